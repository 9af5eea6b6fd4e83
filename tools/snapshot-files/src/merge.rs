//! `merge`: what a snapshot and the diffs after it amount to.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::fs::File;
use std::io;

use mayfly::snapshot::{Header, Kind, MemoryImage, Target, encode_json, write_pair};
use mayfly::wire::check::is_zero;

use crate::image::{Image, each_page};
use crate::opened::{Failure, Opened, Paths};
use crate::verify::{Zeros, content};

/// One of the snapshots, its content checked.
struct Layer {
    snapshot: Opened,
    zeros: Zeros,
}

impl Layer {
    fn open(paths: &Paths) -> Result<Self, Failure> {
        let snapshot = Opened::at(paths)?;
        let zeros = content(&snapshot)?.unwrap_or(Zeros::Written);
        Ok(Layer { snapshot, zeros })
    }

    fn header(&self) -> &Header {
        &self.snapshot.header
    }
}

/// Writes the result to `output`, and prints what it is.
pub fn run(base: &Paths, diffs: &[Paths], output: &Paths) -> Result<(), Failure> {
    let header = merge(base, diffs, output)?;
    println!(
        "merged {} diffs: snapshot {} in `{}` and `{}`",
        diffs.len(),
        header.id,
        output.state.display(),
        output.memory.display()
    );
    Ok(())
}

/// Writes the result to `output`; its header, but for what is said of the memory's content.
fn merge(base: &Paths, diffs: &[Paths], output: &Paths) -> Result<Header, Failure> {
    let mut layers = vec![Layer::open(base)?];
    for paths in diffs {
        let diff = Layer::open(paths)?;
        if let Some(before) = layers.last() {
            check_order(&before.snapshot, &diff.snapshot)?;
        }
        layers.push(diff);
    }
    let (first, last) = (&layers[0], &layers[layers.len() - 1]);
    // A diff and those after it are a diff of what it was applied to; a machine's first is whole.
    let keeps_zeros = first.header().parent.is_some();
    let header = Header {
        kind: match keeps_zeros {
            true => Kind::Diff,
            false => Kind::Full,
        },
        parent: first.header().parent,
        ..last.header().clone()
    };
    let state = last.snapshot.state.json();
    let written = write_pair(
        Target::Path(output.state.clone()),
        Target::Path(output.memory.clone()),
        |file| fill(file, &layers, keeps_zeros, header.memory),
        |memory| {
            Ok::<_, io::Error>(encode_json(
                &Header {
                    memory,
                    ..header.clone()
                },
                state,
            )?)
        },
    );
    written.map_err(|error| {
        let cause = std::error::Error::source(&error);
        let cause = cause.map_or(String::new(), |cause| format!(": {cause}"));
        Failure(format!("{error}{cause}"))
    })?;
    Ok(header)
}

/// Whether `diff` was taken right after `before`.
fn check_order(before: &Opened, diff: &Opened) -> Result<(), Failure> {
    let name = diff.paths.state.display();
    let (header, below) = (&diff.header, &before.header);
    match (header.kind, header.parent) {
        (Kind::Diff, Some(parent)) if parent == below.id => {}
        (Kind::Diff, Some(parent)) => {
            return Err(Failure(format!(
                "The diff `{name}` is applied to the snapshot {parent}, and what comes before it is \
                 {}. Name the diffs in the order in which they were taken",
                below.id
            )));
        }
        (Kind::Diff, None) | (Kind::Full | Kind::Fork, _) => {
            return Err(Failure(format!(
                "`{name}` is no diff of another snapshot: it holds all of memory, and can only come \
                 first"
            )));
        }
    }
    let place = |header: &Header| (header.memory.len, header.memory.id_at);
    match place(header) == place(below) {
        true => Ok(()),
        false => Err(Failure(format!(
            "The memory of `{name}` and of what comes before it have different sizes: they are not of \
             one machine"
        ))),
    }
}

fn fill(
    file: &File,
    layers: &[Layer],
    keeps_zeros: bool,
    memory: MemoryImage,
) -> io::Result<MemoryImage> {
    let mut image = Image::new(file, memory.len, keeps_zeros)?;
    for layer in layers {
        each_page(&layer.snapshot.memory, memory.len, |number, page| {
            match layer.zeros == Zeros::Holes && is_zero(page) {
                true => Ok(()),
                false => image.put(number, page),
            }
        })?;
        image.flush()?;
    }
    let check = Some(image.check);
    Ok(MemoryImage { check, ..memory })
}
