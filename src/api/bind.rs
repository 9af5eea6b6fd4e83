//! The API socket at a path.

use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The API socket could not be made.
#[derive(Debug)]
pub struct BindError {
    path: PathBuf,
    cause: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Failed to open the API socket at: {}. Check that it is not already used.",
            self.path.display()
        )
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Makes the API socket at `path`.
///
/// # Errors
/// Something is there already, or the place cannot be written.
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    UnixListener::bind(path).map_err(|cause| BindError {
        path: path.into(),
        cause,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn bind_when_the_path_exists_is_an_error() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("s");
        let _listener = bind(&path).unwrap();
        let error = crate::log::chain(&bind(&path).unwrap_err());
        assert!(
            error.contains("already used") && error.contains("in use"),
            "{error}"
        );
    }
}
