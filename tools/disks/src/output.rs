//! A result that exists whole or not at all. It is made in a folder beside its place, whose name
//! begins with a dot, synced, and moved by rename. When a run is killed its cleaner removes that
//! folder, and if that was killed too, the next run for the same output. A lock tells a folder in use
//! from one left behind: programs that this process starts hold it too.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, FdFlags};

use crate::cleaner::Cleaner;
use crate::failure::{Context, Failure, Result, printable};

#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    work: PathBuf,
    force: bool,
    _cleaner: Option<Cleaner>,
    _lock: File,
}

impl Output {
    /// Takes the place of `path`. `inputs` are files that it may not be.
    pub fn new(path: &Path, force: bool, inputs: &[&Path]) -> Result<Output> {
        let Some(name) = path.file_name() else {
            return Err(Failure::new(
                path,
                "is no name for a file",
                "give another output",
            ));
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = folder.canonicalize().cannot("open the folder of", path)?;
        let path = folder.join(name);
        if let Ok(there) = fs::symlink_metadata(&path) {
            differs(&path, inputs)?;
            if !there.is_file() {
                return Err(Failure::new(
                    &path,
                    "exists and is not a regular file",
                    "give another output",
                ));
            }
            if !force {
                return Err(exists(&path));
            }
        }
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".unfinished");
        let work = folder.join(hidden);
        let (lock, cleaner) = take(&work, &path)?;
        Ok(Output {
            path,
            work,
            force,
            _cleaner: cleaner,
            _lock: lock,
        })
    }

    /// That the output replaces none of these.
    pub fn differs(&self, inputs: &[&Path]) -> Result<()> {
        differs(&self.path, inputs)
    }

    /// The folder of everything unfinished.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// The final place.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of this run. All but those that are committed are removed at its end.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// The final place of a companion, whose name is the output's with `ending`.
    pub fn beside(&self, ending: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(ending);
        name.into()
    }

    /// Moves the scratch file `name` to its final place.
    pub fn commit(&self, name: &str, to: &Path) -> Result<()> {
        let from = self.scratch(name);
        let file = File::open(&from).cannot("open", &from)?;
        file.sync_all().cannot("write", to)?;
        if self.force {
            fs::rename(&from, to).cannot("create", to)?;
        } else {
            match rustix::fs::renameat_with(CWD, &from, CWD, to, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => return Err(exists(to)),
                // Not every file system knows the flag.
                Err(Errno::INVAL | Errno::NOSYS) => {
                    fs::hard_link(&from, to).cannot("create", to)?;
                }
                other => other.cannot("create", to)?,
            }
        }
        let folder = to.parent().expect("an absolute path of a file");
        let folder_file = File::open(folder).cannot("open", folder)?;
        folder_file.sync_all().cannot("write", folder)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.work);
    }
}

fn differs(path: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(there) = fs::metadata(path) else {
        return Ok(());
    };
    for input in inputs {
        let is_same =
            fs::metadata(input).is_ok_and(|it| (it.dev(), it.ino()) == (there.dev(), there.ino()));
        if is_same {
            return Err(Failure::new(path, "is an input too", "give another output"));
        }
    }
    Ok(())
}

fn exists(path: &Path) -> Failure {
    Failure::new(
        path,
        "exists",
        "give another output, or --force to replace it",
    )
}

/// Makes the folder and locks it; one that an earlier run left is removed.
fn take(work: &Path, output: &Path) -> Result<(File, Option<Cleaner>)> {
    let busy = || {
        Failure::new(
            output,
            "another run is writing it",
            "wait for its end, or give another output",
        )
    };
    for _ in 0..16 {
        match fs::create_dir(work) {
            Ok(()) => {
                let lock = File::open(work).cannot("open", work)?;
                if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                    return Err(busy());
                }
                let cleaner = Cleaner::start(work, &lock);
                // Held by the programs that this run starts as well, but not by the cleaner.
                rustix::io::fcntl_setfd(&lock, FdFlags::empty()).cannot("keep", work)?;
                return Ok((lock, cleaner));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Whatever else is in its place is not followed, nor waited for (a FIFO).
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let old = match rustix::fs::open(work, flags, Mode::empty()) {
                    Err(Errno::NOENT) => continue,
                    Err(Errno::NOTDIR | Errno::LOOP) => {
                        return Err(Failure::new(work, "is in the way", "remove it"));
                    }
                    other => other.cannot("open", work)?,
                };
                if rustix::fs::flock(&old, FlockOperation::NonBlockingLockExclusive).is_err() {
                    return Err(busy());
                }
                eprintln!("removing what an interrupted run left: {}", printable(work));
                fs::remove_dir_all(work).cannot("remove", work)?;
            }
            Err(error) => {
                let folder = work.parent().unwrap_or(work);
                return Err(error).cannot("create a file in", folder);
            }
        }
    }
    Err(busy())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("mf-disks-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn output_when_it_exists_is_replaced_only_by_force() {
        let folder = folder("force");
        let path = folder.join("out");
        fs::write(&path, "old").unwrap();
        assert!(
            Output::new(&path, false, &[])
                .unwrap_err()
                .to_string()
                .contains("exists")
        );
        let output = Output::new(&path, true, &[]).unwrap();
        fs::write(output.scratch("disk"), "new").unwrap();
        output.commit("disk", output.path()).unwrap();
        drop(output);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn output_that_appears_meanwhile_is_kept() {
        let folder = folder("meanwhile");
        let output = Output::new(&folder.join("out"), false, &[]).unwrap();
        fs::write(output.scratch("disk"), "new").unwrap();
        fs::write(folder.join("out"), "of another").unwrap();
        assert!(output.commit("disk", output.path()).is_err());
        drop(output);
        assert_eq!(fs::read(folder.join("out")).unwrap(), b"of another");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn folder_in_use_is_left_and_one_left_behind_is_removed() {
        let folder = folder("lock");
        let path = folder.join("out");
        let first = Output::new(&path, false, &[]).unwrap();
        let second = Output::new(&path, false, &[]).unwrap_err().to_string();
        assert!(second.contains("another run"), "{second}");
        drop(first);
        fs::create_dir(folder.join(".out.unfinished")).unwrap();
        fs::write(folder.join(".out.unfinished/disk"), "half").unwrap();
        drop(Output::new(&path, false, &[]).unwrap());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_is_in_the_place_of_the_folder_and_is_none_is_named_and_kept() {
        let folder = folder("way");
        let work = folder.join(".out.unfinished");
        rustix::fs::mknodat(CWD, &work, rustix::fs::FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let error = Output::new(&folder.join("out"), false, &[]).unwrap_err();
        assert!(error.to_string().contains("is in the way"), "{error}");
        fs::remove_file(&work).unwrap();
        std::os::unix::fs::symlink(&folder, &work).unwrap();
        assert!(Output::new(&folder.join("out"), false, &[]).is_err());
        assert!(fs::symlink_metadata(&work).is_ok());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn output_that_is_an_input_is_refused_even_by_force() {
        let folder = folder("same");
        let path = folder.join("disk");
        fs::write(&path, "precious").unwrap();
        fs::hard_link(&path, folder.join("link")).unwrap();
        let error = Output::new(&folder.join("link"), true, &[&path]).unwrap_err();
        assert!(error.to_string().contains("input"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }
}
