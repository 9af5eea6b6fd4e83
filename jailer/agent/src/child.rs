//! A new process: what is made for it beforehand, and what its copy of the agent does until it is another
//! program.

use core::ffi::CStr;

use mayfly_agent_protocol::{Field, Fields, Malformed, fields};

use crate::sys::{self, Errno, Fd, Words};
use crate::text::Text;
use crate::user::{self, User};
use crate::{archive, root, sys::Result};

/// The code of what cannot be started at all, as of a container engine.
pub const CANNOT_START: u8 = 125;
/// The code of what cannot be executed, as of a shell.
const CANNOT_EXECUTE: u8 = 126;
/// The code of what is not there, as of a shell.
const NOT_FOUND: u8 = 127;
/// Most words and most variables.
const WORDS_MAX: usize = 4096;
/// Where a program without a slash in its name is looked for, unless the environment says it.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is to be run.
pub struct Command<'a> {
    fields: Fields<'a>,
    folder: Option<&'a CStr>,
    user: &'a [u8],
    /// Rows and columns.
    pub terminal: Option<(u16, u16)>,
    has_input: bool,
    pack: Option<&'a CStr>,
    unpack: Option<&'a CStr>,
    umask: Option<u32>,
    /// Bounding, effective, inheritable, permitted and ambient.
    capabilities: Option<[u64; 5]>,
    oom_score: &'a [u8],
    gains_nothing: bool,
    makes_folder: bool,
}

/// A number of 8 bytes.
fn long(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |it| u64::from_le_bytes(*it))
}

impl<'a> Command<'a> {
    pub fn read(body: &'a [u8]) -> core::result::Result<Self, Malformed> {
        let mut command = Command {
            fields: Fields(body),
            folder: None,
            user: b"",
            terminal: None,
            has_input: false,
            pack: None,
            unpack: None,
            umask: None,
            capabilities: None,
            oom_score: b"",
            gains_nothing: false,
            makes_folder: false,
        };
        fields::check_process(body)?;
        for field in Fields(body) {
            let field = field?;
            match field.tag {
                fields::FOLDER => command.folder = Some(field.text()?),
                fields::USER => command.user = field.bytes(),
                fields::HAS_INPUT => command.has_input = true,
                fields::PACK => command.pack = Some(field.text()?),
                fields::UNPACK => command.unpack = Some(field.text()?),
                fields::TERMINAL => {
                    let [a, b, c, d] = *field.bytes() else {
                        return Err(Malformed::Field(field.tag));
                    };
                    let rows = u16::from_le_bytes([a, b]);
                    command.terminal = Some((rows, u16::from_le_bytes([c, d])));
                }
                fields::UMASK => {
                    command.umask = field
                        .bytes()
                        .first_chunk()
                        .map(|it| u32::from_le_bytes(*it));
                }
                fields::CAPABILITIES => {
                    let mut sets = [0; 5];
                    for (set, bytes) in sets.iter_mut().zip(field.bytes().chunks(8)) {
                        *set = long(bytes);
                    }
                    command.capabilities = Some(sets);
                }
                fields::OOM_SCORE => command.oom_score = field.bytes(),
                fields::NO_NEW_PRIVILEGES => command.gains_nothing = true,
                fields::MAKE_FOLDER => command.makes_folder = true,
                // Texts, groups and limits are taken when they are used.
                _ => {}
            }
        }
        Ok(command)
    }

    fn values(&self, tag: u8) -> impl Iterator<Item = &'a [u8]> {
        let of_tag = move |field: Field<'a>| (field.tag == tag).then(|| field.bytes());
        self.fields.flatten().filter_map(of_tag)
    }

    fn texts(&self, tag: u8) -> impl Iterator<Item = &'a CStr> {
        let of_tag = move |field: Field<'a>| (field.tag == tag).then(|| field.text().ok());
        self.fields.flatten().filter_map(of_tag).flatten()
    }

    fn variable(&self, name: &[u8]) -> Option<&'a [u8]> {
        let value = |text: &'a CStr| text.to_bytes().strip_prefix(name)?.strip_prefix(b"=");
        self.texts(fields::VARIABLE).find_map(value)
    }
}

/// A process that was started, and the agent's ends of its streams.
pub struct Child {
    pub pid: i32,
    pub input: Option<Fd>,
    pub output: Fd,
    pub error: Option<Fd>,
}

/// The other ends.
enum Streams {
    Terminal(Fd),
    Pipes(Option<Fd>, Fd, Fd),
}

/// Starts it.
pub fn start(command: &Command<'_>) -> Result<Child> {
    let (mut child, streams) = match command.terminal {
        Some(size) => with_terminal(size, command.has_input)?,
        None => with_pipes(command.has_input)?,
    };
    match sys::fork()? {
        Some(pid) => child.pid = pid,
        None => sys::exit(become_program(command, streams)),
    }
    Ok(child)
}

fn with_terminal((rows, columns): (u16, u16), has_input: bool) -> Result<(Child, Streams)> {
    let (master, number) = sys::open_terminal()?;
    let mut path = Text::new();
    path.add(b"/dev/pts/").add_number(number.into());
    let slave = sys::open(path.c_str(), sys::READ_WRITE, 0)?;
    if rows > 0 && columns > 0 {
        sys::set_size(&master, rows, columns);
    }
    let child = Child {
        pid: 0,
        input: has_input.then(|| sys::copy(&master)).transpose()?,
        output: master,
        error: None,
    };
    Ok((child, Streams::Terminal(slave)))
}

fn with_pipes(has_input: bool) -> Result<(Child, Streams)> {
    let (own_input, input) = match has_input.then(sys::pipe).transpose()? {
        Some((theirs, own)) => (Some(own), Some(theirs)),
        None => (None, None),
    };
    let (output, their_output) = sys::pipe()?;
    let (error, their_error) = sys::pipe()?;
    let all = [own_input.as_ref(), Some(&output), Some(&error)];
    all.into_iter().flatten().for_each(sys::set_nonblocking);
    let child = Child {
        pid: 0,
        input: own_input,
        output,
        error: Some(error),
    };
    Ok((child, Streams::Pipes(input, their_output, their_error)))
}

/// In the copy: all steps to the program; the code to end with if there is none.
fn become_program(command: &Command<'_>, streams: Streams) -> u8 {
    let _ = sys::new_session();
    if place(streams).is_err() {
        return CANNOT_START;
    }
    sys::release_signals();
    if command.pack.is_some() || command.unpack.is_some() {
        // No program follows that would close them: an input of which this copy holds the other end has no end.
        sys::close_others();
    }
    if let Some(path) = command.pack {
        return archive::pack(path);
    }
    if let Some(path) = command.unpack {
        return archive::unpack(path);
    }
    let mut user = match user::find(command.user) {
        Ok(user) => user,
        Err(text) => return complain(text.bytes(), CANNOT_EXECUTE),
    };
    for group in command.values(fields::GROUP) {
        let group = group.first_chunk().map(|it| u32::from_le_bytes(*it));
        group.into_iter().for_each(|group| user.add_group(group));
    }
    // Before the umask of the process counts.
    if let Some(folder) = command.folder.filter(|_| command.makes_folder) {
        root::make_folders(folder);
    }
    set_limits(command);
    if let Err(error) = become_user(&user, command) {
        let text = Text::of(b"become the user, with the groups and capabilities", error);
        return complain(text.bytes(), CANNOT_EXECUTE);
    }
    if let Some(folder) = command.folder
        && let Err(error) = sys::change_folder(folder)
    {
        let mut text = Text::new();
        text.add(b"enter the folder ").add(folder.to_bytes());
        return complain(Text::of(text.bytes(), error).bytes(), CANNOT_EXECUTE);
    }
    execute(command, &user)
}

/// The standard streams, and none else.
fn place(streams: Streams) -> Result<()> {
    match streams {
        Streams::Terminal(slave) => {
            sys::control_terminal(&slave)?;
            (0..3).try_for_each(|at| sys::place(&slave, at))
        }
        Streams::Pipes(input, output, error) => {
            let input = match input {
                Some(input) => input,
                None => sys::open(c"/dev/null", sys::READ, 0)?,
            };
            sys::place(&input, 0)?;
            sys::place(&output, 1)?;
            sys::place(&error, 2)
        }
    }
}

/// What a process may use of the machine. A limit that cannot be set stays as it is: there is none then.
fn set_limits(command: &Command<'_>) {
    for limit in command.values(fields::LIMIT) {
        if let Some((kind, limits)) = limit.split_first() {
            let (soft, hard) = limits.split_at(8);
            let _ = sys::set_limit(*kind, long(soft), long(hard));
        }
    }
    if !command.oom_score.is_empty()
        && let Ok(file) = sys::open(c"/proc/self/oom_score_adj", sys::READ_WRITE, 0)
    {
        let _ = sys::write(&file, command.oom_score);
    }
    if let Some(umask) = command.umask {
        sys::set_umask(umask);
    }
}

fn become_user(user: &User, command: &Command<'_>) -> Result<()> {
    if let Some([bounding, ..]) = command.capabilities {
        sys::bound_capabilities(bounding)?;
    }
    if (user.id, user.group) != (0, 0) || !user.groups().is_empty() {
        sys::set_groups(user.groups())?;
        sys::set_group(user.group)?;
        sys::set_user(user.id)?;
    }
    if let Some([_, effective, inheritable, permitted, ambient]) = command.capabilities {
        sys::set_capabilities(effective, permitted, inheritable)?;
        // One that is not permitted and inheritable cannot be: there is none then, as of container runtimes.
        let _ = sys::set_ambient(ambient);
    }
    if command.gains_nothing {
        sys::gain_nothing()?;
    }
    Ok(())
}

/// Becomes the program; the code for why that cannot be.
fn execute(command: &Command<'_>, user: &User) -> u8 {
    let mut words = Words::<WORDS_MAX>::new();
    let mut variables = Words::<WORDS_MAX>::new();
    let mut home = Text::new();
    home.add(b"HOME=").add(user.home());
    let mut fit = true;
    for text in command.texts(fields::ARGUMENT) {
        fit &= words.push(text);
    }
    for text in command.texts(fields::VARIABLE) {
        fit &= variables.push(text);
    }
    if command.variable(b"HOME").is_none() {
        fit &= variables.push(home.c_str());
    }
    let Some(program) = command.texts(fields::ARGUMENT).next().filter(|_| fit) else {
        return complain(
            b"cannot run the command: it has no words, or too many",
            CANNOT_EXECUTE,
        );
    };
    let (words, variables) = (words.finish(), variables.finish());
    let name = program.to_bytes();
    let mut error = Errno::NOENT;
    if name.contains(&b'/') {
        error = sys::execute(program, words, variables);
    } else if !name.is_empty() {
        for folder in command
            .variable(b"PATH")
            .unwrap_or(PATH)
            .split(|byte| *byte == b':')
        {
            let mut path = Text::new();
            let folder = if folder.is_empty() { b"." } else { folder };
            // What does not fit would be another program.
            if folder.len() + 1 + name.len() > Text::MAX {
                continue;
            }
            path.add(folder).add(b"/").add(name);
            match sys::execute(path.c_str(), words, variables) {
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCES => error = Errno::ACCES,
                other => {
                    error = other;
                    break;
                }
            }
        }
    }
    let mut text = Text::new();
    text.add(b"run ").add(&name[..name.len().min(200)]);
    let code = match error {
        Errno::NOENT | Errno::NOTDIR => NOT_FOUND,
        _ => CANNOT_EXECUTE,
    };
    complain(Text::of(text.bytes(), error).bytes(), code)
}

/// Says on standard error why there is no program.
pub fn complain(text: &[u8], code: u8) -> u8 {
    let mut line = Text::new();
    line.add(b"mayfly-agent: ").add(text).add(b"\n");
    sys::print(line.bytes());
    code
}
