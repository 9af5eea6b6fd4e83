//! Parallels: an image file, and the folder (bundle) that Parallels Desktop keeps it in, with a
//! description of what belongs to what.

use std::fs::{self, File};
use std::path::Path;

use roxmltree::{Document, Node};

use super::{Image, Kind, Reach, damaged, encrypted, need32, plausible, truncated};
use crate::bytes::{self, le64};
use crate::failure::{Context, Failure, Result};

pub const DESCRIPTOR: &str = "DiskDescriptor.xml";
/// A descriptor has a few KiB.
const DESCRIPTOR_MAX: u64 = 1 << 20;
/// It is parsed by recursion, and has some 50 tags for each image.
const TAGS_MAX: usize = 4096;
const IN_USE: u32 = 0x746f_6e59;

pub fn open(file: &File, path: &Path) -> Result<Image> {
    let len = file.metadata().cannot("open", path)?.len();
    let header = bytes::read(file, 0, 64).cannot("read", path)?;
    let entries = u64::from(need32(path, &header, 32)?);
    let sectors = le64(&header, 36).and_then(|sectors| sectors.checked_mul(512));
    let needed = 64 + entries * 4;
    if len < needed {
        return Err(truncated(path, needed, len));
    }
    let mut image = Image::new(Kind::Parallels, path, plausible(path, sectors)?);
    if need32(path, &header, 44)? == IN_USE {
        image
            .notes
            .push("it was not closed: its virtual machine runs, or ended suddenly".into());
    }
    Ok(image)
}

fn child<'a>(node: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text<'a>(node: Node<'a, 'a>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim)
}

/// The image of a bundle, which must have just one.
pub fn bundle(folder: &Path, reach: Reach) -> Result<Image> {
    let path = folder.join(DESCRIPTOR);
    let len = fs::metadata(&path).cannot("open", &path)?.len();
    if len > DESCRIPTOR_MAX {
        return Err(damaged(&path, "it is larger than 1 MiB"));
    }
    let content = fs::read_to_string(&path).cannot("read", &path)?;
    if content.matches('<').count() > TAGS_MAX {
        return Err(damaged(&path, "it has more than 4096 tags"));
    }
    let document = Document::parse(&content)
        .map_err(|error| damaged(&path, &format!("it is not valid XML ({error})")))?;
    let root = document.root_element();
    let cipher = root
        .descendants()
        .find(|node| node.has_tag_name("Encryption"));
    let has_cipher = cipher.is_some_and(|node| {
        node.descendants()
            .any(|node| node.is_text() && !node.text().unwrap_or("").trim().is_empty())
    });
    if has_cipher {
        return Err(encrypted(folder));
    }
    let storages: Vec<Node<'_, '_>> = root
        .descendants()
        .filter(|node| node.has_tag_name("Storage"))
        .collect();
    let [storage] = storages[..] else {
        return Err(Failure::new(
            folder,
            format!("its disk is in {} parts", storages.len()),
            "make one of them in Parallels: Hardware > Hard Disk > Advanced, or prl_disk_tool merge",
        ));
    };
    let images: Vec<Node<'_, '_>> = storage
        .children()
        .filter(|node| node.has_tag_name("Image"))
        .collect();
    let [one] = images[..] else {
        return Err(Failure::new(
            folder,
            format!(
                "it has {} images, of which all but one are snapshots",
                images.len()
            ),
            "delete the snapshots in Parallels, or: prl_disk_tool merge --hdd FOLDER",
        ));
    };
    let number = |name| text(storage, name).and_then(|text| text.parse::<u64>().ok());
    let sectors = match (number("Start"), number("End")) {
        (Some(0), Some(end)) => end.checked_mul(512),
        _ => None,
    };
    let size = plausible(&path, sectors)?;
    let name = text(one, "File").unwrap_or_default();
    let file_path = reach.resolve(&path, name, "image")?;
    let file = File::open(&file_path).cannot("open", &file_path)?;
    let mut image = match text(one, "Type") {
        Some("Compressed") => {
            let kind = Kind::of(&file, &file_path)?;
            if kind != Kind::Parallels {
                return Err(damaged(&file_path, "it is no Parallels image"));
            }
            open(&file, &file_path)?
        }
        Some("Plain") => Image::open(&file_path, Kind::Raw, reach)?,
        _ => return Err(damaged(&path, "the type of its image is unknown")),
    };
    if image.size < size {
        return Err(truncated(&file_path, size, image.size));
    }
    if image.size != size {
        let note = format!(
            "the bundle says {size} bytes, its image {}: taken is the image",
            image.size
        );
        image.notes.push(note);
    }
    image.shape = "bundle".into();
    Ok(image)
}
