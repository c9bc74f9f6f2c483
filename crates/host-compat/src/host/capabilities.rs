//! The capabilities of KVM on which the state of a vCPU depends.

/// What KVM_CHECK_EXTENSION says of each: 0 where it is missing.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Capabilities {
    /// KVM_CAP_XSAVE.
    pub xsave: u32,
    /// KVM_CAP_XSAVE2, Linux 5.17: the bytes that KVM_GET_XSAVE2 copies at most, with the permission
    /// as it was when a vCPU had been created.
    pub xsave2: u32,
    /// KVM_CAP_XCRS.
    pub xcrs: u32,
    /// KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10.
    pub x86_user_space_msr: u32,
    /// KVM_CAP_X86_MSR_FILTER, Linux 5.10.
    pub x86_msr_filter: u32,
    /// KVM_CAP_SYS_ATTRIBUTES, Linux 5.17.
    pub sys_attributes: u32,
    /// KVM_CAP_IMMEDIATE_EXIT, Linux 4.13.
    pub immediate_exit: u32,
}

impl Capabilities {
    /// Each by its name without KVM_CAP_.
    pub fn by_name(&self) -> impl Iterator<Item = (&'static str, u32)> {
        [
            ("XSAVE", self.xsave),
            ("XSAVE2", self.xsave2),
            ("XCRS", self.xcrs),
            ("X86_USER_SPACE_MSR", self.x86_user_space_msr),
            ("X86_MSR_FILTER", self.x86_msr_filter),
            ("SYS_ATTRIBUTES", self.sys_attributes),
            ("IMMEDIATE_EXIT", self.immediate_exit),
        ]
        .into_iter()
    }
}
