//! A file system with one file, whose `fsync` takes as long as a test wants, and which can fall silent:
//! it reads no requests then, so that whatever touches it waits (FUSE, protocol 7).
//!
//! The kernel lets a process end whose request has not been read. One that has been read holds its
//! process until it is answered.
//!
//! The kernel asks, a thread of the test answers. When the test dies, its end of the connection
//! is closed, and the kernel fails whatever was waiting: nothing hangs for ever.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use super::{PATIENCE, sys};

/// Requests (`enum fuse_opcode`).
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
}

const IN_HEADER: usize = 40;
const ROOT: u64 = 1;
const FILE: u64 = 2;
/// Reads and writes are not cached by the kernel.
const DIRECT_IO: u32 = 1;
const NAME: &str = "disk";

#[derive(Default)]
struct State {
    content: Vec<u8>,
    /// Whether an fsync waits.
    hanging: bool,
    /// Those that do.
    waiting: Vec<u64>,
    /// Whether a read is answered only when a test says so.
    holding: bool,
    /// Those that have come and were not answered: the request, and the bytes.
    held: Vec<(u64, Vec<u8>)>,
}

/// The mounted file system.
pub struct Slow {
    /// Requests are read only while this is locked, and false.
    silent: Arc<Mutex<bool>>,
    state: Arc<(Mutex<State>, Condvar)>,
    connection: File,
    folder: PathBuf,
}

/// While this exists, an fsync does not end.
pub struct Hanging<'a>(&'a Slow);

/// While this exists, no request is read.
pub struct Silent<'a>(&'a Slow);

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        *self.0.silent.lock().unwrap_or_else(|e| e.into_inner()) = false;
    }
}

impl Slow {
    /// Mounts it at the folder `at`, with a disk of `len` bytes. The calling thread gets mounts of
    /// its own: only what it starts sees the disk.
    pub fn mount(at: &Path, len: usize) -> Self {
        Slow::mount_with(at, vec![0; len])
    }

    /// The same with a file of this content.
    pub fn mount_with(at: &Path, content: Vec<u8>) -> Self {
        fs::create_dir_all(at).unwrap();
        let connection = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        sys::own_mounts();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            connection.as_raw_fd()
        );
        sys::mount("fuse", at, &options);
        let state = Arc::new((
            Mutex::new(State {
                content,
                ..State::default()
            }),
            Condvar::new(),
        ));
        let (theirs, mut requests) = (Arc::clone(&state), connection.try_clone().unwrap());
        let silent = Arc::new(Mutex::new(false));
        let gate = Arc::clone(&silent);
        thread::spawn(move || {
            let mut bytes = vec![0; 2 << 20];
            loop {
                sys::wait_readable(&requests, 20);
                let silent = gate.lock().unwrap();
                if *silent || !sys::wait_readable(&requests, 0) {
                    continue;
                }
                // Ends when the file system is unmounted, with its last user.
                let Ok(n) = requests.read(&mut bytes) else {
                    break;
                };
                drop(silent);
                serve(&theirs, &mut requests, &bytes[..n]);
            }
        });
        // The kernel learns that closing needs no request.
        drop(File::open(at.join(NAME)).unwrap());
        Slow {
            silent,
            state,
            connection,
            folder: at.to_owned(),
        }
    }

    /// Where the disk is.
    pub fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// From now on no request is read.
    pub fn fall_silent(&self) -> Silent<'_> {
        *self.silent.lock().unwrap() = true;
        Silent(self)
    }

    /// What the file holds.
    pub fn content(&self) -> Vec<u8> {
        self.state.0.lock().unwrap().content.clone()
    }

    /// From now on a read ends when it is said so.
    pub fn hold(&self) -> Held<'_> {
        self.state.0.lock().unwrap().holding = true;
        Held(self)
    }

    fn answer_read(&self, (unique, bytes): &(u64, Vec<u8>)) {
        let _ = (&self.connection).write_all(&reply(*unique, 0, bytes));
    }

    /// From now on no fsync ends.
    pub fn hang(&self) -> Hanging<'_> {
        self.state.0.lock().unwrap().hanging = true;
        Hanging(self)
    }
}

/// While this exists, reads are answered one by one, as a test says.
pub struct Held<'a>(&'a Slow);

impl Held<'_> {
    /// How many reads have come and are not answered.
    pub fn count(&self) -> usize {
        self.0.state.0.lock().unwrap().held.len()
    }

    /// Answers to the one that came last.
    pub fn answer_last(&self) {
        let last = self.0.state.0.lock().unwrap().held.pop();
        self.0.answer_read(&last.expect("no read is held"));
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.0.lock().unwrap_or_else(|e| e.into_inner());
        state.holding = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        held.iter().for_each(|read| self.0.answer_read(read));
    }
}

impl Hanging<'_> {
    /// Waits until an fsync does.
    pub fn wait(&self) {
        let (state, changed) = &*self.0.state;
        let waits = |state: &mut State| state.waiting.is_empty();
        let state = state.lock().unwrap();
        let (state, _) = changed.wait_timeout_while(state, PATIENCE, waits).unwrap();
        assert!(!state.waiting.is_empty(), "no fsync was called");
    }

    /// Whether one still does.
    pub fn is_waited_for(&self) -> bool {
        !self.0.state.0.lock().unwrap().waiting.is_empty()
    }
}

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        // The state may be poisoned by the panic that brings us here.
        let mut state = self.0.state.0.lock().unwrap_or_else(|e| e.into_inner());
        state.hanging = false;
        let mut connection = &self.0.connection;
        for unique in std::mem::take(&mut state.waiting) {
            let _ = connection.write_all(&reply(unique, 0, &[]));
        }
    }
}

fn serve(shared: &(Mutex<State>, Condvar), connection: &mut File, request: &[u8]) {
    let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
    let (kind, unique, node) = (word(4), long(8), long(16));
    let mut state = shared.0.lock().unwrap();
    let len = state.content.len();
    // Arguments of reads and writes: a handle, the offset, the size.
    let range = || {
        let at = usize::try_from(long(IN_HEADER + 8)).unwrap().min(len);
        at..len.min(at + word(IN_HEADER + 16) as usize)
    };
    let answer = match kind {
        opcode::INIT => {
            let mut answer = Vec::new();
            // Version 7.31, read-ahead, flags; 12 requests at once; 128 KiB a write; the rest 0.
            for value in [7, 31, 0, 0, 12 | 12 << 16, 128 << 10, 1] {
                answer.extend(u32::to_le_bytes(value));
            }
            answer.resize(64, 0);
            reply(unique, 0, &answer)
        }
        opcode::LOOKUP if request[IN_HEADER..].starts_with(b"disk\0") => {
            let mut answer = Vec::new();
            // Node, generation, and how long both are good for.
            for value in [FILE, 0, 0, 0, 0] {
                answer.extend(u64::to_le_bytes(value));
            }
            answer.extend(attributes(FILE, len));
            reply(unique, 0, &answer)
        }
        opcode::GETATTR => {
            let mut answer = vec![0; 16];
            answer.extend(attributes(node, len));
            reply(unique, 0, &answer)
        }
        // Of all that can be set, the length: the bit FATTR_SIZE, and where it is.
        opcode::SETATTR if word(IN_HEADER) & 8 != 0 => {
            let size = usize::try_from(long(IN_HEADER + 16)).unwrap();
            state.content.resize(size, 0);
            let mut answer = vec![0; 16];
            answer.extend(attributes(node, size));
            reply(unique, 0, &answer)
        }
        opcode::OPEN => {
            let mut answer = vec![0; 8];
            answer.extend(DIRECT_IO.to_le_bytes());
            answer.extend([0; 4]);
            reply(unique, 0, &answer)
        }
        opcode::READ if state.holding => {
            let bytes = state.content[range()].to_vec();
            state.held.push((unique, bytes));
            return;
        }
        opcode::READ => reply(unique, 0, &state.content[range()]),
        opcode::WRITE => {
            // It grows where it is added to.
            let (at, written) = (long(IN_HEADER + 8) as usize, word(IN_HEADER + 16));
            let range = at..at + written as usize;
            let data = &request[IN_HEADER + 40..][..range.len()];
            let end = len.max(range.end);
            state.content.resize(end, 0);
            state.content[range].copy_from_slice(data);
            reply(unique, 0, &[written, 0].map(u32::to_le_bytes).concat())
        }
        opcode::FSYNC if state.hanging => {
            state.waiting.push(unique);
            shared.1.notify_all();
            return;
        }
        opcode::FLUSH => reply(unique, -libc::ENOSYS, &[]),
        opcode::FSYNC | opcode::RELEASE => reply(unique, 0, &[]),
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return,
        opcode::LOOKUP => reply(unique, -libc::ENOENT, &[]),
        _ => reply(unique, -libc::ENOSYS, &[]),
    };
    let _ = connection.write_all(&answer);
}

/// `struct fuse_out_header` and what follows it.
fn reply(unique: u64, error: i32, answer: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + answer.len()).unwrap();
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(answer);
    bytes
}

/// `struct fuse_attr`.
fn attributes(node: u64, len: usize) -> Vec<u8> {
    let (mode, size) = match node {
        ROOT => (libc::S_IFDIR | 0o755, 0),
        _ => (libc::S_IFREG | 0o600, len as u64),
    };
    let mut bytes = Vec::new();
    // Inode, size, blocks, three times.
    for value in [node, size, size.div_ceil(512), 0, 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    // Their nanoseconds, mode, links, owners, device, block size, flags.
    for value in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        bytes.extend(value.to_le_bytes());
    }
    bytes
}
