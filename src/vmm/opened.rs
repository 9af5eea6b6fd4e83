//! What control has opened for a VM that is still being configured.
//!
//! Clients may remove a file once they have PUT it, so it is opened then and kept. Opening never
//! waits (a FIFO does not hold up the API) and takes only what can be what it is said to be.

use std::error::Error;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use super::action::{Action, ActionError, Answer, Outcome};
use crate::config::cpu::CpuConfig;
use crate::config::{ConfigError, CpuConfigSource, Draft, JsonError, VmConfig, json};
use crate::sys::tap::{Tap, TapError};

/// A file of a VM could not be had.
#[derive(Debug)]
pub struct OpenError {
    what: &'static str,
    path: String,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Open(io::Error),
    WrongKind(&'static str),
    Changed,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OpenError { what, path, why } = self;
        match why {
            Why::Open(_) => write!(f, "Opening the {what} `{path}` failed"),
            Why::WrongKind(kind) => write!(f, "The {what} `{path}` is {kind}, not a file"),
            Why::Changed => write!(
                f,
                "The {what} `{path}` was changed in place after it was named; name it again, and \
                 replace such a file by rename"
            ),
        }
    }
}

impl Error for OpenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.why {
            Why::Open(cause) => Some(cause),
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

told!(OpenError, ConfigError, JsonError, TapError);

/// An image that is mapped into guests: a kernel or an initrd.
#[derive(Debug)]
pub struct Image {
    /// Open for reading.
    pub file: File,
    /// As the client named it.
    pub path: String,
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
    /// Opens the `what` (kernel, initrd) at `path`.
    ///
    /// # Errors
    /// When it is missing, unreadable, or no regular file.
    pub fn open(what: &'static str, path: &str) -> Result<Self, OpenError> {
        let (file, metadata) = open(what, path, OpenOptions::new().read(true))?;
        if !metadata.is_file() {
            return Err(wrong_kind(what, path, &metadata));
        }
        Ok(Image {
            file,
            path: path.to_owned(),
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
            path: self.path.clone(),
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
pub fn put(draft: &mut Draft, opened: &mut Opened, action: Action) -> Answer {
    match action {
        Action::PutMachineConfig(machine) => draft.put_machine_config(machine)?,
        Action::PatchMachineConfig(update) => draft.patch_machine_config(update)?,
        Action::PutBootSource(source) => {
            draft.check_boot_source(&source)?;
            let kernel = Image::open("kernel", &source.kernel_image_path)?;
            let initrd = match &source.initrd_path {
                Some(path) => Some(Image::open("initrd", path)?),
                None => None,
            };
            draft.put_boot_source(source)?;
            (opened.kernel, opened.initrd) = (Some(kernel), initrd);
        }
        Action::PutDrive(drive) => {
            draft.check_drive(&drive)?;
            let file = open_disk(&drive.path_on_host, drive.read_only())?;
            let id = drive.drive_id.clone();
            draft.put_drive(drive)?;
            Opened::keep(&mut opened.disks, &id, file);
        }
        Action::PutNetwork(mut network) => {
            draft.check_network(&network)?;
            let id = network.iface_id.clone();
            let name = &network.host_dev_name;
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
            tap.name().clone_into(&mut network.host_dev_name);
            draft.put_network(network)?;
            Opened::keep(&mut opened.taps, &id, tap);
        }
        Action::PutSerial(serial) => {
            opened.console = match &serial.serial_out_path {
                Some(path) => Some(open_sink("console output", path)?),
                None => None,
            };
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
pub fn take_all(before: &Opened, config: VmConfig) -> Result<(Draft, Opened), ActionError> {
    let (mut draft, mut opened) = (Draft::default(), Opened::default());
    for (_, tap) in &before.taps {
        let again = tap.try_clone().map_err(|e| ActionError::of(&e))?;
        opened.attached.push(again);
    }
    let VmConfig {
        machine_config,
        boot_source,
        drives,
        network_interfaces,
        cpu_config,
        serial,
        logger: _,
        metrics: _,
    } = config;
    let parts = machine_config
        .map(Action::PutMachineConfig)
        .into_iter()
        .chain(serial.map(Action::PutSerial))
        .chain(boot_source.map(Action::PutBootSource))
        .chain(drives.into_iter().map(Action::PutDrive))
        .chain(network_interfaces.into_iter().map(Action::PutNetwork));
    if let Some(cpu) = cpu_config {
        draft.put_cpu_config(cpu_masks(cpu)?);
    }
    for part in parts {
        put(&mut draft, &mut opened, part)?;
    }
    opened.attached.clear();
    Ok((draft, opened))
}

/// Opens the disk image at `path`, for writing too unless `read_only`.
///
/// # Errors
/// When it is missing, not permitted, or neither a regular file nor a block device.
pub fn open_disk(path: &str, read_only: bool) -> Result<File, OpenError> {
    const WHAT: &str = "disk";
    let (file, metadata) = open(WHAT, path, OpenOptions::new().read(true).write(!read_only))?;
    if metadata.is_file() || metadata.file_type().is_block_device() {
        Ok(file)
    } else {
        Err(wrong_kind(WHAT, path, &metadata))
    }
}

fn open(
    what: &'static str,
    path: &str,
    options: &mut OpenOptions,
) -> Result<(File, Metadata), OpenError> {
    let fail = |cause| OpenError {
        what,
        path: path.to_owned(),
        why: Why::Open(cause),
    };
    // Not to be held up by a FIFO without a writer, nor to make a terminal ours.
    let file = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    Ok((file, metadata))
}

/// The CPU masks of a configuration, read from their own file if they have one.
fn cpu_masks(source: CpuConfigSource) -> Result<CpuConfig, ActionError> {
    match source {
        CpuConfigSource::Inline(masks) => Ok(masks),
        CpuConfigSource::Path(path) => Ok(json::parse(&read_text("CPU configuration", &path)?)?),
    }
}

/// Reads a whole small file.
///
/// # Errors
/// When it can not be read, or is longer than any configuration is.
pub fn read_text(what: &'static str, path: &str) -> Result<Vec<u8>, OpenError> {
    const LONGEST: u64 = 1 << 20;
    let (file, metadata) = open(what, path, OpenOptions::new().read(true))?;
    let fail = |cause| OpenError {
        what,
        path: path.to_owned(),
        why: Why::Open(cause),
    };
    if metadata.is_dir() {
        return Err(wrong_kind(what, path, &metadata));
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
/// reads, or a device.
///
/// # Errors
/// When it can not be opened or made.
pub fn open_sink(what: &'static str, path: &str) -> Result<File, OpenError> {
    let mut options = OpenOptions::new();
    // A FIFO without a reader could not be opened for writing alone, and would wait for one.
    let fifo = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
    options.read(fifo).append(true).create(true);
    open(what, path, &mut options).map(|(file, _)| file)
}

fn wrong_kind(what: &'static str, path: &str, metadata: &Metadata) -> OpenError {
    let kind = metadata.file_type();
    let kind = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a character device"
    };
    OpenError {
        what,
        path: path.to_owned(),
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
        let error = Image::open("kernel", path).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("The kernel `{path}` is a directory, not a file")
        );
        let error = open_disk(path, true).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("The disk `{path}` is a directory, not a file")
        );
        let error = Image::open("kernel", "/dev/null").unwrap_err().to_string();
        assert!(
            error.ends_with("is a character device, not a file"),
            "{error}"
        );
        let error = Image::open("kernel", "/no/such").unwrap_err();
        assert_eq!(
            crate::log::chain(&error),
            "Opening the kernel `/no/such` failed: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn image_when_cut_after_opening_is_noticed() {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(100).unwrap();
        let image = Image::open("kernel", file.as_path().to_str().unwrap()).unwrap();
        image.check_unchanged().unwrap();
        file.as_file().set_len(50).unwrap();
        let error = image.check_unchanged().unwrap_err().to_string();
        assert!(error.contains("was changed in place"), "{error}");
    }
}
