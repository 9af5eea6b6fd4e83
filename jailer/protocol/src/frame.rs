//! Frames: a header with a sequence number, and messages.

use crate::message::{self, Message};
use crate::{FRAME_MAX, Malformed, u16_at, u32_at};

/// The version of the protocol. Both sides have to be of the same: agent and supervisor are of one build.
pub const VERSION: u8 = 3;
/// Length of a frame's header.
pub const HEADER: usize = 8;

/// A frame that is being filled. All of it is zero at first, so that a static one costs no file.
#[derive(Clone)]
pub struct Frame {
    bytes: [u8; FRAME_MAX],
    /// Bytes of messages.
    used: usize,
}

impl core::fmt::Debug for Frame {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Frame").field("used", &self.used).finish()
    }
}

impl Default for Frame {
    fn default() -> Self {
        Frame::new()
    }
}

impl Frame {
    /// Without messages.
    pub const fn new() -> Self {
        Frame {
            bytes: [0; FRAME_MAX],
            used: 0,
        }
    }

    /// Whether there are no messages in it.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Removes all messages.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Bytes that the body of one more message may have.
    pub fn room(&self) -> usize {
        FRAME_MAX
            .saturating_sub(HEADER)
            .saturating_sub(self.used)
            .saturating_sub(message::HEADER)
    }

    /// Adds a message; whether there was room for it.
    #[must_use]
    pub fn push(&mut self, message: &Message<'_>) -> bool {
        let start = HEADER.saturating_add(self.used);
        let Some(count) = self
            .bytes
            .get_mut(start..)
            .and_then(|rest| message.encode(rest))
        else {
            return false;
        };
        self.used = self.used.saturating_add(count);
        true
    }

    /// Adds bytes of a stream that `fill` puts in place, at most `most`; what it says. Without bytes nothing
    /// is added.
    pub fn push_data<E>(
        &mut self,
        process: u32,
        stream: crate::Stream,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let start = HEADER.saturating_add(self.used);
        let body = start.saturating_add(message::HEADER);
        let most = most.min(self.room()).min(crate::DATA_MAX);
        let end = body.saturating_add(most);
        let place = self.bytes.get_mut(body..end).unwrap_or_default();
        let count = fill(place)?.min(most);
        if count > 0 {
            let header = message::header(message::DATA, stream as u8, process, count as u32);
            if let Some(place) = self.bytes.get_mut(start..body) {
                place.copy_from_slice(&header);
            }
            self.used = self
                .used
                .saturating_add(message::HEADER)
                .saturating_add(count);
        }
        Ok(count)
    }

    /// The whole frame, as number `sequence`.
    pub fn finish(&mut self, sequence: u32) -> &[u8] {
        let [one, two, three, four] = sequence.to_le_bytes();
        // A frame's length fits 16 bits.
        let [low, high] = (self.used as u16).to_le_bytes();
        if let Some(header) = self.bytes.first_chunk_mut::<HEADER>() {
            *header = [VERSION, 0, low, high, one, two, three, four];
        }
        let end = HEADER.saturating_add(self.used);
        self.bytes.get(..end).unwrap_or_default()
    }
}

/// The length of a whole frame, which the first bytes of it tell; none while there are too few of them.
pub fn length(bytes: &[u8]) -> Option<usize> {
    let used = u16_at(bytes, 2)?;
    bytes.get(..HEADER)?;
    Some(HEADER.saturating_add(usize::from(used)))
}

/// The messages of a frame, which must be number `expected`. What follows the messages is padding.
///
/// # Errors
/// For a frame that is cut short, of another version, or out of turn.
pub fn messages(frame: &[u8], expected: u32) -> Result<Messages<'_>, Malformed> {
    let version = *frame.first().ok_or(Malformed::Short)?;
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let length = length(frame).ok_or(Malformed::Short)?;
    if frame.get(1) != Some(&0) {
        return Err(Malformed::Reserved);
    }
    if length > FRAME_MAX {
        return Err(Malformed::Length(length as u32));
    }
    let found = u32_at(frame, 4).ok_or(Malformed::Short)?;
    if found != expected {
        return Err(Malformed::Sequence { expected, found });
    }
    let bytes = frame.get(HEADER..length).ok_or(Malformed::Short)?;
    Ok(Messages(bytes))
}

/// The messages of a frame, in turn. It ends with the first one that is malformed.
#[derive(Clone, Copy, Debug)]
pub struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match Message::decode(self.0) {
            Ok((message, rest)) => {
                self.0 = rest;
                Some(Ok(message))
            }
            Err(error) => {
                self.0 = &[];
                Some(Err(error))
            }
        }
    }
}
