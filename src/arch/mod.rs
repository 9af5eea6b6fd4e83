//! What depends on the processor: guest addresses, boot protocols, CPUID, registers, platform
//! devices. Re-exports the target's module, nothing more.

mod x86_64;

pub use x86_64::*;
