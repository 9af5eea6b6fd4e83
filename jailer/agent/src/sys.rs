//! The system calls of Linux on x86-64 that the agent is made of, each behind a safe function, and what a
//! program without a standard library needs besides; all of its unsafe code.
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
const NONBLOCK: u32 = 0o4000;
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

/// Opens a file, or a new one with these permissions.
pub fn open(path: &CStr, flags: u32, mode: u32) -> Result<Fd> {
    let flags = flags | CLOSE_ON_EXEC | NOCTTY;
    fd(call!(OPENAT, HERE, path.as_ptr(), flags, mode))
}

/// The same without waiting, now or later.
pub fn open_nonblocking(path: &CStr) -> Result<Fd> {
    open(path, READ_WRITE | NONBLOCK, 0)
}

/// Opens an entry of a folder, and follows no link.
pub fn open_in(folder: &Fd, name: &CStr, flags: u32, mode: u32) -> Result<Fd> {
    let flags = flags | CLOSE_ON_EXEC | NOCTTY | NOFOLLOW | NONBLOCK;
    fd(call!(OPENAT, folder.0, name.as_ptr(), flags, mode))
}

/// Opens a folder.
pub fn open_folder(path: &CStr) -> Result<Fd> {
    open(path, FOLDER, 0)
}

/// Opens a folder in a folder, and follows no link.
pub fn open_folder_in(folder: &Fd, name: &CStr) -> Result<Fd> {
    open_in(folder, name, FOLDER, 0)
}

pub fn read(from: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(READ, from.0, into.as_mut_ptr(), into.len())
}

pub fn write(to: &Fd, bytes: &[u8]) -> Result<usize> {
    call!(WRITE, to.0, bytes.as_ptr(), bytes.len())
}

/// Writes to standard error.
pub fn print(bytes: &[u8]) {
    let _ = call!(WRITE, 2, bytes.as_ptr(), bytes.len());
}

/// Writes one byte at a place.
pub fn write_at(to: &Fd, byte: u8, place: usize) -> Result<()> {
    let byte = [byte];
    call!(PWRITE, to.0, byte.as_ptr(), byte.len(), place).map(drop)
}

/// A pipe, whose ends wait: the reading end first.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0_i32; 2];
    call!(PIPE2, ends.as_mut_ptr(), CLOSE_ON_EXEC)?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Has reads and writes of a file not wait (FIONBIO).
pub fn set_nonblocking(file: &Fd) {
    let yes = [1_i32];
    let _ = call!(IOCTL, file.0, 0x5421, yes.as_ptr());
}

/// Bytes that can be read of a pipe (FIONREAD).
pub fn readable(file: &Fd) -> usize {
    let mut count = [0_i32];
    let _ = call!(IOCTL, file.0, 0x541b, count.as_mut_ptr());
    usize::try_from(count[0]).unwrap_or(0)
}

/// Puts `file` at the place of a standard stream.
pub fn place(file: &Fd, at: i32) -> Result<()> {
    if file.0 == at {
        // It is there, but would be closed by exec.
        return call!(IOCTL, at, 0x5450).map(drop);
    }
    call!(DUP3, file.0, at, 0).map(drop)
}

/// Closes all descriptors but the standard streams, of which no owner is used again.
pub fn close_others() {
    const MOST: u32 = 1024;
    if call!(CLOSE_RANGE, 3, u32::MAX, 0).is_err() {
        // Linux before 5.9.
        for number in 3..MOST {
            let _ = call!(CLOSE, number);
        }
    }
}

/// Another number for the same open file.
pub fn copy(file: &Fd) -> Result<Fd> {
    standard(file.0)
}

/// Another number for a standard stream.
pub fn standard(stream: i32) -> Result<Fd> {
    /// F_DUPFD_CLOEXEC.
    const COPY: usize = 1030;
    fd(call!(FCNTL, stream, COPY, 3))
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

/// Mounts a file system.
pub fn mount(source: &CStr, at: &CStr, kind: &CStr, flags: usize, options: &CStr) -> Result<()> {
    let (source, at, kind) = (source.as_ptr(), at.as_ptr(), kind.as_ptr());
    call!(MOUNT, source, at, kind, flags, options.as_ptr()).map(drop)
}

pub const MOUNT_READ_ONLY: usize = 1;
pub const MOUNT_NO_SUID: usize = 2;
pub const MOUNT_NO_DEV: usize = 4;
pub const MOUNT_NO_EXEC: usize = 8;
pub const MOUNT_REMOUNT: usize = 32;
/// With [`MOUNT_REMOUNT`]: of this mount, and not of its file system.
pub const MOUNT_BIND: usize = 4096;
pub const MOUNT_MOVE: usize = 8192;

/// Makes a folder; no matter if it is there.
pub fn make_folder(path: &CStr, mode: u32) -> Result<()> {
    match call!(MKDIRAT, HERE, path.as_ptr(), mode) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a folder in a folder; no matter if it is there.
pub fn make_folder_in(folder: &Fd, name: &CStr, mode: u32) -> Result<()> {
    match call!(MKDIRAT, folder.0, name.as_ptr(), mode) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a symbolic link in a folder.
pub fn make_link_in(folder: &Fd, name: &CStr, to: &CStr) -> Result<()> {
    call!(SYMLINKAT, to.as_ptr(), folder.0, name.as_ptr()).map(drop)
}

/// Removes what is not a folder from a folder.
pub fn remove_in(folder: &Fd, name: &CStr) -> Result<()> {
    call!(UNLINKAT, folder.0, name.as_ptr(), 0).map(drop)
}

/// Where a link leads; the length of that.
pub fn read_link_in(folder: &Fd, name: &CStr, into: &mut [u8]) -> Result<usize> {
    let (at, length) = (into.as_mut_ptr(), into.len());
    call!(READLINKAT, folder.0, name.as_ptr(), at, length)
}

/// Changes the permissions of an open file.
pub fn set_mode(file: &Fd, mode: u32) -> Result<()> {
    call!(FCHMOD, file.0, mode).map(drop)
}

/// Gives an entry of a folder another user and group; a link itself.
pub fn set_owner(folder: &Fd, name: &CStr, user: u32, group: u32) -> Result<()> {
    const NO_FOLLOW: usize = 0x100;
    call!(FCHOWNAT, folder.0, name.as_ptr(), user, group, NO_FOLLOW).map(drop)
}

/// Type, permissions and size of an entry of a folder, and the number of its file system and its own. It
/// follows no link.
pub struct Stat {
    pub mode: u32,
    pub size: u64,
}

impl Stat {
    pub const KIND: u32 = 0o170_000;
    pub const FILE: u32 = 0o100_000;
    pub const FOLDER: u32 = 0o40_000;
    pub const LINK: u32 = 0o120_000;

    pub fn of(folder: &Fd, name: &CStr) -> Result<Stat> {
        const NO_FOLLOW: usize = 0x100;
        // struct stat of x86-64: the mode is at 24, the size at 48.
        let mut bytes = [0_u8; 144];
        call!(
            FSTATAT,
            folder.0,
            name.as_ptr(),
            bytes.as_mut_ptr(),
            NO_FOLLOW
        )?;
        Ok(Stat::read(&bytes))
    }

    /// Of what a path leads to, through links.
    pub fn of_path(path: &CStr) -> Result<Stat> {
        let mut bytes = [0_u8; 144];
        call!(FSTATAT, HERE, path.as_ptr(), bytes.as_mut_ptr(), 0)?;
        Ok(Stat::read(&bytes))
    }

    fn read(bytes: &[u8; 144]) -> Stat {
        let mode = bytes[24..].first_chunk().copied().unwrap_or_default();
        let size = bytes[48..].first_chunk().copied().unwrap_or_default();
        Stat {
            mode: u32::from_le_bytes(mode),
            size: u64::from_le_bytes(size),
        }
    }
}

/// Entries of a folder, in the kernel's form (getdents64(2)); how many bytes.
pub fn entries(folder: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(GETDENTS, folder.0, into.as_mut_ptr(), into.len())
}

pub fn change_folder(path: &CStr) -> Result<()> {
    call!(CHDIR, path.as_ptr()).map(drop)
}

pub fn change_root(path: &CStr) -> Result<()> {
    call!(CHROOT, path.as_ptr()).map(drop)
}

pub fn set_hostname(name: &[u8]) -> Result<()> {
    call!(SETHOSTNAME, name.as_ptr(), name.len()).map(drop)
}

/// A packet socket of one interface, for frames of one EtherType.
pub fn packet_socket() -> Result<Fd> {
    const FAMILY: usize = 17;
    const DATAGRAMS: usize = 2;
    // Without a protocol nothing comes before it is bound.
    fd(call!(
        SOCKET,
        FAMILY,
        DATAGRAMS | CLOSE_ON_EXEC as usize | NONBLOCK as usize,
        0
    ))
}

/// A socket for requests about the network (rtnetlink(7)).
pub fn netlink_socket() -> Result<Fd> {
    const FAMILY: usize = 16;
    const RAW: usize = 3;
    fd(call!(SOCKET, FAMILY, RAW | CLOSE_ON_EXEC as usize, 0))
}

/// The link-layer address of a peer on an interface (packet(7)).
pub fn packet_address(interface: i32, ether_type: u16, mac: [u8; 6]) -> [u8; 20] {
    let mut address = [0; 20];
    address[0] = 17;
    address[2..4].copy_from_slice(&ether_type.to_be_bytes());
    address[4..8].copy_from_slice(&interface.to_le_bytes());
    address[11] = 6;
    address[12..18].copy_from_slice(&mac);
    address
}

pub fn bind(socket: &Fd, address: &[u8; 20]) -> Result<()> {
    call!(BIND, socket.0, address.as_ptr(), address.len()).map(drop)
}

pub fn send(socket: &Fd, bytes: &[u8], to: &[u8; 20]) -> Result<()> {
    let (at, length) = (bytes.as_ptr(), bytes.len());
    call!(SENDTO, socket.0, at, length, 0, to.as_ptr(), to.len()).map(drop)
}

pub fn receive(socket: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(RECVFROM, socket.0, into.as_mut_ptr(), into.len(), 0, 0, 0)
}

/// Lets so many bytes wait in a socket for being received (SO_RCVBUFFORCE).
pub fn set_receive_buffer(socket: &Fd, bytes: i32) {
    let bytes = bytes.to_le_bytes();
    let _ = call!(SETSOCKOPT, socket.0, 1, 33, bytes.as_ptr(), bytes.len());
}

/// Has a socket take only what comes in by one interface (SO_ATTACH_FILTER, bpf(4)).
pub fn take_only_from(socket: &Fd, interface: i32) -> Result<()> {
    /// Where a filter finds the interface (SKF_AD_OFF, SKF_AD_IFINDEX).
    const INTERFACE: u32 = 0xffff_f008;
    let instruction = |code: u16, is_not: u8, value: u32| {
        let [a, b] = code.to_le_bytes();
        let [c, d, e, f] = value.to_le_bytes();
        [a, b, 0, is_not, c, d, e, f]
    };
    let program = [
        instruction(0x20, 0, INTERFACE),
        instruction(0x15, 1, interface.unsigned_abs()),
        instruction(0x06, 0, u32::MAX),
        instruction(0x06, 0, 0),
    ];
    // struct sock_fprog: how many instructions, and where they are.
    let described = [program.len(), program.as_ptr() as usize];
    let (at, length) = (described.as_ptr(), size_of_val(&described));
    call!(SETSOCKOPT, socket.0, 1, 26, at, length).map(drop)
}

/// A request about an interface (netdevice(7)): its name, and 24 bytes.
pub struct InterfaceRequest(pub [u8; 40]);

impl InterfaceRequest {
    pub const GET_NAME: usize = 0x8910;
    pub const SET_FLAGS: usize = 0x8914;
    pub const SET_NAME: usize = 0x8923;
    pub const GET_MAC: usize = 0x8927;

    pub fn ask(&mut self, socket: &Fd, request: usize) -> Result<()> {
        call!(IOCTL, socket.0, request, self.0.as_mut_ptr()).map(drop)
    }
}

/// A copy of this process: none in the copy, else its number.
pub fn fork() -> Result<Option<i32>> {
    let pid = call!(FORK)?;
    Ok((pid != 0).then_some(pid as i32))
}

/// Replaces this process by a program; returns only why that did not happen. Both lists end with a null.
pub fn execute(path: &CStr, words: &[*const c_char], variables: &[*const c_char]) -> Errno {
    let is_ended = |list: &[*const c_char]| list.last().is_some_and(|last| last.is_null());
    if !is_ended(words) || !is_ended(variables) {
        return Errno::INVAL;
    }
    let (words, variables) = (words.as_ptr(), variables.as_ptr());
    match call!(EXECVE, path.as_ptr(), words, variables) {
        Ok(_) => Errno(0),
        Err(error) => error,
    }
}

/// The next child that has ended, with its status as wait(2) has it. Waits for one, if there are any
/// children, only if that is said.
pub fn wait(patiently: bool) -> Option<(i32, i32)> {
    let no_hang = usize::from(!patiently);
    let mut status = [0_i32];
    let pid = call!(WAIT4, -1_isize, status.as_mut_ptr(), no_hang, 0).ok()?;
    (pid != 0).then_some((pid as i32, status[0]))
}

/// Sends a signal to a process; -1: to all but this one.
pub fn kill(pid: i32, signal: u8) -> Result<()> {
    call!(KILL, pid as isize, signal).map(drop)
}

const CHILD: u64 = 1 << (17 - 1);

/// Holds back the signal of a child's end, and gives a descriptor to read it from.
pub fn watch_children() -> Result<Fd> {
    let set = [CHILD];
    call!(RT_SIGPROCMASK, 0, set.as_ptr(), 0, 8)?;
    fd(call!(
        SIGNALFD,
        -1_isize,
        set.as_ptr(),
        8,
        CLOSE_ON_EXEC | NONBLOCK
    ))
}

/// Lets all signals through, for a program to come.
pub fn release_signals() {
    let set = [0_u64];
    let _ = call!(RT_SIGPROCMASK, 2, set.as_ptr(), 0, 8);
}

pub fn new_session() -> Result<()> {
    call!(SETSID).map(drop)
}

/// A new terminal, and its number, whose other end can be opened.
pub fn open_terminal() -> Result<(Fd, u32)> {
    let master = open_nonblocking(c"/dev/pts/ptmx")?;
    let unlocked = [0_i32];
    call!(IOCTL, master.0, 0x4004_5431, unlocked.as_ptr())?;
    let mut number = [0_u32];
    call!(IOCTL, master.0, 0x8004_5430_u32, number.as_mut_ptr())?;
    Ok((master, number[0]))
}

/// Makes `terminal` the one of this session (TIOCSCTTY).
pub fn control_terminal(terminal: &Fd) -> Result<()> {
    call!(IOCTL, terminal.0, 0x540e, 0).map(drop)
}

/// Sets the size of a terminal (TIOCSWINSZ).
pub fn set_size(terminal: &Fd, rows: u16, columns: u16) {
    let size = [rows, columns, 0, 0];
    let _ = call!(IOCTL, terminal.0, 0x5414, size.as_ptr());
}

pub fn set_groups(groups: &[u32]) -> Result<()> {
    call!(SETGROUPS, groups.len(), groups.as_ptr()).map(drop)
}

pub fn set_group(group: u32) -> Result<()> {
    call!(SETRESGID, group, group, group).map(drop)
}

pub fn set_user(user: u32) -> Result<()> {
    call!(SETRESUID, user, user, user).map(drop)
}

/// Permissions that new files do not get.
pub fn set_umask(mask: u32) {
    let _ = call!(UMASK, mask & 0o777);
}

/// The soft and the hard limit of a resource, by its number.
pub fn set_limit(resource: u8, soft: u64, hard: u64) -> Result<()> {
    let limits = [soft, hard];
    call!(PRLIMIT, 0, resource, limits.as_ptr(), 0).map(drop)
}

/// Takes every capability but these out of the bounding set, and keeps those that are permitted across a change of
/// user.
pub fn bound_capabilities(kept: u64) -> Result<()> {
    const DROP: usize = 24;
    const KEEP: usize = 8;
    for number in 0..u64::BITS {
        if kept >> number & 1 == 0 {
            match call!(PRCTL, DROP, number, 0, 0, 0) {
                // Past the last one that this kernel knows.
                Err(Errno::INVAL) => break,
                other => other?,
            };
        }
    }
    call!(PRCTL, KEEP, 1, 0, 0, 0).map(drop)
}

/// One bit for each number.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> Result<()> {
    // _LINUX_CAPABILITY_VERSION_3, and this process.
    let header = [0x2008_0522_u32, 0];
    let low = |set: u64| set as u32;
    let high = |set: u64| (set >> 32) as u32;
    let sets = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    call!(CAPSET, header.as_ptr(), sets.as_ptr()).map(drop)
}

/// The capabilities that a program has which is not set-user-ID.
pub fn set_ambient(set: u64) -> Result<()> {
    const AMBIENT: usize = 47;
    const RAISE: usize = 2;
    for number in 0..u64::BITS {
        if set >> number & 1 == 1 {
            call!(PRCTL, AMBIENT, RAISE, number, 0, 0)?;
        }
    }
    Ok(())
}

/// From here on no program gives this process more than it has (no_new_privs).
pub fn gain_nothing() -> Result<()> {
    const NO_NEW_PRIVILEGES: usize = 38;
    call!(PRCTL, NO_NEW_PRIVILEGES, 1, 0, 0, 0).map(drop)
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
