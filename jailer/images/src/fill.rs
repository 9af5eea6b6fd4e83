//! The entries of a tar archive, put into a [`Tree`], and their content into numbered files, with a bound on all of it.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::archive::{Archive, Budget, Entry, EntryKind};
use crate::content::{Content, Hashing, Place};
use crate::failure::{Context, Failure, Result, printable};
use crate::progress::Progress;
use crate::sparse;
use crate::tree::{Meta, Node, Tree, names};

/// The numbered files of content, with a bound on all of them together.
#[derive(Debug)]
pub struct Blobs {
    folder: PathBuf,
    count: u64,
    left: u64,
    max: u64,
    /// What the archives of this content may still have besides.
    budget: Budget,
}

impl Blobs {
    pub fn new(folder: PathBuf, max: u64) -> Result<Blobs> {
        fs::create_dir(&folder).cannot("create", &folder)?;
        Ok(Blobs {
            folder,
            count: 0,
            left: max,
            max,
            budget: Budget::default(),
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
        let mut from = Hashing {
            from,
            hash: Sha256::new(),
        };
        let len =
            sparse::from_stream(&mut from, &file, self.left, &mut progress).map_err(|error| {
                match sparse::is_too_long(&error) {
                    true => self.too_much(),
                    false => error,
                }
            })?;
        self.left -= len;
        Ok(Node::File(Content {
            place: Place::Own(path),
            len,
            sum: Some(from.hash.finalize().into()),
        }))
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

impl LeftOut {
    pub fn lines(&self) -> Vec<String> {
        let all = [
            (self.sockets, "sockets were left out"),
            (
                self.mounts,
                "folders are mounts of other file systems: their content was left out",
            ),
            (
                self.attributes,
                "extended attributes other than security.capability were left out",
            ),
        ];
        let some = all.iter().filter(|(count, _)| *count > 0);
        some.map(|(count, what)| format!("{count} {what}"))
            .collect()
    }
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
    let mut archive = Archive::within(from, blobs.budget);
    let bad = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    while let Some(entry) = archive.next_entry()? {
        tree.check_work().map_err(bad)?;
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
    blobs.budget = archive.budget();
    Ok(())
}

fn meta(entry: &Entry, left_out: &mut LeftOut) -> Meta {
    left_out.attributes = left_out.attributes.saturating_add(entry.attributes);
    Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        capability: entry.capability.clone(),
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

/// The refusal of an archive.
pub fn bad_archive(path: &Path, error: &std::io::Error) -> Failure {
    let what = format!("cannot be used: {error}");
    let remedy = match error.kind() {
        std::io::ErrorKind::StorageFull => "free some space".to_owned(),
        _ => format!("make it again, or look at it: tar tvf {}", printable(path)),
    };
    Failure::new(path, what, remedy)
}
