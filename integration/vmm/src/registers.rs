//! The registers that KVM has a structure for, as plain data.
//!
//! Saved state has types of its own, so that a new release of kvm-bindings does not change the
//! snapshot format. Padding is not saved, and is zero when it goes back to KVM.

use kvm_bindings as kvm;
use serde::{Deserialize, Serialize};

/// A structure of ours and conversions from and to KVM's, field by field. A field in parentheses has
/// a mirror of its own; the rest are plain numbers.
macro_rules! mirror {
    ($(#[$doc:meta])* $name:ident = $theirs:ty {
        $($field:ident: $type:ty),* $(; $($nested:ident: $nested_type:ty),*)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[allow(missing_docs, reason = "the fields are the kernel's, by their names")]
        pub struct $name {
            $(pub $field: $type,)*
            $($(pub $nested: $nested_type,)*)?
        }

        impl From<$theirs> for $name {
            fn from(theirs: $theirs) -> Self {
                Self {
                    $($field: theirs.$field,)*
                    $($($nested: theirs.$nested.into(),)*)?
                }
            }
        }

        impl From<$name> for $theirs {
            fn from(ours: $name) -> Self {
                #[allow(clippy::needless_update, reason = "some have padding, some do not")]
                Self {
                    $($field: ours.$field,)*
                    $($($nested: ours.$nested.into(),)*)?
                    ..Default::default()
                }
            }
        }
    };
}

mirror! {
    /// struct kvm_cpuid_entry2.
    CpuidEntry = kvm::kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32
    }
}

/// A vector of them is a table for cpuid-amx.
impl cpuid_amx::CpuidEntry for CpuidEntry {
    fn to_entry(&self) -> cpuid_amx::Entry {
        kvm::kvm_cpuid_entry2::from(*self).to_entry()
    }

    fn from_entry(entry: cpuid_amx::Entry) -> Self {
        kvm::kvm_cpuid_entry2::from_entry(entry).into()
    }

    fn set_value(&mut self, [eax, ebx, ecx, edx]: [u32; 4]) {
        (self.eax, self.ebx, self.ecx, self.edx) = (eax, ebx, ecx, edx);
    }
}

mirror! {
    /// struct kvm_regs.
    General = kvm::kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64
    }
}
mirror! {
    /// struct kvm_segment.
    Segment = kvm::kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8,
        l: u8, g: u8, avl: u8, unusable: u8
    }
}
mirror! {
    /// struct kvm_dtable.
    Table = kvm::kvm_dtable { base: u64, limit: u16 }
}
mirror! {
    /// struct kvm_sregs.
    Special = kvm::kvm_sregs {
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4];
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment,
        tr: Segment, ldt: Segment, gdt: Table, idt: Table
    }
}
mirror! {
    /// struct kvm_debugregs.
    Debug = kvm::kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }
}
mirror! {
    /// The exception of struct kvm_vcpu_events.
    Exception = kvm::kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32
    }
}
mirror! {
    /// The interrupt of struct kvm_vcpu_events.
    Interrupt = kvm::kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 }
}
mirror! {
    /// The non-maskable interrupt of struct kvm_vcpu_events.
    Nmi = kvm::kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 }
}
mirror! {
    /// System management mode in struct kvm_vcpu_events.
    Smi = kvm::kvm_vcpu_events__bindgen_ty_4 {
        smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8
    }
}
mirror! {
    /// The triple fault of struct kvm_vcpu_events.
    TripleFault = kvm::kvm_vcpu_events__bindgen_ty_5 { pending: u8 }
}
mirror! {
    /// struct kvm_vcpu_events.
    Events = kvm::kvm_vcpu_events {
        sipi_vector: u32, flags: u32, exception_has_payload: u8, exception_payload: u64;
        exception: Exception, interrupt: Interrupt, nmi: Nmi, smi: Smi, triple_fault: TripleFault
    }
}
mirror! {
    /// struct kvm_mp_state.
    MpState = kvm::kvm_mp_state { mp_state: u32 }
}
mirror! {
    /// struct kvm_msr_entry.
    Msr = kvm::kvm_msr_entry { index: u32, data: u64 }
}
mirror! {
    /// struct kvm_pit_channel_state.
    TimerChannel = kvm::kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
        count_load_time: i64
    }
}

/// struct kvm_pit_state2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// Its three channels.
    pub channels: [TimerChannel; 3],
    /// KVM_PIT_FLAGS_*.
    pub flags: u32,
}

impl From<kvm::kvm_pit_state2> for Timer {
    fn from(theirs: kvm::kvm_pit_state2) -> Self {
        Self {
            channels: theirs.channels.map(TimerChannel::from),
            flags: theirs.flags,
        }
    }
}

impl From<Timer> for kvm::kvm_pit_state2 {
    fn from(ours: Timer) -> Self {
        Self {
            channels: ours.channels.map(Into::into),
            flags: ours.flags,
            ..Default::default()
        }
    }
}
