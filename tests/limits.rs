//! Rate limiters as a guest feels them: a drive and both directions of a network interface, bytes
//! and operations, bursts, changes and removal while it runs. The guest measures with its own
//! clock. What a limit forbids is checked closely (a busy host makes nothing faster), what it
//! allows loosely; `tools/bench limits` measures how exact they are.

mod common;

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{Api, Folder, Monitor, Netns, needs};
use serde_json::{Value, json};

/// EtherType for local experiments.
const EXPERIMENT: u16 = 0x88b5;
/// The shortest time in which a bucket of `SIZE` comes back.
const REFILL_MS: u64 = 250;

/// One guest at a time: each of them polls its devices without a pause.
static ALONE: Mutex<()> = Mutex::new(());

/// A probe guest that does what is typed.
struct Guest {
    monitor: Monitor,
    api: Api,
    asked: usize,
    _alone: MutexGuard<'static, ()>,
}

fn alone() -> MutexGuard<'static, ()> {
    // A test that failed is not this one's trouble.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk of 1 MiB with this limiter, in a guest.
fn guest_with_disk(folder: &Folder, limiter: Value) -> Guest {
    let disk = folder.disk("disk", 1 << 20);
    let mut config = common::probe_vm_with_disks("shell", &[&disk]);
    config["drives"][0]["rate_limiter"] = limiter;
    let alone = alone();
    Guest::new(Monitor::boot_with_api(folder, &config), alone)
}

/// A network interface with these limiters, in a guest and a network namespace.
fn guest_with_net(netns: &Netns, folder: &Folder, rx: Value, tx: Value) -> Guest {
    netns.tap("tap0", "192.0.2.1/24");
    let mut config = common::probe_vm("shell");
    config["network-interfaces"] = json!([{
        "iface_id": "n", "host_dev_name": "tap0", "rx_rate_limiter": rx, "tx_rate_limiter": tx,
    }]);
    let alone = alone();
    Guest::new(Monitor::boot_inside(netns, folder, &config), alone)
}

impl Guest {
    fn new((monitor, api): (Monitor, Api), alone: MutexGuard<'static, ()>) -> Self {
        monitor.expect("shell ready");
        Guest {
            monitor,
            api,
            asked: 0,
            _alone: alone,
        }
    }

    /// Types a word and does not wait for it.
    fn type_word(&mut self, word: &str) {
        self.asked += 1;
        self.monitor
            .type_in(&format!("{word},print:mark{}\n", self.asked));
    }

    /// What was said since the word before, once the last one is done.
    fn said(&self) -> String {
        let said = self.monitor.expect(&format!("print:mark{} ok", self.asked));
        let before = format!("print:mark{} ok", self.asked - 1);
        let from = said.find(&before).map_or(0, |at| at + before.len());
        let said = &said[from..];
        assert!(!said.contains("FAILED"), "{said}");
        said.to_owned()
    }

    /// Seconds that `word` took by the guest's clock.
    fn seconds(&mut self, word: &str) -> f64 {
        self.type_word(word);
        seconds_in(&self.said())
    }

    /// How often the only device had to wait for its limiter.
    fn waits(&self) -> f64 {
        let (status, text) = self.api.request("GET", "/metrics", "");
        assert_eq!(status, 200);
        let lines = text
            .lines()
            .filter(|line| line.contains("_throttled_total{"));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    fn limit_drive(&self, limiter: Value) {
        self.api.patch(
            "/drives/disk0",
            json!({"drive_id": "disk0", "rate_limiter": limiter}),
        );
    }
}

fn seconds_in(said: &str) -> f64 {
    let (_, ns) = said
        .split_once(" ns=")
        .unwrap_or_else(|| panic!("no time in {said}"));
    let digits: String = ns.chars().take_while(char::is_ascii_digit).collect();
    digits.parse::<f64>().unwrap() / 1e9
}

fn bucket(size: u64, burst: u64) -> Value {
    json!({"size": size, "one_time_burst": burst, "refill_time": REFILL_MS})
}

/// Seconds that `amount` takes from a full bucket of `size`.
fn allowed(amount: u64, size: u64) -> f64 {
    (amount - size) as f64 / size as f64 * REFILL_MS as f64 / 1e3
}

/// Not faster than the limit (2 % for the clocks), and not stopped by it: a busy host may make it
/// slower by a minute.
fn assert_limited(seconds: f64, expected: f64, what: &str) {
    assert!(
        seconds > expected * 0.98 && seconds < expected * 4.0 + 60.0,
        "{what}: {seconds} s, and the limit makes it {expected} s"
    );
}

/// Few waits, so that a busy host adds little to it.
const OPS: &str = "blkbench:0:512:250:50";

#[test]
fn drive_when_limited_keeps_to_operations_and_to_bytes() {
    needs!(kvm);
    let folder = Folder::new();
    let mut guest = guest_with_disk(&folder, json!({"ops": bucket(50, 0)}));
    let seconds = guest.seconds("blkbench:0:512:250:1");
    assert_limited(seconds, allowed(250, 50), "operations");
    // The other bucket alone, for reads and for writes of several depths.
    const SIZE: u64 = 256 << 10;
    guest.limit_drive(json!({"bandwidth": bucket(SIZE, 0), "ops": bucket(0, 0)}));
    for word in ["blkbench:0:32k:40:4:read", "blkbench:0:32k:40:16:write"] {
        let seconds = guest.seconds(word);
        // The bucket has at most filled up since the word before.
        assert_limited(seconds, allowed(40 * (32 << 10), SIZE), word);
    }
}

#[test]
fn drive_when_given_a_burst_has_it_once() {
    needs!(kvm);
    let folder = Folder::new();
    let mut guest = guest_with_disk(&folder, json!({"ops": bucket(25, 225)}));
    guest.seconds(OPS);
    assert_eq!(guest.waits(), 0.0, "the burst is there for all of it");
    assert_limited(guest.seconds(OPS), allowed(250, 25), "without the burst");
    assert!(guest.waits() > 0.0);
}

#[test]
fn drive_when_its_limits_change_follows_at_once() {
    needs!(kvm);
    let folder = Folder::new();
    let mut guest = guest_with_disk(&folder, json!({}));
    guest.seconds(OPS);
    assert_eq!(guest.waits(), 0.0, "there is no limit yet");
    guest.limit_drive(json!({"ops": bucket(25, 0), "bandwidth": bucket(1 << 30, 0)}));
    assert_limited(guest.seconds(OPS), allowed(250, 25), "limited");
    guest.limit_drive(json!({"ops": bucket(50, 0)}));
    assert_limited(
        guest.seconds("blkbench:0:512:250:10"),
        allowed(250, 50),
        "twice as much",
    );
    // A bucket of nothing takes the limit away, and that one only.
    guest.limit_drive(json!({"ops": {"size": 0, "refill_time": 0}}));
    let config = guest.api.get("/vm/config");
    let limiter = &config["drives"][0]["rate_limiter"];
    assert!(
        limiter["ops"].is_null() && limiter["bandwidth"]["size"] == 1 << 30,
        "{limiter}"
    );
    let waits = guest.waits();
    guest.seconds(OPS);
    assert_eq!(guest.waits(), waits, "there is no limit any more");
}

#[test]
fn drive_when_it_waits_and_its_limit_goes_does_not_wait_on() {
    needs!(kvm);
    let folder = Folder::new();
    let hours = json!({"ops": {"size": 2, "refill_time": 7_200_000}});
    let mut guest = guest_with_disk(&folder, hours);
    // The third has to wait for most of an hour.
    guest.type_word("blkbench:0:512:3:1");
    common::wait_until("the third waits", || guest.waits() > 0.0);
    guest.limit_drive(json!({"ops": {"size": 0, "refill_time": 0}}));
    assert!(seconds_in(&guest.said()) < 600.0);
}

#[test]
fn net_when_limited_keeps_to_frames_and_bytes_sent() {
    needs!(kvm, root);
    let (folder, netns) = (Folder::new(), Netns::new());
    let mut guest = guest_with_net(&netns, &folder, Value::Null, json!({"ops": bucket(50, 0)}));
    let seconds = guest.seconds("netsend:0:250:200");
    assert_limited(seconds, allowed(250, 50), "frames");
    const SIZE: u64 = 25_000;
    let limit = |limiter: Value| {
        guest.api.patch(
            "/network-interfaces/n",
            json!({"iface_id": "n", "tx_rate_limiter": limiter}),
        );
    };
    limit(json!({"bandwidth": bucket(SIZE, 0), "ops": bucket(0, 0)}));
    let seconds = guest.seconds("netsend:0:250:1000");
    assert_limited(seconds, allowed(250_000, SIZE), "bytes");
    let limiter = guest.api.get("/vm/config")["network-interfaces"][0]["tx_rate_limiter"].clone();
    assert!(limiter["ops"].is_null(), "{limiter}");
    guest.api.patch(
        "/network-interfaces/n",
        json!({"iface_id": "n", "tx_rate_limiter": {"bandwidth": bucket(0, 0)}}),
    );
    let waits = guest.waits();
    guest.seconds("netsend:0:250:1000");
    assert_eq!(guest.waits(), waits, "there is no limit any more");
}

#[test]
fn net_when_limited_keeps_to_frames_and_bytes_received() {
    needs!(kvm, root);
    let (folder, netns) = (Folder::new(), Netns::new());
    let mut guest = guest_with_net(&netns, &folder, json!({"ops": bucket(50, 0)}), Value::Null);
    let seconds = guest.received(&netns, 250, 200);
    assert_limited(seconds, allowed(250, 50), "frames");
    const SIZE: u64 = 25_000;
    guest.api.patch(
        "/network-interfaces/n",
        json!({"iface_id": "n", "rx_rate_limiter": {"bandwidth": bucket(SIZE, 0), "ops": bucket(0, 0)}}),
    );
    let seconds = guest.received(&netns, 250, 1000);
    assert_limited(seconds, allowed(250_000, SIZE), "bytes");
    guest.api.patch(
        "/network-interfaces/n",
        json!({"iface_id": "n", "rx_rate_limiter": {"bandwidth": bucket(0, 0)}}),
    );
    let waits = guest.waits();
    guest.received(&netns, 250, 1000);
    assert_eq!(guest.waits(), waits, "there is no limit any more");
}

impl Guest {
    /// Seconds from the first to the last of so many frames that the host sends at once.
    fn received(&mut self, netns: &Netns, count: usize, size: usize) -> f64 {
        let ready = "netcount ready";
        let before = self.monitor.stdout().matches(ready).count();
        self.type_word(&format!("netcount:0:{count}:300000"));
        common::wait_until("the guest counts frames", || {
            self.monitor.stdout().matches(ready).count() > before
        });
        // Fewer than the tap's queue holds, so none is lost.
        netns.inside(|| {
            let mut socket = common::sys::frames("tap0", EXPERIMENT);
            let mut frame = vec![0xff; size];
            frame[12..14].copy_from_slice(&EXPERIMENT.to_be_bytes());
            for _ in 0..count {
                socket.write_all(&frame).unwrap();
            }
        });
        seconds_in(&self.said())
    }
}

/// Requests and bytes that the disk has served, between two moments.
struct Served {
    asked: Instant,
    answered: Instant,
    requests: f64,
    bytes: f64,
}

impl Guest {
    fn served(&self) -> Served {
        let asked = Instant::now();
        let (status, text) = self.api.request("GET", "/metrics", "");
        let answered = Instant::now();
        assert_eq!(status, 200);
        let value = |begins: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(begins));
            value.unwrap().trim().parse().unwrap()
        };
        let labels = r#"{device="disk0",operation="read"}"#;
        Served {
            asked,
            answered,
            requests: value(&format!("mayfly_block_operations_total{labels}")),
            bytes: value(&format!("mayfly_block_bytes_total{labels}")),
        }
    }

    /// The least and the greatest rate that the disk may have had in a time of about this, in what `count` tells of.
    fn rate_over(&self, time: Duration, count: impl Fn(&Served) -> f64) -> (f64, f64) {
        let before = self.served();
        thread::sleep(time);
        let after = self.served();
        let done = count(&after) - count(&before);
        let longest = after.answered - before.asked;
        let shortest = after.asked - before.answered;
        (done / longest.as_secs_f64(), done / shortest.as_secs_f64())
    }
}

/// The best share of `limit` that the guest had in a window. It never has more than 5 % above it.
fn best_share_of_limit(
    guest: &mut Guest,
    name: &str,
    limit: f64,
    count: fn(&Served) -> f64,
) -> f64 {
    const WINDOW: Duration = Duration::from_secs(2);
    const WINDOWS: usize = 15;
    // A bucket of 50 ms, which is 2.5 % of a window.
    let size = (limit * 0.05) as u64;
    let limit = size as f64 / 0.05;
    guest.limit_drive(json!({ name: {"size": size, "refill_time": 50} }));
    let mut best = 0.0f64;
    for window in 0..WINDOWS {
        let (least, most) = guest.rate_over(WINDOW, count);
        // What comes through is never more than the rate allows; the bucket may have been full at the beginning.
        let allowed = limit * 1.05;
        assert!(least <= allowed, "{name}: {least:.0} of {limit:.0}");
        best = best.max(most / limit);
        eprintln!(
            "{name}, window {window}: {:.3} to {:.3} of the limit",
            least / limit,
            most / limit
        );
        if best >= 0.95 {
            break;
        }
    }
    guest.limit_drive(json!({ name: {"size": 0, "refill_time": 0} }));
    best
}

/// Half of what this host can do just now: what the guest is kept from is checked in each window; what it is allowed,
/// in the best of some, since the host has other work too. That may have become so much meanwhile that the guest could
/// not have had the rate without a limit either: it is tried again with half of what there is then.
#[test]
fn limits_when_the_rate_is_high_are_kept_within_5_percent() {
    needs!(kvm);
    const TRIES: usize = 5;
    let folder = Folder::new();
    let mut guest = guest_with_disk(&folder, Value::Null);
    guest.type_word("blkload:0:randread:4096:32:600000");
    guest.monitor.expect("blkload begun");
    let of_requests: fn(&Served) -> f64 = |served| served.requests;
    let of_bytes: fn(&Served) -> f64 = |served| served.bytes;
    for (name, count) in [("ops", of_requests), ("bandwidth", of_bytes)] {
        let (_, mut free) = guest.rate_over(Duration::from_secs(1), count);
        for attempt in 1.. {
            let limit = free / 2.0;
            let best = best_share_of_limit(&mut guest, name, limit, count);
            if best >= 0.95 {
                break;
            }
            (_, free) = guest.rate_over(Duration::from_secs(1), count);
            assert!(
                attempt < TRIES,
                "{name}: {best:.3} of the limit of {limit:.0}, and {free:.0} without one"
            );
        }
    }
    guest.monitor.child.kill().unwrap();
}
