//! Work in a process of its own, made by fork: when it panics, that process ends at once, with the message told. To take
//! apart what the threads of a run have would make them wait for each other, and a thread that stands still in
//! its panic hook keeps the whole test program from its end.
//!
//! Of the other threads of the test program nothing is left in the child but what they hold: so the child takes no lock
//! of the program's but the allocator's, which fork frees, and all that is made once is made before.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::Location;
use std::sync::Once;

use rustix::pipe::{PipeFlags, pipe_with};

/// What the child writes first.
const DONE: u8 = b'd';
const PANICKED: u8 = b'p';

thread_local! {
    /// Where the message of a panic goes, in a child.
    static FAILED: RefCell<Option<File>> = const { RefCell::new(None) };
    /// What is said after the message.
    static DOING: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The seed that the work is at: told with the message of a panic.
pub fn at_seed(seed: u64) {
    DOING.set(Some(seed));
}

/// How work ended that panicked.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    pub seed: Option<u64>,
}

/// Does `work` in a process of its own, and gives the number that it gives, or its panic.
pub fn apart(work: impl FnOnce() -> u64) -> Result<u64, Failure> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // The hook of shuttle and what else it makes once.
        shuttle::check_random(|| {}, 1);
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // One without a message ends a thread of a run that was not done: the run's own affair.
            let payload = panic.payload();
            let message = payload.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| payload.downcast_ref::<&str>().copied());
            if let Some(message) = message
                && let Some(told) = FAILED.take()
            {
                end(told, message, panic.location());
            }
            before(panic);
        }));
    });
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe is made");
    // SAFETY: fork takes no pointer. The child does not return from `child`, and takes no lock that another thread of
    // this program may hold (see above).
    let pid = match unsafe { libc::fork() } {
        0 => child(writer, work),
        pid => pid,
    };
    assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
    drop(writer);
    let mut told = Vec::new();
    let read = File::from(reader).read_to_end(&mut told);
    let mut status = 0;
    // SAFETY: `status` is writable for the call, and the child is ours and not waited for yet.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid, "the child is waited for");
    read.expect("the child's word is read");
    let number = |at: usize| told.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    match (told.first(), number(1).map(u64::from_le_bytes)) {
        (Some(&DONE), Some(result)) => Ok(result),
        (Some(&PANICKED), Some(seed)) => Err(Failure {
            message: String::from_utf8_lossy(&told[9..]).into_owned(),
            seed: Some(seed),
        }),
        _ => Err(Failure {
            message: format!(
                "the process of the run ended without a word, with status {status:#x}"
            ),
            seed: None,
        }),
    }
}

fn child(writer: OwnedFd, work: impl FnOnce() -> u64) -> ! {
    let_go_of_all_but(&writer);
    let mut told = File::from(writer);
    FAILED.set(told.try_clone().ok());
    let result = work();
    let word: Vec<u8> = [DONE].into_iter().chain(result.to_le_bytes()).collect();
    let _ = told.write_all(&word);
    exit(0)
}

/// Makes every descriptor but `kept` and the standard ones one of nothing: other tests wait for the ends of their sockets
/// and pipes, which must not be open here. They keep their numbers, for what writes to one (the log) must not write to
/// another that is made later.
fn let_go_of_all_but(kept: &OwnedFd) {
    let nothing = File::options().read(true).write(true).open("/dev/null");
    let nothing = nothing.expect("/dev/null is opened");
    let open = std::fs::read_dir("/proc/self/fd").expect("descriptors are listed");
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let kept = [kept.as_raw_fd(), nothing.as_raw_fd()];
    let others = |number: &i32| *number > libc::STDERR_FILENO && !kept.contains(number);
    // Read to its end first, for it has a descriptor itself.
    for number in numbers.filter(others).collect::<Vec<i32>>() {
        // SAFETY: takes numbers only. What owns the descriptors is never used in this process, nor dropped.
        unsafe { libc::dup2(nothing.as_raw_fd(), number) };
    }
}

/// Ends a child that panics: its threads are left as they are.
fn end(mut told: File, message: &str, place: Option<&Location<'_>>) -> ! {
    let seed = DOING.get().unwrap_or_default();
    let place = place.map(ToString::to_string).unwrap_or_default();
    let mut word = vec![PANICKED];
    word.extend(seed.to_le_bytes());
    word.extend(format!("{message} ({place})").bytes());
    let _ = told.write_all(&word);
    exit(1)
}

fn exit(status: i32) -> ! {
    // SAFETY: the process ends here, without what it would do at an ordinary end.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::{apart, at_seed};

    #[test]
    fn work_when_it_ends_gives_its_number() {
        assert_eq!(apart(|| 77).expect("it does not panic"), 77);
    }

    #[test]
    fn work_when_it_panics_gives_message_place_and_seed() {
        let failure = apart(|| {
            at_seed(5);
            panic!("{} is wrong", "this");
        });
        let failure = failure.expect_err("it panics");
        assert!(
            failure.message.starts_with("this is wrong (src/"),
            "{failure:?}"
        );
        assert_eq!(failure.seed, Some(5));
    }

    #[test]
    fn work_when_its_process_ends_is_a_failure() {
        let failure = apart(|| super::exit(3)).expect_err("it has no result");
        assert!(failure.message.contains("status 0x300"), "{failure:?}");
    }
}
