//! `import`: a disk of another hypervisor to a sparse raw disk, and what is on it.

mod find;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::boot;
use crate::bytes;
use crate::contents::Contents;
use crate::contents::gpt::{Gpt, State};
use crate::copy::copy_part;
use crate::failure::{Context, Failure, Result, clean, printable};
use crate::formats::{self, Image, Kind, Reach, Snapshot};
use crate::output::Output;
use crate::qemu::Qemu;

/// The largest file of ext4; what claims more is no disk.
const DISK_MAX: u64 = 16 << 40;
const DISKS: &[&str] = &[
    "vmdk", "vhd", "vhdx", "vdi", "img", "raw", "qcow2", "qcow", "hdd", "hds", "gz", "xz", "zst",
];

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
    let mut image = find::open(args, path, reach, output, 0)?;
    output.differs(&image.files())?;
    image.write_descriptors(output.work())?;
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
    copy_part(&file, 0, len, &copy, "copying")?;
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
    copy_part(&file, 0, image.size, disk, "copying")
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
    if let (Some(_), Some(note)) = (&kernel, boot::host_note()) {
        println!("  note: {note}");
    }
    if kernel.is_none() && boot::is_beyond_small_kernel(&contents, &boot) {
        println!("  note: {}", boot::SMALL_KERNEL);
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
