//! The exit report: a file of JSON whose place is taken before anything else, and which is written whole
//! or not at all.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::error::{Remedy, at, errno};
use crate::sys;

/// The report cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("cannot make the exit report {0}")]
    Make(PathBuf, #[source] Errno),
    #[error(
        "cannot make the exit report {0}: another user's file is there, and its folder has the sticky bit"
    )]
    Foreign(PathBuf),
    #[error("cannot write the exit report {0}")]
    Write(PathBuf, #[source] Errno),
}

impl Remedy for ReportError {}

/// The place of the report: an unnamed file that gets its name when it is
/// written, so that a run that is killed leaves none.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    file: File,
    /// Where to link the unnamed file; none if the file has its name already.
    link: Option<(OwnedFd, OsString)>,
}

impl Report {
    /// Makes sure that it can be written.
    pub fn open(path: &Path) -> Result<Report, ReportError> {
        let kind = rustix::fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let is_other = kind.is_ok_and(|kind| !kind.is_file());
        // The caller's own link to a file stays one: what is replaced is the file. Any user may have
        // put one into a folder such as /tmp: that is replaced itself.
        let is_trusted = rustix::fs::lstat(path)
            .is_ok_and(|link| [0, rustix::process::geteuid().as_raw()].contains(&link.st_uid));
        let real = path.canonicalize().ok().filter(|_| is_trusted && !is_other);
        let path = real.as_deref().unwrap_or(path);
        let mode = Mode::from_raw_mode(0o644);
        let name = path.file_name().filter(|_| !is_other);
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        if let Some(name) = name {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(folder.unwrap_or(Path::new(".")), flags, Mode::empty())
                .map_err(at(ReportError::Make, path))?;
            // Whether it can be a name there, and whether what has it may be replaced.
            match rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(old) => {
                    let place = rustix::fs::fstat(&folder).map_err(at(ReportError::Make, path))?;
                    let own = rustix::process::geteuid();
                    let is_ours =
                        own.is_root() || [old.st_uid, place.st_uid].contains(&own.as_raw());
                    if Mode::from_raw_mode(place.st_mode).contains(Mode::SVTX) && !is_ours {
                        return Err(ReportError::Foreign(path.to_owned()));
                    }
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(at(ReportError::Make, path)(error)),
            }
            let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
            // Some file systems have no files without a name.
            if let Ok(file) = rustix::fs::openat(&folder, ".", flags, mode) {
                return Ok(Report {
                    path: path.to_owned(),
                    file: file.into(),
                    link: Some((folder, name.to_owned())),
                });
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags | OFlags::NOCTTY, mode)
            .map_err(at(ReportError::Make, path))?;
        Ok(Report {
            path: path.to_owned(),
            file: file.into(),
            link: None,
        })
    }

    /// What another process needs to write it: descriptors to pass on, and the rest for [`Report::of`].
    pub fn parts(&self) -> (Vec<BorrowedFd<'_>>, PathBuf, Option<OsString>) {
        let folder = self.link.as_ref().map(|(folder, _)| folder.as_fd());
        let files = std::iter::once(self.file.as_fd()).chain(folder).collect();
        let name = self.link.as_ref().map(|(_, name)| name.clone());
        (files, self.path.clone(), name)
    }

    /// The report of those [`Report::parts`].
    pub fn of(files: Vec<OwnedFd>, path: PathBuf, name: Option<OsString>) -> Option<Report> {
        let mut files = files.into_iter();
        let file = files.next()?.into();
        let link = files.next().zip(name);
        Some(Report { path, file, link })
    }

    /// Whether any process has written it, as far as can be told: a pipe does not tell.
    pub fn is_written(&self) -> bool {
        let stat = rustix::fs::fstat(&self.file);
        stat.is_ok_and(|stat| match self.link {
            Some(_) => stat.st_nlink > 0,
            None => stat.st_size > 0,
        })
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, facts: &Value) -> Result<(), ReportError> {
        self.try_write(facts)
            .map_err(at(ReportError::Write, &self.path))
    }

    fn try_write(&self, facts: &Value) -> Result<(), Errno> {
        let text = format!("{facts:#}\n");
        std::io::Write::write_all(&mut &self.file, text.as_bytes()).map_err(errno)?;
        let Some((folder, name)) = &self.link else {
            let size = rustix::fs::ftruncate(&self.file, text.len() as u64);
            // A pipe or device has no size.
            return size.or(Ok(()));
        };
        // By way of a second name, since a link does not replace what is there. It has nothing of the
        // first, which may be as long as a name can be; processes of one number are told apart by
        // the time.
        let aside = format!(".mayfly-{}-{:x}", std::process::id(), sys::monotonic_us());
        let own = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.file)
        );
        rustix::fs::linkat(CWD, own, folder, &aside, AtFlags::SYMLINK_FOLLOW).and_then(|()| {
            let renamed = rustix::fs::renameat(folder, &aside, folder, name);
            if renamed.is_err() {
                let _ = rustix::fs::unlinkat(folder, &aside, AtFlags::empty());
            }
            renamed
        })
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
        let (files, at, name) = through_link.parts();
        let files = files.iter().map(|fd| fd.try_clone_to_owned().unwrap());
        let passed = Report::of(files.collect(), at, name).unwrap();
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
