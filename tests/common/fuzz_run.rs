//! The short run of a fuzz target: the corpus in `tests/fuzz/corpus`, mutations of it, and random
//! bytes. Included by the unit tests of the packages that have targets; `tools/fuzz` is the long run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Inputs beside the corpus, and the time after which there are no more.
const INPUTS: usize = 20_000;
const TIME: Duration = Duration::from_secs(3);
/// Bytes of the longest input, unless one of the corpus is longer.
const LENGTH_MAX: usize = 1024;

/// Runs `target`, whose corpus is that of `name`. The seed is printed, and taken from MAYFLY_SEED if
/// that is set; an input that fails is printed in hexadecimal digits.
pub fn run(name: &str, target: fn(&[u8])) {
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "the target {name} has no corpus");
    for (path, input) in &corpus {
        println!("{}", path.display());
        one(target, input);
    }
    let seed = std::env::var("MAYFLY_SEED").ok().map_or_else(
        || u64::from(std::process::id()),
        |seed| seed.parse().expect("MAYFLY_SEED is a number"),
    );
    println!("MAYFLY_SEED={seed}");
    let mut random = Random(seed);
    let until = Instant::now() + TIME;
    let mut count = 0;
    while count < INPUTS && Instant::now() < until {
        one(target, &input(&corpus, &mut random));
        count += 1;
    }
    println!("{} files of the corpus, {count} other inputs", corpus.len());
}

fn one(target: fn(&[u8]), input: &[u8]) {
    /// Prints the input if the target panics.
    struct Shown<'a>(&'a [u8]);
    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let digits: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
                println!("the input that failed, for xxd -r -p: {digits}");
            }
        }
    }
    let shown = Shown(input);
    target(shown.0);
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.ancestors().map(|root| root.join("tests/fuzz/corpus"));
    let folder = folder.filter(|path| path.is_dir()).last().unwrap();
    let mut files: Vec<_> = std::fs::read_dir(folder.join(name))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).unwrap());
    files.into_iter().map(read).collect()
}

/// Random bytes, or a file of the corpus with some changes.
fn input(corpus: &[(PathBuf, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let some = |random: &mut Random| corpus[random.below(corpus.len())].1.clone();
    if random.below(4) == 0 {
        let length = random.below(LENGTH_MAX);
        return (0..length).map(|_| random.byte()).collect();
    }
    let mut bytes = some(random);
    for _ in 0..=random.below(8) {
        let at = random.below(bytes.len() + 1);
        let end = at + random.below(bytes.len() - at + 1).min(16);
        match random.below(7) {
            0 => drop(bytes.drain(at..end)),
            1 => bytes.insert(at, random.byte()),
            2 => bytes[at..end].fill_with(|| random.byte()),
            3 => bytes.truncate(end),
            4 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let other = some(random);
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let bit = 1 << random.below(8);
                bytes[at..end]
                    .iter_mut()
                    .take(1)
                    .for_each(|byte| *byte ^= bit);
            }
        }
    }
    let longest = corpus.iter().map(|(_, bytes)| bytes.len()).max();
    bytes.truncate(LENGTH_MAX.max(longest.unwrap_or(0)));
    bytes
}

/// Numbers from a seed (Steele, Lea, Flood: SplitMix).
struct Random(u64);

impl Random {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % end as u64) as usize
    }

    /// One of those at the ends, every other time.
    fn byte(&mut self) -> u8 {
        match self.below(2) {
            0 => [0, 1, 2, 3, 4, 0x7f, 0x80, 0xff][self.below(8)],
            _ => self.below(256) as u8,
        }
    }
}
