//! The exit report: a file of JSON whose place is taken before anything else, and which is written whole
//! or not at all.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::error::{AnyError, Failure, Step as _, errno};
use crate::root;
use crate::sys;

/// It is not this user's to replace.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot make the exit report {0}: another user's file is there, and its folder has the sticky bit"
)]
struct Foreign(PathBuf);

const MAKE: &str = "make the exit report";

/// The place of the report: an unnamed file that gets its name when it is
/// written, so that a run that is killed leaves none.
#[derive(Debug)]
pub struct Report {
    place: Place,
    file: File,
    /// Where to link the unnamed file; none if the file has its name already.
    folder: Option<OwnedFd>,
}

/// Where a report is to be. It holds no descriptor, so that another process can be told it.
#[derive(Clone, Debug)]
pub struct Place {
    path: PathBuf,
    name: OsString,
}

impl Report {
    /// Makes sure that it can be written.
    pub fn open(path: &Path) -> Result<Report, AnyError> {
        let kind = rustix::fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let is_other = kind.is_ok_and(|kind| !kind.is_file());
        // The caller's own link to a file stays one: what is replaced is the file. Any user may have
        // put one into a folder such as /tmp: that is replaced itself.
        let is_trusted = rustix::fs::lstat(path)
            .is_ok_and(|link| [0, rustix::process::geteuid().as_raw()].contains(&link.st_uid));
        let real = path.canonicalize().ok().filter(|_| is_trusted && !is_other);
        let path = real.as_deref().unwrap_or(path);
        let mode = Mode::from_raw_mode(0o644);
        let report = |file: OwnedFd, folder| Report {
            place: Place {
                path: path.to_owned(),
                name: path.file_name().unwrap_or_default().to_owned(),
            },
            file: file.into(),
            folder,
        };
        if let Some(name) = path.file_name().filter(|_| !is_other) {
            let (folder, _) = root::open_folder_of(path).step_on(MAKE, path)?;
            // Whether it can be a name there, and whether what has it may be replaced.
            match rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                old => {
                    let old = old.step_on(MAKE, path)?;
                    let place = rustix::fs::fstat(&folder).step_on(MAKE, path)?;
                    let own = rustix::process::geteuid();
                    let is_ours =
                        own.is_root() || [old.st_uid, place.st_uid].contains(&own.as_raw());
                    if Mode::from_raw_mode(place.st_mode).contains(Mode::SVTX) && !is_ours {
                        return Err(Foreign(path.to_owned()).into());
                    }
                }
            }
            let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
            // Some file systems have no files without a name.
            if let Ok(file) = rustix::fs::openat(&folder, ".", flags, mode) {
                return Ok(report(file, Some(folder)));
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags | OFlags::NOCTTY, mode).step_on(MAKE, path)?;
        Ok(report(file, None))
    }

    /// What another process needs to write it, with the [`Place`].
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        let folder = self.folder.as_ref().map(AsFd::as_fd);
        std::iter::once(self.file.as_fd()).chain(folder).collect()
    }

    /// Where it is to be.
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    /// The report of those [`Report::files`].
    pub fn of(files: Vec<OwnedFd>, place: Place) -> Option<Report> {
        let mut files = files.into_iter();
        Some(Report {
            place,
            file: files.next()?.into(),
            folder: files.next(),
        })
    }

    /// Whether any process has written it, as far as can be told: a pipe does not tell.
    pub fn is_written(&self) -> bool {
        let stat = rustix::fs::fstat(&self.file);
        stat.is_ok_and(|stat| match self.folder {
            Some(_) => stat.st_nlink > 0,
            None => stat.st_size > 0,
        })
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, facts: &Value) -> Result<(), Failure> {
        self.try_write(facts)
            .step_on("write the exit report", &self.place.path)
    }

    fn try_write(&self, facts: &Value) -> Result<(), Errno> {
        let text = format!("{facts:#}\n");
        std::io::Write::write_all(&mut &self.file, text.as_bytes()).map_err(errno)?;
        let Some(folder) = &self.folder else {
            let size = rustix::fs::ftruncate(&self.file, text.len() as u64);
            // A pipe or device has no size.
            return size.or(Ok(()));
        };
        // By way of a second name, since a link does not replace what is there. It has nothing of the
        // first, which may be as long as a name can be; processes of one number are told apart by
        // the time.
        let aside = format!(".mayfly-{}-{:x}", std::process::id(), sys::monotonic_us());
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, own, folder, &aside, AtFlags::SYMLINK_FOLLOW)?;
        root::take_place(folder, aside.as_str(), self.place.name.as_os_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn report_has_no_name_until_it_is_written_and_replaces_an_old_one() {
        let folder = crate::testing::Folder::new("report");
        let path = folder.path().join("r.json");
        let report = Report::open(&path).unwrap();
        assert!(!path.exists() && !report.is_written());
        report.write(&json!({ "a": 1 })).unwrap();
        Report::open(&path)
            .unwrap()
            .write(&json!({ "a": 2 }))
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            json!({ "a": 2 })
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let through_link = Report::open(&link).unwrap();
        let files = through_link.files().into_iter();
        let files = files.map(|fd| fd.try_clone_to_owned().unwrap());
        let passed = Report::of(files.collect(), through_link.place()).unwrap();
        passed.write(&json!({ "a": 3 })).unwrap();
        assert!(through_link.is_written() && link.is_symlink());
        assert!(std::fs::read_to_string(&path).unwrap().contains('3'));
        std::fs::remove_file(&link).unwrap();
        assert!(Report::open(&folder.path().join("none/r.json")).is_err());
        assert!(Report::open(folder.path()).is_err());
        assert!(Report::open(&folder.path().join("x".repeat(256))).is_err());
        let path = folder.path().join("x".repeat(255));
        let report = Report::open(&path).unwrap();
        report.write(&json!({ "a": 3 })).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
