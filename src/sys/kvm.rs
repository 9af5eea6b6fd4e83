//! The page KVM shares with a vCPU's thread, where kvm-ioctls gives no safe access.

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// An access of the guest's to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `in`
    PortRead,
    /// `out`
    PortWrite,
    /// A load from a register in memory.
    MemoryRead,
    /// A store to one.
    MemoryWrite,
    /// The last exit was for something else.
    None,
}

/// One vCPU's `kvm_run` page.
///
/// Two of its fields are needed beside what `VcpuFd::run` returns: the size of one unit of a port
/// access (a string instruction delivers many units at once), and the flag that makes the next
/// KVM_RUN return at once.
#[derive(Debug)]
pub struct RunPage {
    page: *mut kvm_run,
}

impl RunPage {
    /// The page of `vcpu`. The caller keeps `vcpu` at least as long: see [`Vcpu`](crate::vcpu),
    /// which owns both.
    pub(crate) fn of(vcpu: &mut VcpuFd) -> Self {
        RunPage {
            page: std::ptr::from_mut(vcpu.get_kvm_run()),
        }
    }

    /// Bytes of one unit of the port access that KVM_RUN just returned for: 1, 2 or 4.
    pub fn port_unit(&self) -> usize {
        // SAFETY: the page stays mapped while the vCPU is open; any bytes are a valid `u8`, so
        // reading the union's `io` member is sound even after another kind of exit.
        let size = unsafe { (*self.page).__bindgen_anon_1.io.size };
        usize::from(size).max(1)
    }

    /// KVM's number for what went wrong, after KVM_EXIT_INTERNAL_ERROR.
    pub fn internal_suberror(&self) -> u32 {
        // SAFETY: as for `port_unit`: any bytes are a valid `u32`.
        unsafe { (*self.page).__bindgen_anon_1.internal.suberror }
    }

    /// KVM's number for the last exit.
    pub fn exit_reason(&self) -> u32 {
        // SAFETY: the page stays mapped while the vCPU is open; any bytes are a valid `u32`.
        unsafe { (*self.page).exit_reason }
    }

    /// What the guest did that KVM_RUN just returned for.
    pub fn access(&self) -> Access {
        match self.exit_reason() {
            kvm_bindings::KVM_EXIT_IO => {
                // SAFETY: as for `port_unit`.
                let direction = unsafe { (*self.page).__bindgen_anon_1.io.direction };
                match u32::from(direction) {
                    kvm_bindings::KVM_EXIT_IO_OUT => Access::PortWrite,
                    _ => Access::PortRead,
                }
            }
            kvm_bindings::KVM_EXIT_MMIO => {
                // SAFETY: as for `port_unit`.
                match unsafe { (*self.page).__bindgen_anon_1.mmio.is_write } {
                    0 => Access::MemoryRead,
                    _ => Access::MemoryWrite,
                }
            }
            _ => Access::None,
        }
    }

    /// Makes the next KVM_RUN return at once, or lets it run.
    pub fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the page stays mapped while the vCPU is open; the kernel reads the byte whole.
        unsafe { std::ptr::addr_of_mut!((*self.page).immediate_exit).write_volatile(u8::from(on)) }
    }

    /// The address of the flag, for the signal handler of this thread.
    pub(super) fn immediate_exit_flag(&self) -> *mut u8 {
        // SAFETY: computes an address inside the mapped page; nothing is read.
        unsafe { std::ptr::addr_of_mut!((*self.page).immediate_exit) }
    }
}

// SAFETY: the page belongs to the vCPU that is sent along with it, and is used by the thread that
// owns that vCPU alone.
unsafe impl Send for RunPage {}
