//! The terminal under job control: a real shell with a terminal of its own runs the monitor in the
//! background, stops it and brings it to the foreground. The guest is the bare-metal probe.

mod common;

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use common::sys::Terminal;
use common::{Folder, needs, probe_vm};

/// An interactive shell on a terminal that controls its session.
struct Shell {
    terminal: Terminal,
    shell: Child,
    seen: Arc<Mutex<String>>,
}

impl Shell {
    fn new() -> Self {
        let terminal = Terminal::new();
        let line = || Stdio::from(terminal.line.try_clone().unwrap());
        let shell = Command::new("setsid")
            .args(["--ctty", "dash", "-i"])
            .env("PS1", "ready> ")
            .stdin(line())
            .stdout(line())
            .stderr(line())
            .spawn()
            .unwrap();
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut screen, text) = (terminal.keyboard.try_clone().unwrap(), Arc::clone(&seen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n) = screen.read(&mut bytes)
                && n > 0
            {
                let new = String::from_utf8_lossy(&bytes[..n]);
                text.lock().unwrap().push_str(&new);
            }
        });
        let shell = Shell {
            terminal,
            shell,
            seen,
        };
        shell.waits_for("ready> ");
        shell
    }

    fn types(&self, line: &str) {
        self.seen.lock().unwrap().clear();
        let mut keyboard = &self.terminal.keyboard;
        keyboard.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn waits_for(&self, text: &str) {
        common::wait_until(text, || self.seen.lock().unwrap().contains(text));
    }

    /// Runs a command to its end.
    fn runs(&self, line: &str) {
        self.types(&format!("{line}; echo co''mplete"));
        self.waits_for("complete");
    }

    /// Starts the monitor in the background; its process.
    fn starts_in_background(&self, folder: &Folder, words: &str) -> u32 {
        let args: Vec<String> = common::boot_args(folder, &probe_vm(words))
            .iter()
            .map(|arg| arg.display().to_string())
            .collect();
        let monitor = common::mayfly();
        self.types(&format!("{} {} &", monitor.display(), args.join(" ")));
        self.waits_for("probe: echo ready");
        self.types("echo pid''=$!.");
        self.waits_for("pid=");
        self.waits_for(".");
        let seen = self.seen.lock().unwrap();
        let digits = seen.split("pid=").nth(1).unwrap();
        digits.split('.').next().unwrap().parse().unwrap()
    }

    fn is_raw(&self) -> bool {
        self.terminal.settings().is_raw()
    }

    fn stops(&self, monitor: u32) {
        common::sys::kill(monitor, libc::SIGSTOP);
        self.waits_for("Stopped");
        self.waits_for("ready> ");
        // What shells with an editor do by themselves.
        self.runs("stty sane");
        assert!(self.terminal.settings().is_for_people());
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The jobs get a hangup when the session's leader is gone.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[test]
fn monitor_in_the_background_leaves_the_terminal_alone_until_it_is_in_the_foreground() {
    needs!(kvm);
    let (shell, folder) = (Shell::new(), Folder::new());
    let found = shell.terminal.settings();
    assert!(found.is_for_people());
    let monitor = shell.starts_in_background(&folder, "echo:3,spin");
    assert_eq!(shell.terminal.settings(), found);

    shell.types("fg");
    common::wait_until("raw mode in the foreground", || shell.is_raw());
    shell.types("one\r");
    shell.waits_for("probe: got one");

    // It is stopped, and the shell takes the terminal.
    shell.stops(monitor);
    shell.types("fg");
    common::wait_until("raw mode after SIGCONT", || shell.is_raw());
    shell.types("two\r");
    shell.waits_for("probe: got two");

    common::sys::kill(monitor, libc::SIGTERM);
    shell.waits_for("ready> ");
    assert_eq!(shell.terminal.settings(), found);
}

#[test]
fn monitor_that_ends_in_the_background_leaves_the_terminal_alone() {
    needs!(kvm);
    for signal in [libc::SIGTERM, libc::SIGSEGV] {
        let (shell, folder) = (Shell::new(), Folder::new());
        let monitor = shell.starts_in_background(&folder, "echo:1,spin");
        shell.types("fg");
        common::wait_until("raw mode in the foreground", || shell.is_raw());
        shell.stops(monitor);
        // Another program's settings.
        shell.runs("stty -echo");
        let others = shell.terminal.settings();
        shell.runs("bg");
        common::sys::kill(monitor, signal);
        shell.runs("wait");
        assert_eq!(shell.terminal.settings(), others);
    }
}
