//! `exec`: a further process in a container. This program becomes `mayfly-jailer exec`, which has the
//! engine's streams, and ends as the process does.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;

use rustix::fs::MemfdFlags;
use serde_json::{Map, Value, json};

use super::{CommandError, Target};
use crate::args::Exec;
use crate::bundle::{self, process_text};
use crate::error::{AnyError, Step as _};
use crate::host::Host;
use crate::jailer::RUNTIME;
use crate::lifecycle::Status;

/// Becomes it.
pub fn exec(host: &Host, exec: Exec) -> Result<u8, AnyError> {
    let target = Target::find(host, &exec.id)?;
    target.needs("run a process in", Status::Running)?;
    if target.record.sandbox.is_some() {
        return Err(CommandError::NoGuest.into());
    }
    let mut words: Vec<OsString> = ["exec", &exec.id, "--runtime-dir", RUNTIME]
        .map(OsString::from)
        .into();
    let passed;
    let absolute = |path: &std::path::Path| std::path::absolute(path).map(OsString::from);
    let mut option = |name: &str, value: OsString| words.extend([OsString::from(name), value]);
    match &exec.process {
        Some(path) => option("--process", absolute(path)?),
        None => {
            let own = bundle::read(&target.record.bundle)?.process;
            passed = pass(&process_text(&process(&exec, own))?)?;
            option("--process", format!("fd:{}", passed.as_raw_fd()).into());
        }
    }
    if let Some(path) = &exec.pid_file {
        option("--pid-file", absolute(path)?);
    }
    if let Some(path) = &exec.console_socket {
        option("--console-socket", absolute(path)?);
    }
    // Also of a terminal.
    words.push("-i".into());
    if exec.is_detached {
        words.push("--detach".into());
    }
    Err(target.jailer.command(&target.folder, &words).exec()).step("become mayfly-jailer exec")?
}

/// A file in memory, which the program that this one becomes reads.
fn pass(text: &[u8]) -> Result<File, AnyError> {
    let file = rustix::fs::memfd_create(c"process", MemfdFlags::empty());
    let mut file = File::from(file.step("make a file in memory")?);
    file.write_all(text).step("write the process")?;
    file.rewind().step("write the process")?;
    Ok(file)
}

/// The process that the words of a command line ask for: as the container's own, but for what they say.
fn process(exec: &Exec, own: Map<String, Value>) -> Map<String, Value> {
    let mut process = own;
    process.insert("args".into(), json!(exec.words));
    process.insert("terminal".into(), json!(exec.has_terminal));
    if let Some(cwd) = &exec.cwd {
        process.insert("cwd".into(), json!(cwd));
    }
    if let Some((uid, gid)) = exec.user {
        process.insert(
            "user".into(),
            json!({ "uid": uid, "gid": gid.unwrap_or(0) }),
        );
    }
    let mut env: Vec<String> = match process.remove("env") {
        Some(env) => serde_json::from_value(env).unwrap_or_default(),
        None => Vec::new(),
    };
    for variable in &exec.env {
        let name = variable.split('=').next().unwrap_or_default();
        env.retain(|other| other.split('=').next() != Some(name));
        env.push(variable.clone());
    }
    process.insert("env".into(), json!(env));
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_change_what_the_containers_own_process_is() {
        let own = json!({ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["A=1", "B=2"] });
        let exec = Exec {
            words: vec!["id".into()],
            env: vec!["A=3".into(), "C=4".into()],
            cwd: Some("/tmp".into()),
            user: Some((5, None)),
            ..Exec::default()
        };
        let Value::Object(own) = own else { panic!() };
        let expected = json!({
            "args": ["id"], "cwd": "/tmp", "user": { "uid": 5, "gid": 0 }, "env": ["B=2", "A=3", "C=4"], "terminal": false,
        });
        assert_eq!(Value::Object(process(&exec, own)), expected);
    }
}
