//! What the tests of mayfly-disks share: the program, a folder, disks with known content.

#[path = "../../../../tests/common/folder.rs"]
mod folder;
#[path = "../../../../tests/common/needs.rs"]
pub mod needs;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

/// No whole number of MiB, of cylinders or of clusters: 100 MiB and a sector.
pub const SIZE: u64 = (100 << 20) + 512;
const PARTITION: u64 = 1 << 20;

pub use folder::Folder;

impl Folder {
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub fn has(&self, name: &str) -> bool {
        self.join(name).symlink_metadata().is_ok()
    }

    /// Runs the program in this folder; its exit code, output and messages.
    pub fn disks(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly-disks"));
        command.args(args).current_dir(self.path());
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// The same, which must succeed; its output.
    pub fn succeeds(&self, args: &[&str]) -> String {
        let (code, output, messages) = self.disks(args);
        assert_eq!(code, 0, "{args:?}: {messages}");
        output
    }

    /// The same, which must fail with one message that names all of `words`, and leave nothing.
    pub fn refuses(&self, args: &[&str], words: &[&str]) {
        let before = self.names();
        let (code, _, messages) = self.disks(args);
        assert_eq!(code, 1, "{args:?} was not refused: {messages}");
        let text = messages.trim_end();
        assert_eq!(text.lines().count(), 1, "{args:?}: {messages}");
        for word in words {
            assert!(text.contains(word), "{args:?}: no {word:?} in: {text}");
        }
        assert!(text.contains("; "), "nothing says what to do: {text}");
        assert!(
            !text.contains(".unfinished"),
            "a file of the program's own: {text}"
        );
        assert_eq!(self.names(), before, "{args:?} left something");
    }

    /// Writes a program of the shell, by another process: a descriptor for writing in this one could be inherited by
    /// the child of another test just then, and a program open for writing does not start.
    pub fn program(&self, name: &str, script: &str) {
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$0\"; chmod 755 \"$0\"";
        self.run("sh", &["-ec", write, name, script]);
    }

    /// Runs qemu-img with `words`, which are split at spaces.
    pub fn qemu_img(&self, words: &str) -> String {
        let words: Vec<&str> = words.split(' ').collect();
        self.run("qemu-img", &words)
    }

    /// A raw disk of [`SIZE`] with a partition that is an ext4 file system labelled `mark`, with the
    /// file /etc/mark that holds `mark`. Its last sector has content too.
    pub fn marked(&self, name: &str, mark: &str) {
        let root = self.join("mark-root");
        for folder in ["etc", "bin", "boot"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("etc/mark"), mark).unwrap();
        fs::write(root.join("boot/vmlinuz-6.1.0-9-amd64"), "older").unwrap();
        fs::write(root.join("boot/vmlinuz-6.1.0-18-amd64"), mark.repeat(5000)).unwrap();
        fs::write(root.join("boot/initrd.img-6.1.0-18-amd64"), "an initrd").unwrap();
        self.run(
            "mke2fs",
            &[
                "-q",
                "-t",
                "ext4",
                "-L",
                "mark",
                "-d",
                "mark-root",
                "mark-fs",
                "40M",
            ],
        );
        let disk = File::create(self.join(name)).unwrap();
        disk.set_len(SIZE).unwrap();
        let mut table = [0; 512];
        table[446 + 4] = 0x83;
        table[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
        table[446 + 12..446 + 16].copy_from_slice(&(40u32 << 11).to_le_bytes());
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        disk.write_all_at(&table, 0).unwrap();
        disk.write_all_at(&fs::read(self.join("mark-fs")).unwrap(), PARTITION)
            .unwrap();
        disk.write_all_at(b"the last sector", SIZE - 512).unwrap();
        fs::remove_file(self.join("mark-fs")).unwrap();
        fs::remove_dir_all(root).unwrap();
    }

    /// The content of a file in the marked file system of a raw disk.
    pub fn mark(&self, disk: &str, path: &str) -> String {
        let place = format!("{disk}?offset={PARTITION}");
        self.run("debugfs", &["-R", &format!("cat {path}"), &place])
    }

    pub fn same(&self, one: &str, other: &str) -> bool {
        let (one, other) = (self.join(one), self.join(other));
        Command::new("cmp")
            .arg("-s")
            .args([one, other])
            .status()
            .unwrap()
            .success()
    }

    pub fn len(&self, name: &str) -> u64 {
        fs::metadata(self.join(name)).unwrap().len()
    }

    pub fn allocated(&self, name: &str) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(self.join(name)).unwrap()) * 512
    }

    /// Cuts the end of a file off.
    pub fn cut(&self, name: &str, bytes: u64) {
        let file = File::options().write(true).open(self.join(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() - bytes)
            .unwrap();
    }

    pub fn write_at(&self, name: &str, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.join(name)).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    pub fn convert(&self, format: &str, options: &str, from: &str, to: &str) {
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        self.run("qemu-img", &[&args[..], &[from, to]].concat());
    }
}
