//! `start`: from exec to the guest's first byte, and to the end of the process.

use crate::failure::{Failure, Result};
use crate::guest::{Size, Task};
use crate::monitor::Monitor;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::Workspace;

/// Boots a tiny and a large guest by configuration file, which write a byte and reset.
pub fn measure(workspace: &Workspace, monitors: &[Monitor], plan: Plan) -> Result<Vec<Figure>> {
    let kernels = [
        (
            "tiny kernel",
            workspace.kernel("tiny", Size::Tiny, Task::Reset)?,
        ),
        (
            "20 MiB kernel",
            workspace.kernel("large", Size::Large, Task::Reset)?,
        ),
    ];
    let mut figures = Vec::new();
    for (size, kernel) in &kernels {
        figures.extend(rounds::run(plan, monitors, |monitor| {
            let mut running = monitor.boot(kernel)?;
            let byte = running.first_byte(None)?;
            let byte = running.ms(byte);
            let (end, status) = running.exit()?;
            if !status.success() {
                return Err(Failure::new(format!(
                    "{} ended with {status} after its guest's reset",
                    monitor.name
                )));
            }
            Ok(vec![
                Sample::ms(format!("exec to first guest byte, {size}"), byte),
                Sample::ms(
                    format!("exec to end of the process, {size}"),
                    running.ms(end),
                ),
            ])
        })?);
    }
    Ok(figures)
}
