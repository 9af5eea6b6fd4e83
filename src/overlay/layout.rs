//! Where what is in the file of an overlay.

/// Bytes of a unit: the granularity of the map.
pub const UNIT: u64 = 4096;

/// The largest disk that may have an overlay: its map takes 128 MiB if all of it is used.
pub const SIZE_MAX: u64 = 2 << 40;

/// Bytes of a sector of the map, which reaches the file whole or not at all.
pub(super) const SECTOR: usize = 512;
/// The same in words of 64 bits.
pub(super) const SECTOR_WORDS: usize = 64;
/// Words at the beginning of a sector that are no states: generation and check value.
pub(super) const HEAD_WORDS: usize = 2;
/// Units whose states one word holds.
pub(super) const WORD_UNITS: u64 = 32;
/// Units whose states one sector holds.
pub(super) const SECTOR_UNITS: u64 = 62 * WORD_UNITS;
const _: () = assert!(HEAD_WORDS + 62 == SECTOR_WORDS && SECTOR_WORDS * 8 == SECTOR);

/// Where the map begins.
pub(super) const MAP_AT: u64 = 4096;
/// What data regions begin at a multiple of.
const REGION_STEP: u64 = 1 << 20;

/// The places in the file of an overlay for a disk of some size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of the disk.
    pub size: u64,
    /// Units of the disk; the last may be a part of one.
    pub units: u64,
    /// Sectors of the map.
    pub sectors: u64,
    /// Where the first data region begins.
    pub data_at: u64,
    /// Bytes of a data region.
    pub region: u64,
    /// Bytes of the file.
    pub total: u64,
}

impl Layout {
    /// For a disk of `size` bytes; none if that is too large.
    pub fn new(size: u64) -> Option<Self> {
        if size > SIZE_MAX {
            return None;
        }
        let units = size.div_ceil(UNIT);
        let sectors = units.div_ceil(SECTOR_UNITS);
        let map_end = sectors.checked_mul(SECTOR as u64)?.checked_add(MAP_AT)?;
        let data_at = map_end.checked_next_multiple_of(REGION_STEP)?;
        let region = size.checked_next_multiple_of(REGION_STEP)?;
        let total = region.checked_mul(2)?.checked_add(data_at)?;
        Some(Layout {
            size,
            units,
            sectors,
            data_at,
            region,
            total,
        })
    }

    /// Where the data region of `generation` begins.
    pub fn region_at(&self, generation: u64) -> u64 {
        match generation & 1 {
            0 => self.data_at,
            _ => self.data_at.saturating_add(self.region),
        }
    }

    /// Where sector `index` of the map is.
    pub fn sector_at(index: u64) -> u64 {
        index.saturating_mul(SECTOR as u64).saturating_add(MAP_AT)
    }

    /// Bytes of `unit`: less than [`UNIT`] for the last of a disk of an odd size.
    pub fn unit_len(&self, unit: u64) -> u64 {
        self.size
            .saturating_sub(unit.saturating_mul(UNIT))
            .min(UNIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_when_the_disk_has_any_size_has_room_for_all_of_it() {
        for size in [
            0,
            512,
            4096,
            4608,
            1984 * 4096,
            1984 * 4096 + 512,
            1 << 30,
            SIZE_MAX,
        ] {
            let layout = Layout::new(size).unwrap();
            assert!(
                layout.units * UNIT >= size && layout.units * UNIT < size + UNIT,
                "{size}"
            );
            assert!(layout.sectors * SECTOR_UNITS >= layout.units, "{size}");
            assert!(
                Layout::sector_at(layout.sectors) <= layout.data_at,
                "{size}"
            );
            assert!(layout.region >= size, "{size}");
            assert_eq!(layout.region_at(2), layout.data_at);
            assert_eq!(layout.region_at(3), layout.data_at + layout.region);
            assert_eq!(layout.total, layout.region_at(1) + layout.region);
        }
        assert_eq!(Layout::new(SIZE_MAX + 1), None);
        assert_eq!(Layout::new(u64::MAX), None);
        assert_eq!(Layout::new(4608).unwrap().unit_len(1), 512);
        assert_eq!(Layout::new(4608).unwrap().unit_len(0), 4096);
        assert_eq!(Layout::new(4608).unwrap().unit_len(2), 0);
    }
}
