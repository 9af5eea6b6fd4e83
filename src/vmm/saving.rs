//! Taking a snapshot: what control does between the request and the answer.
//!
//! ```text
//!   Full, Diff: the guest is paused already; Draining where a device is not.
//!
//!   request --> [Draining] --> Collecting --> gather --> Writing --> answer
//!                               each device    vCPUs,      files thread: memory image, state file
//!                               saves itself   chips ...
//!
//!   Fork: it may run. It stands still from Pausing to Freezing.
//!
//!   request --> Preparing --> Pausing --> Collecting --> gather --> Freezing --> Writing --> answer
//!                files thread: page tables,                files thread: memory is exchanged
//!                or a copy (`memory::fork`)                for a private mapping of itself
//! ```
//!
//! One at a time; what clients ask for meanwhile waits in order, but for questions. Whatever fails, a
//! guest that ran goes on, and the pages that a failed image held are counted as changed again.

mod job;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use self::job::{CREATE_FAILED, Image};
pub use self::job::{Job, Written};
use super::action::{Outcome, Reply};
use super::boot::Record;
use super::file_work::{Awaited, FILE_PATIENCE, FileResult};
use super::lifecycle::{Input, Lifecycle};
use super::pausing::Waiter;
use super::saved::{MachineState, SavedMachine};
use super::{Next, Vmm};
use crate::arch::fingerprint::Fingerprint;
use crate::arch::layout;
use crate::error::{ActionError, Context};
use crate::files::Limit;
use crate::memory::fork::{Frozen, Prepare, Prepared};
use crate::memory::image::Stamp;
use crate::memory::page_set::PageSet;
use crate::memory::{Memory, MemoryError};
use crate::snapshot::{Header, Kind, MemoryImage, SnapshotId};
use crate::steps::Steps;
use crate::sys::clock;
use crate::sys::passed::Passed;
use crate::wire::config::{Drive, DriveOverlay, SavedConfig, SnapshotCreate, SnapshotType};
use crate::{error, exit, warn};

/// How long a device may take to save itself. It stands still: only its thread has to wake up.
const DEVICE_PATIENCE: Duration = Duration::from_secs(5);

/// How long the I/O of a paused guest may take to end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// How long a file may keep a snapshot from going on.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

const FAILED: &str = "Saving the microVM failed";

/// In a token: that it belongs to a snapshot, which one, and to which device.
const SAVE: u64 = 1 << 62;
const DEVICE_BITS: u32 = 8;

/// The token with which device number `device` is told to save itself, for snapshot number `snapshot`.
fn save_token(snapshot: u64, device: u32) -> u64 {
    SAVE | snapshot.wrapping_shl(DEVICE_BITS) & (SAVE - 1) | u64::from(device)
}

/// The device of a token, if it is one of snapshot number `snapshot`.
fn device_of_save_token(token: u64, snapshot: u64) -> Option<u32> {
    let device = u32::try_from(token & ((1 << DEVICE_BITS) - 1)).ok()?;
    (token == save_token(snapshot, device)).then_some(device)
}

/// A snapshot that is being taken.
#[derive(Debug)]
pub(super) struct Saving {
    request: SnapshotCreate,
    passed: Passed,
    client: Reply,
    step: Step,
    /// The guest is to run again as soon as it can: it did before it was paused for this.
    resumes: bool,
    /// What was copied ahead, for a fork of memory that is not shared.
    prepared: Option<Prepared>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// It has been asked for.
    Asked,
    /// The files thread readies the memory of a fork, while the guest runs.
    Preparing,
    /// vCPUs and devices are told to stop.
    Pausing,
    /// The guest is paused, but a device still has I/O in flight.
    Draining { deadline: Instant },
    /// Devices, by bit, that have not saved themselves yet.
    Collecting {
        snapshot: u64,
        devices: u32,
        deadline: Instant,
    },
    /// The files thread has guest memory, to freeze it.
    Freezing,
    /// The files thread writes.
    Writing,
}

/// A job, a descriptor of /proc/self/pagemap where that was passed, and the pages that have changed.
type NewJob = (Job, Option<Arc<File>>, Option<PageSet>);

fn not_quiescent() -> ActionError {
    ActionError(
        "The microVM is paused, but a device still has I/O in flight, which may write guest memory. Try \
         again when that has ended: the log reports it."
            .into(),
    )
}

fn no_machine() -> ActionError {
    ActionError("There is no machine.".into())
}

impl Vmm {
    /// Guest memory, unless the files thread has it.
    pub(super) fn memory(&self) -> Option<&Memory> {
        self.machine.as_ref()?.memory.as_ref()
    }

    /// Begins a snapshot. The rules of state allow it: the guest is paused, unless it is forked.
    pub(super) fn save(&mut self, request: SnapshotCreate, passed: Passed, client: Reply) {
        if let Err(error) = self.check_overlays() {
            client.send(Err(error));
            return self.close_passed(passed);
        }
        let is_fork = request.snapshot_type == SnapshotType::Fork;
        self.saving = Some(Saving {
            request,
            passed,
            client,
            step: Step::Asked,
            resumes: false,
            prepared: None,
        });
        match is_fork {
            true => self.prepare_fork(),
            false => self.collect(),
        }
    }

    /// An overlay in memory goes with this process: a snapshot would be of a guest without its disk.
    fn check_overlays(&self) -> Result<(), ActionError> {
        let drives = self.configuration.devices.drives.0.iter();
        let mut configs = drives.map(|entry| &entry.config);
        let is_memory = |drive: &&Drive| matches!(drive.overlay, Some(DriveOverlay::Memory { .. }));
        match configs.find(is_memory) {
            None => Ok(()),
            Some(drive) => Err(ActionError(format!(
                "{FAILED}: the overlay of the drive `{}` is in memory and would be missing in it; a guest to be \
                 saved needs an overlay in a file",
                drive.drive_id
            ))),
        }
    }

    /// Has the files thread record which pages a restored guest has used up to now, its mark: the first
    /// write to the boot timer, or the first pause.
    pub(super) fn record_working_set(&mut self) {
        let Some(Record { file, pagemap }) = self.recording.take() else {
            return;
        };
        let (Some(memory), Some(id)) = (self.memory(), self.last_snapshot) else {
            return;
        };
        let contents = memory.contents(pagemap);
        let work = Box::new(move |steps: &Steps| {
            steps.begin("recording the working set");
            let set = contents.working_set();
            if let Err(cause) = set.and_then(|set| set.record(&file, id.0)) {
                warn!("The working set was not recorded: {cause}. The next load will try again.");
            }
            FileResult::Done
        });
        if let Ok(token) = self.files.submit(Limit::EachStep(FILE_PATIENCE), work) {
            self.awaited.push((token, Awaited::Nothing));
        }
    }

    /// Whether a snapshot is being taken.
    pub(super) fn is_saving(&self) -> bool {
        self.saving.is_some()
    }

    /// When a device that does not save itself is given up.
    pub(super) fn saving_deadline(&self) -> Option<Instant> {
        match self.saving.as_ref()?.step {
            Step::Draining { deadline } | Step::Collecting { deadline, .. } => Some(deadline),
            _ => None,
        }
    }

    /// Gives up a device that has had its time.
    pub(super) fn look_at_saving(&mut self, now: Instant) {
        if let Some(Step::Draining { deadline }) = self.saving.as_ref().map(|s| s.step)
            && deadline <= now
        {
            return self.end_saving(Err(not_quiescent()));
        }
        if let Some(Step::Collecting {
            devices, deadline, ..
        }) = self.saving.as_ref().map(|s| s.step)
            && deadline <= now
        {
            let names = self.configuration.devices.running();
            let names = (0..)
                .zip(names)
                .filter(|(number, _)| is_in(devices, *number));
            let names: Vec<_> = names.map(|(_, device)| device.name().to_owned()).collect();
            self.end_saving(Err(ActionError(format!(
                "The devices {} have not saved themselves within {} s",
                names.join(", "),
                DEVICE_PATIENCE.as_secs()
            ))));
        }
    }

    /// Has the files thread ready guest memory for a fork, while the guest runs.
    fn prepare_fork(&mut self) {
        let Some(memory) = self.memory() else {
            return self.end_saving(Err(no_machine()));
        };
        let (zap, prepare) = (memory.zap(), memory.prepare());
        self.hand_over(
            Step::Preparing,
            Limit::EachStep(WRITE_PATIENCE),
            move |steps| {
                steps.begin("readying guest memory for a fork");
                let prepared = match zap.run() {
                    true => prepare.map(Prepare::run).transpose(),
                    false => Err(io::ErrorKind::TimedOut.into()),
                };
                FileResult::ForkPrepared(prepared)
            },
        );
    }

    /// Gives the files thread the work of `step`.
    fn hand_over(
        &mut self,
        step: Step,
        limit: Limit,
        work: impl FnOnce(&Steps) -> FileResult + Send + 'static,
    ) {
        match self.files.submit(limit, Box::new(work)).bare() {
            Ok(token) => {
                self.set_step(step);
                self.awaited.push((token, Awaited::Saving));
            }
            Err(error) => {
                // What has changed before it went with the work: the next diff has to hold all.
                self.last_snapshot = None;
                self.end_saving(Err(error));
            }
        }
    }

    /// Has the files thread write both files.
    fn have_written(&mut self, job: Job, image: Image) {
        self.hand_over(Step::Writing, Limit::EachStep(WRITE_PATIENCE), move |_| {
            FileResult::Saved(Box::new(job.write(image)))
        });
    }

    /// The memory of a fork is ready.
    pub(super) fn fork_prepared(&mut self, prepared: io::Result<Option<Prepared>>) {
        let prepared = prepared.context(format_args!("{FAILED}: Copying guest memory failed"));
        match (prepared, &mut self.saving) {
            (Ok(prepared), Some(saving)) => {
                saving.prepared = prepared;
                saving.step = Step::Pausing;
                // A client that has asked for a pause wants it to stay paused.
                saving.resumes = self.lifecycle.as_ref().is_some_and(Lifecycle::is_to_run);
                self.advance(Input::Pause(Waiter::Saving));
            }
            (Err(error), _) => self.end_saving(Err(error)),
            (Ok(_), None) => {}
        }
    }

    /// The guest stands still.
    pub(super) fn paused_for_saving(&mut self) {
        if matches!(self.saving.as_ref().map(|s| s.step), Some(Step::Pausing)) {
            self.collect();
        }
    }

    /// The I/O of a paused guest has ended.
    pub(super) fn quiescent_for_saving(&mut self) {
        if matches!(
            self.saving.as_ref().map(|s| s.step),
            Some(Step::Draining { .. })
        ) {
            self.collect();
        }
    }

    /// It does not.
    pub(super) fn not_paused_for_saving(&mut self, error: ActionError) {
        if matches!(self.saving.as_ref().map(|s| s.step), Some(Step::Pausing)) {
            self.end_saving(Err(error));
        }
    }

    /// Has each device save itself.
    fn collect(&mut self) {
        if !self.is_quiescent() {
            let resumes = self.saving.as_ref().is_some_and(|saving| saving.resumes);
            // A guest that runs is not kept standing by a slow disk.
            return match resumes {
                true => self.end_saving(Err(not_quiescent())),
                false => self.set_step(Step::Draining {
                    deadline: Instant::now() + DRAIN_PATIENCE,
                }),
            };
        }
        let snapshot = self.new_token();
        match self.tell_devices(snapshot) {
            Ok(devices) => {
                let deadline = Instant::now() + DEVICE_PATIENCE;
                self.set_step(Step::Collecting {
                    snapshot,
                    devices,
                    deadline,
                });
                self.write_when_collected();
            }
            Err(error) => self.end_saving(Err(error)),
        }
    }

    /// Tells each device to save itself, for snapshot number `snapshot`; which have been told, by bit.
    fn tell_devices(&self, snapshot: u64) -> Result<u32, ActionError> {
        let mut devices = 0;
        for (number, device) in (0u32..).zip(self.configuration.devices.running()) {
            let told = device.save(save_token(snapshot, number));
            told.context(format_args!("Saving the device `{}` failed", device.name()))?;
            devices |= bit(number);
        }
        Ok(devices)
    }

    fn set_step(&mut self, step: Step) {
        if let Some(saving) = &mut self.saving {
            saving.step = step;
        }
    }

    /// A device has answered what it was told with `token`.
    pub(super) fn device_saved(&mut self, token: u64) {
        if let Some(Saving {
            step: Step::Collecting {
                snapshot, devices, ..
            },
            ..
        }) = &mut self.saving
            && let Some(number) = device_of_save_token(token, *snapshot)
        {
            *devices &= !bit(number);
            self.write_when_collected();
        }
    }

    fn write_when_collected(&mut self) {
        let Some(Step::Collecting { devices: 0, .. }) = self.saving.as_ref().map(|s| s.step) else {
            return;
        };
        match self.gather() {
            Ok(saved) => self.write(saved),
            Err(error) => self.end_saving(Err(error)),
        }
    }

    /// The state of the whole machine, which stands still.
    fn gather(&self) -> Result<SavedMachine, ActionError> {
        let machine = self.machine.as_ref();
        let machine = machine.ok_or_else(no_machine)?;
        let devices = self.configuration.devices.take_saved();
        let devices = devices
            .ok_or_else(|| ActionError(format!("{FAILED}: a device has not given its state")))?;
        let vm = machine.vm.save().context(FAILED)?;
        let vcpus = machine.save_vcpus().context(FAILED)?;
        let cpu = vcpus.first();
        let cpu = cpu.map(|state| Fingerprint::of_saved(&machine.vm, state));
        Ok(SavedMachine {
            config: SavedConfig {
                machine: self.configuration.machine.clone(),
                boot_source: self
                    .configuration
                    .boot
                    .as_ref()
                    .map(|boot| boot.source.clone()),
                cpu: self.configuration.cpu.clone(),
                devices: self.configuration.devices.configs(),
            },
            cpu: cpu.ok_or_else(|| ActionError(format!("{FAILED}: it has no vCPU")))?,
            state: MachineState {
                vm: Some(vm),
                chips: machine.lines.save(),
                vcpus,
                uart: machine.uart.save(),
                keyboard: machine.keyboard.save(),
                power: machine.power.save(),
                devices,
            },
        })
    }

    /// Has both files written, or guest memory frozen before.
    fn write(&mut self, saved: SavedMachine) {
        let (job, pagemap, changed) = match self.job(saved) {
            Ok(job) => job,
            Err(error) => return self.end_saving(Err(error)),
        };
        if job.header.kind == Kind::Fork {
            return self.freeze(job, pagemap);
        }
        match self.memory().map(|memory| memory.contents(pagemap)) {
            Some(contents) => self.have_written(job, Image::Memory(contents, changed)),
            None => self.end_saving(Err(no_machine())),
        }
    }

    /// What is to be written, by which descriptor pages in use are found, and which pages have changed,
    /// if that is tracked: it is told once, so nothing after it may fail.
    fn job(&mut self, saved: SavedMachine) -> Result<NewJob, ActionError> {
        if let Some(refused) = self.files.refuses() {
            return Err(ActionError::of(&refused));
        }
        let (Some(machine), Some(saving)) = (&self.machine, &mut self.saving) else {
            return Err(no_machine());
        };
        let memory = machine.memory.as_ref().ok_or_else(no_machine)?;
        let id = SnapshotId::random().context("Making the snapshot's id failed")?;
        let stamp = Stamp {
            offset: memory.offset_of(layout::SNAPSHOT_ID).unwrap_or(0),
            id: id.0,
        };
        let kind = saving.request.snapshot_type;
        let parent = self.last_snapshot.filter(|_| kind == SnapshotType::Diff);
        let header = Header {
            version: saved.version(),
            id,
            kind: match (kind, parent) {
                (SnapshotType::Fork, _) => Kind::Fork,
                (SnapshotType::Diff, Some(_)) => Kind::Diff,
                // There is nothing that a first diff could be applied to.
                _ => Kind::Full,
            },
            parent,
            memory: MemoryImage {
                len: 0,
                check: None,
                id_at: stamp.offset,
            },
            taken: clock::realtime_nanos(),
        };
        let pagemap = saving.request.pagemap.as_ref();
        let pagemap = pagemap.map(|pagemap| saving.passed.claim(pagemap.fd));
        let pagemap = pagemap.transpose().context(CREATE_FAILED)?;
        let pagemap = pagemap.map(|fd| Arc::new(File::from(fd)));
        // What has changed is asked for in any case: the next diff begins here.
        let tracks = self.configuration.machine.track_dirty_pages;
        let changed = tracks.then(|| memory.take_changed(&machine.vm));
        let changed = changed.transpose().context(FAILED)?;
        let job = Job {
            request: saving.request.clone(),
            passed: mem::take(&mut saving.passed),
            stamp,
            header,
            saved,
        };
        Ok((job, pagemap, changed))
    }

    /// Gives guest memory to the files thread, which freezes it.
    fn freeze(&mut self, job: Job, pagemap: Option<Arc<File>>) {
        let saving = self.saving.as_mut();
        let prepared = saving.and_then(|saving| saving.prepared.take());
        let memory = self.machine.as_mut();
        let Some(mut memory) = memory.and_then(|machine| machine.memory.take()) else {
            return self.end_saving(Err(no_machine()));
        };
        self.hand_over(Step::Freezing, Limit::None, move |steps| {
            steps.begin("freezing guest memory");
            let frozen = memory.freeze(prepared, &job.stamp, pagemap);
            FileResult::ForkFrozen(Box::new((memory, frozen, job)))
        });
    }

    /// The files thread gives guest memory back, frozen or not. The guest goes on, and the files are
    /// written beside it. The exit code, if it cannot go on.
    pub(super) fn fork_frozen(
        &mut self,
        memory: Memory,
        frozen: Result<Frozen, MemoryError>,
        job: Job,
    ) -> Next {
        if let Some(machine) = &mut self.machine {
            machine.memory = Some(memory);
        }
        match frozen {
            Ok(frozen) => {
                self.resume_after_saving();
                self.have_written(job, Image::Frozen(frozen));
            }
            Err(error @ MemoryError::Lost(_)) => {
                error!("The guest cannot go on: {}.", ActionError::of(&error));
                return Next::Exit(exit::ERROR);
            }
            Err(error) => {
                self.end_saving(Err(ActionError::of(&error)));
            }
        }
        Next::GoOn
    }

    /// Lets a guest run that ran before.
    fn resume_after_saving(&mut self) {
        if self
            .saving
            .as_mut()
            .is_some_and(|saving| mem::take(&mut saving.resumes))
        {
            self.advance(Input::Resume(Waiter::None));
        }
    }

    /// The files thread has written both files, or failed to.
    pub(super) fn snapshot_written(&mut self, written: Written) {
        let Written { changed, result } = written;
        match &result {
            Ok(id) => self.last_snapshot = Some(*id),
            Err(_) => {
                if let (Some(memory), Some(changed)) = (self.memory(), &changed) {
                    memory.put_back(changed);
                }
            }
        }
        self.end_saving(result.map(drop));
    }

    /// Whether a fork is being written, whose memory is frozen: what its guest does is of no matter any more. (Other
    /// snapshots are of a guest that is paused, which cannot end by itself.)
    pub(super) fn is_writing_fork(&self) -> bool {
        self.saving.as_ref().is_some_and(|saving| {
            let is_fork = saving.request.snapshot_type == SnapshotType::Fork;
            is_fork && matches!(saving.step, Step::Writing)
        })
    }

    /// A file, or a handler of page faults, does not answer: the client is told, and what comes of it
    /// later is not used.
    pub(super) fn saving_hangs(&mut self, message: String) {
        // What has changed before it went with the work: the next diff has to hold all.
        self.last_snapshot = None;
        self.end_saving(Err(ActionError(format!("{CREATE_FAILED}: {message}"))));
    }

    /// Answers, and lets a guest run that ran before.
    fn end_saving(&mut self, result: Result<(), ActionError>) {
        self.resume_after_saving();
        if let Some(saving) = self.saving.take() {
            let is_fork = saving.request.snapshot_type == SnapshotType::Fork;
            let may_have_begun = matches!(
                saving.step,
                Step::Collecting { .. } | Step::Freezing | Step::Writing
            );
            if result.is_err() && is_fork && may_have_begun {
                // What has changed before it is told by no log any more, and memory that was frozen
                // has no page of its own left: the next diff has to hold all.
                self.last_snapshot = None;
            }
            saving.client.send(result.map(|()| Outcome::Done));
            self.close_passed(saving.passed);
        }
    }
}

fn bit(number: u32) -> u32 {
    1u32.checked_shl(number).unwrap_or(0)
}

fn is_in(devices: u32, number: u32) -> bool {
    devices & bit(number) != 0
}
