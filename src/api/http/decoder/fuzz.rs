//! The decoder of requests: any bytes, in pieces of any size.

use super::*;
use crate::api::http::{Request, Response};
use crate::api::routes;
use crate::fuzz::Input;

/// Bytes as a client sends them, fed three times: as far as the end of each line or request, byte by
/// byte, and in other pieces. Checked: the first two find the same, nothing is kept beyond what is
/// promised, and a request that is written out again is found again.
pub fn http(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let payload_max = input.one_of(&[51_200, 64, 0]);
    let size = 1 + input.below(256);
    let bytes = input.bytes(usize::MAX);

    // As the connection does, which may have fewer bytes.
    let by_request = pieces(payload_max, bytes, |decoder, rest| {
        decoder.most(rest).min(rest.len())
    });
    let by_byte = pieces(payload_max, bytes, |_, _| 1);
    assert_eq!(until_close(&by_request), until_close(&by_byte));
    pieces(payload_max, bytes, |decoder, rest| {
        decoder.room().min(size).min(rest.len())
    });

    for piece in &by_byte {
        match piece {
            Piece::Request(request) => check(request, payload_max),
            Piece::Malformed { reason, close } => drop(Response::malformed(reason, *close)),
            Piece::Continue => {}
        }
    }
}

/// All pieces of `bytes`, of which `next` tells how many are fed at once.
fn pieces(payload_max: usize, bytes: &[u8], next: impl Fn(&Decoder, &[u8]) -> usize) -> Vec<Piece> {
    let (mut decoder, mut rest, mut found) = (Decoder::new(payload_max), bytes, Vec::new());
    while !rest.is_empty() {
        let count = next(&decoder, rest);
        assert!(count > 0);
        let fed;
        (fed, rest) = rest.split_at(count);
        decoder.feed(fed);
        assert!(decoder.bytes.len() <= payload_max.max(HEAD_MAX + AHEAD_MAX));
        while let Some(piece) = decoder.next_piece() {
            found.push(piece);
        }
    }
    found
}

/// What comes before the connection is to be closed.
fn until_close(pieces: &[Piece]) -> &[Piece] {
    let closes = |piece: &Piece| matches!(piece, Piece::Malformed { close: true, .. });
    let end = pieces.iter().position(closes);
    &pieces[..end.unwrap_or(pieces.len())]
}

fn check(request: &Request, payload_max: usize) {
    let body = request.body.as_deref();
    assert!(body.is_none_or(|body| !body.is_empty() && body.len() <= payload_max));
    if let Err(refused) = routes::action(request) {
        assert_eq!(refused.status, 400);
        let mut out = Vec::new();
        refused.encode(&mut out);
    }
    if request.close || !request.path.starts_with('/') {
        return;
    }
    let head = format!(
        "{} {} HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        request.method.name(),
        request.path,
        body.map_or(0, <[u8]>::len),
    );
    let again = [head.as_bytes(), body.unwrap_or_default()].concat();
    let expected = Piece::Request(request.clone());
    assert_eq!(
        pieces(payload_max, &again, |_, rest| rest.len()),
        [expected]
    );
}
