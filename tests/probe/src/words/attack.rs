//! Soon.
use super::{Arguments, Outcome};
pub fn attack(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
