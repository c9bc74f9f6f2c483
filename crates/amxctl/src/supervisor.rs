//! State of supervisor components, which is in MSRs and not in the area: whether a file has all of it.

use cpuid_amx::CpuidTable;
use xsave_state::{ComponentId, Layout, XFeatures};

use crate::finding::{Finding, Rule};
use crate::registers::{Listed, MSR_IA32_XSS};

const CR4_CET: u64 = 1 << 23;
const CET: XFeatures = XFeatures::CET_U.union(XFeatures::CET_S);

const U_CET: (u32, &str) = (0x6a0, "IA32_U_CET");
const S_CET: (u32, &str) = (0x6a2, "IA32_S_CET");
/// Those of shadow stacks alone.
const SHADOW_STACKS: [(u32, &str); 5] = [
    (0x6a4, "IA32_PL0_SSP"),
    (0x6a5, "IA32_PL1_SSP"),
    (0x6a6, "IA32_PL2_SSP"),
    (0x6a7, "IA32_PL3_SSP"),
    (0x6a8, "IA32_INTERRUPT_SSP_TABLE_ADDR"),
];
/// Components, and the MSRs that they are made of (SDM Vol. 1 §13.5). CET is asked for apart.
const OTHERS: [(ComponentId, &[(u32, &str)]); 6] = [
    (
        ComponentId::PT,
        &[
            (0x570, "IA32_RTIT_CTL"),
            (0x560, "IA32_RTIT_OUTPUT_BASE"),
            (0x561, "IA32_RTIT_OUTPUT_MASK_PTRS"),
            (0x571, "IA32_RTIT_STATUS"),
            (0x572, "IA32_RTIT_CR3_MATCH"),
        ],
    ),
    (ComponentId::PASID, &[(0xd93, "IA32_PASID")]),
    (ComponentId::HDC, &[(0xdb1, "IA32_PM_CTL1")]),
    (
        ComponentId::UINTR,
        &[
            (0x985, "IA32_UINTR_RR"),
            (0x986, "IA32_UINTR_HANDLER"),
            (0x987, "IA32_UINTR_STACKADJUST"),
            (0x988, "IA32_UINTR_MISC"),
            (0x989, "IA32_UINTR_PD"),
            (0x98a, "IA32_UINTR_TT"),
        ],
    ),
    (
        ComponentId::LBR,
        &[
            (0x14ce, "IA32_LBR_CTL"),
            (0x14cf, "IA32_LBR_DEPTH"),
            (0x1200, "IA32_LBR_0_INFO"),
            (0x1500, "IA32_LBR_0_FROM_IP"),
            (0x1600, "IA32_LBR_0_TO_IP"),
        ],
    ),
    (ComponentId::HWP, &[(0x774, "IA32_HWP_REQUEST")]),
];

/// What a guest with this CPUID has in MSRs and the file does not.
pub(crate) fn missing(
    listed: &Listed,
    xss: Option<XFeatures>,
    cpuid: &impl CpuidTable,
    layout: &Layout,
) -> Vec<Finding> {
    let supervisor = layout.supervisor();
    let [_, _, ecx, edx] = cpuid.leaf(7, 0);
    let (shadow_stacks, ibt) = (ecx & 1 << 7 != 0, edx & 1 << 20 != 0);
    let has_cet = shadow_stacks || ibt || supervisor.intersects(CET);
    let mut found = Vec::new();
    if supervisor.is_empty() && !has_cet {
        return found;
    }
    if !listed.is_complete {
        let components = if supervisor.is_empty() {
            CET
        } else {
            supervisor
        };
        let has = format!("the guest's CPUID has {components}, whose state is in MSRs");
        found.push(match xss {
            None => Finding::unknown(
                Rule::Msrs,
                "--xss",
                format!(
                    "{has}: a file of this format does not have IA32_XSS; give it with --xss, and restore \
                     the MSRs behind it from elsewhere (0 if the guest has not enabled them)"
                ),
            ),
            Some(_) => Finding::note(
                Rule::Msrs,
                format!("{has}: a file of this format does not have them"),
            ),
        });
        return found;
    }
    let values = listed
        .msrs
        .iter()
        .filter(|(index, _)| *index == MSR_IA32_XSS);
    let mut values = values.map(|&(_, value)| value);
    if let Some(first) = values.next()
        && let Some(second) = values.find(|value| *value != first)
    {
        found.push(Finding::broken(
            Rule::Msrs,
            format!("IA32_XSS (MSR 0xda0) is listed twice, as {first:#x} and as {second:#x}"),
        ));
    }
    if xss.is_none() && !supervisor.is_empty() {
        found.push(Finding::broken(
            Rule::Msrs,
            format!(
                "this file cannot hold IA32_XSS (MSR 0xda0): it is not among the MSRs, and the guest's \
                 CPUID has {supervisor}. After a restore it is 0, and the guest's own XRSTORS faults"
            ),
        ));
    }
    let enabled = xss.unwrap_or_default();
    let unsupported = enabled - supervisor;
    if !unsupported.is_empty() {
        found.push(Finding::broken(
            Rule::Msrs,
            format!(
                "IA32_XSS is {enabled}; the guest's CPUID has {supervisor}, and KVM_SET_MSRS refuses \
                 {unsupported}"
            ),
        ));
    }
    let mut cet = Vec::new();
    if shadow_stacks || ibt || enabled.intersects(CET) {
        cet.extend([U_CET, S_CET]);
    }
    if shadow_stacks {
        cet.extend(SHADOW_STACKS);
    }
    // With CR4.CET clear the processor uses none of them.
    let is_known = xss.is_some() || !supervisor.intersects(CET);
    let is_off =
        is_known && !enabled.intersects(CET) && listed.cr4.is_some_and(|cr4| cr4 & CR4_CET == 0);
    if is_off {
        let names = names(listed, &cet);
        if !names.is_empty() {
            found.push(Finding::note(
                Rule::Msrs,
                format!(
                    "MSRs of CET are not in the file: {names}. The guest has not enabled CET (CR4.CET is 0, \
                     and IA32_XSS has none of it), so nothing is lost"
                ),
            ));
        }
        cet.clear();
    }
    let others = OTHERS.iter().filter(|(id, _)| enabled.contains(id.bit()));
    let behind: Vec<_> = others
        .flat_map(|(_, msrs)| *msrs)
        .copied()
        .chain(cet)
        .collect();
    let names = names(listed, &behind);
    if !names.is_empty() {
        found.push(Finding::broken(
            Rule::Msrs,
            format!(
                "this file cannot hold what the guest has in these MSRs, which are not in it: {names}"
            ),
        ));
    }
    if shadow_stacks && !is_off {
        found.push(Finding::broken(
            Rule::Msrs,
            "this file cannot hold SSP, the pointer to the shadow stack of a guest that runs, which is \
             in no MSR: a VMM reads and writes it with KVM_GET_ONE_REG and KVM_SET_ONE_REG \
             (KVM_REG_GUEST_SSP)"
                .to_owned(),
        ));
    }
    found
}

/// Those of the MSRs that are not in the file.
fn names(listed: &Listed, msrs: &[(u32, &str)]) -> String {
    let missing = msrs
        .iter()
        .filter(|(index, _)| listed.msr(*index).is_none());
    let names: Vec<String> = missing
        .map(|(index, name)| format!("{name} ({index:#x})"))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use cpuid_amx::{Entry, Table};

    use super::*;
    use crate::finding::Verdict;

    const SHSTK: u32 = 1 << 7;
    const IBT: u32 = 1 << 20;

    /// What is said of a guest with these bits of leaf 7 and these supervisor components.
    fn said(ecx: u32, edx: u32, supervisor: u32, listed: &Listed) -> Vec<(Verdict, String)> {
        let entry = |leaf, subleaf, value| Entry {
            leaf,
            subleaf: Some(subleaf),
            value,
        };
        let mut entries = vec![
            entry(0, 0, [0xd, 0, 0, 0]),
            entry(1, 0, [0, 0, 1 << 26, 0]),
            entry(7, 0, [0, 0, ecx, edx]),
            entry(0xd, 0, [3, 576, 576, 0]),
            entry(0xd, 1, [0xf, 0, supervisor, 0]),
        ];
        for number in (2..32).filter(|number| supervisor & 1 << number != 0) {
            entries.push(entry(0xd, number, [16, 0, 1, 0]));
        }
        let table: Table = entries.into_iter().collect();
        let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).unwrap();
        let xss = listed.msr(MSR_IA32_XSS).map(XFeatures::from_bits_retain);
        let found = missing(listed, xss, &table, &layout).into_iter();
        found.map(|one| (one.verdict, one.values)).collect()
    }

    fn listed(msrs: &[u32], xss: Option<u64>, cr4: Option<u64>) -> Listed {
        let mut list: Vec<_> = msrs.iter().map(|&index| (index, 0)).collect();
        list.extend(xss.map(|xss| (MSR_IA32_XSS, xss)));
        Listed {
            msrs: list,
            is_complete: true,
            cr4,
            ..Listed::default()
        }
    }

    const ALL: [u32; 7] = [0x6a0, 0x6a2, 0x6a4, 0x6a5, 0x6a6, 0x6a7, 0x6a8];

    #[test]
    fn each_msr_of_cet_is_asked_for() {
        for left_out in ALL {
            let rest: Vec<u32> = ALL.into_iter().filter(|&index| index != left_out).collect();
            let said = said(SHSTK, IBT, 0x1800, &listed(&rest, Some(0x1800), Some(0)));
            let [(Verdict::Broken, msrs), (Verdict::Broken, ssp)] = &*said else {
                panic!("{said:?}")
            };
            assert!(msrs.contains(&format!("({left_out:#x})")), "{msrs}");
            assert!(ssp.contains("KVM_GET_ONE_REG"), "{ssp}");
        }
    }

    #[test]
    fn shadow_stacks_have_a_pointer_and_ibt_has_none() {
        let complete = listed(&ALL, Some(0x1800), Some(CR4_CET));
        assert_eq!(said(0, IBT, 0x1800, &complete), []);
        let [(Verdict::Broken, ssp)] = &*said(SHSTK, IBT, 0x1800, &complete) else {
            panic!("one")
        };
        assert!(ssp.contains("SSP"), "{ssp}");
        // Without a component in CPUID they are used all the same: nothing is in IA32_XSS then.
        let without = |cr4| said(SHSTK, 0, 0, &listed(&ALL, None, Some(cr4)));
        assert_eq!(without(CR4_CET).len(), 1);
        assert_eq!(without(0), []);
    }

    #[test]
    fn what_the_guest_has_not_enabled_is_not_lost() {
        let off = listed(&[], Some(0), Some(0));
        let [(Verdict::Note, note)] = &*said(SHSTK, IBT, 0x1800, &off) else {
            panic!("a note")
        };
        assert!(note.contains("0x6a0"), "{note}");
        // Any of the two alone is no proof.
        for on in [
            listed(&[], Some(0), Some(CR4_CET)),
            listed(&[], Some(0x800), Some(0)),
            listed(&[], Some(0), None),
            listed(&[], None, Some(0)),
        ] {
            let said = said(SHSTK, IBT, 0x1800, &on);
            assert!(said.iter().any(|(verdict, _)| *verdict == Verdict::Broken));
        }
    }

    #[test]
    fn other_components_have_msrs_too() {
        assert_eq!(said(0, 0, 0, &listed(&[], None, None)), []);
        for (component, msr) in [(8, "0x570"), (10, "0xd93"), (14, "0x98a"), (15, "0x14ce")] {
            let bits = 1 << component;
            let without = said(0, 0, bits, &listed(&[], None, None));
            assert!(without[0].1.contains("0xda0"), "{without:?}");
            assert_eq!(said(0, 0, bits, &listed(&[], Some(0), None)), []);
            let on = said(0, 0, bits, &listed(&[], Some(bits.into()), None));
            assert!(on[0].1.contains(msr), "{on:?}");
            assert_eq!(on[0].0, Verdict::Broken);
        }
        // Two values, of which KVM takes the last.
        let mut twice = listed(&[], Some(1 << 10), None);
        twice.msrs.push((MSR_IA32_XSS, 0));
        let twice = said(0, 0, 1 << 10, &twice);
        assert!(twice[0].1.contains("as 0x400 and as 0x0"), "{twice:?}");
        // A format without MSRs does not tell.
        let without = Listed::default();
        let [(Verdict::Unknown { option: "--xss" }, _)] = &*said(0, 0, 1 << 10, &without) else {
            panic!("a question")
        };
        // KVM refuses what CPUID does not have.
        let beyond = said(0, 0, 1 << 10, &listed(&[0xd93], Some(0xc00), None));
        assert_eq!(beyond[0].0, Verdict::Broken);
    }
}
