//! Container images on disk: the OCI image layout (oci-layout, index.json, blobs), as a folder or in
//! a tar archive, and what `docker save` of older versions writes (manifest.json). Blobs are checked
//! against their digests.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::archive::{Archive, EntryKind};
use crate::content::{hex, sum_of};
use crate::failure::{Context, Failure, Result, clean};
use crate::fill::{self, Blobs, LeftOut, bad_archive};
use crate::sparse;
use crate::tree::Tree;
use crate::unpack::{self, Compression};

/// A manifest or a configuration.
const JSON_MAX: u64 = 4 << 20;
const LAYERS_MAX: usize = 512;
/// An index of indexes is one that was made to be.
const DEPTH_MAX: u32 = 4;
const FILES_MAX: usize = 4096;
/// How many manifests are looked at for the one of this machine, in all indexes together.
const MANIFESTS_MAX: u32 = 256;

/// What an image says of how it is run.
#[derive(Debug, Default)]
pub struct Config {
    pub command: Vec<String>,
    pub environment: Vec<String>,
    pub folder: Option<String>,
    pub user: Option<String>,
}

/// The files of a layout, by their names in it.
#[derive(Debug)]
pub enum Layout {
    Folder(PathBuf),
    Archive(PathBuf, HashMap<String, PathBuf>),
}

impl Layout {
    /// The layout that a folder is, if it is one.
    pub fn of_folder(folder: &Path) -> Option<Layout> {
        let has = |name| folder.join(name).is_file();
        // A root file system may have a file of the first name for itself.
        (has("index.json") && has("oci-layout")).then(|| Layout::Folder(folder.to_path_buf()))
    }

    /// The layout in an archive, if there is one; its files are unpacked into `work`.
    pub fn of_archive(path: &Path, work: &Path, max: u64) -> Result<Option<Layout>> {
        let bad = |error: std::io::Error| bad_archive(path, &error);
        let file = File::open(path).cannot("open", path)?;
        let mut archive = Archive::new(BufReader::new(file));
        let (mut has_index, mut has_mark, mut is_saved) = (false, false, false);
        while let Some(entry) = archive.next_entry().map_err(bad)? {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            match plain(&name) {
                _ if entry.kind != EntryKind::File => {}
                "index.json" => has_index = true,
                "oci-layout" => has_mark = true,
                "manifest.json" => is_saved = is_manifest_of_docker(&mut archive).map_err(bad)?,
                _ => {}
            }
        }
        // A root file system may have any of them for itself.
        if !(has_index && has_mark || is_saved) {
            return Ok(None);
        }
        fs::create_dir(work).cannot("create", work)?;
        let file = File::open(path).cannot("open", path)?;
        let mut archive = Archive::new(BufReader::new(file));
        let (mut files, mut links) = (HashMap::new(), Vec::new());
        let (mut left, mut count) = (max, 0);
        while let Some(entry) = archive.next_entry().map_err(bad)? {
            let name = plain(&String::from_utf8_lossy(&entry.name)).to_owned();
            match entry.kind {
                EntryKind::File if count < FILES_MAX => {
                    // One of the same name takes the place of an earlier one.
                    let to = work.join(count.to_string());
                    count += 1;
                    let target = File::create_new(&to).cannot("create", &to)?;
                    let mut progress = crate::progress::Progress::quiet();
                    let len = sparse::from_stream(&mut archive, &target, left, &mut progress)
                        .map_err(bad)?;
                    left -= len;
                    files.insert(name, to);
                }
                EntryKind::File => return Err(damaged(path, "more than 4096 files")),
                // Old versions of docker write a layer once, and links to it.
                EntryKind::Symlink | EntryKind::HardLink if links.len() < FILES_MAX => {
                    links.push((name, String::from_utf8_lossy(&entry.link).into_owned()));
                }
                _ => {}
            }
        }
        for (name, target) in links {
            let target = target.trim_start_matches("../").to_owned();
            if let Some(file) = files.get(&target).cloned() {
                files.insert(name, file);
            }
        }
        Ok(Some(Layout::Archive(path.to_path_buf(), files)))
    }

    fn path(&self) -> &Path {
        match self {
            Layout::Folder(path) | Layout::Archive(path, _) => path,
        }
    }

    /// The file `name` of the layout, which this program has put together.
    fn file(&self, name: &str) -> Result<PathBuf> {
        let missing = || {
            Failure::new(
                self.path(),
                format!("the image is incomplete: {} is missing", clean(name)),
                "save it again",
            )
        };
        match self {
            Layout::Folder(folder) => {
                let path = folder.join(name).canonicalize().map_err(|_| missing())?;
                let top = folder.canonicalize().cannot("open", folder)?;
                if !path.starts_with(top) || !path.is_file() {
                    return Err(missing());
                }
                Ok(path)
            }
            Layout::Archive(_, files) => files.get(name).cloned().ok_or_else(missing),
        }
    }

    fn json(&self, path: &Path) -> Result<Value> {
        let mut text = Vec::new();
        let file = File::open(path).cannot("open", path)?;
        file.take(JSON_MAX + 1)
            .read_to_end(&mut text)
            .cannot("read", path)?;
        if text.len() as u64 > JSON_MAX {
            return Err(damaged(self.path(), "a manifest is larger than 4 MiB"));
        }
        serde_json::from_slice(&text)
            .map_err(|error| damaged(self.path(), &format!("a manifest is not JSON: {error}")))
    }

    /// The blob that a descriptor names, checked.
    fn blob(&self, descriptor: &Value) -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().unwrap_or("");
        let is_sum = |sum: &&str| {
            sum.len() == 64
                && sum
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let Some(sum) = digest.strip_prefix("sha256:").filter(is_sum) else {
            return Err(damaged(
                self.path(),
                &format!("the digest {:?} is not of SHA-256", clean(digest)),
            ));
        };
        let path = self.file(&format!("blobs/sha256/{sum}"))?;
        if hex(&sum_of(&path)?) != sum {
            return Err(damaged(
                self.path(),
                &format!("the blob {sum} does not have the content of its digest"),
            ));
        }
        Ok(path)
    }

    /// The manifest for this machine, of the image with that name where there are several.
    fn manifest(
        &self,
        index: &Value,
        name: Option<&str>,
        depth: u32,
        left: &mut u32,
    ) -> Result<Option<Value>> {
        let entries = items(&index["manifests"]);
        let named = |entry: &&Value| {
            let of = |key: &str| entry["annotations"][key].as_str();
            let names = [
                of("org.opencontainers.image.ref.name"),
                of("io.containerd.image.name"),
            ];
            name.is_none_or(|name| names.contains(&Some(name)))
        };
        let fits = |entry: &&Value| {
            let platform = &entry["platform"];
            platform.is_null() || (platform["os"] == "linux" && platform["architecture"] == "amd64")
        };
        let fitting: Vec<&Value> = entries.iter().filter(named).filter(fits).collect();
        if depth == 0 && fitting.len() > 1 {
            let names = fitting.iter().map(|it| {
                let name = it["annotations"]["org.opencontainers.image.ref.name"].as_str();
                clean(name.unwrap_or("(without a name)"))
            });
            let names: Vec<String> = names.take(32).collect();
            let what = format!("holds several images: {}", names.join(", "));
            return Err(Failure::new(self.path(), what, "choose one with --name"));
        }
        for entry in fitting {
            *left = left.checked_sub(1).ok_or_else(|| {
                let what = format!("its indexes have more than {MANIFESTS_MAX} manifests");
                damaged(self.path(), &what)
            })?;
            let json = self.json(&self.blob(entry)?)?;
            if json["manifests"].is_array() {
                if depth >= DEPTH_MAX {
                    return Err(damaged(self.path(), "an index in an index in an index"));
                }
                if let Some(found) = self.manifest(&json, None, depth + 1, left)? {
                    return Ok(Some(found));
                }
            } else if json["layers"].is_array() {
                return Ok(Some(json));
            }
        }
        Ok(None)
    }

    /// The entries of a list of layers, as many as an image may have.
    fn layers<'a>(&self, list: &'a Value) -> Result<&'a [Value]> {
        match items(list) {
            layers if layers.len() > LAYERS_MAX => {
                Err(damaged(self.path(), "it has more than 512 layers"))
            }
            layers => Ok(layers),
        }
    }

    /// The layers, lowest first, and the configuration.
    fn parts(&self, name: Option<&str>) -> Result<(Vec<PathBuf>, Value)> {
        let nothing = || {
            let which = name.map_or("for linux/amd64".into(), |name| {
                format!("{name:?} for linux/amd64")
            });
            Failure::new(
                self.path(),
                format!("has no image {}", clean(&which)),
                "save it for this platform",
            )
        };
        if let Ok(index) = self.file("index.json") {
            let index = self.json(&index)?;
            let mut left = MANIFESTS_MAX;
            let manifest = self.manifest(&index, name, 0, &mut left)?;
            let manifest = manifest.ok_or_else(nothing)?;
            let layers = self.layers(&manifest["layers"])?.iter();
            // A layer that is named again is not read again for its sum.
            let mut known: HashMap<&str, PathBuf> = HashMap::new();
            let layers: Result<Vec<PathBuf>> = layers
                .map(|layer| {
                    let digest = layer["digest"].as_str().unwrap_or_default();
                    if let Some(path) = known.get(digest) {
                        return Ok(path.clone());
                    }
                    let path = self.blob(layer)?;
                    known.insert(digest, path.clone());
                    Ok(path)
                })
                .collect();
            let config = self.json(&self.blob(&manifest["config"])?)?;
            return Ok((layers?, config));
        }
        let list = self.json(&self.file("manifest.json")?)?;
        let images = items(&list);
        let named = |image: &&Value| {
            let tags = items(&image["RepoTags"]);
            name.is_none_or(|name| tags.iter().any(|tag| tag == name))
        };
        let fitting: Vec<&Value> = images.iter().filter(named).collect();
        let [image] = fitting[..] else {
            return match fitting.len() {
                0 => Err(nothing()),
                count => Err(Failure::new(
                    self.path(),
                    format!("holds {count} images"),
                    "choose one with --name",
                )),
            };
        };
        let layers = self.layers(&image["Layers"])?.iter();
        let layers: Result<Vec<PathBuf>> = layers
            .map(|layer| self.file(layer.as_str().unwrap_or("")))
            .collect();
        let config = self.json(&self.file(image["Config"].as_str().unwrap_or(""))?)?;
        Ok((layers?, config))
    }

    /// Puts the image together in `tree`.
    pub fn read(
        &self,
        name: Option<&str>,
        tree: &mut Tree,
        blobs: &mut Blobs,
        left_out: &mut LeftOut,
    ) -> Result<Config> {
        let (layers, config) = self.parts(name)?;
        let platform = (&config["os"], &config["architecture"]);
        if platform.0 != "linux" || platform.1 != "amd64" {
            let what = format!("is for {}/{}", platform.0, platform.1);
            return Err(Failure::new(
                self.path(),
                clean(&what),
                "save the image for linux/amd64",
            ));
        }
        for (index, layer) in layers.iter().enumerate() {
            tree.layer = index as u32;
            let of = |error: std::io::Error| {
                let text = format!("layer {} of {}: {error}", index + 1, layers.len());
                std::io::Error::new(error.kind(), text)
            };
            let file = File::open(layer).cannot("open", layer)?;
            let compression = Compression::of(&file).cannot("read", layer)?;
            if let Some(kind) = compression {
                unpack::with(layer, kind, |from| {
                    fill::archive(from, tree, blobs, true, left_out).map_err(of)
                })
                .map_err(|error| error.within(layer, self.path()))?;
            } else {
                fill::archive(&mut BufReader::new(file), tree, blobs, true, left_out)
                    .map_err(|error| bad_archive(self.path(), &of(error)))?;
            }
        }
        Ok(Config::read(&config["config"]))
    }
}

/// What is in a list; what is no list has nothing.
fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// Whether it is the list of images that `docker save` writes.
fn is_manifest_of_docker(entry: &mut impl Read) -> std::io::Result<bool> {
    let mut text = Vec::new();
    entry.take(JSON_MAX + 1).read_to_end(&mut text)?;
    let list: Option<Value> = serde_json::from_slice(&text).ok();
    Ok(list.is_some_and(|list| list[0]["Layers"].is_array()))
}

/// `./index.json` is `index.json`.
fn plain(name: &str) -> &str {
    name.trim_start_matches("./")
}

fn damaged(path: &Path, what: &str) -> Failure {
    Failure::new(path, format!("is no valid image: {what}"), "save it again")
}

impl Config {
    fn read(config: &Value) -> Config {
        let list = |name: &str| -> Vec<String> {
            items(&config[name])
                .iter()
                .filter_map(|it| it.as_str().map(str::to_owned))
                .collect()
        };
        let text = |name: &str| {
            config[name]
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
        };
        Config {
            command: [list("Entrypoint"), list("Cmd")].concat(),
            environment: list("Env"),
            folder: text("WorkingDir"),
            user: text("User").filter(|user| !["0", "root", "0:0"].contains(&user.as_str())),
        }
    }
}
