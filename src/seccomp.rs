//! The seccomp filter of each kind of thread.
//!
//! The rules are data: `resources/seccomp/x86_64/*.json`, one file a category, each rule with the
//! reason it is there, compiled to BPF by the build. A thread's code knows one thing about its
//! filter: its [`Category`]. A call outside the filter traps; the handler
//! ([`sys::signal`](crate::sys::signal)) writes one line and ends the process with code 148.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::error::Error;
use std::fmt;

use seccompiler::sock_filter;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What a thread is, and so what it may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// Reads requests and writes responses.
    Api,
    /// Owns the virtual machine.
    Control,
    /// Does what may wait for a file; the only one that may open files.
    Files,
    /// Runs guest code.
    Vcpu,
    /// Serves a disk.
    Block,
    /// Serves a network interface.
    Net,
    /// Moves console bytes.
    Serial,
    /// Carries log lines to their place.
    Log,
}

/// A filter could not be installed.
#[derive(Debug)]
pub struct InstallError {
    category: Category,
    cause: seccompiler::Error,
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Installing the seccomp filter of a {:?} thread failed (does the host's kernel have \
             CONFIG_SECCOMP_FILTER?)",
            self.category
        )
    }
}

impl Error for InstallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.cause)
    }
}

/// Installs the filter of `category` on the calling thread, for good.
///
/// # Errors
/// When the kernel has no seccomp filters.
pub fn install(category: Category) -> Result<(), InstallError> {
    let program: &[sock_filter] = match category {
        Category::Api => &API,
        Category::Control => &CONTROL,
        Category::Files => &FILES,
        Category::Vcpu => &VCPU,
        Category::Block => &BLOCK,
        Category::Net => &NET,
        Category::Serial => &SERIAL,
        Category::Log => &LOG,
    };
    seccompiler::apply_filter(program).map_err(|cause| InstallError { category, cause })
}
