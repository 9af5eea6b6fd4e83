//! Where the socket of a microVM that runs a command is, by its id: in a folder of this user alone.

use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::error::{Advice as _, AnyError, Step as _};

/// Where root's are.
const OF_ROOT: &str = "/run/mayfly";

/// The folder is not this user's alone.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use the folder {0}: it is not a folder of this user that no other may open (mode 0700); remove it, or set \
     XDG_RUNTIME_DIR to a folder of this user"
)]
struct NotOwn(PathBuf);

/// The folder of this user: `/run/mayfly` of root, `$XDG_RUNTIME_DIR/mayfly` of others, and without that
/// variable `/tmp/mayfly-UID`.
fn folder() -> PathBuf {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return OF_ROOT.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|it| it.as_encoded_bytes().starts_with(b"/")) {
        Some(runtime) => Path::new(&runtime).join("mayfly"),
        None => format!("/tmp/mayfly-{}", uid.as_raw()).into(),
    }
}

/// The socket of `id`.
pub fn socket(id: &str) -> PathBuf {
    folder().join(format!("{id}.sock"))
}

/// Makes the folder, if it is not there, and makes sure that it is this user's.
pub fn make_folder() -> Result<(), AnyError> {
    let folder = folder();
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.mode(0o700).create(&folder);
    if let Err(error) = made
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        let failed = Err::<(), _>(error).step_on("make the folder for sockets", &folder);
        return Ok(failed.advise("set XDG_RUNTIME_DIR to a folder of this user")?);
    }
    close_to_others(&folder);
    check(&folder)
}

/// A folder of this user that others may read, but not write to, is closed to them.
fn close_to_others(folder: &Path) {
    let uid = rustix::process::geteuid().as_raw();
    let is_own = |it: &std::fs::Metadata| it.is_dir() && it.uid() == uid && it.mode() & 0o022 == 0;
    if std::fs::symlink_metadata(folder).is_ok_and(|it| is_own(&it)) {
        let own = std::fs::Permissions::from_mode(0o700);
        // What comes of it is looked at.
        let _ = std::fs::set_permissions(folder, own);
    }
}

/// Makes sure that the folder is this user's alone.
pub fn check_folder() -> Result<(), AnyError> {
    check(&folder())
}

fn check(folder: &Path) -> Result<(), AnyError> {
    let found = std::fs::symlink_metadata(folder).step_on("look at the folder", folder)?;
    let is_own = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_dir() || !is_own || found.mode() & 0o077 != 0 {
        return Err(NotOwn(folder.to_owned()).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_that_others_may_open_is_closed_to_them_or_refused() {
        let own = crate::testing::Folder::new("place");
        let set = |mode| {
            std::fs::set_permissions(own.path(), std::fs::Permissions::from_mode(mode)).unwrap()
        };
        set(0o700);
        check(own.path()).unwrap();
        set(0o755);
        assert!(check(own.path()).is_err());
        close_to_others(own.path());
        check(own.path()).unwrap();
        for mode in [0o777, 0o720] {
            set(mode);
            close_to_others(own.path());
            assert!(
                check(own.path())
                    .unwrap_err()
                    .to_string()
                    .contains("no other may open")
            );
        }
        set(0o700);
        let link = own.path().join("link");
        std::os::unix::fs::symlink(own.path(), &link).unwrap();
        assert!(check(&link).is_err());
    }
}
