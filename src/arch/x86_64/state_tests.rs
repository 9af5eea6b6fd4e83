//! A guest that is saved while it runs and goes on in another virtual machine, with `memory` and
//! `arch` alone.

use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::cpuid;
use super::fingerprint::Fingerprint;
use super::guest_tests::{Machine, elf, machine_with};
use super::msr::TSC;
use super::vcpu::state::Msr;
use super::vcpu::{self, MsrList, VcpuState};
use super::vm::VmError;
use super::vm::state::{ChipsState, ClockAfterRestore, ClockState, VmState};
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
    memory: Memory,
}

fn restore(kvm: &Kvm, chips: Chips, saved: &Saved) -> Restored {
    restore_with(kvm, chips, saved, &saved.vm, ClockAfterRestore::Continue)
}

fn restore_with(
    kvm: &Kvm,
    chips: Chips,
    saved: &Saved,
    state: &VmState,
    then: ClockAfterRestore,
) -> Restored {
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
    vm.restore(state, then).unwrap();
    Restored { vcpus, memory }
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

/// Where the guest of [`clock_reader`] has KVM's clock, and where it puts the time stamp counter.
const CLOCK: u64 = 0x20_0000;
const COUNTER: u64 = 0x20_0100;

/// 32-bit code that turns KVM's clock on, and then for ever reads the time stamp counter and tells of
/// it by a byte on the serial port.
fn clock_reader() -> Vec<u8> {
    // mov ecx, 0x4b564d01; mov eax, CLOCK | 1; xor edx, edx; wrmsr
    let mut code = vec![0xb9, 0x01, 0x4d, 0x56, 0x4b, 0xb8, 0x01, 0x00, 0x20, 0x00];
    code.extend([0x31, 0xd2, 0x0f, 0x30]);
    // rdtsc; mov [COUNTER], eax; mov [COUNTER + 4], edx; mov dx, 0x3f8; out dx, al; back to rdtsc
    code.extend([0x0f, 0x31, 0xa3, 0x00, 0x01, 0x20, 0x00]);
    code.extend([0x89, 0x15, 0x04, 0x01, 0x20, 0x00]);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xec]);
    code
}

/// What a guest reads: the time stamp counter, and KVM's clock at that moment in nanoseconds; and
/// whether it was told that it had been stopped.
fn guest_time(vcpu: &Vcpu, memory: &Memory) -> (u64, u64, bool) {
    next_byte(vcpu);
    let ram = memory.ram();
    let u64_at = |at| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
    let tsc = u64_at(COUNTER);
    // struct pvclock_vcpu_time_info
    let (then, system) = (u64_at(CLOCK + 8), u64_at(CLOCK + 16));
    let scale: u32 = ram.read_obj(GuestAddress(CLOCK + 24)).unwrap();
    let [shift, flags]: [u8; 2] = ram.read_obj(GuestAddress(CLOCK + 28)).unwrap();
    let passed = u128::from(tsc.wrapping_sub(then));
    let shifted = match shift.cast_signed() {
        shift @ 0.. => passed << shift,
        shift => passed >> -shift,
    };
    let nanos = (shifted * u128::from(scale)) >> 32;
    (tsc, system + nanos as u64, flags & 1 << 1 != 0)
}

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * SECOND;

#[test]
fn clock_when_restored_goes_on_or_catches_up_and_never_goes_back() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    for chips in [Chips::Split, Chips::Kernel] {
        let file = elf(&clock_reader(), 4096, true);
        let first = machine_with(chips, &kvm, file.as_file(), MIB, 1, None, "");
        for _ in 0..3 {
            guest_time(&first.vcpus[0], &first.memory);
        }
        let (tsc, nanos, was_stopped) = guest_time(&first.vcpus[0], &first.memory);
        assert!(!was_stopped);
        finish(&first.vcpus[0]);
        let saved = save(&kvm, &first);
        let began = Instant::now();
        drop(first);
        assert!(saved.vm.clock.nanos >= nanos);
        let hour_ago = saved.vm.clock.realtime - HOUR;
        let in_an_hour = saved.vm.clock.realtime + HOUR;
        for (then, realtime, expected) in [
            (ClockAfterRestore::Continue, hour_ago, 0),
            (ClockAfterRestore::CatchUp, hour_ago, HOUR),
            // The host's wall clock was set back meanwhile.
            (ClockAfterRestore::CatchUp, in_an_hour, 0),
            (ClockAfterRestore::CatchUp, saved.vm.clock.realtime, 0),
        ] {
            let mut vm = saved.vm.clone();
            vm.clock.realtime = realtime;
            let second = restore_with(&kvm, chips, &saved, &vm, then);
            let vcpu = &second.vcpus[0];
            // What the guest reads first may have been there before; then KVM has updated it.
            let (first_tsc, first_nanos, was_stopped) = guest_time(vcpu, &second.memory);
            let (later_tsc, later, _) = guest_time(vcpu, &second.memory);
            let what = format!("{chips:?} {then:?} {expected}: {nanos} {first_nanos} {later}");
            assert!(was_stopped, "{what}");
            let elapsed = u64::try_from(began.elapsed().as_nanos()).unwrap();
            assert!(first_nanos >= nanos + expected, "{what}");
            assert!(later >= first_nanos, "{what}");
            assert!(later <= nanos + expected + elapsed + SECOND, "{what}");
            // The time stamp counter goes on where it was, whatever the clock does.
            let khz = u64::from(vcpu.get_tsc_khz().unwrap());
            let most = (elapsed + SECOND) / 1_000_000 * khz;
            assert!(first_tsc >= tsc && later_tsc >= first_tsc, "{what}");
            assert!(later_tsc - tsc <= most, "{what}");
        }
    }
}

#[test]
fn clock_when_a_file_says_anything_is_refused_or_taken_without_a_panic() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let memory = Memory::anonymous(2).unwrap();
    for nanos in [0, 1, u64::MAX, 1 << 63] {
        for realtime in [0, u64::MAX, 1 << 63] {
            for then in [ClockAfterRestore::Continue, ClockAfterRestore::CatchUp] {
                let vm = Vm::new(&kvm, &memory, false, Chips::Split).unwrap();
                let state = VmState {
                    clock: ClockState { nanos, realtime },
                    chips: ChipsState::Split,
                };
                // Whether KVM takes it is KVM's to say.
                let _ = vm.restore(&state, then);
            }
        }
    }
}

#[test]
fn chips_when_they_are_elsewhere_are_refused() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let memory = Memory::anonymous(2).unwrap();
    let [split, kernel] =
        [Chips::Split, Chips::Kernel].map(|chips| Vm::new(&kvm, &memory, false, chips).unwrap());
    for (of, to) in [(&split, &kernel), (&kernel, &split)] {
        let state = of.save().unwrap();
        let error = to.restore(&state, ClockAfterRestore::Continue).unwrap_err();
        assert!(matches!(error, VmError::OtherChips), "{error}");
        of.restore(&state, ClockAfterRestore::Continue).unwrap();
    }
}

#[test]
fn state_when_it_cannot_be_a_vcpus_is_refused_before_kvm_sees_it() {
    needs!(kvm);
    let kvm = Kvm::new().unwrap();
    let file = elf(&ALPHABET, 4096, true);
    let machine = machine_with(Chips::Split, &kvm, file.as_file(), MIB, 1, None, "");
    let good = save(&kvm, &machine).vcpus.remove(0);
    let with = |change: fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    for (state, expected) in [
        (with(|state| state.cpuid.clear()), "CPUID table is empty"),
        (
            with(|state| state.cpuid = state.cpuid.repeat(10)),
            "CPUID table is empty or too long",
        ),
        (with(|state| state.msrs.clear()), "no model-specific"),
        (
            with(|state| state.msrs = state.msrs.repeat(100)),
            "or too many",
        ),
        (with(|state| state.xsave.truncate(575)), "too short"),
        (with(|state| state.xsave.push(0)), "not of whole words"),
        (
            with(|state| state.xsave.resize(1 << 20, 0)),
            "longer than this host's",
        ),
        (
            with(|state| state.xcrs = state.xcrs.repeat(17)),
            "too many extended control registers",
        ),
        (
            with(|state| {
                state.msrs.push(Msr {
                    index: 0xdead_beef,
                    data: 1,
                });
            }),
            "register address 0xdeadbeef",
        ),
        (with(|state| state.mp_state = 77), "the run state"),
        (with(|state| state.sregs.cr4 = !0), "the system registers"),
        (with(|state| state.xsave[512] = 0xff), "the XSAVE state"),
    ] {
        let memory = Memory::anonymous(2).unwrap();
        let vm = Vm::new(&kvm, &memory, false, Chips::Split).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let error = vcpu::restore(&vm, &vcpu, &state).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
