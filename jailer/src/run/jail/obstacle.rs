//! What on a host keeps an ordinary program from making a jail, and what to do about it.
//!
//! Distributions and containers have several settings for user namespaces; all of them show only as
//! a refused system call. What they are set to is read here, below a folder that a test can replace.

use std::path::Path;

use rustix::io::Errno;

use crate::error::Failure;

/// Where the kernel's settings are.
const SETTINGS: &str = "/proc/sys";

/// Something that forbids it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What it is.
    pub reason: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

/// Debian's old setting.
const UNPRIVILEGED_CLONE: Obstacle = Obstacle {
    reason: "this host forbids user namespaces to ordinary users (kernel.unprivileged_userns_clone is 0)",
    remedy: "as root: sysctl -w kernel.unprivileged_userns_clone=1",
};
/// The limit on user namespaces is 0.
const MAX_USER_NAMESPACES: Obstacle = Obstacle {
    reason: "this host allows no user namespaces (user.max_user_namespaces is 0)",
    remedy: "as root: sysctl -w user.max_user_namespaces=10000",
};
/// Ubuntu's: programs without an AppArmor profile get namespaces without capabilities.
pub const APPARMOR: Obstacle = Obstacle {
    reason: "AppArmor restricts user namespaces here (kernel.apparmor_restrict_unprivileged_userns is 1)",
    remedy: "as root: install resources/apparmor/mayfly-jailer in /etc/apparmor.d and load it with \
             apparmor_parser -r, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
};
/// Compiled out.
const NO_USER_NAMESPACES: Obstacle = Obstacle {
    reason: "this kernel has no user namespaces",
    remedy: "use a kernel with CONFIG_USER_NS",
};
/// A filter, of a container or a service.
const FILTER: Obstacle = Obstacle {
    reason: "a filter forbids namespaces to this program, as containers and services have them, or it is in a chroot",
    remedy: "start the container with --security-opt seccomp=unconfined (or a profile that allows \
             clone3 and mount), or the service with fewer Restrict options; leave the chroot",
};

/// What stands in the way, if a setting below this folder does.
fn obstacle(settings: &Path, is_root: bool) -> Option<Obstacle> {
    let value = |name: &str| {
        let text = std::fs::read_to_string(settings.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    if value("user/max_user_namespaces") == Some(0) {
        return Some(MAX_USER_NAMESPACES);
    }
    if !is_root && value("kernel/unprivileged_userns_clone") == Some(0) {
        return Some(UNPRIVILEGED_CLONE);
    }
    if !is_root && value("kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return Some(APPARMOR);
    }
    if !Path::new("/proc/self/ns/user").exists() {
        return Some(NO_USER_NAMESPACES);
    }
    None
}

/// What stands in the way on this host, if a setting does.
pub fn here() -> Option<Obstacle> {
    obstacle(Path::new(SETTINGS), crate::sys::is_superuser())
}

/// The namespaces cannot be made: from the kernel's answer, and what is set on this host.
pub fn no_namespaces(answer: Errno, found: Option<Obstacle>) -> Failure {
    let found = found.or(match answer {
        // Containers' filters answer clone3 with "no such call".
        Errno::NOSYS | Errno::PERM | Errno::ACCESS => Some(FILTER),
        Errno::INVAL => Some(NO_USER_NAMESPACES),
        _ => None,
    });
    let reason = found.map_or(String::new(), |it| format!(": {}", it.reason));
    let remedy = match (found, answer) {
        (Some(obstacle), _) => Some(obstacle.remedy),
        (None, Errno::NOSPC | Errno::USERS) => Some(
            "a limit on namespaces is reached: raise user.max_*_namespaces (sysctl), or end some",
        ),
        (None, Errno::AGAIN) => Some("the limit on processes is reached: raise ulimit -u"),
        _ => None,
    };
    Failure::new(format!("make the jail's namespaces{reason}"), answer).hints(|_| remedy)
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
        let text = message(&no_namespaces(Errno::NOSYS, None));
        assert!(text.contains("seccomp=unconfined"), "{text}");
        let text = message(&no_namespaces(Errno::NOSPC, None));
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
            let text = message(&no_namespaces(Errno::PERM, found));
            assert!(text.contains(remedy), "{text}");
        }
    }
}
