//! Turns data into tables: the seccomp filters of the monitor's threads (`resources/seccomp/<arch>`, one
//! file a category), and Firecracker's names of metrics (`resources/metrics/firecracker.json`).

#[path = "resources/seccomp/compile.rs"]
mod compile;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let resources = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("resources");
    let into = env::var("OUT_DIR")?;
    filters(&resources.join("seccomp"), Path::new(&into))?;
    metrics(
        &resources.join("metrics/firecracker.json"),
        &Path::new(&into).join("metrics.rs"),
    )
}

/// The filters, and the enum of their categories.
fn filters(folder: &Path, into: &Path) -> Result<(), Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let folder = folder.join(&arch);
    let mut categories = Vec::new();
    for file in fs::read_dir(&folder)? {
        let path = file?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        categories.push(name.ok_or("a name that is not UTF-8")?.to_owned());
    }
    categories.sort();
    let names: Vec<&str> = categories.iter().map(String::as_str).collect();
    compile::compile(&folder, &arch, &names, &[], &into.join("filters.rs"))?;

    let (mut variants, mut programs, mut all) = (String::new(), String::new(), String::new());
    for name in names {
        let table = name.to_uppercase();
        let variant = table[..1].to_owned() + &name[1..];
        writeln!(
            variants,
            "    /// See `resources/seccomp/{arch}/{name}.json`.\n    {variant},"
        )?;
        writeln!(programs, "            Category::{variant} => &{table},")?;
        write!(all, "Category::{variant}, ")?;
    }
    let source = format!(
        "/// What a thread is, and so what it may ask of the kernel.\n\
         #[derive(Clone, Copy, Debug, PartialEq, Eq)]\n\
         pub enum Category {{\n{variants}}}\n\n\
         impl Category {{\n    #[cfg(test)]\n    const ALL: &[Category] = &[{all}];\n\n    const fn program(self) -> &'static [sock_filter] {{\n        \
         match self {{\n{programs}        }}\n    }}\n}}\n"
    );
    fs::write(into.join("categories.rs"), source)?;
    Ok(())
}

/// The groups of Firecracker's metrics and their keys.
fn metrics(names: &Path, into: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", names.display());
    let groups: BTreeMap<String, Vec<String>> = serde_json::from_slice(&fs::read(names)?)?;
    let mut source = "const FIRECRACKER: &[(&str, &[&str])] = &[\n".to_owned();
    for (group, keys) in groups {
        writeln!(source, "    ({group:?}, &{keys:?}),")?;
    }
    fs::write(into, source + "];\n")?;
    Ok(())
}
