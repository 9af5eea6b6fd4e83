//! What `tools/bench` runs.

fn main() {}
