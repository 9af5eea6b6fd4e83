//! Compressed files, through the programs of the distribution for them: each reads one descriptor and writes another.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::bytes;
use crate::failure::{Context, Failure, Result};
use crate::progress::Progress;
use crate::sparse;
use crate::tool::Tool;

/// What may follow the end of an archive: programs fill their last block.
const REST_MAX: u64 = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Xz,
    Zstd,
}

/// What a compressed file begins with.
const MAGIC: &[(&[u8], Compression)] = &[
    (b"\x1f\x8b\x08", Compression::Gzip),
    (b"\xfd7zXZ\0", Compression::Xz),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
];

impl Compression {
    /// That of the file, by its content.
    pub fn of(file: &File) -> std::io::Result<Option<Compression>> {
        Ok(Compression::of_head(&bytes::read(file, 0, 8)?))
    }

    /// That of a file which begins with these bytes.
    pub fn of_head(head: &[u8]) -> Option<Compression> {
        let found = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
        found.map(|(_, kind)| *kind)
    }

    /// The program for it, its package and its options. The memory that a file may claim is bounded.
    fn program(self) -> (&'static str, &'static str, &'static [&'static str]) {
        match self {
            Compression::Gzip => ("gzip", "gzip", &["-dc"]),
            Compression::Xz => (
                "xz",
                "xz-utils",
                &["-dc", "--memlimit-decompress=1GiB", "-T1"],
            ),
            Compression::Zstd => ("zstd", "zstd", &["-dcq", "--memory=1024MB"]),
        }
    }
}

/// Gives `read` what the file decompresses to.
pub fn with<T>(
    path: &Path,
    kind: Compression,
    read: impl FnOnce(&mut dyn Read) -> std::io::Result<T>,
) -> Result<T> {
    let (name, package, options) = kind.program();
    let tool = Tool::find(name, package)?;
    let mut command = tool.command();
    let file = File::open(path).cannot("open", path)?;
    command.args(options).stdin(file);
    let (mut result, mut error) = (None, None);
    let ended = tool.finish(command, |out| {
        match read(out) {
            Ok(value) => {
                // To the end: only then it says whether the file was whole.
                std::io::copy(&mut out.take(REST_MAX), &mut std::io::sink())?;
                result = Some(value);
            }
            Err(why) => {
                error = Some(why.to_string());
                return Err(why);
            }
        }
        Ok(Vec::new())
    });
    if let Some(why) = error {
        return Err(Failure::new(
            path,
            format!("cannot unpack it: {why}"),
            "check it and the free space",
        ));
    }
    let ended = ended?;
    match (ended.code, result) {
        (Some(0), Some(value)) => Ok(value),
        _ => Err(Failure::new(
            path,
            format!(
                "cannot be unpacked by {name} ({}): it is damaged or truncated",
                ended.why()
            ),
            "copy it again from where it came",
        )),
    }
}

/// Unpacks `path` into the new file `to`, at most `max` bytes.
pub fn unpack(path: &Path, kind: Compression, to: &Path, max: u64) -> Result<()> {
    let target = File::create_new(to).cannot("create", to)?;
    let mut progress = Progress::new("unpacking", 0);
    with(path, kind, |from| {
        sparse::from_stream(from, &target, max, &mut progress)
    })
    .map(|_| ())
}
