//! The allocator: the C library's, and an end in order where that has nothing more to give.
//!
//! What the standard library does then, a text, a look for where it happened and an abort, needs
//! system calls that no filter has, so that a host short of memory would look like an attack.

use std::alloc::{GlobalAlloc, Layout, System};

use super::signal::Text;
use super::{fd, process, terminal};
use crate::{exit, log};

/// The allocator of the monitor.
#[derive(Debug)]
pub struct Allocator;

// SAFETY: every call is passed on to `System` as it came, and so is what that returns, but for
// null pointers, with which nothing goes on.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        there(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the callee's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        there(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        there(unsafe { System.realloc(memory, layout, size) }, size)
    }
}

fn there(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() {
        end(size)
    }
    memory
}

#[cold]
fn end(size: usize) -> ! {
    let mut line = Text::new();
    line.say("mayfly: thread ");
    log::with_thread_name(|name| line.say(name));
    line.say(": the host has no memory left for the monitor: ");
    line.size(size);
    line.say(" bytes were asked for (see the limits RLIMIT_AS and RLIMIT_DATA)\n");
    let _ = fd::write(libc::STDERR_FILENO, line.bytes());
    terminal::restore();
    process::exit(exit::WORKER_FAILED)
}
