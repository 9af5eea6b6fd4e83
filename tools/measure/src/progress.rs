//! A bar on the terminal that says how far a measurement is.

use std::io::{IsTerminal, Write};
use std::time::Instant;

const CELLS: usize = 30;

/// The bar. It is drawn on standard error, only where that is a terminal, and gone at the end.
#[derive(Debug)]
pub struct Progress {
    total: usize,
    done: usize,
    began: Instant,
    shown: bool,
}

impl Progress {
    /// Of `total` steps none is done.
    pub fn new(total: usize) -> Self {
        let progress = Self {
            total,
            done: 0,
            began: Instant::now(),
            shown: std::io::stderr().is_terminal(),
        };
        progress.draw();
        progress
    }

    /// One more step is done.
    pub fn step(&mut self) {
        self.done += 1;
        self.draw();
    }

    /// So many steps are done.
    pub fn at(&mut self, done: usize) {
        self.done = done.min(self.total);
        self.draw();
    }

    fn draw(&self) {
        if self.shown {
            let seconds = self.began.elapsed().as_secs_f64();
            // What cannot be drawn is not missed.
            let _ = write!(
                std::io::stderr(),
                "\r{}",
                line(self.done, self.total, seconds)
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r{:79}\r", "");
        }
    }
}

/// The bar as text: done, and the time it will still take at the pace so far.
fn line(done: usize, total: usize, seconds: f64) -> String {
    let cells = (done * CELLS).checked_div(total).unwrap_or(0);
    let bar = format!("{}{}", "#".repeat(cells), ".".repeat(CELLS - cells));
    let mut text = format!("[{bar}] {done} of {total}");
    if done > 0 {
        let left = seconds / done as f64 * (total - done) as f64;
        text.push_str(&format!(", {left:.0} s left"));
    }
    format!("{text:60}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_when_a_third_is_done_says_how_long_the_rest_takes() {
        let text = line(5, 15, 10.0);
        assert_eq!(text.matches('#').count(), CELLS / 3);
        assert!(text.contains("5 of 15, 20 s left"), "{text}");
    }

    #[test]
    fn line_when_nothing_is_to_do_is_empty() {
        assert!(line(0, 0, 0.0).contains("0 of 0"));
    }
}
