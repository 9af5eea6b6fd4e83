//! What a driver asks of a block device: parsed, checked against the disk, and what came of it.

use std::io;

use super::super::Ram;
use super::super::queue::Chain;
use super::super::segment::{Segment, copy_in, window};
use super::disk::Disk;
use super::{DISCARD_MAX, REQUEST_MAX, SERIAL_LEN, Served, ZEROES_MAX};

/// Request types (virtio 1.2, 5.2.6).
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
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
pub const HEADER: u32 = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, count of sectors, flags.
const RANGE: u32 = 16;
/// Its flag "the space may be given back".
const UNMAP: u32 = 1;

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
    /// The `len` bytes from `at` on are needed no more.
    Discard { at: u64, len: u64 },
    /// Make the `len` bytes from `at` on 0; with `unmap`, their space may be given back.
    WriteZeroes { at: u64, len: u64, unmap: bool },
}

/// What came of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused with this status.
    Invalid(u8),
    /// The host failed it.
    Failed(io::Error),
}

impl Outcome {
    pub fn status(&self) -> u8 {
        match self {
            Outcome::Done => status::OK,
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
    pub fn parse(ram: &Ram, chain: &Chain, disk: &Disk, served: Served) -> Result<Self, u8> {
        let mut header = [0; HEADER as usize];
        if !copy_in(ram, chain.readable().iter().copied(), &mut header) {
            return Err(status::IOERR);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let sector = u64::from_le_bytes(sector);
        let to_disk = chain.readable_len().saturating_sub(HEADER);
        // Without room for a status there is no telling the guest; its end answers that.
        let from_disk = chain.writable_len().checked_sub(1).ok_or(status::IOERR)?;
        let checked = |len: u32, other: u32| {
            if len > REQUEST_MAX || other != 0 {
                return Err(status::IOERR);
            }
            disk.locate(sector, u64::from(len)).ok_or(status::IOERR)
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
            kind::FLUSH if served.flush => Ok(Request::Flush),
            kind::GET_ID if from_disk < SERIAL_LEN as u32 || from_disk > REQUEST_MAX => {
                Err(status::IOERR)
            }
            kind::GET_ID => Ok(Request::GetId),
            kind::DISCARD if served.discard => {
                let (at, len, flags) = range(ram, chain, disk, DISCARD_MAX)?;
                // No flag has a meaning here (5.2.6.2).
                if flags != 0 {
                    return Err(status::UNSUPP);
                }
                Ok(Request::Discard { at, len })
            }
            kind::WRITE_ZEROES if served.write_zeroes => {
                let (at, len, flags) = range(ram, chain, disk, ZEROES_MAX)?;
                if flags & !UNMAP != 0 {
                    return Err(status::UNSUPP);
                }
                let unmap = flags & UNMAP != 0;
                Ok(Request::WriteZeroes { at, len, unmap })
            }
            _ => Err(status::UNSUPP),
        }
    }

    /// Bytes that count for the rate limiter.
    pub fn limited_bytes(&self) -> u64 {
        match self {
            Request::Read { len, .. } | Request::Write { len, .. } => u64::from(*len),
            // Where the file system cannot do it by itself, that many bytes are written.
            Request::WriteZeroes { len, .. } => *len,
            _ => 0,
        }
    }
}

/// The one range of a request that has them: where it begins, its length, and its flags.
fn range(ram: &Ram, chain: &Chain, disk: &Disk, max_sectors: u32) -> Result<(u64, u64, u32), u8> {
    let mut range = [0; RANGE as usize];
    let place = window(chain.readable().iter().copied(), HEADER, RANGE);
    if chain.readable_len() != HEADER.saturating_add(RANGE)
        || chain.writable_len() != 1
        || !copy_in(ram, place, &mut range)
        || disk.is_read_only()
    {
        return Err(status::IOERR);
    }
    let [a, b, c, d, e, f, g, h, s, t, u, v, flags @ ..] = range;
    let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let sectors = u32::from_le_bytes([s, t, u, v]);
    if sectors > max_sectors {
        return Err(status::IOERR);
    }
    let len = u64::from(sectors).saturating_mul(super::disk::SECTOR);
    let at = disk.locate(sector, len).ok_or(status::IOERR)?;
    Ok((at, len, u32::from_le_bytes(flags)))
}

/// The last byte that the device may write: the status (5.2.6).
pub fn status_place(chain: &Chain) -> Option<Segment> {
    let at = chain.writable_len().checked_sub(1)?;
    window(chain.writable().iter().copied(), at, 1).next()
}
