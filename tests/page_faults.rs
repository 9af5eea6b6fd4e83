//! Guest memory that another process brings in, and what becomes of a guest whose handler of page faults
//! is there and does not answer.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::collections::BTreeSet;
use std::fs::File;
use std::mem;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use common::{Api, Folder, Monitor, needs, probe_vm, sys};
use pair::{Pair, pause, resume, save_and_end};
use serde_json::{Value, json};

/// A handler of page faults, whose answers can be held back.
struct Handler {
    listener: UnixListener,
    image: File,
    /// Faults are read, and not answered.
    is_silent: AtomicBool,
    has_ended: AtomicBool,
    /// Faults that have been read and not answered.
    waiting: AtomicUsize,
}

impl Handler {
    fn new(socket: &Path, image: &Path) -> Self {
        Handler {
            listener: UnixListener::bind(socket).unwrap(),
            image: File::open(image).unwrap(),
            is_silent: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Serves one process until it is told to end.
    fn serve(&self) {
        let (stream, _): (UnixStream, _) = self.listener.accept().unwrap();
        let mut message = vec![0; 4096];
        let (count, faults) = sys::receive_with(&stream, &mut message);
        let faults = File::from(faults);
        let mappings: Value = serde_json::from_slice(&message[..count]).unwrap();
        // A vCPU that is told to stop while it waits has its fault again and again.
        let mut waiting = BTreeSet::new();
        while !self.has_ended.load(Ordering::SeqCst) {
            waiting.extend(sys::next_fault(&faults, 10).map(|address| address & !4095));
            self.waiting.store(waiting.len(), Ordering::SeqCst);
            if self.is_silent.load(Ordering::SeqCst) {
                continue;
            }
            for address in mem::take(&mut waiting) {
                let mut page = [0; 4096];
                let offset = offset_in(&mappings, address);
                self.image.read_exact_at(&mut page, offset).unwrap();
                sys::answer_fault(&faults, address, &page);
            }
        }
    }
}

/// However the test ends.
struct EndAtDrop<'a>(&'a AtomicBool);

impl Drop for EndAtDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Where the page at `address` of the monitor is in the image.
fn offset_in(mappings: &Value, address: u64) -> u64 {
    let number = |mapping: &Value, name: &str| mapping[name].as_u64().unwrap();
    let mut mappings = mappings.as_array().unwrap().iter();
    let found = mappings.find_map(|mapping| {
        let inside = address.checked_sub(number(mapping, "base_host_virt_addr"))?;
        (inside < number(mapping, "size")).then(|| number(mapping, "offset") + inside)
    });
    found.expect("an address of guest memory")
}

/// Asks while `GET /` is answered all the time.
fn refused(api: &Api, method: &str, path: &str, body: &Value) -> String {
    let ((status, answer), rounds) =
        api.answers_while(|api| api.request(method, path, &body.to_string()));
    assert!(rounds > 25, "it did not wait: {answer}");
    assert_eq!(status, 400, "{answer}");
    answer
}

#[test]
fn handler_when_it_does_not_answer_makes_pause_and_snapshot_fail_and_the_guest_goes_on() {
    needs!(kvm, root);
    let folder = Folder::new();
    let mut config = probe_vm("fill:4:7,shell");
    config["machine-config"]["mem_size_mib"] = json!(16);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("shell ready");
    let pair = Pair::new(&folder, "saved");
    save_and_end(monitor, &api, &pair);

    let socket = folder.join("handler");
    let handler = Handler::new(&socket, &pair.memory);
    thread::scope(|scope| {
        scope.spawn(|| handler.serve());
        let _end = EndAtDrop(&handler.has_ended);
        let own = Folder::new();
        let (mut monitor, api) = Monitor::unconfigured(&own);
        let load = json!({
            "snapshot_path": pair.state,
            "mem_backend": {"backend_type": "Uffd", "backend_path": socket},
            "resume_vm": true,
        });
        api.put("/snapshot/load", load);
        // Not yet read pages of the pattern: the vCPU waits for them.
        handler.is_silent.store(true, Ordering::SeqCst);
        monitor.type_in("check:4:7\n");
        common::wait_until("a fault waits", || {
            handler.waiting.load(Ordering::SeqCst) > 0
        });
        let answer = refused(&api, "PATCH", "/vm", &json!({"state": "Paused"}));
        assert!(
            answer.contains("vCPU 0 has not stopped within 10 s") && answer.contains("page fault"),
            "{answer}"
        );
        assert_eq!(api.get("/")["state"], "Running");
        handler.is_silent.store(false, Ordering::SeqCst);
        monitor.expect("check:4:7 ok");
        pause(&api);
        assert_eq!(api.get("/")["state"], "Paused");

        // A snapshot reads all of guest memory.
        handler.is_silent.store(true, Ordering::SeqCst);
        let again = Pair::new(&folder, "again");
        let answer = refused(&api, "PUT", "/snapshot/create", &again.create("Full"));
        assert!(
            answer.contains("page fault handler") && answer.contains("nothing was changed"),
            "{answer}"
        );
        // The guest goes on before the snapshot could: nothing of that comes into a file.
        resume(&api);
        handler.is_silent.store(false, Ordering::SeqCst);
        monitor.type_in("check:4:7\n");
        monitor.expect("check:4:7 ok");
        pause(&api);
        let other = Pair::new(&folder, "other");
        common::wait_until("the files thread is free", || {
            let (status, answer) =
                api.request("PUT", "/snapshot/create", &other.create("Full").to_string());
            assert!(status == 204 || answer.contains("Not tried"), "{answer}");
            status == 204
        });
        assert!(!again.state.exists() && !again.memory.exists());
    });
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
