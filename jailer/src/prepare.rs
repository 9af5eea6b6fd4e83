//! `mayfly-jailer prepare`: the process that will stand for a microVM, before all of it is known.
//!
//! The hooks of a container are told the process that stands for it, and make its network in the network
//! namespace of that process; what the guest gets is known only then. So this process goes into the
//! namespace first, says so, and waits for its words, with which it becomes `mayfly-jailer run`: its number
//! and its namespace stay.
//!
//! ```text
//!     runtime                      this process
//!        |--- start, socket ----------->|  joins the namespace, or makes one
//!        |<-- one byte -----------------|
//!      (hooks)                          |  waits
//!        |--- length, words ----------->|  executes itself with them
//!        |--- length 0 ---------------->|  or stays as it is, for a pod's sandbox
//! ```
//!
//! It ends when the runtime does, unless it was told to stay: then it ends by a signal. The namespace, if it made
//! one, ends with it. Where it cannot be in its namespace, it says why in the place of the byte.

use std::ffi::OsString;
use std::io::{Read, Write as _};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use crate::args::{self, ArgsError, Known, Words, asks_for_help};
use crate::error::{Advice as _, AnyError, Step as _, message};
use crate::netns::NetNs;
use crate::sys;

/// What `prepare --help` prints.
pub const HELP: &str = include_str!("prepare.txt");

/// Most bytes of words: more than the kernel takes.
const WORDS_MAX: u32 = 8 << 20;

/// It is not told what to run.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error("cannot go on: the socket (--words-fd) was closed before the words had come")]
    Closed,
    #[error("cannot use the words: {0} bytes are more than {WORDS_MAX}")]
    TooLong(u32),
    #[error("cannot use the words: the last one has no zero byte behind it")]
    Unended,
    #[error("cannot use descriptor {0} (--words-fd): it was not passed at the start")]
    NotPassed(RawFd),
}

/// What is to be waited in and for.
#[derive(Debug, PartialEq, Eq)]
pub struct Prepare {
    /// The network namespace to join; a new one if there is none.
    namespace: Option<PathBuf>,
    words_fd: RawFd,
}

const KNOWN: Known = Known {
    flags: "",
    once: "--id --runtime-dir --words-fd --net-namespace",
    repeatable: "",
    text: "",
    help: "see prepare --help",
};

/// Understands the words after `prepare`; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Prepare>, ArgsError> {
    if asks_for_help(&words) {
        return Ok(None);
    }
    let mut words = Words::sort(words, &KNOWN)?;
    // They stand in the list of processes.
    words
        .parsed("--id", args::name)?
        .ok_or(ArgsError::Missing("--id"))?;
    Ok(Some(Prepare {
        namespace: words.path("--net-namespace"),
        words_fd: words
            .parsed("--words-fd", args::descriptor)?
            .ok_or(ArgsError::Missing("--words-fd"))?,
    }))
}

/// Waits, and becomes what it is told to be. Descriptors that were passed stay open: they are for that.
pub fn prepare(prepare: &Prepare) -> Result<std::convert::Infallible, AnyError> {
    sys::survive_writes();
    let number = prepare.words_fd;
    let socket = mayfly::wire::take_over(number);
    let socket = socket.map_err(|_| PrepareError::NotPassed(number))?;
    let mut socket = UnixStream::from(socket);
    if let Err(error) = go_into(prepare.namespace.as_deref()) {
        let _ = socket.write_all(message(&*error).as_bytes());
        return Err(error);
    }
    socket.write_all(b"1").step("say that it waits")?;
    let words = read(&mut socket)?;
    if words.is_empty() {
        sys::reset_signals().step("reset the signals")?;
        sys::stay();
    }
    let own = std::env::current_exe().step("find this program")?;
    // It stays so across exec otherwise.
    sys::reset_signals().step("reset the signals")?;
    let error = Command::new(own).arg0("mayfly-jailer").args(words).exec();
    Ok(Err(error).step("become mayfly-jailer with the words (--words-fd)")?)
}

fn go_into(namespace: Option<&Path>) -> Result<(), AnyError> {
    match namespace {
        Some(path) => NetNs::open(path)?.join()?,
        None => sys::unshare(UnshareFlags::NEWNET)
            .step("make a network namespace")
            .hint(Errno::PERM, "run it as root")?,
    }
    Ok(())
}

/// Reads the words, whole; there are none where it is to stay.
fn read(socket: &mut impl Read) -> Result<Vec<OsString>, AnyError> {
    let mut length = [0; 4];
    fill(socket, &mut length)?;
    let length = u32::from_ne_bytes(length);
    if length > WORDS_MAX {
        return Err(PrepareError::TooLong(length).into());
    }
    let mut bytes = vec![0; length as usize];
    fill(socket, &mut bytes)?;
    match bytes.pop() {
        None => return Ok(Vec::new()),
        Some(0) => {}
        Some(_) => return Err(PrepareError::Unended.into()),
    }
    let words = bytes.split(|byte| *byte == 0);
    Ok(words
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect())
}

fn fill(socket: &mut impl Read, bytes: &mut [u8]) -> Result<(), AnyError> {
    match socket.read_exact(bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(PrepareError::Closed.into())
        }
        other => Ok(other.step("read the words (--words-fd)")?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Prepare>, String> {
        let words = line.split_whitespace().map(OsString::from).collect();
        parse(words).map_err(|error| error.to_string())
    }

    #[test]
    fn command_line_names_the_socket_and_perhaps_a_namespace() {
        let plain = parsed("--id c1 --runtime-dir . --words-fd 5").unwrap();
        let expected = |namespace: Option<&str>| {
            let namespace = namespace.map(PathBuf::from);
            Some(Prepare {
                namespace,
                words_fd: 5,
            })
        };
        assert_eq!(plain, expected(None));
        let joined = parsed("--words-fd 5 --net-namespace /run/netns/x --id c1").unwrap();
        assert_eq!(joined, expected(Some("/run/netns/x")));
        assert_eq!(parsed("--help"), Ok(None));
        for (line, expected) in [
            ("--id c1", "--words-fd"),
            ("--words-fd 5", "--id"),
            ("--id c/1 --words-fd 5", "--id"),
            ("--id c1 --words-fd 2", "above 2"),
            ("--id c1 --words-fd x", "above 2"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn words_are_read_whole_or_not_at_all() {
        let told = |bytes: &[u8]| {
            let length = (bytes.len() as u32).to_ne_bytes();
            read(&mut &[&length[..], bytes].concat()[..]).map_err(|error| error.to_string())
        };
        assert_eq!(told(b"run\0--id\0\0").unwrap(), ["run", "--id", ""]);
        assert_eq!(told(b"\0").unwrap(), [""]);
        assert_eq!(told(b"").unwrap(), [""; 0]);
        assert!(told(b"run").unwrap_err().contains("zero byte"));
        for cut in [&b""[..], b"\x04\0", b"\x04\0\0\0run"] {
            let error = read(&mut &cut[..]).unwrap_err().to_string();
            assert!(error.contains("closed"), "{cut:?}: {error}");
        }
        let endless = [&u32::MAX.to_ne_bytes()[..], &[b'x'; 64]].concat();
        let error = read(&mut &endless[..]).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }
}
