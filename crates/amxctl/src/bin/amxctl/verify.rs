//! `amxctl verify`: whether a saved state can be restored on a host, as it is.

use serde_json::json;

use crate::cli::VerifyArgs;
use crate::judge::{self, Verdict};
use crate::outcome::{Answer, Outcome};
use crate::screen::{self, Mark};
use crate::{input, render};

pub(crate) fn run(args: &VerifyArgs, json: bool) -> anyhow::Result<Outcome> {
    let given = input::given(&args.given)?;
    let host = input::this_or(args.on.as_deref())?;
    let loaded = input::saved(&args.file, &args.vcpu, &given)?;
    let judgement = judge::saved(&loaded.subjects, &host, false);
    let answer = judgement.answer();
    let text = if json {
        let value = json!({
            "file": loaded.name,
            "format": loaded.format.name(),
            "host": host.name,
            "judged": answer != Answer::Unknown,
            "restorable": answer == Answer::Yes,
            "verdict": render::word(&judgement.verdict),
            "vcpus": render::vcpus_json(&judgement),
            "compatibility": judgement.compared.as_ref().map(render::compared_json),
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let host = &host.name;
        let said = match &judgement.verdict {
            Verdict::Runs => console::style(format!("can be restored on {host}"))
                .green()
                .to_string(),
            Verdict::Unknown(options) => {
                let options = render::give(options);
                Mark::Unknown.paint(&format!("cannot be judged on {host}{options}"))
            }
            Verdict::After { .. } | Verdict::No => {
                Mark::Bad.paint(&format!("cannot be restored on {host} as it is"))
            }
            Verdict::Nowhere => Mark::Bad.paint("must not be restored, on any host"),
        };
        format!(
            "{}: {said}\n{}",
            screen::title(&loaded.name),
            render::text(&judgement)
        )
    };
    Ok(Outcome { text, answer })
}
