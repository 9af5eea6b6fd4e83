//! How the process can end: every exit code, each with one meaning.
//!
//! Codes below 160 are Firecracker's, so that what its users have built on them still holds; those
//! from 160 on tell apart what Firecracker reports as 0 or 1.

/// The guest reset or powered off its machine.
pub const GUEST_ENDED: i32 = 0;
/// The monitor could not do what it was asked (a file, a socket, KVM).
pub const ERROR: i32 = 1;
/// A thread made a system call that its filter does not allow.
pub const BAD_SYSCALL: i32 = 148;
/// SIGBUS: memory mapped from a file is gone, usually because the file was cut short.
pub const SIGBUS: i32 = 149;
/// SIGSEGV in the monitor.
pub const SIGSEGV: i32 = 150;
/// A log level that does not exist.
pub const BAD_LOG_LEVEL: i32 = 152;
/// Command-line arguments that are not valid.
pub const BAD_ARGUMENTS: i32 = 153;
/// SIGXCPU: the CPU time limit of the process is used up.
pub const SIGXCPU: i32 = 154;
/// SIGHUP.
pub const SIGHUP: i32 = 156;
/// SIGILL in the monitor.
pub const SIGILL: i32 = 157;
/// The guest crashed: a triple fault, seen by KVM as a shutdown.
pub const GUEST_CRASHED: i32 = 160;
/// KVM cannot run the guest any further (an instruction it cannot emulate, a failed entry).
pub const GUEST_NOT_RUNNABLE: i32 = 161;
/// A thread of the monitor cannot continue because of the host.
pub const WORKER_FAILED: i32 = 162;
/// Internal error: a panic.
pub const PANIC: i32 = 163;
/// The guest's kernel panicked, said so, and then reset its machine. (164 is the jailer's.)
pub const GUEST_PANICKED: i32 = 165;

/// The code when `signal` ends the process: its own where it has one, else 128 and its number, as
/// shells have it (a process that is the first of its namespace cannot die by the signal itself).
pub const fn by_signal(signal: i32) -> i32 {
    match signal {
        libc::SIGSYS => BAD_SYSCALL,
        libc::SIGBUS => SIGBUS,
        libc::SIGSEGV => SIGSEGV,
        libc::SIGXCPU => SIGXCPU,
        libc::SIGHUP => SIGHUP,
        libc::SIGILL => SIGILL,
        other => other.saturating_add(128),
    }
}
