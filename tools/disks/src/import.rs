//! `import`: a disk of another hypervisor to a sparse raw disk, and what is on it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::archive::{Archive, EntryKind};
use crate::boot;
use crate::bytes;
use crate::contents::Contents;
use crate::contents::gpt::{Gpt, State};
use crate::failure::{Context, Failure, Result, clean, printable};
use crate::formats::{self, Image, Kind, Reach, Snapshot, parallels, vmdk};
use crate::output::Output;
use crate::progress::Progress;
use crate::qemu::Qemu;
use crate::sparse;
use crate::unpack;

/// The largest file of ext4; what claims more is no disk.
const DISK_MAX: u64 = 16 << 40;
/// A compressed archive of a compressed disk has two.
const LAYERS_MAX: u32 = 3;
/// What an appliance has besides its disks.
const NO_DISKS: &[&str] = &["ovf", "mf", "cert", "nvram", "xml", "txt", "iso", "pem"];
const DISKS: &[&str] = &[
    "vmdk", "vhd", "vhdx", "vdi", "img", "raw", "qcow2", "qcow", "hdd", "hds", "gz", "xz", "zst",
];

/// Endings that no raw disk has.
const NEVER_RAW: &[&str] = &["vmdk", "vhd", "vhdx", "vdi", "qcow", "qcow2", "qed"];

#[derive(Debug, Args)]
pub struct Import {
    /// The disk: VMDK, VHD, VHDX, VDI, Parallels (file or folder), QCOW, QCOW2, QED, raw; also in an
    /// OVA, or compressed with gzip, xz or zstd
    file: PathBuf,
    /// The raw disk to make [default: the name with .raw, in the current folder]
    out: Option<PathBuf>,
    /// Replace the output if it exists
    #[arg(long)]
    force: bool,
    /// Take the file as of this format, and do not look what it is
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Import this snapshot (name or id) of a QCOW2 disk instead of its current state
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Which disk of an archive with several
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// Also open files outside of the image's folder that the image names
    #[arg(long)]
    allow_outside: bool,
    /// Write a GPT whose backup is misplaced, missing, or all that is left, anew
    #[arg(long)]
    mend_gpt: bool,
    /// Also write the kernel and the initrd that are inside, as OUT.kernel and OUT.initrd
    #[arg(long)]
    boot_files: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Raw,
    Vmdk,
    Vhd,
    Vhdx,
    Vdi,
    Parallels,
    Qcow,
    Qcow2,
    Qed,
}

impl Format {
    fn kind(self) -> Kind {
        match self {
            Format::Raw => Kind::Raw,
            Format::Vmdk => Kind::VmdkSparse,
            Format::Vhd => Kind::VhdDynamic,
            Format::Vhdx => Kind::Vhdx,
            Format::Vdi => Kind::Vdi,
            Format::Parallels => Kind::Parallels,
            Format::Qcow => Kind::Qcow,
            Format::Qcow2 => Kind::Qcow2,
            Format::Qed => Kind::Qed,
        }
    }
}

pub fn run(args: &Import) -> Result<()> {
    let path = args.file.canonicalize().cannot("open", &args.file)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => default_output(&args.file)?,
    };
    let output = Output::new(&out, args.force, &[&path])?;
    import(args, &path, &output).map_err(|error| error.within(output.work(), &args.file))
}

fn default_output(file: &Path) -> Result<PathBuf> {
    let full = file.canonicalize().cannot("open", file)?;
    let name = full.file_stem().unwrap_or(full.as_os_str());
    let mut name = Path::new(name).to_path_buf();
    // disk.vmdk.gz
    if name
        .extension()
        .is_some_and(|end| DISKS.iter().any(|it| end.eq_ignore_ascii_case(it)))
    {
        name.set_extension("");
    }
    let mut name = name.into_os_string();
    name.push(".raw");
    Ok(name.into())
}

fn import(args: &Import, path: &Path, output: &Output) -> Result<()> {
    let reach = Reach::new(args.allow_outside);
    let mut image = open(args, path, reach, output, 0)?;
    output.differs(&image.files())?;
    describe(args, &image);
    if args.snapshot.is_some() && image.kind != Kind::Qcow2 {
        return Err(Failure::new(
            path,
            "has no snapshots inside",
            "leave out --snapshot",
        ));
    }
    let left_out = prepare(args, &mut image, output)?;
    let disk = output.scratch("disk");
    convert(&image, &disk, output)?;
    let len = image.size.next_multiple_of(512);
    let file = File::options()
        .read(true)
        .write(true)
        .open(&disk)
        .cannot("open", &disk)?;
    if image.kind == Kind::Raw && len != image.size {
        println!(
            "  padded with zeros from {} to {len} bytes: disks have whole sectors",
            image.size
        );
        file.set_len(len).cannot("write", &disk)?;
    }
    let made = file.metadata().cannot("open", &disk)?.len();
    if made != len {
        return Err(Failure::new(
            path,
            format!("was converted to {made} bytes where {len} are expected"),
            "report this with the versions of mayfly and qemu-img",
        ));
    }
    let mut mended = None;
    if args.mend_gpt {
        match Gpt::read(&file, len).cannot("read", &disk)? {
            Some(gpt) => {
                gpt.mend(&file, path)?;
                mended = Some(gpt.state);
            }
            None => {
                return Err(Failure::new(
                    path,
                    "has no valid GPT to mend",
                    "leave out --mend-gpt",
                ));
            }
        }
    }
    let done = Done {
        len,
        left_out,
        mended,
    };
    finish(args, &file, &done, output)
}

/// What was done on the way, for the report.
struct Done {
    len: u64,
    left_out: Vec<String>,
    mended: Option<State>,
}

/// Finds the disk: in the file, in a folder, behind compressions, in an archive.
fn open(args: &Import, path: &Path, reach: Reach, output: &Output, layer: u32) -> Result<Image> {
    if path.is_dir() {
        if path.join(parallels::DESCRIPTOR).exists() {
            return parallels::bundle(path, reach);
        }
        return Err(Failure::new(
            path,
            "is a folder without DiskDescriptor.xml (a Parallels bundle has it)",
            "name the disk file in it",
        ));
    }
    if !path.is_file() {
        return Err(Failure::new(
            path,
            "is no regular file",
            "copy its content into one",
        ));
    }
    let file = File::open(path).cannot("open", path)?;
    let found = Kind::of(&file, path)?;
    let kind = match args.format {
        Some(format) if layer == 0 || !unpack::is_compressed(found) => format.kind(),
        _ => found,
    };
    if layer > 0 && kind == Kind::VmdkDescriptor {
        return Err(Failure::new(
            path,
            "holds the descriptor of a VMDK whose data is in other files",
            "unpack it into a folder with those files and name the descriptor there",
        ));
    }
    match kind {
        Kind::Gzip | Kind::Xz | Kind::Zstd | Kind::Tar if layer >= LAYERS_MAX => Err(Failure::new(
            path,
            "is packed more than three times",
            "unpack it",
        )),
        Kind::Gzip | Kind::Xz | Kind::Zstd => {
            println!("{}: compressed with {}", printable(&args.file), kind.name());
            let to = output.scratch(&format!("unpacked-{layer}"));
            unpack::unpack(path, kind, &to, DISK_MAX)?;
            open(args, &to, reach, output, layer + 1)
        }
        Kind::Tar => {
            let to = output.scratch(&format!("unpacked-{layer}"));
            from_archive(args, path, &file, &to)?;
            open(args, &to, reach, output, layer + 1)
        }
        Kind::Raw if args.format.is_none() => raw(&file, path, reach),
        kind => Image::open(path, kind, reach),
    }
}

/// A file without any sign of a format: a raw disk if it holds what a disk holds.
fn raw(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    if let Some(image) = vmdk::of_extent(path, reach)? {
        return Ok(image);
    }
    if vmdk::is_extent_name(path) {
        return Err(vmdk::extent_alone(path));
    }
    // A fixed VHD without its end looks like a raw disk.
    let tail = bytes::read(file, file_len(file, path)?.saturating_sub(512), 512);
    let tail = tail.cannot("read", path)?;
    let has_part_of_footer = tail.windows(8).any(|at| at == b"conectix");
    let end = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    if has_part_of_footer || NEVER_RAW.contains(&&*end) {
        let what = match has_part_of_footer {
            true => "ends in the middle of a VHD footer: it is truncated".to_owned(),
            false => format!("has the name of a {end} file and the content of none (truncated?)"),
        };
        return Err(Failure::new(
            path,
            what,
            "copy it again from where it came; --format raw takes it as a raw disk",
        ));
    }
    let image = Image::open(path, Kind::Raw, reach)?;
    if Contents::read(file, path, image.size)?.is_known() {
        return Ok(image);
    }
    Err(Failure::new(
        path,
        "is of no known disk format, and has no partition table and no known file system",
        "check that it is a whole disk; --format raw takes it as it is",
    ))
}

fn file_len(file: &File, path: &Path) -> Result<u64> {
    Ok(file.metadata().cannot("open", path)?.len())
}

/// Takes the disk out of an archive (an OVA).
fn from_archive(args: &Import, path: &Path, file: &File, to: &Path) -> Result<()> {
    let bad = |error: std::io::Error| {
        Failure::new(
            path,
            format!("cannot be unpacked: {error}"),
            "copy it again from where it came",
        )
    };
    let ending = |name: &str| {
        Path::new(name)
            .extension()
            .map(|it| it.to_string_lossy().to_lowercase())
    };
    let mut names = Vec::new();
    let mut archive = Archive::new(std::io::BufReader::new(file));
    while let Some(entry) = archive.next().map_err(bad)? {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let end = ending(&name).unwrap_or_default();
        let is_disk = DISKS.contains(&&*end) && !NO_DISKS.contains(&&*end);
        if entry.kind == EntryKind::File && (is_disk || args.disk.as_ref() == Some(&name)) {
            names.push(name);
        }
        if names.len() > 256 {
            return Err(Failure::new(
                path,
                "holds more than 256 disks",
                "unpack it and name one",
            ));
        }
    }
    let shown: Vec<String> = names.iter().map(|name| clean(name)).collect();
    let shown = shown.join(", ");
    let chosen = match (&args.disk, &names[..]) {
        (Some(name), _) if names.contains(name) => name.clone(),
        (Some(name), _) => {
            let what = format!("has no {:?}; its disks are: {shown}", clean(name));
            return Err(Failure::new(path, what, "give one of them to --disk"));
        }
        (None, [one]) => one.clone(),
        (None, []) => {
            return Err(Failure::new(
                path,
                "is a tar archive without a disk in it",
                "for an archive of files: tools/guest rootfs",
            ));
        }
        (None, _) => {
            let what = format!("holds several disks: {shown}");
            return Err(Failure::new(path, what, "choose one with --disk"));
        }
    };
    println!(
        "{}: taking {} out of it",
        printable(&args.file),
        clean(&chosen)
    );
    let from = File::open(path).cannot("open", path)?;
    let mut archive = Archive::new(std::io::BufReader::new(from));
    let target = File::create_new(to).cannot("create", to)?;
    while let Some(entry) = archive.next().map_err(bad)? {
        if entry.kind == EntryKind::File && entry.name == chosen.as_bytes() {
            let mut progress = Progress::new("unpacking", entry.size);
            sparse::from_stream(&mut archive, &target, DISK_MAX, &mut progress).map_err(bad)?;
            return Ok(());
        }
    }
    Err(Failure::new(path, "changed while it was read", "try again"))
}

fn describe(args: &Import, image: &Image) {
    let shape = match image.shape.as_str() {
        "" => String::new(),
        shape => format!(" ({shape})"),
    };
    let name = image.kind.name();
    println!(
        "{}: {name}{shape}, {}",
        printable(&args.file),
        bytes::size(image.size)
    );
    for note in &image.notes {
        println!("  note: {note}");
    }
    let mut below = image.backing.as_deref();
    while let Some(image) = below {
        println!(
            "  on top of {} ({})",
            printable(&image.path),
            image.kind.name()
        );
        below = image.backing.as_deref();
    }
}

/// Copies the image where it must be changed to be read: a snapshot, a log. Gives the names of the
/// snapshots that stay out.
fn prepare(args: &Import, image: &mut Image, output: &Output) -> Result<Vec<String>> {
    let name = |it: &Snapshot| format!("{:?}", clean(&it.name));
    let chosen = match &args.snapshot {
        None => None,
        Some(wanted) => {
            let by_name: Vec<_> = image
                .snapshots
                .iter()
                .filter(|it| it.name == *wanted)
                .collect();
            let by_id: Vec<_> = image
                .snapshots
                .iter()
                .filter(|it| it.id == *wanted)
                .collect();
            match (&by_name[..], &by_id[..]) {
                ([one], _) | ([], [one]) => Some((*one).clone()),
                ([], []) => {
                    let all: Vec<String> = image.snapshots.iter().map(name).collect();
                    let all = if all.is_empty() {
                        "none".into()
                    } else {
                        all.join(", ")
                    };
                    let what = format!("has no snapshot {:?}; its snapshots: {all}", clean(wanted));
                    return Err(Failure::new(
                        &image.path,
                        what,
                        "give --snapshot one of them",
                    ));
                }
                _ => {
                    let ids: Vec<String> = by_name.iter().map(|it| clean(&it.id)).collect();
                    let what = format!(
                        "has several snapshots of that name, with ids {}",
                        ids.join(", ")
                    );
                    return Err(Failure::new(&image.path, what, "give --snapshot an id"));
                }
            }
        }
    };
    let others = image
        .snapshots
        .iter()
        .filter(|it| Some(*it) != chosen.as_ref());
    let left_out = others.map(name).collect();
    if chosen.is_none() && !image.has_log {
        return Ok(left_out);
    }
    let copy = output.scratch("copy");
    let file = File::open(&image.path).cannot("open", &image.path)?;
    let len = file.metadata().cannot("open", &image.path)?.len();
    sparse::copy(&file, 0, len, &copy, "copying")?;
    image.path = copy;
    let qemu = Qemu::find()?;
    if image.has_log {
        println!("  its log was not written back: done in a copy");
        qemu.replay(image)?;
        let again = Image::open(&image.path, image.kind, Reach::new(false))?;
        (image.size, image.has_log) = (again.size, again.has_log);
    }
    if let Some(snapshot) = chosen {
        println!("  taking its snapshot {}", name(&snapshot));
        qemu.apply(image, &snapshot.id)?;
        image.size = formats::qcow::size(&image.path)?;
    }
    Ok(left_out)
}

fn convert(image: &Image, disk: &Path, output: &Output) -> Result<()> {
    if image.kind != Kind::Raw {
        let qemu = Qemu::find()?;
        qemu.check(image)?;
        return qemu.import(image, disk);
    }
    if image.path.starts_with(output.work()) {
        return fs::rename(&image.path, disk).cannot("create", disk);
    }
    let file = File::open(&image.path).cannot("open", &image.path)?;
    sparse::copy(&file, 0, image.size, disk, "copying")
}

/// Reports what the disk holds, and moves it to its place.
fn finish(args: &Import, file: &File, done: &Done, output: &Output) -> Result<()> {
    let disk = output.scratch("disk");
    let contents = Contents::read(file, &disk, done.len)?;
    let boot = boot::find(&contents, output.work(), "disk");
    let (mut kernel, mut initrd) = (None, None);
    if args.boot_files {
        let Some(inside) = &boot.kernel else {
            let what = "no kernel was found inside";
            return Err(Failure::new(&args.file, what, "leave out --boot-files"));
        };
        boot::extract(inside, output.work(), "disk", "kernel")?;
        kernel = Some(output.beside(".kernel"));
        if let Some(inside) = &boot.initrd {
            boot::extract(inside, output.work(), "disk", "initrd")?;
            initrd = Some(output.beside(".initrd"));
        }
    }
    // The disk comes last: when it is there, all is.
    for (name, to) in [("kernel", &kernel), ("initrd", &initrd)] {
        if let Some(to) = to {
            output.commit(name, to)?;
        }
    }
    output.commit("disk", output.path())?;

    let allocated =
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().cannot("open", &disk)?) * 512;
    println!(
        "{}: raw, {}, of which {} MiB are allocated",
        printable(output.path()),
        bytes::size(done.len),
        allocated.div_ceil(1 << 20)
    );
    for line in contents.lines() {
        println!("  {line}");
    }
    if !contents.is_known() {
        println!("  note: no partition table and no known file system");
    }
    if let Some(state) = &done.mended {
        println!("  GPT and backup written anew; found: {state}");
    }
    if !done.left_out.is_empty() {
        println!(
            "  snapshots left out: {} (--snapshot NAME takes one)",
            done.left_out.join(", ")
        );
    }
    for (what, inside) in [("kernel", &boot.kernel), ("initrd", &boot.initrd)] {
        if let Some(inside) = inside {
            println!(
                "  {what} inside {}: {}",
                boot::device(inside.partition),
                inside.path
            );
        }
    }
    if boot.kernel.is_some() && kernel.is_none() {
        println!("  --boot-files writes them beside the disk");
    }
    for note in &boot.notes {
        println!("  note: {note}");
    }
    println!("to start it:");
    println!(
        "  {}",
        boot::command(&boot, output.path(), kernel.as_deref(), initrd.as_deref())
    );
    Ok(())
}

/// The raw disk `path`, for export.
pub fn raw_disk(path: &Path, is_raw: bool) -> Result<Image> {
    let full = path.canonicalize().cannot("open", path)?;
    if !full.is_file() {
        return Err(Failure::new(path, "is no regular file", "name a raw disk"));
    }
    let file = File::open(&full).cannot("open", path)?;
    let kind = Kind::of(&file, path)?;
    if kind != Kind::Raw && !is_raw {
        let what = format!("is not raw but {}", kind.name());
        return Err(Failure::new(
            path,
            what,
            "import it first, or give --raw if a guest wrote that",
        ));
    }
    Image::open(&full, formats::Kind::Raw, Reach::new(false))
}
