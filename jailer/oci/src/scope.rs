//! A container's scope, where the engine leaves control groups to systemd (`--systemd-cgroup`).
//!
//! A scope is a unit of processes that systemd has not started. It is made with this process in it, which
//! then starts the container's: so all of them are in it from the first on, and at no time is it without a
//! process, which would be its end. Who asks for a scope:
//!
//! ```text
//!   lifecycle                      systemd
//!   record the unit's name
//!   StartTransientUnit ----------> makes the groups, moves this process into them
//!   wait: active <----------------
//!   where is it (ControlGroup) --> /machine.slice/libpod-ID.scope
//!   record its groups; make those of controllers that systemd does not know (version 1:
//!   cpuset and freezer), write what there is no property for, enter all (cgroup)
//!   ...
//!   leave them, end what is in them
//!   StopUnit --------------------> removes its groups
//!   wait: inactive; remove the other groups
//! ```
//!
//! - Limits are both properties, which systemd writes again whenever it is told to (`daemon-reload`), and
//!   files, which hold what there is no property for. The scope is delegated: systemd leaves these files
//!   alone.
//! - Whose a unit is, its description says: it has the path of the container's folder. So a container whose
//!   `create` was killed, or whose name another has taken since, ends no unit but its own.
//! - A unit that has failed, or ends, gives way to a new one of its name; one that is there is an error.
//! - Every question to systemd is one run of `busctl`, which is systemd's own program and comes with it. A
//!   D-Bus library would be most of this program, and each question is a line of words.
//!
//! An ordinary user asks the manager of that user's own session.

mod busctl;
mod properties;

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::busctl::{Busctl, BusctlError};
use self::properties::Property;
use crate::bundle::place::{self, Scope};
use crate::bundle::resources::FileText;
use crate::error::AnyError;
use crate::user::User;

/// How long systemd may take to make a scope, or to end one.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long until it is asked again.
const PAUSE: Duration = Duration::from_millis(10);

/// systemd does not make a scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    #[error(
        "cannot make the scope {0}: systemd has a unit of this name, which is {1}; end that container, or give another \
         linux.cgroupsPath"
    )]
    Exists(String, String),
    #[error("cannot make the scope {0}: systemd did not start it; `journalctl -u {0}` may say why")]
    NotStarted(String),
    #[error("cannot {0} the scope {1}: systemd has not done so within {seconds} seconds", seconds = PATIENCE.as_secs())]
    Late(&'static str, String),
    #[error(
        "cannot use the scope {0}: systemd has it in the control group \"{1}\", which is not where its slice is"
    )]
    Elsewhere(String, String),
    #[error("cannot understand what busctl says of {0}: {1}")]
    Answer(String, String),
}

/// A unit, as systemd has it now.
#[derive(Debug)]
struct UnitState {
    state: String,
    has_job: bool,
    description: String,
}

impl UnitState {
    /// Nothing of it is there, or is about to be.
    fn is_gone(&self) -> bool {
        self.state == "inactive" && !self.has_job
    }
}

/// Makes sure that systemd can be asked at all.
pub fn check(user: User) -> Result<(), BusctlError> {
    Busctl::find(user).map(drop)
}

/// The scope of one container.
#[derive(Debug)]
pub struct Unit {
    busctl: Busctl,
    name: String,
    description: String,
}

impl Unit {
    /// The scope `name` of the container whose folder this is, which need not be there.
    pub fn of(name: &str, folder: &Path, user: User) -> Result<Unit, BusctlError> {
        // Whichever links the state folder is named by, and in the form in which it comes back.
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let folder = folder.to_string_lossy().replace(char::is_control, "?");
        Ok(Unit {
            busctl: Busctl::find(user)?,
            name: name.to_owned(),
            description: format!("mayfly-oci container {folder}"),
        })
    }

    /// Makes it, with this process in it; where its group is, below the mount points. `files` are what its groups
    /// are to be told, `has_v1` says that some are of version 1.
    pub fn start(
        &self,
        scope: &Scope,
        files: &[&FileText],
        has_v1: bool,
    ) -> Result<PathBuf, AnyError> {
        let default = match self.busctl.is_of_a_user() {
            true => "user.slice",
            false => "system.slice",
        };
        let slice = scope.slice.as_deref().unwrap_or(default);
        let limits = self.known(properties::limits(files))?;
        let mut words = vec![self.name.clone(), "fail".into()];
        let own = properties::own(slice, &self.description, std::process::id(), has_v1);
        properties::add(&mut words, own.iter().chain(&limits));
        // No units beside it.
        words.push("0".into());
        self.request(&words)?;
        self.wait_until_active()?;
        self.group(slice)
    }

    /// Asks for it, also in place of one that has ended.
    fn request(&self, words: &[String]) -> Result<(), AnyError> {
        let until = Instant::now() + PATIENCE;
        let mut was_reset = false;
        loop {
            let refused = match self
                .busctl
                .call("StartTransientUnit", "ssa(sv)a(sa(sv))", words)
            {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if !matches!(refused, BusctlError::Refused(..)) {
                return Err(refused.into());
            }
            let unit = self.read()?;
            match &*unit.state {
                "failed" | "inactive" if !was_reset && !unit.has_job => {
                    // An error says that it is not there any more: the next try is answered.
                    let _ =
                        self.busctl
                            .call("ResetFailedUnit", "s", std::slice::from_ref(&self.name));
                    was_reset = true;
                }
                "failed" | "inactive" if !unit.has_job => return Err(refused.into()),
                "deactivating" if Instant::now() < until => std::thread::sleep(PAUSE),
                state => {
                    return Err(ScopeError::Exists(self.name.clone(), state.to_owned()).into());
                }
            }
        }
    }

    fn wait_until_active(&self) -> Result<(), AnyError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let unit = self.read()?;
            if unit.state == "active" {
                return Ok(());
            }
            if !unit.has_job {
                return Err(ScopeError::NotStarted(self.name.clone()).into());
            }
            if Instant::now() >= until {
                return Err(ScopeError::Late("make", self.name.clone()).into());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Where its group is, below the mount points.
    fn group(&self, slice: &str) -> Result<PathBuf, AnyError> {
        let answer = self
            .busctl
            .properties(&self.name, "Scope", &["ControlGroup"])?;
        let text = answer.first().and_then(Value::as_str).unwrap_or_default();
        let below = PathBuf::from(text.trim_start_matches('/'));
        let expected = place::slice_path(slice).join(&self.name);
        let is_plain = below
            .components()
            .all(|one| matches!(one, Component::Normal(_)));
        match is_plain && below.ends_with(expected) {
            true => Ok(below),
            false => Err(ScopeError::Elsewhere(self.name.clone(), text.to_owned()).into()),
        }
    }

    /// Changes its limits.
    pub fn update(&self, files: &[&FileText]) -> Result<(), AnyError> {
        let limits = self.known(properties::limits(files))?;
        if limits.is_empty() {
            return Ok(());
        }
        // For this start of the host.
        let mut words = vec![self.name.clone(), "true".into()];
        properties::add(&mut words, limits.iter());
        self.busctl.call("SetUnitProperties", "sba(sv)", &words)?;
        Ok(())
    }

    /// Whether systemd has one of this name that is not this container's.
    pub fn is_anothers(&self) -> Result<bool, AnyError> {
        let unit = self.read_if_any()?;
        Ok(unit.is_some_and(|unit| !unit.is_gone() && unit.description != self.description))
    }

    /// Ends it, with the processes that are in it, if it is this container's.
    pub fn stop(&self) -> Result<(), AnyError> {
        let is_own = |unit: &UnitState| !unit.is_gone() && unit.description == self.description;
        if !self.read_if_any()?.as_ref().is_some_and(is_own) {
            return Ok(());
        }
        // It may end by itself at any time, and cannot be stopped then.
        let stopped = self
            .busctl
            .call("StopUnit", "ss", &[self.name.clone(), "replace".into()]);
        let mut refused = stopped.err();
        let until = Instant::now() + PATIENCE;
        loop {
            let unit = self.read()?;
            if !is_own(&unit) {
                return Ok(());
            }
            if unit.state == "failed" {
                let _ = self
                    .busctl
                    .call("ResetFailedUnit", "s", std::slice::from_ref(&self.name));
            } else if let Some(error) = refused.take() {
                return Err(error.into());
            }
            if Instant::now() >= until {
                return Err(ScopeError::Late("end", self.name.clone()).into());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// As systemd has it; without a systemd there is none.
    fn read_if_any(&self) -> Result<Option<UnitState>, AnyError> {
        match self.read() {
            Ok(unit) => Ok(Some(unit)),
            Err(error) => match error.downcast_ref() {
                Some(BusctlError::NoSystemd) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Those properties that this systemd knows: it refuses a unit for one that it does not.
    fn known(&self, properties: Vec<Property>) -> Result<Vec<Property>, AnyError> {
        if properties.iter().all(|one| one.since == 0) {
            return Ok(properties);
        }
        let version = self.busctl.version()?;
        let is_known = |one: &Property| one.since <= version;
        Ok(properties.into_iter().filter(is_known).collect())
    }

    fn read(&self) -> Result<UnitState, AnyError> {
        // One question for each, in this order: a unit whose job has ended has the state after it, and one that is
        // not there any more had its description while it was.
        let names = ["Description", "Job", "ActiveState"];
        let answer = self.busctl.properties(&self.name, "Unit", &names)?;
        let parsed = || {
            let [description, job, state] = &answer[..] else {
                return None;
            };
            Some(UnitState {
                state: state.as_str()?.to_owned(),
                has_job: job.get(0)?.as_u64()? != 0,
                description: description.as_str()?.to_owned(),
            })
        };
        let wrong =
            || ScopeError::Answer(self.name.clone(), Value::Array(answer.clone()).to_string());
        Ok(parsed().ok_or_else(wrong)?)
    }
}
