//! Opening what a configuration names. A file is opened without waiting for its other end (a FIFO
//! does not hold up control) and taken only if it can be what it is said to be. A descriptor that was
//! passed takes the place of opening, and must be as good.

mod overlay;
mod purpose;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

pub use self::overlay::OpenOverlay;
use self::purpose::{
    CONFIGURATION, CONSOLE_SOCKET, CPU_CONFIGURATION, DISK, DISK_DIRECT, DISK_DIRECT_TO_READ,
    DISK_TO_READ, FAULT_HANDLER, SNAPSHOT_MEMORY, SNAPSHOT_STATE, WORKING_SET,
    WORKING_SET_TO_RECORD,
};
pub use self::purpose::{CONSOLE_OUTPUT, END, INITRD, KERNEL, LOG, METRICS, Purpose, TAP};
use crate::error::{ActionError, Context};
use crate::snapshot::{self, Header, RawState, Refusal, SnapshotId};
use crate::sys::fd;
use crate::sys::io::Access;
use crate::sys::link::{Link, PacketSocket};
use crate::sys::passed::Passed;
use crate::sys::socket;
use crate::sys::tap::Tap;
use crate::wire::config::cpu::CpuConfig;
use crate::wire::config::{CpuConfigSource, Source, json};
use crate::wire::limits::CONFIG_FILE_MAX;

/// An image that is mapped into guests: a kernel or an initrd.
#[derive(Debug)]
pub struct Image {
    /// Open for reading.
    pub file: File,
    /// As the client named it.
    pub name: String,
    source: Source,
    purpose: &'static Purpose,
    /// Size, modification time and its nanoseconds when it was opened.
    stamp: (u64, i64, i64),
}

impl Image {
    /// Opens the image that `source` names.
    ///
    /// # Errors
    /// When it is missing, unreadable, or no regular file.
    pub fn open(
        purpose: &'static Purpose,
        source: &Source,
        passed: &mut Passed,
    ) -> Result<Self, ActionError> {
        let (file, metadata) = purpose.open(source, passed)?;
        if !metadata.is_file() {
            return Err(purpose.wrong_kind(source, &metadata));
        }
        Ok(Image {
            file,
            name: source.to_string(),
            source: source.clone(),
            purpose,
            stamp: stamp(&metadata),
        })
    }

    /// What follows reads it.
    pub fn may_wait(&self) {
        self.purpose.may_wait("reading", &self.source);
    }

    /// Whether the file is still as it was when it was opened: it is about to be mapped.
    ///
    /// # Errors
    /// When its size or modification time changed.
    pub fn check_unchanged(&self) -> Result<(), ActionError> {
        self.purpose.may_wait("reading the state of", &self.source);
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(|cause| self.purpose.not_opened(&self.source, &cause))?;
        if stamp(&metadata) == self.stamp {
            return Ok(());
        }
        Err(self.purpose.wrong(
            &self.source,
            "was changed in place after it was named; name it again, and replace such a file by \
             rename",
        ))
    }
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// Opens the disk image that `source` names, for writing too unless `read_only`, so that it is read and written past
/// the host's page cache.
///
/// # Errors
/// As [`open_disk`]; when it cannot be read and written so.
pub fn open_direct_disk(
    source: &Source,
    read_only: bool,
    passed: &mut Passed,
) -> Result<File, ActionError> {
    let purpose = match read_only {
        true => &DISK_DIRECT_TO_READ,
        false => &DISK_DIRECT,
    };
    let file = open_disk_as(purpose, source, passed)?;
    purpose.may_wait("reading", source);
    let alignment = fd::set_direct(&file).and_then(|()| Access::of(&file)?.alignment(&file));
    match alignment {
        Ok(_) => Ok(file),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) || e.kind() == ErrorKind::Unsupported => {
            let why = "cannot be used with `\"cache\": \"none\"`: its file system cannot go past the page cache \
                       (O_DIRECT). Leave `cache` out, or put the disk on another file system";
            Err(purpose.wrong(source, why))
        }
        Err(cause) => Err(purpose.not_opened(source, &cause)),
    }
}

/// Opens the disk image that `source` names, for writing too unless `read_only`.
///
/// # Errors
/// When it is missing, not permitted, or neither a regular file nor a block device.
pub fn open_disk(
    source: &Source,
    read_only: bool,
    passed: &mut Passed,
) -> Result<File, ActionError> {
    let purpose = if read_only { &DISK_TO_READ } else { &DISK };
    open_disk_as(purpose, source, passed)
}

fn open_disk_as(
    purpose: &Purpose,
    source: &Source,
    passed: &mut Passed,
) -> Result<File, ActionError> {
    let (file, metadata) = purpose.open(source, passed)?;
    match metadata.is_file() || metadata.file_type().is_block_device() {
        true => Ok(file),
        false => Err(purpose.wrong_kind(source, &metadata)),
    }
}

/// Makes the file at `path`, unless there is one; whether it was made.
fn made_if_missing(path: &str) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    options
        .write(true)
        .truncate(false)
        // What a guest has in memory, or writes, is its own.
        .mode(0o600)
        .custom_flags(flags);
    match options.clone().create_new(true).open(path) {
        Ok(_) => Ok(true),
        // Also a symbolic link to what is not there yet.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            options.create(true).open(path).map(|_| false)
        }
        Err(e) => Err(e),
    }
}

/// Reads the state file of a snapshot that a machine can be made of.
///
/// # Errors
/// When it is missing, unreadable, no regular file, no state file of ours that is whole, or that of a
/// diff.
pub fn snapshot_state(
    source: &Source,
    passed: &mut Passed,
) -> Result<(Header, RawState), ActionError> {
    let purpose = &SNAPSHOT_STATE;
    let (file, _) = purpose.open(source, passed)?;
    purpose.may_wait("reading", source);
    let read = snapshot::read(&file).and_then(|read| {
        read.0.check_whole()?;
        Ok(read)
    });
    read.map_err(|refusal| purpose.wrong(source, refusal))
}

/// Reads the state file of a snapshot that a machine can be made of, and opens the memory file that belongs
/// to it.
///
/// # Errors
/// As [`snapshot_state`]; when the memory file is missing, unreadable, no regular file, or belongs to another
/// snapshot.
pub fn snapshot_pair(
    state: &Source,
    memory: &Source,
    passed: &mut Passed,
) -> Result<(Header, RawState, File), ActionError> {
    let purpose = &SNAPSHOT_MEMORY;
    let (Source::Named(_), Source::Named(path)) = (state, memory) else {
        let (header, raw) = snapshot_state(state, passed)?;
        let (file, _) = purpose.open(memory, passed)?;
        purpose.may_wait("reading", memory);
        let path = memory.name().map(Path::new);
        let file = snapshot::memory_of(&header, Ok(file), path);
        return match file {
            Ok(file) => Ok((header, raw, file)),
            Err(refusal) => Err(purpose.wrong(memory, refusal)),
        };
    };
    let path = Path::new(path);
    let open = |header: &Header| {
        purpose.may_wait("opening", memory);
        let opened = snapshot::open_regular(path);
        purpose.may_wait("reading", memory);
        snapshot::memory_of(header, opened, Some(path))
    };
    match snapshot::read_pair(|| snapshot_state(state, passed), open)? {
        (header, raw, Ok(file)) => Ok((header, raw, file)),
        (.., Err(Refusal::Io(cause))) => Err(purpose.not_opened(memory, &cause)),
        (.., Err(refusal)) => Err(purpose.wrong(memory, refusal)),
    }
}

/// What is wrong with the content of the state file `source`.
pub fn wrong_state(source: &Source, why: impl std::fmt::Display) -> ActionError {
    SNAPSHOT_STATE.wrong(source, why)
}

/// The file of a working set.
#[derive(Debug)]
pub struct WorkingSetFile {
    /// Open for reading.
    pub file: File,
    /// Whether it can be recorded into, or why not.
    pub can_record: Result<(), ActionError>,
}

/// Opens the file of the working set of snapshot `id`, to read it or to record it: makes it when it is
/// missing.
///
/// # Errors
/// When it cannot be opened so, or is no regular file.
pub fn working_set(
    source: &Source,
    id: SnapshotId,
    passed: &mut Passed,
) -> Result<WorkingSetFile, ActionError> {
    let purpose = &WORKING_SET;
    let not_opened = |cause: io::Error| purpose.not_opened(source, &cause);
    let (file, metadata) = match source {
        Source::Named(path) => {
            purpose.may_wait("opening", source);
            let file = snapshot::open_working_set(Path::new(path), id).map_err(not_opened)?;
            let metadata = file.metadata().map_err(not_opened)?;
            (file, metadata)
        }
        Source::Fd(_) => purpose.open(source, passed)?,
    };
    if !metadata.is_file() {
        return Err(purpose.wrong_kind(source, &metadata));
    }
    let access = fd::access(&file).map_err(not_opened)?;
    let can_record = WORKING_SET_TO_RECORD.check_access(access);
    Ok(WorkingSetFile {
        file,
        can_record: can_record.map_err(|why| purpose.wrong(source, why)),
    })
}

/// Connects to the process that brings in guest memory.
///
/// # Errors
/// When it does not listen there.
pub fn fault_handler(source: &Source, passed: &mut Passed) -> Result<UnixStream, ActionError> {
    let purpose = &FAULT_HANDLER;
    purpose.may_wait("connecting to", source);
    match source {
        Source::Named(path) => {
            UnixStream::connect(path).map_err(|cause| purpose.not_opened(source, &cause))
        }
        Source::Fd(passed_fd) => {
            let file = File::from(purpose.claim(passed_fd, passed)?);
            let metadata = file.metadata();
            let metadata = metadata.map_err(|cause| purpose.not_opened(source, &cause))?;
            if !metadata.file_type().is_socket() {
                return Err(purpose.wrong(source, "is not a socket"));
            }
            Ok(UnixStream::from(OwnedFd::from(file)))
        }
    }
}

/// Takes the tap, or the socket in its place, out of a descriptor.
///
/// # Errors
/// When it is neither.
pub fn link_from(source: &Source, passed: &mut Passed) -> Result<Link, ActionError> {
    let (file, metadata) = TAP.open(source, passed)?;
    if metadata.file_type().is_socket() {
        let socket = PacketSocket::from_fd(file.into());
        return socket
            .map(Link::from)
            .map_err(|what| TAP.wrong(source, format_args!("is not a tap, but {what}")));
    }
    // Its question is put to devices only: no other file can have an opinion on it.
    if !metadata.file_type().is_char_device() {
        return Err(TAP.wrong(source, "is not a tap"));
    }
    let tap = Tap::from_fd(file.into());
    let tap = tap.context(TAP.wrong(source, "cannot be used"))?;
    Ok(tap.into())
}

/// Opens a place to write text to: a file, made when missing and added to, a FIFO, or a device; a
/// descriptor may be a socket as well.
///
/// # Errors
/// When it cannot be opened or made.
pub fn sink(purpose: &Purpose, source: &Source, passed: &mut Passed) -> Result<File, ActionError> {
    purpose.open(source, passed).map(|(file, _)| file)
}

/// Reads a whole small file.
///
/// # Errors
/// When it cannot be read, or is longer than any configuration is.
pub fn read_text(
    purpose: &Purpose,
    source: &Source,
    passed: &mut Passed,
) -> Result<Vec<u8>, ActionError> {
    let (file, metadata) = purpose.open(source, passed)?;
    read(purpose, source, file, &metadata)
}

/// Reads the configuration of the whole at `path`, to its end: it waits for whatever writes a FIFO
/// or a pipe.
///
/// # Errors
/// When it cannot be read, or is longer than any configuration is.
pub fn read_configuration(path: &str) -> Result<Vec<u8>, ActionError> {
    let (purpose, source) = (&CONFIGURATION, Source::from(path));
    purpose.may_wait("opening", &source);
    let not_opened = |cause: io::Error| purpose.not_opened(&source, &cause);
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NOCTTY);
    let file = options.open(path).map_err(not_opened)?;
    let metadata = file.metadata().map_err(not_opened)?;
    read(purpose, &source, file, &metadata)
}

fn read(
    purpose: &Purpose,
    source: &Source,
    mut file: File,
    metadata: &Metadata,
) -> Result<Vec<u8>, ActionError> {
    if metadata.is_dir() {
        return Err(purpose.wrong_kind(source, metadata));
    }
    let not_read = |cause: io::Error| purpose.not_opened(source, &cause);
    purpose.may_wait("reading", source);
    if metadata.is_file() {
        // The program that passed a descriptor may have written the file and be at its end.
        file.rewind().map_err(not_read)?;
    }
    let size = metadata.len().min(CONFIG_FILE_MAX);
    // With room for one byte more, the end is found by the second call.
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0).saturating_add(1));
    let mut limited = file.take(CONFIG_FILE_MAX.saturating_add(1));
    limited.read_to_end(&mut bytes).map_err(not_read)?;
    if bytes.len() as u64 > CONFIG_FILE_MAX {
        return Err(not_read(io::Error::other("it is longer than 1 MiB")));
    }
    Ok(bytes)
}

/// The CPU masks of a configuration, read from their own file if they have one.
///
/// # Errors
/// When that cannot be read, or is wrong.
pub fn cpu_config(source: CpuConfigSource, passed: &mut Passed) -> Result<CpuConfig, ActionError> {
    match source {
        CpuConfigSource::Inline(masks) => Ok(masks),
        CpuConfigSource::File(file) => {
            json::parse(&read_text(&CPU_CONFIGURATION, &file, passed)?).bare()
        }
    }
}

/// The socket for clients of the console. It goes when the configuration does that asked for it.
#[derive(Debug)]
pub struct ConsoleSocket {
    /// Made here, or passed.
    pub listener: UnixListener,
    /// Where it was made.
    path: Option<String>,
}

impl ConsoleSocket {
    /// Makes it where `source` says, or takes it from what was passed.
    ///
    /// # Errors
    /// When it cannot be made, or is no socket that listens.
    pub fn open(source: &Source, passed: &mut Passed) -> Result<Self, ActionError> {
        let not_opened = |cause: io::Error| CONSOLE_SOCKET.not_opened(source, &cause);
        let (listener, path) = match source {
            Source::Named(path) => {
                CONSOLE_SOCKET.may_wait("making", source);
                let listener = UnixListener::bind(path).map_err(not_opened)?;
                (listener, Some(path.clone()))
            }
            Source::Fd(passed_fd) => {
                let fd = CONSOLE_SOCKET.claim(passed_fd, passed)?;
                let is = |what| CONSOLE_SOCKET.wrong(source, format_args!("is {what}"));
                (socket::listener(fd).map_err(is)?, None)
            }
        };
        listener.set_nonblocking(true).map_err(not_opened)?;
        Ok(ConsoleSocket { listener, path })
    }

    /// Whether it was made where `source` says.
    pub fn is_at(&self, source: &Source) -> bool {
        self.path.is_some() && self.path.as_deref() == source.name()
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may have been removed already.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fd;
    use vmm_sys_util::tempdir::TempDir;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn open_when_not_a_file_says_what_it_is() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().to_str().unwrap();
        let none = &mut Passed::default();
        let error = Image::open(&KERNEL, &path.into(), none)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            format!("Boot source error: The kernel `{path}` is a directory, not a file")
        );
        let error = open_disk(&path.into(), true, none).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("Drive config error: The disk `{path}` is a directory, not a file")
        );
        let error = Image::open(&KERNEL, &"/dev/null".into(), none)
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("is a character device, not a file"),
            "{error}"
        );
        let error = Image::open(&KERNEL, &"/no/such".into(), none).unwrap_err();
        assert_eq!(
            crate::log::chain(&error),
            "Boot source error: Opening the kernel `/no/such` failed: The kernel file cannot be \
             opened: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn image_when_cut_after_opening_is_noticed() {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(100).unwrap();
        let path = Source::from(file.as_path().to_str().unwrap());
        let image = Image::open(&KERNEL, &path, &mut Passed::default()).unwrap();
        image.check_unchanged().unwrap();
        file.as_file().set_len(50).unwrap();
        let error = image.check_unchanged().unwrap_err().to_string();
        assert!(error.contains("was changed in place"), "{error}");
    }

    /// `file` as the only descriptor of a request.
    fn passed(file: File) -> Passed {
        Passed::Received(vec![Some(file.into())])
    }

    #[test]
    fn open_when_passed_checks_kind_and_mode() {
        let file = TempFile::new().unwrap();
        let path = file.as_path();
        let opened = |options: &mut OpenOptions| options.open(path).unwrap();
        let read = || opened(OpenOptions::new().read(true));
        let write = || opened(OpenOptions::new().write(true));
        let both = || opened(OpenOptions::new().read(true).write(true));
        let append = || opened(OpenOptions::new().read(true).append(true));
        let direct = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_DIRECT);
            options.open(path)
        };
        let name = || {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_PATH);
            opened(&mut options)
        };
        let folder = || File::open("/").unwrap();
        let null = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).open("/dev/null").unwrap()
        };
        let pipe = || fd::pipe().unwrap().0;
        let fd0 = Source::fd(0);
        let disk = |file, read_only| open_disk(&fd0, read_only, &mut passed(file)).map(drop);
        let kernel = |file| Image::open(&KERNEL, &fd0, &mut passed(file)).map(drop);
        let to_write = |file| sink(&LOG, &fd0, &mut passed(file)).map(drop);
        let tap = |file| link_from(&fd0, &mut passed(file)).map(drop);

        let good = [
            disk(both(), false),
            disk(read(), true),
            disk(both(), true),
            disk(append(), true),
            kernel(read()),
            kernel(both()),
            to_write(write()),
            to_write(append()),
            to_write(null()),
            to_write(fd::pipe().unwrap().1),
        ];
        for (case, outcome) in good.into_iter().enumerate() {
            assert!(outcome.is_ok(), "{case}: {outcome:?}");
        }
        let mut bad = vec![
            (disk(read(), false), "not opened for writing"),
            (disk(write(), false), "not opened for reading"),
            (disk(append(), false), "O_APPEND"),
            (disk(name(), true), "not opened for reading"),
            (disk(folder(), true), "is a directory, not a file"),
            (disk(null(), false), "is a character device, not a file"),
            (disk(pipe(), true), "is a FIFO, not a file"),
            (kernel(write()), "not opened for reading"),
            (kernel(name()), "not opened for reading"),
            (kernel(folder()), "is a directory"),
            (kernel(null()), "is a character device"),
            (kernel(pipe()), "is a FIFO"),
            (to_write(read()), "not opened for writing"),
            (to_write(folder()), "not opened for writing"),
            (to_write(pipe()), "not opened for writing"),
            (tap(both()), "is not a tap"),
            (tap(null()), "cannot be used"),
            (tap(read()), "not opened for writing"),
        ];
        // Not every file system has it.
        if let Ok(opened) = direct() {
            bad.push((disk(opened, false), "O_DIRECT"));
            let for_direct = |file| open_direct_disk(&fd0, false, &mut passed(file));
            for file in [direct().unwrap(), both()] {
                let access = fd::access(for_direct(file).unwrap()).unwrap();
                assert!(access.direct);
            }
            bad.push((for_direct(read()).map(drop), "not opened for writing"));
            bad.push((for_direct(append()).map(drop), "O_APPEND"));
        }
        for (outcome, reason) in bad {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("in descriptor 0"), "{error}");
            assert!(error.contains(reason), "{error}, not {reason}");
        }
        let named = Source::passed(0, "root.ext4");
        let error = open_disk(&named, false, &mut passed(read())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Drive config error: The disk `root.ext4` was not opened for writing"
        );
        let error = open_disk(&Source::fd(1), true, &mut passed(read())).unwrap_err();
        assert_eq!(
            crate::log::chain(&error),
            "Drive config error: Cannot use the descriptor passed for the disk: There is no descriptor \
             1: 1 came with the first byte of the request, counted from 0"
        );
    }

    #[test]
    fn snapshot_when_opened_is_whole_and_its_files_belong_together() {
        use crate::snapshot::{Kind, MemoryImage, SnapshotId, VERSION, encode};
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.as_path().join(name).to_str().unwrap().to_owned();
        let header = |kind, id| Header {
            version: VERSION,
            id: SnapshotId([id; 16]),
            kind,
            parent: Some(SnapshotId([9; 16])),
            memory: MemoryImage {
                len: 4096,
                check: None,
                id_at: 0,
            },
            taken: 0,
        };
        let write = |name: &str, header: &Header| {
            std::fs::write(path(name), encode(header, &1).unwrap()).unwrap();
        };
        write("state", &header(Kind::Full, 1));
        write("diff", &header(Kind::Diff, 1));
        std::fs::write(path("memory"), [1; 4096]).unwrap();
        std::fs::write(path("other"), [2; 4096]).unwrap();
        let none = &mut Passed::default();
        let (found, state) = snapshot_state(&path("state").as_str().into(), none).unwrap();
        assert_eq!(state.parse::<u8>().unwrap(), 1);
        assert_eq!(found.id, SnapshotId([1; 16]));
        let state_at = Source::from(path("state").as_str());
        let memory = |name: &str| {
            let memory = path(name).as_str().into();
            snapshot_pair(&state_at, &memory, &mut Passed::default())
        };
        memory("memory").unwrap();
        let by_descriptor = File::open(path("memory")).unwrap();
        snapshot_pair(&state_at, &Source::fd(0), &mut passed(by_descriptor)).unwrap();
        let (other, missing) = (path("other"), path("missing"));
        assert!(memory("other").unwrap_err().0.starts_with(&format!(
            "Load snapshot error: The memory file `{other}` belongs to another snapshot: "
        )));
        assert_eq!(
            memory("missing").unwrap_err().0,
            format!(
                "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: \
                 Error creating guest memory from file: Failed to load guest memory: No such file or \
                 directory (os error 2): the memory file `{missing}`"
            )
        );
        std::fs::rename(path("memory"), path(".other.mayfly-partial")).unwrap();
        memory("other").unwrap();
        for (name, reason) in [
            ("diff", "is a diff snapshot"),
            ("memory", "Failed to open snapshot file: No such file"),
            ("other", "is not a snapshot of mayfly"),
            (".", "is a directory, not a file"),
        ] {
            let error = snapshot_state(&path(name).as_str().into(), none)
                .unwrap_err()
                .0;
            assert!(error.starts_with("Load snapshot error: "), "{error}");
            assert!(error.contains(reason), "{error}, not {reason}");
        }
    }

    #[test]
    fn read_text_when_passed_at_the_end_is_read_from_the_start() {
        use std::io::Write;
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(b"{}").unwrap();
        let text = read_text(&CPU_CONFIGURATION, &Source::fd(0), &mut passed(file)).unwrap();
        assert_eq!(text, b"{}");
    }
}
