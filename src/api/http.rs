//! HTTP/1.1 as far as this API needs it: bytes to requests, responses to bytes. No I/O.
//!
//! A [`Decoder`] takes bytes as they come and gives [`Piece`]s, one when it is asked for one: until
//! then a request is no more than its bytes. It keeps less than one request, and what was fed to
//! it beyond, which is little when [`Decoder::room`] is obeyed. Limits and answers are
//! Firecracker's; where a client and we could disagree on where a request ends, the connection
//! is to be closed.

mod decoder;
mod head;
#[cfg(test)]
mod testing;

pub use crate::wire::Method;
pub use decoder::Decoder;
#[cfg(any(test, fuzzing))]
pub use decoder::fuzz;

/// Bytes of a request line or header line, its end included.
pub const LINE_MAX: usize = 1024;

/// Bytes of a request's head: the request line and all headers.
pub const HEAD_MAX: usize = 16 * 1024;

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, neither unescaped nor cut at a `?`; empty when the target has none.
    pub path: String,
    /// The body; none when its length is 0.
    pub body: Option<Vec<u8>>,
    /// The client will send nothing after this.
    pub close: bool,
}

/// What was found in the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A request.
    Request(Request),
    /// The client waits for leave to send the body.
    Continue,
    /// Not a request. All that was received with it is gone.
    Malformed {
        /// The message.
        reason: String,
        /// It is not known what the next bytes belong to: close when this is answered.
        close: bool,
    },
}

/// A response, before it is bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// The kind of body.
    pub content_type: &'static str,
    /// The body; a 100 and a 204 have none.
    pub body: Option<String>,
    /// The connection ends with this.
    pub close: bool,
    /// The request had a member that clients should stop using.
    pub deprecated: bool,
}

impl Response {
    /// JSON, already written.
    pub fn json(status: u16, body: String) -> Self {
        Response {
            status,
            content_type: "application/json",
            body: Some(body),
            close: false,
            deprecated: false,
        }
    }

    /// Nothing but a status.
    pub fn empty(status: u16) -> Self {
        Response {
            body: None,
            ..Response::json(status, String::new())
        }
    }

    /// The answer to what was no request.
    pub fn malformed(reason: &str, close: bool) -> Self {
        let text = format!("{reason}\nAll previous unanswered requests will be dropped.");
        Response {
            close,
            ..Response::json(400, serde_json::json!({ "error": text }).to_string())
        }
    }

    /// Writes it in Firecracker's form, which has no reason phrases.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let connection = if self.close { "close" } else { "keep-alive" };
        let head = format!(
            "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        );
        out.extend_from_slice(head.as_bytes());
        if self.deprecated {
            out.extend_from_slice(b"Deprecation: true\r\n");
        }
        if let Some(body) = &self.body {
            let kind = format!(
                "Content-Type: {}\r\nContent-Length: {}\r\n\r\n",
                self.content_type,
                body.len()
            );
            out.extend_from_slice(kind.as_bytes());
            out.extend_from_slice(body.as_bytes());
        } else {
            out.extend_from_slice(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_when_written_is_the_firecrackers_form() {
        let bytes = |response: Response| {
            let mut out = Vec::new();
            response.encode(&mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            bytes(Response::json(200, "{}".into())),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
        assert_eq!(
            bytes(Response::empty(204)),
            "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
        let refused = bytes(Response::malformed("Why.", true));
        assert!(refused.starts_with("HTTP/1.1 400 \r\n") && refused.contains("Connection: close"));
        assert!(
            refused.ends_with(
                r#"{"error":"Why.\nAll previous unanswered requests will be dropped."}"#
            )
        );
    }
}
