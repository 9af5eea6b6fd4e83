//! What a scope is told: properties, as busctl takes them. Pure.
//!
//! Limits come as the files of control groups, of version 1 or 2, and their texts. A file without a property
//! (devices, soft limits, swap of version 1) is written by this program alone.

use crate::bundle::resources::FileText;

/// No limit.
const INFINITY: u64 = u64::MAX;

/// A name and a value with its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    name: &'static str,
    kind: &'static str,
    words: Vec<String>,
    /// The version of systemd that knew it first; 0: all that are in use.
    pub since: u32,
}

impl Property {
    fn new(name: &'static str, kind: &'static str, word: impl ToString) -> Property {
        Property {
            name,
            kind,
            words: vec![word.to_string()],
            since: 0,
        }
    }

    fn since(self, since: u32) -> Property {
        Property { since, ..self }
    }
}

/// Adds a list of properties, with its length, to the words of a call.
pub fn add<'a>(words: &mut Vec<String>, properties: impl Iterator<Item = &'a Property>) {
    let at = words.len();
    let mut count = 0_usize;
    for property in properties {
        count += 1;
        words.extend([property.name, property.kind].map(str::to_owned));
        words.extend(property.words.iter().cloned());
    }
    words.insert(at, count.to_string());
}

/// Those of every scope. It has the process `pid`. `has_v1`: the host has control groups of version 1.
pub fn own(slice: &str, description: &str, pid: u32, has_v1: bool) -> Vec<Property> {
    let yes = |name| Property::new(name, "b", "true");
    let pids = Property {
        words: vec!["1".into(), pid.to_string()],
        ..Property::new("PIDs", "au", "")
    };
    vec![
        Property::new("Description", "s", description),
        Property::new("Slice", "s", slice),
        pids,
        yes("Delegate"),
        // One that failed is not kept.
        Property::new("CollectMode", "s", "inactive-or-failed"),
        // The engine ends its containers; systemd, when the host goes down, those that are left.
        Property::new("DefaultDependencies", "b", "false"),
        // With these, systemd makes groups of these controllers in version 1 too.
        yes("MemoryAccounting"),
        yes("CPUAccounting"),
        // Newer versions of systemd do not know the first one, and the second makes no group of version 1.
        yes(if has_v1 {
            "BlockIOAccounting"
        } else {
            "IOAccounting"
        }),
        yes("TasksAccounting"),
    ]
}

/// Limits, of the files that have a property. What cannot be understood is left to the kernel, which says why
/// when it is written.
pub fn limits(files: &[&FileText]) -> Vec<Property> {
    let text_of = |name: &str| {
        let mut found = files.iter().filter(|(file, _)| file == name);
        found.next_back().map(|(_, text)| text.trim())
    };
    let mut limits: Vec<Property> = files
        .iter()
        .filter_map(|(file, text)| limit(file, text.trim()))
        .collect();
    let (quota, period) = match text_of("cpu.max") {
        Some(text) => text.split_once(' ').unwrap_or((text, "100000")),
        None => (
            text_of("cpu.cfs_quota_us").unwrap_or_default(),
            text_of("cpu.cfs_period_us").unwrap_or_default(),
        ),
    };
    limits.extend(processor_time(quota, period));
    limits
}

fn limit(file: &str, text: &str) -> Option<Property> {
    let of_number = |name| Some(Property::new(name, "t", amount(text)?));
    let of_list = |name| {
        Some(Property {
            words: mask(text)?,
            ..Property::new(name, "ay", "").since(244)
        })
    };
    match file {
        "memory.max" => of_number("MemoryMax"),
        "memory.high" => of_number("MemoryHigh"),
        "memory.low" => of_number("MemoryLow"),
        "memory.min" => of_number("MemoryMin").map(|it| it.since(240)),
        "memory.swap.max" => of_number("MemorySwapMax"),
        "memory.limit_in_bytes" => of_number("MemoryLimit"),
        "cpu.weight" => of_number("CPUWeight"),
        "cpu.shares" => of_number("CPUShares"),
        "pids.max" => of_number("TasksMax"),
        "cpuset.cpus" => of_list("AllowedCPUs"),
        "cpuset.mems" => of_list("AllowedMemoryNodes"),
        _ => None,
    }
}

/// A number, or no limit, as either version says it.
fn amount(text: &str) -> Option<u64> {
    match text {
        "max" => Some(INFINITY),
        _ if text.starts_with('-') => Some(INFINITY),
        _ => text.parse().ok(),
    }
}

/// How systemd keeps a quota: in hundredths of a processor. It is not to be less than what was asked for.
const STEP_US: u64 = 10_000;

fn processor_time(quota: &str, period: &str) -> Vec<Property> {
    let Some((quota, period)) = amount(quota).zip(period.parse::<u64>().ok()) else {
        return Vec::new();
    };
    let per_second = match quota {
        INFINITY => INFINITY,
        _ => {
            let exact = u128::from(quota) * 1_000_000 / u128::from(period.max(1));
            let exact = u64::try_from(exact).unwrap_or(INFINITY - STEP_US);
            exact.div_ceil(STEP_US).saturating_mul(STEP_US)
        }
    };
    vec![
        Property::new("CPUQuotaPerSecUSec", "t", per_second),
        Property::new("CPUQuotaPeriodUSec", "t", period).since(242),
    ]
}

/// More processors than any host has.
const MASK_MAX: usize = 8192;

/// `0-2,8` as bytes, the lowest first, with their number.
fn mask(list: &str) -> Option<Vec<String>> {
    let mut bytes: Vec<u8> = Vec::new();
    for part in list.split(',').map(str::trim).filter(|it| !it.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MASK_MAX {
            return None;
        }
        for bit in first..=last {
            if bytes.len() <= bit / 8 {
                bytes.resize(bit / 8 + 1, 0);
            }
            *bytes.get_mut(bit / 8)? |= 1 << (bit % 8);
        }
    }
    let numbers = bytes.iter().map(u8::to_string);
    (!bytes.is_empty()).then(|| {
        [bytes.len().to_string()]
            .into_iter()
            .chain(numbers)
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<FileText> = files
            .iter()
            .map(|(file, text)| (file.to_string(), text.to_string()))
            .collect();
        let mut words = Vec::new();
        add(&mut words, limits(&files.iter().collect::<Vec<_>>()).iter());
        let mut told = vec![words.remove(0)];
        while !words.is_empty() {
            let length = match &*words[1] {
                "ay" => 3 + words[2].parse::<usize>().unwrap(),
                _ => 3,
            };
            told.push(words.drain(..length).collect::<Vec<_>>().join(" "));
        }
        told
    }

    #[test]
    fn limits_of_version_2_are_properties() {
        let files = [
            ("memory.max", "1000"),
            ("memory.swap.max", "max"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0-1,9"),
            ("cpuset.mems", "0"),
            ("pids.max", "100"),
            ("io.max", "8:0 rbps=7"),
        ];
        let expected = [
            "9",
            "MemoryMax t 1000",
            "MemorySwapMax t 18446744073709551615",
            "CPUWeight t 39",
            "AllowedCPUs ay 2 3 2",
            "AllowedMemoryNodes ay 1 1",
            "TasksMax t 100",
            "CPUQuotaPerSecUSec t 500000",
            "CPUQuotaPeriodUSec t 100000",
        ];
        assert_eq!(told(&files)[1..], expected[1..]);
        assert_eq!(told(&files)[0], (expected.len() - 1).to_string());
    }

    #[test]
    fn limits_of_version_1_are_properties() {
        let files = [
            ("memory.limit_in_bytes", "-1"),
            ("memory.memsw.limit_in_bytes", "3000"),
            ("cpu.shares", "1024"),
            ("cpu.cfs_period_us", "90000"),
            ("cpu.cfs_quota_us", "10000"),
            ("pids.max", "max"),
        ];
        let expected = [
            "5",
            "MemoryLimit t 18446744073709551615",
            "CPUShares t 1024",
            "TasksMax t 18446744073709551615",
            // 111,111 microseconds, not less.
            "CPUQuotaPerSecUSec t 120000",
            "CPUQuotaPeriodUSec t 90000",
        ];
        assert_eq!(told(&files), expected);
    }

    #[test]
    fn what_has_no_meaning_is_left_to_the_kernel() {
        for files in [
            [("memory.max", "1G"), ("cpu.max", "x 100000")],
            [("cpu.max", "1 x"), ("cpuset.cpus", "x")],
            [("cpuset.cpus", "0-99999999999"), ("cpuset.mems", "")],
            [("cpuset.cpus", "3-1"), ("pids.max", "")],
        ] {
            assert_eq!(told(&files), ["0"], "{files:?}");
        }
        let none = told(&[("cpu.max", "max 100000")]);
        assert_eq!(none[1], "CPUQuotaPerSecUSec t 18446744073709551615");
        let least = told(&[("cpu.cfs_quota_us", "1"), ("cpu.cfs_period_us", "0")]);
        assert_eq!(least[1], "CPUQuotaPerSecUSec t 1000000");
        let much = told(&[("cpu.max", "18446744073709551614 1")]);
        assert!(much[1].starts_with("CPUQuotaPerSecUSec t 1844"), "{much:?}");
    }

    #[test]
    fn scope_is_delegated_and_has_this_process() {
        let mut words = Vec::new();
        add(&mut words, own("a.slice", "of a b", 7, true).iter());
        let text = words.join(" ");
        let begins =
            "10 Description s of a b Slice s a.slice PIDs au 1 7 Delegate b true CollectMode s ";
        assert!(text.starts_with(begins), "{text}");
    }
}
