//! The state folder: one folder for each container, with what the other commands have to know.
//!
//! ```text
//!   ROOT/ID/state.json   what was made (a Record), written aside and renamed
//!   ROOT/ID/process.json the process, for the jailer
//!   ROOT/ID/exit.json    the jailer's report of how it ended
//!   ROOT/ID/run/ID.sock  the jailer's socket
//! ```
//!
//! - Whether a container runs is never read here: that is asked of its process. The sandbox of a pod has a record
//!   alone, and runs from its `start` until its process ends.
//! - A command that changes a container holds a lock on its folder, which the kernel takes back when the
//!   command is killed. What was to be made stands in the record before it is made, so that `delete
//!   --force` finds what a `create` that was killed has left.

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{AnyError, Step as _};
use crate::hooks::Hooks;
use crate::input::{self, InputError};
use crate::process::Known;

const RECORD: &str = "state.json";
/// How long it may be: the annotations of config.json are in it.
const RECORD_MAX: u64 = 64 << 20;
/// How long a command waits for another that changes the same container.
const PATIENCE: Duration = Duration::from_secs(30);

/// A container is there, or is not.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    // Engines look for these words.
    #[error("container does not exist")]
    Missing,
    #[error("cannot create the container {0}: container with given ID already exists")]
    Exists(String),
    #[error("cannot use the container {0}: another command has been changing it for 30 seconds")]
    Busy(String),
    #[error(
        "cannot use the state folder {0}: it is not this user's alone; remove it, or give another with --root"
    )]
    NotOwn(PathBuf),
}

/// What was made for a container, or is to be.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// When it was created, as RFC 3339 has it.
    pub created: String,
    /// Of config.json.
    pub annotations: HashMap<String, String>,
    /// Folders of its control groups, in every hierarchy.
    pub groups: Vec<PathBuf>,
    /// Groups above those that were missing before.
    pub above: Vec<PathBuf>,
    /// No other's processes were in its groups when they were made: what is in them is its own.
    #[serde(default)]
    pub has_groups: bool,
    /// The unit that systemd makes its groups for.
    #[serde(default)]
    pub scope: Option<String>,
    /// The user of its monitor, where root runs this.
    pub uid: Option<u32>,
    /// Its hooks: config.json may be another one by now.
    #[serde(default)]
    pub hooks: Hooks,
    /// The process that stands for it.
    pub process: Option<Known>,
    /// Its guest was ready.
    #[serde(default)]
    pub is_made: bool,
    /// Set when it is the sandbox of a pod, and made.
    #[serde(default)]
    pub sandbox: Option<Sandbox>,
}

/// How far the sandbox of a pod is. It has no guest that could be asked.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    Created,
    Started,
}

/// A container's folder, with its lock.
#[derive(Debug)]
pub struct Held {
    path: PathBuf,
    /// What is known of it.
    pub record: Record,
    _lock: File,
}

/// Where the folder of `id` is.
pub fn folder(root: &Path, id: &str) -> PathBuf {
    root.join(id)
}

/// Reads a container's record, which another command may be about to change.
pub fn read(root: &Path, id: &str) -> Result<Record, AnyError> {
    check_root(root)?;
    read_in(&folder(root, id))
}

fn read_in(folder: &Path) -> Result<Record, AnyError> {
    let path = folder.join(RECORD);
    match input::read(&path, RECORD_MAX) {
        Ok(text) => Ok(serde_json::from_slice(&text).step_on("understand", &path)?),
        Err(InputError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(StateError::Missing.into())
        }
        Err(error) => Ok(Err(error).step_on("read", &path)?),
    }
}

/// Makes the folder for a new container.
pub fn create(root: &Path, record: Record) -> Result<Held, AnyError> {
    make_root(root)?;
    let path = folder(root, &record.id);
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(StateError::Exists(record.id).into());
        }
        made => made.step_on("make the folder", &path)?,
    }
    let held = hold_new(&path, record);
    if held.is_err() {
        let _ = std::fs::remove_dir(&path);
    }
    held
}

fn hold_new(path: &Path, record: Record) -> Result<Held, AnyError> {
    let lock = File::open(path).step_on("open", path)?;
    // It has no record yet: nothing but a delete takes hold of it before this does.
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).step_on("lock", path)?;
    let held = Held {
        path: path.to_owned(),
        record,
        _lock: lock,
    };
    held.write()?;
    Ok(held)
}

/// Takes hold of a container.
pub fn hold(root: &Path, id: &str) -> Result<Held, AnyError> {
    check_root(root)?;
    let path = folder(root, id);
    let lock = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(StateError::Missing.into());
        }
        opened => opened.step_on("open", &path)?,
    };
    let until = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5))
            }
            Err(Errno::WOULDBLOCK) => return Err(StateError::Busy(id.to_owned()).into()),
            Err(error) => return Ok(Err(error).step_on("lock", &path)?),
        }
    }
    // It may have been removed meanwhile, and made anew.
    let is_same = |it: &std::fs::Metadata| lock.metadata().is_ok_and(|own| own.ino() == it.ino());
    if !std::fs::metadata(&path).is_ok_and(|it| is_same(&it)) {
        return Err(StateError::Missing.into());
    }
    let record = match read_in(&path) {
        // Its maker was killed at once.
        Err(error) if error.downcast_ref::<StateError>().is_some() => Record {
            id: id.to_owned(),
            ..Record::default()
        },
        other => other?,
    };
    Ok(Held {
        path,
        record,
        _lock: lock,
    })
}

impl Held {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what is known now.
    pub fn write(&self) -> Result<(), AnyError> {
        let text = serde_json::to_vec(&self.record).step("write the state")?;
        self.write_file(RECORD, &text)
    }

    /// Writes a file of the folder, for this user alone.
    pub fn write_file(&self, name: &str, text: &[u8]) -> Result<(), AnyError> {
        Ok(replace(&self.path.join(name), text, 0o600)?)
    }

    /// Removes the folder.
    pub fn remove(self) -> Result<(), AnyError> {
        // The socket may go at the same time: its keeper removes it.
        for _ in 0..8 {
            match std::fs::remove_dir_all(&self.path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => continue,
                _ => return Ok(()),
            }
        }
        let removed = std::fs::remove_dir_all(&self.path);
        Ok(removed.step_on("remove", &self.path)?)
    }
}

/// What is to be replaced is not a file.
#[derive(Debug, thiserror::Error)]
#[error("it is there and is not a regular file; remove it, or name another")]
struct NotAFile;

/// Writes a file in place of another, so that a reader sees one of both. What is not a file is left as it is, and no
/// link is followed: in a folder of others it may lead anywhere.
pub fn replace(path: &Path, text: &[u8], mode: u32) -> Result<(), crate::error::Failure> {
    let is_other = std::fs::symlink_metadata(path).is_ok_and(|it| !it.is_file());
    if is_other {
        return Err(NotAFile).step_on("write", path);
    }
    // It has nothing of the name, which may be as long as one can be.
    let aside = path.with_file_name(format!(".mayfly-oci-{}", std::process::id()));
    // What a process of the same number has left.
    let _ = std::fs::remove_file(&aside);
    let written = || {
        let mut options = File::options();
        options.write(true).create_new(true).mode(mode);
        options.open(&aside)?.write_all(text)?;
        std::fs::rename(&aside, path)
    };
    let written = written();
    if written.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    written.step_on("write", path)
}

/// Makes the folder of all containers, and makes sure that it is this user's alone.
fn make_root(root: &Path) -> Result<(), AnyError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(root);
    made.step_on("make the state folder", root)?;
    check_root(root)
}

/// A record says which processes and control groups go with its container: root takes no other user's word
/// for that.
fn check_root(root: &Path) -> Result<(), AnyError> {
    let found = match std::fs::metadata(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(StateError::Missing.into());
        }
        found => found.step_on("look at", root)?,
    };
    let is_own = found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0;
    match is_own {
        true => Ok(()),
        false => Err(StateError::NotOwn(root.to_owned()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Root(PathBuf);

    impl Root {
        fn new(test: &str) -> Root {
            let path = std::env::temp_dir()
                .join(format!("mayfly-oci-state-{test}-{}", std::process::id()));
            Root(path)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn state_folder_of_another_user_is_not_believed() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let root = Root::new("owner");
        drop(create(&root.0, record("c1")).unwrap());
        std::os::unix::fs::chown(&root.0, Some(65534), None).unwrap();
        let error = read(&root.0, "c1").unwrap_err();
        assert!(
            error.to_string().contains("not this user's alone"),
            "{error}"
        );
        let error = hold(&root.0, "c1").unwrap_err();
        assert!(
            error.to_string().contains("not this user's alone"),
            "{error}"
        );
    }

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            uid: Some(7),
            ..Record::default()
        }
    }

    fn is_missing(error: &AnyError) -> bool {
        matches!(error.downcast_ref(), Some(StateError::Missing))
    }

    #[test]
    fn container_is_there_from_create_to_remove() {
        let root = Root::new("life");
        assert!(is_missing(&read(&root.0, "a").unwrap_err()));
        let held = create(&root.0, record("a")).unwrap();
        assert_eq!(read(&root.0, "a").unwrap().uid, Some(7));
        assert!(
            create(&root.0, record("a"))
                .unwrap_err()
                .to_string()
                .contains("already exists")
        );
        held.remove().unwrap();
        assert!(is_missing(&hold(&root.0, "a").unwrap_err()));
        create(&root.0, record("a")).unwrap();
    }

    #[test]
    fn what_a_killed_create_left_can_be_held_and_removed() {
        let root = Root::new("killed");
        std::fs::create_dir_all(root.0.join("a")).unwrap();
        let held = hold(&root.0, "a").unwrap();
        assert_eq!((&*held.record.id, held.record.uid), ("a", None));
        held.remove().unwrap();
        assert!(!root.0.join("a").exists());
    }

    #[test]
    fn one_command_at_a_time_has_hold_of_a_container() {
        let root = Root::new("lock");
        let held = create(&root.0, record("a")).unwrap();
        let path = root.0.clone();
        let other = std::thread::spawn(move || {
            hold(&path, "a")
                .map(drop)
                .map_err(|error| error.to_string())
        });
        // It waits for the folder, which is removed meanwhile.
        held.remove().unwrap();
        let missing = StateError::Missing.to_string();
        assert_eq!(other.join().unwrap(), Err(missing));
    }

    #[test]
    fn state_folder_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = Root::new("mode");
        std::fs::create_dir_all(&root.0).unwrap();
        std::fs::set_permissions(&root.0, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = create(&root.0, record("a")).unwrap_err();
        assert!(
            error.to_string().contains("not this user's alone"),
            "{error}"
        );
    }

    #[test]
    fn file_is_replaced_and_neither_a_link_nor_what_is_no_file_is_written_to() {
        let folder = std::env::temp_dir().join(format!("mayfly-oci-put-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let at = |name: &str| folder.join(name);
        std::fs::write(at("precious"), "precious").unwrap();
        std::os::unix::fs::symlink(at("precious"), at("link")).unwrap();
        std::os::unix::fs::symlink("/dev/null", at("null")).unwrap();
        // Where the file is made before it has its name.
        let aside = at(&format!(".mayfly-oci-{}", std::process::id()));
        std::os::unix::fs::symlink(at("precious"), aside).unwrap();
        for text in ["1", "22"] {
            replace(&at("pid"), text.as_bytes(), 0o644).unwrap();
            assert_eq!(std::fs::read(at("pid")).unwrap(), text.as_bytes());
        }
        for name in ["link", "null", "."] {
            let error = replace(&at(name), b"1", 0o644).unwrap_err();
            assert!(
                crate::error::message(&error).contains("not a regular file"),
                "{name}"
            );
        }
        assert_eq!(std::fs::read(at("precious")).unwrap(), b"precious");
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|it| it.unwrap().file_name())
            .collect();
        names.sort();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names, ["link", "null", "pid", "precious"]);
    }
}
