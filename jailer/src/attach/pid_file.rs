//! The file with the number of a process (`exec --pid-file`): made aside and renamed. What is there is replaced if it is
//! a file, and never written through: in a folder of others it may lead anywhere.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// It cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    #[error("it is there and is not a regular file; remove it, or name another")]
    NotAFile,
    #[error("it has no name")]
    NoName,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Refuses what is there if it is not a file.
pub fn check(path: &Path) -> Result<(), PidFileError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => Err(PidFileError::NotAFile),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes it, so that a reader sees all of it or none.
pub fn write(path: &Path, text: &str) -> Result<(), PidFileError> {
    check(path)?;
    let aside = aside(path)?;
    // What a process of the same number has left.
    let _ = std::fs::remove_file(&aside);
    let mut options = File::options();
    // No link is followed: it has to be new.
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&aside)?;
    let written = file.write_all(text.as_bytes());
    let written = written.and_then(|()| std::fs::rename(&aside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    Ok(written?)
}

fn aside(path: &Path) -> Result<PathBuf, PidFileError> {
    path.file_name().ok_or(PidFileError::NoName)?;
    // It has nothing of the name, which may be as long as one can be.
    let name = OsString::from(format!(".mayfly-pid-{}", std::process::id()));
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Folder;

    fn names(folder: &Folder) -> Vec<OsString> {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|it| it.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn file_that_is_there_is_replaced_and_what_stands_aside_is_not_followed() {
        let folder = Folder::new("pid-file");
        let path = folder.path().join("pid");
        write(&path, "1").unwrap();
        let precious = folder.path().join("precious");
        std::fs::hard_link(&path, &precious).unwrap();
        symlink(&precious, aside(&path).unwrap()).unwrap();
        write(&path, "22").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"22");
        assert_eq!(std::fs::read(&precious).unwrap(), b"1");
        assert_eq!(names(&folder), ["pid", "precious"]);
    }

    #[test]
    fn what_is_not_a_file_stays_as_it_is() {
        let folder = Folder::new("pid-other");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("precious"), "precious").unwrap();
        symlink(at("precious"), at("link")).unwrap();
        symlink("/dev/null", at("null")).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), mode).unwrap();
        let before = names(&folder);
        for name in ["link", "null", "folder", "pipe"] {
            let error = write(&at(name), "1").unwrap_err();
            assert!(matches!(error, PidFileError::NotAFile), "{name}: {error}");
        }
        assert_eq!(names(&folder), before);
        assert_eq!(std::fs::read(at("precious")).unwrap(), b"precious");
        assert!(matches!(
            write(Path::new("/"), "1"),
            Err(PidFileError::NotAFile)
        ));
        assert!(matches!(
            write(&at("none/pid"), "1"),
            Err(PidFileError::Io(_))
        ));
    }
}
