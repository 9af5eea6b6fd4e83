//! The head of a request, once all of it is there: what it asks for, how long its body is, and
//! whether the connection goes on. Pure: bytes to a [`Head`] or a [`Refused`].

use super::{HEAD_MAX, Method, Request};

/// Header lines of one request.
const HEADERS_MAX: usize = 64;

/// Bytes of a refused body that are read and thrown away to keep the connection.
const SKIP_MAX: usize = 1 << 20;

/// Why bytes are not a request.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) reason: String,
    pub(super) close: bool,
    /// Bytes of its body that are still to come.
    pub(super) skip: usize,
}

impl Refused {
    pub(super) fn new(reason: impl Into<String>, close: bool) -> Self {
        Refused {
            reason: reason.into(),
            close,
            skip: 0,
        }
    }
}

/// A head that was understood, while its body is awaited.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) request: Request,
    pub(super) length: usize,
    /// The client waits for leave to send the body, and has not got it.
    pub(super) waits: bool,
}

pub(super) fn head_too_large() -> Refused {
    Refused::new("Invalid request: its head is larger than 16 KiB.", true)
}

impl Head {
    /// Understands the head of a request of whose body, or what follows it, `received` bytes came.
    pub(super) fn parse(
        bytes: &[u8],
        received: usize,
        payload_max: usize,
    ) -> Result<Self, Refused> {
        if bytes.len() > HEAD_MAX {
            return Err(head_too_large());
        }
        if std::str::from_utf8(bytes).is_err() {
            return Err(Refused::new(
                "Invalid request: its head is not UTF-8.",
                false,
            ));
        }
        let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut lines);
        if let Err(error) = parsed.parse(bytes) {
            return Err(Refused::new(message(error), false));
        }
        let framing = Framing::of(parsed.headers).map_err(|reason| Refused::new(reason, true))?;
        let old = parsed.version == Some(0);
        // As Firecracker, which keeps the connections of HTTP/1.0 too: some clients that reuse
        // theirs say no more than that.
        let close = framing.connection.unwrap_or(false);
        let waits = framing.expects && !old && framing.length > 0;

        let method = Method::parse(parsed.method.unwrap_or_default());
        let reason = match (method, usize::try_from(framing.length)) {
            (None, _) => "Invalid HTTP Method: Unsupported HTTP method.".into(),
            (Some(method), Ok(length)) if length <= payload_max => {
                return Ok(Head {
                    request: Request {
                        method,
                        path: path(parsed.path.unwrap_or_default()).into(),
                        body: None,
                        close,
                    },
                    length,
                    waits,
                });
            }
            _ => format!(
                "Request payload with size {} is larger than the limit of {payload_max} allowed \
                 by server.",
                framing.length
            ),
        };
        // A body that is not too long is thrown away and the connection goes on; a client that
        // waits for leave to send it may or may not do so after this answer.
        let to_come = usize::try_from(framing.length)
            .unwrap_or(usize::MAX)
            .saturating_sub(received);
        let lost = waits || to_come > SKIP_MAX;
        Err(Refused {
            skip: if lost { 0 } else { to_come },
            ..Refused::new(reason, close || lost)
        })
    }
}

/// What the headers say of the request's end.
struct Framing {
    length: u64,
    expects: bool,
    /// Whether to close, when the client said anything about it.
    connection: Option<bool>,
}

impl Framing {
    fn of(headers: &[httparse::Header<'_>]) -> Result<Self, String> {
        let mut length = None;
        let mut framing = Framing {
            length: 0,
            expects: false,
            connection: None,
        };
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            if is("content-length") {
                let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
                // More digits than a number has are a number that is too large.
                let number = value.parse().unwrap_or(u64::MAX);
                if !digits || length.is_some_and(|other| other != number) {
                    return Err(
                        "Invalid header. Reason: Invalid value. Key: Content-Length.".into(),
                    );
                }
                length = Some(number);
            } else if is("transfer-encoding") && !value.eq_ignore_ascii_case("identity") {
                return Err(
                    "Invalid header. Reason: Unsupported value. Key: Transfer-Encoding; send a \
                     Content-Length."
                        .into(),
                );
            } else if is("expect") {
                framing.expects |= value.eq_ignore_ascii_case("100-continue");
            } else if is("connection") {
                for word in value.split(',').map(str::trim) {
                    if word.eq_ignore_ascii_case("close") {
                        framing.connection = Some(true);
                    } else if word.eq_ignore_ascii_case("keep-alive") {
                        framing.connection = framing.connection.or(Some(false));
                    }
                }
            }
        }
        framing.length = length.unwrap_or(0);
        Ok(framing)
    }
}

/// The path of a request's target: of `/path`, and of `http://host/path`.
fn path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)),
        None => target.starts_with('/').then_some(target),
    }
    .unwrap_or_default()
}

fn message(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::Version => "Invalid HTTP Version: Unsupported HTTP version.",
        httparse::Error::HeaderName | httparse::Error::HeaderValue => {
            "Invalid header. Reason: Header is incorrectly formatted."
        }
        httparse::Error::TooManyHeaders => "Invalid request: it has more than 64 headers.",
        _ => "Invalid request.",
    }
}

#[cfg(test)]
mod tests {
    use super::super::Piece;
    use super::super::testing::{LIMIT, get, pieces, put};
    use super::*;

    #[test]
    fn next_when_head_is_odd_but_good_takes_it() {
        for (input, path) in [
            ("GET version HTTP/1.1\r\n\r\n", ""),
            ("GET /\u{e9} HTTP/1.1\r\n\r\n", "/\u{e9}"),
            ("GET /a?b HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "/a?b"),
            (
                "GET /%41 HTTP/1.1\r\nExpect: 103-checkpoint\r\n\r\n",
                "/%41",
            ),
            ("GET / HTTP/1.0\r\n\r\n", "/"),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "/"),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", "/"),
        ] {
            assert_eq!(pieces(input.as_bytes(), 1000), [get(path)], "{input}");
        }
    }

    #[test]
    fn next_when_client_ends_the_connection_says_so() {
        for input in [
            "GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
            "GET / HTTP/1.1\r\nconnection: keep-alive, CLOSE\r\n\r\n",
            "GET / HTTP/1.0\r\nConnection: close\r\n\r\n",
        ] {
            let found = pieces(input.as_bytes(), 1000);
            assert!(
                matches!(
                    found.as_slice(),
                    [Piece::Request(Request { close: true, .. })]
                ),
                "{input}: {found:?}"
            );
        }
    }

    #[test]
    fn next_when_not_a_request_says_why() {
        // input, reason, close
        let cases: &[(&[u8], &str, bool)] = &[
            (b"FOO\r\n\r\n", "Invalid request", false),
            (b"\r\nGET / HTTP/1.1\r\n\r\n", "is empty", false),
            (b"POST / HTTP/1.1\r\n\r\n", "Invalid HTTP Method", false),
            (b"get / HTTP/1.1\r\n\r\n", "Invalid HTTP Method", false),
            (b"GET / HTTP/2.0\r\n\r\n", "Invalid HTTP Version", false),
            (b"GET  HTTP/1.1\r\n\r\n", "Invalid", false),
            (b"GET /  HTTP/1.1\r\n\r\n", "Invalid", false),
            (b"GET / HTTP/1.1 \r\n\r\n", "Invalid", false),
            (b"GET /\0 HTTP/1.1\r\n\r\n", "Invalid", false),
            (b"GET /\xff HTTP/1.1\r\n\r\n", "UTF-8", false),
            (b"GET / HTTP/1.1\r\na: \xff\r\n\r\n", "UTF-8", false),
            (b"GET / HTTP/1.1\n\n", "CR LF", true),
            (b"GET / HTTP/1.1\r\na\r\n\r\n", "Invalid header", false),
            (
                b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n",
                "Invalid header",
                false,
            ),
            (
                b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                "Transfer-Encoding",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
                "Content-Length",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                "Content-Length",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n",
                "Content-Length",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                "Content-Length",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n",
                "larger than the limit of 51200",
                false,
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                "larger than the limit",
                true,
            ),
            (
                b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51201\r\n\r\n",
                "larger than the limit",
                true,
            ),
        ];
        for (input, reason, close) in cases {
            let found = pieces(input, 10_000);
            match found.as_slice() {
                [
                    Piece::Malformed {
                        reason: told,
                        close: closes,
                    },
                ] => {
                    assert!(told.contains(reason), "{told}");
                    assert_eq!(closes, close, "{told}");
                }
                other => panic!("{}: {other:?}", String::from_utf8_lossy(input)),
            }
        }
    }

    #[test]
    fn next_when_headers_never_end_stops() {
        let mut input = b"GET / HTTP/1.1\r\n".to_vec();
        for _ in 0..65 {
            input.extend_from_slice(b"a: b\r\n");
        }
        input.extend_from_slice(b"\r\n");
        let found = pieces(&input, 10_000);
        assert!(matches!(&found[0], Piece::Malformed { reason, .. } if reason.contains("64")));
        let long = [b"a: ", [b'b'; 900].as_slice(), b"\r\n"].concat();
        let input = [b"GET / HTTP/1.1\r\n".as_slice(), &long.repeat(20)].concat();
        let found = pieces(&input, 100);
        assert!(matches!(&found[0], Piece::Malformed { reason, .. } if reason.contains("16 KiB")));
    }

    #[test]
    fn next_when_body_has_the_limit_takes_it() {
        let mut input = format!("PUT / HTTP/1.1\r\nContent-Length: {LIMIT}\r\n\r\n").into_bytes();
        input.extend_from_slice(&[b' '; LIMIT]);
        assert_eq!(pieces(&input, 4096), [put("/", &[b' '; LIMIT])]);
    }
}
