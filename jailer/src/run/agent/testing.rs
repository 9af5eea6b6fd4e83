//! A session of the supervisor whose guest is played by a test.

use std::os::fd::OwnedFd;

use super::{Agent, Beginning, COMMAND, Front, Plan, RootMode};
use crate::console::{Sink, pipe};
use crate::process::command::Command;

/// A session that runs `true`, the guest's end of its link, and where the command's output comes out. Its errors go
/// nowhere.
pub fn session(beginning: Beginning, is_held: bool) -> (Agent, OwnedFd, OwnedFd) {
    let plan = Plan {
        hostname: "h".into(),
        root_type: "erofs",
        root_mode: RootMode::Overlay,
        command: Command {
            words: vec!["true".into()],
            ..Command::default()
        },
        is_held,
        is_sealed: false,
        upper_type: None,
        memory: Vec::new(),
        interface: None,
        copies: Vec::new(),
        renewal: None,
    };
    let (mut agent, link) = Agent::new(&plan, None, beginning).unwrap();
    let (out, to) = pipe(false, false).unwrap();
    let sinks = [Sink::Output { to, patient: false }, Sink::Nowhere];
    agent.front = Front::with(COMMAND, None, sinks);
    (agent, link, out)
}
