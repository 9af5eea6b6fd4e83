//! What tests ask of the system: what each thread allocates, so that tests can hold threads to
//! allocating nothing, what a socket's other end has not read yet, networks of their own, and time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often the calling thread has allocated or freed.
pub fn allocator_calls() -> u64 {
    CALLS.get()
}

/// Bytes of memory that hold what was sent on `stream` and is not read yet: 0 once all is read.
pub fn unread_by_peer(stream: &UnixStream) -> i32 {
    let mut unread = 0;
    // SAFETY: the descriptor is open, borrowed from `stream`; TIOCOUTQ writes one int, which `unread` is.
    let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    unread
}

/// Waits until `condition` holds; `what` is for the failure.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Waits until the last copy of a descriptor is closed, which `is_so` finds out. A program that another test
/// starts just now has copies of all of them until its exec.
pub fn wait_for_last_close(is_so: impl FnMut() -> bool) {
    wait_until("the last close", is_so);
}

/// Whether `pipe` has no reading end any more. Writes a byte if it has.
pub fn is_without_reader(mut pipe: &File) -> bool {
    let written = pipe.write_all(b"!");
    written.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The name of a network interface or a socket that no other run of the tests has: at most 15 bytes, as an
/// interface's is, with a `name` of at most 4.
pub fn own_name(name: &str) -> String {
    format!("mf-{}-{name}", std::process::id())
}

/// Moves the calling thread into a network namespace of its own, which goes with the thread and what it
/// has opened.
pub fn enter_network_namespace() -> io::Result<()> {
    // SAFETY: unshare takes no pointers; nothing of this thread depends on its network namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// All frames on all interfaces of the calling thread's network namespace from now on.
pub fn packets() -> io::Result<File> {
    use rustix::net::{AddressFamily, Protocol, SocketType, socket};

    let all = u32::from((libc::ETH_P_ALL as u16).to_be());
    let all = Protocol::from_raw(all.try_into().map_err(io::Error::other)?);
    let socket = socket(AddressFamily::PACKET, SocketType::RAW, Some(all))?;
    Ok(File::from(socket))
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator, which keeps the promises.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(old, layout) }
    }
}
