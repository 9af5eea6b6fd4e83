//! Build script of the programs for guests, `mayfly-agent` and `mayfly-exit`: links them as static programs without
//! the C library, of a few KiB, that run on any kernel.
//!
//! The arguments come after rustc's own, which ask for a static position-independent executable with the
//! C library's start files.

fn main() {
    for argument in [
        "-no-pie",
        "-static",
        "-nostartfiles",
        "-nodefaultlibs",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,noexecstack",
        "-Wl,-z,noseparate-code",
        "-Wl,--gc-sections",
        "-Wl,--no-eh-frame-hdr",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
