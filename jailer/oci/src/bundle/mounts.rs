//! The mounts of config.json: what every guest has anyway, what is in its memory, and what is copied
//! in. Nothing of the host is shared with a guest.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use super::{FieldError, refuse};
use crate::error::{AnyError, Step as _};

/// What is laid into a guest's root before its command runs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// Files and folders of the host, and where they go.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// Folders in memory, with their mount options.
    pub tmpfs: Vec<(PathBuf, Vec<String>)>,
}

/// What every guest has, whatever an engine would mount there.
const OWN: &[&str] = &[
    "/proc",
    "/sys",
    "/dev",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/sys/fs/cgroup",
];

/// Files that engines mount for writing, and write themselves: nothing outside reads what a container
/// writes there.
const OF_ENGINES: &[&str] = &[
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/run/.containerenv",
    "/dev/termination-log",
];
/// The same for all below.
const BELOW_OF_ENGINES: &[&str] = &["/run/secrets"];

/// Options of tmpfs that a guest's kernel understands or that have no meaning in it; others are named.
const TMPFS: &[&str] = &[
    "size",
    "mode",
    "uid",
    "gid",
    "nr_inodes",
    "rw",
    "nosuid",
    "nodev",
    "noexec",
];
const WITHOUT_MEANING: &[&str] = &[
    "rprivate",
    "private",
    "rslave",
    "slave",
    "rshared",
    "shared",
    "strictatime",
    "relatime",
];

/// Sorts the mounts.
pub fn sort(bundle: &Path, mounts: &[Mount], notes: &mut Vec<String>) -> Result<Mounts, AnyError> {
    let mut sorted = Mounts::default();
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts.{index} ({})", mount.destination().display());
        add(bundle, mount, &field, &mut sorted, notes)?;
    }
    Ok(sorted)
}

fn add(
    bundle: &Path,
    mount: &Mount,
    field: &str,
    sorted: &mut Mounts,
    notes: &mut Vec<String>,
) -> Result<(), AnyError> {
    let to = mount.destination();
    if !to.is_absolute()
        || to
            .components()
            .any(|one| one == std::path::Component::ParentDir)
    {
        return Ok(refuse(field, "it must be an absolute path without ..")?);
    }
    let to: PathBuf = to.components().collect();
    if OWN.iter().any(|own| to == Path::new(own)) {
        return Ok(());
    }
    if to.as_os_str().as_encoded_bytes().contains(&b':') {
        let why = "a place in a microVM cannot have a colon in its path; choose another";
        return Ok(refuse(field, why)?);
    }
    let options = mount.options().as_deref().unwrap_or_default();
    let is_bind = options
        .iter()
        .any(|option| option == "bind" || option == "rbind");
    match mount.typ().as_deref() {
        kind if is_bind || kind == Some("bind") => bind(bundle, mount, to, field, sorted, notes),
        Some("tmpfs") => {
            sorted
                .tmpfs
                .push((to, tmpfs_options(options, field, notes)));
            Ok(())
        }
        Some("proc" | "sysfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2") => {
            notes.push(format!(
                "{field} is left out: a guest has its own where it is usual"
            ));
            Ok(())
        }
        other => {
            let kind = other.unwrap_or("none");
            Ok(refuse(
                field,
                format!("a file system of type \"{kind}\" cannot be mounted in a microVM"),
            )?)
        }
    }
}

fn tmpfs_options(options: &[String], field: &str, notes: &mut Vec<String>) -> Vec<String> {
    let mut taken = Vec::new();
    for option in options {
        let name = option.split('=').next().unwrap_or_default();
        if TMPFS.contains(&name) {
            taken.push(option.clone());
        } else if !WITHOUT_MEANING.contains(&name) {
            notes.push(format!("{field}: the mount option {option} is left out"));
        }
    }
    taken
}

fn bind(
    bundle: &Path,
    mount: &Mount,
    to: PathBuf,
    field: &str,
    sorted: &mut Mounts,
    notes: &mut Vec<String>,
) -> Result<(), AnyError> {
    let Some(source) = mount.source() else {
        return Ok(refuse(field, "its source is missing")?);
    };
    let source = bundle.join(source);
    let found = std::fs::metadata(&source).step_on(&format!("use {field}: look at"), &source)?;
    if is_writable(mount) {
        if let Some(why) = needs_no_mount(bundle, &source, &found) {
            notes.push(format!("{field} is left out: {why}"));
            return Ok(());
        }
        if is_scratch(bundle, &source) {
            sorted.tmpfs.push((to, Vec::new()));
            return Ok(());
        }
    }
    let kind = found.file_type();
    if kind.is_socket() || kind.is_fifo() || kind.is_block_device() || kind.is_char_device() {
        let why = format!(
            "{} is a socket, a pipe or a device of the host, which a microVM cannot reach",
            source.display()
        );
        return Ok(refuse(field, why)?);
    }
    if is_writable(mount) && !is_of_engines(&to) {
        return Ok(refuse_writable(field, &source)?);
    }
    sorted.copies.push((source, to));
    Ok(())
}

/// What Slurm mounts in every job, for writing: the files that are the container's standard streams anyway,
/// and the folder in which it makes the bundles of a job's steps.
fn needs_no_mount(bundle: &Path, source: &Path, found: &Metadata) -> Option<&'static str> {
    let is_it = |number: i32| {
        let stream = std::fs::metadata(format!("/proc/self/fd/{number}"));
        stream.is_ok_and(|it| (it.dev(), it.ino()) == (found.dev(), found.ino()))
    };
    if found.is_file() && (0..=2).any(is_it) {
        return Some("the file is a standard stream of the container, which writes to it there");
    }
    let source: PathBuf = source.components().collect();
    let own = bundle.parent().filter(|parent| parent.parent().is_some());
    [Some(bundle), own]
        .contains(&Some(&source))
        .then_some("it is the engine's folder, with the bundle in it")
}

/// An empty folder of the bundle goes with it, so that nothing that is written there is kept: Ray makes one
/// as the place of a container whose root is read-only.
fn is_scratch(bundle: &Path, source: &Path) -> bool {
    let entries = std::fs::read_dir(source);
    source != bundle
        && source.starts_with(bundle)
        && entries.is_ok_and(|mut entries| entries.next().is_none())
}

fn refuse_writable(field: &str, source: &Path) -> Result<(), FieldError> {
    refuse(
        field,
        format!(
            "{} is to be written to by the container, and nothing is shared with a microVM: what it writes would be \
             lost. Give it read-only (podman -v SOURCE:PLACE:ro), which copies it in, and bring results out by \
             standard output",
            source.display()
        ),
    )
}

/// The last of the words counts, as of mount(8).
fn is_writable(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    let said = |option: &String| match option.as_str() {
        "ro" | "rro" => Some(false),
        "rw" | "rrw" => Some(true),
        _ => None,
    };
    options.iter().rev().find_map(said).unwrap_or(true)
}

fn is_of_engines(to: &Path) -> bool {
    OF_ENGINES.iter().any(|one| to == Path::new(one))
        || BELOW_OF_ENGINES.iter().any(|one| to.starts_with(one))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sorted(mounts: Value) -> Result<(Mounts, Vec<String>), String> {
        let mounts: Vec<Mount> = serde_json::from_value(mounts).unwrap();
        let mut notes = Vec::new();
        let sorted = sort(Path::new("/etc"), &mounts, &mut notes);
        sorted
            .map(|mounts| (mounts, notes))
            .map_err(|error| crate::error::message(&*error))
    }

    #[test]
    fn what_every_guest_has_is_not_mounted_again() {
        let (mounts, notes) = sorted(json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev/", "type": "tmpfs", "source": "tmpfs", "options": ["size=65536k"] },
            { "destination": "/dev/shm", "type": "bind", "source": "/nonexistent", "options": ["rw", "bind"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup" },
        ]))
        .unwrap();
        assert_eq!((mounts, notes.len()), (Mounts::default(), 0));
    }

    #[test]
    fn files_of_engines_and_what_is_read_only_is_copied() {
        let (mounts, _) = sorted(json!([
            { "destination": "/etc/hosts", "type": "bind", "source": "/etc/passwd", "options": ["bind", "rprivate"] },
            { "destination": "/run/secrets/a", "type": "bind", "source": "passwd", "options": ["bind"] },
            { "destination": "/data", "source": "/usr", "options": ["rw", "rbind", "ro"] },
        ]))
        .unwrap();
        let copy = |from: &str, to: &str| (PathBuf::from(from), PathBuf::from(to));
        let expected = [
            copy("/etc/passwd", "/etc/hosts"),
            copy("/etc/passwd", "/run/secrets/a"),
            copy("/usr", "/data"),
        ];
        assert_eq!(mounts.copies, expected);
    }

    #[test]
    fn folders_that_an_engine_makes_for_a_bundle_are_not_shared() {
        let top = std::env::temp_dir().join(format!("mayfly-oci-spool-{}", std::process::id()));
        let bundle = top.join("spool/job1");
        std::fs::create_dir_all(bundle.join("work")).unwrap();
        std::fs::create_dir(bundle.join("kept")).unwrap();
        std::fs::write(bundle.join("kept/file"), "").unwrap();
        let sorted = |source: PathBuf| {
            let mount = json!({ "destination": "/d", "type": "none", "source": source, "options": ["bind"] });
            let mount = serde_json::from_value(mount).unwrap();
            let mut notes = Vec::new();
            let mounts = sort(&bundle, &[mount], &mut notes);
            mounts
                .map(|mounts| (mounts, notes))
                .map_err(|error| crate::error::message(&*error))
        };
        for source in [bundle.clone(), top.join("spool/")] {
            let (mounts, notes) = sorted(source).unwrap();
            assert_eq!(mounts, Mounts::default());
            assert!(
                notes.len() == 1 && notes[0].contains("mounts.0 (/d)"),
                "{notes:?}"
            );
        }
        let (mounts, _) = sorted(bundle.join("work")).unwrap();
        assert_eq!(mounts.tmpfs, [("/d".into(), Vec::new())]);
        for source in [bundle.join("kept"), top.clone(), "/".into()] {
            let error = sorted(source).unwrap_err();
            assert!(error.contains(":ro"), "{error}");
        }
        std::fs::remove_dir_all(&top).unwrap();
    }

    #[test]
    fn tmpfs_has_the_options_that_a_guest_understands() {
        let (mounts, notes) = sorted(json!([{
            "destination": "/run", "type": "tmpfs", "options": ["rw", "size=1m", "rprivate", "tmpcopyup"],
        }]))
        .unwrap();
        assert_eq!(
            mounts.tmpfs,
            [("/run".into(), vec!["rw".to_owned(), "size=1m".into()])]
        );
        assert!(
            notes.len() == 1 && notes[0].contains("tmpcopyup"),
            "{notes:?}"
        );
    }

    #[test]
    fn what_would_be_lost_or_cannot_be_reached_is_refused() {
        for (mount, expected) in [
            (
                json!({ "destination": "/d", "type": "bind", "source": "/usr", "options": ["rbind"] }),
                ":ro",
            ),
            (
                json!({ "destination": "/f", "source": "/etc/passwd", "options": ["bind", "ro", "rw"] }),
                ":ro",
            ),
            (
                json!({ "destination": "/n", "source": "/dev/null", "options": ["bind", "ro"] }),
                "device",
            ),
            (
                json!({ "destination": "/x", "source": "/nonexistent", "options": ["bind", "ro"] }),
                "/nonexistent",
            ),
            (
                json!({ "destination": "/x", "options": ["bind", "ro"] }),
                "source",
            ),
            (json!({ "destination": "/o", "type": "overlay" }), "overlay"),
            (json!({ "destination": "/a:/b", "type": "tmpfs" }), "colon"),
            (
                json!({ "destination": "/a:/b", "type": "bind", "source": "/usr", "options": ["ro"] }),
                "colon",
            ),
            (json!({ "destination": "o", "type": "tmpfs" }), "absolute"),
            (
                json!({ "destination": "/a/../b", "type": "tmpfs" }),
                "absolute",
            ),
        ] {
            let error = sorted(json!([mount])).unwrap_err();
            assert!(
                error.contains(expected) && error.contains("mounts.0"),
                "{mount}: {error}"
            );
        }
    }
}
