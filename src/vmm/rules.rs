//! The rules of state, in one table: what may be asked for before the start, while the guest
//! runs, and while it is paused. Pure, so that it is tested without a VM.

use super::action::{Action, Part};
use crate::error::ActionError;
use crate::wire::config::{AnyUpdate, SnapshotType};

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
    WhilePaused,
}

/// The table.
const fn when(action: &Action) -> When {
    match action {
        Action::Ask(_) => When::Always,
        Action::Configure(_) | Action::Start | Action::SnapshotLoad(_) => When::BeforeStart,
        Action::SnapshotCreate(create) => match create.snapshot_type {
            SnapshotType::Full | SnapshotType::Diff => When::WhilePaused,
            SnapshotType::Fork => When::AfterStart,
        },
        Action::PatchDevice(AnyUpdate::Drive(update)) if update.reset_overlay => When::WhilePaused,
        // Pause and resume are idempotent, so both are for either state after the start.
        Action::PatchDevice(_)
        | Action::SendCtrlAltDel
        | Action::FlushMetrics
        | Action::Pause
        | Action::Resume => When::AfterStart,
    }
}

/// Whether `action` is about a machine that is to boot: after one, asked for in vain or not, a snapshot
/// is loaded only by what replaces all of it.
pub const fn is_for_boot(action: &Action) -> bool {
    match action {
        Action::Configure(part) => match part {
            Part::Machine(_)
            | Part::MachineUpdate(_)
            | Part::BootSource(_)
            | Part::Device(_)
            | Part::All { .. } => true,
            Part::Serial(_) | Part::Cpu(_) | Part::Logger(_) | Part::Metrics(_) => false,
        },
        _ => false,
    }
}

/// Whether `action` may be asked for in `state`; `was_configured` says whether something was asked for
/// before that [`is_for_boot`].
///
/// # Errors
/// The message that Firecracker's clients know.
pub fn allow(action: &Action, state: State, was_configured: bool) -> Result<(), ActionError> {
    match (when(action), state) {
        (When::BeforeStart, State::NotStarted) => match action {
            Action::SnapshotLoad(restore) if was_configured && !restore.replaces => {
                Err(ActionError(
                    "Load snapshot error: Loading a microVM snapshot not allowed after \
                     configuring boot-specific resources."
                        .into(),
                ))
            }
            _ => Ok(()),
        },
        (When::Always, _)
        | (When::AfterStart, State::Running | State::Paused)
        | (When::WhilePaused, State::Paused) => Ok(()),
        (When::WhilePaused, State::Running) if matches!(action, Action::PatchDevice(_)) => {
            Err(ActionError(
                "Drive config error: An overlay is reset while the microVM is paused: pause it first".into(),
            ))
        }
        (When::WhilePaused, State::Running) => Err(ActionError(
            "Create snapshot error: Cannot save the microVM state: Operation not allowed: \
             save/restore unavailable while running"
                .into(),
        )),
        (When::BeforeStart, State::Running | State::Paused) => Err(ActionError(
            "The requested operation is not supported after starting the microVM.".into(),
        )),
        (When::AfterStart | When::WhilePaused, State::NotStarted) => Err(ActionError(
            "The requested operation is not supported before starting the microVM.".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::action::Question;
    use crate::wire::config::{self, AnyDevice, Restore, json};

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
            (load(), true, false),
            (
                Action::SnapshotCreate(from(r#"{"snapshot_path":"s","snapshot_type":"Fork"}"#)),
                false,
                true,
            ),
        ];
        for (action, before, after) in questions.into_iter().chain(parts).chain(others) {
            for (state, expected) in [
                (State::NotStarted, before),
                (State::Running, after),
                (State::Paused, after),
            ] {
                let answer = allow(&action, state, false);
                assert_eq!(answer.is_ok(), expected, "{action:?} in {state:?}");
                if let Err(ActionError(message)) = answer {
                    let side = if before { "after" } else { "before" };
                    assert!(message.contains(side), "{message}");
                }
            }
        }
    }

    fn load() -> Action {
        let load = from(r#"{"snapshot_path":"s","mem_file_path":"m"}"#);
        Action::SnapshotLoad(Box::new(Restore::new(load)))
    }

    #[test]
    fn overlay_when_reset_needs_a_paused_machine() {
        let update = from(r#"{"drive_id":"a","reset_overlay":true}"#);
        let reset = Action::PatchDevice(AnyUpdate::Drive(update));
        assert!(allow(&reset, State::Paused, true).is_ok());
        let refused = |state| allow(&reset, state, true).unwrap_err().0;
        assert!(refused(State::Running).ends_with("pause it first"));
        assert!(refused(State::NotStarted).contains("before starting"));
    }

    #[test]
    fn snapshot_when_created_needs_a_paused_machine() {
        for kind in ["Full", "Diff"] {
            let text = r#"{"snapshot_path":"s","mem_file_path":"m","snapshot_type":"KIND"}"#;
            let create = Action::SnapshotCreate(from(&text.replace("KIND", kind)));
            let refused = |state| allow(&create, state, true).unwrap_err().0;
            assert!(allow(&create, State::Paused, true).is_ok());
            assert!(refused(State::Running).ends_with("save/restore unavailable while running"));
            assert!(refused(State::NotStarted).contains("before starting"));
        }
    }

    #[test]
    fn snapshot_when_loaded_after_a_part_of_a_boot_is_refused() {
        let parts = [
            (Part::Machine(config::MachineConfig::default()), true),
            (
                Part::MachineUpdate(config::MachineConfigUpdate::default()),
                true,
            ),
            (Part::BootSource(from(r#"{"kernel_image_path":"k"}"#)), true),
            (Part::Logger(from("{}")), false),
            (Part::Metrics(from(r#"{"metrics_path":"m"}"#)), false),
            (Part::Serial(from("{}")), false),
            (Part::Cpu(from("{}")), false),
        ];
        for (part, expected) in parts {
            let action = Action::Configure(part);
            assert_eq!(is_for_boot(&action), expected, "{action:?}");
        }
        assert!(!is_for_boot(&load()) && !is_for_boot(&Action::Start));
        let ActionError(refused) = allow(&load(), State::NotStarted, true).unwrap_err();
        assert!(refused.contains("not allowed after configuring boot-specific resources"));
        let Action::SnapshotLoad(mut restore) = load() else {
            unreachable!()
        };
        restore.replaces = true;
        allow(&Action::SnapshotLoad(restore), State::NotStarted, true).unwrap();
    }

    #[test]
    fn state_when_named_is_what_clients_know() {
        let names = [State::NotStarted, State::Running, State::Paused].map(State::name);
        assert_eq!(names, ["Not started", "Running", "Paused"]);
    }
}
