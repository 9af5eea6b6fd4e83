//! Packets between a descriptor and guest memory, one system call for each, without a copy of ours.
//!
//! Why not io_uring: measured on a tap (Linux 6.18, frames of 1514 bytes and of 64 KiB), a batch of
//! writes or reads costs per frame what the calls cost one by one, or more: nearly all the time goes
//! into the kernel's own path of a frame. What does pay is `write` instead of `writev` for a packet in one
//! piece, by some 8 % of the whole.
//!
//! Guest memory is only given to the kernel as [`VolatileSlice`]s whose lifetimes hold the mapping in
//! place; nothing in this process makes a reference to it.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces that are given to the kernel at once, the spill not counted.
pub const PIECES: usize = 256;

fn vector<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// Memory that packets are read into, in the form that the kernel takes, on the stack. Packets take it
/// from the front. The caller marks as written what a packet has filled.
pub struct Incoming<'a> {
    /// Those from `first` to `end` are initialised, and parts of slices that live for `'a`; the others
    /// cost nothing. The last place is for the spill.
    vectors: [MaybeUninit<libc::iovec>; PIECES + 1],
    first: usize,
    end: usize,
    memory: PhantomData<VolatileSlice<'a>>,
}

impl<'a> Incoming<'a> {
    /// No memory.
    pub fn new() -> Self {
        Incoming {
            vectors: [const { MaybeUninit::uninit() }; PIECES + 1],
            first: 0,
            end: 0,
            memory: PhantomData,
        }
    }

    /// Adds `slice` at the end; whether there was a place.
    pub fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'a, B>) -> bool {
        if self.end == PIECES && self.first > 0 {
            self.vectors.copy_within(self.first..self.end, 0);
            self.end -= self.first;
            self.first = 0;
        }
        match self.vectors.get_mut(self.end) {
            Some(place) if self.end < PIECES => place.write(vector(slice)),
            _ => return false,
        };
        self.end += 1;
        true
    }

    /// Takes `count` pieces away from the front.
    pub fn consume(&mut self, count: usize) {
        self.first = self.first.saturating_add(count).min(self.end);
    }

    /// Takes `count` pieces away from the end.
    pub fn truncate(&mut self, count: usize) {
        self.end = self.end.saturating_sub(count).max(self.first);
    }

    /// Reads one packet into the first `count` pieces and then, should it be longer, into `spill`; its
    /// length.
    ///
    /// # Errors
    /// WouldBlock when there is no packet; else the host's.
    pub fn read(&mut self, fd: impl AsFd, count: usize, spill: &mut [u8]) -> io::Result<usize> {
        let end = self.first.saturating_add(count).min(self.end);
        let Some(behind) = self.vectors.get_mut(end) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // What is behind the last piece makes place for the spill.
        let replaced = *behind;
        behind.write(libc::iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        });
        let len = end - self.first + usize::from(!spill.is_empty());
        let vectors = self.vectors.get(self.first..self.first + len);
        let (fd, vectors) = (fd.as_fd().as_raw_fd(), vectors.unwrap_or_default());
        // SAFETY: `push` has written the vectors from `first` to `end`, and this function the one behind
        // them, which is given to the kernel only if it is the spill's. Each is a part of a slice whose
        // lifetime keeps it mapped and writable across the call, or the spill, which is borrowed
        // exclusively. `MaybeUninit` has the layout of what is in it.
        let n = unsafe {
            match vectors {
                [one] => {
                    let one = one.assume_init();
                    libc::read(fd, one.iov_base, one.iov_len)
                }
                _ => libc::readv(fd, vectors.as_ptr().cast(), vectors.len() as libc::c_int),
            }
        };
        let result = usize::try_from(n).map_err(|_| io::Error::last_os_error());
        if let Some(behind) = self.vectors.get_mut(end) {
            *behind = replaced;
        }
        result
    }
}

/// Writes one packet that consists of `slices`; the length taken.
///
/// # Errors
/// InvalidInput when there are more than [`PIECES`] slices, or none; else the host's.
pub fn write_packet<'a, B: BitmapSlice + 'a>(
    fd: impl AsFd,
    mut slices: impl Iterator<Item = VolatileSlice<'a, B>>,
) -> io::Result<usize> {
    let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; PIECES];
    let mut count = 0;
    for slice in &mut slices {
        let Some(place) = vectors.get_mut(count) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        place.write(vector(&slice));
        count += 1;
    }
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the loop has written the first `count` vectors, and each is a part of a slice whose lifetime
    // keeps it mapped until after the call; the kernel only reads it. `MaybeUninit` has the layout of what
    // is in it.
    let n = unsafe {
        match (count, &vectors[0]) {
            (0, _) => return Err(io::ErrorKind::InvalidInput.into()),
            (1, one) => {
                let one = one.assume_init();
                libc::write(fd, one.iov_base, one.iov_len)
            }
            _ => libc::writev(fd, vectors.as_ptr().cast(), count as libc::c_int),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

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

    fn pair() -> (UnixDatagram, UnixDatagram) {
        let (a, b) = UnixDatagram::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    #[test]
    fn packet_when_in_any_number_of_pieces_arrives_whole() {
        let (a, b) = pair();
        for size in [1, 3, 10, 20] {
            let mut out = *b"0123456789";
            let sent = write_packet(&a, pieces(&mut out, size).into_iter()).unwrap();
            assert_eq!(sent, 10);
            let mut got = [0; 20];
            assert_eq!(b.recv(&mut got).unwrap(), 10);
            assert_eq!(&got[..10], b"0123456789");
        }
        let mut out = vec![0; PIECES + 1];
        for count in [0, PIECES + 1] {
            let error = write_packet(&a, pieces(&mut out[..count], 1).into_iter()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{count}");
        }
    }

    #[test]
    fn packet_when_longer_than_the_pieces_goes_on_in_the_spill() {
        let (a, b) = pair();
        let mut memory = [0; 12];
        let mut spill = [0; 100];
        let mut incoming = Incoming::new();
        for piece in pieces(&mut memory, 4) {
            assert!(incoming.push(&piece));
        }
        a.send(b"0123456789").unwrap();
        assert_eq!(incoming.read(&b, 2, &mut spill).unwrap(), 10);
        assert_eq!(&spill[..3], b"89\0");
        // The piece behind the spill's place is as it was.
        incoming.consume(1);
        a.send(b"abcdefgh").unwrap();
        assert_eq!(incoming.read(&b, 2, &mut []).unwrap(), 8);
        incoming.consume(1);
        a.send(b"xy").unwrap();
        assert_eq!(incoming.read(&b, 1, &mut []).unwrap(), 2);
        let error = incoming.read(&b, 1, &mut []).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(&memory, b"0123abcdxygh");
    }

    #[test]
    fn pieces_when_more_are_pushed_than_fit_make_place_once_consumed() {
        let (a, b) = pair();
        let mut memory = vec![0; PIECES + 2];
        let all = pieces(&mut memory, 1);
        let mut incoming = Incoming::new();
        for piece in &all[..PIECES] {
            assert!(incoming.push(piece));
        }
        assert!(!incoming.push(&all[PIECES]));
        incoming.consume(PIECES - 1);
        assert!(incoming.push(&all[PIECES]));
        assert!(incoming.push(&all[PIECES + 1]));
        incoming.truncate(1);
        a.send(b"abc").unwrap();
        let mut spill = [0; 2];
        assert_eq!(incoming.read(&b, 9, &mut spill).unwrap(), 3);
        assert_eq!(memory[PIECES - 1..], *b"ab\0");
        assert_eq!(&spill, b"c\0");
    }
}
