//! What a Linux-like guest does with AMX before and when a process uses it.

use vcpu_realloc::Grow;

use crate::machine::{ARMED, Command, Machine, Stop};

/// x87, SSE and AMX: what every guest here has.
pub(crate) const XCR0_AMX: u64 = 0x60003;

/// A process that uses tiles.
pub(crate) const AMX: [Command; 2] = [Command::LoadTiles, Command::StoreTiles];

/// Brings a vCPU up: IA32_XFD is armed, then AMX is enabled (arch/x86/kernel/fpu/xstate.c,
/// `fpu__init_cpu_xstate`).
pub(crate) fn boot<V: Grow>(machine: &mut Machine, n: usize, vmm: &mut V)
where
    V::Error: std::fmt::Debug,
{
    machine.tell(
        n,
        &[
            Command::WriteXfd(ARMED),
            Command::WriteXcr0(XCR0_AMX),
            Command::Bell(1),
        ],
    );
    assert_eq!(machine.run(n, vmm), Stop::Bell(1));
}
