//! The commands of README.md's API tour, as they stand there, run by a shell.

mod common;

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use common::Folder;

const README: &str = include_str!("../README.md");

/// The `sh` blocks under a heading.
fn blocks(heading: &str) -> Vec<&'static str> {
    let (_, section) = README
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("README.md has no heading `{heading}`"));
    let section = section.split("\n## ").next().unwrap();
    section
        .split("```sh\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect()
}

#[test]
fn api_tour_when_run_as_it_stands_does_what_it_says() {
    if !common::kvm("api_tour_when_run_as_it_stands_does_what_it_says") {
        return;
    }
    let blocks = blocks("API tour");
    assert_eq!(blocks.len(), 2);
    // Where the tour finds what was built.
    let folder = Folder::new();
    let release = folder.join("target/x86_64-unknown-linux-gnu/release");
    std::fs::create_dir_all(&release).unwrap();
    symlink(common::mayfly(), release.join("mayfly")).unwrap();
    let guest = common::linux().kernel.parent().unwrap().to_owned();
    symlink(guest, folder.join("target/guest")).unwrap();
    std::fs::create_dir(folder.join("tmp")).unwrap();
    for (n, block) in blocks.into_iter().enumerate() {
        // Whatever fails ends the shell, and the monitor goes with it.
        let script =
            format!("set -eu; trap 'kill ${{monitor:-}} 2>/dev/null || true' EXIT\n{block}");
        let output = Command::new("bash")
            .args(["-c", &script])
            .current_dir(folder.path())
            .env("TMPDIR", folder.join("tmp"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{errors}");
        assert!(said.contains(r#""state":"Running""#), "{said}\n{errors}");
        if n == 0 {
            for part in [
                r#""mem_size_mib":160"#,
                "fault_message",
                "/nowhere",
                r#""api_ready_us":"#,
                "# TYPE mayfly_",
            ] {
                assert!(said.contains(part), "no {part}:\n{said}\n{errors}");
            }
        }
        let left = std::fs::read_dir(folder.join("tmp")).unwrap().count();
        assert_eq!(left, 0, "block {n} leaves something behind");
    }
}
