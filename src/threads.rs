//! Threads that exist before they have anything to do.
//!
//! Making a thread can fail and takes time; a [`ParkedThread`] is a thread made early, beside other work,
//! that waits for what it is to do. If starting the VM fails after all, it is dropped and
//! ends, unfiltered. Given work, it names itself, installs its filter,
//! reports ready, and works: from then on it lasts until the process ends.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{ActionError, Context};
use crate::inbox::{TaskSender, tasks};
use crate::seccomp::{self, Category};
use crate::sys::sync::atomic::{AtomicUsize, Ordering};
use crate::sys::{self, process, sync};
use crate::{exit, log};

/// Stack of a thread, in bytes: address space; only what is touched costs memory.
const STACK: usize = 256 * 1024;

/// How long the line about a filter that cannot be installed may take to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(300);

type Work = Box<dyn FnOnce() + Send>;

/// A thread without work.
#[derive(Debug)]
pub struct ParkedThread {
    work: TaskSender<Work>,
    thread: JoinHandle<()>,
}

/// Counts threads down to ready and wakes the one that waits for them.
#[derive(Debug)]
pub struct ReadyLatch {
    missing: AtomicUsize,
    waiter: sync::thread::Thread,
}

impl ReadyLatch {
    /// For `count` threads; the calling thread will wait for them.
    pub fn of(count: usize) -> Arc<Self> {
        Arc::new(ReadyLatch {
            missing: AtomicUsize::new(count),
            waiter: sync::thread::current(),
        })
    }

    /// A thread is ready.
    pub fn report(&self) {
        if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.waiter.unpark();
        }
    }

    /// Returns once all threads are ready. They always get there: what they do before is to
    /// install a filter, and one that cannot ends the process.
    pub fn wait(&self) {
        while self.missing.load(Ordering::Acquire) > 0 {
            sync::thread::park();
        }
    }
}

/// Makes a thread called `name` (at most 15 bytes are shown by tools) that waits for work.
///
/// # Errors
/// When the host's limits do not allow another thread.
pub fn parked(name: String) -> Result<ParkedThread, ActionError> {
    let (work, orders) = tasks::<Work>(2);
    let body = move || {
        while let Some(work) = orders.receive() {
            work();
        }
    };
    let made = thread::Builder::new()
        .name(name.clone())
        .stack_size(STACK)
        .spawn(body);
    let thread = made.context(format_args!(
        "Cannot create the thread `{name}` (a limit on processes or memory?)"
    ))?;
    Ok(ParkedThread { work, thread })
}

impl ParkedThread {
    /// Lets the thread work something out beside the caller, while it has no other work; the
    /// answer comes through the channel.
    pub fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Receiver<T> {
        let (answer, receiver) = sync_channel(1);
        // There is room for one question and the work; if there was not, the receiver would find the
        // channel closed.
        let _ = self.work.send(Box::new(move || {
            let _ = answer.try_send(question());
        }));
        receiver
    }

    /// Gives the thread its work; it installs its filter later, by itself.
    pub fn start_unfiltered(self, work: impl FnOnce() + Send + 'static) {
        let latch = ReadyLatch::of(1);
        let _ = self.start(None, &latch, work);
    }

    /// Gives the thread its work, to be done behind the filter of `category` (none when the
    /// command line said so), after it has reported to `latch`.
    pub fn start<T: 'static>(
        self,
        category: Option<Category>,
        latch: &Arc<ReadyLatch>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<()> {
        self.start_entered(category, latch, move || work)
    }

    /// As [`ParkedThread::start`], with what `enter` returns as the work: `enter` itself runs on the
    /// thread before its filter is installed.
    pub fn start_entered<W: FnOnce() -> T, T: 'static>(
        self,
        category: Option<Category>,
        latch: &Arc<ReadyLatch>,
        enter: impl FnOnce() -> W + Send + 'static,
    ) -> JoinHandle<()> {
        let latch = Arc::clone(latch);
        let filtered = move || {
            if let Some(name) = thread::current().name() {
                sys::thread::set_name(name);
            }
            let work = enter();
            filter_or_end(category);
            latch.report();
            // Neither is what it owned taken apart nor does the thread end: no filter has the
            // calls for that.
            let _kept = work();
            loop {
                thread::park();
            }
        };
        // There is room, and the thread lasts as long as this sender.
        let _ = self.work.send(Box::new(filtered));
        self.thread
    }
}

/// Installs the calling thread's filter; a host without filters is no place to run guests.
pub fn filter_or_end(category: Option<Category>) {
    if let Some(category) = category
        && let Err(error) = seccomp::install(category)
    {
        crate::error!("{}", log::chain(&error));
        log::flush(LOG_PATIENCE);
        process::exit(exit::ERROR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sync::scheduled::{explore, spawn};
    use std::sync::atomic::AtomicBool;

    #[test]
    fn parked_when_dropped_ends_its_thread() {
        let ParkedThread { work, thread } = parked("mf-idle".into()).unwrap();
        drop(work);
        thread.join().unwrap();
    }

    #[test]
    fn latch_when_all_have_work_returns() {
        static DONE: AtomicBool = AtomicBool::new(false);
        let latch = ReadyLatch::of(2);
        for n in 0..2 {
            let thread = parked(format!("mf-{n}")).unwrap();
            let _ = thread.start(None, &latch, || DONE.store(true, Ordering::Release));
        }
        latch.wait();
    }

    #[test]
    fn latch_when_threads_report_in_any_order_of_steps_is_waited_for_to_the_last() {
        explore(|| {
            let latch = ReadyLatch::of(3);
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let latch = Arc::clone(&latch);
                    spawn("reporter", move || latch.report())
                })
                .collect();
            latch.wait();
            assert_eq!(latch.missing.load(Ordering::Acquire), 0);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}
