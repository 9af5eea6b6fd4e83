//! Bad input: refused with one message that names the thing and the reason, at the API and on
//! the command line, before any guest runs, with nothing left behind and nothing spoilt for what
//! comes next.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Api, Folder, Monitor, Netns, needs, probe_vm};
use probe_host::elf;
use serde_json::{Value, json};

/// Where a client of the API is refused.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// At this PUT.
    Put(&'static str),
    /// At the start.
    Start,
}

/// Something wrong.
struct Bad {
    /// A whole configuration with it.
    config: Value,
    /// Where it shows at the API.
    at: At,
    /// What the message has to say.
    says: Vec<String>,
    /// Runs before the monitor: `unshare`, `ip netns exec` and the like.
    wrapper: Vec<String>,
    /// More arguments of the monitor.
    arguments: Vec<&'static str>,
}

impl Bad {
    fn new<S: ToString>(config: Value, at: At, says: &[S]) -> Self {
        Bad {
            config,
            at,
            says: says.iter().map(S::to_string).collect(),
            wrapper: Vec::new(),
            arguments: Vec::new(),
        }
    }

    /// The monitor, to be started in the place where things are wrong.
    fn command(&self) -> Command {
        let mut command = match self.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(common::mayfly());
                command
            }
            None => Command::new(common::mayfly()),
        };
        command.args(&self.arguments);
        command
    }

    fn check_sentence(&self, message: &str) {
        for text in &self.says {
            assert!(message.contains(text.as_str()), "`{text}`: {message}");
        }
        assert!(!message.contains('\n'), "one message: {message:?}");
    }

    /// Refused on the command line, with the API and without.
    fn must_be_refused_on_the_command_line(&self) {
        for with_api in [false, true] {
            let folder = Folder::new();
            let file = folder.file("vm.json", self.config.to_string());
            let socket = folder.join("api");
            let mut command = self.command();
            command.arg("--config-file").arg(file);
            match with_api {
                true => command.arg("--api-sock").arg(&socket),
                false => command.arg("--no-api"),
            };
            let mut monitor = Monitor::spawn(command);
            monitor.exits_with(1);
            let message = monitor.stderr();
            assert_eq!(message.lines().count(), 1, "{message}");
            self.check_sentence(message.trim_end());
            assert!(message.starts_with("mayfly: "), "{message}");
            assert!(!monitor.stdout().contains("probe: "), "a guest ran");
            assert!(!socket.exists(), "the socket is left");
        }
    }

    /// Refused at the API; with what was wrong put right, the same process starts a guest.
    fn must_be_refused_at_the_api(&self, folder: &Folder) {
        let socket = folder.join("api");
        let _ = fs::remove_file(&socket);
        let mut command = self.command();
        command.arg("--api-sock").arg(&socket);
        command.arg("--log-path").arg(folder.join("log"));
        let monitor = Monitor::spawn(command);
        let api = Api::at(&socket);
        let mut refusals = 0;
        for (path, body) in requests(&self.config) {
            if matches!(self.at, At::Put(bad) if bad == path) {
                self.check_sentence(&api.refused("PUT", &path, body));
                refusals += 1;
            } else {
                api.put(&path, body);
            }
        }
        let start = json!({"action_type": "InstanceStart"});
        if self.at == At::Start {
            self.check_sentence(&api.refused("PUT", "/actions", start.clone()));
            refusals += 1;
        }
        assert_eq!(refusals, 1, "it was not tried");
        starts(monitor, &api);
    }

    fn must_be_refused(&self) {
        self.must_be_refused_on_the_command_line();
        self.must_be_refused_at_the_api(&Folder::new());
    }

    fn must_be_refused_inside(mut self, netns: &Netns) {
        let wrapper = ["ip", "netns", "exec", &netns.0].map(str::to_owned);
        self.wrapper.splice(0..0, wrapper);
        let before = netns.run("ip", &["-br", "link"]);
        self.must_be_refused();
        assert_eq!(netns.run("ip", &["-br", "link"]), before, "a tap is left");
    }
}

/// The requests that a configuration is made of.
fn requests(config: &Value) -> Vec<(String, Value)> {
    let mut requests = Vec::new();
    for section in ["machine-config", "boot-source"] {
        requests.push((format!("/{section}"), config[section].clone()));
    }
    for (section, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
        for device in config[section].as_array().into_iter().flatten() {
            let id = device[id].as_str().unwrap();
            requests.push((format!("/{section}/{id}"), device.clone()));
        }
    }
    requests
}

/// The probe with another kernel.
fn with_kernel(path: &Path) -> Value {
    let mut config = probe_vm("print:ran");
    config["boot-source"]["kernel_image_path"] = json!(path);
    config
}

fn with_initrd(path: &Path) -> Value {
    let mut config = probe_vm("print:ran");
    config["boot-source"]["initrd_path"] = json!(path);
    config
}

fn with_machine(vcpus: u64, mib: u64) -> Value {
    let mut config = probe_vm("print:ran");
    config["machine-config"] = json!({"vcpu_count": vcpus, "mem_size_mib": mib});
    config
}

fn with_disk(path: &Path) -> Value {
    common::probe_vm_with_disks("print:ran", &[path])
}

fn with_tap(name: &str) -> Value {
    let mut config = probe_vm("print:ran");
    config["network-interfaces"] = json!([{"iface_id": "eth0", "host_dev_name": name}]);
    config
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Words for a shell that prepares the place and becomes what follows.
fn prepared_by(script: &str) -> Vec<String> {
    let script = format!("{script} && exec \"$@\"");
    ["unshare", "--mount", "sh", "-c", &script, "sh"]
        .map(str::to_owned)
        .to_vec()
}

fn fifo(folder: &Folder, name: &str) -> PathBuf {
    let path = folder.join(name);
    common::run("mkfifo", &[text(&path)]);
    path
}

// Kernel and initrd

#[test]
fn kernel_when_missing_must_be_refused_at_put() {
    needs!(kvm);
    let says = ["kernel", "/no/such/vmlinux", "No such file or directory"];
    let config = with_kernel(Path::new("/no/such/vmlinux"));
    Bad::new(config, At::Put("/boot-source"), &says).must_be_refused();
}

#[test]
fn kernel_when_no_regular_file_must_be_refused_at_put() {
    needs!(kvm);
    let folder = Folder::new();
    // This FIFO has no writer: opening it must not wait for that.
    let fifo = fifo(&folder, "fifo");
    for (path, kind) in [
        (folder.path(), "a directory"),
        (&fifo, "a FIFO"),
        (Path::new("/dev/null"), "a character device"),
    ] {
        let says = ["kernel", text(path), kind];
        Bad::new(with_kernel(path), At::Put("/boot-source"), &says).must_be_refused();
    }
}

#[test]
fn kernel_when_empty_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let path = folder.file("vmlinux", "");
    let says = ["kernel", text(&path), "empty"];
    Bad::new(with_kernel(&path), At::Start, &says).must_be_refused();
}

#[test]
fn kernel_when_truncated_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let whole = fs::read(common::probe()).unwrap();
    // In the header, in the program headers, in a segment.
    for len in [40, 100, whole.len() / 2] {
        let path = folder.file("vmlinux", &whole[..len]);
        let says = ["kernel", text(&path), "truncated", &format!("has {len}")];
        Bad::new(with_kernel(&path), At::Start, &says).must_be_refused();
    }
}

#[test]
fn kernel_when_unrecognised_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let mut old = vec![0; 4096];
    old[0x202..0x208].copy_from_slice(b"HdrS\x0b\x02");
    let mut other = elf::first_byte(elf::End::Reset, 0);
    other[18..20].copy_from_slice(&183u16.to_le_bytes());
    for (content, why) in [
        (
            b"#!/bin/sh\n".to_vec(),
            "neither an ELF file (vmlinux) nor a bzImage",
        ),
        (
            old,
            "version 2.11 of the Linux boot protocol; 2.12 or newer",
        ),
        (other, "not for 64-bit x86"),
    ] {
        let path = folder.file("vmlinux", content);
        let says = ["kernel", text(&path), why];
        Bad::new(with_kernel(&path), At::Start, &says).must_be_refused();
    }
}

#[test]
fn kernel_when_larger_than_memory_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let path = folder.file("vmlinux", elf::first_byte(elf::End::Reset, 40 << 20));
    let ram = (32 << 20).to_string();
    let says = ["kernel", text(&path), "too large", &ram, "at least 41 MiB"];
    Bad::new(with_kernel(&path), At::Start, &says).must_be_refused();
    // With 1 MiB there is no room for any.
    let probe = common::probe();
    let says = ["kernel", text(&probe), "too large", "1048576"];
    Bad::new(with_machine(1, 1), At::Start, &says).must_be_refused();
}

#[test]
fn kernel_when_without_pvh_entry_must_be_refused_where_pvh_is_asked_for() {
    needs!(kvm);
    let folder = Folder::new();
    let mut kernel = fs::read(common::probe()).unwrap();
    elf::without_pvh(&mut kernel);
    let path = folder.file("vmlinux", kernel);
    let says = ["kernel", text(&path), "no PVH entry"];
    let bad = Bad {
        arguments: vec!["--boot-protocol", "pvh"],
        ..Bad::new(with_kernel(&path), At::Start, &says)
    };
    bad.must_be_refused();
}

#[test]
fn kernel_when_cut_after_put_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let path = folder.file("vmlinux", fs::read(common::probe()).unwrap());
    let (mut monitor, api) = Monitor::unconfigured(&folder);
    let source = with_kernel(&path)["boot-source"].clone();
    api.put("/boot-source", source);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8192)
        .unwrap();
    let start = json!({"action_type": "InstanceStart"});
    let message = api.refused("PUT", "/actions", start.clone());
    assert!(message.contains(text(&path)), "{message}");
    assert!(message.contains("changed in place"), "{message}");
    assert_eq!(api.get("/")["state"], "Not started");
    api.put(
        "/boot-source",
        probe_vm("print:fine")["boot-source"].clone(),
    );
    api.put("/actions", start);
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("print:fine ok"));
}

#[test]
fn initrd_when_missing_must_be_refused_at_put() {
    needs!(kvm);
    let says = ["initrd", "/no/such/initrd", "No such file or directory"];
    let config = with_initrd(Path::new("/no/such/initrd"));
    Bad::new(config, At::Put("/boot-source"), &says).must_be_refused();
}

#[test]
fn initrd_when_it_does_not_fit_must_be_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    // Larger than memory, larger than what the kernel leaves of it, and nothing at all.
    for (len, why) in [
        (33 << 20, "does not fit"),
        (31 << 20, "does not fit"),
        (0, "empty"),
    ] {
        let path = folder.disk("initrd", len);
        let mut says = vec!["initrd".to_owned(), text(&path).to_owned(), why.to_owned()];
        if len > 0 {
            says.extend([format!("{len} bytes"), "room for".to_owned()]);
        }
        Bad::new(with_initrd(&path), At::Start, &says).must_be_refused();
    }
}

// The machine

#[test]
fn vcpu_count_when_0_or_33_must_be_refused() {
    needs!(kvm);
    for count in [0, 33] {
        let says = [format!("vcpu_count is {count}"), "at most 32".to_owned()];
        Bad::new(with_machine(count, 32), At::Put("/machine-config"), &says).must_be_refused();
    }
}

#[test]
fn memory_when_0_must_be_refused() {
    needs!(kvm);
    let says = ["mem_size_mib is 0", "memory size"];
    Bad::new(with_machine(1, 0), At::Put("/machine-config"), &says).must_be_refused();
}

#[test]
fn memory_when_more_than_the_host_can_map_must_be_refused_at_the_start() {
    needs!(kvm);
    for mib in [1 << 30, 1 << 43, u64::MAX] {
        let says = [mib.to_string(), "more".to_owned()];
        Bad::new(with_machine(1, mib), At::Start, &says).must_be_refused();
    }
}

#[test]
fn memory_when_a_limit_forbids_it_must_be_refused_at_the_start() {
    needs!(kvm);
    let bad = Bad {
        wrapper: prepared_by("ulimit -v 2000000"),
        ..Bad::new(
            with_machine(1, 4096),
            At::Start,
            &["4096 MiB", "cannot map", "Cannot allocate memory"],
        )
    };
    bad.must_be_refused();
}

// Disks

#[test]
fn drive_when_missing_must_be_refused_at_put() {
    needs!(kvm);
    let says = ["disk", "/no/such/disk", "No such file or directory"];
    let config = with_disk(Path::new("/no/such/disk"));
    Bad::new(config, At::Put("/drives/disk0"), &says).must_be_refused();
}

#[test]
fn drive_when_a_directory_must_be_refused_at_put() {
    needs!(kvm);
    let folder = Folder::new();
    for read_only in [false, true] {
        let says = ["disk", text(folder.path()), "directory"];
        let mut config = with_disk(folder.path());
        config["drives"][0]["is_read_only"] = json!(read_only);
        Bad::new(config, At::Put("/drives/disk0"), &says).must_be_refused();
    }
}

#[test]
fn drive_when_not_writable_must_be_refused_at_put() {
    needs!(kvm, root);
    let folder = Folder::new();
    let place = folder.join("place");
    fs::create_dir(&place).unwrap();
    let disk = place.join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    // Root may write to any file, but not where no user may.
    let at = text(&place);
    let script = format!("mount --bind {at} {at} && mount -o remount,bind,ro {at}");
    let bad = Bad {
        wrapper: prepared_by(&script),
        ..Bad::new(
            with_disk(&disk),
            At::Put("/drives/disk0"),
            &["disk", text(&disk), "Read-only file system"],
        )
    };
    bad.must_be_refused();
    // To be read only, it is good enough.
    let mut config = common::probe_vm_with_disks("blkinfo:0", &[&disk]);
    config["drives"][0]["is_read_only"] = json!(true);
    let mut command = bad.command();
    command.args(common::boot_args(&folder, &config));
    let mut monitor = Monitor::spawn(command);
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("ro=true"), "{}", monitor.stdout());
}

#[test]
fn drive_when_a_second_root_must_be_refused_at_put() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let mut config = common::probe_vm_with_disks("print:ran", &[&disk, &disk]);
    for n in 0..2 {
        config["drives"][n]["is_root_device"] = json!(true);
    }
    let says = ["`disk1`", "root", "already exists", "`disk0`"];
    Bad::new(config, At::Put("/drives/disk1"), &says).must_be_refused();
}

// Taps

#[test]
fn tap_when_its_name_can_not_be_must_be_refused_at_put() {
    needs!(kvm, root);
    let netns = Netns::new();
    for name in ["sixteen-letters-", "a/b", "with space"] {
        let says = ["eth0", name, "no interface name"];
        Bad::new(with_tap(name), At::Put("/network-interfaces/eth0"), &says)
            .must_be_refused_inside(&netns);
    }
}

#[test]
fn tap_when_another_kind_of_interface_must_be_refused_at_put() {
    needs!(kvm, root);
    let netns = Netns::new();
    let says = ["provided by lo:", "no tap"];
    Bad::new(with_tap("lo"), At::Put("/network-interfaces/eth0"), &says)
        .must_be_refused_inside(&netns);
}

#[test]
fn tap_when_busy_must_be_refused_at_put() {
    needs!(kvm, root);
    let netns = Netns::new();
    let folder = Folder::new();
    let mut holder = with_tap("mfbusy");
    holder["boot-source"]["boot_args"] = json!("probe=echo");
    let (mut monitor, _api) = Monitor::boot_inside(&netns, &folder, &holder);
    monitor.expect("probe: echo ready");
    let says = ["mfbusy", "in use"];
    Bad::new(
        with_tap("mfbusy"),
        At::Put("/network-interfaces/eth0"),
        &says,
    )
    .must_be_refused_inside(&netns);
    monitor.type_in("x\n");
    monitor.exits_with(0);
}

#[test]
fn tap_when_it_may_not_be_made_must_be_refused_at_put() {
    needs!(kvm, root);
    let netns = Netns::new();
    // Without its capabilities root may not make interfaces.
    let wrapper = [
        "setpriv",
        "--bounding-set=-net_admin",
        "--inh-caps=-net_admin",
    ];
    let bad = Bad {
        wrapper: wrapper.map(str::to_owned).to_vec(),
        ..Bad::new(
            with_tap("mfnone"),
            At::Put("/network-interfaces/eth0"),
            &["mfnone", "not permitted"],
        )
    };
    bad.must_be_refused_inside(&netns);
}

#[test]
fn tap_when_two_interfaces_want_it_must_be_refused_at_the_second_put() {
    needs!(kvm, root);
    let netns = Netns::new();
    let mut config = with_tap("mftap");
    config["network-interfaces"] = json!([
        {"iface_id": "eth0", "host_dev_name": "mftap"},
        {"iface_id": "eth1", "host_dev_name": "mftap"},
    ]);
    let says = ["`eth1`", "mftap", "already in use", "`eth0`"];
    Bad::new(config, At::Put("/network-interfaces/eth1"), &says).must_be_refused_inside(&netns);
}

#[test]
fn tap_when_a_second_put_of_its_interface_must_be_refused_stays_attached() {
    needs!(kvm, root);
    let netns = Netns::new();
    let folder = Folder::new();
    let socket = folder.join("api");
    let mut command = netns.command(common::mayfly());
    command.arg("--api-sock").arg(&socket);
    let mut monitor = Monitor::spawn(command);
    let api = Api::at(socket);
    let config = probe_vm("netinfo:0");
    api.put("/boot-source", config["boot-source"].clone());
    let path = "/network-interfaces/eth0";
    api.put(path, json!({"iface_id": "eth0", "host_dev_name": "mfone"}));
    let other = json!({"iface_id": "eth0", "host_dev_name": "lo"});
    let message = api.refused("PUT", path, other);
    assert!(message.contains("provided by lo:"), "{message}");
    netns.run("ip", &["link", "show", "mfone"]);
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.exits_with(0);
    assert!(
        monitor.stdout().contains("netinfo:0 ok"),
        "{}",
        monitor.stdout()
    );
}

// Too much

#[test]
fn devices_when_20_are_refused_at_the_start() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let config = common::probe_vm_with_disks("print:ran", &[disk.as_path(); 20]);
    let says = ["20 drives", "19 devices"];
    Bad::new(config, At::Start, &says).must_be_refused();
}

#[test]
fn command_line_when_the_devices_words_do_not_fit_must_be_refused_with_the_room_left() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let word = "virtio_mmio.device=4K@0xc0001000:5";
    let mut config = with_disk(&disk);
    // All but one byte of what ` pci=off` and the word take.
    let len = 2047 - " pci=off ".len() - word.len() + 1;
    let args = "probe=print:ran ";
    config["boot-source"]["boot_args"] = json!(format!("{args}{}", "x".repeat(len - args.len())));
    let says = [
        "command line",
        word,
        &format!("takes {} bytes", word.len()),
        &format!("{} are left", word.len() - 1),
    ];
    Bad::new(config, At::Start, &says).must_be_refused();
}

#[test]
fn boot_args_when_longer_than_a_command_line_are_refused_at_put() {
    needs!(kvm);
    for (args, says) in [
        ("x".repeat(2048), ["boot_args", "2048 bytes", "2047"]),
        ("a\0b".to_owned(), ["boot_args", "zero byte", "end"]),
    ] {
        let mut config = probe_vm("");
        config["boot-source"]["boot_args"] = json!(args);
        Bad::new(config, At::Put("/boot-source"), &says).must_be_refused();
    }
}

#[test]
fn descriptors_when_they_run_out_are_named_and_nothing_is_left() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let config = common::probe_vm_with_disks("print:ran", &[disk.as_path(); 12]);
    let bad = Bad {
        wrapper: prepared_by("ulimit -n 60"),
        ..Bad::new(config, At::Start, &["Too many open files"])
    };
    bad.must_be_refused();
}

#[test]
fn host_when_it_has_no_kvm_must_be_refused_at_the_start() {
    needs!(root);
    let folder = Folder::new();
    let bad = Bad {
        wrapper: prepared_by("mount -t tmpfs none /dev"),
        ..Bad::new(
            probe_vm("print:ran"),
            At::Start,
            &["/dev/kvm", "No such file or directory"],
        )
    };
    bad.must_be_refused_on_the_command_line();
    let socket = folder.join("api");
    let mut command = bad.command();
    command.arg("--api-sock").arg(&socket);
    let _monitor = Monitor::spawn(command);
    let api = Api::at(socket);
    api.put("/boot-source", bad.config["boot-source"].clone());
    bad.check_sentence(&api.refused("PUT", "/actions", json!({"action_type": "InstanceStart"})));
    assert_eq!(api.get("/")["state"], "Not started");
}

// The socket

#[test]
fn socket_path_when_in_use_must_be_refused_and_its_user_left_alone() {
    let folder = Folder::new();
    let (_first, api) = Monitor::unconfigured(&folder);
    let socket = folder.join("api");
    let mut second = Monitor::start(["--api-sock", text(&socket)]);
    second.exits_with(1);
    let message = second.stderr();
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains(text(&socket)), "{message}");
    assert!(message.contains("Address already in use"), "{message}");
    assert_eq!(api.get("/")["state"], "Not started");
}

#[test]
fn socket_path_when_something_is_there_must_be_refused_and_left_as_it_is() {
    let folder = Folder::new();
    let stale = folder.join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let file = folder.file("file", "precious");
    for path in [&stale, &file] {
        let mut monitor = Monitor::start(["--api-sock", text(path)]);
        monitor.exits_with(1);
        let message = monitor.stderr();
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.contains(text(path)), "{message}");
        assert!(message.contains("Address already in use"), "{message}");
    }
    assert!(fs::symlink_metadata(stale).unwrap().file_type().is_socket());
    assert_eq!(fs::read_to_string(file).unwrap(), "precious");
}

#[test]
fn socket_path_when_it_can_not_be_must_be_refused() {
    let folder = Folder::new();
    let nowhere = folder.join("no/such/folder/api");
    let long = folder.join(&"x".repeat(200));
    for (path, reason) in [(nowhere, "No such file"), (long, "SUN_LEN")] {
        let mut monitor = Monitor::start(["--api-sock", text(&path)]);
        monitor.exits_with(1);
        let message = monitor.stderr();
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.contains(text(&path)), "{message}");
        assert!(message.contains(reason), "{message}");
    }
}

// HTTP

/// Sends raw bytes; status and the message of what comes back.
fn raw(api: &Api, bytes: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(&api.0).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let (status, body) = common::read_response(&mut stream);
    let body: Value = serde_json::from_str(&body).unwrap();
    let message = body["error"].as_str().unwrap_or_else(|| panic!("{body}"));
    (status, message.to_owned())
}

/// That the same process still takes a configuration and starts it.
fn starts(mut monitor: Monitor, api: &Api) {
    assert_eq!(api.get("/")["state"], "Not started");
    if needs::are_met("bad_input: the start after what was refused", &["kvm"]) {
        let mut right = probe_vm("echo");
        right["start"] = json!(true);
        api.put("/vm", right);
        monitor.type_in("fine\n");
        monitor.exits_with(0);
        let output = monitor.stdout();
        assert!(output.contains("probe: got fine"), "{output}");
        assert_eq!(monitor.stderr(), "");
    }
}

#[test]
fn http_when_malformed_is_400_and_the_next_client_is_served() {
    let folder = Folder::new();
    let (monitor, api) = Monitor::unconfigured(&folder);
    let long_line = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1100));
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1100));
    let cases: &[(&[u8], &str)] = &[
        (b"nonsense\r\n\r\n", "Invalid"),
        (b"\r\n\r\n", "request line is empty"),
        (b"GET / HTTP/1.1\n\n", "CR LF"),
        (b"GET  / HTTP/9.9\r\n\r\n", "Invalid"),
        (b"POST / HTTP/1.1\r\n\r\n", "HTTP method"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", "Invalid"),
        (b"GET / HTTP/1.1\r\nX: \xff\r\n\r\n", "UTF-8"),
        (
            b"PUT /vm HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "Content-Length",
        ),
        (
            b"PUT /vm HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "Content-Length",
        ),
        (
            b"PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "Transfer-Encoding",
        ),
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            "Invalid",
        ),
        (long_line.as_bytes(), "header"),
        (long_path.as_bytes(), "request"),
    ];
    for (bytes, says) in cases {
        let (status, message) = raw(&api, bytes);
        assert_eq!(status, 400, "{message}");
        assert!(message.contains(says), "{says}: {message}");
        assert_eq!(api.get("/")["state"], "Not started");
    }
    starts(monitor, &api);
}

#[test]
fn http_when_a_client_stops_halfway_others_are_served() {
    let folder = Folder::new();
    let (monitor, api) = Monitor::unconfigured(&folder);
    let mut halfway = Vec::new();
    for bytes in [
        &b""[..],
        b"P",
        b"PUT /vm HTTP/1.1\r\nConte",
        b"PUT /vm HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"",
    ] {
        let mut stream = UnixStream::connect(&api.0).unwrap();
        stream.write_all(bytes).unwrap();
        halfway.push(stream);
    }
    // One that is gone before it reads its answers.
    let mut gone = UnixStream::connect(&api.0).unwrap();
    gone.write_all("GET / HTTP/1.1\r\n\r\n".repeat(50).as_bytes())
        .unwrap();
    drop(gone);
    monitor.comes_to_rest("fc_api");
    starts(monitor, &api);
}

#[test]
fn body_when_over_the_limit_is_400_before_it_is_sent() {
    let folder = Folder::new();
    for (arguments, limit) in [
        (&[][..], 51_200),
        (&["--http-api-max-payload-size", "300"][..], 300),
    ] {
        let socket = folder.join(&format!("api{limit}"));
        let mut command = Command::new(common::mayfly());
        command.arg("--api-sock").arg(&socket).args(arguments);
        let monitor = Monitor::spawn(command);
        let api = Api::at(socket);
        let head = format!("PUT /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n", limit + 1);
        let (status, message) = raw(&api, head.as_bytes());
        assert_eq!(status, 400);
        assert!(message.contains(&(limit + 1).to_string()), "{message}");
        assert!(message.contains(&format!("limit of {limit}")), "{message}");
        // Digits that no number has room for.
        let head = format!(
            "PUT /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
            "9".repeat(40)
        );
        assert_eq!(raw(&api, head.as_bytes()).0, 400);
        // A byte less is taken, and judged by what it says.
        let padding = limit - br#"{"vcpu_count":0,"mem_size_mib":1}"#.len();
        let body = format!(
            r#"{{"vcpu_count":0,{}"mem_size_mib":1}}"#,
            " ".repeat(padding)
        );
        assert_eq!(body.len(), limit);
        let (status, answer) = api.request("PUT", "/machine-config", &body);
        assert_eq!(status, 400);
        assert!(answer.contains("vcpu_count is 0"), "{answer}");
        if limit == 51_200 {
            starts(monitor, &api);
        }
    }
}

#[test]
fn request_when_it_makes_no_sense_is_400_and_names_what_is_wrong() {
    let folder = Folder::new();
    let (monitor, api) = Monitor::unconfigured(&folder);
    let machine = "/machine-config";
    let drive = r#"{"drive_id":"a","path_on_host":"/dev/null","is_root_device":false"#;
    let cases = [
        // JSON that is none
        ("PUT", machine, "{".to_owned(), "EOF"),
        ("PUT", machine, "nonsense".to_owned(), "line 1 column"),
        (
            "PUT",
            machine,
            "{} {}".to_owned(),
            "missing field `vcpu_count`",
        ),
        ("PUT", machine, "[1,2]".to_owned(), "invalid"),
        ("PUT", machine, "[".repeat(5000), "sequence"),
        // members
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1}"#.into(),
            "missing field `mem_size_mib`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1,"mem_size_mib":1,"x":1}"#.into(),
            "unknown field `x`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":"1","mem_size_mib":1}"#.into(),
            "`vcpu_count`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1.0,"mem_size_mib":1}"#.into(),
            "`vcpu_count`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":256,"mem_size_mib":1}"#.into(),
            "`vcpu_count`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":-1,"mem_size_mib":1}"#.into(),
            "`vcpu_count`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1,"mem_size_mib":null}"#.into(),
            "`mem_size_mib`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1,"mem_size_mib":1,"smt":null}"#.into(),
            "`smt`",
        ),
        (
            "PUT",
            machine,
            r#"{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":1}"#.into(),
            "duplicate field `vcpu_count`",
        ),
        ("PATCH", machine, "{}".into(), "Empty PATCH"),
        (
            "PUT",
            "/boot-source",
            "{}".into(),
            "missing field `kernel_image_path`",
        ),
        (
            "PUT",
            "/drives/a",
            format!("{drive},\"cache_type\":\"Fast\"}}"),
            "`Fast`",
        ),
        (
            "PUT",
            "/drives/a",
            format!("{drive},\"size\":1}}"),
            "unknown field `size`",
        ),
        ("PUT", "/drives/b", format!("{drive}}}"), "does not match"),
        ("PUT", "/drives/a-b", format!("{drive}}}"), "alphanumeric"),
        ("PUT", "/drives/", format!("{drive}}}"), "empty"),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id":"a"}"#.into(),
            "missing field `host_dev_name`",
        ),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id":"a","host_dev_name":"t","guest_mac":"06:00"}"#.into(),
            "`guest_mac`",
        ),
        (
            "PUT",
            "/actions",
            r#"{"action_type":"Explode"}"#.into(),
            "`Explode`",
        ),
        ("PATCH", "/vm", r#"{"state":"Gone"}"#.into(), "`Gone`"),
        // methods, paths and bodies
        ("GET", "/no/such", String::new(), "/no/such"),
        (
            "DELETE",
            "/machine-config",
            String::new(),
            "/machine-config",
        ),
        ("PUT", machine, String::new(), "Empty PUT"),
        ("PATCH", "/vm", String::new(), "Empty PATCH"),
        ("GET", "/", "{}".into(), "GET request cannot have a body"),
        ("PUT", "/vsock", "{}".into(), "out of scope"),
        // what the state does not allow
        (
            "PATCH",
            "/vm",
            r#"{"state":"Paused"}"#.into(),
            "before starting",
        ),
        (
            "PATCH",
            "/vm",
            r#"{"state":"Resumed"}"#.into(),
            "before starting",
        ),
        (
            "PUT",
            "/actions",
            r#"{"action_type":"SendCtrlAltDel"}"#.into(),
            "before starting",
        ),
        (
            "PUT",
            "/actions",
            r#"{"action_type":"InstanceStart"}"#.into(),
            "without kernel configuration",
        ),
    ];
    for (method, path, body, says) in &cases {
        let (status, answer) = api.request(method, path, body);
        assert_eq!(status, 400, "{method} {path} {body}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let message = answer["fault_message"].as_str().unwrap();
        assert!(
            message.contains(says),
            "{method} {path} {body}: {says}: {message}"
        );
        assert!(!message.contains('\n'), "{message}");
    }
    starts(monitor, &api);
}

#[test]
fn request_when_the_guest_runs_may_not_change_what_it_began_with() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let config = common::probe_vm_with_disks("echo", &[&disk]);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: echo ready");
    let mut all = requests(&config);
    all.push(("/actions".into(), json!({"action_type": "InstanceStart"})));
    for (path, body) in all {
        let message = api.refused("PUT", &path, body);
        assert!(message.contains("after starting"), "{path}: {message}");
    }
    assert_eq!(api.get("/")["state"], "Running");
    monitor.type_in("still here\n");
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("got still here"));
}

// The command line

/// Ends with `code` and one message that says this; nothing runs, nothing is made.
fn arguments_are_refused(arguments: &[&str], code: i32, says: &[&str]) {
    let mut monitor = Monitor::start(arguments);
    monitor.exits_with(code);
    let message = monitor.stderr();
    assert_eq!(message.lines().count(), 1, "{arguments:?}: {message}");
    for text in says {
        assert!(message.contains(text), "{arguments:?}: {text}: {message}");
    }
    assert!(!monitor.stdout().contains("probe: "), "a guest ran");
}

#[test]
fn arguments_when_wrong_end_with_153_and_a_sentence() {
    let folder = Folder::new();
    let socket = folder.join("api");
    let socket = text(&socket);
    let id65 = "x".repeat(65);
    for (arguments, says) in [
        (&["--nonsense"][..], &["--nonsense"][..]),
        (&["stray"], &["stray"]),
        (&["--api-sock"], &["--api-sock", "value"]),
        (&["--api-sock=x"], &["--api-sock=x"]),
        (
            &["--api-sock", socket, "--api-sock", socket],
            &["--api-sock", "twice"],
        ),
        (&["--no-api"], &["--no-api", "--config-file"]),
        (&["--api-sock", socket, "--id", "a/b"], &["--id", "a/b"]),
        (&["--api-sock", socket, "--id", ""], &["--id"]),
        (&["--api-sock", socket, "--id", &id65], &["--id", "64"]),
        (
            &["--api-sock", socket, "--http-api-max-payload-size", "much"],
            &["much"],
        ),
        (
            &["--api-sock", socket, "--boot-protocol", "uefi"],
            &["--boot-protocol", "uefi", "pvh"],
        ),
        (
            &["--api-sock", socket, "--enable-pci"],
            &["--enable-pci", "PCI"],
        ),
        (
            &["--api-sock", socket, "--seccomp-filter", "f"],
            &["--seccomp-filter"],
        ),
    ] {
        arguments_are_refused(arguments, 153, says);
    }
    arguments_are_refused(
        &["--api-sock", socket, "--level", "loud"],
        152,
        &["loud", "Trace"],
    );
    assert!(!Path::new(socket).exists());
}

#[test]
fn log_path_when_it_can_not_be_written_must_be_refused() {
    let folder = Folder::new();
    let socket = folder.join("api");
    for (path, reason) in [
        (folder.join("no/such/log"), "No such file or directory"),
        (folder.path().to_owned(), "directory"),
    ] {
        let arguments = ["--api-sock", text(&socket), "--log-path", text(&path)];
        arguments_are_refused(&arguments, 1, &["log", text(&path), reason]);
    }
    assert!(!socket.exists());
}

#[test]
fn config_file_when_it_can_not_be_read_must_be_refused() {
    let folder = Folder::new();
    let missing = folder.join("missing.json");
    let large = folder.disk("large", (1 << 20) + 1);
    // A FIFO is waited for: see tests/files.rs.
    for (path, reason) in [
        (missing.as_path(), "No such file or directory"),
        (folder.path(), "directory"),
        (&large, "longer than 1 MiB"),
    ] {
        let arguments = ["--no-api", "--config-file", text(path)];
        arguments_are_refused(&arguments, 1, &["configuration", text(path), reason]);
    }
}

#[test]
fn config_file_when_it_makes_no_sense_must_be_refused() {
    let folder = Folder::new();
    let source = r#""boot-source":{"kernel_image_path":"/dev/null"}"#;
    for (content, reason) in [
        ("".as_bytes().to_vec(), "EOF"),
        (b"{".to_vec(), "EOF"),
        (b"nonsense".to_vec(), "line 1 column"),
        (b"\xff\xfe{}".to_vec(), "not UTF-8"),
        (b"{}".to_vec(), "missing field `boot-source`"),
        (
            format!("{{{source}}}").into_bytes(),
            "missing field `drives`",
        ),
        (
            br#"{"boot-source":{"kernel_image_path":"/k","kernel":1},"drives":[]}"#.to_vec(),
            "unknown field `kernel`",
        ),
        (
            format!(r#"{{{source},"drives":[{{"drive_id":"a"}}]}}"#).into_bytes(),
            "missing field",
        ),
        (
            format!(r#"{{{source},"drives":[],"vsock":{{}}}}"#).into_bytes(),
            "`vsock` is out of scope",
        ),
        (
            format!(r#"{{{source},"drives":[],"machine-config":{{"vcpu_count":1}}}}"#).into_bytes(),
            "missing field `mem_size_mib`",
        ),
    ] {
        let path = folder.file("vm.json", content);
        let arguments = ["--no-api", "--config-file", text(&path)];
        arguments_are_refused(&arguments, 1, &[text(&path), reason]);
    }
}

#[test]
fn version_and_help_when_asked_for_end_well() {
    for (arguments, says) in [
        (&["--version"][..], "(API of Firecracker v1.17.0)"),
        (&["--help"], "--config-file"),
        (&["-h"], "--config-file"),
    ] {
        let mut monitor = Monitor::start(arguments);
        monitor.exits_with(0);
        let output = monitor.stdout();
        assert!(output.contains(says), "{output}");
        assert_eq!(monitor.stderr(), "");
    }
}

#[test]
fn api_when_ten_clients_idle_still_serves_an_eleventh() {
    let folder = Folder::new();
    let (monitor, api) = Monitor::unconfigured(&folder);
    let mut idle: Vec<UnixStream> = (0..30)
        .map(|_| UnixStream::connect(&api.0).unwrap())
        .collect();
    // Slots may be refused for a moment, not for good.
    common::wait_until("a client is served beside idle ones", || {
        let mut stream = UnixStream::connect(&api.0).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let asked = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
        let mut first = [0; 12];
        asked.is_ok() && stream.read_exact(&mut first).is_ok() && first.ends_with(b"200")
    });
    for stream in &mut idle {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    starts(monitor, &api);
}
