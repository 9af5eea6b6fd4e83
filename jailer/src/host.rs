//! What kind of KVM this host has, and what a guest needs on one that emulates the guest's kernel.

use std::path::Path;

/// What a kernel of `tools/guest` needs on a host whose KVM emulates the guest's kernel.
const SOFTWARE_KVM: &str = include_str!("../../resources/guest/cmdline.software-kvm");
/// What glibc in a guest takes its settings from.
const GLIBC: &str = "GLIBC_TUNABLES";

/// Whether this host's KVM emulates the guest's kernel.
pub fn has_software_kvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// The words that the command line of a guest's kernel needs where KVM is software.
pub fn software_kvm_words() -> impl Iterator<Item = &'static str> {
    let lines = SOFTWARE_KVM.lines().filter(|line| !line.starts_with('#'));
    lines.flat_map(str::split_whitespace)
}

/// The variable, with its value, that each program of a guest needs where KVM is software: without it glibc uses
/// vector registers whose upper halves that guest's kernel does not keep for a program while another one runs.
pub fn software_kvm_variable() -> (&'static str, &'static str) {
    let variable = software_kvm_words().filter(|word| word.starts_with(GLIBC));
    (GLIBC, variable.last().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_a_guest_without_xsave_are_told_to_leave_its_registers_alone() {
        assert!(
            software_kvm_words()
                .any(|word| word.starts_with("clearcpuid=") && word.contains("xsave"))
        );
        let (name, variable) = software_kvm_variable();
        let value = variable.strip_prefix(name).unwrap();
        assert!(value.starts_with("=glibc.cpu.hwcaps=-"), "{value}");
        for feature in ["AVX2", "AVX512VL", "AVX_Fast_Unaligned_Load"] {
            assert!(
                value
                    .split([',', '='])
                    .any(|it| it == format!("-{feature}")),
                "{value}"
            );
        }
    }
}
