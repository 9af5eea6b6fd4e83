//! A bounded queue for a thread that waits for nothing else.
//!
//! The standard library's channel wakes its receiver while it holds a lock that the receiver takes
//! next: on one processor that is two more switches for each message, and a start sends many. Here the
//! receiver is woken when the lock is free.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError};

use crate::sys::sync::thread::{self, Thread};
use crate::sys::sync::{Mutex, MutexGuard};

/// The sending end. When it goes, the receiver gets what is left, and then the end.
pub struct TaskSender<T>(Arc<Shared<T>>);

/// The receiving end: owned by one thread.
pub struct TaskReceiver<T>(Arc<Shared<T>>);

struct Shared<T> {
    limit: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    waiting: VecDeque<T>,
    /// The receiver, while it waits.
    receiver: Option<Thread>,
    is_closed: bool,
}

/// Makes a queue for at most `limit` tasks that wait.
pub fn tasks<T>(limit: usize) -> (TaskSender<T>, TaskReceiver<T>) {
    let shared = Arc::new(Shared {
        limit,
        state: Mutex::new(State {
            waiting: VecDeque::with_capacity(limit),
            receiver: None,
            is_closed: false,
        }),
    });
    (TaskSender(Arc::clone(&shared)), TaskReceiver(shared))
}

impl<T> fmt::Debug for TaskSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TaskSender")
    }
}

impl<T> fmt::Debug for TaskReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TaskReceiver")
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes the receiver.
    fn change<R>(&self, change: impl FnOnce(&mut State<T>) -> R) -> R {
        let mut state = self.lock();
        let result = change(&mut state);
        let receiver = state.receiver.take();
        drop(state);
        if let Some(receiver) = receiver {
            receiver.unpark();
        }
        result
    }
}

impl<T> TaskSender<T> {
    /// Gives the receiver `task`. Never waits.
    ///
    /// # Errors
    /// The task, when the queue is full.
    pub fn send(&self, task: T) -> Result<(), T> {
        self.0.change(|state| {
            if state.waiting.len() >= self.0.limit {
                return Err(task);
            }
            state.waiting.push_back(task);
            Ok(())
        })
    }
}

impl<T> Drop for TaskSender<T> {
    fn drop(&mut self) {
        self.0.change(|state| state.is_closed = true);
    }
}

impl<T> TaskReceiver<T> {
    /// The next task, when there is one; none when there will be no more.
    pub fn receive(&self) -> Option<T> {
        loop {
            let mut state = self.0.lock();
            if let Some(task) = state.waiting.pop_front() {
                return Some(task);
            }
            if state.is_closed {
                return None;
            }
            state.receiver = Some(thread::current());
            drop(state);
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sync::scheduled::{explore, spawn, yield_now};
    use std::sync::Barrier;
    use std::thread;

    #[test]
    fn tasks_when_sent_from_another_thread_arrive_in_order_and_then_the_end() {
        let (sender, receiver) = tasks(1000);
        let sending = thread::spawn(move || {
            for n in 0..10_000 {
                while sender.send(n).is_err() {
                    thread::yield_now();
                }
            }
        });
        for n in 0..10_000 {
            assert_eq!(receiver.receive(), Some(n));
        }
        assert_eq!(receiver.receive(), None);
        sending.join().unwrap();
    }

    #[test]
    fn send_when_full_gives_the_task_back() {
        let (sender, receiver) = tasks(2);
        assert_eq!((sender.send('a'), sender.send('b')), (Ok(()), Ok(())));
        assert_eq!(sender.send('c'), Err('c'));
        assert_eq!(receiver.receive(), Some('a'));
        assert_eq!(sender.send('c'), Ok(()));
        drop(sender);
        assert_eq!(receiver.receive(), Some('b'));
        assert_eq!((receiver.receive(), receiver.receive()), (Some('c'), None));
    }

    #[test]
    fn receiver_when_it_waits_is_woken_by_a_task_and_by_the_end() {
        let (sender, receiver) = tasks(1);
        let begun = Arc::new(Barrier::new(2));
        let at = Arc::clone(&begun);
        let receiving = thread::spawn(move || {
            at.wait();
            (receiver.receive(), receiver.receive())
        });
        begun.wait();
        sender.send(7).unwrap();
        drop(sender);
        assert_eq!(receiving.join().unwrap(), (Some(7), None));
    }

    #[test]
    fn receiver_when_tasks_come_in_any_order_of_steps_gets_each_and_then_the_end() {
        explore(|| {
            let (sender, receiver) = tasks(2);
            let sending = spawn("sender", move || {
                for n in 0..5 {
                    let mut task = n;
                    while let Err(back) = sender.send(task) {
                        task = back;
                        yield_now();
                    }
                }
            });
            for n in 0..5 {
                assert_eq!(receiver.receive(), Some(n));
            }
            assert_eq!(receiver.receive(), None);
            sending.join().unwrap();
        });
    }
}
