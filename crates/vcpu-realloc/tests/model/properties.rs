//! What must always hold, and what the model must be able to reach.

use super::guest::Todo;
use super::setup::{Bounds, Program, Setup};
use super::world::{Exit, Mode, Vcpu, World, Write};

/// A predicate that holds in every state.
pub(crate) struct Always {
    pub name: &'static str,
    /// For the documentation.
    pub meaning: &'static str,
    pub holds: fn(&Setup, &World) -> bool,
}

/// A predicate that holds in some state: without it the model would prove little.
pub(crate) struct Sometimes {
    pub name: &'static str,
    pub holds: fn(&Setup, &World) -> bool,
}

pub(crate) const ALWAYS: &[Always] = &[
    Always {
        name: "the host never takes #NM",
        meaning: "no XRSTORS of the host loads a component that IA32_XFD disables",
        holds: |_, world| !world.dead,
    },
    Always {
        name: "no guest's kernel takes #NM",
        meaning: "no XRSTORS of a guest like Linux loads saved tiles while IA32_XFD disables them: its \
                  kernel dies of that",
        holds: |_, world| world.vcpus.iter().all(|vcpu| !vcpu.guest.dead),
    },
    Always {
        name: "no tile is lost",
        meaning: "whenever a guest can look at tiles that it has a claim to, they are what it put \
                  there. On KVM a guest has no claim to tiles that it left in the registers while \
                  it had XFD set; on a hypervisor with option 1 or 2 it has",
        holds: |_, world| world.vcpus.iter().all(no_tile_is_lost),
    },
    Always {
        name: "nothing exists before the grant",
        meaning: "a vCPU that can use tiles, or has some in use, has the VMM's memory for them. On \
                  KVM with one exception, which no VMM can close: an XSETBV while XFD is clear \
                  leaves to nobody. The next capture asks, and the next write of XFD that leaves it \
                  clear; until then, and after a denial, the guest has what it has",
        holds: |_, world| world.vcpus.iter().all(nothing_before_the_grant),
    },
    Always {
        name: "the guest has what it wrote",
        meaning: "XCR0 and XFD of a running guest are what its last writes made them, where they \
                  did not fault",
        holds: |_, world| world.vcpus.iter().all(has_what_it_wrote),
    },
    Always {
        name: "the VMM is asked at first use only",
        meaning: "a question stands only about a write after which the guest could use tiles, or \
                  about what it can use or has in use already, or, before a restored vCPU runs, about \
                  what its VM was or may have been granted",
        holds: |_, world| {
            let asked = |vcpu| asked_at_first_use(vcpu, world.promised);
            world.vcpus.iter().all(asked)
        },
    },
    Always {
        name: "every failure reaches the VMM and can be retried",
        meaning: "while a question or a failure stands, the vCPU does not run and the gate has the \
                  question; so a retry asks again",
        holds: |_, world| world.vcpus.iter().all(can_be_retried),
    },
    Always {
        name: "at most two exits per vCPU, none after first use",
        meaning: "on KVM with the default policy, for guests that write XFD only to change it: two \
                  exits from a vCPU's start until the VM's first use, two more for each denial, and \
                  none after. Start, reset, INIT and restore are starts",
        holds: |_, world| world.vcpus.iter().all(|vcpu| !vcpu.too_many_exits),
    },
];

fn no_tile_is_lost(vcpu: &Vcpu) -> bool {
    let expects = vcpu.guest.expects();
    vcpu.mode != Mode::Guest || expects.is_none_or(|tiles| tiles == vcpu.tiles)
}

fn nothing_before_the_grant(vcpu: &Vcpu) -> bool {
    let has = vcpu.usable() || vcpu.tiles != 0;
    // A vCPU that the VMM holds back cannot use what it has.
    let held_back = matches!(vcpu.exit, Exit::Asked(_) | Exit::Failed(_));
    !has || vcpu.grown || held_back || vcpu.unseen
}

fn has_what_it_wrote(vcpu: &Vcpu) -> bool {
    vcpu.mode != Mode::Guest
        || (vcpu.xfd == vcpu.guest.xfd
            && vcpu.xcr0 == vcpu.guest.xcr0
            && vcpu.processor_xfd == vcpu.guest.xfd)
}

fn asked_at_first_use(vcpu: &Vcpu, promised: bool) -> bool {
    let (Exit::Asked(write) | Exit::Failed(write)) = vcpu.exit else {
        return true;
    };
    let uses = match write {
        Some(Write::Xfd(xfd)) => vcpu.xcr0 && !xfd,
        Some(Write::Xcr0(xcr0)) => xcr0 && !vcpu.xfd,
        Some(Write::Reserved) => false,
        None => vcpu.usable() || vcpu.tiles != 0 || promised,
    };
    uses && !vcpu.grown
}

fn can_be_retried(vcpu: &Vcpu) -> bool {
    let stands = matches!(vcpu.exit, Exit::Asked(_) | Exit::Failed(_));
    stands == vcpu.gate.waiting_for().is_some() && (!stands || vcpu.mode == Mode::Vmm)
}

pub(crate) const SOMETIMES: &[Sometimes] = &[
    Sometimes {
        name: "a guest uses tiles",
        holds: |_, world| any(world, uses_tiles),
    },
    Sometimes {
        name: "all vCPUs use tiles",
        holds: |_, world| world.vcpus.iter().all(uses_tiles),
    },
    Sometimes {
        name: "a task's tiles are in memory while the other task runs",
        holds: |_, world| {
            any(world, |vcpu| {
                vcpu.guest.saved != 0 && vcpu.guest.todo == Todo::User && vcpu.mode == Mode::Guest
            })
        },
    },
    Sometimes {
        name: "tiles are in use and disabled when the kernel saves or has saved them",
        holds: |_, world| {
            any(world, |vcpu| {
                vcpu.in_use_while_disabled() && matches!(vcpu.mode, Mode::Kernel(_))
            })
        },
    },
    Sometimes {
        name: "the kernel has taken the registers from tiles in use",
        holds: |_, world| {
            any(world, |vcpu| {
                vcpu.tiles != 0 && !vcpu.loaded && matches!(vcpu.mode, Mode::Kernel(_))
            })
        },
    },
    Sometimes {
        name: "the filter is lifted",
        holds: |setup, world| setup.is_kvm() && !world.filter,
    },
    Sometimes {
        name: "two vCPUs are asked about at once",
        holds: |_, world| {
            let asked = world.vcpus.iter();
            let asked = asked.filter(|vcpu| matches!(vcpu.exit, Exit::Asked(_)));
            asked.count() >= 2
        },
    },
    Sometimes {
        name: "tiles are used after a denial",
        holds: |setup, world| used_after(setup, world, |left| left.denials),
    },
    Sometimes {
        name: "tiles are used after a growth that failed and was retried",
        holds: |setup, world| used_after(setup, world, |left| left.failures),
    },
    Sometimes {
        name: "an answer comes after the reset of the vCPU that was asked about",
        holds: |_, world| any(world, |vcpu| vcpu.stale.is_some()),
    },
    Sometimes {
        name: "tiles are used after a reset",
        holds: |setup, world| used_after(setup, world, |left| left.resets),
    },
    Sometimes {
        name: "tiles are used after an INIT",
        holds: |setup, world| used_after(setup, world, |left| left.inits),
    },
    Sometimes {
        name: "a guest finds its tiles in another VM",
        holds: |setup, world| used_after(setup, world, |left| left.moves),
    },
    Sometimes {
        name: "a task uses tiles after it has gone to another vCPU",
        holds: |setup, world| used_after(setup, world, |left| left.migrations),
    },
    Sometimes {
        name: "a denial after a first use is refused",
        holds: |setup, world| {
            world.promised
                && world.left.denials < setup.bounds.denials
                && any(world, |vcpu| {
                    matches!(vcpu.exit, Exit::Asked(Some(_))) && !vcpu.gate.promised().is_empty()
                })
        },
    },
    Sometimes {
        name: "a guest's kernel believes a write that was denied",
        holds: |_, world| any(world, |vcpu| vcpu.guest.believes_xfd != vcpu.guest.xfd),
    },
    Sometimes {
        name: "a restored vCPU is asked about before it runs",
        holds: |setup, world| {
            moved(setup, world) && any(world, |vcpu| vcpu.exit == Exit::Asked(None))
        },
    },
    Sometimes {
        name: "a restore comes in the middle of a growth",
        // A failed growth, not retried before the move; the guest repeats its write.
        holds: |setup, world| {
            moved(setup, world)
                && world.left.failures < setup.bounds.failures
                && any(world, |vcpu| {
                    !vcpu.grown && vcpu.guest.todo == Todo::FirstUse && vcpu.mode == Mode::Guest
                })
        },
    },
    Sometimes {
        name: "a guest has tiles that nobody saw it enable, and the VMM is asked at a capture",
        holds: |setup, world| {
            !moved(setup, world)
                && any(world, |vcpu| {
                    vcpu.guest.program == Program::Any && vcpu.exit == Exit::Asked(None)
                })
        },
    },
];

fn any(world: &World, holds: fn(&Vcpu) -> bool) -> bool {
    world.vcpus.iter().any(holds)
}

fn uses_tiles(vcpu: &Vcpu) -> bool {
    vcpu.mode == Mode::Guest && vcpu.guest.expects() > Some(0)
}

fn moved(setup: &Setup, world: &World) -> bool {
    world.left.moves < setup.bounds.moves
}

fn used_after(setup: &Setup, world: &World, what: fn(&Bounds) -> u8) -> bool {
    what(&world.left) < what(&setup.bounds) && any(world, uses_tiles)
}
