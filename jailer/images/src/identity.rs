//! What a file was the last time it was read, so that it need not be read again. A file is known by inode, size and times,
//! above all the time of its last change (ctime), which the kernel sets at each change of content, owner, mode or name and
//! which no program can set; and by its file system, for inode numbers hold for one only.
//!
//! Two changes within one tick of the kernel's clock have one time. So a file that was changed shortly before it was read
//! is read again each time. File systems whose times come from elsewhere (NFS, FUSE) are not trusted with it at all.
//!
//! Each container that an engine starts has an overlay mount of its own, with a device number of its own and a few files
//! of its own; all others have inode and times of the layer below. Where all layers are on one file system, that one counts;
//! otherwise its files cannot be known.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{major, minor};
use sha2::{Digest, Sha256};

use crate::content::{Stamp, Sum};

/// Longer than a tick of any kernel, and than the time stamps of any file system here are coarse.
const SETTLED: Duration = Duration::from_secs(2);

const OVERLAY: i64 = 0x794c_7630;
/// ext2 to ext4, XFS, Btrfs, tmpfs, F2FS.
const LOCAL: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0xf2f5_2010];

/// How a file is known: half of a SHA-256.
pub type Key = [u8; 16];

/// A file system whose files can be known.
#[derive(Debug, Clone)]
pub struct Identity {
    begin: Sha256,
    /// Of an overlay: files of another device are of something mounted over it.
    only: Option<u64>,
    settled_before: (i64, u64),
}

impl Identity {
    /// That of the file system that `it` is on; none: its files cannot be known.
    pub fn of(it: impl AsFd) -> Option<Identity> {
        let kind = rustix::fs::fstatfs(&it).ok()?.f_type as i64;
        let dev = rustix::fs::fstat(&it).ok()?.st_dev;
        let mut fsid = rustix::fs::fstatvfs(&it).ok()?.f_fsid;
        let mut begin = Sha256::new();
        let mut only = None;
        if kind == OVERLAY {
            let layers = layers(dev)?;
            begin.update(b"layers");
            begin.update(layers.dev.to_le_bytes());
            // Each mount has one of its own.
            fsid = layers.fsid;
            only = Some(dev);
        } else if LOCAL.contains(&kind) {
            begin.update(b"local");
        } else {
            return None;
        }
        begin.update(fsid.to_le_bytes());
        let settled = SystemTime::now().checked_sub(SETTLED)?;
        let settled = settled.duration_since(UNIX_EPOCH).ok()?;
        Some(Identity {
            begin,
            only,
            settled_before: (settled.as_secs() as i64, settled.subsec_nanos().into()),
        })
    }

    /// The key of a file; none: it can be no other than read again.
    pub fn key(&self, stamp: &Stamp) -> Option<Key> {
        let mut hash = self.begin.clone();
        match self.only {
            Some(dev) if dev != stamp.dev => return None,
            Some(_) => {}
            None => hash.update(stamp.dev.to_le_bytes()),
        }
        stamp.write(&mut hash);
        let sum: Sum = hash.finalize().into();
        sum.first_chunk().copied()
    }

    /// Whether it was last changed long enough ago: what is read of it now is what its key stands for.
    pub fn is_settled(&self, stamp: &Stamp) -> bool {
        stamp.ctime < self.settled_before && stamp.mtime < self.settled_before
    }
}

/// The file system of all layers of an overlay.
struct Layers {
    dev: u64,
    fsid: u64,
}

/// That of the overlay mount with this number; none where they cannot be told, or are several.
fn layers(dev: u64) -> Option<Layers> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let paths = layer_paths(&mounts, &format!("{}:{}", major(dev), minor(dev)))?;
    let dev_of = |path: &str| rustix::fs::stat(path).ok().map(|it| it.st_dev);
    let first = paths.first()?;
    let dev = dev_of(first)?;
    let are_one = paths.iter().all(|path| dev_of(path) == Some(dev));
    let kind = rustix::fs::statfs(first.as_str()).ok()?.f_type as i64;
    let fsid = rustix::fs::statvfs(first.as_str()).ok()?.f_fsid;
    (are_one && LOCAL.contains(&kind)).then_some(Layers { dev, fsid })
}

/// The folders of the layers of an overlay, out of /proc/self/mountinfo.
fn layer_paths(mounts: &str, number: &str) -> Option<Vec<String>> {
    let is_it = |line: &&str| line.split(' ').nth(2) == Some(number);
    let (_, rest) = mounts.lines().find(is_it)?.split_once(" - overlay ")?;
    let (_, options) = rest.split_once(' ')?;
    // An escaped character: more than is read here.
    if options.contains('\\') {
        return None;
    }
    let mut paths = Vec::new();
    for option in options.split(',') {
        match option.split_once('=') {
            Some(("lowerdir" | "lowerdir+" | "datadir+", list)) => {
                paths.extend(list.split(':').filter(|it| !it.is_empty()))
            }
            Some(("upperdir", path)) => paths.push(path),
            _ => {}
        }
    }
    // Names that hold in the folder of the program that mounted it only.
    let are_whole = !paths.is_empty() && paths.iter().all(|path| path.starts_with('/'));
    are_whole.then(|| paths.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(ctime: i64) -> Stamp {
        Stamp {
            dev: 1,
            ino: 2,
            size: 3,
            mtime: (4, 5),
            ctime: (ctime, 6),
        }
    }

    #[test]
    fn key_when_anything_of_a_file_differs_is_another() {
        let folder = fs::File::open("/dev/shm").unwrap();
        let identity = Identity::of(&folder).expect("/dev/shm is a tmpfs");
        let it = stamp(7);
        let others = [
            Stamp { dev: 9, ..it },
            Stamp { ino: 9, ..it },
            Stamp { size: 9, ..it },
            Stamp {
                mtime: (9, 5),
                ..it
            },
            Stamp {
                mtime: (4, 9),
                ..it
            },
            stamp(9),
            Stamp {
                ctime: (7, 9),
                ..it
            },
        ];
        assert_eq!(identity.key(&it), identity.key(&stamp(7)));
        for other in others {
            assert_ne!(identity.key(&it), identity.key(&other), "{other:?}");
        }
    }

    #[test]
    fn file_that_was_changed_just_now_is_not_settled() {
        let folder = fs::File::open("/dev/shm").unwrap();
        let identity = Identity::of(&folder).unwrap();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs() as i64;
        assert!(!identity.is_settled(&stamp(now)));
        assert!(!identity.is_settled(&stamp(now + 1000)));
        assert!(identity.is_settled(&stamp(now - 10)));
    }

    #[test]
    fn file_systems_whose_times_are_not_the_kernels_are_not_trusted() {
        assert!(Identity::of(fs::File::open("/proc").unwrap()).is_none());
    }

    #[test]
    fn layers_of_an_overlay_are_those_of_its_mount() {
        let mounts = "\
            36 35 0:50 / /a rw - overlay overlay rw,lowerdir=/x:/y,upperdir=/up,workdir=/w\n\
            37 35 0:51 / /b rw - overlay overlay rw,lowerdir+=/p,lowerdir+=/q\n\
            38 35 0:52 / /c rw - overlay overlay rw,lowerdir=l/AB:l/CD,upperdir=d\n\
            39 35 0:53 / /d rw - overlay overlay rw,lowerdir=/a\\040b\n\
            40 35 8:1 / /e rw - ext4 /dev/sda1 rw\n";
        let of = |number| layer_paths(mounts, number);
        assert_eq!(of("0:50").unwrap(), ["/x", "/y", "/up"]);
        assert_eq!(of("0:51").unwrap(), ["/p", "/q"]);
        for number in ["0:52", "0:53", "8:1", "0:5"] {
            assert_eq!(of(number), None, "{number}");
        }
    }
}
