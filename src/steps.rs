//! What the files thread waits for at the moment, in words and since when: told by the code that is
//! about to wait, at whatever depth it is, and read by control, which tells clients.
//!
//! Control may give work up whose step takes too long. Work that must not have an effect after that asks:
//! [`goes_on`] on its way, and [`commits`] before the step that cannot be taken back.
//!
//! Only the files thread has a place to tell it ([`Steps::adopt`]): on any other thread
//! [`may_wait`] does nothing, and nothing is given up.

use std::cell::OnceCell;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The work under way, as both threads know it.
#[derive(Clone, Debug, Default)]
pub struct Steps(Arc<Mutex<Work>>);

#[derive(Debug, Default)]
struct Work {
    /// Which it is, or was.
    token: Option<u64>,
    step: Option<Step>,
    is_given_up: bool,
    /// What it does cannot be taken back any more.
    commits: bool,
    /// What was given up before it has begun.
    not_wanted: Vec<u64>,
}

/// Something that may take for ever where a file system does not answer.
#[derive(Clone, Debug)]
pub struct Step {
    /// As messages say it: "opening the disk `/x`".
    pub text: String,
    /// When it began, or last went on.
    pub since: Instant,
    /// How much longer than others it may take.
    pub more: Duration,
}

thread_local! {
    /// On the files thread: where its steps are told.
    static CURRENT: OnceCell<Steps> = const { OnceCell::new() };
}

fn with_current<T>(tell: impl FnOnce(&Steps) -> T) -> Option<T> {
    CURRENT.with(|current| current.get().map(tell))
}

/// What follows may wait for `text`: an operation and its file, as in "opening the disk `/x`".
pub fn may_wait(text: impl fmt::Display) {
    with_current(|steps| steps.begin(text));
}

/// Some of what was told last has been done: its time begins anew. Whether the work is still wanted.
pub fn goes_on() -> bool {
    let is_wanted = with_current(|steps| {
        let mut work = steps.lock();
        if let Some(step) = &mut work.step {
            step.since = Instant::now();
        }
        !work.is_given_up
    });
    is_wanted.unwrap_or(true)
}

/// What follows cannot be taken back. Whether the work is still wanted; it cannot be given up from then on.
pub fn commits() -> bool {
    let is_wanted = with_current(|steps| {
        let mut work = steps.lock();
        work.commits = !work.is_given_up;
        work.commits
    });
    is_wanted.unwrap_or(true)
}

/// What was told last may take `more` time than other steps.
pub fn may_take(more: Duration) {
    with_current(|steps| {
        if let Some(step) = &mut steps.lock().step {
            step.more = more;
        }
    });
}

impl Steps {
    fn lock(&self) -> MutexGuard<'_, Work> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this thread tells goes here from now on.
    pub fn adopt(&self) {
        CURRENT.with(|current| {
            let _ = current.set(self.clone());
        });
    }

    /// Work `token` begins.
    pub fn start(&self, token: u64, text: impl fmt::Display) {
        let mut work = self.lock();
        let waiting = work.not_wanted.len();
        work.not_wanted.retain(|other| *other != token);
        work.token = Some(token);
        work.is_given_up = work.not_wanted.len() < waiting;
        work.commits = false;
        drop(work);
        self.begin(text);
    }

    /// What follows may wait for `text`.
    pub fn begin(&self, text: impl fmt::Display) {
        let text = text.to_string();
        self.lock().step = Some(Step {
            text,
            since: Instant::now(),
            more: Duration::ZERO,
        });
    }

    /// Nothing is under way.
    pub fn end(&self) {
        self.lock().step = None;
    }

    /// The step under way.
    pub fn now(&self) -> Option<Step> {
        self.lock().step.clone()
    }

    /// Work `token`, which is under way or is to begin, is not wanted any more. Whether that is in time: else what it
    /// does cannot be taken back.
    pub fn give_up(&self, token: u64) -> bool {
        let mut work = self.lock();
        if work.token != Some(token) {
            work.not_wanted.push(token);
            return true;
        }
        work.is_given_up = !work.commits;
        work.is_given_up
    }

    /// The result of work `token` is known.
    pub fn forget(&self, token: u64) {
        self.lock().not_wanted.retain(|other| *other != token);
    }
}

impl Step {
    /// For how long it has been under way, or stands still.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn steps_are_told_on_the_thread_that_has_adopted_them_and_on_no_other() {
        let steps = Steps::default();
        may_wait("opening");
        assert!(steps.now().is_none());
        let its = steps.clone();
        let told = move || {
            its.adopt();
            may_wait(format_args!("opening `{}`", "/x"));
            let begun = its.now().unwrap();
            assert_eq!(
                (begun.text.as_str(), begun.more),
                ("opening `/x`", Duration::ZERO)
            );
            may_take(Duration::from_secs(7));
            while Instant::now() <= begun.since {
                thread::yield_now();
            }
            goes_on();
            let now = its.now().unwrap();
            assert!(now.since > begun.since);
            assert_eq!((now.text, now.more), (begun.text, Duration::from_secs(7)));
            may_wait("syncing");
            assert_eq!(its.now().unwrap().more, Duration::ZERO);
            its.end();
            assert!(goes_on() && its.now().is_none());
        };
        thread::spawn(told).join().unwrap();
    }

    #[test]
    fn work_when_given_up_does_not_commit_and_when_it_commits_is_not_given_up() {
        assert!(goes_on() && commits());
        let told = || {
            let steps = Steps::default();
            steps.adopt();
            steps.start(1, "one");
            assert!(goes_on() && steps.give_up(1));
            assert!(!goes_on() && !commits());
            assert!(steps.give_up(1));
            steps.start(2, "another");
            assert!(goes_on() && commits());
            assert!(!steps.give_up(2));
            assert!(goes_on() && commits());
            steps.end();
            // Its result is on the way.
            assert!(!steps.give_up(2));
            // What has not begun.
            assert!(steps.give_up(3) && steps.give_up(4));
            steps.forget(4);
            for (token, is_wanted) in [(3, false), (4, true), (3, true)] {
                steps.start(token, "yet another");
                assert_eq!([goes_on(), commits()], [is_wanted; 2]);
            }
        };
        thread::spawn(told).join().unwrap();
    }
}
