//! JSON into types, with errors that name the member and the reason.

use std::fmt;

use serde::de::DeserializeOwned;

/// Why a body or a file is not what was asked for: the reason, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError(String);

impl JsonError {
    /// A reason found after the bytes had been read as JSON.
    pub fn new(reason: impl Into<String>) -> Self {
        JsonError(reason.into())
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
    // serde would take the members of a struct in a list, without their names.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(JsonError::new("invalid type: sequence, expected an object"));
    }
    let mut input = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut input).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner().to_string();
        let member = path.rsplit('.').next().unwrap_or_default();
        if path == "." || path == "?" || reason.contains(&format!("`{member}`")) {
            JsonError(reason)
        } else {
            JsonError(format!("{reason} (in `{path}`)"))
        }
    })?;
    input.end().map_err(|error| JsonError(error.to_string()))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Drive, MachineConfig};

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
    fn parse_when_not_utf8_is_an_error() {
        assert!(parse::<Drive>(b"{\"drive_id\":\"\xff\"}").is_err());
    }
}
