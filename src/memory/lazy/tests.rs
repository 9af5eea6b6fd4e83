//! Handlers of page faults: a thread of the test, and a process that ends.
#![expect(unsafe_code, reason = "the handler's side of userfaultfd")]

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit};
use std::os::fd::{AsRawFd, FromRawFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

use super::super::testing::vcpu_in_real_mode;
use super::*;
use crate::memory::MIB;
use crate::memory::image::Stamp;
use crate::needs;
use crate::sys::fd::{Interest, wait};

const STAMP: Stamp = Stamp {
    offset: 0x9_f000,
    id: [3; 16],
};

/// What the test's handler reads of the message.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// Page `number` of the image that the handlers bring in.
fn page(number: u64) -> Vec<u8> {
    (number + 1).to_le_bytes().repeat(512)
}

/// `struct uffd_msg`: the kind of event, and the address of a page fault.
fn next_fault(uffd: &File) -> Option<u64> {
    const PAGEFAULT: u8 = 0x12;
    let mut event = [0; 32];
    match (&*uffd).read(&mut event) {
        Ok(32) => {
            assert_eq!(event[0], PAGEFAULT);
            Some(u64::from_le_bytes(event[16..24].try_into().unwrap()))
        }
        _ => None,
    }
}

/// `UFFDIO_COPY`
fn answer(uffd: &File, address: u64, bytes: &[u8]) {
    let mut copy = [address, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0];
    // SAFETY: the structure is of five numbers, and the source is as long as it says.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc028_aa03, copy.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Takes the message, and serves `most` faults.
fn serve(listener: &UnixListener, most: u64, served: &AtomicU64) -> (UnixStream, File) {
    let (stream, _) = listener.accept().unwrap();
    let mut message = [0; 4096];
    let (count, uffd) = stream.recv_with_fd(&mut message).unwrap();
    let uffd = uffd.unwrap();
    let told: Vec<Told> = serde_json::from_slice(&message[..count]).unwrap();
    for part in &told {
        assert_eq!((part.page_size, part.page_size_kib), (4096, 4096));
    }
    let mut buffer = [0; 1];
    stream.set_nonblocking(true).unwrap();
    while served.load(Ordering::SeqCst) < most {
        let mut polled = [
            Interest::read(uffd.as_raw_fd()),
            Interest::read(stream.as_raw_fd()),
        ];
        wait(&mut polled, None).unwrap();
        while let Some(address) = next_fault(&uffd) {
            let first = address & !4095;
            let part = told
                .iter()
                .find(|part| {
                    (part.base_host_virt_addr..part.base_host_virt_addr + part.size)
                        .contains(&first)
                })
                .unwrap();
            let offset = first - part.base_host_virt_addr + part.offset;
            served.fetch_add(1, Ordering::SeqCst);
            answer(&uffd, first, &page(offset / PAGE));
        }
        // The end of the guest.
        if polled[1].is_ready() && matches!((&stream).read(&mut buffer), Ok(0)) {
            break;
        }
    }
    (stream, uffd)
}

fn word(memory: &Memory, address: u64) -> u64 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

/// Memory with a handler that is a thread; how many faults it has served.
fn with_thread(mib: u64) -> (Memory, Handler, Arc<AtomicU64>) {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("handler");
    let listener = UnixListener::bind(&path).unwrap();
    let served = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&served);
    thread::spawn(move || serve(&listener, u64::MAX, &counter));
    let socket = UnixStream::connect(&path).unwrap();
    let (memory, handler) =
        Memory::from_handler(socket, None, mib, Pages::Ordinary, false).unwrap();
    (memory, handler, served)
}

#[test]
fn lazy_memory_when_used_has_what_the_handler_brings_in_and_keeps_what_is_written() {
    let (memory, mut handler, served) = with_thread(3076);
    assert_eq!(word(&memory, 5 * PAGE + 8), 6);
    assert_eq!(word(&memory, 5 * PAGE), 6);
    assert_eq!(served.load(Ordering::SeqCst), 1);
    memory.write(5 * PAGE, &[9; 8]).unwrap();
    assert_eq!(word(&memory, 5 * PAGE + 8), 6);
    assert_eq!(word(&memory, 5 * PAGE), u64::from_le_bytes([9; 8]));
    // Above the hole, the place in the image is another than the address.
    let high = crate::memory::HIGH_RAM + PAGE;
    assert_eq!(word(&memory, high), 3072 * MIB / PAGE + 2);
    assert!(!handler.is_gone());
}

#[test]
fn images_when_memory_is_lazy_hold_all_or_what_was_brought_in() {
    let (memory, _handler, served) = with_thread(4);
    memory.write(7 * PAGE, &[0; 4096]).unwrap();
    assert_eq!(word(&memory, 9 * PAGE), 10);
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    let contents = memory.contents(None);
    let diff = contents.write_private(&file, &STAMP).unwrap();
    // Those two and the page of the id.
    assert_eq!(diff.pages, 3);
    let full = contents.write_full(&file, &STAMP).unwrap();
    assert_eq!((full.pages, served.load(Ordering::SeqCst)), (1023, 1024));
    let mut bytes = vec![1; 4096];
    for number in 0..1024 {
        file.read_exact_at(&mut bytes, number * PAGE).unwrap();
        let mut wanted = page(number);
        match number {
            7 => wanted.fill(0),
            0x9f => wanted[..16].copy_from_slice(&STAMP.id),
            _ => {}
        }
        assert!(bytes == wanted, "{number}");
    }
}

#[test]
fn fork_when_memory_is_lazy_is_refused() {
    let (mut memory, _handler, _) = with_thread(4);
    assert!(memory.prepare().is_none());
    let error = memory.freeze(None, &STAMP, None).unwrap_err();
    assert!(matches!(error, MemoryError::LazyFork), "{error}");
    assert_eq!(word(&memory, PAGE), 2);
}

#[test]
fn vcpu_when_its_pages_are_missing_gets_them() {
    needs!(kvm);
    let (memory, _handler, served) = with_thread(4);
    // mov ax, [0x8000]; mov [0x9000], ax; hlt
    let code = [0xa1, 0x00, 0x80, 0xa3, 0x00, 0x90, 0xf4];
    memory.write(0x1000, &code).unwrap();
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    memory.register(&vm, false).unwrap();
    let mut vcpu = vcpu_in_real_mode(&vm);
    match vcpu.run().unwrap() {
        VcpuExit::Hlt => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.get_regs().unwrap().rax & 0xffff, 9);
    assert_eq!(word(&memory, 0x9000), 9);
    assert_eq!(word(&memory, 0x9008), 10);
    assert_eq!(served.load(Ordering::SeqCst), 3);
}

const SOCKET: &str = "MAYFLY_TEST_HANDLER_SOCKET";

/// No test of its own: the handler of the next one, as a process. It serves one fault and ends.
#[test]
fn handler_process() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let listener = UnixListener::bind(path).unwrap();
    println!("listens");
    drop(serve(&listener, 1, &AtomicU64::new(0)));
}

#[test]
fn handler_when_its_process_ends_is_gone_and_faults_get_no_zeros() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("handler");
    let name = "handler_process";
    let module = module_path!().split_once("::").unwrap().1;
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::{name}"), "--exact", "--nocapture"])
        .env(SOCKET, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(process.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("listens") {
        line.clear();
        assert_ne!(
            std::io::BufRead::read_line(&mut output, &mut line).unwrap(),
            0
        );
    }
    let socket = UnixStream::connect(&path).unwrap();
    let (memory, mut handler) =
        Memory::from_handler(socket, None, 4, Pages::Ordinary, false).unwrap();
    assert!(!handler.is_gone());
    assert_eq!(word(&memory, 3 * PAGE), 4);

    // It ends: first its process shows it, then its socket.
    let until = Instant::now() + Duration::from_secs(60);
    while !handler.is_gone() {
        assert!(Instant::now() < until, "never gone");
        let watched = handler.to_watch().unwrap().as_raw_fd();
        wait(&mut [Interest::read(watched)], Some(1000)).unwrap();
    }
    process.wait().unwrap();

    // A thread that needs a page waits, and has read nothing, until the descriptor is closed too.
    let ram = memory.ram().clone();
    let (done, is_done) = mpsc::channel();
    let waiting = thread::spawn(move || {
        let value: u64 = ram.read_obj(GuestAddress(8 * PAGE)).unwrap();
        done.send(value).unwrap();
    });
    // Its fault stands in the queue: that much is sure to have happened.
    let mine = handler._uffd.as_fd().as_raw_fd();
    wait(&mut [Interest::read(mine)], Some(60_000)).unwrap();
    // SAFETY: a copy of an open descriptor.
    let copy = unsafe { File::from_raw_fd(libc::dup(mine)) };
    let fault = next_fault(&copy).unwrap();
    assert!(is_done.try_recv().is_err());
    answer(&copy, fault & !4095, &page(8));
    assert_eq!(is_done.recv().unwrap(), 9);
    waiting.join().unwrap();
}

#[test]
fn handler_when_it_only_closes_the_socket_is_not_gone() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_memory, mut handler) =
        Memory::from_handler(ours, None, 1, Pages::Ordinary, false).unwrap();
    drop(theirs);
    assert!(!handler.is_gone());
}

#[test]
fn message_when_sent_is_what_firecracker_sends() {
    let mapping = Mapping {
        base_host_virt_addr: 4096,
        size: 8192,
        offset: 0,
        page_size: 4096,
        page_size_kib: 4096,
    };
    assert_eq!(
        serde_json::to_string(&[mapping]).unwrap(),
        "[{\"base_host_virt_addr\":4096,\"size\":8192,\"offset\":0,\"page_size\":4096,\
         \"page_size_kib\":4096}]"
    );
}
