//! Compiles the seccomp filters of the monitor's threads, `resources/seccomp/<arch>`.

#[path = "resources/seccomp/compile.rs"]
mod compile;

use std::path::Path;
use std::{env, error::Error};

/// Thread categories, as `seccomp::Category` has them.
const CATEGORIES: [&str; 8] = [
    "api", "block", "control", "files", "log", "net", "serial", "vcpu",
];

fn main() -> Result<(), Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?)
        .join("resources/seccomp")
        .join(&arch);
    let into = Path::new(&env::var("OUT_DIR")?).join("filters.rs");
    compile::compile(&folder, &arch, &CATEGORIES, &[], &into)
}
