//! The process as a whole: its end, its allocator, its limits.

use std::io::{self, Write};
use std::panic;

use rustix::process::Resource;

use super::{terminal, thread};

/// Ends the process at once, all threads with it, without running anything else of ours.
pub fn exit(code: i32) -> ! {
    // SAFETY: `_exit` does not return and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Keeps the C library's allocator to one arena that grows by `brk`, or by `mmap` where `brk` has
/// come to its end, and never shrinks: no thread then needs `mprotect`, `mremap`, `munmap` or a
/// file under /proc when it allocates, and a filter can say so. Call it before the first thread
/// is made.
pub fn use_one_arena() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
        // No allocation has a mapping of its own, however large.
        (libc::M_MMAP_MAX, 0),
    ] {
        // SAFETY: only sets a parameter of the allocator, before other threads exist.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Makes a panic on any thread end the process: one line, the terminal restored, exit code `code`.
/// An abort would look like SIGSEGV where the process is the first of its namespace.
pub fn end_on_panic(code: i32) {
    panic::set_hook(Box::new(move |info| {
        thread::with_name(|name| {
            // Not `eprintln!`, which panics when the write fails.
            let _ = writeln!(
                io::stderr(),
                "mayfly: thread {name}: internal error (panic): {info}"
            );
        });
        terminal::restore();
        self::exit(code)
    }));
}

/// Whether this is process 1 of its namespace, where default signal actions do not apply.
pub fn is_first_process() -> bool {
    std::process::id() == 1
}

/// The soft limit on open descriptors.
pub fn descriptor_limit() -> u64 {
    rustix::process::getrlimit(Resource::Nofile)
        .current
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// Set for the process that is to panic.
    const TOLD: &str = "MAYFLY_TEST_PANIC";
    const CODE: i32 = 163;

    /// Not a test of its own: what the process below does.
    #[test]
    fn panics_if_told_to() {
        if std::env::var_os(TOLD).is_some() {
            end_on_panic(CODE);
            panic!("told to");
        }
    }

    #[test]
    fn panic_when_on_any_thread_ends_the_process_with_its_code() {
        let ours = std::env::current_exe().unwrap();
        let words = [
            "--nocapture",
            "--exact",
            "sys::process::tests::panics_if_told_to",
        ];
        let mut plain = Command::new(&ours);
        plain.args(words);
        // As the first process of a namespace, where a signal that is not handled does nothing.
        let mut first = Command::new("unshare");
        first.args(["--pid", "--fork", "--kill-child"]);
        first.arg(&ours).args(words);
        let permitted = Command::new("unshare")
            .args(["--pid", "--fork", "true"])
            .stderr(Stdio::null())
            .status();
        let mut commands = vec![plain];
        if permitted.is_ok_and(|status| status.success()) {
            commands.push(first);
        } else {
            crate::needs::skip(
                "a panic as the first process",
                "needs root for a pid namespace",
            );
        }
        for mut command in commands {
            let output = command.env(TOLD, "1").output().unwrap();
            assert_eq!(output.status.code(), Some(CODE), "{output:?}");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(errors.contains("internal error (panic)"), "{errors}");
        }
    }
}
