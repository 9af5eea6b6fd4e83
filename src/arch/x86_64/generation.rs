//! The generation ID: 16 random bytes in guest memory that say which of all machines this is. A guest
//! that was restored finds others there, and takes new random numbers, so that no two clones of a
//! snapshot have the same.
//!
//! Called at a restore, by control, before any vCPU runs. What a guest with ACPI finds of it is in
//! [`acpi`](super::acpi); a guest without is not told.

use std::error::Error;
use std::fmt;
use std::io;

use super::acpi::GENERATION_ID_LEN;
use super::layout;
use super::split::Lines;
use crate::memory::{Memory, MemoryError};
use crate::sys::fd;

/// Why a guest has no new ID.
#[derive(Debug)]
pub enum GenerationError {
    /// No random bytes.
    Random(io::Error),
    /// No place for them.
    Memory(MemoryError),
    /// The guest is not notified.
    Notify(io::Error),
}

impl fmt::Display for GenerationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GenerationError::Random(_) => "Making a new generation ID failed",
            GenerationError::Memory(_) => "Writing a new generation ID failed",
            GenerationError::Notify(_) => "Notifying the guest of its generation ID failed",
        })
    }
}

impl Error for GenerationError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            GenerationError::Random(cause) | GenerationError::Notify(cause) => Some(cause),
            GenerationError::Memory(cause) => Some(cause),
        }
    }
}

/// Gives the guest whose memory this is a new ID.
///
/// # Errors
/// When the host has no random numbers, or the memory no place for the ID.
pub fn renew(memory: &Memory) -> Result<(), GenerationError> {
    let mut id = [0; GENERATION_ID_LEN];
    fd::random(&mut id).map_err(GenerationError::Random)?;
    let written = memory.write(layout::GENERATION_ID, &id);
    written.map_err(GenerationError::Memory)
}

/// Notifies the guest of its new ID: it takes notice when it runs. To be called when the interrupt
/// controllers, the local APICs too, are restored.
///
/// # Errors
/// The host's.
pub fn notify(lines: &Lines) -> Result<(), GenerationError> {
    let pulsed = lines.pulse(layout::GENERATION_GSI);
    pulsed.map_err(GenerationError::Notify)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn id_when_renewed_is_another_and_nothing_beside_it_changes() {
        let memory = Memory::anonymous(1).unwrap();
        let page = || {
            let mut page = vec![0; 4096];
            let at = GuestAddress(layout::ACPI);
            memory.ram().read_slice(&mut page, at).unwrap();
            page
        };
        let mut ids = Vec::new();
        for _ in 0..3 {
            renew(&memory).unwrap();
            let page = page();
            let at = (layout::GENERATION_ID - layout::ACPI) as usize;
            let (id, rest) = page[at..].split_at(GENERATION_ID_LEN);
            assert!(!ids.contains(&id.to_vec()));
            ids.push(id.to_vec());
            assert!(page[..at].iter().chain(rest).all(|byte| *byte == 0));
        }
    }
}
