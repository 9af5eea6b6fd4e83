//! Holds the code to the picture in `src/lib.rs`: imports point downwards only.

use std::fs;
use std::path::{Path, PathBuf};

/// The height of each module, and what of the modules above or beside it may be seen anyway.
const LAYERS: &[(&str, u8, &[&str])] = &[
    ("main", 9, &[]),
    ("program", 9, &["args"]),
    ("args", 9, &[]),
    // The API thread sees control's vocabulary, not control.
    ("api", 8, &[]),
    ("vmm", 7, &[]),
    ("vcpu", 6, &[]),
    ("virtio", 5, &[]),
    ("arch", 5, &[]),
    ("serial", 4, &[]),
    ("files", 4, &[]),
    ("memory", 4, &[]),
    ("rate_limiter", 3, &[]),
    ("bus", 3, &[]),
    ("inbox", 3, &[]),
    ("seccomp", 3, &[]),
    ("metrics", 3, &[]),
    ("log", 3, &[]),
    ("timeline", 3, &[]),
    ("files", 4, &[]),
    // What the programs that drive the monitor know too.
    ("wire", 1, &[]),
    // Beside its place in `wire`, at the root.
    ("exit", 1, &[]),
    // Sees nothing of ours.
    ("sys", 0, &[]),
];

/// What the API thread may name of `vmm`.
const API_SEES: &[&str] = &["action"];

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The paths below `crate::` that `text` names, test modules left out.
fn crate_paths(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let code: String = code
        .lines()
        .filter(|l| !l.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    code.match_indices("crate::")
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c == '$' || c.is_alphanumeric()))
        .flat_map(|(at, _)| {
            let rest = &code[at + "crate::".len()..];
            match rest.strip_prefix('{') {
                Some(list) => list
                    .split('}')
                    .next()
                    .unwrap_or("")
                    .split(',')
                    .map(|part| path_of(part.trim()))
                    .collect(),
                None => vec![path_of(rest)],
            }
        })
        .filter(|path| !path.is_empty())
        .collect()
}

fn path_of(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':')
        .collect()
}

#[test]
fn imports_when_followed_point_downwards() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 10);

    let mut wrong = Vec::new();
    for file in &files {
        let inside = file.strip_prefix(&src).unwrap();
        let first = inside.iter().next().unwrap().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let Some((_, height, also)) = LAYERS.iter().find(|(name, ..)| *name == module) else {
            wrong.push(format!(
                "{}: `{module}` has no place in the picture",
                inside.display()
            ));
            continue;
        };
        for path in crate_paths(&fs::read_to_string(file).unwrap()) {
            let mut parts = path.split("::");
            let target = parts.next().unwrap();
            // A macro, or the file's own folder.
            let Some((_, target_height, _)) = LAYERS.iter().find(|(name, ..)| *name == target)
            else {
                continue;
            };
            if target == module || also.contains(&target) {
                continue;
            }
            let seen = parts.next().unwrap_or("");
            let allowed = match (module, target) {
                ("api", "vmm") => API_SEES.contains(&seen),
                _ => target_height < height,
            };
            if !allowed {
                wrong.push(format!("{}: sees crate::{path}", inside.display()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports that point up or sideways:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn unsafe_code_when_allowed_is_where_the_house_says() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    for file in &files {
        let inside = file
            .strip_prefix(&src)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let allowed = inside.starts_with("sys/") || inside.starts_with("memory");
        let text = fs::read_to_string(file).unwrap();
        let has =
            text.contains("unsafe {") || text.contains("unsafe impl") || text.contains("unsafe fn");
        assert!(allowed || !has, "{inside} holds unsafe code");
    }
}

/// Most items of unsafe code in the monitor, and in the jailer.
const UNSAFE_MOST: usize = 44;

/// Unsafe blocks, functions and implementations in `text`, its tests left out.
fn unsafe_items(text: &str) -> usize {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text);
    code.lines()
        .map(|line| line.split("//").next().unwrap_or(line))
        .flat_map(|line| line.split("unsafe ").skip(1))
        .filter(|rest| {
            ["{", "fn ", "impl", "extern ", "trait "]
                .iter()
                .any(|item| rest.starts_with(item))
        })
        .count()
}

#[test]
fn unsafe_items_when_counted_are_as_many_as_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let count = |folder: &str| -> usize {
        let mut files = Vec::new();
        sources(&root.join(folder), &mut files);
        // Whole files of help for tests.
        files.retain(|file| !file.ends_with("testing.rs"));
        let texts = files.iter().map(|file| fs::read_to_string(file).unwrap());
        texts.map(|text| unsafe_items(&text)).sum()
    };
    let (monitor, jailer) = (count("src"), count("jailer/src"));
    assert!(monitor <= UNSAFE_MOST && jailer <= UNSAFE_MOST);
    let document = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let words: Vec<&str> = document.split_whitespace().collect();
    let sentence = format!("{monitor} items in the monitor and {jailer} in the jailer");
    assert!(
        words.join(" ").contains(&sentence),
        "SECURITY.md does not say \"{sentence}\""
    );
}
