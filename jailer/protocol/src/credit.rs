//! Flow control of one stream in one direction: bytes are sent only for credit that the receiver gave, so
//! that neither side holds more than a window of them, and none is lost.

use crate::Malformed;

/// Of the side that sends: how much it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    left: u32,
    window: u32,
}

impl Sender {
    /// With a whole window.
    pub const fn new(window: u32) -> Self {
        Sender {
            left: window,
            window,
        }
    }

    /// Bytes that may be sent.
    pub fn left(&self) -> usize {
        self.left as usize
    }

    /// So many were sent, at most what was left.
    pub fn sent(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.left = self.left.saturating_sub(count);
    }

    /// The other side took some.
    ///
    /// # Errors
    /// When that would be more than it can have taken.
    pub fn grant(&mut self, count: u32) -> Result<(), Malformed> {
        let left = self.left.checked_add(count).ok_or(Malformed::Credit)?;
        if left > self.window {
            return Err(Malformed::Credit);
        }
        self.left = left;
        Ok(())
    }
}

/// Of the side that receives: how much may come, and how much was passed on since that was last said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    open: u32,
    owed: u32,
    window: u32,
}

impl Receiver {
    /// With a whole window.
    pub const fn new(window: u32) -> Self {
        Receiver {
            open: window,
            owed: 0,
            window,
        }
    }

    /// So many bytes came.
    ///
    /// # Errors
    /// When there was no credit for them.
    pub fn received(&mut self, count: usize) -> Result<(), Malformed> {
        let count = u32::try_from(count).map_err(|_| Malformed::Credit)?;
        self.open = self.open.checked_sub(count).ok_or(Malformed::Credit)?;
        Ok(())
    }

    /// So many were passed on.
    pub fn passed_on(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.owed = self.owed.saturating_add(count);
    }

    /// The credit to be given now, once that is half of a window: not a message for each byte.
    pub fn due(&self) -> Option<u32> {
        (self.owed >= self.window / 2).then_some(self.owed)
    }

    /// Gives credit that another side asks to be given.
    ///
    /// # Errors
    /// When that would be more than a window.
    pub fn give(&mut self, count: u32) -> Result<(), Malformed> {
        let open = self.open.checked_add(count).ok_or(Malformed::Credit)?;
        if open > self.window {
            return Err(Malformed::Credit);
        }
        self.open = open;
        Ok(())
    }

    /// It was given.
    pub fn given(&mut self, count: u32) {
        self.owed = self.owed.saturating_sub(count);
        self.open = self.open.saturating_add(count).min(self.window);
    }
}
