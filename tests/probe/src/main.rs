//! The bare-metal probe guest.

fn main() {}
