//! The working set of a restored guest: the pages that it used from the restore to a mark, those that
//! it wrote apart from those that it only read. The next restore of the same snapshot brings them in
//! before the guest asks for them.
//!
//! Pages that were written get copies of their own, which saves the guest a fault and a copy for
//! each. Pages that were read are only read into the page cache: to map them would cost more than it
//! saves. [`Contents::working_set`] runs on any thread while the guest runs, [`Prefetch::run`] on a
//! thread beside the making of the machine.
//!
//! Kept as JSON beside the snapshot. What is read of it is distrusted: it can at most bring in pages
//! that are not needed.
//!
//! Many guests may have one file. The first that has something to record does; its first byte is zero until all of
//! it is on the disk, and what begins so is taken for empty (`crate::snapshot`'s `is_unrecorded`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::image::{Contents, ID_LEN};
use super::mapping::{Advice, advise};
use super::page_set::PageSet;
use super::{PAGE, Ram};
use crate::steps::{may_take, may_wait};
use crate::sys::folder;
use crate::sys::pagemap::{self, Kind};

/// The largest file that is read.
const FILE_MAX: u64 = 64 << 20;

/// How much longer than other steps a sync may take.
const SLOW_SYNC: Duration = Duration::from_secs(25);

/// The version of the file's format.
const VERSION: u32 = 1;

/// Which pages of an image were used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Written, whether read or not.
    pub written: PageSet,
    /// Read only. The host maps the neighbours of a page that is read along with it: those count.
    pub read: PageSet,
}

/// What is in the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    /// The id of the snapshot.
    #[serde(with = "crate::state::hex")]
    id: [u8; ID_LEN],
    /// Runs of pages: the first of each, and how many.
    written: Vec<(u64, u64)>,
    read: Vec<(u64, u64)>,
}

impl Contents {
    /// The pages that this process has used since its memory was mapped from an image.
    ///
    /// # Errors
    /// The host's; where /proc/self/pagemap is neither passed nor there, that it is not found.
    pub fn working_set(&self) -> io::Result<WorkingSet> {
        let opened;
        let pagemap = match &self.pagemap {
            Some(passed) => passed.as_ref(),
            None => {
                opened = File::open("/proc/self/pagemap")?;
                &opened
            }
        };
        let find = |kind| {
            let mut pages = PageSet::new(self.len() / PAGE);
            for (piece, host) in self.pieces() {
                let addresses = host..host.saturating_add(piece.len as u64);
                let mut add = |found: Range<u64>| {
                    let page = |address: u64| {
                        let inside = address.saturating_sub(host);
                        inside.saturating_add(piece.offset) / PAGE
                    };
                    pages.insert(page(found.start)..page(found.end));
                };
                if pagemap::scan(pagemap, kind, addresses.clone(), &mut add).is_err() {
                    pagemap::read_entries(pagemap, kind, addresses, &mut add)?;
                }
            }
            Ok::<_, io::Error>(pages)
        };
        Ok(WorkingSet {
            written: find(Kind::Own)?,
            read: find(Kind::File)?,
        })
    }
}

impl WorkingSet {
    /// The file's content, for the snapshot `id`.
    ///
    /// # Errors
    /// None that is known of.
    pub fn encode(&self, id: [u8; ID_LEN]) -> io::Result<Vec<u8>> {
        let runs = |pages: &PageSet| {
            let runs = pages.runs();
            runs.map(|run| (run.start, run.end.saturating_sub(run.start)))
                .collect()
        };
        let stored = Stored {
            version: VERSION,
            id,
            written: runs(&self.written),
            read: runs(&self.read),
        };
        Ok(serde_json::to_vec(&stored)?)
    }

    /// Records it into `file`, for the snapshot `id`; false when another process has done so or is about to.
    ///
    /// # Errors
    /// The host's; the file is empty then, or counts as that.
    pub fn record(&self, file: &File, id: [u8; ID_LEN]) -> io::Result<bool> {
        let bytes = self.encode(id)?;
        // Where the file system has no locks, nothing is lost: two that record at once leave what one of them
        // has, or what no reader takes for a working set.
        if !folder::lock_where_possible(file, Duration::ZERO)? {
            return Ok(false);
        }
        let recorded = match WorkingSet::read(file, id, 0) {
            // Its readers may be at it.
            Ok(Some(_)) => Ok(false),
            _ => write(file, &bytes).map(|()| true),
        };
        if recorded.is_err() {
            // Else it begins with zero, and counts as empty all the same.
            let _ = file.set_len(0);
        }
        folder::unlock(file);
        recorded
    }

    /// Reads `file`, which is to be of the snapshot `id` with an image of `pages` pages; none where it is
    /// of another snapshot, or of another version.
    ///
    /// # Errors
    /// InvalidData for a file that is no working set; else the host's.
    pub fn read(file: &File, id: [u8; ID_LEN], pages: u64) -> io::Result<Option<WorkingSet>> {
        // Whatever its position: others may have passed the same descriptor.
        let len = file.metadata()?.len().min(FILE_MAX);
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, 0)?;
        let stored: Stored = serde_json::from_slice(&bytes)?;
        if stored.version != VERSION || stored.id != id {
            return Ok(None);
        }
        let set = |runs: &[(u64, u64)]| {
            let mut set = PageSet::new(pages);
            for (first, count) in runs {
                set.insert(*first..first.saturating_add(*count));
            }
            set
        };
        Ok(Some(WorkingSet {
            written: set(&stored.written),
            read: set(&stored.read),
        }))
    }
}

/// Writes `bytes` into `file`, the first byte when all others are on the disk.
fn write(file: &File, bytes: &[u8]) -> io::Result<()> {
    let (first, rest) = bytes.split_at_checked(1).unwrap_or_default();
    file.set_len(0)?;
    file.write_all_at(rest, 1)?;
    may_wait("syncing the working set");
    may_take(SLOW_SYNC);
    file.sync_all()?;
    file.write_all_at(first, 0)
}

/// The bringing in of a working set.
#[derive(Debug)]
pub struct Prefetch {
    ram: Ram,
    set: WorkingSet,
}

impl Prefetch {
    /// Of `set`, into `ram`, which is mapped from the image of the same snapshot.
    pub fn new(ram: &Ram, set: WorkingSet) -> Prefetch {
        Prefetch {
            ram: ram.clone(),
            set,
        }
    }

    /// Brings the pages in, those that were written first. What the host refuses the guest brings in
    /// itself, as it needs it.
    pub fn run(self) {
        self.each(&self.set.written, Advice::OwnPages);
        self.each(&self.set.read, Advice::ReadAhead);
    }

    fn each(&self, pages: &PageSet, advice: Advice) {
        let mut before: u64 = 0;
        for region in self.ram.iter() {
            let end = before.saturating_add(region.len());
            for run in pages.runs() {
                let start = run.start.saturating_mul(PAGE).max(before);
                let stop = run.end.saturating_mul(PAGE).min(end);
                if start >= stop {
                    continue;
                }
                let inside = start.saturating_sub(before);
                let address = region.start_addr().raw_value().saturating_add(inside);
                let len = stop.saturating_sub(start) as usize;
                if let Ok(part) = self.ram.get_slice(GuestAddress(address), len) {
                    advise(&part, advice);
                }
            }
            before = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory::{HIGH_RAM, MIB, Memory, Pages, Source};
    use crate::sys::folder::FlockOperation;

    const ID: [u8; ID_LEN] = [0xab; ID_LEN];

    /// An image in which page `n` begins with `n + 1`, for some pages.
    fn image(mib: u64, pages: impl Iterator<Item = u64>) -> Arc<Source> {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(mib * MIB).unwrap();
        for page in pages {
            file.write_all_at(&(page + 1).to_le_bytes(), page * PAGE)
                .unwrap();
        }
        Arc::new(Source::new(&file, "image").unwrap())
    }

    fn restored(image: &Arc<Source>, mib: u64) -> Memory {
        Memory::from_image(image, mib, Pages::Ordinary, false).unwrap()
    }

    fn word(memory: &Memory, address: u64) -> u64 {
        memory.ram().read_obj(GuestAddress(address)).unwrap()
    }

    fn set_of(memory: &Memory) -> WorkingSet {
        memory.contents(None).working_set().unwrap()
    }

    #[test]
    fn working_set_when_recorded_and_brought_in_spares_the_guest_its_faults() {
        let written = [5, 6, 700, 3073 * MIB / PAGE];
        let image = image(3076, written.into_iter().chain([9, 1000]));
        let first = restored(&image, 3076);
        assert_eq!(set_of(&first).written.count(), 0);
        assert_eq!(word(&first, 1000 * PAGE), 1001);
        first.write(5 * PAGE + 8, &[1; 4096]).unwrap();
        first.write(700 * PAGE, &[1; 8]).unwrap();
        first.write(HIGH_RAM + MIB, &[1; 8]).unwrap();
        let set = set_of(&first);
        let runs: Vec<_> = set.written.runs().collect();
        let high = 3073 * MIB / PAGE;
        assert_eq!(runs, [5..7, 700..701, high..high + 1]);
        assert!(set.read.contains(1000));
        assert!(
            set.written
                .runs()
                .flatten()
                .all(|page| !set.read.contains(page))
        );

        let file = TempFile::new().unwrap();
        file.as_file().write_all(&set.encode(ID).unwrap()).unwrap();
        let file = File::open(file.as_path()).unwrap();
        let read = WorkingSet::read(&file, ID, 3076 * MIB / PAGE);
        let read = read.unwrap().unwrap();
        assert_eq!(read, set);

        // The next guest has pages of its own before it writes them, with what is in the image.
        let second = restored(&image, 3076);
        Prefetch::new(second.ram(), read).run();
        assert_eq!(set_of(&second).written, set.written);
        for page in written {
            let address = match page * PAGE {
                offset if offset >= 3072 * MIB => offset - 3072 * MIB + HIGH_RAM,
                offset => offset,
            };
            assert_eq!(word(&second, address), page + 1);
        }
        second.write(5 * PAGE, &[2; 8]).unwrap();
        assert_eq!(word(&restored(&image, 3076), 5 * PAGE), 6);
    }

    fn some() -> WorkingSet {
        let mut written = PageSet::new(1024);
        written.insert(3..70);
        WorkingSet {
            written,
            read: PageSet::new(1024),
        }
    }

    #[test]
    fn record_when_another_process_records_or_has_recorded_leaves_the_file_alone() {
        let file = TempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            let opened = options.read(true).write(true).open(file.as_path());
            opened.unwrap()
        };
        let (one, other) = (open(), open());
        let how = FlockOperation::NonBlockingLockExclusive;
        assert!(folder::lock(&other, how, Duration::ZERO).unwrap());
        assert!(!some().record(&one, ID).unwrap());
        assert_eq!(file.as_file().metadata().unwrap().len(), 0);
        folder::unlock(&other);
        assert!(some().record(&one, ID).unwrap());
        // What is longer or shorter is not put over it.
        assert!(!WorkingSet::default().record(&other, ID).unwrap());
        assert_eq!(WorkingSet::read(&one, ID, 1024).unwrap(), Some(some()));
        // That of another snapshot is replaced, whatever its length.
        let another = [0xcd; ID_LEN];
        let none = WorkingSet {
            written: PageSet::new(1024),
            read: PageSet::new(1024),
        };
        assert!(none.record(&other, another).unwrap());
        assert_eq!(WorkingSet::read(&one, another, 1024).unwrap(), Some(none));
        assert!(some().record(&one, ID).unwrap());
        assert_eq!(WorkingSet::read(&other, ID, 1024).unwrap(), Some(some()));
    }

    #[test]
    fn record_when_it_fails_or_is_killed_leaves_a_file_that_counts_as_empty() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let is_unrecorded = crate::snapshot::is_unrecorded;
        let bytes = some().encode(ID).unwrap();
        // As on a disk that is full: it cannot grow.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("full", flags).unwrap());
        let other = some().encode([1; ID_LEN]).unwrap();
        file.write_all_at(&other, 0).unwrap();
        fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        some().record(&file, ID).unwrap_err();
        assert_eq!(file.metadata().unwrap().len(), 0);
        // At its end.
        let file = TempFile::new().unwrap().into_file();
        file.write_all_at(&bytes[1..], 1).unwrap();
        assert!(is_unrecorded(&file));
        WorkingSet::read(&file, ID, 1024).unwrap_err();
        assert!(some().record(&file, ID).unwrap() && !is_unrecorded(&file));
        assert_eq!(WorkingSet::read(&file, ID, 1024).unwrap(), Some(some()));
    }

    #[test]
    fn read_when_a_file_is_not_one_refuses_and_of_another_snapshot_is_none() {
        let good = String::from_utf8(WorkingSet::default().encode(ID).unwrap()).unwrap();
        let id = "ab".repeat(16);
        assert_eq!(
            good,
            format!("{{\"version\":1,\"id\":\"{id}\",\"written\":[],\"read\":[]}}")
        );
        let read = |text: &str| {
            let file = TempFile::new().unwrap();
            file.as_file().write_all(text.as_bytes()).unwrap();
            let file = File::open(file.as_path()).unwrap();
            WorkingSet::read(&file, ID, 1024)
        };
        let version = good.replace("\"version\":1", "\"version\":2");
        for other in [version, good.replace("abab", "abac")] {
            assert_eq!(read(&other).unwrap(), None, "{other}");
        }
        for bad in [
            String::new(),
            good[..good.len() - 1].to_owned(),
            good.replace("\"read\":[]", "\"read\":[[1]]"),
            good.replace("\"read\":[]", "\"read\":[[1,-1]]"),
        ] {
            let error = read(&bad).unwrap_err();
            assert!(
                matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ),
                "{bad}: {error:?}"
            );
        }
    }

    #[test]
    fn read_when_pages_lie_beyond_the_image_leaves_them_out() {
        let file = TempFile::new().unwrap();
        let id = "ab".repeat(16);
        let text = format!(
            "{{\"version\":1,\"id\":\"{id}\",\"written\":[[1000,{}],[5000,1]],\"read\":[[{},1]]}}",
            u64::MAX,
            u64::MAX
        );
        file.as_file().write_all(text.as_bytes()).unwrap();
        let file = File::open(file.as_path()).unwrap();
        let set = WorkingSet::read(&file, ID, 1024).unwrap().unwrap();
        assert_eq!((set.written.count(), set.read.count()), (24, 0));
        // And are harmless.
        let image = image(4, 0..1);
        Prefetch::new(restored(&image, 4).ram(), set).run();
    }
}
