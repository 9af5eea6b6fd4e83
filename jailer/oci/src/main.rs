//! The binary of `mayfly-oci`. All of it is in the library, where fuzz targets find it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    mayfly_oci::main()
}
