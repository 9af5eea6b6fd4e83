//! Where a file, or a tap, is to be had: at a path, under a name, or from a descriptor.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// In JSON a string, or `{"fd": N}`. A member `"fd": N` of some objects takes the place of the
/// member that names their (first) source; it is an alias of that member, which is why a bare
/// number is a descriptor too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path, or the name of a tap.
    Named(String),
    /// A descriptor: the Nth that came with the request, or number N of those inherited.
    Fd(u32),
}

impl Source {
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
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Named(name) => f.write_str(name),
            Source::Fd(number) => write!(f, "descriptor {number}"),
        }
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Source::Named(name) => serializer.serialize_str(name),
            Source::Fd(number) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("fd", number)?;
                map.end()
            }
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
            .map(Source::Fd)
            .map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &"a descriptor"))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            fd: u32,
        }
        Object::deserialize(MapAccessDeserializer::new(map)).map(|object| Source::Fd(object.fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json::parse;

    #[test]
    fn source_when_parsed_is_a_name_or_a_descriptor() {
        let good = [
            (r#""/k""#, Source::from("/k")),
            (r#""""#, Source::from("")),
            (r#"{"fd":0}"#, Source::Fd(0)),
            (r#"{ "fd" : 15 }"#, Source::Fd(15)),
            ("7", Source::Fd(7)),
            ("4294967295", Source::Fd(u32::MAX)),
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
            (Source::Fd(3), r#"{"fd":3}"#),
        ] {
            assert_eq!(serde_json::to_string(&source).unwrap(), text);
            assert_eq!(parse::<Source>(text.as_bytes()).unwrap(), source);
        }
        assert_eq!(Source::Fd(3).to_string(), "descriptor 3");
    }

    #[test]
    fn member_fd_when_an_object_has_one_source_stands_for_it() {
        use crate::config::{Drive, DriveUpdate, Logger, Metrics, NetworkInterface, Serial};
        let drive: Drive = parse(br#"{"drive_id":"a","is_root_device":true,"fd":1}"#).unwrap();
        assert_eq!(drive.path_on_host, Source::Fd(1));
        let update: DriveUpdate = parse(br#"{"drive_id":"a","fd":2}"#).unwrap();
        assert_eq!(update.path_on_host, Some(Source::Fd(2)));
        let network: NetworkInterface = parse(br#"{"iface_id":"a","fd":3}"#).unwrap();
        assert_eq!(network.host_dev_name, Source::Fd(3));
        let logger: Logger = parse(br#"{"fd":4}"#).unwrap();
        assert_eq!(logger.log_path, Some(Source::Fd(4)));
        let metrics: Metrics = parse(br#"{"fd":5}"#).unwrap();
        assert_eq!(metrics.metrics_path, Source::Fd(5));
        let serial: Serial = parse(br#"{"fd":6}"#).unwrap();
        assert_eq!(serial.serial_out_path, Some(Source::Fd(6)));
        let both = br#"{"drive_id":"a","is_root_device":true,"fd":1,"path_on_host":"p"}"#;
        let error = parse::<Drive>(both).unwrap_err().to_string();
        assert!(error.contains("duplicate field `path_on_host`"), "{error}");
        let none = br#"{"drive_id":"a","is_root_device":true}"#;
        let error = parse::<Drive>(none).unwrap_err().to_string();
        assert!(error.contains("missing field `path_on_host`"), "{error}");
    }
}
