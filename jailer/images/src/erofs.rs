//! Writes a tree as an EROFS file system (Documentation/filesystems/erofs.rst of Linux), uncompressed. The same tree
//! gives the same bytes, for any user: owners, modes, devices, links and capabilities are written into the file system
//! and never given to a file of the host, so that neither root nor fakeroot is needed, and no program that makes file
//! systems. mkfs.erofs 1.5 can do none of it for an ordinary user (it reads owners from files; fakeroot's capabilities
//! are lost), and reads content a second time from a laid out copy.
//!
//! Layout: the superblock; all inodes, each followed by what is in it (entries of a folder, the target of a link, a short
//! file, or the end of a long one); the blocks of content. Blocks of zeros are holes of the disk.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::bytes;
use crate::content::Sum;
use crate::failure::{Context, Failure, Result};
use crate::sparse;
use crate::tree::{Id, Node, ROOT, Tree};

const BLOCK: u64 = 4096;
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: usize = 128;
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// Inodes have times of their own (EROFS_FEATURE_COMPAT_MTIME).
const FEATURE_MTIME: u32 = 2;
/// Of fields in the superblock.
const BLOCKS_AT: usize = 36;
const UUID_AT: usize = 48;
/// The unit of inode numbers.
const SLOT: u64 = 32;
/// An inode with 32-bit owners, a time and 64-bit size.
const INODE: u64 = 64;
/// The first inode is behind the superblock.
const FIRST: u64 = SUPERBLOCK_AT + SUPERBLOCK_LEN as u64;
/// Content up to this length stands behind its inode rather than in a block of its own.
const INLINE_MAX: u64 = 2048;
const DIRENT: usize = 12;
/// `security.`, as the prefix of an extended attribute's name.
const SECURITY: u8 = 6;

/// Where the parts of a node are.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    /// The place of its inode.
    at: u64,
    size: u64,
    /// How much of it is in blocks, from this one on.
    in_blocks: u64,
    block: u64,
    links: u32,
}

impl Position {
    fn number(&self) -> u64 {
        self.at / SLOT
    }

    fn is_inline(&self) -> bool {
        self.in_blocks < self.size
    }
}

/// Where everything will be.
#[derive(Debug)]
struct Plan {
    /// All nodes that have a name, in the order of their inodes.
    order: Vec<Id>,
    positions: Vec<Position>,
    parents: HashMap<Id, Id>,
    blocks: u64,
}

/// Writes the tree into the empty file `to`; `sum` is its identity, which gives the file system its UUID.
pub fn write(tree: &Tree, sum: &Sum, to: &File, path: &Path) -> Result<()> {
    let plan = Plan::new(tree)?;
    to.set_len(plan.blocks * BLOCK).cannot("write", path)?;
    to.write_all_at(&superblock(&plan, sum), SUPERBLOCK_AT)
        .cannot("write", path)?;
    let mut from_first = to;
    from_first
        .seek(SeekFrom::Start(FIRST))
        .cannot("write", path)?;
    let mut inodes = Inodes {
        to: BufWriter::with_capacity(1 << 20, from_first),
        at: FIRST,
    };
    for &id in &plan.order {
        let position = plan.positions[id];
        inodes.pad(position.at).cannot("write", path)?;
        inodes
            .put(&inode(tree, id, &position))
            .cannot("write", path)?;
        let end = body(tree, &plan, id, to, path)?;
        inodes.put(&end).cannot("write", path)?;
    }
    inodes.to.flush().cannot("write", path)
}

/// Writes what of a node is in blocks; what is behind the inode is given back.
fn body(tree: &Tree, plan: &Plan, id: Id, to: &File, path: &Path) -> Result<Vec<u8>> {
    let position = plan.positions[id];
    let begin = position.block * BLOCK;
    let mut at = 0u64;
    let mut end = Vec::new();
    let mut each = |bytes: &[u8]| -> std::io::Result<()> {
        let in_blocks = position
            .in_blocks
            .saturating_sub(at)
            .min(bytes.len() as u64) as usize;
        sparse::write_data(to, &bytes[..in_blocks], begin + at)?;
        end.extend_from_slice(&bytes[in_blocks..]);
        at += bytes.len() as u64;
        Ok(())
    };
    match tree.node(id) {
        Node::File(content) => {
            let sum = content.read(&mut each)?;
            if content.sum.is_some_and(|known| known != sum) {
                return Err(crate::content::changed(&content.path()));
            }
        }
        Node::Folder(_) => each(&entries(tree, plan, id)).cannot("write", path)?,
        Node::Symlink(target) => each(target).cannot("write", path)?,
        Node::Device(..) | Node::Fifo => {}
    }
    Ok(end)
}

impl Plan {
    fn new(tree: &Tree) -> Result<Plan> {
        let mut plan = Plan {
            order: Vec::new(),
            positions: Vec::new(),
            parents: HashMap::from([(ROOT, ROOT)]),
            blocks: 0,
        };
        plan.find(tree);
        let (mut at, mut blocks) = (FIRST, 0);
        for &id in &plan.order {
            let size = size(tree, id);
            let rest = size % BLOCK;
            let head = INODE + attributes(tree, id).len() as u64;
            let is_inline = match tree.node(id) {
                Node::File(_) => rest <= INLINE_MAX,
                _ => true,
            };
            let inline = if is_inline && head + rest <= BLOCK {
                rest
            } else {
                0
            };
            // All of it is in one block: so it is read by one.
            if at % BLOCK + head + inline > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let position = &mut plan.positions[id];
            *position = Position {
                at,
                size,
                in_blocks: size - inline,
                block: blocks,
                ..*position
            };
            at = (at + head + inline).next_multiple_of(SLOT);
            blocks += position.in_blocks.div_ceil(BLOCK);
        }
        let first = at.div_ceil(BLOCK);
        for &id in &plan.order {
            plan.positions[id].block += first;
        }
        plan.blocks = first + blocks;
        if plan.blocks > u64::from(u32::MAX) {
            return Err(Failure::plain(
                "it has more than 16 TiB of files, which EROFS cannot hold; leave some of them out",
            ));
        }
        Ok(plan)
    }

    /// All nodes with a name, folders before what is in them, and how many names each has.
    fn find(&mut self, tree: &Tree) {
        let mut todo = std::collections::VecDeque::from([ROOT]);
        self.order.push(ROOT);
        self.named(ROOT).links = 2;
        while let Some(folder) = todo.pop_front() {
            for &id in tree
                .children(folder)
                .into_iter()
                .flatten()
                .map(|(_, id)| id)
            {
                let is_folder = tree.children(id).is_some();
                let links = &mut self.named(id).links;
                *links += if is_folder { 2 } else { 1 };
                if *links == 1 || is_folder {
                    self.order.push(id);
                }
                if is_folder {
                    self.named(folder).links += 1;
                    self.parents.insert(id, folder);
                    todo.push_back(id);
                }
            }
        }
    }

    fn named(&mut self, id: Id) -> &mut Position {
        if self.positions.len() <= id {
            self.positions.resize(id + 1, Position::default());
        }
        &mut self.positions[id]
    }
}

/// The length of a node's body.
fn size(tree: &Tree, id: Id) -> u64 {
    match tree.node(id) {
        Node::File(content) => content.len,
        Node::Symlink(target) => target.len() as u64,
        Node::Folder(_) => {
            let mut size = 0;
            for block in in_blocks(&names(tree, id)) {
                let used: usize = block.iter().map(|(name, _)| DIRENT + name.len()).sum();
                // The last block only counts as far as it is used.
                size = (size as u64).next_multiple_of(BLOCK) as usize + used;
            }
            size as u64
        }
        Node::Device(..) | Node::Fifo => 0,
    }
}

/// The entries of a folder in the order of their names as bytes, with `.` and `..` among them; those have no node.
fn names(tree: &Tree, id: Id) -> Vec<(&[u8], Option<Id>)> {
    let children = tree.children(id).into_iter().flatten();
    let mut names: Vec<_> = children
        .map(|(name, id)| (name.as_slice(), Some(*id)))
        .collect();
    names.extend([(&b"."[..], None), (&b".."[..], None)]);
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// The same, block by block.
fn in_blocks<'a, 'b>(names: &'b [(&'a [u8], Option<Id>)]) -> Vec<&'b [(&'a [u8], Option<Id>)]> {
    let (mut blocks, mut begin, mut used) = (Vec::new(), 0, 0);
    for (index, (name, _)) in names.iter().enumerate() {
        let len = DIRENT + name.len();
        if used + len > BLOCK as usize {
            blocks.push(&names[begin..index]);
            (begin, used) = (index, 0);
        }
        used += len;
    }
    blocks.push(&names[begin..]);
    blocks
}

/// A folder's body: in each block the entries, then their names.
fn entries(tree: &Tree, plan: &Plan, id: Id) -> Vec<u8> {
    let mut body = Vec::new();
    let names = names(tree, id);
    for block in in_blocks(&names) {
        body.resize(body.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = block.len() * DIRENT;
        for (name, node) in block {
            let node = match (node, *name) {
                (Some(node), _) => *node,
                (None, b".") => id,
                (None, _) => plan.parents[&id],
            };
            body.extend(plan.positions[node].number().to_le_bytes());
            body.extend((name_at as u16).to_le_bytes());
            body.extend([kind(tree, node), 0]);
            name_at += name.len();
        }
        for (name, _) in block {
            body.extend_from_slice(name);
        }
    }
    body
}

/// The kind of an entry, by the numbers of `linux/fs_types.h`.
fn kind(tree: &Tree, id: Id) -> u8 {
    match tree.node(id) {
        Node::File(_) => 1,
        Node::Folder(_) => 2,
        Node::Device(true, ..) => 3,
        Node::Device(false, ..) => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}

/// Extended attributes, as they stand behind the inode.
fn attributes(tree: &Tree, id: Id) -> Vec<u8> {
    const NAME: &[u8] = b"capability";
    let Some(value) = &tree.meta(id).capability else {
        return Vec::new();
    };
    // No shared ones, and no filter of names.
    let mut bytes = vec![0; 12];
    bytes.extend([NAME.len() as u8, SECURITY]);
    bytes.extend((value.len() as u16).to_le_bytes());
    bytes.extend(NAME);
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The inode with its attributes.
fn inode(tree: &Tree, id: Id, position: &Position) -> Vec<u8> {
    /// Of the longer form.
    const EXTENDED: u16 = 1;
    const PLAIN: u16 = 0;
    const INLINE: u16 = 2;
    let meta = tree.meta(id);
    let attributes = attributes(tree, id);
    let count = match attributes.len() {
        0 => 0,
        len => (len - 12) / 4 + 1,
    };
    let (kind, place) = match tree.node(id) {
        Node::File(_) => (0o100_000, position.block as u32),
        Node::Folder(_) => (0o040_000, position.block as u32),
        Node::Symlink(_) => (0o120_000, position.block as u32),
        Node::Fifo => (0o010_000, 0),
        Node::Device(true, major, minor) => (0o020_000, device(*major, *minor)),
        Node::Device(false, major, minor) => (0o060_000, device(*major, *minor)),
    };
    let layout = if position.is_inline() { INLINE } else { PLAIN };
    let mut bytes = Vec::with_capacity(INODE as usize + attributes.len());
    bytes.extend((EXTENDED | layout << 1).to_le_bytes());
    bytes.extend((count as u16).to_le_bytes());
    bytes.extend(((kind | meta.mode & 0o7777) as u16).to_le_bytes());
    bytes.extend(0u16.to_le_bytes());
    bytes.extend(position.size.to_le_bytes());
    bytes.extend(place.to_le_bytes());
    bytes.extend((position.number() as u32).to_le_bytes());
    bytes.extend(meta.uid.to_le_bytes());
    bytes.extend(meta.gid.to_le_bytes());
    bytes.extend(meta.mtime.max(0).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(position.links.to_le_bytes());
    bytes.resize(INODE as usize, 0);
    bytes.extend(attributes);
    bytes
}

/// A device's number as Linux writes it in 32 bits.
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

/// A number of the form that is left to programs (RFC 9562, version 8).
fn uuid(sum: &Sum) -> [u8; 16] {
    let mut uuid = *sum.first_chunk::<16>().expect("a sum is longer");
    uuid[6] = 0x80 | uuid[6] & 0x0f;
    uuid[8] = 0x80 | uuid[8] & 0x3f;
    uuid
}

/// Whether a file of this length begins as the disk of `sum`, and is as long.
pub fn is_whole(file: &File, len: u64, sum: &Sum) -> std::io::Result<bool> {
    let block = bytes::read(file, SUPERBLOCK_AT, SUPERBLOCK_LEN)?;
    let blocks = bytes::le32(&block, BLOCKS_AT).unwrap_or(0);
    Ok(block.starts_with(&MAGIC.to_le_bytes())
        && bytes::has(&block, UUID_AT, &uuid(sum))
        && u64::from(blocks) * BLOCK == len)
}

fn superblock(plan: &Plan, sum: &Sum) -> [u8; SUPERBLOCK_LEN] {
    let mut block = [0; SUPERBLOCK_LEN];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &FEATURE_MTIME.to_le_bytes());
    put(12, &[BLOCK.ilog2() as u8]);
    // It comes first, in the first block or, with many names in it, at the begin of the second.
    put(14, &(plan.positions[ROOT].number() as u16).to_le_bytes());
    put(16, &(plan.order.len() as u64).to_le_bytes());
    put(BLOCKS_AT, &(plan.blocks as u32).to_le_bytes());
    put(UUID_AT, &uuid(sum));
    put(64, b"mayfly");
    block
}

#[derive(Debug)]
struct Inodes<'a> {
    to: BufWriter<&'a File>,
    at: u64,
}

impl Inodes<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.at += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    fn pad(&mut self, to: u64) -> std::io::Result<()> {
        let zeros = vec![0; (to - self.at) as usize];
        self.put(&zeros)
    }
}
