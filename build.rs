//! Compiles the seccomp filters: one JSON file a thread category under `resources/seccomp`, each
//! becoming a table of BPF instructions in the program. A rule that does not compile, a category
//! that is missing and a file that belongs to none all fail the build.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;
use std::{env, error::Error};

use seccompiler::{TargetArch, compile_from_json};

/// Thread categories, as `seccomp::Category` has them.
const CATEGORIES: [&str; 6] = ["api", "block", "control", "net", "serial", "vcpu"];

fn main() -> Result<(), Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?)
        .join("resources/seccomp")
        .join(&arch);
    println!("cargo::rerun-if-changed={}", folder.display());

    let found: BTreeSet<String> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, std::io::Error>>()?;
    let wanted: BTreeSet<String> = CATEGORIES.iter().map(|c| format!("{c}.json")).collect();
    if found != wanted {
        return Err(format!("{}: has {found:?}, wanted {wanted:?}", folder.display()).into());
    }

    let mut source = String::new();
    for category in CATEGORIES {
        let path = folder.join(format!("{category}.json"));
        let named = |error: &dyn Error| format!("{}: {error}", path.display());
        let arch = TargetArch::try_from(arch.as_str()).map_err(|e| named(&e))?;
        let mut filters = compile_from_json(File::open(&path)?, arch).map_err(|e| named(&e))?;
        let program = filters
            .remove(category)
            .filter(|_| filters.is_empty())
            .ok_or_else(|| format!("{}: must hold `{category}` alone", path.display()))?;
        writeln!(
            source,
            "static {}: [sock_filter; {}] = [",
            category.to_uppercase(),
            program.len()
        )?;
        for step in program {
            writeln!(
                source,
                "    sock_filter {{ code: {:#x}, jt: {}, jf: {}, k: {:#x} }},",
                step.code, step.jt, step.jf, step.k
            )?;
        }
        writeln!(source, "];")?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), source)?;
    Ok(())
}
