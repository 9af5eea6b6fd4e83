//! The monitor's binary. All of it is in the library.

#[global_allocator]
static ALLOCATOR: mayfly::Allocator = mayfly::ALLOCATOR;

fn main() {
    mayfly::main();
}
