//! `mayfly-jailer cp`: the host's side of an archive (`mayfly-agent-protocol::archive`), in a child of this
//! program, which reads and writes and may wait.
//!
//! An archive that comes from a guest is hostile: names are entries of a folder and never paths, each
//! folder is opened by its name in the one above, no link is followed, and what is made has no
//! set-user-ID. A guest can fill the file system that it is copied to, as any file that is copied can.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use mayfly_agent_protocol::archive::{
    DEPTH_MAX, Entry, HEADER, Kind, LINK_MAX, MODE_MASK, is_name,
};
use mayfly_agent_protocol::{COMMAND, Malformed, fields};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Session, archive_body, connect};
use crate::error::{AnyError, Step as _, message};
use crate::run::agent::front::Front;
use crate::run::console::{Sink, pipe};
use crate::sys::{self, Ended};

/// Bytes that are read and written at once.
const PIECE: usize = 64 * 1024;

/// What is to be copied.
#[derive(Debug, PartialEq, Eq)]
pub enum Copy {
    /// Out of a guest.
    FromGuest {
        /// Which one.
        id: String,
        /// Where it is there.
        path: String,
        /// Where it goes.
        to: PathBuf,
    },
    /// Into a guest.
    ToGuest {
        /// Which one.
        id: String,
        /// Where it goes there.
        path: String,
        /// Where it is.
        from: PathBuf,
    },
}

/// A file cannot be copied.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("cannot use what the guest sent: it is not an archive")]
    Archive(#[from] Malformed),
    #[error("cannot use what the guest sent: it names {0:?}, which is not the name of an entry")]
    Name(String),
    #[error(
        "cannot use what the guest sent: its folders are more than {DEPTH_MAX} deep, or end twice"
    )]
    Depth,
    #[error("cannot copy {0}: it has no name of its own")]
    NoName(PathBuf),
    #[error("cannot copy {0}: its folders are more than {DEPTH_MAX} deep")]
    TooDeep(String),
}

impl Copy {
    /// Does it; the exit code.
    pub fn run(self) -> Result<i32, AnyError> {
        match self {
            Copy::FromGuest { id, path, to } => {
                let socket = connect(&id)?;
                let (reader, writer) = pipe(true, false).step("make a pipe")?;
                let child = sys::fork().step("start the program that unpacks")?;
                let Some(child) = child else {
                    drop((writer, socket));
                    child_ends(unpack(&mut File::from(reader), &to));
                };
                drop(reader);
                let out = Sink::Output {
                    to: writer,
                    patient: false,
                };
                let error = Sink::output(std::io::stderr().as_fd());
                let front = Front::with(COMMAND, None, [out, error]);
                let body = archive_body(fields::PACK, &path, false)?;
                // The end of the session is the end of the pipe.
                let code = Session::start(&id, socket, front, &body)?.run()?;
                combined(code, child)
            }
            Copy::ToGuest { id, path, from } => {
                std::fs::symlink_metadata(&from).step_on("copy", &from)?;
                let socket = connect(&id)?;
                let (reader, writer) = pipe(true, true).step("make a pipe")?;
                let child = sys::fork().step("start the program that packs")?;
                let Some(child) = child else {
                    drop((reader, socket));
                    child_ends(pack(&from, &mut File::from(writer)));
                };
                drop(writer);
                let nowhere = Sink::Nowhere;
                let error = Sink::output(std::io::stderr().as_fd());
                let front = Front::with(COMMAND, Some(reader), [nowhere, error]);
                let body = archive_body(fields::UNPACK, &path, true)?;
                let code = Session::start(&id, socket, front, &body)?.run()?;
                combined(code, child)
            }
        }
    }
}

/// The code of both ends.
fn combined(code: i32, child: rustix::process::Pid) -> Result<i32, AnyError> {
    let (ended, _) = sys::wait(child).step("learn how the copy ended")?;
    let is_well = ended == Ended::Exited(0);
    Ok(if code == 0 && !is_well {
        super::NOT_COPIED
    } else {
        code
    })
}

fn child_ends(result: Result<(), AnyError>) -> ! {
    let Err(error) = result else { sys::exit_now(0) };
    let text = format!("mayfly-jailer: {}\n", message(&*error));
    let _ = std::io::stderr().write_all(text.as_bytes());
    sys::exit_now(super::NOT_COPIED)
}

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);
const FOLDER: OFlags = READ.union(OFlags::DIRECTORY);

/// The folder of a path, opened, and the name of the entry in it.
fn split(path: &Path) -> Result<(OwnedFd, Vec<u8>), AnyError> {
    let name = path
        .file_name()
        .ok_or_else(|| CopyError::NoName(path.to_owned()))?;
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let opened = sys::open_folder(folder).step_on("open the folder", folder)?;
    Ok((opened, name.as_bytes().to_vec()))
}

/// Writes what is at `path` as an archive.
fn pack(path: &Path, out: &mut File) -> Result<(), AnyError> {
    let path = match path.file_name() {
        Some(_) => path.to_owned(),
        // As of `.` and `..`.
        None => std::fs::canonicalize(path).step_on("copy", path)?,
    };
    let (folder, name) = split(&path)?;
    pack_entry(&folder, &name, out, 0)?;
    send(out, &Entry::bare(Kind::End).encode())
}

/// A reader that is gone has said why.
fn send(out: &mut File, bytes: &[u8]) -> Result<(), AnyError> {
    match out.write_all(bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            sys::exit_now(super::NOT_COPIED)
        }
        other => Ok(other.step("send to the guest")?),
    }
}

fn pack_entry(folder: &OwnedFd, name: &[u8], out: &mut File, depth: usize) -> Result<(), AnyError> {
    let shown = String::from_utf8_lossy(name).into_owned();
    let what = format!("copy {shown}");
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).step(what.clone())?;
    let mut entry = Entry {
        kind: Kind::File,
        name: name.len(),
        mode: stat.st_mode & MODE_MASK,
        size: 0,
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let file = rustix::fs::openat(folder, name, READ, Mode::empty()).step(what.clone())?;
            entry.size = stat.st_size.unsigned_abs();
            send(out, &entry.encode())?;
            send(out, name)?;
            let mut file = File::from(file).take(entry.size);
            let mut piece = vec![0; PIECE];
            let mut left = entry.size;
            while left > 0 {
                let count = file.read(&mut piece).step(what.clone())?;
                // A file that shrank meanwhile has zeros at its end.
                let count = match count {
                    0 => {
                        piece.fill(0);
                        PIECE.min(usize::try_from(left).unwrap_or(PIECE))
                    }
                    count => count,
                };
                send(out, &piece[..count])?;
                left -= count as u64;
            }
        }
        FileType::Symlink => {
            let to = rustix::fs::readlinkat(folder, name, Vec::new()).step(what)?;
            (entry.kind, entry.size) = (Kind::Link, to.as_bytes().len() as u64);
            send(out, &entry.encode())?;
            send(out, name)?;
            send(out, to.as_bytes())?;
        }
        FileType::Directory => {
            if depth >= DEPTH_MAX {
                return Err(CopyError::TooDeep(shown).into());
            }
            let inner =
                rustix::fs::openat(folder, name, FOLDER, Mode::empty()).step(what.clone())?;
            entry.kind = Kind::Folder;
            send(out, &entry.encode())?;
            send(out, name)?;
            for found in Dir::read_from(&inner).step(what.clone())? {
                let found = found.step(what.clone())?;
                let name = found.file_name().to_bytes();
                if is_name(name) {
                    pack_entry(&inner, name, out, depth + 1)?;
                }
            }
            send(out, &Entry::bare(Kind::Leave).encode())?;
        }
        _ => {}
    }
    Ok(())
}

/// Makes what an archive has at `path`: in it, if that is a folder, else under that name.
fn unpack(from: &mut File, path: &Path) -> Result<(), AnyError> {
    let (top, mut renamed) = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => (
            sys::open_folder(path).step_on("open the folder", path)?,
            None,
        ),
        _ => split(path).map(|(folder, name)| (folder, Some(name)))?,
    };
    let mut folders: Vec<OwnedFd> = Vec::new();
    let mut is_first = true;
    loop {
        let mut header = [0; HEADER];
        match from.read_exact(&mut header) {
            // The guest has said why there is nothing.
            Err(_) if is_first => sys::exit_now(super::NOT_COPIED),
            other => other.step("read from the guest")?,
        }
        is_first = false;
        let entry = Entry::decode(&header).map_err(CopyError::Archive)?;
        let mut name = vec![0; entry.name];
        from.read_exact(&mut name).step("read from the guest")?;
        match entry.kind {
            Kind::End => return Ok(()),
            Kind::Leave => {
                folders.pop().ok_or(CopyError::Depth)?;
                continue;
            }
            _ if !is_name(&name) => {
                return Err(CopyError::Name(String::from_utf8_lossy(&name).into_owned()).into());
            }
            _ => {}
        }
        let name = renamed.take().unwrap_or(name);
        let folder = folders.last().unwrap_or(&top);
        let what = format!("make {}", String::from_utf8_lossy(&name));
        if entry.kind == Kind::Folder {
            let inner = make_folder(folder, &name, entry.mode).step(what)?;
            if folders.len() >= DEPTH_MAX {
                return Err(CopyError::Depth.into());
            }
            folders.push(inner);
        } else {
            make_file(folder, &name, &entry, from).step(what)?;
        }
    }
}

fn make_folder(folder: &OwnedFd, name: &[u8], mode: u32) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(folder, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let inner = rustix::fs::openat(folder, name, FOLDER, Mode::empty())?;
    // Its owner has to be able to write to it now.
    rustix::fs::fchmod(&inner, Mode::from_raw_mode(mode | 0o700))?;
    Ok(inner)
}

fn make_file(
    folder: &OwnedFd,
    name: &[u8],
    entry: &Entry,
    from: &mut File,
) -> Result<(), std::io::Error> {
    // What is there is replaced, and not written through.
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    if entry.kind == Kind::Link {
        let mut to = vec![0; usize::try_from(entry.size).unwrap_or(0).min(LINK_MAX)];
        from.read_exact(&mut to)?;
        return Ok(rustix::fs::symlinkat(&*to, folder, name)?);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(file);
    let copied = std::io::copy(&mut from.take(entry.size), &mut file)?;
    if copied < entry.size {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn archive(folder: &Path, bytes: &[u8]) -> File {
        let path = folder.join("archive");
        std::fs::write(&path, bytes).unwrap();
        File::open(path).unwrap()
    }

    #[test]
    fn tree_comes_out_as_it_went_in_with_modes_and_links() {
        let place = crate::testing::Folder::new("copy-tree");
        let from = place.path().join("from");
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(from.join("a/b/file"), &content).unwrap();
        std::fs::write(from.join("empty"), "").unwrap();
        std::fs::set_permissions(from.join("empty"), std::fs::Permissions::from_mode(0o4750))
            .unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let packed = place.path().join("packed");
        pack(&from, &mut File::create(&packed).unwrap()).unwrap();
        let to = place.path().join("to");
        for is_again in [false, true] {
            let target = if is_again {
                to.clone()
            } else {
                place.path().join("to")
            };
            if is_again {
                // Into a folder that is there it goes under its own name, over what is there.
                symlink("/nonexistent", to.join("a/b/planted")).unwrap();
            }
            unpack(&mut File::open(&packed).unwrap(), &target).unwrap();
        }
        for top in [to.clone(), to.join("from")] {
            assert_eq!(std::fs::read(top.join("a/b/file")).unwrap(), content);
            assert_eq!(
                std::fs::read_link(top.join("link")).unwrap(),
                Path::new("/etc/passwd")
            );
            let mode = std::fs::metadata(top.join("empty"))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o7777, 0o750);
        }
    }

    #[test]
    fn archive_that_leads_out_of_its_folder_is_refused() {
        let named = |kind, name: &[u8], size| {
            let entry = Entry {
                kind,
                name: name.len(),
                mode: 0o644,
                size,
            };
            [&entry.encode()[..], name].concat()
        };
        let link = [named(Kind::Link, b"x", 4), b"/tmp".to_vec()].concat();
        let cases: [(&str, Vec<u8>); 6] = [
            ("is not the name", named(Kind::File, b"..", 0)),
            ("is not the name", named(Kind::File, b"a/b", 0)),
            ("is not the name", named(Kind::Folder, b".", 0)),
            ("end twice", Entry::bare(Kind::Leave).encode().to_vec()),
            ("not an archive", vec![9; HEADER]),
            // A folder in place of a link that was made before: the link is not followed.
            ("make x", [link, named(Kind::Folder, b"x", 0)].concat()),
        ];
        for (expected, bytes) in cases {
            let place = crate::testing::Folder::new("copy-hostile");
            let target = place.path().join("target");
            std::fs::create_dir(&target).unwrap();
            let error = unpack(&mut archive(place.path(), &bytes), &target).unwrap_err();
            let text = message(&*error);
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn link_that_is_there_is_replaced_and_not_written_through() {
        let place = crate::testing::Folder::new("copy-link");
        let (target, precious) = (place.path().join("target"), place.path().join("precious"));
        std::fs::create_dir(&target).unwrap();
        std::fs::write(&precious, "precious").unwrap();
        symlink(&precious, target.join("x")).unwrap();
        let entry = Entry {
            kind: Kind::File,
            name: 1,
            mode: 0o600,
            size: 3,
        };
        let end = Entry::bare(Kind::End).encode();
        let bytes = [&entry.encode()[..], b"x", b"new", &end].concat();
        unpack(&mut archive(place.path(), &bytes), &target).unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
        assert_eq!(std::fs::read(target.join("x")).unwrap(), b"new");
    }
}
