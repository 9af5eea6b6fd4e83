//! The console's usual place of output, which may be slow, full or gone.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;

use crate::sys::fd::Interest;

/// Bytes moved at once: at most PIPE_BUF, so that a pipe that has room takes them all.
pub const CHUNK: usize = 4096;

/// The place, and what it has yet to take.
#[derive(Debug)]
pub struct Sink {
    file: File,
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Sink {
    pub fn new(file: File) -> Self {
        Sink {
            file,
            // Fresh zeros: pages that are never used cost nothing.
            bytes: vec![0; CHUNK].into_boxed_slice(),
            from: 0,
            to: 0,
        }
    }

    /// The place itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes that wait to be written.
    pub const fn held(&self) -> usize {
        self.to.saturating_sub(self.from)
    }

    /// Takes new bytes, at most [`CHUNK`], from `fill`, which says how many. Only when none is held.
    pub fn fill(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) {
        (self.from, self.to) = (0, fill(&mut self.bytes).min(CHUNK));
    }

    /// Keeps the first `count` of the bytes held, and forgets the rest.
    pub fn cut(&mut self, count: usize) {
        self.to = self.to.min(self.from.saturating_add(count));
    }

    /// The bytes held, which go elsewhere.
    pub fn give_up(&mut self) -> &[u8] {
        let bytes = self.bytes.get(self.from..self.to).unwrap_or_default();
        (self.from, self.to) = (0, 0);
        bytes
    }

    /// What to wait for while bytes are held.
    pub fn interest(&self) -> Interest {
        Interest::write(self.file.as_raw_fd()).when(self.held() > 0)
    }

    /// One write; how many bytes were lost.
    pub fn write(&mut self) -> u64 {
        let held = self.bytes.get(self.from..self.to).unwrap_or_default();
        match self.file.write(held) {
            Ok(n) => self.from = self.from.saturating_add(n),
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(_) => {
                // It is closed, or the disk is full: these bytes are lost, the next may not be.
                let lost = held.len() as u64;
                self.from = self.to;
                return lost;
            }
        }
        0
    }
}
