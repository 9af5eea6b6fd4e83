//! `smp[:CPUS]`: starts the other processors, by the local APIC from ring 3.
//!
//! Each of them drops to ring 3 as the first one did, notes its APIC id and counts for ever.
//! The word says how many came and that their counters move.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::{clock, serial, text, x86};

unsafe extern "C" {
    static ap_start: u8;
    static ap_end: u8;
    static mut ap_frames: [[u64; 5]; MOST];
}

/// As many as a machine has.
const MOST: usize = 32;
/// The page that processors start at: RAM that no loader uses by now.
const START_PAGE: u64 = 0x8_0000;
const STACK: u64 = 16 << 10;
const LOCAL_APIC: u64 = 0xfee0_0000;
/// Local APIC registers.
const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
/// Commands: to all but this one; INIT asserted; start-up with a page number.
const ALL_OTHERS: u64 = 3 << 18;
const INIT: u64 = 0x4500;
const STARTUP: u64 = 0x4600;
/// User selectors and flags of an iretq frame: see boot.s.
const CODE: u64 = 0x1b;
const STACK_SEGMENT: u64 = 0x23;
const FLAGS: u64 = 0x2;

static ARRIVED: AtomicU32 = AtomicU32::new(0);
static APIC_IDS: [AtomicU32; MOST] = [const { AtomicU32::new(0) }; MOST];
static COUNTERS: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];

/// Where a further processor comes to ring 3. It makes no port accesses: it has no task state.
extern "C" fn further_processor(ticket: u32) -> ! {
    let slot = ticket as usize % MOST;
    let id = x86::load(LOCAL_APIC + ID, 4) >> 24;
    APIC_IDS[slot].store(id as u32, Ordering::Relaxed);
    ARRIVED.fetch_add(1, Ordering::Release);
    loop {
        COUNTERS[slot].fetch_add(1, Ordering::Relaxed);
        super::chips::take_part();
        core::hint::spin_loop();
    }
}

pub fn smp(arguments: &mut Arguments) -> Outcome {
    let wanted = arguments.number_or("CPUS", 0)? as u32;
    // Not from the arena's start, which the next word uses again: these stacks stay.
    let mut arena = Arena::new();
    let stacks = MOST as u64 * STACK;
    let spare = arena
        .free()
        .checked_sub(stacks)
        .ok_or("not enough guest memory")?;
    arena.reserve(spare & !0xf, 1)?;
    let stacks = arena.reserve(stacks, 16)?;
    let entry = further_processor as *const () as u64;
    let frames = core::array::from_fn(|slot| {
        let stack = stacks + (slot as u64 + 1) * STACK - 8;
        [entry, CODE, FLAGS, stack, STACK_SEGMENT]
    });
    // SAFETY: no further processor has started; boot.s reserves that many frames.
    unsafe { (&raw mut ap_frames).write_volatile(frames) };
    let code = &raw const ap_start as u64;
    let size = &raw const ap_end as u64 - code;
    arena::bytes(START_PAGE, size).copy_from_slice(arena::bytes(code, size));

    x86::store(LOCAL_APIC + SPURIOUS, 4, 0x1ff);
    command(INIT);
    clock::wait_ms(10);
    command(STARTUP | START_PAGE >> 12);
    let came = || ARRIVED.load(Ordering::Acquire);
    // Real mode is emulated on some hosts, and hosts are busy.
    let limit = if wanted > 1 {
        clock::patience_ms()
    } else {
        100
    };
    clock::wait_until(limit, || came() + 1 >= wanted.max(2));
    clock::wait_ms(5);
    let count = came() as usize;
    let before: [u64; MOST] = core::array::from_fn(|i| COUNTERS[i].load(Ordering::Relaxed));
    let moves = |slot: usize| COUNTERS[slot].load(Ordering::Relaxed) > before[slot];
    clock::wait_until(clock::patience_ms(), || (0..count).all(moves));
    let mut moving = 0;
    for (slot, before) in before.iter().enumerate().take(count) {
        let now = COUNTERS[slot].load(Ordering::Relaxed);
        let id = APIC_IDS[slot].load(Ordering::Relaxed);
        serial::line(format_args!(
            "  processor apic id {id} counted {}",
            now - before
        ));
        moving += usize::from(now > *before);
    }
    let text = text!("cpus={} counting={moving}", count + 1);
    match moving == count && (wanted == 0 || wanted as usize == count + 1) {
        true => Ok(text),
        false => Err(text),
    }
}

fn command(value: u64) {
    x86::store(LOCAL_APIC + COMMAND_HIGH, 4, 0);
    x86::store(LOCAL_APIC + COMMAND, 4, value | ALL_OTHERS);
}
