//! What other programs of this user ask of the supervisor of a guest with a command: `mayfly-jailer start`,
//! `signal`, `state`. And the descriptor that is told when the guest is ready.

use rustix::io::Errno;
use serde_json::json;

use super::{GRACE_US, Watch};
use crate::run::agent::{Agent, Request};
use crate::run::outcome::Asked;
use crate::run::spec::Ender;

impl Watch {
    /// Answers what clients have asked.
    pub(super) fn answer_requests(&mut self) {
        while let Some((client, request)) = self.agent.as_mut().and_then(Agent::next_request) {
            let answer = match request {
                Request::Start => match self.agent.as_mut().map(|agent| agent.begin(client)) {
                    // When it has started.
                    Some(Ok(())) => continue,
                    Some(Err(why)) => Err(why.into()),
                    None => Err("the guest has ended".into()),
                },
                Request::Signal(number) => self.signal_for_client(number),
                Request::State => Ok(self.state()),
            };
            if let Some(agent) = &mut self.agent {
                agent.answer(client, answer);
            }
        }
    }

    /// Sends a signal to the command. One that would end it ends the microVM where there is no command yet; and a
    /// guest that does not let its command be killed is ended itself.
    fn signal_for_client(&mut self, number: u8) -> Result<String, String> {
        let signal = i32::from(number);
        let Some(agent) = &mut self.agent else {
            return Err("the guest has ended".into());
        };
        if agent.status().is_some() {
            return Err("the command has ended".into());
        }
        if agent.is_running() {
            agent.front().signal(signal);
            agent.settle();
            if signal == libc::SIGKILL {
                self.progress.kill_at_us = Some(self.now_us() + GRACE_US);
            }
            return Ok(String::new());
        }
        let is_passed_over = matches!(
            signal,
            0 | libc::SIGCHLD | libc::SIGCONT | libc::SIGURG | libc::SIGWINCH
        );
        if !is_passed_over {
            self.ask_to_end(Asked::Signal(signal));
        }
        Ok(String::new())
    }

    /// As of container engines, with the processes of this host.
    fn state(&self) -> String {
        let agent = self.agent.as_ref();
        let status = match agent {
            None => "stopped",
            Some(agent) if agent.status().is_some() => "stopped",
            Some(agent) if agent.has_started() => "running",
            Some(agent) if agent.is_held() && agent.is_ready() => "created",
            Some(_) => "creating",
        };
        json!({
            "id": self.spec.id,
            "status": status,
            "pid": std::process::id(),
            "monitor_pid": self.pid.as_raw_nonzero(),
        })
        .to_string()
    }

    /// Says once that the command runs, or that it could be started now.
    pub(super) fn tell_ready(&mut self) {
        let is_ready = |agent: &Agent| match agent.is_held() {
            true => agent.is_ready(),
            false => agent.has_started(),
        };
        if self.agent.as_ref().is_some_and(is_ready)
            && let Some(ready) = self.spec.ready.take()
        {
            let told = rustix::io::write(ready, b"1");
            // A reader that is gone does not want to know. One with which the microVM ends may have been gone before
            // it was known here: another process was taken for it then, and the guest would wait for ever.
            let ends = self.spec.options.with_parent && told == Err(Errno::PIPE);
            if ends {
                self.ask_to_end(Asked::Ender(Ender::Parent));
            }
        }
    }
}
