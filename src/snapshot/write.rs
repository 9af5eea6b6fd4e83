//! Writing a state file and a memory image so that what is in place is the old pair or the new one.
//!
//! At paths, in this order:
//! 1. both temporary files are made and locked; what a killed create left is repaired or removed;
//! 2. the memory image is written and synced, then the state file;
//! 3. the memory image is put in place by exchanging it with the old one, which then has the temporary
//!    name: a reader of the old state file finds it there by its id
//!    ([`memory_of`](super::memory_of));
//! 4. the state file is renamed into place: from here on the pair is the new one;
//! 5. the old image is removed.
//!
//! An error before step 4 undoes everything. On a file system that cannot exchange (NFS, CIFS, many of FUSE), the old
//! image gets a second name before the new one is renamed over it, `old_name`, or is renamed to that where there are no
//! hard links (FAT): a reader of the old state file looks there too.
//!
//! In descriptors, the state file's fixed header is made zero before anything else is written, and is
//! written last: until then the state file is refused as unfinished.

use std::error::Error;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Display, Path};
use std::time::Duration;

use super::header::{FIXED, MemoryImage};
use super::place::{Place, Target, check_passed, old_name};
use super::read::{check_memory, read};
use super::write_error::{WriteError, has_exchange, has_links, step};
use crate::steps::{commits, may_take, may_wait};
use crate::sys::folder::{self, Folder};

/// Bytes that a file system that answers syncs in a second.
const SLOWEST_SYNC: u64 = 8 << 20;

/// Where the file is that another one takes the place of.
#[derive(Clone, Copy, PartialEq)]
enum Old {
    /// In place, or there is none, or it is not to be touched any more.
    InPlace,
    /// At the temporary name.
    Partial,
    /// At [`old_name`], and in place as well until that is taken.
    Linked,
    /// At [`old_name`].
    Aside,
}

/// One of the two files, from its beginning to its place.
enum Output {
    At {
        place: Place,
        file: File,
        is_placed: bool,
        old: Old,
    },
    In {
        file: File,
        name: String,
    },
}

impl Output {
    fn file(&self) -> &File {
        match self {
            Output::At { file, .. } | Output::In { file, .. } => file,
        }
    }

    fn error(&self, what: &'static str, cause: io::Error) -> WriteError {
        match self {
            Output::At { place, .. } => place.error(what, cause),
            Output::In { name, .. } => WriteError::io(what, Path::new(name), cause),
        }
    }

    fn name(&self) -> Display<'_> {
        match self {
            Output::At { place, .. } => place.path.display(),
            Output::In { name, .. } => Path::new(name).display(),
        }
    }

    fn sync(&self) -> Result<(), WriteError> {
        step();
        let synced = self.file().sync_all();
        synced.map_err(|cause| self.error("sync", cause))
    }

    /// Puts a whole file in place, so that the old one can still be found and put back.
    fn exchange(&mut self) -> Result<(), WriteError> {
        let Output::At {
            place,
            is_placed,
            old,
            ..
        } = self
        else {
            return Ok(());
        };
        let error = |cause| place.error("put the new memory file in place at", cause);
        let (folder, partial, name) = (&place.folder, &place.partial, &place.name);
        if place.old.is_some() {
            step();
            if has_exchange() && folder.exchange(partial, name).map_err(error)? {
                *old = Old::Partial;
            } else if has_links() && folder.link(name, &old_name(name)).map_err(error)? {
                *old = Old::Linked;
            } else {
                folder.rename(name, &old_name(name)).map_err(error)?;
                *old = Old::Aside;
            }
        }
        if *old != Old::Partial {
            step();
            folder.rename(partial, name).map_err(error)?;
        }
        *is_placed = true;
        step();
        folder.sync().map_err(error)
    }

    /// Puts the old file, or none, back in place.
    fn undo(&mut self) {
        let Output::At {
            place,
            is_placed,
            old,
            ..
        } = self
        else {
            return;
        };
        let (folder, partial, name) = (&place.folder, &place.partial, &place.name);
        // A failure here leaves what a kill would leave; the first error is the one to tell.
        let undone = match (*old, *is_placed) {
            (Old::InPlace, true) => folder.rename(name, partial),
            (Old::Partial, _) => folder.exchange(name, partial).map(drop),
            (Old::Aside, _) | (Old::Linked, true) => folder.rename(&old_name(name), name),
            (Old::Linked, false) => folder.remove(&old_name(name)),
            (Old::InPlace, false) => return,
        };
        if undone.is_ok() {
            *is_placed = false;
        }
        *old = Old::InPlace;
    }

    /// Renames a whole file into place.
    fn rename(&mut self) -> Result<(), WriteError> {
        let Output::At {
            place, is_placed, ..
        } = self
        else {
            return Ok(());
        };
        let error = |cause| place.error("put the new state file in place at", cause);
        step();
        let renamed = place.folder.rename(&place.partial, &place.name);
        renamed.map_err(error)?;
        *is_placed = true;
        Ok(())
    }

    fn folder(&self) -> Option<&Folder> {
        match self {
            Output::At { place, .. } => Some(&place.folder),
            Output::In { .. } => None,
        }
    }
}

impl Drop for Output {
    /// Removes what was not finished or the old file, and lets go of the lock.
    fn drop(&mut self) {
        let Output::At {
            place,
            file,
            is_placed,
            old,
        } = self
        else {
            return;
        };
        // What cannot be removed, the next create removes.
        if *old == Old::Partial || !*is_placed {
            step();
            let _ = place.folder.remove(&place.partial);
        }
        if *is_placed && matches!(old, Old::Linked | Old::Aside) {
            step();
            let _ = place.folder.remove(&old_name(&place.name));
        }
        folder::unlock(file);
    }
}

/// Where something goes, as far as it is known before anything is changed.
enum Site {
    Path(Place),
    File(File, String),
}

impl Site {
    fn of(target: Target) -> Result<Self, WriteError> {
        match target {
            Target::Path(path) => Place::find(&path).map(Site::Path),
            Target::File { file, name } => {
                check_passed(&file, &name)?;
                Ok(Site::File(file, name))
            }
        }
    }

    /// What is there already.
    fn existing(&self) -> Option<&File> {
        match self {
            Site::Path(place) => place.old.as_ref(),
            Site::File(file, _) => Some(file),
        }
    }

    fn error(&self, what: &'static str, cause: io::Error) -> WriteError {
        match self {
            Site::Path(place) => place.error(what, cause),
            Site::File(_, name) => WriteError::io(what, Path::new(name), cause),
        }
    }

    fn begin(self) -> Result<Output, WriteError> {
        match self {
            Site::Path(place) => Ok(Output::At {
                file: place.begin()?,
                place,
                is_placed: false,
                old: Old::InPlace,
            }),
            Site::File(file, name) => Ok(Output::In { file, name }),
        }
    }

    /// Removes what a killed create left at the temporary name.
    fn clear(&self) -> Result<(), WriteError> {
        if let Site::Path(place) = self
            && let Some(_locked) = place.leftover(&place.partial)?
        {
            remove_leftover(place, &place.partial)?;
        }
        Ok(())
    }
}

fn remove_leftover(place: &Place, hidden: &OsStr) -> Result<(), WriteError> {
    step();
    let removed = place.folder.remove(hidden);
    removed.map_err(|cause| place.error("remove the temporary file beside", cause))
}

fn check_differ(state: &Site, memory: &Site) -> Result<(), WriteError> {
    let error = |cause| memory.error("look at", cause);
    let same = match (state.existing(), memory.existing(), state, memory) {
        (Some(one), Some(other), ..) => {
            let one = one.metadata().map_err(error)?;
            let other = other.metadata().map_err(error)?;
            (one.dev(), one.ino()) == (other.dev(), other.ino())
        }
        (None, None, Site::Path(one), Site::Path(other)) => one.is_same(other).map_err(error)?,
        _ => false,
    };
    match same {
        true => Err(WriteError::Same),
        false => Ok(()),
    }
}

/// Puts the memory image back that the state file belongs to, if a killed create had exchanged it
/// already; else removes what that left.
fn repair(state: &Site, memory: &mut Site) -> Result<(), WriteError> {
    let old_state = state.existing().and_then(|file| read(file).ok());
    let Site::Path(place) = memory else {
        return Ok(());
    };
    for hidden in [place.partial.clone(), old_name(&place.name)] {
        let Some(left) = place.leftover(&hidden)? else {
            continue;
        };
        if let Some((header, _)) = &old_state
            && check_memory(header, &left).is_ok()
            && (place.old.as_ref()).is_none_or(|image| check_memory(header, image).is_err())
        {
            let error = |cause| place.error("put the old memory file back in place at", cause);
            step();
            place.folder.rename(&hidden, &place.name).map_err(error)?;
            place.old = Some(left);
        } else {
            remove_leftover(place, &hidden)?;
        }
    }
    Ok(())
}

/// Writes a memory image, with `fill`, and then the state file that `encode` puts together for it, and
/// puts both in place. `fill` gets an empty file, or a passed one as it is, and leaves it with the
/// length and the id that it returns.
///
/// # Errors
/// Nothing is changed then, except in what was passed as a descriptor.
pub fn write_pair<M, S>(
    state: Target,
    memory: Target,
    fill: impl FnOnce(&File) -> Result<MemoryImage, M>,
    encode: impl FnOnce(MemoryImage) -> Result<Vec<u8>, S>,
) -> Result<(), WriteError>
where
    M: Into<Box<dyn Error + Send + Sync>>,
    S: Into<Box<dyn Error + Send + Sync>>,
{
    may_wait("looking for the places of the snapshot's files");
    let state = Site::of(state)?;
    let mut memory = Site::of(memory)?;
    check_differ(&state, &memory)?;
    state.clear()?;
    let mut state = StateOutput::begin(state, |state| repair(state, &mut memory))?;
    if let Site::Path(place) = &memory {
        place.lock_old()?;
    }
    let mut memory = memory.begin()?;
    may_wait(format_args!(
        "writing the snapshot's memory file `{}`",
        memory.name()
    ));
    step();
    let image = fill(memory.file()).map_err(|cause| WriteError::Memory(cause.into()))?;
    may_wait(format_args!(
        "syncing the snapshot's memory file `{}`",
        memory.name()
    ));
    may_take(Duration::from_secs(image.len / SLOWEST_SYNC));
    memory.sync()?;
    let bytes = encode(image).map_err(|cause| WriteError::State(cause.into()))?;
    may_wait("writing the snapshot's state file");
    state.write(&bytes)?;
    may_wait("putting the snapshot's files in place");
    if !commits() {
        return Err(WriteError::GivenUp);
    }
    if let Err(error) = memory.exchange().and_then(|()| state.commit(&bytes)) {
        if !state.is_committed() {
            memory.undo();
        }
        return Err(error);
    }
    Ok(())
}

/// Writes a state file alone: its memory image is in place elsewhere, or goes there with `pass`, which is called when
/// the state file is written and not yet in place.
///
/// A process that gets the image so can open the state file when the create has been answered, and not before. If putting it in
/// place fails after that, the answer is an error and the image belongs to no state file: its id tells.
///
/// # Errors
/// Nothing is changed then, except in what was passed as a descriptor.
pub fn write_state(
    state: Target,
    bytes: &[u8],
    pass: impl FnOnce() -> io::Result<()>,
) -> Result<(), WriteError> {
    may_wait("writing the snapshot's state file");
    let state = Site::of(state)?;
    state.clear()?;
    let mut state = StateOutput::begin(state, |_| Ok(()))?;
    state.write(bytes)?;
    if !commits() {
        return Err(WriteError::GivenUp);
    }
    pass().map_err(WriteError::Pass)?;
    state.commit(bytes)
}

/// The state file on its way.
struct StateOutput(Output);

impl StateOutput {
    /// Begins it. Before what is in place is overwritten, `before` looks at it.
    fn begin(
        site: Site,
        before: impl FnOnce(&Site) -> Result<(), WriteError>,
    ) -> Result<Self, WriteError> {
        before(&site)?;
        let output = site.begin()?;
        if let Output::In { file, .. } = &output {
            step();
            let zeroed = file.write_all_at(&[0; FIXED], 0);
            zeroed.map_err(|cause| output.error("write", cause))?;
            output.sync()?;
        }
        Ok(StateOutput(output))
    }

    fn write(&self, bytes: &[u8]) -> Result<(), WriteError> {
        let error = |cause| self.0.error("write", cause);
        let file = self.0.file();
        step();
        match &self.0 {
            Output::At { .. } => file.write_all_at(bytes, 0).map_err(error)?,
            Output::In { .. } => {
                file.set_len(bytes.len() as u64).map_err(error)?;
                step();
                let body = bytes.get(FIXED..).unwrap_or_default();
                file.write_all_at(body, FIXED as u64).map_err(error)?;
            }
        }
        self.0.sync()
    }

    /// From here on it counts.
    fn commit(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let output = &mut self.0;
        if let Output::In { file, .. } = output {
            let header = bytes.get(..FIXED).unwrap_or_default();
            step();
            let written = file.write_all_at(header, 0);
            written.map_err(|cause| output.error("write", cause))?;
            return output.sync();
        }
        output.rename()?;
        step();
        let synced = output.folder().map_or(Ok(()), Folder::sync);
        synced.map_err(|cause| output.error("sync the folder of", cause))
    }

    fn is_committed(&self) -> bool {
        match &self.0 {
            Output::At { is_placed, .. } => *is_placed,
            Output::In { .. } => false,
        }
    }
}
