//! How a device with several queues is divided among workers.
//!
//! A device whose driver may use N queues (N pairs, of a network interface) is N workers behind one set of
//! registers. Each worker is a thread with a device of its own kind over the same disk or network, and owns
//! its queues as the only worker of a device with one queue does: no lock, no message between workers.
//! What they have in common is the [`super::Interrupt`], and what the kind of device says: the buckets of a
//! rate limiter, which queues of a tap are attached.
//!
//! - *Activation*: the registers tell each worker of its queues, and then to serve them.
//! - *Reset*: each worker is told; the ticket of the write is done once the last of them has reset.
//! - *NEEDS_RESET*: the worker that finds a broken ring sets it in the [`super::Interrupt`]; the others look there
//!   before each unit, and serve nothing from then on either.
//! - *Pause, resume, save, update*: the handle tells each worker, and makes one answer of theirs
//!   ([`super::DeviceControl::gather`]).
//! - *Interrupts*: one line and one status register; EVENT_IDX is a matter of each queue.
//! - *Kicks*: one ioeventfd for each queue, watched by its worker.
//!
//! A device with one worker has none of this: no list is allocated, and its registers, features and
//! configuration space are what they would be if there was no such thing.

use super::Device;

/// One of something for each worker of a device; the list of the others allocates nothing where there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerWorker<T> {
    /// For the first worker, which every device has.
    pub first: T,
    /// For the others, in order.
    pub others: Vec<T>,
}

impl<T> From<T> for PerWorker<T> {
    fn from(first: T) -> Self {
        PerWorker {
            first,
            others: Vec::new(),
        }
    }
}

impl<T> PerWorker<T> {
    /// What `make` makes for each of `workers` workers, by number.
    ///
    /// # Errors
    /// The first of `make`.
    pub fn try_make<E>(
        workers: usize,
        mut make: impl FnMut(usize) -> Result<T, E>,
    ) -> Result<Self, E> {
        Ok(PerWorker {
            first: make(0)?,
            others: (1..workers).map(make).collect::<Result<_, _>>()?,
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.others.len().saturating_add(1)
    }

    /// The one for worker number `worker`.
    pub fn get(&self, worker: usize) -> Option<&T> {
        match worker.checked_sub(1) {
            None => Some(&self.first),
            Some(other) => self.others.get(other),
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// All of them, in order, by value.
    pub fn into_all(self) -> impl Iterator<Item = T> {
        std::iter::once(self.first).chain(self.others)
    }

    /// These beside `with`, of which there are as many.
    pub fn zip<U>(self, with: PerWorker<U>) -> PerWorker<(T, U)> {
        PerWorker {
            first: (self.first, with.first),
            others: self.others.into_iter().zip(with.others).collect(),
        }
    }

    /// What `make` makes of each, in order.
    pub fn map<U>(self, mut make: impl FnMut(T) -> U) -> PerWorker<U> {
        PerWorker {
            first: make(self.first),
            others: self.others.into_iter().map(make).collect(),
        }
    }

    /// What `make` makes of each, in order.
    ///
    /// # Errors
    /// The first of `make`.
    pub fn try_map<U, E>(self, mut make: impl FnMut(T) -> Result<U, E>) -> Result<PerWorker<U>, E> {
        Ok(PerWorker {
            first: make(self.first)?,
            others: self
                .others
                .into_iter()
                .map(make)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl<A, B> PerWorker<(A, B)> {
    /// Two lists of these.
    pub fn unzip(self) -> (PerWorker<A>, PerWorker<B>) {
        let (first, second) = self.first;
        let (firsts, seconds) = self.others.into_iter().unzip();
        (
            PerWorker {
                first,
                others: firsts,
            },
            PerWorker {
                first: second,
                others: seconds,
            },
        )
    }
}

/// The share of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// The worker's number.
    pub number: usize,
    /// What it is a share of.
    pub division: Division,
}

impl Share {
    /// The numbers of its queues, in the order of their places.
    pub fn queues(self) -> impl Iterator<Item = usize> + use<> {
        self.division.queues(self.number)
    }

    /// The number of the queue that is at `place` among its own.
    pub fn number_of(self, place: usize) -> usize {
        self.queues().nth(place).unwrap_or(place)
    }

    /// The largest sizes of its queues.
    pub fn sizes(self) -> impl Iterator<Item = u16> + use<> {
        let sizes = self.division.sizes;
        self.queues()
            .map(move |queue| sizes.get(queue).copied().unwrap_or(0))
    }

    /// Whether there are other workers.
    pub fn has_others(self) -> bool {
        self.division.workers > 1
    }
}

/// Which of a device's queues are whose. A worker knows its queues by their places among its own; the
/// driver knows all by one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// The largest size of each queue of the device.
    sizes: &'static [u16],
    /// Queues of each worker. One more, behind all these, is the first worker's: a control queue.
    each: usize,
    workers: usize,
}

impl Division {
    /// That of a device of kind `D` with `workers` workers; none where there is no such device.
    pub fn of<D: Device>(workers: usize) -> Option<Self> {
        if workers == 1 {
            return Some(Division::whole(D::QUEUES));
        }
        let each = D::QUEUES.len();
        let sizes = D::queues_of_several(workers)?;
        (sizes.len() >= each.checked_mul(workers)?).then_some(Division {
            sizes,
            each,
            workers,
        })
    }

    /// That of a device with one worker, which has queues of these sizes.
    pub const fn whole(sizes: &'static [u16]) -> Self {
        Division {
            sizes,
            each: sizes.len(),
            workers: 1,
        }
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The largest size of each queue of the device.
    pub fn sizes(&self) -> &'static [u16] {
        self.sizes
    }

    /// The worker of queue number `queue`, and the queue's place among those of the worker.
    pub fn owner(&self, queue: usize) -> (usize, usize) {
        let worker = queue.checked_div(self.each).unwrap_or(0);
        match worker < self.workers {
            true => (worker, queue.checked_rem(self.each).unwrap_or(0)),
            false => (0, self.each),
        }
    }

    /// The numbers of the queues of `worker`, in the order of their places.
    pub fn queues(&self, worker: usize) -> impl Iterator<Item = usize> + use<> {
        let first = worker.saturating_mul(self.each);
        let shared = self.each.saturating_mul(self.workers);
        let control = match worker {
            0 => shared..self.sizes.len(),
            _ => 0..0,
        };
        (first..first.saturating_add(self.each)).chain(control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(division: Division, worker: usize) -> Vec<usize> {
        let numbers: Vec<usize> = division.queues(worker).collect();
        for (place, number) in numbers.iter().enumerate() {
            assert_eq!(division.owner(*number), (worker, place));
        }
        numbers
    }

    #[test]
    fn queues_when_there_are_several_workers_are_each_of_one() {
        let pairs = Division {
            sizes: &[1, 2, 3, 4, 5, 6, 7],
            each: 2,
            workers: 3,
        };
        assert_eq!(numbers(pairs, 0), [0, 1, 6]);
        assert_eq!(numbers(pairs, 1), [2, 3]);
        assert_eq!(numbers(pairs, 2), [4, 5]);
        let sizes = |number| {
            Share {
                number,
                division: pairs,
            }
            .sizes()
        };
        assert!(sizes(0).eq([1, 2, 7]));
        assert!(sizes(2).eq([5, 6]));
        assert_eq!(numbers(Division::whole(&[8, 9]), 0), [0, 1]);
    }

    #[test]
    fn list_when_for_one_worker_allocates_nothing() {
        let one = PerWorker::from(5);
        assert_eq!((one.count(), one.others.capacity()), (1, 0));
        assert_eq!((one.get(0), one.get(1)), (Some(&5), None));
        let three = PerWorker::try_make(3, Ok::<_, ()>).unwrap();
        assert!(three.iter().eq(&[0, 1, 2]));
        assert_eq!(three.get(2), Some(&2));
        assert!(three.into_all().eq([0, 1, 2]));
    }
}
