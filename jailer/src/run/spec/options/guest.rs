//! What `run` is told of a command for the guest: its image, what is laid into it, and when it starts. Pure.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::super::devices::{DriveSettings, GivenDrive};
use super::super::memory::memory_mount;
use super::refuse;
use crate::args::{ArgsError, Why, Words};
use crate::process::command::Command;
use crate::process::pack::CopyIn;
use crate::run::agent::{Memory, RootMode};

/// A command for the guest, and what it runs in.
#[derive(Debug, Default, PartialEq)]
pub struct GuestCommand {
    /// The root disk's image.
    pub image: PathBuf,
    /// What the root disk is to the guest.
    pub mode: Option<RootMode>,
    /// The name of the guest's host; that of the microVM without it.
    pub hostname: Option<String>,
    /// The agent's program.
    pub agent: Option<PathBuf>,
    /// The image of the disk that takes what is written.
    pub upper: Option<PathBuf>,
    /// Where memory is mounted.
    pub memory: Vec<Memory>,
    /// What is copied into the guest.
    pub copies: Vec<CopyIn>,
    /// Whether it waits for `mayfly-jailer start`.
    pub is_held: bool,
    /// What is to be run.
    pub command: Command,
}

impl GuestCommand {
    /// The drives for its root: the image, and the disk that takes what is written.
    pub fn drives(&self) -> Result<Vec<GivenDrive>, ArgsError> {
        let is_read_only = self.mode != Some(RootMode::ReadWrite);
        let mut drives = vec![plain_drive("--image", &self.image, is_read_only)?];
        if let Some(upper) = &self.upper {
            drives.push(plain_drive("--upper", upper, false)?);
        }
        Ok(drives)
    }
}

fn plain_drive(name: &'static str, path: &Path, read_only: bool) -> Result<GivenDrive, ArgsError> {
    let image = path.to_str().ok_or_else(|| {
        let given = path.display().to_string();
        ArgsError::Value(name, given, "it is not UTF-8".into())
    })?;
    Ok(GivenDrive {
        image: image.into(),
        read_only,
        overlay: None,
        settings: DriveSettings::default(),
    })
}

/// Those that only a command has.
const OF_COMMAND: &str = "--agent --hostname --user --workdir --env -t --tty -i --interactive --hold \
                          --ready-fd --runtime-dir --process --console-socket --upper --tmpfs --copy-in \
                          --net-from-namespace --reach-from-namespace --template";
/// Those that a machine with a command does not have.
const NOT_OF_COMMAND: &str = "--config --snapshot --snapshot-to --initrd --api-sock";

/// Takes the command for the guest, and what is about it, out of the words.
pub fn take(
    words: &mut Words,
    command: Option<Vec<OsString>>,
) -> Result<Option<GuestCommand>, ArgsError> {
    const NAME: &str = "--image";
    let Some((image, mode)) = words.parsed(NAME, image)? else {
        if let Some(name) = OF_COMMAND.split(' ').find(|name| words.has(name)) {
            return refuse(name, words, "it needs --image, and a command after --");
        }
        return match command {
            Some(command) => {
                let first = command.first().cloned().unwrap_or_default();
                let why = "a command needs --image; the arguments of a kernel go into --cmdline";
                Err(ArgsError::Value(
                    "--",
                    first.display().to_string(),
                    why.into(),
                ))
            }
            None => Ok(None),
        };
    };
    let given = image.display().to_string();
    if let Some(name) = NOT_OF_COMMAND.split(' ').find(|name| words.has(name)) {
        return refuse(
            name,
            words,
            "--image boots a kernel with an agent of its own; leave one of both out",
        );
    }
    if !words.has("--kernel") {
        let why = "--kernel is missing: a kernel that tools/guest makes, or one that docs/images.md describes";
        return Err(ArgsError::Value(NAME, given, why.into()));
    }
    let missing = "what to run is missing; give it after --, e.g. -- /bin/sh, or with --process";
    let missing = ArgsError::Value(NAME, given, missing.into());
    if words.has("--net-from-namespace") && words.has("--net") {
        let why = "the guest's interface is that of the namespace; leave one of both out";
        return refuse("--net-from-namespace", words, why);
    }
    if words.has("--reach-from-namespace") && !words.has("--net-from-namespace") {
        let why = "it needs --net-from-namespace";
        return refuse("--reach-from-namespace", words, why);
    }
    let upper = words.path("--upper");
    if let (Some(upper), Some(_)) = (&upper, mode) {
        let why = "what is written goes there only of an image without :ro and :rw";
        let upper = upper.display().to_string();
        return Err(ArgsError::Value("--upper", upper, why.into()));
    }
    Ok(Some(GuestCommand {
        image,
        mode,
        upper,
        memory: words.all("--tmpfs", memory_mount)?,
        copies: words.all("--copy-in", CopyIn::parse)?,
        hostname: words.parsed("--hostname", hostname)?,
        agent: words.path("--agent"),
        is_held: words.has("--hold"),
        command: Command::take(words, command, missing)?,
    }))
}

/// Reads `FILE`, `FILE:ro`, `FILE:rw`, or `FILE:overlay`, which is `FILE` also where its name ends as one of these.
fn image(text: &str) -> Result<(PathBuf, Option<RootMode>), Why> {
    let (path, mode) = match text.rsplit_once(':') {
        Some((path, "ro")) => (path, Some(RootMode::ReadOnly)),
        Some((path, "rw")) => (path, Some(RootMode::ReadWrite)),
        Some((path, "overlay")) => (path, None),
        _ => (text, None),
    };
    match path {
        "" => Err("it names no file".into()),
        _ => Ok((path.into(), mode)),
    }
}

/// The name of a host: the kernel takes 64 bytes.
fn hostname(text: &str) -> Result<String, Why> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    match (1..=64).contains(&text.len()) && text.bytes().all(is_fit) {
        true => Ok(text.to_owned()),
        false => Err("a name has 1 to 64 letters, digits, - and .".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_whose_name_ends_as_a_mode_can_be_named_with_each_of_them() {
        for (text, path, mode) in [
            ("a", "a", None),
            ("a:ro", "a", Some(RootMode::ReadOnly)),
            ("a:rw", "a", Some(RootMode::ReadWrite)),
            ("a:overlay", "a", None),
            ("a:ro:ro", "a:ro", Some(RootMode::ReadOnly)),
            ("a:ro:rw", "a:ro", Some(RootMode::ReadWrite)),
            ("a:ro:overlay", "a:ro", None),
            ("a:overlay:overlay", "a:overlay", None),
            ("a:b", "a:b", None),
        ] {
            assert_eq!(image(text).unwrap(), (path.into(), mode), "{text}");
        }
        assert!(image(":ro").is_err());
    }
}
