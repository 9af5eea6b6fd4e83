//! `PUT /cpu-config`: CPUID and MSR masks, in Firecracker's template format.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::json::objects;

/// `PUT /cpu-config`: what to change in the CPU that the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities to ask for besides our own, or not to ask for.
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// CPUID leaves to change.
    #[serde(default, deserialize_with = "objects")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Model specific registers to change.
    #[serde(default, deserialize_with = "objects")]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A KVM capability by number: `"121"` to add it, `"!121"` to remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// The host must have it.
    Add(u32),
    /// Its absence is fine.
    Remove(u32),
}

/// The registers to change in one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuidModifier {
    /// Leaf (EAX).
    #[serde(with = "prefixed")]
    pub leaf: u32,
    /// Subleaf (ECX).
    #[serde(with = "prefixed")]
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// What to change.
    #[serde(deserialize_with = "objects")]
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// A change to one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuidRegisterModifier {
    /// Which register.
    pub register: CpuidRegister,
    /// Which bits.
    pub bitmap: Bitmap<32>,
}

/// The registers that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A change to a model specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct MsrModifier {
    /// Address of the register.
    #[serde(with = "prefixed")]
    pub addr: u32,
    /// Which bits.
    pub bitmap: Bitmap<64>,
}

/// Bits of a register of `BITS` bits: `0b01x`, from the highest; `x` leaves a bit as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: usize> {
    /// The bits that are set by `value`.
    pub filter: u64,
    /// What they become.
    pub value: u64,
}

impl<const BITS: usize> Bitmap<BITS> {
    /// The register's new value.
    pub fn apply(&self, register: u64) -> u64 {
        (register & !self.filter) | self.value
    }

    fn parse(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let mut bitmap = Bitmap::default();
        let mut bit = 1_u64;
        let mut count = 0_usize;
        for digit in digits.bytes().rev().filter(|digit| *digit != b'_') {
            count = count.saturating_add(1);
            if count > BITS {
                return Err(format!("bitmap `{text}` has more than {BITS} bits"));
            }
            match digit {
                b'x' => {}
                b'0' => bitmap.filter |= bit,
                b'1' => {
                    bitmap.filter |= bit;
                    bitmap.value |= bit;
                }
                _ => return Err(format!("bitmap `{text}` may hold only 0, 1, x and _")),
            }
            bit = bit.wrapping_shl(1);
        }
        Ok(bitmap)
    }
}

impl<const BITS: usize> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::from("0b");
        for bit in (0..BITS as u32).rev() {
            let at = 1_u64.wrapping_shl(bit);
            text.push(match (self.filter & at != 0, self.value & at != 0) {
                (false, _) => 'x',
                (true, false) => '0',
                (true, true) => '1',
            });
        }
        serializer.serialize_str(&text)
    }
}

impl<'de, const BITS: usize> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Bitmap::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KvmCapability::Add(number) => serializer.collect_str(number),
            KvmCapability::Remove(number) => serializer.collect_str(&format_args!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (number, make): (&str, fn(u32) -> KvmCapability) = match text.strip_prefix('!') {
            Some(number) => (number, KvmCapability::Remove),
            None => (&text, KvmCapability::Add),
        };
        number.parse().map(make).map_err(|_| {
            D::Error::custom(format!(
                "`{text}` is not the number of a KVM capability, with or without `!` before it"
            ))
        })
    }
}

/// Numbers written as strings with their base before them: `0x` or `0b`.
mod prefixed {
    use super::{Deserialize, Deserializer, Error, Serializer};

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = if let Some(digits) = text.strip_prefix("0x") {
            u32::from_str_radix(digits, 16)
        } else if let Some(digits) = text.strip_prefix("0b") {
            u32::from_str_radix(digits, 2)
        } else {
            return Err(D::Error::custom(format!(
                "`{text}` needs 0x or 0b before its digits"
            )));
        };
        parsed.map_err(|_| D::Error::custom(format!("`{text}` is not a number of 32 bits")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::json;
    use super::*;

    #[test]
    fn bitmap_when_parsed_applies_and_is_written_back() {
        // bitmap, register before, after
        let cases = [
            ("0b1x", 0b00, 0b10),
            ("0b0x", 0b11, 0b01),
            ("x", 0b11, 0b11),
            ("0b1_0", 0b01, 0b10),
            ("", 5, 5),
        ];
        for (text, before, after) in cases {
            let bitmap = Bitmap::<32>::parse(text).unwrap();
            assert_eq!(bitmap.apply(before), after, "{text}");
            let written = serde_json::to_string(&bitmap).unwrap();
            assert_eq!(json::parse::<Bitmap<32>>(written.as_bytes()), Ok(bitmap));
        }
        let all = "1".repeat(64);
        assert_eq!(Bitmap::<64>::parse(&all).unwrap().value, u64::MAX);
        assert!(Bitmap::<64>::parse(&format!("{all}1")).is_err());
        assert!(Bitmap::<32>::parse(&"x".repeat(33)).is_err());
        assert!(Bitmap::<32>::parse("0b2").is_err());
    }

    #[test]
    fn template_when_good_is_taken() {
        let body = br#"{"kvm_capabilities":["!121","5"],
            "cpuid_modifiers":[{"leaf":"0x1","subleaf":"0b0","flags":0,
              "modifiers":[{"register":"ecx","bitmap":"0b1x"}]}],
            "msr_modifiers":[{"addr":"0x10a","bitmap":"0bx1","note":1}]}"#;
        let template: CpuConfig = json::parse(body).unwrap();
        assert_eq!(
            template.kvm_capabilities,
            [KvmCapability::Remove(121), KvmCapability::Add(5)]
        );
        assert_eq!(template.msr_modifiers.first().unwrap().addr, 0x10a);
        let written = serde_json::to_vec(&template).unwrap();
        assert_eq!(json::parse::<CpuConfig>(&written), Ok(template));
        assert_eq!(json::parse::<CpuConfig>(b"{}"), Ok(CpuConfig::default()));
    }

    #[test]
    fn template_when_bad_says_where() {
        let leaf = |leaf: &str| {
            format!(
                r#"{{"cpuid_modifiers":[{{"leaf":"{leaf}","subleaf":"0x0","flags":0,"modifiers":[]}}]}}"#
            )
        };
        for (body, reason) in [
            (leaf("1"), "needs 0x or 0b"),
            (leaf("0x1_"), "is not a number"),
            (leaf("0x100000000"), "is not a number"),
            (r#"{"kvm_capabilities":["a"]}"#.into(), "KVM capability"),
            (r#"{"cpuid_modifiers":null}"#.into(), "invalid type: null"),
            (r#"{"reg_modifiers":[]}"#.into(), "unknown field"),
            (
                r#"{"msr_modifiers":[{"addr":"0x1"}]}"#.into(),
                "missing field `bitmap`",
            ),
        ] {
            let error = json::parse::<CpuConfig>(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(reason), "{body}: {error}");
        }
    }
}
