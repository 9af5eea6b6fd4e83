//! The list of the files that a disk was made from: for each the key that [`crate::identity`] gives it, and its SHA-256.
//! A list is made aside and renamed, and read whole; one that is damaged counts as none.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use crate::content::Sum;
use crate::identity::Key;

const MAGIC: &[u8; 8] = b"mfknown1";
const RECORD: usize = 16 + 32;
/// What one list may have: as many as a tree.
const LIST_MAX: u64 = (RECORD * crate::tree::NODES_MAX + 8) as u64;
/// How many lists are looked through for a folder.
const LISTS_MAX: usize = 32;
/// A list in which so many were found for each that was not is the right one: no other is read.
const RIGHT: usize = 8;

/// One list, in the order of its keys.
#[derive(Debug, Default)]
pub struct List(Vec<(Key, Sum)>);

impl List {
    pub fn new(mut all: Vec<(Key, Sum)>) -> List {
        all.sort_unstable();
        all.dedup_by_key(|(key, _)| *key);
        List(all)
    }

    pub fn read(path: &PathBuf) -> Option<List> {
        if fs::metadata(path).ok()?.len() > LIST_MAX {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        let records = bytes.strip_prefix(MAGIC)?.chunks_exact(RECORD);
        let read = |record: &[u8]| Some((*record.first_chunk()?, *record.last_chunk()?));
        let whole = records.remainder().is_empty();
        let list: Option<Vec<_>> = records.map(read).collect();
        list.filter(|list| whole && list.is_sorted()).map(List)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for (key, sum) in &self.0 {
            bytes.extend(key);
            bytes.extend(sum);
        }
        bytes
    }

    fn find(&self, key: &Key) -> Option<Sum> {
        let found = self.0.binary_search_by_key(key, |(key, _)| *key).ok()?;
        Some(self.0[found].1)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Those of both.
    pub fn with(self, other: List) -> List {
        List::new([self.0, other.0].concat())
    }
}

/// The lists of a cache, which are read as far as they are needed.
#[derive(Debug)]
pub struct Lists(RefCell<State>);

#[derive(Debug)]
struct State {
    /// Those that are not read yet, the most recently used last.
    paths: Vec<PathBuf>,
    lists: Vec<List>,
    /// The list that had the last one.
    last: usize,
    found: usize,
    missed: usize,
}

impl Lists {
    /// `paths`: the most recently used first.
    pub fn new(mut paths: Vec<PathBuf>) -> Lists {
        paths.truncate(LISTS_MAX);
        paths.reverse();
        Lists(RefCell::new(State {
            paths,
            lists: Vec::new(),
            last: 0,
            found: 0,
            missed: 0,
        }))
    }

    pub fn find(&self, key: &Key) -> Option<Sum> {
        let mut state = self.0.borrow_mut();
        let state = &mut *state;
        let first = state.lists.get(state.last).and_then(|it| it.find(key));
        if let Some(sum) = first {
            state.found += 1;
            return Some(sum);
        }
        for (index, list) in state.lists.iter().enumerate() {
            if let Some(sum) = list.find(key) {
                (state.last, state.found) = (index, state.found + 1);
                return Some(sum);
            }
        }
        while state.found <= RIGHT * state.missed || state.lists.is_empty() {
            let Some(path) = state.paths.pop() else { break };
            let Some(list) = List::read(&path) else {
                continue;
            };
            let sum = list.find(key);
            state.lists.push(list);
            if let Some(sum) = sum {
                (state.last, state.found) = (state.lists.len() - 1, state.found + 1);
                return Some(sum);
            }
        }
        state.missed += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(range: std::ops::Range<u8>) -> List {
        List::new(range.rev().map(|n| ([n; 16], [n; 32])).collect())
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("mf-known-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, bytes).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn lists_are_looked_through_until_the_right_one() {
        let folder = Folder::new("right");
        let paths = [
            folder.write("new", &list(0..10).bytes()),
            folder.write("old", &list(100..200).bytes()),
            folder.write("oldest", &list(200..250).bytes()),
        ];
        let lists = Lists::new(paths.to_vec());
        for n in 100..200 {
            assert_eq!(lists.find(&[n; 16]), Some([n; 32]));
        }
        assert_eq!(lists.find(&[99; 16]), None);
        assert_eq!(lists.0.borrow().paths.len(), 1, "all lists were read");
        assert_eq!(lists.find(&[3; 16]), Some([3; 32]));
    }

    #[test]
    fn list_that_is_damaged_counts_as_none() {
        let folder = Folder::new("damaged");
        let good = list(0..10).bytes();
        let mut unsorted = good.clone();
        unsorted[8] = 0xff;
        for bytes in [&b""[..], b"mfknown", &good[..good.len() - 1], &unsorted] {
            assert!(List::read(&folder.write("list", bytes)).is_none());
        }
        assert_eq!(List::read(&folder.write("list", &good)).unwrap().len(), 10);
    }
}
