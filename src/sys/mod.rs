//! Thin safe wrappers over raw system calls: the only code, beside guest memory's registration
//! with KVM, that may be `unsafe`. Each wrapper is complete: no caller needs to know a promise.
#![expect(unsafe_code, reason = "this is where raw system calls are wrapped")]
