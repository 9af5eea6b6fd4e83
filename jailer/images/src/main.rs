//! `mayfly-image`: the disks of container images, folders and tarballs, for engines, for `mayfly-jailer run --image` and
//! by hand. One message on standard error, and exit code 1, where it cannot be done.

use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Args, Parser, Subcommand};
use mayfly_images::bytes::{given_size, size};
use mayfly_images::failure::{Context, Result, printable};
use mayfly_images::fill::LeftOut;
use mayfly_images::{Cache, Listed, SIZE, SOURCE_MAX, Source, default_folder};

#[derive(Debug, Parser)]
#[command(
    name = "mayfly-image",
    version,
    about = "Read-only disks of container images, folders and tarballs, made once"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    cache: Place,
}

#[derive(Debug, Args)]
struct Place {
    /// The folder of the cache [default: /var/cache/mayfly/images of root, mayfly/images in $XDG_CACHE_HOME of others]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// How much the disks may take, in MiB or with M or G; those not used for longest go, and none in use [default: 10G]
    #[arg(long, global = true, value_name = "LIMIT", value_parser = given_size)]
    size: Option<u64>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the path of the disk of a source; it is made if it is not there
    Disk(Disk),
    /// List the disks of the cache, the most recently used first
    List,
    /// Remove disks until the others take at most --size
    Prune {
        /// Remove all that are not in use
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
struct Disk {
    /// A folder, an OCI image layout (a folder or an archive), a tar archive (also .gz, .xz, .zst), or an EROFS or ext4
    /// file, which is given back as it is
    source: PathBuf,
    /// Which image of a layout with several
    #[arg(long)]
    name: Option<String>,
    /// The source is a folder that is a root, also where it looks like an image layout
    #[arg(long, conflicts_with = "name")]
    root: bool,
    /// How much content a source may unpack to
    #[arg(long, value_name = "SIZE", value_parser = given_size)]
    max_size: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayfly-image: {error}.");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let place = &arguments.cache;
    let folder = place.cache.clone().map_or_else(default_folder, Ok)?;
    let limit = place.size.unwrap_or(SIZE);
    let cache = Cache::open(&folder, limit)?;
    match &arguments.command {
        Command::Disk(disk) => {
            let found = cache.disk(&Source {
                path: disk.source.clone(),
                name: disk.name.clone(),
                max: disk.max_size.unwrap_or(SOURCE_MAX),
                is_root: disk.root,
            })?;
            if found.is_new {
                note(&found.left_out);
            }
            let mut line = found.path.into_os_string().into_vec();
            line.push(b'\n');
            let said = std::io::stdout().write_all(&line);
            said.cannot("write", Path::new("standard output"))?;
        }
        Command::List => {
            for disk in cache.list()? {
                println!("{}", line(&disk));
            }
        }
        Command::Prune { all } => {
            let removed = cache.prune(if *all { 0 } else { limit })?;
            let freed = removed.iter().map(|disk| disk.allocated).sum();
            println!("{} disks removed, {} freed", removed.len(), size(freed));
        }
    }
    Ok(())
}

/// What a disk lacks, on standard error.
fn note(left_out: &LeftOut) {
    for line in left_out.lines() {
        eprintln!("mayfly-image: note: {line}");
    }
}

fn line(disk: &Listed) -> String {
    let ago = SystemTime::now()
        .duration_since(disk.last_use)
        .unwrap_or_default();
    let use_now = if disk.is_in_use { ", in use" } else { "" };
    format!(
        "{}  {}, used {} s ago{use_now}",
        printable(&disk.path),
        size(disk.allocated),
        ago.as_secs()
    )
}
