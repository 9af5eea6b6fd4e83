//! Entry points for fuzzing: see `src/fuzz.rs` of the monitor. The functions stand in files named
//! `fuzz.rs` beside what they drive.

pub use crate::args::fuzz::jail_args;
pub use crate::attach::fuzz::unpack;
pub use crate::fuzz_input::Input;
pub use crate::run::agent::fuzz::supervisor;

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn command_line_when_anything_is_understood_or_refused_in_a_line() {
        run("jail-args", super::jail_args);
    }

    #[test]
    fn archive_of_a_guest_when_anything_makes_what_was_asked_for_and_no_more() {
        run("unpack", super::unpack);
    }

    #[test]
    fn guest_when_it_says_anything_gets_no_further_than_its_credit() {
        run("supervisor", super::supervisor);
    }
}
