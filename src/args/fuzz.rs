//! The command line: any words.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::options::OPTIONS;
use super::{Asked, parse};
use crate::exit;
use crate::fuzz::Input;

/// Words, each an option by its number or any bytes. Checked: one that is refused is refused with one
/// line of a bounded length and a code for that; one that is taken is taken in any order of its options,
/// as the same; options that exclude each other are not both there.
pub fn args(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut groups: Vec<Vec<OsString>> = Vec::new();
    while !input.is_empty() {
        let option = &OPTIONS[input.below(OPTIONS.len())];
        let name = OsString::from(format!("--{}", option.name));
        let len = input.below(256);
        match len {
            // Any word where an option is to be.
            200.. => groups.push(vec![OsString::from_vec(input.bytes(len - 200).to_vec())]),
            _ if option.value.is_empty() => groups.push(vec![name]),
            _ => groups.push(vec![name, value(len, input)]),
        }
    }
    let asked = parse(groups.concat());
    match &asked {
        Ok(Asked::Run(args)) => {
            assert!(args.api_fd.is_none() || args.api_sock.is_none());
            assert!(args.config_file.is_none() || args.snapshot.is_none());
            assert!((1..=64).contains(&args.id.len()));
            let may_be_in = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            assert!(args.id.bytes().all(may_be_in));
        }
        Ok(_) => {}
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains(char::is_control), "{text:?}");
            let longest = groups.iter().flatten().map(|it| it.len()).max();
            assert!(text.len() < 300 + 10 * longest.unwrap_or(0));
            let code = error.exit_code();
            assert!(code == exit::BAD_ARGUMENTS || code == exit::BAD_LOG_LEVEL);
        }
    }
    // A lone `--` ends the options: order counts there.
    if asked.is_ok() && !groups.iter().flatten().any(|word| word == "--") {
        groups.reverse();
        assert_eq!(parse(groups.concat()), asked);
    }
}

/// Values that some option takes, and others.
fn value(choice: usize, input: &mut Input<'_>) -> OsString {
    const VALUES: [&str; 16] = [
        "1",
        "0",
        "4294967295",
        "4294967296",
        "18446744073709551615",
        "fd:3,fd:4",
        "fd:3",
        "text",
        "json",
        "pvh",
        "linux64",
        "Warning",
        "a-1",
        "/srv/snapshot",
        "--no-api",
        "",
    ];
    match VALUES.get(choice / 4) {
        Some(value) => value.into(),
        None => OsString::from_vec(input.bytes(choice - 60).to_vec()),
    }
}
