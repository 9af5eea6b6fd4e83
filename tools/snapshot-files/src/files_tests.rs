//! Tests of `verify` and `merge` with whole snapshots, written as the monitor writes them.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use mayfly::snapshot::{
    Header, Kind, MemoryImage, SnapshotId, Target, VERSION, encode, write_pair,
};
use mayfly::wire::check::{PAGE, is_zero, of_page};
use vmm_sys_util::tempdir::TempDir;

use crate::image::Page;
use crate::opened::{Failure, Opened, Paths};
use crate::{merge, verify};

const PAGES: u64 = 600;
const LEN: u64 = PAGES * PAGE as u64;
const ID_AT: u64 = 9 * PAGE as u64;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// A machine's memory, and what was written to it since its last snapshot.
struct Machine {
    memory: Vec<Page>,
    written: BTreeSet<u64>,
    last: Option<SnapshotId>,
    random: Random,
}

impl Machine {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Machine {
            memory: vec![[0; PAGE]; PAGES as usize],
            written: BTreeSet::new(),
            last: None,
            random: Random(seed | 1),
        }
    }

    /// Writes to some pages; zeros into a few.
    fn run(&mut self, count: u64) {
        for _ in 0..count {
            let number = self.random.below(PAGES);
            let byte = self.random.below(4) as u8;
            self.memory[number as usize].fill(byte);
            self.written.insert(number);
        }
    }

    fn save(&mut self, kind: Kind, paths: &Paths) -> SnapshotId {
        let id = SnapshotId(u128::from(self.random.below(u64::MAX)).to_be_bytes());
        let number = ID_AT / PAGE as u64;
        self.memory[number as usize][..16].copy_from_slice(&id.0);
        self.written.insert(number);
        let parent = self.last.filter(|_| kind == Kind::Diff);
        let memory = &self.memory;
        let written: Vec<u64> = match kind {
            Kind::Diff => self.written.iter().copied().collect(),
            _ => (0..PAGES)
                .filter(|n| !is_zero(&memory[*n as usize]))
                .collect(),
        };
        let header = |memory| Header {
            version: VERSION,
            id,
            kind,
            parent,
            memory,
            taken: 1,
        };
        write_pair(
            Target::Path(paths.state.clone()),
            Target::Path(paths.memory.clone()),
            |file| {
                file.set_len(LEN)?;
                let mut check: u64 = 0;
                for number in written {
                    let page = &memory[number as usize];
                    file.write_all_at(page, number * PAGE as u64)?;
                    check = check.wrapping_add(of_page(number, page));
                }
                Ok::<_, io::Error>(MemoryImage {
                    len: LEN,
                    check: Some(check),
                    id_at: ID_AT,
                })
            },
            |memory| encode(&header(memory), &format!("state of {id}")),
        )
        .unwrap();
        self.last = Some(id);
        self.written.clear();
        id
    }

    fn content(&self) -> Vec<u8> {
        self.memory.concat()
    }
}

fn places(folder: &TempDir, names: &[&str]) -> Vec<Paths> {
    let place = |name: &&str| {
        let path = folder.as_path().join(name);
        fs::create_dir_all(&path).unwrap();
        Paths::in_folder(&path)
    };
    names.iter().map(place).collect()
}

fn reason(result: Result<(), Failure>) -> String {
    result.unwrap_err().0
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn ten_diffs_when_merged_equal_a_full_snapshot() {
    for seed in [1, 2] {
        let folder = TempDir::new().unwrap();
        let all = places(
            &folder,
            &[
                "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "full",
            ],
        );
        let (full, layers) = all.split_last().unwrap();
        let mut machine = Machine::new(seed);
        machine.run(300);
        machine.save(Kind::Full, &layers[0]);
        for layer in &layers[1..] {
            machine.run(30);
            machine.save(Kind::Diff, layer);
        }
        let last = machine.last.unwrap();
        let output = places(&folder, &["output"]).remove(0);
        merge::run(&layers[0], &layers[1..], &output).unwrap();
        verify::run(&output).unwrap();
        let merged = Opened::at(&output).unwrap();
        assert_eq!((merged.header.id, merged.header.kind), (last, Kind::Full));
        assert_eq!(merged.header.parent, None);
        let state: String = merged.state.parse().unwrap();
        assert_eq!(state, format!("state of {last}"));
        assert!(fs::read(&output.memory).unwrap() == machine.content());
        // The same check value as if it had been taken at once, but for the id.
        machine.save(Kind::Full, full);
        let number = ID_AT / PAGE as u64;
        let id_page = |paths: &Paths| {
            let bytes = fs::read(&paths.memory).unwrap();
            of_page(
                number,
                bytes.as_chunks::<PAGE>().0[number as usize]
                    .as_ref()
                    .try_into()
                    .unwrap(),
            )
        };
        let without_id = |paths: &Paths| {
            let check = Opened::at(paths).unwrap().header.memory.check.unwrap();
            check.wrapping_sub(id_page(paths))
        };
        assert_eq!(without_id(&output), without_id(full));
        // As sparse as that.
        let blocks = |paths: &Paths| fs::metadata(&paths.memory).unwrap().blocks();
        assert_eq!(blocks(&output), blocks(full));
        // One after another, in place, it is the same.
        for layer in &layers[1..] {
            merge::run(&layers[0], std::slice::from_ref(layer), &layers[0]).unwrap();
        }
        let [one, other] = [&layers[0], &output].map(|paths| fs::read(&paths.state).unwrap());
        assert_eq!(one, other);
        let [one, other] = [&layers[0], &output].map(|paths| fs::read(&paths.memory).unwrap());
        assert!(one == other);
    }
}

#[test]
fn diffs_when_merged_without_a_base_are_a_diff_of_the_same_base() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["base", "1", "2", "3", "diffs", "output"]);
    let [base, one, two, three, diffs, output] = &all[..] else {
        panic!("six places")
    };
    let mut machine = Machine::new(7);
    machine.run(300);
    let base_id = machine.save(Kind::Full, base);
    for layer in [one, two, three] {
        machine.run(100);
        machine.save(Kind::Diff, layer);
    }
    merge::run(one, &[two.clone(), three.clone()], diffs).unwrap();
    let merged = Opened::at(diffs).unwrap().header;
    assert_eq!((merged.kind, merged.parent), (Kind::Diff, Some(base_id)));
    verify::run(diffs).unwrap();
    merge::run(base, std::slice::from_ref(diffs), output).unwrap();
    verify::run(output).unwrap();
    assert!(fs::read(&output.memory).unwrap() == machine.content());
}

#[test]
fn first_diff_when_it_has_no_parent_is_a_base() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["first", "second", "output"]);
    let mut machine = Machine::new(8);
    for place in &all[..2] {
        machine.run(200);
        machine.save(Kind::Diff, place);
    }
    merge::run(&all[0], &all[1..2], &all[2]).unwrap();
    let merged = Opened::at(&all[2]).unwrap().header;
    assert_eq!((merged.kind, merged.parent), (Kind::Full, None));
    assert!(fs::read(&all[2].memory).unwrap() == machine.content());
    verify::run(&all[2]).unwrap();
}

#[test]
fn merge_when_the_parts_do_not_fit_is_refused_and_writes_nothing() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["base", "1", "2", "output"]);
    let [base, one, two, output] = &all[..] else {
        panic!("four places")
    };
    let mut machine = Machine::new(9);
    machine.run(300);
    machine.save(Kind::Full, base);
    for layer in [one, two] {
        machine.run(100);
        machine.save(Kind::Diff, layer);
    }
    let merge = |base: &Paths, diffs: &[&Paths]| {
        let diffs: Vec<Paths> = diffs.iter().map(|paths| (*paths).clone()).collect();
        merge::run(base, &diffs, output)
    };
    let skipped = reason(merge(base, &[two]));
    assert!(
        skipped.contains("in the order in which they were taken"),
        "{skipped}"
    );
    let turned = reason(merge(base, &[two, one]));
    assert!(
        turned.contains("in the order in which they were taken"),
        "{turned}"
    );
    let full = reason(merge(one, &[base]));
    assert!(full.contains("can only come first"), "{full}");
    fs::copy(&one.memory, folder.as_path().join("kept")).unwrap();
    for place in [base, one] {
        flip(&place.memory, ID_AT + 100);
        let altered = reason(merge(base, &[one]));
        assert!(
            altered.contains("was altered after it was written"),
            "{altered}"
        );
        flip(&place.memory, ID_AT + 100);
    }
    flip(&two.memory, ID_AT);
    let mixed = reason(merge(base, &[one, two]));
    assert!(mixed.contains("belongs to another snapshot"), "{mixed}");
    flip(&two.memory, ID_AT);
    assert_eq!(
        fs::read_dir(folder.as_path().join("output"))
            .unwrap()
            .count(),
        0
    );
    merge(base, &[one, two]).unwrap();
}

#[test]
fn verify_when_anything_is_altered_says_what() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["full", "diff"]);
    let mut machine = Machine::new(10);
    machine.run(300);
    machine.save(Kind::Full, &all[0]);
    machine.run(50);
    machine.save(Kind::Diff, &all[1]);
    for paths in &all {
        verify::run(paths).unwrap();
        for (path, at, expected) in [
            (&paths.memory, 0, "was altered"),
            (&paths.memory, LEN - 1, "was altered"),
            (&paths.memory, ID_AT + 15, "belongs to another snapshot"),
            (&paths.state, 40, "was altered"),
            (&paths.state, 0, "is not a snapshot of mayfly"),
        ] {
            flip(path, at);
            let told = reason(verify::run(paths));
            assert!(told.contains(expected), "{told}, not {expected}");
            flip(path, at);
        }
    }
    let memory = OpenOptions::new().write(true).open(&all[0].memory).unwrap();
    memory.set_len(LEN - 4096).unwrap();
    let told = reason(verify::run(&all[0]));
    assert!(told.contains("it is truncated"), "{told}");
    memory.set_len(LEN).unwrap();
    fs::remove_file(&all[0].memory).unwrap();
    let told = reason(verify::run(&all[0]));
    assert!(told.contains("cannot be read: No such file"), "{told}");
}

#[test]
fn verify_when_the_holes_of_a_copy_are_filled_minds_those_of_a_diff_only() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["full", "diff"]);
    let mut machine = Machine::new(11);
    machine.run(300);
    machine.save(Kind::Full, &all[0]);
    // Some of these are zeros.
    machine.run(200);
    machine.save(Kind::Diff, &all[1]);
    for paths in &all {
        verify::run(paths).unwrap();
        let bytes = fs::read(&paths.memory).unwrap();
        fs::write(&paths.memory, bytes).unwrap();
    }
    verify::run(&all[0]).unwrap();
    let told = reason(verify::run(&all[1]));
    assert!(
        told.contains("copying it with a program that fills holes"),
        "{told}"
    );
}

#[test]
fn snapshot_when_its_memory_is_longer_than_any_machines_is_refused_before_memory_is_taken_for_it() {
    let folder = TempDir::new().unwrap();
    let all = places(&folder, &["full"]);
    let header = Header {
        version: VERSION,
        id: SnapshotId([1; 16]),
        kind: Kind::Full,
        parent: None,
        memory: MemoryImage {
            len: 1 << 62,
            check: None,
            id_at: 0,
        },
        taken: 1,
    };
    fs::write(&all[0].state, encode(&header, &"state").unwrap()).unwrap();
    fs::write(&all[0].memory, []).unwrap();
    let told = reason(verify::run(&all[0]));
    assert!(told.contains("which no machine has"), "{told}");
}
