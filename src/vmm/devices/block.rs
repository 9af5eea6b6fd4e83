//! Disks, as control handles them.

use std::fs::File;
use std::io;

use super::limits::{change_number, limiter, limiter_update};
use super::{Kind, check_poll_us, check_queues};
use crate::error::{ActionError, Context};
use crate::files::open::{OpenOverlay, open_direct_disk, open_disk};
use crate::overlay::Durability;
use crate::seccomp::Category;
use crate::sys::passed::Passed;
use crate::virtio::PerWorker;
use crate::virtio::block::{self, BlockState, Disk};
use crate::wire::config::{
    CacheType, Drive, DriveOverlay, DriveUpdate, IoEngine, RateLimiterConfig, Source,
};

/// Disks.
#[derive(Debug)]
pub struct Block;

/// The files of a disk.
#[derive(Debug)]
pub struct Opened {
    /// Of the drive with this id.
    id: String,
    /// The image, or the base of the overlay.
    file: File,
    /// What takes the guest's writes, where the image does not.
    overlay: Option<OpenOverlay>,
}

impl Opened {
    fn try_clone(&self) -> io::Result<Self> {
        let overlay = self.overlay.as_ref().map(OpenOverlay::try_clone);
        Ok(Opened {
            id: self.id.clone(),
            file: self.file.try_clone()?,
            overlay: overlay.transpose()?,
        })
    }
}

/// Opens `source` as `drive` uses its disk: past the page cache or not.
fn open_data(
    drive: &Drive,
    source: &Source,
    read_only: bool,
    passed: &mut Passed,
) -> Result<File, ActionError> {
    match drive.is_direct() {
        true => open_direct_disk(source, read_only, passed),
        false => open_disk(source, read_only, passed),
    }
}

/// The disk in `file` for each queue of `drive`.
fn disks(drive: &Drive, file: File) -> io::Result<PerWorker<Disk>> {
    let mut files = PerWorker::from(file);
    for _ in 1..Block::queues(drive) {
        files.others.push(files.first.try_clone()?);
    }
    files.try_map(|file| {
        let disk = Disk::new(file, drive.read_only()).map_err(io::Error::other)?;
        Ok(match drive.is_direct() {
            true => disk.past_cache(),
            false => disk,
        })
    })
}

impl Kind for Block {
    type Config = Drive;
    type Opened = Opened;
    type Device = block::Block;
    const CATEGORY: Category = Category::Block;
    const THREAD: &'static str = "block";

    fn check<'a>(
        drive: &mut Drive,
        mut others: impl Iterator<Item = &'a Drive>,
    ) -> Result<(), ActionError> {
        let id = &drive.drive_id;
        if drive.socket.is_some() {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has a `socket`: vhost-user devices are out of scope"
            )));
        }
        check_poll_us("Drive config error: ", id, drive.poll_us)?;
        check_queues("Drive config error: ", id, drive.queues)?;
        if drive.overlay.is_some() && Self::queues(drive) > 1 {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has an overlay, whose map is kept by one thread, and {} queues: leave \
                 out `queues` or the overlay",
                Self::queues(drive)
            )));
        }
        let root = others.find(|other| other.is_root_device && other.drive_id != *id);
        if let Some(root) = root.filter(|_| drive.is_root_device) {
            return Err(ActionError(format!(
                "Drive config error: `{id}` cannot be the root device: A root block device already \
                 exists: `{}`",
                root.drive_id
            )));
        }
        if drive.overlay.is_some() && drive.read_only() {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has an overlay, which takes what the guest writes, and is read-only: \
                 leave one of them out"
            )));
        }
        if drive.overlay.is_some() && drive.is_direct() {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has an overlay, which needs the host's page cache, and `cache` none: leave \
                 one of them out"
            )));
        }
        drive.is_read_only = Some(drive.read_only());
        drive.io_engine = Some(drive.io_engine.unwrap_or(IoEngine::Sync));
        drive.rate_limiter = RateLimiterConfig::in_force(drive.rate_limiter);
        Ok(())
    }

    fn queues(drive: &Drive) -> usize {
        drive.queues.unwrap_or(1).into()
    }

    fn poll_us(drive: &Drive) -> Option<u16> {
        drive.poll_us
    }

    /// The map of an overlay reaches its file at a flush.
    fn is_unsettled(drive: &Drive) -> bool {
        matches!(drive.overlay, Some(DriveOverlay::File { .. })) && drive.has_flush()
    }

    fn is_first(drive: &Drive) -> bool {
        drive.is_root_device
    }

    /// An overlay is locked as long as it is open: a new configuration of its drive takes it over.
    fn reopen(opened: &Opened) -> io::Result<Option<Opened>> {
        match opened.overlay {
            Some(_) => opened.try_clone().map(Some),
            None => Ok(None),
        }
    }

    fn open(
        drive: &mut Drive,
        before: &mut Vec<Opened>,
        passed: &mut Passed,
    ) -> Result<Opened, ActionError> {
        let read_only = drive.read_only() || drive.overlay.is_some();
        let file = open_data(drive, &drive.path_on_host, read_only, passed)?;
        let base = (&drive.path_on_host, &file);
        let overlay = match &drive.overlay {
            None => None,
            Some(DriveOverlay::Memory { .. }) => Some(OpenOverlay::memory(base)?),
            Some(DriveOverlay::File { path_on_host }) => {
                let own = before.iter().find(|other| other.id == drive.drive_id);
                let own = own.and_then(|other| other.overlay.as_ref());
                let opened = OpenOverlay::file(path_on_host, base, own, passed)?;
                // A lock does not tell: two descriptors may be one that was opened once.
                let others = before.iter().filter(|other| other.id != drive.drive_id);
                let mut others =
                    others.filter_map(|other| Some((&other.id, other.overlay.as_ref()?)));
                if let Some((id, _)) = others.find(|(_, other)| other.is_in_file_of(&opened)) {
                    return Err(ActionError(format!(
                        "Drive config error: the overlay `{path_on_host}` of `{}` is that of `{id}` as well. \
                         Name another",
                        drive.drive_id
                    )));
                }
                Some(opened)
            }
        };
        Ok(Opened {
            id: drive.drive_id.clone(),
            file,
            overlay,
        })
    }

    fn copy(opened: &Opened) -> io::Result<Opened> {
        opened.try_clone()
    }

    fn build(
        drive: &Drive,
        opened: Opened,
        states: &PerWorker<BlockState>,
        elapsed: u64,
    ) -> io::Result<PerWorker<block::Block>> {
        let Opened { file, overlay, .. } = opened;
        let disks = match overlay {
            None => disks(drive, file)?,
            Some(open) => {
                let durability = match (&drive.overlay, drive.cache_type) {
                    (Some(DriveOverlay::Memory { .. }), _) => Durability::Volatile,
                    (_, CacheType::Unsafe) => Durability::Immediate,
                    (_, CacheType::Writeback) => Durability::Ordered,
                };
                let overlay = open.load(durability).map_err(|refusal| {
                    io::Error::other(format!("the overlay of `{}` {refusal}", drive.drive_id))
                })?;
                let disk = Disk::with_overlay(file, overlay);
                disk.map_err(io::Error::other)?.into()
            }
        };
        block::Block::for_queues(
            disks,
            &drive.drive_id,
            drive.has_flush(),
            limiter(drive.rate_limiter),
            states,
            elapsed,
        )
    }

    fn check_update(drive: Option<&Drive>, update: &DriveUpdate) -> Result<(), ActionError> {
        let id = &update.drive_id;
        let Some(drive) = drive else {
            return Err(ActionError(format!(
                "Drive config error: Unable to patch the block device: Device not found: `{id}`"
            )));
        };
        if update.reset_overlay && drive.overlay.is_none() {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has no overlay that `reset_overlay` could reset"
            )));
        }
        if update.path_on_host.is_some() && drive.overlay.is_some() {
            return Err(ActionError(format!(
                "Drive config error: `{id}` has an overlay, which belongs to the disk that it was made over: \
                 `path_on_host` of such a drive cannot be changed"
            )));
        }
        if update.reset_overlay && update.rate_limiter.is_some() {
            return Err(ActionError(format!(
                "Drive config error: `reset_overlay` of `{id}` goes without a `rate_limiter`: make two \
                 requests of it"
            )));
        }
        if update.reset_overlay {
            return Ok(());
        }
        if update.path_on_host.is_none() && update.rate_limiter.is_none() {
            // "Running method expected different backend" is how Firecracker says it.
            return Err(ActionError(format!(
                "Drive config error: Running method expected different backend. The update of \
                 `{id}` has neither `path_on_host` nor `rate_limiter`"
            )));
        }
        Ok(())
    }

    fn update_opens(update: &DriveUpdate) -> bool {
        // The space that an earlier reset gives back is waited for on the files thread.
        update.path_on_host.is_some() || update.reset_overlay
    }

    fn open_update(
        drive: &Drive,
        update: &DriveUpdate,
        passed: &mut Passed,
    ) -> Result<PerWorker<block::Update>, ActionError> {
        let disks = match &update.path_on_host {
            Some(source) => {
                let file = open_data(drive, source, drive.read_only(), passed)?;
                disks(drive, file).bare()?.map(Some)
            }
            None => PerWorker::try_make(Self::queues(drive), |_| Ok::<_, ActionError>(None))?,
        };
        let number = change_number();
        Ok(disks.map(|disk| block::Update {
            disk: disk.map(Box::new),
            // Of a drive with an overlay, there is one.
            reset: update.reset_overlay.then(Box::<block::Reset>::default),
            limits: limiter_update(update.rate_limiter),
            number,
        }))
    }

    fn note_update(drive: &mut Drive, update: DriveUpdate) {
        if let Some(source) = update.path_on_host {
            drive.path_on_host = source;
        }
        drive.rate_limiter = RateLimiterConfig::patched(drive.rate_limiter, update.rate_limiter);
    }
}
