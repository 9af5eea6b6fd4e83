//! How much a line of the log matters.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Nothing at all is logged.
    Off,
    /// Something failed.
    Error,
    /// Something is odd and goes on.
    Warn,
    /// What a person running it wants to know.
    Info,
    /// For those who build it.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    /// The level of that name, in any case.
    pub fn parse(name: &str) -> Option<Level> {
        [
            ("off", Level::Off),
            ("error", Level::Error),
            ("warning", Level::Warn),
            ("warn", Level::Warn),
            ("info", Level::Info),
            ("debug", Level::Debug),
            ("trace", Level::Trace),
        ]
        .into_iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, level)| level)
    }

    /// The name that lines and answers have.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Off => "OFF",
            Level::Error => "ERROR",
            Level::Warn => "WARN",
            Level::Info => "INFO",
            Level::Debug => "DEBUG",
            Level::Trace => "TRACE",
        }
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Level::parse(&name).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "`{name}` is no log level: it takes Off, Error, Warning, Info, Debug or Trace"
            ))
        })
    }
}

impl Serialize for Level {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_level_is_read_in_any_case() {
        for (name, level) in [
            ("Off", Level::Off),
            ("WARNING", Level::Warn),
            ("tRaCe", Level::Trace),
        ] {
            assert_eq!(Level::parse(name), Some(level));
        }
        assert_eq!(Level::parse("loud"), None);
        let written = serde_json::to_string(&Level::Warn).unwrap();
        assert_eq!(
            serde_json::from_str::<Level>(&written).unwrap(),
            Level::Warn
        );
    }
}
