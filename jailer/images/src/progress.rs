//! How far a long step is: one line that is rewritten, on a terminal only.

use std::io::{IsTerminal, Read, Write};

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

    /// Follows what `qemu-img -p` prints: `    (12.34/100%)` and a carriage return, again and again.
    pub fn follow(&mut self, output: &mut dyn Read) -> std::io::Result<Vec<u8>> {
        self.total = 10_000;
        let (mut piece, mut buffer) = (Vec::new(), [0; 256]);
        loop {
            let len = output.read(&mut buffer)?;
            if len == 0 {
                return Ok(Vec::new());
            }
            for &byte in &buffer[..len] {
                if byte == b'\r' || byte == b'\n' {
                    if let Some(hundredths) = percent(&piece) {
                        self.set(hundredths);
                    }
                    piece.clear();
                } else if piece.len() < 64 {
                    piece.push(byte);
                }
            }
        }
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

/// Hundredths of a percent in one piece of qemu-img's output.
fn percent(piece: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(piece).ok()?.trim();
    let number = text.strip_prefix('(')?.strip_suffix("/100%)")?;
    let (whole, part) = number.split_once('.')?;
    Some(whole.parse::<u64>().ok()?.checked_mul(100)? + part.get(..2)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_read_from_what_qemu_img_prints() {
        assert_eq!(percent(b"    (12.34/100%)"), Some(1234));
        assert_eq!(percent(b"    (100.00/100%)"), Some(10_000));
        assert_eq!(percent(b"    (x/100%)"), None);
        assert_eq!(percent(b""), None);
    }
}
