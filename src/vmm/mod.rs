//! The control thread: owns the virtual machine and decides everything that happens to it.
//!
//! ```text
//!                 Start
//!   Configuring ---------> Started: running or paused, as `lifecycle` says
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
//! Control alone may open files once the guest runs; what it opens it hands to the worker.

pub mod action;
mod boot;
mod devices;
mod ending;
mod lifecycle;
mod machine;
mod opened;
mod pausing;
mod report;
pub mod rules;
pub mod threads;
pub mod words;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use kvm_ioctls::Kvm;

use self::action::{Action, ActionError, Answer, Command, InstanceInfo, Outcome, Owed, Reply};
use self::lifecycle::{Input, Lifecycle};
use self::machine::Machine;
use self::opened::Opened;
use self::rules::State as Phase;

use crate::arch::boot_timer::Booted;
use crate::config::{self, AnyUpdate, Draft, Logger, Metrics, Source, VmConfig};
use crate::inbox::{Inbox, Sender, inbox};
use crate::metrics::{Reader, Report, Sink};
use crate::serial::SerialEvent;
use crate::sys::clock;
use crate::sys::fd::{self, Interest};
use crate::sys::handed::Handed;
use crate::sys::signal::{self, Signal, Signals};
use crate::sys::{process, terminal};
use crate::timeline::{Moment, Timeline};
use crate::vcpu::{End, VcpuEvent};
use crate::virtio::{Done, WorkerEvent, WorkerReply};
use crate::wire::API_VERSION;
use crate::{error, exit, info, log, warn};

/// Events that may wait for control: the 128 requests that the API thread may have under way and
/// as many answers of devices to them, two events of each of 32 vCPUs, three of each of 19
/// devices, eight of the boot timer and the serial thread's.
const INBOX: usize = 400;

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
    /// The guest says that it has booted.
    Booted(Booted),
}

impl From<Booted> for Event {
    fn from(booted: Booted) -> Self {
        Event::Booted(booted)
    }
}

impl From<Command> for Event {
    fn from(command: Command) -> Self {
        Event::Command(command)
    }
}

impl From<VcpuEvent> for Event {
    fn from(event: VcpuEvent) -> Self {
        Event::Vcpu(event)
    }
}

impl From<WorkerEvent> for Event {
    fn from(event: WorkerEvent) -> Self {
        Event::Worker(event)
    }
}

impl From<WorkerReply> for Event {
    fn from(reply: WorkerReply) -> Self {
        Event::Answer(reply)
    }
}

impl From<SerialEvent> for Event {
    fn from(event: SerialEvent) -> Self {
        Event::Serial(event)
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
    /// Boot by this protocol, whatever the kernel offers.
    pub protocol: Option<crate::arch::Protocol>,
}

/// Control.
#[derive(Debug)]
pub struct Vmm {
    settings: Settings,
    timeline: Timeline,
    state: State,
    inbox: Inbox<Event>,
    events: Sender<Event>,
    signals: Signals,
    /// Clients that wait for a device: token, reply, deadline.
    updates: Vec<(u64, Reply, Instant)>,
    next_token: u64,
    /// Answers that the API thread has still to write.
    owed: Owed,
    /// What is told how the guest ended, if anything is.
    end: Option<File>,
    /// /dev/kvm as it was handed in, until a machine is made.
    kvm: Option<Arc<Kvm>>,
    counters: report::Counters,
    /// What other threads than a machine's count.
    readers: Vec<Arc<dyn Reader>>,
    /// Where metrics are written to.
    metrics: Option<Sink>,
    /// When that is due, while a machine runs.
    metrics_due: Option<Instant>,
}

#[derive(Debug)]
enum State {
    /// What was PUT, and the files that belong to it.
    Configuring(Box<Draft>, Opened),
    /// Whether it runs or stands still, its lifecycle knows.
    Started(Box<Machine>, Lifecycle<Reply>),
    /// Only while one state is exchanged for the next.
    Between,
}

/// Opens where `logger` wants the log, if it says so.
fn open_log(logger: &Logger, handed: &mut Handed) -> Result<Option<File>, ActionError> {
    match &logger.log_path {
        Some(sink) => Ok(Some(opened::open_sink(opened::LOG, sink, handed)?)),
        None => Ok(None),
    }
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
    /// When the host has no descriptor left.
    pub fn new(settings: Settings, timeline: Timeline) -> io::Result<Self> {
        let signals = Signals::install(exit::by_signal)?;
        signal::describe_addresses_by(ending::name_mapped_file);
        let (events, inbox) = inbox(INBOX)?;
        Ok(Vmm {
            settings,
            timeline,
            state: State::Configuring(Box::default(), Opened::default()),
            inbox,
            events,
            signals,
            updates: Vec::new(),
            next_token: 0,
            owed: Owed::default(),
            end: None,
            kvm: None,
            counters: report::Counters::default(),
            readers: Vec::new(),
            metrics: None,
            metrics_due: None,
        })
    }

    /// The API accepts clients; `counters` are what its thread counts, `owed` what it has still to
    /// write.
    pub fn api_is_ready(&mut self, counters: Arc<dyn Reader>, owed: Owed) {
        self.owed = owed;
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

    /// Makes the virtual machine by this /dev/kvm, instead of one opened for it.
    pub fn set_kvm(&mut self, kvm: Kvm) {
        self.kvm = Some(Arc::new(kvm));
    }

    /// Does what a client would ask for, before there are any.
    ///
    /// # Errors
    /// The sentence a client would get.
    pub fn apply(&mut self, action: Action) -> Result<Outcome, ActionError> {
        rules::allow(&action, self.phase())?;
        self.configure(action, &mut Handed::default())
    }

    /// Has one word about the guest's end written to inherited descriptor `number`.
    ///
    /// # Errors
    /// The sentence for the person who named it.
    pub fn set_end(&mut self, number: u32) -> Result<(), ActionError> {
        let place = Source::fd(number);
        let file = opened::open_sink("end", &place, &mut Handed::Inherited)?;
        fd::set_nonblocking(&file).map_err(|e| {
            ActionError(format!(
                "Descriptor {number} can not be used for the end: {e}."
            ))
        })?;
        self.end = Some(file);
        Ok(())
    }

    /// Reads the configuration in the file at `path`.
    ///
    /// # Errors
    /// The sentence for the person who named the file.
    pub fn read_config(path: &Path) -> Result<VmConfig, ActionError> {
        let path = path.to_str().ok_or_else(|| {
            ActionError("The path of the configuration is not valid UTF-8.".into())
        })?;
        let source = Source::from(path);
        let bytes = opened::read_text("configuration", &source, &mut Handed::default())?;
        config::parse_file(&bytes)
            .map_err(|e| ActionError(format!("The configuration `{path}` can not be read: {e}")))
    }

    /// Takes up `config` and starts it. The descriptors it names are those that the process was
    /// started with.
    ///
    /// # Errors
    /// The sentence for the person who wrote it.
    pub fn start_from(&mut self, config: VmConfig) -> Result<(), ActionError> {
        self.take_config(config, &mut Handed::Inherited)?;
        self.start(Some(words::STARTED_FROM_FILE)).map(|_| ())
    }

    /// Takes up a whole configuration in place of what there was; all of it, or nothing.
    fn take_config(
        &mut self,
        mut config: VmConfig,
        handed: &mut Handed,
    ) -> Result<(), ActionError> {
        let (logger, metrics) = (config.logger.take(), config.metrics.take());
        let State::Configuring(_, opened) = &self.state else {
            return Err(ActionError("The microVM is running.".into()));
        };
        let taken = opened::take_all(opened, config, handed)?;
        let metrics = match metrics {
            Some(metrics) => Some(self.open_metrics(metrics, handed)?),
            None => None,
        };
        let log = match &logger {
            Some(logger) => open_log(logger, handed)?,
            None => None,
        };
        // From here on nothing fails.
        let State::Configuring(draft, opened) = &mut self.state else {
            return Ok(());
        };
        (**draft, *opened) = taken;
        if let Some(logger) = logger {
            self.use_logger(&logger, log);
        }
        if let Some(metrics) = metrics {
            self.metrics = Some(metrics);
        }
        Ok(())
    }

    /// Takes up where the command line or a client wants the metrics: once.
    ///
    /// # Errors
    /// The sentence: its file can not be opened, or there is one already.
    pub fn set_metrics(
        &mut self,
        metrics: Metrics,
        handed: &mut Handed,
    ) -> Result<(), ActionError> {
        self.metrics = Some(self.open_metrics(metrics, handed)?);
        Ok(())
    }

    fn open_metrics(&self, metrics: Metrics, handed: &mut Handed) -> Result<Sink, ActionError> {
        const WHY: &str = "Cannot initialize the metrics system due to bad user input";
        if self.metrics.is_some() {
            return Err(ActionError(format!(
                "{WHY}: Reinitialization of metrics not allowed."
            )));
        }
        let file = opened::open_sink("metrics", &metrics.metrics_path, handed)
            .map_err(|e| ActionError(format!("{WHY}: {}", log::chain(&e))))?;
        // Opened by somebody else it may not be; and control waits for no reader.
        fd::set_nonblocking(&file).map_err(|e| ActionError(format!("{WHY}: {e}")))?;
        let id = metrics.emit_id.then(|| self.settings.id.clone());
        Ok(Sink::new(file, id, metrics.properties))
    }

    /// All counters as they are now.
    fn report(&self) -> Report {
        let mut report = report::begin(
            &self.settings.id,
            self.phase(),
            &self.timeline,
            &self.counters,
        );
        report.gauge(
            "mayfly_quiescent",
            "1 while the microVM is paused and no device has I/O in flight.",
            &[],
            u64::from(self.is_quiescent()),
        );
        for reader in &self.readers {
            reader.read(&mut report);
        }
        if let Some(machine) = self.machine() {
            report::machine(machine, &mut report);
        }
        report
    }

    /// Writes a line of metrics, if there is a place for it.
    fn flush_metrics(&mut self) -> io::Result<()> {
        if self.metrics.is_none() {
            return Ok(());
        }
        let report = self.report();
        if let Some(sink) = &mut self.metrics {
            let result = sink.write(report);
            self.counters.missed_lines = sink.missed();
            return result;
        }
        Ok(())
    }

    /// Takes up what the command line or a client says of the log.
    ///
    /// # Errors
    /// The sentence: its file can not be opened.
    pub fn set_logger(&mut self, logger: &Logger, handed: &mut Handed) -> Result<(), ActionError> {
        let sink = open_log(logger, handed)?;
        self.use_logger(logger, sink);
        Ok(())
    }

    fn use_logger(&mut self, logger: &Logger, sink: Option<File>) {
        if let Some(sink) = sink {
            log::redirect(sink);
        }
        if let Some(level) = logger.level {
            log::set_level(level);
        }
        log::set_shown(logger.show_level, logger.show_log_origin);
        if let Some(module) = &logger.module {
            log::set_module(module);
        }
    }

    /// The life of the thread, and so of the process, which ends with it. Nothing is taken apart
    /// piece by piece: the kernel does that faster, and all at once.
    pub fn run(mut self) -> ! {
        let mut more = false;
        let code = loop {
            let mut interests = [
                Interest::read(self.inbox.as_raw_fd()),
                Interest::read(self.signals.as_raw_fd()),
            ];
            let patience = if more { Some(0) } else { self.patience() };
            if let Err(error) = fd::wait(&mut interests, patience) {
                error!("Control can not wait for events any more: {error}");
                break Next::Exit(exit::ERROR);
            }
            let [event, signal] = interests;
            if signal.is_ready()
                && let Some(Signal { number, code }) = self.signals.next()
            {
                if number == signal::CONTINUED {
                    set_terminal_again();
                    continue;
                }
                self.finish_console();
                info!("Shutting down VM after intercepting signal {number}, code {code}.");
                self.counters.signal = Some(number);
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
        info!("{}", words::STOPPING);
        if let Next::Exit(code) = code {
            info!("{}", words::exiting(code));
        }
        self.finish();
        terminal::restore();
        match code {
            Next::EndBySignal(number) => signal::end_by(number),
            Next::Exit(code) => process::exit(code),
            Next::GoOn => process::exit(exit::ERROR),
        }
    }

    fn handle(&mut self, event: Event) -> Next {
        match event {
            Event::Command(Command {
                action,
                mut handed,
                reply,
            }) => self.command(*action, &mut handed, reply),
            Event::Vcpu(VcpuEvent::Paused { index }) => self.advance(Input::VcpuPaused(index)),
            Event::Vcpu(VcpuEvent::Ended { index, end }) => {
                if !matches!(end, End::Reset | End::PowerOff) {
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
            Event::Booted(_) => self.guest_booted(),
        }
        Next::GoOn
    }

    /// Logs the guest's boot time, in the words that tools look for.
    fn guest_booted(&self) {
        self.timeline.mark(Moment::BootTimer);
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

    /// One request: refused by the rules of state, begun, or done.
    fn command(&mut self, action: Action, handed: &mut Handed, reply: Reply) {
        if let Err(error) = rules::allow(&action, self.phase()) {
            return reply.send(Err(error));
        }
        match action {
            Action::Pause => self.pause(reply),
            Action::Resume => self.resume(reply),
            Action::PatchDevice(update) if self.machine().is_some() => {
                self.update(reply, |machine, token| match update {
                    AnyUpdate::Drive(update) => machine.update_drive(&update, handed, token),
                    AnyUpdate::NetworkInterface(update) => machine.update_network(&update, token),
                });
            }
            action => {
                let answer = self.configure(action, handed);
                reply.send(answer);
            }
        }
    }

    /// Requests that are done at once.
    fn configure(&mut self, action: Action, handed: &mut Handed) -> Answer {
        match action {
            Action::DescribeInstance => Ok(Outcome::Instance(self.instance())),
            Action::GetVersion => Ok(Outcome::Version(API_VERSION)),
            Action::GetTimeline => Ok(Outcome::Timeline(self.timeline.steps().collect())),
            Action::GetVmConfig => Ok(Outcome::VmConfig(Box::new(self.draft()?.vm_config()))),
            Action::GetMachineConfig => Ok(Outcome::MachineConfig(
                self.draft()?.machine_config().clone(),
            )),
            Action::Start => self.start(None),
            Action::SendCtrlAltDel => {
                if let Some(machine) = self.machine() {
                    machine
                        .press_ctrl_alt_del()
                        .map_err(|e| ActionError::of(&e))?;
                }
                Ok(Outcome::Done)
            }
            Action::GetMetrics => Ok(Outcome::Metrics(self.report().prometheus())),
            Action::PutMetrics(metrics) => {
                self.set_metrics(metrics, handed).map(|()| Outcome::Done)
            }
            Action::FlushMetrics => match self.flush_metrics() {
                Ok(()) => Ok(Outcome::Done),
                Err(cause) => Err(ActionError(format!(
                    "The metrics could not be written, and will be with the next line: {cause}"
                ))),
            },
            Action::PutLogger(logger) => self.set_logger(&logger, handed).map(|()| Outcome::Done),
            Action::PutVm { config, start } => {
                self.take_config(*config, handed)?;
                if start {
                    self.start(None)
                } else {
                    Ok(Outcome::Done)
                }
            }
            action => match &mut self.state {
                State::Configuring(draft, opened) => opened::put(draft, opened, action, handed),
                _ => Err(ActionError("The microVM is running.".into())),
            },
        }
    }

    /// Starts the guest; `word` is said in the log besides what always is.
    fn start(&mut self, word: Option<&'static str>) -> Answer {
        let (draft, opened) = match mem::replace(&mut self.state, State::Between) {
            State::Configuring(draft, opened) => (draft, opened),
            other => {
                self.state = other;
                return Err(ActionError("The microVM is running already.".into()));
            }
        };
        self.timeline.mark_again(Moment::Configured);
        let host = boot::Host {
            settings: &self.settings,
            events: &self.events,
            timeline: &self.timeline,
            kvm: self.kvm.as_ref(),
            word,
        };
        match boot::start(&host, &draft, &opened) {
            Ok(machine) => {
                // The machine has its own copies of what was opened.
                drop(opened);
                self.kvm = None;
                let started = machine.run_vcpus();
                let lifecycle = Self::lifecycle_of(&machine);
                self.state = State::Started(Box::new(machine), lifecycle);
                // The first line comes at once, beside the guest.
                self.metrics_due = self.metrics.is_some().then(Instant::now);
                started.map_err(|e| ActionError::of(&e))?;
                Ok(Outcome::Done)
            }
            Err(error) => {
                self.state = State::Configuring(draft, opened);
                Err(ActionError::of(&error))
            }
        }
    }

    fn worker_answered(&mut self, reply: WorkerReply) {
        if matches!(reply.done, Done::Paused) {
            self.device_answered(reply.token);
        }
        if let Done::Updated {
            config: Some(config),
            ..
        } = &reply.done
            && let Some(machine) = self.machine()
        {
            machine.set_device_config(&reply.device, *config);
        }
        if let Some(at) = self.updates.iter().position(|(t, ..)| *t == reply.token) {
            let (_, client, _) = self.updates.swap_remove(at);
            client.send(Ok(Outcome::Done));
        }
        // What a worker hands back is closed here: it may not do so itself.
        drop(reply);
        self.tell_again();
    }

    /// Sends a device an update; its answer, or the deadline, answers the client.
    fn update(
        &mut self,
        reply: Reply,
        send: impl FnOnce(&mut Machine, u64) -> Result<(), ActionError>,
    ) {
        let token = self.new_token();
        let sent = match &mut self.state {
            State::Started(machine, _) => send(machine, token),
            _ => Err(ActionError("The microVM is not running.".into())),
        };
        match sent {
            Ok(()) => {
                let deadline = Instant::now() + UPDATE_PATIENCE;
                self.updates.push((token, reply, deadline));
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn new_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        token
    }

    /// Milliseconds until the next deadline.
    fn patience(&self) -> Option<u32> {
        let pause = match &self.state {
            State::Started(_, lifecycle) => lifecycle.deadline(),
            _ => None,
        };
        let updates = self.updates.iter().map(|(.., at)| *at);
        let next = updates.chain(pause).chain(self.metrics_due).min()?;
        let left = next.saturating_duration_since(Instant::now());
        Some(
            u32::try_from(left.as_millis())
                .unwrap_or(u32::MAX)
                .saturating_add(1),
        )
    }

    fn look_at_deadlines(&mut self) {
        let now = Instant::now();
        if self.metrics_due.is_some_and(|at| at <= now) {
            self.metrics_due = now.checked_add(METRICS_INTERVAL);
            if let Err(cause) = self.flush_metrics() {
                warn!("A line of metrics was not written: {cause}");
            }
        }
        while let Some(at) = self.updates.iter().position(|(.., at)| *at <= now) {
            let (_, client, _) = self.updates.swap_remove(at);
            client.send(Err(ActionError(format!(
                "The device has not taken up the update within {} s: it is busy with I/O that \
                 does not end. It will once that does.",
                UPDATE_PATIENCE.as_secs()
            ))));
        }
        self.advance(Input::Tick);
    }

    fn phase(&self) -> Phase {
        match &self.state {
            State::Configuring(..) | State::Between => Phase::NotStarted,
            State::Started(_, lifecycle) if lifecycle.is_paused() => Phase::Paused,
            State::Started(..) => Phase::Running,
        }
    }

    fn machine(&self) -> Option<&Machine> {
        match &self.state {
            State::Started(machine, _) => Some(machine),
            _ => None,
        }
    }

    fn draft(&self) -> Result<&Draft, ActionError> {
        match &self.state {
            State::Configuring(draft, _) => Ok(draft),
            State::Started(machine, _) => Ok(machine.draft()),
            State::Between => Err(ActionError("The microVM is ending.".into())),
        }
    }

    fn instance(&self) -> InstanceInfo {
        InstanceInfo {
            // Who is asked for, not who answers: clients that were written for the original look
            // at these. What this is, the metrics and `--version` say.
            app_name: "Firecracker",
            id: self.settings.id.clone(),
            state: self.phase().name(),
            vmm_version: API_VERSION,
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
