//! Disks on a host that forbids io_uring, or has none: threads do what has to be waited for. (`tests/devices.rs` has what
//! happens when they hang.)

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs;

use common::{Folder, Monitor, needs, probe_vm_with_disks, sys};
use pair::{Pair, await_disk, pause};
use probe_host::pattern;
use serde_json::{Value, json};

/// Runs `test` as on a host that answers to io_uring_setup with this.
fn on_a_host_without_io_uring(test: fn(i32)) {
    for errno in [libc::EPERM, libc::ENOSYS] {
        common::with_io_uring_answering(Some(errno), move || test(errno));
    }
}

fn pool_threads(monitor: &Monitor) -> Vec<i32> {
    let mut threads = monitor.threads();
    threads.retain(|(_, name)| name.starts_with("block-pool"));
    threads.into_iter().map(|(id, _)| id).collect()
}

#[test]
fn disk_when_the_host_has_no_io_uring_is_what_the_model_says() {
    needs!(kvm);
    on_a_host_without_io_uring(|errno| {
        let folder = Folder::new();
        for (seed, more) in (1..).zip([
            json!({"cache": "none"}),
            json!({"cache_type": "Writeback"}),
            json!({"cache_type": "Writeback", "overlay": {"path_on_host": folder.join("overlay")}}),
        ]) {
            let disk = folder.disk("disk", 4 << 20);
            let word = format!("blkfuzz:0:{seed}:2000:32");
            let mut config = probe_vm_with_disks(&word, &[&disk]);
            for (key, value) in more.as_object().unwrap() {
                config["drives"][0][key] = value.clone();
            }
            let mut monitor = Monitor::boot(&folder, &config);
            monitor.exits_with(0);
            let output = monitor.stdout();
            assert!(output.contains("blkfuzz:0"), "{output}");
            assert!(
                !output.contains("FAILED"),
                "errno {errno}, {more}: {output}"
            );
            if more["overlay"] == Value::Null {
                let host = pattern::sum(pattern::SUM_START, &fs::read(&disk).unwrap());
                assert!(
                    output.contains(&format!("sum={host:016x}")),
                    "{more}: {output}"
                );
            }
            assert!(folder.read("log").contains("no io_uring for a disk"));
        }
    });
}

/// Saves a guest in the middle of its reads and writes, and has it go on elsewhere: it finds what it wrote.
fn save_in_the_middle(engine: &str, cache: (&str, &str)) {
    let (folder, other) = (Folder::new(), Folder::new());
    let disk = folder.disk("disk", 4 << 20);
    let word = "blkload:0:randrw:4096:16:5000:check";
    let mut config = probe_vm_with_disks(&format!("{word},shell"), &[&disk]);
    config["drives"][0][cache.0] = json!(cache.1);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("blkload begun");
    await_disk(&api, "write", 50);
    let has_pool = !pool_threads(&monitor).is_empty();
    assert_eq!(has_pool, engine == "threads", "{cache:?}");
    let (copy, pair) = (folder.join("copy"), Pair::new(&folder, "snapshot"));
    pause(&api);
    assert!(!monitor.stdout().contains(&format!("probe: {word}")));
    api.put("/snapshot/create", pair.create("Full"));
    fs::copy(&disk, &copy).unwrap();
    drop(monitor);
    let drives = json!({"drive_overrides": [{"drive_id": "disk0", "path_on_host": copy}]});
    let (mut monitor, api) = pair.restore(&other, drives);
    assert_eq!(
        api.get("/vm/config")["drives"][0][cache.0],
        json!(cache.1),
        "{engine}"
    );
    await_disk(&api, "write", 50);
    assert_eq!(!pool_threads(&monitor).is_empty(), has_pool);
    let output = monitor.expect("shell ready");
    assert!(output.contains(&format!("probe: {word} ok")), "{output}");
    monitor.type_in("blkwrite:0:0:64:9\nblkverify:0:0:64:9\nblkflush:0\nreset\n");
    monitor.exits_with(0);
    let output = monitor.stdout();
    for word in ["blkverify:0:0:64:9", "blkflush:0"] {
        assert!(output.contains(&format!("probe: {word} ok")), "{output}");
    }
    let mut expected = vec![0; 64 * 512];
    pattern::fill(9, 0, &mut expected);
    assert!(fs::read(&copy).unwrap()[..expected.len()] == expected);
}

#[test]
fn disk_when_saved_in_the_middle_of_its_work_goes_on_after_a_restore() {
    needs!(kvm);
    save_in_the_middle("ring", ("cache", "none"));
    common::with_io_uring_answering(Some(libc::EPERM), || {
        save_in_the_middle("threads", ("cache", "none"));
        save_in_the_middle("threads", ("cache_type", "Writeback"));
    });
}

#[test]
fn threads_when_there_is_io_uring_or_the_disk_is_memory_are_not_made() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let mut config = probe_vm_with_disks("print:up,hlt", &[&disk]);
    config["drives"][0]["cache"] = json!("none");
    let monitor = Monitor::boot(&folder, &config);
    monitor.expect("probe: print:up ok");
    assert_eq!(pool_threads(&monitor), [0; 0]);
    drop(monitor);
    on_a_host_without_io_uring(|_| {
        let folder = Folder::new();
        let disk = folder.disk("disk", 1 << 20);
        let config = |cache: &str| {
            let mut config = probe_vm_with_disks("print:up,hlt", &[&disk]);
            config["drives"][0]["cache_type"] = json!(cache);
            config
        };
        let monitor = Monitor::boot(&folder, &config("Unsafe"));
        monitor.expect("probe: print:up ok");
        assert_eq!(pool_threads(&monitor).len(), 8);
        drop(monitor);
        let memory = tempfile_in_memory();
        let mut config = config("Unsafe");
        config["drives"][0]["path_on_host"] = json!(memory.0);
        let monitor = Monitor::boot(&folder, &config);
        monitor.expect("probe: print:up ok");
        assert_eq!(pool_threads(&monitor), [0; 0]);
    });
}

/// A file that goes with the value.
struct InMemory(String);

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn tempfile_in_memory() -> InMemory {
    let path = format!("/dev/shm/mf-test-pool-{}", std::process::id());
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    InMemory(path)
}

#[test]
fn call_outside_the_filter_when_made_on_a_thread_of_the_pool_ends_the_process_with_148() {
    needs!(kvm, root);
    for (number, name) in [
        (libc::SYS_socket, "socket"),
        (libc::SYS_openat, "openat"),
        (libc::SYS_clone3, "clone3"),
        (libc::SYS_mprotect, "mprotect"),
        (libc::SYS_io_uring_setup, "io_uring_setup"),
        (libc::SYS_epoll_wait, "epoll_wait"),
    ] {
        common::with_io_uring_answering(Some(libc::EPERM), move || {
            let folder = Folder::new();
            let disk = folder.disk("disk", 1 << 20);
            let config = probe_vm_with_disks("print:up,hlt", &[&disk]);
            let mut monitor = Monitor::boot(&folder, &config);
            monitor.expect("probe: print:up ok");
            let threads = pool_threads(&monitor);
            assert_eq!(sys::inject(threads[0], number), None, "{name}");
            let status = monitor.wait();
            assert_eq!(status.code(), Some(148), "{name}");
            let said = monitor.stderr() + &folder.read("log");
            assert!(said.contains(name) && said.contains("block-pool"), "{said}");
        });
    }
}
