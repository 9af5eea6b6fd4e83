//! The program: arguments in, control thread, exit code out.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::api::{self, Server};
use crate::args::{self, Args, Asked};
use crate::error::ActionError;
use crate::files::Limit;
use crate::log::{self, Writer, firecracker};
use crate::seccomp::Category;
use crate::snapshot::{self, Refusal};
use crate::steps;
use crate::sys::passed::Passed;
use crate::sys::{kvm, landlock, process, socket};
use crate::threads::{self, ReadyLatch};
use crate::timeline::Timeline;
use crate::vmm::{Settings, Vmm};
use crate::wire::Source;
use crate::wire::config::{Logger, Metrics, Restore};
use crate::{error, exit, info};

/// How long the file system of the API socket may take.
const BIND_PATIENCE: Duration = Duration::from_secs(5);
/// How long the last lines of the log may take to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(300);

/// Reads the command line and runs what it asks for.
pub fn main() {
    let timeline = Timeline::begin();
    process::use_one_arena();
    process::end_on_panic(exit::PANIC);
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Asked::Run(args)) => run(*args, timeline),
        Ok(Asked::Help) => print(&args::help()),
        Ok(Asked::Version) => print(&args::version()),
        Ok(Asked::SnapshotVersion) => print(&snapshot::version(snapshot::VERSION)),
        Ok(Asked::DescribeSnapshot(path)) => match describe(&path) {
            Ok(version) => print(&version),
            Err(error) => fail(&error, exit::ERROR),
        },
        Err(error) => fail(&error.to_string(), error.exit_code()),
    }
}

/// The version of the state file at `path`; Firecracker's words for one that is none.
fn describe(path: &Path) -> Result<String, String> {
    const PRINTING: &str = "When printing Snapshot Data format";
    let name = path.display();
    let file = snapshot::open_regular(path).map_err(|refusal| match refusal {
        Refusal::Io(cause) => {
            format!("{PRINTING}: Unable to open snapshot state file: {cause}: `{name}`")
        }
        refusal => format!("{PRINTING}: The state file `{name}` {refusal}"),
    })?;
    match snapshot::read(&file) {
        Ok((header, _)) => Ok(snapshot::version(header.version)),
        Err(refusal) => Err(format!("{PRINTING}: The state file `{name}` {refusal}")),
    }
}

fn run(args: Args, timeline: Timeline) -> ! {
    log::set_instance(&args.id);
    log::set_format(args.log_format);
    let writer = log::start()
        .unwrap_or_else(|e| fail(&format!("Making the log's pipe failed: {e}"), exit::ERROR));
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = Some((writer, args.seccomp));
    let settings = Settings {
        id: args.id,
        seccomp: args.seccomp,
        boot_timer: args.boot_timer,
        start_time_us: args.start_time_us,
        start_time_cpu_us: args.start_time_cpu_us,
        parent_cpu_time_us: args.parent_cpu_time_us,
        guest_exit_code: args.guest_exit_code,
        protocol: args.boot_protocol,
    };
    let mut vmm = Vmm::new(settings, timeline).unwrap_or_else(|e| fail(&e.0, exit::ERROR));
    // After the signals are set up, which threads inherit; and behind Landlock, where that is asked
    // for: until then lines wait in the pipe.
    if !args.landlock {
        carry_log();
    }
    let log_fails = match &args.log_path {
        Some(Source::Fd(_)) => exit::BAD_ARGUMENTS,
        _ => exit::ERROR,
    };
    let logger = Logger {
        log_path: args.log_path,
        level: args.level,
        show_level: Some(args.show_level),
        show_log_origin: Some(args.show_log_origin),
        module: args.module,
    };
    if let Err(error) = vmm.set_logger(logger) {
        fail(&error.0, log_fails);
    }
    if let Some(metrics_path) = args.metrics_path
        && let Err(error) = vmm.set_metrics(Metrics {
            metrics_path: Source::Named(metrics_path),
            emit_id: false,
            properties: None,
        })
    {
        fail(&error.0, exit::ERROR);
    }
    info!("{}", firecracker::running());
    if let Some(number) = args.kvm_fd {
        vmm.set_kvm(adopt("kvm-fd", number, |fd| {
            kvm::adopt(fd).ok_or("not /dev/kvm")
        }));
    }
    if let Some(number) = args.end_fd
        && let Err(error) = vmm.set_end(number)
    {
        fail(&error.0, exit::BAD_ARGUMENTS);
    }
    if let Some(number) = args.console_fd
        && let Err(error) = vmm.set_console(number)
    {
        fail(&error.0, exit::BAD_ARGUMENTS);
    }
    // Read before there is nothing to be opened by name.
    let config = args.config_file.map(|path| {
        // Behind Landlock threads have to be made later.
        let meanwhile = |vmm: &mut Vmm| {
            if !args.landlock {
                vmm.prepare_start();
            }
        };
        vmm.read_config(&path, meanwhile)
            .unwrap_or_else(|e| fail_for(firecracker::BAD_CONFIGURATION, &e.0, exit::ERROR))
    });
    let listener = match (args.api_fd, &args.api_sock) {
        (Some(number), _) => Some(adopt("api-fd", number, socket::listener)),
        (None, Some(path)) => {
            let path = path.clone();
            let bound = vmm.wait_for_file(Limit::Whole(BIND_PATIENCE), move || {
                steps::may_wait(format_args!("making the API socket `{}`", path.display()));
                api::bind(&path).map_err(|e| ActionError::of(&e))
            });
            Some(bound.unwrap_or_else(|e| fail(&e.0, exit::ERROR)))
        }
        (None, None) => None,
    };
    if args.landlock {
        give_up_files(&mut vmm);
        carry_log();
    }
    if let Some(listener) = listener {
        serve(&mut vmm, listener, args.payload_max, args.seccomp);
    }
    let socket = args.api_sock;
    let fail_with = |what| {
        Box::new(move |error: ActionError| {
            // Made by this process a moment ago.
            if let Some(socket) = socket {
                remove(socket);
            }
            fail_for(what, &error.0, exit::ERROR)
        })
    };
    if let Some(config) = config {
        vmm.start_from(config, fail_with(firecracker::BAD_CONFIGURATION));
    } else if let Some(load) = args.snapshot {
        vmm.start_from_snapshot(Restore::new(load), fail_with(""));
    }
    vmm.run()
}

/// Removes the file at `path`, but does not wait for that if its file system does not answer.
fn remove(path: PathBuf) {
    if let Ok(thread) = threads::parked("remove".into()) {
        let removed = thread.ask(move || std::fs::remove_file(path));
        let _ = removed.recv_timeout(LOG_PATIENCE);
        // Dropping it would wait for nothing, but it may still be at work.
        std::mem::forget(thread);
    }
}

/// Takes over the descriptor that `--option number` hands in, for what `kind` makes of it; `kind`
/// says what it is if it is something else.
fn adopt<T>(option: &str, number: u32, kind: impl FnOnce(OwnedFd) -> Result<T, &'static str>) -> T {
    let refuse = |why: String| -> ! {
        let message = format!("Cannot use --{option} {number}: {why}.");
        fail(&message, exit::BAD_ARGUMENTS)
    };
    match Passed::Inherited.claim(number) {
        Ok(fd) => kind(fd).unwrap_or_else(|what| refuse(format!("Descriptor {number} is {what}"))),
        Err(error) => refuse(error.to_string()),
    }
}

/// Applies Landlock, where the kernel has it, to this thread and the files thread. Threads made later
/// inherit it.
fn give_up_files(vmm: &mut Vmm) {
    let others = vmm.wait_for_file(Limit::None, || Ok(landlock::restrict()));
    let others = others.unwrap_or_else(|e| fail(&e.0, exit::ERROR));
    match others.and_then(|_| landlock::restrict()) {
        Ok(Some(abi)) => info!("Landlock holds the monitor (its version {abi})."),
        Ok(None) => info!("This kernel has no Landlock: the monitor goes on without it."),
        Err(cause) => fail(&format!("Applying Landlock failed: {cause}"), exit::ERROR),
    }
}

/// The log thread's work until it has a thread, and whether that is filtered.
static LOG: Mutex<Option<(Writer, bool)>> = Mutex::new(None);

/// Makes the log thread, if there is none yet.
fn carry_log() {
    let writer = LOG.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((writer, seccomp)) = writer else {
        return;
    };
    let thread = threads::parked("log".into()).unwrap_or_else(|e| fail(&e.0, exit::ERROR));
    let category = seccomp.then_some(Category::Log);
    let _ = thread.start(category, &ReadyLatch::of(1), move || {
        if let Err(cause) = writer.run() {
            let _ = writeln!(std::io::stderr(), "mayfly: The log stopped: {cause}");
        }
    });
}

/// Makes the thread that serves the API.
fn serve(vmm: &mut Vmm, listener: UnixListener, payload_max: usize, seccomp: bool) {
    let server = Server::new(listener, vmm.commands(), payload_max)
        .unwrap_or_else(|e| fail(&format!("Serving the API failed: {e}"), exit::ERROR));
    let (counters, pending) = (server.counters(), server.pending());
    let thread =
        threads::parked("fc_api".into()).unwrap_or_else(|e| fail(&log::chain(&e), exit::ERROR));
    let latch: Arc<ReadyLatch> = ReadyLatch::of(1);
    let category = seccomp.then_some(Category::Api);
    let _ = thread.start(category, &latch, move || {
        if let Err(cause) = server.run() {
            error!("Cannot serve the API any more: {cause}");
            log::flush(LOG_PATIENCE);
            process::exit(exit::ERROR);
        }
    });
    vmm.api_is_ready(counters, pending);
    info!("{}", firecracker::API_STARTED);
}

/// Answers on standard output. Who does not take it gets an exit code instead.
fn print(text: &str) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        process::exit(exit::ERROR);
    }
}

/// Says why on standard error, where a person looks, and in the log, and ends.
fn fail(message: &str, code: i32) -> ! {
    fail_for("", message, code)
}

/// The same; the log has `what` before the message.
fn fail_for(what: &str, message: &str, code: i32) -> ! {
    // A path may hold anything: one line stays one line, and a terminal is not told what to do.
    let message = message.replace(char::is_control, "?");
    if log::is_redirected() {
        error!("{what}{message}");
        info!("{}", firecracker::exiting(code));
    }
    carry_log();
    log::flush(LOG_PATIENCE);
    // The exit code tells, also where nothing reads this.
    let _ = writeln!(std::io::stderr(), "mayfly: {message}");
    process::exit(code)
}
