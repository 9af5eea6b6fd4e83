//! The calling thread: its name, which is in its log lines and in the last line of a thread that ends
//! the process, and the CPUs it may use.

use std::cell::Cell;

thread_local! {
    /// Readable in a signal handler: no destructor, no allocation.
    static NAME: Cell<([u8; 16], usize)> = const { Cell::new((*b"main            ", 4)) };
}

/// Names the calling thread; at most 16 bytes are kept.
pub fn set_name(name: &str) {
    let mut bytes = [0; 16];
    let mut len = 0;
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
        len += 1;
    }
    NAME.set((bytes, len));
}

/// Calls `with` with the name of the calling thread. Safe in a signal handler.
pub fn with_name<R>(with: impl FnOnce(&str) -> R) -> R {
    let (bytes, len) = NAME.get();
    let name = bytes.get(..len).unwrap_or_default();
    with(std::str::from_utf8(name).unwrap_or("?"))
}

/// How many CPUs the calling thread may run on. One when the host does not tell.
pub fn allowed_cpus() -> u32 {
    rustix::thread::sched_getaffinity(None).map_or(1, |cpus| cpus.count())
}

/// Lets threads that wait for this CPU run first.
pub fn yield_now() {
    std::thread::yield_now();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_when_set_is_of_this_thread_alone() {
        std::thread::spawn(|| {
            assert_eq!(with_name(str::to_owned), "main");
            set_name("block a-name-that-is-longer");
            assert_eq!(with_name(str::to_owned), "block a-name-tha");
        })
        .join()
        .unwrap();
        assert_eq!(with_name(str::to_owned), "main");
    }
}
