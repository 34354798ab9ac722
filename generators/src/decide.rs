//! The decision, as a pure function: facts in, decision out.

use boot_config::Mode;
use std::fmt;
use std::path::PathBuf;

use crate::kmsg::Level;
use boot_config::target::{DefaultLink, DefaultTarget, Origin};

/// The directory of generator output that the redirect goes to.
///
/// The redirect has the strength of the `default.target` that it replaces. A stronger one would also override another
/// generator that redirects this boot, such as an installer's: the generators run at the same time, so none of
/// them sees all that the others write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Ordinary output. Wins over `/usr`; another generator may replace the link.
    Normal,
    /// Early output. Wins over `/etc`, whose default wins over ordinary output of any generator.
    Early,
}

/// All that the decision depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The generator runs in the initramfs, which has its own targets.
    pub in_initrd: bool,
    /// The switch has been made in this root since power on.
    pub pivoted: bool,
    /// The manager has booted to another target; this is a reload.
    pub booted: bool,
    /// The command line or a drop-in file cannot be understood.
    pub unclear: Option<String>,
    /// `off`, `auto` or `force`.
    pub mode: Mode,
    /// The unit that the kernel command line names.
    pub unit: Option<String>,
    /// The argument by which another generator redirects this boot.
    pub other_generator: Option<&'static str>,
    /// An offline update is pending; its generator redirects this boot.
    pub update_pending: bool,
    /// The unit that `default.target` stands for.
    pub default_target: DefaultLink,
    /// A masked unit without which the boot would not get through the pivot target.
    pub masked: Option<String>,
    /// The unit file of `node-image-pivot.target`.
    pub pivot_target: Option<PathBuf>,
    /// The probe path that was found.
    pub binary: Option<PathBuf>,
    /// A node image or release image is configured.
    pub image: bool,
    /// `target` from the configuration or the command line, checked.
    pub target: Option<String>,
    /// The enabled services that bring up the network and the time.
    pub services: Vec<&'static str>,
}

/// The decision about this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Boot to the pivot target, and remember where the boot would have gone.
    Redirect {
        /// The directory for the link.
        place: Place,
        /// The unit file to link `default.target` to.
        pivot_target: PathBuf,
        /// The target to isolate to in the end.
        original: String,
        /// Services that the pull needs and that nothing else starts before `original`.
        services: Vec<&'static str>,
    },
    /// Leave the boot alone.
    Leave(Reason),
}

/// The reason for leaving the boot alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// In the initramfs.
    InInitrd,
    /// The switch has been made.
    AlreadyPivoted,
    /// The boot is over.
    Booted,
    /// The configuration cannot be understood.
    Unclear(String),
    /// Mode off.
    Off,
    /// The kernel command line names this unit.
    ExplicitUnit(String),
    /// Another generator redirects the boot, because of this argument.
    OtherGenerator(&'static str),
    /// An offline update comes first.
    UpdatePending,
    /// `default.target` is masked.
    DefaultMasked,
    /// This unit is masked.
    Masked(String),
    /// The pivot target is not there, or masked.
    NoPivotTarget,
    /// This system is not base-only.
    HasBinary(PathBuf),
    /// There is nothing to pivot to.
    NoImage,
}

impl Reason {
    /// Returns the level to log the reason at; `None` where it is not worth a line.
    pub fn level(&self) -> Option<Level> {
        match self {
            Reason::InInitrd | Reason::AlreadyPivoted => None,
            // Every daemon-reload of every cluster node comes this way.
            Reason::HasBinary(_) | Reason::Booted => Some(Level::Debug),
            Reason::Unclear(_) => Some(Level::Warning),
            _ => Some(Level::Info),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::InInitrd => f.write_str("this is the initramfs"),
            Reason::AlreadyPivoted => f.write_str("the pivot has been made"),
            Reason::Unclear(what) => f.write_str(what),
            Reason::Booted => f.write_str("the boot is over"),
            Reason::Off => f.write_str("node-image-pivot=off"),
            Reason::ExplicitUnit(unit) => write!(f, "the kernel command line asks for {unit}"),
            Reason::OtherGenerator(argument) => {
                write!(f, "{argument} on the kernel command line, for another generator")
            }
            Reason::UpdatePending => f.write_str("an offline system update is pending"),
            Reason::DefaultMasked => f.write_str("default.target is masked"),
            Reason::Masked(unit) => write!(f, "{unit} is masked"),
            Reason::NoPivotTarget => f.write_str("node-image-pivot.target is missing or masked"),
            Reason::HasBinary(path) => write!(f, "{} exists", path.display()),
            Reason::NoImage => f.write_str(
                "no node image is configured (image, release_image, or node-image-pivot.image= on the kernel command line)",
            ),
        }
    }
}

/// Decides. The order matters only for which reason is given.
pub fn decide(facts: Facts) -> Decision {
    let mode = facts.mode;
    let leave = if facts.in_initrd {
        Reason::InInitrd
    } else if facts.pivoted {
        Reason::AlreadyPivoted
    } else if facts.booted {
        Reason::Booted
    } else if let Some(what) = facts.unclear {
        // Half a configuration could say "off" in the half that is lost.
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
    } else if !facts.image {
        // Not even with force: the machine would wait in the pivot target for something that never
        // comes. Where the image is known only later (assisted flow), an installer starts the units.
        Reason::NoImage
    } else {
        match (facts.default_target.target, facts.pivot_target, facts.masked) {
            (DefaultTarget::Masked, _, _) => Reason::DefaultMasked,
            (_, None, _) => Reason::NoPivotTarget,
            (_, _, Some(unit)) => Reason::Masked(unit),
            (DefaultTarget::Name(name), Some(pivot_target), None) => {
                let original = facts.target.unwrap_or(name);
                let place = match facts.default_target.origin {
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
            in_initrd: false,
            pivoted: false,
            booted: false,
            unclear: None,
            mode: Mode::Auto,
            unit: None,
            other_generator: None,
            update_pending: false,
            default_target: default(Origin::Vendor),
            masked: None,
            pivot_target: Some("/p".into()),
            binary: None,
            image: true,
            target: None,
            services: vec!["n.service"],
        }
    }

    #[test]
    fn table() {
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
        ] {
            assert_eq!(decide(facts.clone()), expected, "{facts:?}");
        }
    }
}
