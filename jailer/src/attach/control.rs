//! `mayfly-jailer start`, `signal` and `state`: one request to the supervisor of a guest that runs a command, and its
//! answer.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use mayfly_agent_protocol::{Frame, Malformed, Message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::options::{separate, text};
use super::{AttachError, Target, connect};
use crate::args::{self, ArgsError, Why, asks_for_help};
use crate::error::{AnyError, Step as _};
use crate::process::place::{PATIENCE, Place};
use crate::process::stream::StreamLink;

/// What their `--help` prints.
pub const CONTROL_HELP: &str = include_str!("control.txt");

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Control {
    target: Target,
    request: String,
}

/// The supervisor does not answer.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot hear from the microVM {0}: it has not answered for {1} seconds; its mayfly-jailer is stopped, or the guest \
     does not start the command"
)]
struct NoAnswer(String, u64);

/// The supervisor refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {0} the microVM {1}: {2}")]
struct Refused(String, String, String);

/// Understands the words after the subcommand `name`; none when help is asked for.
pub fn parse_control(name: &str, words: Vec<OsString>) -> Result<Option<Control>, ArgsError> {
    if asks_for_help(&words) {
        return Ok(None);
    }
    let (mut options, words) = separate(words)?;
    let mut words = words.into_iter();
    let id = words
        .next()
        .ok_or(ArgsError::Missing("ID, as in `start ID`,"))?;
    let id = text(id, "ID", args::name)?;
    let request = match name {
        "signal" => {
            let missing = ArgsError::Missing("the signal, as in `signal ID TERM`,");
            let number = text(words.next().ok_or(missing)?, "signal", signal)?;
            format!("signal {number}")
        }
        _ => name.to_owned(),
    };
    if let Some(more) = words.next() {
        let help = "see start --help";
        return Err(ArgsError::Unknown(more.display().to_string(), help));
    }
    let place = Place::new(options.path("--runtime-dir"));
    let target = Target { id, place };
    Ok(Some(Control { target, request }))
}

/// The number of a signal: that, or its name with or without SIG in front.
fn signal(text: &str) -> Result<u8, Why> {
    const NAMES: [(&str, i32); 20] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ABRT", libc::SIGABRT),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("CHLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("TTIN", libc::SIGTTIN),
        ("TTOU", libc::SIGTTOU),
        ("URG", libc::SIGURG),
        ("WINCH", libc::SIGWINCH),
        ("IO", libc::SIGIO),
        ("PWR", libc::SIGPWR),
    ];
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let by_name = NAMES.iter().find(|(known, _)| *known == name);
    let number = match by_name {
        Some((_, number)) => u8::try_from(*number).ok(),
        None => text.parse().ok().filter(|number| *number <= 64),
    };
    number.ok_or("it is not the number or name of a signal, e.g. 15 or TERM".into())
}

impl Control {
    /// Asks; prints what is answered.
    pub fn run(self) -> Result<i32, AnyError> {
        self.run_within(PATIENCE)
    }

    /// The same, where the answer may take that long. The supervisor answers at once, but where it is stopped; the
    /// command starts when the guest, which may not want to, has started it.
    fn run_within(self, patience: Duration) -> Result<i32, AnyError> {
        let until = Instant::now() + patience;
        let socket = connect(&self.target, patience)?;
        let mut link = StreamLink::new(socket);
        let mut frame = Box::new(Frame::new());
        // It is empty: there is room.
        let _ = frame.push(&Message::Request(self.request.as_bytes()));
        link.send(&mut frame);
        let mut answer = None;
        while answer.is_none() {
            if link.is_closed {
                return Err(AttachError::Lost(self.target.id).into());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoAnswer(self.target.id, patience.as_secs()).into());
            }
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), PollFlags::IN)];
            let waited = poll(&mut fds, Some(&left));
            if waited != Err(Errno::INTR) {
                waited.step("wait for the answer")?;
            }
            link.fill();
            let taken = link.take(|message| match *message {
                Message::Answer(text) => {
                    answer = Some(String::from_utf8_lossy(text).into_owned());
                    Ok(())
                }
                _ => Err(Malformed::Kind(message.kind())),
            });
            taken.map_err(AttachError::Protocol)?;
        }
        let answer = answer.unwrap_or_default();
        if let Some(why) = answer.strip_prefix('-') {
            let what = self.request.split(' ').next().unwrap_or_default();
            return Err(Refused(what.into(), self.target.id, why.into()).into());
        }
        let text = answer.strip_prefix('+').unwrap_or_default();
        if !text.is_empty() {
            let printed = std::io::stdout().write_all(format!("{text}\n").as_bytes());
            printed.step("print")?;
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::error::message;
    use crate::process::place::own_working_folder;
    use crate::testing::Folder;

    fn parse(name: &str, line: &str) -> Result<Option<Control>, ArgsError> {
        parse_control(name, line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn request_has_the_id_and_a_signal_by_number_or_name() {
        for (line, expected) in [
            ("vm_1.x TERM", "signal 15"),
            ("--runtime-dir /r vm_1.x sigkill", "signal 9"),
            ("vm_1.x 64 --runtime-dir /r", "signal 64"),
        ] {
            let control = parse("signal", line).unwrap().unwrap();
            assert_eq!(
                (&*control.target.id, &*control.request),
                ("vm_1.x", expected)
            );
            let given = line.contains("/r").then(|| "/r".into());
            assert_eq!(control.target.place, Place::new(given));
        }
        let start = parse("start", "a").unwrap().unwrap();
        assert_eq!(start.request, "start");
        assert_eq!(parse("state", "--help").unwrap(), None);
        for (name, line) in [
            ("start", ""),
            ("start", "a b"),
            ("start", ".a"),
            ("signal", "a"),
            ("signal", "a 65"),
            ("signal", "a NONE"),
        ] {
            assert!(parse(name, line).is_err(), "{name} {line}");
        }
    }

    fn asked(folder: &Folder, name: &str, line: &str) -> Control {
        let mut control = parse(name, line).unwrap().unwrap();
        control.target.place = Place::new(Some(folder.path().to_owned()));
        control
    }

    #[test]
    fn supervisor_that_does_not_answer_is_waited_for_so_long_and_no_longer() {
        own_working_folder();
        let folder = Folder::new("control-silent");
        // It takes the connection, and says nothing.
        let _listener = UnixListener::bind(folder.path().join("vm.sock")).unwrap();
        for (name, line) in [("start", "vm"), ("signal", "vm TERM"), ("state", "vm")] {
            let control = asked(&folder, name, line);
            let error = control.run_within(Duration::from_millis(1)).unwrap_err();
            let text = message(&*error);
            assert!(text.contains("cannot hear from the microVM vm"), "{text}");
        }
        assert_eq!(PATIENCE, Duration::from_secs(60));
    }

    #[test]
    fn answer_that_comes_in_time_is_taken() {
        own_working_folder();
        let folder = Folder::new("control-answer");
        let listener = UnixListener::bind(folder.path().join("vm.sock")).unwrap();
        for (answer, expected) in [
            (&b"+"[..], Ok(0)),
            (b"-no", Err("cannot signal the microVM vm: no")),
        ] {
            let listener = listener.try_clone().unwrap();
            let other = std::thread::spawn(move || {
                let (mut supervisor, _) = listener.accept().unwrap();
                let mut frame = Frame::new();
                assert!(frame.push(&Message::Answer(answer)));
                supervisor.write_all(frame.finish(0)).unwrap();
            });
            let code = asked(&folder, "signal", "vm 1").run_within(PATIENCE);
            other.join().unwrap();
            assert_eq!(
                code.map_err(|error| message(&*error)),
                expected.map_err(str::to_owned)
            );
        }
    }
}
