//! Pieces of guest memory that have been found to lie in RAM, and what is done with them.

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice,
};

use super::Ram;
use crate::sys::cache;

/// A piece of guest memory, known to lie in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub addr: GuestAddress,
    /// Its length in bytes, not 0.
    pub len: u32,
}

/// The region of RAM that the last piece of a chain was found in: the next one is in it as a rule, and needs no look-up.
/// For pieces of one [`Ram`], which never changes.
pub struct KnownRegion {
    /// Its first byte and its last; none while the last is before the first.
    first: u64,
    last: u64,
    #[cfg(test)]
    lookups: usize,
}

impl KnownRegion {
    /// None is known.
    pub fn new() -> Self {
        KnownRegion {
            first: 1,
            last: 0,
            #[cfg(test)]
            lookups: 0,
        }
    }

    /// Whether the `len` bytes at `addr` lie in `ram`, in one region or several that adjoin.
    pub fn holds(&mut self, ram: &Ram, addr: GuestAddress, len: u32) -> bool {
        let first = addr.raw_value();
        let Some(last) = u64::from(len)
            .checked_sub(1)
            .and_then(|more| first.checked_add(more))
        else {
            return false;
        };
        if self.first <= first && last <= self.last {
            return true;
        }
        #[cfg(test)]
        {
            self.lookups = self.lookups.saturating_add(1);
        }
        match ram.find_region(addr) {
            None => false,
            Some(region) if last <= region.last_addr().raw_value() => {
                self.first = region.start_addr().raw_value();
                self.last = region.last_addr().raw_value();
                true
            }
            Some(_) => ram.check_range(addr, len as usize),
        }
    }
}

/// The `len` bytes of `segments` from byte `skip` on; less when there is less.
pub fn window(
    segments: impl Iterator<Item = Segment>,
    skip: u32,
    len: u32,
) -> impl Iterator<Item = Segment> {
    let (mut segments, mut skip, mut left) = (segments, skip, len);
    std::iter::from_fn(move || {
        while left > 0 {
            let segment = segments.next()?;
            let skipped = skip.min(segment.len);
            skip = skip.saturating_sub(skipped);
            let taken = segment.len.saturating_sub(skipped).min(left);
            left = left.saturating_sub(taken);
            if taken > 0 {
                let addr = segment.addr.checked_add(u64::from(skipped))?;
                return Some(Segment { addr, len: taken });
            }
        }
        None
    })
}

/// Host memory behind one guest memory region's bytes.
pub type Slice<'a> = VolatileSlice<'a, vm_memory::bitmap::MS<'a, Ram>>;

/// The host memory behind `segments`.
pub fn slices<'a>(
    ram: &'a Ram,
    segments: impl Iterator<Item = Segment> + 'a,
) -> impl Iterator<Item = Slice<'a>> {
    segments.flat_map(move |segment| {
        // Every segment was found to lie in RAM, which never changes.
        ram.get_slices(segment.addr, segment.len as usize)
            .filter_map(Result::ok)
    })
}

/// Has the processor bring the byte at `addr`, if that is RAM, and those beside it to its cache.
pub fn prefetch(ram: &Ram, addr: GuestAddress) {
    for slice in ram.get_slices(addr, 1).flatten() {
        cache::prefetch(&slice);
    }
}

/// Marks the host memory behind `segments` as written.
pub fn mark_written(ram: &Ram, segments: impl Iterator<Item = Segment>) {
    for slice in slices(ram, segments) {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}

/// Copies from `segments` into all of `data`; whether there was enough.
pub fn copy_in(ram: &Ram, segments: impl Iterator<Item = Segment>, data: &mut [u8]) -> bool {
    let mut rest = data;
    for segment in segments {
        let len = rest.len().min(segment.len as usize);
        let (now, later) = rest.split_at_mut(len);
        if ram.read_slice(now, segment.addr).is_err() {
            return false;
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

/// Copies all of `data` into `segments`; whether there was room.
pub fn copy_out(ram: &Ram, segments: impl Iterator<Item = Segment>, data: &[u8]) -> bool {
    let mut rest = data;
    for segment in segments {
        let len = rest.len().min(segment.len as usize);
        let (now, later) = rest.split_at(len);
        if ram.write_slice(now, segment.addr).is_err() {
            return false;
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

/// Makes all bytes of `segments` 0; whether all could be.
pub fn clear(ram: &Ram, segments: impl Iterator<Item = Segment>) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    for segment in segments {
        let (mut at, mut left) = (segment.addr, segment.len as usize);
        while left > 0 {
            let step = left.min(ZEROS.len());
            let Some(zeros) = ZEROS.get(..step) else {
                return false;
            };
            if ram.write_slice(zeros, at).is_err() {
                return false;
            }
            at = at.unchecked_add(step as u64);
            left = left.saturating_sub(step);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::testing::ram;
    use super::*;

    const DATA: u64 = 0x80000;

    /// Two regions that adjoin, and one behind a hole.
    fn regions() -> Ram {
        let ranges = [(0, 0x1000), (0x1000, 0x2000), (0x8000, 0x1000)];
        Ram::from_ranges(&ranges.map(|(at, len)| (GuestAddress(at), len))).unwrap()
    }

    #[test]
    fn region_when_it_is_that_of_the_piece_before_is_not_looked_up_again() {
        let ram = regions();
        let lookups = |pieces: &[(u64, u32)]| {
            let mut known = KnownRegion::new();
            for &(addr, len) in pieces {
                assert!(known.holds(&ram, GuestAddress(addr), len), "{addr:#x}");
            }
            known.lookups
        };
        assert_eq!(lookups(&[(0, 16), (0xfff, 1), (0, 0x1000), (5, 7)]), 1);
        assert_eq!(lookups(&[(0, 16), (0x1000, 1), (0x2fff, 1), (1, 1)]), 3);
        // One that ends where its region does makes that known too.
        assert_eq!(lookups(&[(0xfff, 1), (0, 16)]), 1);
        // One over two regions is looked up, and leaves what is known.
        assert_eq!(lookups(&[(0, 1), (0xfff, 2), (0xfff, 2), (0, 1)]), 3);
    }

    #[test]
    fn piece_when_anywhere_is_in_ram_just_where_all_its_bytes_are() {
        let ram = regions();
        let edges = [0, 0x1000, 0x3000, 0x8000, 0x9000, u64::MAX - 1];
        let near = |edge: u64| (0..4).map(move |more| edge.wrapping_add(more).wrapping_sub(2));
        let lens = [0, 1, 2, 3, 0x1000, 0x2000, 0x3000, 0x5000, u32::MAX];
        let mut known = KnownRegion::new();
        for addr in edges.into_iter().flat_map(near) {
            for len in lens {
                let end = u128::from(addr) + u128::from(len);
                let is_in = |from: u128, to| from <= u128::from(addr) && end <= to;
                let expected = len > 0 && (is_in(0, 0x3000) || is_in(0x8000, 0x9000));
                let found = known.holds(&ram, GuestAddress(addr), len);
                assert_eq!(found, expected, "{addr:#x} {len:#x}");
                // The same without what was known before.
                let found = KnownRegion::new().holds(&ram, GuestAddress(addr), len);
                assert_eq!(found, expected, "{addr:#x} {len:#x}");
            }
        }
    }

    #[test]
    fn window_when_cut_anywhere_gives_the_bytes_between() {
        let segments = [(100, 10), (200, 1), (300, 5)].map(|(addr, len)| Segment {
            addr: GuestAddress(addr),
            len,
        });
        let bytes: Vec<u64> = segments
            .iter()
            .flat_map(|s| (0..u64::from(s.len)).map(|i| s.addr.0 + i))
            .collect();
        for skip in 0..20 {
            for len in 0..20 {
                let pieces: Vec<Segment> = window(segments.into_iter(), skip, len).collect();
                assert!(pieces.iter().all(|piece| piece.len > 0), "{skip} {len}");
                let cut: Vec<u64> = pieces
                    .iter()
                    .flat_map(|s| (0..u64::from(s.len)).map(move |i| s.addr.0 + i))
                    .collect();
                let from = (skip as usize).min(bytes.len());
                let to = (from + len as usize).min(bytes.len());
                assert_eq!(cut, bytes[from..to], "{skip} {len}");
            }
        }
    }

    #[test]
    fn window_when_it_is_full_looks_at_no_further_segment() {
        let segment = Segment {
            addr: GuestAddress(DATA),
            len: 4,
        };
        let mut seen = 0;
        let endless = std::iter::repeat(segment).inspect(|_| seen += 1);
        assert_eq!(window(endless, 2, 6).count(), 2);
        assert_eq!(seen, 2);
    }

    #[test]
    fn clear_when_done_has_made_all_bytes_0_and_no_others() {
        let ram = ram();
        let around = vec![7; 0x4000];
        ram.write_slice(&around, GuestAddress(DATA)).unwrap();
        let segments =
            [(DATA + 1, 0x2801), (DATA + 0x3000, 0x1000 - 1)].map(|(addr, len)| Segment {
                addr: GuestAddress(addr),
                len,
            });
        assert!(clear(&ram, segments.into_iter()));
        let mut found = vec![0; 0x4000];
        ram.read_slice(&mut found, GuestAddress(DATA)).unwrap();
        for (at, byte) in found.into_iter().enumerate() {
            let is_in = (1..0x2802).contains(&at) || (0x3000..0x3fff).contains(&at);
            assert_eq!(byte, if is_in { 0 } else { 7 }, "{at:#x}");
        }
        // Where memory ends, what there is no memory for is not made so.
        let beyond = Segment {
            addr: GuestAddress((1 << 20) - 1),
            len: 2,
        };
        assert!(!clear(&ram, [beyond].into_iter()));
    }

    #[test]
    fn copies_when_spread_over_segments_are_whole_or_refused() {
        let ram = ram();
        let segments = [(DATA, 3), (DATA + 10, 2)].map(|(addr, len)| Segment {
            addr: GuestAddress(addr),
            len,
        });
        assert!(copy_out(&ram, segments.into_iter(), b"abcde"));
        let mut back = [0; 5];
        assert!(copy_in(&ram, segments.into_iter(), &mut back));
        assert_eq!(&back, b"abcde");
        assert!(!copy_out(&ram, segments.into_iter(), b"abcdef"));
        assert!(!copy_in(&ram, segments.into_iter(), &mut [0; 6]));
        // Where memory ends.
        let beyond = Segment {
            addr: GuestAddress((1 << 20) - 1),
            len: 2,
        };
        assert!(!copy_out(&ram, [beyond].into_iter(), b"ab"));
        assert!(!copy_in(&ram, [beyond].into_iter(), &mut [0; 2]));
    }
}
