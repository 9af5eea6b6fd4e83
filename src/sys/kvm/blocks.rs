//! Blocks of a vCPU's and a virtual machine's state that kvm-ioctls gives no safe access to: XSAVE,
//! whose length is the host's to say, and the kernel's interrupt chips, which are unions. They are
//! read and written whole; what is in them, [`crate::arch`] knows.

use std::io;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_STATE_NESTED_FORMAT_VMX,
    Xsave, kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

/// Bytes that the XSAVE state of a vCPU of `vm` has at most. Hosts older than Linux 5.17 do not say:
/// there it is the block that KVM had until then.
pub fn xsave_len(vm: &VmFd) -> usize {
    let told = vm.check_extension_int(Cap::Xsave2);
    usize::try_from(told)
        .unwrap_or(0)
        .max(size_of::<kvm_xsave>())
}

/// An XSAVE block of zeros that KVM can fill, or read, for any vCPU of this process.
fn block(vm: &VmFd) -> io::Result<Xsave> {
    let more = xsave_len(vm).saturating_sub(size_of::<kvm_xsave>());
    let block = Xsave::new(more.div_ceil(size_of::<u32>()));
    block.map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}

/// The FPU and vector registers of `vcpu`, one of `vm`, as the XSAVE instruction lays them out.
///
/// # Errors
/// KVM's.
pub fn xsave(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
    if vm.check_extension_int(Cap::Xsave2) <= 0 {
        let block = vcpu.get_xsave()?;
        return Ok(bytes(&block.region, &[]));
    }
    let mut block = block(vm)?;
    // SAFETY: KVM writes as many bytes as the guests of this process may need, which `xsave_len` has
    // asked it for. The number grows only when the process asks for more features for its guests
    // (arch_prctl), and nothing in it does.
    unsafe { vcpu.get_xsave2(&mut block) }?;
    Ok(bytes(
        &block.as_fam_struct_ref().xsave.region,
        block.as_slice(),
    ))
}

fn bytes(region: &[u32], extra: &[u32]) -> Vec<u8> {
    let words = region.iter().chain(extra);
    words.flat_map(|word| word.to_le_bytes()).collect()
}

/// Sets the FPU and vector registers of `vcpu`, one of `vm`; what `state` does not reach is 0. KVM
/// checks what is in it.
///
/// # Errors
/// KVM's, and EINVAL when `state` is longer than the host's or not of whole words.
pub fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, state: &[u8]) -> io::Result<()> {
    let (words, rest) = state.as_chunks::<4>();
    if state.len() > xsave_len(vm) || !rest.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut block = block(vm)?;
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    // SAFETY: only words are changed, not the length that the block was made with.
    let region = unsafe { &mut block.as_mut_fam_struct().xsave.region };
    for (to, from) in region.iter_mut().zip(&mut words) {
        *to = from;
    }
    for (to, from) in block.as_mut_slice().iter_mut().zip(&mut words) {
        *to = from;
    }
    // SAFETY: KVM reads as many bytes as it has told `xsave_len`, and the block is as long: see
    // `xsave`.
    unsafe { vcpu.set_xsave2(&block) }?;
    Ok(())
}

/// Whether the guest of `vcpu` has turned virtualization on and runs, or may run, guests of its own.
///
/// # Errors
/// KVM's.
pub fn runs_guests(vcpu: &VcpuFd) -> io::Result<bool> {
    /// An address that is none: VMX is off.
    const NONE: u64 = u64::MAX;
    let mut state = KvmNestedStateBuffer::empty();
    if vcpu.nested_state(&mut state)?.is_some() {
        return Ok(true);
    }
    if u32::from(state.format) != KVM_STATE_NESTED_FORMAT_VMX {
        return Ok(false);
    }
    // SAFETY: KVM has written this part of the union, as the format says, and it is plain bytes.
    let vmx = unsafe { state.hdr.vmx };
    Ok(vmx.vmxon_pa != NONE)
}

/// One of the two 8259s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pic {
    /// The one with lines 0 to 7.
    Master,
    /// The one with lines 8 to 15.
    Slave,
}

impl Pic {
    const fn id(self) -> u32 {
        match self {
            Pic::Master => KVM_IRQCHIP_PIC_MASTER,
            Pic::Slave => KVM_IRQCHIP_PIC_SLAVE,
        }
    }
}

fn chip(vm: &VmFd, chip_id: u32) -> io::Result<kvm_irqchip> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..kvm_irqchip::default()
    };
    vm.get_irqchip(&mut chip)?;
    Ok(chip)
}

/// The state of an 8259 of KVM's.
///
/// # Errors
/// KVM's: ENXIO when the chips are not in KVM.
pub fn pic(vm: &VmFd, which: Pic) -> io::Result<kvm_pic_state> {
    let chip = chip(vm, which.id())?;
    // SAFETY: all of the union was written, first by `default` and then by KVM, and it is plain bytes.
    Ok(unsafe { chip.chip.pic })
}

/// Sets it.
///
/// # Errors
/// KVM's.
pub fn set_pic(vm: &VmFd, which: Pic, state: &kvm_pic_state) -> io::Result<()> {
    let mut chip = kvm_irqchip {
        chip_id: which.id(),
        ..kvm_irqchip::default()
    };
    chip.chip.pic = *state;
    Ok(vm.set_irqchip(&chip)?)
}

/// The I/O APIC's registers but for its table, and the entries of that.
pub type IoApic = (kvm_ioapic_state, [u64; 24]);

/// The state of KVM's I/O APIC.
///
/// # Errors
/// As for [`pic`].
pub fn io_apic(vm: &VmFd) -> io::Result<IoApic> {
    let chip = chip(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: as for `pic`.
    let state = unsafe { chip.chip.ioapic };
    // SAFETY: each entry is eight bytes whichever way one looks at them.
    let entries = state.redirtbl.map(|entry| unsafe { entry.bits });
    Ok((state, entries))
}

/// Sets it.
///
/// # Errors
/// KVM's.
pub fn set_io_apic(vm: &VmFd, (mut state, entries): IoApic) -> io::Result<()> {
    for (to, bits) in state.redirtbl.iter_mut().zip(entries) {
        to.bits = bits;
    }
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..kvm_irqchip::default()
    };
    chip.chip.ioapic = state;
    Ok(vm.set_irqchip(&chip)?)
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn xsave_when_longer_than_the_hosts_or_not_of_words_is_refused() {
        let Ok(kvm) = Kvm::new() else { return };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let state = xsave(&vm, &vcpu).unwrap();
        assert_eq!(state.len(), xsave_len(&vm));
        set_xsave(&vm, &vcpu, &state).unwrap();
        // Zeros behind what an older host knew.
        set_xsave(&vm, &vcpu, &state[..1024]).unwrap();
        for len in [3, state.len() - 1, state.len() + 4] {
            let error = set_xsave(&vm, &vcpu, &vec![0; len]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{len}");
        }
    }

    #[test]
    fn guests_when_the_vcpu_has_never_run_are_none() {
        let Ok(kvm) = Kvm::new() else { return };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        if vm.check_extension(Cap::NestedState) {
            assert!(!runs_guests(&vcpu).unwrap());
        } else {
            assert!(runs_guests(&vcpu).is_err());
        }
    }

    #[test]
    fn chips_when_they_are_not_in_kvm_are_an_error() {
        let Ok(kvm) = Kvm::new() else { return };
        let vm = kvm.create_vm().unwrap();
        assert!(pic(&vm, Pic::Master).is_err());
        assert!(io_apic(&vm).is_err());
        vm.create_irq_chip().unwrap();
        let mut state = pic(&vm, Pic::Slave).unwrap();
        state.imr = 0x5a;
        set_pic(&vm, Pic::Slave, &state).unwrap();
        assert_eq!(pic(&vm, Pic::Slave).unwrap(), state);
        let (registers, mut entries) = io_apic(&vm).unwrap();
        // Masked, so that nothing comes of it.
        entries[3] = 1 << 16 | 0x31;
        set_io_apic(&vm, (registers, entries)).unwrap();
        assert_eq!(io_apic(&vm).unwrap().1, entries);
    }
}
