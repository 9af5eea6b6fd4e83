//! The state of a vCPU as plain structs. Members are those of KVM's structures, and named as there.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, kvm_xcrs};
use serde::{Deserialize, Serialize};

use super::super::mirror::mirror;
use crate::state::hex;

/// All of a vCPU: taken by [`save`](super::save), put back by [`restore`](super::restore).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// What the guest was told of its processor.
    pub cpuid: Vec<CpuidEntry>,
    /// The rate of its time stamp counter, if the host tells it.
    pub tsc_khz: Option<u32>,
    /// Whether it runs, sleeps, or waits to be woken for the first time: `KVM_MP_STATE_*`.
    pub mp_state: u32,
    /// General registers.
    pub regs: Registers,
    /// Segments, control registers and what else KVM counts as a system register.
    pub sregs: SystemRegisters,
    /// FPU and vector registers, as the XSAVE instruction lays them out.
    #[serde(with = "hex")]
    pub xsave: Vec<u8>,
    /// Which of these the guest has turned on.
    pub xcrs: Vec<Xcr>,
    /// Debug registers.
    pub debug_regs: DebugRegisters,
    /// The local APIC's page of registers.
    #[serde(with = "hex")]
    pub lapic: [u8; LAPIC_LEN],
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
    /// Exceptions, interrupts and the like that are under way.
    pub events: Events,
}

/// Bytes of a local APIC.
pub const LAPIC_LEN: usize = 1024;
/// Registers that turn extended state on: more than any processor has, and all that KVM takes.
pub const XCRS_MAX: usize = 16;
/// Model-specific registers: several times what KVM has.
pub const MSRS_MAX: usize = 4 * KVM_MAX_MSR_ENTRIES;
/// The legacy area of XSAVE and its header.
pub const XSAVE_MIN: usize = 512 + 64;

/// A model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Its address.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

mirror! {
    /// An answer of CPUID.
    CpuidEntry of kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
    }
}

mirror! {
    /// General registers.
    Registers of kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
}

mirror! {
    /// A segment.
    Segment of kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8,
        l: u8, g: u8, avl: u8, unusable: u8,
    }
}

mirror! {
    /// Where a descriptor table is.
    Table of kvm_dtable { base: u64, limit: u16 }
}

mirror! {
    /// System registers.
    SystemRegisters of kvm_sregs {
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment,
        tr: Segment, ldt: Segment, gdt: Table, idt: Table,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }
}

mirror! {
    /// A register that turns extended state on.
    Xcr of kvm_xcr { xcr: u32, value: u64 }
}

mirror! {
    /// Debug registers.
    DebugRegisters of kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }
}

mirror! {
    /// An exception.
    Exception of kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32,
    }
}

mirror! {
    /// An interrupt.
    Interrupt of kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 }
}

mirror! {
    /// A non-maskable interrupt.
    Nmi of kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 }
}

mirror! {
    /// System management mode.
    Smi of kvm_vcpu_events__bindgen_ty_4 {
        smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8,
    }
}

mirror! {
    /// A triple fault.
    TripleFault of kvm_vcpu_events__bindgen_ty_5 { pending: u8 }
}

mirror! {
    /// What is under way; `flags` says which members count.
    Events of kvm_vcpu_events {
        exception: Exception, interrupt: Interrupt, nmi: Nmi, sipi_vector: u32, flags: u32,
        smi: Smi, triple_fault: TripleFault, exception_has_payload: u8, exception_payload: u64,
    }
}

impl VcpuState {
    /// What KVM is not even asked: the first thing that cannot be of a vCPU, given that the host's
    /// XSAVE state has `xsave_len` bytes. What is in the blocks, KVM checks.
    pub fn first_fault(&self, xsave_len: usize) -> Option<&'static str> {
        let has_features = self.cpuid.iter().any(|entry| entry.function == 1);
        if !has_features || self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Some("its CPUID table is empty or too long");
        }
        if self.msrs.is_empty() || self.msrs.len() > MSRS_MAX {
            return Some("it has no model-specific registers or too many");
        }
        if self.xsave.len() < XSAVE_MIN || !self.xsave.len().is_multiple_of(4) {
            return Some("its XSAVE state is too short or not of whole words");
        }
        if self.xsave.len() > xsave_len {
            return Some("its XSAVE state is longer than this host's");
        }
        if self.xcrs.len() > XCRS_MAX {
            return Some("it has too many extended control registers");
        }
        None
    }

    /// The extended control registers as KVM takes them; those beyond the number that it takes are
    /// left out.
    pub(super) fn kvm_xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs::default();
        for (to, from) in xcrs.xcrs.iter_mut().zip(&self.xcrs) {
            *to = (*from).into();
            xcrs.nr_xcrs = xcrs.nr_xcrs.saturating_add(1);
        }
        xcrs
    }
}
