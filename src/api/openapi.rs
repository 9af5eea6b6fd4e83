//! Tests that `resources/openapi.yaml` says what the table of operations and the readers do. It is read
//! by lines:
//! the shape of the document is fixed at its head, so no YAML parser is needed.

use std::collections::{BTreeMap, BTreeSet};

use super::http::{Method, Request};
use super::routes;
use crate::wire::OPERATIONS;

const DOCUMENT: &str = include_str!("../../resources/openapi.yaml");

/// One operation of the document.
#[derive(Debug, Default)]
struct Documented {
    request_schema: Option<String>,
    request_example: Option<String>,
    answers_with_body: bool,
    response_example: Option<String>,
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Lines of the top-level section `name`.
fn section(name: &str) -> impl Iterator<Item = &'static str> {
    DOCUMENT
        .lines()
        .skip_while(move |line| line.trim_end() != format!("{name}:"))
        .skip(1)
        .take_while(|line| line.starts_with(' ') || line.is_empty())
}

fn referred(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("#/components/schemas/")?;
    Some(rest.split('"').next()?.to_string())
}

/// Operations by method and path, with ids written as `{id}`.
fn operations() -> BTreeMap<(String, String), Documented> {
    let mut found: BTreeMap<_, Documented> = BTreeMap::new();
    let (mut path, mut method, mut part) = (String::new(), String::new(), String::new());
    for line in section("paths") {
        let text = line.trim();
        match indent(line) {
            2 => {
                let raw = text.trim_end_matches(':');
                path = match raw.split_once('{') {
                    Some((before, _)) => format!("{before}{{id}}"),
                    None => raw.into(),
                };
            }
            4 => method = text.trim_end_matches(':').to_uppercase(),
            6 => part = text.split(':').next().unwrap().into(),
            _ => {}
        }
        if indent(line) < 4 {
            continue;
        }
        let operation = found.entry((method.clone(), path.clone())).or_default();
        let example = text.strip_prefix("example: ").map(str::to_string);
        match part.as_str() {
            "requestBody" => {
                operation.request_schema = operation.request_schema.take().or(referred(line));
                operation.request_example = operation.request_example.take().or(example);
            }
            "responses" => {
                operation.answers_with_body |= text == "\"200\":";
                operation.response_example = operation.response_example.take().or(example);
            }
            _ => {}
        }
    }
    found
}

/// Names of the members of each schema.
fn schemas() -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut schema, mut in_properties) = (String::new(), false);
    for line in section("components").skip_while(|line| line.trim() != "schemas:") {
        let name = line.trim().split(':').next().unwrap().to_string();
        match indent(line) {
            4 => schema = name,
            6 => in_properties = name == "properties",
            8 if in_properties => {
                found.entry(schema.clone()).or_default().insert(name);
            }
            _ => {}
        }
    }
    found
}

fn request(method: Method, path: &str, body: Option<&str>) -> Request {
    Request {
        method,
        path: path.into(),
        body: body.map(|text| text.as_bytes().to_vec()),
        close: false,
    }
}

#[test]
fn operations_when_compared_are_the_same_in_table_and_document() {
    let documented: BTreeSet<_> = operations().into_keys().collect();
    let offered: BTreeSet<_> = OPERATIONS
        .iter()
        .map(|o| (o.method.name().to_string(), o.path.to_string()))
        .collect();
    assert_eq!(documented, offered);
    assert_eq!(
        offered.len(),
        OPERATIONS.len(),
        "an operation is there twice"
    );
}

#[test]
fn examples_when_sent_are_taken() {
    let documented = operations();
    for operation in OPERATIONS {
        let name = (operation.method.name().to_string(), operation.path.into());
        let found = &documented[&name];
        let body = found.request_example.as_deref();
        assert_eq!(
            body.is_none(),
            operation.method == Method::Get,
            "{name:?} needs an example of its body"
        );
        assert_eq!(
            found.answers_with_body,
            found.response_example.is_some(),
            "{name:?} needs an example of its answer"
        );
        let id = body.map_or(String::new(), |text| {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            ["drive_id", "iface_id"]
                .iter()
                .find_map(|key| value[key].as_str())
                .unwrap_or_default()
                .into()
        });
        let path = operation.path.replace("{id}", &id);
        let action = routes::action(&request(operation.method, &path, body));
        assert!(action.is_ok(), "{name:?}: {action:?}");
    }
}

#[test]
fn members_when_compared_are_the_same_in_types_and_schemas() {
    let schemas = schemas();
    for ((method, path), found) in operations() {
        // `/metrics` takes members that it does not know.
        let Some(schema) = found.request_schema.filter(|name| name != "Metrics") else {
            continue;
        };
        let method = match method.as_str() {
            "PUT" => Method::Put,
            _ => Method::Patch,
        };
        let path = path.replace("{id}", "a");
        let refused =
            routes::action(&request(method, &path, Some(r#"{"nobody knows":1}"#))).unwrap_err();
        // "unknown field `x`, expected one of `a`, `b`": what is known stands there.
        let message = refused.body.unwrap();
        let (_, list) = message
            .split_once("expected ")
            .unwrap_or_else(|| panic!("{path}: {message}"));
        let known: BTreeSet<String> = list
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_string)
            .collect();
        assert_eq!(known, schemas[&schema], "{method:?} {path}");
    }
}
