//! The bytes the probe writes and the sum it prints: the same in the guest and on the host.
//!
//! Pure arithmetic, no memory of its own.

/// One 64-bit word of the pattern for `seed`; `index` counts words from the start of the disk.
pub fn word(seed: u64, index: u64) -> u64 {
    let mut x = seed
        .wrapping_mul(0xd6e8_feb8_6659_fd93)
        .wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Fills `bytes`, which begin at 512-byte sector `sector` of the disk.
pub fn fill(seed: u64, sector: u64, bytes: &mut [u8]) {
    for (i, chunk) in bytes.chunks_mut(8).enumerate() {
        let value = word(seed, sector.wrapping_mul(64).wrapping_add(i as u64)).to_le_bytes();
        chunk.copy_from_slice(&value[..chunk.len()]);
    }
}

/// The first byte that is not the pattern's, as an offset into `bytes`.
pub fn first_difference(seed: u64, sector: u64, bytes: &[u8]) -> Option<usize> {
    bytes.chunks(8).enumerate().find_map(|(i, chunk)| {
        let value = word(seed, sector.wrapping_mul(64).wrapping_add(i as u64)).to_le_bytes();
        let wrong = chunk.iter().zip(value).position(|(a, b)| *a != b)?;
        Some(i * 8 + wrong)
    })
}

/// The greatest number of sectors of one write of an epoch.
pub const EPOCH_SECTORS: u64 = 64;

/// Sector and number of sectors of a write of `blkepochs`, on a disk of `sectors`.
pub fn epoch_place(seed: u64, epoch: u64, write: u64, sectors: u64) -> (u64, u64) {
    let number = word(epoch_seed(seed, epoch), write);
    let count = (1 + (number >> 48) % EPOCH_SECTORS).min(sectors);
    ((number & 0xffff_ffff) % (sectors - count + 1), count)
}

/// The seed of what an epoch writes.
pub fn epoch_seed(seed: u64, epoch: u64) -> u64 {
    word(seed, epoch)
}

/// Where a sum starts.
pub const SUM_START: u64 = 0xcbf2_9ce4_8422_2325;

/// Carries the sum `sum` (FNV-1a, 64 bits) on over `bytes`.
pub fn sum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_difference_when_filled_then_none() {
        let mut bytes = [0u8; 1024];
        fill(7, 3, &mut bytes);
        assert_eq!(first_difference(7, 3, &bytes), None);
        bytes[600] ^= 1;
        assert_eq!(first_difference(7, 3, &bytes), Some(600));
        assert_eq!(first_difference(8, 3, &bytes[..512]), Some(0));
    }

    #[test]
    fn fill_when_in_pieces_then_the_same_bytes() {
        let mut whole = [0u8; 1024];
        let mut halves = [0u8; 1024];
        fill(1, 10, &mut whole);
        fill(1, 10, &mut halves[..512]);
        fill(1, 11, &mut halves[512..]);
        assert_eq!(whole, halves);
    }

    #[test]
    fn sum_when_known_input_then_known_value() {
        assert_eq!(sum(SUM_START, b"foobar"), 0x8594_4171_f739_67e8);
    }
}
