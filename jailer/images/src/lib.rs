//! Disks for guests from what containers are made of: a folder (the bundle of an engine), an OCI layout, a tarball.
//! [`Cache::disk`] gives a read-only EROFS file, made once for each content, which all microVMs share through the host's
//! page cache. docs/images.md is its page for users.
//!
//! It is a library of its own for its three users: the program `mayfly-image`, `mayfly-oci`, and `tools/disks`, whose
//! `rootfs` reads the same sources ([`archive`], [`fill`], [`layout`], [`source`], [`tree`]) and makes a system that boots of them, and
//! whose `import` reads the same archives and compressions. It is below `jailer` because engines need it at run time, where
//! there are no tools; and it is no part of the jailer, which starts `mayfly-image` as a program: so neither readers of
//! foreign files nor their dependencies are in what runs beside a guest.
//!
//! It runs on the caller's thread, and reads folders for the first time by as many threads as there are processors. Other
//! programs only unpack ([`unpack`]). All sources are hostile input: names never reach the host's file system ([`tree`]),
//! files of folders are opened without following links ([`content`]), sizes and counts are bounded, digests of images are
//! checked. It never mounts anything, never becomes another user, and opens no device.
//!
//! Imports point down this list: [`Cache`], `known`, `identity`, [`digest`], [`erofs`], [`source`], [`layout`], [`fill`],
//! [`archive`], [`tree`], [`content`], [`unpack`], [`tool`], [`sparse`], [`bytes`], [`progress`], [`failure`].

#![expect(
    missing_docs,
    reason = "for programs of this workspace: where a name says it, there is no comment"
)]

pub mod archive;
pub mod bytes;
mod cache;
pub mod content;
pub mod digest;
pub mod erofs;
pub mod failure;
pub mod fill;
#[cfg(any(test, fuzzing))]
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
mod identity;
mod known;
pub mod layout;
pub mod progress;
pub mod source;
pub mod sparse;
pub mod tool;
pub mod tree;
pub mod unpack;

pub use cache::{Cache, Disk, Listed, SIZE, SOURCE_MAX, Source, default_folder};
pub use failure::Failure;
