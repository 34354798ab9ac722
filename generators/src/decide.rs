//! Decides, as a pure function of facts, if this boot is redirected.

use boot_config::Mode;
use std::path::{Path, PathBuf};

use crate::installer::Installer;
use crate::kmsg::Level;
use boot_config::target::{DefaultLink, DefaultTarget, Origin};

/// The output directory for the redirect.
///
/// The redirect has the same priority as the `default.target` that it replaces. With a higher priority it would also
/// override another generator that redirects this boot, for example an installer's. Generators run concurrently, so none
/// of them sees the complete output of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Normal output. It has priority over `/usr`. Another generator may replace the link.
    Normal,
    /// Early output. It has priority over `/etc`, which has priority over the normal output of generators.
    Early,
}

/// The facts that the decision depends on. A fact that was not gathered has its default value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// True if the generator runs in the initramfs, which has other targets.
    pub in_initrd: bool,
    /// True if the switch was made in this root since power on.
    pub pivoted: bool,
    /// True if systemd has booted to another target, and this run is caused by a reload.
    pub booted: bool,
    /// Error of the command line or of a drop-in file.
    pub unclear: Option<String>,
    /// The configured mode.
    pub mode: Mode,
    /// The unit to boot to by the kernel command line.
    pub unit: Option<String>,
    /// The argument that makes another generator redirect this boot.
    pub other_generator: Option<&'static str>,
    /// True if an offline update is pending, whose generator redirects this boot.
    pub update_pending: bool,
    /// The unit that `default.target` stands for.
    pub default_target: DefaultLink,
    /// A masked unit that the pivot target requires, or the masked target to isolate in the end.
    pub masked: Option<String>,
    /// The unit file of `node-image-pivot.target`.
    pub pivot_target: Option<PathBuf>,
    /// The probe path that exists.
    pub binary: Option<PathBuf>,
    /// True if a node image or release image is configured.
    pub image: bool,
    /// The valid `target` of the configuration or the command line.
    pub target: Option<String>,
    /// The enabled services that bring up the network and the time.
    pub services: Vec<&'static str>,
    /// An installer's own units in `/etc`.
    pub installer: Option<Installer>,
    /// True if the agent has been started in this boot.
    pub started: bool,
    /// The unit file of the agent, if the system's repo has trees of an earlier boot.
    pub cleaner: Option<PathBuf>,
}

/// The decision about this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Boot to the pivot target, and pass the original target to the agent.
    Redirect {
        /// The output directory for the link.
        place: Place,
        /// The unit file to link `default.target` to.
        pivot_target: PathBuf,
        /// The target to isolate after the pivot.
        original: String,
        /// Services that the pull needs and that nothing else starts before `original`.
        services: Vec<&'static str>,
    },
    /// Leave the boot unchanged.
    Leave(Reason),
}

/// The reason for leaving the boot unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The generator runs in the initramfs.
    #[error("this is the initramfs")]
    InInitrd,
    /// The switch was already made.
    #[error("the pivot was already made")]
    AlreadyPivoted,
    /// The boot is over.
    #[error("the boot is over")]
    Booted,
    /// The configuration is invalid or unreadable.
    #[error("{0}")]
    Unclear(String),
    /// The mode is `off`.
    #[error("node-image-pivot=off")]
    Off,
    /// The kernel command line names this unit.
    #[error("the kernel command line requests {0}")]
    ExplicitUnit(String),
    /// This argument makes another generator redirect the boot.
    #[error("{0} on the kernel command line makes another generator redirect it")]
    OtherGenerator(&'static str),
    /// An offline update is pending.
    #[error("an offline system update is pending")]
    UpdatePending,
    /// `default.target` is masked.
    #[error("default.target is masked")]
    DefaultMasked,
    /// This unit is masked.
    #[error("{0} is masked")]
    Masked(String),
    /// The pivot target is missing or masked.
    #[error("node-image-pivot.target is missing or masked")]
    NoPivotTarget,
    /// The system is not base-only: this path exists.
    #[error("{0} exists")]
    HasBinary(PathBuf),
    /// No image is configured.
    #[error(
        "no node image is configured (image, release_image, or node-image-pivot.image= on the kernel command line)"
    )]
    NoImage,
}

impl Reason {
    /// Returns the log level of the reason, or `None` if it is not logged.
    pub fn level(&self) -> Option<Level> {
        match self {
            Reason::InInitrd | Reason::AlreadyPivoted => None,
            // These reasons occur at every daemon-reload of every cluster node.
            Reason::HasBinary(_) | Reason::Booted => Some(Level::Debug),
            Reason::Unclear(_) => Some(Level::Warning),
            _ => Some(Level::Info),
        }
    }
}

/// Returns the unit file of the agent if this boot must start it to remove the trees of an earlier boot.
pub fn cleaner(facts: &Facts) -> Option<&Path> {
    let is_permitted = facts.mode != Mode::Off && facts.masked.is_none() && !facts.started;
    facts.cleaner.as_deref().filter(|_| is_permitted)
}

/// Returns the agent's unit files that take the place of an installer's.
///
/// This does not depend on the redirect: an installer may write its files to a running system, and starts the units
/// itself. Once the agent has been started, the units must stay the agent's: their jobs may wait for it.
pub fn taken_over(facts: &Facts) -> &[PathBuf] {
    let can_work = facts.pivot_target.is_some() && facts.masked.is_none();
    let permitted = facts.pivoted || facts.started || facts.unclear.is_none() && facts.mode != Mode::Off && can_work;
    facts.installer.as_ref().filter(|_| permitted).map_or(&[], |installer| &installer.hidden)
}

/// Decides about this boot. The order of the conditions affects only which reason is reported.
pub fn decide(facts: Facts) -> Decision {
    let mode = facts.mode;
    let installer_redirects = facts.installer.is_some_and(|installer| installer.redirects);
    let leave = if facts.in_initrd {
        Reason::InInitrd
    } else if facts.pivoted {
        Reason::AlreadyPivoted
    } else if facts.booted {
        Reason::Booted
    } else if let Some(what) = facts.unclear {
        // The unreadable part could contain `mode = "off"`.
        Reason::Unclear(what)
    } else if mode == Mode::Off {
        Reason::Off
    } else if let Some(unit) = facts.unit.filter(|unit| unit != "default.target") {
        Reason::ExplicitUnit(unit)
    } else if let Some(argument) = facts.other_generator {
        Reason::OtherGenerator(argument)
    } else if facts.update_pending {
        Reason::UpdatePending
    } else if let Some(path) = facts.binary.filter(|_| mode == Mode::Auto) {
        Reason::HasBinary(path)
    } else if !facts.image && !installer_redirects {
        // Also with `force`: without an image, the boot would wait in the pivot target indefinitely. In the assisted
        // flow, where the image is known only later, an installer starts the units.
        Reason::NoImage
    } else {
        match (facts.default_target.target, facts.pivot_target, facts.masked) {
            (DefaultTarget::Masked, _, _) => Reason::DefaultMasked,
            (_, None, _) => Reason::NoPivotTarget,
            (_, _, Some(unit)) => Reason::Masked(unit),
            (DefaultTarget::Name(name), Some(pivot_target), None) => {
                let original = facts.target.unwrap_or(name);
                let place = match facts.default_target.origin {
                    // The installer's generator links `default.target` in the normal directory.
                    _ if installer_redirects => Place::Early,
                    Origin::Administrator => Place::Early,
                    Origin::Vendor | Origin::Generator => Place::Normal,
                };
                return Decision::Redirect { place, pivot_target, original, services: facts.services };
            }
        }
    };
    Decision::Leave(leave)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn default(origin: Origin) -> DefaultLink {
        DefaultLink { target: DefaultTarget::Name("graphical.target".into()), origin }
    }

    fn base_only() -> Facts {
        Facts {
            default_target: default(Origin::Vendor),
            pivot_target: Some("/p".into()),
            image: true,
            services: vec!["n.service"],
            ..Facts::default()
        }
    }

    fn installer(redirects: bool) -> Option<Installer> {
        Some(Installer { hidden: vec!["/u/node-image-pull.service".into()], redirects })
    }

    #[test]
    fn each_fact_gives_its_decision() {
        let placed = |original: &str, place| Decision::Redirect {
            place,
            pivot_target: "/p".into(),
            original: original.into(),
            services: vec!["n.service"],
        };
        let redirect = |original: &str| placed(original, Place::Normal);
        let masked = DefaultLink { target: DefaultTarget::Masked, origin: Origin::Administrator };
        let oc = || Some(PathBuf::from("/usr/bin/oc"));
        let leave = Decision::Leave;
        for (facts, expected) in [
            (base_only(), redirect("graphical.target")),
            (
                Facts { default_target: default(Origin::Administrator), ..base_only() },
                placed("graphical.target", Place::Early),
            ),
            (Facts { target: Some("a.target".into()), ..base_only() }, redirect("a.target")),
            (Facts { booted: true, mode: Mode::Force, ..base_only() }, leave(Reason::Booted)),
            (
                Facts { other_generator: Some("systemd.run="), mode: Mode::Force, ..base_only() },
                leave(Reason::OtherGenerator("systemd.run=")),
            ),
            (
                Facts { masked: Some("node-image-pull.service".into()), ..base_only() },
                leave(Reason::Masked("node-image-pull.service".into())),
            ),
            (Facts { mode: Mode::Force, binary: oc(), ..base_only() }, redirect("graphical.target")),
            (Facts { unit: Some("default.target".into()), ..base_only() }, redirect("graphical.target")),
            (Facts { in_initrd: true, unclear: Some("x".into()), ..base_only() }, leave(Reason::InInitrd)),
            (Facts { pivoted: true, mode: Mode::Force, ..base_only() }, leave(Reason::AlreadyPivoted)),
            (Facts { unclear: Some("x".into()), ..base_only() }, leave(Reason::Unclear("x".into()))),
            (Facts { mode: Mode::Off, ..base_only() }, leave(Reason::Off)),
            (
                Facts { mode: Mode::Force, unit: Some("rescue.target".into()), ..base_only() },
                leave(Reason::ExplicitUnit("rescue.target".into())),
            ),
            (Facts { update_pending: true, ..base_only() }, leave(Reason::UpdatePending)),
            (Facts { binary: oc(), ..base_only() }, leave(Reason::HasBinary(oc().unwrap()))),
            (Facts { image: false, ..base_only() }, leave(Reason::NoImage)),
            (Facts { image: false, mode: Mode::Force, ..base_only() }, leave(Reason::NoImage)),
            (Facts { default_target: masked, ..base_only() }, leave(Reason::DefaultMasked)),
            (Facts { pivot_target: None, ..base_only() }, leave(Reason::NoPivotTarget)),
            // The installer's script names the image, and its generator redirects the boot.
            (
                Facts { image: false, installer: installer(true), ..base_only() },
                placed("graphical.target", Place::Early),
            ),
            (Facts { image: false, installer: installer(false), ..base_only() }, leave(Reason::NoImage)),
            (Facts { installer: installer(false), ..base_only() }, redirect("graphical.target")),
            (Facts { mode: Mode::Off, installer: installer(true), ..base_only() }, leave(Reason::Off)),
            (
                Facts { binary: oc(), installer: installer(true), ..base_only() },
                leave(Reason::HasBinary(oc().unwrap())),
            ),
        ] {
            assert_eq!(decide(facts.clone()), expected, "{facts:?}");
        }
    }

    #[test]
    fn units_of_an_installer_are_taken_over_unless_the_agent_is_off() {
        let installers = || Facts { installer: installer(true), ..base_only() };
        for (facts, expected) in [
            (base_only(), false),
            (installers(), true),
            (Facts { installer: installer(false), image: false, ..installers() }, true),
            (Facts { booted: true, ..installers() }, true),
            (Facts { mode: Mode::Off, ..installers() }, false),
            (Facts { mode: Mode::Off, booted: true, ..installers() }, false),
            (Facts { unclear: Some("x".into()), ..installers() }, false),
            (Facts { masked: Some("node-image-pivotd.service".into()), ..installers() }, false),
            (Facts { pivot_target: None, ..installers() }, false),
            // The units have run, whatever the configuration says now.
            (Facts { pivoted: true, pivot_target: None, ..installers() }, true),
            (Facts { started: true, mode: Mode::Off, ..installers() }, true),
            (Facts { started: true, unclear: Some("x".into()), ..installers() }, true),
            (Facts { started: true, ..base_only() }, false),
            (Facts { in_initrd: true, ..base_only() }, false),
        ] {
            assert_eq!(!taken_over(&facts).is_empty(), expected, "{facts:?}");
        }
    }
}
