//! Reaching memory above 4 GiB: boot.s maps the first four, this maps more when asked.
//!
//! The tables are ordinary memory of ring 3. Only entries that were absent are written, so
//! nothing has to be flushed.

use core::cell::UnsafeCell;

use crate::x86;

unsafe extern "C" {
    static pdpt: u8;
}

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Mapped by boot.s.
const FIRST: u64 = 4;
/// One past the last GiB that can be mapped.
const LAST: u64 = 36;
/// Present, writable, user.
const TABLE: u64 = 7;
/// The same, accessed, dirty, 2 MiB.
const PAGE: u64 = 0xe7;

/// Room for the tables of the further GiBs.
#[repr(C, align(4096))]
struct Tables(UnsafeCell<[[u64; 512]; (LAST - FIRST) as usize]>);

// SAFETY: only `map` writes them, by address, and only the first processor calls it.
unsafe impl Sync for Tables {}

static TABLES: Tables = Tables(UnsafeCell::new([[0; 512]; (LAST - FIRST) as usize]));

/// Maps every GiB that `start..end` touches.
pub fn map(start: u64, end: u64) -> Result<(), &'static str> {
    if end > LAST * GIB {
        return Err("memory above 36 GiB is out of the probe's reach");
    }
    for gib in (start / GIB).max(FIRST)..end.div_ceil(GIB) {
        let entry = &raw const pdpt as u64 + gib * 8;
        if x86::load(entry, 8) != 0 {
            continue;
        }
        let table = TABLES.0.get() as u64 + (gib - FIRST) * 4096;
        for i in 0..512 {
            x86::store(table + i * 8, 8, gib * GIB + i * LARGE_PAGE + PAGE);
        }
        x86::store(entry, 8, table + TABLE);
    }
    Ok(())
}
