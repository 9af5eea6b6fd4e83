//! What clients ask for: judged by the rules of state, then done at once, begun, or changed in the
//! three steps of [`super::change`].

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use super::action::{Action, ActionError, Context, InstanceInfo, Outcome, Reply};
use super::change::{Change, Ready, Step};
use super::lifecycle::Lifecycle;
use super::{UPDATE_PATIENCE, Vmm, boot, firecracker_log, open, report, rules};
use crate::log;
use crate::metrics::{Report, Sink};
use crate::sys::fd;
use crate::sys::passed::Passed;
use crate::timeline::Moment;
use crate::wire::API_VERSION;
use crate::wire::config::{self, Logger, Metrics, Source, VmConfig};

/// Firecracker's words for metrics that cannot be written where they should.
const NO_METRICS: &str = "Cannot initialize the metrics system due to bad user input";

/// What came of a request.
pub(super) enum Committed {
    /// All of it.
    Done(Outcome),
    /// A device was told, and will answer with this token.
    Awaits(u64),
}

impl Vmm {
    /// One request: refused by the rules of state, begun, or done.
    pub(super) fn command(&mut self, action: Action, passed: &mut Passed, reply: Reply) {
        if let Err(error) = rules::allow(&action, self.state()) {
            return reply.send(Err(error));
        }
        match action {
            Action::Pause => self.pause(reply),
            Action::Resume => self.resume(reply),
            action => match self.act(action, passed) {
                Ok(Committed::Done(outcome)) => reply.send(Ok(outcome)),
                Ok(Committed::Awaits(token)) => {
                    self.updates
                        .push((token, reply, Instant::now() + UPDATE_PATIENCE));
                }
                Err(error) => reply.send(Err(error)),
            },
        }
    }

    /// Requests that control does by itself.
    fn act(&mut self, action: Action, passed: &mut Passed) -> Result<Committed, ActionError> {
        let outcome = match action {
            Action::DescribeInstance => Outcome::Instance(self.instance()),
            Action::GetVersion => Outcome::Version(API_VERSION),
            Action::GetTimeline => Outcome::Timeline(self.timeline.steps().collect()),
            Action::GetVmConfig => Outcome::VmConfig(Box::new(self.configuration.report())),
            Action::GetMachineConfig => Outcome::MachineConfig(self.configuration.machine.clone()),
            Action::GetMetrics => Outcome::Metrics(self.report().prometheus()),
            Action::Start => {
                self.start(None)?;
                Outcome::Done
            }
            Action::SendCtrlAltDel => {
                if let Some(machine) = &self.machine {
                    machine.keyboard.ctrl_alt_del().bare()?;
                }
                Outcome::Done
            }
            Action::FlushMetrics => {
                self.flush_metrics()
                    .context("The metrics could not be written, and will be with the next line")?;
                Outcome::Done
            }
            action => {
                let change = self.check(action)?;
                let ready = change.open(passed)?;
                return self.commit(ready);
            }
        };
        Ok(Committed::Done(outcome))
    }

    /// The first step of a request that changes something.
    fn check(&self, action: Action) -> Step {
        match action {
            Action::PutLogger(logger) => Ok(put_logger(logger)),
            Action::PutMetrics(metrics) => self.put_metrics(metrics),
            Action::PutVm { config, start } => self.put_vm(*config, start),
            action => self.configuration.check(action),
        }
    }

    /// The last step: takes up what was opened.
    ///
    /// # Errors
    /// The guest cannot be started, or a device takes no messages.
    pub(super) fn commit(&mut self, ready: Ready) -> Result<Committed, ActionError> {
        if let Some(change) = ready.configuration {
            change(&mut self.configuration);
        }
        if let Some((logger, sink)) = ready.logger {
            self.use_logger(&logger, sink);
        }
        if let Some(sink) = ready.metrics {
            self.metrics = Some(sink);
        }
        if ready.start {
            self.start(None)?;
        }
        match ready.device {
            Some(send) => {
                let token = self.new_token();
                send(&mut self.configuration.devices, token)?;
                Ok(Committed::Awaits(token))
            }
            None => Ok(Committed::Done(Outcome::Done)),
        }
    }

    /// All three steps, before there are clients. Descriptors are those that the process was started
    /// with.
    fn change(&mut self, change: Change) -> Result<(), ActionError> {
        let ready = change.open(&mut Passed::Inherited)?;
        self.commit(ready).map(drop)
    }

    /// Takes up a whole configuration in place of what there was; all of it, or nothing.
    fn put_vm(&self, mut config: VmConfig, start: bool) -> Step {
        let logger = config.logger.take().map(put_logger);
        let metrics = config.metrics.take();
        let metrics = metrics
            .map(|metrics| self.put_metrics(metrics))
            .transpose()?;
        let configuration = self.configuration.replace(config)?;
        Ok(Change::new(move |passed| {
            let mut ready = configuration.open(passed)?;
            if let Some(metrics) = metrics {
                ready.metrics = metrics.open(passed)?.metrics;
            }
            if let Some(logger) = logger {
                ready.logger = logger.open(passed)?.logger;
            }
            ready.start = start;
            Ok(ready)
        }))
    }

    fn put_metrics(&self, metrics: Metrics) -> Step {
        if self.metrics.is_some() {
            return Err(ActionError(format!(
                "{NO_METRICS}: Reinitialization of metrics not allowed."
            )));
        }
        let id = metrics.emit_id.then(|| self.settings.id.clone());
        Ok(Change::new(move |passed| {
            let file = open::sink(&open::METRICS, &metrics.metrics_path, passed);
            let file = file.context(NO_METRICS)?;
            // Another program may have opened it for waiting; control waits for no reader.
            fd::set_nonblocking(&file).context(NO_METRICS)?;
            Ok(Ready {
                metrics: Some(Sink::new(file, id, metrics.properties)),
                ..Ready::default()
            })
        }))
    }

    /// Has one word about the guest's end written to inherited descriptor `number`.
    ///
    /// # Errors
    /// The message for the person who named it.
    pub fn set_end(&mut self, number: u32) -> Result<(), ActionError> {
        let place = Source::fd(number);
        let file = open::sink(&open::END, &place, &mut Passed::Inherited)?;
        fd::set_nonblocking(&file)
            .context(format_args!("Cannot use descriptor {number} (--end-fd)"))?;
        self.end = Some(file);
        Ok(())
    }

    /// Reads the configuration in the file at `path`.
    ///
    /// # Errors
    /// The message for the person who named the file.
    pub fn read_config(path: &Path) -> Result<VmConfig, ActionError> {
        let path = path.to_str().ok_or_else(|| {
            ActionError("The path of the configuration is not valid UTF-8.".into())
        })?;
        let source = Source::from(path);
        let bytes = open::read_text(&open::CONFIGURATION, &source, &mut Passed::default())?;
        let parsed = config::parse_file(&bytes);
        parsed.context(format_args!("Cannot read the configuration `{path}`"))
    }

    /// Takes up `config` and starts it. The descriptors it names are those that the process was
    /// started with.
    ///
    /// # Errors
    /// The message for the person who wrote it.
    pub fn start_from(&mut self, config: VmConfig) -> Result<(), ActionError> {
        let change = self.put_vm(config, false)?;
        self.change(change)?;
        self.start(Some(firecracker_log::STARTED_FROM_FILE))
    }

    /// Takes up where the command line wants the metrics.
    ///
    /// # Errors
    /// The message: its file cannot be opened.
    pub fn set_metrics(&mut self, metrics: Metrics) -> Result<(), ActionError> {
        let change = self.put_metrics(metrics)?;
        self.change(change)
    }

    /// Takes up what the command line says of the log.
    ///
    /// # Errors
    /// The message: its file cannot be opened.
    pub fn set_logger(&mut self, logger: Logger) -> Result<(), ActionError> {
        self.change(put_logger(logger))
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
    fn report(&self) -> Report {
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
        for reader in &self.readers {
            reader.read(&mut report);
        }
        if let Some(machine) = &self.machine {
            report::machine(machine, &self.configuration.devices, &mut report);
        }
        report
    }

    /// Writes a line of metrics, if there is a place for it.
    pub(super) fn flush_metrics(&mut self) -> io::Result<()> {
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

    /// Starts the guest; `line` is written to the log besides what always is.
    fn start(&mut self, line: Option<&'static str>) -> Result<(), ActionError> {
        if self.machine.is_some() {
            return Err(ActionError("The microVM is running already.".into()));
        }
        self.timeline.mark_again(Moment::Configured);
        let host = boot::Host {
            settings: &self.settings,
            events: &self.events,
            timeline: &self.timeline,
            kvm: self.kvm.as_ref(),
            line,
        };
        let machine = boot::start(&host, &mut self.configuration)?;
        self.kvm = None;
        let started = machine.run_vcpus();
        let devices = self.configuration.devices.count();
        self.lifecycle = Some(Lifecycle::new(machine.vcpus.len(), devices));
        self.machine = Some(machine);
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

fn put_logger(logger: Logger) -> Change {
    Change::new(|passed| {
        let sink = match &logger.log_path {
            Some(sink) => Some(open::sink(&open::LOG, sink, passed)?),
            None => None,
        };
        Ok(Ready {
            logger: Some((logger, sink)),
            ..Ready::default()
        })
    })
}
