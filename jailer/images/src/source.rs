//! Where a root file system comes from: a folder, an archive of files, or an archive of an image. All fill a [`Tree`].

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, OFlags, Stat};

use crate::archive::Archive;
use crate::content::{Content, Folder, Place, Stamp, Sum};
use crate::failure::{Context, Failure, Result};
use crate::fill::{self, Blobs, LeftOut, bad_archive};
use crate::layout::{Config, Layout};
use crate::tree::{CAPABILITY, Id, Meta, Node, ROOT, Tree};
use crate::unpack::{self, Compression};

/// What an earlier run has read of a file: its sum, where it had no capability.
pub type Known<'a> = &'a dyn Fn(&Stamp) -> Option<Sum>;

struct Reader<'a> {
    folder: Arc<Folder>,
    known: Known<'a>,
    /// The first name of each file that has several.
    links: HashMap<(u64, u64), Id>,
    device: u64,
    /// How much content may still come.
    left: u64,
}

impl Reader<'_> {
    fn read(
        &mut self,
        below: &Path,
        here_id: Id,
        tree: &mut Tree,
        todo: &mut Vec<(PathBuf, Id)>,
        left_out: &mut LeftOut,
    ) -> Result<()> {
        let here = self.folder.path().join(below);
        let fd = self.folder.at(below, OFlags::DIRECTORY)?;
        for entry in Dir::read_from(&fd).cannot("list", &here)? {
            let entry = entry.cannot("list", &here)?;
            let bytes = entry.file_name().to_bytes();
            if bytes == b"." || bytes == b".." {
                continue;
            }
            let name = below.join(OsStr::from_bytes(bytes));
            let path = || self.folder.path().join(&name);
            let it = rustix::fs::statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .cannot("open", &path())?;
            let mut meta = meta_of(&it);
            let kind = FileType::from_raw_mode(it.st_mode);
            let bad = |why: String| Failure::new(self.folder.path(), why, "rename or remove it");
            let number = (rustix::fs::major(it.st_rdev), rustix::fs::minor(it.st_rdev));
            let node = match kind {
                FileType::RegularFile => {
                    let first = self.links.get(&(it.st_dev, it.st_ino));
                    if let Some(first) = first.filter(|_| it.st_nlink > 1) {
                        tree.link_below(here_id, bytes, *first).map_err(bad)?;
                        continue;
                    }
                    let stamp = Stamp::of(&it);
                    let left = self.left.checked_sub(stamp.size);
                    self.left = left.ok_or_else(|| {
                        let why = "has more files than may be taken (--max-size allows more)";
                        Failure::new(self.folder.path(), why, "name another folder")
                    })?;
                    let sum = (self.known)(&stamp);
                    if sum.is_none() {
                        meta.capability = capability(&self.folder, &name)?;
                    }
                    Node::File(Content {
                        place: Place::Below(self.folder.clone(), name.clone(), stamp),
                        len: stamp.size,
                        sum,
                    })
                }
                FileType::Directory => Node::Folder(Default::default()),
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&fd, entry.file_name(), Vec::new())
                        .cannot("read", &path())?;
                    Node::Symlink(target.into_bytes())
                }
                FileType::CharacterDevice => Node::Device(true, number.0, number.1),
                FileType::BlockDevice => Node::Device(false, number.0, number.1),
                FileType::Fifo => Node::Fifo,
                _ => {
                    left_out.sockets += 1;
                    continue;
                }
            };
            let id = tree.add_below(here_id, bytes, node, meta).map_err(bad)?;
            match kind {
                FileType::RegularFile if it.st_nlink > 1 => {
                    self.links.insert((it.st_dev, it.st_ino), id);
                }
                FileType::Directory if it.st_dev == self.device => todo.push((name, id)),
                FileType::Directory => left_out.mounts += 1,
                _ => {}
            }
        }
        Ok(())
    }
}

fn meta_of(it: &Stat) -> Meta {
    Meta {
        mode: it.st_mode & 0o7777,
        uid: it.st_uid,
        gid: it.st_gid,
        mtime: it.st_mtime,
        capability: None,
    }
}

fn capability(folder: &Folder, name: &Path) -> Result<Option<Vec<u8>>> {
    let file = folder.at(name, OFlags::empty())?;
    let mut value = vec![0; 64];
    let Ok(len) = rustix::fs::fgetxattr(&file, CAPABILITY, &mut value[..]) else {
        return Ok(None);
    };
    value.truncate(len);
    Ok(Some(value))
}

/// Reads a folder of this host, on its own file system, of at most `max` bytes of content. Content is not read, and
/// capabilities only of files that are not known.
pub fn folder(
    folder: Folder,
    max: u64,
    tree: &mut Tree,
    known: Known<'_>,
    left_out: &mut LeftOut,
) -> Result<()> {
    let it = rustix::fs::fstat(folder.fd()).cannot("open", folder.path())?;
    tree.set_meta(ROOT, meta_of(&it));
    let mut reader = Reader {
        folder: Arc::new(folder),
        known,
        links: HashMap::new(),
        device: it.st_dev,
        left: max,
    };
    let mut todo = vec![(PathBuf::new(), ROOT)];
    while let Some((below, id)) = todo.pop() {
        reader.read(&below, id, tree, &mut todo, left_out)?;
    }
    Ok(())
}

/// Refuses the tree of the source `path` if nothing is in it.
pub fn check_not_empty(tree: &Tree, path: &Path) -> Result<()> {
    match tree.children(ROOT) {
        Some(children) if !children.is_empty() => Ok(()),
        _ => Err(Failure::new(path, "holds no files", "name another source")),
    }
}

/// What an archive is read with.
#[derive(Debug)]
pub struct Request<'a> {
    pub path: &'a Path,
    /// Which image of a layout with several.
    pub name: Option<&'a str>,
    /// A folder for what is unpacked.
    pub work: &'a Path,
    /// How much content it may unpack to.
    pub max: u64,
}

impl Request<'_> {
    /// Reads an archive: of files, or of an image. None: it is no archive.
    pub fn archive(
        &self,
        tree: &mut Tree,
        blobs: &mut Blobs,
        left_out: &mut LeftOut,
    ) -> Result<Option<Config>> {
        let file = File::open(self.path).cannot("open", self.path)?;
        let mut unpacked = self.path.to_path_buf();
        if let Some(kind) = Compression::of(&file).cannot("read", self.path)? {
            // An image needs the parts of its archive in any order.
            unpacked = self.work.join("unpacked");
            unpack::unpack(self.path, kind, &unpacked, self.max)?;
        }
        let file = File::open(&unpacked).cannot("open", self.path)?;
        if !Archive::is_one(&file).cannot("read", self.path)? {
            return Ok(None);
        }
        let layout = self.work.join("layout");
        if let Some(layout) = Layout::of_archive(&unpacked, &layout, self.max)? {
            return layout.read(self.name, tree, blobs, left_out).map(Some);
        }
        fill::archive(&mut BufReader::new(file), tree, blobs, false, left_out)
            .map_err(|error| bad_archive(self.path, &error))?;
        Ok(Some(Config::default()))
    }
}
