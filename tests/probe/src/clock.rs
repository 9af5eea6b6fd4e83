//! Time, from the time stamp counter alone.
//!
//! The counter's rate is found once: from the command line, from CPUID, from KVM's clock, or by
//! counting against channel 2 of the PIT. A machine with none of these gets a guess, and says so.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::{boot, ring0, x86};

/// Ticks in a millisecond; 0 until first asked for.
static KHZ: AtomicU64 = AtomicU64::new(0);
/// An ordinary server's rate.
const GUESS_KHZ: u64 = 2_400_000;
/// Input clock of the PIT.
const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Bit 0 opens channel 2's gate, bit 5 is its output.
const SPEAKER: u16 = 0x61;

/// The counter's rate and where it is known from.
pub fn rate() -> (u64, &'static str) {
    type Source = fn() -> Option<u64>;
    let sources: [(Source, &str); 5] = [
        (from_command_line, "command line"),
        (from_crystal, "cpuid 15h"),
        (from_hypervisor, "cpuid 40000010h"),
        (from_kvm_clock, "kvm-clock"),
        (from_pit, "pit"),
    ];
    let known = sources
        .iter()
        .find_map(|(source, name)| source().filter(|khz| *khz != 0).map(|khz| (khz, *name)));
    known.unwrap_or((GUESS_KHZ, "a guess"))
}

fn khz() -> u64 {
    match KHZ.load(Ordering::Relaxed) {
        0 => {
            let khz = rate().0;
            KHZ.store(khz, Ordering::Relaxed);
            khz
        }
        khz => khz,
    }
}

/// How long a device, a processor or a person may take: `patience_ms=N`, else longer than the
/// busiest host needs.
pub fn patience_ms() -> u64 {
    let told = boot::info().option("patience_ms=");
    told.and_then(|ms| ms.parse().ok()).unwrap_or(300_000)
}

fn from_command_line() -> Option<u64> {
    boot::info().option("tsc_khz=")?.parse().ok()
}

/// Leaf 15h: ratio to a crystal whose rate is in ecx, or is not told.
fn from_crystal() -> Option<u64> {
    if x86::cpuid(0, 0).0 < 0x15 {
        return None;
    }
    let (denominator, numerator, hz, _) = x86::cpuid(0x15, 0);
    (denominator != 0 && hz != 0)
        .then(|| u64::from(hz) * u64::from(numerator) / u64::from(denominator) / 1000)
}

/// The leaf some hypervisors put the rate in.
fn from_hypervisor() -> Option<u64> {
    let has_hypervisor = x86::cpuid(1, 0).2 >> 31 == 1;
    (has_hypervisor && x86::cpuid(0x4000_0000, 0).0 >= 0x4000_0010)
        .then(|| u64::from(x86::cpuid(0x4000_0010, 0).0))
}

/// What KVM writes for a processor's clock: 32 bytes, of which these two tell the rate.
#[repr(C, align(64))]
struct KvmClock(UnsafeCell<[u8; 64]>);

// SAFETY: KVM writes it while the first processor waits for that; it is read by address only.
unsafe impl Sync for KvmClock {}

static KVM_CLOCK: KvmClock = KvmClock(UnsafeCell::new([0; 64]));

/// KVM's paravirtual clock: nanoseconds = ((ticks << shift) * factor) >> 32.
fn from_kvm_clock() -> Option<u64> {
    const FEATURES: u32 = 0x4000_0001;
    const CLOCKSOURCE2: u32 = 1 << 3;
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    const FACTOR: u64 = 24;
    const SHIFT: u64 = 28;
    let (_, b, c, d) = x86::cpuid(0x4000_0000, 0);
    let is_kvm = [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
    if !is_kvm || x86::cpuid(FEATURES, 0).0 & CLOCKSOURCE2 == 0 {
        return None;
    }
    let at = KVM_CLOCK.0.get() as u64;
    ring0::wrmsr(SYSTEM_TIME, at | 1);
    // KVM writes it before the processor enters the guest again.
    x86::inb(SPEAKER);
    ring0::wrmsr(SYSTEM_TIME, 0);
    let factor = u128::from(x86::load(at + FACTOR, 4));
    let shift = x86::load(at + SHIFT, 1) as i8;
    let scaled = (1_000_000u128 << 32).checked_div(factor)?;
    Some(match shift {
        0.. => scaled >> shift.min(64),
        _ => scaled << (-shift).min(64),
    } as u64)
}

/// What the PIT says of the counter's rate. An interruption makes it seem greater, so the least of
/// many counts.
pub fn pit_rate() -> Option<u64> {
    (0..25).filter_map(|_| from_pit()).min()
}

/// Counts while channel 2 runs down from 20 ms; gives up when it never ends.
fn from_pit() -> Option<u64> {
    let ticks = PIT_HZ / 50;
    let before = x86::inb(SPEAKER);
    x86::outb(SPEAKER, before & !3 | 1);
    x86::outb(PIT_COMMAND, 0xb0);
    x86::outb(PIT_CHANNEL_2, ticks as u8);
    x86::outb(PIT_CHANNEL_2, (ticks >> 8) as u8);
    let start = x86::rdtsc();
    let mut end = start;
    let mut done = false;
    let mut reads = 0;
    while !done && end - start < 4_000_000_000 {
        done = x86::inb(SPEAKER) & 0x20 != 0;
        end = x86::rdtsc();
        reads += 1;
    }
    x86::outb(SPEAKER, before);
    // An absent port reads all ones: the very first read says "done".
    (done && reads > 3).then(|| (end - start) / 20)
}

/// A moment, to measure from.
#[derive(Clone, Copy)]
pub struct Moment(u64);

impl Moment {
    pub fn now() -> Self {
        Moment(x86::rdtsc())
    }

    /// Nanoseconds since then.
    pub fn elapsed_ns(self) -> u64 {
        ns(x86::rdtsc().saturating_sub(self.0))
    }
}

/// Ticks to nanoseconds.
pub fn ns(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz())) as u64
}

/// Nanoseconds to ticks.
pub fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(khz()) / 1_000_000) as u64
}

/// A point in the future that a wait must not go past.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    pub fn in_ms(ms: u64) -> Self {
        Deadline(x86::rdtsc().saturating_add(ms.saturating_mul(khz())))
    }

    pub fn passed(self) -> bool {
        x86::rdtsc() >= self.0
    }
}

/// Does nothing for a while.
pub fn wait_ms(ms: u64) {
    let end = Deadline::in_ms(ms);
    while !end.passed() {
        core::hint::spin_loop();
    }
}

/// Spins until `done` or the limit; says which.
pub fn wait_until(ms: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = Deadline::in_ms(ms);
    loop {
        if done() {
            return true;
        }
        if end.passed() {
            return false;
        }
        core::hint::spin_loop();
    }
}
