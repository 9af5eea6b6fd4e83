//! Guest memory whose pages another process brings in when they are first used: a handler of page
//! faults (userfaultfd), reached by a Unix socket with Firecracker's protocol.
//!
//! The handler gets one message: a JSON array that says where guest memory is in this process and
//! in its image, and with it the descriptor of the faults. This process keeps a copy of that, so that
//! a handler that ends leaves faults unanswered: without the copy, what is missing would read as
//! zeros. Control watches the handler by [`Handler`], and ends the guest when it is gone.
//!
//! Whatever thread touches guest memory may wait for the handler: control never does.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::layout::{Layout, fresh};
use super::{Base, Memory, MemoryError, PAGE, Pages, advise_huge};
use crate::sys::socket::{self, send_with_descriptors};
use crate::sys::uffd::Uffd;

/// A piece of guest memory, as handlers written for Firecracker read it.
#[derive(Debug, Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes too, whatever its name says.
    page_size_kib: u64,
}

/// The process that brings pages in, as control watches it.
///
/// It is gone when both its process has ended and the socket is closed. One alone is not enough: a
/// handler may close the socket and serve on, and may pass the socket to a process that it starts.
#[derive(Debug)]
pub struct Handler {
    /// Kept, so that faults are not answered with zeros when the handler ends.
    _uffd: Uffd,
    socket: UnixStream,
    /// None where the host cannot tell (before Linux 6.5, a handler in another PID namespace).
    process: Option<OwnedFd>,
    has_ended: bool,
}

impl Handler {
    /// The descriptor to poll for input and hang-up: when there is something, ask
    /// [`Handler::is_gone`]. None once that would tell nothing more.
    pub fn to_watch(&self) -> Option<BorrowedFd<'_>> {
        match &self.process {
            Some(process) if !self.has_ended => Some(process.as_fd()),
            Some(_) => Some(self.socket.as_fd()),
            None => None,
        }
    }

    /// Whether no process is left that could bring pages in.
    pub fn is_gone(&mut self) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        self.has_ended = self.has_ended || socket::has_ended(process);
        self.has_ended && socket::is_hung_up(&self.socket)
    }
}

impl Memory {
    /// Guest memory that the handler at `socket` fills. `device` is an open /dev/userfaultfd, where
    /// that cannot be opened by name.
    ///
    /// # Errors
    /// [`MemoryError`] as from [`Memory::new`], and when the host refuses userfaultfd or the handler
    /// does not take the message.
    pub fn from_handler(
        socket: UnixStream,
        device: Option<&File>,
        size_mib: u64,
        pages: Pages,
        log_writes: bool,
    ) -> Result<(Memory, Handler), MemoryError> {
        let layout = Layout::new(size_mib)?;
        let ram = fresh(&layout, size_mib, pages, log_writes)?;
        if pages == Pages::Transparent {
            advise_huge(&ram);
        }
        let uffd = Uffd::new(device).map_err(MemoryError::Userfaultfd)?;
        let page_size = match pages {
            Pages::Ordinary | Pages::Transparent => PAGE,
            Pages::TwoMib => 2 * super::MIB,
        };
        let mut mappings = Vec::new();
        let mut offset: u64 = 0;
        for region in ram.iter() {
            let first = region.as_ptr() as u64;
            uffd.register(first..first.saturating_add(region.len()))
                .map_err(MemoryError::Userfaultfd)?;
            mappings.push(Mapping {
                base_host_virt_addr: first,
                size: region.len(),
                offset,
                page_size,
                page_size_kib: page_size,
            });
            offset = offset.saturating_add(region.len());
        }
        introduce(&socket, &mappings, &uffd).map_err(MemoryError::Handler)?;
        let handler = Handler {
            process: socket::peer_process(&socket),
            _uffd: uffd,
            socket,
            has_ended: false,
        };
        Ok((Memory::of(ram, size_mib, pages, Base::Lazy), handler))
    }
}

/// Sends the one message.
fn introduce(socket: &UnixStream, mappings: &[Mapping], uffd: &Uffd) -> io::Result<()> {
    let message = serde_json::to_vec(mappings)?;
    let sent = send_with_descriptors(socket, &message, &[uffd.as_fd()])?;
    match sent == message.len() {
        true => Ok(()),
        // A handler reads once: half a message is of no use to it.
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests;
