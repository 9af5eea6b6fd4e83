//! Reading, writing and waiting on descriptors, without ever waiting by accident.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::rand::GetRandomFlags;

/// Standard input.
pub const STDIN: RawFd = libc::STDIN_FILENO;
/// Standard output.
pub const STDOUT: RawFd = libc::STDOUT_FILENO;

/// Fills `bytes` with the host's random numbers.
///
/// # Errors
/// When the host has none yet, early in its own boot.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    let wanted = bytes.len();
    match rustix::rand::getrandom(bytes, GetRandomFlags::NONBLOCK)? {
        count if count == wanted => Ok(()),
        // For more than 256 bytes, a signal can end it early.
        _ => Err(io::ErrorKind::Interrupted.into()),
    }
}

/// Writes `bytes` by one call if `fd` can take them now; whether it took all of them.
///
/// For short lines: a pipe that polls as writable takes at least PIPE_BUF (4096) bytes.
pub fn write_now(fd: RawFd, bytes: &[u8]) -> bool {
    let mut poll = [Interest::write(fd)];
    if wait(&mut poll, Some(0)).is_err() || !poll[0].is_ready() {
        return false;
    }
    write(fd, bytes).is_ok_and(|n| n == bytes.len())
}

/// Writes what one `write` takes.
///
/// # Errors
/// The host's, EAGAIN included.
pub fn write(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is readable for its whole length; the kernel checks `fd`.
    let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A pipe: reading end, writing end. Neither end ever blocks.
///
/// # Errors
/// When the host has no descriptor left.
pub fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((reader.into(), writer.into()))
}

/// A copy of a descriptor that the process was started with (standard input, say), above 2.
///
/// # Errors
/// When `fd` is not open, or the host has no descriptor left.
pub fn duplicate(fd: RawFd) -> io::Result<File> {
    let copy = fcntl(fd, libc::F_DUPFD_CLOEXEC, 3)?;
    // SAFETY: the call succeeded: `copy` is open and owned by nothing else.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(copy) }))
}

/// Whether `fd` is an open descriptor of this process.
#[cfg(test)]
pub fn is_open(fd: RawFd) -> bool {
    fcntl(fd, libc::F_GETFD, 0).is_ok()
}

/// Asks about a descriptor or its flags, changes them, or makes a copy of it.
fn fcntl(fd: RawFd, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the commands given here take a number and touch no memory of ours; the kernel
    // checks `fd`.
    let result = unsafe { libc::fcntl(fd, command, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Takes over descriptor `fd`, which this process was started with: closed with the value that
/// owns it now, and at the next exec. A standard stream stays, and is copied.
///
/// All that this process opens for itself is closed at exec from the first moment on, and nothing
/// that is could have been passed: so what is taken here has no other owner, and is taken once.
///
/// # Errors
/// `None` when `fd` is the process's own, or taken already; else the host's: it is not open.
pub fn take_over(fd: RawFd) -> Result<OwnedFd, Option<io::Error>> {
    let flags = fcntl(fd, libc::F_GETFD, 0).map_err(Some)?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(None);
    }
    if fd <= libc::STDERR_FILENO {
        return duplicate(fd).map(OwnedFd::from).map_err(Some);
    }
    fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC).map_err(Some)?;
    // SAFETY: it is open, and was not marked until now: nothing in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What may be done with an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It can be read.
    pub read: bool,
    /// It can be written.
    pub write: bool,
    /// Every write goes to its end, wherever it was meant for (O_APPEND).
    pub append: bool,
    /// It takes whole aligned blocks only (O_DIRECT).
    pub direct: bool,
}

/// How `fd` was opened.
///
/// # Errors
/// None for a descriptor that is open.
pub fn access(fd: impl AsFd) -> io::Result<Access> {
    let flags = fcntl(fd.as_fd().as_raw_fd(), libc::F_GETFL, 0)?;
    // A mere name for a file (O_PATH) can be neither read nor written.
    let mode = (flags & libc::O_PATH == 0).then_some(flags & libc::O_ACCMODE);
    Ok(Access {
        read: matches!(mode, Some(libc::O_RDONLY | libc::O_RDWR)),
        write: matches!(mode, Some(libc::O_WRONLY | libc::O_RDWR)),
        append: flags & libc::O_APPEND != 0,
        direct: flags & libc::O_DIRECT != 0,
    })
}

/// Makes reads and writes of the open file behind `fd` return instead of waiting, whichever
/// descriptor they use.
///
/// # Errors
/// None for a descriptor that is open and can be read or written.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let flags = fcntl(fd, libc::F_GETFL, 0)?;
    fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK).map(drop)
}

/// Lets reads and writes of the open file behind `fd` wait, whichever descriptor they use: io_uring would
/// answer EAGAIN instead.
///
/// # Errors
/// None for a descriptor that is open and can be read or written.
pub fn set_blocking(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let flags = fcntl(fd, libc::F_GETFL, 0)?;
    if flags & libc::O_NONBLOCK == 0 {
        return Ok(());
    }
    fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK).map(drop)
}

/// Makes reads and writes of the open file behind `fd`, whichever descriptor they use, go past the host's page
/// cache (O_DIRECT).
///
/// # Errors
/// EINVAL when its file system cannot do that.
pub fn set_direct(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let flags = fcntl(fd, libc::F_GETFL, 0)?;
    fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT).map(drop)
}

/// What a thread waits for on one descriptor, and what came.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Interest(libc::pollfd);

impl Interest {
    /// Waits for something to read, the end, or an error.
    pub fn read(fd: RawFd) -> Self {
        Interest(libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
    }

    /// Waits for room to write, or an error.
    pub fn write(fd: RawFd) -> Self {
        Interest(libc::pollfd {
            fd,
            events: libc::POLLOUT,
            revents: 0,
        })
    }

    /// Waits for something to read, for room to write, or both; for the end in any case.
    pub fn both(fd: RawFd, reads: bool, writes: bool) -> Self {
        let read = if reads { libc::POLLIN } else { 0 };
        let write = if writes { libc::POLLOUT } else { 0 };
        Interest(libc::pollfd {
            fd,
            events: read | write,
            revents: 0,
        })
    }

    /// Whether there is something to read.
    pub fn may_read(&self) -> bool {
        self.0.revents & libc::POLLIN != 0
    }

    /// Whether the other side is gone.
    pub fn hung_up(&self) -> bool {
        self.0.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Waits for nothing: keeps a place in an array.
    pub fn none() -> Self {
        Interest::read(-1)
    }

    /// `self` if `wanted`, else nothing.
    pub fn when(self, wanted: bool) -> Self {
        if wanted { self } else { Interest::none() }
    }

    /// Whether anything came, an error included: the next read or write tells.
    pub fn is_ready(&self) -> bool {
        self.0.revents != 0
    }
}

/// Waits until something in `interests` is ready, for at most `millis` (for ever when `None`).
/// A signal ends the wait early, with nothing ready.
///
/// # Errors
/// When the host is out of memory.
pub fn wait(interests: &mut [Interest], millis: Option<u32>) -> io::Result<()> {
    let count = interests.len() as libc::nfds_t;
    let limit = millis.map(|millis| libc::timespec {
        tv_sec: i64::from(millis / 1000),
        tv_nsec: i64::from(millis % 1000) * 1_000_000,
    });
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    let fds = interests.as_mut_ptr().cast();
    // Not poll: that goes on after SIGSTOP and SIGCONT, a frozen cgroup or a tracer's look by
    // another system call (restart_syscall), which no filter allows.
    // SAFETY: `Interest` is a transparent pollfd, and the slice is ours for `count` of them; the
    // limit is null or outlives the call, and the signal mask is left alone.
    let result = unsafe { libc::ppoll(fds, count, limit, ptr::null()) };
    if result >= 0 {
        return Ok(());
    }
    for interest in interests.iter_mut() {
        interest.0.revents = 0;
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{is_without_reader, wait_for_last_close};
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn write_now_when_pipe_is_full_returns_at_once() {
        let (mut reader, writer) = pipe().unwrap();
        let line = [b'x'; 1000];
        let mut written = 0;
        while write_now(writer.as_raw_fd(), &line) {
            written += 1;
        }
        assert!(written > 10, "{written}");
        let mut back = vec![0; 1000 * written];
        reader.read_exact(&mut back).unwrap();
        assert!(write_now(writer.as_raw_fd(), &line));
    }

    #[test]
    fn write_now_when_reader_is_gone_is_an_answer() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        wait_for_last_close(|| is_without_reader(&writer));
        assert!(!write_now(writer.as_raw_fd(), b"x"));
        assert!(!write_now(-1, b"x"));
    }

    #[test]
    fn take_over_when_it_is_our_own_is_refused() {
        let (ours, _) = pipe().unwrap();
        assert!(matches!(take_over(ours.as_raw_fd()), Err(None)));
        assert!(matches!(take_over(-1), Err(Some(_))));
        assert!(matches!(take_over(1 << 20), Err(Some(_))));
    }

    #[test]
    fn take_over_when_passed_is_taken_once() {
        let (reader, mut writer) = pipe().unwrap();
        // SAFETY: makes a descriptor that an exec would leave open, as passed ones are.
        let fd = unsafe { libc::dup(reader.as_raw_fd()) };
        drop(reader);
        let taken = take_over(fd).unwrap();
        assert_eq!(taken.as_raw_fd(), fd);
        assert!(matches!(take_over(fd), Err(None)));
        writer.write_all(b"!").unwrap();
        let mut taken = File::from(taken);
        assert_eq!(taken.read(&mut [0; 2]).unwrap(), 1);
        drop(taken);
        wait_for_last_close(|| is_without_reader(&writer));
        let stream = take_over(2).unwrap();
        assert!(stream.as_raw_fd() > 2 && is_open(2));
    }

    #[test]
    fn access_when_asked_is_how_it_was_opened() {
        use std::fs::OpenOptions;
        use std::os::unix::fs::OpenOptionsExt;
        let how = |access: Access| (access.read, access.write, access.append, access.direct);
        let (reader, writer) = pipe().unwrap();
        assert_eq!(how(access(&reader).unwrap()), (true, false, false, false));
        assert_eq!(how(access(&writer).unwrap()), (false, true, false, false));
        let mut both = OpenOptions::new();
        let file = both.read(true).append(true).open("/dev/null").unwrap();
        assert_eq!(how(access(&file).unwrap()), (true, true, true, false));
        let mut name = OpenOptions::new();
        let file = name.read(true).custom_flags(libc::O_PATH).open("/");
        assert_eq!(
            how(access(file.unwrap()).unwrap()),
            (false, false, false, false)
        );
    }

    #[test]
    fn wait_when_two_are_watched_tells_which() {
        let (a, mut to_a) = pipe().unwrap();
        let (b, _to_b) = pipe().unwrap();
        to_a.write_all(b"!").unwrap();
        let mut interests = [
            Interest::read(a.as_raw_fd()),
            Interest::read(b.as_raw_fd()),
            Interest::none(),
        ];
        wait(&mut interests, None).unwrap();
        assert!(interests[0].is_ready());
        assert!(!interests[1].is_ready());
        assert!(!interests[2].is_ready());
    }
}
