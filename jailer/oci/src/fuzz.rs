//! Entry points for fuzzing: see `src/fuzz.rs` of the monitor.

pub use crate::bundle::fuzz::oci_config;
pub use crate::fuzz_input::Input;

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn config_when_anything_is_a_container_within_its_bounds_or_refused() {
        run("oci-config", super::oci_config);
    }
}
