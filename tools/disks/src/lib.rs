//! Disks for guests: from other hypervisors and back (`import`, `export`), root disks from
//! folders, archives and container images (`rootfs`), and overlays (`overlay`). `tools/guest` passes these
//! subcommands here.
//!
//! One thread and other programs do the work: qemu-img reads and writes foreign formats, mke2fs and
//! mkfs.erofs make file systems, gzip, xz and zstd unpack. This program decides what they may open:
//! it reads every header itself first, so that nothing is guessed and no file outside of the image's
//! folder is touched. Images are hostile input; results appear whole or not at all.

mod boot;
mod cleaner;
mod contents;
mod copy;
mod export;
mod formats;
/// Entry points for `tools/fuzz`.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
#[path = "../../../tests/common/fuzz_folder.rs"]
mod fuzz_folder;
#[cfg(any(test, fuzzing))]
#[path = "../../../tests/common/fuzz_input.rs"]
mod fuzz_input;
#[cfg(test)]
#[path = "../../../tests/common/fuzz_run.rs"]
mod fuzz_run;
mod import;
mod output;
mod overlay;
mod qemu;
mod rootfs;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mayfly_images::{archive, bytes, failure, progress, sparse, tool, unpack};

#[derive(Debug, Parser)]
#[command(name = "tools/guest", bin_name = "tools/guest", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a raw disk of another hypervisor's
    Import(import::Import),
    /// Make another hypervisor's disk of a raw one
    Export(export::Export),
    /// Make a root disk of a folder, an archive, a container image or Debian's packages
    Rootfs(rootfs::Rootfs),
    /// Show what an overlay holds, or write it into its base
    Overlay(overlay::OverlayArgs),
    /// Remove the folder of a run once it is gone
    #[command(hide = true)]
    Clean(cleaner::Clean),
}

/// The program.
pub fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Import(args) => import::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Rootfs(args) => rootfs::run(&args),
        Command::Overlay(args) => overlay::run(&args),
        Command::Clean(args) => {
            cleaner::run(&args);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayfly-disks: {error}.");
            ExitCode::FAILURE
        }
    }
}
