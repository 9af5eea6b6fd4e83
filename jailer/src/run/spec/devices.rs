//! What `--drive` and `--net` say of one disk or interface: where it is, and settings at the end, each `:NAME=VALUE`. Pure.

use mayfly::wire::Source;
use mayfly::wire::config::{
    Cache, CacheType, Drive, DriveOverlay, RateLimiterConfig, TokenBucketConfig,
};
use mayfly::wire::limits::{POLL_US_MAX, QUEUES_MAX};

use super::options::{size, source};
use super::{OWN_TAP, OwnTap};
use crate::args::{self, Why};

/// The last setting of `text` and what is before it, if its name is one of `names`: else that is part of a path.
fn last_setting<'a>(
    text: &'a str,
    names: &[&'static str],
) -> Option<(&'a str, &'static str, &'a str)> {
    let (rest, last) = text.rsplit_once(':')?;
    let (name, value) = last.split_once('=')?;
    let name = names.iter().find(|known| **known == name)?;
    Some((rest, name, value))
}

/// Puts what was read where nothing may be yet.
fn once<T>(place: &mut Option<T>, name: &str, value: T) -> Result<(), Why> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!(":{name}= is given twice").into()),
    }
}

fn queues(value: &str) -> Result<u16, Why> {
    let number = value.parse().ok();
    number
        .filter(|number| (1..=QUEUES_MAX).contains(&usize::from(*number)))
        .ok_or_else(|| format!("queues={value} is not a number from 1 to {QUEUES_MAX}").into())
}

fn poll_us(value: &str) -> Result<u16, Why> {
    let number = value.parse().ok();
    number
        .filter(|number| *number <= POLL_US_MAX)
        .ok_or_else(|| format!("poll_us={value} is not a number from 0 to {POLL_US_MAX}").into())
}

/// So much a second.
fn rate(name: &str, value: &str) -> Result<TokenBucketConfig, Why> {
    let Some(size) = size(value).filter(|size| *size > 0) else {
        let why = format!("{name}={value} is not a number above 0, or one with K, M or G");
        return Err(why.into());
    };
    Ok(TokenBucketConfig {
        size,
        one_time_burst: None,
        refill_time: 1000,
    })
}

/// What a `--drive` says.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenDrive {
    /// The image, or the base of the overlay.
    pub image: Source,
    /// The guest may only read it.
    pub read_only: bool,
    /// What takes the guest's writes.
    pub overlay: Option<DriveOverlay>,
    /// The settings at the end.
    pub settings: DriveSettings,
}

/// Settings of a drive, those that are given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DriveSettings {
    queues: Option<u16>,
    cache: Option<(CacheType, Option<Cache>)>,
    poll_us: Option<u16>,
    bandwidth: Option<TokenBucketConfig>,
    ops: Option<TokenBucketConfig>,
}

impl DriveSettings {
    const NAMES: [&str; 5] = ["queues", "cache", "poll_us", "bandwidth", "ops"];

    fn set(&mut self, name: &str, value: &str) -> Result<(), Why> {
        match name {
            "queues" => once(&mut self.queues, name, queues(value)?),
            "cache" => once(&mut self.cache, name, cache(value)?),
            "poll_us" => once(&mut self.poll_us, name, poll_us(value)?),
            "bandwidth" => once(&mut self.bandwidth, name, rate(name, value)?),
            _ => once(&mut self.ops, name, rate(name, value)?),
        }
    }

    /// The name of the first that is given.
    pub fn first(&self) -> Option<&'static str> {
        let given = [
            self.queues.is_some(),
            self.cache.is_some(),
            self.poll_us.is_some(),
            self.bandwidth.is_some(),
            self.ops.is_some(),
        ];
        let mut names = Self::NAMES.into_iter().zip(given);
        names.find_map(|(name, is_given)| is_given.then_some(name))
    }
}

fn cache(value: &str) -> Result<(CacheType, Option<Cache>), Why> {
    Ok(match value {
        "unsafe" => (CacheType::Unsafe, None),
        "writeback" => (CacheType::Writeback, None),
        "none" => (CacheType::default(), Some(Cache::Bypassed)),
        _ => return Err(format!("cache={value} is none of unsafe, writeback and none").into()),
    })
}

impl GivenDrive {
    /// The drive of a new machine.
    pub fn into_drive(self, id: String) -> Drive {
        let settings = self.settings;
        let (cache_type, cache) = settings.cache.unwrap_or_default();
        let limiter = RateLimiterConfig {
            bandwidth: settings.bandwidth,
            ops: settings.ops,
        };
        Drive {
            is_read_only: Some(self.read_only),
            overlay: self.overlay,
            cache_type,
            cache,
            rate_limiter: RateLimiterConfig::in_force(Some(limiter)),
            poll_us: settings.poll_us,
            queues: settings.queues,
            ..Drive::new(id, self.image)
        }
    }
}

/// Reads `FILE`, `FILE:ro`, `FILE:overlay=FILE` or `FILE:overlay=memory`, with settings at the end, before or after
/// `:ro`; a file of the name memory is written `./memory`. `FILE:rw` is `FILE`, also where its name ends with `:ro`.
pub fn drive(text: &str) -> Result<GivenDrive, Why> {
    let mut settings = DriveSettings::default();
    let (mut text, mut read_only, mut has_mode) = (text, false, false);
    loop {
        if let Some((rest, name, value)) = last_setting(text, &DriveSettings::NAMES) {
            settings.set(name, value)?;
            text = rest;
        } else if let (false, Some(rest)) = (has_mode, text.strip_suffix(":ro")) {
            (read_only, has_mode) = (true, true);
            text = rest;
        } else if let (false, Some(rest)) = (has_mode, text.strip_suffix(":rw")) {
            has_mode = true;
            text = rest;
        } else {
            break;
        }
    }
    let (image, overlay) = match text.split_once(":overlay=") {
        Some((image, place)) => (image, Some(overlay(place, read_only)?)),
        None => (text, None),
    };
    Ok(GivenDrive {
        image: image.into(),
        read_only,
        overlay,
        settings,
    })
}

fn overlay(place: &str, read_only: bool) -> Result<DriveOverlay, Why> {
    if read_only {
        return Err("a disk with an overlay is written to; leave out :ro, or give an overlay whose name does not end so".into());
    }
    match place {
        "memory" => Ok(DriveOverlay::Memory { memory: true }),
        path if path.starts_with("fd:") => Err(
            "an overlay is memory, or a file by its path; write ./ before one of such a name"
                .into(),
        ),
        path => Ok(DriveOverlay::File {
            path_on_host: path.into(),
        }),
    }
}

/// What a network interface is connected to, and whether that is made in the jail.
#[derive(Debug)]
pub struct GivenNet {
    /// The tap.
    pub tap: Source,
    /// How it is made in the jail.
    pub own: Option<OwnTap>,
    /// How many pairs of queues the guest may use.
    pub queues: Option<u16>,
    /// How long its thread looks for work.
    pub poll_us: Option<u16>,
}

impl GivenNet {
    /// The name of the first setting that is given.
    pub fn first_setting(&self) -> Option<&'static str> {
        match (self.queues, self.poll_us) {
            (Some(_), _) => Some("queues"),
            (None, Some(_)) => Some("poll_us"),
            (None, None) => None,
        }
    }
}

/// Reads what [`connection`] does, with settings at the end.
pub fn net(text: &str) -> Result<GivenNet, Why> {
    let (mut text, mut pairs, mut polling) = (text, None, None);
    while let Some((rest, name, value)) = last_setting(text, &["queues", "poll_us"]) {
        match name {
            "queues" => once(&mut pairs, name, queues(value)?)?,
            _ => once(&mut polling, name, poll_us(value)?)?,
        }
        text = rest;
    }
    let (tap, own) = connection(text)?;
    if pairs.is_some() && tap.name().is_none_or(|name| name == OWN_TAP) {
        return Err("only a tap of the host, by its name, can have several queues here".into());
    }
    Ok(GivenNet {
        tap,
        own,
        queues: pairs,
        poll_us: polling,
    })
}

fn connection(text: &str) -> Result<(Source, Option<OwnTap>), Why> {
    Ok(match text {
        "auto" => (OWN_TAP.into(), Some(OwnTap::Auto)),
        "user" => (OWN_TAP.into(), Some(OwnTap::User)),
        _ => match text.strip_prefix("fd:") {
            Some(number) => (Source::fd(args::descriptor(number)?.unsigned_abs()), None),
            None => (source(text)?, None),
        },
    })
}

#[cfg(test)]
mod tests {
    use mayfly::wire::config::NetworkInterface;

    use super::super::options::{Machine, parse};
    use super::*;

    /// The disks and interfaces of a new machine.
    fn devices(text: &str) -> (Vec<Drive>, Vec<NetworkInterface>) {
        let words = ["--kernel", "k"].into_iter().chain(text.split(' '));
        let parsed = parse(words.map(Into::into).collect()).unwrap().unwrap();
        let Machine::Plain(config, _) = parsed.machine else {
            panic!("{text}: {parsed:?}")
        };
        (config.devices.drives, config.devices.network_interfaces)
    }

    fn file(path: &str) -> Option<DriveOverlay> {
        Some(DriveOverlay::File {
            path_on_host: path.into(),
        })
    }

    #[test]
    fn drive_when_it_has_an_overlay_says_where_that_is() {
        let (drives, _) = devices("--drive a:overlay=b --drive c:ro:overlay=memory");
        let [first, second] = &drives[..] else {
            panic!("{drives:?}")
        };
        assert_eq!(
            (&first.path_on_host, &first.overlay),
            (&"a".into(), &file("b"))
        );
        assert_eq!(second.path_on_host, "c:ro".into());
        assert_eq!(second.overlay, Some(DriveOverlay::Memory { memory: true }));
        assert!(!first.read_only() && !second.read_only());
        assert_eq!(
            drive("a:overlay=./memory").unwrap().overlay,
            file("./memory")
        );
        let refused = drive("a:overlay=b:ro").unwrap_err();
        assert!(refused.contains("leave out :ro"), "{refused}");
        assert!(drive("a:overlay=fd:3").is_err());
    }

    #[test]
    fn net_when_it_has_several_queues_is_a_tap_by_its_name() {
        let given = net("tap0:queues=4").unwrap();
        assert_eq!((given.tap, given.queues), ("tap0".into(), Some(4)));
        assert_eq!(net("tap0").unwrap().queues, None);
        for text in [
            "auto:queues=2",
            "user:queues=2",
            "fd:9:queues=2",
            "tap0:queues=0",
            "tap0:queues=2:queues=2",
        ] {
            assert!(net(text).is_err(), "{text}");
        }
        let (_, interfaces) = devices("--net tap0:poll_us=7:queues=3 --net fd:9:poll_us=0");
        assert_eq!(interfaces[0].host_dev_name, "tap0".into());
        assert_eq!(
            (interfaces[0].queues, interfaces[0].poll_us),
            (Some(3), Some(7))
        );
        assert_eq!(interfaces[1].host_dev_name, Source::fd(9));
        assert_eq!(interfaces[1].poll_us, Some(0));
    }

    #[test]
    fn drive_when_it_has_several_queues_says_how_many() {
        for (text, image, read_only, queues) in [
            ("a", "a", false, None),
            ("a:queues=1", "a", false, Some(1)),
            ("a:ro:queues=16", "a", true, Some(16)),
            ("a:queues=16:ro", "a", true, Some(16)),
            ("a:ro:ro", "a:ro", true, None),
            ("a:queues", "a:queues", false, None),
            ("a:size=4", "a:size=4", false, None),
        ] {
            let given = drive(text).unwrap();
            assert_eq!(given.image, image.into(), "{text}");
            assert_eq!(
                (given.read_only, given.settings.queues),
                (read_only, queues),
                "{text}"
            );
        }
        for text in ["a:queues=0", "a:queues=17", "a:queues=", "a:queues=x"] {
            assert!(drive(text).is_err(), "{text}");
        }
        let (drives, _) = devices("--drive a:queues=3");
        assert_eq!(drives[0].queues, Some(3));
    }

    #[test]
    fn drive_when_it_has_settings_is_what_the_same_configuration_in_json_is() {
        let read = |json: &str| serde_json::from_str::<Drive>(json).unwrap();
        let base = r#""drive_id":"root","path_on_host":"a","is_root_device":true"#;
        let per_second = |count: u32| format!(r#"{{"size":{count},"refill_time":1000}}"#);
        for (text, read_only, json) in [
            ("a:cache=none", false, r#""cache":"none""#.to_owned()),
            (
                "a:cache=writeback",
                false,
                r#""cache_type":"Writeback""#.to_owned(),
            ),
            (
                "a:cache=unsafe",
                false,
                r#""cache_type":"Unsafe""#.to_owned(),
            ),
            ("a:poll_us=1000", false, r#""poll_us":1000"#.to_owned()),
            (
                "a:ops=50",
                false,
                format!(r#""rate_limiter":{{"ops":{}}}"#, per_second(50)),
            ),
            (
                "a:ro:bandwidth=2K:cache=none:queues=2:ops=9:poll_us=0",
                true,
                format!(
                    r#""rate_limiter":{{"bandwidth":{},"ops":{}}},"cache":"none","queues":2,"poll_us":0"#,
                    per_second(2048),
                    per_second(9)
                ),
            ),
            (
                "a:overlay=b:cache=writeback",
                false,
                r#""overlay":{"path_on_host":"b"},"cache_type":"Writeback""#.to_owned(),
            ),
        ] {
            let (drives, _) = devices(&format!("--drive {text}"));
            let expected = read(&format!(r#"{{{base},"is_read_only":{read_only},{json}}}"#));
            assert_eq!(drives, [expected], "{text}");
        }
    }

    #[test]
    fn drive_when_a_setting_is_wrong_says_what() {
        for (text, why) in [
            ("a:cache=None", "none of unsafe, writeback and none"),
            ("a:cache=", "none of unsafe"),
            ("a:poll_us=1001", "from 0 to 1000"),
            ("a:poll_us=-1", "from 0 to 1000"),
            ("a:bandwidth=0", "above 0"),
            ("a:ops=x", "above 0"),
            ("a:cache=none:ro:cache=unsafe", ":cache= is given twice"),
        ] {
            let refused = drive(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn drive_whose_name_ends_as_a_mode_can_be_named_with_each_of_them() {
        for (text, image, read_only) in [
            ("a:rw", "a", false),
            ("a:ro:ro", "a:ro", true),
            ("a:ro:rw", "a:ro", false),
            ("a:ro:rw:queues=2", "a:ro", false),
            ("a:ro:queues=2:rw", "a:ro", false),
            ("a:rw:rw", "a:rw", false),
        ] {
            let drive = drive(text).unwrap();
            assert_eq!(
                (drive.image, drive.read_only),
                (image.into(), read_only),
                "{text}"
            );
        }
        let drive = drive("a:ro:rw:overlay=memory");
        assert_eq!(drive.unwrap().image, "a:ro:rw".into(), "only at the end");
    }
}
