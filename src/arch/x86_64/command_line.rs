//! The kernel's command line: what was asked for, and what the kernel must be told besides.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::error::Error;
use std::fmt;

use super::layout;
use crate::wire::command_line::{parameters, split};

/// What the kernel is to mount as `/`.
#[derive(Clone, Copy, Debug)]
pub struct Root<'a> {
    /// The partition; without one the whole first disk.
    pub partuuid: Option<&'a str>,
    /// Mount it read-only.
    pub read_only: bool,
}

/// The command line would be longer than the kernel reads, or cannot be written down.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandLineError {
    /// No room.
    TooLong {
        /// What did not fit.
        word: String,
        /// Bytes that were left for it.
        room: usize,
    },
    /// A zero byte would end it early.
    ZeroByte,
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandLineError::TooLong { word, room } => {
                let len = word.len();
                write!(f, "the kernel command line is too long: ")?;
                if len <= 80 {
                    write!(f, "`{word}` takes {len} bytes and {room} are left")
                } else {
                    write!(f, "{len} bytes do not fit where {room} are left")
                }
            }
            CommandLineError::ZeroByte => write!(f, "the kernel command line has a zero byte"),
        }
    }
}

impl Error for CommandLineError {}

/// The command line: `boot_args` as given, then what mayfly adds, before any `--` that begins
/// the arguments of init. `devices` are address and interrupt line of each virtio device that is to be
/// announced there: all of them for a kernel without ACPI, none for one that finds them in its tables,
/// which would try to attach each a second time.
///
/// # Errors
/// [`CommandLineError`] when that is longer than [`layout::COMMAND_LINE_MAX`] with its closing
/// zero, or has a zero byte.
pub fn command_line(
    boot_args: &str,
    root: Option<Root<'_>>,
    devices: &[(u64, u32)],
) -> Result<String, CommandLineError> {
    if boot_args.contains('\0') || root.is_some_and(|r| r.partuuid.unwrap_or("").contains('\0')) {
        return Err(CommandLineError::ZeroByte);
    }
    let (line, init_args) = split(boot_args);
    let mut line = line.to_owned();
    let init_args = match init_args {
        "" => String::new(),
        args => format!(" -- {args}"),
    };
    let mut words = vec!["pci=off".to_owned()];
    if let Some(root) = root {
        words.push(match root.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None => "root=/dev/vda".to_owned(),
        });
        words.push(if root.read_only { "ro" } else { "rw" }.to_owned());
    }
    for (address, irq) in devices {
        words.push(format!("virtio_mmio.device=4K@{address:#x}:{irq}"));
    }

    let capacity = layout::COMMAND_LINE_MAX.saturating_sub(1);
    let room = |line: &String| {
        capacity
            .checked_sub(line.len())
            .and_then(|left| left.checked_sub(init_args.len()))
    };
    if room(&line).is_none() {
        return Err(CommandLineError::TooLong {
            word: boot_args.to_owned(),
            room: capacity,
        });
    }
    for word in words {
        let left = room(&line).unwrap_or(0);
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
        if room(&line).is_none() {
            return Err(CommandLineError::TooLong {
                word,
                room: left.saturating_sub(1),
            });
        }
    }
    line.push_str(&init_args);
    Ok(line)
}

/// Whether `boot_args` have Linux do without ACPI: the last `acpi=` that switches it counts. With
/// `acpi=rsdt` it looks for tables where there are none, and then goes on without.
pub fn acpi_is_off(boot_args: &str) -> bool {
    let (line, _) = split(boot_args);
    let mut off = false;
    for parameter in parameters(line) {
        match &*parameter {
            "acpi=off" => off = true,
            "acpi=force" => off = false,
            "acpi=rsdt" => return true,
            _ => {}
        }
    }
    off
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_when_devices_are_added_goes_before_init_args() {
        let root = |partuuid, read_only| {
            Some(Root {
                partuuid,
                read_only,
            })
        };
        let devices = [(0xc000_1000, 5), (0xc000_2000, 6)];
        for (args, root, devices, expected) in [
            ("", None, &[][..], "pci=off"),
            (" a=b  ", None, &[], "a=b pci=off"),
            (
                "quiet",
                root(None, false),
                &devices,
                "quiet pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 \
                 virtio_mmio.device=4K@0xc0002000:6",
            ),
            (
                "quiet -- single  -- x",
                root(Some("0eaa91a0-01"), true),
                &[],
                "quiet pci=off root=PARTUUID=0eaa91a0-01 ro -- single  -- x",
            ),
            ("a=\" -- \" b", None, &[], "a=\" -- \" b pci=off"),
            (
                "a=\" -- \" -- init",
                None,
                &[],
                "a=\" -- \" pci=off -- init",
            ),
            (" -- init", None, &[], "pci=off -- init"),
            ("a --", None, &[], "a pci=off"),
            ("-- init", None, &[], "pci=off -- init"),
            ("a\t--\tb", None, &[], "a pci=off -- b"),
            ("\"--\" a", None, &[], "pci=off -- a"),
        ] {
            assert_eq!(command_line(args, root, devices).unwrap(), expected);
        }
    }

    #[test]
    fn acpi_is_off_when_the_last_switch_says_so() {
        for (args, off) in [
            ("", false),
            ("acpi=off", true),
            ("quiet acpi=off panic=1", true),
            ("acpi=off acpi=force", false),
            ("acpi=force acpi=off acpi=strict", true),
            ("quiet -- acpi=off", false),
            ("pci=noacpi xacpi=off acpi=offline", false),
            // Linux on x86 knows no such value: it says so, and ACPI stays off.
            ("acpi=off acpi=on", true),
            // There is no such table.
            ("acpi=rsdt", true),
            ("acpi=rsdt acpi=force", true),
            // Quotes around a parameter and around its value are none of it.
            ("acpi=\"off\" quiet", true),
            ("\"acpi=off\"", true),
            ("dyndbg=\"file x acpi=off +p\"", false),
            ("a=\" -- \" acpi=off", true),
            ("acpi=off\tquiet\nro", true),
        ] {
            assert_eq!(acpi_is_off(args), off, "{args}");
        }
    }

    #[test]
    fn command_line_when_it_is_full_says_the_room_left() {
        let fits = 2047 - " pci=off".len();
        let line = command_line(&"x".repeat(fits), None, &[]).unwrap();
        assert_eq!(line.len(), 2047);
        let error = command_line(&"x".repeat(fits + 1), None, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: `pci=off` takes 7 bytes and 6 are left"
        );
        let devices = [(0xc000_1000, 5)];
        let error = command_line(&"x".repeat(2030), None, &devices).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: `virtio_mmio.device=4K@0xc0001000:5` takes 34 \
             bytes and 8 are left"
        );
        let error = command_line(&"x".repeat(3000), None, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is too long: 3000 bytes do not fit where 2047 are left"
        );
        assert_eq!(
            command_line("a\0b", None, &[]),
            Err(CommandLineError::ZeroByte)
        );
    }
}
