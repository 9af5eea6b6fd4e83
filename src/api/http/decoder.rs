//! Bytes to pieces: where requests begin and end in what a client sends, however it is cut up.
//! Pure: it is fed and asked, and keeps less than one request and what was fed beyond.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use super::head::{Head, Refused, head_too_large};
use super::{HEAD_MAX, LINE_MAX, Piece};

/// Bytes to take at once while it is not known where the request ends: two lines of the longest.
const AHEAD_MAX: usize = 2 * LINE_MAX;

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

#[cfg(test)]
mod tests {
    use super::super::testing::{LIMIT, get, pieces, put};
    use super::*;

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
    fn next_when_leave_is_expected_gives_it_before_the_request() {
        let input = b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(pieces(input, 1), [Piece::Continue, put("/a", b"{}")]);
        let input = b"GET /a HTTP/1.1\r\nExpect: 100-continue\r\n\r\n";
        assert_eq!(pieces(input, 1), [get("/a")]);
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
}
