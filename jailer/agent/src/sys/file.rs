//! Files, folders and mounts.

use core::ffi::CStr;

use super::{
    CLOSE_ON_EXEC, Errno, FOLDER, Fd, HERE, NOCTTY, NOFOLLOW, NONBLOCK, READ_WRITE, Result, call,
    fd, number,
};

/// Opens a file, or a new one with these permissions.
pub fn open(path: &CStr, flags: u32, mode: u32) -> Result<Fd> {
    let flags = flags | CLOSE_ON_EXEC | NOCTTY;
    fd(call!(OPENAT, HERE, path.as_ptr(), flags, mode))
}

/// The same without waiting, now or later.
pub fn open_nonblocking(path: &CStr) -> Result<Fd> {
    open(path, READ_WRITE | NONBLOCK, 0)
}

/// Opens an entry of a folder, and follows no link.
pub fn open_in(folder: &Fd, name: &CStr, flags: u32, mode: u32) -> Result<Fd> {
    let flags = flags | CLOSE_ON_EXEC | NOCTTY | NOFOLLOW | NONBLOCK;
    fd(call!(OPENAT, folder.0, name.as_ptr(), flags, mode))
}

/// Opens a folder.
pub fn open_folder(path: &CStr) -> Result<Fd> {
    open(path, FOLDER, 0)
}

/// Opens a folder in a folder, and follows no link.
pub fn open_folder_in(folder: &Fd, name: &CStr) -> Result<Fd> {
    open_in(folder, name, FOLDER, 0)
}

/// Bytes of a disk (BLKGETSIZE64).
pub fn disk_size(disk: &Fd) -> Result<u64> {
    let mut size = [0; 8];
    call!(IOCTL, disk.0, 0x8008_1272_u32, size.as_mut_ptr())?;
    Ok(u64::from_ne_bytes(size))
}

/// Has the kernel drop what it has read of a disk (BLKFLSBUF).
pub fn drop_cached(disk: &Fd) -> Result<()> {
    call!(IOCTL, disk.0, 0x1261, 0).map(drop)
}

/// Gives the kernel's random number generator these bytes, as ones that only this machine has, and has it make all
/// further numbers with them (RNDADDENTROPY, RNDRESEEDCRNG).
pub fn seed(bytes: &[u8]) -> Result<()> {
    /// struct rand_pool_info: bits, bytes, and the bytes.
    const HEADER: usize = 8;
    const ROOM: usize = 64;
    let mut info = [0; HEADER + ROOM];
    let bytes = bytes.get(..bytes.len().min(ROOM)).unwrap_or_default();
    let count = bytes.len() as u32;
    info[..4].copy_from_slice(&count.saturating_mul(8).to_ne_bytes());
    info[4..HEADER].copy_from_slice(&count.to_ne_bytes());
    info[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
    let random = open(c"/dev/urandom", READ_WRITE, 0)?;
    call!(IOCTL, random.0, 0x4008_5203, info.as_ptr())?;
    call!(IOCTL, random.0, 0x5207, 0).map(drop)
}

pub fn read(from: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(READ, from.0, into.as_mut_ptr(), into.len())
}

pub fn write(to: &Fd, bytes: &[u8]) -> Result<usize> {
    call!(WRITE, to.0, bytes.as_ptr(), bytes.len())
}

/// Writes to standard error.
pub fn print(bytes: &[u8]) {
    let _ = call!(WRITE, 2, bytes.as_ptr(), bytes.len());
}

/// Writes one byte at a place.
pub fn write_at(to: &Fd, byte: u8, place: usize) -> Result<()> {
    let byte = [byte];
    call!(PWRITE, to.0, byte.as_ptr(), byte.len(), place).map(drop)
}

/// A pipe, whose ends wait: the reading end first.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0_i32; 2];
    call!(PIPE2, ends.as_mut_ptr(), CLOSE_ON_EXEC)?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Has reads and writes of a file not wait (FIONBIO).
pub fn set_nonblocking(file: &Fd) {
    let yes = [1_i32];
    let _ = call!(IOCTL, file.0, 0x5421, yes.as_ptr());
}

/// Bytes that can be read of a pipe (FIONREAD).
pub fn readable(file: &Fd) -> usize {
    let mut count = [0_i32];
    let _ = call!(IOCTL, file.0, 0x541b, count.as_mut_ptr());
    usize::try_from(count[0]).unwrap_or(0)
}

/// Puts `file` at the place of a standard stream.
pub fn place(file: &Fd, at: i32) -> Result<()> {
    if file.0 == at {
        // It is there, but would be closed by exec.
        return call!(IOCTL, at, 0x5450).map(drop);
    }
    call!(DUP3, file.0, at, 0).map(drop)
}

/// Closes all descriptors but the standard streams, of which no owner is used again.
pub fn close_others() {
    const MOST: u32 = 1024;
    if call!(CLOSE_RANGE, 3, u32::MAX, 0).is_err() {
        // Linux before 5.9.
        for number in 3..MOST {
            let _ = call!(CLOSE, number);
        }
    }
}

/// Another number for the same open file.
pub fn copy(file: &Fd) -> Result<Fd> {
    standard(file.0)
}

/// Another number for a standard stream.
pub fn standard(stream: i32) -> Result<Fd> {
    /// F_DUPFD_CLOEXEC.
    const COPY: usize = 1030;
    fd(call!(FCNTL, stream, COPY, 3))
}

/// Mounts a file system.
pub fn mount(source: &CStr, at: &CStr, kind: &CStr, flags: usize, options: &CStr) -> Result<()> {
    let (source, at, kind) = (source.as_ptr(), at.as_ptr(), kind.as_ptr());
    call!(MOUNT, source, at, kind, flags, options.as_ptr()).map(drop)
}

pub const MOUNT_READ_ONLY: usize = 1;
pub const MOUNT_NO_SUID: usize = 2;
pub const MOUNT_NO_DEV: usize = 4;
pub const MOUNT_NO_EXEC: usize = 8;
pub const MOUNT_REMOUNT: usize = 32;
/// With [`MOUNT_REMOUNT`]: of this mount, and not of its file system.
pub const MOUNT_BIND: usize = 4096;
pub const MOUNT_MOVE: usize = 8192;

/// Makes a folder; no matter if it is there.
pub fn make_folder(path: &CStr, mode: u32) -> Result<()> {
    match call!(MKDIRAT, HERE, path.as_ptr(), mode) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a folder in a folder; no matter if it is there.
pub fn make_folder_in(folder: &Fd, name: &CStr, mode: u32) -> Result<()> {
    match call!(MKDIRAT, folder.0, name.as_ptr(), mode) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a symbolic link in a folder.
pub fn make_link_in(folder: &Fd, name: &CStr, to: &CStr) -> Result<()> {
    call!(SYMLINKAT, to.as_ptr(), folder.0, name.as_ptr()).map(drop)
}

/// Removes what is not a folder from a folder.
pub fn remove_in(folder: &Fd, name: &CStr) -> Result<()> {
    call!(UNLINKAT, folder.0, name.as_ptr(), 0).map(drop)
}

/// Where a link leads; the length of that.
pub fn read_link_in(folder: &Fd, name: &CStr, into: &mut [u8]) -> Result<usize> {
    let (at, length) = (into.as_mut_ptr(), into.len());
    call!(READLINKAT, folder.0, name.as_ptr(), at, length)
}

/// Changes the permissions of an open file.
pub fn set_mode(file: &Fd, mode: u32) -> Result<()> {
    call!(FCHMOD, file.0, mode).map(drop)
}

/// Gives an entry of a folder another user and group; a link itself.
pub fn set_owner(folder: &Fd, name: &CStr, user: u32, group: u32) -> Result<()> {
    const NO_FOLLOW: usize = 0x100;
    call!(FCHOWNAT, folder.0, name.as_ptr(), user, group, NO_FOLLOW).map(drop)
}

/// Type, permissions and size of a file.
pub struct Stat {
    pub mode: u32,
    pub size: u64,
}

impl Stat {
    pub const KIND: u32 = 0o170_000;
    pub const FILE: u32 = 0o100_000;
    pub const FOLDER: u32 = 0o40_000;
    pub const LINK: u32 = 0o120_000;

    /// Of an entry of a folder; of a link itself.
    pub fn of(folder: &Fd, name: &CStr) -> Result<Stat> {
        const NO_FOLLOW: usize = 0x100;
        // struct stat of x86-64: the mode is at 24, the size at 48.
        let mut bytes = [0_u8; 144];
        call!(
            FSTATAT,
            folder.0,
            name.as_ptr(),
            bytes.as_mut_ptr(),
            NO_FOLLOW
        )?;
        Ok(Stat::read(&bytes))
    }

    /// Of what a path leads to, through links.
    pub fn of_path(path: &CStr) -> Result<Stat> {
        let mut bytes = [0_u8; 144];
        call!(FSTATAT, HERE, path.as_ptr(), bytes.as_mut_ptr(), 0)?;
        Ok(Stat::read(&bytes))
    }

    fn read(bytes: &[u8; 144]) -> Stat {
        let mode = bytes[24..].first_chunk().copied().unwrap_or_default();
        let size = bytes[48..].first_chunk().copied().unwrap_or_default();
        Stat {
            mode: u32::from_le_bytes(mode),
            size: u64::from_le_bytes(size),
        }
    }
}

/// Entries of a folder, in the kernel's form (getdents64(2)); how many bytes.
pub fn entries(folder: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(GETDENTS, folder.0, into.as_mut_ptr(), into.len())
}

pub fn change_folder(path: &CStr) -> Result<()> {
    call!(CHDIR, path.as_ptr()).map(drop)
}

pub fn change_root(path: &CStr) -> Result<()> {
    call!(CHROOT, path.as_ptr()).map(drop)
}
