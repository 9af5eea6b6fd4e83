//! What a guest is to run: the words after `--`, and the options about them, as the body of a message.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;

use mayfly_agent_protocol::{BODY_MAX, fields};

use crate::args::{ArgsError, Why, Words};

/// Where programs are looked for, unless --env says it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Command {
    /// Its words.
    pub words: Vec<OsString>,
    /// NAME=VALUE.
    pub variables: Vec<String>,
    /// Its user.
    pub user: Option<String>,
    /// Its working folder.
    pub folder: Option<String>,
    /// Whether it has a terminal.
    pub is_terminal: bool,
    /// Whether it has this program's standard input.
    pub has_input: bool,
}

/// The words before `--`, and those after it.
pub fn split_command(mut words: Vec<OsString>) -> (Vec<OsString>, Option<Vec<OsString>>) {
    let Some(at) = words.iter().position(|word| word == "--") else {
        return (words, None);
    };
    let command = words.split_off(at + 1);
    words.pop();
    (words, Some(command))
}

/// A command cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot use -t (--tty): standard input and output are not a terminal; leave it out")]
    NoTerminal,
    #[error("cannot run the command: its words and variables are longer than {BODY_MAX} bytes")]
    TooLong,
    #[error("cannot run the command: a word or variable has a zero byte in it")]
    ZeroByte,
}

impl Command {
    /// Takes the options, and what stood after `--`.
    pub fn take(words: &mut Words, command: Vec<OsString>) -> Result<Command, ArgsError> {
        Ok(Command {
            words: command,
            variables: words.all("--env", variable)?,
            user: words.parsed("--user", |text| Ok(text.to_owned()))?,
            folder: words.parsed("--workdir", folder)?,
            is_terminal: words.has("-t") || words.has("--tty"),
            has_input: words.has("-i") || words.has("--interactive"),
        })
    }

    /// Makes sure that there is a terminal where one is asked for.
    pub fn check(&self) -> Result<(), CommandError> {
        let is_terminal = |fd| rustix::termios::isatty(fd);
        let (input, output) = (std::io::stdin(), std::io::stdout());
        let fits = is_terminal(output.as_fd()) && (!self.has_input || is_terminal(input.as_fd()));
        match self.is_terminal && !fits {
            true => Err(CommandError::NoTerminal),
            false => Ok(()),
        }
    }

    /// The body of the message that starts it.
    pub fn body(&self, hostname: &str) -> Result<Vec<u8>, CommandError> {
        let mut body = Body::default();
        for word in &self.words {
            body.add(fields::ARGUMENT, word.as_bytes())?;
        }
        let has = |name: &str| {
            let mut names = self.variables.iter().filter_map(|it| it.split_once('='));
            names.any(|(other, _)| other == name)
        };
        for variable in &self.variables {
            body.add(fields::VARIABLE, variable.as_bytes())?;
        }
        if !has("PATH") {
            body.add(fields::VARIABLE, PATH.as_bytes())?;
        }
        if !has("HOSTNAME") && !hostname.is_empty() {
            body.add(fields::VARIABLE, format!("HOSTNAME={hostname}").as_bytes())?;
        }
        if self.is_terminal {
            if !has("TERM") {
                body.add(fields::VARIABLE, b"TERM=xterm")?;
            }
            let (rows, columns) = terminal_size();
            let size = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
            body.add(fields::TERMINAL, &size)?;
        }
        if self.has_input {
            body.add(fields::HAS_INPUT, b"")?;
        }
        if let Some(user) = &self.user {
            body.add(fields::USER, user.as_bytes())?;
        }
        if let Some(folder) = &self.folder {
            body.add(fields::FOLDER, folder.as_bytes())?;
        }
        body.finish()
    }
}

/// Rows and columns of the terminal that this program writes to; zeros without one.
pub fn terminal_size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.map_or((0, 0), |size| (size.ws_row, size.ws_col))
}

/// The body of a message, of fields.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// Adds a field.
    pub fn add(&mut self, tag: u8, value: &[u8]) -> Result<(), CommandError> {
        if value.contains(&0) && tag != fields::TERMINAL && tag != fields::ROOT_MODE {
            return Err(CommandError::ZeroByte);
        }
        let header = fields::header(tag, value).ok_or(CommandError::TooLong)?;
        self.0.extend(header);
        self.0.extend(value);
        self.0.push(0);
        Ok(())
    }

    /// The bytes.
    pub fn finish(self) -> Result<Vec<u8>, CommandError> {
        match self.0.len() > BODY_MAX {
            true => Err(CommandError::TooLong),
            false => Ok(self.0),
        }
    }
}

fn variable(text: &str) -> Result<String, Why> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        Some(_) => Err("it has no name; give NAME=VALUE, or NAME for this program's own".into()),
        None => match std::env::var(text) {
            Ok(value) => Ok(format!("{text}={value}")),
            Err(_) => Err("there is no such variable here; give NAME=VALUE".into()),
        },
    }
}

fn folder(text: &str) -> Result<String, Why> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err("it is not an absolute path".into()),
    }
}

#[cfg(test)]
mod tests {
    use mayfly_agent_protocol::Fields;

    use super::*;

    #[test]
    fn body_has_the_words_and_the_defaults_that_were_not_given() {
        let command = Command {
            words: vec!["echo".into(), "".into()],
            variables: vec!["PATH=/x".into()],
            user: Some("me:5".into()),
            has_input: true,
            ..Command::default()
        };
        let body = command.body("h").unwrap();
        let found: Vec<_> = Fields(&body)
            .map(Result::unwrap)
            .map(|it| (it.tag, it.bytes()))
            .collect();
        let expected: [(u8, &[u8]); 6] = [
            (fields::ARGUMENT, b"echo"),
            (fields::ARGUMENT, b""),
            (fields::VARIABLE, b"PATH=/x"),
            (fields::VARIABLE, b"HOSTNAME=h"),
            (fields::HAS_INPUT, b""),
            (fields::USER, b"me:5"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn command_that_does_not_fit_is_refused() {
        let of = |word: Vec<u8>| {
            use std::os::unix::ffi::OsStringExt as _;
            let words = vec![OsString::from_vec(word)];
            Command {
                words,
                ..Command::default()
            }
            .body("")
        };
        assert!(matches!(of(vec![b'x'; 70_000]), Err(CommandError::TooLong)));
        assert!(matches!(
            of(vec![b'x'; BODY_MAX]),
            Err(CommandError::TooLong)
        ));
        assert!(matches!(of(b"a\0b".to_vec()), Err(CommandError::ZeroByte)));
        assert!(variable("=x").is_err() && folder("tmp").is_err());
    }
}
