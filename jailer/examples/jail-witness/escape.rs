//! What a compromised monitor would try in an empty jail. Every line of its
//! report is an attempt and what came of it: `refused`, with the error's number, or `WORKED`.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::raw::call;

/// Tries everything.
pub fn attack(report: &mut String, value: &dyn Fn(&str) -> Option<String>) {
    let mut tried = |name: &str, result: Result<usize, i32>| {
        let outcome = match result {
            Ok(_) => "WORKED".to_owned(),
            Err(error) => format!("refused {error}"),
        };
        writeln!(report, "attack {name} {outcome}").expect("a string grows");
    };
    let victim: usize = value("victim")
        .and_then(|pid| pid.parse().ok())
        .unwrap_or(2);

    // See or signal processes of the host.
    for (name, pid) in [
        ("signal-victim", victim),
        ("signal-2", 2),
        ("signal-parent", parent()),
    ] {
        tried(name, call(libc::SYS_kill, &[pid, 0]));
    }
    let others = (2..2000_usize).find(|&pid| call(libc::SYS_kill, &[pid, 0]) != Err(libc::ESRCH));
    tried("see-process", others.ok_or(libc::ESRCH));
    tried("signal-all", call(libc::SYS_kill, &[usize::MAX, 0]));
    tried("pidfd", call(libc::SYS_pidfd_open, &[victim, 0]));
    tried("session", call(libc::SYS_getsid, &[victim]));
    tried("priority", call(libc::SYS_getpriority, &[0, victim]));
    tried("scheduler", call(libc::SYS_sched_getscheduler, &[victim]));
    tried(
        "limits-of-victim",
        call(libc::SYS_prlimit64, &[victim, 7, 0, 0]),
    );
    tried("ptrace-attach", call(libc::SYS_ptrace, &[16, victim]));
    tried("ptrace-seize", call(libc::SYS_ptrace, &[0x4206, victim]));
    tried(
        "process-vm",
        call(libc::SYS_process_vm_readv, &[victim, 0, 0, 0, 0, 0]),
    );
    tried("kcmp", call(libc::SYS_kcmp, &[1, victim, 0, 0, 0]));

    // Open a file of the host, find a program.
    for path in [
        c"/etc/passwd",
        c"/../etc/passwd",
        c"/proc/self/status",
        c"/proc/1/root",
        c"/sys",
        c"/dev/kvm",
        c"/dev/mem",
        c"/bin/sh",
        c"/usr/bin/su",
        c"/tmp",
        c"/run",
        c"/.",
        c"..",
    ] {
        let name = format!("open-{}", path.to_string_lossy());
        let own = c"/.".to_bytes() == path.to_bytes() || c"..".to_bytes() == path.to_bytes();
        let opened = call(libc::SYS_openat, &[at_cwd(), path.as_ptr() as usize, 0]);
        // The empty root itself may be looked at.
        if own {
            let name = format!("look-{}", path.to_string_lossy());
            tried(&name, opened.and_then(entries));
        } else {
            tried(&name, opened);
        }
    }
    for fd in 0..64_usize {
        // A folder among the passed descriptors would lead out.
        let up = call(libc::SYS_openat, &[fd, c"..".as_ptr() as usize, 0]);
        if up.is_ok() && fd < 6 {
            tried(&format!("open-above-{fd}"), up);
        }
    }
    let handle = [8_u32, 1, 2, 0];
    tried(
        "handle",
        call(
            libc::SYS_open_by_handle_at,
            &[at_cwd(), handle.as_ptr() as usize, 0],
        ),
    );
    for path in [c"/bin/sh", c"/usr/bin/su", c"/proc/self/exe"] {
        let argv = [path.as_ptr() as usize, 0];
        let name = format!("execute-{}", path.to_string_lossy());
        let arguments = [
            path.as_ptr() as usize,
            argv.as_ptr() as usize,
            argv[1..].as_ptr() as usize,
        ];
        tried(&name, call(libc::SYS_execve, &arguments));
    }

    // Write anywhere.
    for path in [c"/f", c"/tmp/f", c"/dev/shm/f", c"f"] {
        let name = format!("create-{}", path.to_string_lossy());
        let flags = (libc::O_CREAT | libc::O_WRONLY) as usize;
        tried(
            &name,
            call(
                libc::SYS_openat,
                &[at_cwd(), path.as_ptr() as usize, flags, 0o600],
            ),
        );
    }
    let flags = (libc::O_TMPFILE | libc::O_RDWR) as usize;
    let root = c"/".as_ptr() as usize;
    tried(
        "create-unnamed",
        call(libc::SYS_openat, &[at_cwd(), root, flags, 0o600]),
    );
    tried(
        "mkdir",
        call(libc::SYS_mkdir, &[c"/d".as_ptr() as usize, 0o700]),
    );
    tried(
        "symlink",
        call(
            libc::SYS_symlink,
            &[c"/x".as_ptr() as usize, c"/l".as_ptr() as usize],
        ),
    );
    tried(
        "mkfifo",
        call(libc::SYS_mknod, &[c"/p".as_ptr() as usize, 0o010_600, 0]),
    );
    tried(
        "mknod",
        call(
            libc::SYS_mknod,
            &[c"/m".as_ptr() as usize, 0o020_600, 0x101],
        ),
    );
    tried("chmod", call(libc::SYS_chmod, &[root, 0o777]));
    tried("chown", call(libc::SYS_chown, &[root, 0, 0]));
    tried("bind-path", bind_path());

    // Mount, and reopen the jail by namespaces of one's own.
    let tmpfs = c"tmpfs".as_ptr() as usize;
    tried("mount", call(libc::SYS_mount, &[tmpfs, root, tmpfs, 0, 0]));
    let remount = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
    tried("remount", call(libc::SYS_mount, &[0, root, 0, remount, 0]));
    tried(
        "umount",
        call(libc::SYS_umount2, &[root, libc::MNT_DETACH as usize]),
    );
    tried("fsopen", call(libc::SYS_fsopen, &[tmpfs, 0]));
    tried("open-tree", call(libc::SYS_open_tree, &[at_cwd(), root, 1]));
    tried("pivot-root", call(libc::SYS_pivot_root, &[root, root]));
    tried("chroot", call(libc::SYS_chroot, &[root]));
    for (name, flag) in [
        ("user", libc::CLONE_NEWUSER),
        ("mount", libc::CLONE_NEWNS),
        ("net", libc::CLONE_NEWNET),
        ("pid", libc::CLONE_NEWPID),
    ] {
        tried(
            &format!("unshare-{name}"),
            call(libc::SYS_unshare, &[flag as usize]),
        );
    }
    let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as usize;
    tried("clone-user", call(libc::SYS_clone, &[flags, 0, 0, 0, 0]));
    let args = [
        libc::CLONE_NEWUSER as u64,
        0,
        0,
        0,
        libc::SIGCHLD as u64,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let cloned = call(libc::SYS_clone3, &[args.as_ptr() as usize, 88]);
    if cloned == Ok(0) {
        std::process::exit(0);
    }
    tried("clone3-user", cloned);
    for fd in 0..6_usize {
        tried(&format!("setns-{fd}"), call(libc::SYS_setns, &[fd, 0]));
    }

    // Become more.
    tried("setuid", call(libc::SYS_setuid, &[0]));
    tried("setgid", call(libc::SYS_setgid, &[0]));
    tried("setgroups", call(libc::SYS_setgroups, &[0, 0]));
    let header = [0x2008_0522_u32, 0];
    let all = [u32::MAX; 6];
    let pointers = [header.as_ptr() as usize, all.as_ptr() as usize];
    tried("capset", call(libc::SYS_capset, &pointers));
    let kept = (0..64_usize).find(|&cap| call(libc::SYS_prctl, &[24, cap, 0, 0, 0]) == Ok(1));
    tried("bounding-set", kept.ok_or(libc::EPERM));
    let mut own = [0_u32; 6];
    let pointers = [header.as_ptr() as usize, own.as_mut_ptr() as usize];
    let _ = call(libc::SYS_capget, &pointers);
    tried(
        "capabilities",
        own.iter()
            .any(|&bits| bits != 0)
            .then_some(1)
            .ok_or(libc::EPERM),
    );
    let privileges = call(libc::SYS_prctl, &[39, 0, 0, 0, 0]);
    tried(
        "new-privileges",
        if privileges == Ok(1) {
            Err(libc::EPERM)
        } else {
            privileges
        },
    );
    tried("free-of-parent", call(libc::SYS_prctl, &[1, 0, 0, 0, 0]));
    for resource in 0..16_usize {
        let mut now = [0_u64; 2];
        let at = now.as_mut_ptr() as usize;
        let _ = call(libc::SYS_prlimit64, &[0, resource, 0, at]);
        let more = [now[1].saturating_add(1), now[1].saturating_add(1)];
        let result = if now[1] == u64::MAX {
            Err(libc::EPERM)
        } else {
            call(
                libc::SYS_prlimit64,
                &[0, resource, more.as_ptr() as usize, 0],
            )
        };
        tried(&format!("raise-limit-{resource}"), result);
    }

    // The kernel.
    let attributes = [0_u64; 16];
    for command in [0_usize, 5] {
        let arguments = [command, attributes.as_ptr() as usize, 128];
        tried(&format!("bpf-{command}"), call(libc::SYS_bpf, &arguments));
    }
    tried(
        "perf",
        call(
            libc::SYS_perf_event_open,
            &[attributes.as_ptr() as usize, 0, 0, 0, 0],
        ),
    );
    tried("module", call(libc::SYS_init_module, &[0, 0, root]));
    tried("kexec", call(libc::SYS_kexec_load, &[0, 0, 0, 0]));
    tried(
        "reboot",
        call(libc::SYS_reboot, &[0xfee1_dead, 672_274_793, 0, 0]),
    );
    tried("syslog", call(libc::SYS_syslog, &[3, 0, 0]));
    tried("iopl", call(libc::SYS_iopl, &[3]));
    tried("hostname", call(libc::SYS_sethostname, &[root, 1]));
    tried(
        "clock",
        call(libc::SYS_clock_settime, &[0, attributes.as_ptr() as usize]),
    );
    tried("keys", call(libc::SYS_keyctl, &[0, usize::MAX - 3, 0]));

    // The host's network.
    if let Some(port) = value("port").and_then(|port| port.parse::<u16>().ok()) {
        for address in [[127, 0, 0, 1], [198, 18, 0, 1], [10, 0, 2, 2]] {
            let target = SocketAddr::from((address, port));
            let result = TcpStream::connect_timeout(&target, Duration::from_millis(200));
            tried(&format!("connect-{target}"), outcome(result));
        }
    }
    if let Some(name) = value("abstract") {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes());
        let result = address.and_then(|address| UnixStream::connect_addr(&address));
        tried("connect-abstract", outcome(result));
    }
    let result = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"x", "8.8.8.8:53"));
    tried("send-outside", outcome(result));
    let raw = (libc::SOCK_RAW | libc::SOCK_CLOEXEC) as usize;
    tried(
        "raw-socket",
        call(libc::SYS_socket, &[libc::AF_INET as usize, raw, 1]),
    );
    tried(
        "packet-socket",
        call(libc::SYS_socket, &[libc::AF_PACKET as usize, raw, 0x0300]),
    );
}

fn at_cwd() -> usize {
    libc::AT_FDCWD as usize
}

fn parent() -> usize {
    // 0, as the parent is outside: that would be this process's own group.
    match call(libc::SYS_getppid, &[]) {
        Ok(0) | Err(_) => 3,
        Ok(pid) => pid,
    }
}

/// How many entries a folder has besides itself and the one above.
fn entries(fd: usize) -> Result<usize, i32> {
    let mut buffer = [0_u8; 4096];
    let length = call(
        libc::SYS_getdents64,
        &[fd, buffer.as_mut_ptr() as usize, buffer.len()],
    )?;
    let mut count = 0;
    let mut at = 0;
    while at < length {
        count += 1;
        at += usize::from(u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]));
    }
    if count > 2 {
        Ok(count)
    } else {
        Err(libc::ENOENT)
    }
}

fn bind_path() -> Result<usize, i32> {
    outcome(std::os::unix::net::UnixListener::bind("/s"))
}

fn outcome<T>(result: std::io::Result<T>) -> Result<usize, i32> {
    result
        .map(|_| 0)
        .map_err(|error| error.raw_os_error().unwrap_or(0))
}
