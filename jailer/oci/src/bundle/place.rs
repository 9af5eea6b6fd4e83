//! Where a container's control groups are to be, as `linux.cgroupsPath` says it: a path below the mount
//! points, or, by two colons, a scope that systemd is to make. Pure.

use std::path::{Component, Path, PathBuf};

use super::{FieldError, refuse};

/// The field, for messages.
pub const FIELD: &str = "linux.cgroupsPath";
/// The longest name of a unit.
const UNIT_MAX: usize = 255;

/// Where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Below the mount points of the control groups.
    Below(PathBuf),
    /// Where systemd puts it.
    Scope(Scope),
}

/// A scope of systemd's, which is a unit of processes that it has not started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The slice that it is to be in, if one is named.
    pub slice: Option<String>,
    /// Its name, with `.scope`.
    pub unit: String,
}

/// The slice at the root.
const ROOT: &str = "-.slice";

/// A slice's folder: dashes in its name say in which others it is (`a-b.slice` is in `a.slice`).
pub fn slice_path(slice: &str) -> PathBuf {
    if slice == ROOT {
        return PathBuf::new();
    }
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let dashes = name.match_indices('-').map(|(at, _)| at);
    let ends = dashes.chain([name.len()]);
    ends.filter_map(|end| Some(format!("{}.slice", name.get(..end)?)))
        .collect()
}

/// Understands the field.
pub fn parse(path: &Path) -> Result<Place, FieldError> {
    let text = path.to_string_lossy();
    match text.contains(':') {
        true => scope(&text).map(Place::Scope),
        false => below(path).map(Place::Below),
    }
}

/// A path that leads down only.
fn below(path: &Path) -> Result<PathBuf, FieldError> {
    let below: PathBuf = path.strip_prefix("/").unwrap_or(path).into();
    let is_plain = below
        .components()
        .all(|one| matches!(one, Component::Normal(_)));
    match is_plain && !below.as_os_str().is_empty() {
        true => Ok(below),
        false => refuse(
            FIELD,
            format!(
                "\"{}\" is not a path that leads down from the root of the control groups",
                path.display()
            ),
        ),
    }
}

/// `SLICE:PREFIX:NAME`.
fn scope(text: &str) -> Result<Scope, FieldError> {
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return refuse(FIELD, format!("\"{text}\" is not SLICE:PREFIX:NAME"));
    };
    let slice = match slice {
        "" => None,
        "-" | ROOT => Some(ROOT),
        _ if is_slice(slice) => Some(slice),
        _ => return refuse(FIELD, format!("\"{slice}\" is not the name of a slice")),
    };
    let unit = match prefix {
        "" => format!("{name}.scope"),
        _ => format!("{prefix}-{name}.scope"),
    };
    match !name.is_empty() && unit.len() <= UNIT_MAX && unit.bytes().all(is_of_a_name) {
        true => Ok(Scope {
            slice: slice.map(str::to_owned),
            unit,
        }),
        false => refuse(FIELD, format!("\"{unit}\" cannot be the name of a unit")),
    }
}

fn is_slice(text: &str) -> bool {
    let name = text.strip_suffix(".slice").unwrap_or_default();
    // No part between dashes is empty.
    text.len() <= UNIT_MAX
        && name.bytes().all(is_of_a_name)
        && name.split('-').all(|it| !it.is_empty())
}

fn is_of_a_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_with_colons_is_a_scope_in_a_slice() {
        for (text, slice, unit, folder) in [
            (
                "machine.slice:libpod:c1",
                Some("machine.slice"),
                "libpod-c1.scope",
                "machine.slice",
            ),
            (":runc:c.1", None, "runc-c.1.scope", ""),
            ("-:cri:c1", Some(ROOT), "cri-c1.scope", ""),
            (
                "a-b-c_d.slice::c1",
                Some("a-b-c_d.slice"),
                "c1.scope",
                "a.slice/a-b.slice/a-b-c_d.slice",
            ),
        ] {
            let Place::Scope(scope) = parse(Path::new(text)).unwrap() else {
                panic!("{text}");
            };
            assert_eq!((scope.slice.as_deref(), &*scope.unit), (slice, unit));
            let path = scope.slice.as_deref().map(slice_path).unwrap_or_default();
            assert_eq!(path, Path::new(folder), "{text}");
        }
        assert_eq!(
            parse(Path::new("/a/b")).unwrap(),
            Place::Below("a/b".into())
        );
    }

    #[test]
    fn what_is_neither_a_path_down_nor_a_scope_is_refused() {
        let long = format!("a.slice:p:{}", "x".repeat(UNIT_MAX));
        for text in [
            "",
            "/",
            "a/../b",
            "a:b",
            "a.slice:b:c:d",
            "a:b:c",
            "a--b.slice:b:c",
            "-a.slice:b:c",
            "a-.slice:b:c",
            ".slice:b:c",
            "a.slice/b.slice:b:c",
            "a.slice:b:",
            "a.slice:../b:c",
            "a.slice:b:c/d",
            "a.slice:b:c d",
            &long,
        ] {
            let error = parse(Path::new(text)).unwrap_err();
            assert_eq!(error.field, FIELD, "{text}");
        }
    }
}
