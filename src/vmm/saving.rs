//! Taking a snapshot of a paused guest: what control does between the request and the answer.
//!
//! ```text
//!   request --> Collecting --> gather --> Writing --> answer
//!                each device    vCPUs,      files thread: memory image, state file
//!                saves itself   chips ...
//! ```
//!
//! One at a time; what clients ask for meanwhile waits in order, but for questions. If it fails, the
//! pages that the image held are counted as changed again.

use std::fs::File;
use std::time::{Duration, Instant};
use std::{io, mem};

use super::Vmm;
use super::action::{Outcome, Reply};
use super::file_work::{Awaited, FileResult};
use super::saved::{MachineState, SavedConfig, SavedMachine};
use crate::arch::fingerprint::Fingerprint;
use crate::arch::layout;
use crate::error::{ActionError, Context};
use crate::files::Steps;
use crate::memory::image::{Contents, Stamp};
use crate::memory::page_set::PageSet;
use crate::snapshot::{self, Header, Kind, MemoryImage, SnapshotId, Target};
use crate::sys::clock;
use crate::sys::passed::Passed;
use crate::wire::config::{SnapshotCreate, SnapshotType, Source};

/// How long a device may take to save itself. It stands still: only its thread has to wake up.
const DEVICE_PATIENCE: Duration = Duration::from_secs(5);

const FAILED: &str = "Saving the microVM failed";
/// How Firecracker begins the message.
const CREATE_FAILED: &str = "Cannot create the snapshot";

/// In a token: that it belongs to a snapshot. The rest is the device's number.
const SAVE: u64 = 1 << 62;

/// A snapshot that is being taken.
#[derive(Debug)]
pub(super) struct Saving {
    request: SnapshotCreate,
    passed: Passed,
    client: Reply,
    step: Step,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// It has been asked for.
    Asked,
    /// Devices, by bit, that have not saved themselves yet.
    Collecting { devices: u32, deadline: Instant },
    /// The files thread writes.
    Writing,
}

/// What the files thread has made of it.
pub struct Written {
    /// The pages that had changed since the snapshot before.
    changed: Option<PageSet>,
    result: Result<SnapshotId, ActionError>,
}

/// What the files thread needs to write both files.
struct Job {
    request: SnapshotCreate,
    passed: Passed,
    contents: Contents,
    changed: Option<PageSet>,
    stamp: Stamp,
    header: Header,
    saved: SavedMachine,
}

impl Job {
    fn write(mut self, steps: &Steps) -> Written {
        let result = self.write_files(steps);
        Written {
            changed: self.changed,
            result,
        }
    }

    fn write_files(&mut self, steps: &Steps) -> Result<SnapshotId, ActionError> {
        let state = target(&self.request.snapshot_path, &mut self.passed)?;
        let memory = self.request.mem_file_path.as_ref();
        let memory = memory.ok_or_else(|| ActionError("missing field `mem_file_path`".into()))?;
        let memory = target(memory, &mut self.passed)?;
        let fill = |file: &File| -> io::Result<MemoryImage> {
            let (contents, stamp) = (&self.contents, &self.stamp);
            let written = match (self.header.kind, &self.changed) {
                (Kind::Diff, Some(changed)) => contents.write_diff(file, stamp, changed),
                (Kind::Diff, None) => contents.write_private(file, stamp),
                _ => contents.write_full(file, stamp),
            }?;
            Ok(MemoryImage {
                len: contents.len(),
                check: Some(written.check),
                id_at: stamp.offset,
            })
        };
        let encode = |memory| {
            let header = Header {
                memory,
                ..self.header.clone()
            };
            snapshot::encode(&header, &self.saved)
        };
        let wait = |what: &str| steps.begin(what);
        snapshot::write_pair(state, memory, &wait, fill, encode).context(CREATE_FAILED)?;
        Ok(self.header.id)
    }
}

/// Where a file of the snapshot goes.
fn target(source: &Source, passed: &mut Passed) -> Result<Target, ActionError> {
    Ok(match source {
        Source::Named(path) => Target::Path(path.into()),
        Source::Fd(passed_fd) => {
            let fd = passed.claim(passed_fd.fd);
            let name = source.to_string();
            let fd = fd.context(format_args!("{CREATE_FAILED}: Cannot use `{name}`"))?;
            let file = File::from(fd);
            Target::File { file, name }
        }
    })
}

impl Vmm {
    /// Begins a snapshot. The rules of state allow it: the guest is paused, unless it is forked.
    pub(super) fn save(&mut self, request: SnapshotCreate, passed: Passed, client: Reply) {
        let is_fork = request.snapshot_type == SnapshotType::Fork;
        self.saving = Some(Saving {
            request,
            passed,
            client,
            step: Step::Asked,
        });
        match is_fork {
            true => self.end_saving(Err(ActionError(
                "Forking a guest is not in this version.".into(),
            ))),
            false => self.collect(),
        }
    }

    /// Whether a snapshot is being taken.
    pub(super) fn is_saving(&self) -> bool {
        self.saving.is_some()
    }

    /// When a device that does not save itself is given up.
    pub(super) fn saving_deadline(&self) -> Option<Instant> {
        match self.saving.as_ref()?.step {
            Step::Collecting { deadline, .. } => Some(deadline),
            _ => None,
        }
    }

    /// Gives up a device that has had its time.
    pub(super) fn look_at_saving(&mut self, now: Instant) {
        if let Some(Step::Collecting { devices, deadline }) = self.saving.as_ref().map(|s| s.step)
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

    /// Has each device save itself.
    fn collect(&mut self) {
        if !self.is_quiescent() {
            return self.end_saving(Err(ActionError(
                "The microVM is paused, but a device still has I/O in flight, which may write guest \
                 memory. Try again when that has ended: the log tells."
                    .into(),
            )));
        }
        match self.tell_devices() {
            Ok(devices) => {
                let deadline = Instant::now() + DEVICE_PATIENCE;
                self.set_step(Step::Collecting { devices, deadline });
                self.write_when_collected();
            }
            Err(error) => self.end_saving(Err(error)),
        }
    }

    /// Tells each device to save itself; which have been told, by bit.
    fn tell_devices(&self) -> Result<u32, ActionError> {
        let mut devices = 0;
        for (number, device) in (0u32..).zip(self.configuration.devices.running()) {
            let told = device.save(SAVE | u64::from(number));
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
            step: Step::Collecting { devices, .. },
            ..
        }) = &mut self.saving
            && let Ok(number) = u32::try_from(token & !SAVE)
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
        let machine = machine.ok_or_else(|| ActionError("There is no machine.".into()))?;
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

    /// Gives the files thread what it needs to write both files.
    fn write(&mut self, saved: SavedMachine) {
        match self.begin_write(saved) {
            Ok(token) => {
                self.set_step(Step::Writing);
                self.awaited.push((token, Awaited::Saving));
            }
            Err(error) => self.end_saving(Err(error)),
        }
    }

    fn begin_write(&mut self, saved: SavedMachine) -> Result<u64, ActionError> {
        let (Some(machine), Some(saving)) = (&self.machine, &mut self.saving) else {
            return Err(ActionError("There is no machine.".into()));
        };
        if let Some(refused) = self.files.refuses() {
            return Err(ActionError::of(&refused));
        }
        let id = SnapshotId::random().context("Making the snapshot's id failed")?;
        let memory = &machine.memory;
        let stamp = Stamp {
            offset: memory.offset_of(layout::SNAPSHOT_ID).unwrap_or(0),
            id: id.0,
        };
        let tracks = self.configuration.machine.track_dirty_pages;
        // What has changed is asked for in any case: the next diff begins here.
        let changed = match tracks {
            true => Some(memory.take_changed(&machine.vm).context(FAILED)?),
            false => None,
        };
        let parent = match saving.request.snapshot_type {
            SnapshotType::Diff => self.last_snapshot,
            SnapshotType::Full | SnapshotType::Fork => None,
        };
        let header = Header {
            version: snapshot::VERSION,
            id,
            kind: if parent.is_some() {
                Kind::Diff
            } else {
                Kind::Full
            },
            parent,
            memory: MemoryImage {
                len: 0,
                check: None,
                id_at: stamp.offset,
            },
            taken: clock::realtime_nanos(),
        };
        let job = Job {
            request: saving.request.clone(),
            passed: mem::take(&mut saving.passed),
            contents: memory.contents(None),
            changed,
            stamp,
            header,
            saved,
        };
        let work = Box::new(move |steps: &Steps| FileResult::Saved(Box::new(job.write(steps))));
        self.files.submit(None, work).bare()
    }

    /// The files thread has written both files, or failed to.
    pub(super) fn snapshot_written(&mut self, written: Written) {
        let Written { changed, result } = written;
        match &result {
            Ok(id) => self.last_snapshot = Some(*id),
            Err(_) => {
                if let (Some(machine), Some(changed)) = (&self.machine, &changed) {
                    machine.memory.put_back(changed);
                }
            }
        }
        self.end_saving(result.map(drop));
    }

    /// Answers, and lets a guest run that ran before.
    fn end_saving(&mut self, result: Result<(), ActionError>) {
        if let Some(saving) = self.saving.take() {
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
