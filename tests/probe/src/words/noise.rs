//! Soon.
use super::{Arguments, Outcome};
pub fn ports(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
pub fn mmio(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
