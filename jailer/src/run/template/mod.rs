//! Templates: guests of `run --image` that were saved as soon as their agent was there, before they had been told of
//! an image, a command or a network. A further guest of the same shape is a copy of one, in place of a boot.
//!
//! ```text
//!   DIR/NAME/{shape,state,memory}   a template; NAME is made of what is in `shape`
//!   DIR/work/PID-N/                 one that is being made, locked by its maker
//! ```
//!
//! - Runs in the supervisor, before there is a jail ([`Store::find`]), and once more when a guest that booted may be
//!   saved ([`Work`]). It reads and writes only below the folder of `--template`, which has to be the caller's
//!   own, as the files that are loaded have to be: who can write there decides what guests run. It asks the monitor
//!   nothing, and never waits.
//! - `shape` is a text of all that has to be the same: monitor, kernel, agent, host, machine. It is compared
//!   as a whole; its name is only where to look. Disks, addresses and the agent's connection are not part of it.
//! - A template appears whole, by rename, after its files were synced. Of two makers the later one's stays, and both are
//!   right. What a killed maker leaves is removed by the next one. At most [`MOST`] are kept.
//! - What cannot be used is never an error of the run: it is a boot, and the reason is told.

mod shape;

use std::fs::{self, DirBuilder, File};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mayfly::snapshot::{self, MEMORY_NAME, STATE_NAME};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

pub use self::shape::{Parts, Shape};
use crate::error::{Failure, Step as _};

/// How many templates one folder has: what was not used for longest is removed when one more is made.
const MOST: usize = 8;
const SHAPE: &str = "shape";
const WORK: &str = "work";
/// Longer than any shape.
const SHAPE_MAX: u64 = 1 << 20;

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use the folder {0} (--template): {1}; name one that only this user can write to, or that is not there yet"
)]
struct Foreign(PathBuf, &'static str);

/// The folder of templates.
#[derive(Debug)]
pub struct Store(PathBuf);

/// What there is for a shape.
#[derive(Debug)]
pub enum Found {
    /// It can be copied.
    Template(Template),
    /// There is none yet.
    Nothing,
    /// What is there cannot be used; why.
    Damaged(String),
}

/// A template that can be copied.
#[derive(Debug)]
pub struct Template {
    pub state: OwnedFd,
    pub memory: OwnedFd,
    /// Its folder.
    path: PathBuf,
}

impl Template {
    /// It turned out that it cannot be used: the next run makes another.
    pub fn discard(&self) {
        let _ = fs::remove_file(self.path.join(SHAPE));
    }

    /// Where it is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Store {
    /// Opens the folder, or makes it.
    pub fn open(folder: &Path) -> Result<Store, Failure> {
        let what = || format!("use the folder {} (--template)", folder.display());
        make_folder(folder).step(what())?;
        let folder = folder.canonicalize().step(what())?;
        let found = fs::metadata(&folder).step(what())?;
        if let Some(why) = foreign(&found) {
            return Err(Failure::new(what(), Foreign(folder, why)));
        }
        Ok(Store(folder))
    }

    fn place(&self, shape: &Shape) -> PathBuf {
        self.0.join(shape.name())
    }

    /// What there is for a shape.
    pub fn find(&self, shape: &Shape) -> Found {
        let path = self.place(shape);
        let read = |name| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            rustix::fs::open(path.join(name), flags, Mode::empty()).map(File::from)
        };
        let file = match read(SHAPE) {
            Err(Errno::NOENT) => return Found::Nothing,
            Err(error) => return Found::Damaged(format!("cannot open its shape: {error}")),
            Ok(file) => file,
        };
        let folder = fs::symlink_metadata(&path);
        if let Some(why) = folder.ok().and_then(|found| foreign(&found)) {
            return Found::Damaged(why.into());
        }
        let mut text = Vec::new();
        if (&file).take(SHAPE_MAX).read_to_end(&mut text).is_err() || text != shape.bytes() {
            return Found::Damaged("its shape is another".into());
        }
        match open_pair(&path) {
            Ok((state, memory)) => {
                // Those that are used are kept.
                let _ = file.set_modified(SystemTime::now());
                Found::Template(Template {
                    state,
                    memory,
                    path,
                })
            }
            Err(why) => Found::Damaged(why),
        }
    }

    /// A place to make a template in.
    pub fn begin(&self) -> Result<Work, Failure> {
        const WHAT: &str = "make a template in";
        let all = self.0.join(WORK);
        make_folder(&all).step_on(WHAT, &all)?;
        for entry in fs::read_dir(&all).step_on(WHAT, &all)?.flatten() {
            if let Some(_lock) = lock(&entry.path()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        for count in 0..100 {
            let path = all.join(format!("{}-{count}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                made => made.step_on(WHAT, &path)?,
            }
            // Another maker may have taken it for one that was left, and have removed it.
            if let Some(lock) = lock(&path) {
                return Ok(Work { path, _lock: lock });
            }
        }
        Err(Failure::new(
            "make a template",
            Foreign(all, "it is full of folders that others make"),
        ))
    }

    /// Puts what was made in its place.
    pub fn keep(&self, work: Work, shape: &Shape) -> Result<(), Failure> {
        const WHAT: &str = "keep the template in";
        let (from, to) = (work.path.as_path(), self.place(shape));
        fs::write(from.join(SHAPE), shape.bytes()).step_on(WHAT, from)?;
        // Whatever the umask is: a file that a group can write to is not taken.
        for entry in fs::read_dir(from).step_on(WHAT, from)?.flatten() {
            let alone = fs::Permissions::from_mode(0o600);
            fs::set_permissions(entry.path(), alone).step_on(WHAT, entry.path())?;
        }
        let rename = |flags| rustix::fs::renameat_with(CWD, from, CWD, &to, flags);
        put_in_place(from, &to, rename).step_on(WHAT, &to)?;
        drop(work);
        self.prune(&to);
        Ok(())
    }

    /// Removes those that were not used for longest, but for `newest`, down to as many as are kept.
    fn prune(&self, newest: &Path) {
        let all = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let all = all.map(|entry| entry.path());
        let all = all.filter(|path| path != newest && !path.ends_with(WORK));
        let mut all: Vec<_> = all
            .filter_map(|path| {
                // A folder without the state of a guest is not one of these.
                fs::symlink_metadata(path.join(STATE_NAME)).ok()?;
                let used = fs::metadata(path.join(SHAPE)).and_then(|it| it.modified());
                Some((used.unwrap_or(SystemTime::UNIX_EPOCH), path))
            })
            .collect();
        all.sort();
        let surplus = (all.len() + 1).saturating_sub(MOST);
        for (_, path) in all.into_iter().take(surplus) {
            // In this order, so that what is left by a failure is none.
            let _ = fs::remove_file(path.join(SHAPE));
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// A template that is being made; removed with this value.
#[derive(Debug)]
pub struct Work {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Work {
    /// The folder for its files.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn make_folder(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// What is saved in the folder of a template: state and memory. Or why it is not taken.
fn open_pair(path: &Path) -> Result<(OwnedFd, OwnedFd), String> {
    let open = |name| {
        let file = snapshot::open_regular(&path.join(name)).map_err(|why| why.to_string())?;
        // Of what is open, whichever names led to it.
        let found = file.metadata().map_err(|error| error.to_string())?;
        not_own(&found).map_or(Ok(file), |why| Err(format!("its {name}: {why}")))
    };
    let (state, memory) = (open(STATE_NAME)?, open(MEMORY_NAME)?);
    let checked = snapshot::read(&state).and_then(|(header, _)| {
        header.check_whole()?;
        snapshot::memory_of(&header, Ok(memory), None)
    });
    let memory = checked.map_err(|refusal| refusal.to_string())?;
    Ok((state.into(), memory.into()))
}

/// Puts the folder `from` in place at `to` with `rename`, which takes flags. A folder that is there is removed, or has the
/// name `from` afterwards.
fn put_in_place(
    from: &Path,
    to: &Path,
    rename: impl Fn(RenameFlags) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let moved = match rename(RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => rename(RenameFlags::EXCHANGE),
        moved => moved,
    };
    match moved {
        // As on NFS and many file systems of FUSE: no flags.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        moved => return moved,
    }
    let aside = from.with_extension("old");
    let mut tries = 3;
    loop {
        match rustix::fs::rename(from, to) {
            // It is in the way. Another maker's may come again.
            Err(Errno::EXIST | Errno::NOTEMPTY) if tries > 0 => {
                match rustix::fs::rename(to, &aside) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(cause) => return Err(cause),
                }
                let _ = fs::remove_dir_all(&aside);
            }
            moved => return moved,
        }
        tries -= 1;
    }
}

/// Why a folder is not this user's alone, if it is not.
fn foreign(found: &fs::Metadata) -> Option<&'static str> {
    if !found.is_dir() {
        return Some("it is not a folder");
    }
    not_own(found)
}

/// Why a folder or a file is not this user's alone, if it is not.
fn not_own(found: &fs::Metadata) -> Option<&'static str> {
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Some("it belongs to another user");
    }
    (found.mode() & 0o022 != 0).then_some("other users can write to it")
}

/// Locks a folder in which a template is made; none: its maker has it, or it is gone.
fn lock(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).ok()?;
    let own = rustix::fs::fstat(&folder).ok()?;
    let there = rustix::fs::lstat(path).ok()?;
    ((there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)).then_some(folder)
}

#[cfg(test)]
mod tests;
