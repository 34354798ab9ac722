//! The plan for `/etc` that stage made, in `/run/node-image-pivot/etc-plan.json`.

use anyhow::Context as _;
use etc_merge::Plan;

use super::Paths;
use support::directory::Directory;

/// Loads the staged plan for `/etc`.
///
/// # Errors
/// The file cannot be read, is missing or is damaged.
pub(in crate::agent) fn load_etc_plan(paths: &Paths) -> anyhow::Result<Plan> {
    let run = Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
    let path = paths.run().join(Paths::ETC_PLAN);
    let text = run.read_optional(Paths::ETC_PLAN).with_context(|| format!("cannot read {}", path.display()))?;
    let text = text.with_context(|| format!("the plan for /etc, {}, is missing; pull again", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("the plan for /etc, {}, is damaged; pull again", path.display()))
}
