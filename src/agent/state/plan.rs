//! The plan of the switch as a document, which `plan --json` prints. It is stored beside the record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{FileStep, LiveStep, StateFile, SwitchStep};
use crate::host::AddedAccounts;
use crate::preflight::{Need, PackageChanges};
use etc_merge::Class;
use node_store::image::{ImageChoice, PullSpec};
use node_store::store::ObjectId;
use overlay_root::Base;
use overlay_root::delta::DeltaCounts;
use support::human_bytes;
use unit_refresh::Action;

/// The answer to a call of `plan`. `schema` changes only if a field is removed or changes its meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanDocument {
    /// Version of this document: 1.
    pub schema: u32,
    /// `staged`, with a plan, or `nothing-to-do` or `switched`, without one.
    pub state: String,
    /// Reason for `nothing-to-do`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Changes that the switch would make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<SwitchPlan>,
}

/// Changes that the switch would make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchPlan {
    /// The image, by digest.
    pub image: PullSpec,
    /// Choice of the image in the release payload, if one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_choice: Option<ImageChoice>,
    /// Its ostree commit.
    pub commit: ObjectId,
    /// The booted commit, if it is known.
    pub booted_commit: Option<ObjectId>,
    /// Files that `/usr` gains, loses and changes.
    pub usr: DeltaCounts,
    /// The way in which the new `/usr` replaces the booted one.
    pub base: Base,
    /// Figures of the complete tree, if the new `/usr` is not an overlay. It needs `copied_bytes`, and an
    /// inode for each of `directories` and `copied`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub complete: Option<DeltaCounts>,
    /// Changed packages, if both sides have a readable package database.
    pub packages: Option<PackageChanges>,
    /// Changes of `/etc`.
    pub etc: EtcPlan,
    /// Users and groups that only the node image's passwd and group files have.
    pub accounts: AddedAccounts,
    /// Actions for changed units, and the units that the isolation starts in addition.
    pub units: Vec<Action>,
    /// Memory that the switch and the refresh still need.
    pub memory: MemoryPlan,
    /// Warnings of pull and stage.
    pub warnings: Vec<String>,
}

/// Changes of `/etc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcPlan {
    /// Decisions by class.
    pub counts: BTreeMap<Class, usize>,
    /// Every path on which the booted defaults, the node image's defaults and `/etc` do not agree.
    pub decisions: Vec<etc_merge::Decision>,
}

/// Bytes of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Bytes that the switch and the refresh still need, by purpose.
    pub needed: BTreeMap<String, u64>,
    /// Sum of the bytes needed.
    pub needed_bytes: u64,
    /// Bytes available at the time of the plan.
    pub available_bytes: u64,
}

impl From<&Need> for MemoryPlan {
    fn from(need: &Need) -> Self {
        let needed = need.parts.iter().map(|(purpose, bytes)| ((*purpose).to_owned(), *bytes)).collect();
        Self { needed, needed_bytes: need.sum(), available_bytes: need.free }
    }
}

impl From<&etc_merge::Plan> for EtcPlan {
    fn from(plan: &etc_merge::Plan) -> Self {
        let counts = Class::ALL.into_iter().map(|class| (class, plan.count(class))).collect();
        Self { counts, decisions: plan.decisions.clone() }
    }
}

impl StateFile for SwitchPlan {
    const NAME: &'static str = "plan.json";
    const SUBJECT: &'static str = "the plan of the switch";
    const REMEDY: &'static str = "run pull again";
}

impl StateFile for etc_merge::Plan {
    const NAME: &'static str = "etc-plan.json";
    const SUBJECT: &'static str = "the plan for /etc";
    const REMEDY: &'static str = "run pull again, or undo after a switch";
}

impl PlanDocument {
    /// Returns a document without a plan.
    pub(in crate::agent) fn without_plan(state: &str, reason: Option<String>) -> Self {
        Self { schema: 1, state: state.to_owned(), reason, plan: None }
    }

    /// Returns the document of a staged plan.
    pub(in crate::agent) fn staged(plan: SwitchPlan) -> Self {
        Self { schema: 1, state: "staged".to_owned(), reason: None, plan: Some(plan) }
    }

    /// Returns the document as lines of text.
    pub fn lines(&self) -> Vec<String> {
        match (&self.plan, self.state.as_str(), &self.reason) {
            (Some(plan), ..) => plan.lines(),
            (None, "switched", _) => vec!["already switched".to_owned()],
            (None, _, reason) => vec![format!("nothing to do: {}", reason.as_deref().unwrap_or_default())],
        }
    }
}

impl SwitchPlan {
    /// Returns lines about the image, `/usr` and `/etc`, for the journal and the status.
    pub(in crate::agent) fn summary(&self) -> Vec<String> {
        [vec![self.image_line()], self.usr_lines(), self.etc_lines()].concat()
    }

    fn lines(&self) -> Vec<String> {
        let mut lines: Vec<_> = SwitchStep::all().flat_map(|step| self.lines_of(step)).collect();
        lines.push(format!(
            "memory: {} needed, {} available",
            human_bytes(self.memory.needed_bytes),
            human_bytes(self.memory.available_bytes)
        ));
        lines.extend(self.warnings.iter().map(|line| format!("warning: {line}")));
        lines
    }

    /// Returns the changes that a step makes.
    fn lines_of(&self, step: SwitchStep) -> Vec<String> {
        match step {
            SwitchStep::File(FileStep::Ref) => {
                std::iter::once(self.image_line()).chain(self.image_choice.iter().map(ToString::to_string)).collect()
            }
            SwitchStep::File(FileStep::Usr) => [self.usr_lines(), self.package_lines()].concat(),
            SwitchStep::File(FileStep::Etc) => self.etc_lines(),
            SwitchStep::Live(LiveStep::Files) => self.accounts.line().into_iter().collect(),
            SwitchStep::Live(LiveStep::Units) => {
                let changes = self.units.iter().filter(|one| one.class != unit_refresh::Class::None);
                changes.map(|one| format!("unit: {} {} ({})", one.class.as_str(), one.unit, one.reason)).collect()
            }
            // The merge of /etc decides about the policy, and the files of /usr about systemd.
            SwitchStep::File(FileStep::Marker) | SwitchStep::Live(LiveStep::Policy | LiveStep::Manager) => Vec::new(),
        }
    }

    fn image_line(&self) -> String {
        format!("node image {} (commit {})", self.image, self.commit)
    }

    fn usr_lines(&self) -> Vec<String> {
        let usr = &self.usr;
        let mut lines = vec![format!(
            "/usr: {} files added ({}), {} changed ({}, before {}), {} removed ({})",
            usr.added,
            human_bytes(usr.added_bytes),
            usr.changed,
            human_bytes(usr.changed_bytes),
            human_bytes(usr.replaced_bytes),
            usr.removed,
            human_bytes(usr.removed_bytes)
        )];
        lines.push(format!("/usr: {}", self.base));
        lines.extend(self.complete.as_ref().map(DeltaCounts::cost));
        lines
    }

    fn package_lines(&self) -> Vec<String> {
        let unknown = || vec!["packages: unknown, because no package database can be read".to_owned()];
        self.packages.as_ref().map_or_else(unknown, package_lines)
    }

    fn etc_lines(&self) -> Vec<String> {
        let count = |class: &Class| format!("{} {class}", self.etc.counts.get(class).copied().unwrap_or_default());
        let counts: Vec<_> = Class::ALL.iter().map(count).collect();
        let mut lines = vec![format!("/etc: {}; diff-etc shows what changes", counts.join(", "))];
        let conflicts = self.etc.decisions.iter().filter(|decision| decision.class == Class::Conflict);
        lines
            .extend(conflicts.map(|one| format!("/etc: conflict: {} ({}); the local one stays", one.path, one.reason)));
        lines
    }
}

fn package_lines(packages: &PackageChanges) -> Vec<String> {
    let PackageChanges { added, removed, changed } = packages;
    let mut lines =
        vec![format!("packages: {} added, {} changed, {} removed", added.len(), changed.len(), removed.len())];
    lines.extend(added.iter().map(|package| format!("  + {} {}", package.name, package.version)));
    lines.extend(changed.iter().map(|package| format!("  ! {} {} -> {}", package.name, package.from, package.to)));
    lines.extend(removed.iter().map(|package| format!("  - {} {}", package.name, package.version)));
    let names = added.iter().chain(removed).map(|package| &package.name).chain(changed.iter().map(|one| &one.name));
    if names.into_iter().any(|name| is_kernel(name)) {
        lines.push("packages: the running kernel and its modules in /usr/lib/modules stay".into());
    }
    lines
}

/// Returns true for packages that hold a kernel or its modules, by the names that rpm and Debian distributions use.
fn is_kernel(name: &str) -> bool {
    let rpm = name.strip_prefix("kernel").is_some_and(|rest| match rest.rsplit_once('-') {
        None => rest.is_empty(),
        Some((_, last)) => ["core", "modules", "extra", "internal", "virt", "rt", "64k"].contains(&last),
    });
    rpm || ["linux-image-", "linux-modules-"].iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{staged, survives_every_damage};
    use super::*;
    use crate::preflight::{Package, PackageChange};

    fn plan() -> SwitchPlan {
        let package = |name: &str| Package { name: name.into(), version: "1".into() };
        let decision =
            etc_merge::Decision { path: "x".into(), class: Class::Conflict, reason: "changed on both sides".into() };
        SwitchPlan {
            image: staged().pulled.image.pinned,
            image_choice: Some(ImageChoice { tag: "rhel-coreos".into(), reason: "the booted system is el9".into() }),
            commit: ObjectId::default(),
            booted_commit: None,
            usr: DeltaCounts { added: 2, added_bytes: 2048, ..DeltaCounts::default() },
            base: Base::default(),
            complete: None,
            packages: Some(PackageChanges {
                added: vec![package("new")],
                removed: vec![package("old")],
                changed: vec![PackageChange { name: "p".into(), from: "1".into(), to: "2".into() }],
            }),
            etc: EtcPlan { counts: BTreeMap::from([(Class::Conflict, 1)]), decisions: vec![decision] },
            accounts: AddedAccounts { users: vec!["u".into()], groups: Vec::new() },
            units: vec![Action::new("a.service", unit_refresh::Class::Restart, "r")],
            memory: MemoryPlan { needed: BTreeMap::new(), needed_bytes: 1 << 20, available_bytes: 1 << 30 },
            warnings: vec!["w".into()],
        }
    }

    #[test]
    fn the_plan_is_readable_as_lines() {
        let lines = PlanDocument::staged(plan()).lines();
        assert_eq!(
            lines[1..],
            [
                "the node image is rhel-coreos of the release payload: the booted system is el9",
                "/usr: 2 files added (2.0 KiB), 0 changed (0 B, before 0 B), 0 removed (0 B)",
                "/usr: an overlay over /usr",
                "packages: 1 added, 1 changed, 1 removed",
                "  + new 1",
                "  ! p 1 -> 2",
                "  - old 1",
                "/etc: 0 updated, 0 converged, 0 local, 1 conflict; diff-etc shows what changes",
                "/etc: conflict: x (changed on both sides); the local one stays",
                "/etc/passwd and /etc/group gain users u",
                "unit: restart a.service (r)",
                "memory: 1.0 MiB needed, 1.0 GiB available",
                "warning: w",
            ]
        );
        let complete =
            DeltaCounts { added: 9, directories: 4, copied: 3, copied_bytes: 4096, ..DeltaCounts::default() };
        let bound = SwitchPlan { base: Base::Bound("/usr".into()), complete: Some(complete), ..plan() };
        assert_eq!(
            PlanDocument::staged(bound).lines()[3..5],
            [
                "/usr: a complete tree, bound over /usr without an overlay",
                "/usr: the tree needs 4.0 KiB and 7 inodes: 3 of 9 files are copies, 4 directories",
            ]
        );
        let nothing = PlanDocument::without_plan("nothing-to-do", Some("/usr/bin/oc exists".into()));
        assert_eq!(nothing.lines(), ["nothing to do: /usr/bin/oc exists"]);
        assert_eq!(PlanDocument::without_plan("switched", None).lines(), ["already switched"]);
    }

    #[test]
    fn the_plan_says_that_the_running_kernel_stays() {
        for (name, expected) in [
            ("kernel", true),
            ("kernel-core", true),
            ("kernel-modules-extra", true),
            ("kernel-rt-core", true),
            ("kernel-64k", true),
            ("kernel-headers", false),
            ("kernel-tools-libs", false),
            ("kernelshark", false),
            ("linux-image-6.1.0-56-cloud-amd64", true),
            ("linux-libc-dev", false),
        ] {
            for kind in 0..3 {
                let mut packages = PackageChanges::default();
                match kind {
                    0 => packages.added = vec![Package { name: name.into(), version: "1".into() }],
                    1 => packages.removed = vec![Package { name: name.into(), version: "1".into() }],
                    _ => packages.changed = vec![PackageChange { name: name.into(), from: "1".into(), to: "2".into() }],
                }
                let said = package_lines(&packages).iter().any(|line| line.contains("the running kernel"));
                assert_eq!(said, expected, "{name} {kind}");
            }
        }
    }

    #[test]
    fn the_plan_survives_the_file() {
        survives_every_damage(&plan());
        let json = serde_json::to_value(PlanDocument::staged(plan())).unwrap();
        assert_eq!(json["plan"]["etc"]["counts"]["conflict"], 1);
        assert_eq!(json["plan"]["units"][0]["class"], "restart");
        assert_eq!(json["plan"]["packages"]["changed"][0]["to"], "2");
    }
}
