#!/usr/bin/env python3
"""Edits a Linux source tree so that it boots on a software-KVM host (module kvm_pvm), where KVM runs the guest's kernel
mode in its instruction emulator and stops at an instruction the emulator lacks.

usage: software-kvm.py TREE        (TREE is changed in place; tools/guest hands in its own copy)

Each edit finds its anchor in one file, once (in the three levels of page tables: three times). Any other number ends the
script with a sentence: that kernel version needs the edit written anew.
"""

import pathlib
import sys

# A system call from user mode arrives as a page fault: KVM raises the fault that fetching the kernel's entry point with
# user privilege would raise. The registers are as the syscall instruction left them (rcx the return address, r11 the
# flags, rax the number), and the stack is still the caller's. Serve the call here, and go back by the exception's exit.
SYSCALL_AS_FAULT = """
	if (user_mode(regs) && (error_code & X86_PF_INSTR) &&
	    regs->ip == (unsigned long)entry_SYSCALL_64) {
		long nr = (int)regs->ax;

		regs->ip = regs->cx;
		regs->flags = regs->r11;
		regs->cs = __USER_CS;
		regs->ss = __USER_DS;
		regs->orig_ax = nr;
		regs->ax = -ENOSYS;
		instrumentation_begin();
		local_irq_enable();
		regs->ax = x64_sys_call(regs, nr);
		local_irq_disable();
		instrumentation_end();
		irqentry_exit(regs, state);
		return;
	}
"""

# Padding is decoded instruction by instruction only to make few nops out of many. Where all of it is single-byte nops,
# which is nearly everywhere, one look will do; the rest works as it is.
PLAIN_NOPS = """
	size_t plain = 0;

	while (plain < len && buf[plain] == 0x90)
		plain++;
	add_nop(buf, plain);
	return;
"""

# (file, anchor, what takes its place, why); the last edits only save time, a second each or less.
EDITS = [
    (
        "arch/x86/kernel/alternative.c",
        "\n\tint3_selftest();\n",
        "\n\t(void)int3_selftest;\n",
        "int3 in kernel mode is not emulated",
    ),
    (
        "arch/x86/kernel/fpu/core.c",
        'asm volatile("1: fwait\\n"',
        'asm volatile("1: nop\\n"',
        "fwait is not emulated",
    ),
    (
        "arch/x86/mm/fault.c",
        "#include <asm/fred.h>\n",
        "#include <asm/fred.h>\n#include <asm/proto.h>\n#include <asm/syscall.h>\n",
        "names used by the next edit",
    ),
    (
        "arch/x86/mm/fault.c",
        "\tstate = irqentry_enter(regs);\n\n\tinstrumentation_begin();\n\thandle_page_fault(",
        "\tstate = irqentry_enter(regs);\n" + SYSCALL_AS_FAULT + "\n\tinstrumentation_begin();\n\thandle_page_fault(",
        "a system call arrives as a page fault",
    ),
    (
        "arch/x86/kernel/alternative.c",
        "static void noinline optimize_nops(const u8 * const instr, u8 *buf, size_t len)\n{\n",
        "static void noinline optimize_nops(const u8 * const instr, u8 *buf, size_t len)\n{" + PLAIN_NOPS + "\n",
        "decoding the padding of alternatives takes 0.4 s",
    ),
    (
        "arch/x86/mm/init_64.c",
        "\t\tif (paddr >= paddr_end) {\n\t\t\tif (!after_bootmem &&\n",
        "\t\tif (paddr >= paddr_end) {\n\t\t\tif (!after_bootmem)\n\t\t\t\tbreak;\n\t\t\tif (!after_bootmem &&\n",
        "clearing empty entries of fresh page tables takes 0.5 s",
    ),
    (
        "arch/x86/kernel/setup_percpu.c",
        "atom_size = PMD_SIZE;",
        "atom_size = PAGE_SIZE;",
        "zeroing 2 MiB for the per-CPU area takes 0.2 s",
    ),
    (
        "arch/x86/mm/init.c",
        "\t\tset_memory_nx(begin, (end - begin) >> PAGE_SHIFT);\n"
        "\t\tset_memory_rw(begin, (end - begin) >> PAGE_SHIFT);\n",
        "",
        "splitting the kernel's large pages takes 0.3 s, and is needed only without rodata=off",
    ),
    (
        "kernel/params.c",
        "\n\tparam_sysfs_builtin();\n",
        "\n\t(void)param_sysfs_builtin;\n",
        "/sys/module/*/parameters takes 1 s",
    ),
    (
        "kernel/Kconfig.hz",
        "default 100 if HZ_100",
        "default 25 if HZ_100",
        "a tick takes a millisecond: a tenth of the time at 100 Hz, and most of it where the host has much else to do",
    ),
]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tree = pathlib.Path(sys.argv[1])
    for name, anchor, text, why in EDITS:
        path = tree / name
        try:
            source = path.read_text()
        except OSError as error:
            sys.exit(f"software-kvm.py: {path}: {error.strerror}; is {tree} a Linux source tree?")
        found = source.count(anchor)
        expected = 3 if name == "arch/x86/mm/init_64.c" else 1
        if found != expected:
            sys.exit(f"software-kvm.py: {path}: {anchor.strip()!r} is there {found} times, expected {expected} ({why}); "
                     "write this edit anew for this kernel version, or build from Debian's linux-source-6.12.")
        path.write_text(source.replace(anchor, text))


if __name__ == "__main__":
    main()
