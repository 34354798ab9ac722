//! `check`: the checks that need no node image.

use anyhow::{Result, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::say;
use crate::agent::{self, Checks, StateDir};
use crate::report::{Outcome, RefusalId};

/// Parses the id of a check.
pub(super) fn id() -> impl TypedValueParser<Value = RefusalId> {
    PossibleValuesParser::new(agent::checks().map(RefusalId::as_str))
        .try_map(|name| agent::checks().find(|id| id.as_str() == name).ok_or("unknown check"))
}

pub(super) async fn check(paths: &StateDir, json: bool, ignored: &[RefusalId]) -> Result<Outcome> {
    ensure!(rustix::process::geteuid().is_root(), "must be root to look at the mounts as the agent does");
    let checks = Checks::run(paths, ignored).await;
    if json {
        say::out(serde_json::to_string_pretty(&checks)?);
    } else {
        checks.lines().iter().for_each(say::out);
    }
    Ok(checks.outcome())
}
