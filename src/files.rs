//! The files thread: does what may wait for a file, so that control never does.
//!
//! `open`, `stat`, `read`, `write`, `sync`, `close` and `unlink` of a path or of a passed
//! descriptor may take for ever when its file system (FUSE, NFS) does not answer. Control gives
//! such work to this thread as a [`Work`], an owned value, and goes on; the result comes back
//! through control's inbox as a [`Finished`] with the token of the work.
//!
//! [`Files`] is control's side. It knows what is under way and until when:
//! - one thing at a time, in the order of submission, at most [`QUEUE`] waiting;
//! - work that has not finished within its [`Limit`] is *overdue*: control tells the client which
//!   file did not answer in which operation, and does not use the result when it comes; work that goes
//!   step by step is given up, and finds that out at its next step, or at its first
//!   ([`Steps::give_up`]);
//! - while something is overdue, further work is refused at once.
//!
//! What is only to be closed goes the same way ([`Files::close`]): closing a file may wait too.
//!
//! The thread is made before any file is opened and lasts as long as the process. It never
//! decides anything, and never touches the machine. The log has a thread of its own
//! ([`log`](crate::log)): a log file that hangs does not stop an update of a drive, nor the other
//! way round.
//!
//! What no thread can change: a process cannot end while a FUSE request of it that the file
//! system's own process has read already is unanswered, not even by SIGKILL. The monitor calls
//! `exit_group` in time; the kernel keeps the process until that file system answers or its
//! connection is aborted (`/sys/fs/fuse/connections/N/abort`).
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod open;

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::inbox::{Outbox, TaskReceiver, TaskSender, tasks};
use crate::steps::Steps;

/// How much work may wait for the thread.
pub const QUEUE: usize = 32;

/// Something for the files thread to do. It says what it is about to wait for, step by step.
pub type Work<T> = Box<dyn FnOnce(&Steps) -> T + Send>;

/// What came of a [`Work`].
#[derive(Debug)]
pub struct Finished<T> {
    /// Given by [`Files::submit`].
    pub token: u64,
    /// What the work returned.
    pub result: T,
}

enum Job<T> {
    Work(u64, Work<T>),
    /// There is something to close.
    Close,
}

/// Why work was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The thread waits for this, for so long already.
    Hangs(String, Duration),
    /// There is no room for more.
    Full,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Hangs(text, time) => write!(
                f,
                "Not tried, because {text} has not ended for {} s. Try again when that file \
                 system answers",
                time.as_secs()
            ),
            Refused::Full => write!(
                f,
                "Not tried, because {QUEUE} file operations wait already. Try again later"
            ),
        }
    }
}

impl std::error::Error for Refused {}

/// How long work may take.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// All of it, with what waits before it.
    Whole(Duration),
    /// Each of its steps, and of what waits before it: how many it has depends on how much there is to do.
    EachStep(Duration),
    /// As long as it takes: it waits for nothing outside of this process.
    None,
}

/// Work that the thread has not finished.
#[derive(Clone, Copy, Debug)]
struct Pending {
    token: u64,
    submitted: Instant,
    limit: Limit,
    /// Its deadline has passed, and its requester was answered.
    overdue: bool,
}

/// What the thread is to drop, which closes what it owns; it looks here after each job. The number of
/// open files bounds it.
#[derive(Clone, Default)]
struct ToClose(Arc<Mutex<Vec<Box<dyn Any + Send>>>>);

impl ToClose {
    fn lock(&self) -> MutexGuard<'_, Vec<Box<dyn Any + Send>>> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ToClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToClose")
    }
}

/// Control's side of the files thread.
#[derive(Debug)]
pub struct Files<T> {
    jobs: TaskSender<Job<T>>,
    steps: Steps,
    /// Values given to the thread to be dropped, and those that it has dropped.
    closes: u64,
    closed: Arc<AtomicU64>,
    /// In the order in which they finish.
    pending: VecDeque<Pending>,
    to_close: ToClose,
    next_token: u64,
    /// Results that came after their deadline.
    late: u64,
}

/// The thread's side.
#[derive(Debug)]
pub struct FilesThread<T> {
    jobs: TaskReceiver<Job<T>>,
    steps: Steps,
    closed: Arc<AtomicU64>,
    to_close: ToClose,
    finished: Outbox<Finished<T>>,
}

/// Makes both sides; results are posted to `finished`.
pub fn files<T: Send + 'static>(finished: Outbox<Finished<T>>) -> (Files<T>, FilesThread<T>) {
    let (sender, receiver) = tasks(QUEUE);
    let steps = Steps::default();
    let closed = Arc::new(AtomicU64::new(0));
    let to_close = ToClose::default();
    let control = Files {
        jobs: sender,
        steps: steps.clone(),
        closes: 0,
        closed: Arc::clone(&closed),
        pending: VecDeque::new(),
        to_close: to_close.clone(),
        next_token: 0,
        late: 0,
    };
    let thread = FilesThread {
        jobs: receiver,
        steps,
        closed,
        to_close,
        finished,
    };
    (control, thread)
}

impl<T> FilesThread<T> {
    /// Works until [`Files`] is gone.
    pub fn run(self) {
        self.steps.adopt();
        while let Some(job) = self.jobs.receive() {
            if let Job::Work(token, work) = job {
                self.steps.start(token, "what was asked for");
                let result = work(&self.steps);
                self.steps.end();
                // Control's inbox has room for all that can be pending.
                let _ = self.finished.post(Finished { token, result });
            }
            self.close_all();
        }
    }

    fn close_all(&self) {
        loop {
            // Not held while it waits for a file.
            let Some(value) = self.to_close.lock().pop() else {
                return;
            };
            self.steps.begin("closing a file");
            drop(value);
            self.steps.end();
            self.closed.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl<T: Send + 'static> Files<T> {
    /// Gives `work` to the thread, to be finished within `limit`. The token comes back with its
    /// result.
    ///
    /// # Errors
    /// [`Refused`] while the thread hangs, or has too much to do; `work` is dropped by the thread.
    pub fn submit(&mut self, limit: Limit, work: Work<T>) -> Result<u64, Refused> {
        if let Some(refused) = self.refuses() {
            self.close(Box::new(work));
            return Err(refused);
        }
        let token = self.next_token;
        match self.jobs.send(Job::Work(token, work)) {
            Ok(()) => {
                self.next_token = token.wrapping_add(1);
                self.pending.push_back(Pending {
                    token,
                    submitted: Instant::now(),
                    limit,
                    overdue: false,
                });
                Ok(token)
            }
            Err(job) => {
                if let Job::Work(_, work) = job {
                    self.close(Box::new(work));
                }
                Err(Refused::Full)
            }
        }
    }

    /// Why further work would be refused now, if it would. To be asked before work is made, so that
    /// what clients ask for again and again while a file hangs leaves nothing behind.
    pub fn refuses(&self) -> Option<Refused> {
        if !self.pending.iter().any(|pending| pending.overdue) {
            return None;
        }
        let step = self.steps.now()?;
        let time = step.elapsed();
        Some(Refused::Hangs(step.text, time))
    }

    /// Drops `value` on the thread: what it owns may wait when it is closed.
    pub fn close(&mut self, value: Box<dyn Any + Send>) {
        self.closes = self.closes.saturating_add(1);
        let mut to_close = self.to_close.lock();
        to_close.push(value);
        let is_first = to_close.len() == 1;
        drop(to_close);
        if is_first {
            // Where the queue is full the thread has work, and looks after that.
            let _ = self.jobs.send(Job::Close);
        }
    }

    /// Work `token` has finished. Whether it did in time: otherwise its result must not be used.
    pub fn is_in_time(&mut self, token: u64) -> bool {
        self.steps.forget(token);
        let Some(at) = self.pending.iter().position(|known| known.token == token) else {
            return false;
        };
        let in_time = self.pending.remove(at).is_some_and(|known| !known.overdue);
        if !in_time {
            self.late = self.late.saturating_add(1);
        }
        in_time
    }

    /// When the next work becomes overdue, as far as can be told now: a step that goes on in time
    /// moves it.
    pub fn deadline(&self) -> Option<Instant> {
        let waited_for = self.pending.iter().filter(|pending| !pending.overdue);
        waited_for.filter_map(|pending| self.due(pending)).min()
    }

    /// When this work becomes overdue.
    fn due(&self, pending: &Pending) -> Option<Instant> {
        match pending.limit {
            Limit::Whole(limit) => pending.submitted.checked_add(limit),
            Limit::EachStep(limit) => match self.steps.now() {
                Some(step) => {
                    let since = step.since.max(pending.submitted);
                    since.checked_add(limit.saturating_add(step.more))
                }
                // Something begins or ends at this moment: to be asked again then.
                None => Instant::now().checked_add(limit),
            },
            Limit::None => None,
        }
    }

    /// The token of work whose deadline has passed, and the message for whom waits for it; each
    /// once.
    pub fn overdue(&mut self, now: Instant) -> Option<(u64, String)> {
        let is_due =
            |pending: &Pending| !pending.overdue && self.due(pending).is_some_and(|due| due <= now);
        let place = self.pending.iter().position(is_due)?;
        let pending = self.pending.get_mut(place)?;
        pending.overdue = true;
        let token = pending.token;
        let changed = match pending.limit {
            Limit::EachStep(_) if !self.steps.give_up(token) => {
                ". It was about to be completed, and will be if the file answers"
            }
            Limit::EachStep(_) | Limit::Whole(_) | Limit::None => ", and nothing was changed",
        };
        let message = match self.steps.now() {
            Some(step) => format!(
                "No answer from a file: {} has not ended for {} s{changed}. \
                 Check the file system it is on, and try again",
                step.text,
                step.elapsed().as_secs()
            ),
            // It has ended this moment; its result will not be used.
            None => format!("No answer from a file in time{changed}. Try again"),
        };
        Some((token, message))
    }

    /// How much work is under way, or waits.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether any work is under way.
    pub fn is_busy(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether the thread has nothing at all to do: it takes up work at once, and has finished it
    /// soon if that does not wait.
    pub fn is_idle(&self) -> bool {
        let closed = self.closed.load(Ordering::Acquire);
        self.pending.is_empty() && self.closes == closed
    }

    /// Results that came too late so far.
    pub fn late(&self) -> u64 {
        self.late
    }
}

impl<T> fmt::Debug for Job<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Job::Work(token, _) => write!(f, "Work({token})"),
            Job::Close => f.write_str("Close"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::{Inbox, inbox};
    use crate::sys::fd::{self, Interest};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    const LIMIT: Limit = Limit::Whole(Duration::from_secs(5));

    fn rig() -> (Files<u32>, Inbox<Finished<u32>>) {
        let (sender, events) = inbox(QUEUE * 2).unwrap();
        let (files, thread) = files(sender.outbox());
        thread::spawn(move || thread.run());
        (files, events)
    }

    fn next(events: &Inbox<Finished<u32>>) -> Finished<u32> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(event) = events.next() {
                return event;
            }
            assert!(Instant::now() < deadline, "no event");
            fd::wait(&mut [Interest::read(events.as_raw_fd())], Some(100)).unwrap();
            events.silence();
        }
    }

    /// Work that waits for what the returned sender says, and tells when it has begun.
    fn hanging(text: &'static str) -> (Work<u32>, std::sync::mpsc::Sender<u32>, Receiver<()>) {
        let (release, released) = channel();
        let (began, begun) = channel();
        let work: Work<u32> = Box::new(move |steps| {
            steps.begin(text);
            began.send(()).unwrap();
            released.recv().unwrap()
        });
        (work, release, begun)
    }

    #[test]
    fn work_when_submitted_finishes_in_order() {
        let (mut files, events) = rig();
        for n in 0..10 {
            assert_eq!(
                files.submit(LIMIT, Box::new(move |_| n * 2)),
                Ok(u64::from(n))
            );
        }
        assert!(files.is_busy() && files.deadline().is_some());
        for n in 0..10 {
            let Finished { token, result } = next(&events);
            assert_eq!((token, result), (u64::from(n), n * 2));
            assert!(files.is_in_time(token));
        }
        assert!(!files.is_busy() && files.deadline().is_none());
        assert_eq!(files.late(), 0);
    }

    #[test]
    fn work_when_overdue_is_told_once_and_refuses_more_until_it_ends() {
        let (mut files, events) = rig();
        let (work, release, begun) = hanging("opening the disk `/x`");
        let token = files.submit(LIMIT, work).unwrap();
        begun.recv().unwrap();
        let queued = files.submit(LIMIT, Box::new(|_| 1)).unwrap();
        assert_eq!(files.overdue(Instant::now()), None);
        let later = Instant::now() + Duration::from_secs(6);
        let (first, message) = files.overdue(later).unwrap();
        assert_eq!(first, token);
        assert!(
            message.starts_with("No answer from a file: opening the disk `/x` has not ended"),
            "{message}"
        );
        // What waits behind it names the same file.
        let (second, message) = files.overdue(later).unwrap();
        assert_eq!(second, queued);
        assert!(message.contains("opening the disk `/x`"), "{message}");
        assert_eq!(files.overdue(later), None);
        let refused = files.submit(LIMIT, Box::new(|_| 1)).unwrap_err();
        assert!(
            matches!(&refused, Refused::Hangs(text, _) if text == "opening the disk `/x`"),
            "{refused:?}"
        );
        release.send(7).unwrap();
        for token in [token, queued] {
            assert_eq!(next(&events).token, token);
            assert!(!files.is_in_time(token));
        }
        assert_eq!(files.late(), 2);
        let token = files.submit(LIMIT, Box::new(|_| 3)).unwrap();
        assert_eq!(next(&events).result, 3);
        assert!(files.is_in_time(token));
    }

    #[test]
    fn work_when_its_steps_are_in_time_may_take_as_long_as_it_likes() {
        const STEP: Duration = Duration::from_secs(5);
        let (mut files, events) = rig();
        let (go_on, gone_on) = channel();
        let (began, begun) = channel();
        let work: Work<u32> = Box::new(move |steps| {
            steps.begin("writing");
            began.send(steps.now().unwrap().since).unwrap();
            gone_on.recv().unwrap();
            crate::steps::goes_on();
            began.send(steps.now().unwrap().since).unwrap();
            gone_on.recv().unwrap();
            crate::steps::may_take(STEP);
            began.send(steps.now().unwrap().since).unwrap();
            gone_on.recv().unwrap();
            u32::from(crate::steps::commits())
        });
        let token = files.submit(Limit::EachStep(STEP), work).unwrap();
        let commits: Work<u32> = Box::new(|_| u32::from(crate::steps::commits()));
        let behind = files.submit(Limit::EachStep(STEP), commits).unwrap();
        let first = begun.recv().unwrap();
        assert_eq!(files.deadline(), Some(first + STEP));
        assert_eq!(files.overdue(first + STEP - Duration::from_nanos(1)), None);
        thread::sleep(Duration::from_nanos(1));
        go_on.send(()).unwrap();
        let second = begun.recv().unwrap();
        assert!(second > first);
        assert_eq!(files.overdue(first + STEP), None);
        go_on.send(()).unwrap();
        let third = begun.recv().unwrap();
        assert_eq!(files.overdue(third + STEP), None);
        let (overdue, message) = files.overdue(third + 2 * STEP).unwrap();
        assert_eq!(overdue, token);
        assert!(
            message.contains("writing has not ended") && message.contains("nothing was changed"),
            "{message}"
        );
        // What has not begun waits for its turn as long as the first goes on, and is given up with it.
        let (overdue, message) = files.overdue(third + 2 * STEP).unwrap();
        assert_eq!(overdue, behind);
        assert!(
            message.contains("writing has not ended") && message.contains("nothing was changed"),
            "{message}"
        );
        go_on.send(()).unwrap();
        for token in [token, behind] {
            let finished = next(&events);
            assert_eq!((finished.token, finished.result), (token, 0));
            assert!(!files.is_in_time(token));
        }
        let commits: Work<u32> = Box::new(|_| u32::from(crate::steps::commits()));
        files.submit(Limit::EachStep(STEP), commits).unwrap();
        assert_eq!(next(&events).result, 1);
    }

    #[test]
    fn submit_when_queue_is_full_is_refused() {
        let (mut files, events) = rig();
        let (work, release, begun) = hanging("reading");
        files.submit(Limit::None, work).unwrap();
        begun.recv().unwrap();
        for _ in 0..QUEUE {
            files.submit(LIMIT, Box::new(|_| 1)).unwrap();
        }
        assert_eq!(files.submit(LIMIT, Box::new(|_| 1)), Err(Refused::Full));
        release.send(0).unwrap();
        for _ in 0..=QUEUE {
            let token = next(&events).token;
            assert!(files.is_in_time(token));
        }
        assert!(!files.is_busy());
    }

    #[test]
    fn submit_when_many_files_are_to_be_closed_still_has_room() {
        let (mut files, events) = rig();
        let (work, release, begun) = hanging("reading");
        files.submit(Limit::None, work).unwrap();
        begun.recv().unwrap();
        for _ in 0..QUEUE * 2 {
            files.close(Box::new(()));
        }
        let token = files.submit(LIMIT, Box::new(|_| 1)).unwrap();
        release.send(0).unwrap();
        while next(&events).token != token {}
    }

    #[test]
    fn close_when_there_is_much_to_close_is_done_by_the_thread_alone() {
        static CLOSED: AtomicUsize = AtomicUsize::new(0);
        struct Value(thread::ThreadId);
        impl Drop for Value {
            fn drop(&mut self) {
                assert_ne!(thread::current().id(), self.0);
                CLOSED.fetch_add(1, Ordering::SeqCst);
            }
        }
        let (mut files, _events) = rig();
        let (work, release, begun) = hanging("reading");
        files.submit(Limit::None, work).unwrap();
        begun.recv().unwrap();
        for _ in 0..QUEUE * 2 {
            files.close(Box::new(Value(thread::current().id())));
        }
        assert_eq!(CLOSED.load(Ordering::SeqCst), 0);
        release.send(0).unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        // Control does nothing more for it.
        while CLOSED.load(Ordering::SeqCst) < QUEUE * 2 {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }
}
