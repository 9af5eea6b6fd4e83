//! What this host has for containers: the programs, the guest's kernel, and the settings of
//! `/etc/mayfly/oci.json`, or of a user's own `oci.json` in its place. Only looks.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::args::Global;
use crate::error::{AnyError, Step as _};
use crate::input::{self, InputError};
use crate::user::User;

/// Where the settings are.
const SETTINGS: &str = "/etc/mayfly/oci.json";
/// How long they may be.
const SETTINGS_MAX: u64 = 1 << 20;
/// Where programs are, where the environment does not say: podman's has no PATH when it removes a container.
const STANDARD_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The name of the state folder.
const ROOT: &str = "mayfly-oci";

/// The settings; docs/podman.md has them.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The guest's kernel.
    pub kernel: Option<PathBuf>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// MiB of guest memory for a container without a limit.
    pub memory_mib: u64,
    /// Processors of a container without a quota.
    pub vcpus: u64,
    /// Where disks of images are kept.
    pub cache: Option<PathBuf>,
    /// How large that may become, in MiB.
    pub cache_mib: Option<u64>,
    /// Where templates of guests are kept; without it, each container's guest boots.
    pub templates: Option<PathBuf>,
    /// The users for monitors, where root runs this: the first, and how many.
    pub uids: (u32, u32),
    /// Seconds that a guest may take until it is ready.
    pub ready_seconds: u64,
    /// How names of engines' processes begin: a container ends with its own.
    pub end_with: Vec<String>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            kernel: None,
            cmdline: None,
            memory_mib: 256,
            vcpus: 1,
            cache: None,
            cache_mib: None,
            templates: None,
            // Between the numbers that systemd gives to containers and those that programs take for
            // negative.
            uids: (1_900_000_000, 65_536),
            ready_seconds: 180,
            end_with: ["conmon", "containerd-shim", "slurmstepd", "ray::"]
                .map(str::to_owned)
                .into(),
        }
    }
}

/// A setting, a program or a file is missing.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(
        "cannot find the guest's kernel: name it in {0} (\"kernel\"), in the environment (MAYFLY_KERNEL) or with \
         --kernel"
    )]
    NoKernel(String),
    #[error("cannot use the kernel {0}: there is no such file")]
    MissingKernel(PathBuf),
    #[error("cannot find {0}: it is neither beside {1} nor in PATH")]
    NoProgram(&'static str, PathBuf),
    #[error("cannot use the settings {0}: {1}")]
    Settings(PathBuf, &'static str),
}

/// What this host has.
#[derive(Debug)]
pub struct Host {
    /// The settings.
    pub settings: Settings,
    kernel: Option<PathBuf>,
    /// The folder of all containers' states.
    pub root: PathBuf,
    /// Who runs this program.
    pub user: User,
}

impl Host {
    /// Reads the settings.
    pub fn new(global: &Global) -> Result<Host, AnyError> {
        let user = User::current();
        let settings = match &global.config {
            Some(path) => read(path)?,
            None => find(user)?,
        };
        let given = global.kernel.clone();
        let given = given.or_else(|| std::env::var_os("MAYFLY_KERNEL").map(PathBuf::from));
        let root = global.root.clone();
        Ok(Host {
            kernel: given.or_else(|| settings.kernel.clone()),
            settings,
            root: std::path::absolute(root.unwrap_or_else(|| user.runtime_folder(ROOT)))?,
            user,
        })
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> Result<PathBuf, HostError> {
        let Some(kernel) = &self.kernel else {
            let own = self.user.settings();
            let places = [Some(SETTINGS.into()), own].into_iter().flatten();
            let places: Vec<String> = places.map(|it| it.display().to_string()).collect();
            return Err(HostError::NoKernel(places.join(" or ")));
        };
        match std::path::absolute(kernel) {
            Ok(path) if path.is_file() => Ok(path),
            _ => Err(HostError::MissingKernel(kernel.clone())),
        }
    }
}

/// A program, of ours or of the host.
pub fn program(name: &'static str) -> Result<PathBuf, AnyError> {
    let own = std::env::current_exe().step("find this program")?;
    let beside = own.with_file_name(name);
    let path = std::env::var_os("PATH").unwrap_or_else(|| STANDARD_PATH.into());
    let folders = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    let mut places = [beside]
        .into_iter()
        .chain(folders.map(|folder| folder.join(name)));
    let found = places.find(|place| place.is_file());
    Ok(found.ok_or(HostError::NoProgram(name, own))?)
}

/// The settings of this user, or those of the machine.
fn find(user: User) -> Result<Settings, AnyError> {
    if let Some(own) = user.settings() {
        match read(&own) {
            Err(error) if is_missing(&error) => {}
            other => return other,
        }
    }
    match read(Path::new(SETTINGS)) {
        Err(error) if is_missing(&error) => Ok(Settings::default()),
        Err(error) => Err(error),
        Ok(settings) => Ok(settings.of_machine(user)),
    }
}

fn is_missing(error: &AnyError) -> bool {
    let cause = error
        .source()
        .and_then(|it| it.downcast_ref::<InputError>());
    matches!(cause, Some(InputError::Io(cause)) if cause.kind() == std::io::ErrorKind::NotFound)
}

fn read(path: &Path) -> Result<Settings, AnyError> {
    let text = input::read(path, SETTINGS_MAX).step_on("read the settings", path)?;
    let mut parser = serde_json::Deserializer::from_slice(&text);
    let settings: Settings =
        serde_path_to_error::deserialize(&mut parser).step_on("use the settings", path)?;
    settings
        .check()
        .map_err(|why| HostError::Settings(path.to_owned(), why))?;
    Ok(settings)
}

impl Settings {
    /// Those of the machine, for this user: folders that are another's stand for its own.
    fn of_machine(mut self, user: User) -> Settings {
        // That of the disks has a default.
        self.cache = self.cache.filter(|folder| user.can_keep(folder));
        if self.templates.as_ref().is_some_and(|it| !user.can_keep(it)) {
            self.templates = user.cache().map(|folder| folder.join("templates"));
        }
        self
    }

    fn check(&self) -> Result<(), &'static str> {
        let (first, count) = self.uids;
        if first == 0 || !(1..=1 << 20).contains(&count) || first.checked_add(count).is_none() {
            return Err(
                "uids must be the first number, above 0, and how many there are, at most 1048576",
            );
        }
        if !(1..=32).contains(&self.vcpus) {
            return Err("vcpus must be 1 to 32");
        }
        if self.templates.as_ref().is_some_and(|it| it.is_relative()) {
            return Err("templates must be an absolute path");
        }
        if self.memory_mib < 64 {
            return Err("memory_mib must be 64 or more");
        }
        match self.ready_seconds {
            0 => Err("ready_seconds must be above 0"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    fn read_text(text: &str) -> Result<Settings, String> {
        let path =
            std::env::temp_dir().join(format!("mayfly-oci-{}-{}", std::process::id(), text.len()));
        std::fs::write(&path, text).unwrap();
        let settings = read(&path).map_err(|error| message(&*error));
        std::fs::remove_file(&path).unwrap();
        settings
    }

    #[test]
    fn settings_that_are_left_out_have_their_default() {
        let expected = Settings {
            kernel: Some("/k".into()),
            ..Settings::default()
        };
        assert_eq!(read_text("{\"kernel\": \"/k\"}"), Ok(expected));
    }

    #[test]
    fn settings_that_cannot_be_used_are_named() {
        for (text, expected) in [
            ("{\"kernels\": \"/k\"}", "kernels"),
            ("{\"memory_mib\": \"x\"}", "memory_mib"),
            ("{\"memory_mib\": 12}", "64 or more"),
            ("{\"vcpus\": 0}", "1 to 32"),
            ("{\"templates\": \"t\"}", "absolute"),
            ("{\"uids\": [0, 10]}", "uids"),
            ("{\"uids\": [4294967295, 10 ]}", "uids"),
            ("{\"ready_seconds\": 0}", "ready_seconds"),
        ] {
            let error = read_text(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn folders_of_the_machine_stand_for_the_users_own_where_they_are_anothers() {
        let settings = |folder: &Path| Settings {
            cache: Some(folder.into()),
            templates: Some(folder.into()),
            ..Settings::default()
        };
        let user = User::Ordinary(rustix::process::geteuid().as_raw());
        let own = std::env::temp_dir().join("mayfly-oci-nonexistent");
        assert_eq!(settings(&own).of_machine(user), settings(&own));
        let other = crate::user::tests::folder_of_another("machine");
        assert_eq!(settings(&other).of_machine(User::Root), settings(&other));
        let changed = settings(&other).of_machine(user);
        assert_eq!(changed.cache, None);
        let templates = user.cache().map(|it| it.join("templates"));
        assert_eq!(changed.templates, templates);
        let _ = std::fs::remove_dir(&other);
    }

    #[test]
    fn settings_that_are_missing_are_no_error_unless_they_were_named() {
        let error = read(Path::new("/nonexistent/oci.json")).unwrap_err();
        assert!(is_missing(&error), "{error}");
        let global = Global {
            config: Some("/nonexistent/oci.json".into()),
            ..Global::default()
        };
        assert!(Host::new(&global).is_err());
    }
}
