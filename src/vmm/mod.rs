//! The control thread: owns the virtual machine and decides everything that happens to it.
//!
//! ```text
//!                 Start
//!   Not started ---------> Started: running or paused, as `lifecycle` says
//!       ^  |
//!       '--' PUT, PATCH
//! ```
//!
//! One inbox, one `match` on (state, event): requests of API clients, events of vCPUs, devices and
//! the serial thread all arrive there, so their order is decided in one place. Control never waits
//! for another thread: it sends a message and goes on, and the answer comes back as an [`Event`],
//! with a deadline on everything a client waits for. That is why `GET /` is answered while a disk
//! hangs.
//!
//! What may wait for a file is done by the files thread ([`file_work`]); what it opens, control sends to
//! the worker.

pub mod action;
mod boot;
mod change;
mod configuration;
mod cpu;
mod devices;
mod ending;
mod file_work;
#[cfg(test)]
mod interleavings;
mod lifecycle;
mod machine;
mod pausing;
mod report;
mod requests;
mod restoring;
pub mod rules;
mod saved;
mod saving;

#[cfg(any(test, fuzzing))]
pub use self::saved::fuzz::state;

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use self::action::{Command, Outcome, PendingReplies, Reply};
use self::boot::{Prepared, Record};
use self::configuration::Configuration;
use self::file_work::{Awaited, FileResult};
use self::lifecycle::{Input, Lifecycle};
use self::machine::Machine;
use self::pausing::Waiter;
use self::rules::State;
use self::saving::Saving;
use crate::error::{ActionError, Context};

use crate::arch::boot_timer::Booted;
use crate::files::{self, Files, Finished};
use crate::inbox::{Inbox, Sender, inbox};
use crate::log::firecracker;
use crate::memory::lazy::Handler;
use crate::memory::mapped;
use crate::metrics::{Reader, Sink};
use crate::serial::SerialEvent;
use crate::snapshot::SnapshotId;
use crate::sys::clock;
use crate::sys::fd::{self, Interest};
use crate::sys::signal::{self, Signal, Signals};
use crate::sys::{process, terminal};
use crate::timeline::{Moment, Timeline};
use crate::vcpu::VcpuEvent;
use crate::virtio::{Done, WorkerEvent, WorkerReply};
use crate::wire::BOOTED;
use crate::{error, exit, info, threads, warn};

/// Events that may wait for control: the 128 requests that the API thread may have under way and
/// as many answers of devices to them, two events of each of 32 vCPUs, three of each of 19
/// devices, what the files thread may have under way, eight of the boot timer and the serial
/// thread's.
const INBOX: usize = 440;

/// How long a client waits for a device to take up an update.
const UPDATE_PATIENCE: Duration = Duration::from_secs(5);
/// How often a running machine's metrics are written to their sink.
const METRICS_INTERVAL: Duration = Duration::from_secs(60);

/// Everything that happens to a VM.
#[derive(Debug)]
pub enum Event {
    /// A client asks for something.
    Command(Command),
    /// From a vCPU.
    Vcpu(VcpuEvent),
    /// From a device's worker, of itself.
    Worker(WorkerEvent),
    /// A worker's answer to control.
    Answer(WorkerReply),
    /// From the serial thread.
    Serial(SerialEvent),
    /// The files thread has done something.
    Files(Finished<FileResult>),
    /// The guest says that it has booted.
    Booted,
}

/// Events come from outboxes of their own types.
macro_rules! from {
    ($($cause:ty => $event:ident),+ $(,)?) => {
        $(impl From<$cause> for Event {
            fn from(cause: $cause) -> Self {
                Event::$event(cause)
            }
        })+
    };
}

from! {
    Command => Command, VcpuEvent => Vcpu, WorkerEvent => Worker, WorkerReply => Answer,
    SerialEvent => Serial, Finished<FileResult> => Files,
}

impl From<Booted> for Event {
    fn from(_: Booted) -> Self {
        Event::Booted
    }
}

/// What the command line says that lasts as long as the process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The instance's name.
    pub id: String,
    /// Whether threads install their filters.
    pub seccomp: bool,
    /// Whether the guest finds the boot-timer device.
    pub boot_timer: bool,
    /// When the jailer began, in microseconds of the monotonic clock.
    pub start_time_us: Option<u64>,
    /// CPU time that this process had used when it began, by the jailer's account.
    pub start_time_cpu_us: Option<u64>,
    /// CPU time that the jailer used, in microseconds.
    pub parent_cpu_time_us: Option<u64>,
    /// End with the exit code that the guest wrote, if it then ends in an orderly way.
    pub guest_exit_code: bool,
    /// Boot by this protocol, whatever the kernel offers.
    pub protocol: Option<crate::arch::Protocol>,
}

/// Control.
#[derive(Debug)]
pub struct Vmm {
    settings: Settings,
    timeline: Timeline,
    /// What was asked for, and what was opened for it or runs.
    configuration: Configuration,
    /// A part of a boot was asked for, in vain or not: see [`rules::is_for_boot`].
    was_configured: bool,
    /// The rest of the virtual machine, once there is one.
    machine: Option<Machine>,
    /// Whether that runs or stands still.
    lifecycle: Option<Lifecycle<Waiter>>,
    inbox: Inbox<Event>,
    events: Sender<Event>,
    signals: Signals,
    /// Clients that wait for a device: token, reply, deadline.
    updates: Vec<(u64, Reply, Instant)>,
    next_token: u64,
    /// Does what may wait for a file.
    files: Files<FileResult>,
    /// What of that control awaits, by token.
    awaited: Vec<(u64, Awaited)>,
    /// A snapshot that is being taken.
    saving: Option<Saving>,
    /// Where the working set of a restored guest is to be recorded, until its mark.
    recording: Option<Record>,
    /// Control and the files thread have the filter for reading snapshots.
    reads_snapshots: Cell<bool>,
    /// The last snapshot that was taken of this guest, or that it was made of.
    last_snapshot: Option<SnapshotId>,
    /// Requests that wait for a change under way, in order.
    held: VecDeque<Command>,
    /// For the log, when the guest that is being started runs.
    start_line: Option<&'static str>,
    /// Answers that the API thread has still to write.
    pending: PendingReplies,
    /// What is told how the guest ended, if anything is.
    end: Option<File>,
    /// The same place, to be told once that the guest has booted.
    booted: Option<File>,
    /// /dev/kvm as it was passed, until a machine is made.
    kvm: Option<Arc<Kvm>>,
    /// What the first start will need, if it was made ahead of it.
    prepared: Option<Prepared>,
    counters: report::Counters,
    /// What other threads than a machine's count.
    readers: Vec<Arc<dyn Reader>>,
    /// Where metrics are written to.
    metrics: Option<Arc<Mutex<Sink>>>,
    /// The files thread is writing a line of them.
    metrics_line: file_work::MetricsLine,
    /// The clients that the next line is for.
    next_metrics: Vec<Reply>,
    /// When that is due, while a machine runs.
    metrics_due: Option<Instant>,
}

/// Whether the loop goes on.
enum Next {
    GoOn,
    Exit(i32),
    EndBySignal(i32),
}

impl Vmm {
    /// Control, with nothing configured. Call it before any other thread exists.
    ///
    /// # Errors
    /// When the host has no descriptor left, or allows no other thread.
    pub fn new(settings: Settings, timeline: Timeline) -> Result<Self, ActionError> {
        let signals = Signals::install(exit::by_signal).context("Setting up signals failed")?;
        signal::describe_addresses_by(mapped::name_changed_file);
        let (events, inbox) = inbox(INBOX).context("Making control's inbox failed")?;
        let (files, files_thread) = files::files(events.outbox());
        threads::parked("files".into())?.start_unfiltered(move || files_thread.run());
        Ok(Vmm {
            settings,
            timeline,
            configuration: Configuration::default(),
            was_configured: false,
            machine: None,
            lifecycle: None,
            inbox,
            events,
            signals,
            updates: Vec::new(),
            next_token: 0,
            files,
            awaited: Vec::new(),
            saving: None,
            recording: None,
            reads_snapshots: Cell::new(false),
            last_snapshot: None,
            held: VecDeque::new(),
            start_line: None,
            pending: PendingReplies::default(),
            end: None,
            booted: None,
            kvm: None,
            prepared: None,
            counters: report::Counters::default(),
            readers: Vec::new(),
            metrics: None,
            metrics_line: file_work::MetricsLine::None,
            next_metrics: Vec::new(),
            metrics_due: None,
        })
    }

    /// The API accepts clients; `counters` are what its thread counts, `pending` what it has still to
    /// write.
    pub fn api_is_ready(&mut self, counters: Arc<dyn Reader>, pending: PendingReplies) {
        self.pending = pending;
        self.timeline.mark(Moment::ApiReady);
        self.readers.push(counters);
        if let Some(start) = self.settings.start_time_us {
            let now = clock::monotonic_nanos() / 1000;
            self.counters.startup_us = now.saturating_sub(start);
        }
        if let Some(start) = self.settings.start_time_cpu_us {
            let now = clock::process_cpu_nanos() / 1000;
            let parent = self.settings.parent_cpu_time_us.unwrap_or(0);
            self.counters.startup_cpu_us = now.saturating_sub(start).saturating_add(parent);
        }
    }

    /// Where requests go.
    pub fn commands(&self) -> crate::inbox::Outbox<Command> {
        self.events.outbox()
    }

    /// Makes the virtual machine with this /dev/kvm, instead of one opened for it.
    pub fn set_kvm(&mut self, kvm: Kvm) {
        self.kvm = Some(Arc::new(kvm));
    }

    fn log_signal(&mut self, number: i32, code: i32) {
        info!("Shutting down VM after intercepting signal {number}, code {code}.");
        self.counters.signal = Some(number);
    }

    /// The end, when there is no guest yet.
    fn end_by_signal(&mut self, signal: Signal) -> ! {
        self.log_signal(signal.number, signal.code);
        info!("{}", firecracker::STOPPING);
        self.finish();
        signal::end_by(signal.number)
    }

    /// The loop of the thread. The process ends with it; the kernel takes all of it apart faster than
    /// code here could.
    pub fn run(mut self) -> ! {
        let mut more = false;
        let code = loop {
            let mut interests = [
                Interest::read(self.inbox.as_raw_fd()),
                Interest::read(self.signals.as_raw_fd()),
                Interest::read(self.handler_to_watch()),
            ];
            let patience = if more { Some(0) } else { self.patience() };
            if let Err(error) = fd::wait(&mut interests, patience) {
                error!("Control cannot wait for events any more: {error}");
                break Next::Exit(exit::ERROR);
            }
            let [event, signal, handler] = interests;
            if handler.is_ready() && self.handler_is_gone() {
                break Next::Exit(exit::ERROR);
            }
            if signal.is_ready()
                && let Some(Signal { number, code }) = self.signals.next()
            {
                if number == signal::CONTINUED {
                    set_terminal_again();
                    continue;
                }
                self.finish_console();
                self.log_signal(number, code);
                break Next::EndBySignal(number);
            }
            let mut next = Next::GoOn;
            if event.is_ready() {
                self.inbox.silence();
            }
            // No more than an inbox at a time, or busy clients could keep out signals and deadlines.
            more = true;
            for _ in 0..INBOX {
                let Some(event) = self.inbox.next() else {
                    more = false;
                    break;
                };
                next = self.handle(event);
                if !matches!(next, Next::GoOn) {
                    break;
                }
            }
            self.look_at_deadlines();
            if !matches!(next, Next::GoOn) {
                break next;
            }
        };
        info!("{}", firecracker::STOPPING);
        if let Next::Exit(_) = code {
            self.finish_fork();
        }
        if let Next::Exit(code) = code {
            info!("{}", firecracker::exiting(code));
        }
        self.finish();
        terminal::restore();
        match code {
            Next::EndBySignal(number) => signal::end_by(number),
            Next::Exit(code) => process::exit(code),
            Next::GoOn => process::exit(exit::ERROR),
        }
    }

    /// The descriptor that tells of the end of the process that brings in guest memory; -1, which is
    /// not waited for, where there is none.
    fn handler_to_watch(&self) -> RawFd {
        let handler = self
            .machine
            .as_ref()
            .and_then(|machine| machine.handler.as_ref());
        let watched = handler.and_then(Handler::to_watch);
        watched.map_or(-1, |watched| watched.as_raw_fd())
    }

    /// Whether the process that brings in guest memory is gone: the guest cannot go on then.
    fn handler_is_gone(&mut self) -> bool {
        let handler = self
            .machine
            .as_mut()
            .and_then(|machine| machine.handler.as_mut());
        let is_gone = handler.is_some_and(Handler::is_gone);
        if is_gone {
            error!(
                "The guest cannot go on: the process that brings in its memory (the memory backend \
                 `Uffd`) has ended."
            );
        }
        is_gone
    }

    fn handle(&mut self, event: Event) -> Next {
        match event {
            Event::Command(command) => self.command(command),
            Event::Files(finished) => return self.file_work_finished(finished),
            Event::Vcpu(VcpuEvent::Paused { index }) => self.advance(Input::VcpuPaused(index)),
            Event::Vcpu(VcpuEvent::Ended { index, end }) => {
                if !end.is_orderly() {
                    self.counters.vcpu_failures = self.counters.vcpu_failures.saturating_add(1);
                }
                self.finish_console();
                return Next::Exit(self.guest_ended(index, end));
            }
            Event::Worker(event) => {
                error!("{event}");
                return Next::Exit(exit::WORKER_FAILED);
            }
            Event::Answer(reply) => self.worker_answered(reply),
            Event::Serial(SerialEvent::Finished) => {}
            Event::Serial(SerialEvent::InputIsBack) => set_terminal_again(),
            Event::Booted => self.guest_booted(),
        }
        Next::GoOn
    }

    /// Logs the guest's boot time, in the words that tools look for, and tells the jailer.
    fn guest_booted(&mut self) {
        self.record_working_set();
        self.timeline.mark(Moment::BootTimer);
        if let Some(told) = self.booted.take() {
            self.write_once("that the guest has booted", told, BOOTED.to_owned());
        }
        let wall = self.settings.start_time_us.map_or_else(
            || self.timeline.micros(Moment::BootTimer).unwrap_or(0),
            |start| (clock::monotonic_nanos() / 1000).saturating_sub(start),
        );
        let cpu = clock::process_cpu_nanos() / 1000;
        info!(
            "Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms",
            wall / 1000,
            cpu / 1000
        );
    }

    fn worker_answered(&mut self, reply: WorkerReply) {
        // A device answers when the last of its workers has.
        if let Some(reply) = self.configuration.devices.gather(reply) {
            self.device_answer(reply);
        }
        self.tell_again();
    }

    fn device_answer(&mut self, reply: WorkerReply) {
        match reply.done {
            Done::Paused => self.device_answered(reply.token),
            Done::Saved | Done::NotSaved => self.device_saved(reply.token),
            Done::Resumed | Done::Updated { .. } => {}
        }
        if let Done::Updated {
            config: Some(config),
            ..
        } = &reply.done
        {
            // The guest's driver sees it: the size of a disk may be another now.
            let mut running = self.configuration.devices.running();
            if let Some(device) = running.find(|device| *device.name() == *reply.device) {
                device.registers().set_config(*config);
            }
        }
        if let Some(at) = self.updates.iter().position(|(t, ..)| *t == reply.token) {
            let (_, client, _) = self.updates.swap_remove(at);
            client.send(match &reply.done {
                Done::Updated {
                    failed: Some(error),
                    ..
                } => Err(ActionError(format!(
                    "The host failed the change of the device, and nothing was changed: {error}"
                ))),
                _ => Ok(Outcome::Done),
            });
        }
        if let Done::Updated {
            replaced: Some(file),
            ..
        } = reply.done
        {
            // A worker may not close what it gives back.
            self.close(file);
        }
    }

    fn new_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        token
    }

    /// Milliseconds until the next deadline.
    fn patience(&self) -> Option<u32> {
        let pause = self.lifecycle.as_ref().and_then(Lifecycle::deadline);
        let updates = self.updates.iter().map(|(.., at)| *at);
        let files = self.files.deadline();
        let next = updates.chain(pause).chain(self.metrics_due).chain(files);
        let next = next.chain(self.saving_deadline());
        next.min().map(clock::millis_until)
    }

    fn look_at_deadlines(&mut self) {
        let now = Instant::now();
        if self.metrics_due.is_some_and(|at| at <= now) {
            self.metrics_due = now.checked_add(METRICS_INTERVAL);
            self.write_metrics(Vec::new());
        }
        self.look_at_files(now);
        self.look_at_saving(now);
        while let Some(at) = self.updates.iter().position(|(.., at)| *at <= now) {
            let (_, client, _) = self.updates.swap_remove(at);
            client.send(Err(ActionError(format!(
                "The device has not taken up the update within {} s: it is busy with I/O that \
                 does not end. It will once that does.",
                UPDATE_PATIENCE.as_secs()
            ))));
        }
        self.advance(Input::Tick);
        // A change may have ended here, or by an answer of a device or a vCPU.
        self.release_held();
    }

    fn state(&self) -> State {
        match &self.lifecycle {
            None => State::NotStarted,
            Some(lifecycle) if lifecycle.is_paused() => State::Paused,
            Some(_) => State::Running,
        }
    }
}

/// Sets the terminal again, which the shell may have changed while this process was stopped or in
/// the background.
fn set_terminal_again() {
    if let Err(error) = terminal::set_raw_again() {
        warn!("Cannot set the terminal to raw mode again: {error}");
    }
}
