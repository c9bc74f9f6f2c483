//! What it all comes to, as data: the tables show it, and `--json` prints it.

use std::collections::BTreeMap;
use std::time::Duration;

use amx_guest::Kind;
use amx_vmm::Host;
use amx_vmm::host;
use cpuid_amx::PermissionError;
use serde::Serialize;
use xsave_state::XFeatures;

use crate::armed::Moment;
use crate::control::Control;
use crate::fleet::{Fleet, Plan};
use crate::linux::Journey;
use crate::stats::Summary;

/// What the host can do.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct HostFacts {
    pub(crate) processor: Option<String>,
    pub(crate) kernel: Option<String>,
    /// KVM's capabilities and their values; 0 where missing.
    pub(crate) capabilities: BTreeMap<&'static str, i32>,
    /// KVM_X86_XCOMP_GUEST_SUPP.
    pub(crate) guest_supported: Option<u64>,
    /// Components of a guest's CPUID.
    pub(crate) guest_components: u64,
    /// Bytes that KVM copies per vCPU.
    pub(crate) xsave_bytes: usize,
    /// Bytes that a guest's CPUID needs.
    pub(crate) area_bytes: usize,
    pub(crate) permission: String,
    pub(crate) rewrites_cpuid: bool,
    /// The payload that the guests run.
    pub(crate) payload: Option<&'static str>,
    /// The registers that the payload depends on.
    pub(crate) registers: Option<&'static str>,
    pub(crate) amx: bool,
}

impl HostFacts {
    pub(crate) fn new(host: &Host) -> Self {
        let kind = host.best_kind();
        Self {
            processor: host::processor(),
            kernel: host::kernel(),
            capabilities: host
                .capabilities()
                .iter()
                .map(|capability| (capability.name, capability.value))
                .collect(),
            guest_supported: host.guest_supported().map(|features| features.bits()),
            guest_components: host.layout().user().bits(),
            xsave_bytes: host.xsave_size(),
            area_bytes: host.layout().standard_size(),
            permission: permission(host),
            rewrites_cpuid: host.rewrites_cpuid(),
            payload: kind.map(Kind::name),
            registers: kind.map(Kind::registers),
            amx: kind == Some(Kind::Tiles),
        }
    }
}

/// The permission to give AMX to guests, in words.
fn permission(host: &Host) -> String {
    let for_guests = host
        .guest_supported()
        .is_some_and(|features| features.contains(XFeatures::XTILEDATA));
    match host.permission() {
        Ok(_) if for_guests => "granted: guests may have AMX".to_owned(),
        Ok(_) => "granted by the kernel, but this KVM has no AMX to give".to_owned(),
        Err(PermissionError::NotSupported { .. }) => {
            "none needed: this host has no AMX for guests".to_owned()
        }
        Err(error) => error.to_string(),
    }
}

/// The times of one step.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    pub(crate) summary: Summary,
}

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Nothing was lost, and the control was seen.
    pub(crate) good: bool,
    pub(crate) host: HostFacts,
    pub(crate) seed: u64,
    pub(crate) workers: usize,
    pub(crate) vcpus: u8,
    pub(crate) rounds: u64,
    pub(crate) seconds: f64,
    pub(crate) moves_wanted: u64,
    pub(crate) moves: u64,
    pub(crate) guests: u64,
    pub(crate) lost: u64,
    pub(crate) troubles: Vec<String>,
    pub(crate) file_bytes: usize,
    pub(crate) state_bytes: usize,
    pub(crate) in_use: u64,
    pub(crate) pages: usize,
    pub(crate) steps: Vec<Step>,
    pub(crate) control: Vec<Control>,
    /// XFD armed and in the middle of an #NM, where the guests have tiles.
    pub(crate) armed: Vec<Moment>,
    /// Each thing that was left out was seen.
    pub(crate) control_detected: bool,
    /// The Linux guest.
    pub(crate) linux: Option<Journey>,
    /// Why there is none.
    pub(crate) linux_lacks: Option<&'static str>,
    /// There has to be one.
    pub(crate) linux_wanted: bool,
}

impl Report {
    pub(crate) fn new(
        host: HostFacts,
        plan: &Plan,
        fleet: Fleet,
        control: Vec<Control>,
        armed: Vec<Moment>,
        took: Duration,
    ) -> Self {
        let mut losses = control
            .iter()
            .filter(|control| !control.harmless)
            .peekable();
        let detected = losses.peek().is_some() && losses.all(Control::as_expected);
        let whole = control.iter().all(Control::as_expected);
        let steps = &fleet.steps;
        Self {
            good: fleet.lost == 0
                && fleet.troubles.is_empty()
                && fleet.moves == plan.moves
                && detected
                && whole
                && armed.iter().all(|moment| moment.good),
            host,
            seed: plan.seed,
            workers: fleet.workers,
            vcpus: plan.vcpus,
            rounds: plan.kind.default_rounds(),
            seconds: took.as_secs_f64(),
            moves_wanted: plan.moves,
            moves: fleet.moves,
            guests: fleet.guests,
            lost: fleet.lost,
            file_bytes: fleet.sizes.file,
            state_bytes: fleet.sizes.area,
            in_use: fleet.sizes.in_use,
            pages: fleet.sizes.pages,
            steps: [
                ("capture", &steps.capture),
                ("write", &steps.write),
                ("read", &steps.read),
                ("check", &steps.check),
                ("restore", &steps.restore),
                ("together", &steps.all),
            ]
            .map(|(name, series)| Step {
                name,
                summary: series.summary(),
            })
            .into(),
            troubles: fleet.troubles,
            control,
            armed,
            control_detected: detected,
            linux: None,
            linux_lacks: None,
            linux_wanted: false,
        }
    }

    /// There has to be a Linux guest that proves it, and none has.
    pub(crate) fn linux_missing(&self) -> bool {
        self.linux
            .as_ref()
            .map_or(self.linux_wanted, |linux| !linux.good)
    }

    /// What became of the Linux guest, or why there is none; `wanted`: there has to be one.
    pub(crate) fn with_linux(
        self,
        linux: Option<Journey>,
        lacks: Option<&'static str>,
        wanted: bool,
    ) -> Self {
        let report = Self {
            linux,
            linux_lacks: lacks,
            linux_wanted: wanted,
            ..self
        };
        let good = report.good && !report.linux_missing();
        Self { good, ..report }
    }
}
