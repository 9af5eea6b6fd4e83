use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::tempdir::TempDir;

use super::header::{CRC_AT, FIXED, HEADER_LEN_AT, LEN_AT, VERSION_AT, checksum, seal};
use super::place::old_name;
use super::*;
use crate::needs;

thread_local! {
    /// How many system calls of a create are left before the process is killed.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    /// What the file system that is written to is said to have.
    static HAS: Cell<FileSystem> = const { Cell::new(FileSystem::Exchange) };
}

/// What a file system has for putting a file in the place of another one.
#[derive(Clone, Copy, Debug, PartialEq)]
enum FileSystem {
    /// All, as ext4 and XFS.
    Exchange,
    /// As NFS.
    LinksOnly,
    /// As FAT.
    RenamesOnly,
}

const FILE_SYSTEMS: [FileSystem; 3] = [
    FileSystem::Exchange,
    FileSystem::LinksOnly,
    FileSystem::RenamesOnly,
];

pub(super) fn has_exchange() -> bool {
    HAS.get() == FileSystem::Exchange
}

pub(super) fn has_links() -> bool {
    HAS.get() != FileSystem::RenamesOnly
}

/// Kills this process, as SIGKILL from outside would, where a test said so.
pub(super) fn step() {
    LEFT.with(|left| match left.get() {
        Some(0) => {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
        }
        Some(more) => left.set(Some(more - 1)),
        None => {}
    });
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct State {
    text: String,
    numbers: Vec<u64>,
}

const LEN: u64 = 1 << 20;
const ID_AT: u64 = 0x9000;

fn header(id: u8) -> Header {
    Header {
        version: VERSION,
        id: SnapshotId([id; 16]),
        kind: Kind::Full,
        parent: None,
        memory: image(Some(u64::from(id) << 60)),
        taken: 1_790_000_000_123_456_789,
    }
}

fn image(check: Option<u64>) -> MemoryImage {
    MemoryImage {
        len: LEN,
        check,
        id_at: ID_AT,
    }
}

fn state(id: u8) -> State {
    State {
        text: format!("machine {id}"),
        numbers: vec![u64::MAX, 0, u64::from(id)],
    }
}

fn whole(id: u8) -> Vec<u8> {
    encode(&header(id), &state(id)).unwrap()
}

fn folder() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().to_path_buf();
    (folder, path)
}

fn read_bytes(bytes: &[u8]) -> Result<(Header, RawState), Refusal> {
    let (_folder, path) = folder();
    let path = path.join("state");
    fs::write(&path, bytes).unwrap();
    read(&open_regular(&path)?)
}

fn refused(bytes: &[u8]) -> String {
    read_bytes(bytes).unwrap_err().to_string()
}

#[test]
fn state_file_when_written_is_read_back() {
    for (kind, parent, check) in [
        (Kind::Full, None, None),
        (Kind::Diff, Some(SnapshotId([9; 16])), Some(0)),
        (Kind::Fork, None, Some(u64::MAX)),
    ] {
        let header = Header {
            kind,
            parent,
            memory: image(check),
            ..header(3)
        };
        let bytes = encode(&header, &state(3)).unwrap();
        let (read, raw) = read_bytes(&bytes).unwrap();
        assert_eq!(read, header);
        assert_eq!(raw.parse::<State>().unwrap(), state(3));
        assert_eq!(
            encode(&read, &raw.parse::<State>().unwrap()).unwrap(),
            bytes
        );
    }
}

#[test]
fn state_file_when_read_through_a_descriptor_at_its_end_is_read_from_its_start() {
    let (_folder, path) = folder();
    let mut file = OpenOptions::new();
    let file = file.read(true).write(true).create_new(true);
    let mut file = file.open(path.join("state")).unwrap();
    file.write_all(&whole(1)).unwrap();
    assert_eq!(read(&file).unwrap().0, header(1));
}

#[test]
fn state_file_when_truncated_anywhere_is_refused() {
    let bytes = whole(1);
    for len in 0..bytes.len() {
        let reason = refused(&bytes[..len]);
        assert!(
            reason.starts_with("is truncated: it has "),
            "{len}: {reason}"
        );
    }
}

#[test]
fn state_file_when_any_bit_is_altered_is_refused() {
    let bytes = whole(1);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut altered = bytes.clone();
            altered[at] ^= 1 << bit;
            assert!(read_bytes(&altered).is_err(), "bit {bit} of byte {at}");
        }
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(refused(&longer).starts_with("was altered"));
}

#[test]
fn state_file_when_its_writer_is_at_fault_is_refused() {
    let sealed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole(1);
        change(&mut bytes);
        let crc = checksum(&bytes);
        bytes[CRC_AT..LEN_AT].copy_from_slice(&crc.to_le_bytes());
        refused(&bytes)
    };
    let reason = sealed(&|bytes| bytes.push(0));
    assert!(reason.contains("it is longer than it says"), "{reason}");
    let reason = sealed(&|bytes| bytes[LEN_AT - 1 + 13] = 1);
    assert!(reason.contains("a reserved field is not zero"), "{reason}");
    for len in [u32::MAX, 1 << 20] {
        let reason = sealed(&|bytes| {
            bytes[HEADER_LEN_AT..HEADER_LEN_AT + 4].copy_from_slice(&len.to_le_bytes());
        });
        assert!(reason.contains("its header ends outside of it"), "{reason}");
    }
    let reason = sealed(&|bytes| bytes[HEADER_LEN_AT] -= 1);
    assert!(
        reason.starts_with("does not hold a machine's state: "),
        "{reason}"
    );
    let with_header = |text: &str| {
        let mut bytes = vec![0; FIXED];
        bytes.extend_from_slice(text.as_bytes());
        bytes.extend_from_slice(b"{}");
        seal(&mut bytes, text.len(), VERSION);
        refused(&bytes)
    };
    let text = serde_json::to_string(&header(1)).unwrap();
    assert!(
        read_bytes(&{
            let mut bytes = vec![0; FIXED];
            bytes.extend_from_slice(text.as_bytes());
            seal(&mut bytes, text.len(), VERSION);
            bytes
        })
        .is_ok()
    );
    for (from, to, reason) in [
        ("\"Full\"", "\"Half\"", "unknown variant `Half`"),
        ("0101", "01G1", "32 hexadecimal digits"),
        ("0101", "01", "32 hexadecimal digits"),
        ("\"taken\"", "\"took\"", "unknown field `took`"),
        (
            "\"1000000000000000\"",
            "\"+000000000000001\"",
            "16 hexadecimal",
        ),
        ("1048576", "-1", "invalid value"),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        let told = with_header(&changed);
        assert!(told.contains(reason), "{told}, not {reason}");
    }
}

#[test]
fn state_file_when_of_an_earlier_minor_version_is_read_and_keeps_it() {
    for version in [FIRST_VERSION, VERSION] {
        let header = Header {
            version,
            ..header(1)
        };
        let bytes = encode(&header, &state(1)).unwrap();
        assert_eq!(bytes[VERSION_AT..VERSION_AT + 2], version.0.to_le_bytes());
        assert_eq!(bytes[VERSION_AT + 2..CRC_AT], version.1.to_le_bytes());
        let (read, _) = read_bytes(&bytes).unwrap();
        assert_eq!(read, header);
    }
}

#[test]
fn state_file_when_of_a_later_version_is_refused_by_its_version() {
    for (version, is_newer) in [
        ((VERSION.0 + 1, 0), true),
        ((VERSION.0, VERSION.1 + 1), true),
        ((u16::MAX, u16::MAX), true),
        ((0, 9), false),
    ] {
        let mut bytes = whole(1);
        bytes[VERSION_AT..VERSION_AT + 2].copy_from_slice(&version.0.to_le_bytes());
        bytes[VERSION_AT + 2..CRC_AT].copy_from_slice(&version.1.to_le_bytes());
        let reason = refused(&bytes);
        let newer = format!("has version v{}.{}.0 of the format", version.0, version.1);
        assert_eq!(reason.starts_with(&newer), is_newer, "{reason}");
        // What follows may be anything.
        let reason = refused(&bytes[..FIXED]);
        assert_eq!(reason.starts_with(&newer), is_newer, "{reason}");
    }
}

#[test]
fn state_file_when_of_another_program_is_refused_by_its_name() {
    let firecracker = 0x0710_1984_8664_0000u64.to_le_bytes();
    // As version 1.17 writes it.
    let later = b"\0\0\0\x64\x86\x84\x19\x10\x07\x06\x31\x31.0.0\x06\x80\0\x03".to_vec();
    for (bytes, what) in [
        (&firecracker[..], "Firecracker"),
        (&later, "Firecracker"),
        (b"QEVM\0\0\0\x03", "QEMU"),
        (b"{\"vm\": 1}", "Cloud Hypervisor"),
        (b"\x7fELF\x02\x01\x01\0", "an ELF file"),
        (&[1; 100], "unknown bytes"),
        (b"\x89PNG\r\n\x1a\n", "unknown bytes"),
    ] {
        let reason = refused(bytes);
        assert!(
            reason.starts_with("is not a snapshot of mayfly: "),
            "{reason}"
        );
        assert!(reason.contains(what), "{reason}, not {what}");
    }
    assert!(refused(&[0; 100]).starts_with("was not written to its end"));
}

#[test]
fn state_file_when_too_long_is_not_read() {
    let (_folder, path) = folder();
    let path = path.join("state");
    let long = |first: &[u8]| {
        let file = File::create(&path).unwrap();
        file.set_len(STATE_MAX + 1).unwrap();
        file.write_all_at(first, 0).unwrap();
        read(&open_regular(&path).unwrap()).unwrap_err().to_string()
    };
    assert!(long(&whole(1)).starts_with("is too long for a state file"));
    // As memory begins.
    assert!(long(&[0; 8]).contains("Check that it is not the memory file"));
    assert!(long(&[0xf0; 8]).contains("Check that it is not the memory file"));
    assert!(long(b"QEVM").contains("QEMU"));
}

#[test]
fn file_when_it_is_no_regular_one_is_refused_without_waiting() {
    let (_folder, path) = folder();
    let fifo = path.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
    for (path, kind) in [
        (fifo.as_path(), "a FIFO"),
        (Path::new("/dev/zero"), "a character device"),
        (&path, "a directory"),
    ] {
        let reason = open_regular(path).unwrap_err().to_string();
        assert_eq!(reason, format!("is {kind}, not a file"));
        if kind == "a directory" {
            let reason = read(&File::open(path).unwrap()).unwrap_err().to_string();
            assert_eq!(reason, "is a directory, not a file");
        }
        let reason = save(path, &path.with_file_name("other"), 1).unwrap_err();
        assert!(reason.to_string().contains(kind), "{reason}");
        let reason = save(&path.with_file_name("other"), path, 1).unwrap_err();
        assert!(reason.to_string().contains(kind), "{reason}");
    }
    assert_eq!(names(&path), ["fifo"]);
    assert!(matches!(
        open_regular(&path.join("none")),
        Err(Refusal::Io(_))
    ));
}

#[test]
fn random_ids_when_written_as_text_are_read_back() {
    let [one, other] = [SnapshotId::random().unwrap(), SnapshotId::random().unwrap()];
    assert_ne!(one, other);
    assert_eq!(one.to_string().parse(), Ok(one));
    assert_eq!(one.to_string().len(), 32);
    for wrong in ["", "0", "0x000000000000000000000000000000", &"A".repeat(32)] {
        assert!(wrong.parse::<SnapshotId>().is_err(), "{wrong}");
    }
}

/// What a memory image of `id` has at a few places.
fn fill(file: &File, id: u8) -> io::Result<MemoryImage> {
    file.set_len(LEN)?;
    for at in [0, ID_AT, LEN - 4096] {
        step();
        file.write_all_at(&[id; 4096], at)?;
    }
    Ok(image(Some(u64::from(id) << 60)))
}

fn save_to(state_at: Target, memory_at: Target, id: u8) -> Result<(), WriteError> {
    write_pair(
        state_at,
        memory_at,
        |file| fill(file, id),
        |memory| {
            encode(
                &Header {
                    memory,
                    ..header(id)
                },
                &state(id),
            )
        },
    )
}

/// Writes a pair. What another test's child has for a moment, between fork and exec, are copies of
/// locked descriptors of this process: then it is tried again.
fn save(state_at: &Path, memory_at: &Path, id: u8) -> Result<(), WriteError> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let (state, memory) = (state_at.into(), memory_at.into());
        match save_to(Target::Path(state), Target::Path(memory), id) {
            Err(WriteError::Busy(_)) if Instant::now() < end => thread::yield_now(),
            written => return written,
        }
    }
}

/// The snapshot that a reader finds: its state, and memory that belongs to it.
fn load(state_at: &Path, memory_at: &Path) -> Result<u8, Refusal> {
    let (header, raw) = read(&open_regular(state_at)?)?;
    let memory = memory_of(&header, open_regular(memory_at), Some(memory_at))?;
    let id = header.id.0[0];
    assert_eq!(raw.parse::<State>().unwrap(), state(id));
    let mut expected = vec![0; LEN as usize];
    for at in [0, ID_AT as usize, LEN as usize - 4096] {
        expected[at..at + 4096].fill(id);
    }
    let mut bytes = vec![0; LEN as usize];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected, "the memory is not that of {id}");
    Ok(id)
}

/// The same, where a create may come in between: `before` is called before the memory is opened.
fn load_both(
    state_at: &Path,
    memory_at: &Path,
    mut before: impl FnMut(),
) -> Result<(Header, u32, Result<File, Refusal>), Refusal> {
    let mut reads = 0;
    read_pair(
        || {
            reads += 1;
            read(&open_regular(state_at)?).map(|(header, _)| (header, reads))
        },
        |header| {
            before();
            memory_of(header, open_regular(memory_at), Some(memory_at))
        },
    )
}

#[test]
fn pair_when_a_create_replaces_it_while_it_is_read_is_the_new_one() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let mut ids = [2, 3].into_iter();
    let replace = || {
        if let Some(id) = ids.next() {
            save(&at, &memory, id).unwrap();
        }
    };
    let (header, reads, image) = load_both(&at, &memory, replace).unwrap();
    check_memory(&header, &image.unwrap()).unwrap();
    assert_eq!((header.id.0[0], reads), (3, 3));
    // Gone for a moment, and of another length.
    let aside = path.join("aside");
    fs::rename(&memory, &aside).unwrap();
    let mut tries = 0;
    let put_back = || {
        tries += 1;
        if tries == 2 {
            fs::rename(&aside, &memory).unwrap();
        }
    };
    let (_, reads, image) = load_both(&at, &memory, put_back).unwrap();
    assert!(image.is_ok() && reads == 2);
    // What stays mixed is not read for ever, whether the state changes or not.
    fs::write(&memory, "short").unwrap();
    let (_, reads, image) = load_both(&at, &memory, || {}).unwrap();
    assert!(matches!(image, Err(Refusal::Length { .. })) && reads == 2);
    let mut id = 3;
    let change = || {
        id += 1;
        fs::write(&at, whole(id)).unwrap();
    };
    let (_, reads, image) = load_both(&at, &memory, change).unwrap();
    assert!(image.is_err() && reads == 20);
}

#[test]
fn pair_when_it_is_created_again_and_again_is_always_found() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let end = Instant::now() + Duration::from_secs(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for id in (1..=200).cycle() {
                save(&at, &memory, id).unwrap();
                if Instant::now() > end {
                    return;
                }
            }
        });
        while Instant::now() < end {
            let (header, _, image) = load_both(&at, &memory, || {}).unwrap();
            check_memory(&header, &image.unwrap()).unwrap();
        }
    });
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn pair_when_written_replaces_the_old_one_and_leaves_nothing_else() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    for (id, file_system) in (1..).zip(FILE_SYSTEMS.into_iter().chain(FILE_SYSTEMS)) {
        HAS.set(file_system);
        save(&at, &memory, id).unwrap();
        assert_eq!(load(&at, &memory).unwrap(), id);
        assert_eq!(names(&path), ["memory", "state"]);
    }
    HAS.set(FileSystem::Exchange);
    // Whatever was there.
    fs::write(&at, "text").unwrap();
    fs::write(&memory, "").unwrap();
    fs::set_permissions(&at, PermissionsExt::from_mode(0o600)).unwrap();
    save(&at, &memory, 4).unwrap();
    assert_eq!(load(&at, &memory).unwrap(), 4);
    assert_eq!(fs::metadata(&at).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn memory_file_when_replaced_while_mapped_or_read_keeps_its_old_content_there() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let open = open_regular(&memory).unwrap();
    save(&at, &memory, 2).unwrap();
    check_memory(&header(1), &open).unwrap();
    let mixed = check_memory(&header(2), &open).unwrap_err().to_string();
    assert!(mixed.starts_with("belongs to another snapshot"), "{mixed}");
}

#[test]
fn memory_file_when_of_another_length_is_refused() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let open = OpenOptions::new().write(true).open(&memory).unwrap();
    for len in [0, 15, LEN - 4096, LEN + 4096] {
        open.set_len(len).unwrap();
        let reason = load(&at, &memory).unwrap_err().to_string();
        assert!(
            reason.starts_with(&format!("has {len} bytes, and")),
            "{reason}"
        );
    }
    open.set_len(LEN).unwrap();
    for id_at in [LEN - 15, u64::MAX] {
        let memory_of = MemoryImage {
            id_at,
            ..image(None)
        };
        let header = Header {
            memory: memory_of,
            ..header(1)
        };
        let reason = check_memory(&header, &open_regular(&memory).unwrap());
        assert!(reason.unwrap_err().to_string().contains("outside of that"));
    }
}

#[test]
fn diff_when_it_has_a_parent_is_not_a_whole_machine() {
    let parent = Some(SnapshotId([7; 16]));
    let kind = Kind::Diff;
    let diff = Header {
        kind,
        parent,
        ..header(1)
    };
    let reason = diff.check_whole().unwrap_err().to_string();
    assert!(reason.contains(&"07".repeat(16)), "{reason}");
    let first = Header { kind, ..header(1) };
    first.check_whole().unwrap();
    header(1).check_whole().unwrap();
}

#[test]
fn links_when_in_the_callers_paths_are_followed_and_stay() {
    let (_folder, path) = folder();
    for name in ["real", "links"] {
        fs::create_dir(path.join(name)).unwrap();
    }
    let (at, memory) = (path.join("links/state"), path.join("links/memory"));
    symlink("../real/state", &at).unwrap();
    symlink(path.join("links/second"), &memory).unwrap();
    symlink("../real/memory", path.join("links/second")).unwrap();
    for id in [1, 2] {
        save(&at, &memory, id).unwrap();
        assert_eq!(load(&at, &memory).unwrap(), id);
        assert_eq!(names(&path.join("real")), ["memory", "state"]);
        assert_eq!(names(&path.join("links")), ["memory", "second", "state"]);
        assert!(fs::symlink_metadata(&memory).unwrap().is_symlink());
    }
    symlink("turn", path.join("turn")).unwrap();
    let error = save(&path.join("turn"), &memory, 3).unwrap_err();
    assert!(
        matches!(&error, WriteError::Io { cause, .. }
        if cause.raw_os_error() == Some(libc::ELOOP)),
        "{error}"
    );
}

#[test]
fn both_files_when_they_are_one_are_refused() {
    let (_folder, path) = folder();
    let one = path.join("one");
    symlink("one", path.join("link")).unwrap();
    let new = save(&one, &path.join("link"), 1).unwrap_err();
    assert!(matches!(new, WriteError::Same), "{new}");
    fs::write(&one, "old").unwrap();
    fs::hard_link(&one, path.join("other")).unwrap();
    for other in ["one", "link", "other"] {
        let error = save(&one, &path.join(other), 1).unwrap_err();
        assert!(matches!(error, WriteError::Same), "{other}: {error}");
    }
    let same = Target::File {
        file: both_ways(&one),
        name: "descriptor 3".into(),
    };
    let error = save_to(Target::Path(one.clone()), same, 1).unwrap_err();
    assert!(matches!(error, WriteError::Same), "{error}");
    assert_eq!(fs::read(&one).unwrap(), b"old");
    let temporary = path.join(partial_name("x".as_ref()));
    let error = save(&one, &temporary, 1).unwrap_err();
    assert!(matches!(error, WriteError::Temporary(_)), "{error}");
}

fn both_ways(path: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true);
    options.truncate(false).open(path).unwrap()
}

#[test]
fn descriptors_when_written_to_hold_the_pair_and_what_cannot_serve_is_refused() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    let target = |path: &Path| Target::File {
        file: both_ways(path),
        name: "descriptor 3".into(),
    };
    fs::write(&at, vec![1; 10_000]).unwrap();
    for id in [1, 2] {
        save_to(target(&at), target(&memory), id).unwrap();
        assert_eq!(load(&at, &memory).unwrap(), id);
    }
    // A failure in the middle is not taken for a snapshot.
    let failed = write_pair(
        target(&at),
        target(&memory),
        |_| Err(io::Error::other("planted")),
        |_| encode(&header(3), &state(3)),
    );
    assert_eq!(
        crate::log::chain(&failed.unwrap_err()),
        "Cannot write the guest's memory: planted"
    );
    let reason = load(&at, &memory).unwrap_err().to_string();
    assert!(reason.starts_with("was not written to its end"), "{reason}");
    let mut options = OpenOptions::new();
    let read_only = File::open(&at).unwrap();
    let append = options.read(true).append(true).open(&at).unwrap();
    let null = both_ways(Path::new("/dev/null"));
    for (file, reason) in [
        (read_only, "not opened for reading and writing"),
        (append, "O_APPEND"),
        (null, "is a character device"),
    ] {
        let name = "descriptor 3".to_owned();
        let error = save_to(Target::File { file, name }, target(&memory), 1).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn pair_when_given_up_while_it_is_written_is_not_put_in_place() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let written = || {
        let steps = crate::steps::Steps::default();
        steps.adopt();
        steps.start(1, "a snapshot");
        write_pair(
            Target::Path(at.clone()),
            Target::Path(memory.clone()),
            |_| {
                assert!(steps.give_up(1));
                Ok::<_, io::Error>(header(2).memory)
            },
            |_| encode(&header(2), &state(2)),
        )
    };
    let given_up = thread::scope(|scope| scope.spawn(written).join().unwrap());
    assert!(matches!(given_up, Err(WriteError::GivenUp)), "{given_up:?}");
    assert_eq!(load(&at, &memory).unwrap(), 1);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn state_alone_when_written_is_whole_and_in_place() {
    let (_folder, path) = folder();
    let at = path.join("state");
    for id in [1, 2] {
        write_state(Target::Path(at.clone()), &whole(id), || Ok(())).unwrap();
        assert_eq!(fs::read(&at).unwrap(), whole(id));
        assert_eq!(names(&path), ["state"]);
    }
    // Its memory could not be passed on: the old one stays.
    let failed = write_state(Target::Path(at.clone()), &whole(3), || {
        Err(io::ErrorKind::WouldBlock.into())
    });
    let told = crate::log::chain(&failed.unwrap_err());
    assert_eq!(told, "Cannot pass the memory: operation would block");
    assert_eq!(fs::read(&at).unwrap(), whole(2));
    assert_eq!(names(&path), ["state"]);
}

#[test]
fn name_when_it_is_long_has_a_temporary_name_of_its_own_that_fits() {
    let (_folder, path) = folder();
    let mut partials = BTreeSet::new();
    for len in [1, 200, 239, 240, 254, 255] {
        let name = "n".repeat(len);
        for hidden in [partial_name(name.as_ref()), old_name(name.as_ref())] {
            assert!(hidden.len() <= 255, "{len}");
            assert!(partials.insert(hidden), "{len}");
        }
        let at = path.join(&name);
        save(&at, &path.join("memory"), 1).unwrap();
        assert_eq!(load(&at, &path.join("memory")).unwrap(), 1);
        fs::remove_file(at).unwrap();
    }
    let error = save(&path.join("n".repeat(256)), &path.join("memory"), 1).unwrap_err();
    assert!(error.to_string().contains("File name too long"), "{error}");
}

#[test]
fn create_when_memory_or_state_fails_leaves_the_old_pair() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    let target = |path: &Path| Target::Path(path.into());
    for has_old in [false, true] {
        if has_old {
            save(&at, &memory, 1).unwrap();
        }
        let before = names(&path);
        let planted = || io::Error::other("planted");
        for fails_late in [false, true] {
            let failed = write_pair(
                target(&at),
                target(&memory),
                |file| match fails_late {
                    true => fill(file, 2),
                    false => Err(planted()),
                },
                |_| Err(planted()),
            );
            assert!(failed.is_err());
            assert_eq!(names(&path), before);
            if has_old {
                assert_eq!(load(&at, &memory).unwrap(), 1);
            }
        }
    }
}

#[test]
fn create_when_the_state_cannot_be_put_in_place_takes_the_memory_back() {
    for file_system in FILE_SYSTEMS {
        HAS.set(file_system);
        state_cannot_be_put_in_place();
    }
}

fn state_cannot_be_put_in_place() {
    let (_folder, path) = folder();
    for has_old in [false, true] {
        let place = path.join(format!("place {has_old}"));
        fs::create_dir(&place).unwrap();
        let (at, memory) = (place.join("state"), path.join(format!("memory {has_old}")));
        if has_old {
            save(&at, &memory, 1).unwrap();
        }
        let before = names(&path);
        let failed = write_pair(
            Target::Path(at.clone()),
            Target::Path(memory.clone()),
            |file| fill(file, 2),
            |memory| {
                // The temporary state file goes, so that it cannot be renamed.
                fs::remove_file(place.join(".state.mayfly-partial")).unwrap();
                encode(
                    &Header {
                        memory,
                        ..header(2)
                    },
                    &state(2),
                )
            },
        );
        let error = failed.unwrap_err().to_string();
        assert!(
            error.starts_with("Cannot put the new state file in place"),
            "{error}"
        );
        assert_eq!(names(&path), before);
        if has_old {
            assert_eq!(load(&at, &memory).unwrap(), 1);
        }
    }
}

#[test]
fn create_when_another_is_under_way_at_the_same_place_is_refused() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    for id in [1, 2] {
        write_pair(
            Target::Path(at.clone()),
            Target::Path(memory.clone()),
            |file| {
                for (at, memory) in [("state", "memory"), ("state", "else"), ("else", "memory")] {
                    let (at, memory) = (path.join(at), path.join(memory));
                    let saved = save_to(Target::Path(at), Target::Path(memory), 9);
                    let error = saved.unwrap_err();
                    assert!(matches!(error, WriteError::Busy(_)), "{error}");
                }
                fill(file, id)
            },
            |memory| {
                encode(
                    &Header {
                        memory,
                        ..header(id)
                    },
                    &state(id),
                )
            },
        )
        .unwrap();
        assert_eq!(load(&at, &memory).unwrap(), id);
        assert_eq!(names(&path), ["memory", "state"]);
    }
}

/// A process that is forked meanwhile has a copy of the descriptors until it executes its program.
#[test]
fn create_when_copies_of_its_descriptor_stay_open_lets_go_of_its_place() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    let mut copies = Vec::new();
    for id in [1, 2, 3] {
        let encoded = |memory| {
            let header = Header {
                memory,
                ..header(id)
            };
            encode(&header, &state(id))
        };
        let filled = |file: &File| {
            copies.push(file.try_clone()?);
            fill(file, id)
        };
        let written = write_pair(
            Target::Path(at.clone()),
            Target::Path(memory.clone()),
            filled,
            encoded,
        );
        written.unwrap();
        assert_eq!(load(&at, &memory).unwrap(), id);
    }
}

/// Set for the process that is to be killed: at which step, and where it creates a snapshot.
const KILL_AT: &str = "MAYFLY_TEST_KILL_AT";
const KILL_IN: &str = "MAYFLY_TEST_KILL_IN";
/// The number of its file system.
const KILL_ON: &str = "MAYFLY_TEST_KILL_ON";

/// Not a test of its own: what the processes below do.
#[test]
fn creates_if_told_to() {
    if let Some(steps) = std::env::var_os(KILL_AT) {
        let path = PathBuf::from(std::env::var_os(KILL_IN).unwrap());
        let number: usize = std::env::var(KILL_ON).unwrap().parse().unwrap();
        HAS.set(FILE_SYSTEMS[number]);
        LEFT.set(Some(steps.to_str().unwrap().parse().unwrap()));
        save(&path.join("state"), &path.join("memory"), 2).unwrap();
    }
}

/// Has a process create snapshot 2 in `path` and be killed after `steps`; whether it was.
fn killed_after(steps: u32, path: &Path) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "snapshot::tests::creates_if_told_to"]);
    child.env(KILL_AT, steps.to_string()).env(KILL_IN, path);
    child.env(KILL_ON, (HAS.get() as usize).to_string());
    let output = child.output().unwrap();
    match output.status.signal() {
        Some(signal) => {
            assert_eq!(signal, libc::SIGKILL);
            true
        }
        None => {
            assert!(output.status.success(), "{output:?}");
            false
        }
    }
}

#[test]
fn create_when_killed_at_any_step_leaves_the_old_pair_or_the_new_one() {
    for file_system in FILE_SYSTEMS {
        HAS.set(file_system);
        kill_at_any_step();
    }
}

fn kill_at_any_step() {
    let mut found = BTreeSet::new();
    for has_old in [false, true] {
        let mut steps = 0;
        loop {
            let (_folder, path) = folder();
            let (at, memory) = (path.join("state"), path.join("memory"));
            if has_old {
                save(&at, &memory, 1).unwrap();
            }
            let was_killed = killed_after(steps, &path);
            match load(&at, &memory) {
                Ok(id) => {
                    found.insert((has_old, id));
                    assert!(id == 2 || has_old && id == 1, "{steps}: {id}");
                    assert!(was_killed || id == 2);
                }
                Err(refusal) => assert!(!has_old, "{steps}: {refusal}"),
            }
            // A failed create afterwards repairs, and one that works leaves nothing behind.
            let failed = write_pair(
                Target::Path(at.clone()),
                Target::Path(memory.clone()),
                |_| Err(io::Error::other("planted")),
                |_| encode(&header(9), &state(9)),
            );
            assert!(failed.is_err());
            if has_old {
                let (header, _) = read(&open_regular(&at).unwrap()).unwrap();
                check_memory(&header, &open_regular(&memory).unwrap()).unwrap();
            }
            assert!(names(&path).iter().all(|name| !name.starts_with('.')));
            save(&at, &memory, 3).unwrap();
            assert_eq!(load(&at, &memory).unwrap(), 3);
            assert_eq!(names(&path), ["memory", "state"]);
            if !was_killed {
                break;
            }
            steps += 1;
        }
        assert!(steps > 10, "{steps} steps only");
    }
    assert_eq!(Vec::from_iter(found), [(false, 2), (true, 1), (true, 2)]);
}

#[test]
fn old_image_when_it_has_another_name_only_is_found_by_a_link_too() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    fs::create_dir(path.join("links")).unwrap();
    let link = path.join("links/link");
    symlink("../memory", &link).unwrap();
    for hidden in [partial_name("memory".as_ref()), old_name("memory".as_ref())] {
        fs::rename(&memory, path.join(&hidden)).unwrap();
        for name in [&memory, &link] {
            assert_eq!(load(&at, name).unwrap(), 1);
        }
        fs::rename(path.join(&hidden), &memory).unwrap();
    }
}

#[test]
fn create_when_killed_twice_in_a_row_leaves_the_old_pair_or_the_new_one() {
    for file_system in FILE_SYSTEMS {
        HAS.set(file_system);
        // The first around the exchange of the images, the second around the repair and its own.
        for first in 12..18 {
            for second in [0, 1, 2, 3, 16, 17, 18, 19] {
                let (_folder, path) = folder();
                let (at, memory) = (path.join("state"), path.join("memory"));
                save(&at, &memory, 1).unwrap();
                killed_after(first, &path);
                killed_after(second, &path);
                let id = load(&at, &memory).unwrap();
                let of = (file_system, first, second);
                assert!(id == 1 || id == 2, "{of:?}: {id}");
            }
        }
    }
}

/// Set for the process that fills a file system.
const FULL: &str = "MAYFLY_TEST_FULL";

/// Not a test of its own: what the process below does, in a mount namespace of its own.
#[test]
fn fills_a_file_system_if_told_to() {
    let Some(path) = std::env::var_os(FULL).map(PathBuf::from) else {
        return;
    };
    let mut mount = Command::new("mount");
    // Room for one image, most of another, and their states.
    mount.args(["-t", "tmpfs", "-o", "size=44k", "mayfly-test"]);
    assert!(mount.arg(&path).status().unwrap().success());
    let (at, memory) = (path.join("state"), path.join("memory"));
    save(&at, &memory, 1).unwrap();
    let free = rustix::fs::statvfs(&path).unwrap().f_bavail;
    // The disk gets full at every page of a create.
    for pages in 0..=free {
        let ballast = path.join("ballast");
        fs::write(&ballast, vec![1; (pages * 4096) as usize]).unwrap();
        match save(&at, &memory, 2) {
            Ok(()) => {
                assert_eq!(load(&at, &memory).unwrap(), 2);
                save(&at, &memory, 1).unwrap();
            }
            Err(error) => {
                let told = crate::log::chain(&error);
                assert!(told.contains("No space left on device"), "{told}");
                assert_eq!(load(&at, &memory).unwrap(), 1, "{pages}");
            }
        }
        assert_eq!(names(&path), ["ballast", "memory", "state"], "{pages}");
        fs::remove_file(ballast).unwrap();
        println!("{pages} of {free}");
    }
}

#[test]
fn disk_when_it_gets_full_at_any_page_leaves_the_old_pair() {
    needs!(root, unshare, mount);
    let (_folder, path) = folder();
    let mut child = Command::new("unshare");
    child.arg("--mount").arg(std::env::current_exe().unwrap());
    child.args(["--exact", "snapshot::tests::fills_a_file_system_if_told_to"]);
    let output = child.arg("--nocapture").env(FULL, &path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("0 of ") && said.contains("5 of "), "{said}");
}

#[test]
fn folder_when_it_cannot_be_written_to_is_named_and_the_old_pair_stays() {
    let (_folder, path) = folder();
    let (at, memory) = (path.join("state"), path.join("memory"));
    let missing = path.join("none/state");
    let error = save(&missing, &memory, 1).unwrap_err().to_string();
    assert!(error.starts_with("Cannot find the place of `") && error.contains("none/state"));
    let error = save(&path.join("state/"), &memory, 1)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("state/") && error.contains("is a directory"),
        "{error}"
    );
    save(&at, &memory, 1).unwrap();
    for file in [&at, &memory] {
        // /sys cannot be written to by root either.
        let (at, memory) = match file == &at {
            true => (Path::new("/sys/kernel/state"), memory.as_path()),
            false => (at.as_path(), Path::new("/sys/kernel/memory")),
        };
        let error = save(at, memory, 2).unwrap_err().to_string();
        assert!(
            error.starts_with("Cannot create a temporary file beside `/sys"),
            "{error}"
        );
    }
    assert_eq!(load(&at, &memory).unwrap(), 1);
    assert_eq!(names(&path), ["memory", "state"]);
}
