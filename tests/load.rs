//! Many clients at once, while a guest runs and writes to its disk: no request is lost, answers
//! keep their order, and a client that stalls delays no other.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::{Api, Folder, Monitor, PATIENCE, needs, read_response};

const CLIENTS: usize = 200;
const REQUESTS: usize = 10_000;

/// A guest that writes to its disk all the time.
fn busy_guest(folder: &Folder) -> (Monitor, Api) {
    let disk = folder.disk("disk", 4 << 20);
    // Longer than any of these tests; the monitor is killed at its end.
    let words = "blkinfo:0,blkbench:0:4096:100m:8:randwrite";
    let config = common::probe_vm_with_disks(words, &[&disk]);
    let (monitor, api) = Monitor::boot_with_api(folder, &config);
    monitor.expect("blkinfo:0 ok");
    (monitor, api)
}

fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            // The queue of those who knock is full for a moment.
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A request that its answer can be told by: a path that is not there.
fn send_numbered(stream: &mut UnixStream, numbers: impl Iterator<Item = usize>) {
    let requests: String = numbers
        .map(|n| format!("GET /nobody{n} HTTP/1.1\r\n\r\n"))
        .collect();
    stream.write_all(requests.as_bytes()).unwrap();
}

fn expect_numbered(stream: &mut UnixStream, n: usize) {
    let (status, body) = read_response(stream);
    assert!(
        status == 400 && body.contains(&format!("/nobody{n}.")),
        "{n}: {status} {body}"
    );
}

#[test]
fn requests_when_200_clients_ask_at_once_are_all_answered() {
    needs!(kvm);
    let folder = Folder::new();
    let (mut monitor, api) = busy_guest(&folder);
    // These two stay for ever: one in the middle of its request, one that takes no answer.
    let mut silent = connect(&api.0);
    silent
        .write_all(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
        .unwrap();
    let mut deaf = connect(&api.0);
    deaf.set_nonblocking(true).unwrap();
    while deaf
        .write(&b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(64))
        .is_ok()
    {}

    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let mut stream = connect(&api.0);
            thread::spawn(move || {
                let mut answered = 0;
                for turn in 0..REQUESTS / CLIENTS {
                    // Some ask control and wait, some fill the pipe first.
                    if client % 2 == 0 {
                        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                        let (status, body) = read_response(&mut stream);
                        assert!(status == 200 && body.contains("Running"), "{status} {body}");
                    } else {
                        if turn % 10 == 0 {
                            send_numbered(&mut stream, turn..turn + 10);
                        }
                        expect_numbered(&mut stream, turn);
                    }
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    let answered: usize = clients.into_iter().map(|c| c.join().unwrap()).sum();
    assert_eq!(answered, REQUESTS);
    assert_eq!(api.get("/")["state"], "Running");
    // The one in the middle of its request can still go on.
    silent.write_all(&[b' '; 48]).unwrap();
    silent.write_all(b"}").unwrap();
    assert_eq!(read_response(&mut silent).0, 400);
    assert!(monitor.child.try_wait().unwrap().is_none());
}

/// Sends `requests` again and again until no more are taken; how many are whole.
fn fill(stream: &mut UnixStream, requests: &[u8], count: usize) -> usize {
    stream.set_nonblocking(true).unwrap();
    let (mut sent, mut deaf_since) = (0, Instant::now());
    while deaf_since.elapsed() < Duration::from_millis(10) {
        match stream.write(&requests[sent % requests.len()..]) {
            Ok(n) => (sent, deaf_since) = (sent + n, Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    sent / (requests.len() / count)
}

#[test]
fn monitor_when_200_clients_ask_on_and_never_read_hardly_grows() {
    let folder = Folder::new();
    let (monitor, api) = Monitor::unconfigured(&folder);
    api.get("/vm/config");
    let before = monitor.own_kib();
    let requests = b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(600);
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut stream = connect(&api.0);
            let sent = fill(&mut stream, &requests, 600);
            (stream, sent)
        })
        .collect();
    let grown = monitor.own_kib().saturating_sub(before);
    // About 5 KiB each, and room for what else the heap is used for.
    assert!(grown < 3 * 1024, "{grown} KiB");

    // Nothing is lost: a client that reads has every answer.
    let (stream, sent) = &mut clients[0];
    for n in 0..*sent {
        let (status, body) = read_response(stream);
        assert!(
            status == 200 && body.contains("machine-config"),
            "{n}: {status} {body}"
        );
    }
    assert!(*sent > 600, "{sent}");
}

#[test]
fn newcomers_when_300_connections_idle_are_served() {
    needs!(kvm);
    let folder = Folder::new();
    let (_monitor, api) = busy_guest(&folder);
    let mut idle: Vec<UnixStream> = (0..300).map(|_| connect(&api.0)).collect();
    // Each newcomer is served, and in the end the last ones of those that idle are still there.
    for _ in 0..50 {
        assert_eq!(api.get("/")["state"], "Running");
    }
    for stream in idle.iter_mut().rev().take(150) {
        send_numbered(stream, 7..8);
        expect_numbered(stream, 7);
    }
    // Those that gave way were told so by the end of their connection, not left hanging.
    for stream in &mut idle[..40] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn pipelined_requests_when_thousands_are_answered_in_order() {
    needs!(kvm);
    let folder = Folder::new();
    let (_monitor, api) = busy_guest(&folder);
    let mut stream = connect(&api.0);
    let mut writer = stream.try_clone().unwrap();
    const COUNT: usize = 5000;
    // Questions to control between those that are refused at once: both keep their places.
    let writing = thread::spawn(move || {
        for n in 0..COUNT {
            send_numbered(&mut writer, n..n + 1);
            writer.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
        }
    });
    for n in 0..COUNT {
        expect_numbered(&mut stream, n);
        let (status, body) = read_response(&mut stream);
        assert!(
            status == 200 && body.contains("firecracker_version"),
            "{n}: {status} {body}"
        );
    }
    writing.join().unwrap();
}
