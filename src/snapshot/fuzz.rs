//! State files: any bytes, and any texts in a file that is otherwise as it should be.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use super::header::{FIXED, Header, VERSION, encode_json, seal};
use super::read::{RawState, check_memory, read};
use crate::fuzz::Input;

/// The most that a refusal says: it reaches logs and clients.
pub const REFUSAL_MAX: usize = 4096;

/// Reads a state file: the bytes themselves, or with the first as many of them for a header and the rest
/// for a state, signed as a writer does. Checked: what is taken is written again as a file that reads the
/// same; a refusal says little; a memory file is taken with it only if it has the length and the id.
pub fn state_file(input: &mut Input<'_>) -> Option<(Header, RawState)> {
    let header_len = usize::from(input.u16());
    let is_signed = input.below(8) > 0;
    let version = (VERSION.0, input.u16() % (VERSION.1 + 1));
    let mut bytes = if is_signed {
        vec![0; FIXED]
    } else {
        Vec::new()
    };
    bytes.extend(input.bytes(usize::MAX));
    if is_signed {
        seal(&mut bytes, header_len, version);
    }
    let (header, state) = match read(&memory_file(&bytes)) {
        Ok(read) => read,
        Err(refusal) => {
            assert!(refusal.to_string().len() < REFUSAL_MAX);
            return None;
        }
    };
    assert_eq!(state.json(), &bytes[FIXED + header_len..]);
    let again = encode_json(&header, state.json()).unwrap();
    let (header_again, state_again) = read(&memory_file(&again)).unwrap();
    assert_eq!(header_again, header);
    assert_eq!(state_again.json(), state.json());
    memory(&header);
    Some((header, state))
}

fn memory(header: &Header) {
    let image = memory_file(&[]);
    let at = header.memory.id_at;
    let fits = at
        .checked_add(16)
        .is_some_and(|end| end <= header.memory.len);
    // What a file in memory can be as long as.
    if header.memory.len > 1 << 40 || image.set_len(header.memory.len).is_err() {
        return;
    }
    assert_eq!(
        check_memory(header, &image).is_ok(),
        fits && header.id.0 == [0; 16]
    );
    if fits {
        image.write_all_at(&header.id.0, at).unwrap();
        assert!(check_memory(header, &image).is_ok());
        image.set_len(header.memory.len + 1).unwrap();
    }
    assert!(check_memory(header, &image).is_err());
}

fn memory_file(content: &[u8]) -> File {
    let file = File::from(memfd_create("mayfly-fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}
