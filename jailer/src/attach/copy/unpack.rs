//! An archive that comes from a guest, made into files.
//!
//! It is hostile. One file, folder or link is made, no more, and its name is the caller's: the last part of
//! the path that was asked for, or the name that it is to have. Names in it are entries of a folder and never
//! paths; each folder is opened by its name in the one above, and no link is followed. A folder that is there
//! is written into only where the caller asked for that. A file takes its place when all of it has come. The
//! caller's umask holds, and nothing is set-user-ID. A guest can fill the file system that it is copied to,
//! as any file that is copied can.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use mayfly_agent_protocol::Malformed;
use mayfly_agent_protocol::archive::{DEPTH_MAX, Entry, HEADER, Kind, LINK_MAX, is_name};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::CopyError;
use crate::attach::NOT_COPIED;
use crate::error::{Advice as _, AnyError, Step as _, errno};
use crate::process::pack::{FOLDER, PackError, split};
use crate::sys;

/// How many names are tried for a file that is not whole yet.
const TRIES: u32 = 100;

/// Where the one entry of an archive goes.
#[derive(Debug)]
pub struct Destination {
    folder: OwnedFd,
    name: Vec<u8>,
    /// Whether folders that are there are written into.
    merges: bool,
    /// Permissions that nothing gets.
    umask: u32,
}

impl Destination {
    /// In `to`, if that is a folder, under the last part of the guest's `path`; else `to` itself.
    pub fn new(path: &str, to: &Path, merges: bool) -> Result<Destination, AnyError> {
        let of_guest = path.trim_end_matches('/').rsplit('/').next();
        let name = of_guest.unwrap_or_default().as_bytes();
        if !is_name(name) {
            return Err(PackError::NoName(path.into()).into());
        }
        let (folder, name) = match std::fs::metadata(to) {
            Ok(found) if found.is_dir() => {
                let folder = sys::open_folder(to).step_on("open the folder", to)?;
                (folder, name.to_vec())
            }
            _ => split(to)?,
        };
        let umask = rustix::process::umask(Mode::empty());
        rustix::process::umask(umask);
        Ok(Destination {
            folder,
            name,
            merges,
            umask: umask.as_raw_mode(),
        })
    }

    /// Makes what the archive has.
    pub fn unpack(&self, from: &mut File) -> Result<(), AnyError> {
        let mut folders: Vec<OwnedFd> = Vec::new();
        let mut has_begun = false;
        loop {
            let mut header = [0; HEADER];
            match from.read_exact(&mut header) {
                // The guest has said why there is nothing.
                Err(_) if !has_begun => sys::exit_now(NOT_COPIED),
                other => other.step("read from the guest")?,
            }
            let entry = Entry::decode(&header).map_err(CopyError::Archive)?;
            let mut name = vec![0; entry.name];
            from.read_exact(&mut name).step("read from the guest")?;
            match entry.kind {
                Kind::End if !folders.is_empty() => return Err(CopyError::Depth.into()),
                Kind::End if !has_begun => return Err(CopyError::Nothing.into()),
                Kind::End => return Ok(()),
                // Only for a guest.
                Kind::Place => {
                    let kind = Malformed::Kind(entry.kind as u8);
                    return Err(CopyError::Archive(kind).into());
                }
                Kind::Leave => {
                    folders.pop().ok_or(CopyError::Depth)?;
                    continue;
                }
                _ if !is_name(&name) => {
                    let name = String::from_utf8_lossy(&name).into_owned();
                    return Err(CopyError::Name(name).into());
                }
                _ if folders.is_empty() && has_begun => return Err(CopyError::Several.into()),
                _ if folders.is_empty() => name.clone_from(&self.name),
                _ => {}
            }
            has_begun = true;
            let folder = folders.last().unwrap_or(&self.folder);
            let what = format!("make {}", String::from_utf8_lossy(&name));
            match entry.kind {
                Kind::Folder if folders.len() >= DEPTH_MAX => return Err(CopyError::Depth.into()),
                Kind::Folder => {
                    let inner = self.make_folder(folder, &name, entry.mode);
                    let remedy = |answer| match answer {
                        Errno::EXIST => Some(
                            "remove it, give another name, or write into folders that are there \
                             with --merge",
                        ),
                        _ => None,
                    };
                    folders.push(inner.step(what).hints(remedy)?);
                }
                _ => self.make_file(folder, &name, &entry, from).step(what)?,
            }
        }
    }

    fn make_folder(&self, folder: &OwnedFd, name: &[u8], mode: u32) -> Result<OwnedFd, Errno> {
        let made = rustix::fs::mkdirat(folder, name, Mode::RWXU);
        match made {
            Err(Errno::EXIST) if self.merges => {}
            other => other?,
        }
        let inner = rustix::fs::openat(folder, name, FOLDER, Mode::empty())?;
        if made.is_ok() {
            // Its owner has to be able to write to it now.
            rustix::fs::fchmod(&inner, self.mode(mode | 0o700))?;
        }
        Ok(inner)
    }

    fn mode(&self, mode: u32) -> Mode {
        Mode::from_raw_mode(mode & 0o777 & !self.umask)
    }

    /// Makes a file or a link under another name, and gives it its own when it is whole.
    fn make_file(
        &self,
        folder: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        from: &mut File,
    ) -> Result<(), Errno> {
        let mut to = vec![0; LINK_MAX.min(usize::try_from(entry.size).unwrap_or(LINK_MAX))];
        if entry.kind == Kind::Link {
            from.read_exact(&mut to).map_err(errno)?;
        }
        let make = |temporary: &[u8]| match entry.kind {
            Kind::Link => rustix::fs::symlinkat(&*to, folder, temporary).map(|()| None),
            _ => rustix::fs::openat(folder, temporary, NEW, Mode::RUSR | Mode::WUSR).map(Some),
        };
        let (temporary, file) = with_free_name(make)?;
        let whole = match file {
            Some(file) => self.fill(file, entry, from),
            None => Ok(()),
        };
        // What is there is replaced, and not written through.
        let placed = whole.and_then(|()| rustix::fs::renameat(folder, &*temporary, folder, name));
        if placed.is_err() {
            let _ = rustix::fs::unlinkat(folder, &*temporary, AtFlags::empty());
        }
        placed
    }

    fn fill(&self, file: OwnedFd, entry: &Entry, from: &mut File) -> Result<(), Errno> {
        let mut file = File::from(file);
        let copied = std::io::copy(&mut from.take(entry.size), &mut file).map_err(errno)?;
        if copied < entry.size {
            return Err(Errno::IO);
        }
        rustix::fs::fchmod(&file, self.mode(entry.mode))
    }
}

const NEW: OFlags = OFlags::WRONLY
    .union(OFlags::CREATE)
    .union(OFlags::EXCL)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Makes something under a name that is not there yet; the name, and what `make` gave.
fn with_free_name<T>(
    mut make: impl FnMut(&[u8]) -> Result<T, Errno>,
) -> Result<(Vec<u8>, T), Errno> {
    let process = std::process::id();
    for number in 0..TRIES {
        let name = format!(".mayfly-cp-{process}-{number}").into_bytes();
        match make(&name) {
            Err(Errno::EXIST) => {}
            made => return Ok((name, made?)),
        }
    }
    Err(Errno::EXIST)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::OsString;
    use std::io::{Seek as _, Write as _};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::error::message;
    use crate::testing::Folder;

    fn archive(bytes: &[u8]) -> File {
        let memory = rustix::fs::memfd_create("archive", rustix::fs::MemfdFlags::CLOEXEC);
        let mut file = File::from(memory.unwrap());
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn named(kind: Kind, name: &[u8], mode: u32, bytes: &[u8]) -> Vec<u8> {
        let entry = Entry {
            kind,
            name: name.len(),
            mode,
            size: bytes.len() as u64,
            owner: (0, 0),
        };
        [&entry.encode()[..], name, bytes].concat()
    }

    fn bare(kind: Kind) -> Vec<u8> {
        Entry::bare(kind).encode().to_vec()
    }

    fn unpack(parts: &[Vec<u8>], to: &Path, merges: bool) -> Result<(), String> {
        let mut target = Destination::new("/srv/asked", to, merges).unwrap();
        target.umask = 0o027;
        let unpacked = target.unpack(&mut archive(&parts.concat()));
        unpacked.map_err(|error| message(&*error))
    }

    fn listing(folder: &Path) -> BTreeSet<OsString> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|it| it.unwrap().file_name()).collect()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn guest_that_sends_more_than_was_asked_for_makes_nothing_beside_it() {
        for kind in [Kind::File, Kind::Folder] {
            let place = Folder::new("unpack-more");
            std::fs::create_dir(place.path().join(".ssh")).unwrap();
            let before = listing(place.path());
            let mut parts = vec![named(kind, b"asked", 0o755, b"")];
            if kind == Kind::Folder {
                parts.push(bare(Kind::Leave));
            }
            parts.push(named(Kind::Folder, b".ssh", 0o755, b""));
            parts.push(named(Kind::File, b"authorized_keys", 0o644, b"key"));
            let text = unpack(&parts, place.path(), false).unwrap_err();
            assert!(text.contains("more than the one"), "{text}");
            let mut after = listing(place.path());
            assert!(
                after.remove(&OsString::from("asked")) && after == before,
                "{after:?}"
            );
            assert!(listing(&place.path().join(".ssh")).is_empty());
        }
    }

    #[test]
    fn name_of_the_first_entry_is_the_callers() {
        let place = Folder::new("unpack-name");
        let parts = [named(Kind::File, b".bashrc", 0o644, b"x"), bare(Kind::End)];
        unpack(&parts, place.path(), false).unwrap();
        unpack(&parts, &place.path().join("other"), false).unwrap();
        assert_eq!(
            listing(place.path()),
            ["asked", "other"].map(Into::into).into()
        );
        for path in ["/", "//", "/a/..", "/a/.", "/a/../"] {
            let error = Destination::new(path, place.path(), false).unwrap_err();
            assert!(message(&*error).contains("no name"), "{path}");
        }
    }

    #[test]
    fn folder_that_is_there_is_written_into_only_where_that_was_asked_for() {
        let place = Folder::new("unpack-merge");
        let inner = place.path().join("asked/.git");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o700)).unwrap();
        let parts = [
            named(Kind::Folder, b"asked", 0o777, b""),
            named(Kind::Folder, b".git", 0o777, b""),
            named(Kind::File, b"hook", 0o777, b"x"),
            bare(Kind::Leave),
            named(Kind::Folder, b"new", 0o777, b""),
            bare(Kind::Leave),
            bare(Kind::Leave),
            bare(Kind::End),
        ];
        let text = unpack(&parts, place.path(), false).unwrap_err();
        assert!(text.contains("--merge"), "{text}");
        assert!(listing(&inner).is_empty());
        unpack(&parts, place.path(), true).unwrap();
        assert_eq!(listing(&inner), ["hook".into()].into());
        // A folder that was there has the permissions that it had.
        assert_eq!(mode(&inner), 0o700);
        assert_eq!(mode(&place.path().join("asked/new")), 0o750);
        assert_eq!(mode(&inner.join("hook")), 0o750);
    }

    #[test]
    fn file_that_does_not_come_whole_leaves_what_was_there() {
        let place = Folder::new("unpack-cut");
        let path = place.path().join("asked");
        std::fs::write(&path, "precious").unwrap();
        let whole = named(Kind::File, b"asked", 0o644, &[7; 1000]);
        for parts in [
            vec![whole[..500].to_vec()],
            vec![named(Kind::Link, b"x", 0, b"/tmp")[..26].to_vec()],
        ] {
            unpack(&parts, place.path(), false).unwrap_err();
            assert_eq!(std::fs::read(&path).unwrap(), b"precious");
            assert_eq!(listing(place.path()), ["asked".into()].into());
        }
    }

    #[test]
    fn archive_that_leads_out_of_its_folder_is_refused() {
        let folder = named(Kind::Folder, b"asked", 0o755, b"");
        let link = named(Kind::Link, b"x", 0, b"/tmp");
        let place = Entry {
            size: 4,
            ..Entry::bare(Kind::Place)
        };
        let cases: [(&str, Vec<u8>); 10] = [
            ("not an archive", [&place.encode()[..], b"/tmp"].concat()),
            ("is not the name", named(Kind::File, b"..", 0, b"")),
            ("is not the name", named(Kind::File, b"a/b", 0, b"")),
            ("is not the name", named(Kind::Folder, b".", 0, b"")),
            ("end twice", bare(Kind::Leave)),
            ("not an archive", vec![9; HEADER]),
            ("sent nothing", bare(Kind::End)),
            ("end twice", [folder.clone(), bare(Kind::End)].concat()),
            ("end twice", folder.repeat(DEPTH_MAX + 1)),
            // A folder in place of a link that was made before: the link is not followed.
            (
                "make x",
                [folder, link, named(Kind::Folder, b"x", 0, b"")].concat(),
            ),
        ];
        for (expected, bytes) in cases {
            for merges in [false, true] {
                let place = Folder::new("unpack-hostile");
                let text = unpack(std::slice::from_ref(&bytes), place.path(), merges).unwrap_err();
                assert!(text.contains(expected), "{expected}: {text}");
            }
        }
    }

    #[test]
    fn link_that_is_there_is_replaced_and_not_written_through() {
        let place = Folder::new("unpack-link");
        let (target, precious) = (place.path().join("target"), place.path().join("precious"));
        std::fs::create_dir(&target).unwrap();
        std::fs::write(&precious, "precious").unwrap();
        symlink(&precious, target.join("asked")).unwrap();
        let parts = [named(Kind::File, b"x", 0o600, b"new"), bare(Kind::End)];
        unpack(&parts, &target, false).unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
        assert_eq!(std::fs::read(target.join("asked")).unwrap(), b"new");
    }
}
