//! Forks with threads that write all the time, and with a virtual machine.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use kvm_ioctls::{Kvm, VcpuExit};
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{Bytes, GuestAddress};

use super::super::PAGE;
use super::super::testing::vcpu_in_real_mode;
use super::*;
use crate::memory::{Backing, HIGH_RAM, MIB};
use crate::needs;
use crate::sys::testing::wait_until;

const STAMP: Stamp = Stamp {
    offset: 0x9_f000,
    id: *b"the parent's id.",
};

fn shared(mib: u64) -> Memory {
    Memory::new(mib, Pages::Ordinary, Backing::Shared, false).unwrap()
}

/// A child on a private mapping of what was frozen.
fn child(frozen: &Arc<Source>, mib: u64) -> Memory {
    let file = Source::new(frozen.file(), "frozen").unwrap();
    Memory::from_image(&Arc::new(file), mib, Pages::Ordinary, false).unwrap()
}

/// A process that another test has forked just now maps the file too until its exec: it is busy so long.
fn sealed(frozen: Frozen) -> Arc<Source> {
    let mut source = None;
    wait_until("a frozen file that nothing else maps", || {
        match Frozen(Arc::clone(&frozen.0)).seal() {
            Err(MemoryError::Seal(cause)) if cause.kind() == ErrorKind::ResourceBusy => false,
            other => {
                source = Some(other.unwrap());
                true
            }
        }
    });
    source.unwrap()
}

fn word(memory: &Memory, address: u64) -> u64 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

fn set(memory: &Memory, address: u64, value: u64) {
    memory.write(address, &value.to_le_bytes()).unwrap();
}

fn zap_all(memory: &Memory) -> u64 {
    let mut zap = memory.zap();
    let mut steps = 1;
    while !zap.step() {
        steps += 1;
    }
    steps
}

#[test]
fn zap_when_it_goes_on_has_its_time_anew_and_when_given_up_ends() {
    use crate::steps::Steps;
    use std::time::Instant;
    let run = || {
        let memory = shared(3076);
        set(&memory, 5 * PAGE, 7);
        let steps = Steps::default();
        steps.adopt();
        steps.start(1, "readying");
        let begun = steps.now().unwrap().since;
        while Instant::now() <= begun {
            thread::yield_now();
        }
        assert!(memory.zap().run());
        assert!(steps.now().unwrap().since > begun);
        assert!(steps.give_up(1));
        let mut zap = memory.zap();
        assert!(!zap.step());
        assert!(!zap.run());
        assert_eq!(word(&memory, 5 * PAGE), 7);
    };
    thread::spawn(run).join().unwrap();
}

/// Pages of `memory` that are this process's own.
fn own_pages(memory: &Memory) -> u64 {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
    let contents = memory.contents(None);
    let written = contents.write_private(file.as_file(), &STAMP).unwrap();
    // The page of the id is always written.
    written.pages - 1
}

#[test]
fn freeze_when_guest_writes_on_leaves_the_file_and_the_children_alone() {
    let mut parent = shared(3076);
    let places = [
        0,
        5 * PAGE,
        2000 * MIB,
        3072 * MIB - 8,
        HIGH_RAM,
        HIGH_RAM + 3 * MIB,
    ];
    for (value, place) in (1..).zip(places) {
        set(&parent, place, value);
    }
    assert_eq!(zap_all(&parent), 3072 / 16 + 1);
    let frozen = sealed(parent.freeze(None, &STAMP, None).unwrap());
    assert_eq!(own_pages(&parent), 0);

    // Parent and two children: none sees another's writes.
    let children = [child(&frozen, 3076), child(&frozen, 3076)];
    let all = [&parent, &children[0], &children[1]];
    for (value, place) in (1..).zip(places) {
        for (who, memory) in (1..).zip(all) {
            assert_eq!(word(memory, place), value, "{place:#x}");
            set(memory, place, value + 100 * who);
        }
    }
    for (value, place) in (1..).zip(places) {
        for (who, memory) in (1..).zip(all) {
            assert_eq!(word(memory, place), value + 100 * who, "{place:#x}");
        }
        assert_eq!(word(&child(&frozen, 3076), place), value, "{place:#x}");
    }
    // Two places lie in one page each.
    assert_eq!(own_pages(&parent), 6);
    let mut id = [0; 16];
    frozen.read_exact_at(&mut id, STAMP.offset).unwrap();
    assert_eq!(id, STAMP.id);
}

#[test]
fn seal_when_done_refuses_every_change() {
    let mut parent = shared(4);
    let frozen = sealed(parent.freeze(None, &STAMP, None).unwrap());
    let wanted = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    assert!(fcntl_get_seals(frozen.file()).unwrap().contains(wanted));
    assert!(frozen.file().write_all_at(b"x", 0).is_err());
    assert!(frozen.file().set_len(0).is_err());
    assert!(frozen.file().set_len(8 * MIB).is_err());
    parent.write(0, b"x").unwrap();
}

#[test]
fn seal_when_something_still_maps_it_for_writing_refuses_and_the_guest_goes_on() {
    let mut parent = shared(4);
    set(&parent, 0, 7);
    let Base::Shared(other) = parent.base.clone() else {
        panic!("not shared");
    };
    let mut still = Memory::anonymous(4).unwrap();
    map_all(still.ram(), |at| Over::Shared(other.source.file(), at)).unwrap();
    still.base = Base::Shared(other);
    let frozen = parent.freeze(None, &STAMP, None).unwrap();
    assert!(matches!(frozen.seal(), Err(MemoryError::Seal(_))));
    set(&parent, 0, 8);
    assert_eq!((word(&still, 0), word(&parent, 0)), (7, 8));
}

#[test]
fn zap_when_a_thread_writes_all_the_time_loses_nothing_and_after_a_freeze_does_nothing() {
    let mut parent = shared(64);
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let mut late = parent.zap();
    thread::scope(|scope| {
        let ram = parent.ram().clone();
        let (stop, written) = (&stop, &written);
        scope.spawn(move || {
            let mut value = 0;
            while !stop.load(Ordering::Acquire) {
                value += 1;
                let place = value % (64 * MIB / PAGE) * PAGE;
                ram.write_obj(value, GuestAddress(place)).unwrap();
                written.store(value, Ordering::Release);
            }
        });
        // Until the writer has been around twice, and the steps too.
        while written.load(Ordering::Acquire) < 2 * 64 * MIB / PAGE {
            assert_eq!(zap_all(&parent), 4);
        }
        stop.store(true, Ordering::Release);
    });
    let last = written.load(Ordering::Acquire);
    let check = |memory: &Memory| {
        for value in last - 64 * MIB / PAGE + 1..=last {
            let place = value % (64 * MIB / PAGE) * PAGE;
            // One place holds the id instead.
            if place != STAMP.offset {
                assert_eq!(word(memory, place), value);
            }
        }
    };
    check(&parent);
    let frozen = sealed(parent.freeze(None, &STAMP, None).unwrap());
    check(&parent);
    check(&child(&frozen, 64));
    set(&parent, 0, u64::MAX);
    assert!(late.step());
    assert!(parent.zap().step());
    assert_eq!(word(&parent, 0), u64::MAX);
}

#[test]
fn freeze_when_it_is_the_second_has_both_generations_and_the_first_stays() {
    let mut parent = shared(32);
    for page in 0..100 {
        set(&parent, page * PAGE, page + 1);
    }
    let first = sealed(parent.freeze(None, &STAMP, None).unwrap());
    set(&parent, 0, 1000);
    parent.write(PAGE, &[0; 4096]).unwrap();

    let stale = parent.prepare().unwrap().run().unwrap();
    let prepared = parent.prepare().unwrap().run().unwrap();
    // The guest runs while the file is prepared.
    set(&parent, 2 * PAGE, 1002);
    set(&parent, 20 * MIB, 1003);
    let stamp = Stamp {
        id: [2; 16],
        ..STAMP
    };
    let second = sealed(parent.freeze(Some(prepared), &stamp, None).unwrap());
    assert_eq!(own_pages(&parent), 0);
    set(&parent, 3 * PAGE, 1004);

    let (one, two) = (child(&first, 32), child(&second, 32));
    let at = |memory: &Memory| {
        [0, PAGE, 2 * PAGE, 3 * PAGE, 99 * PAGE, 20 * MIB].map(|place| word(memory, place))
    };
    assert_eq!(at(&one), [1, 2, 3, 4, 100, 0]);
    assert_eq!(at(&two), [1000, 0, 1002, 4, 100, 1003]);
    assert_eq!(at(&parent), [1000, 0, 1002, 1004, 100, 1003]);
    assert_eq!(word(&two, STAMP.offset), u64::from_le_bytes([2; 8]));

    // What was prepared before the second fork lacks what has happened since.
    let error = parent.freeze(Some(stale), &stamp, None).unwrap_err();
    assert!(matches!(error, MemoryError::NotPrepared), "{error}");
    let error = parent.freeze(None, &stamp, None).unwrap_err();
    assert!(matches!(error, MemoryError::NotPrepared), "{error}");
    assert_eq!(at(&parent), [1000, 0, 1002, 1004, 100, 1003]);
}

#[test]
fn freeze_when_memory_was_anonymous_or_restored_works_by_copying() {
    let bytes: Vec<u8> = (0..64 * 4096u32).map(|i| (i / 4096 + 1) as u8).collect();
    let kernel = vmm_sys_util::tempfile::TempFile::new().unwrap();
    std::io::Write::write_all(&mut kernel.as_file(), &bytes).unwrap();
    let kernel = Source::new(kernel.as_file(), "kernel").unwrap();
    let mut parent = Memory::anonymous(16).unwrap();
    parent.map_file(&kernel, 0, MIB, 64 * PAGE).unwrap();
    set(&parent, MIB + PAGE, 5);
    set(&parent, 7 * MIB, 6);
    let prepared = parent.prepare().unwrap().run().unwrap();
    let frozen = parent.freeze(Some(prepared), &STAMP, None).unwrap();
    let mut again = child(&sealed(frozen), 16);
    let at = |memory: &Memory| {
        [MIB, MIB + PAGE, MIB + 63 * PAGE, 7 * MIB].map(|place| word(memory, place))
    };
    let page = |number: u8| u64::from_le_bytes([number; 8]);
    assert_eq!(at(&parent), [page(1), 5, page(64), 6]);
    assert_eq!(at(&again), at(&parent));
    set(&again, MIB, 9);
    let prepared = again.prepare().unwrap().run().unwrap();
    let frozen = again.freeze(Some(prepared), &STAMP, None).unwrap();
    let third = child(&sealed(frozen), 16);
    assert_eq!(at(&third), [9, 5, page(64), 6]);
    assert_eq!(at(&parent), [page(1), 5, page(64), 6]);
}

/// In real mode for ever: counts up the words at 0x2000 and 0x8000, and tells port 0x80 each time.
const COUNTER: [u8; 12] = [
    0xff, 0x06, 0x00, 0x20, // inc word [0x2000]
    0xff, 0x06, 0x00, 0x80, // inc word [0x8000]
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xf4, // back
];

#[test]
fn freeze_when_a_vcpu_runs_before_and_after_keeps_its_writes_to_itself() {
    needs!(kvm);
    let mut parent = shared(8);
    parent.write(0x1000, &COUNTER).unwrap();
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    parent.register(&vm, false).unwrap();
    let mut vcpu = vcpu_in_real_mode(&vm);
    let mut run = |times: u64| {
        for _ in 0..times {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x80, _) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    run(10);
    zap_all(&parent);
    run(10);
    assert_eq!((word(&parent, 0x2000), word(&parent, 0x8000)), (20, 20));
    let frozen = sealed(parent.freeze(None, &STAMP, None).unwrap());
    // The slot is the same; the guest goes on where it was, on pages of its own.
    run(5);
    assert_eq!((word(&parent, 0x2000), word(&parent, 0x8000)), (25, 25));
    let child = child(&frozen, 8);
    assert_eq!((word(&child, 0x2000), word(&child, 0x8000)), (20, 20));
    assert_eq!(own_pages(&parent), 2);

    let prepared = parent.prepare().unwrap().run().unwrap();
    run(1);
    let frozen = parent.freeze(Some(prepared), &STAMP, None).unwrap();
    run(1);
    let second = super::tests::child(&sealed(frozen), 8);
    assert_eq!((word(&second, 0x2000), word(&parent, 0x2000)), (26, 27));
    assert_eq!(word(&child, 0x2000), 20);
}
