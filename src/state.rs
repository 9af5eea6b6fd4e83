//! What the saved states of all parts share: how bytes are written, why a state is refused, and the
//! test that each goes through.
//!
//! A part is made from its state, a plain struct beside it, and gives it back by `save`. This module
//! knows none of them. It runs on whichever thread encodes or decodes a state, and opens nothing.

use std::fmt;

/// Why a part was not made from its state: no part of that kind can be in such a state, so the file
/// that it is from was damaged or forged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateError {
    part: &'static str,
    why: String,
}

impl StateError {
    /// The state of `part` is wrong; `why` says which value, and what it may be.
    pub fn new(part: &'static str, why: impl Into<String>) -> Self {
        StateError {
            part,
            why: why.into(),
        }
    }
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "The saved state of the {} is not valid: {}",
            self.part, self.why
        )
    }
}

impl std::error::Error for StateError {}

/// Refuses a value that has bits which no register of that name can hold.
///
/// # Errors
/// [`StateError`], naming `what` and the bits.
pub fn check_bits(
    part: &'static str,
    what: &str,
    value: impl Into<u64>,
    writable: impl Into<u64>,
) -> Result<(), StateError> {
    let (value, writable) = (value.into(), writable.into());
    match value & !writable {
        0 => Ok(()),
        bits => Err(StateError::new(
            part,
            format!("{what} is {value:#x}, of which the bits {bits:#x} do not exist"),
        )),
    }
}

/// Refuses a number that is above the greatest one possible.
///
/// # Errors
/// [`StateError`], naming `what` and both numbers.
pub fn check_max(
    part: &'static str,
    what: &str,
    value: usize,
    most: usize,
) -> Result<(), StateError> {
    match value <= most {
        true => Ok(()),
        false => Err(StateError::new(
            part,
            format!("{what}: {value}, but there can be {most} at most"),
        )),
    }
}

/// Bytes as one hexadecimal string: `#[serde(with = "crate::state::hex")]` on a `Vec<u8>` or a
/// `[u8; N]`. Two digits a byte, lower case when written, either when read.
pub mod hex {
    use std::fmt;
    use std::marker::PhantomData;

    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    /// Bytes that a `Vec<u8>` may have: more than any block that KVM gives out.
    pub const BYTES_MAX: usize = 1 << 20;

    const DIGITS: &[u8; 16] = b"0123456789abcdef";

    /// What bytes can be read into.
    pub trait FromBytes: Sized {
        /// How many there must be; `None` if any number up to [`BYTES_MAX`] will do.
        const LENGTH: Option<usize>;

        /// Takes the bytes, which are as many as [`FromBytes::LENGTH`] says.
        fn from_bytes(bytes: Vec<u8>) -> Option<Self>;
    }

    impl FromBytes for Vec<u8> {
        const LENGTH: Option<usize> = None;

        fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
            Some(bytes)
        }
    }

    impl<const N: usize> FromBytes for [u8; N] {
        const LENGTH: Option<usize> = Some(N);

        fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
            bytes.try_into().ok()
        }
    }

    /// Writes `bytes` as digits.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(
        bytes: &impl AsRef<[u8]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let digit = |value: u8| {
            let digit = DIGITS.get(usize::from(value & 0x0f));
            char::from(digit.copied().unwrap_or_default())
        };
        let bytes = bytes.as_ref().iter();
        let text: String = bytes.flat_map(|b| [digit(b >> 4), digit(*b)]).collect();
        serializer.serialize_str(&text)
    }

    /// Reads digits.
    ///
    /// # Errors
    /// When the value is not a string of hexadecimal digits, or not of the right length.
    pub fn deserialize<'de, D: Deserializer<'de>, T: FromBytes>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        deserializer.deserialize_str(Digits(PhantomData))
    }

    struct Digits<T>(PhantomData<T>);

    impl<T: FromBytes> Visitor<'_> for Digits<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match T::LENGTH {
                Some(length) => write!(f, "{length} bytes in hexadecimal digits"),
                None => write!(f, "at most {BYTES_MAX} bytes in hexadecimal digits"),
            }
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            let (pairs, rest) = text.as_bytes().as_chunks::<2>();
            let fits = match T::LENGTH {
                Some(length) => pairs.len() == length,
                None => pairs.len() <= BYTES_MAX,
            };
            if !fits || !rest.is_empty() {
                return Err(E::invalid_length(text.len(), &self));
            }
            let bytes: Option<Vec<u8>> =
                pairs.iter().map(|[high, low]| byte(*high, *low)).collect();
            let value = bytes.and_then(T::from_bytes);
            value.ok_or_else(|| E::custom(format_args!("expected {}", Expected(&self))))
        }
    }

    struct Expected<'a, V>(&'a V);

    impl<'de, V: Visitor<'de>> fmt::Display for Expected<'_, V> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.expecting(f)
        }
    }

    fn byte(high: u8, low: u8) -> Option<u8> {
        let value = |digit: u8| char::from(digit).to_digit(16);
        u8::try_from((value(high)? << 4) | value(low)?).ok()
    }

    #[cfg(test)]
    mod tests {
        use serde::{Deserialize, Serialize};

        use super::*;

        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Blocks {
            #[serde(with = "super")]
            some: Vec<u8>,
            #[serde(with = "super")]
            four: [u8; 4],
        }

        #[test]
        fn bytes_when_written_are_digits_and_are_read_back() {
            let blocks = Blocks {
                some: (0..=255).collect(),
                four: [0xde, 0xad, 0, 9],
            };
            let text = serde_json::to_string(&blocks).unwrap();
            assert!(
                text.starts_with(r#"{"some":"000102030405060708090a0b0c"#),
                "{text}"
            );
            assert!(text.ends_with(r#"fdfeff","four":"dead0009"}"#), "{text}");
            assert_eq!(serde_json::from_str::<Blocks>(&text).unwrap(), blocks);
            let upper = text.replace("dead", "DEaD");
            assert_eq!(serde_json::from_str::<Blocks>(&upper).unwrap(), blocks);
            let none = serde_json::from_str::<Blocks>(r#"{"some":"","four":"00000000"}"#);
            assert!(none.unwrap().some.is_empty());
        }

        #[test]
        fn digits_when_they_are_not_the_bytes_that_are_wanted_are_refused() {
            for (some, four) in [
                (r#""0""#, r#""00000000""#),
                (r#""0g""#, r#""00000000""#),
                (r#""+1""#, r#""00000000""#),
                (r#"" 1""#, r#""00000000""#),
                (r#""é""#, r#""00000000""#),
                ("[0]", r#""00000000""#),
                ("null", r#""00000000""#),
                (r#""""#, r#""000000""#),
                (r#""""#, r#""0000000000""#),
                (r#""""#, r#""0000000é""#),
                (r#""""#, r#""""#),
                (r#""""#, "[0,0,0,0]"),
            ] {
                let text = format!(r#"{{"some":{some},"four":{four}}}"#);
                let error = serde_json::from_str::<Blocks>(&text)
                    .unwrap_err()
                    .to_string();
                assert!(error.contains("hexadecimal digits"), "{text}: {error}");
            }
        }

        #[test]
        fn digits_when_they_are_too_many_are_refused() {
            for (count, fits) in [(BYTES_MAX, true), (BYTES_MAX + 1, false)] {
                let digits = "00".repeat(count);
                let text = format!(r#"{{"some":"{digits}","four":"00000000"}}"#);
                assert_eq!(serde_json::from_str::<Blocks>(&text).is_ok(), fits);
            }
        }
    }
}

/// The test that every part with a state goes through: saved, made from that and saved again, it has
/// the same state; so it has when the state was JSON in between; and a state with a member that is not
/// known is refused.
///
/// `state_round_trip!(part, make)` is for a part with a method `save`, and `make` makes one of a
/// state. `state_round_trip!(part, make, save)` is for those saved in another way.
#[cfg(test)]
macro_rules! state_round_trip {
    ($part:expr, $make:expr $(,)?) => {
        $crate::state::state_round_trip!($part, $make, |part| part.save())
    };
    ($part:expr, $make:expr, $save:expr $(,)?) => {
        $crate::state::testing::round_trip(&$part, $make, $save)
    };
}
#[cfg(test)]
pub(crate) use state_round_trip;

#[cfg(test)]
pub mod testing {
    use std::fmt::Debug;

    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::Value;

    /// See [`state_round_trip`](super::state_round_trip).
    pub fn round_trip<P, S>(part: &P, make: impl Fn(S) -> P, save: impl Fn(&P) -> S)
    where
        S: Clone + Debug + PartialEq + Serialize + DeserializeOwned,
    {
        let saved = save(part);
        assert_eq!(save(&make(saved.clone())), saved, "made of its state");
        let text = serde_json::to_string(&saved).unwrap();
        let read: S = serde_json::from_str(&text).unwrap();
        assert_eq!(read, saved, "read from {text}");
        assert_eq!(save(&make(read)), saved, "made of {text}");

        let mut value: Value = serde_json::from_str(&text).unwrap();
        if let Value::Object(members) = &mut value {
            members.insert("not_known".into(), Value::Null);
            let read = serde_json::from_value::<S>(value);
            assert!(read.is_err(), "an unknown member is taken for none: {text}");
        }
    }

    mod tests {
        use std::cell::Cell;

        use serde::{Deserialize, Serialize};

        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct CountState {
            count: u32,
            #[serde(skip)]
            forgotten: u32,
        }

        struct Count(CountState);

        impl Count {
            fn save(&self) -> CountState {
                self.0.clone()
            }
        }

        const STATE: CountState = CountState {
            count: 7,
            forgotten: 0,
        };

        #[test]
        fn part_when_its_state_holds_all_of_it_passes() {
            state_round_trip!(Count(STATE), Count);
        }

        #[test]
        #[should_panic(expected = "made of its state")]
        fn part_when_it_forgets_its_state_fails() {
            state_round_trip!(Count(STATE), |state| Count(CountState {
                count: 0,
                ..state
            }));
        }

        #[test]
        #[should_panic(expected = "read from")]
        fn part_when_its_text_lacks_a_member_fails() {
            let forgotten = 1;
            state_round_trip!(Count(CountState { forgotten, ..STATE }), Count);
        }

        #[test]
        #[should_panic(expected = "made of {\"count\"")]
        fn part_when_it_takes_only_the_first_state_fails() {
            let made = Cell::new(0);
            state_round_trip!(Count(STATE), |mut state: CountState| {
                state.count += made.replace(1);
                Count(state)
            });
        }

        #[test]
        #[should_panic(expected = "unknown member")]
        fn part_when_its_state_takes_any_member_fails() {
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            struct Loose {
                count: u32,
            }
            state_round_trip!(Loose { count: 7 }, |state| state, Loose::clone);
        }
    }
}
