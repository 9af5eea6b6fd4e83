//! What of the processor a saved guest depends on, and how a host differs from it.
//!
//! A guest looks at its processor once, at its start, and goes by that for as long as it lives. On a
//! host that lacks a feature which the guest was told of, it fails hours later, at the first
//! instruction that is missing; on another model errata, timings and the hidden parts of the state
//! differ. Both are refused before the guest runs, unless the user says otherwise. Pure, but for
//! [`Fingerprint::of_saved`] and [`Fingerprint::of_host`], which ask the processor and KVM.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::mask::CpuidRegister;
use super::vcpu::{self, VcpuError, VcpuState};
use crate::sys::kvm::{self, blocks};

/// The processor of a saved guest, or of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Who made it, as CPUID tells: "GenuineIntel".
    pub vendor: String,
    /// Which processor it is, of the host and not as the guest was told.
    pub model: Model,
    /// What the guest was told that it has, or what guests of the host can be told.
    pub features: Vec<FeatureWord>,
    /// The rate of the time stamp counter, if the host tells it.
    pub tsc_khz: Option<u32>,
    /// Whether the host can make a guest's time stamp counter run at another rate.
    pub tsc_scaling: bool,
    /// Bytes of the XSAVE state.
    pub xsave_len: usize,
}

/// A processor by the numbers of its vendor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Family, with the extended one.
    pub family: u32,
    /// Model, with the extended one.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
}

/// A register of CPUID each bit of which is a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureWord {
    /// EAX when CPUID is asked.
    pub leaf: u32,
    /// ECX when it is asked.
    pub subleaf: u32,
    /// Which register of the answer.
    pub register: CpuidRegister,
    /// What is in it.
    pub bits: u32,
}

/// A word of features: where it is, bits that are none, and the names of the others from bit 0 on
/// ("-" where there is none).
struct Word {
    leaf: u32,
    subleaf: u32,
    register: CpuidRegister,
    /// Bits that follow what the guest has turned on, or how many vCPUs it has.
    ignored: u32,
    names: &'static str,
}

/// The words that count (Intel SDM volume 2A, "CPUID"; AMD APM volume 3, appendix E; Linux,
/// `Documentation/virt/kvm/x86/cpuid.rst`), with the names that /proc/cpuinfo has.
const WORDS: [Word; 19] = [
    Word {
        leaf: 1,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        // MONITOR, by IA32_MISC_ENABLE; OSXSAVE, by CR4.
        ignored: 1 << 3 | 1 << 27,
        names: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr \
                pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave \
                osxsave avx f16c rdrand hypervisor",
    },
    Word {
        leaf: 1,
        subleaf: 0,
        register: CpuidRegister::Edx,
        // APIC, by IA32_APIC_BASE; more than one logical processor.
        ignored: 1 << 9 | 1 << 28,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush \
                - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    },
    Word {
        leaf: 6,
        subleaf: 0,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "dtherm ida arat",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: CpuidRegister::Ebx,
        ignored: 0,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
                zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb \
                intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        // OSPKE, by CR4.
        ignored: 1 << 4,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
                avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid \
                - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: CpuidRegister::Edx,
        ignored: 0,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear \
                rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr \
                ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d \
                arch_capabilities core_capabilities ssbd",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs \
                - - amx_fp16 - avx_ifma - - lam",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: CpuidRegister::Edx,
        ignored: 0,
        names: "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi",
    },
    Word {
        leaf: 7,
        subleaf: 2,
        register: CpuidRegister::Edx,
        ignored: 0,
        names: "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    },
    Word {
        leaf: 0xd,
        subleaf: 0,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state \
                hi16_zmm_state - pkru_state - - - - - - - xtilecfg_state xtiledata_state",
    },
    Word {
        leaf: 0xd,
        subleaf: 1,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Word {
        leaf: 0xd,
        subleaf: 1,
        register: CpuidRegister::Ecx,
        ignored: 0,
        names: "",
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        // More than one core.
        ignored: 1 << 1,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
                xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - \
                bpext ptsc perfctr_llc mwaitx",
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: CpuidRegister::Edx,
        // As in leaf 1 on AMD.
        ignored: 1 << 9,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - \
                mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    Word {
        leaf: 0x8000_0007,
        subleaf: 0,
        register: CpuidRegister::Edx,
        ignored: 0,
        names: "- - - - - - - - constant_tsc",
    },
    Word {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: CpuidRegister::Ebx,
        ignored: 0,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
                amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd - cppc amd_psfd btc_no \
                amd_ibpb_ret",
    },
    Word {
        leaf: 0x8000_000a,
        subleaf: 0,
        register: CpuidRegister::Edx,
        ignored: 0,
        names: "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists",
    },
    Word {
        leaf: 0x8000_0021,
        subleaf: 0,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs",
    },
    Word {
        leaf: 0x4000_0001,
        subleaf: 0,
        register: CpuidRegister::Eax,
        ignored: 0,
        names: "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi \
                kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control \
                kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
                kvm_migration_control - - - - - - kvmclock_stable",
    },
];

/// Words that a saved fingerprint may have.
const WORDS_MAX: usize = 64;

impl Fingerprint {
    /// What the vCPU that `state` was taken of depends on: the host that this is asked on is the one
    /// it ran on, with a virtual machine of it.
    pub fn of_saved(vm: &VmFd, state: &VcpuState) -> Self {
        let entries = state.cpuid.iter().map(|entry| (*entry).into());
        Fingerprint::of(vm, &entries.collect::<Vec<_>>(), state.tsc_khz)
    }

    /// What this host has for a guest that is told of its processor by `table`. The table is set, and
    /// read back: a KVM that is software adds the features that it cannot hide. `vcpu` is a vCPU of
    /// `vm` that has not run, and whose table is set anew afterwards.
    ///
    /// # Errors
    /// KVM's.
    pub fn of_host(vm: &VmFd, vcpu: &VcpuFd, table: &CpuId) -> Result<Self, VcpuError> {
        vcpu::set_cpuid(vcpu, table)?;
        let set = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        let set = set.map_err(vcpu::not_given("CPUID table"))?;
        let mut host = Fingerprint::of(vm, set.as_slice(), vcpu.get_tsc_khz().ok());
        for word in &mut host.features {
            word.bits |= word.of(table.as_slice());
        }
        Ok(host)
    }

    fn of(vm: &VmFd, entries: &[kvm_cpuid_entry2], tsc_khz: Option<u32>) -> Self {
        let words = WORDS.iter().map(|word| {
            let mut feature = FeatureWord {
                leaf: word.leaf,
                subleaf: word.subleaf,
                register: word.register,
                bits: 0,
            };
            feature.bits = feature.of(entries) & !word.ignored;
            feature
        });
        Fingerprint {
            vendor: kvm::vendor(),
            model: Model::of(kvm::signature()),
            features: words.collect(),
            tsc_khz,
            tsc_scaling: vm.check_extension(Cap::TscControl),
            xsave_len: blocks::xsave_len(vm),
        }
    }

    /// How `host` differs from what the guest depends on: one message for each difference.
    pub fn differences(&self, host: &Fingerprint) -> Vec<String> {
        let mut differences = Vec::new();
        if self.vendor != host.vendor {
            differences.push(format!(
                "the guest ran on a CPU of {}, this host's is of {}",
                shown(&self.vendor),
                shown(&host.vendor)
            ));
        }
        if self.model != host.model {
            differences.push(format!(
                "the guest ran on a CPU of {}, this host's is of {}",
                self.model.shown(),
                host.model.shown()
            ));
        }
        for word in self.features.iter().take(WORDS_MAX) {
            let has = host.features.iter().find(|other| other.is_same(word));
            let missing = word.bits & !has.map_or(0, |word| word.bits);
            let bits = (0..u32::BITS).filter(|bit| missing & 1 << bit != 0);
            differences.extend(bits.map(|bit| {
                let name = word.name(bit);
                format!("the guest was told of the CPU feature {name}, which this host lacks")
            }));
        }
        if let (Some(guest), Some(host_khz)) = (self.tsc_khz, host.tsc_khz)
            && !vcpu::is_same_rate(guest, host_khz)
            && !host.tsc_scaling
        {
            differences.push(format!(
                "the guest's time stamp counter runs at {guest} kHz, this host's at {host_khz} kHz, and \
                 KVM cannot scale it"
            ));
        }
        if self.xsave_len > host.xsave_len {
            differences.push(format!(
                "the guest's extended CPU state (XSAVE) takes {} bytes, this host has {}",
                self.xsave_len, host.xsave_len
            ));
        }
        differences
    }
}

/// A vendor's name out of a file.
fn shown(vendor: &str) -> String {
    let name: String = vendor.chars().take(12).collect();
    format!("\"{}\"", name.escape_default())
}

impl Model {
    /// From EAX of leaf 1.
    const fn of(signature: u32) -> Self {
        let family = signature >> 8 & 0xf;
        let model = signature >> 4 & 0xf;
        let has_extended_model = family == 6 || family == 0xf;
        Model {
            family: match family {
                0xf => 0xf + (signature >> 20 & 0xff),
                family => family,
            },
            model: if has_extended_model {
                model | (signature >> 12 & 0xf0)
            } else {
                model
            },
            stepping: signature & 0xf,
        }
    }

    fn shown(self) -> String {
        let Model {
            family,
            model,
            stepping,
        } = self;
        format!("family {family}, model {model}, stepping {stepping}")
    }
}

impl FeatureWord {
    /// Its bits in a CPUID table: 0 if it is not there.
    fn of(&self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let place = (self.leaf, self.subleaf);
        let mut entries = entries.iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == place);
        entry.map_or(0, |entry| match self.register {
            CpuidRegister::Eax => entry.eax,
            CpuidRegister::Ebx => entry.ebx,
            CpuidRegister::Ecx => entry.ecx,
            CpuidRegister::Edx => entry.edx,
        })
    }

    fn is_same(&self, other: &FeatureWord) -> bool {
        (self.leaf, self.subleaf, self.register) == (other.leaf, other.subleaf, other.register)
    }

    /// What a bit of it is called.
    fn name(&self, bit: u32) -> String {
        let word = WORDS.iter().find(|word| {
            (word.leaf, word.subleaf, word.register) == (self.leaf, self.subleaf, self.register)
        });
        let names = word.map_or("", |word| word.names);
        match names.split_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => name.into(),
            _ => format!(
                "CPUID leaf {:#x}, subleaf {:#x}, {} bit {bit}",
                self.leaf,
                self.subleaf,
                match self.register {
                    CpuidRegister::Eax => "EAX",
                    CpuidRegister::Ebx => "EBX",
                    CpuidRegister::Ecx => "ECX",
                    CpuidRegister::Edx => "EDX",
                }
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(leaf: u32, subleaf: u32, register: CpuidRegister, bits: u32) -> FeatureWord {
        FeatureWord {
            leaf,
            subleaf,
            register,
            bits,
        }
    }

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            vendor: "GenuineIntel".into(),
            model: Model::of(0x0005_0657),
            features: vec![
                word(1, 0, CpuidRegister::Ecx, 1 << 28),
                word(7, 0, CpuidRegister::Ebx, 1 << 5 | 1 << 16),
            ],
            tsc_khz: Some(2_500_000),
            tsc_scaling: false,
            xsave_len: 4096,
        }
    }

    #[test]
    fn names_when_asked_for_are_those_of_the_manuals() {
        use CpuidRegister::{Eax, Ebx, Ecx, Edx};
        for (leaf, subleaf, register, bit, name) in [
            (1, 0, Ecx, 0, "pni"),
            (1, 0, Ecx, 12, "fma"),
            (1, 0, Ecx, 24, "tsc_deadline_timer"),
            (1, 0, Ecx, 28, "avx"),
            (1, 0, Ecx, 31, "hypervisor"),
            (1, 0, Edx, 11, "sep"),
            (1, 0, Edx, 26, "sse2"),
            (6, 0, Eax, 2, "arat"),
            (7, 0, Ebx, 5, "avx2"),
            (7, 0, Ebx, 16, "avx512f"),
            (7, 0, Ebx, 23, "clflushopt"),
            (7, 0, Ebx, 31, "avx512vl"),
            (7, 0, Ecx, 22, "rdpid"),
            (7, 0, Ecx, 31, "pks"),
            (7, 0, Edx, 4, "fsrm"),
            (7, 0, Edx, 24, "amx_tile"),
            (7, 0, Edx, 31, "ssbd"),
            (7, 1, Eax, 4, "avx_vnni"),
            (7, 1, Eax, 26, "lam"),
            (7, 1, Edx, 14, "prefetchi"),
            (0xd, 0, Eax, 9, "pkru_state"),
            (0xd, 0, Eax, 18, "xtiledata_state"),
            (0xd, 1, Eax, 3, "xsaves"),
            (0x8000_0001, 0, Ecx, 22, "topoext"),
            (0x8000_0001, 0, Ecx, 29, "mwaitx"),
            (0x8000_0001, 0, Edx, 20, "nx"),
            (0x8000_0001, 0, Edx, 29, "lm"),
            (0x8000_0007, 0, Edx, 8, "constant_tsc"),
            (0x8000_0008, 0, Ebx, 12, "amd_ibpb"),
            (0x8000_0008, 0, Ebx, 30, "amd_ibpb_ret"),
            (0x8000_0021, 0, Eax, 8, "autoibrs"),
            (0x4000_0001, 0, Eax, 0, "kvmclock"),
            (0x4000_0001, 0, Eax, 24, "kvmclock_stable"),
            (1, 0, Edx, 10, "CPUID leaf 0x1, subleaf 0x0, EDX bit 10"),
            (7, 2, Edx, 31, "CPUID leaf 0x7, subleaf 0x2, EDX bit 31"),
            (0x123, 4, Eax, 0, "CPUID leaf 0x123, subleaf 0x4, EAX bit 0"),
        ] {
            assert_eq!(word(leaf, subleaf, register, 0).name(bit), name);
        }
    }

    #[test]
    fn words_when_listed_are_each_there_once_and_name_no_more_than_their_bits() {
        for (at, word) in WORDS.iter().enumerate() {
            let place = |word: &Word| (word.leaf, word.subleaf, word.register);
            let same = WORDS.iter().filter(|other| place(other) == place(word));
            assert_eq!(same.count(), 1, "{at}");
            assert!(word.names.split_whitespace().count() <= 32, "{at}");
        }
    }

    #[test]
    fn model_when_made_of_a_signature_has_the_extended_numbers() {
        for (signature, family, model, stepping) in [
            (0x0005_0657, 6, 0x55, 7),
            (0x00b0_0f21, 0x1a, 2, 1),
            (0x00a0_0f11, 0x19, 1, 1),
            (0x0001_0543, 5, 4, 3),
            (0xffff_ffff, 0x10e, 0xff, 15),
        ] {
            let expected = Model {
                family,
                model,
                stepping,
            };
            assert_eq!(Model::of(signature), expected, "{signature:#x}");
        }
    }

    #[test]
    fn host_when_it_has_all_that_the_guest_was_told_of_differs_in_nothing() {
        let mut host = fingerprint();
        host.features.reverse();
        host.features.push(word(7, 0, CpuidRegister::Edx, !0));
        for word in &mut host.features {
            word.bits |= 1 << 20;
        }
        host.xsave_len = 8192;
        // As another boot may have measured it.
        host.tsc_khz = Some(2_500_100);
        assert_eq!(fingerprint().differences(&host), [""; 0]);
        host.tsc_khz = None;
        assert_eq!(fingerprint().differences(&host), [""; 0]);
        host.tsc_khz = Some(3_000_000);
        host.tsc_scaling = true;
        assert_eq!(fingerprint().differences(&host), [""; 0]);
    }

    #[test]
    fn host_when_it_lacks_something_or_is_another_model_differs_in_that() {
        let mut host = fingerprint();
        host.features.truncate(1);
        assert_eq!(
            fingerprint().differences(&host),
            [
                "the guest was told of the CPU feature avx2, which this host lacks",
                "the guest was told of the CPU feature avx512f, which this host lacks",
            ]
        );
        let host = Fingerprint {
            vendor: "AuthenticAMD".into(),
            model: Model::of(0x00a0_0f11),
            tsc_khz: Some(2_000_000),
            xsave_len: 2048,
            ..fingerprint()
        };
        let differences = fingerprint().differences(&host);
        assert_eq!(
            differences,
            [
                "the guest ran on a CPU of \"GenuineIntel\", this host's is of \"AuthenticAMD\"",
                "the guest ran on a CPU of family 6, model 85, stepping 7, this host's is of family \
                 25, model 1, stepping 1",
                "the guest's time stamp counter runs at 2500000 kHz, this host's at 2000000 kHz, and \
                 KVM cannot scale it",
                "the guest's extended CPU state (XSAVE) takes 4096 bytes, this host has 2048",
            ]
        );
    }

    #[test]
    fn fingerprint_when_a_file_makes_it_long_says_a_bounded_number_of_plain_sentences() {
        let all = word(0x123, 0, CpuidRegister::Eax, !0);
        let guest = Fingerprint {
            vendor: "\n\u{1b}[31m".repeat(1 << 16),
            features: vec![all; 1 << 16],
            ..fingerprint()
        };
        let differences = guest.differences(&fingerprint());
        assert_eq!(differences.len(), 1 + 32 * WORDS_MAX);
        for difference in differences {
            assert!(difference.len() < 200, "{difference}");
            assert!(!difference.contains(char::is_control), "{difference}");
        }
    }
}
