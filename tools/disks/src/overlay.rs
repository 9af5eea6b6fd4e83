//! `overlay`: looks at the overlay of a disk (`info`), and writes what it holds into a copy of its base or into the base
//! (`commit`). The monitor's library knows the format.
//!
//! A commit into the base notes in the overlay that it is under way: killed at any step, it is run again and ends
//! with the same base. Both files are locked against other processes that use them as an overlay and its base.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use mayfly::overlay::{BaseId, Content, Durability, Overlay, Refusal, State, Storage, lock};
use rustix::fs::{FallocateFlags, SeekFrom};

use crate::bytes;
use crate::copy::copy_part;
use crate::failure::{Context, Failure, Result, printable};
use crate::output::Output;
use crate::progress::Progress;

const CHUNK: u64 = 1 << 20;
/// Sectors are what a guest sees of a disk.
const SECTOR: u64 = 512;

#[derive(Debug, Args)]
pub struct OverlayArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what an overlay holds
    Info(Info),
    /// Write what an overlay holds into a copy of its base, or into the base
    Commit(Commit),
}

#[derive(Debug, Args)]
struct Info {
    /// The overlay
    overlay: PathBuf,
}

#[derive(Debug, Args)]
struct Commit {
    /// The overlay
    overlay: PathBuf,
    /// The base that it was made over
    base: PathBuf,
    /// The disk to make: a copy of the base with what the overlay holds
    #[arg(required_unless_present = "into_base")]
    out: Option<PathBuf>,
    /// Change the base itself and empty the overlay; what other overlays over this base show is a
    /// mixture from then on
    #[arg(long, conflicts_with = "out")]
    into_base: bool,
    /// Replace the output if it exists
    #[arg(long)]
    force: bool,
    /// The base has another modification time than when the overlay was made, but the same content
    #[arg(long)]
    changed_base: bool,
}

pub fn run(args: &OverlayArgs) -> Result<()> {
    match &args.command {
        Command::Info(args) => info(args),
        Command::Commit(args) => commit(args),
    }
}

/// What the library says of a file.
trait Refused<T> {
    fn of(self, file: &Path) -> Result<T>;
}

impl<T> Refused<T> for Result<T, Refusal> {
    fn of(self, file: &Path) -> Result<T> {
        self.map_err(|refusal| match refusal {
            Refusal::Io(_, cause) => cause_of(file, cause),
            Refusal::InUse => Failure::new(
                file,
                "it is in use by another process",
                "end that process first",
            ),
            other => Failure::new(file, format!("it {other}"), "nothing was changed"),
        })
    }
}

fn cause_of(file: &Path, cause: io::Error) -> Failure {
    let failed: io::Result<()> = Err(cause);
    failed.cannot("use", file).expect_err("it is an error")
}

fn info(args: &Info) -> Result<()> {
    let path = &args.overlay;
    let file = File::open(path).cannot("open", path)?;
    let content = Content::read(&file).of(path)?;
    let header = *content.header();
    let (seconds, _) = header.base.modified;
    println!("{}: an overlay", printable(path));
    println!("  disk          {}", bytes::size(header.base.size));
    println!(
        "  base          check value {:08x}, modified {seconds} s after 1970",
        header.base.samples
    );
    println!("  generation    {}", header.generation);
    let allocated = file.metadata().cannot("read", path)?.blocks() * SECTOR;
    println!("  space in use  {}", bytes::size(allocated));
    if header.committing.is_some() {
        println!("  commit        under way, or interrupted");
    }
    // While another process writes the map it cannot be read.
    if let Err(refusal) = lock(&file, true) {
        return match refusal {
            Refusal::InUse => {
                println!("  in use        yes");
                Ok(())
            }
            other => Err(other).of(path),
        };
    }
    let overlay = Overlay::load(Arc::new(file), &content, Durability::Immediate).of(path)?;
    let (mut data, mut zeros) = (0, 0);
    each_run(&overlay, |_, len, state| {
        match state {
            State::Data => data += len,
            State::Zero => zeros += len,
            State::Base => {}
        }
        Ok(())
    })?;
    println!("  in use        no");
    println!("  written       {}", bytes::size(data));
    println!("  zeros         {}", bytes::size(zeros));
    println!(
        "  from base     {}",
        bytes::size(header.base.size - data - zeros)
    );
    Ok(())
}

/// Calls `visit` with offset, length and state of each part of the disk.
fn each_run(
    overlay: &Overlay<File>,
    mut visit: impl FnMut(u64, u64, State) -> Result<()>,
) -> Result<()> {
    let mut at = 0;
    while at < overlay.size() {
        let (state, units) = overlay.state(at);
        let len = (units * mayfly::overlay::UNIT).min(overlay.size() - at);
        visit(at, len, state)?;
        at += len;
    }
    Ok(())
}

/// Opens a disk, which may be a block device; its bytes that a guest sees.
fn open_base(path: &Path, to_write: bool) -> Result<(File, u64)> {
    let mut options = OpenOptions::new();
    options.read(true).write(to_write);
    let file = options.open(path).cannot("open", path)?;
    let end = rustix::fs::seek(&file, SeekFrom::End(0)).cannot("read", path)?;
    Ok((file, end / SECTOR * SECTOR))
}

fn base_id(base: &File, size: u64, path: &Path) -> Result<BaseId> {
    let metadata = base.metadata().cannot("read", path)?;
    let modified = (metadata.mtime(), metadata.mtime_nsec() as u32);
    BaseId::of(base, size, modified).cannot("read", path)
}

fn commit(args: &Commit) -> Result<()> {
    let path = &args.overlay;
    let mut options = OpenOptions::new();
    let file = options.read(true).write(args.into_base).open(path);
    let file = file.cannot("open", path)?;
    lock(&file, false).of(path)?;
    let (base, size) = open_base(&args.base, args.into_base)?;
    lock(&base, !args.into_base).of(&args.base)?;
    let content = Content::read(&file).of(path)?;
    let header = *content.header();
    if header.committing.is_some() && !args.into_base {
        return Err(Failure::new(
            path,
            "a commit into its base was interrupted",
            "run that again, with --into-base",
        ));
    }
    let id = base_id(&base, size, &args.base)?;
    if header.base.size != size {
        return Err(Refusal::Size(header.base.size, size)).of(path);
    }
    match header.committing {
        // It is a mixture then, by which it cannot be told.
        Some(inode) if inode != base.metadata().cannot("read", &args.base)?.ino() => {
            return Err(Failure::new(
                path,
                "a commit into another base was interrupted",
                "name that base",
            ));
        }
        None if header.base.samples != id.samples => return Err(Refusal::OtherBase).of(path),
        None if header.base.modified != id.modified && !args.changed_base => {
            return Err(Failure::new(
                path,
                "its base may have been written to since the overlay was made: it has another modification time",
                "if it has not been, --changed-base commits all the same",
            ));
        }
        _ => {}
    }
    let mut overlay = Overlay::load(Arc::new(file), &content, Durability::Immediate).of(path)?;
    let Some(out) = &args.out else {
        return into_base(&mut overlay, (&base, size, &args.base), path);
    };
    let output = Output::new(out, args.force, &[path, &args.base])?;
    let made = output.scratch("disk");
    let len = rustix::fs::seek(&base, SeekFrom::End(0)).cannot("read", &args.base)?;
    copy_part(&base, 0, len, &made, "copying the base")?;
    let target = OpenOptions::new().read(true).write(true).open(&made);
    let target = target.cannot("open", out)?;
    let (data, zeros) = apply(&overlay, &target, out)?;
    output.commit("disk", output.path())?;
    println!(
        "{}: {}, {} of them written and {} zeros",
        printable(output.path()),
        bytes::size(len),
        bytes::size(data),
        bytes::size(zeros)
    );
    Ok(())
}

fn into_base(
    overlay: &mut Overlay<File>,
    (base, size, base_path): (&File, u64, &Path),
    path: &Path,
) -> Result<()> {
    let inode = base.metadata().cannot("read", base_path)?.ino();
    overlay.set_committing(inode).cannot("write", path)?;
    let (data, zeros) = apply(overlay, base, base_path)?;
    base.sync_all().cannot("write", base_path)?;
    let id = base_id(base, size, base_path)?;
    let stale = overlay.committed(id).cannot("write", path)?;
    drop(stale);
    println!(
        "{}: {} written and {} zeros; {} is empty",
        printable(base_path),
        bytes::size(data),
        bytes::size(zeros),
        printable(path)
    );
    Ok(())
}

/// Writes what the overlay holds into `target`; how many bytes of data and of zeros.
fn apply(overlay: &Overlay<File>, target: &File, target_path: &Path) -> Result<(u64, u64)> {
    let mut progress = Progress::new("writing", overlay.size());
    let mut buffer = vec![0; CHUNK as usize];
    let (mut data, mut zeros) = (0, 0);
    each_run(overlay, |at, len, state| {
        match state {
            State::Base => {}
            State::Data => data += len,
            State::Zero => {
                zeros += len;
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if rustix::fs::fallocate(target, how, at, len).is_ok() {
                    return Ok(());
                }
                buffer.fill(0);
            }
        }
        let mut done = 0;
        while state != State::Base && done < len {
            let part = (len - done).min(CHUNK) as usize;
            if state == State::Data {
                let from = overlay.write_at(at + done);
                let read = overlay.file().read_exact_at(&mut buffer[..part], from);
                read.cannot("read the overlay of", target_path)?;
            }
            let written = target.write_all_at(&mut buffer[..part], at + done);
            written.cannot("write", target_path)?;
            done += part as u64;
            progress.set(at + done);
        }
        Ok(())
    })?;
    Ok((data, zeros))
}
