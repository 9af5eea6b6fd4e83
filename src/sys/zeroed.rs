//! Memory that costs nothing until it is used.

use std::alloc::{Layout, handle_alloc_error};
use std::ptr;
use std::slice;
use std::sync::atomic::AtomicU8;

/// `len` bytes that threads may share, all 0, for as long as the process lives. Pages that are never
/// used cost nothing: an allocator would give, and first clear, memory that was in use before.
pub fn atomic_bytes(len: usize) -> &'static [AtomicU8] {
    let (access, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new mapping at an address that the kernel chooses touches no other memory.
    let memory = unsafe { libc::mmap(ptr::null_mut(), len, access, kind, -1, 0) };
    if memory == libc::MAP_FAILED {
        handle_alloc_error(Layout::array::<AtomicU8>(len).unwrap_or(Layout::new::<AtomicU8>()));
    }
    // SAFETY: the mapping has `len` bytes, is never unmapped and known here alone; an AtomicU8 has the
    // size and alignment of a u8, and a zero byte is valid for it.
    unsafe { slice::from_raw_parts(memory.cast::<AtomicU8>(), len) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn bytes_are_0_and_keep_what_is_written() {
        let bytes = atomic_bytes(10_000);
        assert_eq!(bytes.len(), 10_000);
        assert!(bytes.iter().all(|byte| byte.load(Ordering::Relaxed) == 0));
        bytes[9_999].store(7, Ordering::Relaxed);
        assert_eq!(bytes[9_999].load(Ordering::Relaxed), 7);
    }
}
