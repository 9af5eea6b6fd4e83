//! The process of config.json, which the jailer reads as it stands but for its environment.

use std::collections::BTreeSet;

use oci_spec::runtime::Capability;
use serde::Deserialize as _;
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

/// Names the capabilities that Linux does not have; the jailer leaves them out.
pub fn note_unknown_capabilities(process: &Map<String, Value>, notes: &mut Vec<String>) {
    let sets = process.get("capabilities").and_then(Value::as_object);
    let sets = sets.into_iter().flat_map(Map::values);
    let names = sets.filter_map(Value::as_array).flatten();
    let is_unknown = |name: &&Value| {
        let text = name.as_str().unwrap_or_default();
        !text.starts_with("CAP_") || Capability::deserialize(*name).is_err()
    };
    let unknown: BTreeSet<String> = names.filter(is_unknown).map(Value::to_string).collect();
    let note = |name| format!("process.capabilities: {name} is left out: Linux does not have it");
    notes.extend(unknown.into_iter().map(note));
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
    fn capability_that_linux_does_not_have_is_named_once() {
        let sets = json!({
            "bounding": ["CAP_KILL", "CAP_TEST", "CAP_CHECKPOINT_RESTORE", "KILL"],
            "effective": ["CAP_TEST", 7], "permitted": null,
        });
        let process = json!({ "capabilities": sets });
        let mut notes = Vec::new();
        note_unknown_capabilities(process.as_object().unwrap(), &mut notes);
        let names: Vec<_> = notes.iter().map(|note| note.split(' ').nth(1)).collect();
        assert_eq!(names, [Some("\"CAP_TEST\""), Some("\"KILL\""), Some("7")]);
        for process in [json!({}), json!({ "capabilities": null })] {
            let mut notes = Vec::new();
            note_unknown_capabilities(process.as_object().unwrap(), &mut notes);
            assert!(notes.is_empty());
        }
    }

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
