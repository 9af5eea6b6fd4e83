//! Holds the code to the picture in `src/lib.rs`: imports point downwards only, unsafe code is
//! where it is listed. What finds them is tested with faults that are planted.

#[path = "layering/source.rs"]
mod source;
#[path = "layering/tables.rs"]
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use source::Source;
use tables::{
    IMAGES, JAILER, JAILER_SEES, MACROS, MONITOR, MONITOR_EXCEPTIONS, MONITOR_ONLY, OCI, UNSAFE,
};

/// A crate, as its files and the module that each of them is.
struct Crate {
    /// The file below the repository's root, the module's path, and the code.
    files: Vec<(String, Vec<String>, Source)>,
}

impl Crate {
    fn read(folder: &str) -> Self {
        let all = Self::read_any(folder);
        assert!(all.files.len() > 10, "{folder}: {} files", all.files.len());
        all
    }

    /// Of any number of files.
    fn read_any(folder: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let mut texts = BTreeMap::new();
        read(&root, &mut texts);
        let texts = texts.iter().map(|(path, text)| {
            let inside = path.strip_prefix(&root).unwrap().to_str().unwrap();
            (inside.to_owned(), text.as_str())
        });
        Crate::of(folder, texts)
    }

    /// Of files and texts; those that are compiled for tests only are left out.
    fn of<'a>(folder: &str, texts: impl Iterator<Item = (String, &'a str)>) -> Self {
        let mut files: Vec<_> = texts
            .map(|(inside, text)| {
                let file = format!("{folder}/{inside}");
                (file, module_of(&inside), Source::new(text))
            })
            .collect();
        let for_tests: BTreeSet<Vec<String>> = files
            .iter()
            .flat_map(|(_, module, source)| {
                let inside =
                    |name: &String| [module.as_slice(), std::slice::from_ref(name)].concat();
                source.test_modules.iter().map(inside).collect::<Vec<_>>()
            })
            .collect();
        let is_for_tests =
            |module: &[String]| (1..=module.len()).any(|len| for_tests.contains(&module[..len]));
        files.retain(|(_, module, _)| !is_for_tests(module));
        Crate { files }
    }

    /// Every import that is not allowed.
    fn faults(&self, rules: &Rules) -> Vec<String> {
        let mut faults = Vec::new();
        for (file, module, source) in &self.files {
            for path in source.paths(module, rules.crates) {
                if let Err(why) = rules.check(module, &path) {
                    faults.push(format!("{file}: {path}: {why}"));
                }
            }
        }
        faults
    }
}

fn read(folder: &Path, into: &mut BTreeMap<std::path::PathBuf, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            into.insert(path, text);
        }
    }
}

/// The module that a file below `src` is; none for the root of a library. A program's root stands
/// for the module `main`.
fn module_of(inside: &str) -> Vec<String> {
    let mut parts: Vec<String> = inside
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] {
        parts.pop();
    }
    parts
}

/// Which imports are allowed in a crate.
struct Rules {
    layers: &'static [(&'static str, u8)],
    exceptions: &'static [(&'static str, &'static str)],
    only: &'static [(&'static str, &'static str, &'static str)],
    macros: &'static [(&'static str, &'static str)],
    /// Other crates of ours that it may name.
    crates: &'static [&'static str],
    /// Of those, the only modules.
    sees: Option<&'static [&'static str]>,
}

const MONITOR_RULES: Rules = Rules {
    layers: MONITOR,
    exceptions: MONITOR_EXCEPTIONS,
    only: MONITOR_ONLY,
    macros: MACROS,
    // How the program names the library.
    crates: &["mayfly"],
    sees: None,
};

const JAILER_RULES: Rules = Rules {
    layers: JAILER,
    exceptions: &[],
    only: &[],
    macros: &[],
    crates: &["mayfly"],
    sees: Some(JAILER_SEES),
};

const OCI_RULES: Rules = Rules {
    layers: OCI,
    crates: &[],
    sees: None,
    ..JAILER_RULES
};

const IMAGES_RULES: Rules = Rules {
    layers: IMAGES,
    ..OCI_RULES
};

impl Rules {
    fn check(&self, module: &[String], path: &source::Path) -> Result<(), String> {
        let first = path.parts.first().map_or("", String::as_str);
        if path.root != "crate"
            && let Some(only) = self.sees
        {
            return match only.contains(&first) {
                true => Ok(()),
                false => Err(format!("of {}, only {only:?} may be seen", path.root)),
            };
        }
        // The root of a library imports nothing, the root of a program is `main`.
        let own = module.first().map_or("lib", String::as_str);
        let height = |name: &str| {
            let found = self.layers.iter().find(|(layer, _)| *layer == name);
            found.map(|(_, height)| *height)
        };
        let target = match self.macros.iter().find(|(name, _)| *name == first) {
            Some((_, module)) => module,
            None => first,
        };
        if target == own {
            return Ok(());
        }
        let Some(from) = height(own) else {
            return Err(format!("`{own}` has no place in the table"));
        };
        let Some(to) = height(target) else {
            return Err(format!("`{target}` has no place in the table"));
        };
        let text = path.parts.join("::");
        let is_exception = |(who, what): &(&str, &str)| *who == own && text.starts_with(what);
        if self.exceptions.iter().any(is_exception) {
            return Ok(());
        }
        if to >= from {
            return Err(format!("up or sideways from `{own}`"));
        }
        for (who, of, only) in self.only {
            if *who == own && *of == target && path.parts.get(1).is_none_or(|part| part != only) {
                return Err(format!("of {of}, `{own}` may see `{only}` only"));
            }
        }
        Ok(())
    }
}

#[test]
fn imports_of_the_monitor_when_followed_point_downwards() {
    let faults = Crate::read("src").faults(&MONITOR_RULES);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn imports_of_the_jailer_when_followed_point_downwards() {
    let faults = Crate::read("jailer/src").faults(&JAILER_RULES);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn imports_of_the_oci_runtime_when_followed_point_downwards() {
    let faults = Crate::read("jailer/oci/src").faults(&OCI_RULES);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn imports_of_the_disks_of_images_when_followed_point_downwards() {
    let faults = Crate::read("jailer/images/src").faults(&IMAGES_RULES);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn tables_when_compared_with_the_sources_name_modules_that_exist() {
    for (folder, layers) in [
        ("src", MONITOR),
        ("jailer/src", JAILER),
        ("jailer/oci/src", OCI),
        ("jailer/images/src", IMAGES),
    ] {
        let read = Crate::read(folder);
        for (name, _) in layers {
            let is_it = |(_, module, _): &(String, Vec<String>, Source)| {
                module.first().is_some_and(|first| first == name)
            };
            assert!(read.files.iter().any(is_it), "{folder}: no module `{name}`");
        }
    }
}

/// Lower than everything but `sys`: whatever it imports is a fault.
const BUS: &str = "bus.rs";

/// The faults in a crate of one file at `inside`.
fn faults_of(inside: &str, text: &str) -> Vec<String> {
    Crate::of("src", std::iter::once((inside.to_owned(), text))).faults(&MONITOR_RULES)
}

#[test]
fn import_when_it_points_up_is_found_wherever_it_stands() {
    for (inside, text) in [
        (BUS, "use crate::api::Server;"),
        (
            BUS,
            "use crate::{sys::fd, vmm::{self, action::{Action, Answer}}};",
        ),
        (
            BUS,
            "use crate::{\n    sys::{fd, io},\n    vcpu::{\n        End,\n    },\n};",
        ),
        (BUS, "use crate\n    ::\n    virtio\n    ::Device;"),
        (BUS, "pub(crate) use crate::memory as m;"),
        (BUS, "fn f() -> crate::vmm::Vmm { crate::vmm::Vmm::new() }"),
        (
            BUS,
            "#[cfg(test)]\nuse crate::sys::testing;\n\nuse crate::api::Server;",
        ),
        (
            BUS,
            "#[cfg(test)]\nfn t() { if true {} }\nuse crate::api::Server;",
        ),
        (BUS, "#[cfg(any(test, unix))]\nuse crate::api::Server;"),
        (
            BUS,
            "#[cfg(test)]\n#[expect(dead_code)]\nmod tests { fn t() { {} } }\nuse crate::api;",
        ),
        (
            BUS,
            "struct A { #[cfg(test)] a: Vec<u8>, b: crate::vmm::Vmm }",
        ),
        (
            BUS,
            "macro_rules! m { ($a:expr) => { $crate::vmm::go($a) }; }",
        ),
        (BUS, "/* a /* nested */ comment */ use crate::api; // \""),
        (
            BUS,
            "const A: &str = \"\\\"\"; const B: char = '\"'; use crate::api;",
        ),
        (
            BUS,
            "const A: &[u8] = br#\" \" \"#; fn f<'a>(_: &'a u8) { crate::vmm::go() }",
        ),
        (BUS, "mod inner { use super::super::vmm::Vmm; }"),
        (BUS, "use super::vmm::Vmm;"),
        (BUS, "use crate::*;"),
        (BUS, "use crate as it;"),
        (BUS, "use mayfly::vmm::Vmm;"),
        (BUS, "use crate::unheard_of::Thing;"),
        (BUS, "fn f() { crate::warn!(\"\"); }"),
        ("sys/fd.rs", "use super::super::log;"),
        ("sys/fd.rs", "use super::{io, super::log::chain};"),
        ("virtio/net/mod.rs", "use self::super::super::vcpu::End;"),
        ("api/mod.rs", "use crate::vmm::Vmm;"),
        ("api/mod.rs", "use crate::vmm::{action::Action, boot};"),
        ("unheard_of.rs", "use crate::sys::fd;"),
    ] {
        assert!(!faults_of(inside, text).is_empty(), "{inside}: {text}");
    }
}

#[test]
fn import_when_it_points_down_or_is_no_import_is_no_fault() {
    for (inside, text) in [
        (BUS, "use crate::sys::{fd::{self, Interest}, io};"),
        (
            BUS,
            "// use crate::api;\n/* crate::vmm::x */ const A: &str = \"crate::vmm::Vmm\";",
        ),
        (
            BUS,
            "const A: &str = r#\"\" crate::vmm::Vmm\"#; const B: char = '\\'';",
        ),
        (
            BUS,
            "#[cfg(test)]\nmod tests { use crate::vmm::Vmm; fn f() { crate::api::g() } }",
        ),
        (BUS, "#[cfg(test)]\nuse crate::vmm::{Vmm, action};"),
        (BUS, "#[cfg(any(test, fuzzing))]\nuse crate::vmm::Vmm;"),
        (
            BUS,
            "struct A { #[cfg(test)] a: Vec<crate::vmm::Vmm>, b: u8 }",
        ),
        (BUS, "mod inner { use super::Bus; use self::x::Y; }"),
        (
            "sys/fd.rs",
            "use super::io; use super::super::sys::io as other;",
        ),
        (
            "api/mod.rs",
            "use crate::vmm::action::{Action, Answer}; use crate::{warn, info};",
        ),
        (
            "vmm/mod.rs",
            "use super::vmm::boot; use crate::virtio::block;",
        ),
        (
            "main.rs",
            "use mayfly::vmm::Vmm; use mayfly::{api, args::Args};",
        ),
    ] {
        let faults = faults_of(inside, text);
        assert!(faults.is_empty(), "{inside}: {text}: {faults:?}");
    }
}

#[test]
fn file_when_it_is_for_tests_only_is_left_out_and_no_other() {
    let texts = [
        ("api/mod.rs", "#[cfg(test)]\nmod testing;\nmod http;"),
        ("api/testing.rs", "use crate::vmm::Vmm;"),
        ("api/testing/deeper.rs", "use crate::vmm::Vmm;"),
        ("api/http.rs", "use crate::vmm::Vmm;"),
        ("vmm/testing.rs", "use crate::api::Server;"),
    ];
    let texts = texts.map(|(inside, text)| (inside.to_owned(), text));
    let faults = Crate::of("src", texts.into_iter()).faults(&MONITOR_RULES);
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(
        faults[0].starts_with("src/api/http.rs") && faults[1].starts_with("src/vmm/testing.rs")
    );
}

#[test]
fn jailer_when_it_sees_more_of_the_monitor_than_it_may_is_found() {
    for (text, count) in [
        ("use mayfly::wire::Limits;", 0),
        ("use mayfly::snapshot::{self, Header};", 0),
        ("use mayfly::{wire, vmm};", 1),
        ("fn f() { mayfly::sys::fd::pipe() }", 1),
    ] {
        let texts = std::iter::once(("run/mod.rs".to_owned(), text));
        let faults = Crate::of("jailer/src", texts).faults(&JAILER_RULES);
        assert_eq!(faults.len(), count, "{text}: {faults:?}");
    }
}

#[test]
fn unsafe_code_when_counted_is_what_is_listed() {
    let mut found = BTreeMap::new();
    for folder in [
        "src",
        "jailer/src",
        "jailer/agent/src",
        "jailer/exit/src",
        "jailer/protocol/src",
        "jailer/images/src",
        "jailer/oci/src",
    ] {
        for (file, _, source) in Crate::read_any(folder).files {
            if source.unsafe_items() > 0 {
                found.insert(file, source.unsafe_items());
            }
        }
    }
    let listed: BTreeMap<String, usize> = UNSAFE
        .iter()
        .map(|(file, count, why)| {
            assert!(why.len() > 20, "{file}: why?");
            (file.to_string(), *count)
        })
        .collect();
    assert_eq!(
        found, listed,
        "unsafe items by file: found, and listed in UNSAFE"
    );
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("SECURITY.md");
    assert!(
        fs::read_to_string(document)
            .unwrap()
            .contains("tests/layering.rs")
    );
}

#[test]
fn unsafe_code_when_planted_is_counted() {
    for (text, count) in [
        ("fn f() { unsafe { g() } }", 1),
        ("fn f() { unsafe\n{ g() } }", 1),
        (
            "unsafe impl Send for A {} unsafe extern \"C\" { fn f(); }",
            2,
        ),
        ("pub unsafe fn f() {} type F = unsafe fn(u8);", 1),
        (
            "#[cfg(test)] fn t() { unsafe { g() } } fn f() { unsafe { g() } }",
            1,
        ),
        ("// unsafe { }\nconst A: &str = \"unsafe { }\";", 0),
        ("#![deny(unsafe_code)] #[unsafe(no_mangle)] fn f() {}", 0),
    ] {
        assert_eq!(Source::new(text).unsafe_items(), count, "{text}");
    }
}
