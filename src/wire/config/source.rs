//! Where a file, or a tap, comes from: a path, a name, or a descriptor that was passed.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// In JSON a string, or `{"fd": N}`, or `{"fd": N, "name": "root.ext4"}` with the name that messages
/// give it. A member `"fd"` of some objects takes the place of the member that names their (first)
/// source; it is an alias of that member, which is why a bare number is a descriptor too, and why it
/// may hold the object with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Source {
    /// A path, or the name of a tap.
    Named(String),
    /// A descriptor that was passed.
    Fd(PassedFd),
}

/// A descriptor that was passed, and what the user calls what is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PassedFd {
    /// The Nth that came with the request, or number N of those inherited.
    pub fd: u32,
    /// For messages, and for who reads the configuration back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Source {
    /// Descriptor `fd`, without a name.
    pub fn fd(fd: u32) -> Self {
        Source::Fd(PassedFd { fd, name: None })
    }

    /// Descriptor `fd`, which the user knows by `name`.
    pub fn passed(fd: u32, name: impl Into<String>) -> Self {
        let name = Some(name.into());
        Source::Fd(PassedFd { fd, name })
    }

    /// The path or name, if it is one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Source::Named(name) => Some(name),
            Source::Fd(_) => None,
        }
    }
}

impl From<&str> for Source {
    fn from(name: &str) -> Self {
        Source::Named(name.into())
    }
}

impl fmt::Display for Source {
    /// As the user knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Named(name) => f.write_str(name),
            Source::Fd(PassedFd {
                name: Some(name), ..
            }) => f.write_str(name),
            Source::Fd(PassedFd { fd, name: None }) => write!(f, "descriptor {fd}"),
        }
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Source;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or {\"fd\": N}")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Source, E> {
        Ok(Source::Named(name.into()))
    }

    fn visit_string<E: Error>(self, name: String) -> Result<Source, E> {
        Ok(Source::Named(name))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Source, E> {
        u32::try_from(number)
            .map(Source::fd)
            .map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &"a descriptor"))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
        PassedFd::deserialize(MapAccessDeserializer::new(map)).map(Source::Fd)
    }
}

#[cfg(test)]
mod tests {
    use super::super::json::parse;
    use super::*;

    #[test]
    fn source_when_parsed_is_a_name_or_a_descriptor() {
        let good = [
            (r#""/k""#, Source::from("/k")),
            (r#""""#, Source::from("")),
            (r#"{"fd":0}"#, Source::fd(0)),
            (r#"{ "fd" : 15 }"#, Source::fd(15)),
            (r#"{"fd":3,"name":"a b"}"#, Source::passed(3, "a b")),
            (r#"{"name":"/k","fd":3}"#, Source::passed(3, "/k")),
            (r#"{"fd":3,"name":null}"#, Source::fd(3)),
            ("7", Source::fd(7)),
            ("4294967295", Source::fd(u32::MAX)),
        ];
        for (text, expected) in good {
            assert_eq!(parse::<Source>(text.as_bytes()).unwrap(), expected);
        }
        let bad = [
            ("null", "expected a string or {\"fd\": N}"),
            ("true", "expected a string or {\"fd\": N}"),
            ("-1", "invalid type: integer `-1`"),
            ("1.0", "invalid type: floating point"),
            ("4294967296", "expected a descriptor"),
            ("{}", "missing field `fd`"),
            (r#"{"fd":0,"fd":1}"#, "duplicate field `fd`"),
            (r#"{"fd":0,"path":"x"}"#, "unknown field `path`"),
            (r#"{"fd":"0"}"#, "invalid type: string"),
            (r#"{"fd":0,"name":1}"#, "invalid type: integer"),
            (r#"{"name":"x"}"#, "missing field `fd`"),
            (r#"{"fd":-1}"#, "invalid value: integer `-1`"),
        ];
        for (text, reason) in bad {
            let error = parse::<Source>(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn source_when_written_is_read_back() {
        for (source, text) in [
            (Source::from("/a b"), r#""/a b""#),
            (Source::fd(3), r#"{"fd":3}"#),
            (
                Source::passed(3, "root.ext4"),
                r#"{"fd":3,"name":"root.ext4"}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&source).unwrap(), text);
            assert_eq!(parse::<Source>(text.as_bytes()).unwrap(), source);
        }
        assert_eq!(Source::fd(3).to_string(), "descriptor 3");
        assert_eq!(Source::passed(3, "root.ext4").to_string(), "root.ext4");
    }

    #[test]
    fn member_fd_when_an_object_has_one_source_stands_for_it() {
        use super::super::{Drive, DriveUpdate, Logger, Metrics, NetworkInterface, Serial};
        let drive: Drive = parse(br#"{"drive_id":"a","is_root_device":true,"fd":1}"#).unwrap();
        assert_eq!(drive.path_on_host, Source::fd(1));
        let named = br#"{"drive_id":"a","is_root_device":true,"fd":{"fd":1,"name":"root.ext4"}}"#;
        let drive: Drive = parse(named).unwrap();
        assert_eq!(drive.path_on_host, Source::passed(1, "root.ext4"));
        let update: DriveUpdate = parse(br#"{"drive_id":"a","fd":2}"#).unwrap();
        assert_eq!(update.path_on_host, Some(Source::fd(2)));
        let network: NetworkInterface = parse(br#"{"iface_id":"a","fd":3}"#).unwrap();
        assert_eq!(network.host_dev_name, Source::fd(3));
        let logger: Logger = parse(br#"{"fd":4}"#).unwrap();
        assert_eq!(logger.log_path, Some(Source::fd(4)));
        let metrics: Metrics = parse(br#"{"fd":5}"#).unwrap();
        assert_eq!(metrics.metrics_path, Source::fd(5));
        let serial: Serial = parse(br#"{"fd":6}"#).unwrap();
        assert_eq!(serial.serial_out_path, Some(Source::fd(6)));
        let both = br#"{"drive_id":"a","is_root_device":true,"fd":1,"path_on_host":"p"}"#;
        let error = parse::<Drive>(both).unwrap_err().to_string();
        assert!(error.contains("duplicate field `path_on_host`"), "{error}");
        let none = br#"{"drive_id":"a","is_root_device":true}"#;
        let error = parse::<Drive>(none).unwrap_err().to_string();
        assert!(error.contains("missing field `path_on_host`"), "{error}");
    }
}
