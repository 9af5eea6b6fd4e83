//! The witness as a guest on its tap: it asks for a neighbour and sends it a datagram, frame by frame.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// The header in front of every frame: `struct virtio_net_hdr` with `num_buffers`, as `tap` sets it.
const HEADER: usize = 12;
const OWN: [u8; 6] = [6, 0, 1, 2, 3, 4];
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends `text` to `to` by way of `gateway`, and returns the answer.
pub fn ask(
    tap: &File,
    own: Ipv4Addr,
    gateway: Ipv4Addr,
    to: (Ipv4Addr, u16),
    text: &[u8],
) -> Option<Vec<u8>> {
    let start = Instant::now();
    let mut gateway_mac = None;
    let mut asked_at: Option<Instant> = None;
    while start.elapsed() < PATIENCE {
        if asked_at.is_none_or(|at| at.elapsed() > Duration::from_millis(300)) {
            asked_at = Some(Instant::now());
            let frame = match gateway_mac {
                None => arp(1, [0xff; 6], own, gateway),
                Some(mac) => udp(mac, own, to, text),
            };
            send(tap, &frame);
        }
        let Some(frame) = receive(tap) else { continue };
        let address = |at: usize| {
            Some(Ipv4Addr::from(
                <[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?,
            ))
        };
        match frame.get(12..14)? {
            // ARP: an answer, or a question about our address.
            [8, 6] if frame.get(20..22)? == [0, 2] && address(28)? == gateway => {
                gateway_mac = Some(frame[6..12].try_into().ok()?);
                asked_at = None;
            }
            [8, 6] if frame.get(20..22)? == [0, 1] && address(38)? == own => {
                let asker = frame[6..12].try_into().ok()?;
                send(tap, &arp(2, asker, own, address(28)?));
            }
            // UDP from whom it went to.
            [8, 0] if frame.get(23)? == &17 && address(26)? == to.0 && address(30)? == own => {
                let length = usize::from(u16::from_be_bytes([frame[38], frame[39]]));
                return frame.get(42..34 + length).map(<[u8]>::to_vec);
            }
            _ => {}
        }
    }
    None
}

fn send(mut tap: &File, frame: &[u8]) {
    let mut bytes = vec![0; HEADER];
    bytes.extend(frame);
    bytes.resize(bytes.len().max(HEADER + 60), 0);
    // The interface may not be up yet.
    let _ = tap.write(&bytes);
}

fn receive(mut tap: &File) -> Option<Vec<u8>> {
    let mut bytes = [0; 2048];
    match tap.read(&mut bytes) {
        Ok(count) if count > HEADER + 14 => Some(bytes[HEADER..count].to_vec()),
        _ => {
            std::thread::sleep(Duration::from_millis(2));
            None
        }
    }
}

fn arp(operation: u8, to: [u8; 6], own: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let target_mac = if operation == 1 { [0; 6] } else { to };
    [
        &to[..],
        &OWN,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
        &OWN,
        &own.octets(),
        &target_mac,
        &target.octets(),
    ]
    .concat()
}

fn udp(gateway: [u8; 6], own: Ipv4Addr, to: (Ipv4Addr, u16), text: &[u8]) -> Vec<u8> {
    let length = |bytes: usize| (bytes as u16).to_be_bytes();
    let mut ip = [
        &[0x45, 0][..],
        &length(28 + text.len()),
        &[0, 1, 0, 0, 64, 17, 0, 0],
        &own.octets(),
        &to.0.octets(),
    ]
    .concat();
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !(((folded & 0xffff) + (folded >> 16)) as u16);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    [
        &gateway[..],
        &OWN,
        &[8, 0],
        &ip,
        // From a port of ours; without a checksum, which IPv4 allows.
        &4000_u16.to_be_bytes(),
        &to.1.to_be_bytes(),
        &length(8 + text.len()),
        &[0, 0],
        text,
    ]
    .concat()
}
