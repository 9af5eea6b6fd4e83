//! The log thread: carries lines from the pipe that all threads write them into to their place.
//!
//! It waits for nothing but the pipe, its place and a new place. A place that takes nothing fills
//! the pipe, and what does not fit there any more is lost and counted. Only a place that hangs in
//! a write (FUSE, NFS) holds the thread itself, and no other thread.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::count_lost;
use crate::sys::fd::{self, Interest};

/// Bytes moved at once: at most PIPE_BUF, so that a pipe that has room takes them all.
const CHUNK: usize = 4096;
/// How long a place may take nothing while another one waits, in milliseconds.
const LAST_PATIENCE: u32 = 100;

/// What lines go through, once there is a log thread.
static PIPE: OnceLock<Pipe> = OnceLock::new();
/// Bytes put into the pipe, and bytes that the log thread has written or given up.
static SENT: AtomicU64 = AtomicU64::new(0);
static WRITTEN: Done = Done(AtomicU64::new(0));
/// The thread that waits for that, if one does.
static WAITER: Mutex<Option<Thread>> = Mutex::new(None);
static IS_WAITED_FOR: AtomicBool = AtomicBool::new(false);

static IS_REDIRECTED: AtomicBool = AtomicBool::new(false);

/// Bytes that a writer has dealt with.
#[derive(Debug)]
struct Done(AtomicU64);

#[derive(Debug)]
struct Pipe {
    writer: File,
    /// A place that the log thread has not taken up yet.
    next: Mutex<Option<Next>>,
    /// Rung when there is one.
    changed: EventFd,
}

/// Where lines go from some byte of the pipe on.
#[derive(Debug)]
struct Next {
    place: File,
    from: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process, so a poisoned lock is never seen.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the pipe; lines go into it from now on, and wait there for the thread that runs the
/// [`Writer`]. It may be made once in a process.
///
/// # Errors
/// When the host has no descriptor left.
pub fn start() -> io::Result<Writer> {
    let (reader, writer) = fd::pipe()?;
    let pipe = Pipe {
        writer,
        next: Mutex::new(None),
        changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
    };
    let standard = fd::duplicate(fd::STDOUT).ok();
    if PIPE.set(pipe).is_err() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    Ok(Writer::new(reader, standard, &WRITTEN))
}

/// Writes a whole line; whether it was taken.
pub(super) fn deliver(line: &[u8]) -> bool {
    let Some(pipe) = PIPE.get() else {
        return fd::write_now(fd::STDOUT, line);
    };
    let taken = fd::write(pipe.writer.as_raw_fd(), line).is_ok_and(|n| n == line.len());
    if taken {
        SENT.fetch_add(line.len() as u64, Ordering::SeqCst);
    }
    taken
}

/// Lines from now on go to `place`; those before to the place before, as far as it takes them.
pub fn redirect(place: File) {
    if let Some(pipe) = PIPE.get() {
        let from = SENT.load(Ordering::SeqCst);
        *lock(&pipe.next) = Some(Next { place, from });
        IS_REDIRECTED.store(true, Ordering::SeqCst);
        // It only fails when it is rung already.
        let _ = pipe.changed.write(1);
    }
}

/// Whether lines go elsewhere than to standard output.
pub fn is_redirected() -> bool {
    IS_REDIRECTED.load(Ordering::SeqCst)
}

/// Waits until all lines that the calling thread has logged are in their place, or lost, for at
/// most `limit`; whether they are. One thread at a time may wait.
pub fn flush(limit: Duration) -> bool {
    let wanted = SENT.load(Ordering::SeqCst);
    if WRITTEN.0.load(Ordering::SeqCst) >= wanted {
        return true;
    }
    let deadline = Instant::now() + limit;
    *lock(&WAITER) = Some(thread::current());
    IS_WAITED_FOR.store(true, Ordering::SeqCst);
    let done = loop {
        if WRITTEN.0.load(Ordering::SeqCst) >= wanted {
            break true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break false;
        }
        thread::park_timeout(left);
    };
    IS_WAITED_FOR.store(false, Ordering::SeqCst);
    done
}

impl Done {
    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::SeqCst);
        if IS_WAITED_FOR.load(Ordering::SeqCst)
            && let Some(waiter) = &*lock(&WAITER)
        {
            waiter.unpark();
        }
    }
}

/// The log thread's own.
#[derive(Debug)]
pub struct Writer {
    pipe: File,
    done: &'static Done,
    /// None when standard output was closed from the start.
    place: Option<File>,
    /// The place after it.
    next: Option<Next>,
    bytes: Box<[u8]>,
    /// What of `bytes` waits to be written.
    from: usize,
    to: usize,
    /// Bytes of the pipe before `from`.
    passed: u64,
    /// The last of them ended a line.
    at_line: bool,
}

impl Writer {
    fn new(pipe: File, place: Option<File>, done: &'static Done) -> Self {
        Writer {
            pipe,
            done,
            place,
            next: None,
            bytes: vec![0; CHUNK].into_boxed_slice(),
            from: 0,
            to: 0,
            passed: 0,
            at_line: true,
        }
    }

    /// Carries lines for as long as the process lasts.
    ///
    /// # Errors
    /// When the host cannot wait for descriptors (it is out of memory).
    pub fn run(mut self) -> io::Result<()> {
        let Some(shared) = PIPE.get() else {
            return Ok(());
        };
        loop {
            let mut interests = [self.interest(), Interest::read(shared.changed.as_raw_fd())];
            let patience = self.next.is_some().then_some(LAST_PATIENCE);
            fd::wait(&mut interests, patience)?;
            let [source, changed] = interests;
            if changed.is_ready() {
                let _ = shared.changed.read();
                if let Some(next) = lock(&shared.next).take() {
                    self.next = Some(next);
                }
            }
            if source.is_ready() {
                self.step();
            } else if !changed.is_ready() {
                // The place has had its time; another one waits.
                self.give_up(self.limit());
            }
            self.switch();
        }
    }

    const fn is_holding(&self) -> bool {
        self.from < self.to
    }

    fn interest(&self) -> Interest {
        match &self.place {
            Some(place) if self.is_holding() => Interest::write(place.as_raw_fd()),
            _ => Interest::read(self.pipe.as_raw_fd()),
        }
    }

    /// One read or one write, whichever it is at.
    fn step(&mut self) {
        if !self.is_holding() {
            if let Ok(n) = self.pipe.read(&mut self.bytes[..]) {
                (self.from, self.to) = (0, n);
            }
            // Most places can take it at once; one that cannot is waited for.
            if !self.place.as_ref().is_some_and(is_ready) {
                if self.place.is_none() {
                    self.give_up(self.to);
                }
                return;
            }
        }
        let limit = self.limit();
        let Some(held) = self.bytes.get(self.from..limit) else {
            return;
        };
        let Some(place) = &mut self.place else {
            return;
        };
        match place.write(held) {
            Ok(n) if n > 0 => self.advance(self.from.saturating_add(n)),
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // Nothing reads it, or the disk is full: these lines are lost, the next may not be.
            _ => self.give_up(limit),
        }
    }

    /// Where lines for the next place begin, in `bytes`; or the end.
    fn limit(&self) -> usize {
        let Some(next) = &self.next else {
            return self.to;
        };
        let Ok(ahead) = usize::try_from(next.from.saturating_sub(self.passed)) else {
            return self.to;
        };
        let first = self.from.saturating_add(ahead);
        let begins_line = |at: usize| match at.checked_sub(1) {
            Some(before) if at > self.from => self.bytes.get(before) == Some(&b'\n'),
            _ => self.at_line,
        };
        let mut places = first..self.to;
        places.find(|at| begins_line(*at)).unwrap_or(self.to)
    }

    /// All before `to` has been dealt with.
    fn advance(&mut self, to: usize) {
        let count = to.saturating_sub(self.from);
        if let Some(last) = to.checked_sub(1).filter(|_| count > 0) {
            self.at_line = self.bytes.get(last) == Some(&b'\n');
        }
        self.from = to;
        self.passed = self.passed.saturating_add(count as u64);
        self.done.add(count);
    }

    fn give_up(&mut self, to: usize) {
        let lost = self.bytes.get(self.from..to).unwrap_or_default();
        let lines = lost.iter().filter(|byte| **byte == b'\n').count();
        count_lost(lines as u64);
        self.advance(to);
    }

    /// Takes up the next place once all lines before it have been dealt with.
    fn switch(&mut self) {
        let is_due = |next: &mut Next| self.at_line && next.from <= self.passed;
        if let Some(next) = self.next.take_if(is_due) {
            // Closing the old one may wait as a write may.
            self.place = Some(next.place);
        }
    }
}

/// Whether `place` takes something at once.
fn is_ready(place: &File) -> bool {
    let mut poll = [Interest::write(place.as_raw_fd())];
    fd::wait(&mut poll, Some(0)).is_ok() && poll.iter().any(Interest::is_ready)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Seek;
    use vmm_sys_util::tempfile::TempFile;

    /// A writer without a thread, and the end of the pipe that lines go into.
    fn writer(place: Option<File>) -> (Writer, File) {
        let (reader, lines) = fd::pipe().unwrap();
        static DONE: Done = Done(AtomicU64::new(0));
        (Writer::new(reader, place, &DONE), lines)
    }

    /// As `run` does while there is something to do.
    fn work(writer: &mut Writer) {
        // More than any of these tests needs.
        for _ in 0..1000 {
            let mut interests = [writer.interest()];
            fd::wait(&mut interests, Some(0)).unwrap();
            if interests[0].is_ready() {
                writer.step();
            } else if writer.next.is_some() && writer.is_holding() {
                writer.give_up(writer.limit());
            } else {
                break;
            }
            writer.switch();
        }
    }

    /// A file that is written at its end, wherever it was read last.
    fn file() -> File {
        let file = TempFile::new().unwrap();
        let mut options = File::options();
        options.read(true).append(true);
        options.open(file.as_path()).unwrap()
    }

    fn text(file: &mut File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn lines_when_the_place_changes_are_each_in_one() {
        for from in 0..=15 {
            let (mut first, mut second) = (file(), file());
            let (mut writer, mut lines) = writer(Some(first.try_clone().unwrap()));
            lines.write_all(b"one\ntwo\nthree\nx").unwrap();
            writer.next = Some(Next {
                place: second.try_clone().unwrap(),
                from,
            });
            work(&mut writer);
            lines.write_all(b"\nfour\n").unwrap();
            work(&mut writer);
            let (before, after) = (text(&mut first), text(&mut second));
            assert_eq!(format!("{before}{after}"), "one\ntwo\nthree\nx\nfour\n");
            assert!(
                before.is_empty() || before.ends_with('\n'),
                "{from}: {before:?}"
            );
            assert!(before.len() as u64 >= from.min(14), "{from}: {before:?}");
            assert!(after.ends_with("four\n"), "{from}: {after:?}");
        }
    }

    #[test]
    fn lines_when_the_place_takes_none_are_lost_before_the_next_place_only() {
        let (_reader, mut full) = fd::pipe().unwrap();
        while full.write(&[b'x'; 4096]).is_ok() {}
        let mut second = file();
        let (mut writer, mut lines) = writer(Some(full));
        lines.write_all(b"one\ntwo\n").unwrap();
        work(&mut writer);
        assert!(writer.is_holding());
        writer.next = Some(Next {
            place: second.try_clone().unwrap(),
            from: 8,
        });
        lines.write_all(b"three\n").unwrap();
        let before = super::super::losses().0;
        work(&mut writer);
        assert_eq!(text(&mut second), "three\n");
        assert!(super::super::losses().0 >= before + 2);
    }

    #[test]
    fn lines_when_there_is_no_place_are_lost_and_counted() {
        let (mut writer, mut lines) = writer(None);
        lines.write_all(b"one\ntwo\n").unwrap();
        let before = super::super::losses().0;
        work(&mut writer);
        assert!(!writer.is_holding());
        assert!(super::super::losses().0 >= before + 2);
    }

    /// The one test that makes this process's log thread: no other test's lines go to its place.
    #[test]
    fn flush_when_the_log_thread_runs_waits_for_its_lines() {
        let own = start().unwrap();
        assert!(start().is_err());
        let file = TempFile::new().unwrap();
        let open = |options: &mut OpenOptions| options.open(file.as_path()).unwrap();
        redirect(open(File::options().append(true)));
        // Other tests' lines go there too at any time: what reads it needs an offset of its own.
        let mut place = open(File::options().read(true));
        thread::spawn(move || own.run());
        for n in 0..100 {
            let line = format!("line {n} of the flush test\n");
            while !deliver(line.as_bytes()) {
                thread::yield_now();
            }
            assert!(flush(Duration::from_secs(120)));
            assert!(text(&mut place).contains(&line), "{n}");
        }
    }
}
