//! The system calls of Linux on x86-64, and the two instructions for ports, that this program is made of;
//! all of its unsafe code.

use core::arch::{asm, naked_asm};
use core::ffi::CStr;
use core::slice;

const WRITE: usize = 1;
const OPEN: usize = 2;
const PREAD: usize = 17;
const PWRITE: usize = 18;
const SYNC: usize = 162;
const REBOOT: usize = 169;
const IOPERM: usize = 173;
const EXIT_GROUP: usize = 231;

const READ_AND_WRITE: usize = 2;
const CLOSE_ON_EXEC: usize = 0o2_000_000;

/// The number of an error (errno).
#[derive(Clone, Copy)]
pub struct Errno(pub usize);

/// An open file.
pub struct File(usize);

/// First code of the process: passes the stack that the kernel made to [`super::start`].
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    naked_asm!(
        "mov rdi, rsp",
        "and rsp, -16",
        "call {start}",
        "ud2",
        start = sym start,
    )
}

/// `stack` is what the kernel passes to a new process: the number of arguments, then a pointer to each.
extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: the kernel has put the number of arguments there (System V ABI for x86-64, 3.4.1).
    let count = unsafe { *stack };
    let argument = |index: usize| {
        if index >= count {
            return None;
        }
        // SAFETY: `count` pointers follow.
        let text = unsafe { *stack.add(index).add(1) } as *const u8;
        // SAFETY: each to a text with a zero byte at its end; it stays for as long as the process does.
        Some(unsafe { bytes_of(text) })
    };
    super::main(argument)
}

/// The bytes before the zero byte at the end of `text`.
///
/// # Safety
/// There is one, and all of it stays as it is.
unsafe fn bytes_of(text: *const u8) -> &'static [u8] {
    let mut len = 0;
    // SAFETY: up to the zero byte, all of it is there. Volatile, or the compiler would make a call of the C
    // library's strlen of it, which there is none of.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len = len.wrapping_add(1);
    }
    // SAFETY: as above.
    unsafe { slice::from_raw_parts(text, len) }
}

/// A system call that touches no memory of this program but what its caller says it may.
///
/// # Safety
/// As the call with this number asks.
unsafe fn call(
    number: usize,
    first: usize,
    second: usize,
    third: usize,
    fourth: usize,
) -> Result<usize, Errno> {
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
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if result < 0 {
        return Err(Errno(result.unsigned_abs()));
    }
    Ok(result.unsigned_abs())
}

/// Opens a file for reading and writing.
pub fn open(path: &CStr) -> Result<File, Errno> {
    let flags = READ_AND_WRITE | CLOSE_ON_EXEC;
    // SAFETY: `path` ends with a zero byte.
    let number = unsafe { call(OPEN, path.as_ptr() as usize, flags, 0, 0) };
    number.map(File)
}

impl File {
    /// The byte at `offset`.
    pub fn read_byte(&self, offset: u16) -> Result<u8, Errno> {
        let mut byte = 0u8;
        let place = (&raw mut byte) as usize;
        // SAFETY: the kernel writes one byte, which is there.
        match unsafe { call(PREAD, self.0, place, 1, usize::from(offset)) } {
            Ok(1) => Ok(byte),
            Ok(_) => Err(Errno(0)),
            Err(error) => Err(error),
        }
    }

    /// Writes the byte at `offset`.
    pub fn write_byte(&self, offset: u16, byte: u8) -> Result<(), Errno> {
        let place = (&raw const byte) as usize;
        // SAFETY: the kernel reads one byte, which is there.
        match unsafe { call(PWRITE, self.0, place, 1, usize::from(offset)) } {
            Ok(1) => Ok(()),
            Ok(_) => Err(Errno(0)),
            Err(error) => Err(error),
        }
    }
}

/// Leave to use this port, and no other, by [`read_port`] and [`write_port`].
pub struct Port(u16);

impl Port {
    /// Asks the kernel for it.
    pub fn ask(port: u16) -> Result<Port, Errno> {
        // SAFETY: it touches no memory.
        let allowed = unsafe { call(IOPERM, usize::from(port), 1, 1, 0) };
        allowed.map(|_| Port(port))
    }

    /// Reads it.
    pub fn read(&self) -> u8 {
        let byte: u8;
        // SAFETY: the kernel has allowed this port; it is read without effect (docs/guests.md).
        unsafe { asm!("in al, dx", in("dx") self.0, out("al") byte, options(nomem, nostack)) };
        byte
    }

    /// Writes it.
    pub fn write(&self, byte: u8) {
        // SAFETY: the kernel has allowed this port; what is written there has no effect on memory.
        unsafe { asm!("out dx, al", in("dx") self.0, in("al") byte, options(nomem, nostack)) };
    }
}

/// Writes to standard error as much as it takes.
pub fn print(text: &[u8]) {
    // SAFETY: the kernel reads `text`.
    let _ = unsafe { call(WRITE, 2, text.as_ptr() as usize, text.len(), 0) };
}

/// Writes out what the kernel still holds of files.
pub fn sync() {
    // SAFETY: it touches no memory.
    let _ = unsafe { call(SYNC, 0, 0, 0, 0) };
}

/// Ends the machine: with this command of reboot(2).
pub fn reboot(command: usize) -> Errno {
    const MAGIC: usize = 0xfee1_dead;
    const MAGIC_2: usize = 672_274_793;
    // SAFETY: it touches no memory; both commands that this is called with have no further argument.
    match unsafe { call(REBOOT, MAGIC, MAGIC_2, command, 0) } {
        Ok(_) => Errno(0),
        Err(error) => error,
    }
}

/// Ends the process.
pub fn exit(code: u8) -> ! {
    loop {
        // SAFETY: it touches no memory, and does not return.
        let _ = unsafe { call(EXIT_GROUP, usize::from(code), 0, 0, 0) };
    }
}
