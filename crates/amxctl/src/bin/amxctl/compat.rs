//! `amxctl compat`: whether the guest of A runs on B, every reason why not, and what would help.

use anyhow::{Context, bail};
use host_compat::compat::Guest;
use serde_json::{Value, json};

use crate::cli::CompatArgs;
use crate::judge::{self, Judgement, Verdict};
use crate::outcome::Outcome;
use crate::screen::{self, Mark};
use crate::{input, render};

pub(crate) fn run(args: &CompatArgs, json: bool) -> anyhow::Result<Outcome> {
    let path = &args.guest;
    let guest = input::guest(path)?;
    let host = input::host(&args.host)?;
    match guest {
        input::Guest::Host(own) => {
            if args.given.any() {
                bail!(
                    "{}: this is no saved state, and says all that there is to say: --cpuid, --xcr0, \
                     --xfd and --xfd-err are for what a saved state does not say",
                    path.display()
                );
            }
            let guest = Guest::of_host(&own)
                .with_context(|| format!("{}: a host without KVM has no guests", path.display()))?;
            say(args, &host.name, &judge::fresh(guest, &host), json)
        }
        input::Guest::Saved(snapshot) => {
            let given = input::given(&args.given)?;
            let loaded = input::subjects(path, snapshot, &[], &given)?;
            let judgement = judge::saved(&loaded.subjects, &host, args.relayout);
            say(args, &host.name, &judgement, json)
        }
    }
}

fn say(
    args: &CompatArgs,
    host: &str,
    judgement: &Judgement<'_>,
    json: bool,
) -> anyhow::Result<Outcome> {
    let name = args.guest.display().to_string();
    let text = if json {
        let mut value = judgement
            .compared
            .as_ref()
            .map_or_else(not_compared, render::compared_json);
        let (relayout, hide) = match judgement.verdict {
            Verdict::After { relayout, hide } => (relayout, hide),
            _ => (false, false),
        };
        let more = json!({
            "guest": name,
            "host": host,
            "verdict": render::word(&judgement.verdict),
            "relayout": relayout,
            "hide": hide,
            "vcpus": render::vcpus_json(judgement),
        });
        if let (Some(map), Value::Object(more)) = (value.as_object_mut(), more) {
            map.extend(more);
        }
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let what = match judgement.is_running {
            true => "the guest in",
            false => "a new guest of",
        };
        let verdict = match &judgement.verdict {
            Verdict::Runs => Mark::Good.paint("runs as it is"),
            Verdict::After { relayout, hide } => Mark::Warning.paint(match (relayout, hide) {
                (true, true) => {
                    "runs, with its states in another layout and some features hidden"
                }
                (true, false) => "runs, with its states in another layout",
                _ if judgement.is_running => {
                    "does not run as it is; features that it has not enabled would have to be hidden"
                }
                _ => "runs, with some features hidden",
            }),
            Verdict::Unknown(options) => {
                let options = render::give(options);
                Mark::Unknown.paint(&format!("cannot be judged{options}"))
            }
            Verdict::No => Mark::Bad.paint("does not run"),
            Verdict::Nowhere => Mark::Bad.paint("must not be restored, on any host"),
        };
        format!(
            "{what} {} on {}: {verdict}\n{}",
            screen::title(&name),
            screen::title(host),
            render::text(judgement)
        )
    };
    Ok(Outcome {
        text,
        answer: judgement.answer(),
    })
}

/// For machines, where nothing was compared.
fn not_compared() -> Value {
    json!({
        "reasons": [],
        "not_compared": [],
        "contradictions": [],
        "shared": [],
    })
}
