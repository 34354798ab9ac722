//! Runs hooks: a failure before the switch refuses it, a failure after the switch becomes a warning.

use std::ffi::OsString;
use std::path::Path;

use tracing::{info, warn};

use super::{CancelHandle, Context, Error, Paths, StagedRoot};
use crate::host::{self, Hook, Moment};
use crate::report::{Phase, State, one_line};
use support::directory::Directory;
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
    let hooks =
        host::find_hooks(Path::new(ROOT), moment).map_err(|error| Error::refused("hook", format!("{error:#}")))?;
    // Another switch runs the hooks after it again.
    Directory::ensure(context.paths.run()).and_then(|run| run.remove_all(Paths::HOOKS_DONE)).map_err(|error| {
        let path = context.paths.run().join(Paths::HOOKS_DONE);
        anyhow::anyhow!("cannot remove {}: {error}", path.display())
    })?;
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
            Error::refused("hook", format!("{error:#}; fix the cause, or {remedy}"))
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
    let mut done = done(&context.paths);
    // An agent that was killed meanwhile has lost these warnings.
    for failure in done.iter().filter_map(|(_, failure)| failure.as_ref()) {
        warning(context, failure);
    }
    let hooks: Vec<_> = hooks.into_iter().filter(|hook| !done.iter().any(|(name, _)| *name == hook.name)).collect();
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
        done.push((hook.name, failure));
        if let Err(error) = Directory::ensure(context.paths.run())
            .and_then(|run| run.write_atomic(Paths::HOOKS_DONE, 0o644, written(&done).as_bytes()))
        {
            warn!("cannot record the hooks that have run: {error}; an agent that is restarted now runs them again");
        }
    }
    context.tracker.update(|status| status.waiting_for = None);
    context.tracker.end(Phase::Refresh, State::Switched);
}

/// Name of a hook that ran after this switch, and its failure.
type Done = (String, Option<String>);

fn done(paths: &Paths) -> Vec<Done> {
    let text = Directory::ensure(paths.run()).and_then(|run| run.read_optional(Paths::HOOKS_DONE));
    read(&String::from_utf8_lossy(&text.unwrap_or_default().unwrap_or_default()))
}

/// Reads lines with the name of a hook and, after a tab, its failure.
fn read(text: &str) -> Vec<Done> {
    let parts = |line: &str| match line.split_once('\t') {
        Some((name, failure)) => (name.to_owned(), Some(failure.to_owned())),
        None => (line.to_owned(), None),
    };
    text.lines().map(parts).collect()
}

fn written(done: &[Done]) -> String {
    let line = |(name, failure): &Done| match failure {
        Some(failure) => format!("{name}\t{failure}\n"),
        None => format!("{name}\n"),
    };
    done.iter().map(line).collect()
}

async fn run(context: &Context, hook: &Hook, moment: Moment, staged: &StagedRoot, flow: Flow) -> anyhow::Result<()> {
    info!("running the {} hook {}", moment.as_str(), hook.path.display());
    context.tracker.update(|status| {
        status.waiting_for = Some(format!("the {} hook {}", moment.as_str(), hook.name));
    });
    let environment = environment(context, staged, moment, flow);
    host::run_hook(hook, moment, &environment, context.settings.hooks_timeout).await
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
        ("NODE_IMAGE_PIVOT_IMAGE", (&image.pinned).into()),
        ("NODE_IMAGE_PIVOT_DIGEST", (&image.digest).into()),
        ("NODE_IMAGE_PIVOT_COMMIT", (&staged.pulled.commit).into()),
        ("NODE_IMAGE_PIVOT_TARGET", target.into()),
        ("NODE_IMAGE_PIVOT_STATE_DIR", context.paths.run().into()),
        ("NODE_IMAGE_PIVOT_PLAN", context.paths.run().join(Paths::PLAN).into()),
        ("NODE_IMAGE_PIVOT_DELTA", (&staged.delta.directory).into()),
    ]
}

fn warning(context: &Context, line: &str) {
    context.tracker.warn(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_of_hooks_keeps_names_and_failures() {
        let done = vec![("10-a".to_owned(), None), ("20-b".to_owned(), Some("the hook failed: x; y".to_owned()))];
        assert_eq!(read(&written(&done)), done);
        assert_eq!(read(""), []);
    }
}
