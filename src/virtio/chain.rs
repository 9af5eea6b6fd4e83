//! A request as the driver offered it: a chain of descriptors, walked and checked.
//!
//! A [`Chain`] is fixed storage that is filled anew for each request, so nothing here allocates once
//! it exists.

use super::segment::Segment;

/// The most descriptors a chain may have, an indirect table's included: the size of our queues.
pub const MAX_SEGMENTS: usize = 256;

/// What is wrong with a chain. The request fails; the queue goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// More descriptors than the table has, or than we take: a loop, most likely.
    TooLong,
    /// A descriptor names a next one outside its table.
    NextOutOfRange,
    /// A descriptor of no bytes.
    ZeroLength,
    /// A descriptor or table not wholly in RAM.
    OutsideRam,
    /// An indirect table inside an indirect table.
    NestedIndirect,
    /// An indirect table whose length is 0 or not a multiple of a descriptor's.
    OddIndirect,
    /// An indirect descriptor where none may be: not negotiated, or with a next one.
    UnexpectedIndirect,
    /// A part for the device to read after a part for it to write.
    ReadableAfterWritable,
    /// More than 4 GiB.
    TooLarge,
}

/// A request: the parts the device may read, then those it may write.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Room for one chain.
    pub fn new() -> Self {
        Chain {
            head: 0,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        }
    }

    /// The descriptor it begins with, which names it in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    pub(super) fn clear(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    pub(super) fn push(&mut self, segment: Segment, writable: bool) -> Result<(), ChainError> {
        if self.segments.len() >= MAX_SEGMENTS {
            return Err(ChainError::TooLong);
        }
        let total = if writable {
            &mut self.writable_len
        } else if self.segments.len() > self.readable {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            self.readable = self.readable.saturating_add(1);
            &mut self.readable_len
        };
        *total = total.checked_add(segment.len).ok_or(ChainError::TooLarge)?;
        self.segments.push(segment);
        Ok(())
    }
}

impl Default for Chain {
    fn default() -> Self {
        Chain::new()
    }
}
