//! Entry points for fuzzing: see `src/fuzz.rs` of the monitor.

pub use crate::formats::fuzz::disk;
pub use crate::fuzz_input::Input;

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn disk_when_it_holds_anything_is_known_for_what_it_is_and_reaches_no_other_files() {
        run("disk", super::disk);
    }
}
