//! From what was asked for to devices and their updates: the one place that knows both the
//! configuration's words and the devices' own.

use std::io;

use super::action::ActionError;
use super::opened::{Opened, open_disk};
use crate::config::{
    CacheType, Draft, Drive, DriveUpdate, NetworkInterface, NetworkUpdate, RateLimiterConfig,
    TokenBucketConfig,
};
use crate::rate_limiter::{BucketUpdate, RateLimiter, RateLimiterUpdate, TokenBucket};
use crate::sys::handed::Handed;
use crate::virtio::block::{self, Block, Disk};
use crate::virtio::net::{self, Net};

/// The device of `drive`, on a copy of the descriptor that was opened for it.
pub fn block(drive: &Drive, opened: &Opened) -> io::Result<Block> {
    let file = opened
        .disk(&drive.drive_id)
        .ok_or_else(|| io::Error::other("its file was not opened"))?;
    let disk = Disk::new(file.try_clone()?, drive.read_only()).map_err(io::Error::other)?;
    Block::new(
        disk,
        &drive.drive_id,
        drive.cache_type == CacheType::Writeback,
        limiter(drive.rate_limiter),
    )
}

/// The device of `network`, on a copy of the descriptor that was opened for it.
pub fn net(network: &NetworkInterface, opened: &Opened) -> io::Result<Net> {
    let tap = opened
        .tap(&network.iface_id)
        .ok_or_else(|| io::Error::other("its tap was not opened"))?;
    Net::new(
        tap.try_clone()?,
        network.guest_mac.map(|mac| mac.0),
        network.mtu,
        limiter(network.rx_rate_limiter),
        limiter(network.tx_rate_limiter),
    )
}

/// What `update` means to the device of its drive; opens the new image if there is one.
pub fn block_update(
    draft: &Draft,
    update: &DriveUpdate,
    handed: &mut Handed,
) -> Result<block::Update, ActionError> {
    let disk = match &update.path_on_host {
        Some(source) => {
            let read_only = draft
                .drives()
                .iter()
                .find(|drive| drive.drive_id == update.drive_id)
                .is_none_or(Drive::read_only);
            let file = open_disk(source, read_only, handed)?;
            Some(Disk::new(file, read_only).map_err(|e| ActionError::of(&e))?)
        }
        None => None,
    };
    Ok(block::Update {
        disk,
        limits: limiter_update(update.rate_limiter),
    })
}

/// What `update` means to the device of its interface.
pub fn net_update(update: &NetworkUpdate) -> net::Update {
    net::Update {
        rx_limits: limiter_update(update.rx_rate_limiter),
        tx_limits: limiter_update(update.tx_rate_limiter),
    }
}

fn limiter(config: Option<RateLimiterConfig>) -> RateLimiter {
    let config = config.unwrap_or_default();
    RateLimiter::new(
        config.bandwidth.and_then(bucket),
        config.ops.and_then(bucket),
    )
}

fn limiter_update(config: Option<RateLimiterConfig>) -> RateLimiterUpdate {
    // A bucket that is not given stays; one of nothing goes.
    let update = |given: Option<TokenBucketConfig>| {
        given.map_or(BucketUpdate::Keep, |config| {
            BucketUpdate::Replace(bucket(config))
        })
    };
    let config = config.unwrap_or_default();
    RateLimiterUpdate {
        bandwidth: update(config.bandwidth),
        ops: update(config.ops),
    }
}

/// The bucket that `config` asks for, if it is one.
pub fn bucket(config: TokenBucketConfig) -> Option<TokenBucket> {
    TokenBucket::new(
        config.size,
        config.one_time_burst.unwrap_or(0),
        config.refill_time,
    )
}
