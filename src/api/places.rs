//! Who is served: newcomers, the places there are for them, and which connection gives way when
//! there is none left, of connections or of descriptors.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::connection::{Connection, Dispensable};
use super::{LISTENER, Server, responses};
use crate::sys::socket;

impl Server {
    /// Where `last` would be one too many that has descriptors of a request that is half sent,
    /// closes those of the one that stalled longest; if none has, those of `last`.
    pub(super) fn limit_holders(&mut self, last: &mut Connection) {
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

    /// Takes one connection that waits at the socket.
    pub(super) fn accept(&mut self) {
        let stream = match self.newcomer.take() {
            Some(stream) => stream,
            // It never blocks.
            None => match socket::accept(&self.listener) {
                Ok(stream) => stream.into(),
                Err(error) => {
                    let is_usual = matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                    );
                    // No descriptor left: a connection gives way, or it is tried again in a while.
                    let go_on = is_usual || self.make_room();
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
                let message = "The request was half sent for too long while other clients waited: \
                                send it again.";
                connection.respond(&responses::no_answer(message), true);
                // As far as it can be written now: the place is needed.
                let _ = connection.flush(&self.epoll, now);
            }
            if why == Dispensable::Idle {
                // It may have sent a request that was not read yet.
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

#[cfg(test)]
mod tests {
    use super::super::CONNECTIONS_MAX;
    use super::super::testing::{Client, Fixture, GET, HOLDERS_MAX, Witness, patch_vm};
    use crate::sys::process;
    use crate::sys::socket::send_with;
    use crate::vmm::action::Outcome;
    use std::io::Write;
    use std::thread;
    use std::time::Duration;

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
}
