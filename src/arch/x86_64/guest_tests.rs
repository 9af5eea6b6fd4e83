//! From an opened /dev/kvm to a guest's first byte on the serial port, with `memory` and `arch`
//! alone: both boot protocols, every vCPU count, and Linux as far as its first line.

mod generation;
mod interrupts;

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arch::boot::{Entry, command_line};
use crate::arch::chips::Chips;
use crate::arch::mask::{BitMask, CpuidMask, CpuidRegister, MsrMask};
use crate::arch::{Kernel, Protocol, Vcpu, Vm, boot, cpuid, layout, vcpu};
use crate::memory::Memory;
use crate::needs;
use crate::sys::kvm::Exit;
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

const SERIAL: u16 = 0x3f8;
const LOAD_ADDRESS: u64 = 0x10_0000;

/// `mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt`, the same in 32-bit and 64-bit mode.
const FIRST_BYTE: [u8; 8] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xf4];

/// An ELF file with `code` at 1 MiB, padded to `len` bytes, with a PVH note if asked for.
pub fn elf(code: &[u8], len: u64, pvh: bool) -> TempFile {
    let note_len: u64 = if pvh { 20 } else { 0 };
    let mut bytes = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    for word in [LOAD_ADDRESS, 64, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(b"\0\0\0\0\x40\0\x38\0\x02\0\0\0\0\0\0\0");
    for (kind, offset, address, len) in [(1u64, 0x1000, LOAD_ADDRESS, len), (4, 176, 0, note_len)] {
        for word in [kind | 7 << 32, offset, address, address, len, len, 4] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes.extend_from_slice(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    bytes.extend_from_slice(&(LOAD_ADDRESS as u32).to_le_bytes());
    bytes.resize(0x1000, 0);
    bytes.extend_from_slice(code);
    let file = TempFile::new().unwrap();
    let mut writer = file.as_file();
    writer.write_all(&bytes).unwrap();
    // All of it written, as a kernel is: not a hole.
    let mut at = bytes.len() as u64;
    writer.seek(SeekFrom::Start(at)).unwrap();
    while at < 0x1000 + len {
        let count = (0x1000 + len - at).min(1 << 20);
        writer.write_all(&vec![0xcc; count as usize]).unwrap();
        at += count;
    }
    file
}

pub struct Machine {
    entry: Entry,
    pub vcpus: Vec<Vcpu>,
    pub vm: Arc<Vm>,
    pub memory: Memory,
}

/// Everything up to the first instruction.
fn machine(
    kvm: &Kvm,
    file: &File,
    mib: u64,
    count: u8,
    protocol: Option<Protocol>,
    boot_args: &str,
) -> Machine {
    machine_with(Chips::Kernel, kvm, file, mib, count, protocol, boot_args)
}

/// The same with the interrupt chips in either place.
pub fn machine_with(
    chips: Chips,
    kvm: &Kvm,
    file: &File,
    mib: u64,
    count: u8,
    protocol: Option<Protocol>,
    boot_args: &str,
) -> Machine {
    let kernel = Kernel::read(file, "kernel").unwrap();
    let mut memory = Memory::anonymous(mib).unwrap();
    let line = command_line(boot_args, None, &[]).unwrap();
    let told = boot::Told {
        command_line: &line,
        vcpus: count,
        devices: &[],
        seed: &[1; 32],
        generation_id: [1; 16],
    };
    let entry = boot::load(&mut memory, &kernel, None, protocol, &told).unwrap();
    let vm = Arc::new(Vm::new(kvm, &memory, false, chips).unwrap());
    let vcpus: Vec<_> = (0..count).map(|n| vm.create_vcpu(n).unwrap()).collect();
    let supported = cpuid::supported(kvm).unwrap();
    for (index, vcpu) in (0u8..).zip(&vcpus) {
        let table = cpuid::table(&supported, index, count, false);
        let entry = (index == 0).then_some(&entry);
        vcpu::prepare(vcpu, &table).unwrap();
        if let Some(entry) = entry {
            vcpu::enter(vcpu, entry).unwrap();
        }
    }
    Machine {
        entry,
        vcpus,
        vm,
        memory,
    }
}

impl Machine {
    fn first_byte(&self) -> u8 {
        let vcpu = &self.vcpus[0];
        match vcpu.run().unwrap() {
            Exit::PortWrite(access) if access.port == SERIAL => vcpu.port_data(access, 0)[0],
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn boot_when_either_protocol_is_used_runs_the_first_instruction() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    for (pvh, given, expected) in [
        (true, None, Protocol::Pvh),
        (false, None, Protocol::Linux64),
        (true, Some(Protocol::Linux64), Protocol::Linux64),
    ] {
        for (mib, count, chips) in [
            (2, 1, Chips::Split),
            (2, 1, Chips::Kernel),
            (128, 2, Chips::Kernel),
            (4096, 32, Chips::Split),
        ] {
            let file = elf(&FIRST_BYTE, 4096, pvh);
            let file = file.as_file();
            let machine = machine_with(chips, &kvm, file, mib, count, given, "");
            assert_eq!(machine.entry.protocol, expected);
            assert_eq!(machine.first_byte(), b'A');
            let regs = machine.vcpus[0].get_regs().unwrap();
            match expected {
                Protocol::Pvh => assert_eq!(regs.rbx, 0x6040),
                Protocol::Linux64 => assert_eq!(regs.rsi, 0x7000),
            }
        }
    }
}

#[test]
fn boot_when_reset_state_is_relied_on_it_is_so() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let file = elf(&FIRST_BYTE, 4096, true);
    let machine = machine(&kvm, file.as_file(), 16, 2, None, "");
    // The control word and MXCSR, where FXSAVE puts them.
    let region = machine.vcpus[0].get_xsave().unwrap().region;
    assert_eq!((region[0] & 0xffff, region[6]), (0x37f, 0x1f80));
    let states: Vec<_> = machine
        .vcpus
        .iter()
        .map(|vcpu| vcpu.get_mp_state().unwrap().mp_state)
        .collect();
    // KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED: waits for INIT and SIPI.
    assert_eq!(states, [0, 1]);
    // LINT0 of the boot vCPU: not masked, delivers as the 8259 says (ExtINT).
    let lapic = machine.vcpus[0].get_lapic().unwrap();
    assert_eq!((lapic.regs[0x351] & 7, lapic.regs[0x352] & 1), (7, 0));
}

#[test]
fn cpuid_when_set_is_read_back() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let supported = cpuid::supported(&kvm).unwrap();
    for count in [1, 2, 3, 32] {
        for smt in [false, true] {
            let memory = Memory::anonymous(2).unwrap();
            let vm = Vm::new(&kvm, &memory, false, Chips::Kernel).unwrap();
            for index in if count > 1 {
                vec![0, count - 1]
            } else {
                vec![0]
            } {
                let vcpu = vm.create_vcpu(index).unwrap();
                let table = cpuid::table(&supported, index, count, smt);
                vcpu::prepare(&vcpu, &table).unwrap();
                let set = vcpu.get_cpuid2(256).unwrap();
                let leaf = |function, sub| {
                    let found = set
                        .as_slice()
                        .iter()
                        .find(|e| e.function == function && e.index == sub);
                    *found.unwrap_or_else(|| panic!("{function:#x}.{sub}"))
                };
                assert_eq!(leaf(1, 0).ebx >> 24, u32::from(index));
                assert_eq!(leaf(0xb, 0).edx, u32::from(index));
                assert_eq!(leaf(0xb, 1).ebx, u32::from(count));
                assert_eq!(leaf(0xb, 0).eax, u32::from(smt && count > 1));
            }
        }
    }
}

#[test]
fn cpuid_when_set_announces_what_kvm_does_for_guests() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let supported = cpuid::supported(&kvm).unwrap();
    for chips in [Chips::Kernel, Chips::Split] {
        let memory = Memory::anonymous(2).unwrap();
        let vm = Vm::new(&kvm, &memory, false, chips).unwrap();
        for index in [0, 3] {
            let vcpu = vm.create_vcpu(index).unwrap();
            let khz = vcpu.get_tsc_khz().unwrap();
            let table = cpuid::table(&supported, index, 4, false);
            vcpu::prepare(&vcpu, &cpuid::with_rates(&table, khz)).unwrap();
            let set = vcpu.get_cpuid2(256).unwrap();
            let leaf = |function| {
                let found = set.as_slice().iter().find(|e| e.function == function);
                *found.unwrap_or_else(|| panic!("{function:#x}"))
            };
            assert_eq!(leaf(0x4000_0000).ebx.to_le_bytes(), *b"KVMK");
            assert_eq!(leaf(0x4000_0000).eax, 0x4000_0010);
            // KVM's clock by its old and its new registers, steal time, PV EOI, and that the clock
            // is the same on all vCPUs.
            for bit in [0, 3, 5, 6, 24] {
                assert_ne!(leaf(0x4000_0001).eax & 1 << bit, 0, "bit {bit}");
            }
            // x2APIC, TSC deadline timer, a hypervisor.
            for bit in [21, 24, 31] {
                assert_ne!(leaf(1).ecx & 1 << bit, 0, "bit {bit}");
            }
            assert_eq!(leaf(0x4000_0010).eax, khz);
            assert_eq!(leaf(0x4000_0010).ebx, 1_000_000);
        }
    }
}

#[test]
fn cpu_config_when_applied_is_read_back_as_in_the_golden_tables() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let all = |value| BitMask {
        bits: 0xffff_ffff,
        value,
    };
    let leaf_mask = |leaf, flags, register, value| CpuidMask {
        leaf,
        subleaf: 0,
        flags,
        changes: vec![(register, all(value))],
    };
    let cpuid_masks = [
        leaf_mask(0x8000_0000, 0, CpuidRegister::Ecx, 0x5555_5555),
        leaf_mask(1, 0, CpuidRegister::Eax, 0x306a9),
        leaf_mask(7, 1, CpuidRegister::Ebx, 1),
    ];
    let msr_mask = |address, bits, value| MsrMask {
        address,
        mask: BitMask { bits, value },
    };
    let msr_masks = [
        msr_mask(0x277, 0xff, 5),
        msr_mask(0x174, 0b11011, 0b10000),
        msr_mask(0x1a0, 1, 0),
        msr_mask(0x2ff, 0, 0),
    ];
    let offered = cpuid::supported(&kvm).unwrap();
    let mut supported = offered.clone();
    cpuid::mask(&mut supported, &cpuid_masks).unwrap();
    let memory = Memory::anonymous(2).unwrap();
    let vm = Vm::new(&kvm, &memory, false, Chips::Kernel).unwrap();
    for index in [0, 1] {
        let vcpu = vm.create_vcpu(index).unwrap();
        vcpu::prepare(&vcpu, &cpuid::table(&supported, index, 2, false)).unwrap();
        vcpu::mask_msrs(&vcpu, &msr_masks).unwrap();

        let leaf = |table: &CpuId, function| {
            let found = table
                .as_slice()
                .iter()
                .find(|e| e.function == function && e.index == 0);
            *found.unwrap_or_else(|| panic!("{function:#x}"))
        };
        let set = vcpu.get_cpuid2(256).unwrap();
        assert_eq!(leaf(&set, 0x8000_0000).ecx, 0x5555_5555);
        assert_eq!(leaf(&set, 1).eax, 0x306a9);
        // What is not masked is what KVM makes of the table without masks.
        let other = vm.create_vcpu(index + 10).unwrap();
        vcpu::prepare(&other, &cpuid::table(&offered, index, 2, false)).unwrap();
        let without = other.get_cpuid2(256).unwrap();
        assert_eq!(leaf(&set, 1).ecx, leaf(&without, 1).ecx);
        assert_eq!(leaf(&set, 1).ebx >> 24, u32::from(index));
        // KVM that is software adds the features it cannot hide.
        let given = cpuid::table(&offered, index, 2, false);
        if leaf(&without, 7).ebx == leaf(&given, 7).ebx {
            assert_eq!(leaf(&set, 7).ebx, 1);
        }
        assert_eq!(leaf(&set, 0), leaf(&without, 0));

        // Page attributes as after a reset but for the first; segment 0x10; no fast strings;
        // memory types as every guest finds them.
        let golden: [(u32, u64, u64); 4] = [
            (0x277, u64::MAX, 0x0007_0406_0007_0405),
            (0x174, u64::MAX, 0x10),
            (0x1a0, 1, 0),
            (0x2ff, u64::MAX, 0x806),
        ];
        for (address, mask, value) in golden {
            let entry = kvm_msr_entry {
                index: address,
                ..kvm_msr_entry::default()
            };
            let mut msrs = Msrs::from_entries(&[entry]).unwrap();
            assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1);
            let data = msrs.as_slice()[0].data;
            assert_eq!(data & mask, value, "{address:#x}: {data:#x}");
        }
    }
    let unknown = [msr_mask(0xdead_beef, 1, 1)];
    let vcpu = vm.create_vcpu(2).unwrap();
    let error = vcpu::mask_msrs(&vcpu, &unknown).unwrap_err().to_string();
    assert!(error.ends_with("address 0xdeadbeef"), "{error}");
}

#[test]
fn run_when_the_kernels_file_is_cut_fails_and_the_file_is_named() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    // mov eax, [0x180000]; then as above.
    let mut code = vec![0xa1, 0x00, 0x00, 0x18, 0x00];
    code.extend_from_slice(&FIRST_BYTE);
    let file = elf(&code, 1 << 20, true);
    let machine = machine(&kvm, file.as_file(), 16, 1, None, "");
    assert_eq!(machine.memory.changed_file(), None);
    file.as_file().set_len(0x2000).unwrap();
    match machine.vcpus[0].run() {
        Err(errno) => assert_eq!(errno, libc::EFAULT),
        Ok(Exit::MemoryFault) => {}
        // Where KVM emulates the instruction.
        Ok(Exit::MemoryRead { address, .. }) => assert_eq!(address, 0x18_0000),
        Ok(other) => panic!("{other:?}"),
    }
    assert_eq!(machine.memory.changed_file(), Some("kernel"));
}

#[test]
fn boot_when_the_kernel_is_large_has_all_of_it() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    const LEN: u64 = 20 << 20;
    let file = elf(&FIRST_BYTE, LEN, true);
    let machine = machine(&kvm, file.as_file(), 128, 1, None, "quiet");
    assert_eq!(machine.first_byte(), b'A');
    let last = GuestAddress(LOAD_ADDRESS + LEN - 1);
    let byte: u8 = machine.memory.ram().read_obj(last).unwrap();
    assert_eq!(byte, 0xcc);
}

#[test]
fn boot_when_kernel_is_linux_prints_its_first_line() {
    needs!(kvm, guest);
    let kvm = Kvm::new().unwrap();
    let path = needs::guest_folder().join("vmlinux");
    let args = "earlyprintk=serial,ttyS0 console=ttyS0 reboot=k panic=-1 nokaslr lpj=4000000 \
                noxsave clearcpuid=cx16,popcnt,xsave,bmi1,bmi2,erms,fsrm,rdrand,rdseed,smap,avx,\
                avx2,movbe";
    for protocol in [Protocol::Pvh, Protocol::Linux64] {
        let file = File::open(&path).unwrap();
        let machine = machine(&kvm, &file, 256, 1, Some(protocol), args);
        let begin = Instant::now();
        let mut line = Vec::new();
        let vcpu = &machine.vcpus[0];
        while line.last() != Some(&b'\n') {
            assert!(begin.elapsed() < Duration::from_secs(600), "no line comes");
            match vcpu.run().unwrap() {
                Exit::PortWrite(access) if access.port == SERIAL => {
                    line.extend((0..access.count).map(|i| vcpu.port_data(access, i)[0]));
                }
                // Line status: ready to send. Elsewhere there is nothing.
                Exit::PortRead(access) => {
                    let byte = if access.port == 0x3fd { 0x60 } else { 0xff };
                    for i in 0..access.count {
                        vcpu.answer_port(access, i, &[byte; 4][..access.unit]);
                    }
                }
                Exit::MemoryRead { len, .. } => vcpu.answer_memory(&[0xff; 8][..len]),
                Exit::PortWrite(_) | Exit::MemoryWrite { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let text = String::from_utf8_lossy(&line);
        println!("{protocol:?}, {:?}: {}", begin.elapsed(), text.trim());
        assert!(text.contains("Linux version"), "{text}");
    }
}
