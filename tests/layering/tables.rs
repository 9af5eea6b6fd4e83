//! What the layering test holds the code to: heights of modules, and where unsafe code may be.

/// The height of each module of the monitor: it may see what is lower.
pub const MONITOR: &[(&str, u8)] = &[
    ("main", 11),
    ("program", 10),
    ("args", 9),
    ("api", 8),
    ("vmm", 7),
    ("vcpu", 6),
    ("virtio", 5),
    ("arch", 5),
    ("files", 5),
    ("threads", 5),
    ("serial", 4),
    ("memory", 4),
    ("error", 4),
    ("snapshot", 4),
    ("overlay", 4),
    ("rate_limiter", 3),
    ("bus", 3),
    ("inbox", 3),
    ("seccomp", 3),
    ("metrics", 3),
    ("log", 3),
    ("timeline", 3),
    ("steps", 3),
    ("wire", 1),
    ("state", 1),
    ("sys", 0),
];

/// Imports that may go up or sideways all the same, by whole module and by what they begin with.
pub const MONITOR_EXCEPTIONS: &[(&str, &str)] = &[];

/// Of modules that are lower, what alone may be seen: the API thread sees control's vocabulary,
/// not control.
pub const MONITOR_ONLY: &[(&str, &str, &str)] = &[("api", "vmm", "action")];

/// Macros and other names at the root of the crate, and the module that they stand for.
pub const MACROS: &[(&str, &str)] = &[
    ("error", "log"),
    ("warn", "log"),
    ("info", "log"),
    ("debug", "log"),
    ("guest_warn", "log"),
    ("exit", "wire"),
    ("Allocator", "sys"),
    ("ALLOCATOR", "sys"),
];

/// The same for the jailer.
pub const JAILER: &[(&str, u8)] = &[
    ("main", 10),
    ("attach", 9),
    ("check", 9),
    ("prepare", 9),
    ("run", 8),
    ("compat", 8),
    ("process", 7),
    ("args", 6),
    ("guest", 5),
    ("cgroup", 5),
    ("netns", 5),
    ("root", 4),
    ("monitor", 3),
    ("undo", 3),
    ("console", 2),
    ("input", 2),
    ("error", 1),
    ("filter", 1),
    ("host", 1),
    ("sys", 0),
];

/// The same for `mayfly-oci`.
pub const OCI: &[(&str, u8)] = &[
    ("main", 12),
    ("commands", 11),
    ("lifecycle", 10),
    ("jailer", 9),
    ("image", 8),
    ("cgroup", 7),
    ("scope", 7),
    ("accounts", 6),
    ("bundle", 5),
    ("templates", 5),
    ("state", 4),
    ("hooks", 3),
    ("process", 2),
    ("host", 2),
    ("error", 1),
    ("input", 1),
    ("user", 1),
    ("args", 0),
];

/// The same for the disks of images; `main` is a program that uses the library.
pub const IMAGES: &[(&str, u8)] = &[
    ("cache", 16),
    ("known", 15),
    ("identity", 14),
    ("digest", 13),
    ("erofs", 12),
    ("source", 11),
    ("layout", 10),
    ("fill", 9),
    ("archive", 8),
    ("tree", 7),
    ("content", 6),
    ("unpack", 5),
    ("tool", 4),
    ("sparse", 3),
    ("bytes", 2),
    ("progress", 1),
    ("failure", 0),
];

/// What the jailer may see of the monitor's library: what both know, and the format of a snapshot's
/// files, which it opens for the jail.
pub const JAILER_SEES: &[&str] = &["wire", "snapshot"];

/// Which files hold unsafe code outside of tests, how many items (blocks, functions,
/// implementations), and why they cannot do without. SECURITY.md refers to this list.
pub const UNSAFE: &[(&str, usize, &str)] = &[
    (
        "src/memory/mapping.rs",
        3,
        "maps files into guest memory, advises the host of it, and registers it with KVM: the mapping must outlive the VM",
    ),
    (
        "src/sys/allocator.rs",
        9,
        "the allocator of the process: GlobalAlloc is an unsafe trait",
    ),
    (
        "src/sys/cache.rs",
        1,
        "a prefetch takes an address, and is a hint only",
    ),
    (
        "src/sys/clock.rs",
        1,
        "clock_gettime fills a timespec of ours",
    ),
    (
        "src/sys/fd.rs",
        5,
        "takes descriptors by number that were passed at the start, and calls that rustix does not offer",
    ),
    (
        "src/sys/io.rs",
        3,
        "a buffer of whole pages, and calls on guest memory, which no reference points to",
    ),
    (
        "src/sys/kvm.rs",
        9,
        "the page that KVM shares with a vCPU thread, and ioctls that kvm-ioctls does not offer",
    ),
    (
        "src/sys/kvm/blocks.rs",
        7,
        "a vCPU's XSAVE state, whose length the host says, and unions of KVM's: interrupt chips, nested state",
    ),
    (
        "src/sys/landlock.rs",
        3,
        "the three calls of Landlock, which libc gives no wrappers for",
    ),
    (
        "src/sys/packets.rs",
        2,
        "packets read into and written out of guest memory, by one piece or by vectors",
    ),
    (
        "src/sys/pagemap.rs",
        2,
        "PAGEMAP_SCAN and mincore, with structures and a buffer of ours, to find the pages that hold something",
    ),
    (
        "src/sys/process.rs",
        2,
        "_exit from places where nothing else may run, and mallopt, which libc has no safe form of",
    ),
    (
        "src/sys/ring.rs",
        3,
        "io_uring entries that name guest memory, and the lists of its pieces, which must stay while the kernel uses them",
    ),
    (
        "src/sys/signal.rs",
        5,
        "handlers of signals: sigaction, and what may be called inside of one",
    ),
    (
        "src/sys/socket.rs",
        3,
        "setsockopt and getsockopt for options that rustix does not know, and the descriptor that one of them makes",
    ),
    (
        "src/sys/tap.rs",
        3,
        "the ioctls of TUN/TAP, with structures that libc describes",
    ),
    (
        "src/sys/terminal.rs",
        1,
        "the ioctls of terminals, which also a signal handler makes",
    ),
    (
        "src/sys/uffd.rs",
        4,
        "userfaultfd: the ioctls that make and set it up, the system call, and the descriptor that they make",
    ),
    (
        "src/sys/zeroed.rs",
        2,
        "a mapping of fresh memory, used as a buffer of atomics without writing to it",
    ),
    (
        "jailer/src/sys.rs",
        30,
        "fork, clone3, exec and what happens between them; a process that only stays; mounts, ioctls and prctl that rustix does not offer",
    ),
    (
        "jailer/agent/src/sys.rs",
        22,
        "the guest's agent has no standard library: system calls, memory, the start of a program",
    ),
    (
        "jailer/exit/src/sys.rs",
        18,
        "the guest's helper has no standard library: system calls, two port instructions, the stack at its start",
    ),
];
