//! Bodies of several values: each a tag, a length, the bytes, and a zero behind them, so that a text can be
//! given to the kernel where it lies.
//!
//! ```text
//!   field   tag (1) | length (2) | bytes | 0 (1)
//! ```

use crate::{Malformed, u16_at};

/// Of a setup: the name of the host.
pub const HOSTNAME: u8 = 1;
/// Of a setup: the type of the root disk's file system, as mount(2) takes it.
pub const ROOT_TYPE: u8 = 2;
/// Of a setup: [`READ_ONLY`], [`READ_WRITE`] or [`OVERLAY`].
pub const ROOT_MODE: u8 = 3;
/// Of a setup: no program writes to the root once the command starts, but where memory is mounted.
pub const SEALED: u8 = 4;
/// Of a setup: the type of the file system of the second disk, which holds what is written to an overlay.
pub const UPPER_TYPE: u8 = 5;
/// Of a setup: where memory is mounted. With [`MEMORY_OPTIONS`] behind it; any number of both.
pub const MEMORY: u8 = 6;
/// Of a setup: flags of mount(2), 4 bytes, and options of tmpfs(5).
pub const MEMORY_OPTIONS: u8 = 7;
/// Of a setup: a network interface: its address, 6 bytes, and its MTU, 4 bytes. With [`ADDRESS`]es and [`ROUTE`]s of it
/// behind.
pub const INTERFACE: u8 = 8;
/// Of a setup: bits of the network, 1 byte, and an address, 4 or 16 bytes.
pub const ADDRESS: u8 = 9;
/// Of a setup: bits of the network, 1 byte, an address in it, and the gateway's, if there is one: 4 or 16 bytes each.
pub const ROUTE: u8 = 10;
/// Of a setup: [`SEED_LEN`] random bytes for the kernel's generator, which is to make nothing more of what it had: it may
/// be that of other guests as well.
pub const SEED: u8 = 11;
/// Of a setup: how many sectors of 512 bytes a disk has, 8 bytes; one for each disk from the first one on. The kernel may have
/// seen other disks in their places: it is waited until it knows of these, and what it has of the others is dropped.
pub const SECTORS: u8 = 12;
/// Of a setup: the address, 6 bytes, that the interface behind it ([`INTERFACE`]) has until now.
pub const FOUND_BY: u8 = 13;

/// Bytes of a [`SEED`].
pub const SEED_LEN: usize = 32;

/// Of a process: its words, in order.
pub const ARGUMENT: u8 = 32;
/// Of a process: NAME=VALUE of its environment.
pub const VARIABLE: u8 = 33;
/// Of a process: its working folder.
pub const FOLDER: u8 = 34;
/// Of a process: its user, and its group behind a colon: names of the guest's, or numbers.
pub const USER: u8 = 35;
/// Of a process: it has a terminal of so many rows and columns, 2 bytes each.
pub const TERMINAL: u8 = 36;
/// Of a process: there is an input for it; without this it has none.
pub const HAS_INPUT: u8 = 37;
/// Of a process: it is the agent itself, which writes the file or folder of this path to its output as an
/// archive ([`crate::archive`]).
pub const PACK: u8 = 38;
/// Of a process: it is the agent itself, which makes the file or folder of this path from the archive in
/// its input.
pub const UNPACK: u8 = 39;
/// Of a process: a further group, 4 bytes; any number of them.
pub const GROUP: u8 = 40;
/// Of a process: permissions that its files do not get, 4 bytes.
pub const UMASK: u8 = 41;
/// Of a process: a limit: the number of its resource, 1 byte, the soft and the hard limit, 8 bytes each; any number of
/// them. One that cannot be set is passed over.
pub const LIMIT: u8 = 42;
/// Of a process: no program gives it more than it has (no_new_privs).
pub const NO_NEW_PRIVILEGES: u8 = 43;
/// Of a process: its bounding, effective, inheritable, permitted and ambient capabilities, 8 bytes each.
pub const CAPABILITIES: u8 = 44;
/// Of a process: its oom_score_adj, in digits.
pub const OOM_SCORE: u8 = 45;
/// Of a process: its working folder is made, if it is not there.
pub const MAKE_FOLDER: u8 = 46;

/// Whether zeros may be in a field with this tag.
pub fn is_binary(tag: u8) -> bool {
    matches!(
        tag,
        ROOT_MODE
            | MEMORY_OPTIONS
            | INTERFACE
            | ADDRESS
            | ROUTE
            | SEED
            | SECTORS
            | FOUND_BY
            | TERMINAL
            | GROUP
            | UMASK
            | LIMIT
            | CAPABILITIES
    )
}

/// The root is only read, and nothing can be written but in /tmp and /run.
pub const READ_ONLY: u8 = 0;
/// What is written goes to the root disk.
pub const READ_WRITE: u8 = 1;
/// What is written goes to the guest's memory, and is lost with it.
pub const OVERLAY: u8 = 2;

/// A value of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<'a> {
    /// What it is.
    pub tag: u8,
    /// Its bytes with the zero behind them.
    with_zero: &'a [u8],
}

impl<'a> Field<'a> {
    /// Its bytes.
    pub fn bytes(&self) -> &'a [u8] {
        let end = self.with_zero.len().saturating_sub(1);
        self.with_zero.get(..end).unwrap_or_default()
    }

    /// A text for the kernel, unless there is a zero in it.
    pub fn text(&self) -> Result<&'a core::ffi::CStr, Malformed> {
        core::ffi::CStr::from_bytes_with_nul(self.with_zero).map_err(|_| Malformed::Field(self.tag))
    }
}

/// The fields of a body, in turn. It ends with the first one that is malformed.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn first(self) -> Result<(Field<'a>, &'a [u8]), Malformed> {
        let tag = *self.0.first().ok_or(Malformed::Short)?;
        let length = u16_at(self.0, 1).ok_or(Malformed::Field(tag))?;
        let rest = self.0.get(3..).ok_or(Malformed::Field(tag))?;
        let length = usize::from(length).saturating_add(1);
        let (with_zero, rest) = rest.split_at_checked(length).ok_or(Malformed::Field(tag))?;
        if with_zero.last() != Some(&0) {
            return Err(Malformed::Field(tag));
        }
        Ok((Field { tag, with_zero }, rest))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.first() {
            Ok((field, rest)) => {
                self.0 = rest;
                Some(Ok(field))
            }
            Err(error) => {
                self.0 = &[];
                Some(Err(error))
            }
        }
    }
}

/// Makes sure that a body can be that of a [`crate::Message::Start`].
///
/// # Errors
/// When a field is malformed, or not one of a process.
pub fn check_process(body: &[u8]) -> Result<(), Malformed> {
    for field in Fields(body) {
        let field = field?;
        match field.tag {
            ARGUMENT | VARIABLE | FOLDER | PACK | UNPACK => drop(field.text()?),
            TERMINAL | GROUP | UMASK if field.bytes().len() == 4 => {}
            LIMIT if field.bytes().len() == 17 => {}
            CAPABILITIES if field.bytes().len() == 40 => {}
            USER | HAS_INPUT | NO_NEW_PRIVILEGES | OOM_SCORE | MAKE_FOLDER => {}
            tag => return Err(Malformed::Field(tag)),
        }
    }
    Ok(())
}

/// The header of a field, which the bytes and a zero follow; none if there are too many of them.
pub fn header(tag: u8, bytes: &[u8]) -> Option<[u8; 3]> {
    let length = u16::try_from(bytes.len()).ok()?;
    let [low, high] = length.to_le_bytes();
    Some([tag, low, high])
}
