//! Whether a disk is one that the probe's word `blkepochs` can have left.
//!
//! Host code only: the guest does the writing, with the same [`pattern`](crate::pattern).

use crate::pattern::{self, SUM_START};

const SECTOR: usize = 512;
/// Epochs that the guest may have begun or even flushed when the host had not yet read that it did.
const AHEAD: u64 = 256;

/// What was found on a disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Sectors with what the last flushed epoch that wrote them wrote.
    pub flushed: u64,
    /// Sectors with what a later epoch wrote, which nothing promised and nothing forbids.
    pub later: u64,
    /// Sectors that no epoch wrote, as they were.
    pub as_before: u64,
}

/// Compares `disk` with what `blkepochs:N:SEED:WRITES:DEPTH` writes to a disk that held `before`, when the guest had said
/// that epoch `flushed` (0: none) was flushed. An error names the first sector that holds what it cannot hold.
pub fn check(
    disk: &[u8],
    before: &[u8],
    (seed, writes): (u64, u64),
    flushed: u64,
) -> Result<Found, String> {
    let sectors = (disk.len() / SECTOR) as u64;
    let mut last = vec![0_u64; sectors as usize];
    let mut later: Vec<Vec<u64>> = vec![Vec::new(); sectors as usize];
    for epoch in 1..=flushed + AHEAD {
        for write in 0..writes {
            let (sector, count) = pattern::epoch_place(seed, epoch, write, sectors);
            for sector in sector as usize..(sector + count) as usize {
                if epoch <= flushed {
                    last[sector] = epoch;
                } else if later[sector].last() != Some(&epoch) {
                    later[sector].push(epoch);
                }
            }
        }
    }
    let mut found = Found::default();
    for (sector, bytes) in disk.chunks_exact(SECTOR).enumerate() {
        let is_of = |epoch: u64| {
            let seed = pattern::epoch_seed(seed, epoch);
            pattern::first_difference(seed, sector as u64, bytes).is_none()
        };
        let at = sector * SECTOR;
        if last[sector] > 0 && is_of(last[sector]) {
            found.flushed += 1;
        } else if last[sector] == 0 && before.get(at..at + SECTOR) == Some(bytes) {
            found.as_before += 1;
        } else if later[sector].iter().any(|epoch| is_of(*epoch)) {
            found.later += 1;
        } else {
            let stale = (1..last[sector]).rev().find(|epoch| is_of(*epoch));
            return Err(format!(
                "sector {sector} (sum {:x}) holds {}, but epoch {} was flushed and wrote it last in epoch {}",
                pattern::sum(SUM_START, bytes),
                match stale {
                    Some(epoch) => format!("what epoch {epoch} wrote"),
                    None => "nothing that was ever written there".to_owned(),
                },
                flushed,
                last[sector],
            ));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 512;
    const WRITES: u64 = 5;

    /// A disk after all of the epochs up to one, and the first writes of the next.
    fn written(epochs: u64, writes_of_next: u64) -> Vec<u8> {
        let mut disk = vec![0; SECTORS as usize * SECTOR];
        for epoch in 1..=epochs + 1 {
            let writes = if epoch <= epochs {
                WRITES
            } else {
                writes_of_next
            };
            for write in 0..writes {
                let (sector, count) = pattern::epoch_place(7, epoch, write, SECTORS);
                let at = sector as usize * SECTOR;
                let bytes = &mut disk[at..at + count as usize * SECTOR];
                pattern::fill(pattern::epoch_seed(7, epoch), sector, bytes);
            }
        }
        disk
    }

    #[test]
    fn disk_when_all_flushed_epochs_are_there_is_right() {
        let before = vec![0; SECTORS as usize * SECTOR];
        let found = check(&written(20, 2), &before, (7, WRITES), 20).unwrap();
        assert!(found.flushed > 0 && found.later > 0, "{found:?}");
        // A guest that was ahead of what it was seen to say.
        check(&written(23, 0), &before, (7, WRITES), 20).unwrap();
    }

    #[test]
    fn disk_when_a_flushed_write_is_lost_or_torn_is_told() {
        let before = vec![0; SECTORS as usize * SECTOR];
        let mut disk = written(20, 0);
        assert!(check(&disk, &before, (7, WRITES), 20).is_ok());
        let error = check(&written(19, 0), &before, (7, WRITES), 20).unwrap_err();
        assert!(error.contains("but epoch 20 was flushed"), "{error}");
        let (sector, _) = pattern::epoch_place(7, 20, 0, SECTORS);
        disk[sector as usize * SECTOR + 100] ^= 1;
        let error = check(&disk, &before, (7, WRITES), 20).unwrap_err();
        assert!(error.contains("nothing that was ever written"), "{error}");
    }
}
