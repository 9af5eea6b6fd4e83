//! What a guest is to run: the words after `--`, and the options about them, as the body of a message.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use mayfly_agent_protocol::{BODY_MAX, fields};

use super::{object, pty};
use crate::args::{ArgsError, Why, Words};
use crate::error::AnyError;
use crate::host;

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
    /// The file that says all of the above, of which nothing but the input is known before it is read.
    pub object: Option<PathBuf>,
    /// What such a file says besides. Without it there are defaults for what is not said.
    pub exact: Option<Box<Exact>>,
    /// The socket that gets the other end of a terminal.
    pub console: Option<PathBuf>,
}

/// What a process object says that no option does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exact {
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// Permissions that its files do not get.
    pub umask: Option<u32>,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Limits.
    pub limits: Vec<Limit>,
    /// Whether no program may give it more than it has.
    pub no_new_privileges: bool,
    /// Bounding, effective, inheritable, permitted and ambient capabilities, one bit for each number.
    pub capabilities: Option<[u64; 5]>,
    /// How readily the guest's kernel ends it for want of memory.
    pub oom_score: Option<i32>,
}

/// The number of a resource, and its soft and its hard limit.
pub type Limit = (u8, u64, u64);

/// The words before `--`, and those after it.
pub fn split_command(mut words: Vec<OsString>) -> (Vec<OsString>, Option<Vec<OsString>>) {
    let Some(at) = words.iter().position(|word| word == "--") else {
        return (words, None);
    };
    let command = words.split_off(at + 1);
    words.pop();
    (words, Some(command))
}

/// What a process object says, and no option may besides.
const OF_OBJECT: &str = "--user --env --workdir -t --tty";

/// A command cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot use -t (--tty): standard input and output are not a terminal; leave it out")]
    NoTerminal,
    #[error(
        "cannot use --console-socket: the command has no terminal; give -t (--tty), or `terminal` in its process object"
    )]
    ConsoleWithoutTerminal,
    #[error("cannot run the command: its words and variables are longer than {BODY_MAX} bytes")]
    TooLong,
    #[error("cannot run the command: a word or variable has a zero byte in it")]
    ZeroByte,
}

impl Command {
    /// Takes the options, and what stood after `--`. `missing` is what to say where there is nothing to run.
    pub fn take(
        words: &mut Words,
        command: Option<Vec<OsString>>,
        missing: ArgsError,
    ) -> Result<Command, ArgsError> {
        const NAME: &str = "--process";
        let object = words.parsed(NAME, object_path)?;
        let command = command.filter(|command| !command.is_empty());
        if let Some(object) = &object {
            let said = OF_OBJECT.split(' ').find(|name| words.has(name));
            if let Some(name) = said.or(command.as_ref().map(|_| "--")) {
                let why = format!("the process object says that already; leave {name} out");
                let given = object.display().to_string();
                return Err(ArgsError::Value(NAME, given, why.into()));
            }
        }
        Ok(Command {
            words: match (command, &object) {
                (Some(command), _) => command,
                (None, Some(_)) => Vec::new(),
                (None, None) => return Err(missing),
            },
            variables: words.all("--env", variable)?,
            user: words.parsed("--user", |text| Ok(text.to_owned()))?,
            folder: words.parsed("--workdir", folder)?,
            is_terminal: words.has("-t") || words.has("--tty"),
            has_input: words.has("-i") || words.has("--interactive"),
            object,
            exact: None,
            console: words.path("--console-socket"),
        })
    }

    /// Reads the file that says what is to be run, if there is one. It is closed again.
    pub fn read(&mut self) -> Result<(), AnyError> {
        if let Some(path) = self.object.take() {
            let console = self.console.take();
            *self = Command {
                console,
                ..object::read(&path, self.has_input)?
            };
        }
        Ok(())
    }

    /// Makes the terminal whose other end another program wants, and makes sure that there is one where one is asked
    /// for.
    pub fn prepare_terminal(&mut self) -> Result<(), AnyError> {
        if let Some(socket) = self.console.take() {
            if !self.is_terminal {
                return Err(CommandError::ConsoleWithoutTerminal.into());
            }
            pty::make(&socket, self.exact.as_ref().and_then(|exact| exact.size))?;
        }
        Ok(self.check()?)
    }

    fn check(&self) -> Result<(), CommandError> {
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
        self.body_where(host::has_software_kvm(), hostname)
    }

    fn body_where(&self, kvm_is_software: bool, hostname: &str) -> Result<Vec<u8>, CommandError> {
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
        let is_exact = self.exact.is_some();
        if !is_exact && !has("PATH") {
            body.add(fields::VARIABLE, PATH.as_bytes())?;
        }
        if !is_exact && !has("HOSTNAME") && !hostname.is_empty() {
            body.add(fields::VARIABLE, format!("HOSTNAME={hostname}").as_bytes())?;
        }
        let (name, variable) = host::software_kvm_variable();
        if kvm_is_software && !has(name) {
            body.add(fields::VARIABLE, variable.as_bytes())?;
        }
        if self.is_terminal {
            if !is_exact && !has("TERM") {
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
        if let Some(exact) = &self.exact {
            exact.add_to(&mut body)?;
        }
        body.finish()
    }
}

impl Exact {
    fn add_to(&self, body: &mut Body) -> Result<(), CommandError> {
        // As container runtimes do.
        body.add(fields::MAKE_FOLDER, b"")?;
        if let Some(umask) = self.umask {
            body.add(fields::UMASK, &umask.to_le_bytes())?;
        }
        for group in &self.groups {
            body.add(fields::GROUP, &group.to_le_bytes())?;
        }
        for (kind, soft, hard) in &self.limits {
            let limit = [&[*kind][..], &soft.to_le_bytes(), &hard.to_le_bytes()].concat();
            body.add(fields::LIMIT, &limit)?;
        }
        if let Some(sets) = &self.capabilities {
            let sets: Vec<u8> = sets.iter().flat_map(|set| set.to_le_bytes()).collect();
            body.add(fields::CAPABILITIES, &sets)?;
        }
        if let Some(score) = self.oom_score {
            body.add(fields::OOM_SCORE, score.to_string().as_bytes())?;
        }
        if self.no_new_privileges {
            body.add(fields::NO_NEW_PRIVILEGES, b"")?;
        }
        Ok(())
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
        if value.contains(&0) && !fields::is_binary(tag) {
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

/// The path of a file, or that of a passed descriptor.
fn object_path(text: &str) -> Result<PathBuf, Why> {
    Ok(match text.strip_prefix("fd:") {
        Some(number) => format!("/dev/fd/{number}").into(),
        None => text.into(),
    })
}

fn folder(text: &str) -> Result<String, Why> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err("it is not an absolute path".into()),
    }
}

#[cfg(test)]
mod tests {
    use mayfly_agent_protocol::{Field, Fields};

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
        let body = command.body_where(false, "h").unwrap();
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
    fn variable_for_software_kvm_is_there_unless_the_caller_gives_it() {
        let variables = |given: &[&str], kvm_is_software| {
            let command = Command {
                variables: given.iter().map(|&it| it.to_owned()).collect(),
                exact: Some(Box::default()),
                ..Command::default()
            };
            let body = command.body_where(kvm_is_software, "").unwrap();
            let found = Fields(&body).map(Result::unwrap);
            let found = found.filter(|it| it.tag == fields::VARIABLE);
            let text = |it: Field| String::from_utf8(it.bytes().to_vec()).unwrap();
            found.map(text).collect::<Vec<_>>()
        };
        let (name, variable) = host::software_kvm_variable();
        assert_eq!(variables(&["A=b"], true), ["A=b", variable]);
        assert_eq!(variables(&["A=b"], false), ["A=b"]);
        let given = format!("{name}=");
        assert_eq!(variables(&[&given], true), [given]);
    }

    #[test]
    fn body_of_a_process_object_has_what_it_says_and_no_defaults() {
        let command = Command {
            words: vec!["x".into()],
            exact: Some(Box::new(Exact {
                umask: Some(0o27),
                groups: vec![7, 8],
                limits: vec![(7, 1, u64::MAX)],
                no_new_privileges: true,
                capabilities: Some([1, 2, 3, 4, 5]),
                oom_score: Some(-5),
                size: None,
            })),
            ..Command::default()
        };
        let body = command.body_where(false, "h").unwrap();
        fields::check_process(&body).unwrap();
        let tags: Vec<_> = Fields(&body).map(|it| it.unwrap().tag).collect();
        let expected = [
            fields::ARGUMENT,
            fields::MAKE_FOLDER,
            fields::UMASK,
            fields::GROUP,
            fields::GROUP,
            fields::LIMIT,
            fields::CAPABILITIES,
            fields::OOM_SCORE,
            fields::NO_NEW_PRIVILEGES,
        ];
        assert_eq!(tags, expected);
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
