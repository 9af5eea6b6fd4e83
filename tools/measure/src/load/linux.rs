//! A disk and a network interface under a Linux guest: what a guest's kernel and its programs get.
//!
//! The guest is the one that `tools/guest` makes. A shell on its console runs `dd` with direct I/O, which has one request
//! in flight, and `nc` for a stream of TCP each way; `fio` where the guest's root has it, and `iperf3` where the host has
//! it too: the root that `tools/guest` makes has neither, another one with the same init may. On a host that emulates the
//! guest's kernel, the kernel is what is measured.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::block::{DISK_LEN, Disk};
use super::{Row, Wanted};
use crate::failure::{Context, Failure, Result};
use crate::monitor::{CommandLine, Running};
use crate::rounds::Sample;
use crate::workspace::{TAP, Workspace};

/// How the figures are counted, for the foot of the tables.
pub const NOTES: &str = "\
counted: Linux with one vCPU, its root read-only, a second disk of 256 MiB; by its own clock. dd: direct I/O with one
request in flight; fio, where the guest's root has it: libaio with 32. TCP: nc, from the connection to its end, by the
host's clock; iperf3, where host and guest have it: one stream of 2 s, as its receiver counts. These figures mean something on hosts with hardware KVM only: elsewhere the guest's kernel is emulated,
and they say what that costs.
";

/// Longer than Linux takes to boot here, and than any case takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Requests of the first run of `dd`, and seconds that the second shall take.
const FIRST: u64 = 20;
const SPAN: f64 = 1.5;

/// A run of `dd`.
struct Case {
    name: &'static str,
    words: &'static str,
    block: u64,
    in_bytes: bool,
}

const CASES: [Case; 3] = [
    Case {
        name: "Linux: dd read 4k",
        words: "if=/dev/vdb iflag=direct of=/dev/null",
        block: 4096,
        in_bytes: false,
    },
    Case {
        name: "Linux: dd read 128k",
        words: "if=/dev/vdb iflag=direct of=/dev/null",
        block: 128 << 10,
        in_bytes: true,
    },
    Case {
        name: "Linux: dd write 128k",
        words: "if=/dev/zero of=/dev/vdb oflag=direct",
        block: 128 << 10,
        in_bytes: true,
    },
];

/// Which of `fio` and `iperf3` there are.
const HAS: &str =
    "for p in fio iperf3; do command -v $p >/dev/null && h=\"$h $p\"; done; echo programs''=$h";

/// Runs of `fio`: figure, mode, and the field of its terse output (version 3) that has the requests per second.
const FIO: [(&str, &str, usize); 2] = [
    ("Linux: fio randread 4k, depth 32", "randread", 7),
    ("Linux: fio randwrite 4k, depth 32", "randwrite", 48),
];

/// Streams of TCP: figure, and whether the guest is sent to.
const STREAMS: [(&str, bool); 2] = [("Linux: TCP out", false), ("Linux: TCP in", true)];

/// Runs of `iperf3`: figure, and the option for its direction.
const IPERF3: [(&str, &str); 2] = [("Linux: iperf3 out", ""), ("Linux: iperf3 in", "--reverse")];
const IPERF3_PORT: u16 = 5002;

/// This program's address and port, and the guest's address.
const HOST: &str = "172.16.11.1";
const PORT: u16 = 5001;
const GUEST: &str = "172.16.11.2";

/// Bytes of a write to a stream; how many of them are sent at first, and at most.
const WRITE: u64 = 64 << 10;
const FIRST_WRITES: u64 = 4;
const MOST_WRITES: u64 = 1 << 16;

/// The guest and its disk.
pub struct Bench<'a> {
    workspace: &'a Workspace,
    wanted: Wanted<'a>,
    folder: &'a Path,
    disk: Disk,
}

impl<'a> Bench<'a> {
    /// Makes the disk; `folder` is what `tools/guest` made.
    pub fn new(
        workspace: &'a Workspace,
        wanted: Wanted<'a>,
        folder: Option<&'a Path>,
    ) -> Result<Self> {
        let folder = folder.filter(|folder| folder.join("rootfs.ext4").exists());
        let folder = folder.ok_or_else(|| {
            Failure::new("there is no Linux guest with a root disk: run tools/guest first")
        })?;
        let commands: [&[&str]; 2] = [
            &["address", "add", &format!("{HOST}/24"), "dev", TAP],
            &["link", "set", TAP, "up"],
        ];
        for words in commands {
            let done = Command::new("ip").args(words).status();
            if !done.is_ok_and(|status| status.success()) {
                return Err(Failure::new(
                    "cannot set the tap up: is iproute2 installed?",
                ));
            }
        }
        Ok(Self {
            workspace,
            wanted,
            folder,
            disk: Disk::new(wanted.media, 0, DISK_LEN)?,
        })
    }

    /// All cases, once, by one row; the floor has no Linux.
    pub fn round(&self, row: &Row) -> Result<Vec<Sample>> {
        if row.monitor.command_line == CommandLine::Floor {
            return Ok(Vec::new());
        }
        let mut running = row.monitor.boot_config_quietly(&self.config(row)?)?;
        running.next_line("mayfly-guest: shell ready", PATIENCE)?;
        let programs = ask(&mut running, HAS, "programs=")?;
        let has = |name| programs.split(' ').any(|it| it == name);
        let mut samples = Vec::new();
        for case in CASES.iter().filter(|case| self.wanted.has(case.name)) {
            samples.push(dd(&mut running, case)?);
        }
        if has("fio") {
            for (name, mode, field) in FIO.iter().filter(|(name, ..)| self.wanted.has(name)) {
                samples.push(fio(&mut running, name, mode, *field)?);
            }
        }
        for (name, to_guest) in STREAMS.iter().filter(|(name, ..)| self.wanted.has(name)) {
            samples.push(stream(&mut running, name, *to_guest)?);
        }
        if has("iperf3")
            && let Some(_server) = Server::start()?
        {
            for (name, direction) in IPERF3.iter().filter(|(name, _)| self.wanted.has(name)) {
                samples.push(iperf3(&mut running, name, direction)?);
            }
        }
        running.stop()?;
        Ok(samples)
    }

    fn config(&self, row: &Row) -> Result<PathBuf> {
        let path = self.folder.join("cmdline");
        let words = fs::read_to_string(&path).cannot(|| format!("read {}", path.display()))?;
        let drive = |id: &str, path: PathBuf, is_root: bool| {
            let mut drive = json!({
                "drive_id": id,
                "path_on_host": path,
                "is_root_device": is_root,
                "is_read_only": is_root,
            });
            if let Some(engine) = row.engine {
                drive["io_engine"] = engine.into();
            }
            drive
        };
        let text = json!({
            "boot-source": {
                "kernel_image_path": self.folder.join("vmlinux"),
                "boot_args": format!(
                    "{} ip={GUEST}::{HOST}:255.255.255.0::eth0:off mayfly.run=shell", words.trim()
                ),
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
            "drives": [
                drive("root", self.folder.join("rootfs.ext4"), true),
                drive("disk", self.disk.path.clone(), false),
            ],
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": TAP }],
        });
        self.workspace.file("linux-load.json", &text.to_string())
    }
}

/// Lets the shell do a line, and takes what follows `key` in what that says. The line comes back on the console, so it
/// must not have the key itself.
fn ask(running: &mut Running, line: &str, key: &str) -> Result<String> {
    running.tell(format!("{line}\n").as_bytes())?;
    let answer = running.next_line(key, PATIENCE)?;
    let (_, value) = answer.split_once(key).unwrap_or_default();
    Ok(value.trim().to_owned())
}

fn dd(running: &mut Running, case: &Case) -> Result<Sample> {
    // A few first: a request takes microseconds on some hosts, and many milliseconds on others.
    let pace = FIRST as f64 / timed(running, case, FIRST)?;
    let count = ((pace * SPAN) as u64).clamp(FIRST, DISK_LEN / case.block);
    let rate = count as f64 / timed(running, case, count)?;
    Ok(if case.in_bytes {
        Sample::new(case.name, "MB/s", rate * case.block as f64 / 1e6)
    } else {
        Sample::new(case.name, "IOPS", rate)
    })
}

/// Seconds that `count` requests take; a hundredth at least, which is as exact as the guest's clock is read.
fn timed(running: &mut Running, case: &Case, count: u64) -> Result<f64> {
    let Case { words, block, .. } = case;
    let line = format!(
        "read -r a _ </proc/uptime; dd {words} bs={block} count={count} 2>/dev/null && read -r b _ </proc/uptime; echo to''ok=$a,$b; b="
    );
    let said = ask(running, &line, "took=")?;
    let seconds = between(&said);
    seconds.ok_or_else(|| Failure::new(format!("dd in Linux failed, from and to: {said}")))
}

/// Seconds between two times of `/proc/uptime`, which has hundredths.
fn between(said: &str) -> Option<f64> {
    let (begin, end) = said.split_once(',')?;
    let seconds = end.parse::<f64>().ok()? - begin.parse::<f64>().ok()?;
    Some(seconds.max(0.01))
}

fn fio(running: &mut Running, name: &str, mode: &str, field: usize) -> Result<Sample> {
    let line = format!(
        "echo ter''se=\"$(fio --minimal --name=load --filename=/dev/vdb --direct=1 --ioengine=libaio --rw={mode} --bs=4k --iodepth=32 --time_based --runtime=2)\""
    );
    let said = ask(running, &line, "terse=")?;
    let iops = said
        .split(';')
        .nth(field)
        .and_then(|text| text.parse().ok());
    let iops = iops.ok_or_else(|| Failure::new(format!("fio in Linux says: {said}")))?;
    Ok(Sample::new(name, "IOPS", iops))
}

/// The host's `iperf3`, which is ended with this.
struct Server(Child);

impl Server {
    /// None if this host has no such program.
    fn start() -> Result<Option<Server>> {
        let mut command = Command::new("iperf3");
        command.args(["--server", "--bind", HOST, "--port"]);
        command.arg(IPERF3_PORT.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            spawned => Ok(Some(Server(spawned.cannot(|| "start iperf3".into())?))),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn iperf3(running: &mut Running, name: &str, direction: &str) -> Result<Sample> {
    // The server may not listen yet: a refused connection is tried again.
    let line = format!(
        "for t in 1 2 3 4 5; do r=$(iperf3 --client {HOST} --port {IPERF3_PORT} --time 2 --format k {direction} | grep receiver) && break; sleep 1; done; echo receiv''ed=$r"
    );
    let said = ask(running, &line, "received=")?;
    let rate = kilobits(&said);
    let rate = rate.ok_or_else(|| Failure::new(format!("iperf3 in Linux says: {said}")))?;
    Ok(Sample::new(name, "MB/s", rate / 8e3))
}

/// The number before the unit, in a line of `iperf3 --format k`.
fn kilobits(said: &str) -> Option<f64> {
    let (before, _) = said.split_once(" Kbits/sec")?;
    before.rsplit(' ').next()?.parse().ok()
}

/// Bytes per second of a stream.
fn stream(running: &mut Running, name: &str, to_guest: bool) -> Result<Sample> {
    let pace = FIRST_WRITES as f64 / carried(running, to_guest, FIRST_WRITES)?;
    let count = ((pace * SPAN) as u64).clamp(FIRST_WRITES, MOST_WRITES);
    let bytes = (count * WRITE) as f64;
    let seconds = carried(running, to_guest, count)?;
    Ok(Sample::new(name, "MB/s", bytes / seconds / 1e6))
}

/// Seconds that a stream of `count` writes takes, from the guest's connection to its end.
fn carried(running: &mut Running, to_guest: bool, count: u64) -> Result<f64> {
    let using = || format!("use a stream between {HOST} and the guest");
    let listener = TcpListener::bind((HOST, PORT)).cannot(using)?;
    let peer = std::thread::spawn(move || peer(&listener, to_guest, count));
    let line = match to_guest {
        true => format!("nc {HOST} {PORT} </dev/null >/dev/null"),
        false => {
            format!("dd if=/dev/zero bs={WRITE} count={count} 2>/dev/null | nc {HOST} {PORT}")
        }
    };
    ask(running, &format!("{line}; echo stream''ed=$?"), "streamed=")?;
    let (bytes, took) = peer.join().expect("a peer does not panic").cannot(using)?;
    if bytes != count * WRITE {
        return Err(Failure::new(format!(
            "of {} bytes {bytes} have come through",
            count * WRITE
        )));
    }
    Ok(took.as_secs_f64().max(1e-6))
}

/// The host's end of a stream: its bytes, and how long it lasted.
fn peer(listener: &TcpListener, to_guest: bool, count: u64) -> std::io::Result<(u64, Duration)> {
    let mut stream = accept(listener)?;
    let began = Instant::now();
    let mut bytes = 0;
    if to_guest {
        let zeros = vec![0; WRITE as usize];
        for _ in 0..count {
            stream.write_all(&zeros)?;
            bytes += WRITE;
        }
        stream.shutdown(Shutdown::Write)?;
    }
    bytes += std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok((bytes, began.elapsed()))
}

/// The guest's connection; a guest that makes none is waited for as long as for anything else.
fn accept(listener: &TcpListener) -> std::io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_when_of_an_uptime_are_subtracted() {
        assert_eq!(between("10.25,12.75"), Some(2.5));
        assert_eq!(between("10.25,10.25"), Some(0.01));
        assert_eq!(between("10.25,"), None);
    }

    #[test]
    fn rate_when_iperf3_says_it_is_read() {
        let line = "[  5]   0.00-2.00   sec  2383 KBytes  9762 Kbits/sec                  receiver";
        assert_eq!(kilobits(line), Some(9762.0));
        assert_eq!(kilobits("iperf3: error"), None);
    }
}
