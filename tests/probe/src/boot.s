# Both entries, the machine's tables and the few instructions that ever run in ring 0.
#
# Ring 0 is emulated instruction by instruction on hosts with software KVM: everything that can
# be a constant is one (page tables, descriptor tables, the frames that iretq pops).

    # PVH: XEN_ELFNOTE_PHYS32_ENTRY (18) with the physical address of the 32-bit entry.
    .pushsection .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry
    .popsection

    .pushsection .text.boot, "ax"

# PVH entry: 32-bit protected mode, flat segments, no paging; ebx = hvm_start_info.
    .code32
    .globl pvh_entry
pvh_entry:
    mov eax, 0x620                  # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER: LME
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033             # CR0: PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    xor edi, edi                    # protocol 0: PVH
    mov esi, ebx
    .byte 0xea                      # jmp far 8:to_ring3
    .long to_ring3
    .word 8

# 64-bit Linux boot protocol: long mode, flat segments, identity mapped; rsi = boot_params.
    .code64
    .globl linux64_entry
linux64_entry:
    mov eax, 0x620
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    lgdt [gdt_pointer]
    mov edi, 1                      # protocol 1: Linux, 64 bits

to_ring3:
    lidt [idt_pointer]
    mov eax, 0x28
    ltr ax
    mov rsp, offset start_frame
    iretq

# Every exception: one five-byte call for each vector, whose return address tells which.
    .globl fault_stubs
    .balign 8
fault_stubs:
    .rept 32
    .byte 0xe8
    .long fault_common - (. + 4)
    .balign 8
    .endr

# Saves what the processor pushed, then serves a request of ring 3 or goes back there to report.
fault_common:
    pop qword ptr [fault_words]
    pop qword ptr [fault_words + 8]
    pop qword ptr [fault_words + 16]
    pop qword ptr [fault_words + 24]
    pop qword ptr [fault_words + 32]
    pop qword ptr [fault_words + 40]
    cmp dword ptr [ring0_request], 0
    jne serve
    mov rax, cr2
    mov qword ptr [fault_words + 48], rax
    mov rsp, offset fault_frame
    iretq

# Requests (src/ring0.rs): 1 halt for ever, 2 read an MSR, 3 CPUID, 4 write an MSR. Registers hold what ring 3 put there.
serve:
    cmp dword ptr [ring0_request], 2
    je 2f
    cmp dword ptr [ring0_request], 3
    je 3f
    cmp dword ptr [ring0_request], 4
    je 4f
1:  cli
    hlt
    jmp 1b
2:  rdmsr
    jmp 9f
4:  wrmsr
    jmp 9f
3:  cpuid
9:  mov dword ptr [ring0_request], 0
    mov rsp, offset return_frame
    iretq

# ring0_call: in ring 3. edi = request, rsi = where eax, ebx, ecx, edx are taken from and left.
    .globl ring0_call
ring0_call:
    push rbx
    push rsi
    mov qword ptr [return_frame + 24], rsp
    mov eax, dword ptr [rsi]
    mov ebx, dword ptr [rsi + 4]
    mov ecx, dword ptr [rsi + 8]
    mov edx, dword ptr [rsi + 12]
    mov dword ptr [ring0_request], edi
    mov rdi, 0x7f0000000000         # not mapped: a page fault, which reaches ring 0 everywhere
    mov edi, dword ptr [rdi]
ring0_resume:
    pop rsi
    mov dword ptr [rsi], eax
    mov dword ptr [rsi + 4], ebx
    mov dword ptr [rsi + 8], ecx
    mov dword ptr [rsi + 12], edx
    pop rbx
    ret

# A further processor's first instructions, copied to a page below 1 MiB (src/words/smp.rs).
# Real mode, cs = page >> 4; position independent but for the tables. Its iretq frame is the
# ticket'th of `ap_frames`.
    .code16
    .globl ap_start
    .globl ap_end
ap_start:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt with a 32-bit base, from ds:disp16
    .word ap_gdt_pointer - ap_start
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    .byte 0x66, 0xea                # jmp far 8:ap_long
    .long ap_long
    .word 8
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_end:

    .code64
ap_long:
    mov eax, 1
    lock xadd dword ptr [ap_ticket], eax
    mov edi, eax
    imul eax, eax, 40
    lea rsp, [rax + ap_frames]
    iretq

    .popsection

# Tables. All of them are in memory that ring 3 may write.
    .pushsection .tables, "aw"

    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 7                  # present, writable, user
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad pd0 + 7, pd0 + 0x1000 + 7, pd0 + 0x2000 + 7, pd0 + 0x3000 + 7
    .fill 508, 8, 0                 # above 4 GiB: filled by src/paging.rs when it is needed
pd0:                                # 4 GiB in pages of 2 MiB, identity mapped
    .set page, 0
    .rept 2048
    .quad page + 0xe7               # present, writable, user, accessed, dirty, large
    .set page, page + 0x200000
    .endr

    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 ring 0, code, 64 bits
    .quad 0x00cf93000000ffff        # 0x10 ring 0, data
    .quad 0x00affb000000ffff        # 0x18 ring 3, code, 64 bits
    .quad 0x00cff3000000ffff        # 0x20 ring 3, data
gdt_tss:                            # 0x28 task state
    .word tss_end - tss - 1
    .word tss_low
    .byte tss_middle, 0x89, 0, tss_high
    .quad 0
gdt_end:
    .balign 4
    .word 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 4
    .word 0
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

    .balign 16
    .globl tss
tss:
    .long 0
    .quad ring0_stack_top           # rsp0
    .fill 90, 1, 0
    .word 104                       # offset of the port bitmap
    .fill 8192 + 2, 1, 0            # every port is allowed: software KVM drops IOPL; two bytes
                                    # more for accesses that begin at the last ports
tss_end:
    .balign 16
    .globl idt
idt:
    .fill 32 * 2, 8, 0              # filled by src/fault.rs

# What iretq pops: rip, cs, rflags (IOPL 3, interrupts off), rsp, ss.
# Stack pointers are as after a call: 8 below a multiple of 16.
start_frame:
    .quad ring3_start, 0x1b, 0x3002, boot_stack_top - 8, 0x23
fault_frame:
    .quad fault_main, 0x1b, 0x3002, fault_stack_top - 8, 0x23
return_frame:
    .quad ring0_resume, 0x1b, 0x3002, 0, 0x23
    .globl fault_words
fault_words:
    .fill 7, 8, 0
    .globl ring0_request
ring0_request:
    .long 0
    .globl ap_ticket
ap_ticket:
    .long 0
    .popsection

    .pushsection .bss.stacks, "aw", @nobits
    .balign 16
    .fill 0x80000, 1, 0
boot_stack_top:
    .fill 0x2000, 1, 0
fault_stack_top:
    .fill 0x400, 1, 0
ring0_stack_top:
    .fill 64, 1, 0                  # popped past when an exception has no error code
    .globl ap_frames
ap_frames:
    .fill 32 * 40, 1, 0
    .popsection
