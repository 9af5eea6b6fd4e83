//! The check value of a memory image: whether its content is what was written.
//!
//! A sum over pages, so that it depends neither on their order nor on which of them are holes, and
//! can be kept up when a diff is merged: what a page was is taken off, what it is comes on. In a full
//! image pages of zeros do not count; in a diff they do, since there they say that a page has become
//! zero. It finds damage; against intent it is no protection.

/// Bytes in a page of an image.
pub const PAGE: usize = 4096;

const LANES: usize = 8;
const WORD: usize = size_of::<u64>();

// Odd numbers whose bits are spread: the fractions of the golden ratio and of the roots
// of primes.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX: u64 = 0xbf58_476d_1ce4_e5b9;
const SEEDS: [u64; LANES] = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

/// What page `number` of the content `bytes` adds to the check value.
///
/// Eight sums side by side, each of whose steps can be undone: two pages that differ in one word
/// never have the same value.
pub fn of_page(number: u64, bytes: &[u8; PAGE]) -> u64 {
    let seed = spread(number);
    let mut lanes = SEEDS.map(|lane| lane ^ seed);
    for words in bytes.as_chunks::<{ LANES * WORD }>().0 {
        let (words, _) = words.as_chunks::<WORD>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            let product = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(STEP);
            *lane = product ^ (product >> 31);
        }
    }
    let all = |sum: u64, lane: u64| spread(sum.wrapping_mul(STEP) ^ lane);
    lanes.into_iter().fold(number, all)
}

/// Whether there are only zeros in a page.
pub fn is_zero(bytes: &[u8; PAGE]) -> bool {
    // A word at a time, and as many at once as the host's registers hold.
    let (blocks, _) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<WORD>();
        let any = |any, word: &[u8; WORD]| any | u64::from_le_bytes(*word);
        words.iter().fold(0, any) == 0
    })
}

/// Each bit of `value` changes about half of the result's; no two values give the same.
fn spread(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(MIX);
    let value = (value ^ (value >> 27)).wrapping_mul(STEP);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn of_page_when_any_bit_or_the_place_differs_is_another() {
        let mut page = [0; PAGE];
        let mut seen = HashSet::from([of_page(0, &page)]);
        for number in 1..5000 {
            assert!(seen.insert(of_page(number, &page)), "{number}");
        }
        for at in 0..PAGE {
            for bit in 0..8 {
                page[at] ^= 1 << bit;
                assert!(seen.insert(of_page(7, &page)), "{at} {bit}");
                page[at] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn of_page_when_words_change_places_is_another() {
        let with_word_at = |at: usize| {
            let mut page = [0; PAGE];
            page[at..at + 8].fill(1);
            of_page(0, &page)
        };
        let mut seen = HashSet::new();
        for at in (0..PAGE).step_by(8) {
            assert!(seen.insert(with_word_at(at)), "{at}");
        }
    }

    /// Images are kept for years: what was written is checked by what is built today.
    #[test]
    fn of_page_when_computed_again_is_what_it_always_was() {
        let page = std::array::from_fn(|i| (i * 7 + (i >> 8)) as u8);
        assert_eq!(of_page(0, &[0; PAGE]), 0x5455768d535a1f17);
        assert_eq!(of_page(12345, &page), 0x1aba3680ad6f77f2);
    }

    #[test]
    fn is_zero_when_one_byte_is_set_says_no() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for at in 0..PAGE {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
