//! The bounded form of `tools/soak`: every kind of short life beside two long ones, for some seconds, with nothing that
//! grows or stays behind; and that the soak sees it when something does.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{Folder, jailer, mayfly, needs, probe};
use serde_json::Value;

/// The program, from the release build of this tree: `tools/test` builds it.
fn soak(jailer: &Path, words: &[&str]) -> Output {
    let program = common::built("MAYFLY_SOAK_BIN", "mayfly-soak");
    let mut command = Command::new(program);
    command
        .arg("--mayfly")
        .arg(mayfly())
        .arg("--jailer")
        .arg(jailer);
    command.arg("--probe").arg(probe()).args(words);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{out}{err}")
}

#[test]
fn lives_when_many_are_lived_leave_nothing_and_nothing_grows() {
    needs!(kvm, root, tun, "ip");
    let folder = Folder::new();
    let (json, svg) = (folder.join("soak.json"), folder.join("soak.svg"));
    let files = [json.to_str().unwrap(), svg.to_str().unwrap()];
    let words = ["--seconds", "15", "--json", files[0], "--svg", files[1]];
    let output = soak(&jailer(), &words);
    assert!(output.status.success(), "{}", said(&output));

    let found: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(found["findings"], serde_json::json!([]));
    let lives = found["lives"].as_object().unwrap();
    assert_eq!(lives.len(), 10, "{lives:?}");
    let of_kind = |name: &str| lives[name]["count"].as_u64().unwrap();
    assert!(of_kind("in an empty jail") >= 10 && of_kind("forked") >= 5);
    let samples = found["samples"].as_array().unwrap();
    assert!(samples.len() >= 3, "{}", samples.len());
    for name in ["monitor", "jailer", "jail: mayfly"] {
        let usage = &samples[0]["processes"][name];
        assert!(usage["memory_mib"].as_f64().unwrap() > 0.0, "{name}");
        assert!(usage["descriptors"].as_u64().unwrap() > 0, "{name}");
    }
    let drawn = fs::read_to_string(&svg).unwrap();
    assert!(drawn.contains("<polyline") && drawn.contains("jailer killed ("));
}

#[test]
fn process_when_a_life_leaves_it_is_found() {
    needs!(kvm, root, tun, "ip");
    let folder = Folder::new();
    let script = folder.file(
        "jailer",
        format!(
            "#!/bin/sh\nsleep 1000 </dev/null >/dev/null 2>&1 &\nexec {} \"$@\"\n",
            jailer().display()
        ),
    );
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let output = soak(&script, &["--seconds", "1", "--settle", "1"]);
    let said = said(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("left behind: [\"process sleep "), "{said}");
}
