//! The stream of `cp` on the guest's side, in a copy of the agent of its own: from a file or folder to
//! standard output, and from standard input to one.

use core::ffi::CStr;

use mayfly_agent_protocol::archive::{
    DEPTH_MAX, Entry, HEADER, Kind, LINK_MAX, MODE_MASK, NAME_MAX, is_name,
};

use crate::child::complain;
use crate::root::{make_folders, write_all};
use crate::sys::{self, Errno, Fd, Result, Stat};
use crate::text::Text;

/// The size of a pipe: as much is read and written at once.
const PIECE: usize = 64 * 1024;
const FAILED: u8 = 1;

/// The standard streams. They are not opened anew: to open a pipe that has no reader waits for one.
fn standard() -> Result<(Fd, Fd)> {
    Ok((sys::standard(0)?, sys::standard(1)?))
}

/// A name, with a zero behind it.
struct Name([u8; NAME_MAX + 1]);

impl Name {
    fn of(bytes: &[u8]) -> Option<Name> {
        let mut name = Name([0; NAME_MAX + 1]);
        name.0.get_mut(..bytes.len())?.copy_from_slice(bytes);
        is_name(bytes).then_some(name)
    }

    fn text(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

fn fail(what: &[u8], name: &[u8], error: Errno) -> u8 {
    let mut text = Text::new();
    text.add(what).add(b" ").add(&name[..name.len().min(250)]);
    complain(Text::of(text.bytes(), error).bytes(), FAILED)
}

/// A path, with a zero behind it.
struct Path([u8; LINK_MAX + 1]);

impl Path {
    fn of(bytes: &[u8]) -> Option<Path> {
        let mut path = Path([0; LINK_MAX + 1]);
        path.0.get_mut(..bytes.len())?.copy_from_slice(bytes);
        (bytes.len() <= LINK_MAX).then_some(path)
    }

    fn text(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// The folder of a path, and the entry in it.
fn split(path: &CStr) -> Option<(Path, &[u8])> {
    let mut bytes = path.to_bytes();
    while let Some(shorter) = bytes.strip_suffix(b"/") {
        bytes = shorter;
    }
    let at = bytes.iter().rposition(|byte| *byte == b'/');
    let (folder, name) = match at {
        Some(at) => bytes.split_at(at + 1),
        None => (&b"."[..], bytes),
    };
    Some((Path::of(folder)?, name)).filter(|_| is_name(name))
}

/// Writes what is at `path` to standard output.
pub fn pack(path: &CStr) -> u8 {
    let packed = standard().map_err(|error| fail(b"open", b"the standard streams", error));
    let packed = packed.and_then(|(_, out)| {
        let (folder, name) =
            split(path).ok_or_else(|| fail(b"read", path.to_bytes(), Errno::INVAL))?;
        let of_path = |error| fail(b"read", path.to_bytes(), error);
        let folder = sys::open_folder(folder.text()).map_err(of_path)?;
        let name = Name::of(name).ok_or_else(|| of_path(Errno::INVAL))?;
        pack_entry(&folder, &name, &out, 0)?;
        write_all(&out, &Entry::bare(Kind::End).encode()).map_err(of_path)
    });
    packed.err().unwrap_or(0)
}

fn pack_entry(folder: &Fd, name: &Name, out: &Fd, depth: usize) -> core::result::Result<(), u8> {
    let bytes = name.text().to_bytes();
    let failed = |error| fail(b"read", bytes, error);
    let stat = Stat::of(folder, name.text()).map_err(failed)?;
    let mut entry = Entry {
        kind: Kind::File,
        name: bytes.len(),
        mode: stat.mode & MODE_MASK,
        size: 0,
        owner: (0, 0),
    };
    let send = |entry: Entry| {
        write_all(out, &entry.encode())
            .and_then(|()| write_all(out, bytes))
            .map_err(failed)
    };
    match stat.mode & Stat::KIND {
        Stat::FILE => {
            let file = sys::open_in(folder, name.text(), sys::READ, 0).map_err(failed)?;
            entry.size = stat.size;
            send(entry)?;
            pack_file(&file, stat.size, out).map_err(failed)
        }
        Stat::LINK => {
            let mut to = [0; LINK_MAX];
            let count = sys::read_link_in(folder, name.text(), &mut to).map_err(failed)?;
            (entry.kind, entry.size) = (Kind::Link, count as u64);
            send(entry)?;
            write_all(out, &to[..count]).map_err(failed)
        }
        Stat::FOLDER => {
            if depth >= DEPTH_MAX {
                return Err(fail(b"read", bytes, Errno(36)));
            }
            entry.kind = Kind::Folder;
            let inner = sys::open_folder_in(folder, name.text()).map_err(failed)?;
            send(entry)?;
            pack_folder(&inner, out, depth + 1)?;
            write_all(out, &Entry::bare(Kind::Leave).encode()).map_err(failed)
        }
        _ => Ok(()),
    }
}

/// As many bytes as were announced; a file that shrank meanwhile has zeros at its end.
fn pack_file(file: &Fd, size: u64, out: &Fd) -> Result<()> {
    let mut piece = [0; PIECE];
    let mut left = size;
    while left > 0 {
        let most = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
        let count = match sys::read(file, &mut piece[..most])? {
            0 => {
                piece[..most].fill(0);
                most
            }
            count => count,
        };
        write_all(out, &piece[..count])?;
        left -= count as u64;
    }
    Ok(())
}

fn pack_folder(folder: &Fd, out: &Fd, depth: usize) -> core::result::Result<(), u8> {
    /// Where an entry of the kernel's has its length, and its name (getdents64(2)).
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    let mut buffer = [0; 2048];
    loop {
        let count = sys::entries(folder, &mut buffer);
        let count = count.map_err(|error| fail(b"read", b"a folder", error))?;
        if count == 0 {
            return Ok(());
        }
        let mut at = 0;
        while let Some(length) = buffer[at..count].get(LENGTH..LENGTH + 2) {
            let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
            let name = buffer[at..count].get(NAME..length).unwrap_or_default();
            let end = name
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(name.len());
            if let Some(name) = Name::of(&name[..end]) {
                pack_entry(folder, &name, out, depth)?;
            }
            if length == 0 {
                break;
            }
            at += length;
        }
    }
}

/// Reads all of `into`.
fn read_all(from: &Fd, into: &mut [u8]) -> Result<()> {
    let mut at = 0;
    while at < into.len() {
        match sys::read(from, &mut into[at..]) {
            Ok(0) => return Err(Errno(5)),
            Ok(count) => at += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes what is in standard input at `path`: in it, if that is a folder, else under that name.
pub fn unpack(path: &CStr) -> u8 {
    let unpacked = standard().map_err(|error| fail(b"open", b"the standard streams", error));
    let unpacked = unpacked.and_then(|(input, _)| {
        let failed = |error| fail(b"write", path.to_bytes(), error);
        let is_folder = Stat::of_path(path).is_ok_and(|it| it.mode & Stat::KIND == Stat::FOLDER);
        if is_folder {
            let folder = sys::open_folder(path).map_err(failed)?;
            return unpack_into(&folder, &input, None);
        }
        let (folder, name) = split(path).ok_or_else(|| failed(Errno::INVAL))?;
        let folder = sys::open_folder(folder.text()).map_err(failed)?;
        let name = Name::of(name).ok_or_else(|| failed(Errno::INVAL))?;
        unpack_into(&folder, &input, Some(name))
    });
    unpacked.err().unwrap_or(0)
}

/// Makes the entries in a folder; the first one under `renamed`, if there is one.
fn unpack_into(given: &Fd, input: &Fd, mut renamed: Option<Name>) -> core::result::Result<(), u8> {
    let mut top = None;
    let mut folders: [Option<Fd>; DEPTH_MAX] = [const { None }; DEPTH_MAX];
    let mut depth: usize = 0;
    let broken = |error| fail(b"read", b"the archive", error);
    loop {
        let mut header = [0; HEADER];
        read_all(input, &mut header).map_err(broken)?;
        let entry = Entry::decode(&header).map_err(|_| broken(Errno::INVAL))?;
        let mut bytes = [0; NAME_MAX];
        let bytes = &mut bytes[..entry.name];
        read_all(input, bytes).map_err(broken)?;
        match entry.kind {
            Kind::End => return Ok(()),
            Kind::Place => {
                folders.iter_mut().for_each(|folder| *folder = None);
                depth = 0;
                top = Some(open_place(&entry, input).map_err(broken)?);
                continue;
            }
            Kind::Leave => {
                depth = depth.checked_sub(1).ok_or_else(|| broken(Errno::INVAL))?;
                folders[depth] = None;
                continue;
            }
            _ => {}
        }
        let name = Name::of(bytes).ok_or_else(|| broken(Errno::INVAL))?;
        let name = renamed.take().unwrap_or(name);
        let folder = depth.checked_sub(1).and_then(|last| folders[last].as_ref());
        let folder = folder.or(top.as_ref()).unwrap_or(given);
        let failed = |error| fail(b"write", name.text().to_bytes(), error);
        if entry.kind == Kind::Folder {
            let inner = sys::make_folder_in(folder, name.text(), 0o700)
                .and_then(|()| sys::open_folder_in(folder, name.text()))
                .and_then(|inner| {
                    set_owner(folder, &name, &entry)?;
                    sys::set_mode(&inner, entry.mode).map(|()| inner)
                });
            let inner = inner.map_err(failed)?;
            let place = folders.get_mut(depth).ok_or_else(|| failed(Errno(36)))?;
            *place = Some(inner);
            depth += 1;
        } else {
            unpack_entry(folder, &name, &entry, input).map_err(failed)?;
        }
    }
}

/// The folder of a [`Kind::Place`], whose path is what comes next.
fn open_place(entry: &Entry, input: &Fd) -> Result<Fd> {
    let mut path = [0; LINK_MAX + 1];
    let length = usize::try_from(entry.size).unwrap_or(0).min(LINK_MAX);
    read_all(input, &mut path[..length])?;
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| Errno::INVAL)?;
    make_folders(path);
    sys::open_folder(path)
}

/// Gives an entry its user and group, where it is not root's.
fn set_owner(folder: &Fd, name: &Name, entry: &Entry) -> Result<()> {
    match entry.owner {
        (0, 0) => Ok(()),
        (user, group) => sys::set_owner(folder, name.text(), user, group),
    }
}

fn unpack_entry(folder: &Fd, name: &Name, entry: &Entry, input: &Fd) -> Result<()> {
    // What is there is replaced, and not written through.
    match sys::remove_in(folder, name.text()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    if entry.kind == Kind::Link {
        let mut to = [0; LINK_MAX + 1];
        let length = usize::try_from(entry.size).unwrap_or(0).min(LINK_MAX);
        read_all(input, &mut to[..length])?;
        let to = CStr::from_bytes_until_nul(&to).map_err(|_| Errno::INVAL)?;
        sys::make_link_in(folder, name.text(), to)?;
        return set_owner(folder, name, entry);
    }
    let file = sys::open_in(folder, name.text(), sys::NEW, 0o600)?;
    let mut piece = [0; PIECE];
    let mut left = entry.size;
    while left > 0 {
        let most = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
        let count = match sys::read(input, &mut piece[..most])? {
            0 => return Err(Errno(5)),
            count => count,
        };
        write_all(&file, &piece[..count])?;
        left -= count as u64;
    }
    set_owner(folder, name, entry)?;
    sys::set_mode(&file, entry.mode)
}
