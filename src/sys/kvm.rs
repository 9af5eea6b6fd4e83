//! Where kvm-ioctls gives no safe access: a /dev/kvm that was handed in, and the page KVM shares
//! with a vCPU's thread.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use kvm_bindings::{KVM_API_VERSION, kvm_run};
use kvm_ioctls::{Kvm, VcpuFd};

/// Takes `fd` for /dev/kvm, if it is: `None` when it is something else.
pub fn adopt(fd: OwnedFd) -> Option<Kvm> {
    let file = File::from(fd);
    // The question that follows is put to devices only: no other file can have an opinion on it.
    let kind = file.metadata().ok()?.file_type();
    if !kind.is_char_device() {
        return None;
    }
    let fd = OwnedFd::from(file).into_raw_fd();
    // SAFETY: `fd` is open and was ours until now.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    (u32::try_from(kvm.get_api_version()) == Ok(KVM_API_VERSION)).then_some(kvm)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adopt_when_it_is_not_kvm_is_none() {
        for path in ["/dev/null", "/dev/zero", "/", "/proc/self/exe"] {
            assert!(adopt(File::open(path).unwrap().into()).is_none(), "{path}");
        }
        let (reader, _) = super::super::fd::pipe().unwrap();
        assert!(adopt(reader.into()).is_none());
        if let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") {
            assert!(adopt(kvm.into()).is_some());
        }
    }
}
