//! x86_64 under KVM.

mod acpi;
pub mod boot;
pub mod boot_timer;
pub mod chips;
pub mod cmos;
mod command_line;
pub mod cpuid;
pub mod fingerprint;
mod gdt;
pub mod generation;
#[cfg(test)]
pub mod guest_tests;
pub mod i8042;
pub mod kernel;
pub mod layout;
pub mod mask;
mod mirror;
mod mptable;
mod msr;
pub mod power;
#[cfg(test)]
mod properties;
pub mod split;
#[cfg(test)]
mod state_tests;
pub mod vcpu;
pub mod vm;

pub use boot::Protocol;
#[cfg(any(test, fuzzing))]
pub use command_line::fuzz::cmdline;
pub use kernel::Kernel;
pub use vm::{Vcpu, VcpuAccess, Vm};
