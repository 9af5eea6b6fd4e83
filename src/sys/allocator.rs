//! The allocator: the C library's, and an orderly end of the process where that has nothing more to give.
//!
//! What the standard library does then, a text, a look for where it happened and an abort, needs
//! system calls that no filter has, so that a host short of memory would look like an attack.

use std::alloc::{GlobalAlloc, Layout, System};

use super::signal::Text;
use super::{fd, process, terminal, thread};

/// The allocator of the monitor.
#[derive(Debug)]
pub struct Allocator {
    /// The exit code when the host has no memory left.
    pub exit_code: i32,
}

impl Allocator {
    fn check(&self, memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() {
            end(size, self.exit_code)
        }
        memory
    }
}

// SAFETY: every call is passed on to `System` as it came, and so is what that returns, but for
// null pointers, with which nothing goes on.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        self.check(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the callee's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        self.check(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are the callee's.
        self.check(unsafe { System.realloc(memory, layout, size) }, size)
    }
}

#[cold]
fn end(size: usize, exit_code: i32) -> ! {
    let mut line = Text::new();
    line.say("mayfly: thread ");
    thread::with_name(|name| line.say(name));
    line.say(": the host has no memory left for the monitor: ");
    line.size(size);
    line.say(" bytes were asked for (see the limits RLIMIT_AS and RLIMIT_DATA)\n");
    let _ = fd::write(libc::STDERR_FILENO, line.bytes());
    terminal::restore();
    process::exit(exit_code)
}
