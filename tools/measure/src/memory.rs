//! `memory`: what a running VM takes of the host's memory, by `/proc/PID/smaps`.

use crate::failure::Result;
use crate::guest::{Size, Task};
use crate::monitor::{Monitor, Running, SETTLE};
use crate::proc::{self, Usage};
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::{Kernel, MEMORY_MIB, Workspace};

/// VMs that run at the same time.
const TOGETHER: usize = 8;

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: \"private dirty\" is Private_Dirty of /proc/PID/smaps over all mappings but the guest's memory; the guest's
memory is the 128 MiB of readable and writable mappings in which the guest's signature is found where it belongs (by
/proc/PID/mem). PSS is over all mappings, guest memory included, while 8 VMs of that monitor run: a page of the
executable or of the kernel file in the page cache counts an eighth in each. The kernel's own memory for a VM (vCPU,
page tables, stacks) is in none of them, except where named; `density` shows it.
";

/// Boots guests that stay, alone and eight together.
pub fn measure(workspace: &Workspace, monitors: &[Monitor], plan: Plan) -> Result<Vec<Figure>> {
    let tiny = workspace.kernel("tiny", Size::Tiny, Task::Stay)?;
    let large = workspace.kernel("large", Size::Large, Task::Stay)?;
    let read = workspace.kernel("read", Size::Large, Task::ReadAndStay)?;
    rounds::run(plan, monitors, |monitor| {
        let alone = together(monitor, &tiny, 1)?;
        let many = together(monitor, &large, TOGETHER)?;
        let many_read = together(monitor, &read, TOGETHER)?;
        Ok(vec![
            Sample::mib(
                "private dirty without guest memory, tiny kernel",
                alone.own_dirty,
            ),
            Sample::mib("guest memory resident, tiny kernel", alone.guest_resident),
            Sample::mib("PSS per VM, 8 VMs, 20 MiB kernel", many.pss),
            Sample::mib(
                "private dirty guest memory per VM, 20 MiB kernel",
                many.guest_dirty,
            ),
            Sample::mib("page tables per VM, 20 MiB kernel", many.page_tables),
            Sample::mib(
                "PSS per VM, 8 VMs, 20 MiB kernel the guest has read",
                many_read.pss,
            ),
        ])
    })
}

/// Mean usage of `count` VMs that run at the same time.
fn together(monitor: &Monitor, kernel: &Kernel, count: usize) -> Result<Usage> {
    let mut running: Vec<Running> = Vec::new();
    for _ in 0..count {
        let mut one = monitor.boot(kernel)?;
        one.first_byte(None)?;
        running.push(one);
    }
    std::thread::sleep(SETTLE);
    let mut mean = Usage::default();
    for one in &running {
        let usage = proc::usage(one.pid(), MEMORY_MIB << 20, kernel.signature_at)?;
        let share = 1.0 / count as f64;
        mean.own_dirty += usage.own_dirty * share;
        mean.guest_resident += usage.guest_resident * share;
        mean.guest_dirty += usage.guest_dirty * share;
        mean.pss += usage.pss * share;
        mean.page_tables += usage.page_tables * share;
    }
    running.iter_mut().for_each(Running::kill);
    running.into_iter().try_for_each(Running::stop)?;
    Ok(mean)
}
