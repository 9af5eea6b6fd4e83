use crate::archive::{self, Entry, Kind};
use crate::fields::{self, Fields};
use crate::*;

/// Pseudo-random numbers (xorshift64*), whose seed a failed test prints.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.next() as u8).collect()
    }
}

fn seed() -> u64 {
    let seed = match std::env::var("MAYFLY_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => u64::from(std::process::id()) * 7919 + 1,
    };
    println!("MAYFLY_SEED={seed}");
    seed
}

fn all_kinds<'a>(body: &'a [u8], number: u32) -> Vec<Message<'a>> {
    let process = number;
    vec![
        Message::Data {
            process,
            stream: Stream::Output,
            bytes: body,
        },
        Message::End {
            process,
            stream: Stream::Error,
        },
        Message::Credit {
            process,
            stream: Stream::Input,
            bytes: number,
        },
        Message::Setup(body),
        Message::Start { process, body },
        Message::Signal {
            process,
            number: 15,
        },
        Message::Size {
            process,
            rows: 24,
            columns: 80,
        },
        Message::Started { process },
        Message::Exited {
            process,
            status: Status::Exited(7),
        },
        Message::Exited {
            process,
            status: Status::Killed(9),
        },
        Message::Failed(&body[..body.len().min(TEXT_MAX)]),
        Message::Hello,
        Message::Ready,
        Message::Request(body),
        Message::Answer(body),
    ]
}

#[test]
fn messages_of_every_kind_come_out_as_they_went_in() {
    let body: Vec<u8> = (0..2000).map(|n| n as u8).collect();
    let sent = all_kinds(&body, 0x0102_0304);
    let mut frame = Frame::new();
    for message in &sent {
        assert!(frame.push(message), "{message:?}");
    }
    let count = frame.push_data(9, Stream::Error, 5, |place| {
        place.copy_from_slice(b"12345");
        Ok::<_, ()>(3)
    });
    assert_eq!(count, Ok(3));
    let bytes = frame.finish(77).to_vec();
    assert_eq!(frame::length(&bytes), Some(bytes.len()));
    let padded = [&bytes[..], &[0xff; 60]].concat();
    let got: Vec<_> = messages(&padded, 77).unwrap().map(Result::unwrap).collect();
    assert_eq!(&got[..sent.len()], &sent[..]);
    let last = Message::Data {
        process: 9,
        stream: Stream::Error,
        bytes: b"123",
    };
    assert_eq!(got[sent.len()..], [last]);
}

#[test]
fn frame_that_is_lost_or_repeated_or_of_another_version_is_refused() {
    let mut frame = Frame::new();
    assert!(frame.push(&Message::Started { process: 1 }));
    let bytes = frame.finish(5).to_vec();
    for expected in [4, 6, u32::MAX] {
        let error = messages(&bytes, expected).unwrap_err();
        assert_eq!(error, Malformed::Sequence { expected, found: 5 });
    }
    let mut other = bytes.clone();
    other[0] = VERSION + 1;
    assert_eq!(
        messages(&other, 5).unwrap_err(),
        Malformed::Version(VERSION + 1)
    );
    let mut other = bytes.clone();
    other[1] = 1;
    assert_eq!(messages(&other, 5).unwrap_err(), Malformed::Reserved);
    for end in 0..bytes.len() {
        assert!(messages(&bytes[..end], 5).is_err(), "{end}");
    }
}

#[test]
fn frame_takes_no_more_than_fits_the_largest() {
    let mut frame = Frame::new();
    let big = vec![1; DATA_MAX];
    let data = Message::Data {
        process: 1,
        stream: Stream::Input,
        bytes: &big,
    };
    assert!(frame.push(&data));
    assert!(!frame.push(&data));
    let more = frame.push_data(1, Stream::Input, usize::MAX, |place| {
        Ok::<_, ()>(place.len())
    });
    assert_eq!(more.unwrap(), FRAME_MAX - HEADER - 12 - DATA_MAX - 12);
    assert_eq!(frame.room(), 0);
    assert_eq!(frame.finish(0).len(), FRAME_MAX);
    let long = vec![1; DATA_MAX + 1];
    let data = Message::Data {
        process: 1,
        stream: Stream::Input,
        bytes: &long,
    };
    frame.clear();
    assert!(!frame.push(&data) && frame.is_empty());
}

#[test]
fn message_that_is_malformed_is_named() {
    let mut frame = Frame::new();
    assert!(frame.push(&Message::Exited {
        process: 1,
        status: Status::Exited(0)
    }));
    let good = frame.finish(0)[HEADER..].to_vec();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Message::decode(&bytes).map(drop).unwrap_err()
    };
    assert_eq!(with(0, 0), Malformed::Kind(0));
    assert_eq!(with(0, 200), Malformed::Kind(200));
    assert_eq!(with(1, 1), Malformed::Stream(1));
    assert_eq!(with(2, 1), Malformed::Reserved);
    assert_eq!(with(8, 3), Malformed::Short);
    assert_eq!(with(8, 1), Malformed::Length(1));
    assert_eq!(with(11, 0xff), Malformed::Length(0xff00_0002));
    assert_eq!(with(12, 2), Malformed::Field(2));
    let mut data = good.clone();
    (data[0], data[1]) = (1, 3);
    assert_eq!(Message::decode(&data).unwrap_err(), Malformed::Stream(3));
}

#[test]
fn random_bytes_are_decoded_or_refused_and_never_more_than_they_are() {
    let mut random = Random(seed());
    for _ in 0..50_000 {
        let mut bytes = random.bytes(200);
        if random.below(2) == 0 && bytes.len() >= HEADER {
            // A header that is right, so that what follows is looked at.
            let length = (bytes.len() - HEADER) as u16;
            bytes[..2].copy_from_slice(&[VERSION, 0]);
            bytes[2..4].copy_from_slice(&length.to_le_bytes());
            bytes[4..8].fill(0);
            for at in (HEADER..bytes.len()).step_by(12 + random.below(9) as usize) {
                bytes[at] = 1 + random.below(12) as u8;
                for zero in at + 1..bytes.len().min(at + 4) {
                    bytes[zero] = 0;
                }
                for zero in at + 9..bytes.len().min(at + 12) {
                    bytes[zero] = 0;
                }
            }
        }
        let Ok(found) = messages(&bytes, 0) else {
            continue;
        };
        let mut total = 0;
        for message in found {
            match message {
                Ok(Message::Data { bytes, .. }) => total += 12 + bytes.len(),
                Ok(Message::Start { body, .. } | Message::Setup(body)) => {
                    total += 12 + body.len();
                    Fields(body).for_each(|field| {
                        if let Ok(field) = field {
                            assert!(field.bytes().len() < body.len());
                            let _ = field.text();
                        }
                    });
                }
                Ok(_) => total += 12,
                Err(_) => break,
            }
        }
        assert!(total + HEADER <= bytes.len());
    }
}

#[test]
fn random_messages_in_random_frames_come_out_as_they_went_in() {
    let mut random = Random(seed());
    let mut sequence: u32 = u32::MAX - 20;
    for _ in 0..500 {
        let bodies: Vec<Vec<u8>> = (0..20).map(|_| random.bytes(9000)).collect();
        let mut frame = Frame::new();
        let mut sent = Vec::new();
        for body in &bodies {
            let kinds = all_kinds(body, random.next() as u32);
            let message = kinds[random.below(kinds.len() as u64) as usize];
            if frame.push(&message) {
                sent.push(message);
            }
        }
        let bytes = frame.finish(sequence);
        let got: Vec<_> = messages(bytes, sequence)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(got, sent);
        sequence = sequence.wrapping_add(1);
    }
}

#[test]
fn fields_come_out_with_their_tags_and_zero_bytes_in_texts_are_refused() {
    let mut body = Vec::new();
    for (tag, value) in [
        (fields::ARGUMENT, &b"sh"[..]),
        (fields::USER, b"a\0b"),
        (fields::USER, b""),
    ] {
        body.extend(fields::header(tag, value).unwrap());
        body.extend(value);
        body.push(0);
    }
    let found: Vec<_> = Fields(&body).map(Result::unwrap).collect();
    assert_eq!(found[0].text().unwrap(), c"sh");
    assert_eq!(
        (found[1].tag, found[1].bytes()),
        (fields::USER, &b"a\0b"[..])
    );
    assert_eq!(found[1].text(), Err(Malformed::Field(fields::USER)));
    assert_eq!(found[2].bytes(), b"");
    for end in 1..body.len() {
        let last = Fields(&body[..end]).last().unwrap();
        let is_whole = end == 6 || end == 13;
        assert_eq!(last.is_ok(), is_whole, "{end}");
    }
    assert!(fields::header(1, &vec![0; 70_000]).is_none());
    let without_zero = [fields::USER, 1, 0, b'x', b'y'];
    assert_eq!(
        Fields(&without_zero).next(),
        Some(Err(Malformed::Field(fields::USER)))
    );
}

#[test]
fn credit_is_never_more_than_a_window_on_either_side() {
    let mut sender = Sender::new(100);
    sender.sent(60);
    assert_eq!(sender.left(), 40);
    assert_eq!(sender.grant(61), Err(Malformed::Credit));
    assert_eq!(sender.grant(u32::MAX), Err(Malformed::Credit));
    sender.grant(60).unwrap();
    assert_eq!(sender.left(), 100);
    let mut receiver = Receiver::new(100);
    receiver.received(100).unwrap();
    assert_eq!(receiver.received(1), Err(Malformed::Credit));
    assert_eq!(receiver.received(usize::MAX), Err(Malformed::Credit));
    receiver.passed_on(49);
    assert_eq!(receiver.due(), None);
    receiver.passed_on(1);
    assert_eq!(receiver.due(), Some(50));
    receiver.given(50);
    assert_eq!(receiver.due(), None);
    receiver.received(50).unwrap();
    assert!(receiver.received(1).is_err());
}

#[test]
fn random_traffic_keeps_within_the_window_and_never_stops_for_good() {
    let mut random = Random(seed());
    let (mut sender, mut receiver) = (Sender::new(OUTPUT_WINDOW), Receiver::new(OUTPUT_WINDOW));
    let (mut held, mut moved) = (0_usize, 0_usize);
    while moved < 50_000_000 {
        let count = (random.below(DATA_MAX as u64 + 1) as usize).min(sender.left());
        sender.sent(count);
        receiver.received(count).unwrap();
        held += count;
        assert!(held <= OUTPUT_WINDOW as usize);
        let count = random.below(held as u64 + 1) as usize;
        receiver.passed_on(count);
        held -= count;
        moved += count;
        if let Some(credit) = receiver.due() {
            receiver.given(credit);
            sender.grant(credit).unwrap();
        }
        assert!(sender.left() > 0 || held > 0);
    }
}

#[test]
fn entries_of_an_archive_come_out_as_they_went_in_or_are_refused() {
    for entry in [
        Entry {
            kind: Kind::File,
            name: 255,
            mode: 0o644,
            size: u64::MAX,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Folder,
            name: 1,
            mode: 0o700,
            size: 0,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Link,
            name: 3,
            mode: 0o777,
            size: 4095,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Place,
            name: 0,
            mode: 0,
            size: 4095,
            owner: (0, 0),
        },
        Entry::bare(Kind::Leave),
        Entry::bare(Kind::End),
    ] {
        assert_eq!(Entry::decode(&entry.encode()), Ok(entry));
    }
    for entry in [
        Entry {
            kind: Kind::File,
            name: 256,
            mode: 0,
            size: 0,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::File,
            name: 0,
            mode: 0,
            size: 0,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Link,
            name: 1,
            mode: 0,
            size: 4096,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Link,
            name: 1,
            mode: 0,
            size: 0,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Folder,
            name: 1,
            mode: 0,
            size: 1,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::Leave,
            name: 1,
            mode: 0,
            size: 0,
            owner: (1, u32::MAX),
        },
        Entry {
            kind: Kind::End,
            name: 0,
            mode: 0,
            size: 1,
            owner: (1, u32::MAX),
        },
        Entry::bare(Kind::Place),
        Entry {
            size: 4096,
            ..Entry::bare(Kind::Place)
        },
    ] {
        assert!(Entry::decode(&entry.encode()).is_err(), "{entry:?}");
    }
    let mut random = Random(seed());
    for _ in 0..20_000 {
        let mut bytes = [0; archive::HEADER];
        bytes.fill_with(|| random.next() as u8 & if random.below(2) == 0 { 7 } else { 0xff });
        if let Ok(entry) = Entry::decode(&bytes) {
            assert_eq!(entry.encode(), bytes);
        }
    }
    for (name, expected) in [
        ("a", true),
        ("..a", true),
        ("", false),
        (".", false),
        ("..", false),
        ("a/b", false),
        ("a\0", false),
    ] {
        assert_eq!(archive::is_name(name.as_bytes()), expected, "{name:?}");
    }
}
