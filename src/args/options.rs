//! The options there are, and the help that lists them.

use crate::wire::API_VERSION;

/// One option.
pub(super) struct Opt {
    pub name: &'static str,
    /// What its value is called in the help; empty for one that takes none.
    pub value: &'static str,
    help: &'static str,
}

const fn option(name: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { name, value, help }
}

/// All options, in the order of the help.
pub(super) const OPTIONS: &[Opt] = &[
    option(
        "api-fd",
        "fd",
        "Serve the API on this inherited socket, which listens.",
    ),
    option(
        "api-sock",
        "path",
        "Where to make the API socket. [default: /run/firecracker.socket]",
    ),
    option(
        "boot-protocol",
        "pvh|linux64",
        "Enter the kernel this way, whatever it offers.",
    ),
    option(
        "boot-timer",
        "",
        "Log the time from start until the guest says it has booted.",
    ),
    option(
        "config-file",
        "path",
        "Boot this configuration, in JSON, at once.",
    ),
    option(
        "console-fd",
        "fd",
        "Serve clients of the guest's console on this inherited socket, which listens.",
    ),
    option(
        "describe-snapshot",
        "path",
        "Print the format version of this snapshot.",
    ),
    option(
        "end-fd",
        "fd",
        "Write how the guest ended, in a word, to this inherited pipe or file.",
    ),
    option(
        "guest-exit-code",
        "",
        "End with the exit code that the guest wrote to port 0x610, if it then resets or powers off.",
    ),
    option("help", "", "Print this."),
    option(
        "http-api-max-payload-size",
        "bytes",
        "Largest body of an API request. [default: 51200]",
    ),
    option(
        "id",
        "id",
        "Name of this microVM. [default: anonymous-instance]",
    ),
    option("kvm-fd", "fd", "Use this inherited /dev/kvm."),
    option(
        "landlock",
        "",
        "Give up all access to files by name, with Landlock.",
    ),
    option("level", "level", "Least important lines of the log."),
    option(
        "log-fd",
        "fd",
        "Write the log to this inherited file or pipe.",
    ),
    option(
        "log-format",
        "text|json",
        "Shape of the log's lines. [default: text]",
    ),
    option(
        "log-path",
        "path",
        "File or FIFO for the log, instead of stdout.",
    ),
    option("metrics-path", "path", "File or FIFO for metrics."),
    option("module", "path", "Log only what this module says."),
    option(
        "no-api",
        "",
        "Make no API socket; needs --config-file or --snapshot.",
    ),
    option(
        "no-seccomp",
        "",
        "Install no system call filters. For debugging only.",
    ),
    option("parent-cpu-time-us", "us", "CPU time that the jailer used."),
    option("show-level", "", "Write levels into the log."),
    option(
        "show-log-origin",
        "",
        "Write file names and lines into the log.",
    ),
    option(
        "snapshot",
        "dir|fd:N,fd:M",
        "Resume the snapshot whose files are `state` and `memory` in this directory, or in these \
         inherited descriptors.",
    ),
    option(
        "snapshot-version",
        "",
        "Print the version of the snapshot format.",
    ),
    option(
        "start-time-cpu-us",
        "us",
        "CPU time of the jailer at its start.",
    ),
    option("start-time-us", "us", "Time of the jailer's start."),
    option("version", "", "Print the version."),
];

/// Options of Firecracker's without a meaning here, and why.
pub(super) const NOT_OFFERED: &[(&str, &str)] = &[
    ("enable-pci", "devices are on virtio-mmio, there is no PCI"),
    ("metadata", "there is no metadata service"),
    ("mmds-size-limit", "there is no metadata service"),
    ("seccomp-filter", "the filters are part of the program"),
];

/// Options that say the same in different ways.
pub(super) const EXCLUDE: &[(&str, &str)] = &[
    ("api-fd", "api-sock"),
    ("api-fd", "no-api"),
    ("config-file", "snapshot"),
    ("log-fd", "log-path"),
];

/// What `--help` prints.
pub fn help() -> String {
    let mut text = format!("{}\n\nOptions:\n", version());
    for opt in OPTIONS {
        let left = if opt.value.is_empty() {
            format!("--{}", opt.name)
        } else {
            format!("--{} <{}>", opt.name, opt.value)
        };
        text.push_str(&format!("  {left:<38} {}\n", opt.help));
    }
    text
}

/// What `--version` prints.
pub fn version() -> String {
    format!(
        "mayfly v{} (API of Firecracker v{API_VERSION})",
        env!("CARGO_PKG_VERSION")
    )
}
