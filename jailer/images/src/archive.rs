//! tar archives (POSIX ustar, with the extensions of GNU and pax): names, kinds, owners and content,
//! one entry after the other. Archives are hostile: extension records are bounded, numbers checked,
//! and nothing is written here.

use std::fs::File;
use std::io::{self, Read};

use crate::bytes::{has, until_zero};
use crate::sparse::fill;
use crate::tree::CAPABILITY;

const BLOCK: usize = 512;
/// A long name, or a record of pax attributes.
const EXTENSION_MAX: u64 = 1 << 20;
/// What is kept of the value of an extended attribute: capabilities have 24 bytes.
const ATTRIBUTE_MAX: usize = 64;
/// Entries and extension records of all archives that are read into one tree. An image of a million
/// files has some two million of them.
const HEADERS_MAX: u64 = 1 << 23;
/// The bytes of all their extension records, and of content that is passed over.
const RECORDS_MAX: u64 = 1 << 30;
const SKIPPED_MAX: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Folder,
    Fifo,
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub device: (u32, u32),
    pub size: u64,
    /// The value of [`CAPABILITY`].
    pub capability: Option<Vec<u8>>,
    /// How many other extended attributes it has.
    pub attributes: u64,
}

/// What pax and GNU records before an entry say of it.
#[derive(Debug, Clone, Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    capability: Option<Vec<u8>>,
    attributes: u64,
}

/// What archives may still have beside the content that is taken: without a bound, a small compressed
/// one could be read for days.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    headers: u64,
    records: u64,
    skipped: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget {
            headers: HEADERS_MAX,
            records: RECORDS_MAX,
            skipped: SKIPPED_MAX,
        }
    }
}

/// Takes `count` of what is left.
fn take(left: &mut u64, count: u64, what: &str) -> io::Result<()> {
    *left = left
        .checked_sub(count)
        .ok_or_else(|| invalid(&format!("there {what}")))?;
    Ok(())
}

#[derive(Debug)]
pub struct Archive<R> {
    from: R,
    budget: Budget,
    /// Bytes of the current entry, and of its padding, that are still to come.
    left: u64,
    padding: u64,
    global: Extended,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Archive<File> {
    /// Whether a file begins as one.
    pub fn is_one(file: &File) -> io::Result<bool> {
        Ok(has(&crate::bytes::read(file, 0, BLOCK)?, 257, b"ustar"))
    }
}

impl<R: Read> Archive<R> {
    /// With a budget of its own, and content that is passed over without a bound: that of a file of this
    /// host.
    pub fn new(from: R) -> Self {
        let budget = Budget {
            skipped: u64::MAX,
            ..Budget::default()
        };
        Archive::within(from, budget)
    }

    /// With what is left to the archives of one tree.
    pub fn within(from: R, budget: Budget) -> Self {
        Archive {
            from,
            budget,
            left: 0,
            padding: 0,
            global: Extended::default(),
        }
    }

    /// What it has left.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// The next entry; its content is read from this archive.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut extended = self.global.clone();
        loop {
            self.skip()?;
            let mut header = [0; BLOCK];
            match fill(&mut self.from, &mut header)? {
                BLOCK => {}
                // Some archives lack the blocks of zeros at their end.
                0 => return Ok(None),
                _ => return Err(invalid("the archive is truncated")),
            }
            if header.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            take(
                &mut self.budget.headers,
                1,
                "are more than 8388608 entries and records",
            )?;
            if checksum(&header) != number(&header[148..156]) {
                return Err(invalid("a header of the archive is damaged"));
            }
            let size = number(&header[124..136]).ok_or_else(|| invalid("an entry has no size"))?;
            let kind = header[156];
            if !matches!(kind, b'L' | b'K' | b'x' | b'g') {
                return self.entry(&header, size, extended).map(Some);
            }
            if size > EXTENSION_MAX {
                return Err(invalid("an extension record is longer than 1 MiB"));
            }
            take(
                &mut self.budget.records,
                size,
                "is more than 1 GiB of records",
            )?;
            self.begin(size);
            let mut record = vec![0; size as usize];
            self.read_exact(&mut record)?;
            let text = || until_zero(&record).to_vec();
            match kind {
                b'L' => extended.name = Some(text()),
                b'K' => extended.link = Some(text()),
                b'x' => pax(&record, &mut extended)?,
                _ => {
                    pax(&record, &mut self.global)?;
                    pax(&record, &mut extended)?;
                }
            }
        }
    }

    fn entry(&mut self, header: &[u8; BLOCK], size: u64, extended: Extended) -> io::Result<Entry> {
        let field = |from: usize, to: usize| until_zero(&header[from..to]).to_vec();
        let kind = match header[156] {
            0 | b'0' | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Folder,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(invalid("it was made with --sparse, which is not read here")),
            _ => return Err(invalid("an entry is of an unknown type")),
        };
        let mut name = field(0, 100);
        // Only POSIX archives have the second half of a long name there.
        if has(header, 257, b"ustar\0") && header[345] != 0 {
            name = [field(345, 500), name].join(&b'/');
        }
        let name = extended.name.unwrap_or(name);
        // In the oldest archives only a slash tells a folder.
        let kind = match kind {
            EntryKind::File if name.ends_with(b"/") => EntryKind::Folder,
            other => other,
        };
        let size = match kind {
            EntryKind::File => extended.size.unwrap_or(size),
            _ => 0,
        };
        self.begin(size);
        let short =
            |from: usize, to: usize| number(&header[from..to]).and_then(|n| u32::try_from(n).ok());
        Ok(Entry {
            name,
            link: extended.link.unwrap_or_else(|| field(157, 257)),
            kind,
            mode: short(100, 108).unwrap_or(0) & 0o7777,
            uid: extended.uid.or(short(108, 116)).unwrap_or(0),
            gid: extended.gid.or(short(116, 124)).unwrap_or(0),
            mtime: extended
                .mtime
                .unwrap_or(number(&header[136..148]).unwrap_or(0) as i64),
            device: (short(329, 337).unwrap_or(0), short(337, 345).unwrap_or(0)),
            size,
            capability: extended.capability,
            attributes: extended.attributes,
        })
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// Skips what is left of the current entry.
    fn skip(&mut self) -> io::Result<()> {
        const SKIPPED: &str = "is more than 1 GiB of content of entries that take none";
        take(&mut self.budget.skipped, self.left, SKIPPED)?;
        let rest = self.left.saturating_add(self.padding);
        let skipped = io::copy(&mut (&mut self.from).take(rest), &mut io::sink())?;
        // The padding of the last entry may be missing.
        if skipped < self.left {
            return Err(invalid("the archive is truncated"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

/// The content of the current entry.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let max = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if max == 0 {
            return Ok(0);
        }
        let len = self.from.read(&mut buffer[..max])?;
        if len == 0 {
            return Err(invalid("the archive is truncated"));
        }
        self.left -= len as u64;
        Ok(len)
    }
}

/// Octal digits, or the base-256 number of GNU.
fn number(field: &[u8]) -> Option<u64> {
    match field.first()? {
        0x80 => field[1..].iter().try_fold(0u64, |value, &byte| {
            value.checked_mul(256)?.checked_add(u64::from(byte))
        }),
        0x81.. => None,
        _ => {
            let text = std::str::from_utf8(field).ok()?;
            let text = text.trim_matches(['\0', ' ']);
            if text.is_empty() {
                Some(0)
            } else {
                u64::from_str_radix(text, 8).ok()
            }
        }
    }
}

/// The sum of a header's bytes, its own field taken as spaces.
fn checksum(header: &[u8; BLOCK]) -> Option<u64> {
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    let own: u64 = header[148..156].iter().map(|&byte| u64::from(byte)).sum();
    Some(sum - own + 8 * u64::from(b' '))
}

/// `LENGTH KEY=VALUE\n`, again and again.
fn pax(record: &[u8], into: &mut Extended) -> io::Result<()> {
    let bad = || invalid("a pax record is damaged");
    let mut rest = record;
    while !rest.is_empty() && rest[0] != 0 {
        let space = rest.iter().position(|&byte| byte == b' ').ok_or_else(bad)?;
        let len = std::str::from_utf8(&rest[..space])
            .ok()
            .and_then(|text| text.parse::<usize>().ok());
        let len = len
            .filter(|&len| len > space + 1 && len <= rest.len())
            .ok_or_else(bad)?;
        let line = rest[space + 1..len].strip_suffix(b"\n").ok_or_else(bad)?;
        rest = &rest[len..];
        let equals = line.iter().position(|&byte| byte == b'=').ok_or_else(bad)?;
        let (key, value) = (
            String::from_utf8_lossy(&line[..equals]),
            &line[equals + 1..],
        );
        let text = || std::str::from_utf8(value).map_err(|_| bad());
        match &*key {
            "path" => into.name = Some(value.to_vec()),
            "linkpath" => into.link = Some(value.to_vec()),
            "size" => into.size = Some(text()?.parse().map_err(|_| bad())?),
            "uid" => into.uid = Some(text()?.parse().map_err(|_| bad())?),
            "gid" => into.gid = Some(text()?.parse().map_err(|_| bad())?),
            "mtime" => {
                let whole = text()?.split('.').next().unwrap_or("");
                into.mtime = Some(whole.parse().map_err(|_| bad())?);
            }
            _ if key.starts_with("GNU.sparse") => {
                return Err(invalid("it was made with --sparse, which is not read here"));
            }
            _ => {
                match key.strip_prefix("SCHILY.xattr.") {
                    Some(CAPABILITY) => {
                        // What is longer is none, and is refused by its length.
                        let value = value.get(..ATTRIBUTE_MAX).unwrap_or(value);
                        into.capability = Some(value.to_vec());
                    }
                    Some(_) => into.attributes = into.attributes.saturating_add(1),
                    None => {}
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: u8, size: u64) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0004755");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[156] = kind;
        header[257..263].copy_from_slice(b"ustar\0");
        let sum = checksum(&header).unwrap();
        header[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        header
    }

    fn padded(content: &[u8]) -> Vec<u8> {
        let mut content = content.to_vec();
        content.resize(content.len().next_multiple_of(BLOCK), 0);
        content
    }

    #[test]
    fn entries_have_the_names_and_owners_of_pax_records() {
        let record = b"13 path=a/b\n".to_vec();
        assert!(pax(&record, &mut Extended::default()).is_err());
        let record = b"12 path=a/b\n14 uid=100000\n32 SCHILY.xattr.security.c=\x01\x00\n\x02\n";
        let mut archive = header("x", b'x', record.len() as u64).to_vec();
        archive.extend(padded(record));
        archive.extend(header("short", b'0', 5));
        archive.extend(padded(b"hello"));
        archive.extend(header("dir/", b'5', 0));
        let mut archive = Archive::new(&archive[..]);
        let entry = archive.next_entry().unwrap().unwrap();
        assert_eq!(
            (entry.name.as_slice(), entry.uid, entry.mode),
            (&b"a/b"[..], 100_000, 0o4755)
        );
        assert_eq!((entry.attributes, entry.capability), (1, None));
        let mut content = String::new();
        archive.read_to_string(&mut content).unwrap();
        assert_eq!(content, "hello");
        assert_eq!(
            archive.next_entry().unwrap().unwrap().kind,
            EntryKind::Folder
        );
        assert!(archive.next_entry().unwrap().is_none());
    }

    #[test]
    fn archives_that_are_truncated_or_claim_much_are_refused() {
        let file = header("a", b'0', 7 << 30);
        let mut archive = Archive::new(&file[..]);
        archive.next_entry().unwrap();
        assert!(archive.read(&mut [0; 16]).is_err());
        let mut archive = Archive::new(&file[..]);
        archive.next_entry().unwrap();
        assert!(archive.next_entry().is_err());
        let long = header("a", b'L', 7 << 30);
        assert!(Archive::new(&long[..]).next_entry().is_err());
        let mut wrong = header("a", b'0', 0);
        wrong[0] = b'b';
        assert!(Archive::new(&wrong[..]).next_entry().is_err());
        assert!(
            Archive::new(&header("a", b'0', 0)[..300])
                .next_entry()
                .is_err()
        );
    }

    #[test]
    fn archives_have_as_many_entries_records_and_passed_over_bytes_as_their_budget() {
        let budget = Budget {
            headers: 3,
            records: 40,
            skipped: 5,
        };
        let end = |archive: &[u8]| {
            let mut archive = Archive::within(archive, budget);
            while archive.next_entry()?.is_some() {}
            Ok::<_, io::Error>(archive.budget())
        };
        let file = [&header("a", b'0', 5)[..], &padded(b"hello")].concat();
        let folder = header("a/", b'5', 0);
        let record = b"12 path=a/b\n";
        let record = [&header("x", b'g', 12)[..], &padded(record)].concat();
        let left = end(&[&record[..], &file, &folder].concat()).unwrap();
        assert_eq!((left.headers, left.records, left.skipped), (0, 28, 0));
        for (archive, expected) in [
            (folder.repeat(4), "8388608 entries"),
            (record.repeat(4), "8388608 entries"),
            (file.repeat(2), "content of entries that take none"),
        ] {
            let error = end(&archive).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let long = [&header("x", b'x', 41)[..], &padded(&[0; 41])].concat();
        let error = end(&long).unwrap_err().to_string();
        assert!(error.contains("1 GiB of records"), "{error}");
        // What is read is not passed over.
        let mut archive = Archive::within(
            &file[..],
            Budget {
                skipped: 0,
                ..budget
            },
        );
        archive.next_entry().unwrap();
        archive.read_exact(&mut [0; 5]).unwrap();
        assert!(archive.next_entry().unwrap().is_none());
    }

    #[test]
    fn attributes_are_counted_and_a_capability_of_the_entry_counts_before_a_general_one() {
        let of = |value: &str| format!("33 SCHILY.xattr.security.capability={value}\n");
        let of = |value: &str| {
            let line = of(value);
            format!("{:02}{}", line.len(), &line[2..])
        };
        let many = [
            b"22 SCHILY.xattr.u.a=b\n".repeat(5000),
            of("all").into_bytes(),
        ]
        .concat();
        let own = of("own").into_bytes();
        let mut archive = header("g", b'g', many.len() as u64).to_vec();
        archive.extend(padded(&many));
        archive.extend(header("x", b'x', own.len() as u64));
        archive.extend(padded(&own));
        archive.extend(header("a", b'0', 0));
        archive.extend(header("b", b'0', 0));
        let mut archive = Archive::new(&archive[..]);
        let mut next = || archive.next_entry().unwrap().unwrap();
        let (a, b) = (next(), next());
        assert_eq!(
            (a.attributes, a.capability.unwrap()),
            (5000, b"own".to_vec())
        );
        assert_eq!(
            (b.attributes, b.capability.unwrap()),
            (5000, b"all".to_vec())
        );
    }
}
