//! Where the files of snapshots lie: a folder on tmpfs, removed at the end.

use std::cell::Cell;
use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::failure::{Context, Failure, Result};
use crate::guest::{self, LOAD_AT, PAGE, Task};
use crate::sys;
use crate::workspace::Workspace;

/// The tmpfs that every Linux has.
const TMPFS: &str = "/dev/shm";
/// Written at once when a floor's memory file is filled.
const CHUNK: usize = 1 << 20;

/// The workspace, the guest, and a folder on tmpfs.
#[derive(Debug)]
pub struct Place<'a> {
    /// The files of this run that may lie on a disk.
    pub workspace: &'a Workspace,
    probe: &'a Path,
    folder: PathBuf,
    /// Becomes readable when a socket is made.
    names: Option<File>,
    next: Cell<u32>,
}

/// The two files of a snapshot, in a folder of their own, removed with this value.
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
}

/// What a guest is given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guest {
    /// MiB of memory.
    pub memory: u64,
    /// It writes to every page first.
    pub touched: bool,
    /// Its memory is a memfd, mapped shared.
    pub shared: bool,
    /// Its dirty pages are tracked.
    pub tracked: bool,
}

impl<'a> Place<'a> {
    /// Makes the folder.
    pub fn new(workspace: &'a Workspace, probe: &'a Path) -> Result<Self> {
        let folder = Path::new(TMPFS).join(format!("mayfly-bench-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .cannot(|| format!("make the directory {}", folder.display()))?;
        let mut place = Self {
            workspace,
            probe,
            folder,
            names: None,
            next: Cell::new(0),
        };
        let sockets = place.sockets();
        fs::create_dir(&sockets).cannot(|| "make a directory for sockets".into())?;
        let names =
            sys::watch_for_names(&sockets).cannot(|| "watch the directory of sockets".into())?;
        place.names = Some(File::from(names));
        Ok(place)
    }

    fn number(&self) -> u32 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    /// An empty folder for a snapshot.
    pub fn files(&self) -> Result<Files> {
        let folder = self.folder.join(format!("snapshot{}", self.number()));
        fs::create_dir(&folder).cannot(|| format!("make the directory {}", folder.display()))?;
        Ok(Files { folder })
    }

    /// What becomes readable when the next socket is made. There is one for all of them: closing one waits in the kernel
    /// for milliseconds.
    pub fn next_name(&self) -> Result<&File> {
        let mut names = self
            .names
            .as_ref()
            .ok_or_else(|| Failure::new("nothing watches the directory of sockets"))?;
        let mut earlier = [0; 4096];
        // It is never waited for: at the end of what there is, the read is an error.
        while names.read(&mut earlier).is_ok_and(|len| len > 0) {}
        Ok(names)
    }

    /// The folder of all.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where API sockets go, and nothing else. On a disk, making one may wait for its journal.
    fn sockets(&self) -> PathBuf {
        self.folder.join("sockets")
    }

    /// A name for an API socket.
    pub fn socket(&self) -> PathBuf {
        self.sockets().join(self.number().to_string())
    }

    /// A configuration that boots the probe, which then watches.
    pub fn config(&self, guest: Guest) -> Result<PathBuf> {
        let words = if guest.touched {
            "touch,watch"
        } else {
            "watch"
        };
        let mut machine = json!({ "vcpu_count": 1, "mem_size_mib": guest.memory });
        if guest.tracked {
            machine["track_dirty_pages"] = Value::Bool(true);
        }
        if guest.shared {
            machine["memory_backend"] = Value::from("shared");
        }
        let config = json!({
            "boot-source": {
                "kernel_image_path": self.probe,
                "boot_args": format!("probe={words},stay"),
            },
            "machine-config": machine,
            "drives": [],
        });
        let name = format!("config{}.json", self.number());
        self.workspace.file(&name, &config.to_string())
    }

    /// A memory file for the floor, whose guest writes its byte and halts; its entry is [`LOAD_AT`]. In a touched one
    /// every page holds something.
    pub fn floor(&self, guest: Guest) -> Result<Files> {
        let files = self.files()?;
        let path = files.memory();
        let making = || format!("write {}", path.display());
        let file = File::create(&path).cannot(making)?;
        let len = guest.memory << 20;
        file.set_len(len).cannot(making)?;
        if guest.touched {
            let mut chunk = vec![0; CHUNK];
            chunk.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
            for at in (0..len).step_by(CHUNK) {
                file.write_all_at(&chunk, at).cannot(making)?;
            }
        }
        let code = guest::instructions(Task::Stay);
        file.write_all_at(&code, LOAD_AT.into()).cannot(making)?;
        Ok(files)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            let folder = self.folder.display();
            eprintln!("mayfly-measure: cannot remove {folder}: {error}.");
        }
    }
}

impl Files {
    /// The folder of both.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The state file, by the name that `--snapshot` looks for.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The memory file, likewise.
    pub fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    /// MiB that the memory file takes.
    pub fn allocated(&self) -> Result<f64> {
        let path = self.memory();
        let metadata = fs::metadata(&path).cannot(|| format!("read {}", path.display()))?;
        Ok(metadata.blocks() as f64 / 2048.0)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What stays goes with the folder of all.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
