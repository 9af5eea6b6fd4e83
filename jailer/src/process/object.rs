//! The process object of the OCI runtime specification (config.md, "Process"), which `--process` names a file of.
//!
//! What cannot be honoured is refused by its name. Labels of the host's security modules are about processes of the
//! host, and nothing to a guest: they are passed over.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::command::{Command, Exact, Limit};
use crate::error::{AnyError, Step as _};
use crate::input;

/// Longest file.
const LONGEST: u64 = 1 << 20;

/// A process object cannot be used.
#[derive(Debug, thiserror::Error)]
enum ObjectError {
    #[error("cannot honour \"{0}\" of the process object (--process): leave it out")]
    Unknown(String),
    #[error("cannot use the process object (--process): its {0} {1}")]
    Value(&'static str, String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    cwd: String,
    #[serde(default)]
    terminal: bool,
    console_size: Option<Size>,
    #[serde(default)]
    user: User,
    #[serde(default)]
    rlimits: Vec<Rlimit>,
    #[serde(default)]
    no_new_privileges: bool,
    capabilities: Option<Capabilities>,
    oom_score_adj: Option<i32>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Size {
    height: u16,
    width: u16,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct User {
    uid: u32,
    gid: u32,
    umask: Option<u32>,
    additional_gids: Vec<u32>,
}

#[derive(Deserialize)]
struct Rlimit {
    #[serde(rename = "type")]
    kind: String,
    soft: u64,
    hard: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Capabilities {
    bounding: Vec<String>,
    effective: Vec<String>,
    inheritable: Vec<String>,
    permitted: Vec<String>,
    ambient: Vec<String>,
}

/// Further groups that the agent takes.
const GROUPS_MAX: usize = 64;

/// Members that say nothing to a guest.
const OF_HOST: [&str; 2] = ["apparmorProfile", "selinuxLabel"];

/// Names of limits, by their numbers in Linux.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// Names of capabilities, by their numbers in Linux.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Reads what is to be run from the object in a file. It is closed again.
pub fn read(path: &Path, has_input: bool) -> Result<Command, AnyError> {
    const WHAT: &str = "read the process object (--process)";
    let bytes = input::read(path, LONGEST).step_on(WHAT, path)?;
    let object: Object =
        serde_json::from_slice(&bytes).step_on("use the process object (--process)", path)?;
    Ok(object.into_command(has_input)?)
}

impl Object {
    fn into_command(self, has_input: bool) -> Result<Command, ObjectError> {
        let is_of_host = |name: &str| OF_HOST.contains(&name);
        let mut others = self.others.into_iter();
        if let Some((name, _)) = others.find(|(name, it)| !is_of_host(name) && !it.is_null()) {
            return Err(ObjectError::Unknown(name));
        }
        if self.args.is_empty() {
            return Err(ObjectError::Value(
                "args",
                "are missing: there is nothing to run".into(),
            ));
        }
        if !self.cwd.starts_with('/') {
            return Err(ObjectError::Value("cwd", "is not an absolute path".into()));
        }
        let score = self.oom_score_adj;
        if score.is_some_and(|score| !(-1000..=1000).contains(&score)) {
            return Err(ObjectError::Value(
                "oomScoreAdj",
                "is not from -1000 to 1000".into(),
            ));
        }
        if self.user.additional_gids.len() > GROUPS_MAX {
            let why = format!("has more than {GROUPS_MAX} additionalGids");
            return Err(ObjectError::Value("user", why));
        }
        let limits = self.rlimits.iter().map(limit).collect::<Result<_, _>>()?;
        let capabilities = self.capabilities.as_ref().map(sets);
        let size = self.console_size.filter(|_| self.terminal);
        Ok(Command {
            words: self.args.into_iter().map(Into::into).collect(),
            variables: self.env,
            user: Some(format!("{}:{}", self.user.uid, self.user.gid)),
            folder: Some(self.cwd),
            is_terminal: self.terminal,
            has_input,
            exact: Some(Box::new(Exact {
                size: size.map(|size| (size.height, size.width)),
                umask: self.user.umask,
                groups: self.user.additional_gids,
                limits,
                no_new_privileges: self.no_new_privileges,
                capabilities,
                oom_score: score,
            })),
            ..Command::default()
        })
    }
}

fn limit(limit: &Rlimit) -> Result<Limit, ObjectError> {
    let name = limit.kind.strip_prefix("RLIMIT_").unwrap_or_default();
    let number = LIMITS.iter().position(|known| *known == name);
    let Some(number) = number else {
        let why = format!("have a limit that Linux does not: {:?}", limit.kind);
        return Err(ObjectError::Value("rlimits", why));
    };
    if limit.soft > limit.hard {
        let why = format!("have a soft limit of {} above the hard one", limit.kind);
        return Err(ObjectError::Value("rlimits", why));
    }
    // There are 16 of them.
    let kind = u8::try_from(number).unwrap_or_default();
    Ok((kind, limit.soft, limit.hard))
}

/// Bounding, effective, inheritable, permitted and ambient set, one bit for each number. What Linux does not have
/// cannot be granted, and is no reason to fail (runtime specification, "Linux Process").
fn sets(all: &Capabilities) -> [u64; 5] {
    let number = |name: &String| {
        let plain = name.strip_prefix("CAP_")?;
        CAPABILITIES.iter().position(|known| *known == plain)
    };
    let set = |names: &Vec<String>| {
        let numbers = names.iter().filter_map(number);
        numbers.fold(0_u64, |set, number| set | 1 << number)
    };
    [
        set(&all.bounding),
        set(&all.effective),
        set(&all.inheritable),
        set(&all.permitted),
        set(&all.ambient),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    fn read(text: &str) -> Result<Command, String> {
        let folder = crate::testing::Folder::new("object");
        let path = folder.path().join("process.json");
        std::fs::write(&path, text).unwrap();
        super::read(&path, true).map_err(|error| message(&*error))
    }

    #[test]
    fn object_is_what_a_container_engine_writes() {
        let command = read(
            r#"{ "terminal": true, "consoleSize": { "height": 33, "width": 77 },
                 "user": { "uid": 1000, "gid": 1001, "umask": 18, "additionalGids": [10, 1002] },
                 "args": ["sh", "-c", "a b"], "env": ["A=b", "EMPTY="], "cwd": "/srv",
                 "capabilities": { "bounding": ["CAP_KILL", "CAP_NONE", "CAP_CHOWN", "NICE"], "effective": ["CAP_KILL"],
                                   "permitted": ["CAP_KILL"] },
                 "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 2048, "soft": 1024 }],
                 "oomScoreAdj": -5, "noNewPrivileges": true, "apparmorProfile": "x", "scheduler": null }"#,
        )
        .unwrap();
        let expected = Exact {
            size: Some((33, 77)),
            umask: Some(0o22),
            groups: vec![10, 1002],
            limits: vec![(7, 1024, 2048)],
            no_new_privileges: true,
            capabilities: Some([0b10_0001, 1 << 5, 0, 1 << 5, 0]),
            oom_score: Some(-5),
        };
        assert_eq!(command.exact.as_deref(), Some(&expected));
        assert_eq!(command.words, ["sh", "-c", "a b"]);
        assert_eq!(command.variables, ["A=b", "EMPTY="]);
        assert_eq!(command.user.as_deref(), Some("1000:1001"));
        assert!(command.is_terminal && command.has_input);
        let least = read(r#"{ "args": ["x"], "cwd": "/" }"#).unwrap();
        assert_eq!(least.exact.as_deref(), Some(&Exact::default()));
        assert_eq!(least.user.as_deref(), Some("0:0"));
    }

    #[test]
    fn object_that_cannot_be_honoured_is_refused_by_its_member() {
        for (text, expected) in [
            ("{", "EOF"),
            (r#"{ "args": ["x"] }"#, "missing field `cwd`"),
            (r#"{ "args": [], "cwd": "/" }"#, "args are missing"),
            (
                r#"{ "args": ["x"], "cwd": "tmp" }"#,
                "cwd is not an absolute path",
            ),
            (
                r#"{ "args": ["x"], "cwd": "/", "ioPriority": { "class": "IOPRIO_CLASS_IDLE" } }"#,
                "cannot honour \"ioPriority\"",
            ),
            (
                r#"{ "args": ["x"], "cwd": "/", "rlimits": [{ "type": "RLIMIT_X", "hard": 1, "soft": 1 }] }"#,
                "RLIMIT_X",
            ),
            (
                r#"{ "args": ["x"], "cwd": "/", "rlimits": [{ "type": "RLIMIT_CPU", "hard": 1, "soft": 2 }] }"#,
                "above the hard one",
            ),
            (
                r#"{ "args": ["x"], "cwd": "/", "oomScoreAdj": 1001 }"#,
                "oomScoreAdj",
            ),
            (
                r#"{ "args": ["x"], "cwd": "/", "user": { "uid": -1 } }"#,
                "-1",
            ),
        ] {
            let text = read(text).unwrap_err();
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let groups = |count| {
            let groups = serde_json::json!(vec![7; count]);
            read(&format!(
                r#"{{ "args": ["x"], "cwd": "/", "user": {{ "additionalGids": {groups} }} }}"#
            ))
        };
        assert!(groups(64).is_ok());
        assert!(groups(65).unwrap_err().contains("additionalGids"));
    }
}
