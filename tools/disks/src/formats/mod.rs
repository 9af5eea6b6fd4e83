//! What a file is, by its content, and what its format has to say that qemu-img does not: sizes,
//! files that belong to it, what it lacks. Everything here only reads. Once this module has looked
//! at a file, qemu-img is told its format and all of its files; it never guesses.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod parallels;
pub mod qcow;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::bytes::{self, has, le32};
use crate::failure::{Context, Failure, Result, clean};
use crate::unpack::Compression;

/// What the content of a file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Raw,
    /// A sparse extent, with or without a descriptor of its own.
    VmdkSparse,
    /// The text that names the extents.
    VmdkDescriptor,
    VhdFixed,
    VhdDynamic,
    Vhdx,
    Vdi,
    Parallels,
    Qcow,
    Qcow2,
    Qed,
    Compressed(Compression),
    Tar,
    /// What is no disk, or one that cannot be read: why, and what to do.
    Refused(&'static str, &'static str),
}

const ARCHIVE: (&str, &str) = ("is an archive", "unpack it and name the disk in it");
const DESCRIPTION: (&str, &str) = (
    "describes a virtual machine and is no disk",
    "name the disk file that it mentions",
);

/// Magic numbers at the begin of a file, at their offsets.
const MAGIC: &[(usize, &[u8], Kind)] = &[
    (0, b"KDMV", Kind::VmdkSparse),
    (0, b"COWD", Kind::VmdkSparse),
    (0, b"# Disk DescriptorFile", Kind::VmdkDescriptor),
    (0, b"conectix", Kind::VhdDynamic),
    (0, b"vhdxfile", Kind::Vhdx),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], Kind::Vdi),
    (0, b"WithoutFreeSpace", Kind::Parallels),
    (0, b"WithouFreSpacExt", Kind::Parallels),
    (0, b"QFI\xfb\0\0\0\x01", Kind::Qcow),
    (0, b"QFI\xfb", Kind::Qcow2),
    (0, b"QED\0", Kind::Qed),
    (257, b"ustar", Kind::Tar),
    (0, b"PK\x03\x04", Kind::Refused(ARCHIVE.0, ARCHIVE.1)),
    (
        0,
        b"7z\xbc\xaf\x27\x1c",
        Kind::Refused(ARCHIVE.0, ARCHIVE.1),
    ),
    (0, b"Rar!\x1a\x07", Kind::Refused(ARCHIVE.0, ARCHIVE.1)),
    (
        0,
        b"BZh",
        Kind::Refused("is compressed with bzip2", "unpack it: bunzip2 FILE"),
    ),
    (0, b"<?xml", Kind::Refused(DESCRIPTION.0, DESCRIPTION.1)),
    (0, b".encoding", Kind::Refused(DESCRIPTION.0, DESCRIPTION.1)),
    (
        0,
        b"LUKS\xba\xbe",
        Kind::Refused(
            "is encrypted (a LUKS container)",
            "decrypt it first: qemu-img convert --object secret,id=s,file=PASSWORD --image-opts driver=luks,file.filename=FILE,key-secret=s -O raw OUT",
        ),
    ),
];

impl Kind {
    /// What the file with this content is.
    pub fn of(file: &File, path: &Path) -> Result<Kind> {
        let len = file.metadata().cannot("open", path)?.len();
        if len == 0 {
            return Err(Failure::new(path, "is empty", "take another copy of it"));
        }
        let head = bytes::read(file, 0, 1024).cannot("read", path)?;
        let tail = bytes::read(file, len.saturating_sub(512), 512).cannot("read", path)?;
        if let Some(kind) = Compression::of_head(&head) {
            return Ok(Kind::Compressed(kind));
        }
        let by_head = MAGIC.iter().find(|(at, magic, _)| has(&head, *at, magic));
        Ok(match by_head {
            Some((.., kind)) => *kind,
            // The only sign of a fixed VHD is behind its data.
            None if has(&tail, 0, b"conectix") => Kind::VhdFixed,
            None if has(&tail, 0, b"koly") => Kind::Refused(
                "is an Apple disk image (DMG)",
                "convert it: hdiutil convert FILE -format UDTO -o OUT",
            ),
            None => Kind::Raw,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::VmdkSparse | Kind::VmdkDescriptor => "VMDK",
            Kind::VhdFixed => "VHD (fixed)",
            Kind::VhdDynamic => "VHD (dynamic)",
            Kind::Vhdx => "VHDX",
            Kind::Vdi => "VDI",
            Kind::Parallels => "Parallels HDD",
            Kind::Qcow => "QCOW",
            Kind::Qcow2 => "QCOW2",
            Kind::Qed => "QED",
            Kind::Compressed(Compression::Gzip) => "gzip",
            Kind::Compressed(Compression::Xz) => "xz",
            Kind::Compressed(Compression::Zstd) => "zstd",
            Kind::Tar => "tar",
            Kind::Refused(..) => "refused",
        }
    }
}

/// A disk image whose files were all found and looked at.
#[derive(Debug)]
pub struct Image {
    pub kind: Kind,
    /// Of the format, where it has several shapes.
    pub shape: String,
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// What a guest sees, in bytes.
    pub size: u64,
    pub backing: Option<Box<Image>>,
    pub data_file: Option<PathBuf>,
    /// The extents of a VMDK with a descriptor, and the descriptor that qemu-img gets of it.
    pub checked: Option<vmdk::Checked>,
    told: Option<PathBuf>,
    pub snapshots: Vec<Snapshot>,
    /// A log must be replayed, which changes the file: a copy is needed.
    pub has_log: bool,
    /// What the user should know.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    pub size: Option<u64>,
}

/// Which files an image may lead to.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    pub outside: bool,
    /// How many images may still follow in a chain.
    pub depth: u32,
}

impl Reach {
    pub fn new(outside: bool) -> Reach {
        Reach { outside, depth: 32 }
    }

    fn deeper(self, path: &Path) -> Result<Reach> {
        let Some(depth) = self.depth.checked_sub(1) else {
            return Err(Failure::new(
                path,
                "the chain of backing files is a circle, or longer than 32",
                "merge it with the hypervisor that made it",
            ));
        };
        Ok(Reach { depth, ..self })
    }

    /// The file that `of` names as `name`. It must be one of the image's folder, unless the user
    /// said otherwise.
    pub fn resolve(self, of: &Path, name: &str, what: &str) -> Result<PathBuf> {
        let folder = of.parent().unwrap_or(Path::new("/"));
        let shown = clean(name);
        let protocol = name
            .split('/')
            .next()
            .is_some_and(|first| first.contains(':'));
        if name.is_empty() || name.contains('\0') || protocol {
            return Err(Failure::new(
                of,
                format!("its {what} {shown:?} is no file name"),
                "merge the two where they were made",
            ));
        }
        let found = folder.join(name).canonicalize().map_err(|error| {
            Failure::new(
                of,
                format!("its {what} {shown} cannot be opened ({error})"),
                "put that file into the same folder",
            )
        })?;
        // A folder below is not the image's either: in a home folder that would be all of it.
        if !self.outside && found.parent() != Some(folder) {
            return Err(Failure::new(
                of,
                format!("its {what} {shown} is outside of the image's folder"),
                "put it there, or give --allow-outside if you trust the image",
            ));
        }
        if !found.is_file() {
            let why = format!("its {what} {shown} is not a regular file");
            return Err(Failure::new(of, why, "take another copy of the image"));
        }
        Ok(found)
    }
}

impl Image {
    fn new(kind: Kind, path: &Path, size: u64) -> Image {
        Image {
            kind,
            shape: String::new(),
            path: path.to_path_buf(),
            size,
            backing: None,
            data_file: None,
            checked: None,
            told: None,
            snapshots: Vec::new(),
            has_log: false,
            notes: Vec::new(),
        }
    }

    /// Looks at the image `path`, an absolute path without symbolic links.
    pub fn open(path: &Path, kind: Kind, reach: Reach) -> Result<Image> {
        let file = File::open(path).cannot("open", path)?;
        match kind {
            Kind::Raw => {
                let len = file.metadata().cannot("open", path)?.len();
                Ok(Image::new(Kind::Raw, path, len))
            }
            Kind::VmdkSparse => vmdk::sparse(&file, path, reach),
            Kind::VmdkDescriptor => vmdk::described(&file, path, reach),
            Kind::VhdFixed | Kind::VhdDynamic => vhd::open(&file, path),
            Kind::Vhdx => vhdx::open(&file, path),
            Kind::Vdi => vdi::open(&file, path),
            Kind::Parallels => parallels::open(&file, path),
            Kind::Qcow => qcow::qcow1(&file, path, reach),
            Kind::Qcow2 => qcow::qcow2(&file, path, reach),
            Kind::Qed => qcow::qed(&file, path, reach),
            Kind::Refused(what, remedy) => Err(Failure::new(path, what, remedy)),
            Kind::Compressed(_) | Kind::Tar => Err(Failure::new(
                path,
                "is compressed or an archive, where a disk is needed",
                "unpack it",
            )),
        }
    }

    /// qemu-img's name of the format.
    pub fn driver(&self) -> &'static str {
        match self.kind {
            Kind::VmdkSparse | Kind::VmdkDescriptor => "vmdk",
            Kind::VhdFixed | Kind::VhdDynamic => "vpc",
            Kind::Vhdx => "vhdx",
            Kind::Vdi => "vdi",
            Kind::Parallels => "parallels",
            Kind::Qcow => "qcow",
            Kind::Qcow2 => "qcow2",
            Kind::Qed => "qed",
            _ => "raw",
        }
    }

    /// Writes into `folder` what qemu-img is told in place of descriptors.
    pub fn write_descriptors(&mut self, folder: &Path) -> Result<()> {
        let mut at = Some(self);
        for index in 0.. {
            let Some(image) = at else { break };
            if let Some(checked) = &image.checked {
                image.told = Some(checked.write(&folder.join(format!("vmdk-{index}")))?);
            }
            at = image.backing.as_deref_mut();
        }
        Ok(())
    }

    /// Everything that qemu-img may open, and as what.
    fn options(&self) -> Value {
        let file = |path: &Path| json!({"driver": "file", "filename": path.to_string_lossy()});
        let path = self.told.as_deref().unwrap_or(&self.path);
        let mut options = json!({"driver": self.driver(), "file": file(path)});
        if self.driver() == "vpc" {
            // The number of bytes in the footer, and not the geometry.
            options["force_size_calc"] = "current_size".into();
        }
        if let Some(data) = &self.data_file {
            options["data-file"] = file(data);
        }
        if let Some(backing) = &self.backing {
            options["backing"] = backing.options();
        } else if matches!(self.driver(), "qcow" | "qcow2" | "qed" | "vmdk") {
            options["backing"] = Value::Null;
        }
        options
    }

    /// The image as an argument for qemu-img.
    pub fn argument(&self) -> Result<String> {
        let mut at = Some(self);
        while let Some(image) = at {
            if image.checked.is_some() != image.told.is_some() {
                return Err(damaged(&image.path, "its descriptor was not checked"));
            }
            let path = image.told.as_ref().unwrap_or(&image.path);
            if path.to_str().is_none() {
                return Err(Failure::new(
                    path,
                    "its name is not UTF-8, and qemu-img cannot be told it",
                    "rename it",
                ));
            }
            at = image.backing.as_deref();
        }
        Ok(format!("json:{}", self.options()))
    }

    /// The same without what it builds on: not every command of qemu-img opens that.
    pub fn argument_alone(&self) -> Result<String> {
        self.argument()?;
        let mut options = self.options();
        if self.backing.is_some() {
            options["backing"] = Value::Null;
        }
        Ok(format!("json:{options}"))
    }

    /// The files that it consists of.
    pub fn files(&self) -> Vec<&Path> {
        let mut files = vec![self.path.as_path()];
        files.extend(self.data_file.as_deref());
        files.extend(self.checked.iter().flat_map(vmdk::Checked::files));
        if let Some(backing) = &self.backing {
            files.extend(backing.files());
        }
        files
    }
}

/// Opens the file that `of` builds on. `format` is what `of` says of it.
fn backing(of: &Path, name: &str, format: Option<&str>, reach: Reach) -> Result<Box<Image>> {
    let reach = reach.deeper(of)?;
    let name = name.strip_prefix("file:").unwrap_or(name);
    let path = reach.resolve(of, name, "backing file")?;
    let file = File::open(&path).cannot("open", &path)?;
    let kind = match format {
        // What is said to be raw is not looked at: its content is a guest's.
        Some("raw" | "host_device" | "file") => Kind::Raw,
        _ => Kind::of(&file, &path)?,
    };
    let image = Image::open(&path, kind, reach)?;
    Ok(Box::new(image))
}

/// The refusal of a file that ends before its content does.
fn truncated(path: &Path, needed: u64, len: u64) -> Failure {
    Failure::new(
        path,
        format!("is truncated: it has {len} bytes and needs {needed}"),
        "copy it again from where it came",
    )
}

fn damaged(path: &Path, what: &str) -> Failure {
    Failure::new(
        path,
        format!("is damaged: {what}"),
        "copy it again from where it came",
    )
}

fn encrypted(path: &Path) -> Failure {
    Failure::new(
        path,
        "is encrypted",
        "decrypt it with the hypervisor that made it, or with qemu-img and its secret",
    )
}

/// The size of a disk, if it can be one.
fn plausible(path: &Path, size: Option<u64>) -> Result<u64> {
    match size {
        Some(size) if (1..=1 << 56).contains(&size) => Ok(size),
        _ => Err(damaged(path, "its header has no possible size")),
    }
}

/// `le32` of a header that must have it.
fn need32(path: &Path, bytes: &[u8], at: usize) -> Result<u32> {
    le32(bytes, at).ok_or_else(|| truncated(path, at as u64 + 4, bytes.len() as u64))
}
