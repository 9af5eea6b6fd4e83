//! A small client of the API: one connection over a Unix socket, one request at a time, descriptors
//! with its first byte.
//!
//! [`Client::request`] waits for the answer until a deadline. A program that waits for other things
//! too calls [`Client::send`], waits with the rest until the client's descriptor is ready, and calls
//! [`Client::receive`]. Nothing of an answer is trusted: it is bounded, and anything that is not HTTP
//! is an error.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::limits::ANSWER_MAX;
use crate::sys::fd::{self, Interest};
use crate::sys::socket;

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// What the socket had no room for yet.
    unsent: Vec<u8>,
    received: Vec<u8>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Its HTTP status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum ClientError {
    /// The connection cannot be made or used.
    Io(io::Error),
    /// The monitor closed it before it answered.
    Closed,
    /// The deadline came first.
    TimedOut,
    /// What came is not HTTP, or has no end.
    NotHttp,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ClientError::Io(_) => "The API socket failed",
            ClientError::Closed => "The API connection was closed before the answer",
            ClientError::TimedOut => "The API did not answer in time",
            ClientError::NotHttp => "The API's answer is not HTTP",
        })
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClientError::Io(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(cause: io::Error) -> Self {
        ClientError::Io(cause)
    }
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// The host's.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        Client::new(UnixStream::connect(path)?)
    }

    /// Takes a connected stream, which does not block from now on.
    ///
    /// # Errors
    /// The host's.
    pub fn new(stream: UnixStream) -> Result<Self, ClientError> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            stream,
            unsent: Vec::new(),
            received: Vec::new(),
        })
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// There is none within `patience`.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
        descriptors: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Response, ClientError> {
        let deadline = Instant::now().checked_add(patience);
        self.send(method, path, body, descriptors)?;
        loop {
            if let Some(response) = self.receive()? {
                return Ok(response);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ClientError::TimedOut);
            }
            let millis = left.map(|left| {
                let millis = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
                millis.saturating_add(1)
            });
            let fd = self.stream.as_raw_fd();
            fd::wait(&mut [Interest::both(fd, true, self.is_sending())], millis)?;
        }
    }

    /// Begins a request: sends what there is room for. The descriptors go with its first byte.
    ///
    /// # Errors
    /// The host's.
    pub fn send(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if !body.is_empty() {
            let length = body.len();
            text += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        text += "\r\n";
        text += body;
        let mut bytes = text.into_bytes();
        let sent = socket::send_with_descriptors(&self.stream, &bytes, descriptors)?;
        bytes.drain(..sent.min(bytes.len()));
        self.unsent = bytes;
        Ok(())
    }

    /// Whether a part of a request waits for room.
    pub fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what there is room for and takes what has come, without waiting; the answer, once it is
    /// whole.
    ///
    /// # Errors
    /// There will be none.
    pub fn receive(&mut self) -> Result<Option<Response>, ClientError> {
        self.send_rest();
        let mut chunk = [0; 8192];
        loop {
            if let Some((response, length)) = parse(&self.received)? {
                self.received.drain(..length.min(self.received.len()));
                // It may be followed: 100 Continue is not the answer yet.
                if response.status == 100 {
                    continue;
                }
                return Ok(Some(response));
            }
            match socket::receive_now(&self.stream, &mut chunk) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => self
                    .received
                    .extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ClientError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
            if self.received.len() > ANSWER_MAX {
                return Err(ClientError::NotHttp);
            }
        }
    }

    fn send_rest(&mut self) {
        while !self.unsent.is_empty() {
            match socket::send_now(&self.stream, &self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count.min(self.unsent.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It is not read on, but there may be an answer that says why.
                Err(_) => self.unsent.clear(),
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// The answer at the start of `bytes` and its length, once all of it is there.
fn parse(bytes: &[u8]) -> Result<Option<(Response, usize)>, ClientError> {
    const END: &[u8] = b"\r\n\r\n";
    let Some(end) = bytes.windows(END.len()).position(|four| four == END) else {
        return Ok(None);
    };
    let (head, rest) = bytes.split_at(end);
    let (status, length) = parse_head(head).ok_or(ClientError::NotHttp)?;
    let body = rest.get(END.len()..).unwrap_or_default();
    let whole = end.saturating_add(END.len()).saturating_add(length);
    Ok(body.get(..length).map(|body| {
        let body = body.to_vec();
        (Response { status, body }, whole)
    }))
}

/// Status and length of the body.
fn parse_head(head: &[u8]) -> Option<(u16, usize)> {
    let mut lines = std::str::from_utf8(head).ok()?.split("\r\n");
    let (version, rest) = lines.next()?.split_once(' ')?;
    let status = rest.get(..3)?.parse().ok()?;
    version.strip_prefix("HTTP/1.")?;
    let mut length = 0;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            length = value
                .trim()
                .parse()
                .ok()
                .filter(|length| *length <= ANSWER_MAX)?;
        }
    }
    Some((status, length))
}

impl Response {
    /// Whether the request was done.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Why the request was refused, in one line.
    pub fn fault(&self) -> String {
        #[derive(serde::Deserialize)]
        struct Fault {
            #[serde(alias = "error")]
            fault_message: String,
        }
        match serde_json::from_slice::<Fault>(&self.body) {
            Ok(fault) => {
                let words: Vec<&str> = fault.fault_message.split_whitespace().collect();
                words.join(" ")
            }
            Err(_) => format!("status {}", self.status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn request_when_longer_than_the_socket_goes_in_pieces() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(ours).unwrap();
        let body = "x".repeat(3 << 20);
        let file = File::open("/dev/null").unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = vec![0; 3 << 20];
            theirs.read_exact(&mut text).unwrap();
            assert!(text.starts_with(b"PUT /vm HTTP/1.1\r\n"));

            let head = text.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            theirs.read_exact(&mut vec![0; head]).unwrap();
            theirs
                .write_all(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 \r\nServer: x\r\n\r\n")
                .unwrap();
            theirs
        });
        let answer = client.request("PUT", "/vm", &body, &[file.as_fd()], PATIENCE);
        assert!(answer.unwrap().is_success());
        drop(reader.join().unwrap());
        let error = client.request("GET", "/", "", &[], PATIENCE).unwrap_err();
        assert!(
            matches!(error, ClientError::Closed | ClientError::Io(_)),
            "{error}"
        );
    }

    #[test]
    fn request_when_not_answered_ends_at_its_deadline() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(ours).unwrap();
        let error = client
            .request("GET", "/", "", &[], Duration::from_millis(1))
            .unwrap_err();
        assert!(matches!(error, ClientError::TimedOut), "{error}");
    }

    #[test]
    fn answers_are_taken_one_by_one_when_whole() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(ours).unwrap();
        theirs
            .write_all(b"HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP/1.1 400 Bad\r\ncontent-length: 5\r\n\r\nab")
            .unwrap();
        assert_eq!(client.receive().unwrap().unwrap().status, 204);
        assert_eq!(client.receive().unwrap(), None);
        theirs.write_all(b"cde").unwrap();
        let answer = client.receive().unwrap().unwrap();
        assert_eq!((answer.status, answer.text()), (400, "abcde".into()));
        assert_eq!(answer.fault(), "status 400");
        drop(theirs);
        assert!(matches!(client.receive(), Err(ClientError::Closed)));
    }

    #[test]
    fn answer_when_it_is_not_http_or_has_no_end_is_an_error() {
        for bad in [
            &b"SSH-2.0\r\n\r\n"[..],
            b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n",
            b"HTTP/1.1 20\r\n\r\n",
            b"HTTP/1.1 200 \r\nno colon\r\n\r\n",
            b"\xff\r\n\r\n",
        ] {
            assert!(matches!(parse(bad), Err(ClientError::NotHttp)));
        }
    }

    #[test]
    fn fault_is_one_line() {
        for body in [
            r#"{"fault_message":"a\n b"}"#,
            r#"{"error":"a\u000ab","x":1}"#,
        ] {
            let answer = Response {
                status: 400,
                body: body.into(),
            };
            assert_eq!(answer.fault(), "a b");
        }
    }
}
