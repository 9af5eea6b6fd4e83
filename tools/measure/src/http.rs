//! As much HTTP as a monitor's API needs: one kept-alive connection over a Unix socket, JSON bodies.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Context, Failure, Result};
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(600);

/// A connection to an API socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Client {
    /// Takes a connected stream.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .cannot(|| "set a time limit on the API connection".into())?;
        Ok(Self {
            stream,
            received: Vec::new(),
        })
    }

    /// Sends a PATCH and waits until it is accepted.
    pub fn patch(&mut self, path: &str, body: &Value) -> Result<()> {
        self.send_as("PATCH", path, &body.to_string())?;
        self.accepted(path)
    }

    /// Sends a GET and waits for the answer.
    pub fn get(&mut self, path: &str) -> Result<()> {
        self.stream
            .write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())
            .cannot(|| format!("send GET {path}"))?;
        self.accepted(path)
    }

    /// Sends a PUT and waits until it is accepted.
    pub fn put(&mut self, path: &str, body: &Value) -> Result<()> {
        self.send(path, body)?;
        self.accepted(path)
    }

    /// Sends a PUT.
    pub fn send(&mut self, path: &str, body: &Value) -> Result<()> {
        self.send_as("PUT", path, &body.to_string())
    }

    /// Sends a PUT with one descriptor, and waits until it is accepted.
    pub fn put_with(&mut self, path: &str, body: &Value, passed: BorrowedFd<'_>) -> Result<()> {
        self.send_with(path, body, passed)?;
        self.accepted(path)
    }

    /// Sends a PUT with one descriptor.
    pub fn send_with(&mut self, path: &str, body: &Value, passed: BorrowedFd<'_>) -> Result<()> {
        let request = request("PUT", path, &body.to_string());
        sys::send_with_descriptor(&self.stream, request.as_bytes(), passed)
            .cannot(|| format!("send PUT {path} with a descriptor"))
    }

    fn send_as(&mut self, method: &str, path: &str, body: &str) -> Result<()> {
        self.stream
            .write_all(request(method, path, body).as_bytes())
            .cannot(|| format!("send {method} {path}"))
    }

    /// Reads one answer; anything but 2xx is a failure.
    pub fn accepted(&mut self, path: &str) -> Result<()> {
        loop {
            if let Some((status, len)) = complete(&self.received) {
                let answer: Vec<u8> = self.received.drain(..len).collect();
                if (200..300).contains(&status) {
                    return Ok(());
                }
                let message = fault_message(&answer)
                    .unwrap_or_else(|| String::from_utf8_lossy(&answer).replace("\r\n", " "));
                return Err(Failure::refusal(format!("{path} was refused: {message}")));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    return Err(Failure::new(format!(
                        "the API connection was closed before the answer to {path}"
                    )));
                }
                Ok(len) => self.received.extend(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    if sys::interrupted() {
                        return Err(Failure::interrupted());
                    }
                }
                Err(error) => {
                    return Err(error).cannot(|| format!("read the answer to {path}"));
                }
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What an error answer of an API says.
fn fault_message(answer: &[u8]) -> Option<String> {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let body: Value = serde_json::from_slice(answer.get(at..)?).ok()?;
    let message = body.get("fault_message")?.as_str()?;
    Some(message.trim_end_matches('.').replace('\n', " "))
}

/// Status and length of the answer at the start of `bytes`, once all of it is there.
fn complete(bytes: &[u8]) -> Option<(u16, usize)> {
    let head_len = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(bytes.get(..head_len)?).ok()?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let body_len = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |(_, value)| value.trim().parse().ok())?;
    let len = head_len + body_len;
    (bytes.len() >= len).then_some((status, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_when_without_body_is_complete_at_the_blank_line() {
        assert_eq!(
            complete(b"HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP"),
            Some((204, 28))
        );
    }

    #[test]
    fn answer_when_its_body_is_cut_is_not_complete() {
        let whole = b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(complete(whole), Some((400, whole.len())));
        assert_eq!(complete(&whole[..whole.len() - 1]), None);
    }

    #[test]
    fn fault_message_when_there_is_told_alone() {
        let answer = b"HTTP/1.1 400 \r\n\r\n{\"fault_message\": \"No such thing.\"}";
        assert_eq!(fault_message(answer).unwrap(), "No such thing");
        assert_eq!(fault_message(b"HTTP/1.1 400 \r\n\r\nNo."), None);
    }

    #[test]
    fn request_when_made_declares_its_length() {
        assert!(request("PUT", "/x", "{\"a\":1}").contains("Content-Length: 7\r\n\r\n{"));
    }
}
