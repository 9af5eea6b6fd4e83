//! Numbers in files of others: every read is checked, none panics.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// As many bytes as the file has at `at`, at most `len`.
pub fn read(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, mut have) = (vec![0; len], 0);
    // No file reaches there; the system calls the offset invalid.
    if at > i64::MAX as u64 - len as u64 {
        return Ok(Vec::new());
    }
    while have < len {
        match file.read_at(&mut bytes[have..], at.saturating_add(have as u64)) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

pub fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// Whether `what` is at `at`.
pub fn has(bytes: &[u8], at: usize, what: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(what))
}

/// The bytes before the first zero.
pub fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Text up to its first zero byte, without control characters.
pub fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let end = at.saturating_add(len).min(bytes.len());
    let field = until_zero(bytes.get(at..end).unwrap_or_default());
    crate::failure::clean(String::from_utf8_lossy(field).trim())
}

/// A size as people say it, exact where it is not a whole number.
pub fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        let (whole, rest) = (bytes >> shift, bytes & ((1 << shift) - 1));
        if whole == 0 {
            continue;
        }
        if rest == 0 {
            return format!("{whole} {unit}");
        }
        let tenths = (u128::from(bytes) * 10) >> shift;
        return format!("{}.{} {unit} ({bytes} bytes)", tenths / 10, tenths % 10);
    }
    format!("{bytes} bytes")
}

/// A size as it is given on a command line: MiB, or with M or G.
pub fn given_size(text: &str) -> Result<u64, String> {
    /// What ext4 has with blocks of 4 KiB and without 64-bit numbers, and EROFS.
    const SIZE_MAX: u64 = 16 << 40;
    let (number, shift) = match text.as_bytes().last() {
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'M') => (&text[..text.len() - 1], 20),
        _ => (text, 20),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "give MiB, or a number with M or G".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if (1..=SIZE_MAX).contains(&bytes) => Ok(bytes),
        _ => Err("give 1M to 16384G".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact() {
        assert_eq!(size(100 << 20), "100 MiB");
        assert_eq!(size((100 << 20) + 512), "100.0 MiB (104858112 bytes)");
        assert_eq!(size(12), "12 bytes");
    }

    #[test]
    fn numbers_past_the_end_are_none() {
        assert_eq!(le32(&[1, 2, 3], 0), None);
        assert_eq!(be64(&[0; 8], usize::MAX), None);
        assert_eq!(be16(&[1, 2], 0), Some(0x102));
        assert_eq!(text(b"ab\0c", 1, 100), "b");
    }
}
