//! A network interface on a packet socket: frames whole and in order both ways, a full socket, a closed one,
//! a snapshot, and the jail.

#[path = "common/mod.rs"]
mod common;
#[path = "jail/host.rs"]
mod host;
#[path = "snapshot/pair.rs"]
mod pair;
#[path = "jail/run.rs"]
mod run;

use std::collections::VecDeque;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use common::{Api, Folder, Monitor, PATIENCE, needs, probe_vm};
use pair::{Pair, pause};
use run::{Place, Who};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde_json::json;

const HEADER: usize = 12;
/// The largest frame: 65,535 bytes behind Ethernet's header.
const FRAME_MAX: usize = 14 + 65_535;
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap()
}

/// The test's end of a guest's interface.
struct Peer(OwnedFd);

impl Peer {
    /// Waits until one of `events` is there.
    fn wait(&self, events: PollFlags) {
        let seconds = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.0, events)];
        assert_eq!(poll(&mut fds, Some(&seconds)), Ok(1), "{events:?}");
    }

    fn try_send(&self, frame: &[u8]) -> bool {
        let packet = [&[0; HEADER][..], frame].concat();
        match send(&self.0, &packet, SendFlags::NOSIGNAL) {
            Ok(len) => len == packet.len(),
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// What is left, when the other end is closed.
    fn rest(&self) -> Vec<Vec<u8>> {
        let mut packet = vec![0; 100_000];
        let mut all = Vec::new();
        loop {
            match recv(&self.0, &mut packet[..], RecvFlags::empty()) {
                Ok((0, _)) => return all,
                Ok((len, _)) => all.push(packet[HEADER..len].to_vec()),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn try_receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 100_000];
        match recv(&self.0, &mut packet[..], RecvFlags::empty()) {
            Ok((len, _)) => {
                assert!(len > HEADER, "{len}");
                Some(packet[HEADER..len].to_vec())
            }
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The number in a frame of the probe's word `netsend`.
fn number_of(frame: &[u8]) -> u64 {
    u64::from_be_bytes(frame[14..22].try_into().unwrap())
}

/// Random numbers (splitmix64), the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % end
    }
}

/// A frame to the guest with a random content, and as it comes back.
fn frame(random: &mut Random, len: usize) -> (Vec<u8>, Vec<u8>) {
    let content: Vec<u8> = (14..len).map(|_| random.below(256) as u8).collect();
    let of = |to: [u8; 6], from: [u8; 6]| [&to[..], &from, &[0x88, 0xb5], &content].concat();
    (of(GUEST, HOST), of(HOST, GUEST))
}

/// A guest with this interface and no other device, started in one request.
fn boot(folder: &Folder, words: &str, socket: OwnedFd) -> (Monitor, Api) {
    let (monitor, api) = Monitor::unconfigured(folder);
    let mut config = probe_vm(words);
    let args = format!("probe={words} patience_ms=60000");
    config["boot-source"]["boot_args"] = json!(args);
    config["network-interfaces"] = json!([
        {"iface_id": "n", "guest_mac": "02:00:00:00:00:01", "host_dev_name": {"fd": 0}},
    ]);
    config["start"] = json!(true);
    api.put_with("/vm", config, &[socket.as_fd()]);
    (monitor, api)
}

/// The value of a metric of the interface.
fn metric(api: &Api, name: &str) -> u64 {
    let (status, metrics) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200, "{metrics}");
    let line = metrics.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value.unwrap_or_else(|| panic!("{name}")).parse().unwrap()
}

#[test]
fn frames_when_echoed_by_the_guest_come_back_whole_and_in_order() {
    needs!(kvm);
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut random = Random(seed);
    let (near, far) = sockets();
    let (folder, peer) = (Folder::new(), Peer(near));
    let (monitor, api) = boot(&folder, "netinfo:0,netecho:0", far);
    let info = monitor.expect("netecho ready");
    assert!(info.contains("mtu=65535"), "{info}");
    let (mut expected, mut sent, mut received) = (VecDeque::new(), 0, 0);
    let mut next: Option<(Vec<u8>, Vec<u8>)> = None;
    let deadline = Instant::now() + 4 * PATIENCE;
    while received < 300 {
        assert!(
            Instant::now() < deadline,
            "{sent} sent, {received} received"
        );
        if next.is_none() && sent < 300 {
            let len = match sent {
                0 => FRAME_MAX,
                1 => 60,
                // Large ones, and many small ones in a row.
                _ if random.below(3) == 0 => 60 + random.below(FRAME_MAX - 59),
                _ => 60 + random.below(2000),
            };
            next = Some(frame(&mut random, len));
        }
        if let Some((there, back)) = next.take() {
            match peer.try_send(&there) {
                true => {
                    expected.push_back(back);
                    sent += 1;
                }
                false => next = Some((there, back)),
            }
        }
        // As long as it can be sent, the guest's are left in the socket, most of the time.
        if next.is_some() || sent == 300 || random.below(8) == 0 {
            match peer.try_receive() {
                Some(got) => {
                    let back = expected.pop_front().unwrap();
                    assert!(got == back, "frame {received} of {} bytes", back.len());
                    received += 1;
                }
                None if next.is_some() || sent == 300 => {
                    let out = if next.is_some() {
                        PollFlags::OUT
                    } else {
                        PollFlags::IN
                    };
                    peer.wait(out | PollFlags::IN);
                }
                None => {}
            }
        }
    }
    assert_eq!(
        metric(
            &api,
            "mayfly_net_dropped_total{device=\"n\",direction=\"receive\"}"
        ),
        0
    );
    assert_eq!(
        metric(
            &api,
            "mayfly_net_dropped_total{device=\"n\",direction=\"transmit\"}"
        ),
        0
    );
    assert_eq!(metric(&api, "mayfly_net_tap_gone{device=\"n\"}"), 0);
}

#[test]
fn frames_when_nothing_reads_them_wait_and_the_device_does_not_spin() {
    needs!(kvm);
    let (near, far) = sockets();
    let (folder, peer) = (Folder::new(), Peer(near));
    let (monitor, api) = boot(&folder, "netsend:0:400:4000,print:all-sent,stay", far);
    let sent = "mayfly_net_frames_total{device=\"n\",direction=\"transmit\"}";
    let mut count = 0;
    common::wait_until("the socket is full", || {
        let before = std::mem::replace(&mut count, metric(&api, sent));
        count > 0 && before == count
    });
    assert!(count < 400, "{count}");
    monitor.comes_to_rest("net n");
    for number in 0..400 {
        let frame = loop {
            match peer.try_receive() {
                Some(frame) => break frame,
                None => peer.wait(PollFlags::IN),
            }
        };
        assert_eq!(frame.len(), 4000);
        assert_eq!(number_of(&frame), number);
    }
    monitor.expect("probe: print:all-sent ok");
    assert_eq!(metric(&api, sent), 400);
    assert_eq!(
        metric(
            &api,
            "mayfly_net_dropped_total{device=\"n\",direction=\"transmit\"}"
        ),
        0
    );
}

#[test]
fn guest_when_the_other_end_is_closed_goes_on_without_a_network() {
    needs!(kvm);
    let (near, far) = sockets();
    let (folder, peer) = (Folder::new(), Peer(near));
    let words = "netsend:0:1:60,print:up,shell";
    let (mut monitor, api) = boot(&folder, words, far);
    monitor.expect("shell ready");
    // One frame is left unread there.
    peer.wait(PollFlags::IN);
    drop(peer);
    // Between two drivers the device looks at nothing.
    monitor.type_in("netsend:0:20:1000\nnetsend:0:20:1000\nprint:still-here\n");
    let output = monitor.expect("probe: print:still-here ok");
    assert_eq!(
        output.matches("netsend:0:20:1000 ok").count(),
        2,
        "{output}"
    );
    let gone = "mayfly_net_tap_gone{device=\"n\"}";
    common::wait_until("the device has seen it", || metric(&api, gone) == 1);
    monitor.comes_to_rest("net n");
    let log = folder.read("log");
    let said = "the other end of the packet socket was closed";
    assert_eq!(log.matches(said).count(), 1, "{log}");
    monitor.type_in("reset\n");
    monitor.exits_with(0);
}

#[test]
fn snapshot_when_taken_with_frames_under_way_needs_a_socket_and_loses_none() {
    needs!(kvm);
    let (near, far) = sockets();
    let (folder, other, third) = (Folder::new(), Folder::new(), Folder::new());
    let peer = Peer(near);
    let (monitor, api) = boot(&folder, "netsend:0:400:4000,print:all-sent,stay", far);
    let sent = "mayfly_net_frames_total{device=\"n\",direction=\"transmit\"}";
    common::wait_until("frames are in the socket", || metric(&api, sent) > 10);
    pause(&api);
    let pair = Pair::new(&folder, "snapshot");
    api.put("/snapshot/create", pair.create("Full"));
    drop((monitor, api));
    let before = peer.rest();
    let numbers: Vec<u64> = before.iter().map(|frame| number_of(frame)).collect();
    let mut next = numbers.len() as u64;
    assert_eq!(numbers, (0..next).collect::<Vec<_>>());

    let (refused, api) = Monitor::unconfigured(&third);
    let (status, message) = api.request("PUT", "/snapshot/load", &pair.load().to_string());
    assert_eq!(status, 400);
    assert!(message.contains("`network_overrides`"), "{message}");
    drop(refused);

    let (near, far) = sockets();
    let peer = Peer(near);
    let (monitor, api) = Monitor::unconfigured(&other);
    let more = json!({"network_overrides": [{"iface_id": "n", "host_dev_name": {"fd": 0}}]});
    api.put_with("/snapshot/load", pair.resume(more), &[far.as_fd()]);
    drop(far);
    // No announcement: the first frame is the one that comes next.
    while next < 400 {
        match peer.try_receive() {
            Some(frame) => {
                assert_eq!(number_of(&frame), next);
                next += 1;
            }
            None => peer.wait(PollFlags::IN),
        }
    }
    monitor.expect("probe: print:all-sent ok");
}

#[test]
fn jailer_when_it_passes_a_socket_connects_the_guest_to_it() {
    needs!(root, kvm);
    let place = Place::real("packetsocket", &common::mayfly());
    let kernel = place.path("probe");
    fs::copy(common::probe(), &kernel).unwrap();
    fs::set_permissions(&kernel, fs::Permissions::from_mode(0o755)).unwrap();
    for who in [Who::Root, Who::User] {
        let (near, far) = sockets();
        let peer = Peer(near);
        let words = "probe=netsend:0:3:60,reset";
        let machine = [
            "run",
            "--kernel",
            &kernel,
            "--cmdline",
            words,
            "--net",
            "fd:9",
        ];
        let mut command = place.jailer(who, &machine);
        common::sys::hand_in(&mut command, far.try_clone().unwrap(), 9);
        place.ends(command, 0);
        drop(far);
        for number in 0..3 {
            let frame = peer.try_receive().unwrap();
            assert_eq!(number_of(&frame), number, "{who:?}");
        }
        // The other end of a stream has no packets.
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut command = place.jailer(who, &machine);
        common::sys::hand_in(&mut command, stream.into(), 9);
        let said = place.refuses(command, "SOCK_SEQPACKET");
        assert!(said.contains("descriptor 9"), "{said}");
    }
}
