//! Small files that the caller names, such as settings: read whole, of a bounded length. A pipe may be one
//! (`<(...)` of a shell), and is waited for until a bounded time.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use crate::sys;

/// How long a whole file may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is read at once.
const PART: usize = 64 << 10;

/// Such a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is longer than {0} MiB")]
    TooLong(u64),
    #[error("it did not end within {0} s; name a file, or end what writes to it")]
    TooSlow(u64),
}

/// The content of a file of at most `max` bytes, which is a number of MiB.
pub fn read(path: &Path, max: u64) -> Result<Vec<u8>, InputError> {
    read_within(path, max, PATIENCE)
}

fn read_within(path: &Path, max: u64, patience: Duration) -> Result<Vec<u8>, InputError> {
    let until = Instant::now() + patience;
    // NONBLOCK: neither the open nor a read waits for what writes to a pipe.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut file = File::from(sys::open(path, flags).map_err(io::Error::from)?);
    let mut bytes = Vec::new();
    let mut part = vec![0; PART];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match poll(
            &mut [PollFd::new(&file.as_fd(), PollFlags::IN)],
            left.as_ref(),
        ) {
            Ok(0) => return Err(InputError::TooSlow(patience.as_secs())),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(io::Error::from(error).into()),
        }
        match file.read(&mut part) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        if bytes.len() as u64 > max {
            return Err(InputError::TooLong(max >> 20));
        }
        // A device that always has more is no slower than one byte at a time.
        if Instant::now() >= until {
            return Err(InputError::TooSlow(patience.as_secs()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn file_is_read_whole_up_to_the_limit() {
        let folder = Folder::new("input");
        let path = folder.path().join("file");
        let most = vec![b'x'; 1 << 20];
        std::fs::write(&path, &most).unwrap();
        assert!(read(&path, 1 << 20).unwrap() == most);
        std::fs::write(&path, [most, vec![b'x']].concat()).unwrap();
        let error = read(&path, 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "it is longer than 1 MiB");
        let error = read(Path::new("/dev/zero"), 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "it is longer than 1 MiB");
        assert!(read(folder.path(), 1 << 20).is_err());
    }

    #[test]
    fn pipe_is_read_to_its_end_and_not_waited_for_without_end() {
        let folder = Folder::new("input-pipe");
        let path = folder.path().join("pipe");
        let made = rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &path,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        );
        made.unwrap();
        let error = read_within(&path, 1 << 20, Duration::ZERO).unwrap_err();
        assert!(matches!(error, InputError::TooSlow(0)), "{error}");
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || std::fs::write(path, vec![b'x'; 200_000]).unwrap())
        };
        assert_eq!(read(&path, 1 << 20).unwrap().len(), 200_000);
        writer.join().unwrap();
        // One that is held open, and never ends.
        let open = OFlags::RDWR | OFlags::NONBLOCK;
        let held = sys::open(&path, open).unwrap();
        rustix::io::write(&held, b"part").unwrap();
        let error = read_within(&path, 1 << 20, Duration::ZERO).unwrap_err();
        assert!(matches!(error, InputError::TooSlow(0)), "{error}");
    }
}
