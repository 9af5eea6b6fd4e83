//! The compatible jail, with the real jailer and a witness in the monitor's place: what the witness
//! finds inside, what the host sees of it, and that a jail that cannot be built leaves nothing.
//!
//! They take root, and are skipped, loudly, without it.

#[path = "jail/host.rs"]
mod host;
#[path = "common/needs.rs"]
mod needs;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use host::{
    GID, Host, Report, Staying, UID, cgroup_mount, copy, descriptors, namespace, pid_in, status,
    wait_until,
};
use needs::needs;

/// The host for a test of this name, unless it has to be skipped.
macro_rules! host {
    ($name:literal) => {{
        needs!(root);
        Host::new($name)
    }};
}

#[test]
fn jail_has_the_layout_clients_expect() {
    let host = host!("layout");
    let report = Report::of(host.jailer("one", &[]));
    let (owner, name) = (format!("{UID} {GID}"), &host.name);
    for folder in ["/", "/dev", "/dev/net", "/run"] {
        assert_eq!(
            report.file(folder),
            format!("40700 {owner} - 0"),
            "{folder}"
        );
    }
    for (node, number) in [
        ("/dev/kvm", "10:232"),
        ("/dev/net/tun", "10:200"),
        ("/dev/urandom", "1:9"),
    ] {
        assert_eq!(report.file(node), format!("20600 {owner} {number} 1"));
    }
    if let Ok(device) = fs::metadata("/dev/userfaultfd") {
        // Numbers of this kind have a minor part below 2^20, split around the major one.
        let minor = (device.rdev() & 0xff) | ((device.rdev() >> 12) & 0xfff00);
        let expected = format!("20600 {owner} 10:{minor} 1");
        assert_eq!(report.file("/dev/userfaultfd"), expected);
    }
    assert_eq!(
        report.file(&format!("/{name}")),
        format!("100755 {owner} - 1")
    );
    assert_eq!(report.file(&format!("/{name}.pid")), "100644 0 0 - 1");
    assert_eq!(
        report.all("file").len(),
        if Path::new("/dev/userfaultfd").exists() {
            10
        } else {
            9
        }
    );
    for opened in report
        .all("open")
        .iter()
        .filter(|line| !line.contains("userfaultfd"))
    {
        // kvm, where the host has it.
        let there = Path::new(opened.split(' ').next().unwrap()).exists();
        assert_eq!(opened.ends_with(" yes"), there, "{opened}");
    }
    for way in [host.base().join(name), host.base().join(name).join("one")] {
        let meta = fs::metadata(&way).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o755, 0), "{way:?}");
    }
    assert_eq!(
        fs::read(host.exec_file()).unwrap(),
        fs::read(host.root("one").join(name)).unwrap()
    );
}

#[test]
fn monitor_gets_its_arguments_and_nothing_of_the_callers() {
    let host = host!("arguments");
    // A shell leaves descriptors open that a program of ours would not.
    let jailer = host.jailer(
        "one",
        &["--", "--id", "twice", "--api-sock", "/run/s", "--", "é"],
    );
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "exec 5</etc/passwd 7</ 9>&1; umask 0777; exec \"$0\" \"$@\"",
    ]);
    shell.arg(jailer.get_program()).args(jailer.get_args());
    shell.env("SECRET", "x").current_dir("/usr");

    let report = Report::of(shell);

    let args: Vec<&str> = report.all("arg").iter().map(String::as_str).collect();
    assert_eq!(args[0], format!("/{}", host.name));
    assert_eq!(args[1..4], ["--id", "one", "--start-time-us"]);
    assert_eq!(
        (args[5], args[7]),
        ("--start-time-cpu-us", "--parent-cpu-time-us")
    );
    let number = |at: usize| args[at].parse::<u64>().unwrap();
    assert!(
        number(4) > number(6) && number(6) >= number(8) && number(8) > 0,
        "{args:?}"
    );
    assert_eq!(
        args[9..],
        ["--id", "twice", "--api-sock", "/run/s", "--", "é"]
    );
    assert_eq!(report.all("env"), [] as [&str; 0]);
    assert_eq!(report.one("cwd"), "/");
    assert_eq!(report.one("umask"), "777");
    for (name, id) in [
        ("uid", UID),
        ("euid", UID),
        ("gid", GID),
        ("egid", GID),
        ("groups", 0),
    ] {
        assert_eq!(report.one(name), id.to_string(), "{name}");
    }
    assert_eq!(report.one("nofile"), "2048 2048");
    // The mask of the caller is the monitor's, not the jail's.
    assert!(report.file("/run").starts_with("40700 "));
    assert!(
        report
            .file(&format!("/{}.pid", host.name))
            .starts_with("100644 ")
    );
}

#[test]
fn process_has_no_privileges_descriptors_or_mounts_of_the_host() {
    let host = host!("process");
    let jailer = host.jailer("one", &[]);
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "exec 5</etc/passwd 7</; trap '' USR1; exec \"$0\" \"$@\"",
    ]);
    shell.arg(jailer.get_program()).args(jailer.get_args());
    let staying = Staying::start(&host, "one", shell, &[]);
    let (pid, own) = (staying.pid, std::process::id());
    assert_eq!(pid, staying.jailer_pid(), "the jailer became the monitor");
    assert_eq!(staying.report.one("pid"), pid.to_string());
    assert_eq!(descriptors(pid).into_keys().collect::<Vec<_>>(), [0, 1, 2]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Groups"), "");
    assert_eq!(status(pid, "SigBlk"), "0000000000000000");
    assert_eq!(status(pid, "Uid"), format!("{UID} {UID} {UID} {UID}"));
    assert_eq!(status(pid, "Gid"), format!("{GID} {GID} {GID} {GID}"));
    assert_ne!(namespace(pid, "mnt"), namespace(own, "mnt"));
    for kind in ["net", "pid", "ipc", "uts", "user", "cgroup"] {
        assert_eq!(namespace(pid, kind), namespace(own, kind), "{kind}");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert_eq!(
        fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap(),
        fs::read_to_string("/proc/self/cgroup").unwrap()
    );
    // Nothing shows on the host either.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&host.name), "{mounts}");
    staying.end();
}

#[test]
fn attacks_from_inside_fail() {
    let host = host!("attack");
    let victim = std::process::id().to_string();
    for more in [&[][..], &["--new-pid-ns"], &["--uid", "0", "--gid", "0"]] {
        let id = more
            .first()
            .map_or("plain", |flag| flag.trim_start_matches('-'));
        let as_root = id == "uid";
        let mut words: Vec<String> = vec!["--id".into(), id.into()];
        words.extend(["--exec-file".into(), host.exec_file().display().to_string()]);
        words.extend([
            "--chroot-base-dir".into(),
            host.base().display().to_string(),
        ]);
        if !as_root {
            words.extend([
                "--uid".into(),
                UID.to_string(),
                "--gid".into(),
                GID.to_string(),
            ]);
        }
        words.extend(more.iter().map(|&word| word.to_owned()));
        words.extend(["--", "--attack", "--victim", &victim].map(str::to_owned));
        let report = Report::of(host.bare(&words));
        let outcomes = report.all("attack");
        assert!(outcomes.len() > 10, "{report:?}");
        // A monitor told to run as root is root to other processes and to its own files.
        let as_told = ["setuid", "setgid", "signal", "limits", "chown"];
        for outcome in outcomes {
            let allowed = as_root && as_told.iter().any(|name| outcome.starts_with(name));
            assert!(outcome.ends_with(" refused") || allowed, "{id}: {outcome}");
        }
    }
}

#[test]
fn root_as_asked_for_keeps_three_capabilities() {
    let host = host!("uid0");
    let words = ["--id", "one", "--uid", "0", "--gid", "0"].map(str::to_owned);
    let mut jailer = host.bare(&words);
    jailer.arg("--exec-file").arg(host.exec_file());
    jailer.arg("--chroot-base-dir").arg(host.base());
    let staying = Staying::start(&host, "one", jailer, &[]);
    // DAC_OVERRIDE is 1, NET_ADMIN 12, IPC_LOCK 14.
    let kept = format!("{:016x}", 1 << 1 | 1 << 12 | 1 << 14);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(staying.pid, set), kept, "{set}");
    }
    staying.end();
}

#[test]
fn netns_is_joined() {
    let host = host!("netns");
    // A namespace without a name ends with its process.
    let mut holder = Command::new("unshare")
        .args(["--net", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("unshare of util-linux is there");
    let own = namespace(std::process::id(), "net");
    wait_until("the namespace", || namespace(holder.id(), "net") != own);
    let file = format!("/proc/{}/ns/net", holder.id());
    let jailer = host.jailer("one", &["--netns", &file]);
    let staying = Staying::start(&host, "one", jailer, &[]);
    assert_eq!(namespace(staying.pid, "net"), namespace(holder.id(), "net"));
    staying.end();
    drop(holder.stdin.take());
    holder.wait().unwrap();
}

#[test]
fn daemon_is_on_its_own() {
    let host = host!("daemon");
    let args = ["--daemonize", "--", "--stay", "--report", "/run/report"];
    let output = host.jailer("one", &args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        output.stdout.is_empty() && output.stderr.is_empty(),
        "{output:?}"
    );
    let pid = pid_in(&host.pid_file("one"));
    let file = host.root("one").join("run/report");
    wait_until("the report", || file.exists());
    let report = Report::parse(fs::read_to_string(file).unwrap().lines());
    assert_eq!(report.one("pid"), pid.to_string());
    let open = descriptors(pid);
    assert_eq!(open.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert!(open.values().all(|path| path.ends_with("null")), "{open:?}");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let stat: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let (session, terminal) = (stat[3], stat[4]);
    assert_ne!(
        session,
        pid.to_string(),
        "the leader of a session could get a terminal"
    );
    assert!(
        !Path::new("/proc").join(session).exists(),
        "the leader is gone"
    );
    assert_eq!(terminal, "0");
    assert_ne!(stat[1], std::process::id().to_string());
}

#[test]
fn new_pid_namespace_has_the_monitor_as_first_process() {
    let host = host!("pidns");
    let own = namespace(std::process::id(), "pid");
    let staying = Staying::start(&host, "one", host.jailer("one", &["--new-pid-ns"]), &[]);
    assert_eq!(staying.report.one("pid"), "1");
    assert_ne!(staying.pid, staying.jailer_pid());
    assert_eq!(status(staying.pid, "NSpid"), format!("{} 1", staying.pid));
    assert_ne!(namespace(staying.pid, "pid"), own);
    assert_eq!(
        descriptors(staying.pid).into_keys().collect::<Vec<_>>(),
        [0, 1, 2]
    );
    let args = staying.report.all("arg");
    assert!(
        args[8].parse::<u64>().unwrap() > 0,
        "the jailer's own time: {args:?}"
    );
    staying.end();

    let args = [
        "--new-pid-ns",
        "--daemonize",
        "--",
        "--stay",
        "--report",
        "/run/report",
    ];
    assert!(host.jailer("two", &args).status().unwrap().success());
    let pid = pid_in(&host.pid_file("two"));
    let file = host.root("two").join("run/report");
    wait_until("the report", || file.exists());
    assert_eq!(status(pid, "NSpid"), format!("{pid} 1"));
    assert!(descriptors(pid).values().all(|path| path.ends_with("null")));
}

#[test]
fn new_pid_namespace_outlives_the_session_of_the_jailer() {
    let host = host!("session");
    let mut jailer = Command::new("setsid");
    let inner = host.jailer("one", &["--new-pid-ns"]);
    jailer
        .arg("--wait")
        .arg(inner.get_program())
        .args(inner.get_args());
    let staying = Staying::start(&host, "one", jailer, &[]);
    let stat = fs::read_to_string(format!("/proc/{}/stat", staying.pid)).unwrap();
    let session = stat
        .rsplit(") ")
        .next()
        .unwrap()
        .split(' ')
        .nth(3)
        .unwrap()
        .to_owned();
    // 0 would be a session of outside its pid namespace; from here it has its real number.
    assert_eq!(session, staying.pid.to_string(), "a session of its own");
    staying.end();
}

#[test]
fn cgroups_of_version_1_hold_the_process_and_the_values() {
    let host = host!("cgroup1");
    let (Some(memory), Some(cpuset), Some(pids)) = (
        cgroup_mount("memory"),
        cgroup_mount("cpuset"),
        cgroup_mount("pids"),
    ) else {
        return needs::skip("cgroup1", "this host has no cgroups of version 1");
    };
    let values = [
        "--cgroup",
        "memory.limit_in_bytes=67108864",
        "--cgroup",
        "pids.max=50",
        "--cgroup",
        "cpuset.cpus=0",
        "--cgroup",
        "memory.swappiness=10",
    ];
    let staying = Staying::start(&host, "one", host.jailer("one", &values), &[]);
    let group = |mount: &Path| mount.join(&host.name).join("one");
    let read = |mount: &Path, file: &str| {
        fs::read_to_string(group(mount).join(file))
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(read(&memory, "memory.limit_in_bytes"), "67108864");
    assert_eq!(read(&memory, "memory.swappiness"), "10");
    assert_eq!(read(&pids, "pids.max"), "50");
    assert_eq!(read(&cpuset, "cpuset.cpus"), "0");
    for mount in [&memory, &cpuset, &pids] {
        assert_eq!(read(mount, "cgroup.procs"), staying.pid.to_string());
    }
    staying.end();

    let parent = format!("{}/deep/er", host.name);
    let more = ["--cgroup", "pids.max=5", "--parent-cgroup", &parent];
    let staying = Staying::start(&host, "two", host.jailer("two", &more), &[]);
    let procs = fs::read_to_string(pids.join(&parent).join("two/cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), staying.pid.to_string());
    staying.end();
}

#[test]
fn parent_cgroup_alone_does_nothing_in_version_1() {
    let host = host!("cgroup1-parent");
    let before = fs::read_to_string("/proc/self/cgroup").unwrap();
    let jailer = host.jailer("one", &["--parent-cgroup", &host.name]);
    let staying = Staying::start(&host, "one", jailer, &[]);
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", staying.pid)).unwrap();
    assert_eq!(groups, before);
    staying.end();
}

#[test]
fn cgroups_of_version_2_hold_the_process_and_the_values() {
    let host = host!("cgroup2");
    let Some(mount) = cgroup_mount("") else {
        return needs::skip("cgroup2", "this host has no cgroups of version 2");
    };
    let control = mount.join("cgroup.subtree_control");
    let before = fs::read_to_string(&control).unwrap();
    let offered = fs::read_to_string(mount.join("cgroup.controllers")).unwrap();
    let value = [
        ("hugetlb", "hugetlb.2MB.max=4194304"),
        ("pids", "pids.max=50"),
    ]
    .into_iter()
    .find(|(name, _)| offered.split_whitespace().any(|offer| offer == *name));
    let group = mount.join(&host.name);
    if let Some((_, value)) = value {
        let parent = format!("{}/inner", host.name);
        let more = [
            "--cgroup-version",
            "2",
            "--parent-cgroup",
            &parent,
            "--cgroup",
            value,
        ];
        let staying = Staying::start(&host, "one", host.jailer("one", &more), &[]);
        let one = group.join("inner/one");
        let (file, text) = value.split_once('=').unwrap();
        assert_eq!(fs::read_to_string(one.join(file)).unwrap().trim(), text);
        let procs = fs::read_to_string(one.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), staying.pid.to_string());
        staying.end();
    } else {
        needs::skip(
            "cgroup2",
            &format!("no controller to set a value of in \"{offered}\""),
        );
    }

    // Without values: into the parent if it is there, else nowhere. Its name may begin with a slash,
    // as in /proc/self/cgroup.
    let there = format!("/{}-there", host.name);
    fs::create_dir_all(mount.join(&there[1..])).unwrap();
    let more = ["--cgroup-version", "2", "--parent-cgroup", &there];
    let staying = Staying::start(&host, "two", host.jailer("two", &more), &[]);
    let procs = fs::read_to_string(mount.join(&there[1..]).join("cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), staying.pid.to_string());
    staying.end();
    let missing = format!("{}-missing", host.name);
    let more = ["--cgroup-version", "2", "--parent-cgroup", &missing];
    let staying = Staying::start(&host, "three", host.jailer("three", &more), &[]);
    assert!(!mount.join(&missing).exists());
    staying.end();

    // Ours to take back; other microVMs of a real host go on needing it.
    if let Some((name, _)) = value.filter(|(name, _)| !before.contains(name)) {
        for group in [group.join("inner/one"), group.join("inner"), group.clone()] {
            wait_until("the cgroup is empty", || fs::remove_dir(&group).is_ok());
        }
        fs::write(&control, format!("-{name}")).unwrap();
    }
}

#[test]
fn limits_are_set() {
    let host = host!("limits");
    let more = [
        "--resource-limit",
        "fsize=1048576",
        "--resource-limit",
        "no-file=33",
    ];
    let report = Report::of(host.jailer("one", &more));
    assert_eq!(report.one("fsize"), "1048576 1048576");
    assert_eq!(report.one("nofile"), "33 33");
}

#[test]
fn standard_descriptors_that_are_closed_become_null() {
    let host = host!("stdio");
    let jailer = host.jailer("one", &["--", "--report", "/run/report"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 0<&- 1>&- 2>&-; exec \"$0\" \"$@\""]);
    shell.arg(jailer.get_program()).args(jailer.get_args());
    assert!(shell.status().unwrap().success());
    assert!(host.root("one").join("run/report").exists());
}

#[test]
fn what_a_client_put_into_the_root_beforehand_stays() {
    let host = host!("prepared");
    let root = host.root("one");
    fs::create_dir_all(root.join("run")).unwrap();
    fs::write(root.join("vmlinux"), "kernel").unwrap();
    let report = Report::of(host.jailer("one", &[]));
    assert!(report.file("/vmlinux").starts_with("100644 0 0"));
    assert!(report.file("/run").starts_with(&format!("40700 {UID}")));

    // And when the jail cannot be built: as it was, owners and modes included.
    let root = host.root("two");
    fs::create_dir_all(root.join("run")).unwrap();
    fs::write(root.join("vmlinux"), "kernel").unwrap();
    fs::copy("/bin/true", host.path("dynamic")).unwrap();
    let id = host.base().join("dynamic").join("two");
    fs::create_dir_all(id.parent().unwrap()).unwrap();
    fs::rename(host.base().join(&host.name).join("two"), &id).unwrap();
    let attributes = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.mode(), meta.uid(), meta.gid())
    };
    let before = (
        attributes(&id.join("root")),
        attributes(&id.join("root/run")),
    );
    host.refused(dynamic(&host, "two", &[]));
    assert_eq!(
        before,
        (
            attributes(&id.join("root")),
            attributes(&id.join("root/run"))
        )
    );
    let mut left: Vec<_> = fs::read_dir(id.join("root")).unwrap().flatten().collect();
    left.sort_by_key(fs::DirEntry::file_name);
    let left: Vec<_> = left.iter().map(fs::DirEntry::file_name).collect();
    assert_eq!(left, ["run", "vmlinux"]);
}

#[test]
fn executable_left_in_the_root_is_replaced() {
    let host = host!("replaced");
    let copy = host.root("one").join(&host.name);
    fs::create_dir_all(host.root("one")).unwrap();
    fs::write(&copy, "another program").unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o777)).unwrap();
    let staying = Staying::start(&host, "one", host.jailer("one", &[]), &[]);
    let meta = fs::metadata(&copy).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (UID, 0o755));
    assert_eq!(
        fs::read(&copy).unwrap(),
        fs::read(host.exec_file()).unwrap()
    );

    // While that one runs, its executable is not replaced by a second start.
    let text = host.refused(host.jailer("one", &[]));
    assert!(text.contains("choose another --id"), "{text}");
    assert_eq!(fs::metadata(&copy).unwrap().ino(), meta.ino());
    staying.end();

    // Whatever else is in that place stays, and is refused.
    let place = host.root("two").join(&host.name);
    fs::create_dir_all(&place).unwrap();
    let text = host.refused(host.jailer("two", &[]));
    assert!(text.contains("not a regular file"), "{text}");
    assert!(place.is_dir());
}

#[test]
fn paths_of_the_caller_may_lead_through_links() {
    let host = host!("through-links");
    symlink(host.base(), host.path("link")).unwrap();
    symlink(host.exec_file(), host.path("exec")).unwrap();
    symlink("/proc/self/ns/net", host.path("net")).unwrap();
    let path = |name: &str| host.path(name).display().to_string();
    for (id, base) in [("one", "link"), ("two", "link/../base")] {
        let (exec, base, net) = (path("exec"), path(base), path("net"));
        let mut words = vec!["--id", id, "--uid", "64321", "--gid", "64322"];
        words.extend(["--exec-file", &exec, "--chroot-base-dir", &base]);
        words.extend(["--netns", &net]);
        let report = Report::of(host.bare(&words));
        // The jail has the name of the file, not of the link to it.
        let copy = report.file(&format!("/{}", host.name));
        assert!(copy.starts_with("100755 "), "{copy}");
        assert!(host.root(id).join(&host.name).is_file());
    }
}

#[test]
fn mounts_in_the_root_come_along_and_later_ones_arrive() {
    let host = host!("mounts");
    // In a mount namespace of the test's own, which ends with its processes, so that a killed test
    // leaves no mount behind.
    let jailer = host.jailer("one", &["--", "--stay"]);
    let mut shell = Command::new("unshare");
    shell
        .args(["--mount", "--propagation", "shared", "sh", "-ec"])
        .arg(
            "root=$1; shift; mkdir -p $root/disks $root/later
         mount -t tmpfs none $root/disks; echo 1 >$root/disks/before
         { cat <&3; } | \"$@\" >$root.out & exec 3<&-
         for try in $(seq 1200); do grep -q '^end' $root.out && break; sleep 0.1; done
         mount -t tmpfs none $root/later; echo 1 >$root/later/after
         pid=$(cat $root/*.pid); test -e /proc/$pid/root/later/after && echo arrived
         cat $root.out; kill $pid",
        );
    shell
        .arg("sh")
        .arg(host.root("one"))
        .arg(jailer.get_program())
        .args(jailer.get_args());
    shell.stdin(Stdio::null());
    let mut with_input = Command::new("sh");
    with_input.args(["-c", "exec 3<&0 </dev/null; exec \"$0\" \"$@\""]);
    with_input
        .arg(shell.get_program())
        .args(shell.get_args())
        .stdin(Stdio::piped());
    fs::create_dir_all(host.root("one")).unwrap();
    let mut child = with_input.stdout(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(input);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("arrived"), "{text}");
    assert!(text.contains("/disks/before"), "{text}");
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&host.name)
    );
}

/// A jailer whose executable needs a dynamic linker: everything works but the exec.
fn dynamic(host: &Host, id: &str, more: &[&str]) -> Command {
    let file = host.path("dynamic");
    if !file.exists() {
        fs::copy("/bin/true", &file).unwrap();
    }
    let words = ["--id", id, "--uid", "64321", "--gid", "64322"].map(str::to_owned);
    let mut jailer = host.bare(&words);
    jailer
        .arg("--exec-file")
        .arg(file)
        .arg("--chroot-base-dir")
        .arg(host.base())
        .args(more);
    jailer
}

#[test]
fn executable_that_does_not_start_leaves_nothing_in_any_form() {
    let host = host!("noexec");
    let parent = &*host.name;
    for (id, more) in [
        ("plain", &[][..]),
        ("daemon", &["--daemonize"]),
        ("pidns", &["--new-pid-ns"]),
        ("both", &["--daemonize", "--new-pid-ns"]),
        (
            "tight",
            &[
                "--resource-limit",
                "fsize=0",
                "--resource-limit",
                "no-file=0",
            ],
        ),
        (
            "groups",
            &[
                "--cgroup",
                "pids.max=9",
                "--cgroup",
                "cpuset.cpus=0",
                "--parent-cgroup",
                parent,
            ],
        ),
        (
            "all",
            &[
                "--cgroup",
                "pids.max=9",
                "--parent-cgroup",
                parent,
                "--daemonize",
                "--new-pid-ns",
            ],
        ),
    ] {
        if more.contains(&"--cgroup") && cgroup_mount("pids").is_none() {
            needs::skip("noexec", "this host has no cgroups of version 1");
            continue;
        }
        let text = host.refused(dynamic(&host, id, more));
        assert!(
            text.contains("/dynamic") && text.contains("static executable"),
            "{id}: {text}"
        );
        assert!(!text.contains("left behind"), "{text}");
        assert_eq!(host.left(), Vec::<String>::new(), "{id}");
    }
    fs::write(host.path("dynamic"), "no program").unwrap();
    let text = host.refused(dynamic(&host, "text", &[]));
    assert!(text.contains("for this machine"), "{text}");
    assert_eq!(host.left(), Vec::<String>::new());
}

#[test]
fn id_in_use_is_refused_and_the_first_goes_on() {
    let host = host!("duplicate");
    let staying = Staying::start(&host, "one", host.jailer("one", &[]), &[]);
    let mut before = host.left();
    let text = host.refused(host.jailer("one", &["--daemonize"]));
    assert!(text.contains("choose another --id"), "{text}");
    let mut after = host.left();
    before.sort();
    after.sort();
    assert_eq!(before, after);
    assert_eq!(pid_in(&host.pid_file("one")), staying.pid);
    staying.end();
    // Ended, it is still there: the jail is the caller's to remove.
    host.refused(host.jailer("one", &[]));
    fs::remove_dir_all(host.root("one").parent().unwrap()).unwrap();
    Report::of(host.jailer("one", &[]));
}

#[test]
fn links_in_a_prepared_root_are_refused_and_not_followed() {
    let host = host!("links");
    let root = host.root("one");
    fs::create_dir_all(&root).unwrap();
    let outside = host.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "precious").unwrap();
    let untouched = || {
        let file = fs::metadata(outside.join("file")).unwrap();
        let folder = fs::metadata(&outside).unwrap();
        assert_eq!(
            (file.uid(), file.mode() & 0o7777, folder.uid()),
            (0, 0o644, 0)
        );
        assert_eq!(
            fs::read_to_string(outside.join("file")).unwrap(),
            "precious"
        );
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    };
    for name in ["dev", "run", "dev/net"] {
        let link = root.join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(&outside, &link).unwrap();
        let text = host.refused(host.jailer("one", &[]));
        assert!(text.contains("symbolic link"), "{text}");
        untouched();
        fs::remove_file(&link).unwrap();
    }
    for name in [
        host.name.clone(),
        format!("{}.pid", host.name),
        "dev/kvm".to_owned(),
    ] {
        let link = root.join(&name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(outside.join("file"), &link).unwrap();
        host.refused(host.jailer("one", &[]));
        untouched();
        fs::remove_file(&link).unwrap();
        fs::hard_link(outside.join("file"), &link).unwrap();
        host.refused(host.jailer("one", &[]));
        untouched();
        fs::remove_file(&link).unwrap();
    }
    // The way to the jail as well.
    symlink(&outside, host.base().join(&host.name).join("two")).unwrap();
    host.refused(host.jailer("two", &[]));
    untouched();
}

#[test]
fn bad_input_is_refused_in_one_line_and_makes_nothing() {
    let host = host!("bad");
    let path = |name: &str| host.path(name).display().to_string();
    fs::write(host.path("plain"), "x").unwrap();
    fs::set_permissions(host.path("plain"), fs::Permissions::from_mode(0o644)).unwrap();
    Command::new("mkfifo")
        .arg(host.path("fifo"))
        .status()
        .unwrap();
    let (exec, base) = (host.exec_file().display().to_string(), path("base"));
    let long = "a".repeat(65);
    let complete = |changes: &[(&str, &str)], more: &[&str]| {
        let mut words = Vec::new();
        for (name, default) in [
            ("--id", "one"),
            ("--exec-file", &*exec),
            ("--uid", "64321"),
            ("--gid", "64322"),
            ("--chroot-base-dir", &*base),
        ] {
            let value = changes.iter().find(|(changed, _)| *changed == name);
            words.extend([
                name.to_owned(),
                value.map_or(default, |(_, value)| value).to_owned(),
            ]);
        }
        words.extend(more.iter().map(|&word| word.to_owned()));
        host.bare(&words)
    };
    let none = path("none");
    let (plain, fifo, folder) = (path("plain"), path("fifo"), path("base"));
    let changed: &[(&str, &str, &str)] = &[
        ("--id", "a/b", "--id \"a/b\": an id has 1 to 64 letters"),
        ("--id", "../x", "1 to 64 letters"),
        ("--id", "", "1 to 64 letters"),
        ("--id", &long, "1 to 64 letters"),
        ("--id", "a_b", "1 to 64 letters"),
        ("--uid", "-1", "--uid \"-1\""),
        ("--uid", "4294967295", "--uid"),
        ("--uid", "root", "--uid \"root\""),
        ("--gid", "4294967296", "--gid"),
        ("--exec-file", &none, "No such file"),
        ("--exec-file", &folder, "not a regular file"),
        ("--exec-file", &fifo, "not a regular file"),
        ("--exec-file", &plain, "chmod +x"),
        ("--chroot-base-dir", &none, "mkdir -p"),
        ("--chroot-base-dir", &plain, "Not a directory"),
    ];
    for (name, value, expected) in changed {
        let text = host.refused(complete(&[(name, value)], &[]));
        assert!(text.contains(expected), "{name} {value}: {text}");
    }
    let parent = &*host.name;
    let more: &[(&[&str], &str)] = &[
        (&["--netns", &none], "ip netns add"),
        (&["--netns", &plain], "not a network namespace"),
        (&["--netns", &fifo], "not a network namespace"),
        (&["--netns", "/proc/self/ns/mnt"], "not a network namespace"),
        (&["--netns", "/dev/kvm"], "not a network namespace"),
        (
            &["--cgroup", "nonsense.file=1"],
            "no cgroup controller \"nonsense\"",
        ),
        (&["--cgroup", "memory/../x.y=1"], "without a path"),
        (
            &["--cgroup-version", "2", "--cgroup", "nonsense.file=1"],
            "offers",
        ),
        (&["--cgroup-version", "3"], "neither 1 nor 2"),
        (&["--parent-cgroup", "../x"], ". or .."),
        (
            &["--resource-limit", "no-file=99999999999999"],
            "above what",
        ),
        (&["--resource-limit", "core=1"], "not known"),
        (&["--id", "two"], "given twice"),
        (&["--uid=3"], "put a blank"),
        (&["--nonsense"], "not known"),
        (&["--netns"], "value is missing"),
    ];
    for (words, expected) in more {
        let text = host.refused(complete(&[], words));
        assert!(text.contains(expected), "{words:?}: {text}");
        assert_eq!(host.left(), Vec::<String>::new(), "{words:?}");
    }
    if cgroup_mount("memory").is_some() && cgroup_mount("cpuset").is_some() {
        let more: &[(&[&str], &str)] = &[
            (&["--cgroup", "memory.nonsense=1"], "no such file"),
            (
                &["--cgroup", "memory.limit_in_bytes=much"],
                "does not take that value",
            ),
            (
                &["--cgroup", "cpuset.cpus=4000"],
                "does not take that value",
            ),
        ];
        for (words, expected) in more {
            let words = [words, &["--parent-cgroup", parent][..]].concat();
            let text = host.refused(complete(&[], &words));
            assert!(text.contains(expected), "{words:?}: {text}");
            assert_eq!(host.left(), Vec::<String>::new(), "{words:?}");
        }
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

#[test]
fn ordinary_user_is_told_what_is_missing() {
    let host = host!("user");
    let jailer = host.jailer("one", &[]);
    // Where that user can reach it.
    let program = host.path("jailer");
    copy(Path::new(jailer.get_program()), &program);
    let mut as_user = Command::new(program);
    as_user
        .args(jailer.get_args())
        .uid(UID)
        .gid(GID)
        .stdin(Stdio::null());
    let text = host.refused(as_user);
    assert!(
        text.contains("CAP_SYS_ADMIN") && text.contains("as root"),
        "{text}"
    );
    assert_eq!(host.left(), Vec::<String>::new());
}

#[test]
fn root_of_a_user_namespace_is_told_of_run() {
    let host = host!("nsroot");
    let jailer = host.jailer("one", &[]);
    let mut command = Command::new("unshare");
    command.args(["-r", "-m"]).arg(jailer.get_program());
    command.args(jailer.get_args()).stdin(Stdio::null());
    let text = host.refused(command);
    assert!(text.contains("`mayfly-jailer run`"), "{text}");
    assert_eq!(host.left(), Vec::<String>::new());
}

#[test]
fn help_and_version_need_nothing() {
    let host = host!("help");
    let output = host.bare(&["--version"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.starts_with("mayfly-jailer v"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1);
    let output = host.bare(&["-h"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for flag in [
        "--id",
        "--exec-file",
        "--uid",
        "--gid",
        "--cgroup ",
        "--cgroup-version",
        "--parent-cgroup",
        "--chroot-base-dir",
        "--netns",
        "--resource-limit",
        "--daemonize",
        "--new-pid-ns",
        "--version",
    ] {
        assert!(text.contains(flag), "{flag}");
    }
}

#[test]
fn many_at_once_do_not_get_in_each_others_way() {
    let host = host!("many");
    let grouped = cgroup_mount("pids").is_some();
    let ids: Vec<String> = (0..24).map(|number| format!("vm-{number}")).collect();
    // Every third one fails, and takes away the shared folders if it comes first or last.
    let children: Vec<_> = ids
        .iter()
        .enumerate()
        .map(|(number, id)| {
            let fails = number % 3 == 0;
            let mut more = Vec::new();
            if grouped {
                more.extend(["--cgroup", "pids.max=9"]);
            }
            if fails {
                more.extend(["--resource-limit", "no-file=99999999999999"]);
            }
            let mut jailer = host.jailer(id, &more);
            jailer.stdout(Stdio::piped()).stderr(Stdio::piped());
            (fails, id, jailer.spawn().unwrap())
        })
        .collect();
    for (fails, id, child) in children {
        let output = child.wait_with_output().unwrap();
        if fails {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(!host.base().join(&host.name).join(id).exists());
        } else {
            assert_eq!(Report::of_output(&output).one("uid"), UID.to_string());
        }
    }
}
