//! Requests to control and its answers. A question is posted to control's inbox, or waits here
//! for room in it; an answer finds its connection by the question's token.

use std::time::Instant;

use super::connection::{Asked, Connection};
use super::counters::Counted;
use super::http::{Request, Response};
use super::{
    Answered, BUSY, OUTSTANDING_MAX, PLACE_BITS, Server, paths, place_of, responses, routes,
};
use crate::sys::passed::Passed;
use crate::vmm::action::{Answer, Command, Reply};
use crate::warn;

impl Server {
    /// Takes control's answers to their connections.
    pub(super) fn take_answers(&mut self) {
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
                    ..responses::response(answer)
                };
                self.answer(connection, asked.close, &response);
            }
        }
    }

    /// Gives a connection the answer to its question, and goes on with it.
    pub(super) fn answer(&mut self, token: u64, close: bool, response: &Response) {
        if let Some(connection) = self.connection(token) {
            connection.respond(response, close);
        }
        self.advance(token);
    }

    /// Asks control, or answers at once, what was whole `since`; `false` when control has no room
    /// for the question.
    pub(super) fn ask(
        &mut self,
        connection: &mut Connection,
        request: Request,
        passed: Passed,
        since: Instant,
    ) -> bool {
        if let Passed::Refused(why) = passed {
            connection.respond(&responses::refused(&why), request.close);
            return true;
        }
        let operation = paths::operation(&request);
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
            // Answered in any case: a command that is dropped answers for itself.
            self.outstanding = self.outstanding.saturating_add(1);
            self.to_control.post(Command {
                action: Box::new(action),
                passed,
                reply: Reply::new(token, self.answer_to.clone(), self.pending.clone()),
            })
        };
        if posted {
            if let Some(message) = deprecated {
                warn!("{message}");
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
                &responses::no_answer("The monitor is busy: try again later."),
                request.close,
            );
            return true;
        }
        connection.waiting = Some((request, since));
        self.busy = true;
        false
    }

    pub(super) fn token(&mut self, place: usize) -> u64 {
        self.count = self.count.wrapping_add(1);
        self.count.wrapping_shl(PLACE_BITS) | place as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Fixture, GET, Witness, patch_vm, put};
    use super::*;
    use crate::inbox;
    use crate::sys::socket::send_with;
    use crate::vmm::action::{Action, Outcome, PendingReplies, Question};
    use std::io::Write;
    use std::sync::atomic::Ordering;
    use std::thread;
    use std::time::Duration;

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
        // Answers are not read: requests are sent until the server takes no more.
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

    #[test]
    fn request_when_control_is_gone_is_answered() {
        let fixture = Fixture::new(2);
        fixture.stopped.store(true, Ordering::Relaxed);
        while fixture
            .commands
            .send(Command {
                action: Box::new(Action::Ask(Question::Version)),
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

    #[test]
    fn descriptors_when_requests_are_pipelined_go_with_the_one_they_began() {
        let fixture = Fixture::new(64);
        let witness = Witness::new();
        for _ in 0..50 {
            let mut client = fixture.connect();
            client.send(&[GET, GET].concat());
            send_with(&client.0, GET, &[&witness.writer; 2]);
            client.send(GET);
            send_with(&client.0, &[GET, GET].concat(), &[&witness.writer; 16]);
            send_with(&client.0, GET, &[&witness.writer; 1]);
            for _ in 0..7 {
                assert_eq!(client.response().0, 200);
            }
            let came = std::mem::take(&mut *fixture.came.lock().unwrap());
            assert_eq!(came, [0, 0, 2, 0, 16, 0, 1]);
        }
        assert!(witness.sees_all_closed());
    }

    #[test]
    fn descriptors_when_not_with_a_first_byte_are_closed() {
        let fixture = Fixture::new(64);
        let witness = Witness::new();
        let mut client = fixture.connect();
        let body = put("/drives/a", "{}");
        // In the head, in the body, in what is thrown away, and behind the end.
        for at in [1, 20, body.len() - 1] {
            let (first, rest) = body.split_at(at);
            client.send(first);
            client.wait_until_read();
            send_with(&client.0, rest, &[&witness.writer; 3]);
            assert_eq!(client.response().0, 400);
        }
        client.send(b"PUT / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n");
        assert_eq!(client.response().0, 400);
        send_with(&client.0, &[b' '; 60_000], &[&witness.writer; 3]);
        client.get();
        client.send(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert_eq!(client.response().0, 400);
        send_with(&client.0, GET, &[&witness.writer; 3]);
        assert!(fixture.came.lock().unwrap().iter().all(|count| *count == 0));
        assert!(witness.sees_all_closed());
    }

    #[test]
    fn descriptors_when_the_request_is_refused_are_closed() {
        let fixture = Fixture::new(64);
        let witness = Witness::new();
        let mut client = fixture.connect();
        send_with(&client.0, GET, &[&witness.writer; 33]);
        let (status, body) = client.response();
        assert_eq!(status, 400);
        assert!(body.contains("More than 32 descriptors"), "{body}");
        for request in [&b"GET /nope HTTP/1.1\r\n\r\n"[..], b"FOO\r\n\r\n"] {
            send_with(&client.0, request, &[&witness.writer; 16]);
            assert_eq!(client.response().0, 400);
        }
        client.get();
        // A body that is waited for keeps what came with the head, and gives it up with the client.
        send_with(
            &client.0,
            b"PUT /drives/a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
            &[&witness.writer; 16],
        );
        assert_eq!(client.response().0, 100);
        drop(client);
        assert!(witness.sees_all_closed());
        assert_eq!(*fixture.came.lock().unwrap(), [0]);
    }
}
