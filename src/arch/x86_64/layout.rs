//! Where things are in the guest's physical address space, and why there.
//!
//! ```text
//!   0x0000_6000  boot page: GDT, PVH start info, memory map, random seed, command line
//!   0x0000_7000  zero page (boot_params), 64-bit protocol only
//!   0x0000_9000  page tables, 64-bit protocol only
//!   0x0009_fc00  MP table, up to 1 MiB reserved
//!   0x000e_0000  ACPI tables and the generation ID
//!   0x000e_1000  the ID of the snapshot that the memory is of
//!   0x0010_0000  kernel and, below the end of low RAM, initrd
//!   0xc000_0000  hole of 1 GiB: devices, I/O APIC, local APIC, KVM's own pages
//! 0x1_0000_0000  RAM continues
//! ```

pub use crate::memory::PAGE;
use crate::wire::limits;

/// Boot page: everything small that the guest needs once, in one page, so that making it
/// ready costs the host one page fault. Below 64 KiB, which Linux never allocates from.
pub const BOOT_PAGE: u64 = 0x6000;

/// Global descriptor table, five entries (see `gdt`).
pub const GDT: u64 = BOOT_PAGE;

/// PVH `hvm_start_info`, 56 bytes.
pub const PVH_START_INFO: u64 = BOOT_PAGE + 0x40;

/// PVH `hvm_modlist_entry`, 32 bytes: the initrd, when there is one.
pub const PVH_MODULES: u64 = BOOT_PAGE + 0x80;

/// PVH memory map, entries of 24 bytes, up to [`RNG_SEED`].
pub const PVH_MEMORY_MAP: u64 = BOOT_PAGE + 0xc0;

/// `setup_data` with a random seed (64-bit protocol): 16 bytes of header, 32 of seed.
pub const RNG_SEED: u64 = BOOT_PAGE + 0x400;

/// Kernel command line, closed by a zero byte.
pub const COMMAND_LINE: u64 = BOOT_PAGE + 0x800;

/// Room for the command line in bytes, the closing zero included. Linux's own
/// COMMAND_LINE_SIZE on x86 is 2048: what is longer it would cut off.
pub const COMMAND_LINE_MAX: usize = limits::COMMAND_LINE_MAX + 1;

/// `boot_params`, called the zero page (Linux boot protocol, "64-bit boot protocol").
pub const ZERO_PAGE: u64 = 0x7000;

/// Top of the stack the boot vCPU starts with: the page above the zero page, 16-byte aligned.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Page tables that map the kernel one to one: PML4, PDPT, then one page directory for each
/// of the first [`IDENTITY_GIB_MAX`] GiB.
pub const PAGE_TABLES: u64 = 0x9000;

/// How much is mapped at most, in GiB: RAM below the hole ends there.
pub const IDENTITY_GIB_MAX: u64 = 3;

/// MP table: the last KiB of base memory is one of the three places where it is looked for
/// (MultiProcessor Specification 1.4, section 4).
pub const MP_TABLE: u64 = 0x9_fc00;

/// Room for the MP table. 32 vCPUs take 924 bytes.
#[cfg(test)]
pub const MP_TABLE_MAX: usize = 0x400;

/// ACPI's root pointer, where it is looked for on BIOS machines: from here to 1 MiB, at multiples
/// of 16 (ACPI Specification 6.5, section 5.2.5.1).
pub const ACPI: u64 = 0xe_0000;

/// The generation ID: 16 bytes, in memory that no kernel takes for its own.
pub const GENERATION_ID: u64 = ACPI + 0x30;

/// The other ACPI tables.
pub const ACPI_TABLES: u64 = ACPI + 0x40;

/// Room for all of them. 32 vCPUs and 19 devices take some 2,400 bytes.
pub const ACPI_MAX: usize = 0x1000;

/// The ID of a snapshot in its image of guest memory, 16 bytes: the pair of state and memory is known by
/// it. Written into the image, never into the memory of a running guest; a restored guest has it in
/// memory that no kernel takes for its own. The page has nothing else, so that the ID can be written
/// into an image of a few pages without adding anything to it that is not so in the guest's memory.
pub const SNAPSHOT_ID: u64 = ACPI + ACPI_MAX as u64;
const _: () = assert!(SNAPSHOT_ID.is_multiple_of(PAGE) && SNAPSHOT_ID + PAGE <= HIGH_MEMORY);

/// From here on RAM is the kernel's: what is between [`MP_TABLE`] and here was video memory and
/// BIOS, and is reserved in the memory map.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Boot timer: the first page of the hole, as Firecracker's guests know it.
pub const BOOT_TIMER: u64 = 0xc000_0000;

/// The port that does the same as [`BOOT_TIMER`], for guests that have no page tables.
pub const BOOT_TIMER_PORT: u64 = 0x3f0;

/// First virtio-mmio register block; the next ones follow at [`VIRTIO_MMIO_SIZE`].
pub const VIRTIO_MMIO: u64 = 0xc000_1000;

/// Distance between virtio-mmio register blocks, and their length.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// First interrupt line for virtio devices: 0 to 4 are timer, keyboard, cascade and serial.
pub const VIRTIO_GSI: u32 = 5;

/// Interrupt lines of the I/O APIC: 0 to 23.
pub const GSI_COUNT: u32 = 24;

/// As many virtio devices as there are interrupt lines for them: 19.
pub const VIRTIO_DEVICES_MAX: usize = (GSI_COUNT - VIRTIO_GSI) as usize;
const _: () = assert!(VIRTIO_DEVICES_MAX == limits::DEVICES_MAX);

/// The I/O APIC, KVM's or ours: where every PC has its first one.
pub const IO_APIC: u32 = 0xfec0_0000;

/// The local APIC after reset (Intel SDM volume 3, section 11.4.1).
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that KVM takes for itself on Intel processors that cannot run real mode in a
/// guest. Right after KVM's default place for its identity-map page, and in the hole.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// 16550 UART, 8 ports.
pub const SERIAL_PORT: u64 = 0x3f8;

/// Interrupt line of the UART.
pub const SERIAL_GSI: u32 = 4;

/// Interrupt line by which a guest with ACPI is told that its generation ID has changed: 0 and 2 are the
/// timer's, and 3 was the second serial port's, which there is none of.
pub const GENERATION_GSI: u32 = 3;
const _: () = assert!(GENERATION_GSI < SERIAL_GSI && SERIAL_GSI < VIRTIO_GSI);

/// Keyboard controller: data at 0x60, status and command at 0x64. What is between is not its own.
pub const I8042_PORTS: [u64; 2] = [0x60, 0x64];

/// Interrupt line of the keyboard.
pub const I8042_GSI: u32 = 1;

/// The ports of [`cmos`](super::cmos).
pub const CMOS_PORT: u64 = 0x70;
/// How many there are.
pub const CMOS_PORTS: u64 = 2;

/// The ports of [`power`](super::power): clear of the ISA bus and of what KVM answers itself.
pub const POWER_PORT: u64 = 0x600;

/// How many they are.
pub const POWER_PORTS: u64 = 4;

/// The port for the guest's exit code. No driver that probes for a device of a PC writes here: sound
/// cards are looked for at 0x604, and what QEMU has at 0x600 and 0x604 ends a machine.
pub const EXIT_CODE_PORT: u64 = 0x610;

/// So many, of which the first one counts: a wide access begins there.
pub const EXIT_CODE_PORTS: u64 = 4;

/// Address and interrupt line of the virtio device number `index`, counted from 0;
/// `None` from number [`VIRTIO_DEVICES_MAX`] on.
pub fn virtio_device(index: usize) -> Option<(u64, u32)> {
    if index >= VIRTIO_DEVICES_MAX {
        return None;
    }
    let number = u32::try_from(index).ok()?;
    let address = u64::from(number)
        .checked_mul(VIRTIO_MMIO_SIZE)
        .and_then(|offset| VIRTIO_MMIO.checked_add(offset))?;
    Some((address, VIRTIO_GSI.checked_add(number)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtio_device_when_19_are_placed_the_20th_is_refused() {
        assert_eq!(virtio_device(0), Some((0xc000_1000, 5)));
        assert_eq!(virtio_device(18), Some((0xc001_3000, 23)));
        assert_eq!(virtio_device(19), None);
        assert_eq!(virtio_device(usize::MAX), None);
    }

    #[test]
    fn boot_page_when_full_ends_at_the_zero_page() {
        let room = PVH_MEMORY_MAP..RNG_SEED;
        assert!(room.contains(&(PVH_MEMORY_MAP + 24 * 8)));
        assert_eq!(COMMAND_LINE + COMMAND_LINE_MAX as u64, ZERO_PAGE);
        let tables = PAGE_TABLES + (2 + IDENTITY_GIB_MAX) * PAGE;
        assert!(tables <= MP_TABLE);
        assert!(MP_TABLE + MP_TABLE_MAX as u64 <= 0xa_0000);
    }
}
