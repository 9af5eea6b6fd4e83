//! Snapshots of a machine's memory, merged, against a model of that memory; and files that were altered.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use mayfly::snapshot::{Header, Kind, MemoryImage, SnapshotId, VERSION, encode_json};
use mayfly::wire::check::{PAGE, of_page};

use crate::fuzz::Input;
use crate::fuzz_folder::Folder;
use crate::image::Page;
use crate::opened::Paths;

/// A machine whose memory is written to and saved, whole and by diffs, and the snapshots merged; then perhaps
/// with a header that says anything, or a byte of a file altered. Checked: what is whole is merged into what
/// the machine's memory was, with the last one's id and state, and passes for whole itself; what is altered
/// is refused, or merged into files that are whole; nothing but the result is left.
pub fn merge(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let folder = Folder::new();
    let mut machine = Machine::new(1 + input.below(24), input);
    let count = 2 + input.below(3);
    let begins_with_diff = input.below(4) == 0;
    let mut all = Vec::new();
    for number in 0..count {
        machine.run(input);
        let kind = if number == 0 { Kind::Full } else { Kind::Diff };
        let paths = place(&folder, &number.to_string());
        machine.save(kind, &paths, number == 0 && begins_with_diff);
        all.push(paths);
    }
    let is_altered = input.flag() && alter(input, &all, &mut machine);
    let output = place(&folder, "out");
    let (base, diffs) = all.split_first().unwrap();
    let merged = super::merge(base, diffs, &output);
    let mut left: Vec<_> = fs::read_dir(output.state.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    let header = match merged {
        Ok(header) => header,
        Err(failure) => {
            assert!(is_altered, "{}", failure.0);
            assert!(failure.0.len() < 4096);
            assert!(left.is_empty(), "{left:?}");
            return;
        }
    };
    assert_eq!(left, ["memory", "state"]);
    let opened =
        crate::opened::Opened::at(&output).unwrap_or_else(|failure| panic!("{}", failure.0));
    crate::verify::content(&opened).unwrap_or_else(|failure| panic!("{}", failure.0));
    assert_eq!(opened.header.id, header.id);
    if !is_altered {
        assert_eq!(header.id, machine.last.unwrap());
        assert_eq!(opened.state.json(), b"7");
        assert_eq!(header.kind == Kind::Diff, begins_with_diff);
        let found = fs::read(&output.memory).unwrap();
        assert!(found == machine.expected(begins_with_diff));
    }
}

/// The files of a snapshot in a new folder of this name.
fn place(folder: &Folder, name: &str) -> Paths {
    let path = folder.path().join(name);
    fs::create_dir(&path).unwrap();
    Paths::in_folder(&path)
}

struct Machine {
    memory: Vec<Page>,
    id_at: u64,
    /// Since the last snapshot, and since the first.
    written: BTreeSet<usize>,
    ever: BTreeSet<usize>,
    last: Option<SnapshotId>,
    next: u8,
}

impl Machine {
    fn new(pages: usize, input: &mut Input<'_>) -> Self {
        Machine {
            id_at: (input.below(pages) * PAGE) as u64,
            memory: vec![[0; PAGE]; pages],
            written: BTreeSet::new(),
            ever: BTreeSet::new(),
            last: None,
            next: 0,
        }
    }

    fn run(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.below(12) {
            let page = input.below(self.memory.len());
            // Zeros often: in a diff they are as good as others.
            self.memory[page] = [input.u8() * u8::from(input.flag()); PAGE];
            self.written.insert(page);
        }
    }

    /// `is_later`: of a machine that was saved before.
    fn save(&mut self, kind: Kind, paths: &Paths, is_later: bool) {
        self.next += 1;
        let id = SnapshotId([self.next; 16]);
        let page = self.id_at as usize / PAGE;
        self.memory[page][..16].copy_from_slice(&id.0);
        self.written.insert(page);
        self.ever.extend(&self.written);
        let kind = if is_later { Kind::Diff } else { kind };
        let file = File::create(&paths.memory).unwrap();
        file.set_len((self.memory.len() * PAGE) as u64).unwrap();
        let mut check = 0u64;
        for (number, page) in self.memory.iter().enumerate() {
            let is_there = match kind {
                Kind::Diff => self.written.contains(&number),
                _ => page.iter().any(|byte| *byte != 0),
            };
            if is_there {
                file.write_all_at(page, (number * PAGE) as u64).unwrap();
                check = check.wrapping_add(of_page(number as u64, page));
            }
        }
        let parent = match is_later {
            true => Some(SnapshotId([0xee; 16])),
            false => self.last.filter(|_| kind == Kind::Diff),
        };
        let memory = MemoryImage {
            len: (self.memory.len() * PAGE) as u64,
            check: Some(check),
            id_at: self.id_at,
        };
        let header = Header {
            version: VERSION,
            id,
            kind,
            parent,
            memory,
            taken: 1,
        };
        fs::write(&paths.state, encode_json(&header, b"7").unwrap()).unwrap();
        self.last = Some(id);
        self.written.clear();
    }

    /// All of memory, or what was written.
    fn expected(&self, written_only: bool) -> Vec<u8> {
        let page =
            |(number, page): (usize, &Page)| match written_only && !self.ever.contains(&number) {
                true => [0; PAGE],
                false => *page,
            };
        self.memory.iter().enumerate().flat_map(page).collect()
    }
}

/// Changes one of the snapshots; whether that can be told.
fn alter(input: &mut Input<'_>, all: &[Paths], machine: &mut Machine) -> bool {
    let paths = &all[input.below(all.len())];
    if input.flag() {
        let path = if input.flag() {
            &paths.state
        } else {
            &paths.memory
        };
        let mut bytes = fs::read(path).unwrap();
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] ^= 1 << input.below(8);
        bytes.truncate(bytes.len() - input.below(8) / 7);
        fs::write(path, bytes).unwrap();
        return true;
    }
    // Signed as by a writer that says anything.
    let len = machine.memory.len() as u64 * PAGE as u64;
    let header = Header {
        version: VERSION,
        id: SnapshotId([input.u8() % 6; 16]),
        kind: input.one_of(&[Kind::Full, Kind::Diff, Kind::Fork]),
        parent: input.flag().then(|| SnapshotId([input.u8() % 6; 16])),
        memory: MemoryImage {
            len: input.one_of(&[
                len,
                len + 1,
                len + PAGE as u64,
                0,
                1 << 40,
                1 << 62,
                u64::MAX,
            ]),
            check: input.flag().then(|| input.u64()),
            id_at: input.one_of(&[machine.id_at, 0, len - 16, len - 15, u64::MAX]),
        },
        taken: input.u64(),
    };
    fs::write(&paths.state, encode_json(&header, b"7").unwrap()).unwrap();
    if input.flag() {
        let file = File::options().write(true).open(&paths.memory).unwrap();
        let _ = file.set_len(header.memory.len);
        let _ = file.write_all_at(&header.id.0, header.memory.id_at);
    }
    true
}
