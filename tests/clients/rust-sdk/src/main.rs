//! Drives a monitor through the life of a microVM with the public crate firecracker-rs-sdk, as it is
//! published: create, configure, start, pause, resume, stop.
//!
//! `rust-sdk-client MONITOR FOLDER KERNEL DISK`: the monitor's socket, log, metrics and console are
//! made in FOLDER. The kernel is the probe guest; its console is watched for what shows that the
//! guest really ran, stood still, and heard Ctrl-Alt-Del.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::*;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const ID: &str = "sdk-guest-1";
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result {
    let words: Vec<PathBuf> = std::env::args_os().skip(1).map(Into::into).collect();
    let [monitor, folder, kernel, disk] = words.as_slice() else {
        return Err("usage: rust-sdk-client MONITOR FOLDER KERNEL DISK".into());
    };
    let console = folder.join("console");
    let mut options = FirecrackerOption::new(monitor);
    options
        .api_sock(folder.join("sdk.socket"))
        .id(ID)
        .stdin("/dev/null")
        .stdout(&console);
    let mut vm = options.build()?;
    vm.start_vmm()?;
    step("create");
    configure(&mut vm, folder, kernel, disk)?;
    step("configure");

    check(
        "state",
        vm.describe_instance()?.state,
        InstanceState::NotStarted,
    )?;
    vm.start()?;
    check(
        "state",
        vm.describe_instance()?.state,
        InstanceState::Running,
    )?;
    until("the guest counts", || counted(&console) > 2)?;
    step("start");

    vm.create_sync_action(ActionType::FlushMetrics)?;
    vm.patch_guest_drive_by_id(&PartialDrive {
        drive_id: "data".into(),
        path_on_host: Some(disk.clone()),
        rate_limiter: None,
    })?;
    step("update");

    vm.pause()?;
    check(
        "state",
        vm.describe_instance()?.state,
        InstanceState::Paused,
    )?;
    // What was written before the pause may still be on its way; a guest that goes on counts
    // every 20 ms, and never stands still for so long.
    let deadline = Instant::now() + PATIENCE;
    let mut then = counted(&console);
    loop {
        thread::sleep(Duration::from_millis(500));
        let now = counted(&console);
        if now == then {
            break;
        }
        if Instant::now() > deadline {
            return Err("a paused guest goes on counting".into());
        }
        then = now;
    }
    step("pause");

    vm.resume()?;
    check(
        "state",
        vm.describe_instance()?.state,
        InstanceState::Running,
    )?;
    until("the guest counts on", || counted(&console) > then)?;
    step("resume");

    until("the guest listens to its keyboard", || {
        text_of(&console).contains("kbd ready")
    })?;
    let pid = vm.firecracker_pid().ok_or("the client knows no process")?;
    vm.stop()?;
    until("the monitor ends with its guest", || has_ended(pid))?;
    step("stop");
    Ok(())
}

fn configure(vm: &mut Instance, folder: &Path, kernel: &Path, disk: &Path) -> Result {
    check(
        "version",
        vm.get_firecracker_version()?.firecracker_version.as_str(),
        "1.17.0",
    )?;
    vm.put_logger(&Logger {
        level: Some(LogLevel::Info),
        log_path: folder.join("log"),
        show_level: Some(true),
        show_log_origin: Some(true),
        module: None,
    })?;
    vm.put_metrics(&Metrics {
        metrics_path: folder.join("metrics"),
    })?;
    let machine = MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib: 64,
        track_dirty_pages: Some(false),
        vcpu_count: 1,
        huge_pages: None,
    };
    vm.put_machine_configuration(&machine)?;
    vm.patch_machine_configuration(&MachineConfiguration {
        mem_size_mib: 96,
        ..machine
    })?;
    check("memory", vm.get_machine_configuration()?.mem_size_mib, 96)?;
    vm.put_guest_boot_source(&BootSource {
        boot_args: Some("probe=count:150,kbd:3:60000".into()),
        initrd_path: None,
        kernel_image_path: kernel.into(),
    })?;
    vm.put_guest_drive_by_id(&Drive {
        drive_id: "data".into(),
        partuuid: None,
        is_root_device: false,
        cache_type: Some(CacheType::Unsafe),
        is_read_only: false,
        path_on_host: disk.into(),
        rate_limiter: None,
        io_engine: Some(IoEngine::Sync),
        socket: None,
    })?;
    let whole = vm.get_export_vm_config()?;
    check(
        "memory in the whole configuration",
        whole.machine_config.map(|m| m.mem_size_mib),
        Some(96),
    )?;
    check(
        "boot arguments in the whole configuration",
        whole.boot_source.and_then(|b| b.boot_args).as_deref(),
        Some("probe=count:150,kbd:3:60000"),
    )?;
    // What is refused must reach the caller as an error.
    match vm.put_guest_boot_source(&BootSource {
        boot_args: None,
        initrd_path: None,
        kernel_image_path: folder.join("missing"),
    }) {
        Ok(_) => Err("a kernel that does not exist was taken".into()),
        Err(_) => Ok(()),
    }
}

fn step(name: &str) {
    println!("sdk: {name} ok");
}

fn check<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what} is {found:?}, not {expected:?}").into())
    }
}

fn text_of(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}

/// Lines of the probe's word `count` on the console.
fn counted(console: &Path) -> usize {
    let text = text_of(console);
    text.lines().filter(|line| line.contains("count ")).count()
}

/// Whether the process, a child that has not been waited for, is over.
fn has_ended(pid: u32) -> bool {
    let stat = text_of(Path::new(&format!("/proc/{pid}/stat")));
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with('Z'))
}

fn until(what: &str, done: impl Fn() -> bool) -> Result {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        if Instant::now() > deadline {
            return Err(format!("waited in vain: {what}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
