use super::super::testing::{negotiate, read32, set_queue, write32};
use super::*;
use crate::bus::Registers as _;
use crate::inbox::{Inbox, inbox};

const SIZES: &[u16] = &[256, 64];
const OFFERED: u64 = feature::COMMON | 0b1010;

fn offer() -> Offer {
    Offer {
        device_id: 2,
        features: OFFERED,
        feature_names: |features| format!("{features:#x}"),
        division: Division::whole(SIZES),
        config: ConfigSpace::new().with(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9]),
    }
}

fn registers() -> (Registers, Inbox<DriverMsg>) {
    let (sender, inbox) = inbox(driver_messages(SIZES.len())).unwrap();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(line));
    let registers = Registers::new(
        offer(),
        &RegistersState::default(),
        interrupt,
        sender.into(),
    )
    .unwrap();
    (registers, inbox)
}

/// A device that is active, with its activation taken.
fn active() -> (Registers, Inbox<DriverMsg>) {
    let (registers, inbox) = registers();
    assert!(negotiate(&registers, feature::VERSION_1));
    write32(&registers, reg::STATUS, 15);
    assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
    (registers, inbox)
}

fn reset(registers: &Registers) -> Written {
    registers.write(reg::STATUS, &[0; 4])
}

#[test]
fn identity_when_read_is_the_specifications() {
    let (registers, _inbox) = registers();
    for (offset, value) in [
        (0x000, u32::from_le_bytes(*b"virt")),
        (0x004, 2),
        (0x008, 2),
        (0x034, 256),
        (0x044, 0),
        (0x060, 0),
        (0x070, 0),
        (0x0b0, u32::MAX),
        (0x0b4, u32::MAX),
        (0x0fc, 0),
        (0x0c0, 0),
        (0x014, 0),
        (0x0f8, 0),
    ] {
        assert_eq!(read32(&registers, offset), value, "{offset:#x}");
    }
}

#[test]
fn status_when_written_follows_the_table() {
    // What is written, what Status is afterwards, how many writes were ignored.
    let cases: &[(&[u32], u32, u64)] = &[
        (&[1], 1, 0),
        (&[3], 3, 0),
        (&[1, 3, 3], 3, 0),
        (&[2], 0, 1),
        (&[4], 0, 1),
        (&[15], 0, 1),
        (&[1, 2], 1, 1),
        (&[1, 3, 1], 3, 1),
        (&[1, 3, 7], 3, 1),
        (&[1, 3, 15], 3, 1),
        (&[1, 3, 11, 3], 11, 1),
        (&[1, 3, 11, 15], 15, 0),
        (&[1, 3, 11, 15, 11], 15, 1),
        (&[1, 3, 11, 15, 0x1f], 15, 1),
        (&[1, 3, 0x1_000b], 3, 1),
        (&[0x80], 0x80, 0),
        (&[1, 0x81], 0x81, 0),
        (&[1, 0x81, 0x83], 0x81, 1),
        (&[1, 0x81, 1], 0x81, 1),
        (&[1, 0x81, 0, 1], 1, 0),
        (&[1, 3, 0x43], 3, 0),
        (&[1, 3, 0x4b], 11, 0),
        (&[0xffff_ffff], 0, 1),
        (&[0], 0, 0),
    ];
    for (writes, after, ignored) in cases {
        let (registers, _inbox) = registers();
        for value in *writes {
            if read32(&registers, reg::STATUS) == 3 {
                write32(&registers, reg::DRIVER_FEATURES_SEL, 1);
                write32(&registers, reg::DRIVER_FEATURES, 1);
            }
            let before = registers.ignored();
            write32(&registers, reg::STATUS, *value);
            assert!(registers.ignored() <= before + 1);
        }
        assert_eq!(read32(&registers, reg::STATUS), *after, "{writes:x?}");
        assert_eq!(registers.ignored(), *ignored, "{writes:x?}");
    }
}

#[test]
fn features_when_not_a_subset_or_legacy_are_refused() {
    let (offering, _inbox) = registers();
    let mut offered = 0;
    for page in 0..3 {
        write32(&offering, reg::DEVICE_FEATURES_SEL, page);
        let half = u64::from(read32(&offering, reg::DEVICE_FEATURES));
        offered |= half.checked_shl(32 * page).unwrap_or(0);
    }
    assert_eq!(offered, OFFERED);
    for (features, accepted) in [
        (OFFERED, true),
        (feature::VERSION_1, true),
        (feature::VERSION_1 | 2, true),
        (0, false),
        (OFFERED & !feature::VERSION_1, false),
        // Of the transport; what is of this kind of device is taken for not accepted.
        (OFFERED | 1 << 33, false),
        (u64::MAX, false),
        (OFFERED | 1, true),
        (OFFERED | 1 << 21 | 1 << 63, true),
    ] {
        let (registers, _inbox) = registers();
        assert_eq!(negotiate(&registers, features), accepted, "{features:#x}");
        if !accepted {
            // The driver may think again.
            for (page, half) in [(0, 0), (1, 1)] {
                write32(&registers, reg::DRIVER_FEATURES_SEL, page);
                write32(&registers, reg::DRIVER_FEATURES, half);
            }
            write32(&registers, reg::STATUS, 11);
            assert_eq!(read32(&registers, reg::STATUS), 11);
        }
    }
}

#[test]
fn features_when_accepted_are_frozen() {
    let (registers, inbox) = registers();
    assert!(negotiate(&registers, feature::VERSION_1 | 2));
    write32(&registers, reg::DRIVER_FEATURES_SEL, 0);
    write32(&registers, reg::DRIVER_FEATURES, 8);
    assert_eq!(registers.ignored(), 1);
    write32(&registers, reg::STATUS, 15);
    let Some(DriverMsg::Activate { features, .. }) = inbox.next() else {
        panic!("no activation");
    };
    assert_eq!(features, feature::VERSION_1 | 2);
}

/// Unikraft's driver of network cards accepts VIRTIO_NET_F_GUEST_ANNOUNCE always.
#[test]
fn features_of_the_device_when_not_offered_are_taken_for_not_accepted() {
    let (registers, inbox) = registers();
    assert!(negotiate(&registers, OFFERED | 1 << 21));
    write32(&registers, reg::STATUS, 15);
    let Some(DriverMsg::Activate { features, .. }) = inbox.next() else {
        panic!("no activation");
    };
    assert_eq!(features, OFFERED);
}

#[test]
fn queues_when_written_outside_their_time_stay() {
    let layout = QueueLayout {
        size: 128,
        ready: true,
        descriptors: 0x1_2345_6780,
        avail: 0x2_0000_1000,
        used: 0x3_0000_2000,
    };
    let (registers, inbox) = registers();
    set_queue(&registers, 0, &layout);
    assert_eq!(read32(&registers, reg::QUEUE_READY), 0);
    assert!(negotiate(&registers, feature::VERSION_1));
    set_queue(&registers, 1, &layout);
    assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 64);
    assert_eq!(read32(&registers, reg::QUEUE_READY), 1);
    for none in [2, 3, 0xffff_ffff] {
        set_queue(&registers, none, &layout);
        assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 0);
        assert_eq!(read32(&registers, reg::QUEUE_READY), 0);
    }
    write32(&registers, reg::STATUS, 15);
    let changed = QueueLayout {
        ready: false,
        ..QueueLayout::default()
    };
    set_queue(&registers, 1, &changed);
    assert_eq!(read32(&registers, reg::QUEUE_READY), 1);
    let Some(DriverMsg::Queue {
        index: 1,
        layout: sent,
    }) = inbox.next()
    else {
        panic!("no queue");
    };
    assert_eq!(sent, layout);
    assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
}

#[test]
fn registers_when_accessed_oddly_answer_zeros_and_stay() {
    let (registers, _inbox) = registers();
    for len in [1, 2, 3, 5, 8, 64] {
        for offset in 0..0x100 {
            let mut data = vec![0xee; len];
            registers.read(offset, &mut data);
            assert_eq!(data, vec![0; len], "{offset:#x} {len}");
            assert!(matches!(registers.write(offset, &data), Written::Done));
        }
    }
    for offset in [1, 2, 3, 0x06e, 0x071, 0x0fd, 0x0ff] {
        assert_eq!(read32(&registers, offset), 0, "{offset:#x}");
        write32(&registers, offset, 1);
    }
    assert_eq!(read32(&registers, reg::STATUS), 0);
    assert!(registers.ignored() > 0);
}

#[test]
fn config_when_read_at_any_size_is_itself_then_zeros() {
    let (registers, _inbox) = registers();
    for (offset, data) in [
        (0x100, vec![1]),
        (0x101, vec![2, 3]),
        (0x100, vec![1, 2, 3, 4]),
        (0x101, vec![2, 3, 4, 5, 6, 7, 8, 9]),
        (0x107, vec![8, 9, 0, 0]),
        (0x13f, vec![0, 0]),
        (0xffc, vec![0; 4]),
        (u64::MAX, vec![0; 8]),
    ] {
        let mut read = vec![0xee; data.len()];
        registers.read(offset, &mut read);
        assert_eq!(read, data, "{offset:#x}");
    }
    assert!(matches!(registers.write(0x100, &[9, 9]), Written::Done));
    let mut read = [0; 2];
    registers.read(0x100, &mut read);
    assert_eq!(read, [1, 2]);
}

#[test]
fn set_config_when_driver_is_there_tells_it() {
    let config = ConfigSpace::new().with(0, &[7]);
    let (idle, _inbox) = registers();
    idle.set_config(config);
    assert_eq!(read32(&idle, reg::INTERRUPT_STATUS), 0);
    assert_eq!(read32(&idle, reg::CONFIG_GENERATION), 1);
    let (registers, _inbox) = active();
    registers.set_config(config);
    assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 2);
    let mut read = [0];
    registers.read(0x100, &mut read);
    assert_eq!(read, [7]);
    write32(&registers, reg::INTERRUPT_ACK, 2);
    assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 0);
}

#[test]
fn reset_when_never_active_is_done_at_once() {
    let (registers, inbox) = registers();
    assert!(negotiate(&registers, feature::VERSION_1));
    write32(&registers, reg::QUEUE_SEL, 1);
    assert!(matches!(reset(&registers), Written::Done));
    assert!(inbox.next().is_none());
    assert_eq!(read32(&registers, reg::STATUS), 0);
    assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 256);
}

#[test]
fn interrupt_status_when_it_is_the_first_thing_read_after_a_reset_is_zero() {
    let (registers, inbox) = active();
    registers.interrupt().used_buffers();
    let Written::After(ticket) = reset(&registers) else {
        panic!("an active device is reset by its worker");
    };
    drop(inbox.next());
    assert!(ticket.is_done());
    assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 0);
}

#[test]
fn reset_when_active_is_done_when_the_worker_says_so() {
    let (registers, inbox) = active();
    registers.interrupt().used_buffers();
    registers.interrupt().demand_reset();
    assert_eq!(read32(&registers, reg::STATUS), 0x4f);
    let Written::After(first) = reset(&registers) else {
        panic!("did not wait");
    };
    // A second vCPU does the same; a third goes on as if nothing were.
    let Written::After(second) = reset(&registers) else {
        panic!("did not wait");
    };
    write32(&registers, reg::STATUS, 1);
    write32(&registers, reg::QUEUE_SEL, 1);
    assert_eq!(read32(&registers, reg::STATUS), 0x4f);
    assert!(!first.is_done() && !second.is_done());

    let Some(DriverMsg::Reset(completer)) = inbox.next() else {
        panic!("no reset");
    };
    drop(completer);
    assert!(first.is_done() && !second.is_done());
    assert_eq!(read32(&registers, reg::STATUS), 0);
    assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 0);
    // The late one comes before the new activation, and so does it no harm.
    assert!(negotiate(&registers, feature::VERSION_1));
    write32(&registers, reg::STATUS, 15);
    assert!(matches!(inbox.next(), Some(DriverMsg::Reset(_))));
    assert!(second.is_done());
    assert_eq!(read32(&registers, reg::STATUS), 15);
    assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
}

#[test]
fn worker_when_gone_leaves_no_one_waiting() {
    let (registers, inbox) = active();
    drop(inbox);
    assert!(matches!(reset(&registers), Written::Done));
    assert_eq!(read32(&registers, reg::STATUS), 0);
    assert!(negotiate(&registers, feature::VERSION_1));
    write32(&registers, reg::STATUS, 15);
    assert_eq!(read32(&registers, reg::STATUS), 0x4f);
    assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 2);
}

#[test]
fn notify_when_no_ioeventfd_took_it_kicks() {
    let (registers, _inbox) = registers();
    write32(&registers, reg::QUEUE_NOTIFY, 1);
    assert_eq!(registers.kicks()[1].read().unwrap(), 1);
    write32(&registers, reg::QUEUE_NOTIFY, 2);
    write32(&registers, reg::QUEUE_NOTIFY, u32::MAX);
    assert_eq!(registers.ignored(), 2);
    assert!(registers.kicks()[0].read().is_err());
}
