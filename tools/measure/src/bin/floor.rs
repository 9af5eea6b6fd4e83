//! The floor: how fast a guest can run its first instruction when nothing but the unavoidable KVM calls is made.
//!
//! `floor KERNEL` makes a VM of 128 MiB with an in-kernel interrupt controller and timer (with `--split` before the
//! kernel: local APICs only) and one vCPU, puts the
//! loadable segments of `KERNEL` where they belong (page-aligned ones are mapped, others copied), and enters its ELF
//! entry in 32-bit protected mode. Bytes written to port 0x3f8 go to stdout; a reset through port 0x64 ends the program.
//!
//! `floor --restore MEMORY ENTRY` does the same with the whole of the file `MEMORY` mapped privately as the guest's memory
//! from address 0, and enters at `ENTRY`: what no restore can do without.
//!
//! `floor --image MIB TOUCHED MEMORY` makes no VM: it writes to a few pages of so much memory (to all of them if TOUCHED
//! is `all`), then finds and writes those pages to the new file `MEMORY`, and prints the milliseconds of that: what no
//! full snapshot can do without while its guest stands still.
//!
//! There are no devices, no boot parameters, no filters, no API, no checks: what a monitor needs beyond this is its own
//! doing.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap,
    kvm_pit_config, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use mayfly_measure::failure::{Context, Failure, Result};
use mayfly_measure::sys::GuestMemory;

const MEMORY: usize = 128 << 20;
const PAGE: u64 = 4096;
const PT_LOAD: u32 = 1;
const SERIAL_PORT: u16 = 0x3f8;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const RESET: u8 = 0xfe;
/// Three pages that Intel's virtualisation wants below 4 GiB, outside guest memory.
const TSS_AT: usize = 0xfffb_d000;
/// Lines that an I/O APIC in user space would have.
const IO_APIC_LINES: u64 = 24;
/// CR0: protection enabled.
const CR0_PE: u64 = 1;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}.");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words = std::env::args_os().skip(1).peekable();
    let split = words.next_if(|word| word == "--split").is_some();
    if words.next_if(|word| word == "--image").is_some() {
        let words: Vec<_> = words.filter_map(|word| word.into_string().ok()).collect();
        return image(&words);
    }
    let restore = words.next_if(|word| word == "--restore").is_some();
    let file = words.next().ok_or_else(usage)?;

    // Memory first: a slot made after the interrupt controller waits for milliseconds.
    let kvm = Kvm::new().cannot(|| "open /dev/kvm".into())?;
    let vm = kvm.create_vm().cannot(|| "create a VM".into())?;
    let (memory, entry) = if restore {
        let entry = words.next().and_then(|word| word.to_str()?.parse().ok());
        let reading = || format!("map {}", file.display());
        let file = File::open(&file).cannot(reading)?;
        let memory = GuestMemory::of_file(&file).cannot(reading)?;
        (memory, entry.ok_or_else(usage)?)
    } else {
        let mut memory = GuestMemory::new(MEMORY).cannot(|| "map guest memory".into())?;
        let entry = load(&file, &mut memory)?;
        (memory, entry)
    };
    memory
        .register(&vm)
        .cannot(|| "register guest memory".into())?;
    vm.set_tss_address(TSS_AT)
        .cannot(|| "set the TSS address".into())?;
    if split {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = IO_APIC_LINES;
        vm.enable_cap(&cap)
            .cannot(|| "split the interrupt controller".into())?;
    } else {
        vm.create_irq_chip()
            .cannot(|| "create the interrupt controller".into())?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).cannot(|| "create the timer".into())?;
    }

    let mut vcpu = vm.create_vcpu(0).cannot(|| "create a vCPU".into())?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .cannot(|| "read the supported CPUID".into())?;
    vcpu.set_cpuid2(&cpuid).cannot(|| "set CPUID".into())?;
    set_registers(&vcpu, entry).cannot(|| "set registers".into())?;
    serve(&mut vcpu)
}

fn usage() -> Failure {
    Failure::new(
        "usage: floor [--split] KERNEL, floor [--split] --restore MEMORY ENTRY, or floor --image MIB few|all MEMORY",
    )
}

/// Pages that a guest which barely uses its memory has written to.
const FEW: usize = 64;

fn image(words: &[String]) -> Result<()> {
    let [mib, touched, path] = words else {
        return Err(usage());
    };
    let len = mib.parse::<usize>().map_err(|_| usage())? << 20;
    let pages = match touched.as_str() {
        "all" => len / PAGE as usize,
        _ => FEW,
    };
    let writing = || format!("write {path}");
    let mut memory = GuestMemory::new(len).cannot(|| "map guest memory".into())?;
    for page in 0..pages {
        memory
            .write(page * PAGE as usize, &[1])
            .cannot(|| "write to guest memory".into())?;
    }
    let pagemap = File::open("/proc/self/pagemap").cannot(|| "open the page map".into())?;
    let began = Instant::now();
    let file = File::create(path).cannot(writing)?;
    file.set_len(len as u64).cannot(writing)?;
    for range in memory
        .used(&pagemap)
        .cannot(|| "scan the page map".into())?
    {
        memory.save(range, &file).cannot(writing)?;
    }
    println!("took {} ms", began.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// Puts the kernel's segments into memory; returns its entry.
fn load(kernel: &std::ffi::OsStr, memory: &mut GuestMemory) -> Result<u64> {
    let reading = || format!("load {}", kernel.display());
    let mut file = File::open(kernel).cannot(reading)?;
    let mut head = [0; 4096];
    let head_len = file.read(&mut head).cannot(reading)?;
    let head = &head[..head_len];
    let entry = field(head, 24)?;
    let headers = field(head, 32)? as usize;
    let count = (field(head, 56)? & 0xffff) as usize;
    for at in (0..count).map(|n| headers + n * 56) {
        if field(head, at)? as u32 != PT_LOAD {
            continue;
        }
        let offset = field(head, at + 8)?;
        let address = field(head, at + 24)?;
        let len = field(head, at + 32)? as usize;
        if (offset | address | len as u64).is_multiple_of(PAGE) {
            memory
                .map_file(address as usize, &file, offset, len)
                .cannot(reading)?;
        } else {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset).cannot(reading)?;
            memory.write(address as usize, &bytes).cannot(reading)?;
        }
    }
    Ok(entry)
}

fn field(head: &[u8], at: usize) -> Result<u64> {
    head.get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or_else(|| Failure::new("the kernel is not an ELF file with its headers in front"))
}

/// Flat 32-bit segments, paging off, interrupts off.
fn set_registers(vcpu: &VcpuFd, entry: u64) -> std::result::Result<(), kvm_ioctls::Error> {
    let flat = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut special = vcpu.get_sregs()?;
    special.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.cr0 |= CR0_PE;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rflags: 2, // the bit that is always set
        ..Default::default()
    })
}

fn serve(vcpu: &mut VcpuFd) -> Result<()> {
    let mut console = io::stdout();
    loop {
        match vcpu.run().cannot(|| "run the vCPU".into())? {
            VcpuExit::IoOut(SERIAL_PORT, bytes) => {
                console
                    .write_all(bytes)
                    .and_then(|()| console.flush())
                    .cannot(|| "write to stdout".into())?;
            }
            VcpuExit::IoOut(KEYBOARD_CONTROLLER, [RESET]) => return Ok(()),
            other => {
                return Err(Failure::new(format!(
                    "the guest did what the floor does not serve ({other:?})"
                )));
            }
        }
    }
}
