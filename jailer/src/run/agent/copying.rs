//! Files on their way into the guest before its command starts (`--copy-in`): an archive that a child of this program
//! packs, and a process of the guest that unpacks it. It runs in the supervisor's loop, and never waits.

use mayfly_agent_protocol::{Frame, Message, Status, fields};

use super::AgentError;
use crate::console::Sink;
use crate::error::AnyError;
use crate::process::command::Body;
use crate::process::front::Front;
use crate::process::pack::{CopyIn, Packing};

/// The number of the process that unpacks what is copied in; no client's.
pub const COPY_IN: u32 = u32::MAX;

/// Files on their way into the guest.
#[derive(Debug)]
pub struct Copying {
    packing: Packing,
    /// This side of the process that unpacks.
    pub front: Front,
    /// The guest has been asked to unpack.
    pub is_asked: bool,
}

impl Copying {
    /// Starts to pack.
    pub fn start(copies: &[CopyIn]) -> Result<Copying, AnyError> {
        let (archive, packing) = Packing::start(copies)?;
        let sinks = [Sink::Nowhere, Sink::Tail(Vec::new())];
        Ok(Copying {
            packing,
            front: Front::with(COPY_IN, Some(archive), sinks),
            is_asked: false,
        })
    }

    /// Sends what is to be sent.
    pub fn say(&mut self, frame: &mut Frame) {
        if !self.is_asked {
            let mut body = Body::default();
            // Both are short and without zeros.
            let made = body
                .add(fields::UNPACK, b"/")
                .and_then(|()| body.add(fields::HAS_INPUT, b""))
                .and_then(|()| body.finish());
            self.is_asked = made.is_ok_and(|body| {
                frame.push(&Message::Start {
                    process: COPY_IN,
                    body: &body,
                })
            });
        }
        if self.is_asked {
            self.front.say(frame);
        }
    }

    /// What came of it.
    pub fn end(self) -> Result<(), AgentError> {
        let code = self.front.status.map_or(1, Status::code);
        let said = self.front.error_tail();
        // That closes the archive.
        drop(self.front);
        match self.packing.end() {
            Some(why) => Err(AgentError::CopyIn(why)),
            None if code == 0 => Ok(()),
            None => {
                let line = said.lines().last().unwrap_or_default();
                let text = format!("cannot copy into the guest (--copy-in): {line}");
                Err(AgentError::CopyIn(text))
            }
        }
    }
}
