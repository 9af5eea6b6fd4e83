//! The networks of the empty jail: a tap of its own routed to the host, a tap that slirp4netns or
//! pasta is pointed at, a passed tap. The witness is the guest: it sends frames.

#[path = "jail/host.rs"]
mod host;
#[path = "common/needs.rs"]
mod needs;
#[path = "jail/run.rs"]
mod run;

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use needs::needs;
use run::{Place, Who, cables};

macro_rules! place {
    ($test:literal) => {{
        needs!(root, kvm, tun);
        Place::new($test)
    }};
}

/// A server that sends back what it gets, with an exclamation mark.
fn echo_at(address: &str) -> u16 {
    let socket = UdpSocket::bind((address, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut bytes = [0; 1500];
        while let Ok((count, from)) = socket.recv_from(&mut bytes[..1499]) {
            bytes[count] = b'!';
            let _ = socket.send_to(&bytes[..=count], from);
        }
    });
    port
}

const ANSWER: &str = "answer hello from the guest!\n";

#[test]
fn auto_connects_guest_and_host_and_leaves_no_interface() {
    let place = place!("nauto");
    let before = cables();
    let port = echo_at("0.0.0.0");
    // Several at once have addresses of their own.
    let children: Vec<Child> = (0..4)
        .map(|number| {
            let id = format!("{}-{number}", place.host.name);
            let mut command = place.run(
                Who::Root,
                &format!("udp={port} exit=0"),
                &["--net", "auto", "--id", &id],
            );
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut addresses = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(String::from_utf8_lossy(&output.stdout), ANSWER, "{err}");
        assert_eq!(output.status.code(), Some(0));
        let (_, rest) = err.split_once("the guest's address is ").unwrap();
        addresses.push(rest.split(' ').next().unwrap().to_owned());
    }
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 4);
    place.nothing_is_left();
    let start = Instant::now();
    // The kernel takes them down with their namespace, a moment later.
    while !cables().is_subset(&before) {
        assert!(start.elapsed() < Duration::from_secs(300), "{:?}", cables());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn user_connects_slirp4netns_or_pasta() {
    let place = place!("nuser");
    let port = echo_at("127.0.0.1");
    let programs: [(&str, &[&str], &[&str]); 2] = [
        ("/usr/bin/slirp4netns", &["--configure"], &["tap0"]),
        (
            "/usr/bin/pasta",
            &[
                "--config-net",
                "-f",
                "-q",
                "-a",
                "10.0.2.100",
                "-n",
                "24",
                "-g",
                "10.0.2.2",
            ],
            &[],
        ),
    ];
    for (program, before, after) in programs {
        if !Path::new(program).exists() {
            needs::skip(
                "nuser",
                &format!("no {program} (apt-get install slirp4netns passt)"),
            );
            continue;
        }
        let words = format!("udp={port} udp-to=10.0.2.2 exit=0");
        let mut command = place.run(Who::User, &words, &["--net", "user"]);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = announced_pid(&mut child);
        let mut helper = place.as_user(Who::User, Path::new(program));
        helper.args(before).arg(&pid).args(after);
        let mut helper = helper
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let _ = Command::new("kill")
            .arg(helper.id().to_string())
            .stderr(Stdio::null())
            .status();
        let mut said = String::new();
        let _ = std::io::Read::read_to_string(&mut helper.stderr.take().unwrap(), &mut said);
        let _ = helper.wait();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            ANSWER,
            "{program}: {said}"
        );
        assert_eq!(output.status.code(), Some(0));
        place.nothing_is_left();
    }
}

/// The process that the user is told to point a program at.
fn announced_pid(child: &mut Child) -> String {
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    loop {
        let mut line = String::new();
        assert!(err.read_line(&mut line).unwrap() > 0, "{text}");
        text.push_str(&line);
        if let Some((_, rest)) = line.split_once("where PID is ") {
            child.stderr = Some(err.into_inner());
            return rest.split(' ').next().unwrap().to_owned();
        }
    }
}

#[test]
fn tap_by_name_serves_its_owner() {
    let place = place!("ntap");
    let name = format!("mft{}", std::process::id() % 100_000);
    let ip = |words: &str| {
        let status = Command::new("ip").args(words.split(' ')).status().unwrap();
        assert!(status.success(), "ip {words}");
    };
    ip(&format!("tuntap add {name} mode tap user {}", host::UID));
    let remove = Remove(name.clone());
    for who in run::BOTH {
        let ended = place.ends(place.run(who, "report exit=0", &["--net", &name]), 0);
        assert!(
            ended.out.contains("received CharacterDevice 2"),
            "{}",
            ended.out
        );
    }
    drop(remove);
}

struct Remove(String);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}
