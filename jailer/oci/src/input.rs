//! Files that the caller or another command names: read whole, of a bounded length. A pipe or a device may
//! have no end, and is refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;

/// Such a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is longer than {0} KiB")]
    TooLong(u64),
}

/// The content of a regular file of at most `max` bytes.
pub fn read(path: &Path, max: u64) -> Result<Vec<u8>, InputError> {
    // NONBLOCK: to open a pipe must not wait.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(InputError::NotAFile);
    }
    read_stream(file, max)
}

/// What comes of a stream to its end, at most `max` bytes.
pub fn read_stream(from: impl Read, max: u64) -> Result<Vec<u8>, InputError> {
    let mut bytes = Vec::new();
    from.take(max + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > max {
        true => Err(InputError::TooLong(max >> 10)),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_without_end_and_long_ones_are_refused() {
        let path = std::env::temp_dir().join(format!("mayfly-oci-input-{}", std::process::id()));
        std::fs::write(&path, [b'x'; 1025]).unwrap();
        assert_eq!(read(&path, 2048).unwrap(), [b'x'; 1025]);
        let long = read(&path, 1024).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(long, "it is longer than 1 KiB");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let pipe = read(&path, 1024);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(pipe, Err(InputError::NotAFile)), "{pipe:?}");
        let device = read(Path::new("/dev/zero"), 1024);
        assert!(matches!(device, Err(InputError::NotAFile)), "{device:?}");
        let missing = read(&path, 1024);
        assert!(matches!(missing, Err(InputError::Io(_))), "{missing:?}");
        let stream = read_stream(io::repeat(1), 1024);
        assert!(matches!(stream, Err(InputError::TooLong(1))), "{stream:?}");
    }
}
