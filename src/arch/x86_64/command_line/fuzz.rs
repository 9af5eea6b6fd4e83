//! Kernel command lines, against a reader that is written after Linux's own (`lib/cmdline.c`, `next_arg`,
//! and `kernel/params.c`, `parse_args`).

use super::{CommandLineError, Root, acpi_is_off, command_line};
use crate::arch::layout;
use crate::fuzz::Input;

/// Boot arguments of any text, a root or none, and some devices. Checked of a line that is made: it fits
/// and has no zero byte; a kernel finds in it what it would find in the arguments alone, then what was
/// added and nothing else; init finds what it would find.
pub fn cmdline(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let devices: Vec<(u64, u32)> = (0..input.below(20) as u32)
        .map(|n| (layout::VIRTIO_MMIO + u64::from(n) * 0x1000, 5 + n))
        .collect();
    let root = input.flag().then(|| Root {
        partuuid: input.one_of(&[None, Some("0eaa91a0-01")]),
        read_only: input.flag(),
    });
    let copies = 1 + input.below(40);
    let text = String::from_utf8_lossy(input.bytes(usize::MAX)).repeat(copies);
    let _ = acpi_is_off(&text);
    let line = match command_line(&text, root, &devices) {
        Ok(line) => line,
        Err(CommandLineError::ZeroByte) => return assert!(text.contains('\0')),
        Err(error @ CommandLineError::TooLong { .. }) => {
            assert!(error.to_string().len() < 200);
            // What is added is short: 19 devices take some 700 bytes.
            return assert!(text.len() + 1000 > layout::COMMAND_LINE_MAX);
        }
    };
    assert!(line.len() < layout::COMMAND_LINE_MAX && !line.contains('\0'));
    let mut added = vec!["pci=off".to_owned()];
    if let Some(root) = root {
        added.push(format!(
            "root={}",
            root.partuuid
                .map_or("/dev/vda".into(), |id| format!("PARTUUID={id}"))
        ));
        added.push(if root.read_only { "ro" } else { "rw" }.into());
    }
    added.extend(
        devices
            .iter()
            .map(|(at, irq)| format!("virtio_mmio.device=4K@{at:#x}:{irq}")),
    );
    let (mut kernel, init, is_open) = read(&text);
    if is_open {
        // What is in a quote that does not end is the user's.
        return;
    }
    kernel.extend(added);
    assert_eq!(read(&line), (kernel, init, false), "{text:?} {line:?}");
}

/// The words for the kernel, what is for init, and whether a quote is open at the end.
fn read(line: &str) -> (Vec<String>, Vec<String>, bool) {
    let (mut kernel, mut init) = (Vec::new(), None::<Vec<String>>);
    let (mut word, mut is_quoted) = (String::new(), false);
    for character in line.chars().chain([' ']) {
        is_quoted ^= character == '"';
        // Linux's isspace.
        if !matches!(character, '\t'..='\r' | ' ') || is_quoted {
            word.push(character);
            continue;
        }
        let word = std::mem::take(&mut word);
        match &mut init {
            _ if word.is_empty() => {}
            Some(init) => init.push(word),
            None if word == "--" => init = Some(Vec::new()),
            None => kernel.push(word),
        }
    }
    (kernel, init.unwrap_or_default(), is_quoted)
}
