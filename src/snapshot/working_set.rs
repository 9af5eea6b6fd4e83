//! Opening the file in which the working set of a snapshot is recorded. Many guests of one snapshot have
//! one file: one that only reads it gets it for reading, wherever it can be read.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::SnapshotId;

/// How the file begins in which a working set has been recorded. The first byte is zero until all of it is
/// there.
const HEAD: &str = "{\"version\":1,\"id\":\"";

/// Whether a working set is to be recorded into `file`: nothing is in it, or what was not finished.
pub fn is_unrecorded(file: &File) -> bool {
    let mut found = [0; HEAD.len()];
    let found = match file.metadata().map(|metadata| metadata.len()) {
        Ok(len) if len < found.len() as u64 => found.get_mut(..len as usize),
        Ok(_) => Some(found.as_mut_slice()),
        Err(_) => None,
    };
    let Some(found) = found else { return false };
    if file.read_exact_at(found, 0).is_err() {
        return false;
    }
    match found.split_first() {
        None => true,
        Some((first, rest)) => {
            *first == 0
                && HEAD
                    .get(1..)
                    .unwrap_or_default()
                    .as_bytes()
                    .starts_with(rest)
        }
    }
}

/// Whether the working set of snapshot `id` has been recorded into `file`.
fn is_of(file: &File, id: SnapshotId) -> bool {
    let head = format!("{HEAD}{id}\"");
    let mut found = vec![0; head.len()];
    file.read_exact_at(&mut found, 0).is_ok() && found == head.as_bytes()
}

/// Opens the file at `path` for the working set of snapshot `id`: for reading if it has been recorded there,
/// else for writing too, to record it; made when it is missing. One that cannot be written to and is not
/// empty is opened for reading whatever it holds.
///
/// # Errors
/// The host's.
pub fn open_working_set(path: &Path, id: SnapshotId) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // Not to be held up by a FIFO without a writer, nor to make a terminal ours.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    options.read(true).custom_flags(flags);
    let to_read = match options.open(path) {
        Ok(file) if is_of(&file, id) => return Ok(file),
        Ok(file) => Some(file),
        Err(cause)
            if matches!(
                cause.kind(),
                ErrorKind::NotFound | ErrorKind::PermissionDenied
            ) =>
        {
            None
        }
        Err(cause) => return Err(cause),
    };
    // What a guest has in memory is its own.
    options.write(true).mode(0o600);
    let both_ways = match options.open(path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => options.create(true).open(path),
        opened => opened,
    };
    both_ways.or_else(|cause| to_read.filter(|file| !is_unrecorded(file)).ok_or(cause))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::sys::fd;

    const ID: SnapshotId = SnapshotId([0xab; 16]);

    fn whole(id: SnapshotId) -> String {
        format!("{HEAD}{id}\",\"written\":[],\"read\":[]}}")
    }

    #[test]
    fn file_when_it_is_opened_can_be_written_to_only_if_it_is_to_be_recorded() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("pages");
        let can_write = |path: &Path| {
            let file = open_working_set(path, ID).unwrap();
            fd::access(file).unwrap().write
        };
        assert!(can_write(&path));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        for (content, to_record) in [
            (String::new(), true),
            (whole(ID).replacen('{', "\0", 1), true),
            (whole(ID), false),
            (whole(SnapshotId([1; 16])), true),
        ] {
            fs::write(&path, &content).unwrap();
            assert_eq!(can_write(&path), to_record, "{content:?}");
        }
    }

    /// A program's file cannot be written to while it runs, by any user.
    #[test]
    fn file_that_cannot_be_written_to_is_opened_to_read_what_is_in_it() {
        let program = std::env::current_exe().unwrap();
        let file = open_working_set(&program, ID).unwrap();
        assert!(!fd::access(file).unwrap().write);
        // As on a file system that is mounted read-only: nothing could be recorded.
        let empty = Path::new("/proc/sys/kernel/version");
        open_working_set(empty, ID).unwrap_err();
        open_working_set(Path::new("/proc/none"), ID).unwrap_err();
    }

    #[test]
    fn file_that_begins_with_zeros_is_to_be_recorded_only_if_it_is_an_unfinished_one() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("pages");
        let is_unrecorded = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            is_unrecorded(&File::open(&path).unwrap())
        };
        let unfinished = whole(ID).replacen('{', "\0", 1);
        for len in 0..unfinished.len() {
            assert!(is_unrecorded(&unfinished.as_bytes()[..len]), "{len}");
        }
        for other in [whole(ID).as_bytes(), b"{", b"text", &[0; 4096], &[0, 0]] {
            assert!(!is_unrecorded(other), "{other:?}");
        }
    }
}
