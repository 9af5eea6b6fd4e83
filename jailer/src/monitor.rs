//! The monitor's executable, and what every process that becomes the monitor is given: its limits, and
//! the reason when the exec fails.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::process::Resource;

use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::sys;

/// What a file is that cannot be used as one.
pub const NOT_A_FILE: &str = "not a regular file";

/// A file that cannot be a monitor.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the monitor {0} ({1}): {2}")]
struct Unfit(PathBuf, &'static str, &'static str);

/// The executable that is going to be the monitor, opened and checked.
#[derive(Debug)]
pub struct Executable {
    file: File,
    path: PathBuf,
    /// The last component of its path, which names a jail's folder, the copy and the pid file.
    name: OsString,
    mode: Mode,
}

impl Executable {
    /// Opens `path`, which `option` gave. Links in it are followed once, to find the name of the real
    /// file.
    pub fn open(path: &Path, option: &'static str) -> Result<Executable, AnyError> {
        let unfit = |why| Err(Unfit(path.to_owned(), option, why).into());
        // NONBLOCK: a pipe must not hold us up.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = path.canonicalize().and_then(|real| {
            let links = ResolveFlags::NO_SYMLINKS;
            let file = File::from(rustix::fs::openat2(
                CWD,
                &real,
                flags,
                Mode::empty(),
                links,
            )?);
            Ok((real, file.metadata()?, file))
        });
        let (real, metadata, file) = opened
            .step(format!("open the monitor {} ({option})", path.display()))
            .advise(format!("name it with {option}: a static executable"))?;
        let mode = metadata.permissions().mode();
        if !metadata.is_file() {
            return unfit(NOT_A_FILE);
        }
        if mode & 0o111 == 0 {
            return unfit("no user may execute it; run chmod +x on it");
        }
        let Some(name) = real.file_name() else {
            return unfit("it has no name");
        };
        Ok(Executable {
            file,
            path: path.to_owned(),
            name: name.to_owned(),
            // A copy has no special bits, can be changed by no second user, and is executable for
            // the one that owns it.
            mode: Mode::from_raw_mode(mode & 0o755 | 0o500),
        })
    }

    /// The opened file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path that was given, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's name.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The mode of a copy.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Where the copy is, as seen from inside the jail.
    pub fn inner_path(&self) -> PathBuf {
        Path::new("/").join(&self.name)
    }

    /// Name of the file that is to hold its process id.
    pub fn pid_file_name(&self) -> OsString {
        let mut name = self.name.clone();
        name.push(".pid");
        name
    }
}

/// Limit of open descriptors when none is given.
pub const OPEN_FILES: u64 = 2048;

/// Limits of the monitor's process (--resource-limit).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors open at once.
    pub open_files: Option<u64>,
}

impl ResourceLimits {
    /// Sets both, soft and hard; without a number for it, that of descriptors to `open_files`.
    pub fn set(self, open_files: u64) -> Result<(), Failure> {
        let set = |resource, value, name: &str| {
            sys::set_limit(resource, value)
                .step(format!("set --resource-limit {name}={value}"))
                .hint(Errno::PERM, "it is above what this host or user allows")
        };
        if let Some(bytes) = self.file_size {
            set(Resource::Fsize, bytes, "fsize")?;
        }
        set(
            Resource::Nofile,
            self.open_files.unwrap_or(open_files),
            "no-file",
        )
    }
}

/// Why the monitor was not executed.
pub fn cannot_execute(path: impl AsRef<Path>, option: &str, answer: Errno) -> Failure {
    let remedy = |answer| match answer {
        Errno::NOENT => Some(
            "it needs an interpreter or shared libraries, which a jail does not have: give a static \
             executable",
        ),
        Errno::NOEXEC => Some("give an executable for this machine"),
        _ => None,
    };
    Failure::new(
        format!("execute {} in the jail ({option})", path.as_ref().display()),
        answer,
    )
    .hints(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;
    use crate::testing::Folder;

    #[test]
    fn executable_open_names_the_real_file() {
        let folder = Folder::new("root-executable");
        let real = folder.path().join("mayfly-1.0");
        std::fs::write(&real, "x").unwrap();
        std::fs::set_permissions(&real, PermissionsExt::from_mode(0o4777)).unwrap();
        std::os::unix::fs::symlink("mayfly-1.0", folder.path().join("mayfly")).unwrap();
        let executable = Executable::open(&folder.path().join("mayfly"), "--x").unwrap();
        assert_eq!(executable.name(), "mayfly-1.0");
        assert_eq!(executable.mode, Mode::from_raw_mode(0o755));
        assert_eq!(executable.inner_path(), Path::new("/mayfly-1.0"));
    }

    #[test]
    fn executable_open_when_it_cannot_run_refuses() {
        let folder = Folder::new("root-not-executable");
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        for (path, reason) in [
            (file.as_path(), "chmod +x"),
            (folder.path(), "not a regular file"),
            (&folder.path().join("none"), "No such file"),
        ] {
            let text = message(&*Executable::open(path, "--x").unwrap_err());
            assert!(text.contains(reason), "{text}");
        }
    }
}
