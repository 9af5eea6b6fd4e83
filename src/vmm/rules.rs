//! The rules of state, in one table: what may be asked for before the start, while the guest
//! runs, and while it is paused. Pure, so that it is tested without a VM.

use super::action::Action;
use crate::error::ActionError;

/// How far a VM has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is being configured, or a start has failed.
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

impl State {
    /// The name that `GET /` tells.
    pub const fn name(self) -> &'static str {
        match self {
            State::NotStarted => "Not started",
            State::Running => "Running",
            State::Paused => "Paused",
        }
    }
}

/// When something may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    BeforeStart,
    AfterStart,
}

/// The table.
const fn when(action: &Action) -> When {
    match action {
        Action::Ask(_) => When::Always,
        Action::Configure(_) | Action::Start => When::BeforeStart,
        // Pause and resume are idempotent, so both are for either state after the start.
        Action::PatchDevice(_)
        | Action::SendCtrlAltDel
        | Action::FlushMetrics
        | Action::Pause
        | Action::Resume => When::AfterStart,
    }
}

/// Whether `action` may be asked for in `state`.
///
/// # Errors
/// The message that Firecracker's clients know.
pub fn allow(action: &Action, state: State) -> Result<(), ActionError> {
    match (when(action), state) {
        (When::Always, _)
        | (When::BeforeStart, State::NotStarted)
        | (When::AfterStart, State::Running | State::Paused) => Ok(()),
        (When::BeforeStart, State::Running | State::Paused) => Err(ActionError(
            "The requested operation is not supported after starting the microVM.".into(),
        )),
        (When::AfterStart, State::NotStarted) => Err(ActionError(
            "The requested operation is not supported before starting the microVM.".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::action::{Part, Question};
    use crate::wire::config::{self, AnyDevice, AnyUpdate, json};

    fn from<T: serde::de::DeserializeOwned>(text: &str) -> T {
        json::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn allow_when_asked_in_each_state_follows_the_table() {
        let drive = r#"{"drive_id":"a","path_on_host":"p","is_root_device":true}"#;
        let network = r#"{"iface_id":"a","host_dev_name":"t"}"#;
        let questions = [
            Question::Instance,
            Question::Version,
            Question::VmConfig,
            Question::MachineConfig,
            Question::Metrics,
            Question::Timeline,
        ];
        let parts = [
            Part::Machine(config::MachineConfig::default()),
            Part::MachineUpdate(config::MachineConfigUpdate::default()),
            Part::BootSource(from(r#"{"kernel_image_path":"k"}"#)),
            Part::Device(AnyDevice::Drive(from(drive))),
            Part::Device(AnyDevice::NetworkInterface(from(network))),
            Part::Logger(from("{}")),
            Part::Metrics(from(r#"{"metrics_path":"m"}"#)),
            Part::Serial(from("{}")),
            Part::Cpu(from("{}")),
            Part::All {
                config: Box::default(),
                start: true,
            },
        ];
        // action, allowed before the start, allowed after it
        let questions = questions.map(|question| (Action::Ask(question), true, true));
        let parts = parts.map(|part| (Action::Configure(part), true, false));
        let others = [
            (Action::Start, true, false),
            (
                Action::PatchDevice(AnyUpdate::Drive(from(r#"{"drive_id":"a"}"#))),
                false,
                true,
            ),
            (
                Action::PatchDevice(AnyUpdate::NetworkInterface(from(r#"{"iface_id":"a"}"#))),
                false,
                true,
            ),
            (Action::SendCtrlAltDel, false, true),
            (Action::FlushMetrics, false, true),
            (Action::Pause, false, true),
            (Action::Resume, false, true),
        ];
        for (action, before, after) in questions.into_iter().chain(parts).chain(others) {
            for (state, expected) in [
                (State::NotStarted, before),
                (State::Running, after),
                (State::Paused, after),
            ] {
                let answer = allow(&action, state);
                assert_eq!(answer.is_ok(), expected, "{action:?} in {state:?}");
                if let Err(ActionError(message)) = answer {
                    let side = if before { "after" } else { "before" };
                    assert!(message.contains(side), "{message}");
                }
            }
        }
    }

    #[test]
    fn state_when_named_is_what_clients_know() {
        let names = [State::NotStarted, State::Running, State::Paused].map(State::name);
        assert_eq!(names, ["Not started", "Running", "Paused"]);
    }
}
