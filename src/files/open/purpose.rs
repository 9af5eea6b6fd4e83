//! What a file is for: what it must be good for, and how messages about it begin.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use crate::error::{ActionError, Context};
use crate::steps::may_wait;
use crate::sys::fd;
use crate::sys::passed::Passed;
use crate::wire::config::{PassedFd, Source};

/// What a file is for.
#[derive(Debug)]
pub struct Purpose {
    /// What messages call it.
    pub what: &'static str,
    /// How Firecracker begins a message about it, for clients that look at that.
    pub section: &'static str,
    /// Firecracker's words for a file that cannot be opened, which clients match too.
    refused: &'static str,
    /// Where clients match all that comes before the cause: Firecracker's words for that.
    whole: Option<&'static str>,
    mode: Mode,
    /// A descriptor that was opened with O_DIRECT serves as well.
    is_direct: bool,
}

/// What is to be done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Read,
    ReadWrite,
    /// Add to its end; make it when it is missing.
    Append,
}

const fn purpose(what: &'static str, section: &'static str, mode: Mode) -> Purpose {
    Purpose {
        what,
        section,
        refused: "",
        whole: None,
        mode,
        is_direct: false,
    }
}

/// A kernel.
pub const KERNEL: Purpose = Purpose {
    refused: ": The kernel file cannot be opened",
    ..purpose("kernel", "Boot source error: ", Mode::Read)
};
/// An initial RAM disk.
pub const INITRD: Purpose = Purpose {
    refused: ": The initrd file cannot be opened due to invalid path or invalid permissions",
    ..purpose("initrd", "Boot source error: ", Mode::Read)
};
const DISK_MANIPULATING: &str = ": Error manipulating the backing file";
pub(super) const DISK: Purpose = Purpose {
    refused: DISK_MANIPULATING,
    ..purpose("disk", "Drive config error: ", Mode::ReadWrite)
};
pub(super) const DISK_TO_READ: Purpose = Purpose {
    mode: Mode::Read,
    ..DISK
};
pub(super) const DISK_DIRECT: Purpose = Purpose {
    is_direct: true,
    ..DISK
};
pub(super) const DISK_DIRECT_TO_READ: Purpose = Purpose {
    mode: Mode::Read,
    ..DISK_DIRECT
};
pub(super) const OVERLAY: Purpose = purpose("overlay", "Drive config error: ", Mode::ReadWrite);
/// A tap.
pub const TAP: Purpose = purpose(
    "tap",
    "Network config error: Could not create the network device: ",
    Mode::ReadWrite,
);
/// The log.
pub const LOG: Purpose = purpose("log", "Logger error: ", Mode::Append);
/// Metrics.
pub const METRICS: Purpose = purpose("metrics", "", Mode::Append);
/// How the guest ended.
pub const END: Purpose = purpose("end", "", Mode::Append);
/// The console's output.
pub const CONSOLE_OUTPUT: Purpose = purpose("console output", "", Mode::Append);
pub(super) const CONSOLE_SOCKET: Purpose = purpose("console socket", "", Mode::ReadWrite);
/// A configuration of the whole.
pub const CONFIGURATION: Purpose = purpose("configuration", "", Mode::Read);
/// The state of a snapshot.
pub(super) const SNAPSHOT_STATE: Purpose = Purpose {
    whole: Some(
        "Failed to restore from snapshot: Failed to get snapshot state from file: Failed to open \
         snapshot file",
    ),
    ..purpose("state file", "Load snapshot error: ", Mode::Read)
};
/// The memory of a snapshot.
pub(super) const SNAPSHOT_MEMORY: Purpose = Purpose {
    whole: Some(
        "Failed to restore from snapshot: Failed to load guest memory: Error creating guest memory \
         from file: Failed to load guest memory",
    ),
    ..purpose("memory file", "Load snapshot error: ", Mode::Read)
};
/// Which pages a restored guest needs first.
pub(super) const WORKING_SET: Purpose = purpose("working set", "Load snapshot error: ", Mode::Read);
pub(super) const WORKING_SET_TO_RECORD: Purpose = Purpose {
    mode: Mode::ReadWrite,
    ..WORKING_SET
};
/// The socket of the process that brings in the memory of a snapshot.
pub(super) const FAULT_HANDLER: Purpose = Purpose {
    whole: Some(
        "Failed to restore from snapshot: Failed to load guest memory: Error creating guest memory \
         from uffd: Failed to UDS connect",
    ),
    ..purpose(
        "socket of the page fault handler",
        "Load snapshot error: ",
        Mode::ReadWrite,
    )
};
pub(super) const CPU_CONFIGURATION: Purpose = purpose("CPU configuration", "", Mode::Read);

impl Purpose {
    /// "The kernel `/k` is ..."
    pub fn wrong(&self, source: &Source, why: impl fmt::Display) -> ActionError {
        let Purpose { what, section, .. } = self;
        ActionError(format!("{section}The {what} {} {why}", Quoted(source)))
    }

    pub(super) fn not_opened(&self, source: &Source, cause: &io::Error) -> ActionError {
        let Purpose {
            what,
            section,
            refused,
            whole,
            ..
        } = self;
        let quoted = Quoted(source);
        if let Some(whole) = whole {
            return ActionError(format!("{section}{whole}: {cause}: the {what} {quoted}"));
        }
        // The path once more, behind the cause, as Firecracker has it.
        let path = match *refused {
            DISK_MANIPULATING => format!(" {source}"),
            _ => String::new(),
        };
        ActionError(format!(
            "{section}Opening the {what} {quoted} failed{refused}: {cause}{path}"
        ))
    }

    pub(super) fn claim(
        &self,
        passed_fd: &PassedFd,
        passed: &mut Passed,
    ) -> Result<std::os::fd::OwnedFd, ActionError> {
        let Purpose { what, section, .. } = self;
        let name = match &passed_fd.name {
            Some(name) => format!(" `{name}`"),
            None => String::new(),
        };
        let claimed = passed.claim(passed_fd.fd);
        claimed.context(format_args!(
            "{section}Cannot use the descriptor passed for the {what}{name}"
        ))
    }

    /// Opens what `source` names, or claims it.
    pub(super) fn open(
        &self,
        source: &Source,
        passed: &mut Passed,
    ) -> Result<(File, Metadata), ActionError> {
        self.may_wait("opening", source);
        let not_opened = |cause: io::Error| self.not_opened(source, &cause);
        let file = match source {
            Source::Named(path) => open_path(path, self.mode).map_err(not_opened)?,
            Source::Fd(passed_fd) => {
                let fd = self.claim(passed_fd, passed)?;
                let access = fd::access(&fd).map_err(not_opened)?;
                self.check_access(access)
                    .map_err(|why| self.wrong(source, why))?;
                File::from(fd)
            }
        };
        let metadata = file.metadata().map_err(not_opened)?;
        Ok((file, metadata))
    }

    /// Whether a descriptor that another program opened serves.
    pub(super) fn check_access(&self, access: fd::Access) -> Result<(), &'static str> {
        match self.mode {
            Mode::Read | Mode::ReadWrite if !access.read => Err("was not opened for reading"),
            Mode::ReadWrite | Mode::Append if !access.write => Err("was not opened for writing"),
            // The file would grow, and nothing would be where it was written to.
            Mode::ReadWrite if access.append => {
                Err("was opened with O_APPEND, but random-access writes are needed")
            }
            // Buffers are where the guest has them.
            Mode::Read | Mode::ReadWrite if access.direct && !self.is_direct => {
                Err("was opened with O_DIRECT, but unaligned reads and writes are needed")
            }
            _ => Ok(()),
        }
    }

    /// What follows may wait for the file.
    pub(super) fn may_wait(&self, operation: &str, source: &Source) {
        let Purpose { what, .. } = self;
        may_wait(format_args!("{operation} the {what} {}", Quoted(source)));
    }

    pub(super) fn wrong_kind(&self, source: &Source, metadata: &Metadata) -> ActionError {
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
            "an anonymous inode"
        };
        self.wrong(source, format_args!("is {kind}, not a file"))
    }
}

/// A source as messages name it.
struct Quoted<'a>(&'a Source);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Source::Fd(PassedFd { fd, name: None }) => write!(f, "in descriptor {fd}"),
            named => write!(f, "`{named}`"),
        }
    }
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
