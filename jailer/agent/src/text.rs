//! A short text that is put together without the standard library's formatting, which is larger than the
//! rest of the agent.

use core::ffi::CStr;

use crate::sys::Errno;

/// What is longer is cut.
const ROOM: usize = 512;

pub struct Text {
    bytes: [u8; ROOM],
    used: usize,
}

impl Text {
    /// Bytes that it has room for.
    pub const MAX: usize = ROOM - 1;

    pub fn new() -> Self {
        Text {
            bytes: [0; ROOM],
            used: 0,
        }
    }

    /// `what` failed with `error`.
    pub fn of(what: &[u8], error: Errno) -> Self {
        let mut text = Text::new();
        text.add(b"cannot ").add(what).add_error(error);
        text
    }

    pub fn add(&mut self, more: &[u8]) -> &mut Self {
        // The last byte stays zero.
        let room = ROOM.saturating_sub(1).saturating_sub(self.used);
        let more = &more[..more.len().min(room)];
        let end = self.used.saturating_add(more.len());
        self.bytes[self.used..end].copy_from_slice(more);
        self.used = end;
        self
    }

    pub fn add_number(&mut self, mut number: u64) -> &mut Self {
        let mut digits = [0; 20];
        let mut first = digits.len();
        for (place, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' | (number % 10) as u8;
            number /= 10;
            first = place;
            if number == 0 {
                break;
            }
        }
        self.add(&digits[first..])
    }

    fn add_error(&mut self, error: Errno) -> &mut Self {
        let known: &[u8] = match error {
            Errno(1) => b"operation not permitted",
            Errno::NOENT => b"no such file or folder",
            Errno(5) => b"input/output error",
            Errno(8) => b"not a program of this machine",
            Errno(12) => b"out of memory",
            Errno::ACCES => b"permission denied",
            Errno(19) => b"the kernel was built without it",
            Errno::NOTDIR => b"not a folder",
            Errno(21) => b"it is a folder",
            Errno::INVAL => b"invalid argument",
            Errno(27) => b"file too large",
            Errno(28) => b"no space left",
            Errno(30) => b"read-only file system",
            Errno(36) => b"name too long",
            Errno::NOSYS => b"the kernel does not have that call",
            Errno(40) => b"it is a symbolic link",
            _ => b"",
        };
        match known {
            b"" => self
                .add(b": error ")
                .add_number(error.0.unsigned_abs().into()),
            known => self.add(b": ").add(known),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// Up to the first zero byte.
    pub fn c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}
