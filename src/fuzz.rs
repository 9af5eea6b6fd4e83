//! Entry points for fuzzing: one function for each target, which takes any bytes. Compiled for tests
//! and for `tools/fuzz` only; the functions stand in files named `fuzz.rs` beside what they drive.
//!
//! A target makes its choices from the bytes by way of [`Input`], drives its part with them, and
//! panics when what is promised does not hold. It keeps nothing from one input to the next, so that
//! an input that was found to fail fails again. `tests/fuzz` has the programs for libFuzzer and a
//! small corpus; `cargo test` runs that corpus and some thousands of other inputs by the tests below.

pub use crate::api::fuzz::api;
pub use crate::api::http::fuzz::http;
pub use crate::arch::cmdline;
pub use crate::arch::i8042::fuzz::i8042;
pub use crate::arch::kernel::fuzz::kernel;
pub use crate::arch::split::fuzz::chips;
pub use crate::args::fuzz::args;
pub use crate::fuzz_input::Input;
pub use crate::overlay::fuzz::overlay;
pub use crate::rate_limiter::fuzz::limiter;
pub use crate::serial::fuzz::uart;
pub use crate::virtio::block::fuzz::block;
pub use crate::virtio::net::fuzz::net;
pub use crate::virtio::queue::fuzz::queue;
pub use crate::virtio::registers::fuzz::registers;
pub use crate::vmm::state;

#[cfg(test)]
mod tests {
    use crate::fuzz_run::run;

    #[test]
    fn queue_when_fed_anything_agrees_with_the_reference_reader() {
        run("queue", super::queue);
    }

    #[test]
    fn registers_when_accessed_in_any_order_keep_their_promises() {
        run("registers", super::registers);
    }

    #[test]
    fn block_requests_when_anything_agree_with_the_model_of_the_disk() {
        run("block", super::block);
    }

    #[test]
    fn frames_when_anything_arrive_whole_and_in_order_or_are_counted_as_dropped() {
        run("net", super::net);
    }

    #[test]
    fn http_when_fed_anything_finds_the_same_requests_in_any_pieces() {
        run("http", super::http);
    }

    #[test]
    fn command_line_when_anything_is_taken_in_any_order_or_refused_in_a_line() {
        run("args", super::args);
    }

    #[test]
    fn boot_arguments_when_anything_are_found_by_kernel_and_init() {
        run("cmdline", super::cmdline);
    }

    #[test]
    fn kernel_when_anything_is_loaded_as_its_headers_say_or_refused() {
        run("kernel", super::kernel);
    }

    #[test]
    fn chips_when_accessed_in_any_order_keep_their_promises() {
        run("chips", super::chips);
    }

    #[test]
    fn overlay_when_its_file_holds_anything_agrees_with_the_model_or_is_refused() {
        run("overlay", super::overlay);
    }

    #[test]
    fn state_when_anything_is_a_machine_that_is_written_as_the_same_or_refused() {
        run("state", super::state);
    }

    #[test]
    fn limiter_when_asked_anything_agrees_with_the_model() {
        run("limiter", super::limiter);
    }

    #[test]
    fn uart_when_accessed_in_any_order_keeps_its_promises() {
        run("uart", super::uart);
    }

    #[test]
    fn keyboard_controller_when_accessed_in_any_order_keeps_its_promises() {
        run("i8042", super::i8042);
    }

    #[test]
    fn body_when_anything_is_an_action_or_refused_with_a_reason() {
        run("api", super::api);
    }
}
