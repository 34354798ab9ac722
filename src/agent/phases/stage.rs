//! Stage: the delta tree, the `/etc` plan and every check that can refuse, before anything changes.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::Context as _;
use ostree::glib::VariantDict;
use rustix::fs::OFlags;
use tracing::{info, warn};

use crate::agent::new_usr::{ETC, USR, USR_SOURCE, composefs_image, new_etc};
use crate::agent::state::{EtcPlan, MemoryPlan, StateFile, SwitchPlan};
use crate::agent::unit_survey::{self, UnitSettings};
use crate::agent::{Error, StagedRoot, StateDir, accounts, storage, views};
use crate::config::{EtcStrategy, Settings, StoreSettings};
use crate::host::AddedAccounts;
use crate::preflight::{self, BaseChoice, Free, Need, PackageChanges, Packages, Refusal, Refusals};
use crate::report::{Phase, State, Tracker};
use etc_merge::{Change, Class, Plan};
use node_store::import::PulledImage;
use node_store::store::{NodeStore, ObjectId, ObjectType, commit_metadata};
use overlay_root::delta::{Booted, Delta, Difference, Keep};
use overlay_root::{Base, DetachedTree, Mount, Namespace};
use support::BlockSize;
use unit_refresh::Flow;

/// Parts of the phase: comparison, delta tree, plan of `/etc`, trial, accounts, units.
const PARTS: usize = 6;

/// The settings of the checks.
#[derive(Clone, Copy)]
pub(super) struct Checks {
    store: StoreSettings,
    etc_strategy: EtcStrategy,
    permits_another_system: bool,
}

impl From<&Settings> for Checks {
    fn from(settings: &Settings) -> Self {
        let permits_another_system = settings.permits_another_system();
        Self { store: settings.store, etc_strategy: settings.etc_strategy, permits_another_system }
    }
}

/// Builds the delta tree and the plans from the pulled objects, and runs all checks.
pub(super) async fn stage(
    tracker: &Tracker,
    dir: &StateDir,
    checks: Checks,
    units: &UnitSettings,
    pulled: PulledImage,
    flow: Flow,
) -> Result<StagedRoot, Error> {
    let phase = Phase::Stage;
    tracker.begin(phase);
    let (paths, shares) = (dir.clone(), tracker.clone());
    let done = move |parts| shares.share(0, parts, PARTS);
    // libostree's objects must stay on one thread.
    let blocking = tokio::task::spawn_blocking(move || blocking(&paths, pulled, checks, &done));
    let (mut staged, mut document, plan) = blocking.await.context("staging panicked")??;
    for line in document.summary() {
        info!("{line}");
        tracker.note(line);
    }
    document.image_choice = tracker.status().image_choice;
    match accounts::preview(&staged, &plan).await {
        Ok(plan) => {
            document.accounts = plan.added;
            document.warnings.extend(plan.remarks);
        }
        Err(error) => {
            document.warnings.push(format!("cannot preview the accounts that the node image adds: {error:#}"));
        }
    }
    tracker.share(0, 5, PARTS);
    match unit_survey::preview(units, &staged, plan, flow).await {
        Ok((actions, troubles)) => {
            document.units = actions;
            document.warnings.extend(troubles);
        }
        // Only a preview: the refresh plans again after the switch.
        Err(error) => document.warnings.push(format!("cannot preview the changes of units: {error:#}")),
    }
    let checksum = staged.save(&document, dir)?;
    staged.plans.insert(SwitchPlan::NAME.to_owned(), checksum);
    tracker.warn_all(document.warnings.iter().filter(|&line| !staged.pulled.warnings.contains(line)));
    tracker.end(phase, State::Pulled);
    Ok(staged)
}

/// Runs the checks that do not need the image, before the first byte is fetched. Staging runs them again. Changes nothing.
///
/// # Errors
/// A refusal with all reasons that prevent the switch.
pub(super) async fn check_machine(tracker: &Tracker) -> Result<(), Error> {
    let look = || -> Result<_, Error> { Ok(preflight::estimate(&check_system(&Namespace::init().mounts()?)?.base)) };
    let estimate = tokio::task::spawn_blocking(look).await.context("looking at the machine panicked")??;
    if let Some(line) = estimate {
        info!("{line}");
        tracker.note(line);
    }
    Ok(())
}

/// Repeats the checks whose result may have changed since an earlier call staged. Returns false if `/etc` must be planned
/// again, or if the new `/usr` has other layers now. Changes nothing.
///
/// # Errors
/// A refusal with all reasons that prevent the switch.
pub(super) async fn is_current(tracker: &Tracker, dir: &StateDir, staged: &StagedRoot) -> Result<bool, Error> {
    let (paths, staged) = (dir.clone(), staged.clone());
    let looked = tokio::task::spawn_blocking(move || look_again(&paths, &staged)).await;
    let (current, warnings) = looked.context("looking at the machine again panicked")??;
    tracker.warn_all(warnings);
    Ok(current)
}

/// Runs the checks of the kernel, the mounts of `/usr`, and `/etc`.
///
/// # Errors
/// A refusal with all reasons that prevent the switch.
pub(in crate::agent) fn check_system(mounts: &[Mount]) -> Result<BaseChoice, Error> {
    let image = || composefs_image().map_err(|error| format!("{error:#}"));
    preflight::check_system(mounts, Path::new(USR), Path::new(ETC), &image).map_err(|found| Refusals(found).into())
}

fn look_again(paths: &StateDir, staged: &StagedRoot) -> Result<(bool, Vec<String>), Error> {
    let mounts = Namespace::init().mounts()?;
    let choice = check_system(&mounts)?;
    // The switch mounts the staged base, and its image may be gone.
    if choice.base != staged.delta.base {
        return Ok((false, Vec::new()));
    }
    let tree = staged.delta.open_usr(USR_SOURCE)?;
    let plan = plan_etc(&tree, &storage::of(paths, &staged.delta)?)?;
    // A plan that is missing, damaged or not the staged one must be made again, too.
    let current =
        staged.load::<Plan>(paths).is_ok_and(|old| same_acts(&old, &plan)) && staged.load::<SwitchPlan>(paths).is_ok();
    let place = &staged.delta.directory;
    refuse(too_little(Free::at(place)?.needs(place, 0, plan.bytes(BlockSize::page()))))?;
    Ok((current, preflight::warnings(&mounts, Path::new(USR), &choice)))
}

/// Returns true if both plans do the same. Labels are not compared: a plan that was just made has none yet.
fn same_acts(one: &Plan, other: &Plan) -> bool {
    let bare = |plan: &Plan| -> Vec<Change> {
        plan.changes.iter().map(|change| Change { label: None, ..change.clone() }).collect()
    };
    let conflicts = |plan: &Plan| plan.of(Class::Conflict).map(|decision| decision.path.clone()).collect::<Vec<_>>();
    one.aside == other.aside && conflicts(one) == conflicts(other) && bare(one) == bare(other)
}

/// The delta tree, built from a commit that passed the checks.
struct CheckedTree {
    store: NodeStore,
    delta: Delta,
    /// The new `/usr`, not exposed yet.
    tree: DetachedTree,
    packages: Option<PackageChanges>,
}

/// Runs every check that can refuse, cheapest first. Returns the input of the switch, the document about it without the
/// units, and the plan for `/etc`, which is also stored. Calls `done` with the number of parts that are done.
fn blocking(
    paths: &StateDir,
    pulled: PulledImage,
    checks: Checks,
    done: &dyn Fn(usize),
) -> Result<(StagedRoot, SwitchPlan, Plan), Error> {
    let mut warnings = pulled.warnings.clone();
    let CheckedTree { store, delta, tree, packages } = check_tree(paths, &pulled, checks, &mut warnings, done)?;
    done(2);
    let (plan, memory) = plan_merge(&tree, &store, checks.etc_strategy, paths.run(), &mut warnings)?;
    done(3);
    try_out(&tree, &plan, &mut warnings)?;
    done(4);
    let document = SwitchPlan {
        image: pulled.image.pinned.clone(),
        image_choice: None,
        commit: pulled.commit,
        booted_commit: pulled.booted_commit,
        usr: delta.counts,
        base: delta.base.clone(),
        complete: delta.complete,
        packages,
        etc: EtcPlan::from(&plan),
        accounts: AddedAccounts::default(),
        units: Vec::new(),
        memory,
        warnings,
    };
    let mut staged = StagedRoot { pulled, delta, plans: BTreeMap::new() };
    let checksum = staged.save(&plan, paths)?;
    staged.plans.insert(Plan::NAME.to_owned(), checksum);
    Ok((staged, document, plan))
}

/// Checks the machine and the commit, builds the delta tree, and checks the new `/usr`.
fn check_tree(
    paths: &StateDir,
    pulled: &PulledImage,
    checks: Checks,
    warnings: &mut Vec<String>,
    done: &dyn Fn(usize),
) -> Result<CheckedTree, Error> {
    let usr = Path::new(USR);
    let mounts = Namespace::init().mounts()?;
    let choice = check_system(&mounts)?;
    warnings.extend(preflight::warnings(&mounts, usr, &choice));

    let (store, _) = storage::open(paths, checks.store).map_err(storage::refused)?;
    let metadata = metadata_of(&store, pulled.commit)?;
    refuse(check_metadata(&metadata))?;
    let booted = match pulled.booted_commit {
        Some(commit) => Booted::Commit(commit),
        None => Booted::Directory(usr),
    };
    let difference = overlay_root::delta::compare(&store, booted, pulled.commit, &Keep::default())?;
    if store.complete_build_path().exists() {
        warnings.extend(views::stale(views::Expected::Bootimage));
        store.discard_complete().context("cannot remove the complete tree of an earlier stage")?;
    }
    done(1);
    let built = build(&store, &difference, &store.delta_build_path())?;
    let complete = match &choice.base {
        Base::Bound(usr) => {
            let complete = overlay_root::delta::complete(&store, usr, pulled.commit, &Keep::default())?;
            Some(build(&store, &complete, &store.complete_build_path())?.counts)
        }
        Base::Directory(_) | Base::Composefs(_) => None,
    };
    // The build path may be a name that only this process has.
    let delta = Delta { directory: store.delta_path(), base: choice.base, complete, ..built };
    warnings.extend(delta.warnings.iter().cloned());
    warnings.extend(overlay_root::delta::outside_usr(&store, booted, pulled.commit)?);

    let tree = delta.open_usr(USR_SOURCE)?;
    refuse(preflight::check_content(tree.as_fd(), preflight::Machine::here().context("looking at this program")?))?;
    let booted_usr = etc_merge::open_dir(usr)?;
    refuse(preflight::check_local(booted_usr.as_fd(), tree.as_fd())?.into_iter().collect())?;
    let same = preflight::check_same_system(booted_usr.as_fd(), tree.as_fd(), checks.permits_another_system);
    refuse(same.refusals)?;
    warnings.extend(same.warnings);
    let packages = packages(&store, &tree, pulled, &metadata);
    Ok(CheckedTree { store, delta, tree, packages })
}

/// Builds a tree in the store if there is room for its copies.
fn build(store: &NodeStore, difference: &Difference<'_>, out: &Path) -> Result<Delta, Error> {
    let (root, free) = (store.root(), Free::at(store.root())?);
    let metadata = if free.in_memory { difference.kernel_memory() } else { 0 };
    let copies = difference.bytes_to_copy(store.block_size())?.saturating_add(metadata);
    refuse(too_little(free.needs(root, copies, 0)))?;
    Ok(difference.build(out)?)
}

/// Plans the merge of `/etc` with its labels, and checks SELinux, conflicts and the free memory that the switch needs.
fn plan_merge(
    tree: &DetachedTree,
    store: &NodeStore,
    strategy: EtcStrategy,
    scratch: &Path,
    warnings: &mut Vec<String>,
) -> Result<(Plan, MemoryPlan), Error> {
    let mut plan = plan_etc(tree, store)?;
    match preflight::label_plan(&mut plan, tree.as_fd(), scratch) {
        Ok(labelled) => info!("/etc: {labelled} of {} changes are labelled by the policy", plan.changes.len()),
        // The files of the image have labels, too.
        Err(error) => warnings.push(format!("{error:#}; new entries of /etc get the labels of the image's files")),
    }
    let selinux = preflight::check_selinux(tree.as_fd()).context("looking at SELinux")?;
    refuse(selinux.refusals)?;
    warnings.extend(selinux.warnings);
    if strategy == EtcStrategy::Fail
        && let Err(error) = etc_merge::refuse_conflicts(&plan)
    {
        refuse(vec![Refusal::Conflicts(format!("{error:#}"))])?;
    }
    let needs = Free::at(store.root())?.needs(store.root(), 0, plan.bytes(BlockSize::page()));
    let memory = MemoryPlan::from(&needs[0]);
    refuse(too_little(needs))?;
    Ok((plan, memory))
}

/// Runs programs of the new tree with a merged copy of `/etc`.
fn try_out(tree: &DetachedTree, plan: &Plan, warnings: &mut Vec<String>) -> Result<(), Error> {
    let new = new_etc(tree.as_fd())?;
    let merge =
        |etc: BorrowedFd<'_>, records: &Path| etc_merge::apply(plan, new.as_fd(), etc, &records.join("undo")).map(drop);
    let trial = preflight::check_runs(tree, &merge)?;
    refuse(trial.refusals)?;
    warnings.extend(trial.warnings);
    Ok(())
}

/// Plans the merge of the present `/etc` with the defaults of a `/usr` that is not exposed yet.
fn plan_etc(tree: &DetachedTree, store: &NodeStore) -> anyhow::Result<Plan> {
    let base = etc_merge::open_dir(Path::new("/usr/etc"))?;
    let current = etc_merge::open_dir(Path::new(ETC))?;
    let earlier = earlier_defaults(store).unwrap_or_else(|error| {
        warn!("defaults of an earlier node image in /etc count as local changes: {error:#}");
        etc_merge::Defaults::default()
    });
    etc_merge::plan(base.as_fd(), new_etc(tree.as_fd())?.as_fd(), current.as_fd(), &earlier)
}

/// Returns the defaults that merges of earlier boots took from node images.
fn earlier_defaults(store: &NodeStore) -> anyhow::Result<etc_merge::Defaults> {
    let list = store.read_etc_defaults().context("cannot read the list of earlier defaults")?;
    list.map_or_else(
        || Ok(etc_merge::Defaults::default()),
        |list| serde_json::from_slice(&list).context("the list of earlier defaults is damaged"),
    )
}

/// Returns the changes of the staged plan to `/etc`, as a unified diff. Changes nothing.
pub(in crate::agent) fn diff_etc(paths: &StateDir, staged: &StagedRoot, secrets: bool) -> Result<Vec<u8>, Error> {
    let tree = staged.delta.open_usr(USR_SOURCE)?;
    let plan = staged.load::<Plan>(paths)?;
    let current = etc_merge::open_dir(Path::new(ETC))?;
    Ok(etc_merge::diff(&plan, new_etc(tree.as_fd())?.as_fd(), current.as_fd(), secrets)?)
}

/// Returns the metadata of a commit.
fn metadata_of(store: &NodeStore, commit: ObjectId) -> anyhow::Result<VariantDict> {
    let bytes = store.load_metadata(&commit, ObjectType::Commit)?;
    commit_metadata(bytes).with_context(|| format!("the commit {commit} is malformed"))
}

fn check_metadata(metadata: &VariantDict) -> Vec<Refusal> {
    preflight::check_metadata(
        &|key| metadata.lookup::<String>(key).ok().flatten(),
        &|key| metadata.lookup::<bool>(key).ok().flatten(),
        &rustix::system::uname().machine().to_string_lossy(),
    )
}

/// Compares the packages by dpkg's database in both trees, or by rpm-ostree's list in both commits. Returns `None` if one
/// is missing. A derived image may have the list of its base.
fn packages(store: &NodeStore, tree: &DetachedTree, pulled: &PulledImage, new: &VariantDict) -> Option<PackageChanges> {
    let booted_usr = etc_merge::open_dir(Path::new(USR)).ok()?;
    if let (Some(old), Some(new)) = (dpkg_of(booted_usr.as_fd()), dpkg_of(tree.as_fd())) {
        return Some(PackageChanges::between(&old, &new));
    }
    let old = metadata_of(store, pulled.booted_commit?).ok()?;
    Some(PackageChanges::between(&preflight::rpm(&old)?, &preflight::rpm(new)?))
}

fn dpkg_of(usr: BorrowedFd<'_>) -> Option<Packages> {
    let mut text = Vec::new();
    preflight::open_in_usr(usr, preflight::DPKG_STATUS, OFlags::RDONLY).ok()?.read_to_end(&mut text).ok()?;
    Some(preflight::dpkg(&String::from_utf8_lossy(&text)))
}

fn too_little(needs: Vec<Need>) -> Vec<Refusal> {
    needs.into_iter().filter_map(Need::check).collect()
}

fn refuse(refusals: Vec<Refusal>) -> Result<(), Error> {
    if refusals.is_empty() { Ok(()) } else { Err(Refusals(refusals).into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_compared_by_what_they_do() {
        let change = |name: &str, label: &str| {
            format!(r#"{{"path":"{name}","before":null,"after":null,"content":"new"{label}}}"#)
        };
        let plan = |changes: &str, decisions: &str| -> Plan {
            let mut plan = serde_json::to_value(Plan::default()).expect("a plan");
            plan["changes"] = serde_json::from_str(&format!("[{changes}]")).expect("changes");
            plan["decisions"] = serde_json::from_str(&format!("[{decisions}]")).expect("decisions");
            serde_json::from_value(plan).expect("a plan")
        };
        let decision = |class: &str| format!(r#"{{"path":"a","class":"{class}","reason":"r"}}"#);
        let one = plan(&change("a", ""), &decision("local"));
        assert!(same_acts(&one, &plan(&change("a", r#","label":"x""#), "")), "labels and local changes do not count");
        assert!(!same_acts(&one, &plan(&change("b", ""), "")));
        assert!(!same_acts(&one, &plan(&change("a", ""), &decision("conflict"))));
    }
}
