//! Compiles the seccomp filters of the empty jail, `resources/seccomp/jail/<arch>`.

#[path = "../resources/seccomp/compile.rs"]
mod compile;

use std::path::Path;
use std::{env, error::Error};

use seccompiler::sock_filter;

/// What is denied with EPERM, and what looks absent (ENOSYS).
const CATEGORIES: [&str; 2] = ["denied", "absent"];

/// These filters allow what they do not name, and name calls by their x86_64 numbers: a call by its
/// x32 number (from 0x4000_0000 on), which would pass them, ends the process.
const NO_X32: [sock_filter; 3] = [
    // The number, which is what `struct seccomp_data` begins with.
    step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
    step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, 0x4000_0000),
    step(
        libc::BPF_RET | libc::BPF_K,
        0,
        libc::SECCOMP_RET_KILL_PROCESS,
    ),
];

/// An instruction that goes on `jf` later where it compares and that does not hold.
const fn step(code: u32, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?)
        .join("../resources/seccomp/jail")
        .join(&arch);
    let into = Path::new(&env::var("OUT_DIR")?).join("filters.rs");
    compile::compile(&folder, &arch, &CATEGORIES, &NO_X32, &into)
}
