//! Who runs this program: root, an ordinary user, or root of a user namespace, as which an engine starts it
//! for an ordinary user. Where that one's folders are, and which users it can give to monitors. Only looks.
//!
//! | | root | ordinary | root of a user namespace |
//! |---|---|---|---|
//! | is, on the host | root | itself | the namespace's owner |
//! | its monitors are | users of the settings | itself | users of the upper half of the namespace |
//! | folders for states | `/run` | `$XDG_RUNTIME_DIR` | the same; `/run` where it may write there |
//! | folders for disks, templates | of the settings | its own, where those are another's | the same |
//!
//! A system container's root is of the third kind, and has a `/run` of its own. The engine's commands for one
//! container come with different environments: XDG_RUNTIME_DIR is in all of them, HOME in that of `create`.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// The user `nobody`: files of users that are not in the namespace seem to be its own.
const NOBODY: u32 = 65_534;
/// The fewest users of a namespace that some are taken of.
const USERS_MIN: u32 = 16;

/// Who runs this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The host's.
    Root,
    /// Any but root, by its number.
    Ordinary(u32),
    /// Root of a user namespace.
    Namespaced {
        /// Its number outside.
        outside: u32,
        /// The first of the users that monitors run as, and how many: none where only one user is in the
        /// namespace.
        uids: Option<(u32, u32)>,
    },
}

impl User {
    /// That of this process.
    pub fn current() -> User {
        let uid = rustix::process::geteuid();
        if !uid.is_root() {
            return User::Ordinary(uid.as_raw());
        }
        let read = |name| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        User::of_root(&read("uid_map"), &read("gid_map"), &read("setgroups"))
    }

    /// Root of the namespace with these maps.
    fn of_root(uid_map: &str, gid_map: &str, setgroups: &str) -> User {
        let users = parse(uid_map);
        let root = users.iter().find(|range| range.first == 0);
        if users.is_empty() || root.is_some_and(|it| it.outside == 0 && it.count == u32::MAX) {
            return User::Root;
        }
        User::Namespaced {
            outside: root.map_or(0, |range| range.outside),
            uids: match setgroups.trim() {
                // It cannot become another user.
                "deny" => None,
                _ => upper_half(&users, &parse(gid_map)),
            },
        }
    }

    /// Whether it is the host's root.
    pub fn is_root(self) -> bool {
        self == User::Root
    }

    /// The users that its monitors run as; none: as itself. `wanted` are those of the settings, which are
    /// the host's.
    pub fn uids(self, wanted: (u32, u32)) -> Option<(u32, u32)> {
        match self {
            User::Root => Some(wanted),
            User::Ordinary(_) => None,
            User::Namespaced { uids, .. } => uids,
        }
    }

    /// The folder for what is there while something runs. `name` is what is made in it.
    pub fn runtime_folder(self, name: &str) -> PathBuf {
        let run = Path::new("/run");
        let number = match self {
            User::Root => return run.join(name),
            User::Namespaced { .. } if may_write(run) => return run.join(name),
            User::Namespaced { outside, .. } => outside,
            User::Ordinary(number) => number,
        };
        match variable("XDG_RUNTIME_DIR") {
            Some(runtime) => runtime.join(name),
            None => format!("/tmp/{name}-{number}").into(),
        }
    }

    /// The file of settings of its own.
    pub fn settings(self) -> Option<PathBuf> {
        if self.is_root() {
            return None;
        }
        let folder =
            variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
        Some(folder?.join("mayfly/oci.json"))
    }

    /// The folder for what can be made anew.
    pub fn cache(self) -> Option<PathBuf> {
        let folder = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
        Some(folder?.join("mayfly"))
    }

    /// Whether it can keep files of its own in `folder`, which may have to be made.
    pub fn can_keep(self, folder: &Path) -> bool {
        if self.is_root() {
            return true;
        }
        match std::fs::metadata(folder) {
            Ok(found) => found.uid() == rustix::process::geteuid().as_raw(),
            Err(_) => may_make(folder),
        }
    }
}

/// Whether this process may make the folder `path` with those above it, or something in it where it is there.
pub fn may_make(path: &Path) -> bool {
    let nearest = path.ancestors().find(|it| it.is_dir());
    nearest.is_some_and(may_write)
}

/// Whether this process may make something in `folder`.
fn may_write(folder: &Path) -> bool {
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// An absolute path in the environment.
fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    value.filter(|path| path.is_absolute())
}

/// Numbers of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    outside: u32,
    count: u32,
}

impl Range {
    /// The number behind the last.
    fn end(self) -> u32 {
        self.first.saturating_add(self.count)
    }
}

/// Lines of a map are `first outside count`.
fn parse(map: &str) -> Vec<Range> {
    let range = |line: &str| {
        let mut words = line.split_whitespace().map(|word| word.parse().ok());
        Some(Range {
            first: words.next()??,
            outside: words.next()??,
            count: words.next()??,
        })
    };
    map.lines().filter_map(range).collect()
}

/// The upper half of the longest range of numbers that are users and groups of the namespace: images seldom
/// have files of those.
fn upper_half(users: &[Range], groups: &[Range]) -> Option<(u32, u32)> {
    let both = users.iter().flat_map(|user| {
        let cut = move |group: &Range| {
            let first = user.first.max(group.first);
            let end = user.end().min(group.end());
            // Not nobody, nor those behind it.
            let end = if first < NOBODY { end.min(NOBODY) } else { end };
            (first, end.saturating_sub(first))
        };
        groups.iter().map(cut)
    });
    let (first, count) = both.max_by_key(|(_, count)| *count)?;
    let half = count / 2;
    (count >= USERS_MIN).then_some((first + half, count - half))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    #[test]
    fn root_is_the_hosts_where_all_users_are_its_own() {
        let whole = "         0          0 4294967295\n";
        assert_eq!(User::of_root(whole, whole, "allow\n"), User::Root);
        // A kernel without user namespaces.
        assert_eq!(User::of_root("", "", ""), User::Root);
        let user = User::of_root("0 0 65536\n", "0 0 65536\n", "allow\n");
        assert!(!user.is_root());
    }

    #[test]
    fn monitors_of_a_namespace_have_users_of_its_upper_half() {
        let podman = "0 1000 1\n1 100000 65536\n";
        let small = "0 1000 1\n1 100000 1000\n";
        let alone = "0 1000 1\n";
        let far = "0 1000 1\n1 100000 65536\n200000 300000 100000\n";
        let uids = |uid_map, gid_map, setgroups| match User::of_root(uid_map, gid_map, setgroups) {
            User::Namespaced { outside, uids } => {
                assert_eq!(outside, 1000);
                uids
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(uids(podman, podman, "allow"), Some((32767, 32767)));
        assert_eq!(uids(podman, small, "allow"), Some((501, 500)));
        assert_eq!(uids(far, far, "allow"), Some((250_000, 50_000)));
        assert_eq!(uids(podman, alone, "allow"), None);
        assert_eq!(uids(alone, alone, "allow"), None);
        assert_eq!(uids(podman, podman, "deny\n"), None);
        let wanted = (1_900_000_000, 65_536);
        assert_eq!(User::Root.uids(wanted), Some(wanted));
        assert_eq!(User::Ordinary(7).uids(wanted), None);
    }

    /// A folder that does not belong to the user of this test; the test removes it.
    pub fn folder_of_another(test: &str) -> PathBuf {
        let name = format!("mayfly-oci-other-{test}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        if !rustix::process::geteuid().is_root() {
            return "/proc".into();
        }
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::chown(&folder, Some(NOBODY), None).unwrap();
        folder
    }

    #[test]
    fn folder_of_another_user_is_not_for_ones_own_files() {
        let user = User::Ordinary(rustix::process::geteuid().as_raw());
        let own = std::env::temp_dir().join(format!("mayfly-oci-user-{}", std::process::id()));
        std::fs::create_dir(&own).unwrap();
        assert!(user.can_keep(&own) && user.can_keep(&own.join("a/b")));
        std::fs::remove_dir(&own).unwrap();
        let other = folder_of_another("keep");
        assert!(!user.can_keep(&other));
        assert!(User::Root.can_keep(&other));
        let _ = std::fs::remove_dir(&other);
    }
}
