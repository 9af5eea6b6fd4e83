//! Memory that costs nothing until it is used.

use std::sync::atomic::AtomicU8;

/// `len` bytes that threads may share, all 0. Pages that are never used cost nothing.
pub fn atomic_bytes(len: usize) -> Box<[AtomicU8]> {
    let bytes = Box::into_raw(vec![0u8; len].into_boxed_slice());
    // SAFETY: the box is ours, an AtomicU8 has the size and alignment of a u8, and any byte is
    // valid for it; so it can be freed as what it becomes.
    unsafe { Box::from_raw(bytes as *mut [AtomicU8]) }
}
