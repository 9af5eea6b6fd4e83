//! The serial thread: the host's side of the console.
//!
//! It owns the places that output goes to and input comes from, and waits for all of them at once.
//! It writes only where there is room, so its inbox always reaches it. Output comes from the ring
//! when [`Pace`] says so. It allocates nothing once it runs, and never exits before the process
//! does.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::clients::{CLIENTS, Clients};
use super::input::Input;
use super::pace::{Content, Pace, Plan};
use super::ring::{Ring, Wake};
use super::sink::Sink;
use super::{Counters, SerialEvent, SerialMessage, SerialPort};
use crate::inbox::{Inbox, Outbox};
use crate::rate_limiter::TokenBucket;
use crate::sys::clock;
use crate::sys::fd::{self, Interest};

/// How long a reader may take none of the last output before the rest is given up, in ms.
pub(super) const LAST_PATIENCE: u32 = 50;
/// How long newcomers are left alone when the last could not be taken, in ms.
const REST_MILLIS: u32 = 50;
/// How long a terminal that belongs to another job is left alone, in ms.
const BACKGROUND_MILLIS: u32 = 1000;

/// The serial thread's own.
#[derive(Debug)]
pub struct Console {
    pub(super) port: Arc<SerialPort>,
    pub(super) ring: Arc<Ring>,
    /// Written to when the ring has what this waits for, and when the UART has room for input.
    pub(super) wakeup: EventFd,
    pub(super) input: Input,
    pub(super) output: Sink,
    pub(super) pace: Pace,
    pub(super) limit: Option<TokenBucket>,
    pub(super) clients: Option<Clients>,
    pub(super) messages: Inbox<SerialMessage>,
    pub(super) events: Outbox<SerialEvent>,
    pub(super) counters: Arc<Counters>,
    /// The guest has ended: all that is left is written, then control is told.
    pub(super) finishing: bool,
    /// [`LAST_PATIENCE`]
    pub(super) last_patience: u32,
}

impl Console {
    /// What it and the UART count.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The life of the thread.
    ///
    /// # Errors
    /// When the host cannot wait for descriptors (it is out of memory).
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let mark = self.ring.mark();
            let (wake, millis) = match self.plan() {
                Plan::Take => {
                    self.take_output();
                    continue;
                }
                Plan::Wait(wake, millis) => (wake, millis),
            };
            if self.ring.waits_for(wake, mark) {
                self.wait(millis)?;
            }
        }
    }

    /// What to do about output.
    fn plan(&mut self) -> Plan {
        let content = Content {
            len: self.ring.len(),
            ends_line: self.ring.ends_line(),
        };
        if self.output.held() > 0 {
            // There is no room for more.
            Plan::Wait(Wake::Never, None)
        } else if !self.finishing {
            self.pace.plan(clock::monotonic_nanos(), content)
        } else if content.len > 0 {
            Plan::Take
        } else {
            Plan::Wait(Wake::Any, None)
        }
    }

    /// Moves output from the ring, as far as there is room, to where it is written from.
    fn take_output(&mut self) {
        let Console {
            ring,
            output,
            limit,
            clients,
            counters,
            ..
        } = self;
        output.fill(|bytes| ring.take(bytes));
        if let Some(limit) = limit {
            let came = output.held() as u64;
            let kept = limit.take_some(clock::monotonic_nanos(), came);
            counters.limited.add(came.saturating_sub(kept));
            output.cut(usize::try_from(kept).unwrap_or(usize::MAX));
        }
        if let Some(clients) = clients {
            clients.keep(output.give_up(), counters);
        }
    }

    /// Waits for anything to do, for at most `millis`, and does it.
    fn wait(&mut self, millis: Option<u32>) -> io::Result<()> {
        let typing = self.port.room() > 0;
        let (newcomer, clients) = match &self.clients {
            Some(clients) => clients.interests(typing),
            None => (Interest::none(), [Interest::none(); CLIENTS]),
        };
        let output = match &self.clients {
            Some(clients) => {
                Interest::write(self.output.file().as_raw_fd()).when(clients.output_is_behind())
            }
            None => self.output.interest(),
        };
        let [one, two, three, four] = clients;
        let mut interests = [
            Interest::read(self.messages.as_raw_fd()),
            Interest::read(self.wakeup.as_raw_fd()),
            self.input.interest().when(typing),
            output,
            newcomer,
            one,
            two,
            three,
            four,
        ];
        let millis = self.patience(millis);
        fd::wait(&mut interests, millis)?;
        let idle = !interests.iter().any(Interest::is_ready);
        let [message, wakeup, input, output, newcomer, clients @ ..] = interests;

        if self.finishing && idle {
            let _ = self.events.post(SerialEvent::Finished);
            self.finishing = false;
        }
        if message.is_ready() {
            self.messages.silence();
            while let Some(SerialMessage::Finish) = self.messages.next() {
                self.finishing = true;
            }
        }
        if wakeup.is_ready() {
            let _ = self.wakeup.read();
        }
        if input.is_ready() && self.input.step(input, &self.port) {
            let _ = self.events.post(SerialEvent::InputIsBack);
        }
        if let Some(all) = &mut self.clients {
            all.serve(&clients, &self.port);
            if newcomer.is_ready() {
                all.accept();
            }
            if output.is_ready() {
                all.write_output(self.output.file(), &self.counters);
            }
        } else if output.is_ready() {
            self.counters.lost.add(self.output.write());
        }
        Ok(())
    }

    /// How long to wait at most, in ms, when output would wait for `millis`.
    fn patience(&mut self, millis: Option<u32>) -> Option<u32> {
        if self.finishing {
            // The guest is silent: what is not there at once, or held, will not come.
            return Some(if self.holds_any() {
                self.last_patience
            } else {
                0
            });
        }
        let clients = self.clients.as_mut().is_some_and(Clients::rests);
        let input = self.input.rests();
        [
            millis,
            clients.then_some(REST_MILLIS),
            input.then_some(BACKGROUND_MILLIS),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether bytes wait for room in their place.
    fn holds_any(&self) -> bool {
        let clients = self.clients.as_ref().is_some_and(Clients::is_behind);
        clients || self.output.held() > 0
    }
}
