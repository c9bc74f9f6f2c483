//! Whether the host's kernel keeps areas in the compacted format.
//!
//! It decides how MXCSR is saved. The compacted format saves and loads it with SSE alone, the standard
//! format with SSE and AVX. Linux compacts with XSAVES, and since 5.19 with XSAVEC as well
//! (arch/x86/kernel/fpu/xstate.c, X86_FEATURE_XCOMPACTED; commit 8ad7e8f69695). CPUID alone does not
//! tell: a kernel that works around AMD's erratum 1386 has switched XSAVES off.

use std::fs;

/// Asks the running kernel. Where /proc does not answer, the processor's features decide.
pub(super) fn is_compacted() -> bool {
    let known = fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        by_kernel(&info, &release)
    });
    known.unwrap_or_else(|| {
        std::is_x86_feature_detected!("xsavec") || std::is_x86_feature_detected!("xsaves")
    })
}

/// Decides by the kernel's own flags and its version, as far as they can be read.
fn by_kernel(cpuinfo: &str, release: &str) -> Option<bool> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    let (_, flags) = flags.split_once(':')?;
    let has = |flag| flags.split_ascii_whitespace().any(|it| it == flag);
    if has("xsaves") {
        return Some(true);
    }
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    let version = (number()?, number()?);
    Some(has("xsavec") && version >= (5, 19))
}

#[cfg(test)]
mod tests {
    use super::by_kernel;

    #[test]
    fn xsaves_always_compacts_and_xsavec_since_linux_5_19() {
        let flags =
            |features: &str| std::format!("processor\t: 0\nflags\t\t: fpu {features} avx\n");
        let both = flags("xsavec xgetbv1 xsaves");
        assert_eq!(by_kernel(&both, "4.19.0"), Some(true));
        let erratum_1386 = flags("xsavec xgetbv1");
        assert_eq!(by_kernel(&erratum_1386, "5.10.226-1-amd64"), Some(false));
        assert_eq!(by_kernel(&erratum_1386, "5.18.19"), Some(false));
        for release in ["5.19.0", "6.1.0-25-amd64", "6.12.107+deb13", "10.0"] {
            assert_eq!(by_kernel(&erratum_1386, release), Some(true), "{release}");
        }
        assert_eq!(by_kernel(&flags("xsaveopt"), "7.2.13"), Some(false));
    }

    #[test]
    fn what_cannot_be_read_decides_nothing() {
        assert_eq!(by_kernel("", "6.1.0"), None);
        assert_eq!(by_kernel("flags : xsavec", "unknown"), None);
        assert_eq!(by_kernel("flags", "6.1.0"), None);
    }
}
