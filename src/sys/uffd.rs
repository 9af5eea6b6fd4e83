//! userfaultfd(2): faults on pages of this process that are missing are told to whoever reads the
//! descriptor, and wait until they are answered.
//!
//! The descriptor is one for kernel-mode faults, which a guest's are: /dev/userfaultfd gives it to
//! who may open that, the system call to who has CAP_SYS_PTRACE or where vm.unprivileged_userfaultfd
//! is 1.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `USERFAULTFD_IOC_NEW`
const IOC_NEW: libc::Ioctl = 0xaa00;
/// `UFFDIO_API`, of `struct uffdio_api`: api, features, ioctls.
const API: libc::Ioctl = 0xc018_aa3f;
/// `UFFDIO_REGISTER`, of `struct uffdio_register`: start, len, mode, ioctls.
const REGISTER: libc::Ioctl = 0xc020_aa00;

const API_VERSION: u64 = 0xaa;
/// What handlers written for Firecracker may count on.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// A descriptor of this process's missing pages.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Makes one, by the `device` if it was passed, an open /dev/userfaultfd.
    ///
    /// # Errors
    /// The host's: EPERM where this process may not.
    pub fn new(device: Option<&File>) -> io::Result<Uffd> {
        let made = match device {
            Some(device) => by_device(device)?,
            None => match File::options()
                .read(true)
                .write(true)
                .open("/dev/userfaultfd")
            {
                Ok(device) => by_device(&device)?,
                Err(_) => by_call()?,
            },
        };
        let uffd = Uffd(made);
        uffd.ioctl(API, &mut [API_VERSION, FEATURE_EVENT_REMOVE, 0])?;
        Ok(uffd)
    }

    /// Has faults on missing pages of `addresses` told.
    ///
    /// # Errors
    /// The host's.
    pub fn register(&self, addresses: Range<u64>) -> io::Result<()> {
        let len = addresses.end.saturating_sub(addresses.start);
        self.ioctl(REGISTER, &mut [addresses.start, len, MODE_MISSING, 0])
    }

    fn ioctl<const N: usize>(
        &self,
        number: libc::Ioctl,
        argument: &mut [u64; N],
    ) -> io::Result<()> {
        // SAFETY: the structures of the two calls made here are as many numbers of 64 bits as the
        // array has; the kernel writes the last of them. It changes no memory of this process: what
        // is missing in a range is zero to it, registered or not.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn by_device(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and no pointer.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, FLAGS) }.into())
}

fn by_call() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and no pointer.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })
}

/// What a call that makes a descriptor returned.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded: the descriptor is open and owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}
