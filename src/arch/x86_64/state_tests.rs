//! A guest that is saved while it runs and goes on in another virtual machine, with `memory` and
//! `arch` alone.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::cpuid;
use super::fingerprint::Fingerprint;
use super::guest_tests::{Machine, elf, machine_with};
use super::msr::TSC;
use super::vcpu::state::Msr;
use super::vcpu::{self, MsrList, VcpuState};
use super::vm::state::{ClockAfterRestore, ClockState, VmState};
use crate::arch::chips::Chips;
use crate::arch::{Protocol, Vcpu, Vm};
use crate::memory::Memory;
use crate::needs;
use crate::state::state_round_trip;
use crate::sys::kvm::Exit;

const MIB: u64 = 16;
const SERIAL: u16 = 0x3f8;

/// `mov dx, 0x3f8; mov al, 'A'`, and then for ever `out dx, al; inc al`; the same in 32-bit and 64-bit
/// mode.
const ALPHABET: [u8; 11] = [
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xfe, 0xc0, 0xeb, 0xfb,
];

struct Saved {
    vcpus: Vec<VcpuState>,
    vm: VmState,
    memory: Vec<u8>,
}

fn next_byte(vcpu: &Vcpu) -> u8 {
    match vcpu.run().unwrap() {
        Exit::PortWrite(access) if access.port == SERIAL => vcpu.port_data(access, 0)[0],
        other => panic!("{other:?}"),
    }
}

fn save(kvm: &Kvm, machine: &Machine) -> Saved {
    let list = MsrList::ask(kvm, &machine.vcpus[0]).unwrap();
    let vcpus = machine.vcpus.iter();
    let vcpus = vcpus.map(|vcpu| vcpu::save(&machine.vm, &vcpu.access(), &list).unwrap());
    let vcpus = vcpus.collect();
    let mut memory = vec![0; (MIB << 20) as usize];
    let ram = machine.memory.ram();
    ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
    Saved {
        vcpus,
        vm: machine.vm.save().unwrap(),
        memory,
    }
}

struct Restored {
    vcpus: Vec<Vcpu>,
    _memory: Memory,
}

fn restore(kvm: &Kvm, chips: Chips, saved: &Saved) -> Restored {
    let memory = Memory::anonymous(MIB).unwrap();
    let ram = memory.ram();
    ram.write_slice(&saved.memory, GuestAddress(0)).unwrap();
    let vm = Arc::new(Vm::new(kvm, &memory, false, chips).unwrap());
    let vcpus: Vec<_> = (0u8..)
        .zip(&saved.vcpus)
        .map(|(index, state)| {
            let vcpu = vm.create_vcpu(index).unwrap();
            vcpu::restore(&vm, &vcpu, state).unwrap();
            vcpu
        })
        .collect();
    vm.restore(&saved.vm, ClockAfterRestore::Continue).unwrap();
    Restored {
        vcpus,
        _memory: memory,
    }
}

/// Ends the last exit's instruction, as a vCPU's thread does when it pauses.
fn finish(vcpu: &Vcpu) {
    vcpu.leave_at_once();
    assert_eq!(vcpu.run(), Err(libc::EINTR));
    vcpu.forget_kicks();
}

#[test]
fn guest_when_saved_goes_on_in_another_machine() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    for protocol in [Protocol::Pvh, Protocol::Linux64] {
        for (count, chips) in [
            (1, Chips::Split),
            (1, Chips::Kernel),
            (2, Chips::Split),
            (32, Chips::Kernel),
            (32, Chips::Split),
        ] {
            let file = elf(&ALPHABET, 4096, true);
            let file = file.as_file();
            let first = machine_with(chips, &kvm, file, MIB, count, Some(protocol), "");
            assert_eq!(next_byte(&first.vcpus[0]), b'A');
            assert_eq!(next_byte(&first.vcpus[0]), b'B');
            finish(&first.vcpus[0]);
            let saved = save(&kvm, &first);
            // Where it was saved it goes on as well.
            assert_eq!(next_byte(&first.vcpus[0]), b'C');
            drop(first);
            let second = restore(&kvm, chips, &saved);
            for byte in b'C'..=b'Z' {
                assert_eq!(next_byte(&second.vcpus[0]), byte, "{count} {chips:?}");
            }
            // The others still wait to be woken.
            for vcpu in &second.vcpus[1..] {
                assert_eq!(vcpu.get_mp_state().unwrap().mp_state, 1);
            }
        }
    }
}

/// The same but for the time stamp counter, which goes on.
fn without_time(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|msr| msr.index != TSC);
    state
}

#[test]
fn state_when_restored_and_saved_again_is_the_same() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    for (count, chips) in [(1, Chips::Split), (2, Chips::Kernel), (32, Chips::Split)] {
        let file = elf(&ALPHABET, 4096, true);
        let protocol = Some(Protocol::Linux64);
        let first = machine_with(chips, &kvm, file.as_file(), MIB, count, protocol, "");
        next_byte(&first.vcpus[0]);
        finish(&first.vcpus[0]);
        let list = MsrList::ask(&kvm, &first.vcpus[0]).unwrap();
        let save = |(vm, vcpu, _): &(Arc<Vm>, Vcpu, Option<Memory>)| {
            without_time(vcpu::save(vm, &vcpu.access(), &list).unwrap())
        };
        for (index, vcpu) in (0u8..).zip(first.vcpus) {
            let part = (Arc::clone(&first.vm), vcpu, None);
            // KVM does not list these: how memory is cached, as every guest starts.
            let msrs = save(&part).msrs;
            assert!(msrs.contains(&Msr {
                index: 0x2ff,
                data: 0x806
            }));
            let make = |state: VcpuState| {
                let memory = Memory::anonymous(MIB).unwrap();
                let vm = Arc::new(Vm::new(&kvm, &memory, false, chips).unwrap());
                let vcpu = vm.create_vcpu(index).unwrap();
                vcpu::restore(&vm, &vcpu, &state).unwrap();
                (vm, vcpu, Some(memory))
            };
            state_round_trip!(part, make, save);
        }
        let part = (first.vm, None);
        let make = |state: VmState| {
            let memory = Memory::anonymous(MIB).unwrap();
            let vm = Arc::new(Vm::new(&kvm, &memory, false, chips).unwrap());
            vm.restore(&state, ClockAfterRestore::Continue).unwrap();
            (vm, Some(memory))
        };
        state_round_trip!(part, make, |(vm, _): &(Arc<Vm>, Option<Memory>)| {
            let mut state = vm.save().unwrap();
            state.clock = ClockState::default();
            state
        });
    }
}

#[test]
fn host_when_it_is_the_same_has_all_that_a_guest_depends_on() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let file = elf(&ALPHABET, 4096, true);
    let machine = machine_with(Chips::Split, &kvm, file.as_file(), MIB, 2, None, "");
    next_byte(&machine.vcpus[0]);
    finish(&machine.vcpus[0]);
    let saved = save(&kvm, &machine);
    let guest = Fingerprint::of_saved(&machine.vm, &saved.vcpus[0]);
    assert_eq!(guest, Fingerprint::of_saved(&machine.vm, &saved.vcpus[1]));
    let has = |leaf, bit: u32| {
        let mut words = guest.features.iter();
        words.any(|word| word.leaf == leaf && word.bits & 1 << bit != 0)
    };
    assert!(has(1, 0) && has(0x8000_0001, 29) && has(0x4000_0001, 0));

    let memory = Memory::anonymous(2).unwrap();
    let vm = Vm::new(&kvm, &memory, false, Chips::Split).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = cpuid::supported(&kvm).unwrap();
    let table = cpuid::table(&supported, 0, 2, false);
    let host = Fingerprint::of_host(&vm, &vcpu.access(), &table).unwrap();
    assert_eq!(guest.differences(&host), [""; 0]);
    // The table of the guest can be set afterwards.
    vcpu::restore(&vm, &vcpu, &saved.vcpus[0]).unwrap();

    let mut more = guest.clone();
    for word in &mut more.features {
        word.bits |= u32::from(word.leaf == 7 && word.subleaf == 1) << 31;
    }
    assert_ne!(more.differences(&host), [""; 0]);
}
