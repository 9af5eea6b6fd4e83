//! What a root file system from elsewhere lacks to run in a microVM: an init, a console on the
//! serial port, names for the network. Says what it did. Never changes what a system with an init of
//! its own has, but for its console.

use std::io::Read;

use mayfly_images::fill::Blobs;
use mayfly_images::layout::Config;
use mayfly_images::tree::{Meta, Node, Tree};

use crate::failure::{Failure, Result};

const SCRIPT: &str = include_str!("init.sh");
pub const OWN_INIT: &str = "/sbin/mayfly-init";

/// What was done, and the words for the kernel.
#[derive(Debug, Default)]
pub struct Done {
    pub lines: Vec<String>,
    pub init: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Init {
    Systemd,
    Busybox,
    /// Another one, by its path.
    Other,
    None,
}

fn is_executable(tree: &Tree, path: &str) -> bool {
    tree.find(path).is_some_and(|id| {
        matches!(tree.node(id), Node::File(..)) && tree.meta(id).mode & 0o111 != 0
    })
}

/// By what `/sbin/init` is another name of.
fn init_of(tree: &Tree) -> Init {
    let is_one_of = |paths: [&str; 2]| {
        let init = tree.find("/sbin/init");
        paths
            .iter()
            .any(|path| init.is_some() && tree.find(path) == init)
    };
    if !is_executable(tree, "/sbin/init") {
        Init::None
    } else if is_one_of(["/usr/lib/systemd/systemd", "/lib/systemd/systemd"]) {
        Init::Systemd
    } else if is_one_of(["/bin/busybox", "/usr/bin/busybox"]) {
        Init::Busybox
    } else {
        Init::Other
    }
}

/// The shell for a script: its first line without the begin.
fn shell(tree: &Tree) -> Option<&'static str> {
    [
        ("/bin/sh", "/bin/sh"),
        ("/bin/busybox", "/bin/busybox sh"),
        ("/bin/bash", "/bin/bash"),
    ]
    .into_iter()
    .find(|(path, _)| is_executable(tree, path))
    .map(|(_, line)| line)
}

struct Setup<'a> {
    tree: &'a mut Tree,
    blobs: &'a mut Blobs,
    done: Done,
}

/// Sets the tree up.
pub fn set_up(tree: &mut Tree, blobs: &mut Blobs, config: &Config) -> Result<Done> {
    let mut setup = Setup {
        tree,
        blobs,
        done: Done::default(),
    };
    setup.folders()?;
    setup.names()?;
    match init_of(setup.tree) {
        Init::Systemd => setup.systemd()?,
        Init::Busybox => setup.busybox()?,
        Init::Other => setup.other()?,
        Init::None => setup.own_init(config)?,
    }
    if let Some(user) = &config.user {
        setup.say(format!(
            "the image wants user {:?}: its command runs as root here",
            crate::failure::clean(user)
        ));
    }
    Ok(setup.done)
}

impl Setup<'_> {
    fn say(&mut self, line: impl Into<String>) {
        self.done.lines.push(line.into());
    }

    fn add(&mut self, path: &str, node: Node, mode: u32) -> Result<()> {
        let meta = Meta {
            mode,
            ..Meta::default()
        };
        let added = self.tree.add(path.as_bytes(), node, meta);
        added.map_err(|why| {
            Failure::plain(format!(
                "cannot set the root file system up: {why}; try --as-is"
            ))
        })
    }

    fn file(&mut self, path: &str, text: &str, mode: u32) -> Result<()> {
        let node = self.blobs.text(text)?;
        self.add(path, node, mode)
    }

    /// Text of a file in the tree.
    fn text(&self, path: &str) -> Option<String> {
        match self.tree.node(self.tree.find(path)?) {
            Node::File(content) if content.len < 1 << 20 => {
                let mut text = String::new();
                let mut from = content.open().ok()?.file;
                from.read_to_string(&mut text).ok().map(|_| text)
            }
            _ => None,
        }
    }

    fn folders(&mut self) -> Result<()> {
        let mut made = Vec::new();
        for (path, mode) in [
            ("/dev", 0o755),
            ("/proc", 0o555),
            ("/sys", 0o555),
            ("/run", 0o755),
            ("/tmp", 0o1777),
            ("/root", 0o700),
        ] {
            if self.tree.find(path).is_none() {
                self.add(path, Node::Folder(Default::default()), mode)?;
                made.push(path);
            }
        }
        if !made.is_empty() {
            self.say(format!("made {}", made.join(" ")));
        }
        Ok(())
    }

    /// Name servers come from the kernel's ip= (docs/disks.md), the host's name is the guest's own.
    fn names(&mut self) -> Result<()> {
        let is_empty = self
            .text("/etc/resolv.conf")
            .is_none_or(|text| text.trim().is_empty());
        if is_empty && !matches!(init_of(self.tree), Init::Systemd) {
            self.add(
                "/etc/resolv.conf",
                Node::Symlink(b"/proc/net/pnp".to_vec()),
                0o777,
            )?;
            self.say("/etc/resolv.conf leads to /proc/net/pnp: name servers are those of ip= on the kernel command line");
        }
        if self
            .text("/etc/hosts")
            .is_none_or(|text| text.trim().is_empty())
        {
            self.file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644)?;
            self.say("wrote /etc/hosts");
        }
        if self
            .text("/etc/hostname")
            .is_none_or(|text| text.trim().is_empty())
        {
            self.file("/etc/hostname", "mayfly\n", 0o644)?;
            self.say("wrote /etc/hostname");
        }
        Ok(())
    }

    /// systemd starts a getty on the kernel's console by itself; this logs root in on it.
    fn systemd(&mut self) -> Result<()> {
        if !is_executable(self.tree, "/sbin/agetty") {
            self.say("systemd found, but no /sbin/agetty: there will be no login on the console");
            return Ok(());
        }
        let text = "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - $TERM\n";
        self.file(
            "/etc/systemd/system/serial-getty@ttyS0.service.d/mayfly.conf",
            text,
            0o644,
        )?;
        self.say("systemd found: root is logged in on the console (serial-getty@ttyS0.service.d/mayfly.conf)");
        Ok(())
    }

    fn busybox(&mut self) -> Result<()> {
        let shell = "ttyS0::respawn:-/bin/sh\n";
        let before = self.text("/etc/inittab");
        if before
            .as_ref()
            .is_some_and(|text| text.lines().any(|line| line.starts_with("ttyS0:")))
        {
            self.say("busybox init found, with a console on ttyS0");
            return Ok(());
        }
        let text = match before {
            Some(text) => format!("{}\n{shell}", text.trim_end()),
            None => format!(
                "::sysinit:/bin/mount -t proc proc /proc\n::sysinit:/bin/mount -t sysfs sysfs /sys\n\
                 ::sysinit:/bin/hostname -F /etc/hostname\n::ctrlaltdel:/sbin/reboot\n\
                 ::shutdown:/bin/umount -a -r\n{shell}"
            ),
        };
        self.file("/etc/inittab", &text, 0o644)?;
        self.say("busybox init found: a shell on ttyS0 was added to /etc/inittab");
        Ok(())
    }

    fn other(&mut self) -> Result<()> {
        let line = "T0:12345:respawn:/sbin/agetty --autologin root ttyS0 115200 vt100\n";
        match self.text("/etc/inittab") {
            Some(text)
                if !text
                    .lines()
                    .any(|line| !line.starts_with('#') && line.contains("ttyS0")) =>
            {
                self.file(
                    "/etc/inittab",
                    &format!("{}\n{line}", text.trim_end()),
                    0o644,
                )?;
                self.say("/sbin/init found: a console on ttyS0 was added to /etc/inittab");
            }
            _ => self.say("/sbin/init found, and left as it is"),
        }
        Ok(())
    }

    fn own_init(&mut self, config: &Config) -> Result<()> {
        let Some(shell) = shell(self.tree) else {
            let program = config.command.first().filter(|it| it.starts_with('/'));
            match program {
                Some(program) => {
                    self.say(format!(
                        "no init and no shell: the image's program {program:?} is the init"
                    ));
                    self.done.init = Some(program.clone());
                }
                None => self.say(
                    "no init and no shell: name a program with init= on the kernel command line",
                ),
            }
            return Ok(());
        };
        let text = script(shell, config);
        self.file(OWN_INIT, &text, 0o755)?;
        self.done.init = Some(OWN_INIT.into());
        self.say(match config.command.is_empty() {
            true => format!(
                "no init found: {OWN_INIT} was written, which starts a shell on the console"
            ),
            false => {
                format!("no init found: {OWN_INIT} was written, which runs the image's command")
            }
        });
        Ok(())
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The init script for a shell and an image's configuration.
fn script(shell: &str, config: &Config) -> String {
    let mut environment = String::new();
    for variable in &config.environment {
        if let Some((name, value)) = variable.split_once('=') {
            let is_name = !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && !name.as_bytes()[0].is_ascii_digit();
            if is_name {
                environment += &format!("export {name}={}\n", quoted(value));
            }
        }
    }
    let folder = config.folder.as_deref().unwrap_or("/");
    let command: Vec<String> = config.command.iter().map(|word| quoted(word)).collect();
    SCRIPT
        .replace("@SHELL@", shell)
        .replace("@ENVIRONMENT@\n", &environment)
        .replace("@FOLDER@", &quoted(folder))
        .replace("@COMMAND@", &command.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_takes_words_of_an_image_as_words_and_not_as_code() {
        let config = Config {
            command: vec!["/bin/echo".into(), "it's $(reboot)".into()],
            environment: vec![
                "A=$(x)".into(),
                "B;reboot=1".into(),
                "1C=2".into(),
                "nothing".into(),
            ],
            folder: Some("/a b".into()),
            user: None,
        };
        let text = script("/bin/sh", &config);
        assert!(text.starts_with("#!/bin/sh\n"));
        assert!(text.contains(r"'/bin/echo' 'it'\''s $(reboot)'"), "{text}");
        assert!(text.contains("export A='$(x)'\n") && !text.contains("B;") && !text.contains("1C"));
        assert!(text.contains("cd '/a b'"), "{text}");
        assert!(
            !text.split("\"$@\"").any(|part| part.contains('@')),
            "{text}"
        );
    }
}
