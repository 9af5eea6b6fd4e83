//! Where a root file system comes from: a folder, or a tar archive. Both fill a [`Tree`].

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::tree::{Meta, Node, Tree, names};
use crate::archive::{Archive, Entry, EntryKind};
use crate::failure::{Context, Failure, Result, printable};
use crate::progress::Progress;
use crate::sparse;

const CAPABILITY: &str = "security.capability";

/// The numbered files of content, with a bound on all of them together.
#[derive(Debug)]
pub struct Blobs {
    folder: PathBuf,
    count: u64,
    left: u64,
    max: u64,
}

impl Blobs {
    pub fn new(folder: PathBuf, max: u64) -> Result<Blobs> {
        fs::create_dir(&folder).cannot("create", &folder)?;
        Ok(Blobs {
            folder,
            count: 0,
            left: max,
            max,
        })
    }

    fn too_much(&self) -> std::io::Error {
        let max = self.max >> 20;
        std::io::Error::other(format!(
            "it has more than {max} MiB of files (--max-size allows more)"
        ))
    }

    /// Content from a stream.
    pub fn add(&mut self, from: &mut dyn Read) -> std::io::Result<Node> {
        let path = self.folder.join(self.count.to_string());
        self.count += 1;
        let file = File::create_new(&path)?;
        let mut progress = Progress::quiet();
        let len = sparse::from_stream(from, &file, self.left, &mut progress).map_err(|error| {
            if error.to_string().starts_with("more than") {
                self.too_much()
            } else {
                error
            }
        })?;
        self.left -= len;
        Ok(Node::File(path, len))
    }

    /// The content of a file of this program's own.
    pub fn text(&mut self, text: &str) -> Result<Node> {
        let folder = self.folder.clone();
        self.add(&mut text.as_bytes()).cannot("write", &folder)
    }
}

/// What was left out, and how often.
#[derive(Debug, Default)]
pub struct LeftOut {
    pub sockets: u64,
    pub mounts: u64,
    pub attributes: u64,
}

/// Adds the entries of an archive. With `whiteouts` it is a layer of an image, whose names may mean
/// that something of a lower layer is gone.
pub fn archive(
    from: &mut dyn Read,
    tree: &mut Tree,
    blobs: &mut Blobs,
    whiteouts: bool,
    left_out: &mut LeftOut,
) -> std::io::Result<()> {
    let mut archive = Archive::new(from);
    let bad = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    while let Some(entry) = archive.next()? {
        if whiteouts && whiteout(&entry.name, tree).map_err(bad)? {
            continue;
        }
        let meta = meta(&entry, left_out);
        let node = match entry.kind {
            EntryKind::HardLink => {
                tree.link(&entry.name, &entry.link).map_err(bad)?;
                continue;
            }
            // A name that leads out is refused before its content is read.
            EntryKind::File => {
                names(&entry.name).map_err(bad)?;
                blobs.add(&mut archive)?
            }
            EntryKind::Folder => Node::Folder(Default::default()),
            EntryKind::Symlink => Node::Symlink(entry.link),
            EntryKind::CharDevice => Node::Device(true, entry.device.0, entry.device.1),
            EntryKind::BlockDevice => Node::Device(false, entry.device.0, entry.device.1),
            EntryKind::Fifo => Node::Fifo,
        };
        tree.add(&entry.name, node, meta).map_err(bad)?;
    }
    Ok(())
}

fn meta(entry: &Entry, left_out: &mut LeftOut) -> Meta {
    let capability = entry.attributes.iter().find(|(name, _)| name == CAPABILITY);
    left_out.attributes += entry
        .attributes
        .iter()
        .filter(|(name, _)| name != CAPABILITY)
        .count() as u64;
    Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        capability: capability.map(|(_, value)| value.clone()),
    }
}

/// Whether the name is a whiteout, which is then applied (OCI image specification, layer.md).
fn whiteout(path: &[u8], tree: &mut Tree) -> Result<bool, String> {
    let names = names(path)?;
    let Some((name, folder)) = names.split_last() else {
        return Ok(false);
    };
    if *name == b".wh..wh..opq" {
        tree.hide_all(folder);
    } else if name.starts_with(b".wh..wh.") {
        // Of aufs itself.
    } else if let Some(hidden) = name.strip_prefix(b".wh.") {
        tree.hide(folder, hidden);
    } else {
        return Ok(false);
    }
    Ok(true)
}

/// Adds what is in a folder of this host, on its own file system.
pub fn folder(
    top: &Path,
    tree: &mut Tree,
    blobs: &mut Blobs,
    left_out: &mut LeftOut,
) -> Result<()> {
    let device = fs::metadata(top).cannot("open", top)?.dev();
    let mut links: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut todo = vec![PathBuf::new()];
    let mut progress = Progress::new("reading", 0);
    let mut bytes = 0;
    while let Some(below) = todo.pop() {
        let here = top.join(&below);
        for entry in fs::read_dir(&here).cannot("list", &here)? {
            let entry = entry.cannot("list", &here)?;
            let path = entry.path();
            let name = below.join(entry.file_name());
            let it = fs::symlink_metadata(&path).cannot("open", &path)?;
            let kind = it.file_type();
            let capability = capability(&path, kind.is_file());
            let meta = Meta {
                mode: it.mode() & 0o7777,
                uid: it.uid(),
                gid: it.gid(),
                mtime: it.mtime(),
                capability,
            };
            let rdev = (rustix::fs::major(it.rdev()), rustix::fs::minor(it.rdev()));
            let in_tree = name.as_os_str().as_bytes();
            let bad = |why: String| Failure::new(top, why, "rename or remove it");
            if kind.is_file() && it.nlink() > 1 {
                if let Some(first) = links.get(&it.ino()) {
                    tree.link(in_tree, first).map_err(bad)?;
                    continue;
                }
                links.insert(it.ino(), in_tree.to_vec());
            }
            let node = if kind.is_file() {
                let mut file = File::open(&path).cannot("open", &path)?;
                bytes += it.len();
                progress.set(bytes);
                blobs.add(&mut file).cannot("read", &path)?
            } else if kind.is_dir() {
                if it.dev() == device {
                    todo.push(name.clone());
                } else {
                    left_out.mounts += 1;
                }
                Node::Folder(Default::default())
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).cannot("read", &path)?;
                Node::Symlink(target.into_os_string().into_vec())
            } else if kind.is_char_device() || kind.is_block_device() {
                Node::Device(kind.is_char_device(), rdev.0, rdev.1)
            } else if kind.is_fifo() {
                Node::Fifo
            } else {
                left_out.sockets += 1;
                continue;
            };
            tree.add(in_tree, node, meta).map_err(bad)?;
        }
    }
    Ok(())
}

fn capability(path: &Path, is_file: bool) -> Option<Vec<u8>> {
    if !is_file {
        return None;
    }
    let mut value = vec![0; 64];
    let len = rustix::fs::lgetxattr(path, CAPABILITY, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

/// Sets the capability of a file, where that is permitted.
pub fn set_capability(path: &Path, value: &[u8]) -> bool {
    rustix::fs::lsetxattr(path, CAPABILITY, value, rustix::fs::XattrFlags::empty()).is_ok()
}

/// The refusal of an archive.
pub fn bad_archive(path: &Path, error: &std::io::Error) -> Failure {
    let what = format!("cannot be used: {error}");
    let remedy = match error.kind() {
        std::io::ErrorKind::StorageFull => "free some space".to_owned(),
        _ => format!("make it again, or look at it: tar tvf {}", printable(path)),
    };
    Failure::new(path, what, remedy)
}
