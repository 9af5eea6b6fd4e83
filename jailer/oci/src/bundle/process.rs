//! The process of config.json, which the jailer reads as it stands but for its environment.

use serde_json::{Map, Value};

use crate::error::{Failure, Step as _};

/// Leaves of each variable its last value, which is the one that counts under other runtimes too: Slurm
/// puts the environment of a job behind that of the bundle. In a guest it would be the first for some
/// programs and the last for others.
pub fn keep_last_values(process: &mut Map<String, Value>) {
    let Some(list) = process.get_mut("env").and_then(Value::as_array_mut) else {
        return;
    };
    let mut known = std::collections::HashSet::new();
    let mut kept = Vec::with_capacity(list.len());
    for variable in std::mem::take(list).into_iter().rev() {
        let name = variable.as_str().and_then(|text| text.split('=').next());
        // What is no text is the jailer's to refuse.
        if name.is_none_or(|name| known.insert(name.to_owned())) {
            kept.push(variable);
        }
    }
    kept.reverse();
    *list = kept;
}

/// Writes the process for the jailer.
pub fn process_text(process: &Map<String, Value>) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(process).step("write the process")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn variable_that_is_given_twice_has_its_last_value() {
        for (given, expected) in [
            (
                json!({ "env": ["PATH=/bin", "A=1", "PATH=/usr/bin", "B", "A=2", "AB=3"] }),
                json!({ "env": ["PATH=/usr/bin", "B", "A=2", "AB=3"] }),
            ),
            (json!({ "env": [7, 7] }), json!({ "env": [7, 7] })),
            (json!({ "env": "A=1" }), json!({ "env": "A=1" })),
            (json!({}), json!({})),
        ] {
            let mut process = given.as_object().unwrap().clone();
            keep_last_values(&mut process);
            assert_eq!(Value::Object(process), expected, "{given}");
        }
    }
}
