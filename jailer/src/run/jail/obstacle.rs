//! What on a host keeps an ordinary program from making a jail, and what to do about it.
//!
//! Distributions and containers have several settings for user namespaces; all of them show only as
//! a refused system call. What they are set to is read here, below a folder that a test can replace.

use std::path::Path;

use rustix::io::Errno;

use crate::error::Failure;

/// Where the kernel's settings are (`sys`), and what confines this process (`self/attr`).
const PROC: &str = "/proc";

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
/// Ubuntu's: programs without an AppArmor profile get namespaces without capabilities. The folders are the profile's.
pub const APPARMOR: Obstacle = Obstacle {
    reason: "AppArmor restricts user namespaces here (kernel.apparmor_restrict_unprivileged_userns is 1)",
    remedy: "as root: install resources/apparmor/mayfly-jailer in /etc/apparmor.d, load it with apparmor_parser -r, \
             and start mayfly-jailer from one of its folders (/usr/bin, /usr/lib/mayfly, /usr/local/bin, \
             /opt/mayfly/bin), or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
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

/// Whether no AppArmor profile is this process's. One that confines nothing is shown as `NAME (unconfined)`.
fn is_without_profile(proc: &Path) -> bool {
    // The second may be the label of another security module where there are two.
    let names = ["self/attr/apparmor/current", "self/attr/current"];
    let label = names
        .iter()
        .find_map(|name| std::fs::read_to_string(proc.join(name)).ok());
    label.is_some_and(|it| it.trim_end_matches(['\n', '\0']) == "unconfined")
}

/// What stands in the way, if a setting below this folder does.
fn obstacle(proc: &Path, is_root: bool) -> Option<Obstacle> {
    let value = |name: &str| {
        let text = std::fs::read_to_string(proc.join("sys").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    if value("user/max_user_namespaces") == Some(0) {
        return Some(MAX_USER_NAMESPACES);
    }
    if !is_root && value("kernel/unprivileged_userns_clone") == Some(0) {
        return Some(UNPRIVILEGED_CLONE);
    }
    if !is_root
        && value("kernel/apparmor_restrict_unprivileged_userns") == Some(1)
        && is_without_profile(proc)
    {
        return Some(APPARMOR);
    }
    if !Path::new("/proc/self/ns/user").exists() {
        return Some(NO_USER_NAMESPACES);
    }
    None
}

/// What stands in the way on this host, if a setting does.
pub fn here() -> Option<Obstacle> {
    obstacle(Path::new(PROC), crate::sys::is_superuser())
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

    const RESTRICTS: &str = "sys/kernel/apparmor_restrict_unprivileged_userns";

    /// A folder that stands for /proc.
    fn proc(name: &str, files: &[(&str, &str)]) -> crate::testing::Folder {
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
        let none = proc(
            "obstacle-none",
            &[("sys/user/max_user_namespaces", "100\n")],
        );
        assert_eq!(obstacle(none.path(), false), None);
        let text = message(&no_namespaces(Errno::NOSYS, None));
        assert!(text.contains("seccomp=unconfined"), "{text}");
        let text = message(&no_namespaces(Errno::NOSPC, None));
        assert!(text.contains("max_*_namespaces"), "{text}");
        for (file, value, remedy) in [
            (
                "sys/user/max_user_namespaces",
                "0",
                "user.max_user_namespaces=10000",
            ),
            (
                "sys/kernel/unprivileged_userns_clone",
                "0",
                "unprivileged_userns_clone=1",
            ),
            (RESTRICTS, "1", "resources/apparmor"),
        ] {
            let unconfined = ("self/attr/current", "unconfined\n");
            let folder = proc("obstacle", &[(file, value), unconfined]);
            let found = obstacle(folder.path(), false);
            let text = message(&no_namespaces(Errno::PERM, found));
            assert!(text.contains(remedy), "{text}");
        }
    }

    #[test]
    fn apparmor_when_the_process_has_a_profile_is_no_obstacle() {
        let of_apparmor = "self/attr/apparmor/current";
        let of_some_module = "self/attr/current";
        for (labels, expected) in [
            (&[(of_some_module, "unconfined\n")][..], Some(APPARMOR)),
            (&[(of_some_module, "mayfly-jailer (unconfined)\n")], None),
            (&[(of_some_module, "docker-default (enforce)\n")], None),
            (
                &[
                    (of_apparmor, "mayfly-jailer (unconfined)\n"),
                    (of_some_module, "unconfined\n"),
                ],
                None,
            ),
            (
                &[
                    (of_apparmor, "unconfined\n"),
                    (of_some_module, "system_u:system_r:init_t:s0\0"),
                ],
                Some(APPARMOR),
            ),
            (&[], None),
        ] {
            let files = [&[(RESTRICTS, "1\n")], labels].concat();
            let folder = proc("obstacle-apparmor", &files);
            assert_eq!(obstacle(folder.path(), false), expected, "{labels:?}");
            assert_eq!(obstacle(folder.path(), true), None, "{labels:?}");
        }
    }

    #[test]
    fn remedy_when_apparmor_restricts_names_the_folders_of_the_profile() {
        let profile = include_str!("../../../../resources/apparmor/mayfly-jailer");
        let (_, rest) = profile.split_once("profile mayfly-jailer /{").unwrap();
        let (folders, _) = rest.split_once("}/mayfly-jailer ").unwrap();
        let folders: Vec<_> = folders.split(',').map(|it| format!("/{it}")).collect();
        let expected = format!("({})", folders.join(", "));
        assert!(APPARMOR.remedy.contains(&expected), "{expected}");
    }
}
