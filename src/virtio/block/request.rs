//! One request to a block device (virtio 1.2, 5.2.6): parsed, then run. No eventfds, no queue.

use std::io;

use super::super::Ram;
use super::super::queue::Chain;
use super::super::segment::{clear, copy_in, copy_out, slices, window};
use super::disk::{Disk, Extents, FileIndex};
use super::{REQUEST_MAX, SERIAL_LEN};
use crate::sys;

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
    pub fn run(
        self,
        ram: &Ram,
        chain: &Chain,
        disk: &mut Disk,
        serial: &[u8; SERIAL_LEN],
        extents: &mut Extents,
    ) -> Outcome {
        let done = match self {
            Request::Read { at, len } => {
                read(ram, chain, disk, (at, len), extents).map(|()| Outcome::Read(len))
            }
            Request::Write { at, len } => {
                write(ram, chain, disk, (at, len), extents).map(|()| Outcome::Written(len))
            }
            Request::Flush => flush(disk).map(|()| Outcome::Flushed),
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

fn read(
    ram: &Ram,
    chain: &Chain,
    disk: &Disk,
    (at, len): (u64, u32),
    extents: &mut Extents,
) -> io::Result<()> {
    let mut done: u32 = 0;
    while done < len {
        extents.clear();
        let from = at.saturating_add(u64::from(done));
        disk.read_extents(from, len.saturating_sub(done), extents);
        for extent in extents.as_slice() {
            let data = window(chain.writable().iter().copied(), done, extent.len);
            match disk.file(extent.file) {
                Some((file, _)) => sys::io::read_exact_at(file, slices(ram, data), extent.at)?,
                None if clear(ram, data) => {}
                None => return Err(io::ErrorKind::InvalidInput.into()),
            }
            done = done.saturating_add(extent.len);
        }
    }
    Ok(())
}

fn write(
    ram: &Ram,
    chain: &Chain,
    disk: &mut Disk,
    (at, len): (u64, u32),
    extents: &mut Extents,
) -> io::Result<()> {
    disk.before_write(at, u64::from(len))?;
    let mut done: u32 = 0;
    while done < len {
        extents.clear();
        let to = at.saturating_add(u64::from(done));
        disk.write_extents(to, len.saturating_sub(done), extents);
        for extent in extents.as_slice() {
            let skip = HEADER.saturating_add(done);
            let data = window(chain.readable().iter().copied(), skip, extent.len);
            let (file, _) = disk.file(extent.file).ok_or(io::ErrorKind::InvalidInput)?;
            sys::io::write_all_at(file, slices(ram, data), extent.at)?;
            done = done.saturating_add(extent.len);
        }
    }
    disk.wrote(at, u64::from(len));
    Ok(())
}

fn flush(disk: &mut Disk) -> io::Result<()> {
    disk.flush_metadata()?;
    match disk.file(FileIndex::DATA) {
        Some((file, _)) => file.sync_data(),
        None => Ok(()),
    }
}
