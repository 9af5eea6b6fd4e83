//! Which pages have changed since the last snapshot: KVM's dirty log, which has what vCPUs wrote,
//! joined with our own, which has what the monitor wrote.
//!
//! Asked by control while the guest is paused and its devices are quiescent. Asking starts both logs
//! afresh; what was told is put back when the snapshot fails.

use kvm_ioctls::VmFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::page_set::PageSet;
use super::{Memory, MemoryError, PAGE};

impl Memory {
    /// The pages of its image that have changed since the last call, or since it was made. For
    /// memory with a log of writes, registered with `vm` as tracked.
    ///
    /// # Errors
    /// [`MemoryError::DirtyLog`] when KVM does not tell; nothing is lost then.
    pub fn take_changed(&self, vm: &VmFd) -> Result<PageSet, MemoryError> {
        let mut changed = PageSet::new(self.pages_in_all());
        let mut first: u64 = 0;
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            // Regions are whole MiB: each begins with a word of its own.
            changed.insert_words(first, region.bitmap().take());
            match vm.get_dirty_log(slot, region.size()) {
                Ok(words) => changed.insert_words(first, words),
                Err(cause) => {
                    self.put_back(&changed);
                    return Err(MemoryError::DirtyLog(cause));
                }
            }
            first = first.saturating_add(region.len() / PAGE);
        }
        Ok(changed)
    }

    /// Has the next [`Memory::take_changed`] tell of these pages again.
    pub fn put_back(&self, changed: &PageSet) {
        let mut regions = self.ram.iter();
        let mut region = regions.next();
        let mut first: u64 = 0;
        for run in changed.runs() {
            let mut start = run.start;
            while let Some(here) = region.filter(|_| start < run.end) {
                let end = first.saturating_add(here.len() / PAGE);
                let stop = run.end.min(end);
                let bytes = |pages: u64| pages.saturating_mul(PAGE) as usize;
                here.bitmap().mark_dirty(
                    bytes(start.saturating_sub(first)),
                    bytes(stop.saturating_sub(start)),
                );
                start = start.max(stop);
                if start == end {
                    first = end;
                    region = regions.next();
                }
            }
        }
    }

    /// Forgets what the monitor has written so far.
    pub fn forget_writes(&self) {
        for region in self.ram.iter() {
            region.bitmap().take().for_each(drop);
        }
    }

    fn pages_in_all(&self) -> u64 {
        self.size_mib.saturating_mul(super::MIB) / PAGE
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use kvm_ioctls::{Kvm, VcpuExit};

    use super::super::testing::vcpu_in_real_mode;
    use super::*;
    use crate::memory::{Backing, HIGH_RAM, MIB, Pages};
    use crate::needs;

    fn tracked(mib: u64) -> Memory {
        Memory::new(mib, Pages::Ordinary, Backing::Anonymous, true).unwrap()
    }

    fn runs(set: &PageSet) -> Vec<Range<u64>> {
        set.runs().collect()
    }

    fn only(run: Range<u64>) -> Vec<Range<u64>> {
        Vec::from([run])
    }

    fn vm_with(memory: &Memory) -> VmFd {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        memory.register(&vm, true).unwrap();
        vm
    }

    /// Runs `mov [0x7000], al; mov [0x20000 + 0x10], al; hlt` in real mode.
    fn run_writes(memory: &Memory, vm: &VmFd) {
        const CODE: [u8; 9] = [0xa2, 0, 0x70, 0x26, 0xa2, 0x10, 0, 0xf4, 0xf4];
        memory.write(0x1000, &CODE).unwrap();
        let mut vcpu = vcpu_in_real_mode(vm);
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.es.base, sregs.es.selector) = (0x20000, 0x2000);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        regs.rax = 0x5a;
        vcpu.set_regs(&regs).unwrap();
        match vcpu.run().unwrap() {
            VcpuExit::Hlt => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn take_changed_when_guest_and_monitor_write_tells_of_both_once() {
        needs!(kvm);
        let memory = tracked(3076);
        let vm = vm_with(&memory);
        assert_eq!(runs(&memory.take_changed(&vm).unwrap()), []);
        run_writes(&memory, &vm);
        memory.write(HIGH_RAM + MIB - 1, &[1, 2]).unwrap();
        memory.write(3072 * MIB - 1, &[1]).unwrap();
        let last_low = 3072 * MIB / PAGE - 1;
        let high = 3073 * MIB / PAGE;
        let wanted = [
            1..2,
            7..8,
            32..33,
            last_low..last_low + 1,
            high - 1..high + 1,
        ];
        let changed = memory.take_changed(&vm).unwrap();
        assert_eq!(runs(&changed), wanted);
        assert_eq!(runs(&memory.take_changed(&vm).unwrap()), []);
        memory.put_back(&changed);
        memory.write(0, &[1]).unwrap();
        let again = memory.take_changed(&vm).unwrap();
        assert_eq!(again.count(), changed.count() + 1);
        assert!(changed.runs().flatten().all(|page| again.contains(page)));
    }

    #[test]
    fn put_back_when_a_run_crosses_regions_marks_both() {
        needs!(kvm);
        let memory = tracked(3073);
        let vm = vm_with(&memory);
        let mut all = PageSet::new(3073 * MIB / PAGE);
        let border = 3072 * MIB / PAGE;
        for run in [5..6, border - 2..border + 2, border + 5..border + 256] {
            all.insert(run);
        }
        memory.put_back(&all);
        assert_eq!(memory.take_changed(&vm).unwrap(), all);
    }

    #[test]
    fn take_changed_when_kvm_refuses_loses_nothing() {
        needs!(kvm);
        let memory = tracked(4);
        let untracked = Kvm::new().unwrap().create_vm().unwrap();
        memory.register(&untracked, false).unwrap();
        memory.write(5 * PAGE, &[1]).unwrap();
        assert!(memory.take_changed(&untracked).is_err());
        let vm = vm_with(&memory);
        assert_eq!(runs(&memory.take_changed(&vm).unwrap()), only(5..6));
    }

    #[test]
    fn take_changed_when_restored_tells_of_what_came_after() {
        needs!(kvm);
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        let stamp = crate::memory::image::Stamp {
            offset: 0x9_f000,
            id: [1; 16],
        };
        let first = tracked(16);
        first.write(MIB, &[7; 4096]).unwrap();
        let contents = first.contents(None);
        contents.write_full(file.as_file(), &stamp).unwrap();
        let source =
            std::sync::Arc::new(crate::memory::Source::new(file.as_file(), "image").unwrap());
        for pages in [Pages::Ordinary, Pages::TwoMib] {
            let Ok(memory) = Memory::from_image(&source, 16, pages, true) else {
                assert_eq!(pages, Pages::TwoMib);
                eprintln!("no huge pages here");
                continue;
            };
            let vm = vm_with(&memory);
            run_writes(&memory, &vm);
            let changed = memory.take_changed(&vm).unwrap();
            assert_eq!(runs(&changed), [1..2, 7..8, 32..33], "{pages:?}");
        }
    }

    #[test]
    fn take_changed_when_a_kernel_is_mapped_tells_of_all_of_it() {
        needs!(kvm);
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        file.as_file().set_len(64 * PAGE).unwrap();
        let source = crate::memory::Source::new(file.as_file(), "kernel").unwrap();
        let mut memory = tracked(4);
        memory.map_file(&source, 0, MIB, 64 * PAGE).unwrap();
        let vm = vm_with(&memory);
        assert_eq!(runs(&memory.take_changed(&vm).unwrap()), only(256..320));
    }
}
