//! What a state file begins with, and putting one together.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::sys::fd;

/// The latest version of the format, major and minor. Files of the same major and of this or an earlier
/// minor version are read. A file is written in the earliest version that has all that is in it.
pub const VERSION: (u16, u16) = (1, 1);

/// The earliest version of the format: what has nothing that came later is written in it.
pub const FIRST_VERSION: (u16, u16) = (1, 0);

/// A version as command lines and messages write it.
pub fn version((major, minor): (u16, u16)) -> String {
    format!("v{major}.{minor}.0")
}

/// The first bytes of a state file. The first is no ASCII, so that no text begins like this.
pub(super) const MAGIC: [u8; 8] = *b"\x89MAYFLY\n";

/// Where the parts of the fixed header are; all numbers are little-endian.
pub(super) const VERSION_AT: usize = 8;
pub(super) const CRC_AT: usize = 12;
pub(super) const LEN_AT: usize = 16;
pub(super) const HEADER_LEN_AT: usize = 24;
pub(super) const RESERVED_AT: usize = 28;
/// How long the fixed header is.
pub(super) const FIXED: usize = 32;

/// What a snapshot is called: 16 random bytes, in its state file and in its memory image.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// A new one.
    ///
    /// # Errors
    /// When the host has no random numbers yet, early in its own boot.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        fd::random(&mut bytes)?;
        Ok(SnapshotId(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SnapshotId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        digits(text, 32)
            .map(|number| SnapshotId(number.to_be_bytes()))
            .ok_or("an id is 32 hexadecimal digits in lower case")
    }
}

impl Serialize for SnapshotId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SnapshotId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The number that exactly `count` hexadecimal digits stand for.
fn digits(text: &str, count: usize) -> Option<u128> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != count || !text.bytes().all(good) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

/// What the memory image of a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Kind {
    /// All of memory, written out.
    Full,
    /// What was written since the snapshot that it is applied to.
    Diff,
    /// All of memory: the memory of a machine that ran on beside it.
    Fork,
}

/// What the state file says of the memory image that belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryImage {
    /// Its length in bytes: that of guest memory.
    pub len: u64,
    /// The check value of its content, if it was made out.
    #[serde(default, with = "check_value")]
    pub check: Option<u64>,
    /// At which offset of the image the snapshot's id stands.
    pub id_at: u64,
}

mod check_value {
    use super::{Deserialize, Deserializer, Serializer, digits};
    use serde::de::Error;

    pub fn serialize<S: Serializer>(value: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(&format_args!("{value:016x}")),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        let Some(text) = Option::<String>::deserialize(from)? else {
            return Ok(None);
        };
        let value = digits(&text, 16).and_then(|value| u64::try_from(value).ok());
        let why = "a check value is 16 hexadecimal digits in lower case";
        value.map(Some).ok_or_else(|| D::Error::custom(why))
    }
}

/// What a snapshot is, apart from the machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The version of the format: it stands before the header.
    #[serde(skip, default = "latest_version")]
    pub version: (u16, u16),
    /// The same 16 bytes stand in the memory image.
    pub id: SnapshotId,
    /// What the memory image holds.
    pub kind: Kind,
    /// Of a diff: the snapshot that it is applied to.
    #[serde(default)]
    pub parent: Option<SnapshotId>,
    /// What is known of the memory image.
    pub memory: MemoryImage,
    /// When the guest was stopped for it: nanoseconds since 1970, UTC.
    pub taken: u64,
}

fn latest_version() -> (u16, u16) {
    VERSION
}

/// A whole state file.
///
/// # Errors
/// When `state` cannot be written as JSON.
pub fn encode<S: Serialize>(header: &Header, state: &S) -> Result<Vec<u8>, serde_json::Error> {
    encode_json(header, &serde_json::to_vec(state)?)
}

/// The same with a state that is JSON already.
///
/// # Errors
/// None that a header can bring about.
pub fn encode_json(header: &Header, state: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = vec![0; FIXED];
    serde_json::to_writer(&mut bytes, header)?;
    let header_len = bytes.len().saturating_sub(FIXED);
    bytes.extend_from_slice(state);
    seal(&mut bytes, header_len, header.version);
    Ok(bytes)
}

/// Fills in the fixed header of a file whose other parts are in place.
pub(super) fn seal(bytes: &mut [u8], header_len: usize, (major, minor): (u16, u16)) {
    let len = bytes.len() as u64;
    put(bytes, 0, &MAGIC);
    put(bytes, VERSION_AT, &major.to_le_bytes());
    put(bytes, VERSION_AT.saturating_add(2), &minor.to_le_bytes());
    put(bytes, LEN_AT, &len.to_le_bytes());
    let header_len = u32::try_from(header_len).unwrap_or(u32::MAX);
    put(bytes, HEADER_LEN_AT, &header_len.to_le_bytes());
    put(bytes, RESERVED_AT, &[0; 4]);
    let crc = checksum(bytes);
    put(bytes, CRC_AT, &crc.to_le_bytes());
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(value.len())) {
        place.copy_from_slice(value);
    }
}

/// The CRC-32 of all bytes of a state file but those that hold it.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytes.get(..CRC_AT).unwrap_or_default());
    crc.update(bytes.get(LEN_AT..).unwrap_or_default());
    crc.finalize()
}
