//! Lines of the log that tools written for Firecracker wait for, in its own words.

use crate::exit;
use crate::wire::API_VERSION;

/// The first line.
pub fn running() -> String {
    let own = env!("CARGO_PKG_VERSION");
    format!("Running Firecracker v{API_VERSION} (mayfly v{own})")
}

/// Clients may connect.
pub const API_STARTED: &str = "API server started.";
/// A guest runs that a configuration file described.
pub const STARTED_FROM_FILE: &str =
    "Successfully started microvm that was configured from one single json";
/// A guest does not, for the reason that follows.
pub const BAD_CONFIGURATION: &str =
    "Failed to build MicroVM from Json: Configuration for VMM from one single json failed: ";
/// The guest has ended, or is to.
pub const STOPPING: &str = "Vmm is stopping.";

/// The last line.
pub fn exiting(code: i32) -> String {
    let how = match code {
        exit::GUEST_ENDED => "successfully",
        _ => "with error",
    };
    format!("Firecracker exiting {how}. exit_code={code}")
}
