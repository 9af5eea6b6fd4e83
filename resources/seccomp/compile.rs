//! Compiles seccomp filters for a build script: one JSON file a category, each becoming a table of
//! BPF instructions in the program. A rule that does not compile, a category that is missing and a
//! file that belongs to none all fail the build.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use seccompiler::{TargetArch, compile_from_json, sock_filter};

/// Codes of the instructions that [`as_tree`] reads or writes: compare and jump, jump, return.
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_NOT_BELOW: u16 = 0x35;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;

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
        let program = as_tree(&program)
            .ok_or_else(|| format!("{}: unexpected instructions", path.display()))?;
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

/// What is done about one system call.
struct Rule<'a> {
    number: u32,
    body: &'a [sock_filter],
}

/// The same program, which finds the rule for a system call by halving the range of numbers instead
/// of comparing with each in turn. The kernel runs a filter once for every number there is when it
/// installs it, so that this is a third of what a start spends on filters.
fn as_tree(program: &[sock_filter]) -> Option<Vec<sock_filter>> {
    // What checks the architecture and loads the number; then each rule: "if it is this number, skip
    // the next instruction; jump to the next rule", and its body; at the end, what is for all others.
    const START: usize = 4;
    let (last, rules) = program.get(START..)?.split_last()?;
    let mut found: Vec<Rule> = Vec::new();
    let mut at = 0;
    while at < rules.len() {
        let [test, to_body, ..] = rules.get(at..)? else {
            return None;
        };
        let mut next = at + 2;
        // A rule with alternatives jumps from one to the next.
        while let Some(sock_filter { code: JUMP, k, .. }) = rules.get(next) {
            next += 1 + *k as usize;
        }
        let is_rule = (test.code, test.jt, test.jf) == (JUMP_IF_EQUAL, 0, 1)
            && (to_body.code, to_body.k) == (JUMP, 1)
            && found.last().is_none_or(|before| before.number < test.k);
        found.push(Rule {
            number: is_rule.then_some(test.k)?,
            body: rules.get(at + 3..next)?,
        });
        at = next;
    }
    let mut tree = program.get(..START)?.to_vec();
    tree.extend(branch(&found, last)?);
    (last.code == RETURN).then_some(tree)
}

/// Decides among `rules`, which are sorted; `last` is for what has none.
fn branch(rules: &[Rule], last: &sock_filter) -> Option<Vec<sock_filter>> {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    Some(match rules {
        [] => vec![last.clone()],
        [Rule { number, body }] => {
            let mut steps = vec![step(JUMP_IF_EQUAL, 1, 0, *number), last.clone()];
            steps.extend_from_slice(body);
            steps
        }
        _ => {
            let (below, others) = rules.split_at(rules.len() / 2);
            let pivot = others.first()?.number;
            let below = branch(below, last)?;
            let distance = u8::try_from(below.len()).ok()?;
            let mut steps = vec![step(JUMP_IF_NOT_BELOW, distance, 0, pivot)];
            steps.extend(below);
            steps.extend(branch(others, last)?);
            steps
        }
    })
}
