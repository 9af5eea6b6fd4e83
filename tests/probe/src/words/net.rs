//! Soon.
use super::{Arguments, Outcome};
pub fn info(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
pub fn echo(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
pub fn count(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
pub fn send(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
pub fn ping(_: &mut Arguments) -> Outcome {
    Err("soon".into())
}
