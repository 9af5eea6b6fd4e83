//! Files of this host as an archive for a guest (`mayfly-agent-protocol::archive`): of `cp`, and of `--copy-in`.
//!
//! It is done by a child of this program, which reads and writes and may wait. No link in a folder is followed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use mayfly_agent_protocol::archive::{DEPTH_MAX, Entry, Kind, LINK_MAX, MODE_MASK, is_name};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::args::Why;
use crate::console::pipe;
use crate::error::{AnyError, Failure, Step as _, message};
use crate::sys;

/// Bytes that are read and written at once.
const PIECE: usize = 64 * 1024;
/// Longest message of a child.
const MESSAGE_MAX: usize = 4096;

/// A file cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error("cannot copy {0}: it has no name of its own")]
    NoName(PathBuf),
    #[error("cannot copy {0}: its folders are more than {DEPTH_MAX} deep")]
    TooDeep(String),
    #[error("cannot copy {0} (--copy-in): it is not a file or a folder")]
    NoFile(PathBuf),
}

/// A file or folder for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyIn {
    from: PathBuf,
    /// The folder in the guest.
    folder: Vec<u8>,
    /// Its name there.
    name: Vec<u8>,
}

impl CopyIn {
    /// Reads `SRC:DST`; the last colon is the one between both.
    pub fn parse(text: &str) -> Result<CopyIn, Why> {
        let (from, to) = text.rsplit_once(':').ok_or("it is not SRC:DST")?;
        let to = to.trim_end_matches('/');
        let (folder, name) = to.rsplit_once('/').ok_or("DST is not an absolute path")?;
        let folder = if folder.is_empty() { "/" } else { folder };
        let is_path = folder.starts_with('/') && folder.len() <= LINK_MAX;
        match is_path && is_name(name.as_bytes()) && !from.is_empty() {
            true => Ok(CopyIn {
                from: from.into(),
                folder: folder.into(),
                name: name.into(),
            }),
            false => Err("DST is not an absolute path with a name at its end".into()),
        }
    }
}

/// A child that packs: its archive, and what it says if it cannot.
#[derive(Debug)]
pub struct Packing {
    errors: OwnedFd,
    child: Pid,
}

impl Packing {
    /// Starts to pack what is to be copied; the archive too, of which a read does not wait.
    pub fn start(all: &[CopyIn]) -> Result<(OwnedFd, Packing), Failure> {
        const START: &str = "start the program that copies files in (--copy-in)";
        let (archive, to) = pipe(false, true).step(START)?;
        let (errors, complaint) = pipe(true, false).step(START)?;
        let child =
            sys::fork_apart(to, complaint.as_fd(), &Order(all.to_vec()), pack_all).step(START)?;
        Ok((archive, Packing { errors, child }))
    }

    /// Why it could not pack, if that was so. The archive is to be closed by then.
    pub fn end(self) -> Option<String> {
        let mut text = Vec::new();
        // It is gone or about to be.
        let _ = File::from(self.errors)
            .take(MESSAGE_MAX as u64)
            .read_to_end(&mut text);
        let _ = sys::wait(self.child);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }
}

/// What the child is told.
#[derive(Clone)]
struct Order(Vec<CopyIn>);

/// The life of the child.
fn pack_all(closed: Result<(), Errno>, to: OwnedFd, complaint: BorrowedFd<'_>, all: &Order) {
    let packed = (|| -> Result<(), AnyError> {
        closed.step("close descriptors")?;
        let mut packer = Packer {
            out: File::from(to),
            keeps_owners: rustix::process::geteuid().is_root(),
        };
        all.0.iter().try_for_each(|copy| packer.copy_in(copy))?;
        packer.end()
    })();
    if let Err(error) = packed {
        let _ = rustix::io::write(complaint, message(&*error).as_bytes());
    }
}

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);
/// How a folder in a folder is opened.
pub const FOLDER: OFlags = READ.union(OFlags::DIRECTORY);

/// The folder of a path, opened, and the name of the entry in it.
pub fn split(path: &Path) -> Result<(OwnedFd, Vec<u8>), AnyError> {
    let name = path
        .file_name()
        .ok_or_else(|| PackError::NoName(path.to_owned()))?;
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let opened = sys::open_folder(folder).step_on("open the folder", folder)?;
    Ok((opened, name.as_bytes().to_vec()))
}

/// What writes an archive.
#[derive(Debug)]
pub struct Packer {
    /// Where it goes.
    pub out: File,
    /// Whether users and groups go along.
    pub keeps_owners: bool,
}

impl Packer {
    /// Writes what is at `path`, and nothing else.
    pub fn pack(&mut self, path: &Path) -> Result<(), AnyError> {
        let path = match path.file_name() {
            Some(_) => path.to_owned(),
            // As of `.` and `..`.
            None => std::fs::canonicalize(path).step_on("copy", path)?,
        };
        let (folder, name) = split(&path)?;
        self.entry(&folder, &name, &name, 0)?;
        self.end()
    }

    /// Writes a file or folder for a place in the guest. A link to one stands for it.
    fn copy_in(&mut self, copy: &CopyIn) -> Result<(), AnyError> {
        const WHAT: &str = "copy into the guest (--copy-in)";
        let path = std::fs::canonicalize(&copy.from).step_on(WHAT, &copy.from)?;
        let found = std::fs::metadata(&path).step_on(WHAT, &path)?;
        if !found.is_file() && !found.is_dir() {
            return Err(PackError::NoFile(copy.from.clone()).into());
        }
        let (folder, name) = split(&path)?;
        let place = Entry {
            size: copy.folder.len() as u64,
            ..Entry::bare(Kind::Place)
        };
        self.send(&place.encode())?;
        self.send(&copy.folder)?;
        self.entry(&folder, &name, &copy.name, 0)
    }

    fn end(&mut self) -> Result<(), AnyError> {
        self.send(&Entry::bare(Kind::End).encode())
    }

    /// A reader that is gone has said why.
    fn send(&mut self, bytes: &[u8]) -> Result<(), AnyError> {
        match self.out.write_all(bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => sys::exit_now(1),
            other => Ok(other.step("send to the guest")?),
        }
    }

    /// Writes the entry `name` of a folder, as `named`.
    fn entry(
        &mut self,
        folder: &OwnedFd,
        name: &[u8],
        named: &[u8],
        depth: usize,
    ) -> Result<(), AnyError> {
        let shown = String::from_utf8_lossy(name).into_owned();
        let what = format!("copy {shown}");
        let stat =
            rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).step(what.clone())?;
        let owner = match self.keeps_owners {
            true => (stat.st_uid, stat.st_gid),
            false => (0, 0),
        };
        let mut entry = Entry {
            name: named.len(),
            mode: stat.st_mode & MODE_MASK,
            owner,
            ..Entry::bare(Kind::File)
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file =
                    rustix::fs::openat(folder, name, READ, Mode::empty()).step(what.clone())?;
                entry.size = stat.st_size.unsigned_abs();
                self.send(&entry.encode())?;
                self.send(named)?;
                self.content(File::from(file), &stat, &what)?;
            }
            FileType::Symlink => {
                let to = rustix::fs::readlinkat(folder, name, Vec::new()).step(what)?;
                (entry.kind, entry.size) = (Kind::Link, to.as_bytes().len() as u64);
                self.send(&entry.encode())?;
                self.send(named)?;
                self.send(to.as_bytes())?;
            }
            FileType::Directory => {
                if depth >= DEPTH_MAX {
                    return Err(PackError::TooDeep(shown).into());
                }
                let inner =
                    rustix::fs::openat(folder, name, FOLDER, Mode::empty()).step(what.clone())?;
                entry.kind = Kind::Folder;
                self.send(&entry.encode())?;
                self.send(named)?;
                for found in Dir::read_from(&inner).step(what.clone())? {
                    let found = found.step(what.clone())?;
                    let name = found.file_name().to_bytes();
                    if is_name(name) {
                        self.entry(&inner, name, name, depth + 1)?;
                    }
                }
                self.send(&Entry::bare(Kind::Leave).encode())?;
            }
            _ => {}
        }
        Ok(())
    }

    /// As many bytes as were announced; a file that shrank meanwhile has zeros at its end.
    fn content(&mut self, file: File, stat: &Stat, what: &str) -> Result<(), AnyError> {
        let mut left = stat.st_size.unsigned_abs();
        let mut file = file.take(left);
        let mut piece = vec![0; PIECE];
        while left > 0 {
            let count = match file.read(&mut piece).step(what.to_owned())? {
                0 => {
                    piece.fill(0);
                    PIECE.min(usize::try_from(left).unwrap_or(PIECE))
                }
                count => count,
            };
            self.send(&piece[..count])?;
            left -= count as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_in_the_guest_is_an_absolute_path_with_a_name() {
        let copy = CopyIn::parse("./a:b/c:/etc/new/").unwrap();
        assert_eq!(copy.from, Path::new("./a:b/c"));
        assert_eq!((&*copy.folder, &*copy.name), (&b"/etc"[..], &b"new"[..]));
        assert_eq!(CopyIn::parse("a:/b").unwrap().folder, b"/");
        for text in [
            "", "a", "a:", "a:b", "a:/", ":/a", "a:/..", "a:b/c", "a:/b/.",
        ] {
            assert!(CopyIn::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn several_files_are_one_archive_and_what_cannot_be_copied_is_said() {
        let folder = crate::testing::Folder::new("pack-several");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "content").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let copy = |from: &Path, to| CopyIn::parse(&format!("{}:{to}", from.display())).unwrap();
        let all = [copy(&link, "/etc/hosts"), copy(folder.path(), "/srv/x")];
        let (archive, packing) = Packing::start(&all).unwrap();
        let mut bytes = Vec::new();
        rustix::io::ioctl_fionbio(&archive, false).unwrap();
        File::from(archive).read_to_end(&mut bytes).unwrap();
        assert_eq!(packing.end(), None);
        let has = |text: &[u8]| bytes.windows(text.len()).any(|it| it == text);
        assert!(has(b"/etc") && has(b"hostscontent"), "{bytes:?}");
        assert!(has(b"filecontent") && has(b"linkfile"));

        let (_archive, packing) = Packing::start(&[copy(Path::new("/dev/null"), "/x")]).unwrap();
        let text = packing.end().unwrap();
        assert!(
            text.contains("/dev/null") && text.contains("not a file"),
            "{text}"
        );
    }
}
