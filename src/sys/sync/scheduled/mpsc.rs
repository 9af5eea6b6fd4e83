//! Channels of the standard library, of which one that is empty is waited for as a run wants it.

use std::sync::Arc;
pub use std::sync::mpsc::{RecvError, TryRecvError, TrySendError};

use super::{Key, block_until, changed, is_on, key_of, point};

/// The sending end of a channel of the standard library.
#[derive(Debug)]
pub struct SyncSender<T> {
    /// None while it is dropped.
    sender: Option<std::sync::mpsc::SyncSender<T>>,
    mark: Arc<u8>,
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver<T> {
    receiver: std::sync::mpsc::Receiver<T>,
    mark: Arc<u8>,
}

pub fn sync_channel<T>(bound: usize) -> (SyncSender<T>, Receiver<T>) {
    let (sender, receiver) = std::sync::mpsc::sync_channel(bound);
    // Its address stands for the channel.
    let mark = Arc::new(0);
    let sender = SyncSender {
        sender: Some(sender),
        mark: Arc::clone(&mark),
    };
    (sender, Receiver { receiver, mark })
}

fn key(mark: &Arc<u8>) -> Key {
    key_of(&**mark)
}

impl<T> SyncSender<T> {
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        point();
        let sender = self.sender.as_ref();
        let sent = sender
            .expect("it is there until it is dropped")
            .try_send(message);
        changed(key(&self.mark));
        point();
        sent
    }
}

impl<T> Drop for SyncSender<T> {
    fn drop(&mut self) {
        self.sender = None;
        changed(key(&self.mark));
        point();
    }
}

impl<T> Receiver<T> {
    pub fn recv(&self) -> Result<T, RecvError> {
        if !is_on() {
            return self.receiver.recv();
        }
        point();
        block_until(key(&self.mark), || match self.receiver.try_recv() {
            Ok(message) => Some(Ok(message)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(RecvError)),
        })
    }

    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        point();
        self.receiver.try_recv()
    }

    pub fn try_iter(&self) -> impl Iterator<Item = T> {
        std::iter::from_fn(|| self.try_recv().ok())
    }
}
