//! A second opinion on areas and registers: the manual's rules once more, with none of
//! xsave-state's code for them. It takes from a layout only what CPUID says.

use xsave_state::Layout;

/// Whether a processor of that layout, and LDTILECFG, take the area. `None` is yes.
#[must_use]
pub fn area(area: &[u8], layout: &Layout) -> Option<&'static str> {
    if area.len() < layout.standard_size() {
        return Some("length");
    }
    if word(area, 512) & !layout.user().bits() != 0 {
        return Some("XSTATE_BV");
    }
    if word(area, 520) != 0 {
        return Some("XCOMP_BV");
    }
    if area[528..576].iter().any(|&byte| byte != 0) {
        return Some("reserved bytes of the header");
    }
    if area[416..464].iter().any(|&byte| byte != 0) {
        return Some("reserved bytes of the legacy region");
    }
    if word(area, 24) as u32 & !layout.mxcsr_mask() != 0 {
        return Some("MXCSR");
    }
    if word(area, 512) & 1 << 17 != 0 {
        let place = layout
            .components()
            .find(|component| component.id().number() == 17)
            .and_then(|component| component.offset())?;
        if !tilecfg(&area[place..place + 64], layout) {
            return Some("TILECFG");
        }
    }
    None
}

/// Whether LDTILECFG takes 64 bytes.
#[must_use]
pub fn tilecfg(cfg: &[u8], layout: &Layout) -> bool {
    if cfg[0] == 0 {
        return true;
    }
    let Some(palette) = layout.palettes().iter().find(|p| p.id() == cfg[0]) else {
        return false;
    };
    cfg[2..16].iter().all(|&byte| byte == 0)
        && (0..16).all(|tile| {
            let colsb = u16::from_le_bytes([cfg[16 + 2 * tile], cfg[17 + 2 * tile]]);
            let rows = u16::from(cfg[48 + tile]);
            if tile < usize::from(palette.tiles()) {
                colsb <= palette.row_bytes()
                    && rows <= palette.rows()
                    && (colsb == 0) == (rows == 0)
            } else {
                colsb == 0 && rows == 0
            }
        })
}

/// Whether XSETBV takes `xcr0`, WRMSR takes `xfd` and `xfd_err`, and the host can load XSTATE_BV
/// under them. `None` is yes. `user` and `xfd_supported` are what there may be.
#[must_use]
pub fn registers(
    [xcr0, xfd, xfd_err]: [u64; 3],
    xstate_bv: u64,
    user: u64,
    xfd_supported: u64,
) -> Option<&'static str> {
    let all_or_none = |group: u64| xcr0 & group == 0 || xcr0 & group == group;
    if xcr0 & !user != 0 {
        return Some("XCR0 beyond CPUID");
    }
    if xcr0 & 1 == 0 || xcr0 & 0b110 == 0b100 {
        return Some("XCR0 without x87, or AVX without SSE");
    }
    if !all_or_none(0x18) || !all_or_none(0xe0) || !all_or_none(0x60000) {
        return Some("XCR0 splits a group");
    }
    if xcr0 & 0xe0 != 0 && xcr0 & 4 == 0 {
        return Some("XCR0 with AVX-512 and without AVX");
    }
    if (xfd | xfd_err) & !xfd_supported != 0 {
        return Some("IA32_XFD or IA32_XFD_ERR beyond CPUID");
    }
    if xstate_bv & xfd != 0 {
        return Some("in use while disabled");
    }
    None
}

/// Eight bytes as a number.
#[must_use]
pub fn word(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(area[at..at + 8].try_into().unwrap())
}
