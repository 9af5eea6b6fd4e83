//! Finds the disk that is to be imported: in a file, in a folder, behind compressions, in an archive.

use std::fs::File;
use std::path::Path;

use super::{DISK_MAX, DISKS, Format, Import};
use crate::archive::{Archive, EntryKind};
use crate::bytes;
use crate::contents::Contents;
use crate::failure::{Context, Failure, Result, clean, printable};
use crate::formats::{Image, Kind, Reach, parallels, vmdk};
use crate::output::Output;
use crate::progress::Progress;
use crate::sparse;
use crate::unpack;

/// A compressed archive of a compressed disk has two.
const LAYERS_MAX: u32 = 3;
/// What an appliance has besides its disks.
const NO_DISKS: &[&str] = &["ovf", "mf", "cert", "nvram", "xml", "txt", "iso", "pem"];
/// Endings that no raw disk has.
const NEVER_RAW: &[&str] = &["vmdk", "vhd", "vhdx", "vdi", "qcow", "qcow2", "qed"];

/// Finds the disk: in the file, in a folder, behind compressions, in an archive.
pub fn open(
    args: &Import,
    path: &Path,
    reach: Reach,
    output: &Output,
    layer: u32,
) -> Result<Image> {
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
        // A VMDK may be the file that names the others.
        Some(Format::Vmdk) if found == Kind::VmdkDescriptor => found,
        Some(format) if layer == 0 || !matches!(found, Kind::Compressed(_)) => format.kind(),
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
        Kind::Compressed(_) | Kind::Tar if layer >= LAYERS_MAX => Err(Failure::new(
            path,
            "is packed more than three times",
            "unpack it",
        )),
        Kind::Compressed(compression) => {
            println!("{}: compressed with {}", printable(&args.file), kind.name());
            let to = output.scratch(&format!("unpacked-{layer}"));
            unpack::unpack(path, compression, &to, DISK_MAX)?;
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
    while let Some(entry) = archive.next_entry().map_err(bad)? {
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
    while let Some(entry) = archive.next_entry().map_err(bad)? {
        if entry.kind == EntryKind::File && entry.name == chosen.as_bytes() {
            let mut progress = Progress::new("unpacking", entry.size);
            sparse::from_stream(&mut archive, &target, DISK_MAX, &mut progress).map_err(bad)?;
            return Ok(());
        }
    }
    Err(Failure::new(path, "changed while it was read", "try again"))
}
