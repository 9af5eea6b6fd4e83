//! Why a command line is refused.

use std::fmt;

use crate::exit;

/// Why a command line is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArgsError {
    /// Not an option of ours.
    Unexpected(String),
    /// An option without the value it takes.
    NoValue(&'static str),
    /// An option given twice.
    Twice(&'static str),
    /// An option that needs another.
    Needs(&'static str, &'static str),
    /// An option given beside another that says the same.
    Beside(&'static str, &'static str),
    /// A value that the option does not take.
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it takes.
        takes: &'static str,
    },
    /// A log level that is none.
    Level(String),
    /// An option of Firecracker's that has no meaning here.
    NotOffered(&'static str, &'static str),
}

impl ArgsError {
    /// The exit code that tells of it.
    pub fn exit_code(&self) -> i32 {
        match self {
            ArgsError::Level(_) => exit::BAD_LOG_LEVEL,
            _ => exit::BAD_ARGUMENTS,
        }
    }
}

impl fmt::Display for ArgsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArgsError::Unexpected(found) => write!(
                f,
                "Arguments parsing error: `{}` is not an option of this program",
                found.escape_debug()
            )?,
            ArgsError::NoValue(option) => {
                write!(f, "Arguments parsing error: --{option} needs a value")?;
            }
            ArgsError::Twice(option) => {
                write!(f, "Arguments parsing error: --{option} is given twice")?;
            }
            ArgsError::Needs(one, other) => {
                write!(f, "Arguments parsing error: --{one} needs --{other}")?;
            }
            ArgsError::Beside(one, other) => write!(
                f,
                "Arguments parsing error: --{one} and --{other} exclude each other"
            )?,
            ArgsError::Value {
                option,
                value,
                takes,
            } => write!(
                f,
                "Arguments parsing error: --{option} takes {takes}, not `{}`",
                value.escape_debug()
            )?,
            ArgsError::Level(level) => write!(
                f,
                "Invalid value for logger level: `{}` is none of Off, Error, Warning, Info, \
                 Debug, Trace",
                level.escape_debug()
            )?,
            ArgsError::NotOffered(option, why) => {
                write!(
                    f,
                    "Arguments parsing error: --{option} is not offered: {why}"
                )?;
            }
        }
        f.write_str(". For more information try --help.")
    }
}

impl std::error::Error for ArgsError {}
