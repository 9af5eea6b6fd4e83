//! `export`: a raw disk to the format of another hypervisor.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::bytes;
use crate::failure::{Failure, Result, printable};
use crate::formats::Kind;
use crate::import::raw_disk;
use crate::output::Output;
use crate::qemu::Qemu;

/// What a VHD can address.
const VHD_MAX: u64 = 2040 << 30;

#[derive(Debug, Args)]
pub struct Export {
    /// The raw disk
    disk: PathBuf,
    /// The file to make
    out: PathBuf,
    /// Its format
    #[arg(long, value_enum)]
    format: Format,
    /// Replace the output if it exists
    #[arg(long)]
    force: bool,
    /// The disk is raw although its first bytes look like another format
    #[arg(long)]
    raw: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// VMware, in one growing file
    Vmdk,
    /// VMware, compressed, as in an OVA
    VmdkStream,
    /// Hyper-V of the first generation, growing
    Vhd,
    /// The same at its full size, as Azure wants it
    VhdFixed,
    /// Hyper-V
    Vhdx,
    /// VirtualBox
    Vdi,
    /// Parallels
    Parallels,
    /// QEMU
    Qcow2,
}

impl Format {
    /// qemu-img's name, the options, and what the result is recognised as.
    fn how(self) -> (&'static str, &'static [&'static str], Kind) {
        match self {
            Format::Vmdk => ("vmdk", &["subformat=monolithicSparse"], Kind::VmdkSparse),
            Format::VmdkStream => ("vmdk", &["subformat=streamOptimized"], Kind::VmdkSparse),
            // Without force_size the disk grows to the next size that a geometry can express.
            Format::Vhd => (
                "vpc",
                &["subformat=dynamic,force_size=on"],
                Kind::VhdDynamic,
            ),
            Format::VhdFixed => ("vpc", &["subformat=fixed,force_size=on"], Kind::VhdFixed),
            Format::Vhdx => ("vhdx", &[], Kind::Vhdx),
            Format::Vdi => ("vdi", &[], Kind::Vdi),
            Format::Parallels => ("parallels", &[], Kind::Parallels),
            Format::Qcow2 => ("qcow2", &[], Kind::Qcow2),
        }
    }
}

pub fn run(args: &Export) -> Result<()> {
    let disk = raw_disk(&args.disk, args.raw)?;
    let is_vhd = matches!(args.format, Format::Vhd | Format::VhdFixed);
    if is_vhd && disk.size > VHD_MAX {
        return Err(Failure::new(
            &args.disk,
            format!("has {}, and a VHD at most 2040 GiB", bytes::size(disk.size)),
            "export it as vhdx",
        ));
    }
    let output = Output::new(&args.out, args.force, &[&disk.path])?;
    let (format, options, kind) = args.format.how();
    let qemu = Qemu::find()?;
    let made = output.scratch("disk");
    qemu.export(&disk, format, options, &made)?;
    let size = disk.size.next_multiple_of(512);
    let seen = qemu
        .size(&made, kind)
        .map_err(|error| error.within(output.work(), &args.out))?;
    if seen != size {
        return Err(Failure::new(
            &args.disk,
            format!("has {size} bytes, and would have {seen} as {format}"),
            "choose another format",
        ));
    }
    output.commit("disk", output.path())?;
    println!(
        "{}: {}, {}",
        printable(output.path()),
        kind.name(),
        bytes::size(size)
    );
    Ok(())
}
