//! Which pages of guest memory the monitor itself has written: what KVM's dirty log does not see.
//!
//! Marked by every access that goes through [`super::Ram`], on whichever thread; read and cleared
//! when a diff is written, while nothing runs. Without tracking there is no log, and a mark costs
//! the look whether there is one.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

const PAGE_SHIFT: u32 = super::PAGE.trailing_zeros();
const WORD_SHIFT: u32 = u64::BITS.trailing_zeros();
const WORD_MASK: usize = u64::BITS as usize - 1;

/// A bit for each page of one region; none when nothing is tracked.
#[derive(Debug, Default)]
pub struct WriteLog(Option<Box<[AtomicU64]>>);

/// A part of it: all that follows a byte of the region.
#[derive(Clone, Copy, Debug)]
pub struct WriteLogSlice<'a> {
    words: Option<&'a [AtomicU64]>,
    from: usize,
}

impl WriteLog {
    /// A log of a region of `len` bytes, if it is `tracked`.
    pub(super) fn new(len: usize, tracked: bool) -> Self {
        let pages = len.div_ceil(1 << PAGE_SHIFT);
        let words = pages.div_ceil(u64::BITS as usize);
        WriteLog(tracked.then(|| (0..words).map(|_| AtomicU64::new(0)).collect()))
    }

    fn all(&self) -> WriteLogSlice<'_> {
        WriteLogSlice {
            words: self.0.as_deref(),
            from: 0,
        }
    }
}

impl<'a> WriteLogSlice<'a> {
    /// The words of the whole log, from the region's first page on, each replaced by 0; none without
    /// a log.
    pub(super) fn take(self) -> impl Iterator<Item = u64> + 'a {
        let words = self.words.unwrap_or_default().iter();
        words.map(|word| word.swap(0, Ordering::Relaxed))
    }
}

/// Sets the bits of the pages of `len` bytes from `first` on.
fn mark(words: &[AtomicU64], first: usize, len: usize) {
    let Some(last) = len.checked_sub(1).map(|rest| first.saturating_add(rest)) else {
        return;
    };
    for page in (first >> PAGE_SHIFT)..=(last >> PAGE_SHIFT) {
        let Some(word) = words.get(page >> WORD_SHIFT) else {
            return;
        };
        let bit = 1 << (page & WORD_MASK);
        // Most pages are written again and again: looking is cheaper than an atomic change.
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = WriteLogSlice<'a>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.all().mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.all().dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> WriteLogSlice<'_> {
        self.all().slice_at(offset)
    }
}

/// Of no tracking: tests make their guest memory with it.
impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        WriteLog::new(len, false)
    }
}

impl WithBitmapSlice<'_> for WriteLogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for WriteLogSlice<'_> {}

impl Bitmap for WriteLogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        #[cfg(test)]
        crate::sys::sync::scheduled::point();
        if let Some(words) = self.words {
            mark(words, self.from.wrapping_add(offset), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.from.wrapping_add(offset) >> PAGE_SHIFT;
        let word = self.words.and_then(|words| words.get(page >> WORD_SHIFT));
        let bit = 1 << (page & WORD_MASK);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn slice_at(&self, offset: usize) -> Self {
        WriteLogSlice {
            words: self.words,
            from: self.from.wrapping_add(offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(log: &WriteLog) -> Vec<u64> {
        log.all().take().collect()
    }

    #[test]
    fn mark_when_a_range_touches_pages_marks_each_of_them_once() {
        let log = WriteLog::new(130 * 4096, true);
        log.mark_dirty(4095, 2);
        log.mark_dirty(63 * 4096, 8192);
        log.mark_dirty(200, 0);
        log.slice_at(100 * 4096)
            .slice_at(29 * 4096)
            .mark_dirty(5, 1);
        assert!(log.dirty_at(0) && log.dirty_at(8191) && !log.dirty_at(8192));
        assert!(log.slice_at(4096).dirty_at(0));
        assert_eq!(taken(&log), [0b11 | 1 << 63, 1, 0b10]);
        assert_eq!(taken(&log), [0; 3]);
    }

    #[test]
    fn mark_when_beyond_the_region_or_without_a_log_does_nothing() {
        let log = WriteLog::new(4096, true);
        log.mark_dirty(usize::MAX, 5);
        log.slice_at(usize::MAX).mark_dirty(usize::MAX, usize::MAX);
        assert_eq!(taken(&log).len(), 1);
        let off = WriteLog::new(4096, false);
        off.mark_dirty(0, 4096);
        assert!(!off.dirty_at(0));
        assert!(taken(&off).is_empty());
    }
}
