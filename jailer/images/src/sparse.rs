//! Copies that make holes of zeros.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::progress::Progress;

const CHUNK: usize = 1 << 20;
/// Zeros are left out in pieces of the usual block size.
const BLOCK: usize = 4096;

/// Writes `bytes` at `at` without their blocks of zeros.
pub fn write_data(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut start = None;
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        let here = index * BLOCK;
        let is_zero = block.iter().all(|&byte| byte == 0);
        match (start, is_zero) {
            (None, false) => start = Some(here),
            (Some(from), true) => {
                to.write_all_at(&bytes[from..here], at + from as u64)?;
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(from) => to.write_all_at(&bytes[from..], at + from as u64),
        None => Ok(()),
    }
}

/// Fills `buffer` as far as `from` has bytes.
pub fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match from.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// A stream has more than this many bytes, which is as much as it may have.
#[derive(Debug)]
struct TooLong(u64);

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "more than {} MiB", self.0 >> 20)
    }
}

impl std::error::Error for TooLong {}

/// Whether [`from_stream`] has failed because there was more than it was to write.
pub fn is_too_long(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|it| it.is::<TooLong>())
}

/// Writes all that `from` has, at most `max` bytes, into the empty file `to`; its length.
pub fn from_stream(
    from: &mut dyn Read,
    to: &File,
    max: u64,
    progress: &mut Progress,
) -> io::Result<u64> {
    let (mut buffer, mut at) = (vec![0; CHUNK], 0u64);
    loop {
        let len = fill(from, &mut buffer)?;
        if len == 0 {
            to.set_len(at)?;
            return Ok(at);
        }
        if at + len as u64 > max {
            return Err(io::Error::other(TooLong(max)));
        }
        write_data(to, &buffer[..len], at)?;
        at += len as u64;
        progress.set(at);
    }
}
