//! The CPU of a guest that runs on every host, for the tools that start guests.

use std::path::Path;

use anyhow::anyhow;
use host_compat::render::{self, RenderError, Rendered};
use host_compat::{Fleet, GuestCpu, Host};
use serde_json::json;

use crate::cli::Tool;
use crate::{input, screen};

/// What the tool reads; what its format cannot hold goes to standard error, or both into JSON.
pub(crate) fn write(
    fleet: &Fleet,
    home: Option<&Path>,
    tool: Tool,
    json: bool,
) -> anyhow::Result<String> {
    let mut cpu = fleet.guest_cpu()?;
    if let Some(path) = home {
        cpu = cpu.on(&input::host(path)?)?;
    }
    let (name, rendered) = match tool {
        Tool::Firecracker => ("firecracker", firecracker(&cpu)?),
        Tool::Qemu => ("qemu", render::qemu(&cpu)),
        Tool::Cpuid => ("cpuid", render::cpuid(&cpu)),
    };
    let Rendered { text, not_held } = rendered;
    if json {
        let object = json!({ "format": name, "text": text, "not_held": not_held });
        return Ok(serde_json::to_string_pretty(&object)? + "\n");
    }
    for not_held in &not_held {
        screen::note(&not_held.why);
    }
    Ok(text)
}

fn firecracker(cpu: &GuestCpu) -> anyhow::Result<Rendered> {
    render::firecracker(cpu).map_err(|error| match error {
        RenderError::LeafOfSomeHosts { .. } => anyhow!("{error}, with --for HOST.JSON"),
        error => error.into(),
    })
}

/// The same for the guests of one host.
pub(crate) fn write_for_host(host: &Host, tool: Tool, json: bool) -> anyhow::Result<String> {
    let mut fleet = Fleet::new();
    fleet.add(host)?;
    write(&fleet, None, tool, json)
}
