//! HTTP/1.1 as far as this API needs it: bytes to requests, responses to bytes. No I/O.
//!
//! A [`Decoder`] takes bytes as they come and gives [`Piece`]s, one when it is asked for one: until
//! then a request is no more than its bytes. It keeps less than one request, and what was fed to
//! it beyond, which is little when [`Decoder::room`] is obeyed. Limits and answers are
//! Firecracker's; where a client and we could disagree on where a request ends, the connection
//! is to be closed.

/// Bytes of a request line or header line, its end included.
pub const LINE_MAX: usize = 1024;

/// Bytes of a request's head: the request line and all headers.
pub const HEAD_MAX: usize = 16 * 1024;

/// Bytes to take at once while nobody knows where the request ends: two lines of the longest.
const AHEAD_MAX: usize = 2 * LINE_MAX;

/// Header lines of one request.
const HEADERS_MAX: usize = 64;

/// Bytes of a refused body that are read and thrown away to keep the connection.
const SKIP_MAX: usize = 1 << 20;

pub use crate::wire::Method;

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
        /// One sentence.
        reason: String,
        /// Nobody knows what the next bytes belong to: close when this is answered.
        close: bool,
    },
}

/// Why bytes are not a request.
#[derive(Debug)]
struct Refused {
    reason: String,
    close: bool,
    /// Bytes of its body that are still to come.
    skip: usize,
}

impl Refused {
    fn new(reason: impl Into<String>, close: bool) -> Self {
        Refused {
            reason: reason.into(),
            close,
            skip: 0,
        }
    }
}

/// A head that was understood, while its body is awaited.
#[derive(Debug)]
struct Head {
    request: Request,
    length: usize,
    /// The client waits for leave to send the body, and has not got it.
    waits: bool,
}

/// Bytes to pieces, for one connection.
#[derive(Debug)]
pub struct Decoder {
    payload_max: usize,
    /// What was received and not given out: the rest of one request, and what came behind it.
    bytes: Vec<u8>,
    lines: Lines,
    head: Option<Head>,
    /// Whether what came behind the first request was looked at.
    looked_through: bool,
    /// Bytes of a refused body that are still to come.
    skip: usize,
}

impl Decoder {
    /// A decoder that takes bodies of at most `payload_max` bytes.
    pub fn new(payload_max: usize) -> Self {
        Decoder {
            payload_max,
            bytes: Vec::new(),
            lines: Lines::default(),
            head: None,
            looked_through: false,
            skip: 0,
        }
    }

    /// Whether there is nothing of a request.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.head.is_none()
    }

    /// Whether the next byte is the first of a request.
    pub fn is_between(&self) -> bool {
        self.is_empty() && self.skip == 0
    }

    /// How many bytes to feed at once, when there is no whole request: what is missing of a body,
    /// else little.
    pub fn room(&self) -> usize {
        self.missing().unwrap_or(AHEAD_MAX).max(1)
    }

    /// How many of the bytes that come `next` may be fed without going beyond the request that
    /// is being received: the first of one, a line of its head, or what is missing of its body.
    pub fn most(&self, next: &[u8]) -> usize {
        self.missing().unwrap_or_else(|| {
            if self.is_between() {
                return 1;
            }
            let end = next.iter().position(|byte| *byte == b'\n');
            end.map_or(next.len(), |at| at.saturating_add(1))
        })
    }

    /// Bytes of a body that are still to come, where it is known.
    fn missing(&self) -> Option<usize> {
        match &self.head {
            Some(head) => Some(head.length.saturating_sub(self.bytes.len())),
            None => (self.skip > 0).then_some(self.skip),
        }
    }

    /// Takes what was received.
    pub fn feed(&mut self, received: &[u8]) {
        let skipped = self.skip.min(received.len());
        self.skip = self.skip.saturating_sub(skipped);
        self.bytes
            .extend_from_slice(received.get(skipped..).unwrap_or_default());
        self.looked_through = false;
    }

    /// The next piece of what was fed, or none until there is more. What was fed is not a request
    /// as soon as any of it is not: requests before that are gone too.
    pub fn next_piece(&mut self) -> Option<Piece> {
        self.find().unwrap_or_else(|refused| {
            *self = Decoder {
                skip: refused.skip,
                ..Decoder::new(self.payload_max)
            };
            Some(Piece::Malformed {
                reason: refused.reason,
                close: refused.close,
            })
        })
    }

    fn find(&mut self) -> Result<Option<Piece>, Refused> {
        if self.head.is_none()
            && let Some(end) = self.lines.end(&self.bytes)?
        {
            let (head, rest) = self.bytes.split_at_checked(end).unwrap_or_default();
            self.head = Some(Head::parse(head, rest.len(), self.payload_max)?);
            self.bytes.drain(..end);
            self.lines = Lines::default();
        }
        let Some(head) = &mut self.head else {
            return Ok(None);
        };
        let behind = self.bytes.get(head.length..);
        if let Some(behind) = behind.filter(|_| !self.looked_through) {
            look_through(behind, self.payload_max)?;
            self.looked_through = true;
        }
        if std::mem::take(&mut head.waits) {
            return Ok(Some(Piece::Continue));
        }
        let Some(head) = self.head.take_if(|_| behind.is_some()) else {
            return Ok(None);
        };
        let mut request = head.request;
        if head.length > 0 {
            let behind = self.bytes.split_off(head.length);
            request.body = Some(std::mem::replace(&mut self.bytes, behind));
        }
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(Piece::Request(request)))
    }
}

/// Looks at the requests that `bytes` begin with, whole or not: refused if one of them is.
fn look_through(mut bytes: &[u8], payload_max: usize) -> Result<(), Refused> {
    while let Some(end) = Lines::default().end(bytes)? {
        let (head, rest) = bytes.split_at_checked(end).unwrap_or_default();
        let head = Head::parse(head, rest.len(), payload_max)?;
        bytes = rest.get(head.length..).unwrap_or_default();
    }
    Ok(())
}

/// The lines of a head, as they come.
#[derive(Debug, Default)]
struct Lines {
    /// Where the line begins whose end was not found yet, and from where on to look for it.
    line: usize,
    looked: usize,
}

impl Lines {
    /// Where the head ends that `bytes` begin with, after its empty line; looks at each byte once.
    fn end(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refused> {
        while let Some(at) = position(bytes, b'\n', self.looked) {
            let line = bytes.get(self.line..at).unwrap_or_default();
            let next = at.saturating_add(1);
            let Some(text) = line.strip_suffix(b"\r") else {
                return Err(Refused::new(
                    "Invalid request: a line ends without CR LF.",
                    true,
                ));
            };
            if line.len() >= LINE_MAX {
                return Err(self.too_long());
            }
            let (first, last) = (self.line == 0, text.is_empty());
            (self.line, self.looked) = (next, next);
            match (first, last) {
                (true, true) => {
                    return Err(Refused::new(
                        "Invalid request: the request line is empty.",
                        false,
                    ));
                }
                (_, false) => {}
                (false, true) => return Ok(Some(next)),
            }
        }
        self.looked = bytes.len();
        if self.looked.saturating_sub(self.line) >= LINE_MAX {
            return Err(self.too_long());
        }
        if self.looked > HEAD_MAX {
            return Err(head_too_large());
        }
        Ok(None)
    }

    fn too_long(&self) -> Refused {
        let what = if self.line == 0 { "request" } else { "header" };
        let reason = format!("Invalid {what}: a line is longer than {LINE_MAX} bytes.");
        Refused::new(reason, true)
    }
}

fn position(bytes: &[u8], byte: u8, from: usize) -> Option<usize> {
    let at = bytes.get(from..)?.iter().position(|b| *b == byte)?;
    from.checked_add(at)
}

fn head_too_large() -> Refused {
    Refused::new("Invalid request: its head is larger than 16 KiB.", true)
}

impl Head {
    /// Understands the head of a request of whose body, or what follows it, `received` bytes came.
    fn parse(bytes: &[u8], received: usize, payload_max: usize) -> Result<Self, Refused> {
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
            return Err(Refused::new(sentence(error), false));
        }
        let framing = Framing::of(parsed.headers).map_err(|reason| Refused::new(reason, true))?;
        let old = parsed.version == Some(0);
        // As the original, which keeps the connections of HTTP/1.0 too: some clients that reuse
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

fn sentence(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::Version => "Invalid HTTP Version: Unsupported HTTP version.",
        httparse::Error::HeaderName | httparse::Error::HeaderValue => {
            "Invalid header. Reason: Header is incorrectly formatted."
        }
        httparse::Error::TooManyHeaders => "Invalid request: it has more than 64 headers.",
        _ => "Invalid request.",
    }
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

    /// Writes it in the original's form, which has no reason phrases.
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

    const LIMIT: usize = 51_200;

    /// All pieces of `input`, fed in chunks of `size`.
    fn pieces(input: &[u8], size: usize) -> Vec<Piece> {
        let mut decoder = Decoder::new(LIMIT);
        let mut found = Vec::new();
        for chunk in input.chunks(size) {
            decoder.feed(chunk);
            while let Some(piece) = decoder.next_piece() {
                found.push(piece);
            }
        }
        found
    }

    fn get(path: &str) -> Piece {
        Piece::Request(Request {
            method: Method::Get,
            path: path.into(),
            body: None,
            close: false,
        })
    }

    #[test]
    fn most_when_obeyed_never_goes_beyond_a_request() {
        let requests: [&[u8]; 5] = [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"PUT /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhel\no",
            b"PUT /a HTTP/1.1\r\nContent-Length: 60000\r\n\r\n",
            &[b'\n'; 60_000],
            b"GET / HTTP/1.1\r\n\r\n",
        ];
        let input = requests.concat();
        let (mut decoder, mut at, mut between) = (Decoder::new(LIMIT), 0, Vec::new());
        while at < input.len() {
            if decoder.is_between() {
                between.push(at);
            }
            let count = decoder.most(&input[at..]);
            assert!(count > 0 && at + count <= input.len());
            decoder.feed(&input[at..at + count]);
            while decoder.next_piece().is_some() {}
            at += count;
        }
        let mut starts = vec![0];
        for request in requests {
            starts.push(starts.last().unwrap() + request.len());
        }
        // The fourth is what is thrown away of the third.
        starts.remove(3);
        starts.pop();
        assert_eq!(between, starts);
    }

    fn put(path: &str, body: &[u8]) -> Piece {
        Piece::Request(Request {
            method: Method::Put,
            path: path.into(),
            body: Some(body.into()),
            close: false,
        })
    }

    #[test]
    fn room_when_obeyed_bounds_what_is_kept() {
        let long = [b"a: ", [b'b'; 900].as_slice(), b"\r\n"].concat();
        let body = vec![b'x'; LIMIT];
        let input = [
            &b"GET / HTTP/1.1\r\n\r\n".repeat(1000),
            &b"PUT /a HTTP/1.1\r\nContent-Length: 51200\r\n"[..],
            &long.repeat(17),
            b"\r\n",
            &body,
            &b"GET /b HTTP/1.1\r\n\r\n".repeat(500),
            &b"PUT /c HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".repeat(500),
        ]
        .concat();
        let mut expected = vec![get("/"); 1000];
        expected.push(put("/a", &body));
        expected.extend(vec![get("/b"); 500]);
        expected.extend(vec![put("/c", b"abc"); 500]);

        let (mut decoder, mut rest) = (Decoder::new(LIMIT), input.as_slice());
        let (mut found, mut most) = (Vec::new(), 0);
        while !rest.is_empty() {
            let fed;
            (fed, rest) = rest.split_at(decoder.room().min(rest.len()));
            decoder.feed(fed);
            most = most.max(decoder.bytes.len());
            while let Some(piece) = decoder.next_piece() {
                found.push(piece);
            }
        }
        assert_eq!(found, expected);
        assert!(most <= LIMIT.max(HEAD_MAX + AHEAD_MAX), "{most}");
        assert!(decoder.is_between() && decoder.bytes.capacity() == 0);
    }

    #[test]
    fn next_when_requests_are_whole_finds_them_in_any_pieces() {
        let input = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\
            PUT /actions HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello\
            GET http://localhost/version HTTP/1.1\r\n\r\n";
        let expected = vec![get("/"), put("/actions", b"hello"), get("/version")];
        for size in [1, 2, 3, 7, 16, input.len()] {
            assert_eq!(pieces(input, size), expected, "{size}");
        }
    }

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
    fn next_when_leave_is_expected_gives_it_before_the_request() {
        let input = b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(pieces(input, 1), [Piece::Continue, put("/a", b"{}")]);
        let input = b"GET /a HTTP/1.1\r\nExpect: 100-continue\r\n\r\n";
        assert_eq!(pieces(input, 1), [get("/a")]);
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
    fn next_when_malformed_drops_what_came_with_it_and_starts_anew() {
        let mut decoder = Decoder::new(LIMIT);
        decoder.feed(b"FOO\r\n\r\nGET /a HTTP/1.1\r\n\r\n");
        assert!(matches!(
            decoder.next_piece(),
            Some(Piece::Malformed { .. })
        ));
        assert_eq!(decoder.next_piece(), None);
        assert!(decoder.is_empty());
        decoder.feed(b"GET /b HTTP/1.1\r\n\r\n");
        assert_eq!(decoder.next_piece(), Some(get("/b")));
    }

    #[test]
    fn next_when_what_follows_is_malformed_drops_those_before() {
        let good = "GET /a HTTP/1.1\r\n\r\nPUT /b HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        for (bad, closes) in [
            ("FOO\r\n\r\n", false),
            ("PUT / HTTP/1.1\r\nContent-Length: 60000\r\n\r\nabc", false),
            ("GET / HTTP/1.1\n", true),
            (&"x".repeat(LINE_MAX), true),
        ] {
            let input = format!("{good}{bad}").into_bytes();
            let found = pieces(&input, input.len());
            assert!(
                matches!(found.as_slice(), [Piece::Malformed { close, .. }] if *close == closes),
                "{bad}: {found:?}"
            );
            // Those that were given out before it came are not.
            assert_eq!(pieces(&input, 1).len(), 3, "{bad}");
        }
    }

    #[test]
    fn next_when_a_body_is_refused_skips_it() {
        for head in [
            "POST / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n",
        ] {
            let mut decoder = Decoder::new(LIMIT);
            decoder.feed(head.as_bytes());
            decoder.feed(&[b'x'; 1000]);
            assert!(matches!(
                decoder.next_piece(),
                Some(Piece::Malformed { close: false, .. })
            ));
            decoder.feed(&[b'x'; 58_999]);
            decoder.feed(b"xGET / HTTP/1.1\r\n\r\n");
            assert_eq!(decoder.next_piece(), Some(get("/")));
        }
    }

    #[test]
    fn next_when_lines_grow_stops_at_1024_bytes() {
        for (length, good) in [(1021, true), (1022, true), (1023, false), (5000, false)] {
            let target = "x".repeat(length - "GET / HTTP/1.1".len());
            let line = format!("GET /{target} HTTP/1.1\r\n\r\n");
            let header = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(length - 3));
            for input in [line, header] {
                for size in [1, 100, 10_000] {
                    let found = pieces(input.as_bytes(), size);
                    let is_good = matches!(found.first(), Some(Piece::Request(_)));
                    assert_eq!(is_good, good, "{length} in pieces of {size}");
                }
            }
        }
        let endless = pieces(&[b'x'; 1024], 1024);
        assert!(matches!(
            endless.as_slice(),
            [Piece::Malformed { close: true, .. }]
        ));
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

    #[test]
    fn next_when_fed_noise_never_panics() {
        let mut seed = 1_u64;
        let alphabet = b"GET /PU \r\n\r\n:HTTP/1.10Content-Length5chunked\x00\xff";
        for _ in 0..2000 {
            let mut decoder = Decoder::new(64);
            for _ in 0..20 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let from = (seed >> 33) as usize % alphabet.len();
                decoder.feed(&alphabet[from..]);
                while decoder.next_piece().is_some() {}
            }
        }
    }

    #[test]
    fn encode_when_written_is_the_originals_form() {
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
