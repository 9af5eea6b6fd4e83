//! Putting a guest together: kernel, initrd, command line, and the tables of a boot protocol.
//!
//! Done once by control, before any vCPU runs. Two protocols:
//! - PVH (Xen, `docs/misc/pvh.pandoc`): 32-bit entry, one structure; taken when the kernel has
//!   the ELF note for it;
//! - 64-bit Linux (Linux, `Documentation/arch/x86/boot.rst`, "64-bit boot protocol"): the zero
//!   page, page tables and a descriptor table.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(test)]
mod bzimage_tests;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

pub use super::acpi::GENERATION_ID_LEN;
pub use super::command_line::{Root, acpi_is_off, command_line};
use super::gdt::Segments;
use super::kernel::{Kernel, bzimage};
use super::{acpi, layout, mptable};
use crate::memory::{LOW_RAM_END_MAX, Memory, MemoryError, Source};

/// `hvm_start_info.magic`.
const PVH_MAGIC: u32 = 0x336e_c578;
/// The version of `hvm_start_info` that has a memory map.
const PVH_VERSION: u32 = 1;

/// `boot_params.hdr`: fixed values of the Linux boot protocol.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const PROTOCOL_VERSION: u16 = 0x020f;
const LOADER_UNKNOWN: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// `setup_data.type`: a seed for the kernel's random numbers.
const SETUP_RNG_SEED: u32 = 9;

/// Kinds of memory, the same in both protocols.
const KIND_RAM: u32 = 1;
const KIND_RESERVED: u32 = 2;

/// Page table entries: present and writable; and a page of 2 MiB (Intel SDM volume 3, 4.5).
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;
const LARGE_PAGE_SHIFT: u32 = 21;
const ENTRIES: u64 = 512;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// In 32-bit mode, with `hvm_start_info`.
    Pvh,
    /// In 64-bit mode, with `boot_params`.
    Linux64,
}

/// Where the boot vCPU begins, and in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Decides the state of the registers.
    pub protocol: Protocol,
    /// Guest address of the first instruction.
    pub rip: u64,
}

/// What the kernel is told of its machine.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// The whole command line.
    pub command_line: &'a str,
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// Address and interrupt line of each virtio device, in the order of slots.
    pub devices: &'a [(u64, u32)],
    /// For the kernel's random numbers, where the protocol has a place for it (64-bit Linux).
    pub seed: &'a [u8; 32],
    /// Which of all machines this is; clones get another.
    pub generation_id: [u8; GENERATION_ID_LEN],
}

/// Why a guest could not be put together.
#[derive(Debug)]
pub enum BootError {
    /// PVH was asked for.
    NoPvhEntry {
        /// The kernel.
        name: String,
    },
    /// The first instruction would not be the kernel's.
    Entry {
        /// The kernel.
        name: String,
        /// Where it would be entered.
        address: u64,
    },
    /// The kernel needs more memory than there is.
    KernelTooLarge {
        /// The kernel.
        name: String,
        /// First address after what it needs.
        end: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
    /// The kernel does not read as much.
    CommandLineTooLong {
        /// The kernel.
        name: String,
        /// Length of the command line in bytes.
        len: u64,
        /// What the kernel's header gives as the most.
        max: u64,
    },
    /// The initrd has no bytes.
    InitrdEmpty {
        /// The initrd.
        name: String,
    },
    /// The initrd does not fit beside the kernel.
    InitrdTooLarge {
        /// The initrd.
        name: String,
        /// Its size in bytes.
        len: u64,
        /// Bytes there are for it.
        room: u64,
        /// How much memory would do, in bytes, if more memory helps.
        needed: Option<u64>,
    },
    /// The initrd could not be opened again.
    Initrd {
        /// The initrd.
        name: String,
        /// The host's reason.
        cause: io::Error,
    },
    /// A mapped file is no longer what it was.
    Changed {
        /// The file.
        name: String,
    },
    /// More vCPUs than the MP table has room for, or none.
    Vcpus(u8),
    /// Something did not get into guest memory.
    Memory(MemoryError),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BootError::NoPvhEntry { name } => write!(f, "kernel {name} has no PVH entry"),
            BootError::Entry { name, address } => write!(
                f,
                "kernel {name} has its entry at {address:#x}, outside of its segments"
            ),
            BootError::KernelTooLarge { name, end, ram_end } => {
                write!(
                    f,
                    "kernel {name} is too large: it ends at {end} bytes, and guest memory for \
                     kernels, below the hole at 3 GiB, at {ram_end}"
                )?;
                match *end <= LOW_RAM_END_MAX {
                    true => write!(
                        f,
                        "; it needs at least {} MiB of guest memory",
                        end.div_ceil(1 << 20)
                    ),
                    false => Ok(()),
                }
            }
            BootError::CommandLineTooLong { name, len, max } => write!(
                f,
                "kernel {name} reads command lines of at most {max} bytes, and this one has {len}"
            ),
            BootError::InitrdEmpty { name } => write!(f, "initrd {name} is empty"),
            BootError::InitrdTooLarge {
                name,
                len,
                room,
                needed,
            } => {
                write!(
                    f,
                    "initrd {name} does not fit: it has {len} bytes and there is room for {room}"
                )?;
                match needed {
                    Some(needed) => write!(
                        f,
                        "; with this kernel it needs at least {} MiB of guest memory",
                        needed.div_ceil(1 << 20)
                    ),
                    None => Ok(()),
                }
            }
            BootError::Initrd { name, .. } => write!(f, "initrd {name} cannot be opened"),
            BootError::Changed { name } => {
                write!(f, "{name} was changed while the guest was being made")
            }
            BootError::Vcpus(count) => write!(f, "{count} vCPUs: it must be 1 to 32"),
            BootError::Memory(_) => write!(f, "the guest could not be loaded"),
        }
    }
}

impl Error for BootError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            BootError::Initrd { cause, .. } => Some(cause),
            BootError::Memory(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<MemoryError> for BootError {
    fn from(cause: MemoryError) -> Self {
        BootError::Memory(cause)
    }
}

/// Puts kernel, initrd (a file and what errors call it) and tables into `memory`, which must not
/// have been used yet.
///
/// Without `protocol` the kernel decides: PVH if it has the note. Which of the tables it reads, those
/// of ACPI or the MP table, it decides too.
///
/// # Errors
/// [`BootError`] when something does not fit or cannot be read.
pub fn load(
    memory: &mut Memory,
    kernel: &Kernel,
    initrd: Option<(&File, &str)>,
    protocol: Option<Protocol>,
    told: &Told<'_>,
) -> Result<Entry, BootError> {
    let entry = choose_entry(kernel, protocol)?;
    let max = kernel.bzimage.as_ref().map(|image| image.command_line_max);
    let len = told.command_line.len() as u64;
    if let Some(max) = max.filter(|max| len > *max) {
        let name = kernel.source.name().to_owned();
        return Err(BootError::CommandLineTooLong { name, len, max });
    }
    place_kernel(memory, kernel)?;
    let initrd = match initrd {
        Some((file, name)) => Some(place_initrd(memory, kernel, file, name)?),
        None => None,
    };
    let mp_table = mptable::table(told.vcpus).ok_or(BootError::Vcpus(told.vcpus))?;
    memory.write(layout::MP_TABLE, &mp_table)?;
    let tables = acpi::tables(told.vcpus, told.devices, told.generation_id);
    memory.write(layout::ACPI, &tables)?;
    let mut line = told.command_line.as_bytes().to_vec();
    line.push(0);
    memory.write(layout::COMMAND_LINE, &line)?;
    let segments = Segments::flat(entry.protocol == Protocol::Linux64);
    memory.write(layout::GDT, &segments.table())?;
    match entry.protocol {
        Protocol::Pvh => write_start_info(memory, initrd)?,
        Protocol::Linux64 => {
            write_boot_params(memory, kernel, initrd, line.len(), told.seed)?;
            write_page_tables(memory, kernel.end())?;
        }
    }
    let changed = if kernel.source.is_unchanged() {
        memory.changed_file()
    } else {
        Some(kernel.source.name())
    };
    match changed {
        Some(name) => Err(BootError::Changed {
            name: name.to_owned(),
        }),
        None => Ok(entry),
    }
}

fn choose_entry(kernel: &Kernel, protocol: Option<Protocol>) -> Result<Entry, BootError> {
    let name = || kernel.source.name().to_owned();
    let (protocol, rip) = match (protocol, kernel.pvh_entry) {
        (None | Some(Protocol::Pvh), Some(entry)) => (Protocol::Pvh, entry),
        (Some(Protocol::Pvh), None) => return Err(BootError::NoPvhEntry { name: name() }),
        (None | Some(Protocol::Linux64), _) => (Protocol::Linux64, kernel.entry),
    };
    if !kernel.contains(rip) {
        return Err(BootError::Entry {
            name: name(),
            address: rip,
        });
    }
    Ok(Entry { protocol, rip })
}

fn place_kernel(memory: &mut Memory, kernel: &Kernel) -> Result<(), BootError> {
    let (end, ram_end) = (kernel.end(), memory.low_end());
    if end > ram_end {
        return Err(BootError::KernelTooLarge {
            name: kernel.source.name().to_owned(),
            end,
            ram_end,
        });
    }
    // What a segment has beyond its file part is zero, as fresh memory is.
    for segment in kernel.segments.iter().filter(|s| s.file_len > 0) {
        memory.map_file(
            &kernel.source,
            segment.offset,
            segment.address,
            segment.file_len,
        )?;
    }
    Ok(())
}

/// Puts the initrd as high as it goes in low RAM, out of the way of a kernel that grows; below a
/// kernel where there is no room above. Gives its address and length.
fn place_initrd(
    memory: &mut Memory,
    kernel: &Kernel,
    file: &File,
    name: &str,
) -> Result<(u64, u64), BootError> {
    let source = Source::new(file, name).map_err(|cause| BootError::Initrd {
        name: name.to_owned(),
        cause,
    })?;
    let len = source.len();
    if len == 0 {
        return Err(BootError::InitrdEmpty {
            name: name.to_owned(),
        });
    }
    let pages = len.checked_next_multiple_of(layout::PAGE);
    let image = kernel.bzimage.as_ref();
    let limit = image.map_or(LOW_RAM_END_MAX, |image| {
        image.initrd_limit & !(layout::PAGE - 1)
    });
    let place = initrd_places(kernel, memory.low_end().min(limit));
    let fitting = |(first, end): &(u64, u64)| {
        let at = end.checked_sub(pages?)?;
        (at >= *first).then_some(at)
    };
    let Some(address) = place.iter().find_map(fitting) else {
        let room = place.iter().map(|(first, end)| end.saturating_sub(*first));
        // After the kernel, if the memory goes on there.
        let (above, _) = place[0];
        return Err(BootError::InitrdTooLarge {
            name: name.to_owned(),
            len,
            room: room.max().unwrap_or(0),
            needed: pages
                .and_then(|pages| above.checked_add(pages))
                .filter(|end| *end <= limit.min(LOW_RAM_END_MAX)),
        });
    };
    memory.map_file(&source, 0, address, len)?;
    Ok((address, len))
}

/// The ranges for an initrd that ends at `end` at most, the better one first: whole pages that the
/// kernel does not need. A range may be empty, or end before it begins.
fn initrd_places(kernel: &Kernel, end: u64) -> [(u64, u64); 2] {
    let mask = !(layout::PAGE - 1);
    let after = kernel.end().checked_next_multiple_of(layout::PAGE);
    let before = kernel.segments.iter().map(|segment| segment.address).min();
    [
        (after.unwrap_or(u64::MAX), end),
        (layout::HIGH_MEMORY, before.unwrap_or(0).min(end) & mask),
    ]
}

/// The memory map of both protocols: address, length, kind.
fn memory_map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::MP_TABLE, KIND_RAM),
        (
            layout::MP_TABLE,
            layout::HIGH_MEMORY.saturating_sub(layout::MP_TABLE),
            KIND_RESERVED,
        ),
    ];
    for (first, len) in memory.regions() {
        let skip = layout::HIGH_MEMORY.saturating_sub(first).min(len);
        if skip < len {
            map.push((
                first.saturating_add(skip),
                len.saturating_sub(skip),
                KIND_RAM,
            ));
        }
    }
    map
}

/// Xen, `public/arch-x86/hvm/start_info.h`.
fn write_start_info(memory: &Memory, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..hvm_start_info::default()
    };
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..hvm_modlist_entry::default()
        };
        memory.write(layout::PVH_MODULES, module.as_slice())?;
        info.modlist_paddr = layout::PVH_MODULES;
        info.nr_modules = 1;
    }
    let map: Vec<u8> = map.iter().flat_map(|e| e.as_slice()).copied().collect();
    memory.write(layout::PVH_MEMORY_MAP, &map)?;
    memory.write(layout::PVH_START_INFO, info.as_slice())?;
    Ok(())
}

/// Linux, `Documentation/arch/x86/zero-page.rst`.
fn write_boot_params(
    memory: &Memory,
    kernel: &Kernel,
    initrd: Option<(u64, u64)>,
    line_len: usize,
    seed: &[u8; 32],
) -> Result<(), BootError> {
    // Everything lies below 4 GiB, by layout and by where an initrd is placed.
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut params = boot_params {
        acpi_rsdp_addr: layout::ACPI,
        ..boot_params::default()
    };
    match &kernel.bzimage {
        // Its own header, of which the loader fills in some fields.
        Some(image) => {
            let place = params.as_mut_slice().get_mut(bzimage::HEADER_AT..);
            for (to, from) in place.unwrap_or_default().iter_mut().zip(&image.header) {
                *to = *from;
            }
            params.hdr.code32_start = low(kernel.segments.first().map_or(0, |s| s.address));
        }
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = HEADER_MAGIC;
            params.hdr.version = PROTOCOL_VERSION;
            params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
            params.hdr.cmdline_size = u32::try_from(line_len).unwrap_or(0);
        }
    }
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
    params.hdr.ramdisk_image = 0;
    params.hdr.ramdisk_size = 0;
    if let Some((address, len)) = initrd {
        params.hdr.ramdisk_image = low(address);
        params.hdr.ramdisk_size = low(len);
    }

    let mut data = Vec::with_capacity(16 + 32);
    data.extend_from_slice(&0u64.to_le_bytes());
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&32u32.to_le_bytes());
    data.extend_from_slice(seed);
    memory.write(layout::RNG_SEED, &data)?;
    params.hdr.setup_data = layout::RNG_SEED;

    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    let mut table = params.e820_table;
    for (slot, (addr, size, kind)) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
    params.e820_table = table;
    memory.write(layout::ZERO_PAGE, params.as_slice())?;
    Ok(())
}

/// Maps the first GiBs one to one in pages of 2 MiB, as many as hold the kernel: the protocol
/// asks for kernel, zero page and command line.
fn write_page_tables(memory: &Memory, kernel_end: u64) -> Result<(), BootError> {
    let gibs = kernel_end
        .div_ceil(1 << 30)
        .clamp(1, layout::IDENTITY_GIB_MAX);
    // Table number n after the PML4; checked by a test to stay below the MP table.
    let table = |n: u64| layout::PAGE_TABLES.saturating_add(n.saturating_mul(layout::PAGE));

    let mut bytes = Vec::new();
    let page = layout::PAGE as usize;
    bytes.extend_from_slice(&(table(1) | PRESENT_WRITABLE).to_le_bytes());
    bytes.resize(page, 0);
    for gib in 0..gibs {
        let directory = table(gib.saturating_add(2)) | PRESENT_WRITABLE;
        bytes.extend_from_slice(&directory.to_le_bytes());
    }
    bytes.resize(page.saturating_mul(2), 0);
    for large_page in 0..gibs.saturating_mul(ENTRIES) {
        let address = large_page << LARGE_PAGE_SHIFT;
        bytes.extend_from_slice(&(address | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes());
    }
    memory.write(layout::PAGE_TABLES, &bytes)?;
    Ok(())
}
