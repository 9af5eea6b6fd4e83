//! The API THREAD: accepts connections, reads requests, asks control, writes answers.
//!
//! It owns the listening socket, up to [`CONNECTIONS_MAX`] connections and an inbox for control's
//! answers, and waits for all of them in one epoll set and for nothing else: reads, writes and
//! questions to control are tried, never waited for. A connection asks one question at a time,
//! which keeps pipelined answers in order, and is not read from while one is open, which bounds
//! what it can make this thread hold. A client that stalls delays itself. One client's bytes, in
//! and out, are in connection.rs; who is served, and who gives way to whom, in places.rs; what is
//! asked and answered, in questions.rs; the loop is here.
//!
//! Descriptors come along with bytes (SCM_RIGHTS). Those that came with the first byte of a request
//! go with it to control, which claims them; all others are closed here, at once. A request that
//! is half sent keeps its own, but only a few may do so at a time, and one that stalls gives way.
//!
//! A connection is never closed in the face of a client that may be writing: after the last answer
//! this side is closed, and what still comes is thrown away for a while. Where the place is needed
//! at once, the client is told so as far as it can be (503).
//!
//! ```text
//!            bytes      pieces              Command            (token, Answer)       bytes
//!   client -------> Decoder -----> routes ----------> control ----------------> routes -----> client
//!                  (http.rs)    (routes.rs)                                     (http.rs)
//! ```
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod bind;
mod connection;
mod counters;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod http;
#[cfg(test)]
mod openapi;
mod paths;
mod places;
mod questions;
mod responses;
pub mod routes;
#[cfg(test)]
mod testing;

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::inbox::{self, Inbox, Outbox};
use crate::metrics::Reader;
use crate::sys::passed::Passed;
use crate::sys::process;
use crate::vmm::action::{Answer, Command, PendingReplies};
pub use bind::bind;
use connection::{Connection, DRAIN_PATIENCE, Flush, STALLED};
use counters::Counters;
use http::{Piece, Response};

/// Most connections at once. When a new one needs its place, an idle one is closed.
pub const CONNECTIONS_MAX: usize = 256;

/// Fewest connections at once, however few descriptors the process may have.
const CONNECTIONS_MIN: usize = 8;

/// Questions that control may owe an answer: half of the places in its inbox. Further ones wait
/// in their connections.
const OUTSTANDING_MAX: usize = 128;

/// Most bytes taken from a connection before others have their turn.
const READ_MAX: usize = 16 * 1024;

/// Steps that one connection may make before others have their turn.
const STEPS_MAX: usize = 64;

/// One connection for so many descriptors of the process may hold descriptors of a request that is
/// half sent: with 32 each, that is a quarter of them all.
const PER_HOLDER: usize = 128;

/// How long to go on asking when control's inbox is full.
const BUSY: Duration = Duration::from_secs(if cfg!(test) { 4 } else { 10 });

/// Between looks at what nothing wakes this thread for: room in control's inbox, room for a
/// newcomer, deadlines.
const RETRY: Duration = Duration::from_millis(10);
const REOPEN: Duration = Duration::from_millis(100);
const DEADLINES: Duration = Duration::from_secs(1);

/// Tokens in the epoll set; connections have numbers below.
const LISTENER: u64 = u64::MAX;
const ANSWERS: u64 = u64::MAX - 1;

/// A token's low bits are the connection's place, the others make it unique.
const PLACE_BITS: u32 = 16;

/// A message in the answers' inbox; boxed so that the inbox stays small.
#[derive(Debug)]
struct Answered {
    token: u64,
    answer: Box<Answer>,
}

impl From<(u64, Answer)> for Answered {
    fn from((token, answer): (u64, Answer)) -> Self {
        Answered {
            token,
            answer: Box::new(answer),
        }
    }
}

/// The state of the API thread.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// Whether the epoll set has the listener: not while there is no place for a connection.
    listening: bool,
    /// A connection that was accepted and has no place yet.
    newcomer: Option<UnixStream>,
    epoll: Epoll,
    to_control: Outbox<Command>,
    answers: Inbox<Answered>,
    /// Control's way back; it is lent to every question.
    answer_to: Outbox<(u64, Answer)>,
    /// Questions that control has not answered.
    outstanding: usize,
    /// How many of control's answers are not written yet; control looks at it before it ends.
    pending: PendingReplies,
    payload_max: usize,
    /// Most connections that may hold descriptors of a request that is half sent.
    holders_max: usize,
    /// Boxed: places that were never taken cost next to nothing.
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    /// Connections that have more to do than one turn allowed.
    again: Vec<u64>,
    /// Whether a request waits for room in control's inbox.
    busy: bool,
    /// How long a request may be half sent before others come first.
    stalled: Duration,
    /// How long to read on behind a connection's last answer.
    drain_patience: Duration,
    /// Whether a connection has had its last answer and is not closed yet.
    draining: bool,
    scratch: Vec<u8>,
    /// The number of the last token.
    count: u64,
    /// When this turn began.
    now: Instant,
    /// When it was last looked at deadlines.
    looked: Instant,
    counters: Arc<Counters>,
}

impl Server {
    /// A server for `listener` that asks `to_control` and takes bodies of at most `payload_max`
    /// bytes.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(
        listener: UnixListener,
        to_control: Outbox<Command>,
        payload_max: usize,
    ) -> io::Result<Self> {
        let (sender, answers) = inbox::inbox::<Answered>(OUTSTANDING_MAX)?;
        let epoll = Epoll::new()?;
        listener.set_nonblocking(true)?;
        let add = |fd: RawFd, token| {
            let event = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        add(listener.as_raw_fd(), LISTENER)?;
        add(answers.as_raw_fd(), ANSWERS)?;
        // Control needs descriptors too.
        let limit = usize::try_from(process::descriptor_limit()).unwrap_or(usize::MAX);
        let half = limit.checked_div(2).unwrap_or_default();
        let places = half.clamp(CONNECTIONS_MIN, CONNECTIONS_MAX);
        let holders = limit.checked_div(PER_HOLDER).unwrap_or_default();
        Ok(Server {
            listener,
            listening: true,
            newcomer: None,
            epoll,
            to_control,
            answers,
            answer_to: sender.outbox(),
            outstanding: 0,
            pending: PendingReplies::default(),
            payload_max,
            holders_max: holders.clamp(1, CONNECTIONS_MAX),
            connections: (0..places).map(|_| None).collect(),
            free: (0..places).rev().collect(),
            again: Vec::new(),
            busy: false,
            stalled: STALLED,
            drain_patience: DRAIN_PATIENCE,
            draining: false,
            scratch: vec![0; READ_MAX],
            count: 0,
            now: Instant::now(),
            looked: Instant::now(),
            counters: Arc::new(Counters::new()),
        })
    }

    /// What it counts.
    pub fn counters(&self) -> Arc<dyn Reader> {
        Arc::clone(&self.counters) as Arc<dyn Reader>
    }

    /// What it has still to write.
    pub fn pending(&self) -> PendingReplies {
        self.pending.clone()
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// The epoll set is broken, which only a fault of ours can bring about.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.turn()?;
        }
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 32];
        let count = match self.epoll.wait(self.pause(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        self.now = Instant::now();
        let mut has_newcomers = false;
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => has_newcomers = true,
                ANSWERS => self.take_answers(),
                token => {
                    let ended = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
                    if let Some(connection) = self.connection(token) {
                        let events = event.event_set();
                        connection.hung_up |= events.intersects(ended);
                        connection.readable |= events.intersects(ended | EventSet::IN);
                    }
                    self.advance(token);
                }
            }
        }
        for token in std::mem::take(&mut self.again) {
            self.advance(token);
        }
        let since = self.now.saturating_duration_since(self.looked);
        if self.interval().is_some_and(|interval| since >= interval) {
            self.looked = self.now;
            self.look_at_clock();
        }
        // Last, when it is known who is idle.
        if has_newcomers || self.newcomer.is_some() {
            self.accept();
        }
        Ok(())
    }

    /// Milliseconds to wait for events, or -1 for as long as it takes.
    fn pause(&self) -> i32 {
        if !self.again.is_empty() {
            return 0;
        }
        self.interval().map_or(-1, |interval| {
            i32::try_from(interval.as_millis()).unwrap_or(i32::MAX)
        })
    }

    /// How often to look at the clock, when there is a reason to.
    fn interval(&self) -> Option<Duration> {
        if self.busy {
            Some(RETRY)
        } else if !self.listening {
            Some(REOPEN)
        } else if self.outstanding > 0 || self.draining {
            Some(DEADLINES)
        } else {
            None
        }
    }

    /// Goes through what has a deadline, and tries again what could not be done.
    fn look_at_clock(&mut self) {
        (self.busy, self.draining) = (false, false);
        let now = self.now;
        for place in 0..self.connections.len() {
            let Some(connection) = self.at(place) else {
                continue;
            };
            let token = connection.token;
            if let Some(late) = connection.asked.take_if(|asked| asked.until <= now) {
                self.counters.late(late.counted);
                let seconds = late.patience.as_secs();
                let message = format!(
                    "There was no answer within {seconds} seconds; what was asked for may still \
                     be done."
                );
                self.answer(token, late.close, &responses::no_answer(&message));
            } else if connection.waiting.is_some() {
                self.advance(token);
            } else if connection.is_draining() {
                self.draining = true;
                self.advance(token);
            }
        }
        if !self.listening {
            self.accept();
        }
    }

    fn at(&mut self, place: usize) -> Option<&mut Connection> {
        self.connections.get_mut(place)?.as_deref_mut()
    }

    /// The connection of that token, if it is still there.
    fn connection(&mut self, token: u64) -> Option<&mut Connection> {
        self.at(place_of(token)).filter(|c| c.token == token)
    }

    /// Does with a connection all that can be done without waiting.
    fn advance(&mut self, token: u64) {
        let place = place_of(token);
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        let Some(mut connection) = slot.take_if(|c| c.token == token) else {
            return;
        };
        if self.steps(&mut connection) {
            self.limit_holders(&mut connection);
            if let Some(slot) = self.connections.get_mut(place) {
                *slot = Some(connection);
            }
        } else {
            self.free.push(place);
        }
    }

    /// Steps of one connection, until it has to wait; whether it is to be kept.
    fn steps(&mut self, connection: &mut Connection) -> bool {
        for _ in 0..STEPS_MAX {
            match connection.flush(&self.epoll, self.now) {
                Flush::Done => {}
                Flush::Blocked => return true,
                Flush::Gone => return false,
            }
            if connection.asked.is_some() {
                return true;
            }
            self.draining |= connection.begin_drain(self.now, self.drain_patience);
            if let Some((request, since)) = connection.waiting.take() {
                if !self.ask(connection, request, Passed::default(), since) {
                    return true;
                }
                continue;
            }
            match connection.next() {
                Some((Piece::Continue, _)) => connection.respond(&Response::empty(100), false),
                Some((Piece::Malformed { reason, close }, _)) => {
                    self.counters.malformed();
                    connection.respond(&Response::malformed(&reason, close), close);
                    if !close {
                        connection.forget_rest(&mut self.scratch);
                    }
                }
                Some((Piece::Request(request), passed)) => {
                    if !self.ask(connection, request, passed, self.now) {
                        return true;
                    }
                }
                None if connection.is_over(self.now) => return false,
                None if !connection.readable => return true,
                None => {
                    self.count = self.count.wrapping_add(1);
                    connection.used = self.count;
                    connection.read(&mut self.scratch, self.now);
                }
            }
        }
        self.again.push(connection.token);
        true
    }
}

/// The place that a token's connection has.
fn place_of(token: u64) -> usize {
    let mask = 1_u64.wrapping_shl(PLACE_BITS).wrapping_sub(1);
    usize::try_from(token & mask).unwrap_or(usize::MAX)
}
