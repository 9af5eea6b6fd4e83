//! Questions to systemd, each by one run of `busctl`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::host;
use crate::input;
use crate::process;
use crate::user::User;

const SERVICE: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "/org/freedesktop/systemd1";
/// Is there where systemd runs.
const BOOTED: &str = "/run/systemd/system";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may be.
const ANSWER_MAX: u64 = 1 << 16;

/// systemd cannot be asked, or refuses.
#[derive(Debug, thiserror::Error)]
pub enum BusctlError {
    #[error(
        "cannot use --systemd-cgroup: systemd does not run on this host ({BOOTED} is missing); have the engine use \
         cgroupfs (podman --cgroup-manager cgroupfs; containerd: SystemdCgroup = false)"
    )]
    NoSystemd,
    #[error(
        "cannot use --systemd-cgroup: busctl, which comes with systemd, is not in PATH; install it, or have the engine \
         use cgroupfs (podman --cgroup-manager cgroupfs; containerd: SystemdCgroup = false)"
    )]
    NoProgram,
    #[error("cannot ask systemd ({0}): {1}")]
    Refused(String, String),
    #[error("cannot ask systemd ({0}): no answer within {seconds} seconds", seconds = PATIENCE.as_secs())]
    Late(String),
    #[error("cannot run busctl")]
    Run(#[source] std::io::Error),
}

/// The program, and which systemd it is to ask.
#[derive(Debug)]
pub struct Busctl {
    program: PathBuf,
    is_of_a_user: bool,
}

impl Busctl {
    /// Finds it: for the host's systemd, or, for an ordinary user, that user's.
    pub fn find(user: User) -> Result<Busctl, BusctlError> {
        Ok(Busctl {
            program: host::program("busctl").map_err(|_| BusctlError::NoProgram)?,
            is_of_a_user: !user.is_root(),
        })
    }

    pub fn is_of_a_user(&self) -> bool {
        self.is_of_a_user
    }

    /// Calls the manager.
    pub fn call(&self, member: &str, types: &str, words: &[String]) -> Result<Value, BusctlError> {
        let interface = format!("{SERVICE}.Manager");
        let call = ["call", SERVICE, MANAGER, &interface, member, types];
        let call = call.into_iter().chain(words.iter().map(String::as_str));
        let answers = self.ask(member, call)?;
        Ok(answers.into_iter().next().unwrap_or_default())
    }

    /// Properties of a unit, in the order of `names`.
    pub fn properties(
        &self,
        unit: &str,
        interface: &str,
        names: &[&str],
    ) -> Result<Vec<Value>, BusctlError> {
        self.get(&object(unit), interface, names)
    }

    /// The number of systemd's version.
    pub fn version(&self) -> Result<u32, BusctlError> {
        let answer = self.get(MANAGER, "Manager", &["Version"])?;
        let text = answer.first().and_then(Value::as_str).unwrap_or_default();
        Ok(number(text))
    }

    fn get(
        &self,
        object: &str,
        interface: &str,
        names: &[&str],
    ) -> Result<Vec<Value>, BusctlError> {
        let interface = format!("{SERVICE}.{interface}");
        let words = ["get-property", SERVICE, object, &interface];
        let words = words.into_iter().chain(names.iter().copied());
        self.ask(&format!("{} of {object}", names.join(", ")), words)
    }

    /// Runs it; the data of each line that it prints.
    fn ask<'a>(
        &self,
        what: &str,
        words: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<Value>, BusctlError> {
        let mut command = Command::new(&self.program);
        command.args([
            if self.is_of_a_user {
                "--user"
            } else {
                "--system"
            },
            "--json=short",
            // A word with a dash is no option.
            "--",
        ]);
        command.args(words).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(BusctlError::Run)?;
        let has_ended = process::Known::of(child.id() as i32)
            .and_then(|known| known.open())
            .is_none_or(|pidfd| process::wait(&pidfd, PATIENCE));
        if !has_ended {
            let _ = child.kill();
        }
        let status = child.wait().map_err(BusctlError::Run)?;
        if !has_ended {
            return Err(BusctlError::Late(what.to_owned()));
        }
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        if !status.success() {
            let text = stderr.and_then(|it| input::read_stream(it, ANSWER_MAX).ok());
            let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
            return Err(self.refusal(what, text.trim()));
        }
        let text = stdout.and_then(|it| input::read_stream(it, ANSWER_MAX).ok());
        Ok(data(&text.unwrap_or_default()))
    }

    /// What busctl said, or that there is no systemd that could have.
    fn refusal(&self, what: &str, text: &str) -> BusctlError {
        let text = text.trim_start_matches("Call failed: ");
        let is_missing = !self.is_of_a_user && !Path::new(BOOTED).is_dir();
        // What is said of a unit is systemd's.
        match is_missing && !text.starts_with("Unit ") {
            true => BusctlError::NoSystemd,
            false => BusctlError::Refused(what.to_owned(), text.to_owned()),
        }
    }
}

/// What is in lines of `{"type": ..., "data": ...}`.
fn data(text: &[u8]) -> Vec<Value> {
    let lines = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
    let values = lines.map_while(Result::ok);
    values.map(|mut value| value["data"].take()).collect()
}

/// `252.38-1~deb12u1`, `v239`.
fn number(version: &str) -> u32 {
    let digits = version.trim_start_matches('v');
    let end = digits.find(|it: char| !it.is_ascii_digit());
    let digits = end.map_or(digits, |end| &digits[..end]);
    digits.parse().unwrap_or(0)
}

/// A unit's object: what is neither letter nor digit is written as its number, and a digit too that comes first.
fn object(unit: &str) -> String {
    let mut path = format!("{MANAGER}/unit/");
    for (at, byte) in unit.bytes().enumerate() {
        let is_plain = byte.is_ascii_alphabetic() || byte.is_ascii_digit() && at > 0;
        match is_plain {
            true => path.push(char::from(byte)),
            false => path.push_str(&format!("_{byte:02x}")),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unit_has_the_path_of_an_object() {
        assert_eq!(
            object("libpod-c1_a.scope"),
            "/org/freedesktop/systemd1/unit/libpod_2dc1_5fa_2escope"
        );
        assert!(object("7z.scope").ends_with("/unit/_37z_2escope"));
    }

    /// As systemd 252 prints them.
    #[test]
    fn answers_are_lines_of_json() {
        let text =
            b"{\"type\":\"s\",\"data\":\"active\"}\n{\"type\":\"(uo)\",\"data\":[0,\"/\"]}\n";
        assert_eq!(data(text), [json!("active"), json!([0, "/"])]);
        assert!(data(b"").is_empty() && data(b"s \"active\"\n").is_empty());
        for (text, expected) in [
            ("252.38-1~deb12u1", 252),
            ("v239", 239),
            ("257", 257),
            ("", 0),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }
}
