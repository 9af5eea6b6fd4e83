//! What is built into the monitor: the list in docs/crates.md is that of cargo; and, of all crates that anything here is
//! built of, what can be checked without cargo-deny (`tools/supply`): licences, sources, duplicates. And the programs that tests
//! need: all are in packages that `tools/test` installs, so that none is there by chance.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

#[path = "common/needs.rs"]
mod needs;

use needs::needs;

/// What the monitor may be built of at most, without what is there at build time only.
const MOST: usize = 45;
/// The one registry, as lock files name it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What cargo says, from what is on this host already.
fn cargo(words: &[&str]) -> String {
    let cargo = std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
    let output = Command::new(cargo)
        .args(words)
        .args(["--locked", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {words:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Crates of the monitor with their versions, without itself; `edges` are cargo's.
fn tree(edges: &str) -> BTreeSet<(String, String)> {
    let said = cargo(&[
        "tree", "-p", "mayfly", "-e", edges, "--target", TARGET, "--prefix", "none",
    ]);
    let crates = said.lines().filter_map(|line| {
        let (name, rest) = line.split_once(" v")?;
        let version = rest.split(' ').next()?;
        Some((name.to_owned(), version.to_owned()))
    });
    let mut crates: BTreeSet<_> = crates.collect();
    crates.retain(|(name, _)| name != "mayfly");
    crates
}

/// The crates in the first column of the table under a heading, with how many versions are named: `syn (2 and 3)`.
fn listed(heading: &str) -> BTreeMap<String, usize> {
    let page = read("docs/crates.md");
    let section = page.split("\n## ").find(|part| part.starts_with(heading));
    let section = section.unwrap_or_else(|| panic!("docs/crates.md has no \"{heading}\""));
    let rows = section
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1);
    let mut found = BTreeMap::new();
    for row in rows {
        for cell in row[2..].split(" | ").next().unwrap().split(", ") {
            let (name, versions) = match cell.split_once(" (") {
                Some((name, versions)) => (name, versions.split(" and ").count()),
                None => (cell, 1),
            };
            assert_eq!(
                found.insert(name.to_owned(), versions),
                None,
                "{name} twice"
            );
        }
    }
    found
}

fn counted(crates: &BTreeSet<(String, String)>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (name, _) in crates {
        *counts.entry(name.clone()).or_default() += 1;
    }
    counts
}

#[test]
fn crates_in_the_monitor_are_those_of_the_list() {
    let all = tree("normal");
    let inside = tree("normal,no-proc-macro");
    assert!(inside.len() > 10 && inside.len() < all.len(), "{inside:?}");
    let outside = all.difference(&inside).cloned().collect();
    assert_eq!(listed("In the program"), counted(&inside));
    assert_eq!(listed("At build time only"), counted(&outside));
    assert!(inside.len() <= MOST, "{} crates", inside.len());
    let figures = format!(
        "{} crates are in the program, {} more are needed to build it",
        inside.len(),
        all.len() - inside.len()
    );
    assert!(read("SECURITY.md").contains(&figures), "{figures}");
    // The build script, which runs on the builder's host, has no others.
    assert_eq!(tree("normal,build"), all);
}

/// Every package that something in this workspace is built of, without what only tests need.
fn packages() -> Vec<Value> {
    let words = [
        "metadata",
        "--format-version",
        "1",
        "--filter-platform",
        TARGET,
    ];
    let said: Value = serde_json::from_str(&cargo(&words)).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let id = |value: &Value| value.as_str().unwrap().to_owned();
    let nodes = list(&said["resolve"]["nodes"]);
    let nodes: BTreeMap<String, Value> = nodes.into_iter().map(|n| (id(&n["id"]), n)).collect();
    let mut used = BTreeSet::new();
    let mut next: Vec<String> = list(&said["workspace_members"]).iter().map(id).collect();
    while let Some(package) = next.pop() {
        if !used.insert(package.clone()) {
            continue;
        }
        for dependency in list(&nodes[&package]["deps"]) {
            let is_built_in = |kind: &Value| kind["kind"] != "dev";
            if list(&dependency["dep_kinds"]).iter().any(is_built_in) {
                next.push(id(&dependency["pkg"]));
            }
        }
    }
    let mut packages = list(&said["packages"]);
    packages.retain(|package| used.contains(&id(&package["id"])));
    assert!(packages.len() > 50, "{}", packages.len());
    packages
}

/// The words in quotes of a list in deny.toml.
fn policy(key: &str) -> Vec<String> {
    let text = read("deny.toml");
    let begin = text
        .find(&format!("\n{key} = ["))
        .unwrap_or_else(|| panic!("no {key}"));
    let list = text[begin..].split_once('[').unwrap().1;
    let list = list.split_once("\n]").unwrap().0;
    let words = list.split('"').skip(1).step_by(2);
    words.map(str::to_owned).collect()
}

/// Whether a licence expression, in the old form with `/` too, can be met by what is allowed.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ");
    // No expression here has OR below AND but in brackets, and none has brackets below brackets.
    let all = expression.split(" AND ");
    all.map(|part| part.trim_matches(|c| c == '(' || c == ')'))
        .all(|part| {
            part.split(" OR ")
                .any(|one| allowed.iter().any(|known| known == one.trim()))
        })
}

#[test]
fn licences_of_all_crates_are_allowed() {
    let allowed = policy("allow");
    assert!(allowed.len() > 3, "{allowed:?}");
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_allowed(licence, &allowed), "{name}: {licence}");
    }
}

#[test]
fn licence_when_it_asks_for_more_is_not_allowed() {
    let allowed = ["MIT".to_owned(), "Unicode-3.0".to_owned()];
    for licence in [
        "MIT",
        "GPL-2.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR X) AND Unicode-3.0",
    ] {
        assert!(is_allowed(licence, &allowed), "{licence}");
    }
    for licence in [
        "none",
        "GPL-2.0",
        "MIT AND GPL-2.0",
        "(MIT OR X) AND NCSA",
        "MIT-0",
    ] {
        assert!(!is_allowed(licence, &allowed), "{licence}");
    }
}

#[test]
fn sources_of_all_crates_are_the_registry_with_a_sum() {
    for lock in [
        "Cargo.lock",
        "tests/fuzz/Cargo.lock",
        "tests/clients/rust-sdk/Cargo.lock",
    ] {
        let text = read(lock);
        for package in text.split("[[package]]").skip(1) {
            let value = |key: &str| {
                let line = package.lines().find(|line| line.starts_with(key))?;
                Some(line.split('"').nth(1)?.to_owned())
            };
            let name = value("name = ").unwrap();
            // One without a source is in this tree.
            if let Some(source) = value("source = ") {
                assert_eq!(source, REGISTRY, "{lock}: {name}");
                assert_eq!(value("checksum = ").unwrap().len(), 64, "{lock}: {name}");
            } else {
                let is_ours = ["mayfly", "probe", "rust-sdk-client"]
                    .iter()
                    .any(|ours| name.starts_with(ours));
                assert!(is_ours, "{lock}: where is {name} from?");
            }
        }
    }
}

#[test]
fn second_versions_of_crates_are_those_that_are_explained() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in packages() {
        let of = |key: &str| package[key].as_str().unwrap().to_owned();
        versions
            .entry(of("name"))
            .or_default()
            .insert(of("version"));
    }
    versions.retain(|_, versions| versions.len() > 1);
    // crate = "NAME@MAJOR", reason = "..."
    let words = policy("skip");
    let explained: BTreeMap<&str, usize> = words
        .iter()
        .filter_map(|word| word.split_once('@'))
        .fold(BTreeMap::new(), |mut counts, (name, _)| {
            *counts.entry(name).or_insert(1) += 1;
            counts
        });
    let found: BTreeMap<&str, usize> = versions
        .iter()
        .map(|(name, versions)| (name.as_str(), versions.len()))
        .collect();
    assert_eq!(found, explained);
}

/// The words in `needs!` that are no programs.
const NO_PROGRAMS: [&str; 6] = ["kvm", "fuse", "tun", "root", "cgroup1", "guest"];

/// The programs that the tests below `folder` name in `needs!`.
fn programs_needed(folder: &Path, programs: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            programs_needed(&path, programs);
        }
        if path.extension().is_none_or(|it| it != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let lists = text.split("    needs!(").skip(1);
        let words = lists.flat_map(|rest| rest.split(')').next().unwrap_or_default().split(','));
        let words = words.map(|word| word.trim().trim_matches('"'));
        programs.extend(
            words
                .filter(|word| !word.is_empty() && !NO_PROGRAMS.contains(word))
                .map(str::to_owned),
        );
    }
}

/// The packages that a program is of, and whether no Debian system is without them.
fn packages_of(program: &str) -> Vec<(String, bool)> {
    let query = |words: &[&str]| {
        let output = Command::new("dpkg-query").args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // An alternative (`lzma`) is a link to a file that is of a package, and a link of another name (`python3`) is of one
    // itself.
    let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(Path::new);
    let files = folders.iter().map(|it| it.join(program));
    let files = files.filter(|it| it.exists()).take(1);
    let files = files.flat_map(|it| [it.canonicalize().unwrap(), it]);
    let owners: String = files
        .map(|file| {
            // A package may have it by another name of its folder (/sbin, which is /usr/sbin).
            let mut last = file.iter().rev().map(|it| it.to_string_lossy());
            let (name, folder) = (last.next().unwrap(), last.next().unwrap());
            query(&["-S", &format!("*/{folder}/{name}")])
        })
        .collect();
    let names = owners.lines().filter_map(|line| {
        let (owner, _path) = line.split_once(": ")?;
        let name = owner.split([',', ':']).next()?;
        (!owner.starts_with("diversion by")).then(|| name.to_owned())
    });
    let with_kind = names.map(|name| {
        let kind = query(&["-W", "-f", "${Essential} ${Priority}", &name]);
        let is_everywhere = kind == "yes required" || kind.ends_with(" required");
        (name, is_everywhere)
    });
    with_kind.collect()
}

#[test]
fn programs_that_tests_need_are_of_packages_that_the_suite_installs() {
    needs!("dpkg-query");
    let mut programs = BTreeSet::new();
    for folder in ["tests", "tools", "jailer", "src"] {
        programs_needed(&root().join(folder), &mut programs);
    }
    assert!(programs.len() > 30, "{programs:?}");
    let installing = [read("tools/test"), read("tools/guest")].concat();
    let installed: BTreeSet<_> = installing
        .split(|letter: char| letter.is_whitespace() || "(:)".contains(letter))
        .collect();
    for program in programs {
        let packages = packages_of(&program);
        let is_had = |(name, is_everywhere): &(String, bool)| {
            *is_everywhere || installed.contains(name.as_str())
        };
        assert!(
            packages.iter().any(is_had),
            "{program}, which a test needs, is of {packages:?}: name a package that has it in tools/test"
        );
    }
}
