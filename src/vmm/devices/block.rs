//! Disks, as control handles them.

use std::fs::File;
use std::io;

use super::limits::{limiter, limiter_update};
use super::{Kind, check_poll_us};
use crate::error::{ActionError, Context};
use crate::files::open::open_disk;
use crate::seccomp::Category;
use crate::sys::passed::Passed;
use crate::virtio::block::{self, BlockState, Disk};
use crate::wire::config::{CacheType, Drive, DriveUpdate, IoEngine, RateLimiterConfig};

/// Disks.
#[derive(Debug)]
pub struct Block;

impl Kind for Block {
    type Config = Drive;
    type Opened = File;
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
        let root = others.find(|other| other.is_root_device && other.drive_id != *id);
        if let Some(root) = root.filter(|_| drive.is_root_device) {
            return Err(ActionError(format!(
                "Drive config error: `{id}` cannot be the root device: A root block device already \
                 exists: `{}`",
                root.drive_id
            )));
        }
        drive.is_read_only = Some(drive.read_only());
        drive.io_engine = Some(drive.io_engine.unwrap_or(IoEngine::Sync));
        drive.rate_limiter = RateLimiterConfig::in_force(drive.rate_limiter);
        Ok(())
    }

    fn poll_us(drive: &Drive) -> Option<u16> {
        drive.poll_us
    }

    fn is_first(drive: &Drive) -> bool {
        drive.is_root_device
    }

    fn open(
        drive: &mut Drive,
        _: &mut Vec<File>,
        passed: &mut Passed,
    ) -> Result<File, ActionError> {
        open_disk(&drive.path_on_host, drive.read_only(), passed)
    }

    fn copy(file: &File) -> io::Result<File> {
        file.try_clone()
    }

    fn build(
        drive: &Drive,
        file: File,
        state: &BlockState,
        elapsed: u64,
    ) -> io::Result<block::Block> {
        let disk = Disk::new(file, drive.read_only()).map_err(io::Error::other)?;
        block::Block::new(
            disk,
            &drive.drive_id,
            drive.cache_type == CacheType::Writeback,
            limiter(drive.rate_limiter),
            state,
            elapsed,
        )
    }

    fn check_update(drive: Option<&Drive>, update: &DriveUpdate) -> Result<(), ActionError> {
        let id = &update.drive_id;
        if drive.is_none() {
            return Err(ActionError(format!(
                "Drive config error: Unable to patch the block device: Device not found: `{id}`"
            )));
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
        update.path_on_host.is_some()
    }

    fn open_update(
        drive: &Drive,
        update: &DriveUpdate,
        passed: &mut Passed,
    ) -> Result<block::Update, ActionError> {
        let disk = match &update.path_on_host {
            Some(source) => {
                let file = open_disk(source, drive.read_only(), passed)?;
                Some(Box::new(Disk::new(file, drive.read_only()).bare()?))
            }
            None => None,
        };
        let limits = limiter_update(update.rate_limiter);
        Ok(block::Update { disk, limits })
    }

    fn note_update(drive: &mut Drive, update: DriveUpdate) {
        if let Some(source) = update.path_on_host {
            drive.path_on_host = source;
        }
        drive.rate_limiter = RateLimiterConfig::patched(drive.rate_limiter, update.rate_limiter);
    }
}
