//! The fuzz target of the protocol: any bytes as a frame of the other side. Compiled for tests and
//! `tools/fuzz` only.

use crate::archive::{self, Entry};
use crate::{Fields, Frame, HEADER, INPUT_WINDOW, Message, Receiver, Sender, fields, frame};
use std::vec::Vec;

/// A frame, and an archive's entry. Checked: what is decoded is encoded to the same bytes, so that
/// no two spellings mean the same; nothing is longer than what it came in; a receiver never takes more
/// bytes than it has given credit for, and a sender no more credit than a window.
pub fn agent(bytes: &[u8]) {
    // The sequence number of the frame is right as a rule.
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let found = bytes.get(4..HEADER).and_then(|it| it.first_chunk());
    let found = u32::from_le_bytes(found.copied().unwrap_or_default());
    let expected = if choice % 16 == 0 { 0 } else { found };
    if let Ok(messages) = frame::messages(bytes, expected) {
        let mut again = Frame::new();
        let mut is_whole = true;
        let mut streams = Streams::default();
        for message in messages {
            match message {
                Ok(message) => {
                    streams.take(&message);
                    assert!(again.push(&message));
                }
                Err(_) => is_whole = false,
            }
        }
        let again = again.finish(found);
        assert_eq!(again[HEADER..], bytes[HEADER..again.len()]);
        assert_eq!(is_whole, again.len() == frame::length(bytes).unwrap());
        assert!(!is_whole || again == &bytes[..again.len()]);
    }
    if let Some(entry) = bytes.first_chunk::<{ archive::HEADER }>()
        && let Ok(decoded) = Entry::decode(entry)
    {
        assert_eq!(decoded.encode(), *entry);
    }
    let _ = archive::is_name(bytes);
}

/// Both ends of streams, and what they are to know.
struct Streams {
    receiver: Receiver,
    open: usize,
    sender: Sender,
    left: u64,
}

impl Default for Streams {
    fn default() -> Self {
        Streams {
            receiver: Receiver::new(INPUT_WINDOW),
            open: INPUT_WINDOW as usize,
            sender: Sender::new(INPUT_WINDOW),
            left: u64::from(INPUT_WINDOW),
        }
    }
}

impl Streams {
    fn take(&mut self, message: &Message<'_>) {
        match message {
            Message::Setup(body) | Message::Start { body, .. } => check_fields(body),
            Message::Data { bytes, .. } => {
                let fits = bytes.len() <= self.open;
                assert_eq!(self.receiver.received(bytes.len()).is_ok(), fits);
                self.open -= if fits { bytes.len() } else { 0 };
                self.sender.sent(bytes.len());
                self.left = self.left.saturating_sub(bytes.len() as u64);
            }
            Message::Credit { bytes, .. } => {
                let left = self.left + u64::from(*bytes);
                let fits = left <= u64::from(INPUT_WINDOW);
                assert_eq!(self.sender.grant(*bytes).is_ok(), fits);
                self.left = if fits { left } else { self.left };
                assert_eq!(self.sender.left() as u64, self.left);
            }
            _ => {}
        }
    }
}

fn check_fields(body: &[u8]) {
    let mut again = Vec::new();
    let mut is_whole = true;
    for field in Fields(body) {
        let Ok(field) = field else {
            is_whole = false;
            break;
        };
        again.extend(fields::header(field.tag, field.bytes()).unwrap());
        again.extend(field.bytes());
        again.push(0);
        assert_eq!(field.text().is_ok(), !field.bytes().contains(&0));
    }
    assert_eq!(again, body[..again.len()]);
    assert_eq!(is_whole, again.len() == body.len());
    assert!(is_whole || fields::check_process(body).is_err());
}

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn frame_when_anything_is_decoded_as_it_would_be_encoded() {
        run("agent", super::agent);
    }
}
