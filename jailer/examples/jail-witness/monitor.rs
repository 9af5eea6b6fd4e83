//! The witness as the monitor of an empty jail: it serves as much of the API as the jailer needs,
//! and does what the words on the guest's kernel command line say.
//!
//! `report` says what it sees, `attack` tries to get out (`victim=PID port=N abstract=NAME` name
//! what to reach), `agent=KIND` sends what no agent may (`garbage`, `endless`, `foreign`), `udp=PORT` asks the host (or `udp-to=ADDRESS`) over its tap, `exit=N`, `signal=N`, `hog=MIB`, `stay`, `echo`, `flood`, `refuse`, `silent`,
//! `hangup` are what they say; `log=WORDS` is written to the log with blanks for underscores, and
//! `end=WORD` to where the guest's end is told.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::{cable, escape, raw};

/// Serves the API until the guest would run, then does what it says.
pub fn run(args: &[String]) -> ! {
    let after = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1)?.parse::<i32>().ok()
    };
    let before: Vec<String> = (0..4096).filter_map(raw::describe).collect();
    let listener = UnixListener::from(raw::take(after("--api-fd").expect("the jailer passes it")));
    let mut log = std::fs::File::from(raw::take(after("--log-fd").expect("it was passed")));
    let (mut client, _) = listener.accept().expect("the jailer is connected");
    let mut files = Vec::new();
    let mut words = String::new();
    loop {
        let text = receive(&mut client, &mut files);
        if text.is_empty() {
            std::process::exit(0);
        }
        if let Some(found) = boot_args(&text) {
            words = found;
        }
        let starts = text.contains("\"start\":true") || text.contains("InstanceStart");
        let has = |word: &str| words.split(' ').any(|other| other == word);
        if has("silent") {
            std::thread::sleep(Duration::from_secs(100));
        }
        if has("hangup") {
            drop(client);
            std::thread::sleep(Duration::from_secs(100));
            std::process::exit(0);
        }
        let fault = "{\"fault_message\":\"Not with\\nthis one.\"}";
        let refusal = format!(
            "HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{fault}",
            fault.len()
        );
        let answer = if has("refuse") {
            refusal.as_str()
        } else {
            "HTTP/1.1 204 \r\n\r\n"
        };
        client
            .write_all(answer.as_bytes())
            .expect("the jailer listens");
        if starts {
            break;
        }
    }
    obey(&words, args, &before, &files, &mut log);
    std::process::exit(0)
}

/// One request, with its descriptors.
fn receive(client: &mut UnixStream, files: &mut Vec<OwnedFd>) -> String {
    let mut text = Vec::new();
    loop {
        let mut bytes = [0; 65536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let received = rustix::net::recvmsg(&*client, &mut into, &mut control, RecvFlags::empty());
        let count = received.map_or(0, |received| received.bytes);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        text.extend_from_slice(&bytes[..count]);
        let so_far = String::from_utf8_lossy(&text).into_owned();
        let whole = so_far.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length = head.split("Content-Length: ").nth(1).and_then(|rest| {
                rest.split("\r\n")
                    .next()
                    .and_then(|number| number.parse().ok())
            });
            body.len() >= length.unwrap_or(0)
        });
        if count == 0 || whole {
            return so_far;
        }
    }
}

fn boot_args(request: &str) -> Option<String> {
    let (_, rest) = request.split_once("\"boot_args\":\"")?;
    rest.split('"').next().map(str::to_owned)
}

/// The descriptor that is told how the guest ended.
fn end_of(args: &[String]) -> Option<i32> {
    let at = args.iter().position(|arg| arg == "--end-fd")?;
    args.get(at + 1)?.parse().ok()
}

/// Packets on the link to the supervisor, as of a guest that wants to harm it, until nothing takes them.
fn play_agent(kind: &str, link: &OwnedFd) {
    let packet = |ether_type: [u8; 2], sequence: u32, messages: &[u8]| {
        let mut packet = vec![0; 24];
        packet.extend(ether_type);
        packet.extend([mayfly_agent_protocol::VERSION, 0]);
        packet.extend((messages.len() as u16).to_le_bytes());
        packet.extend(sequence.to_le_bytes());
        packet.extend(messages);
        packet
    };
    // The guest is ready, and its command started.
    let started = [
        12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut data = vec![1, 1, 0, 0, 1, 0, 0, 0];
    data.extend(50_000_u32.to_le_bytes());
    data.resize(12 + 50_000, b'x');
    for sequence in 0.. {
        let bytes = match (kind, sequence) {
            ("foreign", _) => packet([0x08, 0x00], sequence, &[7; 60_000]),
            ("garbage", 0) | ("endless", 0) => packet([0x88, 0xb5], 0, &started),
            ("garbage", _) => packet([0x88, 0xb5], sequence, &[7; 100]),
            _ => packet([0x88, 0xb5], sequence, &data),
        };
        loop {
            match rustix::io::write(link, &bytes) {
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => std::thread::sleep(Duration::from_secs(100)),
                Ok(_) => break,
            }
        }
    }
}

fn obey(
    words: &str,
    args: &[String],
    before: &[String],
    files: &[OwnedFd],
    log: &mut std::fs::File,
) {
    let value = |name: &str| {
        words
            .split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let number = |name: &str| value(name).and_then(|text| text.parse::<i64>().ok());
    let has = |word: &str| words.split(' ').any(|other| other == word);
    let mut report = String::new();
    if has("report") {
        crate::see(&mut report, args);
        for line in before {
            report.push_str(&format!("fd {line}\n"));
        }
        for file in files {
            let described = raw::describe(file.as_raw_fd()).unwrap_or_default();
            let kind = described.split_once(' ').map_or("", |(_, kind)| kind);
            report.push_str(&format!("received {kind}\n"));
        }
        report.push_str(&format!("words {words}\n"));
        // What is done at SIGXFSZ: 0 is what every program does, 1 nothing.
        let mut action = [0_usize; 4];
        let place = action.as_mut_ptr() as usize;
        let _ = raw::call(
            libc::SYS_rt_sigaction,
            &[libc::SIGXFSZ as usize, 0, place, 8],
        );
        report.push_str(&format!("xfsz {}\n", action[0]));
        report.push_str(&format!(
            "host {}\n",
            rustix::system::uname().nodename().to_string_lossy()
        ));
        report.push_str("end\n");
    }
    if has("attack") {
        escape::attack(&mut report, &value);
        report.push_str("end\n");
    }
    if let (Some(word), Some(end)) = (value("end"), end_of(args)) {
        let mut end = std::fs::File::from(raw::take(end));
        let _ = writeln!(end, "{word}");
    }
    print!("{report}");
    let _ = std::io::stdout().flush();
    // As the monitor does, it keeps to the level of its log.
    let is_info = |pair: &[String]| pair[0] == "--level" && pair[1] == "Info";
    if let Some(line) = value("log")
        && args.windows(2).any(is_info)
    {
        let _ = writeln!(log, "now [witness:main:INFO] {}", line.replace('_', " "));
    }
    if let Some(line) = value("warn") {
        let _ = writeln!(log, "now [witness:main:WARN] {}", line.replace('_', " "));
    }
    if let Some(port) = number("udp")
        && let Some(tap) = files.last()
    {
        let tap = std::fs::File::from(tap.try_clone().expect("there is room"));
        let ip = value("ip").unwrap_or_default();
        let mut parts = ip
            .split(':')
            .filter_map(|part| part.parse::<Ipv4Addr>().ok());
        let own = parts.next().expect("the jailer says it");
        let gateway = parts.next().expect("the jailer says it");
        // The host is the first of the block that the guest's address lies in.
        let host = Ipv4Addr::from_bits(own.to_bits() & !7 | 1);
        let to = value("udp-to")
            .and_then(|text| text.parse().ok())
            .unwrap_or(host);
        let answer = cable::ask(
            &tap,
            own,
            gateway,
            (to, port as u16),
            b"hello from the guest",
        );
        println!(
            "answer {}",
            String::from_utf8_lossy(&answer.unwrap_or_default())
        );
    }
    if let (Some(kind), Some(link)) = (value("agent"), files.last()) {
        play_agent(&kind, link);
    }
    if has("echo") {
        for byte in std::io::stdin().lock().bytes() {
            let Ok(byte) = byte else { break };
            print!("<{}>", byte.escape_ascii());
            let _ = std::io::stdout().flush();
            if byte == b'q' {
                break;
            }
        }
    }
    if has("flood") {
        let line = "x".repeat(1023) + "\n";
        for _ in 0..number("flood-kib").unwrap_or(64 * 1024) {
            print!("{line}");
        }
    }
    let mut memory = Vec::new();
    for _ in 0..number("hog").unwrap_or(0) {
        memory.push(vec![1_u8; 1 << 20]);
    }
    if has("stay") {
        std::thread::sleep(Duration::from_secs(100));
    }
    if let Some(signal) = number("signal") {
        let _ = raw::call(
            libc::SYS_kill,
            &[std::process::id() as usize, signal as usize],
        );
    }
    if has("abort") {
        std::process::abort();
    }
    if let Some(code) = number("exit") {
        std::process::exit(code as i32);
    }
}
