//! The jailer: builds the jail a mayfly runs in, drops privileges and executes the monitor.

fn main() {}
