//! What is on a raw disk: its partition table and the file systems, by their magic numbers. Only
//! reads; the bytes are a guest's, so every number is checked.

pub mod filesystem;
pub mod gpt;
pub mod mbr;

use std::fs::File;
use std::path::Path;

use crate::bytes;
use crate::failure::{Context, Result};
use filesystem::FileSystem;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// As in /dev/vda2.
    pub number: u32,
    /// In bytes.
    pub start: u64,
    pub len: u64,
    /// The name in a GPT.
    pub name: String,
    pub content: Option<FileSystem>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Table {
    None,
    Mbr,
    Gpt(gpt::State),
}

/// The content of a disk of `len` bytes.
#[derive(Debug)]
pub struct Contents {
    pub table: Table,
    pub partitions: Vec<Partition>,
    /// A file system on the whole disk.
    pub whole: Option<FileSystem>,
    pub notes: Vec<String>,
}

impl Contents {
    pub fn read(file: &File, path: &Path, len: u64) -> Result<Contents> {
        let mut contents = Contents {
            table: Table::None,
            partitions: Vec::new(),
            whole: filesystem::find(file, 0, len).cannot("read", path)?,
            notes: Vec::new(),
        };
        // Others may be remains from before the disk was partitioned.
        if contents
            .whole
            .as_ref()
            .is_some_and(|whole| whole.begins_at_0)
        {
            return Ok(contents);
        }
        if let Some(found) = gpt::Gpt::read(file, len).cannot("read", path)? {
            contents.partitions = found.partitions();
            contents.table = Table::Gpt(found.state);
        } else {
            let partitions = mbr::read(file, len).cannot("read", path)?;
            if !partitions.is_empty() {
                (contents.table, contents.partitions) = (Table::Mbr, partitions);
            }
        }
        if contents.table == Table::None {
            let at_4096 = bytes::read(file, 4096, 8).cannot("read", path)?;
            if at_4096 == b"EFI PART" {
                contents.notes.push(
                    "its GPT counts sectors of 4096 bytes; a guest here has sectors of 512 and will not find it".into(),
                );
            }
            return Ok(contents);
        }
        let is_iso = contents
            .whole
            .as_ref()
            .is_some_and(|whole| whole.kind == "iso9660");
        if !is_iso {
            contents.whole = None;
        }
        for partition in &mut contents.partitions {
            let end = partition.start.saturating_add(partition.len);
            if end > len {
                contents.notes.push(format!(
                    "partition {} ends at byte {end}, behind the end of the disk ({len})",
                    partition.number
                ));
            }
            partition.content =
                filesystem::find(file, partition.start, partition.len).cannot("read", path)?;
        }
        Ok(contents)
    }

    /// Whether there is anything that a guest could use.
    pub fn is_known(&self) -> bool {
        self.whole.is_some() || self.table != Table::None || !self.notes.is_empty()
    }

    /// Whether it would begin a system by a disk of its own.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(whole) = &self.whole {
            lines.push(format!("the whole disk: {whole}"));
        }
        match &self.table {
            Table::None => {}
            Table::Mbr => lines.push(format!("MBR, {} partitions", self.partitions.len())),
            Table::Gpt(gpt::State::Good) => {
                lines.push(format!("GPT, {} partitions", self.partitions.len()));
            }
            Table::Gpt(state) => lines.push(format!(
                "GPT, {} partitions; {state} (--mend-gpt writes both anew)",
                self.partitions.len()
            )),
        }
        for partition in &self.partitions {
            let content = match &partition.content {
                Some(content) => content.to_string(),
                None => "no known file system".into(),
            };
            let name = match partition.name.as_str() {
                "" => String::new(),
                name => format!(" {name:?}"),
            };
            lines.push(format!(
                "partition {}{name}: {} at {}: {content}",
                partition.number,
                bytes::size(partition.len),
                bytes::size(partition.start),
            ));
        }
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines
    }
}
