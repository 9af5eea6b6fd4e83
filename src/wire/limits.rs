//! How many and how large things may be.

pub use crate::sys::passed::PASSED_MAX as DESCRIPTORS_MAX;

/// Most vCPUs of one VM.
pub const VCPUS_MAX: u8 = 32;

/// Most devices of one VM: the interrupt lines 5 to 23.
pub const DEVICES_MAX: usize = 19;

/// Most queues of a drive, and pairs of queues of a network interface. Each is a thread and some ten
/// descriptors of the monitor's, and one processor of the host at most: more than that help none.
pub const QUEUES_MAX: usize = 16;

/// Bytes of a kernel command line, without the zero that ends it.
pub const COMMAND_LINE_MAX: usize = 2047;

/// Longest name of a network interface of the host (`IFNAMSIZ`, without the zero).
pub const TAP_NAME_MAX: usize = 15;

/// The least MTU that IPv4 allows.
pub const MTU_MIN: u16 = 68;

/// The longest that a device's thread may be told to look for work before it sleeps, in microseconds.
pub const POLL_US_MAX: u16 = 1000;

/// Longest `--id` in bytes.
pub const INSTANCE_ID_MAX: usize = 64;

/// Longest configuration file in bytes.
pub const CONFIG_FILE_MAX: u64 = 1 << 20;

/// Longest body of an API request in bytes, unless `--http-api-max-payload-size` says otherwise.
pub const BODY_MAX: usize = 51_200;

/// Longest answer of the API in bytes that a client takes.
pub const ANSWER_MAX: usize = 1 << 20;

/// Longest report of a guest's end in bytes: what a pipe takes in one piece.
pub const END_REPORT_MAX: usize = 4096;
