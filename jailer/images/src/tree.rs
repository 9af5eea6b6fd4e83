//! The root file system as a tree in memory. Names and links of archives are resolved here, inside
//! of the tree, so that nothing on the host is reached by them; content lies in numbered files of
//! the working folder, or in the folder that the tree was read from. Owners, modes and device nodes
//! exist only here and in the disk.

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::content::Content;

/// What a tree may have, and as many names: some 300 bytes of memory each.
pub const NODES_MAX: usize = 1 << 20;
/// The names of one file: a limit of ext4.
const NAMES_MAX: u32 = 65_000;
/// All names, and the targets of all links, together.
const TEXT_MAX: usize = 256 << 20;
/// Folders in folders, and symbolic links to symbolic links: limits of Linux.
const DEPTH_MAX: usize = 256;
const LINKS_MAX: usize = 40;
const NAME_MAX: usize = 255;
const TARGET_MAX: usize = 4095;
/// A whole path stays below the system's limit with the working folder before it.
const PATH_MAX: usize = 3072;
/// Names that are looked up, and children that are looked through, for all entries of archives together:
/// 64 for each of as many entries as there may be.
const WORK_MAX: u64 = 1 << 29;
/// The bytes of all paths together.
const PATHS_MAX: usize = 256 << 20;

/// The extended attribute in which a file's capabilities are.
pub const CAPABILITY: &str = "security.capability";

pub type Id = usize;
pub const ROOT: Id = 0;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    /// The value of [`CAPABILITY`].
    pub capability: Option<Vec<u8>>,
}

#[derive(Debug, Clone)]
pub enum Node {
    Folder(BTreeMap<Vec<u8>, Id>),
    File(Content),
    Symlink(Vec<u8>),
    /// Whether it is a character device, and its number.
    Device(bool, u32, u32),
    Fifo,
}

#[derive(Debug)]
struct Entry {
    node: Node,
    meta: Meta,
    /// The layer of an image that it came with.
    layer: u32,
    /// How often it was given a name.
    names: u32,
    /// The layer after the one that hid all of lower layers in it.
    hidden: u32,
}

#[derive(Debug)]
pub struct Tree {
    entries: Vec<Entry>,
    /// Names that were given, and the bytes of names and of targets.
    names: usize,
    text: usize,
    /// What is done of [`WORK_MAX`].
    work: Cell<u64>,
    /// Of what is added from now on.
    pub layer: u32,
}

pub type Result<T> = std::result::Result<T, String>;

/// A name in a message, or its first part: one of an archive may have a MiB.
fn shown(path: &[u8]) -> String {
    const SHOWN_MAX: usize = 512;
    match path.get(..SHOWN_MAX) {
        Some(begin) if path.len() > SHOWN_MAX => {
            let begin = crate::failure::clean(&String::from_utf8_lossy(begin));
            format!("{begin}...")
        }
        _ => crate::failure::clean(&String::from_utf8_lossy(path)),
    }
}

/// The names of a path, without what means nothing. `..` is refused.
pub fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    let names: Vec<&[u8]> = path
        .split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .collect();
    if names.contains(&&b".."[..]) {
        return Err(format!("{:?} leads out of the root folder", shown(path)));
    }
    let is_bad = |name: &&[u8]| name.len() > NAME_MAX || name.contains(&0);
    if names.iter().any(is_bad) || names.len() > DEPTH_MAX || path.len() > PATH_MAX {
        return Err(format!(
            "the name {:?} is not possible on Linux",
            shown(path)
        ));
    }
    Ok(names)
}

fn is_possible(name: &[u8], node: &Node) -> Result<()> {
    match node {
        Node::Symlink(target)
            if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) =>
        {
            let name = shown(name);
            Err(format!("the link {name:?} has an impossible target"))
        }
        _ => Ok(()),
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Tree {
    pub fn new() -> Tree {
        let meta = Meta {
            mode: 0o755,
            ..Meta::default()
        };
        let root = Entry {
            node: Node::Folder(BTreeMap::new()),
            meta,
            layer: 0,
            names: 1,
            hidden: 0,
        };
        Tree {
            entries: vec![root],
            names: 0,
            text: 0,
            work: Cell::new(0),
            layer: 0,
        }
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.entries[id].node
    }

    pub fn meta(&self, id: Id) -> &Meta {
        &self.entries[id].meta
    }

    /// All nodes, with those that a later entry of an archive replaced.
    pub fn nodes(&self) -> impl Iterator<Item = (Id, &Node)> {
        self.entries.iter().map(|entry| &entry.node).enumerate()
    }

    /// The content of a file, to note its sum.
    pub fn content_mut(&mut self, id: Id) -> Option<&mut Content> {
        match &mut self.entries[id].node {
            Node::File(content) => Some(content),
            _ => None,
        }
    }

    pub fn set_meta(&mut self, id: Id, meta: Meta) {
        self.entries[id].meta = meta;
    }

    pub fn set_capability(&mut self, id: Id, capability: Option<Vec<u8>>) {
        self.entries[id].meta.capability = capability;
    }

    /// Leaves the times of regular files only. Those of folders, links and devices say when a copy was made, and differ
    /// between copies of one image; programs rely on those of files (Python's compiled modules, make).
    pub fn keep_times_of_files(&mut self) {
        for entry in &mut self.entries {
            if !matches!(entry.node, Node::File(_)) {
                entry.meta.mtime = 0;
            }
        }
    }

    pub fn children(&self, id: Id) -> Option<&BTreeMap<Vec<u8>, Id>> {
        match &self.entries[id].node {
            Node::Folder(children) => Some(children),
            _ => None,
        }
    }

    fn push(&mut self, node: Node, meta: Meta) -> Result<Id> {
        if self.entries.len() >= NODES_MAX {
            return Err(format!("there are more than {NODES_MAX} files"));
        }
        if let Node::Symlink(target) = &node {
            self.text += target.len();
        }
        self.entries.push(Entry {
            node,
            meta,
            layer: self.layer,
            names: 0,
            hidden: 0,
        });
        Ok(self.entries.len() - 1)
    }

    /// Follows the names from the root, and symbolic links; the last name's only if `last`. The
    /// links are the guest's: `/` and `..` stay inside of the root.
    fn walk(&self, path: &[&[u8]], last: bool) -> Option<Vec<Id>> {
        let mut todo: Vec<Vec<u8>> = path.iter().rev().map(|name| name.to_vec()).collect();
        let (mut at, mut links) = (vec![ROOT], 0);
        while let Some(name) = todo.pop() {
            self.work.set(self.work.get() + 1);
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if at.len() > 1 {
                        at.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let id = *self.children(*at.last()?)?.get(&name)?;
            if let (Node::Symlink(target), true) = (self.node(id), last || !todo.is_empty()) {
                links += 1;
                if links > LINKS_MAX || todo.len() > 4 * DEPTH_MAX {
                    return None;
                }
                if target.first() == Some(&b'/') {
                    at.truncate(1);
                }
                todo.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                continue;
            }
            at.push(id);
        }
        Some(at)
    }

    /// Refuses archives whose entries take more work than those of any image that is one.
    pub fn check_work(&self) -> Result<()> {
        match self.work.get() {
            0..WORK_MAX => Ok(()),
            _ => Err(format!(
                "its names are too deep, or lead through too many links, {} times",
                WORK_MAX
            )),
        }
    }

    /// The node at a path of the guest, through symbolic links.
    pub fn find(&self, path: &str) -> Option<Id> {
        let names: Vec<&[u8]> = path.as_bytes().split(|&byte| byte == b'/').collect();
        self.walk(&names, true)?.last().copied()
    }

    /// The folder for a new entry: what is missing of it is made.
    fn parent(&mut self, path: &[&[u8]]) -> Result<Id> {
        // Most are there, deep ones too: an archive of millions of entries in one costs each of them one walk.
        let found = self.walk(path, true).and_then(|at| at.last().copied());
        if let Some(found) = found.filter(|&id| self.children(id).is_some()) {
            return Ok(found);
        }
        let mut done = 0;
        let mut at = ROOT;
        while done < path.len() {
            if let Some(found) = self.walk(&path[..=done], true) {
                at = *found.last().unwrap_or(&ROOT);
                if self.children(at).is_none() {
                    let name = shown(&path[..=done].join(&b'/'));
                    return Err(format!("{name:?} is used as a folder and is none"));
                }
            } else {
                // A link whose target is missing is not a folder either.
                if self.walk(&path[..=done], false).is_some() {
                    let name = shown(&path[..=done].join(&b'/'));
                    return Err(format!("{name:?} leads nowhere and is used as a folder"));
                }
                let meta = Meta {
                    mode: 0o755,
                    ..Meta::default()
                };
                let id = self.push(Node::Folder(BTreeMap::new()), meta)?;
                self.insert(at, path[done], id)?;
                at = id;
            }
            done += 1;
        }
        Ok(at)
    }

    fn insert(&mut self, folder: Id, name: &[u8], id: Id) -> Result<()> {
        self.names += 1;
        self.text += name.len();
        if self.names > NODES_MAX || self.text > TEXT_MAX {
            return Err(format!(
                "there are more than {NODES_MAX} names, or {} MiB of them",
                TEXT_MAX >> 20
            ));
        }
        self.entries[id].names += 1;
        if self.entries[id].names > NAMES_MAX {
            return Err(format!(
                "{:?} is a link to a file that has {NAMES_MAX} names already",
                shown(name)
            ));
        }
        if let Node::Folder(children) = &mut self.entries[folder].node {
            children.insert(name.to_vec(), id);
        }
        Ok(())
    }

    /// Adds an entry at a path. One that is there is replaced; a folder keeps what is in it.
    pub fn add(&mut self, path: &[u8], node: Node, meta: Meta) -> Result<()> {
        let names = names(path)?;
        is_possible(path, &node)?;
        let Some((name, folder)) = names.split_last() else {
            if let Node::Folder(_) = node {
                self.entries[ROOT].meta = meta;
            }
            return Ok(());
        };
        let folder = self.parent(folder)?;
        let there = self
            .children(folder)
            .and_then(|children| children.get(*name).copied());
        if let (Node::Folder(_), Some(id)) = (&node, there)
            && self.children(id).is_some()
        {
            (self.entries[id].meta, self.entries[id].layer) = (meta, self.layer);
            return Ok(());
        }
        let id = self.push(node, meta)?;
        self.insert(folder, name, id)
    }

    /// Adds an entry that is not there yet to a folder by its id: what is read of a host's folder has no links to follow.
    pub fn add_below(&mut self, folder: Id, name: &[u8], node: Node, meta: Meta) -> Result<Id> {
        is_possible(name, &node)?;
        let id = self.push(node, meta)?;
        self.insert(folder, name, id)?;
        Ok(id)
    }

    /// Adds another name for a file to a folder, both by their ids.
    pub fn link_below(&mut self, folder: Id, name: &[u8], file: Id) -> Result<()> {
        self.insert(folder, name, file)
    }

    /// Adds another name for a file.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let found = self
            .walk(&names(target)?, false)
            .and_then(|at| at.last().copied());
        let Some(id) = found.filter(|&id| self.children(id).is_none()) else {
            let (path, target) = (shown(path), shown(target));
            return Err(format!(
                "{path:?} is a link to {target:?}, which is not there"
            ));
        };
        let path = names(path)?;
        let Some((name, folder)) = path.split_last() else {
            return Err("the root folder cannot be a link".into());
        };
        let folder = self.parent(folder)?;
        self.insert(folder, name, id)
    }

    /// Removes what lower layers have at a path (a whiteout).
    pub fn hide(&mut self, folder: &[&[u8]], name: &[u8]) {
        let Some(folder) = self.walk(folder, true).and_then(|at| at.last().copied()) else {
            return;
        };
        let Some(&id) = self
            .children(folder)
            .and_then(|children| children.get(name))
        else {
            return;
        };
        if self.entries[id].layer < self.layer {
            if let Node::Folder(children) = &mut self.entries[folder].node {
                children.remove(name);
            }
        } else {
            self.hide_below(id);
        }
    }

    /// Removes what lower layers have in a folder (an opaque whiteout).
    pub fn hide_all(&mut self, folder: &[&[u8]]) {
        if let Some(id) = self.walk(folder, true).and_then(|at| at.last().copied()) {
            self.hide_below(id);
        }
    }

    fn hide_below(&mut self, id: Id) {
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            let layer = self.layer;
            // What came since is of this layer, also in the folders below.
            if std::mem::replace(&mut self.entries[id].hidden, layer + 1) > layer {
                continue;
            }
            let Node::Folder(children) = &self.entries[id].node else {
                continue;
            };
            self.work.set(self.work.get() + children.len() as u64);
            let keep = |id: &Id| self.entries[*id].layer >= layer;
            let kept: BTreeMap<Vec<u8>, Id> = children
                .iter()
                .filter(|(_, id)| keep(id))
                .map(|(name, id)| (name.clone(), *id))
                .collect();
            todo.extend(kept.values());
            self.entries[id].node = Node::Folder(kept);
        }
    }

    /// Every name in the tree but the root's, folders before what is in them. Through links, names
    /// can be longer than any that was added: all of them together are bounded.
    pub fn paths(&self) -> Result<Vec<(Vec<u8>, Id)>> {
        let (mut found, mut todo) = (Vec::new(), vec![(Vec::new(), ROOT)]);
        let mut left = PATHS_MAX;
        while let Some((path, id)) = todo.pop() {
            for (name, id) in self.children(id).into_iter().flatten() {
                let below = match path.is_empty() {
                    true => name.clone(),
                    false => [&path[..], name].join(&b'/'),
                };
                let rest = left.checked_sub(below.len());
                left = rest
                    .filter(|_| below.len() <= PATH_MAX)
                    .ok_or_else(|| format!("the folders around {:?} are too deep", shown(name)))?;
                found.push((below.clone(), *id));
                if self.children(*id).is_some() {
                    todo.push((below, *id));
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> Node {
        Node::Folder(BTreeMap::new())
    }

    fn file(name: &str) -> Node {
        Node::File(Content::of_nothing(name))
    }

    fn listed(tree: &Tree) -> Vec<String> {
        let mut paths: Vec<String> = tree
            .paths()
            .unwrap()
            .into_iter()
            .map(|(path, _)| String::from_utf8(path).unwrap())
            .collect();
        paths.sort();
        paths
    }

    fn add(tree: &mut Tree, path: &str, node: Node) -> Result<()> {
        tree.add(path.as_bytes(), node, Meta::default())
    }

    #[test]
    fn names_that_lead_out_are_refused_and_absolute_ones_stay_inside() {
        let mut tree = Tree::new();
        for path in ["../a", "a/../../b", "a/..", ".."] {
            assert!(add(&mut tree, path, file("x")).is_err(), "{path}");
            assert!(tree.link(b"new", path.as_bytes()).is_err(), "{path}");
        }
        add(&mut tree, "/etc//./passwd", file("x")).unwrap();
        assert_eq!(listed(&tree), ["etc", "etc/passwd"]);
        let long = "n".repeat(256);
        assert!(add(&mut tree, &long, file("x")).is_err());
        assert!(add(&mut tree, &"a/".repeat(300), folder()).is_err());
        assert!(tree.add(b"a\0b", file("x"), Meta::default()).is_err());
    }

    #[test]
    fn names_in_messages_are_bounded() {
        let error = names("n/".repeat(1 << 19).as_bytes()).unwrap_err();
        assert!(error.len() < 1000 && error.contains("n/n/..."), "{error}");
    }

    #[test]
    fn links_of_the_guest_are_followed_inside_of_the_root() {
        let mut tree = Tree::new();
        add(&mut tree, "usr/lib", folder()).unwrap();
        add(&mut tree, "lib", Node::Symlink(b"usr/lib".to_vec())).unwrap();
        add(&mut tree, "up", Node::Symlink(b"../../../usr/lib".to_vec())).unwrap();
        add(&mut tree, "absolute", Node::Symlink(b"/usr".to_vec())).unwrap();
        add(&mut tree, "lib/a", file("a")).unwrap();
        add(&mut tree, "up/b", file("b")).unwrap();
        add(&mut tree, "absolute/lib/c", file("c")).unwrap();
        let below = ["usr/lib", "usr/lib/a", "usr/lib/b", "usr/lib/c"];
        assert_eq!(listed(&tree)[4..], below);
        add(&mut tree, "loop", Node::Symlink(b"loop".to_vec())).unwrap();
        assert!(add(&mut tree, "loop/x", file("x")).is_err());
        add(&mut tree, "nowhere", Node::Symlink(b"/gone".to_vec())).unwrap();
        assert!(add(&mut tree, "nowhere/x", file("x")).is_err());
        assert!(add(&mut tree, "lib/a/x", file("x")).is_err());
        // The link itself is replaced, and not what it leads to.
        add(&mut tree, "up", file("now a file")).unwrap();
        assert!(matches!(
            tree.node(tree.find("up").unwrap()),
            Node::File(..)
        ));
        assert!(tree.find("usr/lib/b").is_some());
    }

    #[test]
    fn folders_that_grow_through_links_are_refused_before_their_paths_fill_the_memory() {
        let mut tree = Tree::new();
        let long = "n".repeat(200);
        let deep = [long.as_str(); 10].join("/");
        add(&mut tree, &deep, folder()).unwrap();
        add(&mut tree, "l0", Node::Symlink(deep.clone().into_bytes())).unwrap();
        assert!(tree.paths().is_ok());
        add(&mut tree, &format!("l0/{deep}"), folder()).unwrap();
        assert!(tree.paths().unwrap_err().contains("too deep"));
    }

    #[test]
    fn hard_links_share_a_node_and_must_have_a_target() {
        let mut tree = Tree::new();
        add(&mut tree, "a", file("a")).unwrap();
        tree.link(b"b", b"/a").unwrap();
        assert_eq!(tree.find("a"), tree.find("b"));
        assert!(tree.link(b"c", b"gone").is_err());
        add(&mut tree, "folder", folder()).unwrap();
        assert!(tree.link(b"c", b"folder").is_err());
    }

    #[test]
    fn hard_links_are_counted_for_each_file_and_together() {
        let mut tree = Tree::new();
        add(&mut tree, "a", file("a")).unwrap();
        for index in 1..NAMES_MAX {
            tree.link(format!("h{index}").as_bytes(), b"a").unwrap();
        }
        let error = tree.link(b"one more", b"a").unwrap_err();
        assert!(error.contains("65000 names"), "{error}");
        let mut tree = Tree::new();
        let names = NODES_MAX / NAMES_MAX as usize + 1;
        let added = (0..names).try_for_each(|nth| {
            add(&mut tree, &format!("f{nth}"), file("f"))?;
            (1..NAMES_MAX).try_for_each(|link| {
                tree.link(
                    format!("f{nth}-{link}").as_bytes(),
                    format!("f{nth}").as_bytes(),
                )
            })
        });
        let error = added.unwrap_err();
        assert!(error.contains("names"), "{error}");
    }

    #[test]
    fn whiteouts_hide_lower_layers_only() {
        let mut tree = Tree::new();
        for path in ["a/old", "a/sub/old", "b/old", "c"] {
            add(&mut tree, path, file("x")).unwrap();
        }
        tree.layer = 1;
        add(&mut tree, "a/new", file("x")).unwrap();
        tree.hide_all(&[b"a"]);
        tree.hide(&[], b"b");
        add(&mut tree, "c", file("x")).unwrap();
        tree.hide(&[], b"c");
        tree.hide(&[], b"missing");
        tree.hide_all(&[b"missing"]);
        assert_eq!(listed(&tree), ["a", "a/new", "c"]);
    }

    #[test]
    fn whiteouts_that_are_repeated_look_through_a_folder_once() {
        let mut tree = Tree::new();
        for nth in 0..1000 {
            add(&mut tree, &format!("a/low{nth}"), file("x")).unwrap();
        }
        tree.layer = 1;
        for nth in 0..1000 {
            add(&mut tree, &format!("a/b/new{nth}"), file("x")).unwrap();
        }
        let before = tree.work.get();
        for _ in 0..1000 {
            tree.hide_all(&[b"a"]);
            tree.hide(&[b"a"], b"b");
        }
        let work = tree.work.get() - before;
        assert!(work < 10_000, "{work}");
        // It counts anew for the next layer.
        tree.layer = 2;
        add(&mut tree, "a/newer", file("x")).unwrap();
        tree.hide_all(&[b"a"]);
        assert_eq!(listed(&tree), ["a", "a/newer"]);
    }

    #[test]
    fn names_through_many_links_are_work_that_is_bounded() {
        let mut tree = Tree::new();
        let link = Node::Symlink(b"./".repeat(1000));
        add(&mut tree, "l", link).unwrap();
        let mut count = 0;
        while tree.check_work().is_ok() {
            add(&mut tree, "l/l/l/l/l/l/l/l/f", folder()).unwrap();
            // As the next entries do, without waiting for all of them.
            tree.work.set(tree.work.get() * 2);
            count += 1;
        }
        assert!((2..100).contains(&count), "{count}");
        let error = tree.check_work().unwrap_err();
        assert!(error.contains("too deep"), "{error}");
    }
}
