//! How far a long step is: one line that is rewritten, on a terminal only.

use std::io::{IsTerminal, Write};

const WIDTH: usize = 30;

#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: u64,
    is_shown: bool,
    permille: Option<u64>,
}

impl Progress {
    /// `total` may be 0 where it is not known.
    pub fn new(what: &'static str, total: u64) -> Progress {
        Progress {
            what,
            total,
            is_shown: std::io::stderr().is_terminal(),
            permille: None,
        }
    }

    /// For a step that is part of a longer one.
    pub fn quiet() -> Progress {
        Progress {
            is_shown: false,
            ..Progress::new("", 0)
        }
    }

    pub fn set(&mut self, done: u64) {
        if !self.is_shown {
            return;
        }
        if self.total == 0 {
            let mib = done >> 20;
            if self.permille.replace(mib) != Some(mib) {
                eprint!("\r{} {mib} MiB ", self.what);
            }
            return;
        }
        let permille = (u128::from(done) * 1000 / u128::from(self.total)).min(1000) as u64;
        if self.permille.replace(permille) == Some(permille) {
            return;
        }
        let full = permille as usize * WIDTH / 1000;
        let bar = "#".repeat(full) + &".".repeat(WIDTH - full);
        eprint!("\r{} [{bar}] {:5.1} % ", self.what, permille as f64 / 10.0);
        let _ = std::io::stderr().flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.permille.is_some() {
            // The line goes: what follows says more.
            eprint!("\r{:width$}\r", "", width = self.what.len() + WIDTH + 14);
        }
    }
}
