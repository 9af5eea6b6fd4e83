//! The names of instructions that KVM's emulator is known to lack, found from their bytes.
//!
//! Only for a message: what is not known has no name. 64-bit mode is assumed; the bytes are the
//! guest's, and any are taken.

/// The prefixes of an instruction, as far as they choose between instructions.
#[derive(Clone, Copy, Debug, Default)]
struct Prefixes {
    /// 0x66
    operand: bool,
    /// 0xf3
    rep: bool,
    /// 0xf2
    repne: bool,
    /// REX.W
    wide: bool,
}

/// The name of the instruction that `bytes` begin with (Intel SDM volume 2, appendix A).
pub fn name(bytes: &[u8]) -> Option<&'static str> {
    let (prefixes, rest) = prefixes(bytes);
    let (opcode, rest) = rest.split_first()?;
    match opcode {
        0x0f => two_bytes(prefixes, rest),
        0x62 => Some("an AVX-512 instruction"),
        0x8f if modrm(rest).is_some_and(|(_, reg, _)| reg != 0) => Some("an XOP instruction"),
        0x9b => Some("fwait"),
        0xc4 => vex(*rest.first()? & 0x1f, *rest.get(1)? & 3, rest.get(2..)?),
        // The short form: always of the map that 0x0f begins.
        0xc5 => vex(1, *rest.first()? & 3, rest.get(1..)?),
        0xcc => Some("int3"),
        0xd8..=0xdf => Some("an x87 instruction"),
        0xf1 => Some("int1"),
        _ => None,
    }
}

fn prefixes(mut bytes: &[u8]) -> (Prefixes, &[u8]) {
    let mut prefixes = Prefixes::default();
    while let Some((byte, rest)) = bytes.split_first() {
        match byte {
            0x66 => prefixes.operand = true,
            0xf2 => prefixes.repne = true,
            0xf3 => prefixes.rep = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 | 0xf0 | 0x40..=0x4f => {}
            _ => break,
        }
        // A REX prefix counts only where it is the last.
        prefixes.wide = (0x48..=0x4f).contains(byte);
        bytes = rest;
    }
    (prefixes, bytes)
}

/// The ModRM byte's parts: whether it names a register, its middle field, the byte itself.
fn modrm(rest: &[u8]) -> Option<(bool, u8, u8)> {
    let byte = *rest.first()?;
    Some((byte >= 0xc0, byte >> 3 & 7, byte))
}

/// What follows 0x0f.
fn two_bytes(prefixes: Prefixes, rest: &[u8]) -> Option<&'static str> {
    let (opcode, rest) = rest.split_first()?;
    match opcode {
        0x01 => system(modrm(rest)?.2),
        0x05 => Some("syscall"),
        0x0b => Some("ud2"),
        0x0d => Some("prefetchw"),
        0x10..=0x17
        | 0x28..=0x2f
        | 0x50..=0x76
        | 0x7c..=0x7f
        | 0xc2
        | 0xc4..=0xc6
        | 0xd0..=0xfe => Some("an SSE or MMX instruction"),
        0x1e if prefixes.rep && rest.first() == Some(&0xfa) => Some("endbr64"),
        0x31 => Some("rdtsc"),
        0x33 => Some("rdpmc"),
        0x34 => Some("sysenter"),
        0x35 => Some("sysexit"),
        0x38 => three_bytes(prefixes, rest),
        0x3a => Some("an SSE instruction"),
        0x77 => Some("emms"),
        0xae => state(prefixes, rest),
        0xb8 if prefixes.rep => Some("popcnt"),
        0xb9 | 0xff => Some("ud1"),
        0xbc if prefixes.rep => Some("tzcnt"),
        0xbd if prefixes.rep => Some("lzcnt"),
        0xc7 => exchange(prefixes, rest),
        _ => None,
    }
}

/// 0x0f 0x01 with a register in its ModRM byte: each of them is an instruction of its own.
fn system(modrm: u8) -> Option<&'static str> {
    Some(match modrm {
        0xc1 => "vmcall",
        0xc8 => "monitor",
        0xc9 => "mwait",
        0xca => "clac",
        0xcb => "stac",
        0xd0 => "xgetbv",
        0xd1 => "xsetbv",
        0xd9 => "vmmcall",
        0xee => "rdpkru",
        0xef => "wrpkru",
        0xf8 => "swapgs",
        0xf9 => "rdtscp",
        _ => return None,
    })
}

/// 0x0f 0x38
fn three_bytes(prefixes: Prefixes, rest: &[u8]) -> Option<&'static str> {
    Some(match rest.first()? {
        0x82 if prefixes.operand => "invpcid",
        0xf0 | 0xf1 if prefixes.repne => "crc32",
        0xf0 | 0xf1 => "movbe",
        0xf6 if prefixes.operand => "adcx",
        0xf6 if prefixes.rep => "adox",
        0xf8 => "movdir64b",
        0xf9 => "movdiri",
        0x00..=0xdf => "an SSE instruction",
        _ => return None,
    })
}

/// 0x0f 0xae: saving and restoring a processor's state, and fences.
fn state(prefixes: Prefixes, rest: &[u8]) -> Option<&'static str> {
    let (is_register, reg, _) = modrm(rest)?;
    Some(match (is_register, reg) {
        (false, 0) => "fxsave",
        (false, 1) => "fxrstor",
        (false, 2) => "ldmxcsr",
        (false, 3) => "stmxcsr",
        (false, 4) => "xsave",
        (false, 5) => "xrstor",
        (false, 6) if prefixes.operand => "clwb",
        (false, 6) => "xsaveopt",
        (false, 7) if prefixes.operand => "clflushopt",
        (false, 7) => "clflush",
        (true, 0) if prefixes.rep => "rdfsbase",
        (true, 1) if prefixes.rep => "rdgsbase",
        (true, 2) if prefixes.rep => "wrfsbase",
        (true, 3) if prefixes.rep => "wrgsbase",
        (true, 5) => "lfence",
        (true, 6) => "mfence",
        (true, 7) => "sfence",
        _ => return None,
    })
}

/// 0x0f 0xc7
fn exchange(prefixes: Prefixes, rest: &[u8]) -> Option<&'static str> {
    let (is_register, reg, _) = modrm(rest)?;
    Some(match (is_register, reg) {
        (false, 1) if prefixes.wide => "cmpxchg16b",
        (false, 1) => "cmpxchg8b",
        (false, 3) => "xrstors",
        (false, 4) => "xsavec",
        (false, 5) => "xsaves",
        (true, 6) => "rdrand",
        (true, 7) if prefixes.rep => "rdpid",
        (true, 7) => "rdseed",
        _ => return None,
    })
}

/// What follows a VEX prefix, whose fields are `map` and `prefix` (0 none, 1 0x66, 2 0xf3, 3 0xf2).
fn vex(map: u8, prefix: u8, rest: &[u8]) -> Option<&'static str> {
    let (opcode, rest) = rest.split_first()?;
    let reg = modrm(rest)?.1;
    Some(match (map, opcode, prefix) {
        (2, 0xf2, 0) => "andn (BMI1)",
        (2, 0xf3, 0) => match reg {
            1 => "blsr (BMI1)",
            2 => "blsmsk (BMI1)",
            3 => "blsi (BMI1)",
            _ => return None,
        },
        (2, 0xf5, 0) => "bzhi (BMI2)",
        (2, 0xf5, 2) => "pext (BMI2)",
        (2, 0xf5, 3) => "pdep (BMI2)",
        (2, 0xf6, 3) => "mulx (BMI2)",
        (2, 0xf7, 0) => "bextr (BMI1)",
        (2, 0xf7, 1) => "shlx (BMI2)",
        (2, 0xf7, 2) => "sarx (BMI2)",
        (2, 0xf7, 3) => "shrx (BMI2)",
        (3, 0xf0, 3) => "rorx (BMI2)",
        _ => "an AVX instruction",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_when_instruction_is_known_is_its_mnemonic() {
        // As an assembler encodes them.
        let known: &[(&[u8], &str)] = &[
            (&[0xf3, 0x0f, 0xb8, 0xc7], "popcnt"),
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc7], "popcnt"),
            (&[0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x07], "popcnt"),
            (&[0xf3, 0x0f, 0xbc, 0xc7], "tzcnt"),
            (&[0xf0, 0x48, 0x0f, 0xc7, 0x0e], "cmpxchg16b"),
            (&[0x65, 0x48, 0x0f, 0xc7, 0x0e], "cmpxchg16b"),
            (&[0xf0, 0x0f, 0xc7, 0x0e], "cmpxchg8b"),
            (&[0x48, 0x0f, 0xae, 0x2f], "xrstor"),
            (&[0x48, 0x0f, 0xc7, 0x1f], "xrstors"),
            (&[0x48, 0x0f, 0xae, 0x27], "xsave"),
            (&[0x0f, 0xae, 0xe8], "lfence"),
            (&[0xf3, 0x48, 0x0f, 0xae, 0xd0], "wrfsbase"),
            (&[0x48, 0x0f, 0xc7, 0xf0], "rdrand"),
            (&[0x48, 0x0f, 0xc7, 0xf8], "rdseed"),
            (&[0xf3, 0x48, 0x0f, 0xc7, 0xf8], "rdpid"),
            (&[0xcc], "int3"),
            (&[0x9b], "fwait"),
            (&[0xdb, 0xe3], "an x87 instruction"),
            (&[0x0f, 0x01, 0xca], "clac"),
            (&[0x0f, 0x01, 0xcb], "stac"),
            (&[0x0f, 0x38, 0xf0, 0x07], "movbe"),
            (&[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc7], "crc32"),
            (&[0xc4, 0xe2, 0x71, 0xf7, 0xc2], "shlx (BMI2)"),
            (&[0xc4, 0xe2, 0xf3, 0xf7, 0xc2], "shrx (BMI2)"),
            (&[0xc4, 0xe2, 0x70, 0xf5, 0xc2], "bzhi (BMI2)"),
            (&[0xc4, 0xe3, 0x7b, 0xf0, 0xc2, 0x05], "rorx (BMI2)"),
            (&[0xc4, 0xe2, 0x70, 0xf2, 0xc2], "andn (BMI1)"),
            (&[0xc4, 0xe2, 0x78, 0xf3, 0xca], "blsr (BMI1)"),
            (&[0xc5, 0xf9, 0x6f, 0x07], "an AVX instruction"),
            (&[0x66, 0x0f, 0x6f, 0x07], "an SSE or MMX instruction"),
            (
                &[0x62, 0xf1, 0x7d, 0x48, 0x6f, 0x07],
                "an AVX-512 instruction",
            ),
        ];
        for (bytes, expected) in known {
            assert_eq!(name(bytes), Some(*expected), "{bytes:02x?}");
        }
    }

    #[test]
    fn name_when_instruction_is_common_or_cut_short_is_none() {
        let unknown: &[&[u8]] = &[
            &[],
            &[0x90],
            &[0x66],
            &[0x48],
            &[0x0f],
            &[0xf3, 0x0f],
            &[0x0f, 0xc7],
            &[0xc4],
            &[0xc4, 0xe2],
            &[0xc5, 0xf9],
            &[0x0f, 0xb8, 0xc7],
            &[0x0f, 0xbc, 0xc7],
            &[0x48, 0x89, 0xc7],
        ];
        for bytes in unknown {
            assert_eq!(name(bytes), None, "{bytes:02x?}");
        }
    }

    #[test]
    fn name_when_bytes_are_any_never_panics() {
        for first in 0..=255u8 {
            for second in 0..=255u8 {
                for tail in [&[][..], &[0x00], &[0xc8, 0xf7], &[0xff; 12]] {
                    let _ = name(&[&[first, second], tail].concat());
                }
            }
        }
    }
}
