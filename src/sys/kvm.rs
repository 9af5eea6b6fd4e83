//! Where kvm-ioctls gives no safe access: a /dev/kvm that was handed in, and the page KVM shares
//! with a vCPU's thread.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

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

/// A vCPU on the thread that runs it. Dereferences to its descriptor.
#[derive(Debug)]
pub struct Runner {
    // Borrowed for ever and lent to nobody: it can be neither closed nor exchanged, and so its
    // page stays mapped.
    vcpu: &'static mut VcpuFd,
    page: RunPage,
}

/// What is needed of the page that KVM shares with a vCPU's thread, beside what `VcpuFd::run`
/// returns.
#[derive(Clone, Copy, Debug)]
pub struct RunPage {
    immediate_exit: &'static AtomicU8,
    port_unit: &'static AtomicU8,
    suberror: &'static AtomicU32,
}

impl Runner {
    /// A runner of `vcpu`, which is never closed from here on.
    pub fn new(vcpu: &'static mut VcpuFd) -> Self {
        let page = ptr::from_mut(vcpu.get_kvm_run());
        // SAFETY: the fields lie in the page at their natural alignment, and any bytes are valid
        // numbers. It is mapped as long as the vCPU is open, which `Runner` keeps so for ever. Only
        // the thread that owns it, a signal handler on it, and the kernel in its calls use them.
        let page = unsafe {
            let exit = &raw mut (*page).__bindgen_anon_1;
            RunPage {
                immediate_exit: AtomicU8::from_ptr(&raw mut (*page).immediate_exit),
                port_unit: AtomicU8::from_ptr(&raw mut (*exit).io.size),
                suberror: AtomicU32::from_ptr(&raw mut (*exit).internal.suberror),
            }
        };
        Runner { vcpu, page }
    }

    /// Lets the guest run until its next exit.
    ///
    /// # Errors
    /// KVM's, EINTR included.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.vcpu.run()
    }

    /// KVM's number for the last exit.
    pub fn exit_reason(&mut self) -> u32 {
        self.vcpu.get_kvm_run().exit_reason
    }

    /// The page shared with KVM.
    pub fn page(&self) -> RunPage {
        self.page
    }
}

impl Deref for Runner {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        self.vcpu
    }
}

impl RunPage {
    /// Bytes of one unit of the port access that KVM_RUN just returned for: 1, 2 or 4. A string
    /// instruction delivers many units at once.
    pub fn port_unit(self) -> usize {
        usize::from(self.port_unit.load(Ordering::Relaxed)).max(1)
    }

    /// KVM's number for what went wrong, after KVM_EXIT_INTERNAL_ERROR.
    pub fn internal_suberror(self) -> u32 {
        self.suberror.load(Ordering::Relaxed)
    }

    /// Lets the next KVM_RUN run, whatever kicks there were before.
    pub fn forget_kicks(self) {
        self.immediate_exit.store(0, Ordering::Relaxed);
    }

    /// The flag that makes the next KVM_RUN return at once.
    pub(super) fn immediate_exit(self) -> &'static AtomicU8 {
        self.immediate_exit
    }
}

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
