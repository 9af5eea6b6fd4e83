//! The system calls of Linux on x86-64 that the agent is made of, each behind a safe function, and what a
//! program without a standard library needs besides; all of its unsafe code. `file`, `socket` and `process` are
//! made of one macro of this file, `call!`.
//!
//! The agent has one thread. A copy that it makes of itself ([`fork`]) has its own memory.

use core::arch::{asm, naked_asm};
use core::ffi::{CStr, c_char};
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

/// Numbers of system calls.
mod number {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const POLL: usize = 7;
    pub const MMAP: usize = 9;
    pub const MUNMAP: usize = 11;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const IOCTL: usize = 16;
    pub const PWRITE: usize = 18;
    pub const SOCKET: usize = 41;
    pub const SENDTO: usize = 44;
    pub const RECVFROM: usize = 45;
    pub const BIND: usize = 49;
    pub const SETSOCKOPT: usize = 54;
    pub const FORK: usize = 57;
    pub const EXECVE: usize = 59;
    pub const WAIT4: usize = 61;
    pub const KILL: usize = 62;
    pub const FCNTL: usize = 72;
    pub const CHDIR: usize = 80;
    pub const FCHMOD: usize = 91;
    pub const UMASK: usize = 95;
    pub const SETSID: usize = 112;
    pub const SETGROUPS: usize = 116;
    pub const SETRESUID: usize = 117;
    pub const SETRESGID: usize = 119;
    pub const CAPSET: usize = 126;
    pub const PRCTL: usize = 157;
    pub const CHROOT: usize = 161;
    pub const SYNC: usize = 162;
    pub const MOUNT: usize = 165;
    pub const REBOOT: usize = 169;
    pub const SETHOSTNAME: usize = 170;
    pub const GETDENTS: usize = 217;
    pub const EXIT_GROUP: usize = 231;
    pub const OPENAT: usize = 257;
    pub const MKDIRAT: usize = 258;
    pub const FCHOWNAT: usize = 260;
    pub const UNLINKAT: usize = 263;
    pub const SYMLINKAT: usize = 266;
    pub const READLINKAT: usize = 267;
    pub const FSTATAT: usize = 262;
    pub const SIGNALFD: usize = 289;
    pub const DUP3: usize = 292;
    pub const PIPE2: usize = 293;
    pub const PRLIMIT: usize = 302;
    pub const CLOSE_RANGE: usize = 436;
}

/// The number of an error (errno).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    pub const NOENT: Errno = Errno(2);
    pub const INTR: Errno = Errno(4);
    pub const AGAIN: Errno = Errno(11);
    pub const ACCES: Errno = Errno(13);
    pub const EXIST: Errno = Errno(17);
    pub const NOTDIR: Errno = Errno(20);
    pub const INVAL: Errno = Errno(22);
    pub const NOSYS: Errno = Errno(38);
    pub const NOBUFS: Errno = Errno(105);
}

pub type Result<T> = core::result::Result<T, Errno>;

/// Below a folder of this number a path is that of the working folder.
const HERE: i32 = -100;
const CLOSE_ON_EXEC: u32 = 0o2_000_000;
pub const NONBLOCK: u32 = 0o4000;
const NOFOLLOW: u32 = 0o400_000;
const FOLDER: u32 = 0o200_000;
const NOCTTY: u32 = 0o400;
/// Only read.
pub const READ: u32 = 0;
/// Read and write.
pub const READ_WRITE: u32 = 2;
/// A file that must not be there.
pub const NEW: u32 = 1 | 0o100 | 0o200;

/// First code of the process: passes the stack that the kernel made to [`start`].
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    naked_asm!("and rsp, -16", "call {start}", "ud2", start = sym start)
}

extern "C" fn start() -> ! {
    super::main()
}

/// Copies `count` bytes: the compiler makes calls of it.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller has so many bytes at both places.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// The same where both places may overlap.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: as the caller says; copied upwards, no byte is overwritten before it was read.
        return unsafe { memcpy(to, from, count) };
    }
    let last = count.wrapping_sub(1);
    // SAFETY: the caller has so many bytes at both places; downwards, from the last one on, no byte is
    // overwritten before it was read. The direction is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(last) => _, inout("rsi") from.wrapping_add(last) => _,
            options(nostack));
    }
    to
}

/// Fills `count` bytes.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller has so many bytes there.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares `count` bytes.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller has so many bytes at both places.
        let (a, b) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
        if a != b {
            return i32::from(a).wrapping_sub(i32::from(b));
        }
    }
    0
}

/// Compares `count` bytes for being the same.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: as the caller says.
    unsafe { memcmp(one, other, count) }
}

/// The length of a text.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const c_char) -> usize {
    let mut length = 0;
    // SAFETY: the caller has a zero byte there, up to which all is readable. Volatile, or the compiler would
    // make a call of this function of it.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length = length.wrapping_add(1);
    }
    length
}

/// A system call.
///
/// # Safety
/// As the call with this number asks.
unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize> {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    let result: isize;
    // SAFETY: the kernel's convention for system calls; it changes no register but these.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            in("r8") fifth,
            in("r9") sixth,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    match result {
        -4095..=-1 => Err(Errno(i32::try_from(result.unsigned_abs()).unwrap_or(0))),
        _ => Ok(result as usize),
    }
}

/// A system call that touches no memory of this process but texts and buffers that are lent to it.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {{
        let mut arguments = [0; 6];
        let given = [$($argument as usize),*];
        arguments[..given.len()].copy_from_slice(&given);
        // SAFETY: each pointer among the arguments is made, in this expression, of a borrowed text with its
        // zero byte, or of a borrowed buffer whose length goes along; the kernel keeps none of them.
        unsafe { call(number::$number, arguments) }
    }};
}

mod file;
mod process;
mod socket;

pub use file::*;
pub use process::*;
pub use socket::*;

/// An open file, which is closed with its owner.
pub struct Fd(i32);

impl Fd {
    /// Its number.
    pub fn number(&self) -> i32 {
        self.0
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        let _ = call!(CLOSE, self.0);
    }
}

fn fd(result: Result<usize>) -> Result<Fd> {
    result.map(|number| Fd(number as i32))
}

/// What is waited for of a file.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Poll {
    pub fd: i32,
    pub events: i16,
    pub revents: i16,
}

pub const POLL_IN: i16 = 1;
pub const POLL_OUT: i16 = 4;

/// Waits until one of them is ready, at most so many milliseconds; without an end for -1.
pub fn poll(files: &mut [Poll], milliseconds: i32) -> Result<usize> {
    call!(POLL, files.as_mut_ptr(), files.len(), milliseconds as isize)
}

/// Anonymous memory, zero at first, which is given back with its owner.
pub struct Memory {
    at: *mut u8,
    length: usize,
}

impl Memory {
    pub fn new(length: usize) -> Result<Memory> {
        const READ_AND_WRITE: usize = 3;
        const PRIVATE_AND_ANONYMOUS: usize = 0x22;
        let arguments = [
            0,
            length,
            READ_AND_WRITE,
            PRIVATE_AND_ANONYMOUS,
            usize::MAX,
            0,
        ];
        // SAFETY: new memory, at a place that the kernel chooses.
        let at = unsafe { call(number::MMAP, arguments) }?;
        Ok(Memory {
            at: at as *mut u8,
            length,
        })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes were mapped there for this owner alone, for as long as it is.
        unsafe { core::slice::from_raw_parts_mut(self.at, self.length) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was mapped by this owner, from whom nothing is borrowed any more.
        let _ = unsafe { call(number::MUNMAP, [self.at as usize, self.length, 0, 0, 0, 0]) };
    }
}

/// A value that is in the program from the start, and taken once.
pub struct Static<T> {
    value: core::cell::UnsafeCell<T>,
    taken: AtomicBool,
}

// SAFETY: only `take` gives the value away, once.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    pub const fn new(value: T) -> Self {
        Static {
            value: core::cell::UnsafeCell::new(value),
            taken: AtomicBool::new(false),
        }
    }

    /// The value; none the second time.
    #[expect(clippy::mut_from_ref, reason = "it is given away once")]
    pub fn take(&'static self) -> Option<&'static mut T> {
        if self.taken.swap(true, Ordering::Relaxed) {
            return None;
        }
        // SAFETY: this is the first time, so there is no other reference to it.
        Some(unsafe { &mut *self.value.get() })
    }
}

pub fn set_hostname(name: &[u8]) -> Result<()> {
    call!(SETHOSTNAME, name.as_ptr(), name.len()).map(drop)
}

pub fn sync() {
    let _ = call!(SYNC);
}

/// Resets the machine; returns only why that did not happen.
pub fn reset_machine() -> Errno {
    const MAGIC: usize = 0xfee1_dead;
    const MAGIC_2: usize = 672_274_793;
    const RESTART: usize = 0x0123_4567;
    match call!(REBOOT, MAGIC, MAGIC_2, RESTART, 0) {
        Ok(_) => Errno(0),
        Err(error) => error,
    }
}

/// Ends the process.
pub fn exit(code: u8) -> ! {
    loop {
        let _ = call!(EXIT_GROUP, code);
    }
}

/// A list of texts for [`execute`], with a null behind them.
pub struct Words<'a, const N: usize> {
    list: [MaybeUninit<*const c_char>; N],
    count: usize,
    texts: PhantomData<&'a CStr>,
}

impl<'a, const N: usize> Words<'a, N> {
    pub fn new() -> Self {
        Words {
            list: [const { MaybeUninit::uninit() }; N],
            count: 0,
            texts: PhantomData,
        }
    }

    /// Adds a text; whether there was room.
    pub fn push(&mut self, text: &'a CStr) -> bool {
        let is_room = self.count.saturating_add(1) < N;
        if let Some(place) = self.list.get_mut(self.count).filter(|_| is_room) {
            place.write(text.as_ptr());
            self.count = self.count.saturating_add(1);
        }
        is_room
    }

    /// The list.
    pub fn finish(&mut self) -> &[*const c_char] {
        if let Some(place) = self.list.get_mut(self.count) {
            place.write(ptr::null());
        }
        let count = self.count.saturating_add(1).min(N);
        // SAFETY: so many places were written to: those that were counted, and the one behind them.
        unsafe { core::slice::from_raw_parts(self.list.as_ptr().cast(), count) }
    }
}
