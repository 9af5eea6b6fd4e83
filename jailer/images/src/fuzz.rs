//! Images of any content: layers of any archives, to a tree, to a disk, which is read again.
//! Compiled for tests and `tools/fuzz` only.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::erofs;
use crate::fill::{self, Blobs, LeftOut};
use crate::fuzz_folder::Folder;
pub use crate::fuzz_input::Input;
use crate::tree::{Id, Node, ROOT, Tree};

/// Bytes of content that all layers may have.
const CONTENT_MAX: u64 = 1 << 20;

/// Up to four layers, of entries of an archive that are as they should be but for what is in them, and of any
/// bytes. Checked of what is taken: each name can be one of Linux and is found where it was put, no folder
/// is in itself, and all paths are bounded; the disk that is made of it has each name, owner, mode, size,
/// link, device and content, and holds nothing else.
pub fn layers(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let work = Folder::new();
    let (mut tree, mut left_out) = (Tree::new(), LeftOut::default());
    let mut blobs = Blobs::new(work.path().join("content"), CONTENT_MAX).unwrap();
    let whiteouts = input.below(4) > 0;
    for layer in 0..4 {
        if input.is_empty() {
            break;
        }
        tree.layer = layer;
        let archive = archive(input);
        let read = fill::archive(
            &mut &archive[..],
            &mut tree,
            &mut blobs,
            whiteouts,
            &mut left_out,
        );
        if let Err(error) = read {
            let text = error.to_string();
            assert!(
                !text.contains(char::is_control) && text.len() < 8192,
                "{text:?}"
            );
            break;
        }
    }
    let Ok(paths) = tree.paths() else { return };
    for (path, id) in &paths {
        assert!(path.len() <= 4096);
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        for name in &parts {
            assert!((1..=255).contains(&name.len()) && !name.contains(&0));
            assert!(*name != b"." && *name != b"..");
        }
        // Along the names alone, without links.
        let found = parts
            .iter()
            .try_fold(ROOT, |at, name| tree.children(at)?.get(*name).copied());
        assert_eq!(found, Some(*id));
    }
    disk_has_all_of(&tree);
}

fn disk_has_all_of(tree: &Tree) {
    let disk = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    erofs::write(tree, &[7; 32], &disk, Path::new("disk")).unwrap();
    Reader::new(disk).check(tree);
}

/// An archive of some entries.
fn archive(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..input.below(24) {
        match input.below(16) {
            0 => {
                let len = input.below(64);
                bytes.extend(input.bytes(len));
            }
            1 => {
                let len = input.below(128);
                let record = input.bytes(len).to_vec();
                entry(&mut bytes, input.one_of(b"xgLK"), b"x", b"", &record, input);
            }
            2 => {
                let value = name(input);
                let key = input.one_of(&["path", "linkpath", "uid", "size", "mtime", CAPABILITY]);
                let record = record(key, &value);
                entry(&mut bytes, input.one_of(b"xxg"), b"x", b"", &record, input);
            }
            3 => {
                // More than fit in a block of a folder.
                let (folder, count) = (name(input), input.below(64));
                for nth in 0..count {
                    let long = format!("/{nth:0>60}");
                    let path = [&folder[..], long.as_bytes()].concat();
                    entry(&mut bytes, b'0', &path, b"", b"", input);
                }
            }
            _ => {
                let kind = input.one_of(b"0000511122634S7\0");
                let (path, target) = (name(input), name(input));
                let len = match input.below(4) {
                    0 => usize::from(input.u16()) % 9000,
                    1 => input.one_of(&[2048, 2049, 4096, 4032, 4033, 8192]),
                    _ => input.below(64),
                };
                let content = vec![input.u8(); if kind == b'0' { len } else { 0 }];
                entry(&mut bytes, kind, &path, &target, &content, input);
            }
        }
    }
    bytes
}

const CAPABILITY: &str = "SCHILY.xattr.security.capability";

/// `LENGTH KEY=VALUE\n`, in which the length counts itself.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let len = rest + (rest + 3).to_string().len();
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A path of few names, so that they meet.
fn name(input: &mut Input<'_>) -> Vec<u8> {
    const NAMES: [&str; 16] = [
        "a",
        "b",
        "c",
        "d",
        "l",
        ".",
        "..",
        "",
        ".wh.a",
        ".wh..wh..opq",
        ".wh..wh.x",
        "usr",
        "a",
        "b",
        "c",
        "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn",
    ];
    match input.below(8) {
        0 => {
            let len = input.below(100);
            input.bytes(len).to_vec()
        }
        1 => b"nnnnnnnnnnnnnnnnnnn/".repeat(input.below(5)),
        _ => {
            let names: Vec<&str> = (0..=input.below(4)).map(|_| input.one_of(&NAMES)).collect();
            names.join("/").into_bytes()
        }
    }
}

fn entry(
    to: &mut Vec<u8>,
    kind: u8,
    name: &[u8],
    link: &[u8],
    content: &[u8],
    input: &mut Input<'_>,
) {
    let mut header = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8], max: usize| {
        let len = bytes.len().min(max);
        header[at..at + len].copy_from_slice(&bytes[..len]);
    };
    put(0, name, 100);
    put(100, format!("{:07o}", input.u16()).as_bytes(), 8);
    put(108, format!("{:07o}", input.u8()).as_bytes(), 8);
    put(116, format!("{:07o}", input.u8()).as_bytes(), 8);
    put(124, format!("{:011o}", content.len()).as_bytes(), 12);
    put(136, format!("{:011o}", input.u16()).as_bytes(), 12);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\0", 6);
    put(329, format!("{:07o}", input.u16()).as_bytes(), 8);
    put(337, format!("{:07o}", input.u16()).as_bytes(), 8);
    if input.below(8) == 0 {
        // A name in two halves, or a number of another form.
        put(
            input.one_of(&[345, 124, 136, 108]),
            &[0x80, input.u8(), input.u8()],
            3,
        );
    }
    put(148, b"        ", 8);
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    to.extend(header);
    to.extend(content);
    to.resize(to.len().next_multiple_of(512), 0);
}

/// Reads an EROFS file system as Linux does, as far as it is of the kind that is written here.
struct Reader {
    disk: File,
    len: u64,
    /// Inode numbers by the nodes of the tree.
    known: BTreeMap<Id, u64>,
    /// How many names each inode was found to have.
    names: BTreeMap<Id, u32>,
}

const BLOCK: u64 = 4096;

impl Reader {
    fn new(disk: File) -> Self {
        let len = disk.metadata().unwrap().len();
        Reader {
            disk,
            len,
            known: BTreeMap::new(),
            names: BTreeMap::new(),
        }
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.disk
            .read_exact_at(&mut bytes, at)
            .expect("it is within the disk");
        bytes
    }

    fn number<const LEN: usize>(&self, at: u64) -> u64 {
        let mut number = [0; 8];
        number[..LEN].copy_from_slice(&self.bytes(at, LEN as u64));
        u64::from_le_bytes(number)
    }

    fn check(mut self, tree: &Tree) {
        assert_eq!(self.number::<4>(1024), u64::from(erofs::MAGIC));
        assert_eq!(self.number::<4>(1024 + 36) * BLOCK, self.len);
        let root = self.number::<2>(1024 + 14);
        self.known.insert(ROOT, root);
        self.names.insert(ROOT, 2);
        let mut todo = vec![(ROOT, ROOT)];
        while let Some((id, parent)) = todo.pop() {
            self.inode(tree, id);
            for (name, found) in self.entries(id) {
                let below = match &name[..] {
                    b"." => id,
                    b".." => parent,
                    _ => tree.children(id).unwrap()[&name],
                };
                let known = *self.known.entry(below).or_insert(found);
                assert_eq!(known, found, "{name:?}");
                if name == b"." || name == b".." {
                    continue;
                }
                *self.names.entry(below).or_default() += 1;
                match tree.node(below) {
                    Node::Folder(_) => {
                        *self.names.entry(below).or_default() += 1;
                        *self.names.entry(id).or_default() += 1;
                        todo.push((below, id));
                    }
                    _ => self.inode(tree, below),
                }
            }
        }
        assert_eq!(self.number::<8>(1024 + 16), self.known.len() as u64);
        for (id, names) in &self.names {
            assert_eq!(
                self.number::<4>(self.at(*id) + 44),
                u64::from(*names),
                "links"
            );
        }
    }

    fn at(&self, id: Id) -> u64 {
        self.known[&id] * 32
    }

    fn attributes(&self, id: Id) -> u64 {
        match self.number::<2>(self.at(id) + 2) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        }
    }

    /// What of an inode is content: some blocks, and an end behind the inode.
    fn body(&self, id: Id) -> Vec<u8> {
        let at = self.at(id);
        let (size, block) = (self.number::<8>(at + 8), self.number::<4>(at + 16));
        let is_inline = self.number::<2>(at) >> 1 == 2;
        let end = if is_inline { size % BLOCK } else { 0 };
        let mut body = match size - end {
            0 => Vec::new(),
            len => self.bytes(block * BLOCK, len),
        };
        let end_at = at + 64 + self.attributes(id);
        // What is behind an inode is in one block with it.
        assert!(end == 0 || end_at / BLOCK == (end_at + end - 1) / BLOCK);
        body.extend(self.bytes(end_at, end));
        body
    }

    /// Names and inode numbers in a folder.
    fn entries(&self, id: Id) -> Vec<(Vec<u8>, u64)> {
        let body = self.body(id);
        let mut all: Vec<(Vec<u8>, u64)> = Vec::new();
        for block in body.chunks(BLOCK as usize) {
            let number = |at: usize, len: usize| {
                let mut number = [0; 8];
                number[..len].copy_from_slice(&block[at..at + len]);
                u64::from_le_bytes(number) as usize
            };
            let count = number(8, 2) / 12;
            for nth in 0..count {
                let begin = number(nth * 12 + 8, 2);
                let end = match nth + 1 < count {
                    true => number((nth + 1) * 12 + 8, 2),
                    false => block.len(),
                };
                let name = block[begin..end].split(|byte| *byte == 0).next().unwrap();
                all.push((name.to_vec(), number(nth * 12, 8) as u64));
            }
        }
        assert!(
            all.is_sorted_by(|one, next| one.0 < next.0),
            "Linux searches by halves"
        );
        all
    }

    fn inode(&self, tree: &Tree, id: Id) {
        let (at, meta) = (self.at(id), tree.meta(id));
        let device = |major: &u32, minor: &u32| {
            u64::from(minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12)
        };
        let (kind, size) = match tree.node(id) {
            Node::Folder(children) => {
                assert_eq!(self.entries(id).len(), children.len() + 2);
                (0o040_000, None)
            }
            Node::File(content) => {
                assert!(self.body(id) == std::fs::read(content.path()).unwrap());
                (0o100_000, Some(content.len))
            }
            Node::Symlink(target) => {
                assert_eq!(&self.body(id), target);
                (0o120_000, Some(target.len() as u64))
            }
            Node::Device(is_char, major, minor) => {
                assert_eq!(self.number::<4>(at + 16), device(major, minor));
                (if *is_char { 0o020_000 } else { 0o060_000 }, Some(0))
            }
            Node::Fifo => (0o010_000, Some(0)),
        };
        assert_eq!(
            self.number::<2>(at + 4),
            kind | u64::from(meta.mode & 0o7777)
        );
        assert_eq!(
            size.unwrap_or(self.number::<8>(at + 8)),
            self.number::<8>(at + 8)
        );
        assert_eq!(self.number::<4>(at + 24), u64::from(meta.uid));
        assert_eq!(self.number::<4>(at + 28), u64::from(meta.gid));
        assert_eq!(self.number::<8>(at + 32), meta.mtime.max(0) as u64);
        if let Some(capability) = &meta.capability {
            let value = at + 64 + 12 + 4 + 10;
            assert_eq!(self.number::<2>(at + 64 + 12 + 2), capability.len() as u64);
            assert_eq!(self.bytes(value, capability.len() as u64), *capability);
        }
        assert_eq!(self.attributes(id) > 0, meta.capability.is_some());
    }
}

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;
    use crate::tree::{Meta, Node, Tree};

    #[test]
    fn layers_when_anything_become_a_disk_that_has_all_of_them_or_are_refused() {
        run("layers", super::layers);
    }

    /// The root's inode is in the first block with the superblock, or behind it where its names need the room.
    #[test]
    fn folders_with_any_number_of_names_are_read_as_they_were() {
        for count in 0..400 {
            let mut tree = Tree::new();
            for nth in 0..count {
                for folder in ["", "folder/"] {
                    let name = format!("{folder}{nth:0>20}");
                    let added = tree.add(name.as_bytes(), Node::Fifo, Meta::default());
                    added.unwrap();
                }
            }
            super::disk_has_all_of(&tree);
        }
    }
}
