//! What may be the id of a device, and of an instance.

use std::fmt;

use super::limits::INSTANCE_ID_MAX;

/// Why a text is no id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadId {
    /// The id of a device that has no characters.
    Empty,
    /// The id of a device with other characters than letters, digits and `_`.
    Characters,
    /// The id of an instance that is empty, too long, or has other characters than letters, digits
    /// and hyphens.
    Instance,
}

impl fmt::Display for BadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadId::Empty => f.write_str("The ID cannot be empty."),
            BadId::Characters => f.write_str(
                "API Resource IDs can only contain alphanumeric characters and underscores.",
            ),
            BadId::Instance => write!(
                f,
                "an id has 1 to {INSTANCE_ID_MAX} letters, digits and hyphens"
            ),
        }
    }
}

impl std::error::Error for BadId {}

/// Takes `id` for a drive's or network interface's: letters, digits and `_`.
///
/// # Errors
/// What is wrong with it.
pub fn device(id: &str) -> Result<&str, BadId> {
    if id.is_empty() {
        return Err(BadId::Empty);
    }
    match id.chars().all(|c| c == '_' || c.is_alphanumeric()) {
        true => Ok(id),
        false => Err(BadId::Characters),
    }
}

/// Takes `id` for an instance's (`--id`): 1 to 64 bytes of letters, digits and hyphens.
///
/// # Errors
/// What is wrong with it.
pub fn instance(id: &str) -> Result<&str, BadId> {
    let good = id.chars().all(|c| c == '-' || c.is_alphanumeric());
    match good && (1..=INSTANCE_ID_MAX).contains(&id.len()) {
        true => Ok(id),
        false => Err(BadId::Instance),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_of_a_device_has_letters_digits_and_underscores() {
        for good in ["a", "root", "eth_0", "9", "é"] {
            assert_eq!(device(good), Ok(good));
        }
        assert_eq!(device(""), Err(BadId::Empty));
        for bad in ["a-b", "a b", "a/b", "a.", "\0"] {
            assert_eq!(device(bad), Err(BadId::Characters), "{bad}");
        }
    }

    #[test]
    fn id_of_an_instance_has_letters_digits_and_hyphens() {
        let longest = "a".repeat(INSTANCE_ID_MAX);
        for good in ["a", "vm-1", &longest] {
            assert_eq!(instance(good), Ok(good));
        }
        let long = "a".repeat(INSTANCE_ID_MAX + 1);
        for bad in ["", "a_b", "a b", "../a", &long] {
            assert_eq!(instance(bad), Err(BadId::Instance), "{bad}");
        }
    }
}
