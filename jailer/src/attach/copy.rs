//! `mayfly-jailer cp`: the host's side of an archive (`mayfly-agent-protocol::archive`), in a child of this
//! program, which reads and writes and may wait (`process::pack` is the other way).
//!
//! What comes from a guest is hostile: `unpack` takes care of its archive, and of what it says on standard
//! error one line is shown, without control characters.

mod unpack;

#[cfg(any(test, fuzzing))]
pub use self::unpack::fuzz;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use mayfly_agent_protocol::archive::DEPTH_MAX;
use mayfly_agent_protocol::{COMMAND, Malformed, fields};

use self::unpack::Destination;
use super::{Session, Target, archive_body, connect};
use crate::console::{Sink, pipe};
use crate::error::{AnyError, Step as _, message};
use crate::process::front::Front;
use crate::process::pack::Packer;
use crate::process::place::PATIENCE;
use crate::sys::{self, Ended};

/// Most characters of what a guest says that are shown.
const LINE_MAX: usize = 400;

/// The code of the child that unpacks where nothing came.
const NOTHING_CAME: i32 = 2;

/// What is to be copied.
#[derive(Debug, PartialEq, Eq)]
pub enum Copy {
    /// Out of a guest.
    FromGuest {
        /// Which one.
        target: Target,
        /// Where it is there.
        path: String,
        /// Where it goes.
        to: PathBuf,
        /// Whether folders that are there are written into.
        merges: bool,
    },
    /// Into a guest.
    ToGuest {
        /// Which one.
        target: Target,
        /// Where it goes there.
        path: String,
        /// Where it is.
        from: PathBuf,
    },
}

/// A file cannot be copied.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("cannot use what the guest sent: it is not an archive")]
    Archive(#[from] Malformed),
    #[error("cannot use what the guest sent: it names {0:?}, which is not the name of an entry")]
    Name(String),
    #[error(
        "cannot use what the guest sent: its folders are more than {DEPTH_MAX} deep, or end twice"
    )]
    Depth,
    #[error(
        "cannot use what the guest sent: it is more than the one file or folder that was asked for"
    )]
    Several,
    #[error("cannot copy: the guest sent nothing; it is not a file, a folder or a link there")]
    Nothing,
    #[error("cannot copy: the guest's side of it ended with code {0}, and gave no reason")]
    Silent(i32),
}

impl Copy {
    /// Does it; the exit code.
    pub fn run(self) -> Result<i32, AnyError> {
        match self {
            Copy::FromGuest {
                target: from,
                path,
                to,
                merges,
            } => {
                let destination = Destination::new(&path, &to, merges)?;
                let socket = connect(&from, PATIENCE)?;
                let (reader, writer) = pipe(true, false).step("make a pipe")?;
                let child = sys::fork().step("start the program that unpacks")?;
                let Some(child) = child else {
                    drop((writer, socket));
                    child_ends(destination.unpack(&mut File::from(reader)));
                };
                drop(reader);
                let out = Sink::Output {
                    to: writer,
                    patient: false,
                };
                let front = Front::with(COMMAND, None, [out, Sink::Tail(Vec::new())]);
                let body = archive_body(fields::PACK, &path, false)?;
                // The end of the session is the end of the pipe.
                run(Session::start(&from.id, socket, front, &body)?)?.combined(child)
            }
            Copy::ToGuest {
                target: to,
                path,
                from,
            } => {
                std::fs::symlink_metadata(&from).step_on("copy", &from)?;
                let socket = connect(&to, PATIENCE)?;
                let (reader, writer) = pipe(true, true).step("make a pipe")?;
                let child = sys::fork().step("start the program that packs")?;
                let Some(child) = child else {
                    drop((reader, socket));
                    let mut packer = Packer {
                        out: File::from(writer),
                        keeps_owners: false,
                    };
                    child_ends(packer.pack(&from));
                };
                drop(writer);
                let sinks = [Sink::Nowhere, Sink::Tail(Vec::new())];
                let front = Front::with(COMMAND, Some(reader), sinks);
                let body = archive_body(fields::UNPACK, &path, true)?;
                run(Session::start(&to.id, socket, front, &body)?)?.combined(child)
            }
        }
    }
}

/// How the guest's side of a copy ended.
struct OfGuest {
    code: i32,
    /// Whether it gave a reason, which is shown then.
    has_spoken: bool,
}

/// Runs the session to its end, and shows what the guest said of it. The pipe is closed then.
fn run(mut session: Session) -> Result<OfGuest, AnyError> {
    let code = session.run();
    let line = last_line(&session.front.error_tail());
    if !line.is_empty() {
        // With standard error gone, the exit code still says it.
        let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
    }
    Ok(OfGuest {
        code: code?,
        has_spoken: !line.is_empty(),
    })
}

/// The last line of a text without control characters, no longer than a message is.
fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or_default().chars().take(LINE_MAX).collect()
}

impl OfGuest {
    /// The code of both ends. One that failed without a word is spoken for.
    fn combined(&self, child: rustix::process::Pid) -> Result<i32, AnyError> {
        let (ended, _) = sys::wait(child).step("learn how the copy ended")?;
        if let Some(error) = self.unsaid(ended) {
            say(&error);
        }
        Ok(match (self.code, ended) {
            (0, Ended::Exited(0)) => 0,
            (0, _) => super::NOT_COPIED,
            (code, _) => code,
        })
    }

    /// What is wrong and was not said yet, where this program's side ended so.
    fn unsaid(&self, ended: Ended) -> Option<CopyError> {
        match (self.code, ended) {
            _ if self.has_spoken => None,
            (0, Ended::Exited(NOTHING_CAME)) => Some(CopyError::Nothing),
            (0, _) => None,
            (code, Ended::Exited(0 | NOTHING_CAME)) => Some(CopyError::Silent(code)),
            _ => None,
        }
    }
}

fn child_ends(result: Result<(), AnyError>) -> ! {
    let Err(error) = result else { sys::exit_now(0) };
    if matches!(error.downcast_ref(), Some(CopyError::Nothing)) {
        // The guest says why, where it behaves.
        sys::exit_now(NOTHING_CAME);
    }
    say(&*error);
    sys::exit_now(super::NOT_COPIED)
}

/// Says on standard error that the copy failed.
fn say(error: &(dyn std::error::Error + 'static)) {
    let text = format!("mayfly-jailer: {}\n", message(error));
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::Path;

    use super::*;

    #[test]
    fn tree_comes_out_as_it_went_in_with_modes_and_links() {
        let place = crate::testing::Folder::new("copy-tree");
        let from = place.path().join("from");
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(from.join("a/b/file"), &content).unwrap();
        std::fs::write(from.join("empty"), "").unwrap();
        std::fs::set_permissions(from.join("empty"), std::fs::Permissions::from_mode(0o4750))
            .unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let packed = place.path().join("packed");
        let mut packer = Packer {
            out: File::create(&packed).unwrap(),
            keeps_owners: true,
        };
        packer.pack(&from).unwrap();
        let to = place.path().join("to");
        // The second time into a folder that is there, under its own name.
        for _ in 0..2 {
            let target = Destination::new("/x/from/", &to, false).unwrap();
            target.unpack(&mut File::open(&packed).unwrap()).unwrap();
        }
        for top in [to.clone(), to.join("from")] {
            assert_eq!(std::fs::read(top.join("a/b/file")).unwrap(), content);
            assert_eq!(
                std::fs::read_link(top.join("link")).unwrap(),
                Path::new("/etc/passwd")
            );
            let mode = std::fs::metadata(top.join("empty"))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o7700, 0o700);
        }
    }

    #[test]
    fn one_line_of_what_the_guest_says_is_shown() {
        assert_eq!(last_line("first\nlast\n \n"), "last");
        assert_eq!(last_line(&"x".repeat(10_000)).len(), LINE_MAX);
        assert_eq!(last_line(""), "");
    }

    #[test]
    fn guest_that_fails_without_a_reason_is_spoken_for() {
        let told = |code, has_spoken, ended| {
            let unsaid = OfGuest { code, has_spoken }.unsaid(Ended::Exited(ended));
            unsaid.map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(told(0, false, 0), "");
        assert!(told(0, false, NOTHING_CAME).contains("sent nothing"));
        assert!(told(3, false, NOTHING_CAME).contains("ended with code 3"));
        assert!(told(3, false, 0).contains("ended with code 3"));
        // Either side has said it.
        assert_eq!(told(3, true, NOTHING_CAME), "");
        assert_eq!(told(0, true, NOTHING_CAME), "");
        assert_eq!(told(0, false, super::super::NOT_COPIED), "");
    }
}
