//! The announcement of an interface that goes on elsewhere: a RARP request for its own MAC address, by
//! which switches learn where its frames are to be sent now. QEMU does the same after a migration.
//! Nothing answers it.

use super::{HEADER, Net};
use crate::sys::io::ErrorText;
use crate::sys::packets::write_packet;
use vm_memory::VolatileSlice;

/// The shortest frame that Ethernet has, without its checksum.
const FRAME: usize = 60;
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet, IPv4, the lengths of their addresses, "request reverse" (RFC 903).
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
const IPV4_UNKNOWN: [u8; 4] = [0; 4];

impl Net {
    /// Tells the network where the interface is now. A tap that does not take it is harmless: the guest's
    /// first frame says the same.
    pub(super) fn announce(&mut self) {
        let Some(mac) = self.mac else {
            // Only the guest knows what it has chosen.
            return;
        };
        // A socket leads to one process, and is not a network.
        if self.gone || self.link.is_socket() {
            return;
        }
        let mut packet = announcement(mac);
        let packet = VolatileSlice::from(&mut packet[..]);
        match write_packet(&self.link, std::iter::once(packet)) {
            Ok(_) => self.counters.announcements.one(),
            Err(error) => {
                crate::warn!(
                    "cannot announce the network interface: {}",
                    ErrorText(&error)
                );
                self.note_if_gone(&error);
            }
        }
    }
}

/// The frame that announces `mac`, with an empty virtio-net header in front.
fn announcement(mac: [u8; 6]) -> [u8; HEADER as usize + FRAME] {
    let parts: [&[u8]; 9] = [
        &[0; HEADER as usize],
        &[0xff; 6],
        &mac,
        &ETHERTYPE_RARP,
        &REQUEST,
        &mac,
        &IPV4_UNKNOWN,
        &mac,
        &IPV4_UNKNOWN,
    ];
    let mut packet = [0; HEADER as usize + FRAME];
    for (to, from) in packet.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    packet
}
