//! `rootfs`: a root disk from a folder, a tar archive, a container image, or Debian's packages.

mod image;
mod setup;

use std::ffi::OsStr;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use clap::Args;

use crate::boot;
use crate::bytes;
use crate::failure::{Context, Failure, Result, printable};
use crate::formats::Kind;
use crate::output::Output;
use crate::tool::Tool;
use bytes::given_size;
use image::FileSystem;
use mayfly_images::content::Folder;
use mayfly_images::fill::{self, Blobs, LeftOut};
use mayfly_images::layout::{Config, Layout};
use mayfly_images::source::{self, Request};
use mayfly_images::tree::Tree;
use mayfly_images::{digest, erofs};

const MIRROR: &str = "http://deb.debian.org/debian";

#[derive(Debug, Args)]
pub struct Rootfs {
    /// A folder, a tar archive (also compressed), or an OCI image layout or `docker save` archive;
    /// with --debian the file to make
    source: PathBuf,
    /// The disk to make
    #[arg(required_unless_present = "debian")]
    out: Option<PathBuf>,
    /// Install this release of Debian (bookworm, trixie, ...) with mmdebstrap or debootstrap
    #[arg(long, value_name = "SUITE", conflicts_with = "out")]
    debian: Option<String>,
    /// More packages for --debian, with commas between them
    #[arg(long, value_name = "PACKAGES", requires = "debian")]
    include: Option<String>,
    /// Where --debian takes packages from
    #[arg(long, value_name = "URL", default_value = MIRROR, requires = "debian")]
    mirror: String,
    /// The file system; EROFS is read-only
    #[arg(long = "type", value_enum, default_value = "ext4")]
    kind: FileSystem,
    /// Compress an EROFS (lz4hc)
    #[arg(long)]
    compress: bool,
    /// The size of an ext4 disk in MiB, or with M or G [default: what the files need, and a tenth]
    #[arg(long, value_parser = given_size)]
    size: Option<u64>,
    /// Which image of a layout with several
    #[arg(long)]
    name: Option<String>,
    /// Add no init, console or names
    #[arg(long)]
    as_is: bool,
    /// How much content a source may unpack to
    #[arg(long, value_parser = given_size, default_value = "32G")]
    max_size: u64,
    /// Replace the output if it exists
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Rootfs) -> Result<()> {
    let (out, inputs) = match (&args.debian, &args.out) {
        (Some(_), _) => (&args.source, Vec::new()),
        (None, Some(out)) => (out, vec![args.source.as_path()]),
        (None, None) => return Err(Failure::plain("the file to make is missing; name it")),
    };
    let output = Output::new(out, args.force, &inputs)?;
    make(args, &output).map_err(|error| error.within(output.work(), &args.source))
}

fn make(args: &Rootfs, output: &Output) -> Result<()> {
    let mut tree = Tree::new();
    let mut blobs = Blobs::new(output.scratch("blobs"), args.max_size)?;
    let mut left_out = LeftOut::default();
    let config = read(args, output, &mut tree, &mut blobs, &mut left_out)?;
    source::check_not_empty(&tree, &args.source)?;
    // What is made here belongs to the newest layer.
    tree.layer = u32::MAX;
    let done = match args.as_is {
        true => setup::Done::default(),
        false => setup::set_up(&mut tree, &mut blobs, &config)?,
    };
    let disk = output.scratch("disk");
    let capabilities_lost = match args.kind {
        FileSystem::Erofs if !args.compress => {
            digest::complete(&mut tree)?;
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&disk)
                .cannot("create", &disk)?;
            erofs::write(&tree, &digest::of(&tree)?, &file, &disk)?;
            0
        }
        _ => {
            let staged = image::stage(&tree, output.scratch("root"), output.scratch("state"))?;
            staged.make(args.kind, args.size, &disk)?;
            staged.capabilities_lost
        }
    };
    output.commit("disk", output.path())?;
    report(args, output, &done, &left_out, capabilities_lost)
}

/// Fills the tree from whatever the source is.
fn read(
    args: &Rootfs,
    output: &Output,
    tree: &mut Tree,
    blobs: &mut Blobs,
    left_out: &mut LeftOut,
) -> Result<Config> {
    if let Some(suite) = &args.debian {
        debian(args, suite, output, tree, blobs, left_out)?;
        return Ok(Config::default());
    }
    let path = args.source.canonicalize().cannot("open", &args.source)?;
    if path.is_dir() {
        // It would be a part of itself.
        if output.path().starts_with(&path) {
            return Err(Failure::new(
                output.path(),
                "is to be made inside of the folder that it is made from",
                "give another output",
            ));
        }
        if let Some(layout) = Layout::of_folder(&path) {
            return layout.read(args.name.as_deref(), tree, blobs, left_out);
        }
        let folder = Folder::open(&path)?;
        source::folder(folder, args.max_size, tree, &|_| None, left_out)?;
        return Ok(Config::default());
    }
    if !path.is_file() {
        return Err(Failure::new(
            &path,
            "is neither a file nor a folder",
            "name one",
        ));
    }
    let request = Request {
        path: &path,
        name: args.name.as_deref(),
        work: output.work(),
        max: args.max_size,
    };
    if let Some(config) = request.archive(tree, blobs, left_out)? {
        return Ok(config);
    }
    let file = File::open(&path).cannot("open", &path)?;
    let kind = Kind::of(&file, &path)?;
    Err(Failure::new(
        &path,
        format!("is {} and no tar archive", kind.name()),
        "for a disk: tools/guest import",
    ))
}

/// Installs Debian: with mmdebstrap as any user, with debootstrap as root.
fn debian(
    args: &Rootfs,
    suite: &str,
    output: &Output,
    tree: &mut Tree,
    blobs: &mut Blobs,
    left_out: &mut LeftOut,
) -> Result<()> {
    let is_word = |text: &str| {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
        !text.is_empty() && !text.starts_with('-') && text.bytes().all(is_plain)
    };
    let extra = args.include.as_deref().unwrap_or("");
    if !is_word(suite)
        || !extra
            .split(',')
            .all(|name| name.is_empty() || is_word(name))
    {
        return Err(Failure::plain(
            "the suite or a package has an impossible name; write them as apt does",
        ));
    }
    if args.mirror.starts_with('-') || !args.mirror.contains("://") {
        return Err(Failure::plain(format!(
            "{:?} is no URL; give --mirror one",
            args.mirror
        )));
    }
    let packages = format!("--include=init,{extra}");
    let packages = packages.trim_end_matches(',');
    println!(
        "installing Debian {suite} from {}: this takes minutes",
        args.mirror
    );
    let target = output.scratch("debian");
    if let Ok(tool) = Tool::find("mmdebstrap", "mmdebstrap") {
        let options = [
            "--variant=minbase",
            "--format=tar",
            "--quiet",
            packages,
            suite,
        ];
        let mut command: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
        command.extend([target.as_os_str(), OsStr::new(&args.mirror)]);
        installed(&tool, &command)?;
        let file = File::open(&target).cannot("open", &target)?;
        return fill::archive(&mut BufReader::new(file), tree, blobs, false, left_out)
            .map_err(|error| fill::bad_archive(&target, &error));
    }
    if !rustix::process::geteuid().is_root() {
        Tool::find("mmdebstrap", "mmdebstrap")?;
    }
    let tool = Tool::find("debootstrap", "mmdebstrap")?;
    let options = ["--variant=minbase", packages, suite];
    let mut command: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
    command.extend([target.as_os_str(), OsStr::new(&args.mirror)]);
    installed(&tool, &command)?;
    let folder = Folder::open(&target)?;
    source::folder(folder, args.max_size, tree, &|_| None, left_out)
}

fn installed(tool: &Tool, args: &[&OsStr]) -> Result<()> {
    let ended = tool.run(args)?;
    if ended.code == Some(0) {
        return Ok(());
    }
    let last = ended
        .messages()
        .lines()
        .rev()
        .find(|line| line.contains("E:") && !line.contains("mmdebstrap failed to run"));
    let why = last.map_or_else(|| ended.why(), |line| crate::failure::clean(line.trim()));
    Err(Failure::plain(format!(
        "Debian cannot be installed ({why}); check the suite, the mirror and the network"
    )))
}

fn report(
    args: &Rootfs,
    output: &Output,
    done: &setup::Done,
    left_out: &LeftOut,
    capabilities_lost: u64,
) -> Result<()> {
    let path = output.path();
    let len = std::fs::metadata(path).cannot("open", path)?.len();
    let name = match args.kind {
        FileSystem::Ext4 => "ext4",
        FileSystem::Erofs => "erofs (read-only)",
    };
    println!("{}: {name}, {}", printable(path), bytes::size(len));
    for line in &done.lines {
        println!("  {line}");
    }
    for line in left_out.lines() {
        println!("  note: {line}");
    }
    if capabilities_lost > 0 {
        println!(
            "  note: {capabilities_lost} files lost their capabilities, which only root can give; run this as root to keep them"
        );
    }
    let init = done.init.as_deref().unwrap_or(boot::INIT);
    let end = match args.kind {
        FileSystem::Ext4 => "",
        FileSystem::Erofs => ":ro",
    };
    if args.kind == FileSystem::Erofs && args.compress {
        println!("  note: {}", boot::SMALL_KERNEL);
    }
    println!("to start it:");
    println!("  {}", boot::root_command(path, init, end));
    Ok(())
}
