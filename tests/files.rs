//! Files whose file system does not answer (FUSE): whatever is opened, read or written, control
//! answers other requests meanwhile, the request that needs the file gets its answer, and SIGTERM
//! ends the process.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::fuse::Slow;
use common::{Api, Folder, Monitor, needs, probe_vm, probe_vm_with_disks, sys};
use serde_json::{Value, json};

/// More than the deadline for a file, and than a busy machine makes of it.
const ANSWER: Duration = Duration::from_secs(60);

/// Runs `test` on a thread of its own: the file system is mounted for that and what it starts.
fn with_slow(name: &str, content: Vec<u8>, test: impl FnOnce(&Folder, &Slow) + Send + 'static) {
    if !common::kvm(name) || !common::needs_root(name) {
        return;
    }
    let own = thread::spawn(move || {
        let folder = Folder::new();
        let slow = Slow::mount_with(&folder.join("slow"), content);
        test(&folder, &slow);
        // The folder can only be removed once nothing is mounted in it for us.
        drop(slow);
    });
    own.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
}

/// A request that needs a file which does not answer: it is refused in time with a message that
/// names the file, and `GET /` is answered all the while.
fn refused_in_time(api: &Api, method: &str, path: &str, body: &Value, file: &Path) -> String {
    let asked = Instant::now();
    let ((status, answer), rounds) =
        api.answers_while(|api| api.request(method, path, &body.to_string()));
    assert!(
        rounds > 10,
        "{path}: the file did not hang: {rounds} rounds, {:?}: {answer}",
        asked.elapsed()
    );
    assert!(asked.elapsed() < ANSWER, "{path}: {:?}", asked.elapsed());
    assert_eq!(status, 400, "{path}: {answer}");
    assert!(
        answer.contains("No answer from a file") && answer.contains(file.to_str().unwrap()),
        "{path}: {answer}"
    );
    answer
}

/// SIGTERM ends it, by the signal.
fn ends_by_sigterm(mut monitor: Monitor) {
    sys::kill(monitor.pid(), libc::SIGTERM);
    let status = monitor.wait();
    assert_eq!(status.signal(), Some(libc::SIGTERM), "{status:?}");
}

#[test]
fn drive_update_when_the_open_hangs_is_refused_and_holds_up_nothing_else() {
    let test = "drive_update_when_the_open_hangs_is_refused_and_holds_up_nothing_else";
    with_slow(test, vec![0; 4096], |folder, slow| {
        let (one, two) = (folder.disk("one", 4096), folder.disk("two", 4096));
        let config = probe_vm_with_disks("print:up,spin", &[&one]);
        let (monitor, api) = Monitor::boot_with_api(folder, &config);
        monitor.expect("probe: print:up ok");
        let update = json!({"drive_id": "disk0", "path_on_host": slow.path()});
        let silent = slow.fall_silent();
        let answer = refused_in_time(&api, "PATCH", "/drives/disk0", &update, &slow.path());
        assert!(answer.contains("opening the disk"), "{answer}");
        // While it hangs, another file is not waited for; what needs no file is done.
        let other = json!({"drive_id": "disk0", "path_on_host": two});
        let answer = api.refused("PATCH", "/drives/disk0", other.clone());
        assert!(
            answer.contains("Not tried, because opening the disk"),
            "{answer}"
        );
        let limits = json!({"ops": {"size": 1000, "refill_time": 100}});
        api.patch(
            "/drives/disk0",
            json!({"drive_id": "disk0", "rate_limiter": limits}),
        );
        api.patch("/vm", json!({"state": "Paused"}));
        api.patch("/vm", json!({"state": "Resumed"}));
        let drive = &api.get("/vm/config")["drives"][0]["path_on_host"];
        assert_eq!(*drive, json!(one));
        // It answers again: what was refused is not done after all, and works when asked for again.
        drop(silent);
        common::wait_until("the files thread is free", || {
            api.request("PATCH", "/drives/disk0", &other.to_string()).0 == 204
        });
        let drive = &api.get("/vm/config")["drives"][0]["path_on_host"];
        assert_eq!(*drive, json!(two));
        let metrics = api.request("GET", "/metrics", "").1;
        assert!(
            metrics.contains("mayfly_late_file_operations_total 1"),
            "{metrics}"
        );
        // What was refused is closed by the thread too, the slow file among it: each further update
        // waits for the closes before it.
        for _ in 0..8 {
            api.patch("/drives/disk0", other.clone());
        }
        let silent = slow.fall_silent();
        refused_in_time(&api, "PATCH", "/drives/disk0", &update, &slow.path());
        ends_by_sigterm(monitor);
        drop(silent);
    });
}

#[test]
fn metrics_when_their_file_hangs_are_refused_and_hold_up_nothing_else() {
    let test = "metrics_when_their_file_hangs_are_refused_and_hold_up_nothing_else";
    with_slow(test, Vec::new(), |folder, slow| {
        let mut config = probe_vm("print:up,spin");
        config["metrics"] = json!({"metrics_path": slow.path()});
        let (monitor, api) = Monitor::boot_with_api(folder, &config);
        monitor.expect("probe: print:up ok");
        let flush = json!({"action_type": "FlushMetrics"});
        api.put("/actions", flush.clone());
        let silent = slow.fall_silent();
        let body = flush.to_string();
        let answer = thread::scope(|scope| {
            let asking = scope.spawn(|| api.request("PUT", "/actions", &body));
            while !asking.is_finished() {
                api.get("/");
                thread::sleep(Duration::from_millis(20));
            }
            asking.join().unwrap()
        });
        assert_eq!(answer.0, 400, "{answer:?}");
        assert!(answer.1.contains("writing the metrics"), "{answer:?}");
        let message = api.refused("PUT", "/actions", flush.clone());
        assert!(message.contains("has not been written yet"), "{message}");
        // It answers again: lines are whole, and go on.
        drop(silent);
        common::wait_until("metrics are written", || {
            api.request("PUT", "/actions", &body).0 == 204
        });
        let text = String::from_utf8(slow.content()).unwrap();
        let lines = text.lines().map(serde_json::from_str::<Value>);
        assert!(lines.map(Result::unwrap).count() >= 3, "{text}");
        let silent = slow.fall_silent();
        ends_by_sigterm(monitor);
        drop(silent);
    });
}

#[test]
fn metrics_when_clients_ask_while_a_line_is_written_are_written_for_all_of_them() {
    let test = "metrics_when_clients_ask_while_a_line_is_written_are_written_for_all_of_them";
    with_slow(test, Vec::new(), |folder, slow| {
        let mut config = probe_vm("print:up,spin");
        config["metrics"] = json!({"metrics_path": slow.path()});
        let (monitor, api) = Monitor::boot_with_api(folder, &config);
        monitor.expect("probe: print:up ok");
        let body = json!({"action_type": "FlushMetrics"}).to_string();
        let length = body.len();
        let request = format!("PUT /actions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
        let silent = slow.fall_silent();
        let clients = [(); 5].map(|()| {
            let client = api.send_with(request.as_bytes(), &[]);
            // Once this is answered, control has seen the one before it.
            api.get("/");
            client
        });
        drop(silent);
        for mut client in clients {
            assert_eq!(common::read_response(&mut client), (204, String::new()));
        }
        ends_by_sigterm(monitor);
    });
}

#[test]
fn snapshot_when_its_file_hangs_is_refused_and_the_guest_goes_on() {
    let test = "snapshot_when_its_file_hangs_is_refused_and_the_guest_goes_on";
    with_slow(test, vec![0; 4096], |folder, slow| {
        let (monitor, api) = Monitor::boot_with_api(folder, &probe_vm("shell"));
        monitor.expect("shell ready");
        api.patch("/vm", json!({"state": "Paused"}));
        let open = |path: &Path| {
            let mut options = fs::File::options();
            let options = options.read(true).write(true).create(true).truncate(false);
            options.open(path).unwrap()
        };
        let (state, memory) = (open(&folder.join("state")), open(&slow.path()));
        let silent = slow.fall_silent();
        let asked = Instant::now();
        let body = json!({
            "snapshot_path": {"fd": 0},
            "mem_file_path": {"fd": 1, "name": "the memory"},
        });
        let ((status, answer), _) = api.answers_while(|api| {
            let fds = [state.as_fd(), memory.as_fd()];
            api.request_with("PUT", "/snapshot/create", &body.to_string(), &fds)
        });
        assert!(asked.elapsed() > Duration::from_secs(10), "it did not hang");
        assert_eq!(status, 400, "{answer}");
        assert!(
            answer.contains("No answer from a file") && answer.contains("snapshot's files"),
            "{answer}"
        );
        api.patch("/vm", json!({"state": "Resumed"}));
        let refused = api.refused(
            "PUT",
            "/snapshot/create",
            json!({"snapshot_path": "/x", "mem_file_path": "/y", "snapshot_type": "Fork"}),
        );
        assert!(refused.contains("Not tried"), "{refused}");
        drop((monitor, silent));
    });
}

#[test]
fn log_when_its_file_hangs_holds_up_nothing() {
    let test = "log_when_its_file_hangs_holds_up_nothing";
    with_slow(test, Vec::new(), |folder, slow| {
        let (one, two) = (folder.disk("one", 4096), folder.disk("two", 4096));
        let mut config = probe_vm_with_disks("print:up,echo,spin", &[&one]);
        config["logger"] = json!({"log_path": slow.path(), "level": "Debug"});
        let (mut monitor, api) = Monitor::boot_with_api(folder, &config);
        monitor.expect("probe: echo ready");
        let silent = slow.fall_silent();
        // Each is a line of the log.
        for _ in 0..200 {
            api.refused("PUT", "/actions", json!({"action_type": "None"}));
        }
        api.patch(
            "/drives/disk0",
            json!({"drive_id": "disk0", "path_on_host": two}),
        );
        monitor.type_in("still here\n");
        monitor.expect("still here");
        ends_by_sigterm(monitor);
        drop(silent);
    });
}

#[test]
fn console_output_when_its_file_hangs_holds_up_nothing_else() {
    let test = "console_output_when_its_file_hangs_holds_up_nothing_else";
    with_slow(test, Vec::new(), |folder, slow| {
        let (monitor, api) = Monitor::unconfigured(folder);
        api.put("/serial", json!({"serial_out_path": slow.path()}));
        let vm = probe_vm("print:up,spin");
        api.put("/boot-source", vm["boot-source"].clone());
        let silent = slow.fall_silent();
        api.put("/actions", json!({"action_type": "InstanceStart"}));
        common::wait_until("the guest writes", || {
            let metrics = api.request("GET", "/metrics", "").1;
            let line = metrics
                .lines()
                .find(|l| l.contains("direction=\"output\"}"));
            line.is_some_and(|line| !line.ends_with(" 0"))
        });
        api.patch("/vm", json!({"state": "Paused"}));
        ends_by_sigterm(monitor);
        // The log has its last lines all the same.
        let log = fs::read_to_string(folder.join("log")).unwrap();
        assert!(log.contains("Vmm is stopping."), "{log}");
        drop(silent);
    });
}

#[test]
fn request_before_the_start_when_its_file_hangs_is_refused_and_holds_up_nothing_else() {
    let test = "request_before_the_start_when_its_file_hangs";
    with_slow(test, vec![0; 4096], |_, slow| {
        let path = slow.path();
        let kernel = common::probe();
        let boot = json!({"kernel_image_path": kernel});
        let vm = json!({"boot-source": boot, "drives": [], "cpu-config": path});
        let socket = path.with_file_name("socket");
        let cases = [
            ("/boot-source", json!({"kernel_image_path": path}), &path),
            (
                "/boot-source",
                json!({"kernel_image_path": kernel, "initrd_path": path}),
                &path,
            ),
            (
                "/drives/d",
                json!({"drive_id": "d", "path_on_host": path, "is_root_device": false}),
                &path,
            ),
            ("/serial", json!({"serial_out_path": path}), &path),
            ("/serial", json!({"console_socket": socket}), &socket),
            ("/logger", json!({"log_path": path}), &path),
            ("/metrics", json!({"metrics_path": path}), &path),
            ("/vm", vm, &path),
        ];
        let folders: Vec<Folder> = cases.iter().map(|_| Folder::new()).collect();
        let monitors: Vec<(Monitor, Api)> = folders.iter().map(Monitor::unconfigured).collect();
        let silent = slow.fall_silent();
        thread::scope(|scope| {
            for ((request, body, file), (_, api)) in cases.iter().zip(&monitors) {
                scope.spawn(move || {
                    refused_in_time(api, "PUT", request, body, file);
                    // What needs no file is done in its turn.
                    api.put(
                        "/machine-config",
                        json!({"vcpu_count": 1, "mem_size_mib": 64}),
                    );
                });
            }
        });
        for (monitor, _) in monitors {
            ends_by_sigterm(monitor);
        }
        drop(silent);
    });
}

#[test]
fn requests_when_one_waits_for_its_file_keep_their_order() {
    let test = "requests_when_one_waits_for_its_file_keep_their_order";
    with_slow(test, vec![0; 4096], |folder, slow| {
        let (_monitor, api) = Monitor::unconfigured(folder);
        let drive = |path: &Path| {
            json!({"drive_id": "d", "path_on_host": path, "is_root_device": false}).to_string()
        };
        let last = folder.disk("last", 4096);
        let (first, last_body) = (drive(&slow.path()), drive(&last));
        let silent = slow.fall_silent();
        thread::scope(|scope| {
            let one = scope.spawn(|| api.request("PUT", "/drives/d", &first));
            common::wait_until("the first hangs", || {
                let metrics = api.request("GET", "/metrics", "").1;
                metrics.contains("mayfly_file_operations_pending 1")
            });
            let two = scope.spawn(|| api.request("PUT", "/drives/d", &last_body));
            let config = || api.get("/vm/config")["drives"].clone();
            assert_eq!(config(), json!([]));
            drop(silent);
            assert_eq!(one.join().unwrap().0, 204);
            assert_eq!(two.join().unwrap().0, 204);
            assert_eq!(config()[0]["path_on_host"], json!(last));
        });
    });
}

#[test]
fn start_when_the_kernel_hangs_is_refused_and_can_be_tried_again() {
    let test = "start_when_the_kernel_hangs_is_refused_and_can_be_tried_again";
    let kernel = fs::read(common::probe()).unwrap();
    with_slow(test, kernel, |folder, slow| {
        let (monitor, api) = Monitor::unconfigured(folder);
        let boot = json!({"kernel_image_path": slow.path(), "boot_args": "probe=print:up,spin"});
        api.put("/boot-source", boot);
        let silent = slow.fall_silent();
        let start = json!({"action_type": "InstanceStart"});
        refused_in_time(&api, "PUT", "/actions", &start, &slow.path());
        assert_eq!(api.get("/")["state"], "Not started");
        drop(silent);
        common::wait_until("it starts", || {
            api.request("PUT", "/actions", &start.to_string()).0 == 204
        });
        monitor.expect("probe: print:up ok");
        ends_by_sigterm(monitor);
    });
}

#[test]
fn command_line_when_its_file_hangs_ends_in_order() {
    let test = "command_line_when_its_file_hangs_ends_in_order";
    with_slow(test, b"{}".to_vec(), |folder, slow| {
        let path = slow.path();
        let socket = path.with_file_name("api");
        let silent = slow.fall_silent();
        // With a deadline.
        let cases = [
            (vec!["--no-api", "--log-path"], &path, "opening the log"),
            (
                vec!["--no-api", "--metrics-path"],
                &path,
                "opening the metrics",
            ),
            (vec!["--api-sock"], &socket, "making the API socket"),
        ];
        let config = folder.file("vm.json", probe_vm("spin").to_string());
        let started = cases.map(|(args, file, text)| {
            let mut command = Command::new(common::mayfly());
            command
                .args(args)
                .arg(file)
                .arg("--config-file")
                .arg(&config);
            (Monitor::spawn(command), text)
        });
        for (mut monitor, text) in started {
            monitor.exits_with(1);
            assert!(monitor.stderr().contains(text), "{}", monitor.stderr());
        }
        // The configuration is waited for, until a signal comes.
        let mut command = Command::new(common::mayfly());
        command.args(["--no-api", "--config-file"]).arg(&path);
        let monitor = Monitor::spawn(command);
        common::wait_until("there are two threads", || monitor.threads().len() >= 2);
        monitor.expect("Running Firecracker");
        ends_by_sigterm(monitor);
        drop(silent);
    });
}

#[test]
fn config_file_when_a_fifo_is_read_to_its_end() {
    needs!(kvm);
    let folder = Folder::new();
    let fifo = folder.join("fifo");
    common::run("mkfifo", &[fifo.to_str().unwrap()]);
    let mut command = Command::new(common::mayfly());
    command.args(["--no-api", "--config-file"]).arg(&fifo);
    let mut monitor = Monitor::spawn(command);
    let text = probe_vm("print:up,reset").to_string();
    let mut writer = fs::File::options().write(true).open(&fifo).unwrap();
    // In two parts, the second when the first has been taken.
    let (first, second) = text.split_at(text.len() / 2);
    writer.write_all(first.as_bytes()).unwrap();
    monitor.comes_to_rest("files");
    writer.write_all(second.as_bytes()).unwrap();
    drop(writer);
    monitor.expect("probe: print:up ok");
    monitor.exits_with(0);
}

#[test]
fn config_file_when_nothing_writes_the_fifo_is_waited_for_until_a_signal() {
    needs!(kvm);
    let folder = Folder::new();
    let fifo = folder.join("fifo");
    common::run("mkfifo", &[fifo.to_str().unwrap()]);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut command = Command::new(common::mayfly());
        command.args(["--no-api", "--config-file"]).arg(&fifo);
        let mut monitor = Monitor::spawn(command);
        monitor.expect("Running Firecracker");
        sys::kill(monitor.pid(), signal);
        assert_eq!(monitor.wait().signal(), Some(signal));
        assert!(
            monitor.stdout().contains("Vmm is stopping."),
            "{}",
            monitor.stdout()
        );
    }
}

#[test]
fn end_when_its_descriptor_and_the_metrics_hang_is_still_the_guests() {
    let test = "end_when_its_descriptor_and_the_metrics_hang_is_still_the_guests";
    with_slow(test, Vec::new(), |folder, slow| {
        let mut config = probe_vm("echo,reset");
        config["metrics"] = json!({"metrics_path": slow.path()});
        let file = folder.file("vm.json", config.to_string());
        let mut command = Command::new(common::mayfly());
        command
            .args(["--no-api", "--end-fd", "9", "--config-file"])
            .arg(file);
        let end = fs::File::options().append(true).open(slow.path()).unwrap();
        sys::hand_in(&mut command, end.into(), 9);
        let mut monitor = Monitor::spawn(command);
        monitor.expect("probe: echo ready");
        let silent = slow.fall_silent();
        monitor.type_in("x\n");
        monitor.exits_with(0);
        let output = monitor.stdout();
        assert!(output.contains("exit_code=0"), "{output}");
        drop(silent);
    });
}
