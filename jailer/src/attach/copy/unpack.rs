//! An archive that comes from a guest, made into files.
//!
//! It is hostile. One file, folder or link is made, no more, and its name is the caller's: the last part of
//! the path that was asked for, or the name that it is to have. Names in it are entries of a folder and never
//! paths; each folder is opened by its name in the one above, and no link is followed. A folder that is there
//! is written into only where the caller asked for that. A file takes its place when all of it has come: it has
//! no name before, so that nothing of it is left when this program is killed. On file systems that have no such
//! files it has a name of ours, and the next copy removes what was left there. The caller's umask holds, and
//! nothing is set-user-ID. A guest can fill the file system that it is copied to,
//! as any file that is copied can.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use mayfly_agent_protocol::Malformed;
use mayfly_agent_protocol::archive::{DEPTH_MAX, Entry, HEADER, Kind, LINK_MAX, is_name};
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::CopyError;
use crate::error::{Advice as _, AnyError, Step as _, errno};
use crate::process::pack::{FOLDER, PackError, split};
use crate::root::take_place;
use crate::sys;

/// How many names are tried for a file that is not whole yet.
const TRIES: u32 = 100;

/// The umask of this process. The system call only tells it where it sets another one, for all threads; so it is
/// made only where there is no /proc.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let shown = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    let shown = shown.and_then(|digits| u32::from_str_radix(digits.trim(), 8).ok());
    shown.unwrap_or_else(|| {
        let umask = rustix::process::umask(Mode::from_raw_mode(0o077));
        rustix::process::umask(umask);
        umask.as_raw_mode()
    })
}

/// Where the one entry of an archive goes.
#[derive(Debug)]
pub struct Destination {
    folder: OwnedFd,
    name: Vec<u8>,
    /// Whether folders that are there are written into.
    merges: bool,
    /// Permissions that nothing gets.
    umask: u32,
    /// Whether files without a name are tried.
    has_unnamed: bool,
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
        Ok(Destination {
            folder,
            name,
            merges,
            umask: umask(),
            // What gives such a file its name.
            has_unnamed: Path::new(OWN).exists(),
        })
    }

    /// Makes what the archive has.
    pub fn unpack(&self, from: &mut File) -> Result<(), AnyError> {
        let mut folders: Vec<OwnedFd> = Vec::new();
        let mut has_begun = false;
        loop {
            let mut header = [0; HEADER];
            match from.read_exact(&mut header) {
                Err(_) if !has_begun => return Err(CopyError::Nothing.into()),
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

    /// Makes a file or a link, which has its name when it is whole. What is there is replaced, and not written
    /// through.
    fn make_file(
        &self,
        folder: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        from: &mut File,
    ) -> Result<(), Errno> {
        if entry.kind == Kind::Link {
            let mut to = vec![0; LINK_MAX.min(usize::try_from(entry.size).unwrap_or(LINK_MAX))];
            from.read_exact(&mut to).map_err(errno)?;
            let make = |aside: &[u8]| rustix::fs::symlinkat(&*to, folder, aside);
            let (aside, ()) = with_free_name(folder, make)?;
            return take_place(folder, &*aside, name);
        }
        let mode = Mode::RUSR | Mode::WUSR;
        let unnamed = match self.has_unnamed {
            true => rustix::fs::openat(folder, ".", UNNAMED, mode).ok(),
            false => None,
        };
        if let Some(file) = unnamed {
            let file = File::from(file);
            // For the time that it has a name of ours.
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            self.fill(&file, entry, from)?;
            return name_it(&file, folder, name);
        }
        let make = |aside: &[u8]| {
            let file = File::from(rustix::fs::openat(folder, aside, NEW, mode)?);
            // Held as long as this process is there.
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            // The next copy has taken it for one that was left.
            match rustix::fs::fstat(&file)?.st_nlink {
                0 => Err(Errno::EXIST),
                _ => Ok(file),
            }
        };
        let (aside, file) = with_free_name(folder, make)?;
        let placed = self.fill(&file, entry, from);
        let placed = placed.and_then(|()| take_place(folder, &*aside, name));
        if placed.is_err() {
            let _ = rustix::fs::unlinkat(folder, &*aside, AtFlags::empty());
        }
        placed
    }

    fn fill(&self, mut file: &File, entry: &Entry, from: &mut File) -> Result<(), Errno> {
        let copied = std::io::copy(&mut from.take(entry.size), &mut file).map_err(errno)?;
        if copied < entry.size {
            return Err(Errno::IO);
        }
        rustix::fs::fchmod(file, self.mode(entry.mode))
    }
}

/// Where this process's descriptors have names.
const OWN: &str = "/proc/self/fd";
const UNNAMED: OFlags = OFlags::WRONLY.union(OFlags::TMPFILE).union(OFlags::CLOEXEC);
const NEW: OFlags = OFlags::WRONLY
    .union(OFlags::CREATE)
    .union(OFlags::EXCL)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Gives a file without a name one.
fn name_it(file: &File, folder: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    let own = format!("{OWN}/{}", file.as_raw_fd());
    let link = |name: &[u8]| rustix::fs::linkat(CWD, &*own, folder, name, AtFlags::SYMLINK_FOLLOW);
    match link(name) {
        Err(Errno::EXIST) => {}
        other => return other,
    }
    // A link does not replace what is there.
    let (aside, ()) = with_free_name(folder, link)?;
    take_place(folder, &*aside, name)
}

/// Makes something under a name that no copy uses; the name, and what `make` gave. What one that was killed has left
/// there is removed.
fn with_free_name<T>(
    folder: &OwnedFd,
    mut make: impl FnMut(&[u8]) -> Result<T, Errno>,
) -> Result<(Vec<u8>, T), Errno> {
    for number in 0..TRIES {
        let name = format!(".mayfly-cp-{number}").into_bytes();
        // Twice: once more where it was left.
        for _ in 0..2 {
            match make(&name) {
                Err(Errno::EXIST) if remove_left(folder, &name) => {}
                Err(Errno::EXIST | Errno::WOULDBLOCK) => break,
                made => return Ok((name, made?)),
            }
        }
    }
    Err(Errno::EXIST)
}

/// Removes a file that no process has locked; whether there was one.
fn remove_left(folder: &OwnedFd, name: &[u8]) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let removed = || {
        let file = rustix::fs::openat(folder, name, flags | OFlags::NOCTTY, Mode::empty())?;
        if !FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_file() {
            return Err(Errno::EXIST);
        }
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // It may have taken its place meanwhile, and another have been made.
        let (own, there) = (
            rustix::fs::fstat(&file)?,
            rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?,
        );
        match (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) {
            true => rustix::fs::unlinkat(folder, name, AtFlags::empty()),
            false => Err(Errno::EXIST),
        }
    };
    removed().is_ok()
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
    fn umask_is_the_one_that_programs_inherit() {
        let shell = std::process::Command::new("sh")
            .args(["-c", "umask"])
            .output()
            .unwrap();
        let shown = String::from_utf8(shell.stdout).unwrap();
        assert_eq!(u32::from_str_radix(shown.trim(), 8), Ok(umask()));
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

    #[test]
    fn file_that_has_not_come_whole_has_no_name() {
        let place = Folder::new("unpack-unnamed");
        let path = place.path().to_owned();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let unpacking = std::thread::spawn(move || {
            let target = Destination::new("/srv/asked", &path, false).unwrap();
            assert!(target.has_unnamed);
            let mut reader = File::from(OwnedFd::from(reader));
            target.unpack(&mut reader).map_err(|error| message(&*error))
        });
        let whole = named(Kind::File, b"asked", 0o644, &vec![7; 1 << 20]);
        // More than a pipe holds: most of it was taken.
        writer.write_all(&whole[..whole.len() / 2]).unwrap();
        assert_eq!(listing(place.path()), BTreeSet::new());
        writer.write_all(&whole[whole.len() / 2..]).unwrap();
        writer.write_all(&bare(Kind::End)).unwrap();
        unpacking.join().unwrap().unwrap();
        assert_eq!(listing(place.path()), ["asked".into()].into());
        assert_eq!(
            std::fs::metadata(place.path().join("asked")).unwrap().len(),
            1 << 20
        );
    }

    #[test]
    fn what_a_copy_that_was_killed_has_left_is_removed_by_the_next_one() {
        let place = Folder::new("unpack-left");
        let at = |name: &str| place.path().join(name);
        let parts = [named(Kind::File, b"x", 0o600, b"new"), bare(Kind::End)].concat();
        let copy = |has_unnamed| {
            std::fs::write(at("asked"), "old").unwrap();
            let mut target = Destination::new("/srv/asked", place.path(), false).unwrap();
            target.has_unnamed = has_unnamed;
            target.unpack(&mut archive(&parts)).unwrap();
            assert_eq!(std::fs::read(at("asked")).unwrap(), b"new");
        };
        for has_unnamed in [true, false] {
            std::fs::write(at(".mayfly-cp-0"), "half").unwrap();
            copy(has_unnamed);
            assert_eq!(listing(place.path()), ["asked".into()].into());
        }
        // One that another copy writes, and what is none of ours, stay.
        let other = File::create(at(".mayfly-cp-0")).unwrap();
        rustix::fs::flock(&other, FlockOperation::LockExclusive).unwrap();
        symlink("/nonexistent", at(".mayfly-cp-1")).unwrap();
        std::fs::create_dir(at(".mayfly-cp-2")).unwrap();
        let before = listing(place.path());
        for has_unnamed in [true, false] {
            copy(has_unnamed);
            assert_eq!(listing(place.path()), before);
        }
        // Nor is anything left where a folder has the name.
        std::fs::remove_file(at("asked")).unwrap();
        std::fs::create_dir(at("asked")).unwrap();
        let before = listing(place.path());
        for has_unnamed in [true, false] {
            let mut target = Destination::new("/srv/x", &at("asked"), false).unwrap();
            (target.has_unnamed, target.name) = (has_unnamed, b"asked".to_vec());
            target.folder = sys::open_folder(place.path()).unwrap();
            target.unpack(&mut archive(&parts)).unwrap_err();
            assert_eq!(listing(place.path()), before);
        }
    }
}
