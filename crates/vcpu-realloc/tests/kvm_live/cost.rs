//! What a workload that switches between tasks with and without AMX costs: under the default policy,
//! and with every write of IA32_XFD trapped.

use std::time::{Duration, Instant};

use vcpu_realloc::Answer;
use vcpu_realloc::kvm::{Mode, Options, Policy};

use crate::boot::{AMX, boot};
use crate::machine::stats::exits;
use crate::machine::{Command, Machine, Stop};
use crate::vmm::never;

struct Cost {
    exits: u64,
    time: Duration,
}

/// Runs vCPU 0, which has passed. Its neighbour never uses AMX, so under `EachVcpu` every write of
/// vCPU 0 leaves.
fn cost(policy: Policy, command: Command) -> Option<Cost> {
    let options = Options {
        policy,
        ..Options::default()
    };
    let mut machine = Machine::with_amx(2, options)?;
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
    }
    machine.tell(0, &[AMX[0], AMX[1], Command::Bell(1)]);
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Bell(1));
    let lifted = policy == Policy::WholeVm;
    assert_eq!(machine.gate.mode() == Mode::Lifted, lifted);
    machine.tell(0, &[command, Command::Bell(2)]);
    let before = exits(&machine.vcpus[0].fd);
    let start = Instant::now();
    assert_eq!(machine.run(0, &mut never), Stop::Bell(2));
    let time = start.elapsed();
    let exits = exits(&machine.vcpus[0].fd) - before;
    machine.tell(0, &AMX);
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    Some(Cost { exits, time })
}

#[test]
fn switching_costs_nothing_once_lifted_and_two_exits_while_trapped() {
    for (switches, products) in [(2_000, 1), (200, 1_000)] {
        let Some(base) = cost(Policy::WholeVm, Command::Compute(switches, products)) else {
            return;
        };
        let switch = Command::Switch(switches, products);
        let lifted = cost(Policy::WholeVm, switch).unwrap();
        let trapped = cost(Policy::EachVcpu, switch).unwrap();
        println!("{switches} switches, {products} products of tiles each | VM exits | time, ratio");
        let ratio = |cost: &Cost| cost.time.as_secs_f64() / base.time.as_secs_f64();
        for (name, cost) in [
            ("IA32_XFD never written", &base),
            ("written, lifted", &lifted),
            ("written, trapped", &trapped),
        ] {
            println!("{name} | {} | {:.3}", cost.exits, ratio(cost));
        }
        assert!(lifted.exits < 100, "{}", lifted.exits);
        assert!(
            trapped.exits >= 2 * u64::from(switches),
            "{}",
            trapped.exits
        );
    }
}
