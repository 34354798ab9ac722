//! The accounts that only the node image has: planned in stage, added in the refresh.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context as _, Result};
use tracing::info;

use super::StagedRoot;
use super::new_usr::{ETC, USR, USR_SOURCE};
use crate::host::{AccountPlan, Accounts, AddedAccounts, plan_accounts};
use etc_merge::{Origin, Plan};
use overlay_root::Namespace;

/// Plans the accounts for the staged `/usr` and the planned merge of `/etc`. Changes nothing.
pub(super) async fn preview(staged: &StagedRoot, merge: &Plan) -> Result<AccountPlan> {
    let mut changes = merge.changes.iter();
    let replaced = changes.any(|change| change.path.as_path() == Path::new(NSSWITCH) && change.content == Origin::New);
    let delta = staged.delta.clone();
    let plan = tokio::task::spawn_blocking(move || {
        let usr = Path::new(USR);
        let tree = delta.open_usr(USR_SOURCE)?;
        let new = Path::new("/proc/self/fd").join(tree.as_fd().as_raw_fd().to_string());
        let nsswitch = nsswitch(&if replaced { new.join("etc") } else { ETC.into() });
        plan_accounts(&Accounts::read(&[&usr.join("etc")])?, &new, Path::new(ETC), &nsswitch)
    });
    plan.await.context("reading accounts panicked")?
}

/// Adds the accounts that only the node image in place has. Returns them, and a line for each account that it could not
/// add or that has another id than in the image.
pub(super) async fn add() -> Result<(AddedAccounts, Vec<String>)> {
    let plan = tokio::task::spawn_blocking(|| {
        let usr = Path::new(USR);
        let booted = || Accounts::read(&[&usr.join("etc")]);
        let booted = Namespace::init().run_without(usr, USR_SOURCE, booted)?;
        plan_accounts(&booted, usr, Path::new(ETC), &nsswitch(Path::new(ETC)))
    });
    let plan = plan.await.context("reading accounts panicked")??;
    let failed = plan.apply(Path::new("/")).await;
    if let Some(line) = plan.added.line() {
        info!("{line}: only the node image has them");
    }
    Ok((plan.added, plan.remarks.into_iter().chain(failed).collect()))
}

const NSSWITCH: &str = "nsswitch.conf";

/// Returns the text of nsswitch.conf(5), empty if it cannot be read.
fn nsswitch(etc: &Path) -> String {
    fs::read_to_string(etc.join(NSSWITCH)).unwrap_or_default()
}
