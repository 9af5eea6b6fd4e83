//! The agent's side of the frames: a packet socket on the interface whose only other end is the
//! supervisor.
//!
//! Why packets, and not the console: measured, a byte to the 16550 costs an exit from the guest, a frame
//! of 60 KiB one notification. Why no TCP: the guest's kernel would execute a whole stack for each
//! segment, and have an address that other interfaces of the guest reach.

use mayfly_agent_protocol::{
    AGENT_MAC, ETHER_TYPE, FRAME_MAX, Frame, Malformed, SUPERVISOR_MAC, frame,
};

use crate::sys::{self, Errno, Fd, InterfaceRequest};
use crate::text::Text;

/// Most interfaces that are looked at.
const INTERFACES: i32 = 32;
/// More than the windows of all processes' inputs.
const RECEIVE_BUFFER: i32 = 16 << 20;
const UP: u8 = 1;

pub struct Link {
    socket: Fd,
    peer: [u8; 20],
    /// Numbers of the next frames.
    sent: u32,
    received: u32,
    /// The last frame did not go, and is to be sent again.
    pub is_blocked: bool,
}

impl Link {
    /// Finds the interface, names it, and brings it up.
    pub fn open() -> Result<Link, Text> {
        let socket = sys::packet_socket()
            .map_err(|error| Text::of(b"make a packet socket (CONFIG_PACKET)", error))?;
        let Some((index, mut request)) = find(&socket, &AGENT_MAC) else {
            let mut text = Text::new();
            text.add(b"cannot find the agent's network interface");
            return Err(text);
        };
        let peer = sys::packet_address(index, ETHER_TYPE, SUPERVISOR_MAC);
        let mut open = || {
            // The name stays what it was if the kernel does not take it: it is for people.
            request.0[16..32].copy_from_slice(b"agent0\0\0\0\0\0\0\0\0\0\0");
            if request.ask(&socket, InterfaceRequest::SET_NAME).is_ok() {
                request.0[..16].copy_from_slice(b"agent0\0\0\0\0\0\0\0\0\0\0");
            }
            sys::set_receive_buffer(&socket, RECEIVE_BUFFER);
            // Before it is up, so that no frame is missed: the first one is there already. A socket that is bound to
            // an interface hears only a moment after that; so it is bound to all, with a filter.
            sys::take_only_from(&socket, index)?;
            sys::bind(&socket, &sys::packet_address(0, ETHER_TYPE, SUPERVISOR_MAC))?;
            bring_up(&socket, &mut request)
        };
        open().map_err(|error| Text::of(b"bring up the agent's network interface", error))?;
        Ok(Link {
            socket,
            peer,
            sent: 0,
            received: 0,
            is_blocked: false,
        })
    }

    /// What to wait for.
    pub fn number(&self) -> i32 {
        self.socket.number()
    }

    /// Sends what is in `frame`, which is empty then, unless it has to wait.
    pub fn flush(&mut self, frame: &mut Frame) {
        if frame.is_empty() {
            return;
        }
        self.is_blocked = match sys::send(&self.socket, frame.finish(self.sent), &self.peer) {
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => true,
            _ => {
                self.sent = self.sent.wrapping_add(1);
                frame.clear();
                false
            }
        };
    }

    /// The next frame, if one has come.
    pub fn receive<'a>(
        &mut self,
        into: &'a mut [u8; FRAME_MAX],
    ) -> Option<Result<frame::Messages<'a>, Malformed>> {
        let count = match sys::receive(&self.socket, into) {
            Ok(count) => count,
            // An interface that went down for a moment says so once.
            Err(_) => return None,
        };
        let expected = self.received;
        self.received = expected.wrapping_add(1);
        Some(frame::messages(&into[..count], expected))
    }
}

/// The number of the interface with an address, and a request that names it.
fn find(socket: &Fd, mac: &[u8]) -> Option<(i32, InterfaceRequest)> {
    for index in 1..=INTERFACES {
        let mut request = InterfaceRequest([0; 40]);
        request.0[16..20].copy_from_slice(&index.to_le_bytes());
        if request.ask(socket, InterfaceRequest::GET_NAME).is_err() {
            continue;
        }
        if request.ask(socket, InterfaceRequest::GET_MAC).is_ok() && request.0[18..24] == *mac {
            return Some((index, request));
        }
    }
    None
}

fn bring_up(socket: &Fd, request: &mut InterfaceRequest) -> sys::Result<()> {
    request.0[16..].fill(0);
    request.0[16] = UP;
    request.ask(socket, InterfaceRequest::SET_FLAGS)
}

/// The number of the interface with an address.
pub fn index_of(link: &Link, mac: &[u8]) -> Option<i32> {
    find(&link.socket, mac).map(|(index, _)| index)
}

/// Brings up the loopback interface, which programs expect.
pub fn bring_up_loopback(link: &Link) {
    let mut request = InterfaceRequest([0; 40]);
    request.0[..2].copy_from_slice(b"lo");
    let _ = bring_up(&link.socket, &mut request);
}
