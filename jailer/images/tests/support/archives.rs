//! Archives and image layouts, honest and hostile, byte by byte.

use std::fs;
use std::path::Path;
use std::process::Command;

/// An entry of an archive: name, type, mode, owner, link target, content.
pub struct Entry<'a>(
    pub &'a str,
    pub u8,
    pub u32,
    pub u32,
    pub &'a str,
    pub &'a [u8],
);

pub fn file<'a>(name: &'a str, content: &'a str) -> Entry<'a> {
    Entry(name, b'0', 0o644, 0, "", content.as_bytes())
}

pub fn program<'a>(name: &'a str, content: &'a str) -> Entry<'a> {
    Entry(name, b'0', 0o755, 0, "", content.as_bytes())
}

pub fn link<'a>(name: &'a str, target: &'a str) -> Entry<'a> {
    Entry(name, b'2', 0o777, 0, target, b"")
}

/// A tar archive, with whatever names are wanted.
pub fn tar(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = Vec::new();
    for Entry(name, kind, mode, owner, target, content) in entries {
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, format!("{owner:07o}").as_bytes());
        put(116, format!("{:07o}", owner + 1).as_bytes());
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, b"14000000000");
        put(148, b"        ");
        put(156, &[*kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000005");
        put(337, b"0000001");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// Archives that lead out or are damaged, and what they are refused with.
pub fn hostile() -> [(Vec<u8>, &'static str); 8] {
    [
        (tar(&[file("../outside", "x")]), "leads out"),
        (tar(&[file("a/../../outside", "x")]), "leads out"),
        (
            tar(&[Entry("a", b'1', 0, 0, "../../outside", b"")]),
            "leads out",
        ),
        (
            tar(&[Entry("a", b'1', 0, 0, "/etc/passwd", b"")]),
            "not there",
        ),
        (tar(&[file("a", "x"), file("a/b", "x")]), "used as a folder"),
        (tar(&[link("a", "a"), file("a/b", "x")]), "used as a folder"),
        (tar(&[Entry("a", b'V', 0, 0, "", b"")]), "unknown type"),
        (tar(&[Entry("a", b'S', 0, 0, "", b"")]), "--sparse"),
    ]
}

/// Writes a blob and gives its descriptor.
pub fn blob(layout: &Path, content: &[u8]) -> String {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let unfinished = layout.join("blob");
    fs::write(&unfinished, content).unwrap();
    let output = Command::new("sha256sum").arg(&unfinished).output().unwrap();
    let sum = String::from_utf8(output.stdout).unwrap();
    let sum = sum.split(' ').next().unwrap();
    fs::rename(unfinished, blobs.join(sum)).unwrap();
    format!("{{\"digest\":\"sha256:{sum}\",\"size\":{}}}", content.len())
}

/// An OCI layout of these layers in the folder `layout`; its manifest's descriptor.
pub fn image(layout: &Path, layers: &[Vec<u8>], architecture: &str) -> String {
    let layers: Vec<String> = layers.iter().map(|layer| blob(layout, layer)).collect();
    let config = format!(
        "{{\"os\":\"linux\",\"architecture\":\"{architecture}\",\"config\":{{\"Entrypoint\":[\"/bin/app\"],\
         \"Cmd\":[\"it's an argument\"],\"Env\":[\"A=b c\"],\"WorkingDir\":\"/srv\",\"User\":\"app\"}}}}"
    );
    let config = blob(layout, config.as_bytes());
    let manifest = format!("{{\"config\":{config},\"layers\":[{}]}}", layers.join(","));
    blob(layout, manifest.as_bytes())
}

pub fn index(layout: &Path, manifests: &[String]) {
    let text = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{}]}}",
        manifests.join(",")
    );
    fs::write(layout.join("index.json"), text).unwrap();
    fs::write(
        layout.join("oci-layout"),
        "{\"imageLayoutVersion\":\"1.0.0\"}",
    )
    .unwrap();
}

pub fn layers() -> Vec<Vec<u8>> {
    vec![
        tar(&[
            program("bin/sh", "a shell"),
            file("gone", "x"),
            file("dir/old", "x"),
            file("kept", "1"),
        ]),
        tar(&[
            file(".wh.gone", ""),
            file("dir/.wh..wh..opq", ""),
            file("dir/new", "x"),
            file("kept", "2"),
        ]),
    ]
}
