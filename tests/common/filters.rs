//! Seccomp filters of another process's threads, and what they say of a call.

#![expect(
    unsafe_code,
    reason = "filters are read by ptrace, which has no safe wrapper"
)]

use std::ptr;

/// An instruction of a filter, as the kernel has it (`struct sock_filter`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    operand: u32,
}

/// The filters of thread `id`, the newest first. It is stopped meanwhile.
pub fn installed(id: i32) -> Vec<Vec<Instruction>> {
    let null = ptr::null_mut::<libc::c_void>();
    // SAFETY: ptrace and waitpid act on the other process; `status` is ours.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, id, null, null), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, id, null, null), 0);
        let mut status = 0;
        assert_eq!(libc::waitpid(id, &raw mut status, libc::__WALL), id);
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
    }
    let mut filters = Vec::new();
    while let Some(filter) = filter(id, filters.len()) {
        filters.push(filter);
    }
    // SAFETY: as above.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_DETACH, id, null, null), 0);
    }
    filters
}

fn filter(id: i32, index: usize) -> Option<Vec<Instruction>> {
    /// From the kernel's `linux/ptrace.h`.
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    // SAFETY: without a buffer the kernel tells how many instructions there are, and writes nothing.
    let count = unsafe {
        libc::ptrace(
            PTRACE_SECCOMP_GET_FILTER,
            id,
            index,
            ptr::null_mut::<Instruction>(),
        )
    };
    let count = usize::try_from(count).ok()?;
    let mut filter = vec![Instruction::default(); count];
    // SAFETY: the buffer has room for all of them, and a filter never changes.
    let copied = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, id, index, filter.as_mut_ptr()) };
    assert_eq!(usize::try_from(copied), Ok(count));
    Some(filter)
}

/// What a filter is asked about (`struct seccomp_data`).
pub struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

impl Call {
    /// Of 64-bit code.
    pub fn native(number: u32, arguments: [u64; 6]) -> Self {
        Call {
            number,
            architecture: 0xc000_003e,
            arguments,
        }
    }

    /// By `int 0x80`, whose numbers are others.
    pub fn of_32_bit_code(number: u32) -> Self {
        Call {
            number,
            architecture: 0x4000_0003,
            arguments: [0; 6],
        }
    }

    pub fn is_allowed_by(&self, filter: &[Instruction]) -> bool {
        self.action_of(filter) == libc::SECCOMP_RET_ALLOW
    }

    /// What `filter` returns, by the rules of the kernel's interpreter.
    pub fn action_of(&self, filter: &[Instruction]) -> u32 {
        let word = |offset: u32| match offset {
            0 => self.number,
            4 => self.architecture,
            16.. => {
                let argument = self.arguments[(offset as usize - 16) / 8];
                (argument >> (offset % 8 * 8)) as u32
            }
            _ => 0,
        };
        let (mut at, mut value) = (0, 0);
        loop {
            let step = filter[at];
            at += 1;
            let holds = match step.code {
                0x20 => {
                    value = word(step.operand);
                    continue;
                }
                0x54 => {
                    value &= step.operand;
                    continue;
                }
                0x05 => {
                    at += step.operand as usize;
                    continue;
                }
                0x06 => return step.operand,
                0x15 => value == step.operand,
                0x25 => value > step.operand,
                0x35 => value >= step.operand,
                code => panic!("instruction {code:#x}"),
            };
            at += usize::from(if holds {
                step.jump_true
            } else {
                step.jump_false
            });
        }
    }
}
