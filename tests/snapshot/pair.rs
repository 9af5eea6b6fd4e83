//! The two files of a snapshot, and the requests that write and load them.
#![expect(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{self, Api, Folder, Monitor};

/// Where a snapshot is, or goes.
#[derive(Clone, Debug)]
pub struct Pair {
    pub state: PathBuf,
    pub memory: PathBuf,
}

impl Pair {
    /// `NAME.state` and `NAME.memory` in a folder.
    pub fn new(folder: &Folder, name: &str) -> Self {
        Pair {
            state: folder.join(&format!("{name}.state")),
            memory: folder.join(&format!("{name}.memory")),
        }
    }

    /// The body of a create of `kind`: Full, Diff or Fork.
    pub fn create(&self, kind: &str) -> Value {
        json!({
            "snapshot_type": kind,
            "snapshot_path": self.state,
            "mem_file_path": self.memory,
        })
    }

    /// The body of a load after which the guest is paused.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "File", "backend_path": self.memory},
        })
    }

    /// The same with `more` members, after which the guest runs.
    pub fn resume(&self, more: Value) -> Value {
        let mut body = self.load();
        body["resume_vm"] = json!(true);
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    }

    /// A machine made of it, which runs, with `more` members in the request.
    pub fn restore(&self, folder: &Folder, more: Value) -> (Monitor, Api) {
        let (monitor, api) = Monitor::unconfigured(folder);
        api.put("/snapshot/load", self.resume(more));
        (monitor, api)
    }

    /// Its header, by the documented format of the state file.
    pub fn header(&self) -> Value {
        let bytes = fs::read(&self.state).unwrap();
        let len = u32::from_le_bytes(bytes[24..28].try_into().unwrap());
        serde_json::from_slice(&bytes[32..32 + len as usize]).unwrap()
    }

    /// Where the snapshot's id is in the memory file.
    pub fn id_range(&self) -> std::ops::Range<usize> {
        let at = self.header()["memory"]["id_at"].as_u64().unwrap();
        let at = usize::try_from(at).unwrap();
        at..at + 16
    }

    /// Guest memory without the snapshot's id.
    pub fn memory(&self) -> Vec<u8> {
        let mut memory = fs::read(&self.memory).unwrap();
        memory[self.id_range()].fill(0);
        memory
    }
}

/// That two images of guest memory are the same.
pub fn assert_same(one: &[u8], other: &[u8]) {
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
    let different: Vec<_> = pages.filter(|(_, (one, other))| one != other).collect();
    let numbers: Vec<_> = different.iter().map(|(page, _)| page).take(20).collect();
    let count = different.len();
    assert!(different.is_empty(), "{count} pages differ: {numbers:?}");
}

pub fn pause(api: &Api) {
    api.patch("/vm", json!({"state": "Paused"}));
}

pub fn resume(api: &Api) {
    api.patch("/vm", json!({"state": "Resumed"}));
}

/// Pauses the guest, takes a full snapshot, and ends the monitor.
pub fn save_and_end(mut monitor: Monitor, api: &Api, pair: &Pair) {
    pause(api);
    api.put("/snapshot/create", pair.create("Full"));
    monitor.child.kill().unwrap();
    monitor.child.wait().unwrap();
}

/// How many requests of a kind (`read`, `write`) the disks have done.
pub fn disk_requests(api: &Api, kind: &str) -> u64 {
    let (status, metrics) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200, "{metrics}");
    let kind = format!("operation=\"{kind}\"");
    let of_disks = metrics
        .lines()
        .filter(|line| line.starts_with("mayfly_block_operations_total{") && line.contains(&kind));
    of_disks
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

/// Waits until the disks have done `count` more requests of a kind.
pub fn await_disk(api: &Api, kind: &str, count: u64) {
    let before = disk_requests(api, kind);
    common::wait_until("the disk is used", || {
        disk_requests(api, kind) >= before + count
    });
}

/// Runs `tools/snapshot`'s program, which must succeed.
pub fn snapshot_tool(args: &[&Path]) {
    let program = common::built("MAYFLY_SNAPSHOT_BIN", "mayfly-snapshot");
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
}
