//! Where kvm-ioctls gives no sound access: a /dev/kvm that was passed in, and the page that KVM
//! shares with a vCPU's thread (`struct kvm_run`).
//!
//! Three parties use that page: KVM while KVM_RUN is under way, the vCPU's thread between two
//! calls, and a signal handler on that thread, which sets one byte of it at any moment. So there
//! is one way to it: [`Vcpu`] maps it once more for itself and copies bytes out and in by a raw
//! pointer. No reference to it exists, but to the handler's byte, which is an atomic and which no
//! copy may touch. The mapping that kvm-ioctls makes is another one, and is never used.

pub mod blocks;

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings as kvm;
use kvm_bindings::{KVM_API_VERSION, KVMIO, kvm_run};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::ioctl::ioctl;

mod request {
    vmm_sys_util::ioctl_io_nr!(KVM_RUN, super::KVMIO, 0x80);
}

/// Takes `fd` for /dev/kvm, if it is: `None` when it is something else.
pub fn adopt(fd: OwnedFd) -> Option<Kvm> {
    let file = File::from(fd);
    // Only a device understands the ioctl that follows.
    let kind = file.metadata().ok()?.file_type();
    if !kind.is_char_device() {
        return None;
    }
    let fd = OwnedFd::from(file).into_raw_fd();
    // SAFETY: `fd` is open and was ours until now.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    (u32::try_from(kvm.get_api_version()) == Ok(KVM_API_VERSION)).then_some(kvm)
}

/// Why KVM_RUN returned, as far as this program knows what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `in`: [`Vcpu::answer_port`] gives the guest each unit.
    PortRead(PortAccess),
    /// `out`: [`Vcpu::port_data`] tells each unit.
    PortWrite(PortAccess),
    /// A load from an address without memory: [`Vcpu::answer_memory`] gives the guest its bytes.
    MemoryRead {
        /// Guest physical address.
        address: u64,
        /// Bytes, at most 8.
        len: usize,
    },
    /// A store to one.
    MemoryWrite {
        /// Guest physical address.
        address: u64,
        /// What is stored, in the first `len` bytes.
        data: [u8; 8],
        /// Bytes, at most 8.
        len: usize,
    },
    /// A signal, or the guest takes interrupts again.
    Interrupted,
    /// The guest has served an interrupt of a line that is a level (split interrupt chip).
    EndOfInterrupt,
    /// The processor shut down: a triple fault.
    Shutdown,
    /// The processor refused the guest's state; the hardware's reason.
    FailedEntry(u64),
    /// KVM could not go on: see [`Vcpu::internal_error`].
    InternalError,
    /// Guest memory could not be reached.
    MemoryFault,
    /// The guest asked for a reset or power-off, or told of a crash; KVM's number for which.
    SystemEvent(u32),
    /// Something else; KVM's number.
    Other(u32),
}

/// An access to a port: a string instruction makes many units at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes of a unit: 1, 2 or 4.
    pub unit: usize,
    /// Units.
    pub count: usize,
    /// Where the units are in the page.
    at: usize,
}

/// What KVM tells after [`Exit::InternalError`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InternalError {
    /// KVM's number for what went wrong; 1 is an instruction that it cannot emulate.
    pub suberror: u32,
    /// That instruction and what follows it, as far as KVM tells.
    pub instruction: [u8; INSTRUCTION_MAX],
    /// How many of these bytes are valid.
    pub instruction_len: usize,
}

/// The longest instruction, in bytes.
pub const INSTRUCTION_MAX: usize = 15;

/// A vCPU and the page it shares with KVM. Dereferences to its descriptor.
///
/// It may be sent to another thread and is used by one at a time: it is not `Sync`.
#[derive(Debug)]
pub struct Vcpu {
    fd: Arc<VcpuFd>,
    /// The beginning of the mapping.
    page: NonNull<u8>,
    /// Its length.
    len: usize,
}

// SAFETY: the page is the vCPU's own, reached by nothing but this value, and bound to no thread.
unsafe impl Send for Vcpu {}

/// Whether the host's processor has what hardware KVM needs: VMX or SVM. Without either the host's
/// KVM is software for certain; with one it may still be.
pub fn may_be_hardware() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const EXTENDED: u32 = 0x8000_0000;
    const EXTENDED_FEATURES: u32 = 0x8000_0001;
    let has_vmx = cpuid(1).ecx & VMX != 0;
    let has_extended = cpuid(EXTENDED).eax >= EXTENDED_FEATURES;
    has_vmx || has_extended && cpuid(EXTENDED_FEATURES).ecx & SVM != 0
}

/// Who made the host's processor: "GenuineIntel".
pub fn vendor() -> String {
    let Cpuid { ebx, ecx, edx, .. } = cpuid(0);
    let name = [ebx, edx, ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(name.as_flattened()).into_owned()
}

/// Family, model and stepping of the host's processor, as CPUID has them.
pub fn signature() -> u32 {
    cpuid(1).eax
}

/// What the processor answers to CPUID.
struct Cpuid {
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// What the host's answers for `leaf` (and subleaf 0).
fn cpuid(leaf: u32) -> Cpuid {
    let (eax, rbx, ecx, edx): (u32, u64, u32, u32);
    // SAFETY: every 64-bit processor has the instruction; it changes four registers, of which RBX is
    // restored and the others are declared.
    unsafe {
        std::arch::asm!(
            "mov {rbx}, rbx",
            "cpuid",
            "xchg {rbx}, rbx",
            rbx = out(reg) rbx,
            inout("eax") leaf => eax,
            inout("ecx") 0 => ecx,
            out("edx") edx,
        );
    }
    Cpuid {
        eax,
        ebx: rbx as u32,
        ecx,
        edx,
    }
}

impl Vcpu {
    /// A vCPU by its descriptor; `len` is what KVM_GET_VCPU_MMAP_SIZE says.
    ///
    /// # Errors
    /// When the page cannot be mapped.
    pub fn new(fd: VcpuFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the kernel chooses an address where nothing is, so no memory of ours changes.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page.cast()) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED.cast() => Ok(Vcpu {
                fd: Arc::new(fd),
                page,
                len,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The descriptor, for a thread that does not run the vCPU.
    pub fn share(&self) -> Arc<VcpuFd> {
        Arc::clone(&self.fd)
    }

    /// Lets the guest run until its next exit.
    ///
    /// # Errors
    /// KVM's, EINTR included.
    pub fn run(&self) -> Result<Exit, i32> {
        // SAFETY: the descriptor is a vCPU's, and KVM_RUN takes no argument. KVM writes to the page
        // and to guest memory; nothing of ours refers to either, but atomics and raw pointers.
        if unsafe { ioctl(&*self.fd, request::KVM_RUN()) } != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        Ok(self.exit())
    }

    /// What the page says of the last exit.
    fn exit(&self) -> Exit {
        match self.u32_at(offset_of!(kvm_run, exit_reason)) {
            kvm::KVM_EXIT_IO => {
                let access = PortAccess {
                    port: u16::from_le_bytes(
                        self.get(offset_of!(kvm_run, __bindgen_anon_1.io.port)),
                    ),
                    unit: self
                        .u8_at(offset_of!(kvm_run, __bindgen_anon_1.io.size))
                        .into(),
                    count: self.u32_at(offset_of!(kvm_run, __bindgen_anon_1.io.count)) as usize,
                    at: u64::from_le_bytes(
                        self.get(offset_of!(kvm_run, __bindgen_anon_1.io.data_offset)),
                    ) as usize,
                };
                let direction = self.u8_at(offset_of!(kvm_run, __bindgen_anon_1.io.direction));
                if u32::from(direction) == kvm::KVM_EXIT_IO_OUT {
                    Exit::PortWrite(access)
                } else {
                    Exit::PortRead(access)
                }
            }
            kvm::KVM_EXIT_MMIO => {
                let address = u64::from_le_bytes(
                    self.get(offset_of!(kvm_run, __bindgen_anon_1.mmio.phys_addr)),
                );
                let len = self.u32_at(offset_of!(kvm_run, __bindgen_anon_1.mmio.len)) as usize;
                let len = len.min(8);
                if self.u8_at(offset_of!(kvm_run, __bindgen_anon_1.mmio.is_write)) == 0 {
                    Exit::MemoryRead { address, len }
                } else {
                    let data = self.get(offset_of!(kvm_run, __bindgen_anon_1.mmio.data));
                    Exit::MemoryWrite { address, data, len }
                }
            }
            kvm::KVM_EXIT_INTR | kvm::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Interrupted,
            kvm::KVM_EXIT_IOAPIC_EOI => Exit::EndOfInterrupt,
            kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kvm::KVM_EXIT_FAIL_ENTRY => {
                Exit::FailedEntry(u64::from_le_bytes(self.get(offset_of!(
                    kvm_run,
                    __bindgen_anon_1.fail_entry.hardware_entry_failure_reason
                ))))
            }
            kvm::KVM_EXIT_INTERNAL_ERROR => Exit::InternalError,
            kvm::KVM_EXIT_MEMORY_FAULT => Exit::MemoryFault,
            kvm::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent(
                self.u32_at(offset_of!(kvm_run, __bindgen_anon_1.system_event.type_)),
            ),
            other => Exit::Other(other),
        }
    }

    /// Unit number `index` of what the guest wrote to a port; its bytes are the first ones.
    pub fn port_data(&self, access: PortAccess, index: usize) -> [u8; 4] {
        let mut data = [0; 4];
        if let Some(unit) = data.get_mut(..access.unit) {
            self.copy_out(access.unit_at(index), unit);
        }
        data
    }

    /// Gives the guest unit number `index` of what it reads from a port.
    pub fn answer_port(&self, access: PortAccess, index: usize, unit: &[u8]) {
        self.copy_in(access.unit_at(index), unit);
    }

    /// Gives the guest what it reads from memory.
    pub fn answer_memory(&self, data: &[u8]) {
        let data = data.get(..8).unwrap_or(data);
        self.copy_in(offset_of!(kvm_run, __bindgen_anon_1.mmio.data), data);
    }

    /// What KVM tells after [`Exit::InternalError`].
    pub fn internal_error(&self) -> InternalError {
        let suberror = self.u32_at(offset_of!(kvm_run, __bindgen_anon_1.internal.suberror));
        let mut error = InternalError {
            suberror,
            ..InternalError::default()
        };
        if suberror == kvm::KVM_INTERNAL_ERROR_EMULATION {
            // After `suberror`: how many 64-bit words follow, a word of flags, then one byte for the
            // length of the instruction and 15 for the instruction itself.
            let start = offset_of!(kvm_run, __bindgen_anon_1.emulation_failure);
            let words = self.u32_at(start.saturating_add(4));
            let flags = u64::from_le_bytes(self.get(start.saturating_add(8)));
            let told = u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
            if words >= 3 && flags & told != 0 {
                let len = self.u8_at(start.saturating_add(16));
                error.instruction_len = usize::from(len).min(INSTRUCTION_MAX);
                error.instruction = self.get(start.saturating_add(17));
            }
        }
        error
    }

    /// The flag that makes the next KVM_RUN return at once. The vCPU lasts for ever, and so does
    /// its page.
    pub fn immediate_exit(&'static self) -> &'static AtomicU8 {
        self.flag()
    }

    /// Lets the next KVM_RUN run, whatever kicks there were before.
    pub fn forget_kicks(&self) {
        self.flag().store(0, Ordering::Relaxed);
    }

    /// Makes the next KVM_RUN finish the instruction of the last exit and return before another one.
    pub fn leave_at_once(&self) {
        self.flag().store(1, Ordering::Relaxed);
    }

    fn flag(&self) -> &AtomicU8 {
        const AT: usize = offset_of!(kvm_run, immediate_exit);
        // SAFETY: `new` has mapped a whole `kvm_run`, of which this is a byte, and it stays mapped
        // as long as `self` is there. All accesses of ours to the byte are atomic: copies begin
        // behind it (`COPIED_FROM`). The kernel only reads it, in calls of this thread.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(AT)) }
    }

    fn u8_at(&self, offset: usize) -> u8 {
        let [byte] = self.get(offset);
        byte
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.copy_out(offset, &mut bytes);
        bytes
    }

    /// Whether `len` bytes from `offset` on may be copied.
    fn may_copy(&self, offset: usize, len: usize) -> bool {
        let end = offset.checked_add(len);
        offset >= COPIED_FROM && end.is_some_and(|end| end <= self.len)
    }

    /// Copies bytes of the page; they stay as they are where KVM named a place outside the page.
    #[inline]
    fn copy_out(&self, offset: usize, to: &mut [u8]) {
        if self.may_copy(offset, to.len()) {
            // SAFETY: both are as long, the first by the check. No call of the kernel is under way,
            // and the signal handler's byte is not among them: nothing else writes there now.
            unsafe {
                let from = self.page.as_ptr().add(offset);
                ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
            }
        }
    }

    #[inline]
    fn copy_in(&self, offset: usize, from: &[u8]) {
        if self.may_copy(offset, from.len()) {
            // SAFETY: as for `copy_out`; nothing of ours refers to these bytes.
            unsafe {
                let to = self.page.as_ptr().add(offset);
                ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
            }
        }
    }
}

/// Where the first of the bytes is that are copied: behind those of the signal handler.
const COPIED_FROM: usize = offset_of!(kvm_run, exit_reason);
const _: () = assert!(offset_of!(kvm_run, immediate_exit) < COPIED_FROM);

impl PortAccess {
    fn unit_at(&self, index: usize) -> usize {
        self.at.saturating_add(index.saturating_mul(self.unit))
    }
}

impl Deref for Vcpu {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: the mapping is as `new` made it. References to its flag borrow `self`, or are made
        // of a `self` that is never dropped.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.len) };
    }
}

/// The name of an exit reason in the kernel's header, as far as x86 has them.
pub const fn exit_name(reason: u32) -> &'static str {
    match reason {
        kvm::KVM_EXIT_UNKNOWN => "KVM_EXIT_UNKNOWN",
        kvm::KVM_EXIT_EXCEPTION => "KVM_EXIT_EXCEPTION",
        kvm::KVM_EXIT_IO => "KVM_EXIT_IO",
        kvm::KVM_EXIT_HYPERCALL => "KVM_EXIT_HYPERCALL",
        kvm::KVM_EXIT_DEBUG => "KVM_EXIT_DEBUG",
        kvm::KVM_EXIT_HLT => "KVM_EXIT_HLT",
        kvm::KVM_EXIT_MMIO => "KVM_EXIT_MMIO",
        kvm::KVM_EXIT_IRQ_WINDOW_OPEN => "KVM_EXIT_IRQ_WINDOW_OPEN",
        kvm::KVM_EXIT_SHUTDOWN => "KVM_EXIT_SHUTDOWN",
        kvm::KVM_EXIT_FAIL_ENTRY => "KVM_EXIT_FAIL_ENTRY",
        kvm::KVM_EXIT_INTR => "KVM_EXIT_INTR",
        kvm::KVM_EXIT_SET_TPR => "KVM_EXIT_SET_TPR",
        kvm::KVM_EXIT_TPR_ACCESS => "KVM_EXIT_TPR_ACCESS",
        kvm::KVM_EXIT_NMI => "KVM_EXIT_NMI",
        kvm::KVM_EXIT_INTERNAL_ERROR => "KVM_EXIT_INTERNAL_ERROR",
        kvm::KVM_EXIT_WATCHDOG => "KVM_EXIT_WATCHDOG",
        kvm::KVM_EXIT_SYSTEM_EVENT => "KVM_EXIT_SYSTEM_EVENT",
        kvm::KVM_EXIT_IOAPIC_EOI => "KVM_EXIT_IOAPIC_EOI",
        kvm::KVM_EXIT_HYPERV => "KVM_EXIT_HYPERV",
        kvm::KVM_EXIT_X86_RDMSR => "KVM_EXIT_X86_RDMSR",
        kvm::KVM_EXIT_X86_WRMSR => "KVM_EXIT_X86_WRMSR",
        kvm::KVM_EXIT_DIRTY_RING_FULL => "KVM_EXIT_DIRTY_RING_FULL",
        kvm::KVM_EXIT_AP_RESET_HOLD => "KVM_EXIT_AP_RESET_HOLD",
        kvm::KVM_EXIT_X86_BUS_LOCK => "KVM_EXIT_X86_BUS_LOCK",
        kvm::KVM_EXIT_XEN => "KVM_EXIT_XEN",
        kvm::KVM_EXIT_NOTIFY => "KVM_EXIT_NOTIFY",
        kvm::KVM_EXIT_MEMORY_FAULT => "KVM_EXIT_MEMORY_FAULT",
        _ => "no name known here",
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

    /// A vCPU of a machine without memory; `None` on a host without KVM.
    fn vcpu() -> Option<Vcpu> {
        let kvm = Kvm::new().ok()?;
        let fd = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        Some(Vcpu::new(fd, kvm.get_vcpu_mmap_size().unwrap()).unwrap())
    }

    /// Writes `bytes` where KVM would.
    fn put(vcpu: &Vcpu, offset: usize, bytes: &[u8]) {
        vcpu.copy_in(offset, bytes);
    }

    fn put_reason(vcpu: &Vcpu, reason: u32) {
        put(
            vcpu,
            offset_of!(kvm_run, exit_reason),
            &reason.to_le_bytes(),
        );
    }

    #[test]
    fn run_when_the_flag_is_set_returns_at_once() {
        let Some(vcpu) = vcpu() else { return };
        let vcpu: &'static Vcpu = Box::leak(Box::new(vcpu));
        vcpu.immediate_exit().store(1, Ordering::Relaxed);
        assert_eq!(vcpu.run(), Err(libc::EINTR));
        vcpu.forget_kicks();
        assert_eq!(vcpu.immediate_exit().load(Ordering::Relaxed), 0);
    }

    #[test]
    fn exit_when_it_is_a_port_access_tells_each_unit() {
        let Some(vcpu) = vcpu() else { return };
        put_reason(&vcpu, kvm::KVM_EXIT_IO);
        let io = offset_of!(kvm_run, __bindgen_anon_1.io);
        // direction, size, port, count, data_offset
        put(
            &vcpu,
            io,
            &[1, 2, 0xf8, 3, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0],
        );
        put(&vcpu, 0x1000, &[1, 2, 3, 4, 5, 6]);
        let Exit::PortWrite(access) = vcpu.exit() else {
            panic!("{:?}", vcpu.exit());
        };
        assert_eq!((access.port, access.unit, access.count), (0x3f8, 2, 3));
        assert_eq!(vcpu.port_data(access, 0), [1, 2, 0, 0]);
        assert_eq!(vcpu.port_data(access, 2), [5, 6, 0, 0]);
        put(&vcpu, io, &[0]);
        let Exit::PortRead(access) = vcpu.exit() else {
            panic!("{:?}", vcpu.exit());
        };
        vcpu.answer_port(access, 1, &[7, 8]);
        assert_eq!(vcpu.get(0x1000), [1, 2, 7, 8, 5, 6]);
    }

    #[test]
    fn exit_when_it_is_a_memory_access_tells_address_and_bytes() {
        let Some(vcpu) = vcpu() else { return };
        put_reason(&vcpu, kvm::KVM_EXIT_MMIO);
        let mmio = offset_of!(kvm_run, __bindgen_anon_1.mmio);
        put(&vcpu, mmio, &0xc000_1050u64.to_le_bytes());
        put(&vcpu, mmio + 8, &[1, 2, 3, 4, 0, 0, 0, 0, 4, 0, 0, 0, 1]);
        let data = [1, 2, 3, 4, 0, 0, 0, 0];
        let (address, len) = (0xc000_1050, 4);
        assert_eq!(vcpu.exit(), Exit::MemoryWrite { address, data, len });
        put(&vcpu, mmio + 20, &[0]);
        assert_eq!(vcpu.exit(), Exit::MemoryRead { address, len });
        vcpu.answer_memory(&[9, 9]);
        assert_eq!(vcpu.get(mmio + 8), [9, 9, 3, 4]);
    }

    #[test]
    fn exit_when_it_is_an_internal_error_tells_the_instruction_if_kvm_does() {
        let Some(vcpu) = vcpu() else { return };
        put_reason(&vcpu, kvm::KVM_EXIT_INTERNAL_ERROR);
        let at = offset_of!(kvm_run, __bindgen_anon_1.internal);
        put(&vcpu, at, &[1, 0, 0, 0, 4, 0, 0, 0]);
        put(
            &vcpu,
            at + 8,
            &[1, 0, 0, 0, 0, 0, 0, 0, 3, 0x0f, 0xc7, 0x08, 0x90],
        );
        assert_eq!(vcpu.exit(), Exit::InternalError);
        let error = vcpu.internal_error();
        assert_eq!((error.suberror, error.instruction_len), (1, 3));
        assert_eq!(error.instruction[..3], [0x0f, 0xc7, 0x08]);
        // Older kernels tell nothing, and other errors have other data there.
        put(&vcpu, at + 8, &[0]);
        assert_eq!(vcpu.internal_error().instruction_len, 0);
        put(&vcpu, at + 8, &[1]);
        put(&vcpu, at, &[3]);
        assert_eq!(vcpu.internal_error().instruction_len, 0);
    }

    #[test]
    fn copy_when_it_would_leave_the_page_or_reach_the_flag_does_nothing() {
        let Some(vcpu) = vcpu() else { return };
        for offset in [0, 1, 7, vcpu.len, vcpu.len - 1, usize::MAX] {
            put(&vcpu, offset, &[0xff; 2]);
            assert_eq!(vcpu.get(offset), [0u8; 2], "{offset}");
        }
        assert_eq!(vcpu.flag().load(Ordering::Relaxed), 0);
    }
}
