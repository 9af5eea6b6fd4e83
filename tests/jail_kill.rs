//! Everything that belongs to a run (jailer, monitor, keeper) is killed, in every order, at every
//! stage of a start and of a life, and nothing may be left: no process, mount, cgroup, interface,
//! socket or file. Where the keeper was killed together with the jailer, the next start sweeps.
//!
//! The points are drawn from a seed, which is printed: MAYFLY_KILL_SEED and MAYFLY_KILLS repeat or
//! lengthen a run.

#[path = "jail/host.rs"]
mod host;
#[path = "common/needs.rs"]
mod needs;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host::cgroup_mount;
use needs::needs;
use run::{Place, Who, cables};

/// How long anything may take before the test gives up; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(300);

/// Small and repeatable: xorshift.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Whom to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Jailer,
    Monitor,
    Keeper,
}

/// All orders of one, two and three of them.
const ORDERS: [&[Victim]; 15] = [
    &[Victim::Jailer],
    &[Victim::Monitor],
    &[Victim::Keeper],
    &[Victim::Jailer, Victim::Monitor],
    &[Victim::Monitor, Victim::Jailer],
    &[Victim::Jailer, Victim::Keeper],
    &[Victim::Keeper, Victim::Jailer],
    &[Victim::Monitor, Victim::Keeper],
    &[Victim::Keeper, Victim::Monitor],
    &[Victim::Jailer, Victim::Monitor, Victim::Keeper],
    &[Victim::Jailer, Victim::Keeper, Victim::Monitor],
    &[Victim::Monitor, Victim::Jailer, Victim::Keeper],
    &[Victim::Monitor, Victim::Keeper, Victim::Jailer],
    &[Victim::Keeper, Victim::Jailer, Victim::Monitor],
    &[Victim::Keeper, Victim::Monitor, Victim::Jailer],
];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[test]
fn processes_of_a_run_when_killed_at_any_time_leave_nothing() {
    needs!(root, kvm);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let seed = number("MAYFLY_KILL_SEED", now.as_nanos() as u64 | 1);
    let kills = number("MAYFLY_KILLS", 210);
    eprintln!("MAYFLY_KILL_SEED={seed} MAYFLY_KILLS={kills}");
    let place = Place::new("kill");
    let socket = place.shared("api");
    let console = format!("unix:{}", place.shared("console"));
    let mut kinds: Vec<(Who, Vec<&str>)> = vec![
        (Who::Root, vec![]),
        (Who::User, vec![]),
        (
            Who::Root,
            vec!["--api-sock", &socket, "--console", &console],
        ),
        (Who::User, vec!["--api-sock", &socket]),
    ];
    if cgroup_mount("pids").is_some() && cgroup_mount("memory").is_some() {
        kinds.push((
            Who::Root,
            vec!["--limit", "pids=30", "--limit", "memory=100M"],
        ));
        kinds.push((Who::Root, vec!["--limit", "pids=30", "--api-sock", &socket]));
    }
    if fs::File::open("/dev/net/tun").is_ok() {
        kinds.push((Who::Root, vec!["--net", "auto"]));
        kinds.push((Who::User, vec!["--net", "user"]));
        if cgroup_mount("pids").is_some() {
            kinds.push((Who::Root, vec!["--net", "auto", "--limit", "pids=30"]));
        }
    }
    let before = cables();
    let mut dice = Dice(seed | 1);
    let mut dead = 0;
    for point in 0..kills {
        let (who, more) = &kinds[dice.below(kinds.len() as u64) as usize];
        let order = ORDERS[dice.below(ORDERS.len() as u64) as usize];
        // Most points lie in the start, which takes some ten milliseconds.
        let most = [1_500, 6_000, 20_000, 60_000][dice.below(4) as usize];
        let delay = Duration::from_micros(dice.below(most));
        let gap = Duration::from_micros(dice.below(3) * dice.below(1_000));
        let what = format!(
            "seed {seed} point {point}: {who:?} {more:?}, {order:?} after {delay:?}, {gap:?} apart"
        );

        let mut command = place.run(*who, "stay", more);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        if *who == Who::User {
            // The way to being that user is no part of this.
            wait_for_jailer(&place, &child);
        }
        spin(delay);
        let mut hit = Vec::new();
        for victim in order {
            if strike(&child, *victim) {
                hit.push(*victim);
            }
            spin(gap);
        }
        dead += u64::from(!hit.is_empty());
        // Where only the keeper was, or nothing yet, the guest goes on until it is killed later.
        let survives = hit.iter().all(|victim| *victim == Victim::Keeper);
        let what = format!("{what}; met {hit:?}");
        end(&mut child, survives, &what);
        let keeper_too = hit.contains(&Victim::Keeper) && hit.contains(&Victim::Jailer);
        settle(&place, &what, keeper_too, *who, more);
    }
    let start = Instant::now();
    while !cables().is_subset(&before) {
        assert!(start.elapsed() < PATIENCE, "left: {:?}", cables());
        std::thread::sleep(Duration::from_millis(20));
    }
    // Otherwise this has proved nothing.
    assert!(dead > kills / 2, "{dead} of {kills} met anybody");
}

fn wait_for_jailer(place: &Place, child: &Child) {
    let program = place.host.path("mayfly-jailer");
    let exe = format!("/proc/{}/exe", child.id());
    let start = Instant::now();
    while fs::read_link(&exe).ok().as_ref() != Some(&program) && start.elapsed() < PATIENCE {
        std::hint::spin_loop();
    }
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Kills one of them, if it is there already and still.
fn strike(child: &Child, victim: Victim) -> bool {
    let jailer = child.id();
    let target = match victim {
        Victim::Jailer => Some(jailer),
        _ => {
            let children = fs::read_to_string(format!("/proc/{jailer}/task/{jailer}/children"));
            let children = children.unwrap_or_default();
            let mut children = children
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok());
            // The keeper is of the host's process namespace from its first moment, the monitor not.
            let own = fs::read_link("/proc/self/ns/pid").ok();
            children.find(|pid: &u32| {
                let theirs = fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
                theirs.is_some() && (theirs == own) == (victim == Victim::Keeper)
            })
        }
    };
    let Some(target) = target else { return false };
    // Through the library call of the test's own crate there is none: kill(1) is quick enough.
    let status = Command::new("kill")
        .args(["-KILL", &target.to_string()])
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

fn end(child: &mut Child, survives: bool, what: &str) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if survives {
            strike(child, Victim::Monitor);
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("the jailer goes on: {what}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until nothing is left; where nothing was left to remove it, the next start has to.
fn settle(place: &Place, what: &str, sweeps: bool, who: Who, more: &[&str]) {
    let start = Instant::now();
    let mut has_swept = false;
    loop {
        let left = place.left();
        if left.is_empty() {
            return;
        }
        let is_process = left.iter().any(|it| it.starts_with("process"));
        if sweeps && !is_process && !has_swept && start.elapsed() > Duration::from_millis(50) {
            has_swept = true;
            let output = place.run(who, "exit=0", more).output().unwrap();
            let err = String::from_utf8_lossy(&output.stderr).into_owned();
            let code = output.status.code();
            assert_eq!(
                code,
                Some(0),
                "{what}: the next start after {left:?}: {err}"
            );
        }
        assert!(start.elapsed() < PATIENCE, "{what}: left behind: {left:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
