//! The identity of a tree: a SHA-256 over all that its disk will hold. Two sources of the same content have the same one,
//! whatever they are (a folder, a tarball, an image), and so one disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use crate::content::{Content, Sum};
use crate::failure::{Failure, Result};
use crate::tree::{Id, Node, ROOT, Tree};

/// Changes with all that changes the disk of a tree: the writer of file systems, what is kept of a source.
pub const VERSION: &[u8] = b"mayfly-images 2\n";
/// More threads than this read no faster.
const THREADS_MAX: usize = 8;

/// Reads what of the tree was not read yet, and notes its sum.
pub fn complete(tree: &mut Tree) -> Result<()> {
    let missing: Vec<(Id, Content)> = tree
        .nodes()
        .filter_map(|(id, node)| match node {
            Node::File(content) if content.sum.is_none() => Some((id, content.clone())),
            _ => None,
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let read = || -> Result<Vec<(Id, Sum)>> {
        let mut read = Vec::new();
        while let Some((id, content)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Where one fails, the others need not go on.
            let sum = content
                .read(&mut |_| Ok(()))
                .inspect_err(|_| next.store(missing.len(), Ordering::Relaxed))?;
            read.push((*id, sum));
        }
        Ok(read)
    };
    let sums: Vec<Result<Vec<(Id, Sum)>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.min(THREADS_MAX).min(missing.len()))
            .map(|_| scope.spawn(read))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|sums| sums.expect("reading does not panic"))
            .collect()
    });
    for sums in sums {
        for (id, sum) in sums? {
            if let Some(content) = tree.content_mut(id) {
                content.sum = Some(sum);
            }
        }
    }
    Ok(())
}

/// The identity of a tree all of whose content was read.
pub fn of(tree: &Tree) -> Result<Sum> {
    let mut hash = Sha256::new();
    hash.update(VERSION);
    let too_deep = |why| {
        Failure::plain(format!(
            "cannot lay the files out: {why}; shorten its names"
        ))
    };
    let mut first_names: HashMap<Id, u64> = HashMap::new();
    let root = (Vec::new(), ROOT);
    for (number, (path, id)) in
        (0u64..).zip(std::iter::once(root).chain(tree.paths().map_err(too_deep)?))
    {
        put(&mut hash, &path);
        let first = *first_names.entry(id).or_insert(number);
        hash.update(first.to_le_bytes());
        if first != number {
            continue;
        }
        let meta = tree.meta(id);
        for value in [meta.mode, meta.uid, meta.gid] {
            hash.update(value.to_le_bytes());
        }
        hash.update(meta.mtime.to_le_bytes());
        put(&mut hash, meta.capability.as_deref().unwrap_or_default());
        match tree.node(id) {
            Node::Folder(_) => hash.update(b"d"),
            Node::File(content) => {
                hash.update(b"f");
                hash.update(content.len.to_le_bytes());
                hash.update(content.sum.expect("all content was read"));
            }
            Node::Symlink(target) => {
                hash.update(b"l");
                put(&mut hash, target);
            }
            Node::Device(is_character, major, minor) => {
                hash.update(if *is_character { b"c" } else { b"b" });
                hash.update(major.to_le_bytes());
                hash.update(minor.to_le_bytes());
            }
            Node::Fifo => hash.update(b"p"),
        }
    }
    Ok(hash.finalize().into())
}

/// Bytes with their length before them: no two lists give the same.
fn put(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Meta;

    fn tree(change: impl FnOnce(&mut Tree)) -> Sum {
        let mut tree = Tree::new();
        let file = |sum| {
            Node::File(Content {
                sum: Some([sum; 32]),
                ..Content::of_nothing("x")
            })
        };
        tree.add(b"a", file(1), Meta::default()).unwrap();
        tree.add(b"b/c", file(2), Meta::default()).unwrap();
        change(&mut tree);
        of(&tree).unwrap()
    }

    #[test]
    fn identity_when_anything_differs_is_another() {
        let plain = tree(|_| {});
        assert_eq!(plain, tree(|_| {}));
        let meta = |change: fn(&mut Meta)| {
            tree(|tree| {
                let id = tree.find("a").unwrap();
                let mut meta = tree.meta(id).clone();
                change(&mut meta);
                tree.set_meta(id, meta);
            })
        };
        let all = [
            plain,
            meta(|meta| meta.mode = 0o755),
            meta(|meta| meta.uid = 1),
            meta(|meta| meta.gid = 1),
            meta(|meta| meta.mtime = 1),
            meta(|meta| meta.capability = Some(vec![1])),
            tree(|tree| tree.link(b"d", b"a").unwrap()),
            tree(|tree| tree.link(b"d", b"b/c").unwrap()),
            tree(|tree| tree.add(b"d", Node::Fifo, Meta::default()).unwrap()),
            tree(|tree| {
                tree.add(b"d", Node::Symlink(b"a".to_vec()), Meta::default())
                    .unwrap()
            }),
            tree(|tree| {
                tree.add(b"d", Node::Device(true, 1, 3), Meta::default())
                    .unwrap()
            }),
            tree(|tree| {
                tree.add(b"d", Node::Device(false, 1, 3), Meta::default())
                    .unwrap()
            }),
            tree(|tree| tree.content_mut(tree.find("a").unwrap()).unwrap().sum = Some([9; 32])),
            tree(|tree| tree.content_mut(tree.find("a").unwrap()).unwrap().len = 9),
        ];
        for (index, one) in all.iter().enumerate() {
            for (other, two) in all.iter().enumerate() {
                assert_eq!(one == two, index == other, "{index} and {other}");
            }
        }
    }
}
