//! The command lines: any words, for any subcommand.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::{ArgsError, Command, parse};
use crate::error::message;
use crate::fuzz::Input;
use crate::{attach, check, prepare, run};

/// Options of all subcommands, with those that have no value first.
const OPTIONS: [&str; 54] = [
    "--daemonize",
    "--new-pid-ns",
    "--quiet",
    "--same-disks",
    "-t",
    "-i",
    "--hold",
    "--reach-from-namespace",
    "--with-parent",
    "--merge",
    "--",
    "--id",
    "--exec-file",
    "--uid",
    "--gid",
    "--chroot-base-dir",
    "--netns",
    "--cgroup-version",
    "--parent-cgroup",
    "--cgroup",
    "--resource-limit",
    "--image",
    "--config",
    "--snapshot",
    "--working-set",
    "--kernel",
    "--cmdline",
    "--vcpus",
    "--interrupt-controller",
    "--memory",
    "--limit",
    "--console",
    "--log",
    "--timeout",
    "--end-with-fd",
    "--ready-fd",
    "--process",
    "--upper",
    "--net-from-namespace",
    "--template",
    "--net-namespace",
    "--words-fd",
    "--drive",
    "--net",
    "--env",
    "--tmpfs",
    "--copy-in",
    "--user",
    "--workdir",
    "--hostname",
    "--agent",
    "--mayfly",
    "--api-sock",
    "--snapshot-to",
];
const WITHOUT_VALUE: usize = 11;

/// Values that some option takes, and others.
const VALUES: [&str; 32] = [
    "1",
    "0",
    "2",
    "4294967294",
    "4294967295",
    "18446744073709551615",
    "a-1",
    "/srv/x",
    "/a:/b",
    "/a:/b:ro",
    "vda",
    "tap0",
    "tap0,mac=06:00:00:00:00:01",
    "cpu.shares=512",
    "fsize=1",
    "no-file=2",
    "0-1",
    "memory=64M",
    "A=b",
    "A",
    "/tmp:size=1m",
    "5",
    "1000:1000",
    "root=/dev/vda -- x",
    "box:/etc",
    ".",
    "",
    "a/../b",
    "-1",
    "1.5",
    "128M",
    "path=/x,ro",
];

/// Words, each an option, a value that some option takes, or any bytes. Checked: what is refused is
/// refused in one bounded line without control characters; of the compatible jail, what is taken is
/// taken in any order of its options, as the same.
pub fn jail_args(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let subcommand = input.below(8);
    let mut groups: Vec<Vec<OsString>> = Vec::new();
    if subcommand == 0 {
        // What it cannot be without.
        for (option, value) in [
            ("--id", "a"),
            ("--exec-file", "/m"),
            ("--uid", "1"),
            ("--gid", "1"),
        ] {
            groups.push(vec![option.into(), value.into()]);
        }
    }
    while !input.is_empty() && groups.len() < 64 {
        groups.push(match input.below(OPTIONS.len() + 6) {
            option @ ..WITHOUT_VALUE => vec![OPTIONS[option].into()],
            option if option < OPTIONS.len() => vec![OPTIONS[option].into(), value(input)],
            _ => vec![value(input)],
        });
    }
    let words = groups.concat();
    let longest = words.iter().map(|word| word.len()).max().unwrap_or(0);
    let refused = |error: ArgsError| {
        let text = message(&error);
        assert!(!text.contains(char::is_control));
        assert!(text.len() < 1000 + 8 * longest, "{text}");
    };
    match subcommand {
        0 | 1 => match parse(words.clone()) {
            Ok(Command::Compatible(one)) => check_compatible(*one, groups),
            Ok(_) => {}
            Err(error) => refused(error),
        },
        2..=4 => drop(run::spec::options::parse(words).map_err(refused)),
        5 => {
            drop(check::parse(words.clone()).map_err(refused));
            drop(prepare::parse(words).map_err(refused));
        }
        6 => {
            drop(attach::parse_exec(words.clone()).map_err(refused));
            drop(attach::parse_copy(words).map_err(refused));
        }
        _ => {
            for name in ["start", "signal", "state"] {
                drop(attach::parse_control(name, words.clone()).map_err(refused));
            }
        }
    }
}

fn value(input: &mut Input<'_>) -> OsString {
    match input.below(VALUES.len() + 4) {
        choice if choice < VALUES.len() => VALUES[choice].into(),
        _ => {
            let len = input.below(80);
            OsString::from_vec(input.bytes(len).to_vec())
        }
    }
}

fn check_compatible(one: super::Compatible, mut groups: Vec<Vec<OsString>>) {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    assert!((1..=64).contains(&one.id.len()) && one.id.bytes().all(is_plain));
    for name in one.parent_cgroup.iter().flatten() {
        assert!(name != "." && name != ".." && !name.is_empty());
        assert!(!name.as_encoded_bytes().contains(&b'/'));
    }
    for value in &one.cgroups {
        assert!(
            !value.file.contains('/') && value.file.contains('.') && !value.text.contains('\n')
        );
    }
    // Values of one file count in their order, and so do words for the monitor.
    let count = |name: &str| groups.iter().flatten().filter(|word| *word == name).count();
    if count("--cgroup") < 2 && count("--resource-limit") < 2 && count("--") == 0 {
        groups.reverse();
        assert_eq!(
            parse(groups.concat()).ok(),
            Some(Command::Compatible(Box::new(one)))
        );
    }
}
