//! The segments a guest starts with: once as KVM's registers, once as descriptors in memory.
//!
//! Both protocols want flat code and data segments under the selectors `__BOOT_CS` and
//! `__BOOT_DS` (Linux boot protocol, "64-bit boot protocol"), PVH also a 32-bit task segment of
//! 0x67 bytes (Xen, `docs/misc/pvh.pandoc`, "Initial machine state").

use kvm_bindings::kvm_segment;

/// `__BOOT_CS`.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS`.
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Code, execute and read, accessed (Intel SDM volume 3, table 3-1).
const TYPE_CODE: u8 = 0xb;
/// Data, read and write, accessed.
const TYPE_DATA: u8 = 0x3;
/// Busy task state segment (Intel SDM volume 3, table 3-2).
const TYPE_TASK: u8 = 0xb;

/// Bytes of the descriptor table: null, unused, code, data, task.
pub const TABLE_SIZE: u16 = 5 * 8;

/// The segments of a guest that starts in 64-bit (`long`) or 32-bit mode.
pub struct Segments {
    /// For CS.
    pub code: kvm_segment,
    /// For DS, ES, FS, GS and SS.
    pub data: kvm_segment,
    /// For TR.
    pub task: kvm_segment,
}

impl Segments {
    /// Flat segments over 4 GiB (32-bit) or everything (64-bit).
    pub const fn flat(long: bool) -> Segments {
        Segments {
            code: segment(CODE_SELECTOR, TYPE_CODE, long, !long),
            data: segment(DATA_SELECTOR, TYPE_DATA, false, true),
            task: kvm_segment {
                limit: 0x67,
                s: 0,
                g: 0,
                ..segment(TASK_SELECTOR, TYPE_TASK, false, false)
            },
        }
    }

    /// The descriptor table as it lies in memory.
    pub fn table(&self) -> Vec<u8> {
        [
            0,
            0,
            descriptor(&self.code),
            descriptor(&self.data),
            descriptor(&self.task),
        ]
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
    }
}

const fn segment(selector: u16, type_: u8, long: bool, bits_32: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: bits_32 as u8,
        s: 1,
        l: long as u8,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// A segment as eight bytes of a descriptor table (Intel SDM volume 3, figure 3-8). The base is
/// 0 throughout.
fn descriptor(segment: &kvm_segment) -> u64 {
    // With granularity set, the field counts pages.
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access =
        u64::from(segment.type_ | (segment.s << 4) | (segment.dpl << 5) | (segment.present << 7));
    let flags = u64::from(segment.avl | (segment.l << 1) | (segment.db << 2) | (segment.g << 3));
    (limit & 0xffff) | (access << 40) | (((limit >> 16) & 0xf) << 48) | (flags << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_when_written_out_is_the_linux_kernels_own() {
        let table = |long| -> Vec<u64> {
            Segments::flat(long)
                .table()
                .chunks(8)
                .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
                .collect()
        };
        // The values of arch/x86/boot/pm.c and compressed/head_64.S.
        assert_eq!(
            table(false),
            [
                0,
                0,
                0x00cf_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
        assert_eq!(
            table(true),
            [
                0,
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
        assert_eq!(Segments::flat(true).table().len(), usize::from(TABLE_SIZE));
    }
}
