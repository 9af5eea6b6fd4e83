//! Several workers behind one set of registers, with a device whose requests end when the test says so.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::queue::{Chain, Popped};
use super::super::super::state::ShareState;
use super::super::super::testing::{Rings, mailbox, next, ram, read32, start, wait_until, write32};
use super::super::super::{
    BrokenRing, ConfigSpace, DeviceControl, DeviceHandle, DeviceState, Gathered, Progress, Queue,
    QueueLayout, QueueSet, Ram, Registers, Updated, feature,
};
use super::super::*;
use crate::bus::{Registers as _, Ticket, Written};
use crate::metrics::Report;
use crate::state::state_round_trip;

const WORKERS: usize = 3;
const SIZES: &[u16] = &[16; WORKERS + 1];
/// The queue behind those of the workers.
const CONTROL: usize = WORKERS;
const BASE: u64 = 0x10000;
const DATA: u64 = 0x40000;

/// What the test and one worker's device share.
#[derive(Debug, Default)]
struct Host {
    begun: AtomicUsize,
    /// Requests that may end.
    released: AtomicUsize,
    updates: AtomicUsize,
    /// What has ended takes work without an end to be returned.
    is_endless: AtomicBool,
}

/// Requests of its queue end when they are released; those of the control queue at once. Each gets the
/// worker's number as its length.
struct Waiting {
    number: u32,
    host: Arc<Host>,
    wake: EventFd,
    chain: Chain,
    flying: Vec<u16>,
    ended: Vec<u16>,
    seen: usize,
}

impl Device for Waiting {
    plain!();
    const QUEUES: &'static [u16] = &[16];
    const UNITS_MAY_WAIT: bool = false;
    type State = u32;

    fn queues_of_several(workers: usize) -> Option<&'static [u16]> {
        (workers == WORKERS).then_some(SIZES)
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if index == 0 && self.complete(index, queue, ram)? == Progress::More {
            return Ok(Progress::More);
        }
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Chain => {}
            Popped::Malformed(error) => panic!("{error:?}"),
        }
        if index != 0 {
            assert_eq!(self.number, 0);
            queue.add_used(ram, self.chain.head(), 99)?;
            return Ok(Progress::More);
        }
        self.flying.push(self.chain.head());
        self.host.begun.fetch_add(1, Ordering::SeqCst);
        self.backend(0);
        Ok(Progress::More)
    }

    fn in_flight(&self) -> usize {
        self.flying.len()
    }

    fn complete(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if index != 0 {
            return Ok(Progress::Wait);
        }
        if self.host.is_endless.load(Ordering::SeqCst) {
            return Ok(Progress::More);
        }
        let Some(head) = self.ended.pop() else {
            return Ok(Progress::Wait);
        };
        queue.add_used(ram, head, self.number)?;
        Ok(Progress::More)
    }

    fn backend(&mut self, _: usize) -> QueueSet {
        while self.seen < self.host.released.load(Ordering::SeqCst) && !self.flying.is_empty() {
            self.seen += 1;
            self.ended.push(self.flying.remove(0));
        }
        QueueSet::one(0)
    }

    fn update(&mut self, (): ()) -> Updated {
        self.host.updates.fetch_add(1, Ordering::SeqCst);
        Updated::default()
    }

    fn state_buffer() -> u32 {
        0
    }

    fn save(&self, state: &mut u32) {
        *state = self.number;
    }

    fn reset(&mut self) {
        assert!(self.flying.is_empty());
        self.ended.clear();
    }
}

struct Bench {
    ram: Ram,
    registers: Arc<Registers>,
    handle: DeviceHandle<Waiting>,
    threads: Vec<JoinHandle<Worker<Waiting>>>,
    hosts: Vec<Arc<Host>>,
    wakes: Vec<EventFd>,
    replies: Inbox<WorkerReply>,
    _events: Inbox<WorkerEvent>,
}

fn bench_of(ram: &Ram, saved: Option<DeviceState<u32>>) -> io::Result<Bench> {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let hosts: Vec<_> = (0..WORKERS).map(|_| Arc::new(Host::default())).collect();
    let wakes: Vec<_> = (0..WORKERS).map(|_| event()).collect();
    let start = saved.map_or_else(Start::default, |saved| {
        let workers = PerWorker {
            first: saved.worker,
            others: saved.others.into_iter().map(|other| other.worker).collect(),
        };
        Start::saved(saved.registers, workers)
    });
    let devices = PerWorker::try_make(WORKERS, |number| {
        Ok::<_, ()>(Waiting {
            number: number as u32,
            host: Arc::clone(&hosts[number]),
            wake: wakes[number].try_clone().unwrap(),
            chain: Chain::new(),
            flying: Vec::new(),
            ended: Vec::new(),
            seen: 0,
        })
    });
    let (to_replies, replies) = mailbox();
    let (to_events, events) = mailbox();
    let attached = attach_all(
        devices.unwrap(),
        "several",
        &start,
        ram,
        event(),
        &to_replies,
        &to_events,
    )?;
    let (registers, workers, handle) = attached;
    Ok(Bench {
        ram: ram.clone(),
        registers,
        handle,
        threads: workers
            .into_all()
            .map(|worker| thread::spawn(move || worker.run()))
            .collect(),
        hosts,
        wakes,
        replies,
        _events: events,
    })
}

fn bench() -> Bench {
    bench_of(&ram(), None).unwrap()
}

impl Bench {
    fn rings(&self) -> Vec<Rings<'_>> {
        let place = |queue: usize| BASE + queue as u64 * 0x4000;
        (0..=CONTROL)
            .map(|queue| Rings::new(&self.ram, place(queue), 16))
            .collect()
    }

    fn start(&self, rings: &[Rings<'_>]) {
        let layouts: Vec<_> = rings.iter().map(Rings::layout).collect();
        start(&self.registers, 0, &layouts);
    }

    fn offer(&self, rings: &Rings<'_>, queue: usize, head: u16) {
        rings.offer_chain(head, &[(DATA, 4, true)]);
        self.registers.kicks()[queue].write(1).unwrap();
    }

    fn begun(&self, worker: usize) -> usize {
        self.hosts[worker].begun.load(Ordering::SeqCst)
    }

    fn release(&self, worker: usize, count: usize) {
        self.hosts[worker]
            .released
            .fetch_add(count, Ordering::SeqCst);
        self.wakes[worker].write(1).unwrap();
    }

    /// The next answer of the whole device.
    fn answer(&self) -> WorkerReply {
        loop {
            if let Gathered::Whole(whole) = self.handle.gather(next(&self.replies)) {
                return whole;
            }
        }
    }

    /// What has been answered so far, by all but those that have not: no whole answer.
    fn no_answer_but(&self, count: usize) {
        for _ in 0..count {
            let gathered = self.handle.gather(next(&self.replies));
            assert!(matches!(gathered, Gathered::Partly), "{gathered:?}");
        }
    }

    fn pause(&self) {
        self.handle.pause(5).unwrap();
        while !matches!(self.answer().done, Done::Paused) {}
    }

    fn begin_reset(&self) -> Ticket {
        match self.registers.write(0x70, &[0; 4]) {
            Written::After(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for worker in 0..WORKERS {
            self.hosts[worker].is_endless.store(false, Ordering::SeqCst);
            self.release(worker, 100);
        }
        let _ = self.handle.stop();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn save(bench: &Bench) -> DeviceState<u32> {
    bench.handle.save(6).unwrap();
    assert!(matches!(bench.answer().done, Done::Saved));
    bench.handle.take_saved().unwrap()
}

#[test]
fn queues_when_kicked_are_each_served_by_a_worker_of_their_own() {
    let bench = bench();
    let mut rings = bench.rings();
    for queue in 0..=CONTROL {
        write32(&bench.registers, 0x30, queue as u32);
        assert_eq!(read32(&bench.registers, 0x34), 16);
    }
    write32(&bench.registers, 0x30, CONTROL as u32 + 1);
    assert_eq!(read32(&bench.registers, 0x34), 0);
    bench.start(&rings);
    for (worker, rings) in rings[..WORKERS].iter_mut().enumerate() {
        bench.release(worker, 1);
        bench.offer(rings, worker, 3);
        assert_eq!(rings.wait(), (3, worker as u32));
    }
    bench.offer(&rings[CONTROL], CONTROL, 2);
    assert_eq!(rings[CONTROL].wait(), (2, 99));
}

#[test]
fn worker_when_its_requests_wait_holds_up_no_other() {
    let bench = bench();
    let mut rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[0], 0, 0);
    wait_until("it has begun", || bench.begun(0) == 1);
    bench.release(2, 1);
    bench.offer(&rings[2], 2, 0);
    assert_eq!(rings[2].wait(), (0, 2));
    assert_eq!(rings[0].take(), None);
}

#[test]
fn reset_when_one_worker_is_slow_is_done_when_that_has_reset() {
    let bench = bench();
    let rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[1], 1, 0);
    wait_until("it has begun", || bench.begun(1) == 1);
    let ticket = bench.begin_reset();
    let again = bench.begin_reset();
    // The others have reset by the time that they answer to this.
    bench.handle.update(1, per_worker()).unwrap();
    bench.no_answer_but(WORKERS - 1);
    assert!(!ticket.is_done());
    assert_eq!(read32(&bench.registers, 0x70), 15);
    bench.release(1, 1);
    wait_until("all have reset", || ticket.is_done() && again.is_done());
    assert_eq!(read32(&bench.registers, 0x70), 0);
    assert_eq!(rings[1].used_index(), 0);
    assert!(matches!(bench.answer().done, Done::Updated { .. }));

    let mut rings = bench.rings();
    bench.start(&rings);
    bench.release(0, 1);
    bench.offer(&rings[0], 0, 1);
    assert_eq!(rings[0].wait(), (1, 0));
}

fn per_worker() -> PerWorker<()> {
    PerWorker::try_make(WORKERS, |_| Ok::<_, ()>(())).unwrap()
}

#[test]
fn ring_when_it_is_broken_stops_all_workers_until_the_reset() {
    let bench = bench();
    let rings = bench.rings();
    bench.start(&rings);
    rings[1].set_avail_index(1000);
    bench.registers.kicks()[1].write(1).unwrap();
    wait_until("the device needs a reset", || {
        read32(&bench.registers, 0x70) == 0x4f
    });
    bench.release(0, 1);
    bench.offer(&rings[0], 0, 0);
    bench.pause();
    assert_eq!(bench.begun(0), 0);
    let state = save(&bench);
    assert!(state.registers.needs_reset);
    let phases = [state.worker.phase, state.others[0].worker.phase];
    assert_eq!(phases, [Phase::Broken; 2]);
    state_round_trip!(bench, |state| bench_of(&ram(), Some(state)).unwrap(), save);
    bench.handle.resume(7).unwrap();

    let ticket = bench.begin_reset();
    wait_until("all have reset", || ticket.is_done());
    let mut rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[0], 0, 1);
    assert_eq!(rings[0].wait(), (1, 0));
}

#[test]
fn pause_when_one_worker_is_slow_is_answered_when_nothing_is_in_flight() {
    let bench = bench();
    let mut rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[2], 2, 0);
    wait_until("it has begun", || bench.begun(2) == 1);
    bench.handle.pause(8).unwrap();
    bench.no_answer_but(WORKERS - 1);
    bench.release(2, 1);
    let answer = bench.answer();
    assert_eq!(answer.token, 8);
    assert!(matches!(answer.done, Done::Paused));
    assert_eq!(rings[2].take(), Some((0, 2)));
    // What is offered now waits for the resume.
    bench.release(0, 1);
    bench.offer(&rings[0], 0, 0);
    bench.handle.update(9, per_worker()).unwrap();
    assert!(matches!(bench.answer().done, Done::Updated { .. }));
    assert_eq!(rings[0].take(), None);
    bench.handle.resume(10).unwrap();
    assert_eq!(rings[0].wait(), (0, 0));
}

#[test]
fn pause_when_it_is_called_off_does_not_count_for_the_next() {
    let bench = bench();
    let rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[1], 1, 0);
    wait_until("it has begun", || bench.begun(1) == 1);
    bench.handle.pause(1).unwrap();
    bench.no_answer_but(WORKERS - 1);
    bench.handle.resume(2).unwrap();
    for _ in 0..WORKERS {
        let reply = next(&bench.replies);
        assert!(matches!(reply.done, Done::Resumed));
        bench.handle.gather(reply);
    }
    bench.handle.pause(3).unwrap();
    bench.no_answer_but(WORKERS - 1);
    bench.release(1, 1);
    let answer = bench.answer();
    assert!(matches!(answer.done, Done::Paused));
    assert_eq!(answer.token, 3);
}

#[test]
fn pause_when_a_late_answer_is_to_an_earlier_one_is_whole_all_the_same() {
    let bench = bench();
    let answers = || -> Vec<WorkerReply> {
        let mut answers: Vec<_> = (0..WORKERS).map(|_| next(&bench.replies)).collect();
        answers.sort_by_key(|answer| answer.worker);
        answers
    };
    let partly = |answer: WorkerReply| {
        let gathered = bench.handle.gather(answer);
        assert!(matches!(gathered, Gathered::Partly), "{gathered:?}");
    };
    bench.handle.pause(5).unwrap();
    let mut first = answers();
    let late = first.remove(1);
    first.into_iter().for_each(partly);
    bench.handle.resume(6).unwrap();
    answers();
    bench.handle.pause(7).unwrap();
    let [zero, one, two] = <[WorkerReply; WORKERS]>::try_from(answers()).unwrap();
    partly(zero);
    partly(late);
    partly(two);
    match bench.handle.gather(one) {
        Gathered::Whole(WorkerReply { token: 7, done, .. }) => {
            assert!(matches!(done, Done::Paused));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn pause_when_what_has_ended_takes_long_to_return_can_be_called_off() {
    let bench = bench();
    let mut rings = bench.rings();
    bench.start(&rings);
    bench.hosts[1].is_endless.store(true, Ordering::SeqCst);
    bench.handle.pause(1).unwrap();
    bench.no_answer_but(WORKERS - 1);
    bench.handle.resume(2).unwrap();
    for _ in 0..WORKERS {
        assert!(matches!(next(&bench.replies).done, Done::Resumed));
    }
    bench.hosts[1].is_endless.store(false, Ordering::SeqCst);
    bench.release(1, 1);
    bench.offer(&rings[1], 1, 0);
    assert_eq!(rings[1].wait(), (0, 1));
}

#[test]
fn save_when_a_late_answer_is_to_an_earlier_one_is_whole_all_the_same() {
    let bench = bench();
    // It runs, and is not saved.
    bench.handle.save(1).unwrap();
    let mut late: Vec<_> = (0..WORKERS).map(|_| next(&bench.replies)).collect();
    bench.pause();
    bench.handle.save(2).unwrap();
    bench.no_answer_but(1);
    assert!(matches!(late[0].done, Done::NotSaved));
    let gathered = bench.handle.gather(late.remove(0));
    assert!(matches!(gathered, Gathered::Partly), "{gathered:?}");
    let answer = bench.answer();
    assert_eq!(answer.token, 2);
    assert!(matches!(answer.done, Done::Saved), "{:?}", answer.done);
    assert!(bench.handle.take_saved().is_some());
}

#[test]
fn update_when_a_worker_has_no_room_reaches_none() {
    let bench = bench();
    let rings = bench.rings();
    bench.start(&rings);
    bench.offer(&rings[1], 1, 0);
    wait_until("it has begun", || bench.begun(1) == 1);
    let mut sent = 0;
    while bench.handle.update(sent, per_worker()).is_ok() {
        sent += 1;
        // The two that are not held up answer.
        bench.no_answer_but(WORKERS - 1);
    }
    assert!(sent >= 16, "{sent}");
    let updates = |worker: usize| bench.hosts[worker].updates.load(Ordering::SeqCst) as u64;
    assert_eq!([updates(0), updates(1), updates(2)], [sent, 0, sent]);
    // A pause reaches the others, and that one later.
    assert!(bench.handle.pause(100).is_err() && bench.handle.has_missed());
    bench.no_answer_but(WORKERS - 1);
    bench.release(1, 1);
    wait_until("it is free", || updates(1) == sent);
    bench.handle.pause(100).unwrap();
    assert!(!bench.handle.has_missed());
    loop {
        let answer = bench.answer();
        if matches!(answer.done, Done::Paused) {
            assert_eq!(answer.token, 100);
            break;
        }
    }
}

#[test]
fn device_when_saved_in_any_phase_is_the_same_when_made_anew() {
    let ram = ram();
    let make = |state: DeviceState<u32>| bench_of(&ram, Some(state)).unwrap();
    let bench = bench_of(&ram, None).unwrap();
    bench.pause();
    state_round_trip!(bench, make, save);
    bench.handle.resume(1).unwrap();
    let mut rings = bench.rings();
    bench.start(&rings);
    for (worker, rings) in rings[..WORKERS].iter_mut().enumerate() {
        bench.release(worker, worker);
        for head in 0..worker {
            bench.offer(rings, worker, head as u16);
            rings.wait();
        }
    }
    bench.pause();
    state_round_trip!(bench, make, save);
    let state = save(&bench);
    let ShareState { worker, device } = &state.others[1];
    assert_eq!(*device, 2);
    assert_eq!(worker.queues[0].unwrap().next_used, 2);
    // The first has the control queue too.
    assert_eq!(state.worker.queues.len(), 2);
    assert_eq!(state.registers.queues.len(), WORKERS + 1);

    // It goes on where it was.
    let anew = make(state);
    anew.handle.resume(1).unwrap();
    anew.release(2, 1);
    rings[2].offer_chain(7, &[(DATA, 4, true)]);
    anew.registers.kicks()[2].write(1).unwrap();
    assert_eq!(rings[2].wait(), (7, 2));
}

#[test]
fn state_when_workers_are_missing_or_disagree_is_refused() {
    let ram = ram();
    let bench = bench_of(&ram, None).unwrap();
    let rings = bench.rings();
    bench.start(&rings);
    bench.pause();
    let state = save(&bench);
    let refused = |change: fn(&mut DeviceState<u32>)| {
        let mut state = state.clone();
        change(&mut state);
        bench_of(&ram, Some(state)).err().map(|e| e.to_string())
    };
    assert_eq!(refused(|_| {}), None);
    let changes: [fn(&mut DeviceState<u32>); 6] = [
        |state| drop(state.others.pop()),
        |state| state.others.push(state.others[0].clone()),
        |state| state.others[1].worker.phase = Phase::Idle,
        |state| state.others[1].worker.phase = Phase::Broken,
        |state| state.worker.queues.truncate(1),
        |state| state.registers.queues.truncate(WORKERS),
    ];
    for change in changes {
        assert!(refused(change).is_some());
    }
    // A queue that cannot be is told by the number that the driver knows.
    let error = refused(|state| {
        if let Some(queue) = &mut state.others[1].worker.queues[0] {
            queue.layout = QueueLayout {
                used: u64::MAX,
                ..queue.layout
            };
        }
    });
    assert!(error.unwrap().contains("queue 2"));
}
