//! Time as plain numbers.

use std::time::Instant;

fn nanos(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a timespec of ours that outlives the call, which writes nothing else.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    debug_assert_eq!(result, 0, "the clocks exist on every Linux");
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

#[cfg(test)]
thread_local! {
    /// How often the calling thread has looked at the monotonic clock.
    pub static LOOKS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn monotonic_nanos() -> u64 {
    #[cfg(test)]
    LOOKS.set(LOOKS.get() + 1);
    nanos(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds of CLOCK_REALTIME since 1970; 0 before that.
pub fn realtime_nanos() -> u64 {
    nanos(libc::CLOCK_REALTIME)
}

/// Nanoseconds of CPU time this process has used.
pub fn process_cpu_nanos() -> u64 {
    nanos(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// Milliseconds until `at`, rounded up; 0 once it has passed.
pub fn millis_until(at: Instant) -> u32 {
    let left = at.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return 0;
    }
    u32::try_from(left.as_millis())
        .unwrap_or(u32::MAX)
        .saturating_add(1)
}
