//! `info`: what a state file says.

use std::fmt::Write;
use std::path::Path;

use mayfly::snapshot::{Header, version};
use serde_json::Value;

use crate::opened::{Failure, read_state};

/// Prints it.
pub fn run(path: &Path) -> Result<(), Failure> {
    let (header, state) = read_state(path)?;
    let state = state.parse::<Value>();
    let state = state.map_err(|refusal| Failure::of("state file", path, &refusal))?;
    print!("{}", text(&header, &state));
    Ok(())
}

fn text(header: &Header, state: &Value) -> String {
    let memory = &header.memory;
    let mut lines = vec![
        ("version", version(header.version)),
        ("id", header.id.to_string()),
        ("kind", format!("{:?}", header.kind)),
    ];
    if let Some(parent) = header.parent {
        lines.push(("parent", parent.to_string()));
    }
    lines.push(("taken", date(header.taken)));
    let check = memory
        .check
        .map_or("none".into(), |check| format!("{check:016x}"));
    lines.push((
        "memory",
        format!(
            "{} MiB ({} bytes), check value {check}",
            memory.len >> 20,
            memory.len
        ),
    ));
    lines.extend(machine(state));
    let mut text = String::new();
    for (name, value) in lines {
        // What a guest or a client may have put there does not get at the terminal.
        let value = value.replace(char::is_control, "?");
        let _ = writeln!(text, "{name:<10} {value}");
    }
    text
}

/// What the state tells of the machine, as far as its members are where they are expected.
fn machine(state: &Value) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let config = &state["config"];
    if let Some(count) = config["machine"]["vcpu_count"].as_u64() {
        lines.push(("vCPUs", count.to_string()));
    }
    if let Value::String(kernel) = &config["boot_source"]["kernel_image_path"] {
        lines.push(("kernel", kernel.clone()));
    }
    for (name, section, id, source) in [
        ("disk", "drives", "drive_id", "path_on_host"),
        ("network", "network-interfaces", "iface_id", "host_dev_name"),
    ] {
        for device in config["devices"][section].as_array().into_iter().flatten() {
            let id = device[id].as_str().unwrap_or_default();
            let source = match &device[source] {
                Value::String(name) => name.clone(),
                other => other.to_string(),
            };
            lines.push((name, format!("{id}: {source}")));
        }
    }
    lines
}

/// Nanoseconds since 1970 as a date, UTC.
fn date(nanos: u64) -> String {
    let seconds = nanos / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years (146,097 days), years that begin in March.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let millis = nanos % 1_000_000_000 / 1_000_000;
    let (hour, minute, second) = (rest / 3_600, rest % 3_600 / 60, rest % 60);
    format!("{year}-{month:02}-{day_of_month:02} {hour:02}:{minute:02}:{second:02}.{millis:03} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly::snapshot::{Kind, MemoryImage, SnapshotId};
    use serde_json::json;

    #[test]
    fn date_when_printed_is_that_of_the_calendar() {
        let second = 1_000_000_000;
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00.000 UTC"),
            (951_782_399, "2000-02-28 23:59:59.000 UTC"),
            (951_782_400, "2000-02-29 00:00:00.000 UTC"),
            (1_796_000_000, "2026-11-30 00:53:20.000 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00.000 UTC"),
        ] {
            assert_eq!(date(seconds * second), expected);
        }
        assert_eq!(date(u64::MAX), "2554-07-21 23:34:33.709 UTC");
    }

    #[test]
    fn text_when_printed_has_what_the_header_says_and_no_control_characters() {
        let header = Header {
            version: (1, 0),
            id: SnapshotId([1; 16]),
            kind: Kind::Diff,
            parent: Some(SnapshotId([2; 16])),
            memory: MemoryImage {
                len: 128 << 20,
                check: Some(255),
                id_at: 4096,
            },
            taken: 0,
        };
        let state = json!({"config": {"machine": {"vcpu_count": 2},
            "boot_source": {"kernel_image_path": "/srv/vmlinux"},
            "devices": {"drives": [{"drive_id": "root\u{1b}[0m", "path_on_host": {"fd": 3}}],
              "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}]}}});
        let text = text(&header, &state);
        for line in [
            "version    v1.0.0",
            "kind       Diff",
            "memory     128 MiB (134217728 bytes), check value 00000000000000ff",
            "vCPUs      2",
            "kernel     /srv/vmlinux",
            "disk       root?[0m: {\"fd\":3}",
            "network    eth0: tap0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
