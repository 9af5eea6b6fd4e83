//! The host's side of a network interface under load: a thread that sends to a tap, or answers what comes from it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::failure::{Context, Failure, Result};
use crate::sys;

/// Headers of a TCP segment, and the data between two of them after it was cut up.
const TCP_HEADERS: usize = 54;
const SEGMENT: usize = 1448;
/// A frame of TCP of 45 segments.
pub const LARGE: usize = TCP_HEADERS + 45 * SEGMENT;
/// Bytes on their way to the guest before the sending thread sleeps.
const SENDING: i32 = 512 << 10;
/// How soon threads of the host notice that they are no longer needed.
const NOTICE: Duration = Duration::from_millis(50);

/// Kinds of traffic, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The guest sends; the host's stack drops what comes.
    Transmit,
    /// The guest receives.
    Receive,
    /// One frame that goes to and fro.
    PingPong,
}

impl Mode {
    /// What the probe guest calls it.
    pub fn word(self) -> &'static str {
        match self {
            Mode::Transmit => "tx",
            Mode::Receive => "rx",
            Mode::PingPong => "pingpong",
        }
    }
}

/// Lets a tap carry frames, and none that no one asked for.
pub fn bring_up(tap: &str) -> Result<()> {
    // Where there is no IPv6, nothing has to be turned off.
    let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let up = Command::new("ip").args(["link", "set", tap, "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        return Err(Failure::new(format!(
            "cannot bring the tap {tap} up: is iproute2 installed?"
        )));
    }
    Ok(())
}

/// A thread on the other side of the tap.
#[derive(Debug)]
pub struct Peer {
    tap: String,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Peer {
    /// Starts what such traffic at a tap needs, if it needs something; frames that are sent have `size` bytes.
    pub fn start(tap: &str, mode: Mode, size: usize) -> Result<Option<Self>> {
        let opening = || format!("open a socket on {tap}");
        let enough = Arc::new(AtomicBool::new(false));
        let noticed = enough.clone();
        let thread = match mode {
            Mode::Transmit => return Ok(None),
            Mode::Receive => {
                let socket = sys::frame_socket(tap).cannot(opening)?;
                sys::with_header(&socket).cannot(opening)?;
                sys::limit_sending(&socket, SENDING).cannot(opening)?;
                sys::limit_waiting(&socket, NOTICE).cannot(opening)?;
                let frame = frame(size, SOCKET_HEADER);
                std::thread::spawn(move || send(&socket, &frame, &noticed))
            }
            Mode::PingPong => {
                let socket = sys::experiment_socket(tap).cannot(opening)?;
                sys::limit_waiting(&socket, NOTICE).cannot(opening)?;
                std::thread::spawn(move || answer(socket, &noticed))
            }
        };
        Ok(Some(Self {
            tap: tap.to_owned(),
            enough,
            thread,
        }))
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.enough.store(true, Ordering::Relaxed);
        let ended = self.thread.join().expect("a peer does not panic");
        ended.cannot(|| format!("send frames to {}", self.tap))
    }
}

/// Sends a frame again and again. Writes wait while too much is on its way.
fn send(socket: &fs::File, frame: &[u8], enough: &AtomicBool) -> std::io::Result<()> {
    while !enough.load(Ordering::Relaxed) {
        match sys::send_many(socket, frame) {
            Ok(()) => {}
            Err(error) if is_for_now(&error) => {}
            // The queue of the interface is full.
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => std::thread::yield_now(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

const ENOBUFS: i32 = 105;

/// Sends each frame back to where it came from.
fn answer(mut socket: fs::File, enough: &AtomicBool) -> std::io::Result<()> {
    let mut frame = [0; 2048];
    while !enough.load(Ordering::Relaxed) {
        let len = match socket.read(&mut frame) {
            Ok(len) => len,
            Err(error) if is_for_now(&error) => continue,
            Err(error) => return Err(error),
        };
        if len < 14 {
            continue;
        }
        let (to, from) = frame.split_at_mut(6);
        to.copy_from_slice(&from[..6]);
        socket.write_all(&frame[..len])?;
    }
    Ok(())
}

fn is_for_now(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Size of the header that a socket takes before a frame.
const SOCKET_HEADER: usize = 10;

/// A frame of `size` bytes behind a virtio-net header of `header` bytes. A large one is a TCP segment to be cut up.
pub fn frame(size: usize, header: usize) -> Vec<u8> {
    let mut bytes = vec![0; header + size];
    let (virtio, frame) = bytes.split_at_mut(header);
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    if size <= 1514 {
        frame[12..14].copy_from_slice(&sys::EXPERIMENT.to_be_bytes());
        return bytes;
    }
    // Flags: the checksum is still to be made; then the kind (TCP over IPv4) and sizes.
    virtio[..2].copy_from_slice(&[1, 1]);
    for (at, value) in [(2, TCP_HEADERS), (4, SEGMENT), (6, 34), (8, 16)] {
        virtio[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    frame[12..14].copy_from_slice(&[8, 0]);
    let ip = &mut frame[14..];
    let length = ip.len() as u16;
    ip[..2].copy_from_slice(&[0x45, 0]);
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    ip[8..10].copy_from_slice(&[64, 6]);
    // Addresses for measurements (RFC 2544).
    ip[12..20].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    let sum: u32 = ip[..20]
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip[20..24].copy_from_slice(&[0x13, 0x89, 0x13, 0x89]);
    ip[32..36].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_when_large_has_a_right_ip_header() {
        let bytes = frame(LARGE, SOCKET_HEADER);
        let ip = &bytes[SOCKET_HEADER + 14..];
        let sum: u32 = ip[..20]
            .chunks(2)
            .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(u16::from_be_bytes([ip[2], ip[3]]) as usize, LARGE - 14);
    }
}
