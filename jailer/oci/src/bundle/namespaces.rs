//! Namespaces of others that config.json names. A guest is in none of the host's but for the network's, whose
//! interface it takes over, and which must not be the one that this program is in. The others are looked at, as the
//! specification wants, and left out.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags};

use super::refuse;
use crate::error::{AnyError, Step as _};

/// The type of the file system that namespaces are files of.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Makes sure that each is there, and of the type that is said of it as far as its path tells that.
pub fn check(linux: &Linux, notes: &mut Vec<String>) -> Result<(), AnyError> {
    let list = linux.namespaces().as_deref().unwrap_or_default();
    for (index, namespace) in list.iter().enumerate() {
        let path = namespace.path().as_ref();
        let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
            continue;
        };
        let field = format!("linux.namespaces.{index} ({})", path.display());
        let Some(kind) = name(namespace.typ()) else {
            // Another container's process is in it, too, unless a hook made a network for it.
            if is_same(path, Path::new("/proc/self/ns/net")) {
                let why = "it is the host's network, which cannot be given to a microVM";
                return Ok(refuse(field, why)?);
            }
            continue;
        };
        if !is_namespace(path)? {
            return Ok(refuse(field, "it is not a namespace")?);
        }
        if kind_of(path).is_some_and(|found| found != kind) {
            return Ok(refuse(field, format!("it is not of the type {kind}"))?);
        }
        notes.push(format!("{field} is left out: a guest has its own"));
    }
    Ok(())
}

/// Whether both are one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let number = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    number(one).is_some_and(|found| number(other) == Some(found))
}

/// What the links of a process call it; that of the network is the jailer's to look at.
fn name(kind: LinuxNamespaceType) -> Option<&'static str> {
    Some(match kind {
        LinuxNamespaceType::Network => return None,
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Time => "time",
    })
}

fn is_namespace(path: &Path) -> Result<bool, AnyError> {
    // It may be anything: it is not opened for more than a look.
    let file = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let file = file.step_on("use the namespace", path)?;
    let found = rustix::fs::fstatfs(&file).step_on("use the namespace", path)?;
    Ok(u64::try_from(found.f_type).ok() == Some(NSFS_MAGIC))
}

/// The links of a process name the type: `ipc:[4026531839]`. A mounted one has no such name.
fn kind_of(path: &Path) -> Option<String> {
    let link = std::fs::read_link(path).ok()?;
    let (kind, _) = link.to_str()?.split_once(":[")?;
    Some(kind.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(kind: &str, path: &str) -> Result<Vec<String>, String> {
        let linux = json!({ "namespaces": [{ "type": kind, "path": path }] });
        let linux = serde_json::from_value(linux).unwrap();
        let mut notes = Vec::new();
        match check(&linux, &mut notes) {
            Ok(()) => Ok(notes),
            Err(error) => Err(crate::error::message(&*error)),
        }
    }

    #[test]
    fn namespace_of_another_has_to_be_one_and_is_named() {
        for (kind, path) in [
            ("ipc", "/proc/self/ns/ipc"),
            ("mount", "/proc/self/ns/mnt"),
            ("pid", "/proc/self/ns/pid_for_children"),
        ] {
            let notes = checked(kind, path).unwrap();
            assert!(notes.len() == 1 && notes[0].contains(path), "{notes:?}");
        }
        assert_eq!(checked("network", "/nonexistent"), Ok(vec![]));
        assert_eq!(checked("uts", ""), Ok(vec![]));
        for (kind, path, why) in [
            ("ipc", "/proc/self/ns/uts", "not of the type ipc"),
            ("pid", "/proc/self/status", "not a namespace"),
            ("uts", "/nonexistent", "No such file"),
            ("network", "/proc/self/ns/net", "the host's network"),
            ("network", "/proc/thread-self/ns/net", "the host's network"),
        ] {
            let text = checked(kind, path).unwrap_err();
            assert!(text.contains(why) && text.contains(path), "{text}");
        }
    }
}
