//! Archives of a guest, into a folder of the host.

use std::collections::BTreeMap;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::PathBuf;

use super::*;
use crate::error::message;
use crate::fuzz::Input;
use crate::testing::Folder;

/// An archive of any entries, into a folder that has other things, with and without `--merge`. Checked: what
/// is beside the one name that was asked for is as it was, also where links lead out of the folder; what
/// was made has no more permissions than it may, and nothing that is not whole is left; a whole archive
/// makes that name.
pub fn unpack(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let place = Folder::new("fuzz-unpack");
    let inside = place.path().join("inside");
    let before = {
        prepare(place.path(), input);
        Seen::of(place.path())
    };
    let merges = input.flag();
    let mut target = Destination::new("/srv/asked", &inside, merges).unwrap();
    target.umask = 0o027;
    target.has_unnamed &= input.below(4) > 0;
    let unpacked = target.unpack(&mut archive(input));
    if let Err(error) = &unpacked {
        let text = message(&**error);
        assert!(
            !text.contains(char::is_control) && text.len() < 1000,
            "{text}"
        );
    }
    let after = Seen::of(place.path());
    let asked = inside.join("asked");
    let others = |seen: &Seen| {
        let mut all = seen.0.clone();
        // The folder's own times and links change.
        all.retain(|path, _| !path.starts_with(&asked) && *path != inside);
        all
    };
    assert_eq!(others(&before), others(&after));
    for (path, one) in after.0.iter().filter(|(path, _)| path.starts_with(&asked)) {
        let is_new = before.0.get(path) != Some(one);
        assert!(!is_new || one.mode & 0o7000 == 0, "{}", path.display());
        let is_dir = one.mode & 0o170_000 == 0o040_000;
        assert!(!is_new || is_dir || one.mode & 0o170_000 == 0o120_000 || one.mode & 0o027 == 0);
    }
    assert!(unpacked.is_err() || asked.symlink_metadata().is_ok());
}

/// What is there before.
fn prepare(place: &Path, input: &mut Input<'_>) {
    let at = |name: &str| place.join(name);
    for name in ["inside", "outside", "outside/folder"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    for name in ["inside/other", "outside/file", "outside/folder/a"] {
        std::fs::write(at(name), name).unwrap();
    }
    match input.below(6) {
        0 => std::fs::write(at("inside/asked"), "old").unwrap(),
        1 => symlink("../outside/file", at("inside/asked")).unwrap(),
        2 => symlink("../outside/folder", at("inside/asked")).unwrap(),
        3 | 4 => {
            std::fs::create_dir(at("inside/asked")).unwrap();
            symlink("../../outside/folder", at("inside/asked/a")).unwrap();
            symlink("../../outside/file", at("inside/asked/b")).unwrap();
            std::fs::write(at("inside/asked/c"), "old").unwrap();
        }
        _ => {}
    }
}

/// A file, folder or link.
#[derive(Clone, Debug, PartialEq, Eq)]
struct One {
    mode: u32,
    content: Vec<u8>,
}

/// All below a folder.
struct Seen(BTreeMap<PathBuf, One>);

impl Seen {
    fn of(folder: &Path) -> Seen {
        let mut seen = Seen(BTreeMap::new());
        let mut todo = vec![folder.to_path_buf()];
        while let Some(path) = todo.pop() {
            let metadata = path.symlink_metadata().unwrap();
            let content = if metadata.is_dir() {
                todo.extend(
                    std::fs::read_dir(&path)
                        .unwrap()
                        .map(|it| it.unwrap().path()),
                );
                Vec::new()
            } else if metadata.is_symlink() {
                std::fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            } else {
                std::fs::read(&path).unwrap()
            };
            let mode = metadata.mode();
            seen.0.insert(path, One { mode, content });
        }
        seen
    }
}

fn archive(input: &mut Input<'_>) -> File {
    const NAMES: [&[u8]; 12] = [
        b"a",
        b"b",
        b"c",
        b"d",
        b"..",
        b".",
        b"",
        b"a/b",
        b"../outside",
        b"asked",
        b"/x",
        b".mayfly-cp-0",
    ];
    let memory = rustix::fs::memfd_create("archive", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.unwrap());
    while !input.is_empty() {
        let kind = input.one_of(&[
            Kind::File,
            Kind::Folder,
            Kind::Link,
            Kind::Leave,
            Kind::End,
            Kind::Folder,
            Kind::File,
            Kind::Leave,
            Kind::Place,
        ]);
        if input.below(24) == 0 {
            let len = input.below(64);
            file.write_all(input.bytes(len)).unwrap();
            continue;
        }
        if matches!(kind, Kind::Leave | Kind::End) {
            file.write_all(&Entry::bare(kind).encode()).unwrap();
            continue;
        }
        let len = input.below(40);
        let name = match input.below(8) {
            0 => input.bytes(len),
            _ => input.one_of(&NAMES),
        };
        let content = match kind {
            Kind::Folder => &[][..],
            Kind::Link => input.one_of(&[&b"../outside"[..], b"/", b"a", b"../../outside/folder"]),
            _ => input.bytes(len),
        };
        let entry = Entry {
            kind,
            name: name.len(),
            mode: input.u32(),
            size: content.len() as u64,
            owner: (0, 0),
        };
        file.write_all(&[&entry.encode()[..], name, content].concat())
            .unwrap();
    }
    file.rewind().unwrap();
    file
}
