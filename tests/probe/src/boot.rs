//! What the boot loader passed, by either protocol, read once.
//!
//! Everything here stays where the loader put it; this module only remembers where. It never
//! writes to it.

use core::cell::UnsafeCell;

use crate::x86;

/// hvm_start_info begins with this.
const PVH_MAGIC: u64 = 0x336e_c578;
/// Most regions of the memory map that are remembered.
pub const MAX_REGIONS: usize = 32;
/// Type of a region that is ordinary memory, in both protocols.
pub const RAM: u32 = 1;

/// Offsets in hvm_start_info.
mod pvh {
    pub const VERSION: u64 = 4;
    pub const MODULES: u64 = 12;
    pub const MODULE_LIST: u64 = 16;
    pub const COMMAND_LINE: u64 = 24;
    pub const RSDP: u64 = 32;
    pub const MEMORY_MAP: u64 = 40;
    pub const MEMORY_MAP_ENTRIES: u64 = 48;
    pub const REGION: u64 = 24;
}

/// Offsets in the zero page (boot_params).
mod linux {
    pub const RSDP: u64 = 0x70;
    pub const INITRD_HIGH: u64 = 0xc0;
    pub const INITRD_SIZE_HIGH: u64 = 0xc4;
    pub const COMMAND_LINE_HIGH: u64 = 0xc8;
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const HEADER_MAGIC: u64 = 0x202;
    pub const VERSION: u64 = 0x206;
    pub const INITRD: u64 = 0x218;
    pub const INITRD_SIZE: u64 = 0x21c;
    pub const COMMAND_LINE: u64 = 0x228;
    pub const SETUP_DATA: u64 = 0x250;
    pub const E820: u64 = 0x2d0;
    pub const REGION: u64 = 20;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    Pvh,
    Linux64,
}

#[derive(Clone, Copy)]
pub struct Region {
    pub start: u64,
    pub size: u64,
    pub kind: u32,
}

impl Region {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// What was passed.
pub struct Info {
    pub protocol: Protocol,
    /// Where hvm_start_info or boot_params lie.
    pub address: u64,
    /// The structure's own magic was right.
    pub magic_ok: bool,
    pub version: u32,
    pub command_line: &'static str,
    regions: [Region; MAX_REGIONS],
    region_count: usize,
    /// How many regions the map has; may be more than are remembered.
    pub regions_told: u64,
    /// PVH: number of modules, of which the first is the initrd.
    pub modules: u64,
    /// Address and size.
    pub initrd: Option<(u64, u64)>,
    pub rsdp: u64,
    /// Linux: head of the setup_data list.
    pub setup_data: u64,
}

impl Info {
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.region_count]
    }

    /// What follows `name` in the first word of the command line that starts with it.
    pub fn option(&self, name: &str) -> Option<&'static str> {
        self.options(name).next()
    }

    /// The same for every such word.
    pub fn options<'a>(&self, name: &'a str) -> impl Iterator<Item = &'static str> + use<'a> {
        self.command_line
            .split_ascii_whitespace()
            .filter_map(move |word| word.strip_prefix(name))
    }

    /// Where free memory that begins at `start` ends: at the end of its RAM region or the
    /// initrd, and below 4 GiB.
    pub fn end_of_free_ram(&self, start: u64) -> u64 {
        let region = self
            .regions()
            .iter()
            .find(|r| r.kind == RAM && r.start <= start && start < r.end());
        // No map: assume the smallest machine that is of any use.
        let end = region.map_or(32 << 20, |r| r.end().min(1 << 32));
        match self.initrd {
            Some((initrd, _)) if initrd >= start => end.min(initrd),
            _ => end,
        }
    }

    fn add(&mut self, start: u64, size: u64, kind: u32) {
        if let Some(slot) = self.regions.get_mut(self.region_count) {
            *slot = Region { start, size, kind };
            self.region_count += 1;
        }
    }
}

struct Cell(UnsafeCell<Info>);

// SAFETY: written once, by `read`, before anything else runs.
unsafe impl Sync for Cell {}

static INFO: Cell = Cell(UnsafeCell::new(Info {
    protocol: Protocol::Pvh,
    address: 0,
    magic_ok: false,
    version: 0,
    command_line: "",
    regions: [Region {
        start: 0,
        size: 0,
        kind: 0,
    }; MAX_REGIONS],
    region_count: 0,
    regions_told: 0,
    modules: 0,
    initrd: None,
    rsdp: 0,
    setup_data: 0,
}));

pub fn info() -> &'static Info {
    // SAFETY: see `Cell`.
    unsafe { &*INFO.0.get() }
}

/// Reads what the entry was given. Called once, first.
pub fn read(protocol: u32, address: u64) {
    // SAFETY: nothing has called `info` yet.
    let info = unsafe { &mut *INFO.0.get() };
    info.address = address;
    if protocol == 0 {
        read_pvh(info, address);
    } else {
        info.protocol = Protocol::Linux64;
        read_linux(info, address);
    }
}

fn read_pvh(info: &mut Info, at: u64) {
    info.magic_ok = x86::load(at, 4) == PVH_MAGIC;
    if !info.magic_ok {
        return;
    }
    info.version = x86::load(at + pvh::VERSION, 4) as u32;
    info.command_line = text_at(x86::load(at + pvh::COMMAND_LINE, 8));
    info.rsdp = x86::load(at + pvh::RSDP, 8);
    info.modules = x86::load(at + pvh::MODULES, 4);
    if info.modules > 0 {
        let module = x86::load(at + pvh::MODULE_LIST, 8);
        info.initrd = Some((x86::load(module, 8), x86::load(module + 8, 8)));
    }
    if info.version > 0 {
        let map = x86::load(at + pvh::MEMORY_MAP, 8);
        info.regions_told = x86::load(at + pvh::MEMORY_MAP_ENTRIES, 4);
        for i in 0..info.regions_told {
            let entry = map + i * pvh::REGION;
            let kind = x86::load(entry + 16, 4) as u32;
            info.add(x86::load(entry, 8), x86::load(entry + 8, 8), kind);
        }
    }
}

fn read_linux(info: &mut Info, at: u64) {
    info.magic_ok =
        x86::load(at + linux::HEADER_MAGIC, 4) == u64::from(u32::from_le_bytes(*b"HdrS"));
    info.version = x86::load(at + linux::VERSION, 2) as u32;
    let wide = |low, high| x86::load(at + low, 4) | x86::load(at + high, 4) << 32;
    info.command_line = text_at(wide(linux::COMMAND_LINE, linux::COMMAND_LINE_HIGH));
    info.rsdp = x86::load(at + linux::RSDP, 8);
    info.setup_data = x86::load(at + linux::SETUP_DATA, 8);
    let initrd = wide(linux::INITRD, linux::INITRD_HIGH);
    let size = wide(linux::INITRD_SIZE, linux::INITRD_SIZE_HIGH);
    info.initrd = (size > 0).then_some((initrd, size));
    info.regions_told = x86::load(at + linux::E820_ENTRIES, 1);
    for i in 0..info.regions_told {
        let entry = at + linux::E820 + i * linux::REGION;
        let kind = x86::load(entry + 16, 4) as u32;
        info.add(x86::load(entry, 8), x86::load(entry + 8, 8), kind);
    }
}

/// The zero-terminated text at an address; empty when it is not ASCII or UTF-8, or has no end.
fn text_at(address: u64) -> &'static str {
    const LIMIT: usize = 0x1_0000;
    if address == 0 {
        return "";
    }
    let mut length = 0;
    while length < LIMIT && x86::load(address + length as u64, 1) != 0 {
        length += 1;
    }
    // SAFETY: those bytes were just read, and the probe never writes to them.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, length) };
    core::str::from_utf8(bytes).unwrap_or("")
}
