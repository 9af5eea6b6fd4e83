//! `api`: from exec to a ready socket, to a configured machine, to the guest's first byte, by API requests.

use std::fs;
use std::time::Instant;

use serde_json::json;

use crate::failure::{Context, Result};
use crate::guest::{Size, Task};
use crate::http::Client;
use crate::monitor::Monitor;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::sys;
use crate::workspace::{Kernel, Workspace};

const READY: &str = "exec to socket ready (a connection is taken)";
const CONFIGURED: &str = "exec to configured (requests answered)";
const BYTE: &str = "exec to first guest byte, by the API";

/// Drives a tiny guest over one kept-alive connection. The floor has no API: it appears in the last figure, booted
/// directly.
pub fn measure(workspace: &Workspace, monitors: &[Monitor], plan: Plan) -> Result<Vec<Figure>> {
    let kernel = workspace.kernel("tiny", Size::Tiny, Task::Reset)?;
    let mut figures = rounds::run(plan, monitors, |monitor| {
        if monitor.has_api() {
            by_api(workspace, monitor, &kernel)
        } else {
            let mut running = monitor.boot(&kernel)?;
            let byte = running.first_byte(None)?;
            running.exit()?;
            Ok(vec![Sample::ms(BYTE, running.ms(byte))])
        }
    })?;
    // In order of time, whichever monitor came first.
    figures.sort_by_key(|figure| {
        [READY, CONFIGURED, BYTE]
            .iter()
            .position(|n| *n == figure.name)
    });
    Ok(figures)
}

fn by_api(workspace: &Workspace, monitor: &Monitor, kernel: &Kernel) -> Result<Vec<Sample>> {
    let requests = workspace.requests(kernel);
    let start = json!({ "action_type": "InstanceStart" });
    let sockets = workspace.sockets();
    let socket = sockets.join("api");
    let names =
        sys::watch_for_names(&sockets).cannot(|| "watch the directory of sockets".into())?;

    let mut running = monitor.listen(&socket)?;
    let stream = running.connect(&names, &socket)?;
    let ready = Instant::now();
    let mut client = Client::new(stream)?;
    for (path, body) in &requests {
        client.put(path, body)?;
    }
    let configured = Instant::now();
    client.send("/actions", &start)?;
    let byte = running.first_byte(Some((&mut client, "/actions")))?;
    running.exit()?;

    // Firecracker leaves its socket behind.
    if let Err(error) = fs::remove_file(&socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).cannot(|| format!("remove the socket of {}", monitor.name));
    }
    Ok(vec![
        Sample::ms(READY, running.ms(ready)),
        Sample::ms(CONFIGURED, running.ms(configured)),
        Sample::ms(BYTE, running.ms(byte)),
    ])
}
