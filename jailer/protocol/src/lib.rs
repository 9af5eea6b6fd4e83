//! What the agent in a guest and the supervisor on the host say to each other: frames of messages, and
//! the credit without which no stream's bytes are sent.
//!
//! Pure: no input or output, no thread, no allocation. Every decoder takes its input for hostile: what is
//! malformed is an error, nothing is read beyond a length that was checked, and nothing is kept.
//!
//! ```text
//!   frame     version (1) | 0 (1) | length of the messages (2) | sequence number (4) | messages
//!   message   kind (1) | stream (1) | 0 (2) | process (4) | length of the body (4) | body
//! ```
//!
//! - All numbers are little-endian. `frame` has both formats, `message` the kinds, `fields` the bodies
//!   of those that carry several values, `credit` the flow control, `archive` the stream of `cp`.
//! - Each side numbers its frames from 0. A frame that was lost, or came twice, is found by that.
//! - A process is known by a number that the supervisor chooses. 1 is the command of the microVM, whose
//!   end is the end of the guest.

#![cfg_attr(not(any(test, fuzzing)), no_std)]

pub mod archive;
pub mod credit;
pub mod fields;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
#[path = "../../../tests/common/fuzz_run.rs"]
mod fuzz_run;
pub mod message;

pub use credit::{Receiver, Sender};
pub use fields::{Field, Fields};
pub use frame::{Frame, HEADER, VERSION, messages};
pub use message::{Message, Status, Stream};

/// The EtherType of frames between agent and supervisor: the first of IEEE 802's two for local
/// experiments.
pub const ETHER_TYPE: u16 = 0x88b5;
/// The address of the agent's interface, by which it finds it. Locally administered.
pub const AGENT_MAC: [u8; 6] = [0x06, 0x6d, 0x66, 0x61, 0x67, 0x74];
/// The address of the supervisor's end.
pub const SUPERVISOR_MAC: [u8; 6] = [0x06, 0x6d, 0x66, 0x73, 0x75, 0x70];
/// The length of an Ethernet header.
pub const ETHERNET: usize = 14;

/// Largest frame, with its header: it fits an interface with the largest MTU that virtio can name.
pub const FRAME_MAX: usize = 65_024;
/// Most bytes of a stream in one message.
pub const DATA_MAX: usize = 61_440;
/// Most bytes of the body of another message.
pub const BODY_MAX: usize = 61_440;
/// Longest text that an agent may give as a reason.
pub const TEXT_MAX: usize = 1024;
/// Processes that an agent runs at once: the command, and further ones.
pub const PROCESSES_MAX: usize = 32;
/// The number of the command.
pub const COMMAND: u32 = 1;
/// Bytes of a standard input that an agent takes before it has passed on any.
pub const INPUT_WINDOW: u32 = 128 * 1024;
/// Bytes of an output that the supervisor takes before it has passed on any.
pub const OUTPUT_WINDOW: u32 = 256 * 1024;

/// What came is not of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Of a frame: it ends before its header says, or in its header.
    Short,
    /// Another version of the protocol.
    Version(u8),
    /// A frame is missing or came twice.
    Sequence {
        /// The number that was to come.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// The bytes that are 0 are not.
    Reserved,
    /// A message of this kind is not known, or not for this side.
    Kind(u8),
    /// A stream of this number is not known, or not for this message.
    Stream(u8),
    /// A body is longer or shorter than one of its kind.
    Length(u32),
    /// A field of a body is malformed.
    Field(u8),
    /// More bytes were sent than there was credit for.
    Credit,
}

impl core::fmt::Display for Malformed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Malformed::Short => f.write_str("a frame is cut short"),
            Malformed::Version(version) => {
                write!(
                    f,
                    "it speaks version {version} of the protocol, not {VERSION}"
                )
            }
            Malformed::Sequence { expected, found } => {
                write!(f, "frame {found} came in place of frame {expected}")
            }
            Malformed::Reserved => f.write_str("reserved bytes are in use"),
            Malformed::Kind(kind) => write!(f, "unexpected message of kind {kind}"),
            Malformed::Stream(stream) => write!(f, "unexpected stream {stream}"),
            Malformed::Length(length) => write!(f, "a message has the wrong length {length}"),
            Malformed::Field(tag) => write!(f, "field {tag} of a message is malformed"),
            Malformed::Credit => f.write_str("more bytes were sent than there was credit for"),
        }
    }
}

impl core::error::Error for Malformed {}

/// A little-endian number at `at`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    let bytes = bytes.get(at..end)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

/// A little-endian number at `at`.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let end = at.checked_add(2)?;
    let bytes = bytes.get(at..end)?.first_chunk()?;
    Some(u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests;
