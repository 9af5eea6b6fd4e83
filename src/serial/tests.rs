use super::clients::CLIENTS;
use super::sink::CHUNK;
use super::*;
use crate::bus::Registers;
use crate::inbox::{Sender, inbox};
use crate::sys::fd;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::tempdir::TempDir;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_RECEIVED: u8 = 1;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const LOOPBACK: u8 = 0x10;

struct Rig {
    port: Arc<SerialPort>,
    /// The interrupt line.
    raised: EventFd,
    messages: Sender<SerialMessage>,
    events: Inbox<SerialEvent>,
    type_in: File,
    screen: File,
}

fn rig() -> (Rig, Console) {
    rig_with(None, None)
}

fn rig_with(limit: Option<TokenBucket>, socket: Option<UnixListener>) -> (Rig, Console) {
    rig_in(&UartState::default(), limit, socket)
}

fn rig_in(
    uart: &UartState,
    limit: Option<TokenBucket>,
    socket: Option<UnixListener>,
) -> (Rig, Console) {
    let (input, type_in) = fd::pipe().unwrap();
    let (screen, output) = fd::pipe().unwrap();
    let (messages, inbox_) = inbox(4).unwrap();
    let (sender, events) = inbox::<SerialEvent>(4).unwrap();
    let streams = Streams {
        input: Some(input),
        output,
        limit,
        socket,
    };
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let raised = line.try_clone().unwrap();
    let (port, console) = console(uart, line, streams, inbox_, sender.outbox()).unwrap();
    let rig = Rig {
        port,
        raised,
        messages,
        events,
        type_in,
        screen,
    };
    (rig, console)
}

fn read_soon(file: &mut File, len: usize) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut got = Vec::new();
    while got.len() < len && Instant::now() < deadline {
        let mut bytes = [0; 256];
        match file.read(&mut bytes) {
            Ok(n) => got.extend_from_slice(&bytes[..n]),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    got
}

fn guest_reads(port: &SerialPort, len: usize) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut got = Vec::new();
    while got.len() < len && Instant::now() < deadline {
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        if status[0] & 1 == 0 {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        let mut byte = [0];
        port.read(DATA, &mut byte);
        got.push(byte[0]);
    }
    got
}

#[test]
fn console_when_guest_and_user_talk_carries_both_ways() {
    let (mut rig, console) = rig();
    thread::spawn(move || console.run());
    for byte in b"hello" {
        let _ = rig.port.write(DATA, &[*byte]);
    }
    assert_eq!(read_soon(&mut rig.screen, 5), b"hello");

    // More than a FIFO's worth: held back until the guest reads.
    let typed: Vec<u8> = (0..200).collect();
    rig.type_in.write_all(&typed).unwrap();
    assert_eq!(guest_reads(&rig.port, typed.len()), typed);
}

#[test]
fn console_when_output_is_unread_loses_bytes_and_not_time() {
    let (rig, console) = rig();
    let counters = console.counters();
    thread::spawn(move || console.run());
    // Two pipes and the buffer between them hold less than this.
    for n in 0..400_000u32 {
        let _ = rig.port.write(DATA, &[n as u8]);
    }
    assert!(counters.overrun.get() > 0);
    assert_eq!(counters.overrun.get() + counters.written.get(), 400_000);
    rig.messages.send(SerialMessage::Finish).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while rig.events.next().is_none() {
        assert!(Instant::now() < deadline, "finishing waits for the reader");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn console_when_its_reader_is_behind_at_the_end_writes_all_of_it() {
    let (mut rig, mut console) = rig();
    let counters = console.counters();
    // This reader is slow, but it reads.
    console.last_patience = 20_000;
    thread::spawn(move || console.run());
    // More than the reader's pipe and the buffer hold, and less than the guest's pipe holds besides.
    let said: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    let takes = |byte: u8| {
        let lost = counters.overrun.get();
        let _ = rig.port.write(DATA, &[byte]);
        counters.overrun.get() == lost
    };
    for byte in &said {
        while !takes(*byte) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    rig.messages.send(SerialMessage::Finish).unwrap();
    let mut seen = Vec::new();
    while seen.len() + (64 << 10) + CHUNK < said.len() {
        assert!(
            rig.events.next().is_none(),
            "{} bytes were seen",
            seen.len()
        );
        thread::sleep(Duration::from_millis(1));
        seen.extend(read_soon(&mut rig.screen, 256));
    }
    seen.extend(read_soon(&mut rig.screen, said.len() - seen.len()));
    assert!(seen == said);
    let deadline = Instant::now() + Duration::from_secs(120);
    while rig.events.next().is_none() {
        assert!(Instant::now() < deadline, "all is written");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn console_when_reader_is_gone_counts_the_bytes() {
    let (rig, console) = rig();
    let counters = console.counters();
    drop(rig.screen);
    thread::spawn(move || console.run());
    // More than one: a program that another test starts just now may hold a copy of the screen until its
    // exec. Fewer than a pipe holds.
    for _ in 0..60_000 {
        let _ = rig.port.write(DATA, b"x");
        if counters.lost.get() > 0 {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no byte is lost");
}

#[test]
fn input_while_the_uart_loops_back_is_kept() {
    let (mut rig, console) = rig();
    let _ = rig.port.write(MODEM_CONTROL, &[LOOPBACK]);
    thread::spawn(move || console.run());
    rig.type_in.write_all(b"kept").unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while rig.port.room() == uart::LINE {
        assert!(Instant::now() < deadline, "the UART takes it");
        thread::sleep(Duration::from_millis(1));
    }
    let _ = rig.port.write(MODEM_CONTROL, &[0]);
    assert_eq!(guest_reads(&rig.port, 4), b"kept");
}

#[test]
fn console_when_restored_has_what_was_typed_and_goes_on() {
    let (mut rig, console) = rig();
    thread::spawn(move || console.run());
    let typed: Vec<u8> = (0..100).collect();
    rig.type_in.write_all(&typed).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while rig.port.room() > 0 {
        assert!(Instant::now() < deadline, "the UART takes it");
        thread::sleep(Duration::from_millis(1));
    }
    let _ = rig.port.write(INTERRUPT_ENABLE, &[INTERRUPT_RECEIVED]);
    rig.raised.read().unwrap();
    let state = rig.port.save();

    let (mut restored, console) = rig_in(&state, None, None);
    assert!(
        restored.raised.read().is_err(),
        "not before it is asked for"
    );
    restored.port.raise_again();
    restored.raised.read().unwrap();
    thread::spawn(move || console.run());
    restored.type_in.write_all(b"more").unwrap();
    let expected = [&typed[..uart::LINE], b"more"].concat();
    assert_eq!(guest_reads(&restored.port, expected.len()), expected);
    let _ = restored.raised.read();
    restored.port.raise_again();
    assert!(restored.raised.read().is_err(), "all is read");
    let _ = restored.port.write(DATA, b"x");
    assert_eq!(read_soon(&mut restored.screen, 1), b"x");
}

#[test]
fn console_when_its_state_is_none_that_a_uart_can_be_in_is_refused() {
    let (_, output) = fd::pipe().unwrap();
    let (_messages, inbox_) = inbox(4).unwrap();
    let (sender, _events) = inbox::<SerialEvent>(4).unwrap();
    let streams = Streams {
        input: None,
        output,
        limit: None,
        socket: None,
    };
    let state = UartState {
        line: vec![0; uart::LINE + 1],
        ..UartState::default()
    };
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let made = console(&state, line, streams, inbox_, sender.outbox());
    let error = made.map(drop).unwrap_err().to_string();
    assert!(error.contains("bytes in line: 65"), "{error}");
}

#[test]
fn input_counters_count_what_the_guest_read_and_nothing_else() {
    let (mut rig, console) = rig();
    let counters = console.counters();
    assert_eq!(counters.read.get(), 0);
    thread::spawn(move || console.run());
    rig.type_in.write_all(b"abc").unwrap();
    assert_eq!(guest_reads(&rig.port, 3), b"abc");
    // There is nothing more to read.
    rig.port.read(DATA, &mut [0]);
    assert_eq!(counters.read.get(), 3);
}

#[test]
fn registers_when_accessed_by_odd_sizes_answer() {
    let (rig, _console) = rig();
    let mut wide = [0xaa; 8];
    rig.port.read(LINE_STATUS, &mut wide);
    assert_eq!(wide[1..], [0; 7]);
    assert_eq!(wide[0] & 0x60, 0x60);
    rig.port.read(LINE_STATUS, &mut []);
    let _ = rig.port.write(LINE_STATUS, &[]);
    let _ = rig.port.write(u64::MAX, &[1]);
}

fn socket(name: &str) -> (TempDir, UnixListener, std::path::PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join(name);
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    (folder, listener, path)
}

fn write_all(port: &SerialPort, text: &[u8]) {
    for byte in text {
        let _ = port.write(DATA, &[*byte]);
    }
}

/// What a client reads until it has `len` bytes.
fn client_reads(client: &mut UnixStream, len: usize) -> Vec<u8> {
    client
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    let mut got = vec![0; len];
    client.read_exact(&mut got).unwrap();
    got
}

/// A client that is served, once there is a place: that of one before it is free when the
/// console has seen its end.
fn served_client(path: &std::path::Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let mut client = UnixStream::connect(path).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        let mut byte = [0];
        if matches!(client.read(&mut byte), Ok(1)) {
            assert_eq!(&byte, b"x");
            return client;
        }
        assert!(Instant::now() < deadline, "no place becomes free");
    }
}

#[test]
fn clients_when_they_come_late_see_what_was_and_type() {
    let (_folder, listener, path) = socket("console");
    let (mut rig, console) = rig_with(None, Some(listener));
    thread::spawn(move || console.run());
    write_all(&rig.port, b"before ");
    assert_eq!(read_soon(&mut rig.screen, 7), b"before ");
    let mut one = UnixStream::connect(&path).unwrap();
    assert_eq!(client_reads(&mut one, 7), b"before ");
    write_all(&rig.port, b"after");
    assert_eq!(client_reads(&mut one, 5), b"after");
    assert_eq!(read_soon(&mut rig.screen, 5), b"after");
    let mut two = UnixStream::connect(&path).unwrap();
    assert_eq!(client_reads(&mut two, 12), b"before after");

    let typed: Vec<u8> = (0..200).collect();
    one.write_all(&typed).unwrap();
    // It goes; what it typed is not lost.
    drop(one);
    assert_eq!(guest_reads(&rig.port, typed.len()), typed);
    two.write_all(b"two").unwrap();
    two.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest_reads(&rig.port, 3), b"two");
    write_all(&rig.port, b"!");
    assert_eq!(client_reads(&mut two, 1), b"!");
    rig.type_in.write_all(b"stdin").unwrap();
    assert_eq!(guest_reads(&rig.port, 5), b"stdin");
}

#[test]
fn clients_when_too_many_come_and_go_are_served_four_at_a_time() {
    let (_folder, listener, path) = socket("console");
    let (rig, console) = rig_with(None, Some(listener));
    thread::spawn(move || console.run());
    write_all(&rig.port, b"x");
    for _ in 0..50 {
        let all: Vec<_> = (0..CLIENTS).map(|_| served_client(&path)).collect();
        let mut turned_away = UnixStream::connect(&path).unwrap();
        assert_eq!(turned_away.read(&mut [0]).unwrap_or(0), 0);
        drop(all);
    }
}

#[test]
fn clients_that_have_gone_give_way_also_while_nothing_reads_what_they_typed() {
    let (_folder, listener, path) = socket("console");
    let (rig, console) = rig_with(None, Some(listener));
    thread::spawn(move || console.run());
    write_all(&rig.port, b"x");
    for _ in 0..CLIENTS {
        let mut client = served_client(&path);
        client.write_all(&[b'y'; 200]).unwrap();
    }
    served_client(&path);
}

#[test]
fn clients_when_slow_lose_bytes_and_hold_nobody_up() {
    let (_folder, listener, path) = socket("console");
    let (rig, console) = rig_with(None, Some(listener));
    let counters = console.counters();
    thread::spawn(move || console.run());
    let mut slow = UnixStream::connect(&path).unwrap();
    // Neither it nor the screen is read.
    let deadline = Instant::now() + Duration::from_secs(120);
    let has_lost = || counters.skipped.get() > 0 && counters.lost.get() > 0;
    while !has_lost() {
        assert!(Instant::now() < deadline, "nothing is lost");
        for n in 0..4096u32 {
            let _ = rig.port.write(DATA, &[b'a' + (n % 26) as u8]);
        }
        thread::sleep(Duration::from_micros(200));
    }
    rig.messages.send(SerialMessage::Finish).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while rig.events.next().is_none() {
        assert!(Instant::now() < deadline, "finishing waits for the reader");
        thread::sleep(Duration::from_millis(1));
    }
    // It reads on, from where it can.
    let _ = client_reads(&mut slow, 1000);
}

#[test]
fn output_when_limited_is_dropped_and_counted() {
    let bucket = TokenBucket::new(1000, 0, 3_600_000_000);
    let (mut rig, console) = rig_with(bucket, None);
    let counters = console.counters();
    thread::spawn(move || console.run());
    write_all(&rig.port, &[b'x'; 3000]);
    assert_eq!(read_soon(&mut rig.screen, 1000).len(), 1000);
    let deadline = Instant::now() + Duration::from_secs(120);
    while counters.limited.get() < 2000 {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    let mut more = [0; 10];
    assert!(
        rig.screen.read(&mut more).is_err(),
        "1000 bytes were allowed"
    );
    assert_eq!(counters.limited.get(), 2000);
}
