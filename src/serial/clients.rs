//! The console's socket: clients that come and go while the guest runs, each shown the last
//! 64 KiB of output first, and each able to type.
//!
//! Output lies in one ring. Every reader, the console's usual place among them, has a position of
//! its own in it: one that is too slow skips what was overwritten, which is counted, and costs
//! the others nothing. Nothing is allocated once the guest runs, and a client that goes is
//! forgotten.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use super::port::SerialPort;
use super::sink::CHUNK;
use super::{Counters, uart};
use crate::sys::fd::{self, Interest};
use crate::sys::socket;

/// Output that is kept, in bytes.
pub const REPLAY: usize = 64 * 1024;
/// Clients at once; one more is turned away.
pub const CLIENTS: usize = 4;

/// What the guest has written lately.
#[derive(Debug)]
struct Ring {
    bytes: Box<[u8]>,
    /// Bytes ever written.
    end: u64,
}

impl Ring {
    fn new() -> Self {
        Ring {
            bytes: vec![0; REPLAY].into_boxed_slice(),
            end: 0,
        }
    }

    /// The index of position `at`: a ring's size is a power of two.
    fn index(at: u64) -> usize {
        (at & (REPLAY as u64).wrapping_sub(1)) as usize
    }

    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(room) = self.bytes.get_mut(Self::index(self.end)..) else {
                return;
            };
            let (now, later) = bytes.split_at(bytes.len().min(room.len()));
            for (to, from) in room.iter_mut().zip(now) {
                *to = *from;
            }
            self.end = self.end.saturating_add(now.len() as u64);
            bytes = later;
        }
    }

    /// The oldest position that is still there.
    fn begin(&self) -> u64 {
        self.end.saturating_sub(REPLAY as u64)
    }

    /// Moves `at` to what is still there; how many bytes that skips.
    fn catch_up(&self, at: &mut u64) -> u64 {
        let skipped = self.begin().saturating_sub(*at);
        *at = at.saturating_add(skipped);
        skipped
    }

    /// What comes at `at`, as far as it lies in one piece.
    fn read(&self, at: u64) -> &[u8] {
        let left = usize::try_from(self.end.saturating_sub(at)).unwrap_or(0);
        let piece = self.bytes.get(Self::index(at)..).unwrap_or_default();
        piece.get(..left.min(piece.len())).unwrap_or_default()
    }
}

/// One client.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    /// Where it is in the ring.
    at: u64,
    /// It types no more.
    input_ended: bool,
}

/// The socket and all who read from the ring.
#[derive(Debug)]
pub struct Clients {
    listener: UnixListener,
    ring: Ring,
    clients: [Option<Client>; CLIENTS],
    /// Where the console's usual place is in the ring.
    output_at: u64,
    /// The last newcomer could not be taken: for one wait, none is looked for.
    resting: bool,
}

const _: () = assert!(REPLAY.is_power_of_two());

impl Clients {
    pub fn new(listener: UnixListener) -> Self {
        Clients {
            listener,
            ring: Ring::new(),
            clients: [const { None }; CLIENTS],
            output_at: 0,
            resting: false,
        }
    }

    /// Keeps what the guest has written.
    pub fn keep(&mut self, output: &[u8], counters: &Counters) {
        self.ring.write(output);
        counters.lost.add(self.ring.catch_up(&mut self.output_at));
        for client in self.clients.iter_mut().flatten() {
            counters.skipped.add(self.ring.catch_up(&mut client.at));
        }
    }

    /// Whether the console's usual place has not had all yet.
    pub fn output_is_behind(&self) -> bool {
        self.output_at < self.ring.end
    }

    /// Writes to the console's usual place what it takes.
    pub fn write_output(&mut self, mut place: &File, counters: &Counters) {
        let piece = self.ring.read(self.output_at);
        match place.write(piece.get(..CHUNK).unwrap_or(piece)) {
            Ok(n) => self.output_at = self.output_at.saturating_add(n as u64),
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(_) => {
                counters.lost.add(piece.len() as u64);
                self.output_at = self.output_at.saturating_add(piece.len() as u64);
            }
        }
    }

    /// What to wait for: newcomers, and each client. Input only if `typing` has room for it.
    pub fn interests(&self, typing: bool) -> (Interest, [Interest; CLIENTS]) {
        let mut all = [Interest::none(); CLIENTS];
        for (interest, client) in all.iter_mut().zip(&self.clients) {
            if let Some(client) = client {
                let reads = typing && !client.input_ended;
                // All have ended their input: only then is an end looked for without it.
                let gone = client.input_ended;
                let writes = client.at < self.ring.end;
                let wanted = reads || writes || gone;
                *interest = Interest::both(client.socket.as_raw_fd(), reads, writes).when(wanted);
            }
        }
        let newcomer = Interest::read(self.listener.as_raw_fd());
        (newcomer.when(!self.resting), all)
    }

    /// Whether newcomers are not looked for in the wait that follows; they are in the next.
    pub fn rests(&mut self) -> bool {
        std::mem::take(&mut self.resting)
    }

    /// Whether any reader has not had all yet.
    pub fn is_behind(&self) -> bool {
        let mut clients = self.clients.iter().flatten();
        self.output_is_behind() || clients.any(|client| client.at < self.ring.end)
    }

    /// Takes one newcomer.
    pub fn accept(&mut self) {
        let socket = match socket::accept(&self.listener) {
            Ok(socket) => socket,
            Err(e) => {
                // Out of descriptors: the newcomer stays where it is, and is not asked about
                // again at once.
                self.resting = !passing(&e);
                return;
            }
        };
        if self.clients.iter().all(Option::is_some) {
            self.remove_one_gone();
        }
        // One too many is closed at once.
        if let Some(free) = self.clients.iter_mut().find(|client| client.is_none()) {
            *free = Some(Client {
                socket,
                at: self.ring.begin(),
                input_ended: false,
            });
        }
    }

    /// Gives up one that has gone, and from which there was no room to read.
    fn remove_one_gone(&mut self) {
        let gone = self.clients.iter_mut().find(|client| {
            let socket = client.as_ref().map(|client| client.socket.as_raw_fd());
            let mut looked = [Interest::both(socket.unwrap_or(-1), false, false)];
            fd::wait(&mut looked, Some(0)).is_ok() && looked[0].hung_up()
        });
        if let Some(gone) = gone {
            *gone = None;
        }
    }

    /// Does for each client what it is ready for; what one types goes to `port`.
    pub fn serve(&mut self, ready: &[Interest; CLIENTS], port: &SerialPort) {
        for (slot, ready) in self.clients.iter_mut().zip(ready) {
            if !ready.is_ready() {
                continue;
            }
            if let Some(client) = slot
                && client.serve(*ready, &self.ring, port).is_err()
            {
                *slot = None;
            }
        }
    }
}

impl Client {
    /// # Errors
    /// It has gone.
    fn serve(&mut self, ready: Interest, ring: &Ring, port: &SerialPort) -> io::Result<()> {
        if ready.may_read() && !self.input_ended {
            self.receive(port)?;
        }
        let piece = ring.read(self.at);
        if !piece.is_empty() {
            match socket::send_now(&self.socket, piece) {
                Ok(n) => self.at = self.at.saturating_add(n as u64),
                Err(e) if passing(&e) => {}
                Err(e) => return Err(e),
            }
        }
        if ready.hung_up() && self.input_ended {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }

    /// Moves to the UART what it has room for.
    fn receive(&mut self, port: &SerialPort) -> io::Result<()> {
        let mut bytes = [0; uart::LINE];
        let Some(bytes) = bytes.get_mut(..port.room()).filter(|b| !b.is_empty()) else {
            return Ok(());
        };
        match socket::receive_now(&self.socket, bytes) {
            Ok(0) => self.input_ended = true,
            Ok(n) => {
                port.feed(bytes.get(..n).unwrap_or_default());
            }
            Err(e) if passing(&e) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// Whether to try again later.
fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_when_overrun_keeps_the_last_of_it() {
        let mut ring = Ring::new();
        let (mut first, mut slow) = (0, 0);
        ring.write(b"hello");
        assert_eq!(ring.read(first), b"hello");
        first += 5;
        assert_eq!(ring.read(first), b"");
        for n in 0..20_000u32 {
            ring.write(&n.to_le_bytes());
        }
        assert_eq!(ring.end, 80_005);
        assert_eq!(ring.catch_up(&mut slow), 80_005 - REPLAY as u64);
        let mut all = Vec::new();
        while !ring.read(slow).is_empty() {
            let piece = ring.read(slow);
            all.extend_from_slice(piece);
            slow += piece.len() as u64;
        }
        assert_eq!(all.len(), REPLAY);
        assert_eq!(all[REPLAY - 4..], 19_999u32.to_le_bytes());
        assert_eq!(ring.catch_up(&mut slow), 0);
    }
}
