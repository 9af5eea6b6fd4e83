//! The pages of memory files, and what they add up to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mayfly::wire::check::{PAGE, is_zero, of_page};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// How much is read, and written, at a time.
const CHUNK: usize = 1 << 20;

/// One page.
pub type Page = [u8; PAGE];

/// The pages of `file` that are data, in order, by their numbers. What is written to a file that
/// shows holes in larger pieces than a page may come with pages of zeros that were never written.
pub fn each_page(
    file: &File,
    len: u64,
    mut take: impl FnMut(u64, &Page) -> io::Result<()>,
) -> io::Result<()> {
    let page = PAGE as u64;
    if !len.is_multiple_of(page) {
        return Err(io::Error::other("its length is not a multiple of 4,096"));
    }
    let mut bytes = vec![0; CHUNK];
    let mut at = 0;
    while let Some((start, end)) = data(file, at, len)? {
        let mut from = start / page * page;
        let end = end.next_multiple_of(page).min(len);
        while from < end {
            let count = CHUNK.min(usize::try_from(end - from).unwrap_or(CHUNK));
            let chunk = &mut bytes[..count];
            file.read_exact_at(chunk, from)?;
            for (number, page_bytes) in (from / page..).zip(chunk.as_chunks::<PAGE>().0) {
                take(number, page_bytes)?;
            }
            from += count as u64;
        }
        at = end;
    }
    Ok(())
}

/// The first range of data at or behind `at`.
fn data(file: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that does not tell has no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, len))),
        Err(cause) => return Err(cause.into()),
    };
    if start >= len {
        return Ok(None);
    }
    Ok(Some((start, seek(file, SeekFrom::Hole(start))?.min(len))))
}

/// What the pages of an image add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// All that are data.
    pub data: u64,
    /// Those of them that hold something else than zeros.
    pub not_zero: u64,
    /// How many those are.
    pub pages: u64,
}

/// Adds up an image.
pub fn sums(file: &File, len: u64) -> io::Result<Sums> {
    let mut sums = Sums::default();
    each_page(file, len, |number, page| {
        let value = of_page(number, page);
        sums.data = sums.data.wrapping_add(value);
        if !is_zero(page) {
            sums.not_zero = sums.not_zero.wrapping_add(value);
            sums.pages += 1;
        }
        Ok(())
    })?;
    Ok(sums)
}

/// An image in the making: what is in it, and its check value.
pub struct Image<'a> {
    file: &'a File,
    /// One bit for each page that is there.
    present: Vec<u64>,
    /// Whether pages of zeros are there, as in a diff.
    keeps_zeros: bool,
    /// The check value.
    pub check: u64,
    /// Pages that follow one another and are not written yet.
    buffer: Vec<u8>,
    /// Where those begin.
    start: u64,
}

impl<'a> Image<'a> {
    /// An empty one of `len` bytes in `file`.
    pub fn new(file: &'a File, len: u64, keeps_zeros: bool) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(len)?;
        let pages = usize::try_from(len / PAGE as u64).map_err(io::Error::other)?;
        Ok(Image {
            file,
            present: vec![0; pages.div_ceil(64)],
            keeps_zeros,
            check: 0,
            buffer: Vec::with_capacity(CHUNK),
            start: 0,
        })
    }

    fn word(&mut self, number: u64) -> io::Result<(&mut u64, u64)> {
        let at = usize::try_from(number / 64).map_err(io::Error::other)?;
        let word = self.present.get_mut(at);
        let word = word.ok_or_else(|| io::Error::other("a page is outside of the image"))?;
        Ok((word, 1 << (number % 64)))
    }

    /// Puts a page in its place. Within one layer, numbers rise.
    pub fn put(&mut self, number: u64, page: &Page) -> io::Result<()> {
        let keep = self.keeps_zeros || !is_zero(page);
        let at = number * PAGE as u64;
        let (word, bit) = self.word(number)?;
        let was_there = *word & bit != 0;
        *word = if keep { *word | bit } else { *word & !bit };
        if was_there {
            let mut old = [0; PAGE];
            self.file.read_exact_at(&mut old, at)?;
            self.check = self.check.wrapping_sub(of_page(number, &old));
            if !keep {
                return self.remove(at);
            }
        }
        if !keep {
            return Ok(());
        }
        self.check = self.check.wrapping_add(of_page(number, page));
        let end = self.start + self.buffer.len() as u64;
        if end != at || self.buffer.len() >= CHUNK {
            self.flush()?;
            self.start = at;
        }
        self.buffer.extend_from_slice(page);
        Ok(())
    }

    fn remove(&self, at: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.file, hole, at, PAGE as u64) {
            Err(Errno::OPNOTSUPP) => self.file.write_all_at(&[0; PAGE], at),
            removed => Ok(removed?),
        }
    }

    /// Ends a layer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.start)?;
        self.buffer.clear();
        Ok(())
    }
}
