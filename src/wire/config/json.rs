//! JSON into types, with errors that name the member and the reason.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};

/// Why a body or a file is not what was asked for: the reason, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError(String);

/// The most bytes of a reason: it may quote what was read, and goes to logs and clients.
const REASON_MAX: usize = 2048;

/// `reason` without its middle, where that is too long. The end says what was expected, and where.
fn shortened(reason: String) -> String {
    if reason.len() <= REASON_MAX {
        return reason;
    }
    let is_boundary = |at: &usize| reason.is_char_boundary(*at);
    let half = REASON_MAX / 2;
    let begin = (0..=half).rev().find(is_boundary);
    let end = (reason.len().saturating_sub(half)..=reason.len()).find(is_boundary);
    let begin = begin.and_then(|at| reason.get(..at));
    let end = end.and_then(|at| reason.get(at..));
    format!(
        "{}...{}",
        begin.unwrap_or_default(),
        end.unwrap_or_default()
    )
}

impl JsonError {
    /// A reason found after the bytes had been read as JSON.
    pub fn new(reason: impl Into<String>) -> Self {
        JsonError(shortened(reason.into()))
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for JsonError {}

/// Reads exactly one JSON value of type `T`.
///
/// # Errors
/// The reason, line and column as serde_json says them, and the path of the member unless the
/// reason names it already.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    // Of the body itself; inside, [`object`] and its like see to it.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(JsonError::new("invalid type: sequence, expected an object"));
    }
    let mut input = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut input).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner().to_string();
        let member = path.rsplit('.').next().unwrap_or_default();
        if path == "." || path == "?" || reason.contains(&format!("`{member}`")) {
            JsonError::new(reason)
        } else {
            JsonError::new(format!("{reason} (in `{path}`)"))
        }
    })?;
    input
        .end()
        .map_err(|error| JsonError::new(error.to_string()))?;
    Ok(value)
}

/// [`parse`], for what only a program writes: the reason does not come with the path of the member, and the
/// code that reads a large type is half as long.
///
/// # Errors
/// The reason, line and column as serde_json says them.
pub fn parse_written<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    serde_json::from_slice(bytes).map_err(|error| JsonError::new(error.to_string()))
}

/// Reads a struct from an object and from nothing else: serde by itself also takes the members of
/// a struct in a list, without their names. For `deserialize_with`.
///
/// # Errors
/// As the struct's own, and for what is no object.
pub fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Object::deserialize(deserializer).map(|Object(value)| value)
}

/// [`object`], where there may be none otherwise.
///
/// # Errors
/// As [`object`].
pub fn some_object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    object(deserializer).map(Some)
}

/// [`object`], or null.
///
/// # Errors
/// As [`object`].
pub fn optional_object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let read = Option::<Object<T>>::deserialize(deserializer)?;
    Ok(read.map(|Object(value)| value))
}

/// A list of what [`object`] reads.
///
/// # Errors
/// As [`object`].
pub fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let read = Vec::<Object<T>>::deserialize(deserializer)?;
    Ok(read.into_iter().map(|Object(value)| value).collect())
}

struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members))
            }
        }

        deserializer
            .deserialize_map(Members(PhantomData))
            .map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Drive, MachineConfig, VmConfig, parse_file};
    use super::*;

    #[test]
    fn parse_when_wrong_names_member_and_reason() {
        let cases = [
            ("{}", "missing field `vcpu_count` at line 1 column 2"),
            (
                r#"{"vcpu_count":1.0,"mem_size_mib":1}"#,
                "invalid type: floating point `1.0`, expected u8 at line 1 column 17 (in `vcpu_count`)",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":1,"x":1}"#,
                "unknown field `x`, expected one of",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":null}"#,
                "(in `huge_pages`)",
            ),
            (
                r#"{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":1}"#,
                "duplicate field `vcpu_count`",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":1} x"#,
                "trailing characters",
            ),
            ("", "EOF while parsing"),
            (" [1,128]", "invalid type: sequence"),
            ("\u{feff}{}", "expected value"),
        ];
        for (body, reason) in cases {
            let error = parse::<MachineConfig>(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(reason), "{body}: {error}");
        }
    }

    #[test]
    fn reason_when_it_quotes_much_has_its_two_ends() {
        for name in ["x".repeat(50_000), "\u{20ac}".repeat(20_000)] {
            let body = format!(r#"{{"vcpu_count":1,"{name}":1}}"#);
            for error in [
                parse::<MachineConfig>(body.as_bytes()).unwrap_err(),
                parse_written::<MachineConfig>(body.as_bytes()).unwrap_err(),
            ] {
                let text = error.to_string();
                assert!(text.len() <= REASON_MAX + 3, "{}", text.len());
                assert!(text.starts_with("unknown field `"), "{text}");
                assert!(
                    text.contains("...") && text.contains("expected one of"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn parse_when_nested_names_the_whole_path() {
        let body = r#"{"drive_id":"a","path_on_host":"p","is_root_device":false,
            "rate_limiter":{"ops":{"size":-1,"refill_time":1}}}"#;
        let error = parse::<Drive>(body.as_bytes()).unwrap_err();
        assert!(
            error.to_string().ends_with("(in `rate_limiter.ops.size`)"),
            "{error}"
        );
    }

    #[test]
    fn parse_when_a_list_is_in_the_place_of_an_object_is_an_error() {
        let drive = |limiter: &str| {
            format!(
                r#"{{"drive_id":"a","path_on_host":"p","is_root_device":false,"rate_limiter":{limiter}}}"#
            )
        };
        for (limiter, place) in [
            ("[null,null]", "rate_limiter"),
            (r#"{"ops":[1,2,3]}"#, "rate_limiter.ops"),
        ] {
            let error = parse::<Drive>(drive(limiter).as_bytes()).unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains("invalid type: sequence, expected an object")
                    && error.contains(place),
                "{error}"
            );
        }
        for section in [
            r#""boot-source":["k",null,null]"#,
            r#""drives":[["a",null,false,"Unsafe",null,"p",null,null,null]]"#,
            r#""machine-config":[1,128]"#,
            r#""network-interfaces":[["n","t"]]"#,
            r#""cpu-config":[[],[],[]]"#,
            r#""cpu-config":{"msr_modifiers":[["0x1","0bx"]]}"#,
            r#""cpu-config":{"cpuid_modifiers":[["0x1","0x0",0,[]]]}"#,
            r#""logger":["l"]"#,
            r#""metrics":["m"]"#,
            r#""serial":["s"]"#,
        ] {
            let rest = [
                r#""boot-source":{"kernel_image_path":"k"}"#,
                r#""drives":[]"#,
            ]
            .into_iter()
            .filter(|part| !section.starts_with(part.split(':').next().unwrap_or_default()));
            let parts: Vec<&str> = rest.chain([section]).collect();
            let parsed: Result<VmConfig, _> =
                parse_file(format!("{{{}}}", parts.join(",")).as_bytes());
            assert!(parsed.is_err(), "{section}");
        }
    }

    #[test]
    fn parse_when_not_utf8_is_an_error() {
        assert!(parse::<Drive>(b"{\"drive_id\":\"\xff\"}").is_err());
    }
}
