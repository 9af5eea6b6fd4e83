//! A short text of fixed size, for results: there is no allocator.

use core::fmt::{self, Write};

/// Up to [`Text::SIZE`] bytes; what does not fit is cut off.
pub struct Text {
    bytes: [u8; Self::SIZE],
    length: usize,
}

impl Text {
    const SIZE: usize = 512;

    pub fn new(arguments: fmt::Arguments) -> Self {
        let mut text = Text {
            bytes: [0; Self::SIZE],
            length: 0,
        };
        // A text that is cut off is still a text.
        let _ = text.write_fmt(arguments);
        text
    }

    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("?")
    }
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = Self::SIZE - self.length;
        let mut count = part.len().min(room);
        while !part.is_char_boundary(count) {
            count -= 1;
        }
        self.bytes[self.length..self.length + count].copy_from_slice(&part.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Text::new(format_args!("{text}"))
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `format!`, into a [`Text`].
#[macro_export]
macro_rules! text {
    ($($argument:tt)*) => { $crate::text::Text::new(format_args!($($argument)*)) };
}
