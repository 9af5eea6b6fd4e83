//! From exec to the first ping reply of a restored Linux.
//!
//! Linux boots once under each monitor, with an address and without a program that matters, until it answers pings; then
//! it is stopped. In each round it is restored on the same tap, with an echo request every two milliseconds; the clock
//! stops when the first reply has come. The tap is in a network namespace of this program, whose neighbour table has the
//! guest's address for good, so no ARP is in the figure.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Bench;
use super::machine::{Load, Machine};
use super::place::Files;
use crate::failure::{Context, Failure, Result};
use crate::monitor::Monitor;
use crate::rounds::{Figure, Sample};
use crate::sys;
use crate::workspace::TAP;

const HOST: &str = "172.16.0.1/24";
const GUEST: [u8; 4] = [172, 16, 0, 2];
const MAC: &str = "06:00:ac:10:00:02";
/// Between two echo requests to a restored Linux.
const BETWEEN: Duration = Duration::from_millis(2);
/// Between two to one that boots.
const SELDOM: Duration = Duration::from_millis(200);
/// Between the first reply of one that boots and its snapshot.
const SETTLE: Duration = Duration::from_secs(2);
/// Longer than Linux takes to boot here, and to answer.
const BOOT: Duration = Duration::from_secs(300);
const RESTORE: Duration = Duration::from_secs(20);

/// Boots Linux once for each monitor, and restores it in rounds. `folder` is what `tools/guest` made.
pub fn measure(bench: &Bench<'_>, folder: Option<&Path>) -> Result<Vec<Figure>> {
    let what = "restore: exec to the first ping reply of a booted Linux";
    let Some(folder) = folder.filter(|folder| folder.join("vmlinux").exists()) else {
        bench.skip(
            what,
            "all",
            "there is no Linux guest: run tools/guest first",
        );
        return Ok(Vec::new());
    };
    let guest = format!("{}.{}.{}.{}", GUEST[0], GUEST[1], GUEST[2], GUEST[3]);
    ip(&["address", "add", HOST, "dev", TAP])?;
    ip(&["link", "set", TAP, "up"])?;
    ip(&["neighbour", "replace", &guest, "lladdr", MAC, "dev", TAP])?;
    let config = config(bench, folder)?;
    let mut pings = Pings::new()?;
    let mut snapshots = HashMap::new();
    for monitor in bench.monitors_by_api() {
        eprintln!("snapshot: a boot of Linux under {}", monitor.name);
        let made = booted(bench, monitor, &config, &mut pings);
        if let Some(files) = bench.or_leave_out(what, monitor, made)? {
            snapshots.insert(monitor.name.clone(), files);
        }
    }
    let takes_part = |row: &Monitor| snapshots.contains_key(&row.name);
    bench.rounds(what, 1.0, takes_part, |row| {
        pings.restart();
        let mut machine = Machine::listen(&bench.place, row)?;
        machine.send_load(&snapshots[&row.name], Load::ByPath)?;
        let reply = pings.first_reply(BETWEEN, RESTORE);
        // A refusal says more than a reply that did not come.
        machine.loaded()?;
        let reply = reply?;
        let ms = machine.running.ms(reply);
        machine.stop()?;
        Ok(vec![Sample::ms(what, ms)])
    })
}

fn ip(words: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(words).status();
    if done.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "cannot run `ip {}`: is iproute2 installed?",
        words.join(" ")
    )))
}

fn config(bench: &Bench<'_>, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("cmdline");
    let words = fs::read_to_string(&path).cannot(|| format!("read {}", path.display()))?;
    let words = words.trim();
    let config = json!({
        "boot-source": {
            "kernel_image_path": folder.join("vmlinux"),
            "initrd_path": folder.join("initramfs.cpio"),
            "boot_args": format!("{words} ip=172.16.0.2::172.16.0.1:255.255.255.0::eth0:off"),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
        "network-interfaces": [
            { "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": MAC }
        ],
    });
    bench
        .place
        .workspace
        .file("linux.json", &config.to_string())
}

/// Boots Linux until it answers, and stops it.
fn booted(bench: &Bench<'_>, monitor: &Monitor, config: &Path, pings: &mut Pings) -> Result<Files> {
    let files = bench.place.files()?;
    pings.restart();
    let mut machine = Machine::boot_config(&bench.place, monitor, config)?;
    pings.first_reply(SELDOM, BOOT)?;
    // What waits in its queues is answered first: a guest at rest is stopped.
    std::thread::sleep(SETTLE);
    machine.pause()?;
    machine.create("Full", &files)?;
    machine.stop()?;
    Ok(files)
}

/// Echo requests to the guest, each run of them with an identifier of its own, so that a late reply to an earlier run is
/// not taken for one of this.
struct Pings {
    socket: File,
    run: u16,
}

impl Pings {
    fn new() -> Result<Self> {
        let socket = sys::icmp_socket(GUEST).cannot(|| "open a socket for pings".into())?;
        Ok(Self { socket, run: 0 })
    }

    fn restart(&mut self) {
        self.run = self.run.wrapping_add(1);
    }

    /// Sends requests until a reply comes.
    fn first_reply(&mut self, between: Duration, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut sequence = 0_u16;
        while Instant::now() < deadline {
            sequence = sequence.wrapping_add(1);
            // While nothing has opened the tap, sending fails; it is tried again.
            let _ = self.socket.write(&echo_request(self.run, sequence));
            let next = Instant::now() + between;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                let [came] = sys::poll_for([self.socket.as_fd()], left)
                    .cannot(|| "wait for a ping reply".into())?;
                let now = Instant::now();
                if !came {
                    break;
                }
                let mut packet = [0; 128];
                let len = self
                    .socket
                    .read(&mut packet)
                    .cannot(|| "read a ping reply".into())?;
                if is_reply(&packet[..len], self.run) {
                    return Ok(now);
                }
            }
        }
        Err(Failure::new(format!(
            "Linux answered no ping for {} s",
            patience.as_secs()
        )))
    }
}

fn echo_request(id: u16, sequence: u16) -> [u8; 8] {
    let mut message = [8, 0, 0, 0, 0, 0, 0, 0];
    message[4..6].copy_from_slice(&id.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum: u32 = message
        .chunks(2)
        .map(|two| u32::from(two[0]) << 8 | u32::from(two[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// Whether an IPv4 packet holds an echo reply with this identifier.
fn is_reply(packet: &[u8], id: u16) -> bool {
    let header = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(&0) && message.get(4..6) == Some(&id.to_be_bytes()[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_request_when_summed_gives_all_ones() {
        let message = echo_request(0x1234, 0xfffe);
        let sum: u32 = message
            .chunks(2)
            .map(|two| u32::from(two[0]) << 8 | u32::from(two[1]))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn reply_when_of_another_run_is_not_taken() {
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[24..26].copy_from_slice(&7_u16.to_be_bytes());
        assert!(is_reply(&packet, 7));
        assert!(!is_reply(&packet, 8));
        packet[20] = 8;
        assert!(!is_reply(&packet, 7));
        assert!(!is_reply(&[], 7));
    }
}
