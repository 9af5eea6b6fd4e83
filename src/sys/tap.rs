//! Taps: the host's end of a guest's network cable.
//!
//! Frames pass with a virtio-net header of 12 bytes in front, in both directions; who needs
//! checksums and segmentation done is settled by [`Tap::set_offloads`].

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use super::fd;

/// Bytes of the header in front of each frame: `struct virtio_net_hdr` with `num_buffers`
/// (virtio 1.2, 5.1.6).
pub const HEADER: usize = 12;

/// The host's tun device.
pub const TUN: &str = "/dev/net/tun";

/// An attached tap. Closing it detaches it, and removes it unless it is persistent.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// Other descriptors may be other queues of it.
    has_queues: bool,
    #[cfg(any(test, fuzzing))]
    fake: bool,
}

/// What the guest takes over from the tap: frames with these marks reach it unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Partial checksums; without them there is none of the others either.
    pub checksum: bool,
    /// TCP segmentation over IPv4.
    pub tso4: bool,
    /// TCP segmentation over IPv6.
    pub tso6: bool,
    /// TCP segmentation with ECN.
    pub ecn: bool,
    /// UDP fragmentation.
    pub ufo: bool,
    /// UDP segmentation over IPv4 and IPv6: a tap takes both or neither ([`Tap::takes_uso`]).
    pub uso: bool,
}

/// Why a tap cannot be had.
#[derive(Debug)]
pub enum TapError {
    /// Longer than the host allows, or holding a zero byte.
    Name(String),
    /// The host's tun device could not be opened.
    Open(io::Error),
    /// Another process is attached to it.
    Busy(String),
    /// Attaching to it, or making it, is not permitted.
    NotPermitted(String),
    /// There is an interface of this name that cannot be attached to as we need it.
    NotATap(String),
    /// There is an interface of this name that is no tap with several queues.
    OneQueue(String),
    /// It could not be attached or made for another reason.
    Attach(String, io::Error),
    /// The descriptor passed is not an attached tap.
    NotAttached(io::Error),
    /// The descriptor passed is attached without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR.
    Flags(String),
    /// It could not be set up.
    SetUp(String, io::Error),
}

impl fmt::Display for TapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TapError::Name(name) => write!(
                f,
                "{name:?} cannot name a tap: at most {} bytes, none of them zero",
                libc::IFNAMSIZ - 1
            ),
            TapError::Open(_) => write!(f, "{TUN} cannot be opened"),
            TapError::Busy(name) => write!(f, "the tap {name:?} is in use by another process"),
            TapError::NotPermitted(name) => write!(
                f,
                "attaching to the tap {name:?}, or making it, is not permitted to this user; make it \
                 as root with `ip tuntap add dev {} mode tap user USER`",
                name.escape_debug()
            ),
            TapError::NotATap(name) => write!(
                f,
                "Invalid TUN/TAP Backend provided by {}: it is no tap with a single queue, or can \
                 not be named so",
                name.escape_debug()
            ),
            TapError::OneQueue(name) => write!(
                f,
                "the tap {name:?} has a single queue, or is no tap, and several were asked for; make it with `ip \
                 tuntap add dev {} mode tap multi_queue`, or let it be made by leaving it out",
                name.escape_debug()
            ),
            TapError::Attach(name, _) => write!(f, "the tap {name:?} cannot be attached to"),
            TapError::NotAttached(_) => f.write_str("the descriptor is not an attached tap"),
            TapError::Flags(name) => write!(
                f,
                "the tap {name:?} was attached without IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
            ),
            TapError::SetUp(name, _) => write!(f, "the tap {name:?} cannot be set up"),
        }
    }
}

impl std::error::Error for TapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TapError::Open(e)
            | TapError::Attach(_, e)
            | TapError::NotAttached(e)
            | TapError::SetUp(_, e) => Some(e),
            _ => None,
        }
    }
}

impl Tap {
    /// Attaches to the tap `name`, made if it does not exist. As for the host's own tools, an
    /// empty name or one with `%d` asks the host for a free one.
    ///
    /// # Errors
    /// One message for each of: a bad name, no tun device, busy, not permitted, not a tap.
    pub fn open(name: &str) -> Result<Self, TapError> {
        // Before anything is opened for a name that cannot be.
        Request::of(name)?;
        Tap::attach(open_tun().map_err(TapError::Open)?, name)
    }

    /// Attaches to another queue of the tap `name`, which has several, or is made with several.
    ///
    /// # Errors
    /// As [`Tap::open`]; one more for a tap with a single queue.
    pub fn open_queue(name: &str) -> Result<Self, TapError> {
        Request::of(name)?;
        let tun = open_tun().map_err(TapError::Open)?;
        Tap::attach_as(tun, name, FLAGS | SEVERAL)
    }

    /// [`Tap::open`] with a tun device that [`open_tun`] opened, and that is attached to nothing yet.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn attach(tun: OwnedFd, name: &str) -> Result<Self, TapError> {
        Tap::attach_as(tun, name, FLAGS)
    }

    fn attach_as(tun: OwnedFd, name: &str, flags: libc::c_short) -> Result<Self, TapError> {
        let file = File::from(tun);
        let mut request = Request::of(name)?;
        request.flags = flags;
        interface_ioctl(&file, libc::TUNSETIFF, &mut request).map_err(|e| {
            let name = name.to_owned();
            match e.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(name),
                Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted(name),
                Some(libc::EINVAL) if flags & SEVERAL != 0 => TapError::OneQueue(name),
                Some(libc::EINVAL) => TapError::NotATap(name),
                _ => TapError::Attach(name, e),
            }
        })?;
        Tap::set_up(file, &request)
    }

    /// Takes over a descriptor that is attached already, with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    ///
    /// # Errors
    /// When it is not.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = Request::of("")?;
        interface_ioctl(&file, libc::TUNGETIFF, &mut request).map_err(TapError::NotAttached)?;
        if request.flags & FLAGS != FLAGS {
            return Err(TapError::Flags(request.name()));
        }
        fd::set_nonblocking(&file).map_err(|e| TapError::SetUp(request.name(), e))?;
        Tap::set_up(file, &request)
    }

    fn set_up(file: File, request: &Request) -> Result<Self, TapError> {
        let name = request.name();
        let size = HEADER as libc::c_int;
        // SAFETY: the kernel reads one int behind the pointer, which is what `size` is.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        if result < 0 {
            return Err(TapError::SetUp(name, io::Error::last_os_error()));
        }
        Ok(Tap {
            file,
            name,
            has_queues: request.flags & SEVERAL != 0,
            #[cfg(any(test, fuzzing))]
            fake: false,
        })
    }

    /// Lets the tap stay when it is closed, until its network namespace goes.
    ///
    /// # Errors
    /// The host's.
    pub fn make_persistent(&self) -> io::Result<()> {
        self.set(libc::TUNSETPERSIST, 1)
    }

    /// The same tap by another descriptor.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Tap {
            file: self.file.try_clone()?,
            name: self.name.clone(),
            has_queues: self.has_queues,
            #[cfg(any(test, fuzzing))]
            fake: self.fake,
        })
    }

    /// Whether other descriptors may be other queues of it.
    pub fn has_queues(&self) -> bool {
        self.has_queues
    }

    /// Attaches this queue of a tap with several, or detaches it: a detached one gets no frames, and drops those that it
    /// has.
    ///
    /// # Errors
    /// The host's, also when it is so already.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        #[cfg(any(test, fuzzing))]
        if self.fake {
            return Ok(());
        }
        let mut request = Request::empty();
        request.flags = match attached {
            true => libc::IFF_ATTACH_QUEUE as libc::c_short,
            false => libc::IFF_DETACH_QUEUE as libc::c_short,
        };
        interface_ioctl(&self.file, libc::TUNSETQUEUE, &mut request)
    }

    /// Detaches this queue unless it is detached.
    ///
    /// # Errors
    /// The host's.
    pub fn detach(&self) -> io::Result<()> {
        match self.set_attached(false) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && self.has_queues => Ok(()),
            other => other,
        }
    }

    /// The name the host knows it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the host what the guest takes over.
    ///
    /// # Errors
    /// When the tap has vanished.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        #[cfg(any(test, fuzzing))]
        if self.fake {
            return Ok(());
        }
        let mut bits = 0;
        if offloads.checksum {
            bits |= libc::TUN_F_CSUM;
            for (wanted, bit) in [
                (offloads.tso4, libc::TUN_F_TSO4),
                (offloads.tso6, libc::TUN_F_TSO6),
                (
                    offloads.ecn && (offloads.tso4 || offloads.tso6),
                    libc::TUN_F_TSO_ECN,
                ),
                (offloads.ufo, libc::TUN_F_UFO),
                (offloads.uso, USO),
            ] {
                if wanted {
                    bits |= bit;
                }
            }
        }
        self.set(libc::TUNSETOFFLOAD, libc::c_ulong::from(bits))
    }

    /// Whether the host's kernel knows UDP segmentation (Linux 6.2 does). TUNGETFEATURES does not tell:
    /// it is tried, which leaves the tap without offloads.
    pub fn takes_uso(&self) -> bool {
        #[cfg(any(test, fuzzing))]
        if self.fake {
            return true;
        }
        let uso = libc::c_ulong::from(libc::TUN_F_CSUM | USO);
        self.set(libc::TUNSETOFFLOAD, uso).is_ok() && self.set(libc::TUNSETOFFLOAD, 0).is_ok()
    }

    /// Changes a setting of the tap.
    fn set(&self, setting: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
        // SAFETY: both settings this is called with take a number and touch no memory of ours.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), setting, value) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// A stand-in for tests: a datagram socket carries whole frames just as a tap does.
    #[cfg(any(test, fuzzing))]
    pub fn fake(socket: std::os::unix::net::UnixDatagram) -> Self {
        socket.set_nonblocking(true).unwrap();
        Tap {
            file: File::from(OwnedFd::from(socket)),
            name: "fake".into(),
            has_queues: true,
            fake: true,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.file.into()
    }
}

/// Opens the host's tun device.
///
/// # Errors
/// The host's: it is missing, or not for this user.
pub fn open_tun() -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    Ok(options.open(TUN)?.into())
}

/// Whether `error` says that the tap itself is gone.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADFD | libc::ENODEV | libc::ENXIO | libc::EBADF)
    )
}

/// UDP segmentation over both versions of IP; with only one of them, or without checksums, EINVAL.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

const FLAGS: libc::c_short =
    (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;

/// A descriptor is one of several queues of a tap.
const SEVERAL: libc::c_short = libc::IFF_MULTI_QUEUE as libc::c_short;

/// `struct ifreq`, as the requests of a tap use it.
#[repr(C)]
struct Request {
    /// Ends with a zero byte.
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    /// Room for what other requests have here.
    unused: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    const fn empty() -> Self {
        Request {
            name: [0; libc::IFNAMSIZ],
            flags: 0,
            unused: [0; 22],
        }
    }

    fn of(name: &str) -> Result<Self, TapError> {
        if name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0) {
            return Err(TapError::Name(name.to_owned()));
        }
        let mut request = Request::empty();
        for (to, from) in request.name.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Ok(request)
    }

    fn name(&self) -> String {
        let name = self.name.split(|b| *b == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

fn interface_ioctl(file: &File, number: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    // SAFETY: all numbers this is called with take an ifreq, which is what `request` is laid out
    // as, and write no more than one; a device that is no tap sees four bytes in them, or refuses.
    if unsafe { libc::ioctl(file.as_raw_fd(), number, ptr::from_mut(request)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{own_name, wait_for_last_close};

    /// A tap of this test's own, or `None`, loudly, where this user may not make one.
    fn tap(name: &str) -> Option<Tap> {
        match Tap::open(name) {
            Ok(tap) => Some(tap),
            Err(error @ (TapError::Open(_) | TapError::NotPermitted(_))) => {
                crate::needs::skip(name, &error.to_string());
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn open_when_name_is_bad_says_so() {
        for name in ["sixteen-bytes-xx", "a\0b"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
        let Some(_) = tap(&own_name("name")) else {
            return;
        };
        assert!(matches!(Tap::open("lo"), Err(TapError::NotATap(_))));
        assert!(matches!(Tap::open("a/b"), Err(TapError::NotATap(_))));
    }

    #[test]
    fn open_when_missing_makes_it_and_when_attached_is_busy() {
        let name = own_name("busy");
        let Some(first) = tap(&name) else { return };
        assert_eq!(first.name(), name);
        let interface = std::path::Path::new("/sys/class/net").join(&name);
        assert!(interface.exists());
        let error = Tap::open(&name).unwrap_err();
        assert!(matches!(error, TapError::Busy(_)), "{error}");
        assert_eq!(
            error.to_string(),
            format!("the tap \"{name}\" is in use by another process")
        );
        drop(first);
        wait_for_last_close(|| !interface.exists());
    }

    #[test]
    fn from_fd_when_attached_knows_the_name() {
        let name = own_name("fd");
        let Some(first) = tap(&name) else { return };
        let second = Tap::from_fd(first.file.try_clone().unwrap().into()).unwrap();
        assert_eq!(second.name(), name);
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(
            Tap::from_fd(file.into()),
            Err(TapError::NotAttached(_))
        ));
    }

    #[test]
    fn set_offloads_when_any_combination_is_taken() {
        let Some(tap) = tap(&own_name("off")) else {
            return;
        };
        let takes_uso = tap.takes_uso();
        for bits in 0..64 {
            tap.set_offloads(Offloads {
                checksum: bits & 1 != 0,
                tso4: bits & 2 != 0,
                tso6: bits & 4 != 0,
                ecn: bits & 8 != 0,
                ufo: bits & 16 != 0,
                uso: takes_uso && bits & 32 != 0,
            })
            .unwrap();
        }
    }
}
