//! Entry points for fuzzing: one function for each target, which takes any bytes. Compiled for tests
//! and for `tools/fuzz` only; the functions stand in files named `fuzz.rs` beside what they drive.
//!
//! A target makes its choices from the bytes by way of [`Input`], drives its part with them, and
//! panics when what is promised does not hold. It keeps nothing from one input to the next, so that
//! an input that was found to fail fails again. `tests/fuzz` has the programs for libFuzzer and a
//! small corpus; `cargo test` runs that corpus and some thousands of other inputs by the tests below.

pub use crate::api::fuzz::api;
pub use crate::api::http::fuzz::http;
pub use crate::virtio::block::fuzz::block;
pub use crate::virtio::queue::fuzz::queue;
pub use crate::virtio::registers::fuzz::registers;

/// Bytes, taken from the front; zeros when there are no more.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or what is left of them.
    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut array = [0; LEN];
        let bytes = self.bytes(LEN);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A number below `end`, by one byte: `end` is at most 256.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::from(self.u8()) % end
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

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
    fn http_when_fed_anything_finds_the_same_requests_in_any_pieces() {
        run("http", super::http);
    }

    #[test]
    fn body_when_anything_is_an_action_or_refused_with_a_reason() {
        run("api", super::api);
    }
}
