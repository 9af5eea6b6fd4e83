//! What holds for any input: proptest makes the inputs, and makes one that fails small.

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Inputs that a test tries unless the environment says how many.
const INPUTS: u32 = 300;

/// Tries `check` with many values of `inputs`. Their number is `MAYFLY_PROPERTIES`, if that is set; the seed is
/// printed, and taken from `MAYFLY_SEED` if that is set.
pub fn hold<S: Strategy>(inputs: S, check: impl Fn(S::Value)) {
    let variable = |name| {
        let set = std::env::var(name).ok();
        set.map(|set| set.parse::<u64>().expect("the variable is a number"))
    };
    let seed = variable("MAYFLY_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("MAYFLY_SEED={seed}");
    let cases = variable("MAYFLY_PROPERTIES").map_or(INPUTS, |cases| cases as u32);
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let checked = TestRunner::new_with_rng(config, random).run(&inputs, |input| {
        check(input);
        Ok(())
    });
    if let Err(failure) = checked {
        panic!("MAYFLY_SEED={seed}: {failure}");
    }
}
