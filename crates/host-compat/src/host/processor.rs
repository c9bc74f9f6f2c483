//! Which processor a host has.

use cpuid_amx::amx::AmxFeatures;

/// A processor, by what it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Processor {
    /// `GenuineIntel`, `AuthenticAMD`, ... (CPUID.0H:EBX, EDX, ECX).
    pub vendor: String,
    /// The brand string, CPUID.80000002H to 80000004H; empty where there is none.
    pub name: String,
    /// Family with the extended family, CPUID.1H:EAX (SDM Vol. 2, CPUID, figure 3-6).
    pub family: u32,
    /// Model with the extended model, CPUID.1H:EAX.
    pub model: u32,
    /// Stepping, CPUID.1H:EAX\[3:0\].
    pub stepping: u32,
    /// Its AMX features: those that the kernel lists in /proc/cpuinfo, or those of CPUID.
    pub amx: AmxFeatures,
}

impl Processor {
    /// Reads leaves 0, 1, 7, 1EH and 80000000H to 80000004H through `cpuid(leaf, subleaf)`.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let [_, ebx, ecx, edx] = cpuid(0, 0);
        let [signature, ..] = cpuid(1, 0);
        let [max_extended, ..] = cpuid(0x8000_0000, 0);
        let name = if max_extended >= 0x8000_0004 {
            text((0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0)))
        } else {
            String::new()
        };
        let base_family = signature >> 8 & 0xf;
        let base_model = signature >> 4 & 0xf;
        let family = match base_family {
            0xf => base_family.saturating_add(signature >> 20 & 0xff),
            _ => base_family,
        };
        let model = match base_family {
            6 | 0xf => (signature >> 12 & 0xf0) | base_model,
            _ => base_model,
        };
        Self {
            vendor: text([ebx, edx, ecx]),
            name,
            family,
            model,
            stepping: signature & 0xf,
            amx: AmxFeatures::from_cpuid(cpuid),
        }
    }

    /// Reads the first processor of /proc/cpuinfo. The flags name the AMX features that the kernel
    /// lets processes see (arch/x86/kernel/cpu/proc.c, `show_cpuinfo`).
    #[must_use]
    pub fn from_cpuinfo(cpuinfo: &str) -> Self {
        let first = || cpuinfo.lines().take_while(|line| !line.trim().is_empty());
        let value = |key: &str| {
            first().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == key).then(|| value.trim())
            })
        };
        let number = |key| value(key).and_then(|text| text.parse().ok()).unwrap_or(0);
        let amx = value("flags")
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(AmxFeatures::by_name)
            .collect();
        Self {
            vendor: value("vendor_id").unwrap_or_default().to_string(),
            name: value("model name").unwrap_or_default().to_string(),
            family: number("cpu family"),
            model: number("model"),
            stepping: number("stepping"),
            amx,
        }
    }
}

/// ASCII, four characters in each register, up to the first zero.
fn text(registers: impl IntoIterator<Item = u32>) -> String {
    let bytes: Vec<u8> = registers
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .filter(|byte| byte.is_ascii_graphic() || *byte == b' ')
        .collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpuid_amx::table::{CpuidTable, Table};

    #[test]
    fn sapphire_rapids_by_cpuid() {
        let table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        let processor = Processor::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        assert_eq!(
            processor,
            Processor {
                vendor: "GenuineIntel".into(),
                name: String::new(),
                family: 6,
                model: 143,
                stepping: 8,
                amx: AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16,
            }
        );
    }

    #[test]
    fn family_and_model_have_extensions() {
        let of = |signature| {
            let processor = Processor::from_cpuid(|leaf, _| match leaf {
                1 => [signature, 0, 0, 0],
                _ => [0; 4],
            });
            (processor.family, processor.model, processor.stepping)
        };
        // AMD Genoa, Intel Haswell, a Pentium, and Diamond Rapids' family.
        assert_eq!(of(0x00a1_0f11), (25, 17, 1));
        assert_eq!(of(0x0003_06c3), (6, 60, 3));
        assert_eq!(of(0x0000_0543), (5, 4, 3));
        assert_eq!(of(0x0040_0f10), (19, 1, 0));
    }

    #[test]
    fn the_brand_string_is_text_whatever_the_registers_have() {
        let words: Vec<u32> = b"Intel(R) Xeon(R) \x01\xffPlatinum 8480+\0garbage beyond it!"
            .chunks(4)
            .map(|chunk| {
                let mut word = [0; 4];
                word[..chunk.len()].copy_from_slice(chunk);
                u32::from_le_bytes(word)
            })
            .collect();
        let processor = Processor::from_cpuid(|leaf, _| match leaf {
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 4;
                [words[at], words[at + 1], words[at + 2], words[at + 3]]
            }
            _ => [0; 4],
        });
        assert_eq!(processor.name, "Intel(R) Xeon(R) Platinum 8480+");
    }

    #[test]
    fn cpuinfo() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 173\n\
                    model name\t: Intel(R) Xeon(R) 6980P\nstepping\t: 1\n\
                    flags\t\t: fpu amx_bf16 amx_tile amx_int8 amx_fp16 amxish xsave\n\n\
                    processor\t: 1\nmodel\t\t: 1\nflags\t\t: amx_complex\n";
        assert_eq!(
            Processor::from_cpuinfo(text),
            Processor {
                vendor: "GenuineIntel".into(),
                name: "Intel(R) Xeon(R) 6980P".into(),
                family: 6,
                model: 173,
                stepping: 1,
                amx: AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16 | AmxFeatures::FP16,
            }
        );
        assert_eq!(Processor::from_cpuinfo("nonsense"), Processor::default());
    }
}
