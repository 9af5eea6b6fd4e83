//! Command lines, and what they mean or why they are refused.

use super::super::OWN_TAP;
use super::*;
use crate::error::message;

fn line(text: &str) -> Result<Option<Options>, ArgsError> {
    parse(text.split_whitespace().map(OsString::from).collect())
}

fn options(text: &str) -> Options {
    line(text).unwrap().unwrap()
}

#[test]
fn the_first_drive_is_the_root_unless_the_command_line_names_one() {
    let is_root = |text: &str| match options(text).machine {
        Machine::Plain(config, _) => config.devices.drives[0].is_root_device,
        other => panic!("{other:?}"),
    };
    assert!(is_root("--kernel k --drive a"));
    assert!(is_root("--kernel k --cmdline quiet --drive a"));
    assert!(!is_root("--kernel k --cmdline root=/dev/vda2 --drive a"));
    assert!(!names_root("quiet -- root=x noroot=x") && names_root("quiet root=LABEL=x -- y"));
}

#[test]
fn parse_of_plain_options() {
    let options = options(
        "--kernel k --initrd i --cmdline --x --drive a --drive b:ro --net fd:7 \
         --net tap0 --net user --vcpus 2 --memory 1G --id x --timeout 1.5 --quiet --limit \
         cpus=1.5 --limit memory=1M --limit pids=5 --limit io=/dev/x:2K --console unix:/s \
         --with-parent --end-with-fd 9 --interrupt-controller kernel",
    );
    let Machine::Plain(config, own_tap) = options.machine else {
        panic!("{:?}", options.machine)
    };
    assert_eq!(own_tap, Some(OwnTap::User));
    let boot = config.boot_source.unwrap();
    assert_eq!(boot.kernel_image_path, "k".into());
    assert_eq!(boot.initrd_path, Some("i".into()));
    assert_eq!(boot.boot_args, Some("--x".into()));
    let [root, second] = &config.devices.drives[..] else {
        panic!("{:?}", config.devices.drives)
    };
    assert_eq!(
        (root.drive_id.as_str(), &root.path_on_host),
        ("root", &"a".into())
    );
    // The initrd is the root file system.
    assert!(!root.is_root_device && !root.read_only());
    assert!(second.read_only() && second.path_on_host == "b".into());
    let taps = config.devices.network_interfaces.into_iter();
    let taps: Vec<Source> = taps.map(|it| it.host_dev_name).collect();
    assert_eq!(taps, [Source::fd(7), "tap0".into(), OWN_TAP.into()]);
    let machine = config.machine_config.unwrap();
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (2, 1024));
    assert_eq!(machine.interrupt_controller, InterruptController::Kernel);
    assert_eq!(options.timeout, Some(Duration::from_millis(1500)));
    assert_eq!(options.console, Console::None);
    assert_eq!(options.console_socket, Some("/s".into()));
    assert_eq!(
        options.cgroups.limits,
        [
            Limit::Cpus(1500),
            Limit::Memory(1 << 20),
            Limit::Pids(5),
            Limit::Io("/dev/x".into(), 2048)
        ]
    );
    assert!(options.quiet && options.with_parent);
    assert_eq!(options.end_with_fd, Some(9));
}

#[test]
fn parse_of_a_snapshot_names_its_disks_and_taps_as_at_boot() {
    let options = options(
        "--snapshot d --drive a --drive data=b:ro --drive ./x=y --drive more=c:overlay=o --net tap0 --net e=user \
         --same-disks --ignore-cpu-differences --working-set w --snapshot-to t \
         --snapshot-and-continue",
    );
    let expected = Restoring {
        folder: "d".into(),
        drives: vec![
            ("root".into(), drive("a").unwrap()),
            ("data".into(), drive("b:ro").unwrap()),
            ("disk1".into(), drive("./x=y").unwrap()),
            ("more".into(), drive("c:overlay=o").unwrap()),
        ],
        taps: vec![("eth0".into(), "tap0".into()), ("e".into(), OWN_TAP.into())],
        working_set: Some("w".into()),
        same_disks: true,
        ignore_cpu_differences: true,
    };
    let user = Some(OwnTap::User);
    assert_eq!(options.machine, Machine::Snapshot(expected, user));
    assert_eq!(options.snapshot_to, Some("t".into()));
    assert!(options.snapshot_and_continue);
}

#[test]
fn parse_of_a_config_or_nothing() {
    assert_eq!(options("--config f").machine, Machine::Config("f".into()));
    assert_eq!(options("--api-sock s").machine, Machine::Client);
    assert!(line("--config f -h").unwrap().is_none());
}

#[test]
fn parse_when_wrong_says_what() {
    for (text, expected) in [
        ("--config f --kernel k", "describes the machine already"),
        ("--vcpus 1", "--kernel is missing"),
        ("--snapshot d --config c", "--config \"c\""),
        ("--snapshot d --kernel k", "--kernel \"k\""),
        ("--snapshot d --initrd k", "--initrd \"k\""),
        ("--snapshot d --cmdline k", "--cmdline \"k\""),
        ("--snapshot d --vcpus 1", "--vcpus \"1\""),
        ("--snapshot d --memory 1", "leave it out"),
        ("--snapshot d --interrupt-controller split", "leave it out"),
        (
            "--config f --interrupt-controller split",
            "describes the machine already",
        ),
        (
            "--kernel k --interrupt-controller pic",
            "auto, split and kernel",
        ),
        ("--snapshot d --drive a --drive root=b", "given twice"),
        ("--snapshot d --net a --net eth0=b", "given twice"),
        ("--snapshot d --drive a:queues=3", "leave out :queues="),
        ("--snapshot d --drive a:cache=none", "leave out :cache="),
        ("--snapshot d --drive a:poll_us=0", "leave out :poll_us="),
        ("--snapshot d --drive a:ops=9", "leave out :ops="),
        ("--snapshot d --net t:poll_us=0", "leave out :poll_us="),
        ("--snapshot d --net t:queues=2", "leave out :queues="),
        ("--kernel k --same-disks", "needs --snapshot"),
        ("--ignore-cpu-differences", "needs --snapshot"),
        ("--kernel k --working-set w", "needs --snapshot"),
        ("--kernel k --snapshot-and-continue", "needs --snapshot-to"),
        ("--nonsense", "not known"),
        ("--config", "value is missing"),
        ("--kernel k --kernel k", "given twice"),
        ("--kernel k --net fd:1", "descriptor above 2"),
        ("--kernel k --memory 5K", "MiB"),
        ("--kernel k --memory x", "MiB"),
        ("--kernel k --vcpus x", "not a number"),
        ("--config f --end-with-fd 2", "descriptor above 2"),
        ("--config f --timeout 0", "above 0"),
        ("--config f --timeout -1", "above 0"),
        ("--config f --limit x=1", "not known"),
        ("--config f --limit cpus=0", "above 0"),
        ("--config f --limit memory", "no ="),
        ("--config f --id a/b", "1 to 100 letters"),
        ("--config f --uid x", "--uid"),
        ("--kernel k --net user --net auto", "given twice"),
        ("--config f --resource-limit x=1", "not known"),
        (
            "--config f --resource-limit no-file=41",
            "no-file=43 or more",
        ),
    ] {
        let failure = message(&line(text).unwrap_err());
        assert!(failure.contains(expected), "{text}: {failure}");
    }
}
