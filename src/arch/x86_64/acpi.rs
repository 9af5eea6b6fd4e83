//! ACPI tables: how a kernel learns of processors, interrupt controllers and devices, and how it
//! switches the machine off (ACPI Specification 6.5).
//!
//! Hardware-reduced ACPI (section 4.1): no interrupt of its own (SCI), no timer, no fixed registers but
//! those of [`power`]. Plain functions from a description of the machine to bytes; control's
//! files thread calls them once, before any vCPU runs.
//!
//! ```text
//! layout::ACPI       RSDP: where a kernel that is not told otherwise looks for it
//!   + 0x30           the generation ID, 16 bytes that a restored clone finds changed
//!   + 0x40           XSDT -> FADT -> DSDT, and MADT
//! ```
//!
//! What Linux needs of each is in `docs/guest-kernel.md`. The namespace is kept small: a kernel interprets
//! it at every boot.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod detect;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{layout, power};

/// Who made the tables, and their version (section 5.2.6).
const OEM: [u8; 6] = *b"MAYFLY";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// Length of the header that every table but the RSDP begins with.
const HEADER: u32 = 36;
/// The version of the DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;

/// Where tables begin.
const ALIGNMENT: u64 = 16;

/// `FADT.IAPC_BOOT_ARCH` (table 5.11): there is a keyboard controller; there is no VGA and no
/// real-time clock, and no interrupts by message (there is no PCI).
const BOOT_8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_MSI: u16 = 1 << 3;
const BOOT_NO_RTC: u16 = 1 << 5;

/// The I/O APIC's ID, which is 0 after its reset.
const IO_APIC_ID: u8 = 0;

/// Length of a generation ID in bytes.
pub const GENERATION_ID_LEN: usize = 16;

/// What a guest is notified of: the ID has changed (Microsoft, "Virtual Machine Generation ID").
const GENERATION_CHANGED: u8 = 0x80;

/// All tables, to be put at [`layout::ACPI`], for `vcpus` processors with the APIC IDs 0, 1, ...,
/// and for virtio `devices`, each by its address and interrupt line, in the order of slots.
pub fn tables(
    vcpus: u8,
    devices: &[(u64, u32)],
    generation_id: [u8; GENERATION_ID_LEN],
) -> Vec<u8> {
    let madt = madt(vcpus);
    let dsdt = dsdt(devices);
    // The XSDT has two entries, and so a known length.
    let xsdt_at = layout::ACPI_TABLES;
    let fadt_at = after(xsdt_at, (HEADER as usize).saturating_add(16));
    let madt_at = after(fadt_at, FADT::len());
    let dsdt_at = after(madt_at, madt.len());

    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);

    let mut block = Vec::with_capacity(0x1000);
    for (address, table) in [
        (layout::ACPI, bytes(&Rsdp::new(OEM, xsdt_at))),
        (layout::GENERATION_ID, generation_id.to_vec()),
        (xsdt_at, bytes(&xsdt)),
        (fadt_at, fadt(dsdt_at)),
        (madt_at, madt),
        (dsdt_at, dsdt),
    ] {
        let offset = address.saturating_sub(layout::ACPI);
        block.resize(usize::try_from(offset).unwrap_or(0), 0);
        block.extend_from_slice(&table);
    }
    block
}

/// Where what follows `len` bytes at `address` begins.
fn after(address: u64, len: usize) -> u64 {
    let end = address.saturating_add(len as u64);
    end.next_multiple_of(ALIGNMENT)
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed ACPI Description Table (section 5.2.9): the registers that end the machine, and where the
/// DSDT is.
fn fadt(dsdt_at: u64) -> Vec<u8> {
    let port = |offset: u64| {
        let address = layout::POWER_PORT.saturating_add(offset);
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt_at)
        // No fixed hardware: SCI, PM timer, event and control blocks are absent.
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Required of every machine that follows the specification.
        .flag(Flags::Wbinvd)
        // Set means: no such button among the fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_8042 | BOOT_NO_VGA | BOOT_NO_MSI | BOOT_NO_RTC).into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

/// Multiple APIC Description Table (section 5.2.12). It has no overrides: interrupt lines are the inputs
/// of the I/O APIC of the same number, and each device in the DSDT says how its own is triggered. Its
/// flags are 0: kernels that follow it do without the 8259.
fn madt(vcpus: u8) -> Vec<u8> {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local_apic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, layout::IO_APIC, 0));
    bytes(&madt)
}

/// Differentiated System Description Table (section 5.2.11.1): the devices, and the one sleep state.
fn dsdt(devices: &[(u64, u32)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (number, (address, gsi)) in (0u8..).zip(devices) {
        all.extend(virtio_device(number, *address, *gsi));
    }
    all.extend(serial_port());
    all.extend(keyboard());
    all.extend(generation_id());
    all.extend(events());
    all.extend(panic_port());
    let mut namespace = Scope::raw("\\_SB_".into(), all);
    // Section 7.4.2: what is written to the sleep control register to reach S5, "soft off".
    let s5: Vec<&dyn Aml> = vec![&power::SLEEP_TYPE_OFF, &acpi_tables::aml::ZERO];
    namespace.extend(bytes(&Name::new("\\_S5_".into(), &Package::new(s5))));

    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER,
        DSDT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    dsdt.append_slice(&namespace);
    bytes(&dsdt)
}

/// A virtio device on MMIO; `LNRO0005` is the ID that Linux's driver knows it by.
fn virtio_device(number: u8, address: u64, gsi: u32) -> Vec<u8> {
    // Below 4 GiB, by layout.
    let address = u32::try_from(address).unwrap_or(0);
    let registers = Memory32Fixed::new(true, address, layout::VIRTIO_MMIO_SIZE as u32);
    device(
        &format!("V{number:03}"),
        &[
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            // Its accesses to memory are coherent.
            &Name::new("_CCA".into(), &ONE),
            &resources(vec![&registers, &line(gsi)]),
        ],
    )
}

fn serial_port() -> Vec<u8> {
    device(
        "COM1",
        &[
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &resources(vec![
                &ports(layout::SERIAL_PORT, 8),
                &line(layout::SERIAL_GSI),
            ]),
        ],
    )
}

/// The keyboard controller: without an interrupt by this device a kernel has none for it.
fn keyboard() -> Vec<u8> {
    let [data, command] = layout::I8042_PORTS;
    device(
        "KBD_",
        &[
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &resources(vec![
                &ports(data, 1),
                &ports(command, 1),
                &line(layout::I8042_GSI),
            ]),
        ],
    )
}

/// The generation ID (Microsoft, "Virtual Machine Generation ID"): `ADDR` is its address, in two halves.
/// A guest is notified of its change by [`events`].
fn generation_id() -> Vec<u8> {
    let (low, high) = (layout::GENERATION_ID as u32, 0u32);
    let address: Vec<&dyn Aml> = vec![&low, &high];
    device(
        "VGEN",
        &[
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(address)),
        ],
    )
}

/// Generic Event Device (section 5.6.9): its interrupt means that the generation ID has changed.
fn events() -> Vec<u8> {
    let (generation, changed) = (Path::new("VGEN"), GENERATION_CHANGED);
    let notify = Notify::new(&generation, &changed);
    let is_it = Equal::new(&Arg(0), &layout::GENERATION_GSI);
    let handle = If::new(&is_it, vec![&notify]);
    device(
        "GED_",
        &[
            &Name::new("_HID".into(), &"ACPI0013"),
            &resources(vec![&line(layout::GENERATION_GSI)]),
            &Method::new("_EVT".into(), 1, true, vec![&handle]),
        ],
    )
}

/// Where a kernel says that it panicked; `QEMU0001` is the ID that Linux's driver `pvpanic` knows it by.
fn panic_port() -> Vec<u8> {
    let port = layout::POWER_PORT.saturating_add(power::PANIC);
    device(
        "PEVT",
        &[
            &Name::new("_HID".into(), &"QEMU0001"),
            &resources(vec![&ports(port, 1)]),
        ],
    )
}

fn device(name: &str, children: &[&dyn Aml]) -> Vec<u8> {
    bytes(&Device::new(name.into(), children.to_vec()))
}

/// `_CRS`: what a device is reached by.
fn resources(all: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(all))
}

/// `len` ports from `first` on.
fn ports(first: u64, len: u8) -> IO {
    // Ports have 16 bits, by layout.
    let first = u16::try_from(first).unwrap_or(0);
    IO::new(first, first, 1, len)
}

/// An interrupt line of one device, which raises it by edges, as irqfds do.
fn line(gsi: u32) -> Interrupt {
    const CONSUMER: bool = true;
    const EDGE: bool = true;
    const ACTIVE_LOW: bool = false;
    const SHARED: bool = false;
    Interrupt::new(CONSUMER, EDGE, ACTIVE_LOW, SHARED, gsi)
}

#[cfg(test)]
mod tests;
