//! Words about guest memory.

use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::{boot, paging, pattern, text, x86};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Writes and reads back the first and the last page of every RAM region, and restores them.
pub fn mem(_: &mut Arguments) -> Outcome {
    let mut pages = 0;
    for region in boot::info()
        .regions()
        .iter()
        .filter(|r| r.kind == boot::RAM)
    {
        paging::map(region.start, region.end())?;
        let first = region.start.next_multiple_of(PAGE);
        let last = (region.end() & !(PAGE - 1)).wrapping_sub(PAGE);
        for page in [first, last] {
            for at in [page, page + PAGE - 8] {
                let before = x86::load(at, 8);
                for value in [!at, at] {
                    x86::store(at, 8, value);
                    let read = x86::load(at, 8);
                    if read != value {
                        return Err(text!("at {at:#x}: wrote {value:#x}, read {read:#x}"));
                    }
                }
                x86::store(at, 8, before);
            }
            pages += 1;
        }
    }
    match pages {
        0 => Err("no RAM in the memory map".into()),
        _ => Ok(text!("pages={pages}")),
    }
}

/// The free memory that `fill` and `check` use: at the end of the arena, where no other word
/// gets to unless it needs nearly all of it.
fn area(arguments: &mut Arguments) -> Result<(u64, u64, u64), crate::text::Text> {
    let mib = arguments.number("MIB")?;
    let seed = arguments.number("SEED")?;
    let mut arena = Arena::new();
    let size = mib.saturating_mul(MIB);
    let skip = arena
        .free()
        .checked_sub(size)
        .ok_or("not that much free memory")?;
    arena.reserve(skip & !(PAGE - 1), 1)?;
    Ok((arena.reserve(size, 1)?, size, seed))
}

pub fn fill(arguments: &mut Arguments) -> Outcome {
    let (address, size, seed) = area(arguments)?;
    let bytes = arena::bytes(address, size);
    pattern::fill(seed, 0, bytes);
    Ok(text!(
        "at {address:#x} sum {:016x}",
        pattern::sum(pattern::SUM_START, bytes)
    ))
}

pub fn check(arguments: &mut Arguments) -> Outcome {
    let (address, size, seed) = area(arguments)?;
    let bytes = arena::bytes(address, size);
    match pattern::first_difference(seed, 0, bytes) {
        None => Ok(text!(
            "at {address:#x} sum {:016x}",
            pattern::sum(pattern::SUM_START, bytes)
        )),
        Some(offset) => Err(text!("first difference at {:#x}", address + offset as u64)),
    }
}

/// Writes to every page above the image, so that all of them hold something other than zeros.
pub fn touch(_: &mut Arguments) -> Outcome {
    let image_end = Arena::new().reserve(0, PAGE)?;
    let mut pages = 0u64;
    for region in boot::info()
        .regions()
        .iter()
        .filter(|r| r.kind == boot::RAM && r.end() > image_end)
    {
        let start = region.start.max(image_end).next_multiple_of(PAGE);
        let end = region.end() & !(PAGE - 1);
        paging::map(start, end)?;
        for page in (start..end).step_by(PAGE as usize) {
            x86::store(page, 8, page | 1);
            pages += 1;
        }
    }
    Ok(text!("pages={pages}"))
}
