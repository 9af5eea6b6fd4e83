//! A copy of a part of a file, which keeps holes and makes holes of zeros.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::failure::{Context, Result};
use crate::progress::Progress;
use crate::sparse::write_data;

const CHUNK: usize = 1 << 20;

/// Copies `len` bytes of a file from `offset` on to a new file.
pub fn copy_part(from: &File, offset: u64, len: u64, to: &Path, what: &'static str) -> Result<()> {
    let target = File::create_new(to).cannot("create", to)?;
    target.set_len(len).cannot("write", to)?;
    let mut progress = Progress::new(what, len);
    let (mut at, mut buffer) = (0, vec![0; CHUNK]);
    while at < len {
        let data = match rustix::fs::seek(from, SeekFrom::Data(offset + at)) {
            Ok(data) => data.saturating_sub(offset),
            // Nothing but a hole from here on.
            Err(Errno::NXIO) => break,
            // A file system without holes.
            Err(_) => at,
        };
        if data >= len {
            break;
        }
        let hole = rustix::fs::seek(from, SeekFrom::Hole(offset + data));
        let end = hole.map_or(len, |hole| hole.saturating_sub(offset).min(len));
        at = data;
        while at < end {
            let part = CHUNK.min((end - at) as usize);
            from.read_exact_at(&mut buffer[..part], offset + at)
                .cannot("read the source of", to)?;
            write_data(&target, &buffer[..part], at).cannot("write", to)?;
            at += part as u64;
            progress.set(at);
        }
    }
    Ok(())
}
