//! A snapshot whose files are open.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use mayfly::snapshot::{
    Header, MEMORY_NAME, RawState, Refusal, STATE_NAME, memory_of, open_regular, read,
};

/// Why nothing came of it.
#[derive(Debug)]
pub struct Failure(pub String);

impl Failure {
    /// "The state file `x` is truncated ..."
    pub fn of(what: &str, path: &Path, refusal: &Refusal) -> Self {
        Failure(format!("The {what} `{}` {refusal}", path.display()))
    }

    /// "Reading the memory file `x` failed: ..."
    pub fn io(doing: &str, path: &Path, cause: &dyn fmt::Display) -> Self {
        Failure(format!("{doing} `{}` failed: {cause}", path.display()))
    }
}

/// Where the files of a snapshot are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The state file.
    pub state: PathBuf,
    /// The memory file.
    pub memory: PathBuf,
}

impl Paths {
    /// Two files.
    pub fn new(state: &OsStr, memory: &OsStr) -> Self {
        Paths {
            state: state.into(),
            memory: memory.into(),
        }
    }

    /// The files of `folder`, by the names that `mayfly --snapshot` looks for.
    pub fn in_folder(folder: &Path) -> Self {
        Paths {
            state: folder.join(STATE_NAME),
            memory: folder.join(MEMORY_NAME),
        }
    }
}

/// Bytes of memory that no machine has more of: there is a bit in this process's memory for each page.
const MEMORY_MAX: u64 = 16 << 40;

/// A snapshot whose files belong together.
pub struct Opened {
    /// Where they are.
    pub paths: Paths,
    /// What the state file says of it.
    pub header: Header,
    /// The machine.
    pub state: RawState,
    /// Guest memory.
    pub memory: File,
}

impl Opened {
    /// Opens both files; the content of the memory file is not looked at.
    pub fn at(paths: &Paths) -> Result<Self, Failure> {
        let (header, state) = read_state(&paths.state)?;
        let len = header.memory.len;
        if len > MEMORY_MAX {
            let name = paths.state.display();
            return Err(Failure(format!(
                "The state file `{name}` says that its memory has {len} bytes, which no machine has. \
                 Take the snapshot again"
            )));
        }
        let refused = |refusal| Failure::of("memory file", &paths.memory, &refusal);
        let memory = memory_of(&header, open_regular(&paths.memory), Some(&paths.memory));
        let memory = memory.map_err(refused)?;
        Ok(Opened {
            paths: paths.clone(),
            header,
            state,
            memory,
        })
    }
}

/// Reads a state file.
pub fn read_state(path: &Path) -> Result<(Header, RawState), Failure> {
    let opened = open_regular(path).and_then(|file| read(&file));
    opened.map_err(|refusal| Failure::of("state file", path, &refusal))
}
