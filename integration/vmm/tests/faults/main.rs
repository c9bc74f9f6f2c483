//! Whatever breaks while a guest is moved or saved: exactly one side has it, or it has ended with the
//! process that had it; and what is sent with bad intentions harms neither the destination nor its host.
//!
//! One test for each group of faults, which can be run alone, and one that prints the table of all and
//! holds the sums against what is promised. Bare guests, on any live /dev/kvm; with tiles where it has
//! AMX. docs/faults.md has the table.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod connection;
mod corruption;
mod disk;
mod fields;
mod frame;
mod groups;
mod hostile;
mod inject;
mod ioctls;
mod kill;
mod memory;
mod platform;
mod process;
mod relay;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod trial;

use groups::Group;

/// In a process that a group has started, does what that group wants there; otherwise runs the group.
fn group(group: Group) {
    match support::job() {
        Some(job) => group.work_elsewhere(&job),
        None => {
            if let Some(rows) = group.rows() {
                table::print(rows);
            }
        }
    }
}

#[test]
fn a_process_is_killed() {
    group(Group::Kill);
}

#[test]
fn the_connection_is_cut() {
    group(Group::Connection);
}

#[test]
fn an_ioctl_of_save_fails() {
    group(Group::Save);
}

#[test]
fn an_ioctl_of_restore_fails() {
    group(Group::Restore);
}

#[test]
fn the_disk_is_full() {
    group(Group::Disk);
}

#[test]
fn the_destination_has_too_little_memory() {
    group(Group::Memory);
}

#[test]
fn a_message_is_changed_on_its_way() {
    group(Group::Corruption);
}

#[test]
fn the_other_side_is_hostile() {
    group(Group::Hostile);
}

/// The hand-over alone, at a few places: what each of its two rules is for.
#[test]
fn the_hand_over_is_cut() {
    if let Some(host) = support::host() {
        table::print(&connection::hand_over(&host));
    }
}

/// What Hello has promised is not what comes.
#[test]
fn pages_and_controllers_are_not_what_was_promised() {
    if let Some(host) = support::host() {
        table::print(&hostile::promises(&host));
    }
}

/// All groups, of which none runs twice.
#[test]
fn no_fault_loses_or_doubles_a_guest_or_harms_the_host() {
    table::check_all();
}
