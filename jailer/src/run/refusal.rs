//! Why a host does not let an ordinary program make a jail, and what to do about it.
//!
//! Distributions and containers have several switches for user namespaces; all of them show only as
//! a refused system call. What they are set to is looked up here, below a folder that a test can
//! replace.

use std::path::Path;

use rustix::io::Errno;

use crate::failure::Failure;

/// Where the kernel's switches are.
pub const SWITCHES: &str = "/proc/sys";

/// A switch that is set against us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Debian's old switch.
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

/// What stands in the way, if a switch does.
pub fn obstacle(switches: &Path, is_root: bool) -> Option<Obstacle> {
    let value = |name: &str| {
        let text = std::fs::read_to_string(switches.join(name)).ok()?;
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

/// Why the namespaces could not be had.
pub fn of_namespaces(error: Errno) -> Failure {
    of_error(error, here())
}

/// What stands in the way on this host, if a switch does.
pub fn here() -> Option<Obstacle> {
    obstacle(Path::new(SWITCHES), crate::sys::is_superuser())
}

fn of_error(error: Errno, found: Option<Obstacle>) -> Failure {
    let what = "make the jail's namespaces";
    let found = found.or(match error {
        // Containers' filters answer clone3 with "no such call".
        Errno::NOSYS | Errno::PERM | Errno::ACCESS => Some(Obstacle::Filter),
        Errno::INVAL => Some(Obstacle::NoUserNamespaces),
        _ => None,
    });
    match (found, error) {
        (Some(obstacle), _) => Failure::new(what, format_args!("{} ({error})", obstacle.reason()))
            .remedy(obstacle.remedy()),
        (None, Errno::NOSPC | Errno::USERS) => {
            Failure::new(what, "a limit on namespaces is reached")
                .remedy("raise user.max_*_namespaces (sysctl), or end some")
        }
        (None, Errno::AGAIN) => {
            Failure::new(what, "the limit on processes is reached").remedy("raise ulimit -u")
        }
        (None, _) => Failure::new(what, error),
    }
}

/// Adds to a failure of what namespaces are needed for, once they are made, what may be behind it:
/// AppArmor lets them be made and then refuses everything in them. `found` is what was found outside
/// and before, since inside there is nothing to look at.
pub fn explain(failure: Failure, found: Option<Obstacle>) -> Failure {
    // Said by number in every sentence: EPERM, EACCES.
    let text = failure.to_string();
    let is_denial = text.contains("(os error 1)") || text.contains("(os error 13)");
    match found {
        Some(obstacle) if is_denial => {
            failure.remedy(format_args!("{}: {}", obstacle.reason(), obstacle.remedy()))
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switches(name: &str, files: &[(&str, &str)]) -> crate::testing::Folder {
        let folder = crate::testing::Folder::new(name);
        for (file, text) in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn denial_is_explained_by_what_was_found_and_by_nothing_else() {
        let denied = || Failure::new("name the jail's host", std::io::Error::from(Errno::PERM));
        let plain = denied().to_string();
        assert_eq!(explain(denied(), None).to_string(), plain);
        let text = explain(denied(), Some(Obstacle::AppArmor)).to_string();
        assert!(text.contains("AppArmor"), "{text}");
        let other = Failure::new("name the jail's host", std::io::Error::from(Errno::INVAL));
        let plain = other.to_string();
        let text = explain(other, Some(Obstacle::AppArmor)).to_string();
        assert_eq!(text, plain);
    }

    #[test]
    fn every_switch_is_recognised_and_has_a_remedy() {
        let none = switches("refusal-none", &[("user/max_user_namespaces", "100\n")]);
        assert_eq!(obstacle(none.path(), false), None);
        let text = of_error(Errno::NOSYS, None).to_string();
        assert!(text.contains("seccomp=unconfined"), "{text}");
        let text = of_error(Errno::NOSPC, None).to_string();
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
            let folder = switches("refusal", &[(file, value)]);
            let text = of_error(Errno::PERM, obstacle(folder.path(), false)).to_string();
            assert!(text.contains(remedy), "{text}");
        }
    }
}
