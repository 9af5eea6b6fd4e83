//! The API THREAD: accepts connections, reads requests, asks control, writes answers.
//!
//! It owns the listening socket, up to [`CONNECTIONS_MAX`] connections and an inbox for control's
//! answers, and waits for all of them in one epoll set and for nothing else: reads, writes and
//! questions to control are tried, never waited for. A connection asks one question at a time,
//! which keeps pipelined answers in order, and is not read from while one is open, which bounds
//! what it can make this thread hold. A client that stalls delays itself. One client's bytes, in
//! and out, are in connection.rs; who is served, and who gives way to whom, is here.
//!
//! Descriptors come along with bytes (SCM_RIGHTS). Those that came with the first byte of a request
//! go with it to control, which claims them; all others are closed here, at once. A request that
//! is half sent keeps its own, but only a few may do so at a time, and one that stalls gives way.
//!
//! ```text
//!            bytes      pieces              Command            (token, Answer)       bytes
//!   client -------> Decoder -----> routes ----------> control ----------------> routes -----> client
//!                  (http.rs)    (routes.rs)                                     (http.rs)
//! ```
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod connection;
mod counters;
pub mod http;
#[cfg(test)]
mod openapi;
pub mod routes;
#[cfg(test)]
mod testing;

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::inbox::{self, Inbox, Outbox};
use crate::metrics::Reader;
use crate::sys::passed::Passed;
use crate::sys::{process, socket};
use crate::vmm::action::{Answer, Command, PendingReplies, Reply};
use crate::warn;
use connection::{Asked, Connection, DRAIN_PATIENCE, Dispensable, Flush, STALLED};
use counters::{Counted, Counters};
use http::{Piece, Request, Response};

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

/// The API socket could not be made.
#[derive(Debug)]
pub struct BindError {
    path: PathBuf,
    cause: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Failed to open the API socket at: {}. Check that it is not already used.",
            self.path.display()
        )
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Makes the API socket at `path`.
///
/// # Errors
/// Something is there already, or the place cannot be written.
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    UnixListener::bind(path).map_err(|cause| BindError {
        path: path.into(),
        cause,
    })
}

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

/// The API thread's all.
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
    /// Answers of control's that are not written yet.
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
        let mut somebody_came = false;
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => somebody_came = true,
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
        if somebody_came || self.newcomer.is_some() {
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
                let sentence = format!(
                    "There was no answer within {seconds} seconds; what was asked for may still \
                     be done."
                );
                self.answer(token, late.close, &routes::no_answer(&sentence));
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

    /// Takes control's answers to their connections.
    fn take_answers(&mut self) {
        self.answers.silence();
        while let Some(Answered { token, answer }) = self.answers.next() {
            self.outstanding = self.outstanding.saturating_sub(1);
            self.take_answer(token, &answer);
            // Written, as far as the client takes it.
            self.pending.settle();
        }
    }

    fn take_answer(&mut self, token: u64, answer: &Answer) {
        if let Some(connection) = self.at(place_of(token)) {
            // Another question, or another client, may have come to this place since.
            if let Some(asked) = connection.asked.take_if(|asked| asked.token == token) {
                let connection = connection.token;
                let time = self.now.saturating_duration_since(asked.since);
                self.counters.answered(asked.counted, answer.is_ok(), time);
                let response = Response {
                    deprecated: asked.deprecated,
                    ..routes::response(answer)
                };
                self.answer(connection, asked.close, &response);
            }
        }
    }

    /// Gives a connection the answer to its question, and goes on with it.
    fn answer(&mut self, token: u64, close: bool, response: &Response) {
        if let Some(connection) = self.connection(token) {
            connection.respond(response, close);
        }
        self.advance(token);
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

    /// Where `last` would be one too many that has descriptors of a request that is half sent,
    /// closes those of the one that stalled longest; if none has, those of `last`.
    fn limit_holders(&mut self, last: &mut Connection) {
        let others = self.connections.iter().flatten();
        let holders = others.filter(|other| other.is_holding()).count();
        if !last.is_holding() || holders < self.holders_max {
            return;
        }
        let (now, long) = (self.now, self.stalled);
        let others = self.connections.iter_mut().flatten();
        let stalled = others.filter_map(|other| Some((other.holds_since(now, long)?, other)));
        match stalled.min_by_key(|(since, _)| *since) {
            Some((_, other)) => other.give_up_descriptors(),
            None => last.give_up_descriptors(),
        }
    }

    /// Asks control, or answers at once, what was whole `since`; `false` when control has no room
    /// for the question.
    fn ask(
        &mut self,
        connection: &mut Connection,
        request: Request,
        passed: Passed,
        since: Instant,
    ) -> bool {
        if let Passed::Refused(why) = passed {
            connection.respond(&routes::refused(&why), request.close);
            return true;
        }
        let operation = routes::operation(&request);
        let action = match routes::action(&request) {
            Ok(action) => action,
            Err(refused) => {
                self.counters.refused(operation);
                connection.respond(&refused, request.close);
                return true;
            }
        };
        let patience = routes::patience(&action);
        let counted = Counted::new(operation, &action);
        let deprecated = routes::deprecated(&action);
        let token = self.token(place_of(connection.token));
        // What came with a question goes with it, delivered or not: no second try then.
        let once = !passed.is_empty();
        let posted = self.outstanding < OUTSTANDING_MAX && {
            // Answered in any case: a command that nobody takes answers for itself.
            self.outstanding = self.outstanding.saturating_add(1);
            self.to_control.post(Command {
                action: Box::new(action),
                passed,
                reply: Reply::new(token, self.answer_to.clone(), self.pending.clone()),
            })
        };
        if posted {
            if let Some(sentence) = deprecated {
                warn!("{sentence}");
            }
            connection.asked = Some(Asked {
                token,
                until: self.now.checked_add(patience).unwrap_or(self.now),
                patience,
                close: request.close,
                since,
                counted,
                deprecated: deprecated.is_some(),
            });
            return true;
        }
        if once || self.now.saturating_duration_since(since) >= BUSY {
            self.counters.late(counted);
            connection.respond(
                &routes::no_answer("The monitor is busy: try again later."),
                request.close,
            );
            return true;
        }
        connection.waiting = Some((request, since));
        self.busy = true;
        false
    }

    fn token(&mut self, place: usize) -> u64 {
        self.count = self.count.wrapping_add(1);
        self.count.wrapping_shl(PLACE_BITS) | place as u64
    }

    /// Takes one connection that waits at the socket.
    fn accept(&mut self) {
        let stream = match self.newcomer.take() {
            Some(stream) => stream,
            // It never blocks.
            None => match socket::accept(&self.listener) {
                Ok(stream) => stream.into(),
                Err(error) => {
                    let nobody = matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                    );
                    // No descriptor left: somebody gives way, or it is tried again in a while.
                    let go_on = nobody || self.make_room();
                    self.listen(go_on);
                    return;
                }
            },
        };
        if self.free.is_empty() && !self.make_room() {
            self.newcomer = Some(stream);
            self.listen(false);
            return;
        }
        self.listen(true);
        let Some(place) = self.free.pop() else {
            return;
        };
        let token = self.token(place);
        let event = EpollEvent::new(Connection::EVENTS, token);
        let fd = stream.as_raw_fd();
        let added = self.epoll.ctl(ControlOperation::Add, fd, event);
        match (added, self.connections.get_mut(place)) {
            (Ok(()), Some(slot)) => {
                let connection = Connection::new(stream, token, self.payload_max, self.now);
                *slot = Some(Box::new(connection));
                self.counters.connected();
            }
            // Closed: there is no descriptor, or no memory, to serve it with.
            _ => self.free.push(place),
        }
    }

    /// Looks for newcomers, or not, for want of places.
    fn listen(&mut self, yes: bool) {
        if yes != self.listening {
            let events = if yes { EventSet::IN } else { EventSet::empty() };
            let event = EpollEvent::new(events, LISTENER);
            let fd = self.listener.as_raw_fd();
            // Should it fail, it is tried again with the next newcomer or the next look.
            if self.epoll.ctl(ControlOperation::Modify, fd, event).is_ok() {
                self.listening = yes;
            }
        }
    }

    /// Closes the connection that can best be done without, if there is one.
    fn make_room(&mut self) -> bool {
        for _ in 0..self.connections.len() {
            let Some((why, place)) = self.least_needed() else {
                return false;
            };
            let now = self.now;
            let Some(connection) = self.connections.get_mut(place).and_then(Option::as_mut) else {
                return false;
            };
            if why == Dispensable::HalfSent {
                let sentence = "The request was half sent for too long while other clients waited: \
                                send it again.";
                connection.respond(&routes::no_answer(sentence), true);
                // As far as it can be written now: the place is needed.
                let _ = connection.flush(&self.epoll, now);
            }
            if why == Dispensable::Idle {
                // It may have sent a request that nobody has looked at.
                connection.readable = true;
                let token = connection.token;
                self.advance(token);
                if self.connection(token).is_some_and(|c| !c.is_idle()) {
                    continue;
                }
            }
            // Its place may be free already.
            if let Some(slot) = self.connections.get_mut(place)
                && slot.take().is_some()
            {
                self.free.push(place);
            }
            return true;
        }
        false
    }

    /// The place of the connection that can best be done without, and why.
    fn least_needed(&self) -> Option<(Dispensable, usize)> {
        let now = self.now;
        let rank = |(place, slot): (usize, &Option<Box<Connection>>)| {
            let connection = slot.as_ref()?;
            let rank = connection.dispensable(now, self.stalled)?;
            Some((rank, connection.used, place))
        };
        let (rank, _, place) = self.connections.iter().enumerate().filter_map(rank).min()?;
        Some((rank, place))
    }
}

/// The place that a token's connection has.
fn place_of(token: u64) -> usize {
    let mask = 1_u64.wrapping_shl(PLACE_BITS).wrapping_sub(1);
    usize::try_from(token & mask).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::testing::{Client, Fixture, GET, HOLDERS_MAX, Witness, patch_vm};
    use super::*;
    use crate::sys::socket::send_with;
    use crate::vmm::action::{Action, Outcome};
    use std::io::Write;
    use std::sync::atomic::Ordering;
    use std::thread;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn bind_when_the_path_exists_is_an_error() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("s");
        let _listener = bind(&path).unwrap();
        let error = crate::log::chain(&bind(&path).unwrap_err());
        assert!(
            error.contains("already used") && error.contains("in use"),
            "{error}"
        );
    }

    #[test]
    fn clients_when_one_stalls_or_waits_delay_nobody() {
        let fixture = Fixture::new(64);
        let mut half = fixture.connect();
        half.send(b"GET /ver");
        let mut waiting = fixture.connect();
        waiting.send(&patch_vm("Paused"));
        let mut greedy = fixture.connect();
        greedy
            .0
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        // Answers that nobody reads: sent until the server takes no more.
        while greedy.0.write_all(&GET.repeat(1000)).is_ok() {}
        for _ in 0..20 {
            fixture.connect().get();
        }
        half.send(b"sion HTTP/1.1\r\n\r\n");
        assert_eq!(half.response().0, 200);
        let reply = fixture.held.lock().unwrap().pop().unwrap();
        reply.send(Ok(Outcome::Done));
        assert_eq!(waiting.response().0, 204);
    }

    #[test]
    fn connections_when_more_than_there_are_places_close_the_idle() {
        let fixture = Fixture::new(64);
        let mut busy = fixture.connect();
        busy.send(&patch_vm("Paused"));
        let mut clients: Vec<Client> = (0..300)
            .map(|_| {
                let mut client = fixture.connect();
                client.get();
                client
            })
            .collect();
        let places = CONNECTIONS_MAX.min(process::descriptor_limit() as usize / 2);
        let (gone, kept) = clients.split_at_mut(301 - places);
        assert!(gone.iter_mut().all(Client::is_closed));
        kept.iter_mut().for_each(Client::get);
        fixture
            .held
            .lock()
            .unwrap()
            .pop()
            .unwrap()
            .send(Ok(Outcome::Done));
        assert_eq!(busy.response().0, 204);
    }

    #[test]
    fn connections_when_half_sent_give_way_after_a_while() {
        let fixture = Fixture::with(64, |server| server.stalled = Duration::from_millis(50));
        let mut stalled: Vec<Client> = (0..CONNECTIONS_MAX)
            .map(|_| {
                let mut client = fixture.connect();
                client.get();
                client.send(b"GET /");
                client
            })
            .collect();
        fixture.connect().get();
        // The one that was used longest ago is told to try again.
        assert_eq!(stalled[0].response().0, 503);
        assert!(stalled[0].is_closed());
        stalled[CONNECTIONS_MAX - 1].send(b"version HTTP/1.1\r\n\r\n");
        assert_eq!(stalled[CONNECTIONS_MAX - 1].response().0, 200);
    }

    #[test]
    fn connections_when_they_ask_on_and_never_read_give_way_after_a_while() {
        let fixture = Fixture::with(64, |server| server.stalled = Duration::from_millis(50));
        let greedy: Vec<Client> = (0..CONNECTIONS_MAX)
            .map(|_| {
                let mut client = fixture.connect();
                client.get();
                client.0.set_nonblocking(true).unwrap();
                // More than it is sent at once, so that questions are left over.
                while client.0.write_all(&GET.repeat(1000)).is_ok() {}
                client
            })
            .collect();
        fixture.connect().get();
        drop(greedy);
    }

    #[test]
    fn requests_when_control_has_little_room_are_not_lost() {
        let fixture = Fixture::new(2);
        let clients: Vec<_> = (0..50)
            .map(|_| {
                let mut client = fixture.connect();
                thread::spawn(move || {
                    for _ in 0..20 {
                        client.get();
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
    }

    /// Clients that have as many requests with descriptors half sent as may be.
    fn holders(fixture: &Fixture, witness: &Witness) -> Vec<Client> {
        let half = (0..HOLDERS_MAX).map(|_| half_sent(fixture, witness, 16));
        half.collect()
    }

    /// A client that has sent half a request with descriptors, which have arrived.
    fn half_sent(fixture: &Fixture, witness: &Witness, count: usize) -> Client {
        let client = fixture.connect();
        send_with(&client.0, b"GET /ver", &vec![&witness.writer; count]);
        // What came first is looked at first.
        fixture.connect().get();
        client
    }

    /// The answer to the whole of it.
    fn other_half(client: &mut Client) -> (u16, String) {
        client.send(b"sion HTTP/1.1\r\n\r\n").response()
    }

    #[test]
    fn descriptors_when_many_requests_are_half_sent_are_refused() {
        let fixture = Fixture::new(64);
        let witness = Witness::new();
        let mut half = holders(&fixture, &witness);
        let mut late = half_sent(&fixture, &witness, 1);
        let (status, body) = other_half(&mut late);
        assert_eq!(status, 400);
        assert!(body.contains("half sent"), "{body}");
        for client in &mut half {
            assert_eq!(other_half(client).0, 200);
        }
        assert!(witness.sees_all_closed());
    }

    #[test]
    fn descriptors_when_half_sent_for_long_give_way_to_others() {
        const LONG: Duration = Duration::from_millis(50);
        let fixture = Fixture::with(64, |server| server.stalled = LONG);
        let witness = Witness::new();
        let mut half = holders(&fixture, &witness);
        thread::sleep(LONG * 2);
        fixture.came.lock().unwrap().clear();
        let mut late = half_sent(&fixture, &witness, 1);
        assert_eq!(other_half(&mut late).0, 200);
        let (status, body) = other_half(&mut half[0]);
        assert_eq!(status, 400);
        assert!(body.contains("half sent"), "{body}");
        for client in &mut half[1..] {
            assert_eq!(other_half(client).0, 200);
        }
        assert_eq!(*fixture.came.lock().unwrap(), [0, 1, 16, 16, 16]);
        assert!(witness.sees_all_closed());
    }

    #[test]
    fn descriptors_when_their_request_is_whole_need_no_room_beside_those_half_sent() {
        let fixture = Fixture::new(64);
        let witness = Witness::new();
        let half = holders(&fixture, &witness);
        fixture.came.lock().unwrap().clear();
        let mut client = fixture.connect();
        for _ in 0..3 {
            send_with(&client.0, GET, &[&witness.writer; 16]);
            assert_eq!(client.response().0, 200);
        }
        assert_eq!(*fixture.came.lock().unwrap(), [16, 16, 16]);
        drop((half, client));
        assert!(witness.sees_all_closed());
    }

    #[test]
    fn request_when_control_is_gone_is_answered() {
        let fixture = Fixture::new(2);
        fixture.stopped.store(true, Ordering::Relaxed);
        while fixture
            .commands
            .send(Command {
                action: Box::new(Action::GetVersion),
                passed: Passed::default(),
                reply: Reply::new(
                    0,
                    inbox::inbox::<(u64, Answer)>(1).unwrap().0.outbox(),
                    PendingReplies::default(),
                ),
            })
            .is_ok()
        {
            thread::sleep(Duration::from_millis(1));
        }
        let (status, body) = fixture.connect().send(GET).response();
        assert_eq!(status, 503);
        assert!(body.contains("busy"), "{body}");
    }
}
