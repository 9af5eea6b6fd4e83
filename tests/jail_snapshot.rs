//! Snapshots and the empty jail: templates that `run --snapshot-to` makes, and microVMs that
//! `run --snapshot` starts from them, as root and as an ordinary user, with real guests; and snapshots
//! inside of the compatible jail.

#[path = "common/mod.rs"]
mod common;
#[path = "jail/host.rs"]
mod host;
#[path = "jail/run.rs"]
mod run;

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::needs;
use host::{Host, wait_until};
use mayfly::snapshot::{self, SnapshotId};
use run::{BOTH, Place, Who, fact};

/// The place for a test of this name, with the real monitor and its guest.
macro_rules! place {
    ($test:literal) => {{
        needs!(root, kvm);
        let place = Place::real($test, &common::mayfly());
        copy_for_all(&common::probe(), &place.path("probe"));
        // Where a user may make a folder.
        let templates = place.path("templates");
        fs::create_dir(&templates).unwrap();
        fs::set_permissions(&templates, Permissions::from_mode(0o777)).unwrap();
        place
    }};
}

fn copy_for_all(from: &Path, to: &str) {
    fs::copy(from, to).unwrap();
    fs::set_permissions(to, Permissions::from_mode(0o666)).unwrap();
}

/// An image of zeros that every user may write to.
fn image(path: &str) {
    let file = File::create(path).unwrap();
    file.set_len(1 << 20).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
}

/// `mayfly-jailer run` of the probe guest with `words`, taking a snapshot into `to`.
fn template(place: &Place, who: Who, words: &str, to: &str, more: &[&str]) -> Command {
    let (kernel, cmdline) = (place.path("probe"), format!("probe={words}"));
    let machine = ["run", "--kernel", &kernel, "--cmdline", &cmdline];
    let memory = ["--memory", "32", "--snapshot-to", to];
    place.jailer(who, &[&machine[..], &memory, more].concat())
}

/// A jailer whose guest reads words from its console.
struct Running {
    child: Child,
    text: String,
}

impl Running {
    fn start(mut command: Command) -> Running {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let text = String::new();
        Running { child, text }
    }

    fn read_until(&mut self, words: &str) {
        let console = self.child.stdout.as_mut().unwrap();
        while !self.text.contains(words) {
            let mut bytes = [0; 256];
            let count = console.read(&mut bytes).unwrap();
            if count == 0 {
                let mut err = String::new();
                let _ = self.child.stderr.as_mut().unwrap().read_to_string(&mut err);
                panic!("{words} in {} {err}", self.text);
            }
            self.text += &String::from_utf8_lossy(&bytes[..count]);
        }
    }

    fn send(&mut self, words: &str) {
        let console = self.child.stdin.as_mut().unwrap();
        console.write_all(words.as_bytes()).unwrap();
    }

    fn signal(&self, name: &str) {
        assert!(self.try_signal(name));
    }

    fn try_signal(&self, name: &str) -> bool {
        let pid = self.child.id().to_string();
        let name = format!("-{name}");
        let status = Command::new("kill").args([name, pid]).status();
        status.is_ok_and(|status| status.success())
    }

    /// The exit code, and what the jailer said.
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.child.stdin.take());
        let mut err = Vec::new();
        // What the guest still writes is read beside it: a full pipe would hold it up.
        let mut console = self.child.stdout.take().unwrap();
        let reader = thread::spawn(move || io::copy(&mut console, &mut io::sink()));
        let stderr = self.child.stderr.as_mut().unwrap();
        stderr.read_to_end(&mut err).unwrap();
        let code = self.child.wait().unwrap().code();
        reader.join().unwrap().unwrap();
        (code, String::from_utf8_lossy(&err).into_owned())
    }
}

impl Drop for Running {
    /// A test that failed leaves no microVM: it ends as at SIGTERM, or else is killed.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.try_signal("TERM");
            let by = Instant::now() + Duration::from_secs(10);
            while let Ok(None) = self.child.try_wait() {
                if Instant::now() > by {
                    let _ = self.child.kill();
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
            let _ = self.child.wait();
        }
    }
}

/// The id of a snapshot whose files belong together.
fn whole(folder: &str) -> SnapshotId {
    let state = File::open(format!("{folder}/state")).unwrap();
    let (header, _) = snapshot::read(&state).unwrap_or_else(|refusal| panic!("{refusal}"));
    let memory = File::open(format!("{folder}/memory")).unwrap();
    let belongs = snapshot::check_memory(&header, &memory);
    belongs.unwrap_or_else(|refusal| panic!("{refusal}"));
    header.id
}

/// The names in a folder.
fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn template_when_the_guest_is_ready_is_made_and_started_from() {
    let place = place!("sready");
    let report = place.path("templates/report.json");
    for who in BOTH {
        let folder = place.path(&format!("templates/{who:?}/deep"));
        let more = ["--exit-report", report.as_str()];
        let words = "print:before,timer,echo:1,reset";
        let ended = place.ends(template(&place, who, words, &folder, &more), 0);
        assert!(ended.out.contains("before"), "{ended:?}");
        for words in ["the snapshot is in ", "32 MiB of memory", " ms"] {
            assert!(ended.err.contains(words), "{words} in {ended:?}");
        }
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "snapshot", "{text}");
        assert_eq!(fact(&text, "exit_code"), "0", "{text}");
        fs::remove_file(&report).unwrap();
        whole(&folder);
        assert_eq!(names(&folder), ["memory", "state"]);
        let memory = fs::metadata(format!("{folder}/memory")).unwrap();
        assert_eq!(memory.len(), 32 << 20);
        // Guest memory is its owner's alone.
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o77, 0);
        // What the guest has not touched takes no room.
        assert!(memory.blocks() * 512 < 16 << 20, "{}", memory.blocks());
        // Any number of times.
        for _ in 0..2 {
            let command = place.jailer(who, &["run", "--snapshot", &folder]);
            let mut running = Running::start(command);
            running.send("typed\n");
            running.read_until("got typed");
            assert!(!running.text.contains("before"), "{}", running.text);
            assert_eq!(running.end().0, Some(0));
            place.nothing_is_left();
        }
        // An older one is replaced, quietly.
        let id = whole(&folder);
        let quiet = template(&place, who, words, &folder, &["--quiet"]);
        assert_eq!(place.ends(quiet, 0).err, "");
        assert_ne!(whole(&folder), id);
    }
}

#[test]
fn signal_when_it_asks_for_a_snapshot_takes_one_and_the_guest_ends_or_goes_on() {
    let place = place!("ssignal");
    for who in BOTH {
        let folder = place.path(&format!("templates/{who:?}"));
        let command = template(&place, who, "echo:1,reset", &folder, &[]);
        let mut running = Running::start(command);
        running.read_until("echo ready");
        running.signal("USR1");
        let (code, err) = running.end();
        assert_eq!(code, Some(0), "{err}");
        let first = whole(&folder);
        place.nothing_is_left();

        let more = ["--snapshot-and-continue"];
        let words = "echo:1,timer,echo:1,reset";
        let mut running = Running::start(template(&place, who, words, &folder, &more));
        running.read_until("echo ready");
        running.signal("USR1");
        wait_until("a snapshot", || whole_if_any(&folder) != Some(first));
        let second = whole(&folder);
        // The boot timer comes too late to count.
        running.send("on\n");
        running.read_until("got on");
        running.read_until("timer ok");
        assert_eq!(whole(&folder), second);
        running.signal("USR1");
        wait_until("another", || whole_if_any(&folder) != Some(second));
        running.send("end\n");
        let (code, err) = running.end();
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(err.matches("the snapshot is in").count(), 2, "{err}");
        place.nothing_is_left();
        // The last one waits for its line.
        let mut running = Running::start(place.jailer(who, &["run", "--snapshot", &folder]));
        running.send("again\n");
        running.read_until("got again");
        assert_eq!(running.end().0, Some(0));
        place.nothing_is_left();
    }
}

/// The same while it may be just being put in place.
fn whole_if_any(folder: &str) -> Option<SnapshotId> {
    let state = File::open(format!("{folder}/state")).ok()?;
    Some(snapshot::read(&state).ok()?.0.id)
}

#[test]
fn clones_at_the_same_time_have_disks_of_their_own() {
    let place = place!("sclones");
    let (root, data) = (place.path("root"), place.path("data"));
    for name in [&root, &data] {
        image(name);
    }
    for who in BOTH {
        let folder = place.path(&format!("templates/{who:?}"));
        let only_to_read = format!("{root}:ro");
        let disks = ["--drive", &only_to_read, "--drive", &data];
        let command = template(&place, who, "timer,shell,reset", &folder, &disks);
        place.ends(command, 0);
        let run = |more: &[&str]| {
            let words = [&["run", "--snapshot", &folder][..], more].concat();
            place.jailer(who, &words)
        };
        let err = place.refuses(run(&[]), "disk1");
        assert!(
            err.contains(&data) && err.contains("--drive disk1=FILE"),
            "{err}"
        );
        let images = [place.path("one"), place.path("two")];
        let mut clones: Vec<_> = images
            .iter()
            .zip(["one", "two"])
            .map(|(path, name)| {
                image(path);
                let own = format!("disk1={path}");
                let id = format!("clone-{name}");
                Running::start(run(&["--drive", &own, "--id", &id]))
            })
            .collect();
        for (clone, seed) in clones.iter_mut().zip(["1", "2"]) {
            clone.send(&format!(
                "blkwrite:1:0:8:{seed}\nblkverify:1:0:8:{seed}\nblkread:0:0:1\n"
            ));
            clone.read_until("blkread:0:0:1 ok");
            assert!(!clone.text.contains("FAILED"), "{}", clone.text);
        }
        for mut clone in clones {
            clone.send("end\n");
            assert_eq!(clone.end().0, Some(0));
        }
        place.nothing_is_left();
        let [one, two] = images.map(|path| fs::read(path).unwrap());
        assert!(one != two && one[..4096].iter().any(|byte| *byte != 0));
        assert!(fs::read(&data).unwrap().iter().all(|byte| *byte == 0));
        // With that word it is the same disk.
        let mut same = Running::start(run(&["--same-disks"]));
        same.send("blkwrite:1:0:8:3\nend\n");
        same.read_until("blkwrite:1:0:8:3 ok");
        assert_eq!(same.end().0, Some(0));
        assert!(fs::read(&data).unwrap().iter().any(|byte| *byte != 0));
        image(&data);
        place.nothing_is_left();
    }
}

#[test]
fn working_set_when_it_is_new_is_recorded_and_then_used() {
    let place = place!("sworkingset");
    for who in BOTH {
        let folder = place.path(&format!("templates/{who:?}"));
        place.ends(template(&place, who, "timer,shell,reset", &folder, &[]), 0);
        let file = place.path(&format!("templates/{who:?}.pages"));
        let run = || {
            let words = ["run", "--snapshot", &folder, "--working-set", &file];
            let mut guest = Running::start(place.jailer(who, &words));
            guest.send("timer\nmem\n");
            guest.read_until("timer");
            guest
        };
        let mut first = run();
        wait_until("the working set has been recorded", || {
            fs::metadata(&file).is_ok_and(|it| it.len() > 0)
        });
        first.send("end\n");
        assert_eq!(first.end().0, Some(0));
        let recorded = fs::read(&file).unwrap();
        let mut second = run();
        second.send("end\n");
        assert_eq!(second.end().0, Some(0));
        assert_eq!(fs::read(&file).unwrap(), recorded);
        place.nothing_is_left();
        // What is something else is not overwritten.
        fs::write(&file, "a file of the user's").unwrap();
        let words = ["run", "--snapshot", &folder, "--working-set", &file];
        place.refuses(place.jailer(who, &words), "not overwritten");
    }
}

#[test]
fn what_does_not_go_with_a_snapshot_is_refused_by_name() {
    let place = place!("srefused");
    let folder = place.path("templates/one");
    let disk = place.path("root");
    image(&disk);
    let command = template(
        &place,
        Who::Root,
        "timer,echo:1",
        &folder,
        &["--drive", &disk],
    );
    place.ends(command, 0);
    let with_drive = ["--drive", &disk];
    for (more, expected) in [
        (&["--kernel", "/k"][..], "--kernel"),
        (&["--initrd", "/k"], "--initrd"),
        (&["--cmdline", "k"], "--cmdline"),
        (&["--vcpus", "2"], "--vcpus"),
        (&["--memory", "64"], "--memory"),
        (&["--config", "/c"], "--config"),
        (&["--drive", "/no/such/disk"], "No such file"),
        (
            &["--same-disks", "--drive", "other=/dev/null"],
            "it has no disk other",
        ),
        (
            &["--same-disks", "--net", "user"],
            "no network interface eth0",
        ),
    ] {
        let words = [&["run", "--snapshot", &folder], more].concat();
        place.refuses(place.jailer(Who::Root, &words), expected);
    }
    let read_only = format!("{disk}:ro");
    let words = ["run", "--snapshot", &folder, "--drive", &read_only];
    place.refuses(place.jailer(Who::Root, &words), "saved writable");
    let start = |folder: &str| {
        let words = [&["run", "--snapshot", folder], &with_drive[..]].concat();
        place.jailer(Who::Root, &words)
    };
    place.refuses(
        start("/no/such/folder"),
        "/no/such/folder/state cannot be read",
    );
    // One after the other, each on a copy.
    let bad = place.path("templates/bad");
    let (state, memory) = (format!("{bad}/state"), format!("{bad}/memory"));
    let renew = || {
        let _ = fs::remove_dir_all(&bad);
        fs::create_dir(&bad).unwrap();
        fs::copy(format!("{folder}/state"), &state).unwrap();
        fs::copy(format!("{folder}/memory"), &memory).unwrap();
    };
    renew();
    File::options()
        .write(true)
        .open(&state)
        .unwrap()
        .set_len(100)
        .unwrap();
    place.refuses(start(&bad), "is truncated");
    renew();
    let file = File::options().write(true).open(&state).unwrap();
    file.write_all_at(b"?", 500).unwrap();
    place.refuses(start(&bad), "was altered");
    renew();
    File::options()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(4096)
        .unwrap();
    place.refuses(start(&bad), "has 4096 bytes");
    fs::remove_file(&memory).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&memory)
            .status()
            .unwrap()
            .success()
    );
    place.refuses(start(&bad), "is a FIFO");
    // The guest ends before it is ready.
    let command = template(&place, Who::Root, "print:x,reset", &folder, &[]);
    let id = whole(&folder);
    let err = place.refuses(command, "the guest ended before");
    assert!(err.contains("boot timer"), "{err}");
    assert_eq!(whole(&folder), id);
    // The monitor has a word about a machine that cannot be saved where it should go.
    let file = place.path("kernel");
    let command = template(&place, Who::Root, "timer", &file, &[]);
    place.refuses(command, "make the folder");
}

#[test]
fn jailer_when_killed_while_it_takes_a_snapshot_leaves_the_old_one() {
    let place = place!("skilled");
    let folder = place.path("templates/one");
    let words = "fill:20:7,timer,echo:1,check:20:7,stay";
    place.ends(template(&place, Who::Root, words, &folder, &[]), 0);
    let mut id = whole(&folder);
    for round in 0..8 {
        let command = template(
            &place,
            Who::Root,
            "fill:20:9,echo:1,check:20:9,stay",
            &folder,
            &[],
        );
        let mut running = Running::start(command);
        running.read_until("echo ready");
        running.signal("USR1");
        // Killed once there is something to leave, a little later each time.
        let partial = format!("{folder}/.memory.mayfly-partial");
        let is_written = |least: u64| {
            let blocks = fs::metadata(&partial).map(|it| it.blocks());
            blocks.is_ok_and(|blocks| blocks >= least)
        };
        wait_until("the temporary file, or the end", || {
            is_written(round * 2048) || whole_if_any(&folder) != Some(id)
        });
        running.signal("KILL");
        running.end();
        place.nothing_is_left();
        // The old one or the new one.
        let mut started = Running::start(place.jailer(Who::Root, &["run", "--snapshot", &folder]));
        started.send("typed\n");
        started.read_until("halted");
        assert!(started.text.contains("check:20:"), "{}", started.text);
        assert!(!started.text.contains("FAILED"), "{}", started.text);
        started.signal("TERM");
        started.end();
        place.nothing_is_left();
        id = whole_if_any(&folder).unwrap();
    }
    // The next one tidies up.
    place.ends(template(&place, Who::Root, words, &folder, &[]), 0);
    assert_ne!(whole(&folder), id);
    assert_eq!(names(&folder), ["memory", "state"]);
}

#[test]
fn compatible_jail_takes_and_loads_snapshots_by_paths_inside() {
    needs!(root, kvm);
    let host = Host::new("scompat");
    let start = |id: &str| {
        let mut command = host.jailer(id, &["--", "--api-sock", "/api.sock"]);
        command.stdout(Stdio::null());
        command
    };
    fs::copy(common::mayfly(), host.exec_file()).unwrap();
    fs::set_permissions(host.exec_file(), Permissions::from_mode(0o755)).unwrap();
    let place_file = |id: &str, from: &Path, name: &str| {
        let to = host.root(id).join(name);
        fs::copy(from, &to).unwrap();
        std::os::unix::fs::chown(&to, Some(host::UID), Some(host::GID)).unwrap();
    };
    let ask = |id: &str, method: &str, path: &str, body: &str| {
        let socket = host.root(id).join("api.sock");
        wait_until("the API's socket", || UnixStream::connect(&socket).is_ok());
        let mut client = mayfly::wire::Client::connect(&socket).unwrap();
        let answer = client
            .request(method, path, body, &[], common::PATIENCE)
            .unwrap();
        assert!(answer.is_success(), "{path}: {}", answer.fault());
    };
    let mut first = start("first").spawn().unwrap();
    wait_until("the jail", || host.root("first").exists());
    place_file("first", &common::probe(), "probe");
    let boot = r#"{"kernel_image_path":"/probe","boot_args":"probe=echo:1,reset"}"#;
    ask("first", "PUT", "/boot-source", boot);
    ask(
        "first",
        "PUT",
        "/actions",
        r#"{"action_type":"InstanceStart"}"#,
    );
    ask("first", "PATCH", "/vm", r#"{"state":"Paused"}"#);
    let create = r#"{"snapshot_path":"/state","mem_file_path":"/memory"}"#;
    ask("first", "PUT", "/snapshot/create", create);
    assert!(first.try_wait().unwrap().is_none());
    first.kill().unwrap();
    first.wait().unwrap();
    let mut second = start("second").spawn().unwrap();
    wait_until("the jail", || host.root("second").exists());
    for name in ["state", "memory"] {
        place_file("second", &host.root("first").join(name), name);
    }
    let load = r#"{"snapshot_path":"/state","resume_vm":true,
                   "mem_backend":{"backend_type":"File","backend_path":"/memory"}}"#;
    ask("second", "PUT", "/snapshot/load", load);
    ask("second", "PATCH", "/vm", r#"{"state":"Paused"}"#);
    second.kill().unwrap();
    second.wait().unwrap();
}
