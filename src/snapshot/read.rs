//! Reading a state file, and whether a memory image belongs to it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use serde::de::DeserializeOwned;

use super::header::{
    CRC_AT, FIXED, HEADER_LEN_AT, Header, Kind, LEN_AT, MAGIC, RESERVED_AT, SnapshotId, VERSION,
    VERSION_AT, checksum, version,
};
use super::place::{LINKS, old_name};
use super::{MemoryImage, STATE_MAX, Target, partial_name};
use crate::wire::config::json::{self, JsonError};

/// Why a file is not taken. Messages put the file before it: "The state file `x` is truncated ...".
#[derive(Debug)]
pub enum Refusal {
    /// It cannot be opened or read.
    Io(io::Error),
    /// It is something else than a regular file.
    Kind(&'static str),
    /// It ends before the end that it announces.
    Truncated {
        /// Its length.
        len: u64,
        /// The length that it should have, if it says so.
        expected: Option<u64>,
    },
    /// Writing it in place was begun and not finished.
    Unfinished,
    /// Its check value does not fit, or its parts do not.
    Altered(String),
    /// It is a file of this program.
    Foreign(&'static str),
    /// A later version of this program wrote it.
    Newer(u16, u16),
    /// It is longer than any state file.
    TooLong(u64),
    /// What it holds is no state of a machine.
    Content(JsonError),
    /// It is a memory image of another length.
    Length {
        /// Its length.
        len: u64,
        /// The length that the state file says.
        expected: u64,
    },
    /// It is the memory image of another snapshot.
    Mixed {
        /// The id in the image.
        image: SnapshotId,
        /// The id in the state file.
        state: SnapshotId,
    },
    /// It is not the snapshot of a whole machine: what it is to be applied to.
    Diff(SnapshotId),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Io(cause) => write!(f, "cannot be read: {cause}"),
            Refusal::Kind(kind) => write!(f, "is {kind}, not a file"),
            Refusal::Truncated {
                len,
                expected: Some(expected),
            } => write!(
                f,
                "is truncated: it has {len} of {expected} bytes. Take the snapshot again"
            ),
            Refusal::Truncated {
                len,
                expected: None,
            } => write!(
                f,
                "is truncated: it has {len} bytes only. Take the snapshot again"
            ),
            Refusal::Unfinished => f.write_str(
                "was not written to its end, because creating the snapshot was interrupted (take it \
                 again), or is the memory file",
            ),
            Refusal::Altered(what) => write!(
                f,
                "was altered after it was written: {what}. Take the snapshot again"
            ),
            Refusal::Foreign(what) => write!(f, "is not a snapshot of mayfly: {what}"),
            Refusal::Newer(major, minor) => write!(
                f,
                "has version {} of the format, and this program reads versions up to {}. Use the \
                 version of mayfly that wrote it, or a later one",
                version((*major, *minor)),
                version(VERSION)
            ),
            Refusal::TooLong(len) => write!(
                f,
                "is too long for a state file: it has {len} bytes, and the longest has {STATE_MAX}. \
                 Check that it is not the memory file"
            ),
            Refusal::Content(cause) => write!(f, "does not hold a machine's state: {cause}"),
            Refusal::Length { len, expected } => write!(
                f,
                "has {len} bytes, and the memory of this snapshot has {expected}: it is truncated, or \
                 belongs to another snapshot"
            ),
            Refusal::Mixed { image, state } => write!(
                f,
                "belongs to another snapshot: it is the memory of {image}, and the state file is \
                 that of {state}"
            ),
            Refusal::Diff(parent) => write!(
                f,
                "is a diff snapshot, which holds a part of memory only. Merge it into its base, \
                 {parent}, first"
            ),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Self {
        Refusal::Io(cause)
    }
}

/// What a file that is no regular one is.
pub(super) fn kind_of(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else if kind.is_block_device() {
        Some("a block device")
    } else if kind.is_char_device() {
        Some("a character device")
    } else {
        Some("an anonymous inode")
    }
}

/// Opens a regular file for reading, without waiting for the other end of anything else.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub fn open_regular(path: &Path) -> Result<File, Refusal> {
    let mut options = OpenOptions::new();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = options.read(true).custom_flags(flags).open(path)?;
    check_regular(&file)?;
    Ok(file)
}

/// Its length, if it is a regular file.
fn check_regular(file: &File) -> Result<u64, Refusal> {
    let metadata = file.metadata()?;
    match kind_of(&metadata) {
        None => Ok(metadata.len()),
        Some(kind) => Err(Refusal::Kind(kind)),
    }
}

/// The machine's state in a state file, not looked at yet.
#[derive(Debug)]
pub struct RawState {
    bytes: Vec<u8>,
    /// Where the state begins.
    start: usize,
}

impl RawState {
    /// The state, in JSON.
    pub fn json(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// The whole state file.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Makes the state of it.
    ///
    /// # Errors
    /// When it is not one: the member, and the reason.
    pub fn parse<S: DeserializeOwned>(&self) -> Result<S, Refusal> {
        json::parse_written(self.json()).map_err(Refusal::Content)
    }
}

/// Reads a state file from its first byte on, wherever the descriptor is.
///
/// # Errors
/// When it is no regular file, truncated, altered, foreign, too long, or of a later version.
pub fn read(file: &File) -> Result<(Header, RawState), Refusal> {
    let len = check_regular(file)?;
    if len > STATE_MAX {
        let mut first = [0; FIXED];
        file.read_exact_at(&mut first, 0)?;
        return Err(match check_format(&first) {
            Err(Refusal::Foreign(what)) if what != UNKNOWN => Refusal::Foreign(what),
            Err(Refusal::Newer(major, minor)) => Refusal::Newer(major, minor),
            _ => Refusal::TooLong(len),
        });
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::UnexpectedEof => Refusal::Altered("it is being written".into()),
            _ => Refusal::Io(cause),
        })?;
    let (header, start) = decode(&bytes)?;
    Ok((header, RawState { bytes, start }))
}

fn decode(bytes: &[u8]) -> Result<(Header, usize), Refusal> {
    check_format(bytes)?;
    let len = bytes.len() as u64;
    let major = number16(bytes, VERSION_AT);
    let minor = number16(bytes, VERSION_AT.saturating_add(2));
    let version = (major, minor);
    let expected = u64::from_le_bytes(array(bytes, LEN_AT).ok_or(Refusal::Truncated {
        len,
        expected: None,
    })?);
    if len < FIXED as u64 || len < expected {
        return Err(Refusal::Truncated {
            len,
            expected: Some(expected),
        });
    }
    let crc = u32::from_le_bytes(array(bytes, CRC_AT).unwrap_or_default());
    if crc != checksum(bytes) {
        return Err(Refusal::Altered("its check value does not fit".into()));
    }
    // What follows would take a writer that is at fault.
    let wrong = |what: &str| Refusal::Altered(what.into());
    if len != expected {
        return Err(wrong("it is longer than it says"));
    }
    if array(bytes, RESERVED_AT) != Some([0; 4]) {
        return Err(wrong("a reserved field is not zero"));
    }
    let header_len = u32::from_le_bytes(array(bytes, HEADER_LEN_AT).unwrap_or_default());
    let start = usize::try_from(header_len)
        .ok()
        .and_then(|header_len| FIXED.checked_add(header_len))
        .filter(|start| *start <= bytes.len())
        .ok_or_else(|| wrong("its header ends outside of it"))?;
    let header = json::parse_written::<Header>(bytes.get(FIXED..start).unwrap_or_default());
    let header = header.map_err(Refusal::Content)?;
    Ok((Header { version, ..header }, start))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes
        .get(at..at.saturating_add(N))
        .and_then(|part| part.try_into().ok())
}

fn number16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at).unwrap_or_default())
}

/// Whether a file that begins with `bytes` is one of ours, of a version that is known.
fn check_format(bytes: &[u8]) -> Result<(), Refusal> {
    let first = bytes.get(..FIXED).unwrap_or(bytes);
    if !first.starts_with(&MAGIC) {
        return Err(match bytes.len() {
            // Also of nothing.
            short if MAGIC.starts_with(first) => Refusal::Truncated {
                len: short as u64,
                expected: None,
            },
            _ if first.len() == FIXED && first.iter().all(|byte| *byte == 0) => Refusal::Unfinished,
            _ => Refusal::Foreign(foreign(bytes)),
        });
    }
    let Some(version) = array::<4>(bytes, VERSION_AT) else {
        return Err(Refusal::Truncated {
            len: bytes.len() as u64,
            expected: None,
        });
    };
    let (major, minor) = (number16(&version, 0), number16(&version, 2));
    match (major, minor) {
        (0, _) => Err(Refusal::Altered("its version is 0".into())),
        (major, minor) if major > VERSION.0 || (major == VERSION.0 && minor > VERSION.1) => {
            Err(Refusal::Newer(major, minor))
        }
        _ => Ok(()),
    }
}

/// What Firecracker's state files hold near their start, on x86-64 and on aarch64.
const FIRECRACKER: [u64; 2] = [0x0710_1984_8664_0000, 0x0710_1984_AAAA_0000];

/// What is told of a file that nothing is known of.
const UNKNOWN: &str = "it begins with unknown bytes";

/// What a file of another program is, as far as its first bytes tell.
fn foreign(bytes: &[u8]) -> &'static str {
    let start = bytes.get(..4096).unwrap_or(bytes);
    let is_firecracker = |window: &[u8]| {
        let number = array(window, 0).map(u64::from_le_bytes);
        number.is_some_and(|number| FIRECRACKER.contains(&number))
    };
    if start.windows(8).any(is_firecracker) {
        return "it is a snapshot of Firecracker, whose state cannot be converted. Take it again \
                with mayfly";
    }
    let known: [(&[u8], &str); 5] = [
        (b"QEVM", "it is a saved machine of QEMU"),
        (b"LibvirtQemudSave", "it is a saved machine of libvirt"),
        (b"QFI\xfb", "it is a disk image (QCOW2)"),
        (b"\x7fELF", "it is an ELF file"),
        (
            b"{",
            "it is JSON, as the states of Cloud Hypervisor and configurations are",
        ),
    ];
    let found = known.iter().find(|(magic, _)| start.starts_with(magic));
    found.map_or(UNKNOWN, |(_, what)| what)
}

impl Header {
    /// Whether a machine can be made of this snapshot as it is.
    ///
    /// # Errors
    /// When it is a diff.
    pub fn check_whole(&self) -> Result<(), Refusal> {
        match (self.kind, self.parent) {
            (Kind::Diff, Some(parent)) => Err(Refusal::Diff(parent)),
            // The first diff of a machine holds all that it has written since it began.
            (Kind::Diff, None) | (Kind::Full | Kind::Fork, _) => Ok(()),
        }
    }
}

/// The id in a memory image.
fn image_id(image: &File, at: u64) -> io::Result<SnapshotId> {
    let mut bytes = [0; 16];
    image.read_exact_at(&mut bytes, at)?;
    Ok(SnapshotId(bytes))
}

/// Whether `image` is the memory image that belongs to the state file with `header`: by its length
/// and its id, not by its content.
///
/// # Errors
/// When it does not, or is no regular file.
pub fn check_memory(header: &Header, image: &File) -> Result<(), Refusal> {
    let len = check_regular(image)?;
    let expected = header.memory.len;
    if len != expected {
        return Err(Refusal::Length { len, expected });
    }
    let at = header.memory.id_at;
    if at.checked_add(16).is_none_or(|end| end > len) {
        let what = "the place of its id in the memory file is outside of that";
        return Err(Refusal::Altered(what.into()));
    }
    match image_id(image, at)? {
        id if id == header.id => Ok(()),
        image => Err(Refusal::Mixed {
            image,
            state: header.id,
        }),
    }
}

/// Whether there is an image of snapshot `id`, of the length and with the place of the id that `memory` has, where
/// `target` would be written.
pub fn is_onto(target: &Target, memory: &MemoryImage, id: SnapshotId) -> bool {
    let bears_it = |image: &File| {
        check_regular(image).is_ok_and(|len| len == memory.len)
            && image_id(image, memory.id_at).is_ok_and(|found| found == id)
    };
    match target {
        Target::Path(path) => open_regular(path).is_ok_and(|image| bears_it(&image)),
        Target::File { file, .. } => bears_it(file),
    }
}

/// How often a pair is read that is another one each time.
const TRIES: u32 = 20;

/// Reads a state file with `state`, and opens the memory image that belongs to it with `memory`
/// ([`memory_of`]). Does both again when a create at the same paths came in between: then the state file is
/// another one by now, or was about to be.
///
/// # Errors
/// What `state` gives. In the result, why the memory image is not taken.
pub fn read_pair<S, E>(
    mut state: impl FnMut() -> Result<(Header, S), E>,
    mut memory: impl FnMut(&Header) -> Result<File, Refusal>,
) -> Result<(Header, S, Result<File, Refusal>), E> {
    let mut before = None;
    let mut tries = TRIES;
    loop {
        let (header, state) = state()?;
        let image = memory(&header);
        tries = tries.saturating_sub(1);
        let may_be_replaced = match &image {
            Err(Refusal::Mixed { .. } | Refusal::Length { .. }) => true,
            Err(Refusal::Io(cause)) => cause.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
        if !may_be_replaced || before == Some(header.id) || tries == 0 {
            return Ok((header, state, image));
        }
        before = Some(header.id);
    }
}

/// The memory image that belongs to the state file with `header`: what was `opened` at `path`, or what a
/// create that was killed has left beside it.
///
/// # Errors
/// Why what was opened is not taken.
pub fn memory_of(
    header: &Header,
    opened: Result<File, Refusal>,
    path: Option<&Path>,
) -> Result<File, Refusal> {
    let checked = opened.and_then(|image| {
        check_memory(header, &image)?;
        Ok(image)
    });
    checked.or_else(|refusal| {
        let left = path.and_then(|path| partial_memory(header, path));
        left.ok_or(refusal)
    })
}

/// The memory image of the snapshot with `header` beside `path`, where a create that was killed has
/// left it: it had put its own image at `path`, or was about to, and not yet its state file in place.
pub(super) fn partial_memory(header: &Header, path: &Path) -> Option<File> {
    // A symbolic link is followed as it was when the image was written; there may be nothing at its end.
    let mut path = path.to_path_buf();
    for _ in 0..LINKS {
        match std::fs::read_link(&path) {
            Ok(target) => path = path.parent()?.join(target),
            Err(_) => break,
        }
    }
    let name: &OsStr = path.file_name()?;
    [partial_name(name), old_name(name)]
        .iter()
        .find_map(|name| {
            let image = open_regular(&path.with_file_name(name)).ok()?;
            check_memory(header, &image).ok()?;
            Some(image)
        })
}
