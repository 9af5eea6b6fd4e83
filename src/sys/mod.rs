//! Thin safe wrappers over raw system calls: the only code, beside the mapping of guest memory and
//! its registration with KVM, that may be `unsafe`. Each wrapper is complete: no caller has a promise to keep. Nothing
//! here knows of anything else in the program; exit codes come in as values.
#![expect(unsafe_code, reason = "this is where raw system calls are wrapped")]

pub mod allocator;
pub mod cache;
pub mod clock;
pub mod fd;
pub mod folder;
pub mod io;
pub mod kvm;
pub mod landlock;
pub mod link;
pub mod packets;
pub mod pagemap;
pub mod passed;
pub mod process;
pub mod ring;
pub mod signal;
pub mod socket;
pub mod sync;
pub mod syscalls;
pub mod tap;
pub mod terminal;
#[cfg(test)]
pub mod testing;
pub mod thread;
pub mod uffd;
pub mod zeroed;
