//! The stream of `cp` and `--copy-in`: files and trees of folders, in one pass, read and made as it comes.
//!
//! ```text
//!   archive   entry ... end
//!   entry     kind (1) | 0 (1) | length of the name (2) | mode (4) | size (8) | user (4) | group (4)
//!             | name | bytes, so many
//! ```
//!
//! A folder's entries follow it, up to a [`Kind::Leave`]. The bytes of a link are where it leads. Names are
//! those of entries in their folder, and never paths: what makes files from an archive opens each folder
//! by its name in the one above, follows no link, and so stays where it was told to begin. Devices, sockets
//! and pipes are left out.
//!
//! Only to a guest, and only from its supervisor, goes a [`Kind::Place`]: its bytes are the path of a folder, which is
//! made if it is not there, and links in it are followed. The entries behind it are made in that. And only there do
//! users and groups count.

use crate::{Malformed, u16_at, u32_at};

/// Length of an entry without name and bytes.
pub const HEADER: usize = 24;
/// Longest name.
pub const NAME_MAX: usize = 255;
/// Longest place that a link leads to.
pub const LINK_MAX: usize = 4095;
/// Most folders inside one another.
pub const DEPTH_MAX: usize = 100;
/// The permissions that an archive carries: no set-user-ID, no set-group-ID.
pub const MODE_MASK: u32 = 0o777;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A file, and its bytes.
    File = 1,
    /// A folder, whose entries follow.
    Folder = 2,
    /// A symbolic link.
    Link = 3,
    /// The end of a folder.
    Leave = 4,
    /// The end of the archive.
    End = 5,
    /// The folder for what follows, by its path.
    Place = 6,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Length of its name.
    pub name: usize,
    /// Its permissions.
    pub mode: u32,
    /// How many bytes follow the name.
    pub size: u64,
    /// Its user and its group.
    pub owner: (u32, u32),
}

impl Entry {
    /// One without name and bytes.
    pub fn bare(kind: Kind) -> Self {
        Entry {
            kind,
            name: 0,
            mode: 0,
            size: 0,
            owner: (0, 0),
        }
    }

    /// Its first bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let (front, rest) = bytes.split_at_mut(8);
        let (size, owner) = rest.split_at_mut(8);
        size.copy_from_slice(&self.size.to_le_bytes());
        let (user, group) = owner.split_at_mut(4);
        user.copy_from_slice(&self.owner.0.to_le_bytes());
        group.copy_from_slice(&self.owner.1.to_le_bytes());
        let [low, high] = (self.name as u16).to_le_bytes();
        let [a, b, c, d] = (self.mode & MODE_MASK).to_le_bytes();
        front.copy_from_slice(&[self.kind as u8, 0, low, high, a, b, c, d]);
        bytes
    }

    /// From its first bytes.
    ///
    /// # Errors
    /// When they are malformed, or one has a name or bytes that its kind cannot have.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Entry, Malformed> {
        let [kind, zero, ..] = *bytes;
        let kind = match kind {
            1 => Kind::File,
            2 => Kind::Folder,
            3 => Kind::Link,
            4 => Kind::Leave,
            5 => Kind::End,
            6 => Kind::Place,
            _ => return Err(Malformed::Kind(kind)),
        };
        let name = usize::from(u16_at(bytes, 2).ok_or(Malformed::Short)?);
        let mode = u32_at(bytes, 4).ok_or(Malformed::Short)?;
        let (low, high) = (u32_at(bytes, 8), u32_at(bytes, 12));
        let (low, high) = low.zip(high).ok_or(Malformed::Short)?;
        let size = u64::from(high) << 32 | u64::from(low);
        let (user, group) = (u32_at(bytes, 16), u32_at(bytes, 20));
        let owner = user.zip(group).ok_or(Malformed::Short)?;
        if zero != 0 || mode & !MODE_MASK != 0 {
            return Err(Malformed::Reserved);
        }
        let is_named = matches!(kind, Kind::File | Kind::Folder | Kind::Link);
        let most = match kind {
            Kind::File => u64::MAX,
            Kind::Link | Kind::Place => LINK_MAX as u64,
            _ => 0,
        };
        if name > NAME_MAX || (name > 0) != is_named {
            return Err(Malformed::Length(name as u32));
        }
        if size > most || (size == 0 && matches!(kind, Kind::Link | Kind::Place)) {
            return Err(Malformed::Length(u32::try_from(size).unwrap_or(u32::MAX)));
        }
        Ok(Entry {
            kind,
            name,
            mode,
            size,
            owner,
        })
    }
}

/// Whether a name can be that of an entry.
pub fn is_name(name: &[u8]) -> bool {
    let is_path = name.iter().any(|byte| matches!(byte, 0 | b'/'));
    !is_path && !matches!(name, b"" | b"." | b"..") && name.len() <= NAME_MAX
}
