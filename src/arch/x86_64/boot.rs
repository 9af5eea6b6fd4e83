//! Putting a guest together: kernel, initrd, command line, and the tables of a boot protocol.
//!
//! Done once by control, before any vCPU runs. Two protocols:
//! - PVH (Xen, `docs/misc/pvh.pandoc`): 32-bit entry, one structure; taken when the kernel has
//!   the ELF note for it;
//! - 64-bit Linux (Linux, `Documentation/arch/x86/boot.rst`, "64-bit boot protocol"): the zero
//!   page, page tables and a descriptor table.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::gdt::Segments;
use super::kernel::Kernel;
use super::{layout, mptable};
use crate::memory::{Memory, MemoryError, Source};

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

/// What the kernel is to mount as `/`.
#[derive(Clone, Copy, Debug)]
pub struct Root<'a> {
    /// The partition; without one the whole first disk.
    pub partuuid: Option<&'a str>,
    /// Mount it read-only.
    pub read_only: bool,
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
        /// First address after it.
        end: u64,
        /// Where RAM ends.
        ram_end: u64,
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
            BootError::KernelTooLarge { name, end, ram_end } => write!(
                f,
                "kernel {name} is too large: it ends at {end} bytes, and guest memory for kernels, \
                 below the hole at 3 GiB, at {ram_end}"
            ),
            BootError::InitrdEmpty { name } => write!(f, "initrd {name} is empty"),
            BootError::InitrdTooLarge { name, len, room } => write!(
                f,
                "initrd {name} does not fit: it has {len} bytes and there is room for {room}"
            ),
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

/// The command line would be longer than the kernel reads, or cannot be written down.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandLineError {
    /// No room.
    TooLong {
        /// What did not fit.
        word: String,
        /// Bytes that were left for it.
        room: usize,
    },
    /// A zero byte would end it early.
    ZeroByte,
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandLineError::TooLong { word, room } => {
                let len = word.len();
                write!(f, "the kernel command line is too long: ")?;
                if len <= 80 {
                    write!(f, "`{word}` takes {len} bytes and {room} are left")
                } else {
                    write!(f, "{len} bytes do not fit where {room} are left")
                }
            }
            CommandLineError::ZeroByte => write!(f, "the kernel command line has a zero byte"),
        }
    }
}

impl Error for CommandLineError {}

/// The command line: `boot_args` as given, then what mayfly adds, before any ` -- ` that begins
/// the arguments of init. `devices` are address and interrupt line of each virtio device.
///
/// # Errors
/// [`CommandLineError`] when that is longer than [`layout::COMMAND_LINE_MAX`] with its closing
/// zero, or has a zero byte.
pub fn command_line(
    boot_args: &str,
    root: Option<Root<'_>>,
    devices: &[(u64, u32)],
) -> Result<String, CommandLineError> {
    if boot_args.contains('\0') || root.is_some_and(|r| r.partuuid.unwrap_or("").contains('\0')) {
        return Err(CommandLineError::ZeroByte);
    }
    let (mut line, init_args) = split_init_args(boot_args);
    let init_args = match init_args {
        "" => String::new(),
        args => format!(" -- {args}"),
    };
    let mut words = vec!["pci=off".to_owned()];
    if let Some(root) = root {
        words.push(match root.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None => "root=/dev/vda".to_owned(),
        });
        words.push(if root.read_only { "ro" } else { "rw" }.to_owned());
    }
    for (address, irq) in devices {
        words.push(format!("virtio_mmio.device=4K@{address:#x}:{irq}"));
    }

    let capacity = layout::COMMAND_LINE_MAX.saturating_sub(1);
    let room = |line: &String| {
        capacity
            .checked_sub(line.len())
            .and_then(|left| left.checked_sub(init_args.len()))
    };
    if room(&line).is_none() {
        return Err(CommandLineError::TooLong {
            word: boot_args.to_owned(),
            room: capacity,
        });
    }
    for word in words {
        let left = room(&line).unwrap_or(0);
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
        if room(&line).is_none() {
            return Err(CommandLineError::TooLong {
                word,
                room: left.saturating_sub(1),
            });
        }
    }
    line.push_str(&init_args);
    Ok(line)
}

/// What is before and after the first ` -- ` that is not inside double quotes.
fn split_init_args(boot_args: &str) -> (String, &str) {
    const SEPARATOR: &str = " -- ";
    let mut quotes = 0usize;
    let mut seen = 0usize;
    for (at, _) in boot_args.match_indices(SEPARATOR) {
        let since = boot_args.get(seen..at).unwrap_or("");
        quotes = quotes.saturating_add(since.matches('"').count());
        seen = at;
        if quotes.is_multiple_of(2) {
            let (line, rest) = boot_args.split_at(at);
            let rest = rest.strip_prefix(SEPARATOR).unwrap_or("");
            return (line.trim().to_owned(), rest.trim());
        }
    }
    (boot_args.trim().to_owned(), "")
}

/// Puts kernel, initrd (a file and what errors call it) and tables into `memory`, which must not
/// have been used yet.
///
/// Without `protocol` the kernel decides: PVH if it has the note. `seed` goes to the kernel's
/// random numbers where the protocol has a place for it (64-bit Linux).
///
/// # Errors
/// [`BootError`] when something does not fit or cannot be read.
pub fn load(
    memory: &mut Memory,
    kernel: &Kernel,
    initrd: Option<(&File, &str)>,
    command_line: &str,
    vcpus: u8,
    protocol: Option<Protocol>,
    seed: &[u8; 32],
) -> Result<Entry, BootError> {
    let entry = choose_entry(kernel, protocol)?;
    place_kernel(memory, kernel)?;
    let initrd = match initrd {
        Some((file, name)) => Some(place_initrd(memory, kernel.end(), file, name)?),
        None => None,
    };
    let mp_table = mptable::table(vcpus).ok_or(BootError::Vcpus(vcpus))?;
    memory.write(layout::MP_TABLE, &mp_table)?;
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory.write(layout::COMMAND_LINE, &line)?;
    let segments = Segments::flat(entry.protocol == Protocol::Linux64);
    memory.write(layout::GDT, &segments.table())?;
    match entry.protocol {
        Protocol::Pvh => write_start_info(memory, initrd)?,
        Protocol::Linux64 => {
            write_boot_params(memory, initrd, line.len(), seed)?;
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

/// Puts the initrd as high as it goes in low RAM, out of the way of a kernel that grows. Gives
/// its address and length.
fn place_initrd(
    memory: &mut Memory,
    kernel_end: u64,
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
    let too_large = |room| BootError::InitrdTooLarge {
        name: name.to_owned(),
        len,
        room,
    };
    let room = kernel_end
        .checked_next_multiple_of(layout::PAGE)
        .and_then(|first| memory.low_end().checked_sub(first))
        .unwrap_or(0);
    let pages = len.checked_next_multiple_of(layout::PAGE);
    let Some(pages) = pages.filter(|pages| *pages <= room) else {
        return Err(too_large(room));
    };
    let address = memory.low_end().saturating_sub(pages);
    memory.map_file(&source, 0, address, len)?;
    Ok((address, len))
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
    initrd: Option<(u64, u64)>,
    line_len: usize,
    seed: &[u8; 32],
) -> Result<(), BootError> {
    // Everything lies below 4 GiB, by layout and by where an initrd is placed.
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
    params.hdr.cmdline_size = u32::try_from(line_len).unwrap_or(0);
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

#[cfg(test)]
mod tests {
    use super::super::kernel::tests::{elf, read_bytes};
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    const SEED: [u8; 32] = [7; 32];

    fn read<T: ByteValued>(memory: &Memory, address: u64) -> T {
        memory.ram().read_obj(GuestAddress(address)).unwrap()
    }

    fn text(memory: &Memory, address: u64) -> String {
        let bytes = (address..)
            .map(|a| read::<u8>(memory, a))
            .take_while(|b| *b != 0)
            .collect();
        String::from_utf8(bytes).unwrap()
    }

    fn file(bytes: &[u8]) -> TempFile {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        file
    }

    fn load_one(
        memory: &mut Memory,
        kernel: &Kernel,
        protocol: Option<Protocol>,
    ) -> Result<Entry, BootError> {
        load(memory, kernel, None, "console=ttyS0", 1, protocol, &SEED)
    }

    fn kernel(len: usize, pvh: bool) -> Kernel {
        let entry = 0x10_0010u32.to_le_bytes();
        let code: Vec<u8> = (0..len).map(|i| (i / 11) as u8).collect();
        read_bytes(&elf(&code, 0x10_0000, pvh.then_some(&entry[..]))).unwrap()
    }

    #[test]
    fn load_when_kernel_has_the_note_writes_start_info() {
        let mut memory = Memory::anonymous(16).unwrap();
        let initrd = file(&[0x5a; 100_000]);
        let kernel = kernel(200_000, true);
        let parts = Some((initrd.as_file(), "initrd"));
        let entry = load(&mut memory, &kernel, parts, "quiet", 4, None, &SEED).unwrap();
        assert_eq!(
            entry,
            Entry {
                protocol: Protocol::Pvh,
                rip: 0x10_0010
            }
        );
        let info: hvm_start_info = read(&memory, layout::PVH_START_INFO);
        assert_eq!(
            (info.magic, info.version, info.nr_modules),
            (0x336e_c578, 1, 1)
        );
        assert_eq!(text(&memory, info.cmdline_paddr), "quiet");
        let module: hvm_modlist_entry = read(&memory, info.modlist_paddr);
        assert_eq!((module.paddr, module.size), ((16 << 20) - 102_400, 100_000));
        let bytes: [u8; 32] = read(&memory, module.paddr + 99_968);
        assert_eq!(bytes, [0x5a; 32]);
        let map: Vec<_> = (0..u64::from(info.memmap_entries))
            .map(|n| read::<hvm_memmap_table_entry>(&memory, info.memmap_paddr + 24 * n))
            .map(|e| (e.addr, e.size, e.type_))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (1 << 20, 15 << 20, 1)
            ]
        );
        assert_eq!(read::<[u8; 4]>(&memory, layout::MP_TABLE), *b"_MP_");
        assert_eq!(
            read::<u8>(&memory, 0x10_0000 + 199_999),
            (199_999 / 11) as u8
        );
        assert_eq!(memory.changed_file(), None);
    }

    #[test]
    fn load_when_there_is_no_note_writes_boot_params_and_page_tables() {
        let mut memory = Memory::anonymous(4096).unwrap();
        let entry = load_one(&mut memory, &kernel(5000, false), None).unwrap();
        assert_eq!(
            entry,
            Entry {
                protocol: Protocol::Linux64,
                rip: 0x10_0000
            }
        );
        let params: boot_params = read(&memory, layout::ZERO_PAGE);
        let hdr = params.hdr;
        assert_eq!({ hdr.header }, 0x5372_6448);
        assert_eq!({ hdr.ramdisk_size }, 0);
        assert_eq!(text(&memory, u64::from(hdr.cmd_line_ptr)), "console=ttyS0");
        assert_eq!(read::<u64>(&memory, hdr.setup_data), 0);
        assert_eq!(read::<[u32; 2]>(&memory, hdr.setup_data + 8), [9, 32]);
        assert_eq!(read::<[u8; 32]>(&memory, hdr.setup_data + 16), SEED);
        let table = params.e820_table;
        let map: Vec<_> = table[..usize::from(params.e820_entries)]
            .iter()
            .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (1 << 20, 0xbff0_0000, 1),
                (1 << 32, 1 << 30, 1)
            ]
        );
        // Walk the tables for a few addresses.
        for address in [0u64, layout::ZERO_PAGE, 0x10_0000, 0x3fff_ffff] {
            let mut table = layout::PAGE_TABLES;
            for shift in [39, 30] {
                let entry: u64 = read(&memory, table + ((address >> shift) & 511) * 8);
                assert_eq!(entry & 0xfff, 3);
                table = entry & !0xfff;
            }
            let entry: u64 = read(&memory, table + ((address >> 21) & 511) * 8);
            assert_eq!(entry, (address & !0x1f_ffff) | 0x83);
        }
    }

    #[test]
    fn load_when_protocol_is_given_follows_it() {
        let kernel = kernel(5000, true);
        let mut memory = Memory::anonymous(4).unwrap();
        let entry = load_one(&mut memory, &kernel, Some(Protocol::Linux64)).unwrap();
        assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, 0x10_0000));

        let kernel = self::kernel(5000, false);
        let mut memory = Memory::anonymous(4).unwrap();
        let error = load_one(&mut memory, &kernel, Some(Protocol::Pvh)).unwrap_err();
        assert_eq!(error.to_string(), "kernel vmlinux has no PVH entry");
    }

    #[test]
    fn load_when_something_does_not_fit_says_the_sizes() {
        let mut memory = Memory::anonymous(1).unwrap();
        let error = load_one(&mut memory, &kernel(5000, true), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel vmlinux is too large: it ends at 1053576 bytes, and guest memory for kernels, \
             below the hole at 3 GiB, at 1048576"
        );

        let mut memory = Memory::anonymous(2).unwrap();
        let kernel = kernel(5000, true);
        let mut load_initrd = |bytes: &[u8]| {
            let file = file(bytes);
            let parts = Some((file.as_file(), "initrd"));
            load(&mut memory, &kernel, parts, "", 1, None, &SEED).map(|_| ())
        };
        let room = (1 << 20) - 8192;
        assert_eq!(
            load_initrd(&vec![1; room + 1]).unwrap_err().to_string(),
            "initrd initrd does not fit: it has 1040385 bytes and there is room for 1040384"
        );
        load_initrd(&vec![1; room]).unwrap();
        assert_eq!(
            load_initrd(&[]).unwrap_err().to_string(),
            "initrd initrd is empty"
        );
    }

    #[test]
    fn load_when_entry_is_elsewhere_is_refused() {
        let entry = 0x20_0000u32.to_le_bytes();
        let kernel = read_bytes(&elf(&[0x90; 64], 0x10_0000, Some(&entry))).unwrap();
        let mut memory = Memory::anonymous(4).unwrap();
        let error = load_one(&mut memory, &kernel, None).unwrap_err();
        assert!(error.to_string().contains("entry at 0x200000, outside"));
    }

    #[test]
    fn load_when_a_file_was_changed_since_it_was_read_is_refused() {
        let file = file(&elf(&[0x90; 200_000], 0x10_0000, None));
        let kernel = Kernel::read(file.as_file(), "vmlinux").unwrap();
        file.as_file().set_len(250_000).unwrap();
        let mut memory = Memory::anonymous(4).unwrap();
        let error = load_one(&mut memory, &kernel, None).unwrap_err();
        assert!(error.to_string().starts_with("vmlinux was changed"));
    }

    #[test]
    fn command_line_when_devices_are_added_goes_before_init_args() {
        let root = |partuuid, read_only| {
            Some(Root {
                partuuid,
                read_only,
            })
        };
        let devices = [(0xc000_1000, 5), (0xc000_2000, 6)];
        for (args, root, devices, expected) in [
            ("", None, &[][..], "pci=off"),
            (" a=b  ", None, &[], "a=b pci=off"),
            (
                "quiet",
                root(None, false),
                &devices,
                "quiet pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 \
                 virtio_mmio.device=4K@0xc0002000:6",
            ),
            (
                "quiet -- single  -- x",
                root(Some("0eaa91a0-01"), true),
                &[],
                "quiet pci=off root=PARTUUID=0eaa91a0-01 ro -- single  -- x",
            ),
            ("a=\" -- \" b", None, &[], "a=\" -- \" b pci=off"),
            (
                "a=\" -- \" -- init",
                None,
                &[],
                "a=\" -- \" pci=off -- init",
            ),
            (" -- init", None, &[], "pci=off -- init"),
            ("a --", None, &[], "a -- pci=off"),
        ] {
            assert_eq!(command_line(args, root, devices).unwrap(), expected);
        }
    }

    #[test]
    fn command_line_when_it_is_full_says_the_room_left() {
        let fits = 2047 - " pci=off".len();
        let line = command_line(&"x".repeat(fits), None, &[]).unwrap();
        assert_eq!(line.len(), 2047);
        let error = command_line(&"x".repeat(fits + 1), None, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: `pci=off` takes 7 bytes and 6 are left"
        );
        let devices = [(0xc000_1000, 5)];
        let error = command_line(&"x".repeat(2030), None, &devices).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: `virtio_mmio.device=4K@0xc0001000:5` takes 34 \
             bytes and 8 are left"
        );
        let error = command_line(&"x".repeat(3000), None, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: 3000 bytes do not fit where 2047 are left"
        );
        assert_eq!(
            command_line("a\0b", None, &[]),
            Err(CommandLineError::ZeroByte)
        );
    }
}
