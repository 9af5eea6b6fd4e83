//! The word that measures pauses: it watches the counter for gaps and does what single input bytes ask.
//!
//! | input | what it does |
//! |---|---|
//! | `g` | prints the greatest gap since it last printed one, how many it has printed, and a full stop |
//! | `w` | writes to 1,000 pages spread evenly over free memory, always the same, then `0xf7` |
//! | `m` | writes 123 to the boot timer, which marks the end of a start or a restore, then `0xf7` |
//! | `p` | `0xf7` for ever |
//! | `h` | `0xf7`, then halts for ever |
//! | `e` | ends the word |
//!
//! A gap is the time between two readings of the counter in one turn of the loop, so a pause that
//! begins and ends anywhere in it is seen whole. Looking for input is part of the loop. What an
//! input asks for is not, but for its last byte: a pause that begins when that has come is seen.
//! `0xf7` occurs in no text, so it is found among whatever a monitor prints.

use super::{Arguments, Outcome};
use crate::{arena::Arena, clock, ring0, serial, text, x86};

/// The byte that says "done".
const MARKER: u8 = 0xf7;
/// Pages that `w` writes to.
const PAGES: u64 = 1000;
const PAGE: u64 = 4096;
/// Between two looks at the serial port, each of which costs an exit.
const LOOK_NS: u64 = 50_000;

pub fn watch(_: &mut Arguments) -> Outcome {
    let mut pages = Pages::new()?;
    // Finding the counter's rate may take long: once, now.
    let between_looks = clock::ticks(LOOK_NS);
    serial::line(format_args!("watch ready"));
    let mut last = x86::rdtsc();
    let mut looked = last;
    let mut greatest = 0;
    let mut answers = 0u64;
    loop {
        let now = x86::rdtsc();
        // A restored machine's counter may stand before what was read last.
        greatest = now.saturating_sub(last).max(greatest);
        last = now;
        if now.wrapping_sub(looked) < between_looks {
            continue;
        }
        looked = now;
        match serial::poll() {
            None => continue,
            Some(b'g') => {
                answers += 1;
                let gap = clock::ns(greatest);
                serial::line(format_args!("gap {gap} ns, answer {answers}"));
                greatest = 0;
                last = x86::rdtsc();
                serial::byte(b'.');
            }
            Some(b'w') => {
                pages.write();
                last = x86::rdtsc();
                serial::byte(MARKER);
            }
            Some(b'm') => {
                super::machine::mark();
                last = x86::rdtsc();
                serial::byte(MARKER);
            }
            Some(b'p') => loop {
                serial::byte(MARKER);
            },
            Some(b'h') => {
                serial::byte(MARKER);
                ring0::halt();
            }
            Some(b'e') => return Ok(text!("answers={answers}")),
            Some(_) => continue,
        }
    }
}

/// The pages that `w` writes to.
struct Pages {
    first: u64,
    step: u64,
    turn: u64,
}

impl Pages {
    fn new() -> Result<Self, text::Text> {
        let mut arena = Arena::new();
        let first = arena.reserve(PAGE, PAGE)?;
        let step = (arena.free() / PAGES) & !(PAGE - 1);
        if step == 0 {
            return Err("not enough guest memory for this word".into());
        }
        Ok(Pages {
            first,
            step,
            turn: 0,
        })
    }

    fn write(&mut self) {
        self.turn += 1;
        for page in 0..PAGES {
            x86::store(self.first + page * self.step + 16, 8, self.turn);
        }
    }
}
