//! qemu-img: reads what an image says, checks it, converts. It is always told the format.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::failure::{Failure, Result, printable};
use crate::formats::{Image, Kind};
use crate::progress::Progress;
use crate::tool::{Ended, Tool};

#[derive(Debug)]
pub struct Qemu(Tool);

impl Qemu {
    pub fn find() -> Result<Qemu> {
        Tool::find("qemu-img", "qemu-utils").map(Qemu)
    }

    fn refused(path: &Path, doing: &str, ended: &Ended) -> Failure {
        let why = ended.why();
        // Without what it was told to open, which the message names otherwise.
        let why = why.rsplit_once("': ").map_or(why.as_str(), |(_, why)| why);
        let remedy = if ended.messages().contains("No space left") {
            "free some space"
        } else {
            "copy the disk again from where it came, or repair it there"
        };
        Failure::new(path, format!("qemu-img cannot {doing} it ({why})"), remedy)
    }

    /// That qemu-img reads `image` as this program does, and that all of it is there.
    pub fn check(&self, image: &Image) -> Result<()> {
        let argument = image.argument_alone()?;
        let ended = self.0.run(&["info", "--output=json", &argument])?;
        let info: Value = serde_json::from_slice(&ended.output).unwrap_or_default();
        if ended.code != Some(0) {
            return Err(Qemu::refused(&image.path, "read", &ended));
        }
        if info["encrypted"] == true {
            return Err(Failure::new(
                &image.path,
                "is encrypted",
                "decrypt it first",
            ));
        }
        // It counts in sectors.
        let size = info["virtual-size"].as_u64().unwrap_or(0);
        if size != image.size && size != image.size.next_multiple_of(512) {
            return Err(Failure::new(
                &image.path,
                format!(
                    "its header says {} bytes, and qemu-img reads {size}",
                    image.size
                ),
                "copy it again from where it came, or convert it there",
            ));
        }
        let corrupt = info["format-specific"]["data"]["corrupt"] == true;
        let ended = self.0.run(&["check", "--output=json", &argument])?;
        // 3: unused space only; 63: the format has no checks.
        if corrupt || !matches!(ended.code, Some(0 | 3 | 63)) {
            let report: Value = serde_json::from_slice(&ended.output).unwrap_or_default();
            let what = match report["corruptions"].as_u64() {
                Some(count) if count > 0 => format!("is damaged or truncated ({count} errors)"),
                _ => format!("is damaged or truncated ({})", ended.why()),
            };
            return Err(Failure::new(
                &image.path,
                what,
                "copy it again from where it came, or repair a copy: qemu-img check -r all COPY",
            ));
        }
        self.check_extent(image, &image.argument()?)
    }

    /// That the data which the image's tables name is in its file: qemu-img reads what is missing at
    /// the end as zeros.
    fn check_extent(&self, image: &Image, argument: &str) -> Result<()> {
        // VMDK has been checked, extent by extent; in the others offsets are in the one file.
        let is_one_file = image.data_file.is_none() && image.driver() != "vmdk";
        if !is_one_file {
            return Ok(());
        }
        let len = File::open(&image.path).and_then(|file| file.metadata());
        let len = len.map_or(0, |it| it.len());
        let mut needed = 0;
        let mut command = self.0.command();
        command.args(["map", "--output=json", argument]);
        let ended = self.0.finish(command, |out| {
            let mut lines = BufReader::new(out);
            let mut line = Vec::new();
            loop {
                line.clear();
                if (&mut lines).take(4096).read_until(b'\n', &mut line)? == 0 {
                    return Ok(Vec::new());
                }
                let text = String::from_utf8_lossy(&line);
                let object = text.trim().trim_matches(['[', ']', ',']);
                let entry: Value = serde_json::from_str(object).unwrap_or_default();
                let number = |name| entry[name].as_u64();
                let has_data = entry["depth"] == 0 && entry["data"] == true;
                if let (true, Some(at), Some(part), Some(start)) = (
                    has_data,
                    number("offset"),
                    number("length"),
                    number("start"),
                ) {
                    let visible = part.min(image.size.saturating_sub(start));
                    needed = at.saturating_add(visible).max(needed);
                }
            }
        })?;
        if ended.code != Some(0) {
            return Err(Qemu::refused(&image.path, "read", &ended));
        }
        if needed > len {
            return Err(Failure::new(
                &image.path,
                format!("is truncated: it has {len} bytes and needs {needed}"),
                "copy it again from where it came",
            ));
        }
        Ok(())
    }

    /// Makes the raw disk `to`.
    pub fn import(&self, image: &Image, to: &Path) -> Result<()> {
        let argument = image.argument()?;
        self.convert(&["-O", "raw", &argument], to, &image.path)
    }

    /// Makes `to` of the raw disk `from`.
    pub fn export(&self, from: &Image, format: &str, options: &[&str], to: &Path) -> Result<()> {
        let argument = from.argument()?;
        let mut args = vec!["-O", format];
        for option in options {
            args.extend(["-o", option]);
        }
        args.push(&argument);
        self.convert(&args, to, &from.path)
    }

    fn convert(&self, args: &[&str], to: &Path, from: &Path) -> Result<()> {
        let mut command = self.0.command();
        // Absolute, so that it is neither an option nor a protocol.
        command.args(["convert", "-p"]).args(args).arg(to);
        let mut progress = Progress::new("converting", 10_000);
        let ended = self.0.finish(command, |out| follow(out, &mut progress))?;
        drop(progress);
        if ended.code != Some(0) {
            return Err(Qemu::refused(from, "convert", &ended));
        }
        Ok(())
    }

    /// Makes the snapshot `id` the state of `image`, which must be a copy.
    pub fn apply(&self, image: &Image, id: &str) -> Result<()> {
        let argument = image.argument()?;
        let ended = self.0.run(&["snapshot", "-a", id, &argument])?;
        if ended.code != Some(0) {
            return Err(Qemu::refused(&image.path, "apply the snapshot of", &ended));
        }
        Ok(())
    }

    /// Writes back the log of `image`, which must be a copy.
    pub fn replay(&self, image: &Image) -> Result<()> {
        let argument = image.argument()?;
        let ended = self.0.run(&["check", "-r", "all", &argument])?;
        if ended.code != Some(0) {
            return Err(Qemu::refused(&image.path, "replay the log of", &ended));
        }
        Ok(())
    }

    /// The size that `path`, of this program's making, is read with.
    pub fn size(&self, path: &Path, kind: Kind) -> Result<u64> {
        let image = Image::open(path, kind, crate::formats::Reach::new(false))?;
        let ended = self.0.run(&["info", "--output=json", &image.argument()?])?;
        let info: Value = serde_json::from_slice(&ended.output).unwrap_or_default();
        info["virtual-size"].as_u64().ok_or_else(|| {
            Failure::plain(format!(
                "{}: qemu-img cannot read back what it wrote",
                printable(path)
            ))
        })
    }
}

/// Shows what `qemu-img -p` prints: `    (12.34/100%)` and a carriage return, again and again.
fn follow(output: &mut dyn Read, progress: &mut Progress) -> std::io::Result<Vec<u8>> {
    let (mut piece, mut buffer) = (Vec::new(), [0; 256]);
    loop {
        let len = output.read(&mut buffer)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        for &byte in &buffer[..len] {
            if byte == b'\r' || byte == b'\n' {
                if let Some(hundredths) = percent(&piece) {
                    progress.set(hundredths);
                }
                piece.clear();
            } else if piece.len() < 64 {
                piece.push(byte);
            }
        }
    }
}

/// Hundredths of a percent in one piece of qemu-img's output.
fn percent(piece: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(piece).ok()?.trim();
    let number = text.strip_prefix('(')?.strip_suffix("/100%)")?;
    let (whole, part) = number.split_once('.')?;
    Some(whole.parse::<u64>().ok()?.checked_mul(100)? + part.get(..2)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_read_from_what_qemu_img_prints() {
        assert_eq!(percent(b"    (12.34/100%)"), Some(1234));
        assert_eq!(percent(b"    (100.00/100%)"), Some(10_000));
        assert_eq!(percent(b"    (x/100%)"), None);
        assert_eq!(percent(b""), None);
    }
}
