//! The cache of disks. One folder, of one user:
//!
//! | | |
//! |---|---|
//! | `disks/SUM.erofs` | a disk, by the identity of its content ([`crate::digest`]): it appears whole, by rename, and never changes |
//! | `files/SUM` | the files of folders that it was made from ([`crate::known`]) |
//! | `sources/KEY` | the disk that an archive or a layout became, by inode, size and times of its files |
//! | `work/PID-N` | what a run is making, locked by it ([`work`]) |
//! | `locks/NAME` | one maker at a time of one disk, and of one archive |
//!
//! Everything but the disks only saves time: it may be lost, damaged or removed at any time.
//!
//! Who uses a disk has a shared lock on its file (flock) as long as it does: [`Disk::file`], and the supervisor of a
//! microVM. What prunes takes an exclusive one first, so that no disk in use goes. A disk's last use is its file's time of
//! last access. A process that is killed leaves at most a folder in `work`, whose lock is gone with it.

mod prune;
mod stamps;
mod work;

use std::cmp::Reverse;
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::content::{Folder, Place, Stamp, Sum, hex};
use crate::digest;
use crate::erofs;
use crate::failure::{Context, Failure, Result};
use crate::fill::{Blobs, LeftOut};
use crate::identity::Identity;
use crate::known::{List, Lists};
use crate::layout::Layout;
use crate::source::{self, Request};
use crate::tree::{Node, Tree};
pub use prune::Listed;
use stamps::Stamps;
use work::Work;

/// The size of a cache, unless another one is given.
pub const SIZE: u64 = 10 << 30;
/// How much a source may unpack to, unless another limit is given.
pub const SOURCE_MAX: u64 = 32 << 30;

const DISKS: &str = "disks";
const FILES: &str = "files";
const SOURCES: &str = "sources";
const WORK: &str = "work";
const LOCKS: &str = "locks";
const ENDING: &str = ".erofs";
/// A list of known files is kept up to so many times the files of the last folder.
const LIST_GROWTH: usize = 4;

/// What a disk is made from.
#[derive(Debug, Clone)]
pub struct Source {
    /// A folder, an archive, an image layout, or a disk.
    pub path: PathBuf,
    /// Which image of a layout with several.
    pub name: Option<String>,
    /// How much content it may unpack to.
    pub max: u64,
    /// It is a folder that is a root, also where it looks like an image layout.
    pub is_root: bool,
}

impl Source {
    pub fn new(path: impl Into<PathBuf>) -> Source {
        Source {
            path: path.into(),
            name: None,
            max: SOURCE_MAX,
            is_root: false,
        }
    }

    /// A folder that is the root of a container: what is in it has no say in what it is taken for.
    pub fn root(folder: impl Into<PathBuf>) -> Source {
        Source {
            is_root: true,
            ..Source::new(folder)
        }
    }
}

/// A disk that is there as long as this is held.
#[derive(Debug)]
pub struct Disk {
    pub path: PathBuf,
    /// Open for reading, with a shared lock if the disk is one of the cache.
    pub file: File,
    /// It was made now.
    pub is_new: bool,
    /// What the source has and the disk has not.
    pub left_out: LeftOut,
}

#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    limit: u64,
}

/// Where the disks of this user are: where the variable MAYFLY_IMAGES says, `/var/cache/mayfly/images` of root,
/// `mayfly/images` in the user's own folder of caches otherwise.
pub fn default_folder() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("MAYFLY_IMAGES").filter(|it| !it.is_empty()) {
        return Ok(given.into());
    }
    // In a user namespace, root is an ordinary user of the host.
    let whole = fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let words: Vec<&str> = map.split_whitespace().collect();
        words == ["0", "0", "4294967295"]
    });
    if rustix::process::geteuid().is_root() && whole {
        return Ok("/var/cache/mayfly/images".into());
    }
    let folder = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|it| it.is_absolute())
    };
    let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    caches.map(|it| it.join("mayfly/images")).ok_or_else(|| {
        Failure::plain("there is no place for the cache of disks: neither XDG_CACHE_HOME nor HOME is set; give --cache")
    })
}

impl Cache {
    /// Opens the cache, and makes it if it is not there. `limit` is how many bytes its disks may take.
    pub fn open(folder: &Path, limit: u64) -> Result<Cache> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .cannot("create", folder)?;
        let folder = folder.canonicalize().cannot("open", folder)?;
        let it = fs::metadata(&folder).cannot("open", &folder)?;
        if it.uid() != rustix::process::geteuid().as_raw() || it.mode() & 0o022 != 0 {
            return Err(Failure::new(
                &folder,
                "is no place for disks: another user may write there",
                "give --cache a folder of this user with the mode 0700",
            ));
        }
        for name in [DISKS, FILES, SOURCES, WORK, LOCKS] {
            let path = folder.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                other => other.cannot("create", &path)?,
            }
        }
        work::remove_left_behind(&folder.join(WORK))?;
        Ok(Cache { folder, limit })
    }

    /// The disk of a source.
    pub fn disk(&self, source: &Source) -> Result<Disk> {
        let path = source.path.canonicalize().cannot("open", &source.path)?;
        if path.is_dir() {
            return match Layout::of_folder(&path).filter(|_| !source.is_root) {
                Some(layout) => self.of_archive(&path, Some(layout), source),
                None => self.of_folder(&path, source),
            };
        }
        if !path.is_file() {
            return Err(Failure::new(
                &path,
                "is neither a file nor a folder",
                "name a folder, an archive, an image layout or a disk",
            ));
        }
        let file = File::open(&path).cannot("open", &path)?;
        if is_disk(&file).cannot("read", &path)? {
            return Ok(Disk {
                path,
                file,
                is_new: false,
                left_out: LeftOut::default(),
            });
        }
        self.of_archive(&path, None, source)
    }

    fn of_folder(&self, path: &Path, source: &Source) -> Result<Disk> {
        if self.folder.starts_with(path) {
            return Err(Failure::new(
                path,
                "holds the cache of disks",
                "name another folder, or give --cache a place outside of it",
            ));
        }
        let folder = Folder::open(path)?;
        let identity = Identity::of(folder.fd());
        let lists = Lists::new(self.lists()?);
        let known = |stamp: &Stamp| lists.find(&identity.as_ref()?.key(stamp)?);
        let (mut tree, mut left_out) = (Tree::new(), LeftOut::default());
        source::folder(folder, source.max, &mut tree, &known, &mut left_out)?;
        let (files, new) = files(&tree);
        digest::complete(&mut tree)?;
        let sum = finish(&mut tree, path)?;
        let disk = match self.take(&sum)? {
            Some(disk) => disk,
            None => {
                let work = Work::new(&self.folder.join(WORK))?;
                self.take_or_make(&tree, &sum, &work)?
            }
        };
        // A few files of each container's own are read each time, which takes less than to note them.
        if let Some(identity) = &identity
            && (new * 10 > files || disk.is_new)
        {
            let place = self.folder.join(FILES).join(hex(&sum));
            let old = List::read(&place).unwrap_or_default();
            let list = list(&tree, identity);
            let list = match old.len() > LIST_GROWTH * list.len() {
                true => list,
                false => list.with(old),
            };
            self.save(&place, &list.bytes());
        }
        Ok(Disk { left_out, ..disk })
    }

    /// Of an archive, or of a folder that is the layout `folder`.
    fn of_archive(&self, path: &Path, folder: Option<Layout>, source: &Source) -> Result<Disk> {
        let stamps = Stamps::of(path)?;
        let name = source.name.as_deref();
        let key = stamps.as_ref().and_then(|it| it.key(name));
        if let Some(disk) = self.remembered(&key)? {
            return Ok(disk);
        }
        // One that cannot be known is known by its name for as long as it is read.
        let by_name = || Sha256::digest(path.as_os_str().as_encoded_bytes()).into();
        let _reading = self.lock("source", &key.unwrap_or_else(by_name))?;
        if let Some(disk) = self.remembered(&key)? {
            return Ok(disk);
        }
        let work = Work::new(&self.folder.join(WORK))?;
        let (mut tree, mut left_out) = (Tree::new(), LeftOut::default());
        let mut read = || -> Result<()> {
            let mut blobs = Blobs::new(work.join("blobs"), source.max)?;
            if let Some(layout) = &folder {
                return layout
                    .read(name, &mut tree, &mut blobs, &mut left_out)
                    .map(|_| ());
            }
            let request = Request {
                path,
                name,
                work: work.path(),
                max: source.max,
            };
            match request.archive(&mut tree, &mut blobs, &mut left_out)? {
                Some(_) => Ok(()),
                None => Err(Failure::new(
                    path,
                    "is neither a tar archive (also .gz, .xz or .zst) nor an EROFS or ext4 file system",
                    "for a disk of another kind: tools/guest import",
                )),
            }
        };
        read().map_err(|error| error.within(work.path(), &source.path))?;
        let sum = finish(&mut tree, path)?;
        let disk = self
            .take_or_make(&tree, &sum, &work)
            .map_err(|error| error.within(work.path(), &source.path))?;
        // Only if it is still what it was, and was so for a while before.
        let again = Stamps::of(path)?;
        if let (Some(key), Some(before)) = (key, stamps)
            && before.are_settled()
            && again.is_some_and(|again| again.is_as(&before))
        {
            let place = self.folder.join(SOURCES).join(hex(&key));
            self.save(&place, hex(&sum).as_bytes());
        }
        Ok(Disk { left_out, ..disk })
    }

    /// The disk that a source became before.
    fn remembered(&self, key: &Option<Sum>) -> Result<Option<Disk>> {
        let Some(key) = key else { return Ok(None) };
        let Ok(text) = fs::read_to_string(self.folder.join(SOURCES).join(hex(key))) else {
            return Ok(None);
        };
        match sum_in(&text) {
            Some(sum) => self.take(&sum),
            None => Ok(None),
        }
    }

    /// A disk that is there, kept there from now on, and its last use is now.
    fn take(&self, sum: &Sum) -> Result<Option<Disk>> {
        let path = self.place(sum);
        loop {
            let file = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                other => other.cannot("open", &path)?,
            };
            rustix::fs::flock(&file, FlockOperation::LockShared).cannot("lock", &path)?;
            let it = file.metadata().cannot("open", &path)?;
            if it.nlink() == 0 {
                // It was removed meanwhile.
                continue;
            }
            if !erofs::is_whole(&file, it.len(), sum).cannot("read", &path)? {
                // After a crash of the host, a file can be there without its content.
                fs::remove_file(&path).cannot("remove", &path)?;
                return Ok(None);
            }
            touch(&file).cannot("note the use of", &path)?;
            return Ok(Some(Disk {
                path,
                file,
                is_new: false,
                left_out: LeftOut::default(),
            }));
        }
    }

    /// The disk of a tree, which one of those who want it at the same time makes.
    fn take_or_make(&self, tree: &Tree, sum: &Sum, work: &Work) -> Result<Disk> {
        let _lock = self.lock("disk", sum)?;
        match self.take(sum)? {
            Some(disk) => Ok(disk),
            None => self.make(tree, sum, work),
        }
    }

    /// Makes a disk. The caller has the lock of it.
    fn make(&self, tree: &Tree, sum: &Sum, work: &Work) -> Result<Disk> {
        let unfinished = work.join("disk");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)
            .cannot("create", &unfinished)?;
        erofs::write(tree, sum, &file, &unfinished)?;
        file.set_permissions(fs::Permissions::from_mode(0o400))
            .cannot("write", &unfinished)?;
        file.sync_all().cannot("write", &unfinished)?;
        drop(file);
        // In use before it is there.
        let file = File::open(&unfinished).cannot("open", &unfinished)?;
        rustix::fs::flock(&file, FlockOperation::LockShared).cannot("lock", &unfinished)?;
        touch(&file).cannot("note the use of", &unfinished)?;
        let path = self.place(sum);
        put(&unfinished, &path)?;
        self.prune(self.limit)?;
        Ok(Disk {
            path,
            file,
            is_new: true,
            left_out: LeftOut::default(),
        })
    }

    fn place(&self, sum: &Sum) -> PathBuf {
        self.folder.join(DISKS).join(hex(sum) + ENDING)
    }

    /// The lists of files, those of the most recently used disks first.
    fn lists(&self) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join(FILES);
        let mut all = Vec::new();
        for entry in fs::read_dir(&folder).cannot("list", &folder)? {
            let path = entry.cannot("list", &folder)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let used = sum_in(&name).and_then(|sum| fs::metadata(self.place(&sum)).ok());
            if let Some(used) = used {
                all.push(((used.atime(), used.atime_nsec()), path));
            }
        }
        all.sort_by_key(|(used, _)| Reverse(*used));
        Ok(all.into_iter().map(|(_, path)| path).collect())
    }

    /// Waits for its turn with one of the 256 locks of a kind: files that are never removed, so that all who wait for
    /// one wait for the same. Who needs several takes them in the order source, disk, prune.
    fn lock(&self, kind: &str, sum: &Sum) -> Result<File> {
        let path = self
            .folder
            .join(LOCKS)
            .join(format!("{kind}-{:02x}", sum[0]));
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .cannot("open", &path)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                other => return other.cannot("lock", &path).map(|()| file),
            }
        }
    }

    /// Writes a small file whole, that only saves time: where it cannot, the disk is there all the same.
    fn save(&self, to: &Path, bytes: &[u8]) {
        let Ok(work) = Work::new(&self.folder.join(WORK)) else {
            return;
        };
        let unfinished = work.join("file");
        let write = || -> std::io::Result<()> {
            File::create_new(&unfinished)?.write_all(bytes)?;
            fs::rename(&unfinished, to)
        };
        let _ = write();
    }
}

/// How many files a tree has, and how many of them are new here.
fn files(tree: &Tree) -> (usize, usize) {
    let mut count = (0, 0);
    for (_, node) in tree.nodes() {
        if let Node::File(content) = node {
            count.0 += 1;
            count.1 += usize::from(content.sum.is_none());
        }
    }
    count
}

/// What can be said the next time of a tree of which all is read.
fn list(tree: &Tree, identity: &Identity) -> List {
    let of = |(id, node): (usize, &Node)| {
        let Node::File(content) = node else {
            return None;
        };
        let Place::Below(_, _, stamp) = &content.place else {
            return None;
        };
        let is_plain = tree.meta(id).capability.is_none() && identity.is_settled(stamp);
        Some((identity.key(stamp).filter(|_| is_plain)?, content.sum?))
    };
    List::new(tree.nodes().filter_map(of).collect())
}

/// The identity of a tree that is read.
fn finish(tree: &mut Tree, path: &Path) -> Result<Sum> {
    source::check_not_empty(tree, path)?;
    tree.keep_times_of_files();
    digest::of(tree)
}

/// Whether a file is an EROFS or an ext4 file system, which guests can have as it is.
fn is_disk(file: &File) -> std::io::Result<bool> {
    const SUPERBLOCK: u64 = 1024;
    let block = crate::bytes::read(file, SUPERBLOCK, 64)?;
    Ok(block.starts_with(&erofs::MAGIC.to_le_bytes())
        || crate::bytes::le16(&block, 56) == Some(0xef53))
}

/// The sum that a text is.
fn sum_in(text: &str) -> Option<Sum> {
    let digits = text.as_bytes();
    let mut sum = [0; 32];
    if digits.len() != 64 || !digits.iter().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in sum.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(sum)
}

/// The file is used now, also where its file system does not note that.
fn touch(file: &File) -> rustix::io::Result<()> {
    let at = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps {
        last_access: at(UTIME_NOW),
        last_modification: at(UTIME_OMIT),
    };
    rustix::fs::futimens(file, &times)
}

/// Gives a file its name for ever. One that is there has the same content.
fn put(from: &Path, to: &Path) -> Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows the flag.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to).cannot("create", to)?,
        other => other.cannot("create", to)?,
    }
    let folder = to.parent().unwrap_or(Path::new("/"));
    let opened = File::open(folder).cannot("open", folder)?;
    opened.sync_all().cannot("write", folder)
}
