//! Pieces of guest memory that have been found to lie in RAM, and what is done with them.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::Ram;

/// A piece of guest memory, known to lie in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub addr: GuestAddress,
    /// Its length in bytes, not 0.
    pub len: u32,
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
                let cut: Vec<u64> = window(segments.into_iter(), skip, len)
                    .flat_map(|s| (0..u64::from(s.len)).map(move |i| s.addr.0 + i))
                    .collect();
                let from = (skip as usize).min(bytes.len());
                let to = (from + len as usize).min(bytes.len());
                assert_eq!(cut, bytes[from..to], "{skip} {len}");
            }
        }
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
    }
}
