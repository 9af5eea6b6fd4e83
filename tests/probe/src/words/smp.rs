//! Soon.
use super::{Arguments, Outcome};
pub fn smp(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
