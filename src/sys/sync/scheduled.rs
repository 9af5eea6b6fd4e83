//! Runs threads in orders that shuttle chooses.
//!
//! In a run of [`explore`] all threads are one thread of the host, and one of them runs until it comes to a *point*:
//! an operation of a type of this module, a write to guest memory, an end of a thread. There shuttle decides which
//! one goes on. All data is that of the real types (a mutex of the standard library, an eventfd of the kernel), which
//! are only ever used in ways that do not wait; what waits, waits in [`block_until`], which shuttle knows of: when
//! every thread waits, the run fails, and that is how a lost wake-up is seen.
//!
//! Three kinds of order, in turn: any thread at each point (random); the one of the highest priority, with priorities
//! that change at two points or at eleven (PCT), which keeps one thread back for long. A wait for descriptors is the kernel's own
//! epoll or poll, asked again whenever a [`super::Bell`] has rung.
//!
//! What this cannot find: memory is as if each access was in one order for all threads (no weak memory), and two
//! accesses between which there is no point are one.

mod apart;
pub mod mpsc;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LockResult, PoisonError, TryLockError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use apart::{Failure, apart, at_seed};

/// Orders that a test tries unless the environment says how many, and the time after which there are no more.
const ORDERS: usize = 300;
const TIME: Duration = Duration::from_secs(3);
/// Orders with one seed.
const BATCH: usize = 20;
/// A thread that goes on for so long is in a loop without an end.
const STEPS_MAX: usize = 200_000;
const STACK: usize = 256 << 10;

/// What is waited for: the address of the thing, or one of these.
type Key = usize;
/// Any descriptor.
const BELLS: Key = 1;

thread_local! {
    /// The run that this thread of the host is in.
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Run {
    waiting: BTreeMap<Key, Vec<Waker>>,
    /// How often each has changed.
    changes: BTreeMap<Key, u64>,
    /// Tokens of parked threads, by the number of the thread.
    tokens: BTreeMap<usize, Arc<std::sync::atomic::AtomicBool>>,
}

/// Whether the calling thread is one of a run.
pub fn is_on() -> bool {
    RUN.with(|run| run.try_borrow().is_ok_and(|run| run.is_some()))
}

fn with_run<R>(with: impl FnOnce(&mut Run) -> R) -> Option<R> {
    RUN.with(|run| run.borrow_mut().as_mut().map(with))
}

/// Another thread may go on here.
pub fn point() {
    if is_on() {
        shuttle::thread::sleep(Duration::ZERO);
    }
}

/// A thread may go on that waits for `key`.
fn changed(key: Key) {
    let woken = with_run(|run| {
        *run.changes.entry(key).or_default() += 1;
        run.waiting.remove(&key)
    });
    woken.flatten().into_iter().flatten().for_each(Waker::wake);
}

/// What `attempt` gives, once it gives something; it is tried again when `key` has [`changed`].
fn block_until<R>(key: Key, mut attempt: impl FnMut() -> Option<R>) -> R {
    let changes = || with_run(|run| run.changes.get(&key).copied());
    shuttle::future::block_on(poll_fn(move |context| {
        loop {
            let before = changes();
            if let Some(result) = attempt() {
                return Poll::Ready(result);
            }
            if changes() == before {
                break;
            }
        }
        let waker = context.waker().clone();
        with_run(|run| run.waiting.entry(key).or_default().push(waker));
        Poll::Pending
    }))
}

fn key_of<T>(thing: &T) -> Key {
    std::ptr::from_ref(thing).addr()
}

/// See `plain`.
pub fn wait_for<E>(millis: i32, mut wait: impl FnMut(i32) -> Result<usize, E>) -> Result<usize, E> {
    if !is_on() {
        return wait(millis);
    }
    point();
    if millis == 0 {
        return wait(0);
    }
    block_until(BELLS, || match wait(0) {
        Ok(0) => None,
        ready => Some(ready),
    })
}

/// See `plain`.
pub fn rang() {
    changed(BELLS);
    point();
}

/// What `attempt` gives, once it gives something; it is tried again whenever something has [`rang`].
pub fn wait_until<R>(attempt: impl FnMut() -> Option<R>) -> R {
    block_until(BELLS, attempt)
}

/// Lets other threads go on first.
pub fn yield_now() {
    shuttle::thread::yield_now();
}

/// A number below `end`, of the run's.
pub fn below(end: u32) -> u32 {
    shuttle::rand::thread_rng().gen_range(0..end)
}

/// Whether it is one case of `cases`.
pub fn one_in(cases: u32) -> bool {
    below(cases) == 0
}

/// A thread of the run.
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> shuttle::thread::JoinHandle<T> {
    let builder = shuttle::thread::Builder::new().name(name.into());
    builder.spawn(body).expect("a thread of a run is made")
}

/// The thread of the run that `handle` is of, for one that unparks it.
pub fn thread_of<T>(handle: &shuttle::thread::JoinHandle<T>) -> thread::Thread {
    thread::of(handle.thread().id())
}

/// Runs `body`, the first thread of a run, in many orders. Their number is `MAYFLY_INTERLEAVINGS`, if that is set; the
/// seed is printed, and taken from `MAYFLY_SEED` if that is set. Of orders that fail, the seed is told with which
/// they come first: set both variables to have them again.
pub fn explore(body: impl Fn() + Send + Sync + 'static) {
    let variable = |name| {
        let set = std::env::var(name).ok();
        set.map(|set| set.parse::<u64>().expect("the variable is a number"))
    };
    let orders = variable("MAYFLY_INTERLEAVINGS");
    let until = orders.is_none().then(|| Instant::now() + TIME);
    let orders = orders.map_or(ORDERS, |orders| orders as usize);
    let seed = variable("MAYFLY_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 32);
    let done = apart(move || {
        let body = Arc::new(body);
        let mut done = 0;
        for batch in seed.. {
            if done >= orders || until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            one_batch(batch, &body);
            done += BATCH;
        }
        done as u64
    });
    match done {
        Ok(done) => println!("{done} orders from MAYFLY_SEED={seed}"),
        Err(Failure {
            message,
            seed: batch,
        }) => {
            let batch = batch.unwrap_or(seed);
            panic!("{message}\nwith MAYFLY_SEED={batch} MAYFLY_INTERLEAVINGS={BATCH}");
        }
    }
}

/// The message of the first order of `body` that fails, if one does.
pub fn finds(body: impl Fn() + Send + Sync + 'static) -> Option<String> {
    let body = Arc::new(body);
    let done = apart(move || {
        (0..100).for_each(|batch| one_batch(batch, &body));
        100
    });
    done.err().map(|failure| failure.message)
}

/// [`BATCH`] orders of `seed`.
fn one_batch(seed: u64, body: &Arc<impl Fn() + Send + Sync + 'static>) {
    at_seed(seed);
    let mut config = Config::new();
    config.stack_size = STACK;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    let body = Arc::clone(body);
    let body = move || {
        RUN.set(Some(Run::default()));
        body();
        RUN.set(None);
    };
    // Batches that differ in their order only have other seeds, so that they differ in their data too.
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let hash = hasher.finish();
    match seed % 3 {
        0 => Runner::new(RandomScheduler::new_from_seed(hash, BATCH), config).run(body),
        1 => Runner::new(PctScheduler::new_from_seed(hash, 3, BATCH), config).run(body),
        _ => Runner::new(PctScheduler::new_from_seed(hash, 12, BATCH), config).run(body),
    };
}

/// A mutex of the standard library.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

/// Of a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    /// None while it is dropped.
    held: Option<std::sync::MutexGuard<'a, T>>,
    key: Key,
}

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Mutex(std::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        let key = key_of(self);
        let guard = |held| MutexGuard {
            held: Some(held),
            key,
        };
        let locked = if is_on() {
            point();
            block_until(key, || match self.0.try_lock() {
                Ok(held) => Some(Ok(held)),
                Err(TryLockError::Poisoned(error)) => Some(Err(error)),
                Err(TryLockError::WouldBlock) => None,
            })
        } else {
            self.0.lock()
        };
        match locked {
            Ok(held) => Ok(guard(held)),
            Err(error) => Err(PoisonError::new(guard(error.into_inner()))),
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("it is held until it is dropped")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("it is held until it is dropped")
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.held = None;
        changed(self.key);
        point();
    }
}

pub mod atomic {
    use super::point;
    pub use std::sync::atomic::Ordering;

    /// An atomic of the standard library, with a point before each operation.
    macro_rules! atomic {
        ($name:ident of $value:ty: $($operation:ident)*) => {
            #[derive(Debug, Default)]
            pub struct $name(std::sync::atomic::$name);

            impl $name {
                pub const fn new(value: $value) -> Self {
                    Self(std::sync::atomic::$name::new(value))
                }

                pub fn load(&self, order: Ordering) -> $value {
                    point();
                    self.0.load(order)
                }

                $(
                    pub fn $operation(&self, value: $value, order: Ordering) -> $value {
                        point();
                        self.0.$operation(value, order)
                    }
                )*
            }
        };
    }

    /// What returns nothing.
    macro_rules! store {
        ($($name:ident of $value:ty),*) => {
            $(
                impl $name {
                    pub fn store(&self, value: $value, order: Ordering) {
                        point();
                        self.0.store(value, order);
                    }
                }
            )*
        };
    }

    atomic!(AtomicBool of bool:);
    atomic!(AtomicU32 of u32: fetch_and fetch_or);
    atomic!(AtomicU64 of u64: fetch_max);
    atomic!(AtomicUsize of usize: fetch_sub);
    store!(AtomicBool of bool, AtomicU32 of u32);
}

pub mod thread {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use shuttle::thread::ThreadId;

    use super::{block_until, changed, is_on, key_of, one_in, point, with_run};

    /// A thread that may be parked.
    #[derive(Clone, Debug)]
    pub struct Thread {
        thread: std::thread::Thread,
        /// Of a thread of a run: it need not be parked next.
        token: Option<Arc<AtomicBool>>,
    }

    /// That of the calling thread, if it is one of a run.
    fn token() -> Option<Arc<AtomicBool>> {
        if !is_on() {
            return None;
        }
        token_of(shuttle::thread::current().id())
    }

    fn token_of(id: ThreadId) -> Option<Arc<AtomicBool>> {
        with_run(|run| Arc::clone(run.tokens.entry(id.into()).or_default()))
    }

    pub fn current() -> Thread {
        Thread {
            thread: std::thread::current(),
            token: token(),
        }
    }

    pub(super) fn of(id: ThreadId) -> Thread {
        Thread {
            thread: std::thread::current(),
            token: token_of(id),
        }
    }

    impl Thread {
        pub fn unpark(&self) {
            let Some(token) = &self.token else {
                return self.thread.unpark();
            };
            point();
            token.store(true, Ordering::SeqCst);
            changed(key_of(&**token));
            point();
        }
    }

    /// Now and then it returns without cause, as it may.
    pub fn park() {
        let Some(token) = token() else {
            return std::thread::park();
        };
        point();
        if !one_in(8) {
            block_until(key_of(&*token), || {
                token.swap(false, Ordering::SeqCst).then_some(())
            });
        }
    }
}
