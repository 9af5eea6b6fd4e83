//! A request that changes what is configured, or a running device, in three steps:
//!
//! 1. *check*: [`Configuration::check`] and its like judge the request beside all there is. Pure.
//! 2. *open*: [`Change::open`] opens the files that it names. This alone may wait for the host. It
//!    owns all it needs and borrows nothing of control's: the files thread does it.
//! 3. *commit*: control takes up what was opened ([`super::Vmm::commit`]). Nothing is opened any more.
//!
//! A request that fails in the first two steps has changed nothing. Between the first and the last
//! of one request control must not commit another: the checks would not hold.
//!
//! [`Configuration::check`]: super::configuration::Configuration::check

use std::any::Any;
use std::fmt;
use std::fs::File;

use super::configuration::Configuration;
use super::devices::Devices;
use crate::error::ActionError;
use crate::metrics::Sink;
use crate::sys::passed::Passed;
use crate::wire::config::Logger;

/// What the first step gives.
pub type Step = Result<Change, ActionError>;

type Open = dyn FnOnce(&mut Passed) -> Result<Ready, ActionError> + Send;
type ForConfiguration = dyn FnOnce(&mut Configuration) -> Replaced + Send;

/// What was replaced: it is closed by the files thread.
pub type Replaced = Box<dyn Any + Send>;
type ForDevice = dyn FnOnce(&mut Devices, u64) -> Result<(), ActionError> + Send;

/// A request that was checked.
pub struct Change {
    open: Box<Open>,
    waits: bool,
}

impl Change {
    /// One whose second step is `open`.
    pub fn new(
        open: impl FnOnce(&mut Passed) -> Result<Ready, ActionError> + Send + 'static,
    ) -> Self {
        Change {
            open: Box::new(open),
            waits: true,
        }
    }

    /// One that opens nothing.
    pub fn at_once<T: Send + 'static>(
        change: impl FnOnce(&mut Configuration) -> T + Send + 'static,
    ) -> Self {
        Change::new(|_| Ok(Ready::of(change))).waiting(false)
    }

    /// The same; whether its second step may wait for a file.
    pub fn waiting(self, waits: bool) -> Self {
        Change { waits, ..self }
    }

    /// Whether its second step may wait for a file.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Opens what it names, or takes it from what was passed with it. May wait.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(self, passed: &mut Passed) -> Result<Ready, ActionError> {
        (self.open)(passed)
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Change")
    }
}

/// A request whose files are open: all that is to be taken up.
#[derive(Default)]
pub struct Ready {
    /// A part of the configuration, or all of it.
    pub configuration: Option<Box<ForConfiguration>>,
    /// The log, and where it goes if that changes.
    pub logger: Option<(Logger, Option<File>)>,
    /// Where metrics go.
    pub metrics: Option<Sink>,
    /// A message to a running device, which answers with the given token.
    pub device: Option<Box<ForDevice>>,
    /// Start the guest.
    pub start: bool,
    /// A line for the log once it runs.
    pub line: Option<&'static str>,
}

impl Ready {
    /// A change of the configuration, which returns what it replaces.
    pub fn of<T: Send + 'static>(
        change: impl FnOnce(&mut Configuration) -> T + Send + 'static,
    ) -> Self {
        Ready {
            configuration: Some(Box::new(|configuration| Box::new(change(configuration)))),
            ..Ready::default()
        }
    }

    /// A message to a running device.
    pub fn for_device(
        send: impl FnOnce(&mut Devices, u64) -> Result<(), ActionError> + Send + 'static,
    ) -> Self {
        Ready {
            device: Some(Box::new(send)),
            ..Ready::default()
        }
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ready")
    }
}
