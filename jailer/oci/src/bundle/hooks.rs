//! The hooks of config.json: those that a microVM can have, checked.

use oci_spec::runtime::{Hook as Given, Spec};

use super::{FieldError, is_empty, refuse};
use crate::hooks::{Hook, Hooks};

/// Most hooks of one kind.
const HOOKS_MAX: usize = 64;

/// Takes the hooks of `spec`.
pub fn take(spec: &Spec) -> Result<Hooks, FieldError> {
    let Some(given) = spec.hooks() else {
        return Ok(Hooks::default());
    };
    // By their names: prestart, which engines use, is deprecated in the type.
    let lists = serde_json::to_value(given).unwrap_or_default();
    for name in ["createContainer", "startContainer"] {
        if lists.get(name).is_some_and(|list| !is_empty(list)) {
            return refuse(
                format!("hooks.{name}"),
                "such hooks run in the container's own namespaces, which are those of the guest's kernel; give \
                 createRuntime or poststart hooks, which run on the host",
            );
        }
    }
    let list = |name: &str| {
        let list = lists.get(name).cloned().unwrap_or_default();
        let list: Option<Vec<Given>> = serde_json::from_value(list).unwrap_or_default();
        let list = list.unwrap_or_default();
        if list.len() > HOOKS_MAX {
            let why = format!("there are {}, and {HOOKS_MAX} are the most", list.len());
            return refuse(format!("hooks.{name}"), why);
        }
        let list = list.into_iter().enumerate();
        list.map(|(index, hook)| one(&format!("hooks.{name}.{index}"), &hook))
            .collect()
    };
    Ok(Hooks {
        prestart: list("prestart")?,
        create_runtime: list("createRuntime")?,
        poststart: list("poststart")?,
        poststop: list("poststop")?,
    })
}

fn one(field: &str, hook: &Given) -> Result<Hook, FieldError> {
    if hook.path().is_relative() {
        let why = format!("\"{}\" is not an absolute path", hook.path().display());
        return refuse(format!("{field}.path"), why);
    }
    let timeout = match hook.timeout().map(u64::try_from) {
        None => None,
        Some(Ok(seconds @ 1..)) => Some(seconds),
        Some(_) => return refuse(format!("{field}.timeout"), "it must be above 0 seconds"),
    };
    let variable = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => refuse(
            format!("{field}.env"),
            format!("\"{text}\" is not NAME=VALUE"),
        ),
    };
    let env = hook.env().iter().flatten().map(variable);
    Ok(Hook {
        path: hook.path().clone(),
        args: hook.args().clone().unwrap_or_default(),
        env: env.collect::<Result<_, _>>()?,
        timeout,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn taken(hooks: Value) -> Result<Hooks, String> {
        let spec = json!({ "ociVersion": "1.0.2", "hooks": hooks });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        take(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn hooks_of_the_host_are_taken_as_they_are_given() {
        assert_eq!(taken(json!({})), Ok(Hooks::default()));
        let empty = json!({ "createContainer": [], "startContainer": [], "prestart": [] });
        assert_eq!(taken(empty), Ok(Hooks::default()));
        let plain = |path: &str| Hook {
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            timeout: None,
        };
        let given = json!({
            "prestart": [{ "path": "/a" }, { "path": "/b" }],
            "createRuntime": [{ "path": "/c", "args": ["c", "--x"], "env": ["A=1=2", "B="], "timeout": 3 }],
            "poststart": [{ "path": "/d" }],
            "poststop": [{ "path": "/e" }],
        });
        let create = Hook {
            args: vec!["c".into(), "--x".into()],
            env: vec![("A".into(), "1=2".into()), ("B".into(), String::new())],
            timeout: Some(3),
            ..plain("/c")
        };
        let expected = Hooks {
            prestart: vec![plain("/a"), plain("/b")],
            create_runtime: vec![create],
            poststart: vec![plain("/d")],
            poststop: vec![plain("/e")],
        };
        assert_eq!(taken(given), Ok(expected));
    }

    #[test]
    fn hooks_that_cannot_be_run_are_refused_by_their_name() {
        let hook = json!({ "path": "/bin/true" });
        let with = |field: &str, value: Value| {
            let mut hook = hook.clone();
            hook[field] = value;
            json!({ "poststop": [hook] })
        };
        for (hooks, expected) in [
            (
                json!({ "createContainer": [hook] }),
                "hooks.createContainer: ",
            ),
            (
                json!({ "startContainer": [hook] }),
                "hooks.startContainer: ",
            ),
            (
                json!({ "prestart": vec![hook.clone(); 65] }),
                "hooks.prestart: there are 65",
            ),
            (with("path", json!("bin/true")), "hooks.poststop.0.path: "),
            (with("timeout", json!(0)), "hooks.poststop.0.timeout: "),
            (with("timeout", json!(-1)), "hooks.poststop.0.timeout: "),
            (with("env", json!(["A"])), "hooks.poststop.0.env: \"A\""),
            (with("env", json!(["=A"])), "hooks.poststop.0.env: \"=A\""),
        ] {
            let error = taken(hooks).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
