//! Memory for rings and buffers: the RAM between the image and whatever comes next.
//!
//! A bump allocator that every word starts afresh. A word leaves no device running (dropping
//! `virtio::Device` resets it), so nothing writes to memory of the word before.

use crate::boot;

unsafe extern "C" {
    static image_end: u8;
}

/// Free memory, as addresses: in this machine address and pointer are the same.
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// Everything from the image's end to the end of that piece of RAM or the initrd.
    pub fn new() -> Self {
        let start = &raw const image_end as u64;
        Arena {
            next: start,
            end: boot::info().end_of_free_ram(start),
        }
    }

    /// `size` zeroed bytes.
    pub fn take(&mut self, size: u64, align: u64) -> Result<u64, &'static str> {
        let address = self.reserve(size, align)?;
        bytes(address, size).fill(0);
        Ok(address)
    }

    /// The same without touching them.
    pub fn reserve(&mut self, size: u64, align: u64) -> Result<u64, &'static str> {
        let start = self.next.next_multiple_of(align);
        let end = start.checked_add(size).ok_or("size overflows")?;
        if end > self.end {
            return Err("not enough guest memory for this word");
        }
        self.next = end;
        Ok(start)
    }

    pub fn free(&self) -> u64 {
        self.end.saturating_sub(self.next)
    }
}

/// Arena memory as a slice. The caller has taken it and shares it with a device at most.
pub fn bytes(address: u64, size: u64) -> &'static mut [u8] {
    // SAFETY: arena memory is no Rust object; one processor uses it, and it was given out once.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, size as usize) }
}
