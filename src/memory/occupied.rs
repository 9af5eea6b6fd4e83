//! Which pages of guest memory may hold something, found without reading them.
//!
//! Memory that only this process has is asked of the kernel by the best means there is:
//! PAGEMAP_SCAN, the entries of /proc/self/pagemap (before Linux 6.7), mincore (in a jail without
//! /proc, on a host without swap). Without any, every page counts. What is mapped from a file holds
//! the file's data besides. Too many pages are never a fault, since the writer of an image leaves
//! out what is zero; one too few would be lost.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::image::Contents;
use super::page_set::PageSet;
use super::{Base, PAGE, Piece};
use crate::sys::pagemap::{self, Kind};

/// How a process's own pages are found, best first.
#[derive(Clone, Debug)]
enum Method {
    Scan(Arc<File>),
    Entries(Arc<File>),
    Resident,
    All,
}

/// Finds the pages of one image.
#[derive(Debug)]
pub(super) struct Finder {
    method: Method,
}

impl Finder {
    /// By `pagemap`, which is this process's; else by what can be opened.
    pub(super) fn new(pagemap: Option<&Arc<File>>) -> Finder {
        let opened = || File::open("/proc/self/pagemap").ok().map(Arc::new);
        let method = match pagemap.cloned().or_else(opened) {
            Some(file) => Method::Scan(file),
            None => Method::Resident,
        };
        Finder { method }
    }

    /// One for each means.
    #[cfg(test)]
    pub(super) fn each() -> impl Iterator<Item = Finder> {
        let file = Arc::new(File::open("/proc/self/pagemap").unwrap());
        let entries = Method::Entries(Arc::clone(&file));
        [Method::Scan(file), entries, Method::Resident, Method::All]
            .into_iter()
            .map(|method| Finder { method })
    }

    /// Puts into `pages`, whose page 0 is at offset `window.start` in the image, what may hold
    /// something of the `window`, which lies in `piece`, mapped at `host`.
    pub(super) fn find(
        &mut self,
        contents: &Contents,
        (piece, host): (Piece, u64),
        window: Range<u64>,
        pages: &mut PageSet,
    ) {
        match &contents.base {
            Base::Image(source) => {
                let mut add = adder(window.start, pages);
                add_data(source.file(), window.clone(), 0, &mut add);
            }
            // Only the handler knows what has not been brought in.
            Base::Lazy => return adder(window.start, pages)(window),
            Base::Anonymous | Base::Shared(_) => {}
        }
        self.find_own(contents, (piece, host), window, pages);
    }

    /// The same without what is still as in the image that was mapped.
    pub(super) fn find_own(
        &mut self,
        contents: &Contents,
        (piece, host): (Piece, u64),
        window: Range<u64>,
        pages: &mut PageSet,
    ) {
        let mut add = adder(window.start, pages);
        if let Base::Shared(shared) = &contents.base {
            return add_data(shared.source.file(), window.clone(), 0, &mut add);
        }
        for part in &contents.parts {
            let end = part.offset.saturating_add(part.len).min(window.end);
            let start = part.offset.max(window.start);
            if start < end {
                let shift = part.in_file.wrapping_sub(part.offset);
                add_data(part.source.file(), start..end, shift, &mut add);
            }
        }
        let to_offset = |address: u64| address.wrapping_sub(host).wrapping_add(piece.offset);
        let to_address = |offset: u64| offset.wrapping_sub(piece.offset).wrapping_add(host);
        let addresses = to_address(window.start)..to_address(window.end);
        self.own_pages(addresses, |found| {
            add(to_offset(found.start)..to_offset(found.end));
        });
    }

    /// Tells `found` which of `addresses` are this process's own.
    fn own_pages(&mut self, addresses: Range<u64>, mut found: impl FnMut(Range<u64>)) {
        loop {
            let whole = addresses.clone();
            let (result, next) = match &self.method {
                Method::Scan(file) => (
                    pagemap::scan(file, Kind::Own, whole, &mut found),
                    Method::Entries(Arc::clone(file)),
                ),
                Method::Entries(file) => (
                    pagemap::read_entries(file, Kind::Own, whole, &mut found),
                    Method::Resident,
                ),
                Method::Resident => (pagemap::resident(whole, &mut found), Method::All),
                Method::All => return found(whole),
            };
            if result.is_ok() {
                return;
            }
            self.method = next;
        }
    }
}

/// What puts the pages of a range of an image into `pages`, whose page 0 is at offset `first`.
fn adder(first: u64, pages: &mut PageSet) -> impl FnMut(Range<u64>) {
    move |range| {
        let start = range.start.saturating_sub(first) / PAGE;
        let end = range.end.saturating_sub(first).div_ceil(PAGE);
        pages.insert(start..end);
    }
}

/// Tells `add` what of `range` of an image is data in `file`, in which it lies `shift` further on.
fn add_data(file: &File, range: Range<u64>, shift: u64, add: &mut impl FnMut(Range<u64>)) {
    let in_file = range.start.wrapping_add(shift)..range.end.wrapping_add(shift);
    for data in data_ranges(file, in_file) {
        match data {
            Ok(data) => add(data.start.wrapping_sub(shift)..data.end.wrapping_sub(shift)),
            // What cannot be asked may be anything.
            Err(_) => return add(range),
        }
    }
}

/// The ranges of `file` within `range` that are not holes, in order.
pub(super) fn data_ranges(
    file: &File,
    range: Range<u64>,
) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let Range { mut start, end } = range;
    std::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let data = match rustix::fs::seek(file, SeekFrom::Data(start)) {
            Ok(data) if data < end => data,
            // No more data: beyond `end`, or none at all.
            Ok(_) | Err(Errno::NXIO) => return None,
            Err(error) => {
                start = end;
                return Some(Err(error.into()));
            }
        };
        match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => {
                let stop = hole.min(end);
                start = stop;
                Some(Ok(data..stop))
            }
            Err(error) => {
                start = end;
                Some(Err(error.into()))
            }
        }
    })
}
