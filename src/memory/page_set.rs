//! Sets of pages, as a bit for each: what a memory image is written by.

use std::ops::Range;

const BITS: u64 = u64::BITS as u64;

/// Some of the pages 0 to `len`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    len: u64,
}

impl PageSet {
    /// None of `len` pages.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(BITS)).unwrap_or(0);
        PageSet {
            words: vec![0; words],
            len,
        }
    }

    /// How many pages there are to be in it.
    #[cfg(test)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How many are in it.
    #[cfg(test)]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Takes all out.
    #[cfg(test)]
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Puts `pages` in, but for those beyond the last.
    pub fn insert(&mut self, pages: Range<u64>) {
        let end = pages.end.min(self.len);
        let mut page = pages.start;
        while page < end {
            let first = page % BITS;
            let count = (BITS.saturating_sub(first)).min(end.saturating_sub(page));
            let ones = u64::MAX.checked_shr(BITS.saturating_sub(count) as u32);
            if let Some(word) = self.word_mut(page) {
                *word |= ones.unwrap_or(0) << first;
            }
            page = page.saturating_add(count);
        }
    }

    /// Puts those in whose bits are set in `words`, the first of which stands for page `first` on;
    /// `first` is a multiple of 64.
    pub fn insert_words(&mut self, first: u64, words: impl IntoIterator<Item = u64>) {
        let mut page = first;
        for bits in words {
            let room = self.len.saturating_sub(page).min(BITS);
            let valid = u64::MAX.checked_shr(BITS.saturating_sub(room) as u32);
            if let Some(word) = self.word_mut(page) {
                *word |= bits & valid.unwrap_or(0);
            }
            page = page.saturating_add(BITS);
        }
    }

    /// Puts in what of `other` is there from its page `first` on, a multiple of 64.
    pub fn insert_from(&mut self, other: &PageSet, first: u64) {
        let skip = usize::try_from(first / BITS).unwrap_or(usize::MAX);
        let words = usize::try_from(self.len.div_ceil(BITS)).unwrap_or(0);
        self.insert_words(0, other.words.iter().copied().skip(skip).take(words));
    }

    /// Whether `page` is in it.
    #[cfg(test)]
    pub fn contains(&self, page: u64) -> bool {
        let index = usize::try_from(page / BITS).ok();
        let word = index.and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & (1 << (page % BITS)) != 0)
    }

    /// The pages in it, as ranges that do not touch, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut page = 0;
        std::iter::from_fn(move || {
            let start = self.next(page, false)?;
            let end = self.next(start, true).unwrap_or(self.len);
            page = end;
            Some(start..end)
        })
    }

    /// The first page from `page` on that is in it, or that is `absent`.
    fn next(&self, page: u64, absent: bool) -> Option<u64> {
        let mut at = page;
        while at < self.len {
            let word = *self.words.get(usize::try_from(at / BITS).ok()?)?;
            let word = if absent { !word } else { word };
            let rest = word >> (at % BITS);
            if rest != 0 {
                let found = at.saturating_add(u64::from(rest.trailing_zeros()));
                return (found < self.len).then_some(found);
            }
            at = (at / BITS).saturating_add(1).saturating_mul(BITS);
        }
        None
    }

    fn word_mut(&mut self, page: u64) -> Option<&mut u64> {
        self.words.get_mut(usize::try_from(page / BITS).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(set: &PageSet) -> Vec<Range<u64>> {
        set.runs().collect()
    }

    #[test]
    fn insert_when_ranges_cross_words_gives_them_back_as_runs() {
        let mut set = PageSet::new(300);
        assert_eq!(runs(&set), []);
        for range in [3..4, 60..70, 128..256, 299..400, 5..5, 256..257] {
            set.insert(range);
        }
        assert_eq!(runs(&set), [3..4, 60..70, 128..257, 299..300]);
        assert_eq!(set.count(), 1 + 10 + 129 + 1);
        for page in 0..310 {
            let is_in = runs(&set).iter().any(|run| run.contains(&page));
            assert_eq!(set.contains(page), is_in, "{page}");
        }
        set.insert(0..u64::MAX);
        assert_eq!((set.runs().next(), set.count()), (Some(0..300), 300));
        set.clear();
        assert_eq!((runs(&set), set.count(), set.len()), (vec![], 0, 300));
    }

    #[test]
    fn insert_words_when_some_lie_beyond_the_last_page_leaves_them_out() {
        let mut set = PageSet::new(70);
        set.insert_words(0, [0b101, u64::MAX, u64::MAX]);
        assert_eq!(runs(&set), [0..1, 2..3, 64..70]);
        set.insert_words(64, [0]);
        assert_eq!(set.count(), 8);
    }
}
