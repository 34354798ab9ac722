//! Runs hooks: a failure before the switch refuses it, a failure after the switch becomes a warning.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::state::{StateFile, if_present};
use super::{CancelHandle, Context, Error, StagedRoot, SwitchPlan};
use crate::host::{self, Hook, Moment};
use crate::report::{Phase, RefusalId, State, Subject, one_line};
use unit_refresh::Flow;

const ROOT: &str = "/";

/// Runs the hooks before the switch.
///
/// # Errors
/// A hook fails, or the call is cancelled. The agent has changed nothing then.
pub(super) async fn pre_switch(
    context: &Context,
    staged: &StagedRoot,
    flow: Flow,
    cancel: &CancelHandle,
) -> Result<(), Error> {
    let moment = Moment::PreSwitch;
    let hooks = host::find_hooks(Path::new(ROOT), moment)
        .map_err(|error| Error::refused(RefusalId::Hook, format!("{error:#}")))?;
    // Another switch runs the hooks after it again.
    context.paths.remove(Done::NAME)?;
    if hooks.is_empty() {
        return Ok(());
    }
    context.tracker.begin(Phase::Switch);
    let all = async {
        for hook in &hooks {
            run(context, hook, moment, staged, flow).await?;
        }
        anyhow::Ok(())
    };
    let outcome = tokio::select! {
        outcome = all => outcome.map_err(|error| {
            let name = moment.as_str();
            let remedy = format!("disable the hook with a link to /dev/null in /etc/node-image-pivot/{name}.d");
            Error::refused(RefusalId::Hook, format!("{error:#}; fix the cause, or {remedy}"))
        }),
        () = cancel.cancelled() => Err(Error::cancelled()),
    };
    context.tracker.update(|status| {
        status.waiting_for = None;
        if outcome.is_err() {
            status.timeline.retain(|entry| entry.phase != Phase::Switch);
        }
    });
    outcome
}

/// Runs those hooks after the switch that have not run since. A failure becomes a warning.
pub(super) async fn post_switch(context: &Context, staged: &StagedRoot, flow: Flow) {
    let moment = Moment::PostSwitch;
    let hooks = host::find_hooks(Path::new(ROOT), moment).unwrap_or_else(|error| {
        warning(context, &format!("{error:#}"));
        Vec::new()
    });
    let done = if_present(staged.load::<Done>(&context.paths)).unwrap_or_else(|error| {
        warning(context, &error.to_string());
        None
    });
    let mut done = done.unwrap_or_default();
    // An agent that was killed meanwhile has lost these warnings.
    for failure in done.hooks.values().flatten() {
        warning(context, failure);
    }
    let hooks: Vec<_> = hooks.into_iter().filter(|hook| !done.hooks.contains_key(&hook.name)).collect();
    if hooks.is_empty() {
        return;
    }
    context.tracker.update(|status| status.state = State::Running);
    for hook in hooks {
        let failure =
            run(context, &hook, moment, staged, flow).await.err().map(|error| one_line(&format!("{error:#}")));
        if let Some(failure) = &failure {
            warning(context, failure);
        }
        done.hooks.insert(hook.name, failure);
        if let Err(error) = staged.save(&done, &context.paths) {
            warn!("{error:#}; an agent that is restarted now runs the hooks again");
        }
    }
    context.tracker.update(|status| status.waiting_for = None);
    context.tracker.end(Phase::Refresh, State::Switched);
}

/// The hooks that ran after this switch, and their failures.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Done {
    hooks: BTreeMap<String, Option<String>>,
}

impl StateFile for Done {
    const NAME: &'static str = "hooks-done";
    const SUBJECT: &'static str = "the list of hooks that have run";
    const REMEDY: &'static str = "the hooks after the switch run again";

    /// Reads lines with the name of a hook and, after a tab, its failure.
    fn of_older_agent(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| !text.starts_with('{'))?;
        let parts = |line: &str| match line.split_once('\t') {
            Some((name, failure)) => (name.to_owned(), Some(failure.to_owned())),
            None => (line.to_owned(), None),
        };
        Some(Self { hooks: text.lines().map(parts).collect() })
    }
}

async fn run(context: &Context, hook: &Hook, moment: Moment, staged: &StagedRoot, flow: Flow) -> anyhow::Result<()> {
    info!("running the {} hook {}", moment.as_str(), hook.path.display());
    context.tracker.update(|status| {
        status.waiting_for = Some(format!("the {} hook {}", moment.as_str(), hook.name));
    });
    let environment = environment(context, staged, moment, flow);
    let run = host::run_hook(hook, moment, &environment, context.settings.hooks_timeout);
    context.tracker.timed(Subject::Hook, &hook.name, run).await
}

fn environment(context: &Context, staged: &StagedRoot, moment: Moment, flow: Flow) -> [(&'static str, OsString); 9] {
    let image = &staged.pulled.image;
    let target = context.tracker.status().target.unwrap_or_else(|| context.settings.target.clone());
    let flow = match flow {
        Flow::Bootstrap => "bootstrap",
        Flow::Live => "live",
    };
    [
        ("NODE_IMAGE_PIVOT_HOOK", moment.as_str().into()),
        ("NODE_IMAGE_PIVOT_FLOW", flow.into()),
        ("NODE_IMAGE_PIVOT_IMAGE", image.pinned.to_string().into()),
        ("NODE_IMAGE_PIVOT_DIGEST", image.digest.to_string().into()),
        ("NODE_IMAGE_PIVOT_COMMIT", staged.pulled.commit.to_string().into()),
        ("NODE_IMAGE_PIVOT_TARGET", target.into()),
        ("NODE_IMAGE_PIVOT_STATE_DIR", context.paths.run().into()),
        ("NODE_IMAGE_PIVOT_PLAN", context.paths.run().join(SwitchPlan::NAME).into()),
        ("NODE_IMAGE_PIVOT_DELTA", (&staged.delta.directory).into()),
    ]
}

fn warning(context: &Context, line: &str) {
    context.tracker.warn(line);
}

#[cfg(test)]
mod tests {
    use super::super::state::survives_every_damage;
    use super::*;

    #[test]
    fn the_list_of_an_older_agent_is_read() {
        let failure = Some("the hook failed: x; y".to_owned());
        let hooks = BTreeMap::from([("10-a".to_owned(), None), ("20-b".to_owned(), failure)]);
        let done = Done { hooks };
        survives_every_damage(&done);
        assert_eq!(Done::of_older_agent(b"10-a\n20-b\tthe hook failed: x; y\n"), Some(done));
    }
}
