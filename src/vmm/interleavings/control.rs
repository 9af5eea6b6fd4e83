//! Control, and its clients.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::iter::once;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::cpu::Thread;
use super::device::{Delayed, Disk};
use super::world::{Facts, Fault, MEMORY};
use crate::inbox::{Inbox, Sender, inbox};
use crate::memory::Ram;
use crate::sys::fd::{self, Interest};
use crate::sys::sync::scheduled::{below, one_in, rang, wait_until, yield_now};
use crate::sys::sync::wait_for;
use crate::vcpu::VcpuEvent;
use crate::vcpu::testing::TestHandle;
use crate::virtio::worker::attach_all;
use crate::virtio::{
    DeviceControl, DeviceHandle, DeviceState, Done, Gathered, PerWorker, Start, WorkerEvent,
    WorkerReply,
};
use crate::vmm::lifecycle::{Input, Lifecycle, Task};
use crate::vmm::pausing::{of_pause_token, pause_devices, resume_devices, tell_devices_again};

/// What a client wants.
#[derive(Clone, Copy, Debug)]
enum Wish {
    Pause,
    Resume,
    /// The device's configuration space begins with this byte.
    Update(u8),
    Save,
    /// More time than a pause may take.
    Patience,
}

/// Who waits for a wish.
#[derive(Debug)]
pub struct Reply {
    wish: Wish,
    answers: Arc<AtomicU32>,
    facts: Arc<Facts>,
}

impl Reply {
    fn send(self) {
        let before = self.answers.fetch_add(1, Ordering::SeqCst);
        assert_eq!(before, 0, "{:?}: a client is answered twice", self.wish);
        rang();
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let is_answered = self.answers.load(Ordering::SeqCst) > 0;
        assert!(
            is_answered || self.facts.is_ending(),
            "{:?}: a client is left without an answer",
            self.wish
        );
    }
}

/// What arrives in control's inbox.
#[derive(Debug)]
pub enum Event {
    Client(Reply),
    Vcpu(VcpuEvent),
    Answer(WorkerReply),
    Worker(WorkerEvent),
}

/// Makes a device of `state`, as a restore does, and lets it go.
fn restored(state: &DeviceState<u64>, ram: &Ram, facts: &Arc<Facts>) -> io::Result<()> {
    let workers = PerWorker {
        first: state.worker.clone(),
        others: state.others.iter().map(|one| one.worker.clone()).collect(),
    };
    let devices = PerWorker::try_make(workers.count(), |number| {
        Ok::<_, io::Error>(Delayed::new(number, Disk::new(), Arc::clone(facts)))
    })?;
    let start = Start::saved(state.registers.clone(), workers);
    let line = EventFd::new(EFD_NONBLOCK)?;
    let (sender, _inbox) = inbox::<Event>(1)?;
    let (replies, events) = (sender.outbox(), sender.outbox());
    attach_all(devices, "disk", &start, ram, line, &replies, &events).map(drop)
}

impl From<VcpuEvent> for Event {
    fn from(event: VcpuEvent) -> Self {
        Event::Vcpu(event)
    }
}

impl From<WorkerReply> for Event {
    fn from(reply: WorkerReply) -> Self {
        Event::Answer(reply)
    }
}

impl From<WorkerEvent> for Event {
    fn from(event: WorkerEvent) -> Self {
        Event::Worker(event)
    }
}

/// A client.
pub struct Client {
    number: usize,
    control: Sender<Event>,
    facts: Arc<Facts>,
}

impl Client {
    pub fn new(number: usize, control: Sender<Event>, facts: Arc<Facts>) -> Self {
        Client {
            number,
            control,
            facts,
        }
    }

    /// Asks for `count` things; what was answered to each.
    pub fn run(self, count: u32) -> Vec<Arc<AtomicU32>> {
        let wishes = (0..count).map(|_| match below(8) {
            0..3 => Wish::Pause,
            3..5 => Wish::Resume,
            5 => Wish::Update(below(250) as u8),
            6 => Wish::Save,
            _ => Wish::Patience,
        });
        let wishes: Vec<Wish> = wishes.collect();
        wishes.into_iter().map(|wish| self.ask(wish)).collect()
    }

    /// Asks for the one thing after which the guest comes to its end.
    pub fn resume(self) -> Vec<Arc<AtomicU32>> {
        vec![self.ask(Wish::Resume)]
    }

    fn ask(&self, wish: Wish) -> Arc<AtomicU32> {
        let answers = Arc::new(AtomicU32::new(0));
        let reply = Reply {
            wish,
            answers: Arc::clone(&answers),
            facts: Arc::clone(&self.facts),
        };
        let sent = self.control.send(Event::Client(reply));
        sent.unwrap_or_else(|_| panic!("client {}: control's inbox is full", self.number));
        if one_in(2) {
            wait_until(|| {
                let is_answered = answers.load(Ordering::SeqCst) > 0;
                (is_answered || self.facts.is_ending()).then_some(())
            });
        }
        answers
    }
}

/// The control thread.
pub struct Control {
    events: Inbox<Event>,
    vcpus: Vec<(TestHandle, Thread)>,
    device: DeviceHandle<Delayed>,
    ram: Ram,
    facts: Arc<Facts>,
    workers: usize,
    lifecycle: Lifecycle<Reply>,
    now: Instant,
    next_token: u64,
    updates: Vec<(u64, Reply)>,
    save: Option<Save>,
    /// What workers have answered.
    answered: BTreeSet<(usize, u64, &'static str)>,
    /// Of guest memory, while nothing may write to it.
    fingerprint: Option<u64>,
    /// Counts resumes.
    resumes: u32,
}

/// A save under way.
struct Save {
    token: u64,
    client: Reply,
    /// It was asked for in a quiescent machine, after as many resumes.
    quiescent_since: Option<u32>,
}

impl Control {
    pub fn new(
        events: Inbox<Event>,
        vcpus: Vec<(TestHandle, Thread)>,
        device: DeviceHandle<Delayed>,
        ram: Ram,
        facts: Arc<Facts>,
        workers: usize,
        is_restored: bool,
    ) -> Self {
        let now = Instant::now();
        let lifecycle = match is_restored {
            true => Lifecycle::new_paused(vcpus.len(), 1, now),
            false => Lifecycle::new(vcpus.len(), 1),
        };
        Control {
            events,
            vcpus,
            device,
            ram,
            facts,
            workers,
            lifecycle,
            now,
            next_token: 0,
            updates: Vec::new(),
            save: None,
            answered: BTreeSet::new(),
            fingerprint: None,
            resumes: 0,
        }
    }

    /// The loop; returns when the guest has ended and workers are told to stop.
    pub fn run(mut self) -> Self {
        if !self.lifecycle.is_paused() {
            self.run_vcpus();
        }
        loop {
            let mut interests = [Interest::read(self.events.as_raw_fd())];
            let waited = wait_for(-1, |_| {
                fd::wait(&mut interests, Some(0))?;
                Ok::<_, std::io::Error>(usize::from(interests[0].is_ready()))
            });
            waited.unwrap();
            self.events.silence();
            while let Some(event) = self.events.next() {
                if self.has_ended(&event) {
                    return self.end();
                }
                self.handle(event);
                self.watch();
            }
        }
    }

    fn has_ended(&self, event: &Event) -> bool {
        matches!(event, Event::Vcpu(VcpuEvent::Ended { .. }))
    }

    fn end(mut self) -> Self {
        self.facts.end();
        self.facts.set_quiescent(false);
        let tasks = self.lifecycle.handle(Input::End, self.now);
        assert!(tasks.is_empty());
        self.updates.clear();
        self.save = None;
        rang();
        while self.device.stop().is_err() {
            yield_now();
        }
        self
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Client(reply) => self.client(reply),
            Event::Vcpu(VcpuEvent::Paused { index }) => self.advance(Input::VcpuPaused(index)),
            Event::Vcpu(VcpuEvent::Ended { .. }) => {}
            Event::Worker(WorkerEvent::Failed { error, .. }) => panic!("{error}"),
            Event::Answer(reply) => {
                self.note(&reply);
                if self.facts.fault == Fault::SecondAnswer {
                    self.note(&reply);
                }
                match self.device.gather(reply) {
                    Gathered::Other(reply) => panic!("{reply:?}"),
                    Gathered::Partly => {}
                    Gathered::Whole(reply) => self.device_answer(reply),
                }
                let token = self.new_token();
                let devices = once(&self.device as &dyn DeviceControl);
                tell_devices_again(devices, &self.lifecycle, token);
            }
        }
    }

    fn note(&mut self, reply: &WorkerReply) {
        let kind = match reply.done {
            Done::Paused => "pause",
            Done::Resumed => "resume",
            Done::Saved | Done::NotSaved => "save",
            Done::Updated { .. } => "update",
        };
        let is_new = self.answered.insert((reply.worker, reply.token, kind));
        assert!(is_new, "a {kind} is answered twice: {reply:?}");
    }

    fn client(&mut self, reply: Reply) {
        match reply.wish {
            Wish::Pause => self.advance(Input::Pause(reply)),
            Wish::Resume => self.advance(Input::Resume(reply)),
            Wish::Patience => {
                self.now += Duration::from_millis(1100);
                self.advance(Input::Tick);
                reply.send();
            }
            Wish::Update(version) => {
                let token = self.new_token();
                let updates = PerWorker::try_make(self.workers, |_| Ok::<_, ()>(version));
                match self.device.update(token, updates.unwrap()) {
                    Ok(()) => self.updates.push((token, reply)),
                    Err(_) => reply.send(),
                }
            }
            Wish::Save => self.begin_save(reply),
        }
    }

    fn begin_save(&mut self, client: Reply) {
        let quiescent = self.lifecycle.is_quiescent();
        // Control saves what stands still only; a worker must cope with the rest too.
        if self.save.is_some() || !quiescent && one_in(2) {
            return client.send();
        }
        let token = self.new_token();
        match self.device.save(token) {
            Ok(()) => {
                self.save = Some(Save {
                    token,
                    client,
                    quiescent_since: quiescent.then_some(self.resumes),
                });
            }
            // As far as workers were reached, they answer in vain.
            Err(_) => client.send(),
        }
    }

    fn device_answer(&mut self, reply: WorkerReply) {
        match reply.done {
            Done::Paused => {
                let (pause, device) = of_pause_token(reply.token).expect("the token of a pause");
                self.advance(Input::DevicePaused { pause, device });
            }
            Done::Resumed => {}
            Done::Saved => self.saved(reply.token, true),
            Done::NotSaved => self.saved(reply.token, false),
            Done::Updated { config, .. } => {
                if let Some(config) = config {
                    self.device.registers().set_config(config);
                }
                let at = self.updates.iter().position(|(t, _)| *t == reply.token);
                let (_, client) = self
                    .updates
                    .remove(at.expect("an update that was asked for"));
                client.send();
            }
        }
    }

    fn saved(&mut self, token: u64, is_saved: bool) {
        let Some(save) = self.save.take_if(|save| save.token == token) else {
            return;
        };
        save.client.send();
        let state = self.device.take_saved();
        if save.quiescent_since == Some(self.resumes) {
            assert!(is_saved, "a save is refused though quiescent");
            self.check_saved(&state.expect("the state of what was saved"));
        }
    }

    /// Of a quiescent machine: nothing is in flight, the saved indices are those in guest memory, and a device can be
    /// made of it.
    fn check_saved(&self, state: &DeviceState<u64>) {
        let others = state.others.iter().map(|other| &other.worker);
        for worker in once(&state.worker).chain(others) {
            for queue in worker.queues.iter().flatten() {
                let at = GuestAddress(queue.layout.used + 2);
                let used: u16 = self.ram.read_obj(at).unwrap();
                assert_eq!(queue.next_used, used, "saved after quiescent");
                assert_eq!(queue.next_avail, used, "saved with a request in flight");
            }
        }
        let made = restored(state, &self.ram, &self.facts);
        made.expect("a device can be made of what was saved");
    }

    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn advance(&mut self, input: Input<Reply>) {
        let tasks = self.lifecycle.handle(input, self.now);
        for task in VecDeque::from(tasks) {
            self.perform(task);
        }
    }

    fn perform(&mut self, task: Task<Reply>) {
        let devices = once(&self.device as &dyn DeviceControl);
        match task {
            Task::PauseVcpus => {
                for (vcpu, thread) in &self.vcpus {
                    vcpu.pause(thread).expect("a vCPU takes a pause");
                }
            }
            Task::PauseDevices(pause) => pause_devices(devices, pause),
            Task::Resume(client) => {
                self.watch_end();
                self.resumes += 1;
                let token = self.new_token();
                resume_devices(once(&self.device as &dyn DeviceControl), token);
                self.run_vcpus();
                client.send();
            }
            Task::GoOn => self.run_vcpus(),
            Task::Refuse(client, _) | Task::Answer(client) => client.send(),
            Task::Paused { .. }
            | Task::ReportVcpus(_)
            | Task::ReportDevices(_)
            | Task::ReportQuiescent(_) => {}
        }
    }

    fn run_vcpus(&self) {
        for (vcpu, _) in &self.vcpus {
            vcpu.run().expect("a vCPU takes a resume");
        }
    }

    /// Looks whether guest memory stands still while it must.
    fn watch(&mut self) {
        if !self.lifecycle.is_quiescent() {
            return;
        }
        let now = self.fingerprint_now();
        let before = *self.fingerprint.get_or_insert(now);
        self.facts.set_quiescent(true);
        assert_eq!(now, before, "guest memory was written after quiescent");
    }

    fn watch_end(&mut self) {
        if let Some(before) = self.fingerprint.take() {
            let now = self.fingerprint_now();
            assert_eq!(now, before, "guest memory was written after quiescent");
        }
        self.facts.set_quiescent(false);
    }

    fn fingerprint_now(&self) -> u64 {
        let mut bytes = vec![0; MEMORY as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        hasher.finish()
    }

    /// Once all has ended.
    pub fn check(&self, answers: &[Arc<AtomicU32>]) {
        for answers in answers {
            assert!(answers.load(Ordering::SeqCst) <= 1, "answered twice");
        }
    }

    /// What is left, for who ends the vCPUs.
    pub fn into_vcpus(self) -> Vec<(TestHandle, Thread)> {
        self.vcpus
    }
}
