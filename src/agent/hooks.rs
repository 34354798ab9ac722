//! Runs hooks: a failure before the switch or a deployment refuses it, a failure afterwards becomes a warning.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::state::{StateFile, if_present};
use super::{CancelHandle, Error, StagedRoot, StateDir, SwitchPlan};
use crate::host::{self, Hook, Moment};
use crate::report::{Phase, RefusalId, State, Subject, Tracker, one_line};
use unit_refresh::Flow;

const ROOT: &str = "/";

/// The hooks of a switch or of a deployment.
pub(super) struct Hooks<'a> {
    pub(super) tracker: &'a Tracker,
    pub(super) dir: &'a StateDir,
    pub(super) timeout: Duration,
    pub(super) target: &'a str,
    pub(super) staged: &'a StagedRoot,
    pub(super) flow: Flow,
    /// The sysroot of a deployment.
    pub(super) sysroot: Option<&'a Path>,
}

impl Hooks<'_> {
    /// Runs the hooks before the switch.
    ///
    /// # Errors
    /// A hook fails, or the call is cancelled. The agent has changed nothing then.
    pub(super) async fn pre_switch(&self, cancel: &CancelHandle) -> Result<(), Error> {
        let hooks = find_all(Moment::PreSwitch)?;
        // Another switch runs the hooks after it again.
        self.dir.remove(Done::NAME)?;
        if hooks.is_empty() {
            return Ok(());
        }
        self.tracker.begin(Phase::Switch);
        let outcome = self.run_all(&hooks, Moment::PreSwitch, cancel).await;
        if outcome.is_err() {
            self.tracker.update(|status| status.timeline.retain(|entry| entry.phase != Phase::Switch));
        }
        outcome
    }

    /// Runs the hooks before a deployment.
    ///
    /// # Errors
    /// As [`Hooks::pre_switch`].
    pub(super) async fn pre_deploy(&self, cancel: &CancelHandle) -> Result<(), Error> {
        self.run_all(&find_all(Moment::PreDeploy)?, Moment::PreDeploy, cancel).await
    }

    /// Runs the hooks after a deployment, until the call is cancelled. Returns the failures.
    pub(super) async fn post_deploy(&self, cancel: &CancelHandle) -> Vec<String> {
        let hooks = find_all(Moment::PostDeploy);
        let mut failures: Vec<_> = hooks.as_ref().err().map(ToString::to_string).into_iter().collect();
        for hook in hooks.into_iter().flatten() {
            let outcome = tokio::select! {
                biased;
                () = cancel.cancelled() => Err(anyhow!("the call was cancelled before the end of the hook {}", hook.name)),
                outcome = self.run(&hook, Moment::PostDeploy) => outcome,
            };
            failures.extend(outcome.err().map(|error| one_line(&format!("{error:#}"))));
        }
        self.tracker.update(|status| status.waiting_for = None);
        failures
    }

    /// Runs hooks until one fails, which refuses the switch or the deployment.
    async fn run_all(&self, hooks: &[Hook], moment: Moment, cancel: &CancelHandle) -> Result<(), Error> {
        let all = async {
            for hook in hooks {
                self.run(hook, moment).await?;
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
        self.tracker.update(|status| status.waiting_for = None);
        outcome
    }

    /// Runs those hooks after the switch that have not run since. A failure becomes a warning.
    pub(super) async fn post_switch(&self) {
        let moment = Moment::PostSwitch;
        let hooks = host::find_hooks(Path::new(ROOT), moment).unwrap_or_else(|error| {
            self.tracker.warn(format!("{error:#}"));
            Vec::new()
        });
        let done = if_present(self.staged.load::<Done>(self.dir)).unwrap_or_else(|error| {
            self.tracker.warn(error.to_string());
            None
        });
        let mut done = done.unwrap_or_default();
        // An agent that was killed meanwhile has lost these warnings.
        for failure in done.hooks.values().flatten() {
            self.tracker.warn(failure);
        }
        let hooks: Vec<_> = hooks.into_iter().filter(|hook| !done.hooks.contains_key(&hook.name)).collect();
        if hooks.is_empty() {
            return;
        }
        self.tracker.update(|status| status.state = State::Running);
        for hook in hooks {
            let failure = self.run(&hook, moment).await.err().map(|error| one_line(&format!("{error:#}")));
            if let Some(failure) = &failure {
                self.tracker.warn(failure);
            }
            done.hooks.insert(hook.name, failure);
            if let Err(error) = self.staged.save(&done, self.dir) {
                warn!("{error:#}; an agent that is restarted now runs the hooks again");
            }
        }
        self.tracker.update(|status| status.waiting_for = None);
        self.tracker.end(Phase::Refresh, State::Switched);
    }

    async fn run(&self, hook: &Hook, moment: Moment) -> anyhow::Result<()> {
        info!("running the {} hook {}", moment.as_str(), hook.path.display());
        self.tracker.update(|status| {
            status.waiting_for = Some(format!("the {} hook {}", moment.as_str(), hook.name));
        });
        let environment = self.environment(moment);
        let run = host::run_hook(hook, moment, &environment, self.timeout);
        self.tracker.timed(Subject::Hook, &hook.name, run).await
    }

    fn environment(&self, moment: Moment) -> Vec<(&'static str, OsString)> {
        let image = &self.staged.pulled.image;
        let sysroot = self.sysroot.map(|path| ("NODE_IMAGE_PIVOT_SYSROOT", path.into()));
        let all = [
            ("NODE_IMAGE_PIVOT_HOOK", moment.as_str().into()),
            ("NODE_IMAGE_PIVOT_FLOW", <&str>::from(self.flow).into()),
            ("NODE_IMAGE_PIVOT_IMAGE", image.pinned.to_string().into()),
            ("NODE_IMAGE_PIVOT_DIGEST", image.digest.to_string().into()),
            ("NODE_IMAGE_PIVOT_COMMIT", self.staged.pulled.commit.to_string().into()),
            ("NODE_IMAGE_PIVOT_TARGET", self.target.into()),
            ("NODE_IMAGE_PIVOT_STATE_DIR", self.dir.run().into()),
            ("NODE_IMAGE_PIVOT_PLAN", self.dir.run().join(SwitchPlan::NAME).into()),
            ("NODE_IMAGE_PIVOT_DELTA", (&self.staged.delta.directory).into()),
        ];
        all.into_iter().chain(sysroot).collect()
    }
}

fn find_all(moment: Moment) -> Result<Vec<Hook>, Error> {
    host::find_hooks(Path::new(ROOT), moment).map_err(|error| Error::refused(RefusalId::Hook, format!("{error:#}")))
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
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use rustix::mount::{MountFlags, mount};

    use super::super::state::{staged, survives_every_damage};
    use super::*;
    use crate::agent::CancelHandles;
    use crate::report::Status;
    use support::testing::private;

    fn put(path: &str, text: &str) {
        let path = Path::new("/run/node-image-pivot").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_hook_refuses_a_deployment_and_failures_after_it_are_returned() {
        private(|scratch| {
            mount("none", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
            let (tracker, dir, staged) = (&Tracker::new(Status::default()), &StateDir::below(scratch), &staged());
            let (timeout, flow, sysroot) = (Duration::from_secs(120), Flow::Live, Some(Path::new("/mnt")));
            let hooks = Hooks { tracker, dir, timeout, target: "multi-user.target", staged, flow, sysroot };
            let handles = CancelHandles::default();
            let cancel = handles.register("test");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let pre_deploy = || runtime.block_on(hooks.pre_deploy(&cancel));
            pre_deploy().unwrap();
            put("pre-deploy.d/10-check", "#!/bin/sh\ntest \"$NODE_IMAGE_PIVOT_SYSROOT\" = /mnt\n");
            pre_deploy().unwrap();
            put("pre-deploy.d/20-refuse", "#!/bin/sh\necho not today; exit 1\n");
            let refused = pre_deploy().unwrap_err().last_error();
            assert_eq!(refused.refusals[0].id, "hook");
            assert!(refused.message.contains("not today"), "{}", refused.message);
            put("post-deploy.d/10-fail", "#!/bin/sh\nexit 7\n");
            put("post-deploy.d/20-note", "#!/bin/sh\necho $NODE_IMAGE_PIVOT_HOOK >/run/noted\n");
            let failures = runtime.block_on(hooks.post_deploy(&cancel));
            assert!(failures.len() == 1 && failures[0].contains("10-fail"), "{failures:?}");
            assert_eq!(fs::read_to_string("/run/noted").unwrap(), "post-deploy\n");
            put("post-deploy.d/10-fail", "#!/bin/sh\ntouch /run/begun; exec sleep 600\n");
            let failures = runtime.block_on(async {
                let cancelled = async {
                    while !Path::new("/run/begun").exists() {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    handles.cancel_all()
                };
                tokio::join!(hooks.post_deploy(&cancel), cancelled).0
            });
            let ended = |name: &str| format!("the call was cancelled before the end of the hook {name}");
            assert_eq!(failures, ["10-fail", "20-note"].map(ended));
        });
    }

    #[test]
    fn the_list_survives_the_file() {
        let failure = Some("the hook failed: x; y".to_owned());
        let hooks = BTreeMap::from([("10-a".to_owned(), None), ("20-b".to_owned(), failure)]);
        survives_every_damage(&Done { hooks });
    }
}
