//! Paths of requests, by the table of all operations ([`OPERATIONS`]). Pure.

use super::http::{Method, Request};
use crate::wire::config::DeviceKind;
use crate::wire::{OPERATIONS, Operation};

/// First segments of Firecracker's paths that stay refused, and what they are about.
const OUT_OF_SCOPE: &[(&str, &str)] = &[
    ("vsock", "a vsock device"),
    ("balloon", "a memory balloon"),
    ("mmds", "a metadata service"),
    ("entropy", "an entropy device"),
    ("pmem", "persistent memory devices"),
    ("hotplug", "hotplug of memory or devices"),
];

/// The place in [`OPERATIONS`] of what `request` asks for.
pub fn operation(request: &Request) -> Option<usize> {
    place(request).map(|(at, ..)| at)
}

/// What `request` asks for, where that is in the table, and the id in its path.
pub(super) fn place(request: &Request) -> Option<(usize, &'static Operation, &str)> {
    OPERATIONS
        .iter()
        .enumerate()
        .filter(|(_, operation)| operation.method == request.method)
        .find_map(|(at, operation)| Some((at, operation, matches(operation.path, &request.path)?)))
}

/// Whether `path` is the one of `pattern`; and the segment in the place of `{id}`, if any.
fn matches<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let mut id = "";
    let mut segments = segments(path);
    for (place, expected) in pattern.trim_start_matches('/').split('/').enumerate() {
        let segment = segments.next().unwrap_or_default();
        if expected == "{id}" {
            id = segment;
        } else if segment != expected || (place > 0 && segment.is_empty()) {
            return None;
        }
    }
    Some(id)
}

/// The segments of a path, as Firecracker counts them: slashes before the first are nothing.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}

/// Why nothing is at the path of `request`.
pub(super) fn unknown(request: &Request) -> String {
    let mut parts = segments(&request.path);
    let first = parts.next().unwrap_or_default();
    let kind = DeviceKind::of_section(first);
    let absent = OUT_OF_SCOPE.iter().find(|(name, _)| *name == first);
    if let Some((name, what)) = absent.filter(|_| kind.is_none()) {
        return format!("/{name} is out of scope: this monitor does not offer {what}.");
    }
    match request.method {
        Method::Delete if kind.is_some() => {
            "Unplugging devices is out of scope: this monitor does not offer hotplug.".into()
        }
        method => format!(
            "Invalid request method and/or path: {} {}.",
            method.name(),
            request.path
        ),
    }
}
