//! One client of the API thread: bytes in, requests out; answers in, bytes out.
//!
//! A [`Connection`] owns the client's socket, what came by it and is not dealt with yet, and the
//! answer that is being written. It belongs to the server, which calls it on the API thread. It
//! never waits: a read or a write that cannot be done now is done on the epoll set's next event. It
//! never speaks to control and knows no other connection: what a request comes to, and who gives
//! way to whom, is the server's to say.
//!
//! It holds one request and one answer. Requests behind the first stay bytes, few of them here
//! and the rest in the socket, until that has its answer and the client has taken it. So a client
//! that asks on and never reads costs about as much as one that asks once.

use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::PLACE_BITS;
use super::counters::Counted;
use super::http::{Decoder, Piece, Request, Response};
use crate::sys::passed::{Passed, PassedError};
use crate::sys::socket::{self, Received};

/// Bytes that are read and thrown away behind the last request of a connection, and for how long:
/// a client that is still writing then gets its answer, and not the error of a broken connection.
const DRAIN_MAX: usize = 16 << 20;
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(3);

/// How long a request may be half sent, or an answer half taken, before the connection may have
/// to give way to a new one, or its descriptors to others.
pub const STALLED: Duration = Duration::from_millis(250);

/// Why a connection may have to give way, from the best reason to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dispensable {
    /// It got its last answer.
    Finished,
    /// It asks nothing.
    Idle,
    /// It began a request long ago.
    HalfSent,
    /// It does not read its answer.
    HalfTaken,
}

/// How an attempt to write went.
pub enum Flush {
    Done,
    Blocked,
    Gone,
}

/// What a client may still send after its last answer: it is thrown away.
#[derive(Debug)]
struct Drain {
    until: Instant,
    /// Bytes left.
    left: usize,
}

/// A question that control was asked.
#[derive(Debug)]
pub struct Asked {
    pub token: u64,
    pub until: Instant,
    pub patience: Duration,
    pub close: bool,
    /// When the request was whole.
    pub since: Instant,
    pub counted: Counted,
    pub deprecated: bool,
}

/// One client.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Its token in the epoll set.
    pub token: u64,
    decoder: Decoder,
    /// The descriptors that came with the first byte of the request that is being received.
    arriving: Passed,
    /// The question whose answer is awaited.
    pub asked: Option<Asked>,
    /// A request that waits for room in control's inbox, and since when.
    pub waiting: Option<(Request, Instant)>,
    output: Vec<u8>,
    /// Bytes of `output` that were written.
    written: usize,
    /// Whether the epoll set tells when more can be written.
    wants_out: bool,
    /// There may be something to read. Events report only what is new.
    pub readable: bool,
    /// The client has closed its side, so reading goes on until its end is seen.
    pub hung_up: bool,
    /// That end was seen.
    ended: bool,
    /// The answer that is being written is the last one.
    closing: bool,
    /// It is written and our side is closed.
    draining: Option<Drain>,
    /// When the request that is being received, or the answer that is being written, began; but
    /// no request before the answer to the last one was taken.
    since: Instant,
    /// For telling who was used longest ago.
    pub used: u64,
}

impl Connection {
    /// Told once for each arrival, so that a connection that is not read costs nothing.
    pub const EVENTS: EventSet = EventSet::IN
        .union(EventSet::READ_HANG_UP)
        .union(EventSet::EDGE_TRIGGERED);

    pub fn new(stream: UnixStream, token: u64, payload_max: usize, now: Instant) -> Self {
        Connection {
            stream,
            token,
            decoder: Decoder::new(payload_max),
            arriving: Passed::default(),
            asked: None,
            waiting: None,
            output: Vec::new(),
            written: 0,
            wants_out: false,
            readable: false,
            hung_up: false,
            ended: false,
            closing: false,
            draining: None,
            since: now,
            used: token.wrapping_shr(PLACE_BITS),
        }
    }

    pub fn is_idle(&self) -> bool {
        self.asked.is_none()
            && self.waiting.is_none()
            && self.output.is_empty()
            && self.decoder.is_empty()
    }

    /// Whether it has descriptors of a request that is half sent.
    pub fn is_holding(&self) -> bool {
        matches!(&self.arriving, Passed::Received(some) if !some.is_empty())
    }

    /// Since when it has descriptors of a request that is half sent, if that is `long` ago.
    pub fn holds_since(&self, now: Instant, long: Duration) -> Option<Instant> {
        (self.is_holding() && self.has_stalled(now, long)).then_some(self.since)
    }

    /// Closes the descriptors of the request that is half sent, which is told so when it is whole.
    pub fn give_up_descriptors(&mut self) {
        self.arriving = Passed::Refused(PassedError::Crowded);
    }

    fn has_stalled(&self, now: Instant, long: Duration) -> bool {
        now.saturating_duration_since(self.since) >= long
    }

    /// Why it may be closed for the sake of another, if it may; what has not moved for `long` may.
    pub fn dispensable(&self, now: Instant, long: Duration) -> Option<Dispensable> {
        let stalled = self.has_stalled(now, long);
        if self.asked.is_some() {
            None
        } else if self.wants_out {
            // Whatever else it asks: that waits until this answer is taken.
            stalled.then_some(Dispensable::HalfTaken)
        } else if !self.output.is_empty() || self.waiting.is_some() {
            None
        } else if self.is_draining() {
            Some(Dispensable::Finished)
        } else if self.decoder.is_empty() {
            Some(Dispensable::Idle)
        } else {
            stalled.then_some(Dispensable::HalfSent)
        }
    }

    /// Queues a response.
    pub fn respond(&mut self, response: &Response, close: bool) {
        self.closing |= close;
        if self.closing && !response.close {
            let response = Response {
                close: true,
                ..response.clone()
            };
            response.encode(&mut self.output);
        } else {
            response.encode(&mut self.output);
        }
    }

    /// Closes our side if the last answer is written: the client sees the end, and what it still
    /// sends is read and thrown away until it closes its side or a bound is reached. Closing both
    /// sides at once would fail a write that it is in, and it might not look for the answer then.
    /// Whether that began now.
    pub fn begin_drain(&mut self, now: Instant, patience: Duration) -> bool {
        if !self.closing || self.is_draining() {
            return false;
        }
        self.ended |= self.stream.shutdown(Shutdown::Write).is_err();
        self.draining = Some(Drain {
            until: now.checked_add(patience).unwrap_or(now),
            left: DRAIN_MAX,
        });
        true
    }

    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Whether there is nothing more to do: the client has closed its side, or has sent enough
    /// after its last answer.
    pub fn is_over(&self, now: Instant) -> bool {
        let drained = |drain: &Drain| drain.left == 0 || now >= drain.until;
        self.ended || self.draining.as_ref().is_some_and(drained)
    }

    /// Writes as much as the client takes.
    pub fn flush(&mut self, epoll: &Epoll, now: Instant) -> Flush {
        if self.output.is_empty() {
            return Flush::Done;
        }
        while let Some(rest) = self.output.get(self.written..).filter(|r| !r.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Flush::Gone,
                Ok(count) => self.written = self.written.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.wants_out {
                        return Flush::Blocked;
                    }
                    self.since = now;
                    self.wants_out = true;
                    let events = Self::EVENTS.union(EventSet::OUT);
                    return match self.watch(epoll, events) {
                        Ok(()) => Flush::Blocked,
                        Err(_) => Flush::Gone,
                    };
                }
                Err(_) => return Flush::Gone,
            }
        }
        (self.output, self.written) = (Vec::new(), 0);
        // What has come of the next request had to wait for this.
        self.since = now;
        if self.wants_out {
            self.wants_out = false;
            if self.watch(epoll, Self::EVENTS).is_err() {
                return Flush::Gone;
            }
        }
        Flush::Done
    }

    fn watch(&self, epoll: &Epoll, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, self.token);
        epoll.ctl(ControlOperation::Modify, self.stream.as_raw_fd(), event)
    }

    /// The next piece of what has come, and the descriptors that came with it.
    pub fn next(&mut self) -> Option<(Piece, Passed)> {
        if self.closing {
            return None;
        }
        let piece = self.decoder.next_piece()?;
        let passed = match piece {
            // It goes on to be received.
            Piece::Continue => Passed::default(),
            Piece::Request(_) | Piece::Malformed { .. } => std::mem::take(&mut self.arriving),
        };
        Some((piece, passed))
    }

    /// Reads once.
    pub fn read(&mut self, scratch: &mut [u8], now: Instant) {
        if self.is_draining() {
            let count = self.discard(scratch);
            if let Some(drain) = &mut self.draining {
                drain.left = drain.left.saturating_sub(count);
            }
            return;
        }
        let room = self.decoder.room().min(scratch.len());
        let scratch = scratch.get_mut(..room).unwrap_or_default();
        // Dropped, and so closed, unless it is the first byte of a request that brought them.
        let mut passed = Passed::default();
        // Descriptors are not to come with bytes of two requests.
        let most = |next: &[u8]| self.decoder.most(next);
        let received = socket::receive(&self.stream, scratch, most, &mut passed);
        let count = self.take_note(received);
        if count == 0 {
            return;
        }
        if self.decoder.is_empty() {
            self.since = now;
        }
        if self.decoder.is_between() {
            self.arriving = passed;
        }
        self.decoder.feed(scratch.get(..count).unwrap_or_default());
    }

    /// Throws away what came along with bytes that are no request and was not read with them:
    /// it is not known where in it a request begins.
    pub fn forget_rest(&mut self, scratch: &mut [u8]) {
        if self.readable && self.decoder.is_between() {
            self.discard(scratch);
        }
    }

    /// Reads once for nothing; how many bytes.
    fn discard(&mut self, scratch: &mut [u8]) -> usize {
        let mut passed = Passed::default();
        let received = socket::receive(&self.stream, scratch, <[u8]>::len, &mut passed);
        self.take_note(received)
    }

    /// Notes how a read went; how many bytes it got.
    fn take_note(&mut self, received: io::Result<Received>) -> usize {
        match received {
            Ok(Received { count, more }) if count > 0 => {
                // If there is no more, that was all, unless the end has come too.
                self.readable = more || self.hung_up;
                return count;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            _ => (self.ended, self.readable) = (true, false),
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing::{Fixture, GET, VERSION, patch_vm, put};

    #[test]
    fn connection_when_kept_alive_answers_in_order_also_after_400() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        for _ in 0..3 {
            client.get();
        }
        let mut pipeline = GET.to_vec();
        pipeline.extend_from_slice(b"GET /nope HTTP/1.1\r\n\r\n");
        pipeline.extend_from_slice(&put("/drives/a", "{}"));
        pipeline.extend_from_slice(&patch_vm("Resumed"));
        pipeline.extend_from_slice(GET);
        client.send(&pipeline);
        assert_eq!(client.response().0, 200);
        assert!(client.response().1.contains("GET /nope"));
        assert!(client.response().1.contains("missing field `drive_id`"));
        assert_eq!(client.response(), (204, String::new()));
        assert_eq!(client.response().0, 200);
    }

    #[test]
    fn connection_when_malformed_drops_the_unanswered_and_gives_one_400() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        client.send(&[GET, GET, b"FOO\r\n\r\n", GET].concat());
        let (status, body) = client.response();
        assert_eq!(status, 400);
        assert!(body.starts_with(r#"{"error":"Invalid request"#), "{body}");
        client.get();
    }

    #[test]
    fn connection_when_malformed_far_behind_answers_in_order_and_gives_one_400() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        let rest = [b"FOO\r\n\r\n", &GET.repeat(200)[..]].concat();
        for before in [100, 300] {
            client.send(&[&GET.repeat(before), rest.as_slice()].concat());
            // Those behind the last of these were unanswered when it was found.
            let mut answered = 0;
            let status = loop {
                match client.response().0 {
                    200 => answered += 1,
                    other => break other,
                }
            };
            assert!(status == 400 && answered <= before, "{status} {answered}");
            client.get();
        }
    }

    /// Requests whose end is not known, so that nothing can follow them.
    fn without_a_known_end() -> Vec<Vec<u8>> {
        let long = [b"GET /", &[b'a'; 2000][..]].concat();
        [
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            &b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"[..],
            b"PUT / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 60000\r\n\r\n",
            b"GET / HTTP/1.1\n\n",
            &long,
        ]
        .map(<[u8]>::to_vec)
        .into()
    }

    #[test]
    fn connection_when_the_end_of_a_request_is_unknown_is_half_closed_after_the_answer() {
        let fixture = Fixture::new(64);
        for request in without_a_known_end() {
            let mut client = fixture.connect();
            client.send(&request);
            assert_eq!(client.response().0, 400);
            // The client's own side is open: it may be in the middle of a write.
            client.sees_the_end();
            client.send(&[b' '; 1 << 20]);
            client.sees_the_end();
        }
    }

    #[test]
    fn connection_when_the_client_asks_for_its_end_is_half_closed_after_the_answer() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        client.send(&[b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n", GET].concat());
        assert_eq!(client.response(), (200, VERSION.into()));
        client.sees_the_end();
        client.send(GET).sees_the_end();
    }

    #[test]
    fn client_when_it_writes_all_before_it_reads_gets_the_refusal() {
        let fixture = Fixture::new(64);
        for request in without_a_known_end() {
            let mut client = fixture.connect();
            client.send(&request);
            client.send(&[b'x'; 8 << 20]);
            assert_eq!(client.response().0, 400);
            client.sees_the_end();
        }
    }

    #[test]
    fn connection_when_half_closed_is_closed_after_a_while() {
        let fixture = Fixture::with(64, |server| {
            server.drain_patience = Duration::from_millis(10);
        });
        let mut client = fixture.connect();
        client.send(b"GET / HTTP/1.1\n\n");
        assert_eq!(client.response().0, 400);
        // Nothing wakes the server but its clock.
        client.is_hung_up_on();
    }

    #[test]
    fn connection_when_half_closed_takes_only_so_many_bytes() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        client.send(b"GET / HTTP/1.1\n\n");
        let block = [0; 1 << 16];
        let mut sent = 0;
        let error = loop {
            match client.0.write(&block) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        let closed = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(closed.contains(&error.kind()), "{error}");
        // What is on its way in the socket is not counted.
        assert!(sent <= DRAIN_MAX + (4 << 20), "{sent}");
        assert_eq!(client.response().0, 400);
    }

    #[test]
    fn body_when_in_pieces_and_expected_is_taken() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        client.send(
            b"PUT /drives/a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51200\r\n\r\n",
        );
        assert_eq!(client.response(), (100, String::new()));
        for _ in 0..50 {
            client.send(&[b' '; 1024]);
        }
        let (status, body) = client.response();
        assert_eq!(status, 400);
        assert!(body.contains("EOF while parsing"), "{body}");
        client.send(&put("/drives/a", &" ".repeat(51_201)));
        assert!(
            client
                .response()
                .1
                .contains("larger than the limit of 51200")
        );
        client.get();
    }

    #[test]
    fn client_when_it_closes_its_side_still_gets_the_answer() {
        let fixture = Fixture::new(64);
        let mut client = fixture.connect();
        client.send(&[GET, GET].concat());
        client.0.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.response().0, 200);
        assert_eq!(client.response().0, 200);
        client.sees_the_end();
    }
}
