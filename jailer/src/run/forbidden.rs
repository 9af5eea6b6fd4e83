//! What nothing in the empty jail may ask of the kernel, whatever its filters of its own say.
//!
//! The monitor's threads each have a filter that allows a dozen calls; this one is for the time
//! before those are in place, and for a program that is not the monitor. It denies what could
//! reopen the jail or look behind it: new namespaces (a user namespace gives back capabilities),
//! mounts, other processes, kernel programs, keys, sockets of a network, and the tie to the supervisor.

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long,
    sock_filter,
};

/// System calls that are denied whatever their arguments are.
const DENIED: [c_long; 56] = [
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_acct,
    // Namespaces.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    // The kernel.
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_personality,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_vhangup,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS__sysctl,
    libc::SYS_uselib,
    libc::SYS_ustat,
    // Keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// Flags of clone that ask for namespaces.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const ARCH: u32 = 0xc000_003e;
/// Numbers from here on belong to the x32 interface.
const X32: u32 = 0x4000_0000;

/// Where `struct seccomp_data` has what is looked at.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The low half of the first argument; no call below uses the high one.
const FIRST_ARGUMENT: u32 = 16;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn error(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number as u32
}

fn load(at: u32) -> sock_filter {
    sock_filter {
        code: (BPF_LD | BPF_W | BPF_ABS) as u16,
        jt: 0,
        jf: 0,
        k: at,
    }
}

fn give(action: u32) -> sock_filter {
    sock_filter {
        code: (BPF_RET | BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: action,
    }
}

/// Goes `jt` instructions on where the comparison with `k` holds, and `jf` where not.
fn compare(how: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        code: (BPF_JMP | how | BPF_K) as u16,
        jt,
        jf,
        k,
    }
}

/// The filter.
pub fn filter() -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCHITECTURE),
        compare(BPF_JEQ, ARCH, 1, 0),
        give(KILL),
        load(NUMBER),
        compare(BPF_JGE, X32, 0, 1),
        give(KILL),
        // Its flags are in memory, out of a filter's sight. The C library goes on to clone.
        compare(BPF_JEQ, libc::SYS_clone3 as u32, 0, 1),
        give(error(libc::ENOSYS)),
        compare(BPF_JEQ, libc::SYS_clone as u32, 0, 4),
        load(FIRST_ARGUMENT),
        compare(BPF_JSET, NAMESPACES, 0, 1),
        give(error(libc::EPERM)),
        give(ALLOW),
        // The jail's network, if it has one, is the guest's.
        compare(BPF_JEQ, libc::SYS_socket as u32, 0, 4),
        load(FIRST_ARGUMENT),
        compare(BPF_JEQ, libc::AF_UNIX as u32, 1, 0),
        give(error(libc::EPERM)),
        give(ALLOW),
        compare(BPF_JEQ, libc::SYS_prctl as u32, 0, 4),
        load(FIRST_ARGUMENT),
        compare(BPF_JEQ, libc::PR_SET_PDEATHSIG as u32, 0, 1),
        give(error(libc::EPERM)),
        give(ALLOW),
    ];
    for number in DENIED {
        program.push(compare(BPF_JEQ, number as u32, 0, 1));
        program.push(give(error(libc::EPERM)));
    }
    program.push(give(ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter does with a call, found by running it as the kernel would.
    fn run(number: c_long, argument: u32, architecture: u32) -> u32 {
        let program = filter();
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    accumulator = match step.k {
                        NUMBER => number as u32,
                        ARCHITECTURE => architecture,
                        _ => argument,
                    }
                }
                code if code == BPF_JMP | BPF_JEQ | BPF_K => at += jump(accumulator == step.k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => at += jump(accumulator >= step.k),
                code if code == BPF_JMP | BPF_JSET | BPF_K => at += jump(accumulator & step.k != 0),
                _ => return step.k,
            }
        }
    }

    #[test]
    fn filter_denies_what_it_lists_and_nothing_else() {
        for number in DENIED {
            assert_eq!(run(number, 0, ARCH), error(libc::EPERM), "{number}");
        }
        for number in [
            libc::SYS_read,
            libc::SYS_ioctl,
            libc::SYS_execveat,
            libc::SYS_exit_group,
        ] {
            assert_eq!(run(number, 0, ARCH), ALLOW);
        }
        assert_eq!(run(libc::SYS_clone3, 0, ARCH), error(libc::ENOSYS));
        let thread = libc::CLONE_VM | libc::CLONE_THREAD;
        assert_eq!(run(libc::SYS_clone, thread as u32, ARCH), ALLOW);
        let user = libc::CLONE_NEWUSER as u32;
        assert_eq!(run(libc::SYS_clone, user, ARCH), error(libc::EPERM));
        assert_eq!(run(libc::SYS_prctl, libc::PR_SET_NAME as u32, ARCH), ALLOW);
        let death = libc::PR_SET_PDEATHSIG as u32;
        assert_eq!(run(libc::SYS_prctl, death, ARCH), error(libc::EPERM));
        assert_eq!(run(libc::SYS_socket, libc::AF_UNIX as u32, ARCH), ALLOW);
        let inet = libc::AF_INET as u32;
        assert_eq!(run(libc::SYS_socket, inet, ARCH), error(libc::EPERM));
        assert_eq!(run(libc::SYS_read, 0, 0x4000_0003), KILL);
        assert_eq!(run(libc::c_long::from(X32), 0, ARCH), KILL);
    }
}
