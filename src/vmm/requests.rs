//! What clients ask for: judged by the rules of state, then done at once, begun, or changed in the
//! three steps of [`super::change`].

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::action::{Action, Answer, Command, InstanceInfo, Outcome, Part, Question, Reply};
use super::boot::Origin;
use super::change::{Change, Edit};
use super::configuration::{Configuration, ConsoleSockets};
use super::devices::{Devices, ForDevice};
use super::file_work::{Asker, Awaited, FILE_PATIENCE, FileResult};
use super::lifecycle::{Input, Lifecycle};
use super::pausing::Waiter;
use super::{UPDATE_PATIENCE, Vmm, boot, report, restoring, rules};
use crate::error::{ActionError, Context};
use crate::files::open::ConsoleSocket;
use crate::files::{Files, Limit, open};
use crate::log::{self, firecracker};
use crate::metrics::{Report, Sink};
use crate::seccomp::Category;
use crate::steps::Steps;
use crate::sys::fd;
use crate::sys::passed::Passed;
use crate::threads::{self, ReadyLatch};
use crate::timeline::Moment;
use crate::wire::API_VERSION;
use crate::wire::config::{self, Logger, MachineConfig, Metrics, Restore, Source, VmConfig};

/// Firecracker's words for metrics that cannot be written where they should.
const NO_METRICS: &str = "Cannot initialize the metrics system due to bad user input";

/// What came of a request.
pub(super) enum Committed {
    /// All of it.
    Done,
    /// The guest is to be started.
    Starts(Start),
    /// A device was told, and will answer with this token.
    Awaits(u64),
}

/// What a machine does once it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Run. Its devices do already.
    Run,
    /// Run, where it and its devices stand still.
    Resume,
    /// Stay paused.
    Pause,
}

/// A start that was asked for.
pub struct Start {
    /// What the machine begins as.
    pub origin: Origin,
    /// What it does once it is made.
    pub then: Then,
    /// A line for the log then.
    pub line: Option<&'static str>,
}

impl Start {
    /// That of a kernel.
    pub fn kernel(line: Option<&'static str>) -> Self {
        Start {
            origin: Origin::Kernel,
            then: Then::Run,
            line,
        }
    }
}

/// A request that was checked.
pub(super) type Step = Result<Change<Ready>, ActionError>;

/// A request whose files are open: what is to be taken up.
pub enum Ready {
    /// A part of the configuration, or all of it.
    Configuration(Edit<Configuration>),
    /// The log, and where it goes if that changes.
    Logger((Logger, Option<File>)),
    /// Where metrics go.
    Metrics(Sink),
    /// A message to a running device, which answers with the given token.
    Device(ForDevice),
    /// Start the guest.
    Start(Start),
    /// These, in order.
    All(Vec<Ready>),
}

impl Vmm {
    /// One request: done now, or in its turn.
    pub(super) fn command(&mut self, command: Command) {
        if self.is_held_back(&command.action) {
            self.held.push_back(command);
        } else {
            self.carry_out(command);
        }
    }

    /// One request: refused by the rules of state, begun, or done.
    pub(super) fn carry_out(&mut self, command: Command) {
        let Command {
            action,
            passed,
            reply,
        } = command;
        if let Err(error) = rules::allow(&action, self.state(), self.was_configured) {
            self.close_passed(passed);
            return reply.send(Err(error));
        }
        self.was_configured |= rules::is_for_boot(&action);
        match *action {
            Action::Pause => self.pause(reply),
            Action::Resume => self.resume(reply),
            Action::FlushMetrics => self.write_metrics(vec![reply]),
            Action::Start => self.begin_start(Asker::Client(reply), Start::kernel(None)),
            Action::Ask(question) => reply.send(Ok(self.answer(question))),
            Action::SendCtrlAltDel => reply.send(self.press_ctrl_alt_del()),
            Action::SnapshotCreate(create) => return self.save(create, passed, reply),
            Action::SnapshotLoad(restore) => {
                self.change_for(self.load(*restore), passed, reply);
                return self.prepare_beside_load();
            }
            Action::Configure(part) => return self.change_for(self.check(part), passed, reply),
            Action::PatchDevice(update) => {
                let change = self.configuration.devices.patch(update);
                let change = change.map(|change| change.map(Ready::Device));
                return self.change_for(change, passed, reply);
            }
        }
        self.close_passed(passed);
    }

    /// Goes on with a request that has been checked, unless it was refused.
    fn change_for(&mut self, checked: Step, passed: Passed, client: Reply) {
        match checked {
            Ok(change) => self.open(change, passed, Asker::Client(client)),
            Err(error) => {
                client.send(Err(error));
                self.close_passed(passed);
            }
        }
    }

    fn answer(&self, question: Question) -> Outcome {
        match question {
            Question::Instance => Outcome::Instance(self.instance()),
            Question::Version => Outcome::Version(API_VERSION),
            Question::Timeline => Outcome::Timeline(self.timeline.steps().collect()),
            Question::VmConfig => Outcome::VmConfig(Box::new(self.configuration.report())),
            Question::MachineConfig => Outcome::MachineConfig(self.configuration.machine.clone()),
            Question::Metrics => Outcome::Metrics(self.report().prometheus()),
        }
    }

    fn press_ctrl_alt_del(&self) -> Answer {
        if let Some(machine) = &self.machine {
            machine.keyboard.ctrl_alt_del().bare()?;
        }
        Ok(Outcome::Done)
    }

    /// Takes up what was opened, and answers, now or when it is done.
    pub(super) fn conclude(&mut self, asker: Asker, ready: Result<Ready, ActionError>) {
        match (ready.and_then(|ready| self.commit(ready)), asker) {
            (Ok(Committed::Done), asker) => asker.answer(Ok(Outcome::Done)),
            (Ok(Committed::Awaits(token)), Asker::Client(reply)) => {
                self.updates
                    .push((token, reply, Instant::now() + UPDATE_PATIENCE));
            }
            (Ok(Committed::Awaits(_)), asker) => asker.answer(Ok(Outcome::Done)),
            (Ok(Committed::Starts(start)), asker) => self.begin_start(asker, start),
            (Err(error), asker) => asker.answer(Err(error)),
        }
    }

    /// The first step of a request that changes the configuration.
    fn check(&self, part: Part) -> Step {
        match part {
            Part::Logger(logger) => Ok(put_logger(logger).map(Ready::Logger)),
            Part::Metrics(metrics) => Ok(self.put_first_metrics(metrics)?.map(Ready::Metrics)),
            Part::All { config, start } => self.put_vm(*config, start, None),
            part => Ok(self.configuration.check(part)?.map(Ready::Configuration)),
        }
    }

    /// The last step: takes up what was opened.
    ///
    /// # Errors
    /// The guest cannot be started, or a device takes no messages.
    pub(super) fn commit(&mut self, ready: Ready) -> Result<Committed, ActionError> {
        match ready {
            Ready::Configuration(edit) => {
                let replaced = edit(&mut self.configuration);
                self.files.close(replaced);
            }
            Ready::Logger((logger, sink)) => self.use_logger(&logger, sink),
            Ready::Metrics(sink) => {
                let before = self.metrics.replace(Arc::new(Mutex::new(sink)));
                self.files.close(Box::new(before));
            }
            Ready::Device(send) => {
                let token = self.new_token();
                send(&mut self.configuration.devices, token)?;
                return Ok(Committed::Awaits(token));
            }
            Ready::Start(start) => return Ok(Committed::Starts(start)),
            Ready::All(parts) => {
                let mut last = Committed::Done;
                for part in parts {
                    last = self.commit(part)?;
                }
                return Ok(last);
            }
        }
        Ok(Committed::Done)
    }

    /// All three steps, before there are clients. Descriptors are those that the process was started
    /// with.
    fn change(&mut self, change: Change<Ready>) -> Result<(), ActionError> {
        let waits = change.waits();
        let open = move || change.open(&mut Passed::Inherited);
        let ready = match waits {
            true => self.wait_for_file(Limit::EachStep(FILE_PATIENCE), open)?,
            false => open()?,
        };
        self.commit(ready).map(drop)
    }

    /// Takes up a whole configuration in place of what there was; all of it, or nothing.
    fn put_vm(&self, mut config: VmConfig, start: bool, line: Option<&'static str>) -> Step {
        let sinks = self.put_sinks(config.logger.take(), config.metrics.take())?;
        let configuration = self.configuration.replace(config)?;
        Ok(Change::new(move |passed| {
            let mut parts = vec![Ready::Configuration(configuration.open(passed)?)];
            parts.extend(sinks.open(passed)?);
            parts.extend(start.then(|| Ready::Start(Start::kernel(line))));
            Ok(Ready::All(parts))
        }))
    }

    /// Takes up where metrics and the log go, as far as that is asked for.
    fn put_sinks(
        &self,
        logger: Option<Logger>,
        metrics: Option<Metrics>,
    ) -> Result<Change<Vec<Ready>>, ActionError> {
        let logger = logger.map(put_logger);
        let metrics = metrics.map(|metrics| self.put_metrics(metrics));
        Ok(Change::new(move |passed| {
            let mut parts = Vec::new();
            if let Some(metrics) = metrics {
                parts.push(Ready::Metrics(metrics.open(passed)?));
            }
            if let Some(logger) = logger {
                parts.push(Ready::Logger(logger.open(passed)?));
            }
            Ok(parts)
        }))
    }

    /// Takes up a snapshot, and what is asked for beside it.
    fn load(&self, restore: Restore) -> Step {
        let Restore {
            load,
            logger,
            metrics,
            serial,
            ..
        } = restore;
        let sinks = self.put_sinks(logger, metrics)?;
        let serial = serial.map(|serial| self.configuration.check(Part::Serial(serial)));
        let serial = serial.transpose()?;
        let before = self.configuration.devices.reopened()?;
        // Once: a filter lasts.
        let filter = (self.settings.seccomp && !self.reads_snapshots.replace(true))
            .then_some(Category::Restore);
        threads::filter_or_end(filter);
        let timeline = self.timeline.clone();
        Ok(Change::new(move |passed| {
            let mut parts = sinks.open(passed)?;
            if let Some(serial) = serial {
                parts.push(Ready::Configuration(serial.open(passed)?));
            }
            parts.extend(restoring::restore(&load, filter, before, passed)?);
            timeline.mark_again(Moment::SnapshotRead);
            Ok(Ready::All(parts))
        }))
    }

    /// As a part alone, metrics are put once.
    fn put_first_metrics(&self, metrics: Metrics) -> Result<Change<Sink>, ActionError> {
        if self.metrics.is_some() {
            return Err(ActionError(format!(
                "{NO_METRICS}: Reinitialization of metrics not allowed."
            )));
        }
        Ok(self.put_metrics(metrics))
    }

    fn put_metrics(&self, metrics: Metrics) -> Change<Sink> {
        let id = metrics.emit_id.then(|| self.settings.id.clone());
        Change::new(move |passed| {
            let file = open::sink(&open::METRICS, &metrics.metrics_path, passed);
            let file = file.context(NO_METRICS)?;
            // Another program may have opened it for waiting; control waits for no reader.
            fd::set_nonblocking(&file).context(NO_METRICS)?;
            Ok(Sink::new(file, id, metrics.properties))
        })
    }

    /// Has one word about the guest's end written to inherited descriptor `number`; before it, if there
    /// is a boot timer, that the guest has booted.
    ///
    /// # Errors
    /// The message for the person who named it.
    pub fn set_end(&mut self, number: u32) -> Result<(), ActionError> {
        let place = Source::fd(number);
        let file = self.wait_for_file(Limit::Whole(FILE_PATIENCE), move || {
            let file = open::sink(&open::END, &place, &mut Passed::Inherited)?;
            fd::set_nonblocking(&file)
                .context(format_args!("Cannot use descriptor {number} (--end-fd)"))?;
            Ok(file)
        })?;
        if self.settings.boot_timer {
            let copy = file.try_clone();
            self.booted = Some(copy.context("Cannot use the descriptor of --end-fd")?);
        }
        self.end = Some(file);
        Ok(())
    }

    /// Reads the configuration in the file at `path`, to its end, however long that takes; SIGTERM and
    /// its like end the process meanwhile. `meanwhile` is done beside that.
    ///
    /// # Errors
    /// The message for the person who named the file.
    pub fn read_config(
        &mut self,
        path: &Path,
        meanwhile: impl FnOnce(&mut Self),
    ) -> Result<VmConfig, ActionError> {
        let path = path.to_str().ok_or_else(|| {
            ActionError("The path of the configuration is not valid UTF-8.".into())
        })?;
        let name = path.to_owned();
        let work = self.begin_file(Limit::None, move || open::read_configuration(&name))?;
        meanwhile(self);
        let bytes = self.await_file(work)?;
        let parsed = config::parse_file(&bytes);
        parsed.context(format_args!("Cannot read the configuration `{path}`"))
    }

    /// Makes what the start will need and no configuration says. If it fails the start tries again,
    /// and tells why.
    pub fn prepare_start(&mut self) {
        self.prepared = boot::prepare(self.kvm.as_ref()).ok();
    }

    /// Takes up `config` and starts it; `fail` ends the process if that fails. The descriptors it
    /// names are those that the process was started with.
    pub fn start_from(&mut self, config: VmConfig, fail: Box<dyn FnOnce(ActionError)>) {
        let asker = Asker::CommandLine(fail);
        let line = Some(firecracker::STARTED_FROM_FILE);
        match self.put_vm(config, true, line) {
            Ok(change) => self.open(change, Passed::Inherited, asker),
            Err(error) => asker.answer(Err(error)),
        }
    }

    /// Makes the machine of the snapshot that `restore` names; `fail` ends the process if that fails.
    /// The descriptors it names are those that the process was started with.
    pub fn start_from_snapshot(&mut self, restore: Restore, fail: Box<dyn FnOnce(ActionError)>) {
        let asker = Asker::CommandLine(fail);
        match self.load(restore) {
            Ok(change) => self.open(change, Passed::Inherited, asker),
            Err(error) => asker.answer(Err(error)),
        }
        self.prepare_beside_load();
    }

    /// Makes what every start needs while the files thread reads a snapshot.
    fn prepare_beside_load(&mut self) {
        if self.is_changing() && self.prepared.is_none() {
            self.prepare_start();
        }
    }

    /// Takes up where the command line wants the metrics.
    ///
    /// # Errors
    /// The message: its file cannot be opened.
    pub fn set_metrics(&mut self, metrics: Metrics) -> Result<(), ActionError> {
        let change = self.put_first_metrics(metrics)?;
        self.change(change.map(Ready::Metrics))
    }

    /// Has clients of the console come through the inherited socket `number`, unless a configuration or
    /// a request names another.
    ///
    /// # Errors
    /// The message: it is no socket that listens.
    pub fn set_console(&mut self, number: u32) -> Result<(), ActionError> {
        let socket = ConsoleSocket::open(&Source::fd(number), &mut Passed::Inherited)?;
        let socket = Some(Arc::new(socket));
        self.configuration.console.sockets = ConsoleSockets {
            used: socket.clone(),
            given: socket,
        };
        Ok(())
    }

    /// Takes up what the command line says of the log.
    ///
    /// # Errors
    /// The message: its file cannot be opened.
    pub fn set_logger(&mut self, logger: Logger) -> Result<(), ActionError> {
        self.change(put_logger(logger).map(Ready::Logger))
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

    /// All counters as they are now.
    pub(super) fn report(&self) -> Report {
        let mut report = report::begin(
            &self.settings.id,
            self.state(),
            &self.timeline,
            &self.counters,
        );
        report.gauge(
            "mayfly_quiescent",
            "1 while the microVM is paused and no device has I/O in flight.",
            &[],
            u64::from(self.is_quiescent()),
        );
        report.gauge(
            "mayfly_file_operations_pending",
            "File operations under way, or waiting.",
            &[],
            self.files.pending() as u64,
        );
        for reader in &self.readers {
            reader.read(&mut report);
        }
        if let Some(machine) = &self.machine {
            report::machine(machine, &self.configuration, &mut report);
        }
        report
    }

    /// The first half of a start; the second comes when the guest has been loaded.
    pub(super) fn begin_start(&mut self, asker: Asker, start: Start) {
        let Start {
            mut origin,
            then,
            line,
        } = start;
        if self.machine.is_some() {
            return asker.answer(Err(ActionError("The microVM is running already.".into())));
        }
        self.timeline.mark_again(Moment::Configured);
        self.start_line = line;
        (self.last_snapshot, self.recording) = match &mut origin {
            Origin::Kernel => (None, None),
            Origin::Snapshot(restored) => (Some(restored.id), restored.record.take()),
        };
        let host = boot::Host {
            settings: &self.settings,
            events: &self.events,
            timeline: &self.timeline,
            line,
            has_boot_timer: self.settings.boot_timer || self.recording.is_some(),
        };
        let (prepared, kvm) = (self.prepared.take(), self.kvm.as_ref());
        let prepare = || prepared.map_or_else(|| boot::prepare(kvm), Ok);
        let files = &mut self.files;
        let mut loading = None;
        let submit = |load: boot::Load| {
            let work = Box::new(move |_: &Steps| FileResult::Loaded(Box::new(load())));
            let token = files.submit(Limit::EachStep(FILE_PATIENCE), work).bare()?;
            loading = Some(token);
            Ok(token)
        };
        match boot::begin(&host, &self.configuration, origin, prepare, submit) {
            Ok((begun, token)) => {
                let start = Awaited::Start(asker, Box::new(begun), then);
                self.awaited.push((token, start));
            }
            Err(error) => {
                let is_restore = self.forget_snapshot();
                match loading {
                    Some(token) => self.awaited.push((token, Awaited::Refusal(asker, error))),
                    // Its taps and disks are free again when this is answered.
                    None if is_restore => self.refuse_when_closed(asker, error),
                    None => asker.answer(Err(error)),
                }
            }
        }
    }

    /// Gives up the configuration of a snapshot that could not be resumed; whether there was one.
    pub(super) fn forget_snapshot(&mut self) -> bool {
        let is_restore = self.last_snapshot.take().is_some();
        if is_restore {
            let (machine, devices) = (MachineConfig::default(), Devices::default());
            let replaced = self.configuration.restore(machine, None, None, devices);
            self.files.close(Box::new(replaced));
        }
        is_restore
    }

    /// The second half of a start.
    pub(super) fn complete_start(
        &mut self,
        begun: boot::Begun,
        loaded: boot::Loaded,
        then: Then,
    ) -> Result<(), ActionError> {
        let host = boot::Host {
            settings: &self.settings,
            events: &self.events,
            timeline: &self.timeline,
            line: self.start_line,
            has_boot_timer: self.settings.boot_timer || self.recording.is_some(),
        };
        let files = &mut self.files;
        let seal = |category, latch: &Arc<ReadyLatch>| seal(files, category, latch);
        let (machine, replaced) =
            boot::complete(&host, &mut self.configuration, begun, loaded, seal)?;
        for replaced in replaced {
            self.files.close(replaced);
        }
        self.kvm = None;
        let (vcpus, devices) = (machine.vcpus.len(), self.configuration.devices.count());
        let started = match then {
            Then::Run => {
                self.lifecycle = Some(Lifecycle::new(vcpus, devices));
                machine.run_vcpus()
            }
            Then::Resume | Then::Pause => {
                let paused = Lifecycle::new_paused(vcpus, devices, Instant::now());
                self.lifecycle = Some(paused);
                Ok(())
            }
        };
        self.machine = Some(machine);
        if then == Then::Resume {
            self.advance(Input::Resume(Waiter::None));
        }
        // The first line comes at once, beside the guest.
        self.metrics_due = self.metrics.is_some().then(Instant::now);
        started.bare()
    }

    fn instance(&self) -> InstanceInfo {
        InstanceInfo {
            // The API's name, not the program's: clients that were written for Firecracker look at
            // these. What this is, the metrics and `--version` say.
            app_name: "Firecracker",
            id: self.settings.id.clone(),
            state: self.state().name(),
            vmm_version: API_VERSION,
        }
    }
}

fn put_logger(logger: Logger) -> Change<(Logger, Option<File>)> {
    let waits = logger.log_path.is_some();
    let open = |passed: &mut Passed| {
        let sink = logger.log_path.as_ref();
        let sink = sink.map(|sink| open::sink(&open::LOG, sink, passed));
        let sink = sink.transpose()?;
        Ok((logger, sink))
    };
    Change::new(open).waiting(waits)
}

/// Has the files thread install its filter, the last time that anything waits for it. It has
/// nothing else to do then, so it does that at once.
fn seal(
    files: &mut Files<FileResult>,
    category: Option<Category>,
    latch: &Arc<ReadyLatch>,
) -> Result<(), ActionError> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let deadline = Instant::now() + PATIENCE;
    while !files.is_idle() {
        if Instant::now() >= deadline {
            return Err(ActionError(
                "The guest was not started, because a file that was replaced has not been closed \
                 within 1 s. Try again when its file system answers."
                    .into(),
            ));
        }
        let _ = fd::wait(&mut [], Some(1));
    }
    let latch = Arc::clone(latch);
    let work = Box::new(move |_: &Steps| {
        threads::filter_or_end(category);
        latch.report();
        FileResult::Done
    });
    files.submit(Limit::None, work).map(drop).bare()
}
