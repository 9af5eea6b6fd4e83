//! What the fuzz targets of virtio share: guest memory as plain bytes, and a reference reader of
//! descriptor chains (virtio 1.2, 2.7.5, with our limits), written for plainness and not after `queue.rs`.

use vm_memory::{Bytes, GuestAddress};

use crate::fuzz::Input;
use crate::virtio::{QueueLayout, Ram};

/// Guest memory: two regions that adjoin, a hole, and a third.
const REGIONS: [(u64, usize); 3] = [(0, 0x6000), (0x6000, 0x2000), (0xc000, 0x4000)];
/// Where the last of them ends.
const END: u64 = 0x1_0000;

/// The most descriptors of a chain.
const SEGMENTS_MAX: usize = 256;

/// A piece of a chain: address, length, and whether the device may write it.
pub type Piece = (u64, u32, bool);

/// What a chain is: its pieces, or not to be served.
pub type Walked = Option<Vec<Piece>>;

thread_local! {
    static RAM: Ram = Ram::from_ranges(&REGIONS.map(|(at, len)| (GuestAddress(at), len))).unwrap();
}

/// Guest memory that is all zeros.
pub fn empty_ram() -> Ram {
    let ram = RAM.with(Clone::clone);
    for (at, len) in REGIONS {
        ram.write_slice(&vec![0; len], GuestAddress(at)).unwrap();
    }
    ram
}

/// A copy of guest memory, by address; the hole is zeros.
#[derive(Clone, PartialEq, Eq)]
pub struct Memory(Vec<u8>);

impl Memory {
    pub fn of(ram: &Ram) -> Self {
        let mut bytes = vec![0; END as usize];
        for (at, len) in REGIONS {
            let to = &mut bytes[at as usize..at as usize + len];
            ram.read_slice(to, GuestAddress(at)).unwrap();
        }
        Memory(bytes)
    }

    /// Whether the `len` bytes at `at` are all memory.
    pub fn holds(at: u64, len: u64) -> bool {
        let Some(end) = at.checked_add(len) else {
            return false;
        };
        // The first two regions are one piece.
        end <= 0x8000 || at >= 0xc000 && end <= END
    }

    pub fn get(&self, at: u64, len: u64) -> &[u8] {
        assert!(Self::holds(at, len), "{at:#x} {len:#x}");
        &self.0[at as usize..(at + len) as usize]
    }

    pub fn set(&mut self, at: u64, bytes: &[u8]) {
        assert!(Self::holds(at, bytes.len() as u64), "{at:#x}");
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at, 4).try_into().unwrap())
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
    }

    /// Where the two differ first.
    pub fn difference(&self, other: &Memory) -> Option<usize> {
        if self == other {
            return None;
        }
        self.0.iter().zip(&other.0).position(|(a, b)| a != b)
    }

    /// Reads the chain that begins with descriptor `head` of `layout`'s table.
    pub fn walk(&self, layout: &QueueLayout, head: u16, takes_indirect: bool) -> Walked {
        let mut pieces = Vec::new();
        let mut table = (layout.descriptors, u64::from(layout.size));
        let (mut index, mut steps, mut is_indirect) = (u64::from(head), 0, false);
        loop {
            let (base, entries) = table;
            steps += 1;
            let at = base.checked_add(index * 16)?;
            if index >= entries || steps > entries || !Self::holds(at, 16) {
                return None;
            }
            let (addr, len) = (self.u64(at), self.u32(at + 8));
            let (flags, next) = (self.u16(at + 12), self.u16(at + 14));
            let is_last = flags & 1 == 0;
            if len == 0 || !Self::holds(addr, u64::from(len)) {
                return None;
            }
            if flags & 4 != 0 {
                if is_indirect || !takes_indirect || !is_last || !len.is_multiple_of(16) {
                    return None;
                }
                table = (addr, u64::from(len / 16));
                (index, steps, is_indirect) = (0, 0, true);
                continue;
            }
            let is_writable = flags & 2 != 0;
            if !is_writable && pieces.iter().any(|(_, _, writable)| *writable) {
                return None;
            }
            pieces.push((addr, len, is_writable));
            if pieces.len() > SEGMENTS_MAX {
                return None;
            }
            if is_last {
                return Some(pieces);
            }
            index = u64::from(next);
        }
    }
}

/// An address: in memory as a rule, at its edges often, anything sometimes.
pub fn address(input: &mut Input<'_>) -> u64 {
    match input.below(8) {
        0 => input.u64(),
        1 => input
            .one_of(&[0, 0x6000, 0x8000, 0xc000, END, 1 << 32, u64::MAX])
            .wrapping_sub(u64::from(input.u8())),
        2 => u64::from(input.u16()),
        // The pages that are used again and again.
        choice => 0x1000 * choice as u64 + u64::from(input.u8()) * 8,
    }
}

/// A length of a piece: small as a rule.
pub fn length(input: &mut Input<'_>) -> u32 {
    match input.below(4) {
        0 => u32::from(input.u16()),
        1 if input.flag() => input.u32(),
        1 => 512 * u32::from(input.u8()),
        2 => input.one_of(&[0, 1, 12, 16, 17, 32, 512, 513, 1024, 4096, u32::MAX]),
        _ => u32::from(input.u8()),
    }
}

/// Writes what fits of `bytes`, as a guest may at any time.
pub fn poke(ram: &Ram, at: u64, bytes: &[u8]) {
    let _ = ram.write_slice(bytes, GuestAddress(at));
}

/// Writes a descriptor.
pub fn describe(ram: &Ram, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    poke(ram, at, &bytes);
}
