//! Reading and writing straight into and out of guest memory, by vectors.
//!
//! Guest memory is only ever given to the kernel here, as [`VolatileSlice`]s whose lifetimes hold
//! the mapping in place; nothing in this process makes a reference to it.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};
use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::fd;

/// How reads and writes of a file behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// All of it is in memory (tmpfs, a memfd, hugetlbfs): no call waits for storage.
    InMemory,
    /// It has a page cache, and reads can be told not to wait for what is not in that.
    Cached,
    /// It goes past the page cache, on a file system whose calls can be begun without waiting for their end.
    Direct,
    /// Any call may wait for as long as it likes, also one that an io_uring is only to begin: FUSE's do.
    MayWait,
}

impl Access {
    /// That of `file`, open for reading, and a regular file or a block device.
    ///
    /// # Errors
    /// The host's.
    pub fn of(file: &File) -> io::Result<Self> {
        let is_file = file.metadata()?.is_file();
        // A file system that does not say what it is may wait (FUSE asks a process).
        let kind = rustix::fs::fstatfs(file).map_or(0, |system| system.f_type);
        let in_memory = matches!(
            kind,
            libc::TMPFS_MAGIC | libc::HUGETLBFS_MAGIC | RAMFS_MAGIC
        );
        if is_file && in_memory {
            return Ok(Access::InMemory);
        }
        let is_direct = fd::access(file)?.direct;
        // That of a block device is not where its content is.
        let has_cache = matches!(
            kind,
            libc::EXT4_SUPER_MAGIC
                | libc::XFS_SUPER_MAGIC
                | libc::BTRFS_SUPER_MAGIC
                | libc::F2FS_SUPER_MAGIC
        );
        Ok(match (!is_file || has_cache, is_direct) {
            (true, false) => Access::Cached,
            (true, true) => Access::Direct,
            (false, _) => Access::MayWait,
        })
    }
}

impl Access {
    /// What reads and writes of `file`, which is accessed so, have to be multiples of.
    ///
    /// # Errors
    /// As [`Alignment::of`].
    pub fn alignment(self, file: &File) -> io::Result<Alignment> {
        match self {
            Access::Direct => Alignment::of(file),
            Access::MayWait if fd::access(file)?.direct => Alignment::of(file),
            _ => Ok(Alignment::NONE),
        }
    }
}

/// What reads and writes of a file that goes past the page cache (O_DIRECT) have to be multiples of, in bytes; both
/// are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// The address of each piece of memory.
    pub memory: u32,
    /// The place in the file, and the length of each piece of memory.
    pub file: u32,
}

impl Alignment {
    /// No more than any address and any length is.
    pub const NONE: Alignment = Alignment { memory: 1, file: 1 };

    /// That of `file`, which was opened with O_DIRECT or made so, for reading at least. Where the kernel does not tell
    /// (before Linux 6.1, and for some file systems) it is found out by reading the first bytes.
    ///
    /// # Errors
    /// Unsupported when the file cannot be read so; else the host's.
    pub fn of(file: &File) -> io::Result<Self> {
        let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        if let Ok(told) = told
            && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        {
            return Alignment::new(told.stx_dio_mem_align, told.stx_dio_offset_align);
        }
        for size in [512, Alignment::MOST] {
            let mut first = AlignedPage([0; Alignment::MOST as usize]);
            let bytes = first.0.get_mut(Alignment::MOST as usize - size as usize..);
            match file.read_at(bytes.unwrap_or_default(), 0) {
                Ok(_) => return Alignment::new(size, size),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The largest that is served: a page, which guest memory and buffers are aligned to.
    const MOST: u32 = 4096;

    fn new(memory: u32, file: u32) -> io::Result<Self> {
        let is_served = |of: u32| of.is_power_of_two() && of <= Alignment::MOST;
        match is_served(memory) && is_served(file) {
            true => Ok(Alignment { memory, file }),
            // 0 says that there is no such access.
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A page that lies where pages do.
#[repr(align(4096))]
struct AlignedPage([u8; 4096]);

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// The most pieces given to the kernel at once.
const PIECES: usize = 256;

/// Pieces of memory in the form the kernel takes, on the stack. Each is part of a slice that lives
/// for `'a`.
struct Vectors<'a> {
    /// The first `len` are initialised; the others cost nothing.
    pieces: [MaybeUninit<libc::iovec>; PIECES],
    len: usize,
    memory: PhantomData<VolatileSlice<'a>>,
}

/// Who writes to the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// The kernel does: a read.
    In,
    /// The kernel only reads it: a write.
    Out,
}

impl<'a> Vectors<'a> {
    fn new() -> Self {
        Vectors {
            pieces: [const { MaybeUninit::uninit() }; PIECES],
            len: 0,
            memory: PhantomData,
        }
    }

    /// Takes from `slices` what fits; whether that was all.
    fn fill<'m: 'a, B: BitmapSlice>(
        &mut self,
        slices: &mut impl Iterator<Item = VolatileSlice<'m, B>>,
        direction: Direction,
    ) -> bool {
        self.len = 0;
        while self.len < PIECES {
            let Some(slice) = slices.next() else {
                return true;
            };
            if direction == Direction::In {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            self.push(&slice);
        }
        false
    }

    fn push<'m: 'a, B: BitmapSlice>(&mut self, slice: &VolatileSlice<'m, B>) {
        if let Some(piece) = self.pieces.get_mut(self.len) {
            piece.write(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.len += 1;
        }
    }

    fn filled(&mut self) -> &mut [libc::iovec] {
        let start = self.pieces.as_mut_ptr().cast();
        // SAFETY: `push`, the only place that raises `len`, has written the first `len` pieces,
        // and `MaybeUninit` has the layout of what is in it.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }

    /// What is left after `done` bytes. Pieces that are done with become empty ones.
    fn advance(&mut self, mut done: usize) {
        for piece in self.filled() {
            let step = done.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(step);
            piece.iov_len -= step;
            done -= step;
            if done == 0 {
                break;
            }
        }
    }

    fn rest(&mut self) -> &[libc::iovec] {
        let filled = self.filled();
        let start = filled.iter().position(|p| p.iov_len > 0);
        start.and_then(|at| filled.get(at..)).unwrap_or_default()
    }

    /// Has the kernel fill or write out what is left, by one call, from `offset` of the file on; how many
    /// bytes it moved.
    fn pass(
        &mut self,
        file: &File,
        direction: Direction,
        offset: libc::off_t,
    ) -> io::Result<usize> {
        let rest = self.rest();
        let (fd, pieces, count) = (file.as_raw_fd(), rest.as_ptr(), rest.len() as libc::c_int);
        // SAFETY: `pieces` are `count` in number, and each lies in a slice whose lifetime keeps it
        // mapped, and writable, across the call; `advance` moves none beyond its end. Nothing else
        // has a reference to that memory.
        let n = unsafe {
            match direction {
                Direction::In => libc::preadv(fd, pieces, count, offset),
                Direction::Out => libc::pwritev(fd, pieces, count, offset),
            }
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// An error of the host's as text, without an allocation: a device's thread may not allocate, and the
/// error's own text comes from the C library.
pub struct ErrorText<'a>(pub &'a io::Error);

impl fmt::Display for ErrorText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.raw_os_error() {
            // The usual one has no kind.
            Some(libc::EIO) => write!(f, "input/output error (os error {})", libc::EIO),
            Some(number) => write!(f, "{} (os error {number})", self.0.kind()),
            None => write!(f, "{}", self.0.kind()),
        }
    }
}

/// Fills all of `slices` from `file`, from `offset` on.
///
/// # Errors
/// UnexpectedEof when the file ends before; else the host's.
pub fn read_exact_at<'a, B: BitmapSlice + 'a>(
    file: &File,
    slices: impl Iterator<Item = VolatileSlice<'a, B>>,
    offset: u64,
) -> io::Result<()> {
    transfer(file, slices, offset, Direction::In)
}

/// Writes all of `slices` to `file`, from `offset` on.
///
/// # Errors
/// WriteZero when the file takes no more; else the host's.
pub fn write_all_at<'a, B: BitmapSlice + 'a>(
    file: &File,
    slices: impl Iterator<Item = VolatileSlice<'a, B>>,
    offset: u64,
) -> io::Result<()> {
    transfer(file, slices, offset, Direction::Out)
}

fn transfer<'a, B: BitmapSlice + 'a>(
    file: &File,
    mut slices: impl Iterator<Item = VolatileSlice<'a, B>>,
    mut offset: u64,
    direction: Direction,
) -> io::Result<()> {
    let mut vectors = Vectors::new();
    loop {
        let was_all = vectors.fill(&mut slices, direction);
        while !vectors.rest().is_empty() {
            let at = libc::off_t::try_from(offset)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let done = match vectors.pass(file, direction, at) {
                Ok(0) if direction == Direction::In => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => done,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            offset = offset.saturating_add(done as u64);
            vectors.advance(done);
        }
        if was_all {
            return Ok(());
        }
    }
}

/// Reads into `slices` from `file`, from `offset` on, what is there without waiting for storage; how many
/// bytes that was.
///
/// # Errors
/// WouldBlock when it would have to wait for the first of them; UnexpectedEof at the end of the file;
/// else the host's.
pub fn read_now_at<'a, B: BitmapSlice + 'a>(
    file: &File,
    mut slices: impl Iterator<Item = VolatileSlice<'a, B>>,
    offset: u64,
) -> io::Result<usize> {
    let mut vectors = Vectors::new();
    vectors.fill(&mut slices, Direction::In);
    let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let pieces = vectors.rest();
    let (fd, count) = (file.as_raw_fd(), pieces.len() as libc::c_int);
    // SAFETY: as in `Vectors::pass`.
    let n = unsafe { libc::preadv2(fd, pieces.as_ptr(), count, at, libc::RWF_NOWAIT) };
    match usize::try_from(n) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(n) => Ok(n),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// How space of a file is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The bytes become 0, and their space is given back.
    Punched,
    /// The bytes become 0, and keep their space.
    Zeroed,
}

impl Space {
    fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                Space::Punched => FallocateFlags::PUNCH_HOLE,
                Space::Zeroed => FallocateFlags::ZERO_RANGE,
            }
    }

    /// As the kernel has it: the mode of fallocate.
    pub fn mode(self) -> i32 {
        self.flags().bits().cast_signed()
    }
}

/// Changes the space of the `len` bytes of `file` from `offset` on.
///
/// # Errors
/// The host's, EOPNOTSUPP when the file has no such operation.
pub fn change_space(file: &File, space: Space, offset: u64, len: u64) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, space.flags(), offset, len)?)
}

/// The same with a mode of fallocate's.
///
/// # Errors
/// As [`change_space`].
pub fn change_space_by(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

/// Writes `len` zeros to `file`, from `offset` on.
///
/// # Errors
/// WriteZero when the file takes no more; else the host's.
pub fn write_zeros_at(file: &File, offset: u64, len: u64) -> io::Result<()> {
    static ZEROS: [u8; 16384] = [0; 16384];
    let end = offset.saturating_add(len);
    let mut at = offset;
    while at < end {
        let step = usize::try_from(end - at).unwrap_or(usize::MAX);
        let zeros = ZEROS.get(..step).unwrap_or(&ZEROS);
        match rustix::io::pwritev(file, &[IoSlice::new(zeros)], at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => at = at.saturating_add(done as u64),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::allocator_calls;
    use super::*;
    use std::io::{Seek, Write};
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn error_text_when_printed_says_what_it_is_and_allocates_nothing() {
        for (error, text) in [
            (
                io::Error::from_raw_os_error(libc::EIO),
                "input/output error (os error 5)",
            ),
            (
                io::Error::from_raw_os_error(libc::ENOSPC),
                "no storage space (os error 28)",
            ),
            (
                io::ErrorKind::UnexpectedEof.into(),
                "unexpected end of file",
            ),
        ] {
            let mut line = [0; 64];
            let mut rest = &mut line[..];
            let before = allocator_calls();
            write!(rest, "{}", ErrorText(&error)).unwrap();
            assert_eq!(allocator_calls(), before);
            assert_eq!(&line[..text.len()], text.as_bytes());
        }
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn pieces(memory: &mut [u8], size: usize) -> Vec<VolatileSlice<'_>> {
        let whole = VolatileSlice::from(memory);
        (0..whole.len())
            .step_by(size)
            .map(|at| {
                let len = size.min(whole.len() - at);
                whole.subslice(at, len).unwrap()
            })
            .collect()
    }

    #[test]
    fn read_exact_at_when_pieces_outnumber_one_call_fills_all() {
        let data: Vec<u8> = (0..2000u32).map(|i| (i % 251) as u8).collect();
        let file = file_of(&data);
        let mut memory = vec![0; 1900];
        read_exact_at(&file, pieces(&mut memory, 3).into_iter(), 100).unwrap();
        assert_eq!(memory, data[100..]);
    }

    #[test]
    fn read_exact_at_when_file_is_short_says_so() {
        let file = file_of(&[1; 100]);
        let mut memory = vec![0; 101];
        let error = read_exact_at(&file, pieces(&mut memory, 50).into_iter(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error =
            read_exact_at(&file, pieces(&mut memory, 50).into_iter(), u64::MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn write_all_at_when_in_pieces_writes_all() {
        let file = file_of(&[0; 1000]);
        let mut memory: Vec<u8> = (0..600u32).map(|i| (i % 251) as u8).collect();
        write_all_at(&file, pieces(&mut memory, 1).into_iter(), 400).unwrap();
        let mut back = vec![9; 1000];
        read_exact_at(&file, pieces(&mut back, 1000).into_iter(), 0).unwrap();
        assert_eq!(back[..400], [0; 400]);
        assert_eq!(back[400..], memory);
    }

    #[test]
    fn advance_when_in_the_middle_of_a_piece_keeps_the_rest() {
        let mut memory = [0; 10];
        let base = memory.as_mut_ptr();
        let mut vectors = Vectors::new();
        assert!(vectors.fill(&mut pieces(&mut memory, 4).into_iter(), Direction::Out));
        vectors.advance(5);
        let rest = vectors.rest();
        assert_eq!(rest.len(), 2);
        assert_eq!(rest[0].iov_base, base.wrapping_add(5).cast());
        assert_eq!((rest[0].iov_len, rest[1].iov_len), (3, 2));
        vectors.advance(5);
        assert!(vectors.rest().is_empty());
    }
}
