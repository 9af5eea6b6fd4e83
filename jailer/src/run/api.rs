//! A client of the monitor's API: requests with descriptors, one at a time, and their answers.
//!
//! The monitor is not trusted with more than it needs: an answer is bounded, and only its status and
//! the sentence of a fault are looked at.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde_json::Value;

use super::channel;
use crate::failure::{Doing, Failure};

/// Longest answer in bytes.
const LONGEST: usize = 256 * 1024;

/// A connection.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// What there was no room for yet.
    unsent: Vec<u8>,
    heard: Vec<u8>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its HTTP status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

impl Client {
    /// Over a connected socket.
    pub fn new(socket: OwnedFd) -> Client {
        // Whoever does not read a long request must not hold up its sender; an error here means that
        // it does.
        let _ = rustix::fs::fcntl_setfl(&socket, OFlags::NONBLOCK);
        Client {
            socket,
            unsent: Vec::new(),
            heard: Vec::new(),
        }
    }

    /// Sends a request, as far as there is room; `line` is its method and path. The descriptors go
    /// with its first byte.
    pub fn send(
        &mut self,
        line: &str,
        body: Option<&Value>,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Failure> {
        let what = || format!("send {line} to the monitor");
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = match body.len() {
            0 => format!("{line} HTTP/1.1\r\nHost: mayfly\r\n\r\n"),
            length => format!(
                "{line} HTTP/1.1\r\nHost: mayfly\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n"
            ),
        };
        let text = (head + &body).into_bytes();
        let sent = channel::send(self.socket.as_fd(), &[IoSlice::new(&text)], files);
        self.unsent = text;
        self.unsent.drain(..sent.doing(what())?);
        self.send_rest().doing(what())
    }

    fn send_rest(&mut self) -> Result<(), Errno> {
        while !self.unsent.is_empty() {
            match rustix::net::send(&self.socket, &self.unsent, SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether a part of a request waits for room.
    pub fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what there is room for and takes what has come; the answer once it is whole.
    pub fn receive(&mut self) -> Result<Option<Answer>, Failure> {
        let what = "hear from the monitor";
        if self.send_rest().is_err() {
            // Nobody reads on, but there may be an answer that says why.
            self.unsent.clear();
        }
        let mut buffer = [0_u8; 8192];
        match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Failure::new(what, "it closed the connection")),
            Ok((count, _)) => self.heard.extend_from_slice(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(Failure::new(what, error)),
        }
        if self.heard.len() > LONGEST {
            return Err(Failure::new(what, "its answer has no end"));
        }
        parse(&mut self.heard).ok_or_else(|| Failure::new(what, "its answer is not HTTP"))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Takes one whole answer out of `heard`: `Some(None)` if there is not one yet, none if there can
/// never be one.
fn parse(heard: &mut Vec<u8>) -> Option<Option<Answer>> {
    let Some(end) = heard.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
        return Some(None);
    };
    let head = std::str::from_utf8(&heard[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()?
        .strip_prefix("HTTP/1.")?
        .get(2..5)?
        .parse()
        .ok()?;
    let mut length = 0;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            length = value
                .trim()
                .parse::<usize>()
                .ok()
                .filter(|&length| length <= LONGEST)?;
        }
    }
    let whole = end + 4 + length;
    if heard.len() < whole {
        return Some(None);
    }
    let body = heard[end + 4..whole].to_vec();
    heard.drain(..whole);
    // 100 Continue is not the answer yet.
    if status == 100 {
        return parse(heard);
    }
    Some(Some(Answer { status, body }))
}

impl Answer {
    /// Whether the request was done.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The sentence of a refusal.
    pub fn fault(&self) -> String {
        let body: Option<Value> = serde_json::from_slice(&self.body).ok();
        let sentence = body.as_ref().and_then(|body| {
            body.get("fault_message")
                .or_else(|| body.get("error"))?
                .as_str()
        });
        match sentence {
            // One line, whatever it says.
            Some(sentence) => sentence.split_whitespace().collect::<Vec<_>>().join(" "),
            None => format!("it answered with status {}", self.status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_request_goes_in_pieces_and_waits_for_nobody() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut client = Client::new(one.into());
        let body = Value::from("x".repeat(3 << 20));
        let file = std::fs::File::open("/dev/null").unwrap();
        client
            .send("PUT /vm", Some(&body), &[file.as_fd()])
            .unwrap();
        assert!(client.is_sending());
        let reader = std::thread::spawn(move || {
            let mut text = vec![0; (3 << 20) + 2];
            std::io::Read::read_exact(&mut &other, &mut text).unwrap();
            std::io::Write::write_all(&mut &other, b"HTTP/1.1 204 \r\n\r\n").unwrap();
            other
        });
        let start = std::time::Instant::now();
        let answer = loop {
            if let Some(answer) = client.receive().unwrap() {
                break answer;
            }
            assert!(start.elapsed().as_secs() < 10);
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        assert!(answer.is_success());
        drop(reader.join().unwrap());
        // What is left of it has nobody to go to.
        assert!(client.receive().is_err());
    }

    #[test]
    fn answers_are_taken_one_by_one_when_whole() {
        let mut heard =
            b"HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP/1.1 400 \r\ncontent-length: 5\r\n\r\nab"
                .to_vec();
        let first = parse(&mut heard).unwrap().unwrap();
        assert_eq!((first.status, first.is_success()), (204, true));
        assert_eq!(parse(&mut heard), Some(None));
        heard.extend(b"cde");
        let second = parse(&mut heard).unwrap().unwrap();
        assert_eq!((second.status, &second.body[..]), (400, &b"abcde"[..]));
        assert_eq!(second.fault(), "it answered with status 400");
        assert!(heard.is_empty());
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        assert_eq!(parse(&mut b"SSH-2.0\r\n\r\n".to_vec()), None);
        assert_eq!(
            parse(&mut b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n".to_vec()),
            None
        );
    }

    #[test]
    fn fault_is_one_line() {
        let answer = Answer {
            status: 400,
            body: br#"{"fault_message":"a\n b"}"#.to_vec(),
        };
        assert_eq!(answer.fault(), "a b");
    }
}
