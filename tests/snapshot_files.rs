//! The files of a snapshot when something goes wrong: a monitor that is killed while it writes them, and
//! files that were changed.
//!
//! MAYFLY_SNAPSHOT_ROUNDS multiplies how often each is tried.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use common::{Api, Folder, Monitor, needs, probe_vm, probe_vm_with_disks};
use pair::{Pair, pause};
use probe_host::pattern;
use serde_json::{Value, json};

/// How often to try what is tried `few` times in a short run.
fn rounds(few: u64) -> u64 {
    let times = std::env::var("MAYFLY_SNAPSHOT_ROUNDS");
    few * times.map_or(1, |times| times.parse().unwrap())
}

/// A number below `end`, from a seed and a place in the sequence.
fn number(seed: u64, place: u64, end: u64) -> u64 {
    pattern::word(seed, place) % end
}

fn seed() -> u64 {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = std::env::var("MAYFLY_SEED")
        .ok()
        .and_then(|it| it.parse().ok());
    let seed = seed.unwrap_or(now.as_nanos() as u64 & 0xffff_ffff);
    eprintln!("MAYFLY_SEED={seed}");
    seed
}

/// The guest of each round holds the round's number in its memory. It is saved over the snapshot of the
/// round before, and the monitor is killed some time during that. What is there then is one or the
/// other, whole, and the guest of the next round is made of it.
#[test]
fn create_when_killed_leaves_the_old_snapshot_or_the_new_one() {
    needs!(kvm);
    let seed = seed();
    let folder = Folder::new();
    let pair = Pair::new(&folder, "snapshot");
    let own = Folder::new();
    let (monitor, api) = Monitor::boot_with_api(&own, &probe_vm("touch,fill:2:1,shell"));
    monitor.expect("shell ready");
    pause(&api);
    let start = Instant::now();
    api.put("/snapshot/create", pair.create("Full"));
    let mut longest = start.elapsed();
    drop((monitor, api, own));

    let (mut there, mut outcomes) = (1, [0, 0]);
    for round in 2..2 + rounds(20) {
        let own = Folder::new();
        let (mut monitor, api) = pair.restore(&own, json!({}));
        monitor.type_in(&format!("check:2:{there}\nfill:2:{round}\n"));
        let output = monitor.expect(&format!("fill:2:{round}"));
        assert!(
            output.contains(&format!("check:2:{there} ok")),
            "{round}: {output}"
        );
        monitor.expect(&format!("fill:2:{round} ok"));
        pause(&api);
        let after = longest * u32::try_from(number(seed, round, 1100)).unwrap() / 1000;
        let pid = monitor.pid();
        let body = pair.create("Full").to_string();
        let begun = Instant::now();
        // Before the monitor can be killed: nothing listens any more then.
        let stream = UnixStream::connect(&api.0).unwrap();
        let answer = thread::scope(|scope| {
            // A connection that ends without an answer is no failure of the test.
            let asking = scope.spawn(|| ask(stream, &body));
            thread::sleep(after);
            common::sys::kill(pid, libc::SIGKILL);
            asking.join().unwrap()
        });
        monitor.wait();
        if answer {
            longest = longest.max(begun.elapsed().min(longest * 2));
        }
        // What it holds is told by a machine made of it.
        let own = Folder::new();
        let (mut loaded, api) = Monitor::unconfigured(&own);
        api.put("/snapshot/load", pair.resume(json!({})));
        loaded.type_in(&format!("check:2:{there}\ncheck:2:{round}\nprint:said\n"));
        let output = loaded.expect("print:said ok");
        let is = |number| output.contains(&format!("check:2:{number} ok"));
        assert!(is(there) ^ is(round), "round {round} of {seed}: {output}");
        assert!(!answer || is(round), "it was answered: {output}");
        outcomes[usize::from(is(round))] += 1;
        if is(round) {
            there = round;
        }
    }
    eprintln!("old and new: {outcomes:?}");
    // The next create at that place works, and cleans up.
    let own = Folder::new();
    let (_monitor, api) = pair.restore(&own, json!({}));
    pause(&api);
    api.put("/snapshot/create", pair.create("Full"));
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["snapshot.memory", "snapshot.state"]);
}

/// Whether a create was answered well, by a monitor that may be killed meanwhile.
fn ask(mut stream: UnixStream, body: &str) -> bool {
    let head = format!(
        "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let sent = stream.write_all((head + body).as_bytes());
    let mut answer = [0; 12];
    sent.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 204")
}

// Changed files

/// What a state file is made of.
struct State {
    header: Vec<u8>,
    state: Value,
}

/// The state file of this header and this state, with a check value that fits.
fn sealed(header: &[u8], state: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x89MAYFLY\n\x01\0\0\0".to_vec();
    let len = 32 + header.len() + state.len();
    bytes.extend([0; 4]);
    bytes.extend((len as u64).to_le_bytes());
    bytes.extend((header.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(header);
    bytes.extend(state);
    seal(&mut bytes);
    bytes
}

fn seal(bytes: &mut [u8]) {
    let mut check = crc32fast::Hasher::new();
    check.update(&bytes[..12]);
    check.update(&bytes[16..]);
    bytes[12..16].copy_from_slice(&check.finalize().to_le_bytes());
}

impl State {
    fn read(bytes: &[u8]) -> Self {
        let len = u32::from_le_bytes(bytes[24..28].try_into().unwrap()) as usize;
        State {
            header: bytes[32..32 + len].to_vec(),
            state: serde_json::from_slice(&bytes[32 + len..]).unwrap(),
        }
    }
}

/// How many values there are in `value`, itself counted.
fn count(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum::<u64>(),
        _ => 0,
    }
}

/// Changes the value with this number, in a way that `dice` chooses; where it is.
fn change(value: &mut Value, at: &mut u64, dice: u64, path: &str) -> Option<String> {
    if *at == 0 {
        let before = value.to_string();
        *value = other_than(value, dice);
        return Some(format!(
            "{path}: {before:.60} became {:.60}",
            value.to_string()
        ));
    }
    *at -= 1;
    match value {
        Value::Array(items) => (0..)
            .zip(items)
            .find_map(|(n, item)| change(item, at, dice, &format!("{path}[{n}]"))),
        Value::Object(members) => members
            .iter_mut()
            .find_map(|(name, item)| change(item, at, dice, &format!("{path}.{name}"))),
        _ => None,
    }
}

fn other_than(value: &Value, dice: u64) -> Value {
    let pick = |list: &[Value]| list[(dice % list.len() as u64) as usize].clone();
    match value {
        Value::Number(number) => {
            let was = number.as_u64().unwrap_or(0);
            pick(&[
                json!(0),
                json!(was ^ 1 << (dice >> 8 & 63)),
                json!(was.wrapping_add(1)),
                json!(was.wrapping_sub(1)),
                json!(u64::MAX),
                json!(u32::MAX),
                json!(u16::MAX),
                json!(0x1_0000),
                json!(-1),
                json!(dice),
                Value::Null,
            ])
        }
        Value::String(text) => {
            let mut flipped = text.clone().into_bytes();
            if let Some(byte) = flipped.get_mut((dice >> 8) as usize % text.len().max(1)) {
                *byte = b"0123456789abcdef"[(dice >> 4 & 15) as usize];
            }
            let flipped = String::from_utf8_lossy(&flipped).into_owned();
            pick(&[
                json!(flipped),
                json!(flipped),
                json!(""),
                json!(text.repeat(2)),
                json!(text[..text.len() / 2]),
                json!(1),
            ])
        }
        Value::Array(items) => {
            let mut longer = items.clone();
            longer.extend(items.first().cloned());
            let mut shorter = items.clone();
            shorter.pop();
            let mut many = items.clone();
            if let Some(first) = items.first() {
                many.resize(5000, first.clone());
            }
            pick(&[json!(longer), json!(shorter), json!([]), json!(many)])
        }
        Value::Object(members) => {
            let mut fewer = members.clone();
            let gone = members.keys().nth(dice as usize >> 8 & 7).cloned();
            fewer.remove(&gone.unwrap_or_default());
            pick(&[json!(fewer), json!({}), Value::Null])
        }
        Value::Bool(is) => json!(!is),
        Value::Null => pick(&[json!(1), json!({}), json!("x")]),
    }
}

/// A guest that polls a disk and prints, as a snapshot, with two vCPUs.
fn subject(folder: &Folder) -> (Pair, Vec<u8>) {
    let disk = folder.disk("disk", 1 << 20);
    let mut config = probe_vm_with_disks("blkbench:0:4096:1000000:4:randwrite", &[&disk]);
    config["machine-config"]["mem_size_mib"] = json!(16);
    let own = Folder::new();
    let (_monitor, api) = Monitor::boot_with_api(&own, &config);
    pair::await_disk(&api, "write", 10);
    let pair = Pair::new(folder, "subject");
    pause(&api);
    api.put("/snapshot/create", pair.create("Full"));
    let state = fs::read(&pair.state).unwrap();
    (pair, state)
}

/// What a monitor may end with when its guest is not what it was: the guest's reset, its crash, KVM that
/// cannot run it, a thread that cannot go on. Not: a panic, a signal, a call that a filter refuses.
const ALLOWED: [i32; 4] = [0, 160, 161, 162];

/// A message may list all features of a CPU that a host lacks, and no more than that.
const MESSAGE: usize = 256 << 10;

/// Loads what was changed. Refused, with one message, the process is as before; else the guest runs,
/// can be paused and saved again, or ends its machine.
fn load(subject: &Pair, what: &str, process: &mut Option<(Folder, Monitor, Api)>) -> bool {
    let (own, mut monitor, api) = process.take().unwrap_or_else(|| {
        let own = Folder::new();
        let (monitor, api) = Monitor::unconfigured(&own);
        (own, monitor, api)
    });
    let body = subject.load().to_string();
    let mut asked = |method: &str, path: &str, body: &str| {
        let answer = try_request(&api, method, path, body);
        if answer.is_none() {
            let code = monitor.wait().code();
            let said = format!("{}\n{}", monitor.stderr(), own.read("log"));
            let is_fine = code.is_some_and(|code| ALLOWED.contains(&code));
            assert!(
                is_fine && !said.contains("internal error"),
                "{what}: {code:?}: {said}"
            );
        }
        answer
    };
    let (status, message) = asked("PUT", "/snapshot/load", &body).expect(what);
    if status == 400 {
        assert!(
            message.contains("fault_message") && message.len() < MESSAGE,
            "{what}: {message}"
        );
        let (_, instance) = asked("GET", "/", "").expect(what);
        assert!(instance.contains("Not started"), "{what}: {instance}");
        assert_eq!(monitor.stdout(), "", "{what}: a guest ran");
        *process = Some((own, monitor, api));
        return false;
    }
    assert_eq!(status, 204, "{what}: {message}");
    let again = Pair::new(&own, "again");
    let create = again.create("Full").to_string();
    let steps = [
        ("PATCH", "/vm", r#"{"state": "Resumed"}"#),
        ("GET", "/metrics", ""),
        ("PATCH", "/vm", r#"{"state": "Paused"}"#),
        ("PUT", "/snapshot/create", &create),
        ("PATCH", "/vm", r#"{"state": "Resumed"}"#),
        ("GET", "/metrics", ""),
    ];
    for (method, path, body) in steps {
        if asked(method, path, body).is_none() {
            return true;
        }
    }
    true
}

/// Status and body, unless the monitor ends.
fn try_request(api: &Api, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
    let mut stream = std::os::unix::net::UnixStream::connect(&api.0).ok()?;
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + body).as_bytes()).ok()?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&answer).into_owned();
        if let Some((head, rest)) = text.split_once("\r\n\r\n") {
            let len = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let is_len = name.eq_ignore_ascii_case("content-length");
                is_len.then(|| value.trim().parse::<usize>().unwrap())
            });
            if rest.len() >= len.unwrap_or(0) {
                let status = head.split(' ').nth(1)?.parse().ok()?;
                return Some((status, rest.to_owned()));
            }
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
        }
    }
}

/// Memory files that are not the snapshot's, and working sets that are none: the process can load the
/// right ones after that, also where a create that was killed has left them.
#[test]
fn load_when_files_are_not_what_they_should_be_is_refused_and_can_be_tried_again() {
    needs!(kvm);
    let folder = Folder::new();
    let (pair, state) = subject(&folder);
    let memory = fs::read(&pair.memory).unwrap();
    let other = folder.join("other");
    fs::write(&other, vec![0; memory.len()]).unwrap();
    let text = folder.file("text", "precious");
    let own = Folder::new();
    let (_monitor, api) = Monitor::unconfigured(&own);
    for wrong in ["/dev/zero".as_ref(), "/".as_ref(), &*other, &*text] {
        let mut body = pair.load();
        body["mem_backend"]["backend_path"] = json!(wrong);
        let message = api.refused("PUT", "/snapshot/load", body);
        assert!(message.contains(wrong.to_str().unwrap()), "{message}");
    }
    for wrong in [&text, &pair.memory, &pair.state] {
        let mut body = pair.load();
        body["working_set"] = json!(wrong);
        let message = api.refused("PUT", "/snapshot/load", body);
        assert!(message.contains("is not overwritten"), "{message}");
    }
    assert_eq!(fs::read(&text).unwrap(), b"precious");
    assert!(fs::read(&pair.memory).unwrap() == memory);
    assert!(fs::read(&pair.state).unwrap() == state);
    // As after a kill between the two renames of a create.
    let left = folder.join(".subject.memory.mayfly-partial");
    fs::rename(&pair.memory, left).unwrap();
    fs::rename(&other, &pair.memory).unwrap();
    api.put("/snapshot/load", pair.load());
    assert_eq!(api.get("/")["state"], "Paused");
}

/// A working set is recorded by the first of its guests, and only read by those that come after it.
#[test]
fn working_set_when_it_is_recorded_is_only_read_and_when_unfinished_is_recorded_anew() {
    needs!(kvm);
    let folder = Folder::new();
    let (pair, _) = subject(&folder);
    let file = folder.join("pages");
    let loaded = |source: Value, fds: &[std::os::fd::BorrowedFd<'_>]| {
        let own = Folder::new();
        let (monitor, api) = Monitor::unconfigured(&own);
        let mut body = pair.load();
        body["resume_vm"] = json!(true);
        body["working_set"] = source;
        let (status, answer) = api.request_with("PUT", "/snapshot/load", &body.to_string(), fds);
        (status, answer, own, monitor, api)
    };
    let is_whole = || fs::read(&file).is_ok_and(|bytes| bytes.first() == Some(&b'{'));
    // Both are there before one has anything to record.
    let both = [(); 2].map(|()| loaded(json!(file), &[]));
    for (status, answer, _, monitor, api) in &both {
        assert_eq!(*status, 204, "{answer}");
        pause(api);
        common::wait_until("the working set has been recorded", is_whole);
        assert!(
            !monitor.stderr().contains("not recorded"),
            "{}",
            monitor.stderr()
        );
    }
    drop(both);
    let recorded = fs::read(&file).unwrap();
    // A descriptor that can be read from is enough, and a file that cannot be written to.
    let to_read = fs::File::open(&file).unwrap();
    let (status, answer, ..) = loaded(json!({"fd": 0}), &[to_read.as_fd()]);
    assert_eq!(status, 204, "{answer}");
    // One that was not finished counts as empty.
    let mut unfinished = recorded.clone();
    unfinished[0] = 0;
    unfinished.truncate(recorded.len() - 2);
    fs::write(&file, &unfinished).unwrap();
    let (status, answer, ..) = loaded(json!({"fd": 0}), &[to_read.as_fd()]);
    assert_eq!(status, 400, "{answer}");
    assert!(answer.contains("was not opened for writing"), "{answer}");
    let (status, answer, _own, _monitor, api) = loaded(json!(file), &[]);
    assert_eq!(status, 204, "{answer}");
    pause(&api);
    common::wait_until("the working set has been recorded", is_whole);
}

/// The lock is tried for a moment, and the guest is none the worse for it.
#[test]
fn create_when_another_process_writes_there_is_refused_and_the_guest_stays() {
    needs!(kvm);
    let folder = Folder::new();
    let (pair, _) = subject(&folder);
    let own = Folder::new();
    let (_monitor, api) = pair.restore(&own, json!({}));
    pause(&api);
    let other = fs::File::create(folder.join(".subject.memory.mayfly-partial")).unwrap();
    other.lock().unwrap();
    let message = api.refused("PUT", "/snapshot/create", pair.create("Full"));
    assert!(
        message.contains("another process is writing one there"),
        "{message}"
    );
    drop(other);
    api.put("/snapshot/create", pair.create("Full"));
    assert_eq!(api.get("/")["state"], "Paused");
}

/// Values of the state, behind a check value that fits: what each part of the machine makes of them.
#[test]
fn state_when_values_are_changed_is_refused_or_harmless() {
    needs!(kvm);
    let seed = seed();
    let folder = Folder::new();
    let (mut subject, bytes) = subject(&folder);
    let original = State::read(&bytes);
    subject.state = folder.join("changed.state");
    let values = count(&original.state);
    let (mut process, mut taken) = (None, 0);
    for round in 0..rounds(100) {
        let mut state = original.state.clone();
        let mut at = number(seed, 2 * round, values);
        let dice = pattern::word(seed, 2 * round + 1);
        let what = change(&mut state, &mut at, dice, "").expect("there is one");
        let what = format!("MAYFLY_SEED={seed}, round {round}: {what}");
        let text = state.to_string();
        fs::write(&subject.state, sealed(&original.header, text.as_bytes())).unwrap();
        taken += u64::from(load(&subject, &what, &mut process));
    }
    eprintln!("{taken} of {} were taken", rounds(100));
    // Unchanged, it is.
    let text = original.state.to_string();
    fs::write(&subject.state, sealed(&original.header, text.as_bytes())).unwrap();
    assert!(load(&subject, "unchanged", &mut process));
}

/// Bytes of the state file: all are refused. Bytes of memory: the monitor does not care.
#[test]
fn files_when_bytes_are_changed_are_refused_or_harmless() {
    needs!(kvm);
    let seed = seed();
    let folder = Folder::new();
    let (mut subject, bytes) = subject(&folder);
    let id = subject.id_range();
    let memory = fs::File::options()
        .write(true)
        .open(&subject.memory)
        .unwrap();
    let len = memory.metadata().unwrap().len();
    let state_file = subject.state.clone();
    subject.state = folder.join("changed.state");
    let mut process = None;
    for round in 0..rounds(40) {
        let dice = |place: u64, end: usize| number(seed, 8 * round + place, end as u64) as usize;
        let mut changed = bytes.clone();
        let at = dice(0, bytes.len());
        match dice(1, 6) {
            0 => changed[at] ^= 1 << dice(2, 8),
            1 => changed[at] = changed[at].wrapping_add(1 + dice(2, 255) as u8),
            2 => changed.truncate(at),
            3 => changed.extend(vec![dice(2, 256) as u8; 1 + dice(3, 5000)]),
            4 => {
                let end = (at + 1 + dice(2, 512)).min(bytes.len());
                changed[at..end].iter_mut().for_each(|byte| *byte = !*byte);
            }
            _ => {
                changed.remove(at);
            }
        }
        let what = format!(
            "MAYFLY_SEED={seed}, byte {at} of {}, round {round}",
            bytes.len()
        );
        fs::write(&subject.state, changed).unwrap();
        assert!(!load(&subject, &what, &mut process), "{what}: it was taken");
    }
    subject.state = state_file;
    for round in 0..rounds(10) {
        // Some pages of noise, most of them where there is something.
        for page in 0..8 {
            let place = 64 * round + page;
            let end = if page < 6 { 0x40_0000 } else { len };
            let at = number(seed, place, end / 4096) * 4096;
            let noise: Vec<u8> = (0..512u64)
                .flat_map(|n| pattern::word(seed ^ place, n).to_le_bytes())
                .collect();
            let range: Range<usize> = at as usize..at as usize + 4096;
            if !range.contains(&id.start) {
                memory.write_all_at(&noise, at).unwrap();
            }
        }
        let what = format!("MAYFLY_SEED={seed}, memory, round {round}");
        assert!(
            load(&subject, &what, &mut process),
            "{what}: it was refused"
        );
    }
    // Another id is another snapshot.
    memory.write_all_at(&[0; 16], id.start as u64).unwrap();
    assert!(!load(&subject, "another id", &mut process));
    // Cut short, it is no memory of this machine.
    memory.set_len(len - 4096).unwrap();
    assert!(!load(&subject, "cut short", &mut process));
}
