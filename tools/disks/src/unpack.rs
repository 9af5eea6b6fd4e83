//! Compressed files, through the programs that everyone has for them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::failure::{Context, Failure, Result};
use crate::formats::Kind;
use crate::progress::Progress;
use crate::sparse;
use crate::tool::Tool;

/// What may follow the end of an archive.
const REST_MAX: u64 = 1 << 30;

/// The program for a compression, with its options. The memory that a file may claim is bounded.
fn program(kind: Kind) -> Option<(&'static str, &'static str, &'static [&'static str])> {
    match kind {
        Kind::Gzip => Some(("gzip", "gzip", &["-dc"])),
        Kind::Xz => Some((
            "xz",
            "xz-utils",
            &["-dc", "--memlimit-decompress=1GiB", "-T1"],
        )),
        Kind::Zstd => Some(("zstd", "zstd", &["-dcq", "--memory=1024MB"])),
        _ => None,
    }
}

pub fn is_compressed(kind: Kind) -> bool {
    program(kind).is_some()
}

/// Gives `read` what the file decompresses to.
pub fn with<T>(
    path: &Path,
    kind: Kind,
    read: impl FnOnce(&mut dyn Read) -> std::io::Result<T>,
) -> Result<T> {
    let (name, package, options) = program(kind).expect("a compression");
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
pub fn unpack(path: &Path, kind: Kind, to: &Path, max: u64) -> Result<()> {
    let target = File::create_new(to).cannot("create", to)?;
    let mut progress = Progress::new("unpacking", 0);
    with(path, kind, |from| {
        sparse::from_stream(from, &target, max, &mut progress)
    })
    .map(|_| ())
}
