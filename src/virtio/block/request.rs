//! One request to a block device (virtio 1.2, 5.2.6): parsed, then run. No eventfds, no queue.

use std::io;

use super::super::Ram;
use super::super::queue::Chain;
use super::super::segment::{copy_in, copy_out, slices, window};
use super::disk::Disk;
use super::{REQUEST_MAX, SERIAL_LEN};

/// Request types (virtio 1.2, 5.2.6).
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
}

/// The last byte of a request (virtio 1.2, 5.2.6).
pub mod status {
    /// VIRTIO_BLK_S_OK
    pub const OK: u8 = 0;
    /// VIRTIO_BLK_S_IOERR
    pub const IOERR: u8 = 1;
    /// VIRTIO_BLK_S_UNSUPP
    pub const UNSUPP: u8 = 2;
}

/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER: u32 = 16;

/// What is asked for, checked against the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes at byte `at` of the disk.
    Read { at: u64, len: u32 },
    /// Write `len` bytes at byte `at` of the disk.
    Write { at: u64, len: u32 },
    /// Make all writes last.
    Flush,
    /// Tell the serial number.
    GetId,
}

/// What came of a request.
#[derive(Debug)]
pub enum Outcome {
    /// This many bytes were read.
    Read(u32),
    /// This many bytes were written.
    Written(u32),
    /// All writes will last.
    Flushed,
    /// The serial number was told.
    Identified,
    /// It was refused with this status.
    Invalid(u8),
    /// The host failed it.
    Failed(io::Error),
}

impl Outcome {
    pub fn invalid(status: u8) -> Self {
        Outcome::Invalid(status)
    }

    pub fn status(&self) -> u8 {
        match self {
            Outcome::Read(_) | Outcome::Written(_) | Outcome::Flushed | Outcome::Identified => {
                status::OK
            }
            Outcome::Invalid(status) => *status,
            Outcome::Failed(_) => status::IOERR,
        }
    }
}

impl Request {
    /// Reads the header, once, and checks it against the chain and the disk.
    ///
    /// # Errors
    /// The status to refuse it with.
    pub fn parse(ram: &Ram, chain: &Chain, disk: &Disk, flush: bool) -> Result<Self, u8> {
        let mut header = [0; HEADER as usize];
        if !copy_in(ram, chain.readable().iter().copied(), &mut header) {
            return Err(status::IOERR);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let sector = u64::from_le_bytes(sector);
        let to_disk = chain.readable_len().saturating_sub(HEADER);
        // Without room for a status there is no telling the guest; serve answers that.
        let from_disk = chain.writable_len().checked_sub(1).ok_or(status::IOERR)?;
        let checked = |len: u32, other: u32| {
            if len > REQUEST_MAX || other != 0 {
                return Err(status::IOERR);
            }
            disk.locate(sector, len).ok_or(status::IOERR)
        };
        match kind {
            kind::IN => Ok(Request::Read {
                at: checked(from_disk, to_disk)?,
                len: from_disk,
            }),
            kind::OUT if disk.is_read_only() => Err(status::IOERR),
            kind::OUT => Ok(Request::Write {
                at: checked(to_disk, from_disk)?,
                len: to_disk,
            }),
            kind::FLUSH if flush => Ok(Request::Flush),
            kind::GET_ID if from_disk as usize >= SERIAL_LEN => Ok(Request::GetId),
            kind::GET_ID => Err(status::IOERR),
            _ => Err(status::UNSUPP),
        }
    }

    /// Bytes that count for the rate limiter.
    pub fn limited_bytes(&self) -> u64 {
        match self {
            Request::Read { len, .. } | Request::Write { len, .. } => u64::from(*len),
            Request::Flush | Request::GetId => 0,
        }
    }

    /// Does it.
    pub fn run(self, ram: &Ram, chain: &Chain, disk: &Disk, serial: &[u8; SERIAL_LEN]) -> Outcome {
        let done = match self {
            Request::Read { at, len } => {
                let data = window(chain.writable().iter().copied(), 0, len);
                disk.read(slices(ram, data), at)
                    .map(|()| Outcome::Read(len))
            }
            Request::Write { at, len } => {
                let data = window(chain.readable().iter().copied(), HEADER, len);
                disk.write(slices(ram, data), at)
                    .map(|()| Outcome::Written(len))
            }
            Request::Flush => disk.flush().map(|()| Outcome::Flushed),
            Request::GetId => {
                if copy_out(ram, chain.writable().iter().copied(), serial) {
                    Ok(Outcome::Identified)
                } else {
                    Ok(Outcome::Invalid(status::IOERR))
                }
            }
        };
        done.unwrap_or_else(Outcome::Failed)
    }
}
