//! The kernel command line of a guest whose caller gives none.

use mayfly::wire::DEFAULT_BOOT_ARGS;

use crate::host;

/// The default line on this host.
pub fn default() -> String {
    line(host::has_software_kvm())
}

/// The monitor's default line with a console, which this command shows: the word that keeps Linux from looking for
/// serial ports goes. Where KVM emulates the guest's kernel, no kernel runs without what it lacks.
fn line(is_emulated: bool) -> String {
    let words = DEFAULT_BOOT_ARGS.split_whitespace();
    // Kernels of distributions have virtio as modules.
    let words = words.filter(|word| !word.starts_with("8250.") && *word != "nomodule");
    let mut all = vec!["console=ttyS0", "quiet"];
    all.extend(words);
    if is_emulated {
        all.extend(emulated(&all));
    }
    all.join(" ")
}

/// What software KVM needs: the words that say nothing about what `known` says, and do not name an init.
fn emulated(known: &[&str]) -> Vec<&'static str> {
    let name = |word: &str| word.split('=').next().unwrap_or_default().to_owned();
    let known: Vec<String> = known.iter().copied().chain(["init"]).map(name).collect();
    host::software_kvm_words()
        .filter(|word| !known.contains(&name(word)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: &str = "console=ttyS0 quiet reboot=k panic=1 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

    #[test]
    fn line_has_a_console_and_lets_modules_be_loaded() {
        assert_eq!(line(false), HARDWARE);
    }

    #[test]
    fn line_when_the_guests_kernel_is_emulated_leaves_out_what_cannot_be() {
        let line = line(true);
        let more = line.strip_prefix(HARDWARE).unwrap();
        assert!(more.starts_with(" clearcpuid=popcnt,"), "{more}");
        assert!(
            more.contains(" clocksource=kvm-clock GLIBC_TUNABLES="),
            "{more}"
        );
        for word in ["init=", "console=", "panic=", "quiet", "#"] {
            assert!(!more.contains(word), "{more}");
        }
    }
}
