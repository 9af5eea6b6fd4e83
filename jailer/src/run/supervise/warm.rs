//! Guests that are copies of a template (`run --image --template`), and the making of one.
//!
//! ```text
//!   there is one    copy: load of the template with the guest's own files --> agent is set up
//!   there is none   boot with empty disks --> agent is there --> saved into the template
//!                   --> the guest's own disks in their places --> agent is set up
//! ```
//!
//! - What decides runs before there is a jail ([`choose`]). What saves runs in the supervisor's loop, which serves all else
//!   meanwhile.
//! - The guest that a template is made of has neither its disks nor been told what it is to be: nothing of an
//!   image, a command or a secret is in it. Its network interface is down; its address is replaced in each copy.
//! - Each guest, the first one as well, gets new random bytes, and learns which disks it has. The wall clock is the
//!   monitor's to set. What kernels make of random numbers while they boot is the same in all copies.
//! - A template that cannot be made, for want of space or whatever else, costs the guest nothing but that.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use mayfly::wire::Source;
use mayfly_agent_protocol::fields::SEED_LEN;
use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom};
use serde_json::json;

use super::Watch;
use super::snapshot::TakeError;
use crate::error::{AnyError, Failure, Step as _, message};
use crate::run::agent::{Agent, Beginning, Plan, Renewal};
use crate::run::spec::vm::Vm;
use crate::run::template::{Found, Parts, Shape, Store, Template, Work};

/// How long a guest is left alone before it is saved: what its kernel still does after the agent has spoken is not done
/// again in each copy.
const SETTLE_US: u64 = 100_000;
/// Size of the disks that a guest boots with which a template is made of: one page, of zeros.
const EMPTY_LEN: u64 = 4096;
/// The address of the network interface of a guest that a template is made of, by which each copy finds it. Locally
/// administered.
const SAVED_MAC: [u8; 6] = [0x06, 0x6d, 0x66, 0x74, 0x70, 0x6c];

/// How a guest begins.
#[derive(Debug)]
pub enum Chosen {
    /// By booting, without regard to templates.
    Boot,
    /// By booting, and a template is made on the way.
    Make(Store, Shape),
    /// As a copy.
    Copy(Template),
}

/// A template that is going to be made.
#[derive(Debug)]
pub struct Making {
    store: Store,
    shape: Shape,
    work: Work,
    /// The disks of the guest, by id.
    disks: Vec<(String, OwnedFd)>,
    /// When, once the agent is there.
    at_us: Option<u64>,
}

/// What there is to tell of the choice.
#[derive(Debug)]
pub struct Told {
    /// The guest is a copy.
    pub is_copy: bool,
    /// For the exit report and the log.
    pub note: String,
    /// Something is wrong, and not only missing.
    pub is_warning: bool,
}

impl Told {
    fn new(is_copy: bool, note: impl Into<String>) -> Told {
        Told {
            is_copy,
            note: note.into(),
            is_warning: false,
        }
    }

    /// Writes it to the log, if that is a file; what is wrong to standard error otherwise.
    pub fn write(&self, log: Option<&File>) {
        let how = match self.is_copy {
            true => "the guest is a copy of a template",
            false => "the guest boots",
        };
        let text = format!("mayfly-jailer: {how} (--template): {}\n", self.note);
        // A log that cannot be written to ends no microVM.
        let _ = match log {
            Some(mut log) => log.write_all(text.as_bytes()),
            None if self.is_warning => std::io::stderr().write_all(text.as_bytes()),
            None => Ok(()),
        };
    }
}

/// Chooses how the guest of `plan` begins, and has it told what is to be new in it. `monitor` and `initramfs` are those that
/// it would boot with.
pub fn choose(
    folder: &Path,
    vm: &Vm,
    monitor: BorrowedFd<'_>,
    initramfs: BorrowedFd<'_>,
    plan: &mut Plan,
) -> Result<(Chosen, Told), AnyError> {
    let store = Store::open(folder)?;
    let shape = vm.shape(plan.interface.is_some()).map_err(str::to_owned);
    let shape = shape.and_then(|machine| {
        let kernel = vm.kernel().ok_or("it has no kernel")?.as_fd();
        Shape::of(&Parts {
            monitor,
            kernel,
            initramfs,
            machine: &machine,
        })
    });
    let shape = match shape {
        Ok(shape) => shape,
        Err(why) => return Ok((Chosen::Boot, Told::new(false, why))),
    };
    let old_mac = plan.interface.as_ref().map(|_| SAVED_MAC);
    plan.renewal = Some(renewal(vm, old_mac)?);
    let (chosen, told) = match store.find(&shape) {
        Found::Template(template) => {
            let note = template.path().display().to_string();
            (Chosen::Copy(template), Told::new(true, note))
        }
        Found::Nothing => {
            let note = "there is none of its kind yet, and one is made";
            (Chosen::Make(store, shape), Told::new(false, note))
        }
        Found::Damaged(why) => {
            let told = Told {
                is_warning: true,
                ..Told::new(
                    false,
                    format!("the template cannot be used, and is made anew: {why}"),
                )
            };
            (Chosen::Make(store, shape), told)
        }
    };
    Ok((chosen, told))
}

/// What is new in a guest besides its files.
fn renewal(vm: &Vm, old_mac: Option<[u8; 6]>) -> Result<Renewal, AnyError> {
    let mut seed = [0; SEED_LEN];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .step("read random bytes for the guest")?;
    let sectors = vm.disks().into_iter().map(|(id, disk)| {
        let length = rustix::fs::seek(disk, SeekFrom::End(0));
        let length = length.step(format!("learn the size of the disk {id}"))?;
        Ok::<u64, Failure>(length / 512)
    });
    Ok(Renewal {
        seed,
        sectors: sectors.collect::<Result<_, _>>()?,
        old_mac,
    })
}

impl Chosen {
    /// Where the session with the agent begins.
    pub fn beginning(&self) -> Beginning {
        match self {
            Chosen::Boot => Beginning::Boot,
            Chosen::Make(..) => Beginning::Wait,
            Chosen::Copy(_) => Beginning::Copy,
        }
    }

    /// Has the machine begin like that, once it has all its devices.
    pub fn apply(
        self,
        vm: &mut Option<Vm>,
    ) -> Result<(Option<Making>, Option<Template>), AnyError> {
        match self {
            Chosen::Boot => Ok((None, None)),
            Chosen::Copy(template) => {
                let files = (template.state.try_clone(), template.memory.try_clone());
                let (state, memory) = (files.0.step(COPY)?, files.1.step(COPY)?);
                *vm = vm.take().map(|vm| vm.start_from(state, memory));
                Ok((None, Some(template)))
            }
            Chosen::Make(store, shape) => {
                let work = store.begin()?;
                let empty = empty_disk().step("make an empty disk in memory")?;
                let disks = vm.as_mut().map(|vm| {
                    vm.set_macs(SAVED_MAC);
                    vm.take_disks(&empty)
                });
                let making = Making {
                    store,
                    shape,
                    work,
                    disks: disks.transpose().step(COPY)?.unwrap_or_default(),
                    at_us: None,
                };
                Ok((Some(making), None))
            }
        }
    }
}

const COPY: &str = "copy a descriptor";

/// A disk of zeros, which can only be read.
fn empty_disk() -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("empty-disk", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, EMPTY_LEN)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/self/fd/{number}"), flags, Mode::empty())
}

impl Watch {
    /// When a template is to be made, once its guest is ready for that.
    pub(super) fn template_due_us(&self) -> Option<u64> {
        let at_us = self.making.as_ref().and_then(|making| making.at_us);
        at_us.filter(|at| *at > self.now_us() && !self.is_ending())
    }

    /// Makes the template, if it is time, and has the guest go on.
    pub(super) fn make_template_when_due(&mut self) {
        let now = self.now_us();
        let progress = &self.progress;
        let is_free = progress.has_started && progress.is_monitor && progress.question.is_none();
        let is_waiting = self.agent.as_ref().is_some_and(Agent::awaits_setup);
        if !is_waiting || !is_free || self.is_ending() || self.client.is_none() {
            return;
        }
        let Some(making) = &mut self.making else {
            return;
        };
        if now < *making.at_us.get_or_insert(now + SETTLE_US) {
            return;
        }
        let Some(making) = self.making.take() else {
            return;
        };
        let saved = self.take_snapshot(making.work.path(), true);
        if self.is_ending() || self.progress.ended.is_some() {
            return;
        }
        if let Err(error) = self.give_disks(making.disks) {
            return self.give_up(error);
        }
        let set_up = self.agent.as_mut().map(Agent::set_up);
        if let Some(Err(error)) = set_up {
            return self.give_up(error.into());
        }
        let kept = match saved {
            Ok(_) => making.store.keep(making.work, &making.shape),
            Err(error) => Err(Failure::new("save the guest as a template", error)),
        };
        if let Err(error) = kept
            && let Some((_, note)) = &mut self.progress.seen.copied
        {
            *note = message(&error);
        }
    }

    /// Puts the guest's disks in the places of the empty ones.
    fn give_disks(&mut self, disks: Vec<(String, OwnedFd)>) -> Result<(), AnyError> {
        for (id, disk) in disks {
            let body = json!({ "drive_id": id, "path_on_host": Source::passed(0, id.clone()) });
            let path = format!("/drives/{id}");
            match self.ask("PATCH", &path, &body.to_string(), &[disk.as_fd()]) {
                // How it ends counts then.
                Ok(()) | Err(TakeError::Ending) => {}
                Err(error) => return Err(Failure::new("give the guest its disks", error).into()),
            }
        }
        Ok(())
    }
}
