//! A vCPU's thread with a real guest on it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::arch::Protocol;
use crate::arch::chips::Chips;
use crate::arch::guest_tests::{Machine, elf, machine_with};
use crate::arch::vcpu::MsrList;
use crate::bus::{Completer, Registers, Tickets, Written};
use crate::inbox::{Inbox, inbox};
use crate::needs;

const DEVICE: u64 = 0xd000_0000;
const PORT: u64 = 0x100;
/// Where guests put what they read.
const BUFFER: u64 = 0x20_0000;
/// What they read at once.
const STRING: u64 = 64;

/// Counts reads, each of which is told the count of bytes so far; a write to port or address 0x10
/// waits until the test lets it.
#[derive(Default)]
struct Device {
    reads: AtomicU32,
    tickets: Mutex<Tickets>,
    waiting: Mutex<Vec<Completer>>,
}

impl Registers for Device {
    fn read(&self, _: u64, data: &mut [u8]) {
        let count = self.reads.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        for (to, from) in data.iter_mut().zip(count.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, _: u64, _: &[u8]) -> Written {
        let (ticket, completers) = self.tickets.lock().unwrap().issue();
        self.waiting.lock().unwrap().extend(completers);
        Written::After(ticket)
    }
}

/// A guest on a vCPU's thread.
struct Running {
    handle: VcpuHandle,
    events: Inbox<VcpuEvent>,
    device: Arc<Device>,
    machine: Machine,
}

/// The guest with this 32-bit `code`.
fn start(code: &[u8]) -> Running {
    start_vcpu(code, 0)
}

/// The same, of which vCPU `index` runs, and no other.
fn start_vcpu(code: &[u8], index: u8) -> Running {
    signal::install_kicks();
    let kvm = Kvm::new().unwrap();
    let file = elf(code, 4096, true);
    let protocol = Some(Protocol::Pvh);
    let mut machine = machine_with(
        Chips::Split,
        &kvm,
        file.as_file(),
        16,
        index + 1,
        protocol,
        "",
    );
    let device = Arc::new(Device::default());
    let mut buses = Buses::default();
    buses.memory.insert(DEVICE, 0x2000, device.clone()).unwrap();
    buses.ports.insert(PORT, 4, device.clone()).unwrap();
    let (sender, events) = inbox(8).unwrap();
    let fd = machine.vcpus.remove(index.into());
    let outbox = sender.outbox();
    let (vcpu, link) = Vcpu::new(index, fd, Arc::new(buses), outbox, Timeline::begin());
    let thread = thread::spawn(move || vcpu.run());
    Running {
        handle: VcpuHandle::new(link, thread),
        events,
        device,
        machine,
    }
}

impl Running {
    fn pause(&self) {
        self.handle.pause().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let event = self.events.next_until(deadline);
        let index = self.handle.messages.index;
        assert_eq!(event, Some(VcpuEvent::Paused { index }));
        assert!(
            !self
                .handle
                .messages
                .shared
                .in_access
                .load(Ordering::Relaxed)
        );
    }

    fn reads(&self) -> u32 {
        self.device.reads.load(Ordering::SeqCst)
    }

    /// Pauses and resumes many times; `check` looks at the registers each time.
    fn check_pauses(&self, check: impl Fn(&kvm_bindings::kvm_regs, u32)) {
        let begin = Instant::now();
        let mut reads = 0;
        for _ in 0..200 {
            self.handle.run().unwrap();
            // So that the guest has come to something new.
            while self.reads() == reads {
                assert!(begin.elapsed() < Duration::from_secs(300));
                thread::yield_now();
            }
            self.pause();
            reads = self.reads();
            check(&self.handle.access.get_regs().unwrap(), reads);
        }
    }
}

fn load(code: &mut Vec<u8>, opcode: u8, value: u64) {
    code.push(opcode);
    code.extend_from_slice(&(value as u32).to_le_bytes());
}

#[test]
fn pause_when_the_guest_reads_a_port_leaves_the_answer_in_its_register() {
    needs!(kvm);
    // mov dx, PORT; in eax, dx; jmp to the in
    let guest = start(&[0x66, 0xba, 0x00, 0x01, 0xed, 0xeb, 0xfd]);
    guest.check_pauses(|regs, reads| assert_eq!(regs.rax, u64::from(reads)));
}

#[test]
fn pause_when_the_guest_reads_a_register_in_memory_leaves_the_answer_in_its_register() {
    needs!(kvm);
    // mov eax, [DEVICE]; jmp to it
    let mut code = Vec::new();
    load(&mut code, 0xa1, DEVICE);
    code.extend([0xeb, 0xf9]);
    let guest = start(&code);
    guest.check_pauses(|regs, reads| assert_eq!(regs.rax, u64::from(reads)));
}

#[test]
fn pause_when_an_access_crosses_pages_has_done_both_parts() {
    needs!(kvm);
    let mut code = Vec::new();
    load(&mut code, 0xa1, DEVICE + 0xffe);
    code.extend([0xeb, 0xf9]);
    let guest = start(&code);
    guest.check_pauses(|regs, reads| {
        assert_eq!(reads % 2, 0);
        let low = (reads - 1) & 0xffff;
        assert_eq!(regs.rax, u64::from(reads << 16 | low));
    });
}

/// Reads [`STRING`] bytes to [`BUFFER`], again and again, by a string instruction.
fn string_reader(instruction: [u8; 2]) -> Running {
    // mov dx, PORT
    let mut code = vec![0x66, 0xba, 0x00, 0x01];
    // mov esi, DEVICE; mov edi, BUFFER; mov ecx, STRING
    load(&mut code, 0xbe, DEVICE);
    load(&mut code, 0xbf, BUFFER);
    load(&mut code, 0xb9, STRING);
    code.extend(instruction);
    code.extend([0xeb, 0xed]);
    start(&code)
}

/// What was read is in the buffer, as far as the registers tell.
fn check_string(guest: &Running) {
    guest.check_pauses(|regs, reads| {
        let done = regs.rdi.wrapping_sub(BUFFER) % STRING;
        assert_eq!(
            done,
            u64::from(reads) % STRING,
            "{:#x} {}",
            regs.rdi,
            regs.rcx
        );
        let last = (u64::from(reads) + STRING - 1) % STRING;
        let at = GuestAddress(BUFFER + last);
        let byte: u8 = guest.machine.memory.ram().read_obj(at).unwrap();
        assert_eq!(byte, reads as u8);
    });
}

#[test]
fn pause_when_a_string_comes_from_a_port_has_what_was_read() {
    needs!(kvm);
    // rep insb
    check_string(&string_reader([0xf3, 0x6c]));
}

#[test]
fn pause_when_a_string_comes_from_registers_has_what_was_read() {
    needs!(kvm);
    // rep movsb
    check_string(&string_reader([0xf3, 0xa4]));
}

#[test]
fn pause_when_a_write_waits_has_done_its_instruction_and_the_guest_goes_on_later() {
    needs!(kvm);
    // mov [DEVICE], eax; in eax, PORT's; jmp to the first
    let mut code = vec![0x66, 0xba, 0x00, 0x01];
    load(&mut code, 0xa3, DEVICE);
    code.extend([0xed, 0xeb, 0xf8]);
    let guest = start(&code);
    for round in 0..50 {
        guest.handle.run().unwrap();
        let begin = Instant::now();
        while guest.device.waiting.lock().unwrap().is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(60));
            thread::yield_now();
        }
        guest.pause();
        assert_eq!(guest.reads(), round);
        let regs = guest.handle.access.get_regs().unwrap();
        assert_eq!(regs.rip, 0x10_0009, "behind the write");
        guest.device.waiting.lock().unwrap().clear();
    }
}

#[test]
fn state_when_saved_in_the_middle_of_traffic_is_whole() {
    needs!(kvm);
    let guest = start(&[0x66, 0xba, 0x00, 0x01, 0xed, 0xeb, 0xfd]);
    let kvm = Kvm::new().unwrap();
    guest.check_pauses(|regs, reads| {
        let list: MsrList = guest.handle.ask_msrs(&kvm).unwrap();
        let state = guest.handle.save(&guest.machine.vm, &list).unwrap();
        assert_eq!(state.regs.rax, u64::from(reads));
        assert_eq!(state.regs, (*regs).into());
    });
}

#[test]
fn pause_when_the_guest_has_never_run_changes_nothing() {
    needs!(kvm);
    let guest = start(&[0xf4]);
    let before = guest.handle.access.get_regs().unwrap();
    guest.pause();
    // Told to run and to pause at once, it may come to run or not.
    guest.pause();
    assert_eq!(guest.handle.access.get_regs().unwrap(), before);
    guest.handle.forgive_pause();
}

#[test]
fn pause_when_a_vcpu_waits_to_be_woken_leaves_it_so() {
    needs!(kvm);
    let guest = start_vcpu(&[0xf4], 1);
    for _ in 0..20 {
        guest.handle.run().unwrap();
        guest.pause();
        let state = guest.handle.access.get_mp_state().unwrap();
        assert_eq!(state.mp_state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);
    }
}
