//! The process of a container whose hooks run before its microVM is made: `mayfly-jailer prepare`, which is in
//! the container's network namespace and control groups already, and becomes `mayfly-jailer run` when it
//! gets its words. The process of a pod's sandbox gets none, and stays.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::io::FdFlags;

use crate::error::{AnyError, Step as _};
use crate::input;
use crate::jailer::{Jailer, RUNTIME, Told};

/// How long its message may be.
const MESSAGE_MAX: u64 = 1 << 16;

/// A word cannot be passed on.
#[derive(Debug, thiserror::Error)]
#[error("there is a zero byte in \"{0}\"")]
struct ZeroByte(String);

/// It, until it has its words or is told to stay. Dropped, it ends.
pub struct Waiting {
    child: Option<Child>,
    socket: UnixStream,
}

impl Waiting {
    /// Starts it for the container `id`, whose folder this is, with the descriptors in `passed`. It joins a
    /// network namespace, or makes one.
    pub fn start(
        jailer: &Jailer,
        folder: &Path,
        id: &str,
        namespace: Option<&Path>,
        passed: &[&OwnedFd],
    ) -> Result<Waiting, AnyError> {
        let (socket, theirs) = UnixStream::pair().step("make a pair of sockets")?;
        let theirs = OwnedFd::from(theirs);
        let number = theirs.as_raw_fd().to_string();
        let words = [
            "prepare",
            "--id",
            id,
            "--runtime-dir",
            RUNTIME,
            "--words-fd",
        ];
        let mut words: Vec<OsString> = words.map(OsString::from).into();
        words.push(number.into());
        if let Some(path) = namespace {
            words.extend(["--net-namespace".into(), path.into()]);
        }
        let mut command = jailer.command(folder, &words);
        let child = spawn(&mut command, &[passed, &[&theirs]].concat(), id)?;
        Ok(Waiting {
            child: Some(child),
            socket,
        })
    }

    /// Its number.
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.id() as i32)
    }

    /// Waits until it is in the namespace, or says why it cannot be.
    pub fn wait(&mut self, patience: Duration) -> Result<(), AnyError> {
        const WHAT: &str = "wait for mayfly-jailer prepare";
        self.socket.set_read_timeout(Some(patience)).step(WHAT)?;
        let mut first = [0];
        // A read with a time limit is not begun anew after a signal (signal(7)).
        let read = || rustix::io::read(&self.socket, &mut first);
        match rustix::io::retry_on_intr(read).step(WHAT)? {
            1 if first == *b"1" => Ok(()),
            count => {
                let mut text = first[..count].to_vec();
                let rest = (&self.socket).take(MESSAGE_MAX);
                text.extend(input::read_stream(rest, MESSAGE_MAX).step(WHAT)?);
                let text = match &*text {
                    b"" => {
                        "mayfly-jailer prepare ended before it was in the network namespace".into()
                    }
                    said => String::from_utf8_lossy(said).into_owned(),
                };
                Err(Told(text).into())
            }
        }
    }

    /// Has it stay as it is, until it is killed.
    pub fn stay(mut self) -> Result<Child, AnyError> {
        let written = self.socket.write_all(&0_u32.to_ne_bytes());
        written.step("tell mayfly-jailer to stay")?;
        Ok(self.child.take().expect("it is taken here alone"))
    }

    /// Has it become `mayfly-jailer` with these words.
    pub fn go(mut self, words: &[OsString]) -> Result<Child, AnyError> {
        let bytes = packed(words).step("pass on the words of mayfly-jailer run")?;
        let written = self.socket.write_all(&bytes);
        written.step("tell mayfly-jailer what to run")?;
        Ok(self.child.take().expect("it is taken here alone"))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// As `mayfly-jailer prepare` reads them: their length, and each with a zero byte behind it.
fn packed(words: &[OsString]) -> Result<Vec<u8>, AnyError> {
    let mut bytes = Vec::new();
    for word in words {
        if word.as_bytes().contains(&0) {
            return Err(ZeroByte(word.display().to_string()).into());
        }
        bytes.extend_from_slice(word.as_bytes());
        bytes.push(0);
    }
    let length = u32::try_from(bytes.len())?;
    bytes.splice(..0, length.to_ne_bytes());
    Ok(bytes)
}

/// Starts a program for the container `id` that gets the descriptors in `passed`; the next one does not.
pub fn spawn(command: &mut Command, passed: &[&OwnedFd], id: &str) -> Result<Child, AnyError> {
    for one in passed {
        rustix::io::fcntl_setfd(one, FdFlags::empty()).step("pass a descriptor")?;
    }
    let started = command.spawn();
    for one in passed {
        rustix::io::fcntl_setfd(one, FdFlags::CLOEXEC).step("keep a descriptor")?;
    }
    Ok(started.step_on("start mayfly-jailer for", id)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_packed_with_their_length_and_none_becomes_two() {
        let words = ["run", "", "--id"].map(OsString::from);
        let mut expected = 10_u32.to_ne_bytes().to_vec();
        expected.extend(b"run\0\0--id\0");
        assert_eq!(packed(&words).unwrap(), expected);
        let error = packed(&["--hostname\0--image".into()]).unwrap_err();
        assert!(error.to_string().contains("zero byte"), "{error}");
    }
}
