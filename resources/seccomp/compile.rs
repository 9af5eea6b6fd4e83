//! Compiles seccomp filters for a build script: one JSON file a category, each becoming a table of
//! BPF instructions in the program. A rule that does not compile, a category that is missing and a
//! file that belongs to none all fail the build.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use seccompiler::{TargetArch, compile_from_json, sock_filter};

/// Writes a table for each of `categories`, which are the files of `folder`, into `into`. Every
/// program begins with `before`.
pub fn compile(
    folder: &Path,
    arch: &str,
    categories: &[&str],
    before: &[sock_filter],
    into: &Path,
) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let found: BTreeSet<String> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, std::io::Error>>()?;
    let wanted: BTreeSet<String> = categories.iter().map(|c| format!("{c}.json")).collect();
    if found != wanted {
        return Err(format!("{}: has {found:?}, wanted {wanted:?}", folder.display()).into());
    }

    let mut source = String::new();
    for &category in categories {
        let path = folder.join(format!("{category}.json"));
        let named = |error: &dyn Error| format!("{}: {error}", path.display());
        let arch = TargetArch::try_from(arch).map_err(|e| named(&e))?;
        let mut filters = compile_from_json(File::open(&path)?, arch).map_err(|e| named(&e))?;
        let program = filters
            .remove(category)
            .filter(|_| filters.is_empty())
            .ok_or_else(|| format!("{}: must hold `{category}` alone", path.display()))?;
        writeln!(
            source,
            "static {}: [sock_filter; {}] = [",
            category.to_uppercase(),
            before.len() + program.len()
        )?;
        for step in before.iter().chain(&program) {
            writeln!(
                source,
                "    sock_filter {{ code: {:#x}, jt: {}, jf: {}, k: {:#x} }},",
                step.code, step.jt, step.jf, step.k
            )?;
        }
        writeln!(source, "];")?;
    }
    fs::write(into, source)?;
    Ok(())
}
