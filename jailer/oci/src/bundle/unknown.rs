//! Fields of config.json that are not known here, so that they can be named.

use serde_json::Value;

/// Adds a note for each field of `given` that `understood` has lost. `understood` is what was read,
/// written again.
pub fn find(given: &Value, understood: &Value, notes: &mut Vec<String>) {
    walk(given, Some(understood), &mut Vec::new(), notes);
}

/// Most notes: a file that is nothing of the kind does not fill a log.
const NOTES_MAX: usize = 32;

fn walk(
    given: &Value,
    understood: Option<&Value>,
    path: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    if notes.len() >= NOTES_MAX {
        return;
    }
    match (given, understood) {
        (given, _) if super::is_empty(given) => {}
        (_, None) => notes.push(format!(
            "{} is left out: it is not known here",
            path.join(".")
        )),
        (Value::Object(given), Some(understood)) => {
            for (name, value) in given {
                path.push(name.clone());
                walk(value, understood.get(name), path, notes);
                path.pop();
            }
        }
        (Value::Array(given), Some(Value::Array(understood)))
            if given.len() == understood.len() =>
        {
            for (index, (given, understood)) in given.iter().zip(understood).enumerate() {
                path.push(index.to_string());
                walk(given, Some(understood), path, notes);
                path.pop();
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_that_were_lost_are_named_from_the_top() {
        let given = json!({ "a": { "b": [{ "c": 1, "d": 2 }], "e": 3 }, "f": {}, "g": null });
        let understood = json!({ "a": { "b": [{ "c": 1 }] } });
        let mut notes = Vec::new();
        find(&given, &understood, &mut notes);
        let names: Vec<_> = notes
            .iter()
            .map(|note| note.split(' ').next().unwrap())
            .collect();
        assert_eq!(names, ["a.b.0.d", "a.e"]);
    }

    #[test]
    fn notes_have_an_end() {
        let given: serde_json::Map<_, _> = (0..1000)
            .map(|index| (index.to_string(), json!(1)))
            .collect();
        let mut notes = Vec::new();
        find(&Value::Object(given), &json!({}), &mut notes);
        assert_eq!(notes.len(), NOTES_MAX);
    }
}
