//! A real snapshot with bytes changed and the checksums right: whatever is accepted goes to KVM, and
//! KVM or this VMM says no by name, or there is a VM. Nothing is run.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use amx_guest::Kind;
use amx_vmm::{RestoreError, Snapshot, Vm};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{host, stopped};

fn seal(bytes: &mut [u8]) {
    let body = crc32fast::hash(&bytes[64..]);
    bytes[40..44].copy_from_slice(&body.to_le_bytes());
    let header = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&header.to_le_bytes());
}

#[test]
fn what_is_accepted_is_restored_or_refused_by_name() {
    let Some(host) = host() else { return };
    let (snapshot, _) = stopped(&host, Kind::Sse, 1, 3);
    let good = snapshot.to_bytes();
    let state_bytes = u64::from_le_bytes(good[16..24].try_into().expect("eight bytes"));
    let state_end = 64 + usize::try_from(state_bytes).expect("a small file");
    let mut rng = StdRng::seed_from_u64(4);
    let (mut unread, mut unfit, mut refused, mut restored) = (0, 0, 0, 0);
    for _ in 0..400 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(64..state_end);
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        seal(&mut bytes);
        let Ok(snapshot) = Snapshot::from_bytes(&bytes) else {
            unread += 1;
            continue;
        };
        match Vm::restore(&host, &snapshot) {
            Ok(mut vm) => {
                // Still a state that is valid as a whole.
                vm.capture(&host)
                    .expect("what was restored can be captured");
                restored += 1;
            }
            Err(RestoreError::Unfit(_)) => unfit += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    println!(
        "{unread} not read, {unfit} do not fit, {refused} refused by KVM, {restored} restored"
    );
    assert!(unread > 0 && restored > 0);
}
