//! The processor's cache.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Has the processor bring the line in which `slice` begins to its cache. It goes on meanwhile.
pub fn prefetch<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) {
    // SAFETY: a prefetch is a hint, which reads nothing that a program could see, and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.ptr_guard().as_ptr().cast()) }
}
