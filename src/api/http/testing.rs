//! What the tests of the decoder and of heads share.

use super::{Decoder, Method, Piece, Request};

pub const LIMIT: usize = 51_200;

/// All pieces of `input`, fed in chunks of `size`.
pub fn pieces(input: &[u8], size: usize) -> Vec<Piece> {
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

pub fn get(path: &str) -> Piece {
    Piece::Request(Request {
        method: Method::Get,
        path: path.into(),
        body: None,
        close: false,
    })
}

pub fn put(path: &str, body: &[u8]) -> Piece {
    Piece::Request(Request {
        method: Method::Put,
        path: path.into(),
        body: Some(body.into()),
        close: false,
    })
}
