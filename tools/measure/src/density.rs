//! `density`: many idle VMs at once, what they take of the host, and how fast they come.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result};
use crate::guest::{Size, Task};
use crate::monitor::{Monitor, Running};
use crate::proc;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::{Kernel, Workspace};

/// Starts under way at the same time.
const PARALLEL: usize = 2;

/// Descriptors held here for each VM: three pipes and a pidfd.
const FILES_EACH: usize = 4;

/// Lets the kernel catch up: what ended VMs held was seen to come back over some three seconds.
const SETTLE: Duration = Duration::from_secs(3);

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: guests with a 20 MiB kernel, idle after their first byte. A start counts from exec to the first byte; two are
under way at a time. \"Host memory\" is what MemAvailable of /proc/meminfo fell by, so it includes the kernel's own memory
for a VM, and whatever other programs did meanwhile. PSS is the sum over all VMs, guest memory included.
";

/// Starts `count` VMs, measures, and stops them.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    count: usize,
) -> Result<Vec<Figure>> {
    let limit = proc::open_files_limit().unwrap_or(usize::MAX);
    if count * FILES_EACH + 32 > limit {
        return Err(Failure::new(format!(
            "{count} VMs need {} open files here, and the limit is {limit}: raise it with ulimit -n",
            count * FILES_EACH + 32
        )));
    }
    let kernel = workspace.kernel("large", Size::Large, Task::Stay)?;
    rounds::run(plan, monitors, |monitor| {
        let before = proc::available()?;
        let begun = Instant::now();
        let mut running = start_all(monitor, &kernel, count)?;
        let seconds = begun.elapsed().as_secs_f64();
        std::thread::sleep(SETTLE);
        let during = proc::available()?;
        let mut pss = 0.0;
        for one in &running {
            pss += proc::pss(one.pid())?;
        }
        running.iter_mut().for_each(Running::kill);
        running.into_iter().try_for_each(Running::stop)?;
        std::thread::sleep(SETTLE);
        // Between before and after, so that what other programs take steadily cancels out.
        let taken = (before + proc::available()?) / 2.0 - during;
        let each = 1.0 / count as f64;
        Ok(vec![
            Sample::mib(format!("host memory per VM, {count} VMs"), taken * each),
            Sample::mib(format!("PSS per VM, {count} VMs"), pss * each),
            Sample::new(
                format!("starts per second, {PARALLEL} at a time"),
                "1/s",
                count as f64 / seconds,
            ),
        ])
    })
}

fn start_all(monitor: &Monitor, kernel: &Kernel, count: usize) -> Result<Vec<Running>> {
    let taken = AtomicUsize::new(0);
    let starter = || -> Result<Vec<Running>> {
        let mut mine = Vec::new();
        while taken.fetch_add(1, Ordering::Relaxed) < count {
            let mut running = monitor.boot(kernel)?;
            running.first_byte(None)?;
            mine.push(running);
        }
        Ok(mine)
    };
    let groups: Vec<Result<Vec<Running>>> = std::thread::scope(|scope| {
        let starters: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(starter)).collect();
        let join = |starter: std::thread::ScopedJoinHandle<'_, _>| {
            starter.join().expect("a starter does not panic")
        };
        starters.into_iter().map(join).collect()
    });
    let mut all = Vec::with_capacity(count);
    for group in groups {
        all.extend(group?);
    }
    Ok(all)
}
