//! The seccomp filters over the whole empty jail: what nothing in it may ask of the kernel.
//!
//! The monitor's threads each have a filter of their own that allows a dozen calls; these are for
//! the time before those are in place, and for a program that is not the monitor. They deny what
//! could reopen the jail or look outside it: namespaces, mounts, other processes, kernel programs,
//! keys, sockets of a network. The rules are data (`resources/seccomp/jail`), compiled by the build.

use seccompiler::{apply_filter, sock_filter};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Installs both on this process, for good.
pub fn install() -> Result<(), seccompiler::Error> {
    apply_filter(&DENIED)?;
    apply_filter(&ABSENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{BPF_ABS, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_JSET, BPF_LD, BPF_W};
    use libc::{BPF_ALU, BPF_AND, BPF_RET, SECCOMP_RET_ALLOW, c_long};

    const X86_64: u32 = 0xc000_003e;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    fn error(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number as u32
    }

    /// What one filter does with a call, found by running it as the kernel would.
    fn run(program: &[sock_filter], number: u32, first: u64, arch: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
            const LOAD: u32 = BPF_LD | BPF_W | BPF_ABS;
            match u32::from(step.code) {
                LOAD => {
                    accumulator = match step.k {
                        0 => number,
                        4 => arch,
                        16 => first as u32,
                        20 => (first >> 32) as u32,
                        _ => panic!("no rule looks at offset {}", step.k),
                    }
                }
                code if code == BPF_JMP | BPF_JEQ => at += jump(accumulator == step.k),
                code if code == BPF_JMP | BPF_JGE => at += jump(accumulator >= step.k),
                code if code == BPF_JMP | BPF_JGT => at += jump(accumulator > step.k),
                code if code == BPF_JMP | BPF_JSET => at += jump(accumulator & step.k != 0),
                code if code == BPF_JMP | BPF_JA => at += step.k as usize,
                code if code == BPF_ALU | BPF_AND => accumulator &= step.k,
                code if code == BPF_RET => return step.k,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    /// What both do: the stricter verdict has the lower number, but for killing the process.
    fn verdict(number: u32, first: u64, arch: u32) -> u32 {
        let one = run(&DENIED, number, first, arch);
        let other = run(&ABSENT, number, first, arch);
        if one == KILL || other == KILL {
            KILL
        } else {
            one.min(other)
        }
    }

    #[test]
    fn filters_deny_what_they_name_and_nothing_else() {
        let of = |call: c_long, first: i32| verdict(call as u32, first as u64, X86_64);
        for call in [
            libc::SYS_mount,
            libc::SYS_open_tree,
            libc::SYS_mount_setattr,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS__sysctl,
            libc::SYS_quotactl_fd,
        ] {
            assert_eq!(of(call, 0), error(libc::EPERM), "{call}");
        }
        for call in [
            libc::SYS_read,
            libc::SYS_ioctl,
            libc::SYS_execveat,
            libc::SYS_seccomp,
            libc::SYS_exit_group,
        ] {
            assert_eq!(of(call, 0), SECCOMP_RET_ALLOW, "{call}");
        }
        assert_eq!(of(libc::SYS_clone3, 0), error(libc::ENOSYS));
    }

    #[test]
    fn filters_when_a_rule_has_an_argument_look_at_it() {
        let of = |call: c_long, first: i32| verdict(call as u32, first as u32 as u64, X86_64);
        let thread = libc::CLONE_VM | libc::CLONE_THREAD;
        assert_eq!(of(libc::SYS_clone, thread), SECCOMP_RET_ALLOW);
        for namespace in [
            libc::CLONE_NEWNS,
            libc::CLONE_NEWCGROUP,
            libc::CLONE_NEWUTS,
            libc::CLONE_NEWIPC,
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWPID,
            libc::CLONE_NEWNET,
        ] {
            let flags = namespace | libc::CLONE_VM;
            assert_eq!(of(libc::SYS_clone, flags), error(libc::EPERM));
        }
        assert_eq!(of(libc::SYS_socket, libc::AF_UNIX), SECCOMP_RET_ALLOW);
        assert_eq!(of(libc::SYS_socket, libc::AF_INET), error(libc::EPERM));
        assert_eq!(of(libc::SYS_socket, libc::AF_NETLINK), error(libc::EPERM));
        assert_eq!(of(libc::SYS_prctl, libc::PR_SET_NAME), SECCOMP_RET_ALLOW);
        let death = libc::PR_SET_PDEATHSIG;
        assert_eq!(of(libc::SYS_prctl, death), error(libc::EPERM));
        // The kernel looks at the low half of these arguments alone; so must the filters.
        let high = |call: c_long, low: i32| verdict(call as u32, 7 << 32 | low as u64, X86_64);
        assert_eq!(high(libc::SYS_prctl, death), error(libc::EPERM));
        assert_eq!(high(libc::SYS_socket, libc::AF_INET), error(libc::EPERM));
    }

    #[test]
    fn filters_when_another_numbering_is_used_kill() {
        const I386: u32 = 0x4000_0003;
        assert_eq!(verdict(libc::SYS_read as u32, 0, I386), KILL);
        assert_eq!(verdict(0x4000_0000, 0, X86_64), KILL);
        assert_eq!(verdict(0x4000_0000 | 165, 0, X86_64), KILL);
    }
}
