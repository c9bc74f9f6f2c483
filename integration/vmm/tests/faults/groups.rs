//! The groups of faults: each runs once in a process, whoever asks first.

use std::sync::OnceLock;

use amx_vmm::Host;

use crate::table::Row;
use crate::{connection, corruption, disk, hostile, ioctls, kill, memory, support};

/// Faults of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Kill,
    Connection,
    Save,
    Restore,
    Disk,
    Memory,
    Corruption,
    Hostile,
}

impl Group {
    pub(crate) const ALL: [Self; 8] = [
        Self::Kill,
        Self::Connection,
        Self::Save,
        Self::Restore,
        Self::Disk,
        Self::Memory,
        Self::Corruption,
        Self::Hostile,
    ];

    /// What became of its faults; `None` where there is no KVM. Runs them at the first call.
    pub(crate) fn rows(self) -> Option<&'static [Row]> {
        static ROWS: [OnceLock<Option<Vec<Row>>>; Group::ALL.len()] =
            [const { OnceLock::new() }; Group::ALL.len()];
        let rows = ROWS[self as usize].get_or_init(|| {
            let host = support::host()?;
            Some(self.run(&host))
        });
        rows.as_deref()
    }

    fn run(self, host: &Host) -> Vec<Row> {
        match self {
            Self::Kill => kill::run(host),
            Self::Connection => connection::run(host),
            Self::Save => ioctls::run_save(),
            Self::Restore => ioctls::run_restore(),
            Self::Disk => disk::run(host),
            Self::Memory => memory::run(host),
            Self::Corruption => corruption::run(host),
            Self::Hostile => hostile::run(host),
        }
    }

    /// What a process is there for that the group has started.
    pub(crate) fn work_elsewhere(self, job: &str) {
        let host = support::host().expect("its parent has found one");
        match self {
            Self::Kill => kill::work(&host, job),
            Self::Save => ioctls::work_save(&host, job),
            Self::Restore => ioctls::work_restore(&host, job),
            Self::Disk => disk::work(&host, job),
            Self::Memory => memory::work(&host, job),
            Self::Connection | Self::Corruption | Self::Hostile => {
                panic!("{self:?} starts no processes")
            }
        }
    }

    /// The name of its test.
    pub(crate) const fn test(self) -> &'static str {
        match self {
            Self::Kill => "a_process_is_killed",
            Self::Connection => "the_connection_is_cut",
            Self::Save => "an_ioctl_of_save_fails",
            Self::Restore => "an_ioctl_of_restore_fails",
            Self::Disk => "the_disk_is_full",
            Self::Memory => "the_destination_has_too_little_memory",
            Self::Corruption => "a_message_is_changed_on_its_way",
            Self::Hostile => "the_other_side_is_hostile",
        }
    }
}
