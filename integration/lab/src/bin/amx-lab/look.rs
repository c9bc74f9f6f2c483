//! prepare, status and clean.

use amx_lab::{Kernel, Part, PrepareOptions, Show, Store};
use anyhow::Result;

use crate::cli::{PrepareArgs, StatusArgs};
use crate::codes;

pub(crate) fn prepare(args: &PrepareArgs) -> Result<u8> {
    let kernels = match (args.all, args.kernel.as_slice()) {
        (true, _) => Kernel::ALL.to_vec(),
        (false, []) => vec![Kernel::default()],
        (false, some) => some.to_vec(),
    };
    let options = PrepareOptions {
        kernels,
        memory_mib: args.memory,
        cpu: args.cpu,
        cold: false,
        cpus: args.cpus,
        mirror: args.mirror.clone(),
        update: args.update,
        verify: args.verify,
        without_patches: args.without_patch.clone(),
    };
    amx_lab::prepare(&Store::open()?, &options, &Show::default())?;
    Ok(0)
}

/// The status is 0 if a lab with the default kernel can start, and that of an unusable lab otherwise.
pub(crate) fn status(args: &StatusArgs) -> Result<u8> {
    let store = Store::open()?;
    let status = amx_lab::status(&store, args.verify)?;
    let default = Kernel::default().to_string();
    let usable = |name: &str| {
        status
            .parts
            .iter()
            .any(|part| part.name == name && part.bytes.is_some())
    };
    let is_usable = usable("emulator") && usable(&default);
    if args.json {
        let report = serde_json::json!({
            "folder": store.root(),
            "usable": is_usable,
            "parts": status.parts,
            "others": status.others,
        });
        println!("{report:#}");
    } else {
        println!("{}", store.root().display());
        status.parts.iter().for_each(print);
        if !status.others.is_empty() {
            println!("kept as well (machines resume after their boot):");
            status.others.iter().for_each(print);
        }
        if !is_usable {
            println!("nothing can run yet: amx-lab prepare");
        }
    }
    Ok(if is_usable { 0 } else { codes::LAB })
}

fn print(part: &Part) {
    match part.bytes {
        Some(bytes) => println!(
            "  {:<42} {:>6} MB  {}",
            part.name,
            bytes / 1_000_000,
            part.about
        ),
        None => println!("  {:<42} {:>9}  {}", part.name, "-", part.about),
    }
}

pub(crate) fn clean() -> Result<u8> {
    let store = Store::open()?;
    let bytes = amx_lab::clean(&store)?;
    println!(
        "removed {} MB from {}",
        bytes / 1_000_000,
        store.root().display()
    );
    Ok(0)
}
