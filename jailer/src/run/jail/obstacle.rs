//! What on a host keeps an ordinary program from making a jail, and what to do about it.
//!
//! Distributions and containers have several settings for user namespaces; all of them show only as
//! a refused system call. What they are set to is read here, below a folder that a test can replace.

use std::borrow::Cow;
use std::path::Path;

use rustix::io::Errno;

use crate::error::Remedy;

/// Where the kernel's settings are.
const SETTINGS: &str = "/proc/sys";

/// A setting that forbids it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Debian's old setting.
    UnprivilegedClone,
    /// The limit on user namespaces is 0.
    MaxUserNamespaces,
    /// Ubuntu's: programs without an AppArmor profile get namespaces without capabilities.
    AppArmor,
    /// Compiled out.
    NoUserNamespaces,
    /// A filter, of a container or a service.
    Filter,
}

impl Obstacle {
    /// What it is.
    pub fn reason(self) -> &'static str {
        match self {
            Obstacle::UnprivilegedClone => {
                "this host forbids user namespaces to ordinary users (kernel.unprivileged_userns_clone is 0)"
            }
            Obstacle::MaxUserNamespaces => {
                "this host allows no user namespaces (user.max_user_namespaces is 0)"
            }
            Obstacle::AppArmor => {
                "AppArmor restricts user namespaces here (kernel.apparmor_restrict_unprivileged_userns is 1)"
            }
            Obstacle::NoUserNamespaces => "this kernel has no user namespaces",
            Obstacle::Filter => {
                "a filter forbids namespaces to this program, as containers and services have them"
            }
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Obstacle::UnprivilegedClone => "as root: sysctl -w kernel.unprivileged_userns_clone=1",
            Obstacle::MaxUserNamespaces => "as root: sysctl -w user.max_user_namespaces=10000",
            Obstacle::AppArmor => {
                "as root: install resources/apparmor/mayfly-jailer in /etc/apparmor.d and load it \
                 with apparmor_parser -r, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
            }
            Obstacle::NoUserNamespaces => "use a kernel with CONFIG_USER_NS",
            Obstacle::Filter => {
                "start the container with --security-opt seccomp=unconfined (or a profile that allows \
                 clone3 and mount), or the service with fewer Restrict options"
            }
        }
    }
}

/// What stands in the way, if a setting below this folder does.
fn obstacle(settings: &Path, is_root: bool) -> Option<Obstacle> {
    let value = |name: &str| {
        let text = std::fs::read_to_string(settings.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    if value("user/max_user_namespaces") == Some(0) {
        return Some(Obstacle::MaxUserNamespaces);
    }
    if !is_root && value("kernel/unprivileged_userns_clone") == Some(0) {
        return Some(Obstacle::UnprivilegedClone);
    }
    if !is_root && value("kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return Some(Obstacle::AppArmor);
    }
    if !Path::new("/proc/self/ns/user").exists() {
        return Some(Obstacle::NoUserNamespaces);
    }
    None
}

/// What stands in the way on this host, if a setting does.
pub fn here() -> Option<Obstacle> {
    obstacle(Path::new(SETTINGS), crate::sys::is_superuser())
}

/// The namespaces cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the jail's namespaces{}", found.map_or(String::new(), |it| format!(": {}", it.reason())))]
pub struct NamespacesError {
    found: Option<Obstacle>,
    source: Errno,
}

impl NamespacesError {
    /// From the kernel's answer, and what is set on this host.
    pub fn of(source: Errno, found: Option<Obstacle>) -> NamespacesError {
        let found = found.or(match source {
            // Containers' filters answer clone3 with "no such call".
            Errno::NOSYS | Errno::PERM | Errno::ACCESS => Some(Obstacle::Filter),
            Errno::INVAL => Some(Obstacle::NoUserNamespaces),
            _ => None,
        });
        NamespacesError { found, source }
    }
}

impl Remedy for NamespacesError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match (self.found, self.source) {
            (Some(obstacle), _) => obstacle.remedy(),
            (None, Errno::NOSPC | Errno::USERS) => {
                "a limit on namespaces is reached: raise user.max_*_namespaces (sysctl), or end some"
            }
            (None, Errno::AGAIN) => "the limit on processes is reached: raise ulimit -u",
            _ => return None,
        };
        Some(remedy.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    fn settings(name: &str, files: &[(&str, &str)]) -> crate::testing::Folder {
        let folder = crate::testing::Folder::new(name);
        for (file, text) in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn every_setting_is_recognised_and_has_a_remedy() {
        let none = settings("obstacle-none", &[("user/max_user_namespaces", "100\n")]);
        assert_eq!(obstacle(none.path(), false), None);
        let text = message(&NamespacesError::of(Errno::NOSYS, None));
        assert!(text.contains("seccomp=unconfined"), "{text}");
        let text = message(&NamespacesError::of(Errno::NOSPC, None));
        assert!(text.contains("max_*_namespaces"), "{text}");
        for (file, value, remedy) in [
            (
                "user/max_user_namespaces",
                "0",
                "user.max_user_namespaces=10000",
            ),
            (
                "kernel/unprivileged_userns_clone",
                "0",
                "unprivileged_userns_clone=1",
            ),
            (
                "kernel/apparmor_restrict_unprivileged_userns",
                "1",
                "resources/apparmor",
            ),
        ] {
            let folder = settings("obstacle", &[(file, value)]);
            let found = obstacle(folder.path(), false);
            let text = message(&NamespacesError::of(Errno::PERM, found));
            assert!(text.contains(remedy), "{text}");
        }
    }
}
