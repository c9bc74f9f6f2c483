//! `amxctl describe`: this host, or one of which there is only CPUID, as a line of JSON.

use cpuid_amx::coherence;
use host_compat::{Host, probe};

use crate::cli::DescribeArgs;
use crate::outcome::Outcome;
use crate::{fleet, input, screen};

pub(crate) fn run(args: &DescribeArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut host = match &args.cpuid {
        Some(path) => Host::from_cpuid(path.display().to_string(), input::cpuid(path)?),
        None => probe(),
    };
    if let Some(name) = &args.name {
        host.name.clone_from(name);
    }
    for contradiction in host
        .guest_cpuid()
        .map(coherence::check)
        .into_iter()
        .flatten()
    {
        if !contradiction.is_recomputed_by_kvm() {
            screen::warning(&contradiction.to_string());
        }
    }
    if let Some(tool) = args.format {
        return Outcome::yes(fleet::write_for_host(&host, tool, json)?);
    }
    let text = if args.pretty {
        serde_json::to_string_pretty(&host)?
    } else {
        serde_json::to_string(&host)?
    };
    Outcome::yes(text + "\n")
}
