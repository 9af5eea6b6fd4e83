//! Users for monitors, where root runs this, or root of a user namespace: a number for each container, that
//! no other of this host, or of this user, has.
//!
//! A number is taken by a file of that name, which holds the path of the container's folder. It is free
//! again when that folder is gone, whichever command was killed meanwhile.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::error::{AnyError, Step as _};
use crate::input;
use crate::user::User;

/// The name of the folder with the files: one place for all state folders.
const FOLDER: &str = "mayfly-oci.users";

/// How long a path may be.
const OWNER_MAX: u64 = 4096;

/// All numbers are taken.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot choose a user for the microVM: all {0} from {1} on are taken; give more in \"uids\" of oci.json"
)]
struct NoneLeft(u32, u32);

/// Numbers, and who has them.
pub struct Accounts {
    folder: PathBuf,
    first: u32,
    count: u32,
}

impl Accounts {
    /// Those of `user`, if it can give monitors a user of their own. `wanted`, of root: the first of them, and how
    /// many.
    pub fn of(user: User, wanted: (u32, u32)) -> Option<Accounts> {
        let (first, count) = user.uids(wanted)?;
        Some(Accounts {
            folder: user.runtime_folder(FOLDER),
            first,
            count,
        })
    }

    /// Takes one for the container whose folder is `state`. `note` writes down which, before it is taken.
    pub fn take(
        &self,
        state: &Path,
        note: impl FnOnce(u32) -> Result<(), AnyError>,
    ) -> Result<(), AnyError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder);
        made.step_on("make the folder", &self.folder)?;
        let _lock = self.lock()?;
        // Not the last one that was given back: what that one has left on the host is not this one's.
        let at = std::process::id() % self.count;
        let mut numbers = (0..self.count).map(|step| self.first + (at + step) % self.count);
        let free = numbers.find(|number| !owner(&self.file(*number)).is_some_and(|it| it.exists()));
        let number = free.ok_or(NoneLeft(self.count, self.first))?;
        note(number)?;
        let path = self.file(number);
        let text = state.as_os_str().as_encoded_bytes();
        let written = File::create(&path).and_then(|mut file| file.write_all(text));
        Ok(written.step_on("write", &path)?)
    }

    /// Gives the one back that the container whose folder was `state` has, or was about to take.
    pub fn give_back(&self, number: u32, state: &Path) {
        // What stays is free when the container's folder is gone.
        let Ok(_lock) = self.lock() else {
            return;
        };
        let path = self.file(number);
        // It may have been taken by another name of the same folder.
        let is_same = |owner: &Path| {
            let plain = |path: &Path| path.canonicalize().ok();
            owner == state || (plain(owner).is_some() && plain(owner) == plain(state))
        };
        if owner(&path).is_some_and(|owner| is_same(&owner)) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn lock(&self) -> Result<File, AnyError> {
        let lock = File::open(&self.folder).step_on("open", &self.folder)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).step_on("lock", &self.folder)?;
        Ok(lock)
    }

    fn file(&self, number: u32) -> PathBuf {
        self.folder.join(number.to_string())
    }
}

/// The folder of the container that has a number, which may be gone.
fn owner(file: &Path) -> Option<PathBuf> {
    let path = input::read(file, OWNER_MAX).ok()?;
    Some(OsString::from_vec(path).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_different_until_their_container_is_gone() {
        let top = std::env::temp_dir().join(format!("mayfly-oci-users-{}", std::process::id()));
        let accounts = Accounts {
            folder: top.join("users"),
            first: 500,
            count: 2,
        };
        let states: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| top.join(name)).collect();
        for state in &states {
            std::fs::create_dir_all(state).unwrap();
        }
        let take = |state: &Path| {
            let mut number = 0;
            let taken = accounts.take(state, |it| {
                number = it;
                Ok(())
            });
            taken.map(|()| number)
        };
        let (first, second) = (take(&states[0]).unwrap(), take(&states[1]).unwrap());
        assert_eq!([first.min(second), first.max(second)], [500, 501]);
        let error = take(&states[2]).unwrap_err();
        assert!(error.to_string().contains("all 2 from 500"), "{error}");
        // Its create was killed, and its folder removed.
        std::fs::remove_dir(&states[1]).unwrap();
        assert_eq!(take(&states[2]).unwrap(), second);
        // The one whose folder was removed does not have it any more.
        accounts.give_back(second, &states[1]);
        assert!(top.join("users").join(second.to_string()).exists());
        accounts.give_back(second, &states[2]);
        assert_eq!(take(&states[2]).unwrap(), second);
        std::fs::remove_dir_all(&top).unwrap();
    }
}
