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

use crate::error::ActionError;
use crate::sys::passed::Passed;

type Open<T> = dyn FnOnce(&mut Passed) -> Result<T, ActionError> + Send;

/// A request that was checked; `T` is what its second step gives the third.
pub struct Change<T> {
    open: Box<Open<T>>,
    waits: bool,
}

/// The third step, where that replaces a part of `T`.
pub type Edit<T> = Box<dyn FnOnce(&mut T) -> Replaced + Send>;

/// What was replaced: the files thread closes it.
pub type Replaced = Box<dyn Any + Send>;

/// An [`Edit`] by `edit`, which returns what it replaces.
pub fn edit<T, R: Send + 'static>(
    edit: impl FnOnce(&mut T) -> R + Send + 'static,
) -> Result<Edit<T>, ActionError> {
    Ok(Box::new(|whole| Box::new(edit(whole))))
}

impl<T: 'static> Change<T> {
    /// One whose second step is `open`. It is taken to wait for files.
    pub fn new(open: impl FnOnce(&mut Passed) -> Result<T, ActionError> + Send + 'static) -> Self {
        Change {
            open: Box::new(open),
            waits: true,
        }
    }

    /// The same; whether its second step may wait for a file.
    pub fn waiting(self, waits: bool) -> Self {
        Change { waits, ..self }
    }

    /// Whether its second step may wait for a file.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// The same, which gives what `made` makes of what it gives.
    pub fn map<U: 'static>(self, made: impl FnOnce(T) -> U + Send + 'static) -> Change<U> {
        let Change { open, waits } = self;
        Change::new(|passed| open(passed).map(made)).waiting(waits)
    }

    /// Opens what it names, or takes it from what was passed with it. May wait.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(self, passed: &mut Passed) -> Result<T, ActionError> {
        (self.open)(passed)
    }
}

impl<T> fmt::Debug for Change<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Change")
    }
}
