//! Hooks in the order of things: a failing one before the switch refuses it, one after it is a warning.

use std::ffi::OsString;
use std::path::Path;

use tracing::{info, warn};

use super::{Context, Error, Paths, StagedRoot, Ticket};
use crate::dirfd::Directory;
use crate::host::{self, Hook, Moment};
use crate::report::{Phase, State};
use crate::units::Flow;

const ROOT: &str = "/";

/// Runs the hooks before the switch; none of them has changed anything when this returns an error.
pub(super) async fn pre_switch(
    context: &Context,
    staged: &StagedRoot,
    flow: Flow,
    ticket: &Ticket,
) -> Result<(), Error> {
    let moment = Moment::PreSwitch;
    let hooks = host::find_hooks(Path::new(ROOT), moment)
        .map_err(|error| Error::Refused(format!("{error:#}; the running system is untouched")))?;
    // A switch that is made anew has its hooks afterwards anew, too.
    Directory::ensure(context.paths.run()).and_then(|run| run.remove_all(Paths::HOOKS_DONE)).map_err(|error| {
        let path = context.paths.run().join(Paths::HOOKS_DONE);
        anyhow::anyhow!("cannot remove {}: {error}; the running system is untouched", path.display())
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
            Error::Refused(format!(
                "{error:#}; the running system is untouched. Mend the cause, or switch the hook off: a link to /dev/null \
                 of its name in /etc/node-image-pivot/{name}.d"
            ))
        }),
        () = ticket.cancelled() => Err(Error::Cancelled),
    };
    context.tracker.update(|status| {
        status.waiting_for = None;
        if outcome.is_err() {
            status.timeline.retain(|entry| entry.phase != Phase::Switch);
        }
    });
    outcome
}

/// Runs the hooks after the switch that have not run since. What goes wrong becomes a warning.
pub(super) async fn post_switch(context: &Context, staged: &StagedRoot, flow: Flow) {
    let moment = Moment::PostSwitch;
    let hooks = host::find_hooks(Path::new(ROOT), moment).unwrap_or_else(|error| {
        warning(context, &format!("{error:#}"));
        Vec::new()
    });
    let mut done = done(&context.paths);
    let mut hooks =
        hooks.into_iter().filter(|hook| !done.contains(&hook.name)).collect::<Vec<_>>().into_iter().peekable();
    if hooks.peek().is_none() {
        return;
    }
    context.tracker.update(|status| status.state = State::Running);
    for hook in hooks {
        if let Err(error) = run(context, &hook, moment, staged, flow).await {
            warning(context, &format!("{error:#}"));
        }
        done.push(hook.name);
        let text = done.join("\n");
        if let Err(error) = Directory::ensure(context.paths.run())
            .and_then(|run| run.write_atomic(Paths::HOOKS_DONE, 0o644, text.as_bytes()))
        {
            warn!("cannot note which hooks have run, an agent that is restarted now runs them again: {error}");
        }
    }
    context.tracker.update(|status| status.waiting_for = None);
    context.tracker.end(Phase::Refresh, State::Switched);
}

/// Names of the hooks that ran after this switch.
fn done(paths: &Paths) -> Vec<String> {
    let text = Directory::ensure(paths.run()).and_then(|run| run.read_optional(Paths::HOOKS_DONE));
    let text = text.unwrap_or_default().unwrap_or_default();
    String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
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
    warn!("{line}");
    context.tracker.note(format!("warning: {line}"));
}
