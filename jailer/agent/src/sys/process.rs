//! Processes: children, signals, terminals, and what a process may do.

use core::ffi::{CStr, c_char};

use super::{CLOSE_ON_EXEC, Errno, Fd, NONBLOCK, Result, call, fd, number, open_nonblocking};

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
