//! What tests of guest memory share.

use kvm_ioctls::{VcpuFd, VmFd};

/// The first vCPU of `vm`, in real mode before guest address 0x1000.
pub fn vcpu_in_real_mode(vm: &VmFd) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).unwrap();
    vcpu
}
