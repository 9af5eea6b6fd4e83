//! A file of JSON, read as the monitor reads one: bounded, and with every name of an object once. What
//! its values mean is for others.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::failure::{Doing, Failure};

/// Longest file in bytes; the monitor's limit too.
const LONGEST: u64 = 1 << 20;

/// Reads the file at `path`; `what` completes "cannot ...".
pub fn read(path: &Path, what: &str) -> Result<Value, Failure> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
        .doing(what)?;
    if bytes.len() as u64 > LONGEST {
        return Err(Failure::new(what, "it is longer than 1 MiB"));
    }
    parse(&bytes).map_err(|error| Failure::new(what, error))
}

/// One value. serde_json's own way takes the last of several members of one name.
pub fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(bytes).map(|Once(value)| value)
}

/// A value in which no object has two members of one name.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader).map(Once)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Once(value)) = values.next_element()? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            // Before its value, so that the place it is said to be at is the name's.
            if object.contains_key(&name) {
                return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
            }
            let Once(value) = members.next_value()?;
            object.insert(name, value);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_read_as_it_stands() {
        let text = r#"{"a":[null,true,-1,18446744073709551615,1.5,"\u00e4\n"],"b":{"a":{}}}"#;
        let usual: Value = serde_json::from_str(text).unwrap();
        assert_eq!(parse(text.as_bytes()).unwrap(), usual);
    }

    #[test]
    fn name_given_twice_is_refused_at_its_place() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":1,"\u0061":2}}]"#] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(
                error.starts_with("duplicate field `a` at line 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_longer_than_the_monitor_takes_is_refused() {
        let folder = crate::testing::Folder::new("json");
        let path = folder.path().join("f");
        let of = |length: usize| {
            std::fs::write(&path, format!("\"{}\"", "x".repeat(length - 2))).unwrap();
            read(&path, "read it")
        };
        assert!(of(1 << 20).is_ok());
        let error = of((1 << 20) + 1).unwrap_err().to_string();
        assert_eq!(error, "cannot read it: it is longer than 1 MiB");
    }
}
