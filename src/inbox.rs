//! Messages between threads: a bounded queue whose receiver can stand in an epoll set.
//!
//! An [`Inbox`] belongs to the one thread that empties it; a [`Sender`] may be cloned to any
//! number of threads. Sending never blocks and, after construction, never allocates: a full
//! inbox gives the message back. That a queue can be full is how a thread that has stopped
//! listening (a device hanging in `fsync`) is kept from holding up, or growing, any other.
//!
//! To look into an empty inbox costs one load of a flag: a thread may do so between any two pieces of
//! work. The room for messages is memory that is not touched before it is needed: control's inbox has
//! place for hundreds, and mostly holds one.
//!
//! A thread that waits for nothing but messages has a queue without an eventfd: [`mod@tasks`].
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod tasks;

pub use tasks::{TaskReceiver, TaskSender, tasks};

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use crate::sys::clock;
use crate::sys::fd::{self, Interest};
use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::sync::{Bell, Mutex, MutexGuard};

/// The receiving end: owned by one thread.
pub struct Inbox<T>(Arc<Shared<T>>);

/// The sending end: one for each thread that has something to say.
pub struct Sender<T>(Arc<Shared<T>>);

struct Shared<T> {
    /// Locked for no longer than it takes to put a message in or to take one out.
    queue: Mutex<Waiting<T>>,
    /// There is a message. Changed with the queue locked.
    is_pending: AtomicBool,
    /// For a receiver that sleeps.
    bell: Bell,
}

struct Waiting<T> {
    messages: VecDeque<T>,
    limit: usize,
    /// There is no receiver any more.
    is_closed: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inbox")
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

/// A message that could not be delivered, given back.
pub struct Undelivered<T>(pub T);

impl<T> fmt::Debug for Undelivered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Undelivered")
    }
}

/// Makes an inbox for at most `capacity` messages that wait to be fetched.
///
/// # Errors
/// When the host has no descriptor left for the eventfd.
pub fn inbox<T>(capacity: usize) -> io::Result<(Sender<T>, Inbox<T>)> {
    let shared = Arc::new(Shared {
        queue: Mutex::new(Waiting {
            messages: VecDeque::with_capacity(capacity),
            limit: capacity,
            is_closed: false,
        }),
        is_pending: AtomicBool::new(false),
        bell: Bell::new()?,
    });
    Ok((Sender(Arc::clone(&shared)), Inbox(shared)))
}

impl<T> Inbox<T> {
    /// The next message, if there is one.
    ///
    /// The bell is silenced by [`Inbox::silence`], once per wake-up and before the first
    /// `next`, so that a message sent in between rings again.
    pub fn next(&self) -> Option<T> {
        if !self.is_pending() {
            return None;
        }
        let mut queue = self.0.lock();
        let message = queue.messages.pop_front();
        if queue.messages.is_empty() {
            // The next ones go to the beginning again, which has been touched already.
            queue.messages.clear();
            self.0.is_pending.store(false, Ordering::Release);
        }
        message
    }

    /// Whether there is a message.
    pub fn is_pending(&self) -> bool {
        self.0.is_pending.load(Ordering::Acquire)
    }

    /// The next message, if one comes until `deadline`.
    pub fn next_until(&self, deadline: Instant) -> Option<T> {
        loop {
            if let Some(message) = self.next() {
                return Some(message);
            }
            let millis = clock::millis_until(deadline);
            let mut interests = [Interest::read(self.as_raw_fd())];
            if millis == 0 || fd::wait(&mut interests, Some(millis)).is_err() {
                return None;
            }
            self.silence();
        }
    }

    /// Acknowledges the wake-up. Call it before fetching, never after.
    pub fn silence(&self) {
        self.0.bell.silence();
    }
}

impl<T> AsRawFd for Inbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.bell.as_raw_fd()
    }
}

impl<T> Sender<T> {
    /// Delivers `message`, or gives it back when the inbox is full or its owner is gone.
    ///
    /// # Errors
    /// [`Undelivered`] holds the message.
    pub fn send(&self, message: T) -> Result<(), Undelivered<T>> {
        let mut queue = self.0.lock();
        if queue.is_closed || queue.messages.len() >= queue.limit {
            return Err(Undelivered(message));
        }
        queue.messages.push_back(message);
        self.0.is_pending.store(true, Ordering::Release);
        drop(queue);
        self.0.bell.ring();
        Ok(())
    }

    /// Whether a message would be delivered now.
    pub fn has_room(&self) -> bool {
        let queue = self.0.lock();
        !queue.is_closed && queue.messages.len() < queue.limit
    }

    /// The same inbox seen by a module that knows only its own kind of message.
    ///
    /// Modules below `vmm` may not name its `Event`; they say `Outbox<OwnEvent>` instead.
    pub fn outbox<U>(&self) -> Outbox<U>
    where
        T: From<U> + Send + 'static,
        U: 'static,
    {
        let sender = self.clone();
        Outbox(Arc::new(move |message| {
            sender.send(T::from(message)).is_ok()
        }))
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(Arc::clone(&self.0))
    }
}

impl<T> Drop for Inbox<T> {
    /// Frees what will not be read, also while there are senders.
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.is_closed = true;
        let left = std::mem::take(&mut queue.messages);
        // Without the lock: a message may own a sender.
        drop(queue);
        drop(left);
    }
}

/// Where a thread posts messages of type `U` without knowing who reads them.
pub struct Outbox<U>(Arc<dyn Fn(U) -> bool + Send + Sync>);

impl<U> Outbox<U> {
    /// Posts `message`; `false` when the reader's inbox is full or the reader is gone.
    pub fn post(&self, message: U) -> bool {
        (self.0)(message)
    }
}

impl<U> Clone for Outbox<U> {
    fn clone(&self) -> Self {
        Outbox(Arc::clone(&self.0))
    }
}

impl<U> fmt::Debug for Outbox<U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Outbox")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sync::scheduled::{explore, spawn, yield_now};
    use crate::sys::sync::wait_for;

    #[test]
    fn send_when_full_gives_the_message_back() {
        let (tx, rx) = inbox::<u32>(1).unwrap();
        tx.send(1).unwrap();
        let Undelivered(back) = tx.send(2).unwrap_err();
        assert_eq!(back, 2);
        assert_eq!(rx.next(), Some(1));
        tx.send(3).unwrap();
        assert_eq!(rx.next(), Some(3));
        assert_eq!(rx.next(), None);
    }

    #[test]
    fn send_when_reader_is_gone_gives_the_message_back() {
        let (tx, rx) = inbox::<u32>(1).unwrap();
        drop(rx);
        assert!(tx.send(7).is_err());
    }

    #[test]
    fn bell_when_message_arrives_after_silence_rings_again() {
        let (tx, rx) = inbox::<u32>(4).unwrap();
        tx.send(1).unwrap();
        rx.silence();
        tx.send(2).unwrap();
        assert_eq!(rx.0.bell.count(), 1);
    }

    #[test]
    fn messages_when_many_threads_send_all_arrive_without_the_bell() {
        const EACH: u32 = 10_000;
        let (tx, rx) = inbox::<u32>(16).unwrap();
        let senders: Vec<_> = (0..3)
            .map(|_| {
                let tx = tx.clone();
                std::thread::spawn(move || {
                    for n in 0..EACH {
                        let mut message = n;
                        while let Err(Undelivered(back)) = tx.send(message) {
                            message = back;
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let (mut count, mut sum) = (0, 0);
        let until = Instant::now() + std::time::Duration::from_secs(120);
        while count < 3 * EACH {
            match rx.next() {
                Some(n) => {
                    count += 1;
                    sum += u64::from(n);
                }
                None => {
                    assert!(Instant::now() < until, "a message is lost");
                    std::thread::yield_now();
                }
            }
        }
        assert_eq!(sum, 3 * (0..u64::from(EACH)).sum::<u64>());
        assert_eq!(rx.next(), None);
        for sender in senders {
            sender.join().unwrap();
        }
    }

    #[test]
    fn outbox_when_posted_converts() {
        let (tx, rx) = inbox::<u64>(4).unwrap();
        let out: Outbox<u32> = tx.outbox();
        assert!(out.post(5));
        assert_eq!(rx.next(), Some(5u64));
    }

    #[test]
    fn messages_when_senders_and_a_sleeper_meet_in_any_order_of_steps_all_arrive() {
        explore(|| {
            let (tx, rx) = inbox::<u32>(2).unwrap();
            let senders: Vec<_> = (0..2)
                .map(|from| {
                    let tx = tx.clone();
                    spawn("sender", move || {
                        for n in 0..3 {
                            let mut message = 10 * from + n;
                            while let Err(Undelivered(back)) = tx.send(message) {
                                message = back;
                                yield_now();
                            }
                        }
                    })
                })
                .collect();
            let mut last = [None; 2];
            for _ in 0..6 {
                let message = loop {
                    // As a thread does that has other work too: it sleeps only when there is no message.
                    if let Some(message) = rx.next() {
                        break message;
                    }
                    sleep_until_it_rings(&rx);
                    rx.silence();
                };
                let (from, n) = (message / 10, message % 10);
                let next = last[from as usize].map_or(0, |last| last + 1);
                assert_eq!(n, next, "messages of one sender keep their order");
                last[from as usize] = Some(n);
            }
            assert_eq!(rx.next(), None);
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    fn sleep_until_it_rings(rx: &Inbox<u32>) {
        let mut interests = [Interest::read(rx.as_raw_fd())];
        let waited = wait_for(-1, |_| {
            fd::wait(&mut interests, Some(0))?;
            Ok::<_, io::Error>(usize::from(interests[0].is_ready()))
        });
        waited.unwrap();
    }
}
