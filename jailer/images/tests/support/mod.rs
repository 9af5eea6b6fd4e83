//! What the tests of mayfly-image share: a folder, the program, a cache.

pub mod archives;
#[path = "../../../../tests/common/folder.rs"]
mod folder;
#[path = "../../../../tests/common/needs.rs"]
pub mod needs;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

pub use folder::Folder;

impl Folder {
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// The names in a folder below, in order; none where it is missing.
    pub fn names(&self, below: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.join(below)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The program with the cache `cache` of this folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly-image"));
        command.current_dir(self.path()).arg("--cache").arg("cache");
        command.args(args).stdin(Stdio::null());
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// It must succeed; what it prints.
    pub fn succeeds(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The path of the disk of a source.
    pub fn disk(&self, source: &str) -> PathBuf {
        PathBuf::from(self.succeeds(&["disk", source]).trim_end())
    }

    /// It must fail with one message that has all of `words`, and leave nothing in the cache.
    pub fn refuses(&self, args: &[&str], words: &[&str]) {
        let before = (self.names(""), self.names("cache/disks"));
        let output = self.output(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?}: no {word:?} in: {text}");
        }
        assert!(text.contains("; "), "nothing says what to do: {text}");
        assert!(!text.contains("cache/work"), "a file of its own: {text}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert_eq!(self.names("cache/work"), [""; 0], "{args:?}");
        let after: Vec<_> = self.names("");
        let after: Vec<_> = after.into_iter().filter(|it| it != "cache").collect();
        let before_here: Vec<_> = before.0.into_iter().filter(|it| it != "cache").collect();
        assert_eq!(after, before_here, "{args:?} left something");
        assert_eq!(self.names("cache/disks"), before.1, "{args:?}");
    }

    pub fn shell(&self, script: &str) -> String {
        self.run("sh", &["-ec", script])
    }

    /// What another program says of a file of a disk.
    pub fn stat(&self, disk: &std::path::Path, path: &str) -> String {
        let disk = disk.to_str().unwrap();
        self.run("dump.erofs", &[&format!("--path={path}"), disk])
    }

    /// Unpacks a disk with another program's reader into a new folder, which also checks it.
    pub fn unpack(&self, disk: &std::path::Path, to: &str) {
        let to = format!("--extract={}", self.join(to).display());
        self.run("fsck.erofs", &[&to, disk.to_str().unwrap()]);
    }
}

/// Numbers that look random, the same for each seed.
pub struct Random(pub u64);

impl Random {
    /// With a seed that is printed, or the one of MAYFLY_SEED.
    pub fn new() -> Random {
        let given = std::env::var("MAYFLY_SEED").ok();
        let seed = given.and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) * 7919 + 1);
        println!("seed {seed} (MAYFLY_SEED)");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
