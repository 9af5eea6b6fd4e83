//! Links the guests as plain static ELF files for a bare machine.
//!
//! The workspace builds with `+crt-static`, for which rustc asks the linker for a static
//! position-independent executable with the C library's start files. The arguments below
//! come after rustc's own and take that back: fixed addresses, no start files, no libraries,
//! and a linker script that places the image at 1 MiB.

use std::path::Path;

/// Where each guest's memory layout is written down, relative to this package.
const GUESTS: [(&str, &str); 2] = [
    ("probe", "src/probe.ld"),
    ("firstbyte", "src/firstbyte/firstbyte.ld"),
];

fn main() {
    let package = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    for (guest, script) in GUESTS {
        let script = Path::new(&package).join(script);
        println!("cargo:rerun-if-changed={}", script.display());
        for argument in [
            "-no-pie",
            "-static",
            "-nostartfiles",
            "-nodefaultlibs",
            "-Wl,--build-id=none",
            "-Wl,-z,norelro",
            "-Wl,-z,noexecstack",
            "-Wl,--gc-sections",
            "-Wl,--no-eh-frame-hdr",
        ] {
            println!("cargo:rustc-link-arg-bin={guest}={argument}");
        }
        println!(
            "cargo:rustc-link-arg-bin={guest}=-Wl,-T,{}",
            script.display()
        );
    }
}
