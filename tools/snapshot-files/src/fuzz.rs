//! Entry points for fuzzing: see `src/fuzz.rs` of the monitor.

pub use crate::fuzz_input::Input;
pub use crate::merge::fuzz::merge;

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn snapshots_when_merged_have_what_the_model_of_their_memory_has() {
        run("merge", super::merge);
    }
}
