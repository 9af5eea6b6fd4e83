//! What control has opened for a VM that is still being configured.
//!
//! Clients may remove a file once they have PUT it, so it is opened then and kept. Opening never
//! waits (a FIFO does not hold up the API) and takes only what can be what it is said to be. A
//! descriptor that was handed in takes the place of opening, and must be as good.

use std::error::Error;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::action::{Action, ActionError, Answer, Outcome};
use crate::config::cpu::CpuConfig;
use crate::config::{
    AnyDevice, ConfigError, CpuConfigSource, Draft, JsonError, PassedFd, Source, VmConfig, json,
};
use crate::log;
use crate::sys::fd;
use crate::sys::handed::{Handed, HandedError};
use crate::sys::socket;
use crate::sys::tap::{Tap, TapError};

/// What is opened, as sentences call it.
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const DISK: &str = "disk";
const TAP: &str = "tap";
/// The log, as [`open_sink`] is asked for it.
pub const LOG: &str = "log";

/// A file of a VM could not be had.
#[derive(Debug)]
pub struct OpenError {
    what: &'static str,
    source: Source,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Open(io::Error),
    Handed(HandedError),
    WrongKind(&'static str),
    /// What can not be done with the descriptor as it was opened.
    Mode(&'static str),
    Tap(TapError),
    NoListener(&'static str),
    Changed,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OpenError { what, source, why } = self;
        let name = match source {
            Source::Fd(PassedFd { fd, name: None }) => format!("in descriptor {fd}"),
            named => format!("`{named}`"),
        };
        f.write_str(section(what))?;
        match why {
            // The words after the last colon here are the original's, which clients match.
            Why::Open(_) if *what == KERNEL => write!(
                f,
                "Opening the {what} {name} failed: The kernel file cannot be opened"
            ),
            Why::Open(_) if *what == INITRD => write!(
                f,
                "Opening the {what} {name} failed: The initrd file cannot be opened due to \
                 invalid path or invalid permissions"
            ),
            // The path once more, behind the cause.
            Why::Open(cause) if *what == DISK => write!(
                f,
                "Opening the {what} {name} failed: Error manipulating the backing file: {cause} {}",
                name.trim_matches('`')
            ),
            Why::Open(_) => write!(f, "Opening the {what} {name} failed"),
            Why::Handed(_) => write!(f, "The {what} {name} can not be had"),
            Why::WrongKind(kind) => write!(f, "The {what} {name} is {kind}, not a file"),
            Why::Mode(mode) => write!(f, "The {what} {name} {mode}"),
            Why::NoListener(kind) => write!(f, "The {what} {name} is {kind}"),
            Why::Tap(_) => write!(f, "The {what} {name} can not be used"),
            Why::Changed => write!(
                f,
                "The {what} {name} was changed in place after it was named; name it again, and \
                 replace such a file by rename"
            ),
        }
    }
}

impl Error for OpenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.why {
            Why::Open(_) if self.what == DISK => None,
            Why::Open(cause) => Some(cause),
            Why::Handed(cause) => Some(cause),
            Why::Tap(cause) => Some(cause),
            _ => None,
        }
    }
}

/// Errors that a client is told as they are.
macro_rules! told {
    ($($cause:ty),+) => {
        $(impl From<$cause> for ActionError {
            fn from(error: $cause) -> Self {
                ActionError::of(&error)
            }
        })+
    };
}

told!(OpenError, ConfigError, JsonError);

impl From<TapError> for ActionError {
    fn from(error: TapError) -> Self {
        let section = section(TAP);
        ActionError(format!(
            "{section}Open tap device failed: {}",
            log::chain(&error)
        ))
    }
}

/// How the original begins a sentence about `what`, for clients that look at that.
fn section(what: &str) -> &'static str {
    match what {
        KERNEL | INITRD => "Boot source error: ",
        DISK => "Drive config error: ",
        TAP => "Network config error: Could not create the network device: ",
        LOG => "Logger error: ",
        _ => "",
    }
}

/// An image that is mapped into guests: a kernel or an initrd.
#[derive(Debug)]
pub struct Image {
    /// Open for reading.
    pub file: File,
    /// As the client named it.
    pub name: String,
    source: Source,
    what: &'static str,
    /// Size, modification time and its nanoseconds when it was opened.
    stamp: (u64, i64, i64),
}

/// What has been opened so far.
#[derive(Debug, Default)]
pub struct Opened {
    /// The kernel.
    pub kernel: Option<Image>,
    /// The initial RAM disk.
    pub initrd: Option<Image>,
    /// Disk images by drive id.
    pub disks: Vec<(String, File)>,
    /// Taps by interface id.
    pub taps: Vec<(String, Tap)>,
    /// Taps of a configuration that this one replaces: a tap can be attached only once.
    attached: Vec<Tap>,
    /// Where console output goes instead of standard output.
    pub console: Option<File>,
    /// Where clients of the console come.
    pub console_socket: Option<Arc<ConsoleSocket>>,
}

/// The socket for clients of the console. It goes when the configuration does that asked for it.
#[derive(Debug)]
pub struct ConsoleSocket {
    /// Made here, or handed in.
    pub listener: UnixListener,
    /// Where it was made.
    path: Option<String>,
}

impl ConsoleSocket {
    fn open(source: &Source, handed: &mut Handed) -> Result<Self, OpenError> {
        let fail = |why| OpenError {
            what: "console socket",
            source: source.clone(),
            why,
        };
        let (listener, path) = match source {
            Source::Named(path) => {
                let listener = UnixListener::bind(path).map_err(|e| fail(Why::Open(e)))?;
                (listener, Some(path.clone()))
            }
            Source::Fd(passed) => {
                let claimed = handed.claim(passed.fd);
                let fd = claimed.map_err(|cause| fail(Why::Handed(cause)))?;
                let listener = socket::listener(fd).map_err(|what| fail(Why::NoListener(what)))?;
                (listener, None)
            }
        };
        listener
            .set_nonblocking(true)
            .map_err(|e| fail(Why::Open(e)))?;
        Ok(ConsoleSocket { listener, path })
    }
}

impl ConsoleSocket {
    /// Whether it was made where `source` says.
    fn is_at(&self, source: &Source) -> bool {
        self.path.is_some() && self.path.as_deref() == source.name()
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Opened {
    /// The disk image of drive `id`.
    pub fn disk(&self, id: &str) -> Option<&File> {
        self.disks
            .iter()
            .find(|(known, _)| known == id)
            .map(|(_, file)| file)
    }

    /// The tap of interface `id`.
    pub fn tap(&self, id: &str) -> Option<&Tap> {
        self.taps
            .iter()
            .find(|(known, _)| known == id)
            .map(|(_, tap)| tap)
    }

    /// The tap called `name`, if it is attached already.
    fn take_attached(&mut self, name: &str) -> Option<Tap> {
        let at = self.attached.iter().position(|tap| tap.name() == name)?;
        Some(self.attached.swap_remove(at))
    }

    /// Keeps `value` for `id` in `list`, in place of what was kept before.
    fn keep<T>(list: &mut Vec<(String, T)>, id: &str, value: T) {
        match list.iter_mut().find(|(known, _)| known == id) {
            Some((_, old)) => *old = value,
            None => list.push((id.to_owned(), value)),
        }
    }
}

impl Image {
    /// Opens the `what` (kernel, initrd) that `source` names.
    ///
    /// # Errors
    /// When it is missing, unreadable, or no regular file.
    pub fn open(
        what: &'static str,
        source: &Source,
        handed: &mut Handed,
    ) -> Result<Self, OpenError> {
        let (file, metadata) = open(what, source, Mode::Read, handed)?;
        if !metadata.is_file() {
            return Err(wrong_kind(what, source, &metadata));
        }
        Ok(Image {
            file,
            name: source.to_string(),
            source: source.clone(),
            what,
            stamp: stamp(&metadata),
        })
    }

    /// Whether the file is still as it was when it was opened: it is about to be mapped.
    ///
    /// # Errors
    /// When its size or modification time changed.
    pub fn check_unchanged(&self) -> Result<(), OpenError> {
        let fail = |why| OpenError {
            what: self.what,
            source: self.source.clone(),
            why,
        };
        let metadata = self.file.metadata().map_err(|e| fail(Why::Open(e)))?;
        if stamp(&metadata) == self.stamp {
            Ok(())
        } else {
            Err(fail(Why::Changed))
        }
    }
}

/// Takes up a PUT or PATCH of the configuration: checked first, then opened, then noted, so that
/// one that is refused changes nothing.
///
/// # Errors
/// The sentence for the client.
pub fn put(draft: &mut Draft, opened: &mut Opened, action: Action, handed: &mut Handed) -> Answer {
    match action {
        Action::PutMachineConfig(machine) => draft.put_machine_config(machine)?,
        Action::PatchMachineConfig(update) => draft.patch_machine_config(update)?,
        Action::PutBootSource(source) => {
            draft.check_boot_source(&source)?;
            let kernel = Image::open(KERNEL, &source.kernel_image_path, handed)?;
            let initrd = match &source.initrd_path {
                Some(initrd) => Some(Image::open(INITRD, initrd, handed)?),
                None => None,
            };
            draft.put_boot_source(source)?;
            (opened.kernel, opened.initrd) = (Some(kernel), initrd);
        }
        Action::PutDevice(AnyDevice::Drive(drive)) => {
            draft.check_drive(&drive)?;
            let file = open_disk(&drive.path_on_host, drive.read_only(), handed)?;
            let id = drive.drive_id.clone();
            draft.put_drive(drive)?;
            Opened::keep(&mut opened.disks, &id, file);
        }
        Action::PutDevice(AnyDevice::NetworkInterface(mut network)) => {
            draft.check_network(&network)?;
            let id = network.iface_id.clone();
            let tap = match &network.host_dev_name {
                Source::Named(name) => {
                    // The same interface again: a tap can be attached only once, so it stays.
                    let before = opened.tap(&id).filter(|tap| tap.name() == name);
                    let tap = match before.map(Tap::try_clone) {
                        Some(again) => again.map_err(|e| ActionError::of(&e))?,
                        None => match opened.take_attached(name) {
                            Some(tap) => tap,
                            None => Tap::open(name)?,
                        },
                    };
                    // The host may have chosen the name.
                    network.host_dev_name = tap.name().into();
                    tap
                }
                source => tap_from(source, handed)?,
            };
            draft.put_network(network)?;
            Opened::keep(&mut opened.taps, &id, tap);
        }
        Action::PutSerial(serial) => {
            let console = match &serial.serial_out_path {
                Some(sink) => Some(open_sink("console output", sink, handed)?),
                None => None,
            };
            opened.console_socket = match &serial.console_socket {
                Some(source) => match opened.console_socket.take_if(|s| s.is_at(source)) {
                    Some(same) => Some(same),
                    None => Some(Arc::new(ConsoleSocket::open(source, handed)?)),
                },
                None => None,
            };
            opened.console = console;
            draft.put_serial(serial);
        }
        Action::PutCpuConfig(cpu) => draft.put_cpu_config(cpu),
        other => {
            return Err(ActionError(format!(
                "This can not be asked for before the start: {other:?}."
            )));
        }
    }
    Ok(Outcome::Done)
}

/// Takes up a whole configuration, to be put in place of `before`, which stays as it is.
///
/// # Errors
/// The sentence for the client.
pub fn take_all(
    before: &Opened,
    config: VmConfig,
    handed: &mut Handed,
) -> Result<(Draft, Opened), ActionError> {
    let (mut draft, mut opened) = (Draft::default(), Opened::default());
    for (_, tap) in &before.taps {
        let again = tap.try_clone().map_err(|e| ActionError::of(&e))?;
        opened.attached.push(again);
    }
    opened.console_socket.clone_from(&before.console_socket);
    let VmConfig {
        machine_config,
        boot_source,
        devices,
        cpu_config,
        serial,
        logger: _,
        metrics: _,
    } = config;
    let has_serial = serial.is_some();
    let parts = machine_config
        .map(Action::PutMachineConfig)
        .into_iter()
        .chain(serial.map(Action::PutSerial))
        .chain(boot_source.map(Action::PutBootSource))
        .chain(devices.into_each().map(Action::PutDevice));
    if let Some(cpu) = cpu_config {
        draft.put_cpu_config(cpu_masks(cpu, handed)?);
    }
    for part in parts {
        put(&mut draft, &mut opened, part, handed)?;
    }
    opened.attached.clear();
    if !has_serial {
        opened.console_socket = None;
    }
    Ok((draft, opened))
}

/// Opens the disk image that `source` names, for writing too unless `read_only`.
///
/// # Errors
/// When it is missing, not permitted, or neither a regular file nor a block device.
pub fn open_disk(source: &Source, read_only: bool, handed: &mut Handed) -> Result<File, OpenError> {
    const WHAT: &str = DISK;
    let mode = if read_only {
        Mode::Read
    } else {
        Mode::ReadWrite
    };
    let (file, metadata) = open(WHAT, source, mode, handed)?;
    if metadata.is_file() || metadata.file_type().is_block_device() {
        Ok(file)
    } else {
        Err(wrong_kind(WHAT, source, &metadata))
    }
}

/// Takes the tap out of a descriptor.
fn tap_from(source: &Source, handed: &mut Handed) -> Result<Tap, OpenError> {
    let fail = |why| OpenError {
        what: TAP,
        source: source.clone(),
        why,
    };
    let (file, metadata) = open(TAP, source, Mode::ReadWrite, handed)?;
    // Its question is put to devices only: no other file can have an opinion on it.
    if !metadata.file_type().is_char_device() {
        return Err(fail(Why::Mode("is not a tap")));
    }
    Tap::from_fd(file.into()).map_err(|e| fail(Why::Tap(e)))
}

/// What is to be done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Read,
    ReadWrite,
    /// Add to its end; make it when it is missing.
    Append,
}

/// Opens what `source` names, or claims it, for `mode`.
fn open(
    what: &'static str,
    source: &Source,
    mode: Mode,
    handed: &mut Handed,
) -> Result<(File, Metadata), OpenError> {
    let fail = |why| OpenError {
        what,
        source: source.clone(),
        why,
    };
    let opened = |cause| fail(Why::Open(cause));
    let file = match source {
        Source::Named(path) => open_path(path, mode).map_err(opened)?,
        Source::Fd(passed) => {
            let fd = handed
                .claim(passed.fd)
                .map_err(|cause| fail(Why::Handed(cause)))?;
            check_access(fd::access(&fd).map_err(opened)?, mode)
                .map_err(|reason| fail(Why::Mode(reason)))?;
            File::from(fd)
        }
    };
    let metadata = file.metadata().map_err(opened)?;
    Ok((file, metadata))
}

fn open_path(path: &str, mode: Mode) -> io::Result<File> {
    let mut options = OpenOptions::new();
    match mode {
        Mode::Read => options.read(true),
        Mode::ReadWrite => options.read(true).write(true),
        Mode::Append => {
            // A FIFO without a reader could not be opened for writing alone, and would wait for
            // one.
            let fifo = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
            options.read(fifo).append(true).create(true)
        }
    };
    // Not to be held up by a FIFO without a writer, nor to make a terminal ours.
    options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// Whether a descriptor that somebody else opened serves for `mode`.
fn check_access(access: fd::Access, mode: Mode) -> Result<(), &'static str> {
    match mode {
        Mode::Read | Mode::ReadWrite if !access.read => Err("was not opened for reading"),
        Mode::ReadWrite | Mode::Append if !access.write => Err("was not opened for writing"),
        // The file would grow, and nothing would be where it was written to.
        Mode::ReadWrite if access.append => {
            Err("was opened for adding to its end (O_APPEND), and is to be written anywhere")
        }
        // Buffers are where the guest has them.
        Mode::Read | Mode::ReadWrite if access.direct => {
            Err("was opened for aligned blocks only (O_DIRECT)")
        }
        _ => Ok(()),
    }
}

/// The CPU masks of a configuration, read from their own file if they have one.
fn cpu_masks(source: CpuConfigSource, handed: &mut Handed) -> Result<CpuConfig, ActionError> {
    match source {
        CpuConfigSource::Inline(masks) => Ok(masks),
        CpuConfigSource::File(file) => Ok(json::parse(&read_text(
            "CPU configuration",
            &file,
            handed,
        )?)?),
    }
}

/// Reads a whole small file.
///
/// # Errors
/// When it can not be read, or is longer than any configuration is.
pub fn read_text(
    what: &'static str,
    source: &Source,
    handed: &mut Handed,
) -> Result<Vec<u8>, OpenError> {
    const LONGEST: u64 = 1 << 20;
    let (mut file, metadata) = open(what, source, Mode::Read, handed)?;
    let fail = |cause| OpenError {
        what,
        source: source.clone(),
        why: Why::Open(cause),
    };
    if metadata.is_dir() {
        return Err(wrong_kind(what, source, &metadata));
    }
    if metadata.is_file() {
        // A descriptor may come with a place in the file: whoever wrote it may have left it at
        // the end.
        file.rewind().map_err(fail)?;
    }
    let mut bytes = Vec::new();
    file.take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    if bytes.len() as u64 > LONGEST {
        return Err(fail(io::Error::other("it is longer than 1 MiB")));
    }
    Ok(bytes)
}

/// Opens a place to write text to: a file, made when missing and added to, a FIFO that somebody
/// reads, or a device; a descriptor may be a socket as well.
///
/// # Errors
/// When it can not be opened or made.
pub fn open_sink(
    what: &'static str,
    source: &Source,
    handed: &mut Handed,
) -> Result<File, OpenError> {
    open(what, source, Mode::Append, handed).map(|(file, _)| file)
}

fn wrong_kind(what: &'static str, source: &Source, metadata: &Metadata) -> OpenError {
    let kind = metadata.file_type();
    let kind = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        // An eventfd, an epoll set and their like have no type at all.
        "a descriptor of the kernel's own"
    };
    OpenError {
        what,
        source: source.clone(),
        why: Why::WrongKind(kind),
    }
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn open_when_not_a_file_says_what_it_is() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().to_str().unwrap();
        let none = &mut Handed::default();
        let error = Image::open("kernel", &path.into(), none)
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
        let error = Image::open("kernel", &"/dev/null".into(), none)
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("is a character device, not a file"),
            "{error}"
        );
        let error = Image::open("kernel", &"/no/such".into(), none).unwrap_err();
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
        let image = Image::open("kernel", &path, &mut Handed::default()).unwrap();
        image.check_unchanged().unwrap();
        file.as_file().set_len(50).unwrap();
        let error = image.check_unchanged().unwrap_err().to_string();
        assert!(error.contains("was changed in place"), "{error}");
    }

    /// `file` as the only descriptor of a request.
    fn handed(file: File) -> Handed {
        Handed::Received(vec![Some(file.into())])
    }

    #[test]
    fn open_when_handed_in_checks_kind_and_mode() {
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
        let disk = |file, read_only| open_disk(&fd0, read_only, &mut handed(file)).map(drop);
        let kernel = |file| Image::open("kernel", &fd0, &mut handed(file)).map(drop);
        let sink = |file| open_sink("log", &fd0, &mut handed(file)).map(drop);
        let tap = |file| tap_from(&fd0, &mut handed(file)).map(drop);

        let good = [
            disk(both(), false),
            disk(read(), true),
            disk(both(), true),
            disk(append(), true),
            kernel(read()),
            kernel(both()),
            sink(write()),
            sink(append()),
            sink(null()),
            sink(fd::pipe().unwrap().1),
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
            (sink(read()), "not opened for writing"),
            (sink(folder()), "not opened for writing"),
            (sink(pipe()), "not opened for writing"),
            (tap(both()), "is not a tap"),
            (tap(null()), "can not be used"),
            (tap(read()), "not opened for writing"),
        ];
        // Not every file system has it.
        if let Ok(direct) = direct() {
            bad.push((disk(direct, false), "O_DIRECT"));
        }
        for (outcome, reason) in bad {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("in descriptor 0"), "{error}");
            assert!(error.contains(reason), "{error}, not {reason}");
        }
        let named = Source::passed(0, "root.ext4");
        let error = open_disk(&named, false, &mut handed(read())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Drive config error: The disk `root.ext4` was not opened for writing"
        );
        let error = open_disk(&Source::fd(1), true, &mut handed(read())).unwrap_err();
        assert_eq!(
            crate::log::chain(&error),
            "Drive config error: The disk in descriptor 1 can not be had: There is no descriptor 1: 1 came with the \
             first byte of the request, counted from 0"
        );
    }

    #[test]
    fn read_text_when_handed_in_at_the_end_is_read_from_the_start() {
        use std::io::Write;
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(b"{}").unwrap();
        let text = read_text("masks", &Source::fd(0), &mut handed(file)).unwrap();
        assert_eq!(text, b"{}");
    }

    #[test]
    fn put_when_refused_keeps_what_there_was() {
        let (mut draft, mut opened) = (Draft::default(), Opened::default());
        let body = br#"{"drive_id":"a","is_root_device":false,"fd":0}"#;
        let drive = || Action::PutDevice(AnyDevice::Drive(json::parse(body).unwrap()));
        let mut good = handed(TempFile::new().unwrap().into_file());
        put(&mut draft, &mut opened, drive(), &mut good).unwrap();
        let before = opened.disk("a").unwrap().metadata().unwrap().ino();
        let mut bad = handed(File::open("/").unwrap());
        put(&mut draft, &mut opened, drive(), &mut bad).unwrap_err();
        put(&mut draft, &mut opened, drive(), &mut Handed::default()).unwrap_err();
        let after = opened.disk("a").unwrap().metadata().unwrap().ino();
        assert_eq!(before, after);
    }
}
