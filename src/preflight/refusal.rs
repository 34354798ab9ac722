//! The reasons not to switch, with their messages and stable names.

use super::elf::Machine;
use support::human_bytes;

/// One reason not to switch.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// A system call that the switch is made of is missing.
    #[error("this kernel lacks {feature}; boot a bootimage with Linux {since} or later")]
    OldKernel {
        /// What is missing.
        feature: &'static str,
        /// The first version that has it.
        since: &'static str,
    },
    /// The kernel has no overlay file system.
    #[error("this kernel has no overlay file system; load or enable overlay")]
    NoOverlay,
    /// The daemon has not the right to mount.
    #[error("the daemon may not mount (no CAP_SYS_ADMIN); run it with the unit that is shipped")]
    NotAllowed,
    /// The overlay would lie on too many others.
    #[error(
        "the booted /usr is already made of {} stacked overlays ({}) and the kernel allows one more on at most 1; {}",
        layers.len(), layers.join(" over "), too_deep_remedy(layers)
    )]
    TooDeep {
        /// The mounts that are stacked, topmost first, as mount tables name them.
        layers: Vec<String>,
    },
    /// The kernel refuses the overlay for a reason of its own.
    #[error("the kernel cannot lay an overlay over /usr: {0}; use a bootimage with /usr on another file system")]
    NotStackable(String),
    /// `/usr` is on an overlay with an upper layer.
    #[error(
        "cannot tell what /usr holds: the overlay {source_name:?} makes it writable; reboot without `ostree admin unlock` \
         (`bootc usr-overlay`, `rpm-ostree usroverlay`) and without `transient = true` under [root] in \
         /etc/ostree/prepare-root.conf"
    )]
    Unlocked {
        /// Source in the mount table.
        source_name: String,
    },
    /// The booted kernel's modules are on a mount that the switch would hide.
    #[error(
        "cannot keep the modules of the running kernel: {0} is a mount point, which the new /usr would hide; unmount it"
    )]
    ModulesMounted(String),
    /// Something every node image has is missing from this one.
    #[error("the node image lacks /usr/{path}, which every bootable system has; use another node image")]
    Missing {
        /// Relative to `/usr`.
        path: &'static str,
    },
    /// os-release says nothing.
    #[error("the node image's /usr/lib/os-release does not name a system (no ID=); use another node image")]
    OsRelease,
    /// Its programs are for other machines.
    #[error("the node image is built for {image} and this machine is {here}; use the node image for {here}")]
    Architecture {
        /// What the image's programs need.
        image: Machine,
        /// What this program was built for.
        here: Machine,
    },
    /// The commit contradicts itself.
    #[error("the node image's commit says {0}; use another node image")]
    Metadata(String),
    /// Too little memory, or room, for what is still to be done.
    #[error(
        "too little {}: {} are needed ({}) and {} are free; add some, or stop something that uses it",
        need.what, human_bytes(need.sum()), need.parts(), human_bytes(need.free)
    )]
    TooLittle {
        /// The numbers.
        need: Need,
    },
    /// A program of the new tree does not run here.
    #[error("{0}; the node image does not run on this machine (another CPU, or a broken C library?)")]
    Trial(String),
    /// A login would no longer be possible; holds the words of its `sshd -t`.
    #[error(
        "the node image's sshd does not take this machine's configuration or host keys, as the running one does, and \
         would not come up again: {0}; correct /etc/ssh so that `sshd -t` of both passes, or disable and stop sshd"
    )]
    Sshd(String),
    /// `/etc` cannot be written.
    #[error("/etc is mounted read-only; make it writable first")]
    EtcReadOnly,
    /// `/etc` itself cannot be changed.
    #[error("cannot merge /etc: the directory is immutable or append-only; run `chattr -i -a /etc`")]
    EtcLocked,
    /// The kernel checks each access through the new overlay against the domain that mounted it, too.
    #[error(
        "the node image's SELinux policy does not know {context}, in which this agent runs: once that policy is loaded, \
         the kernel would deny every access to the new /usr; run the agent in a domain that both policies have \
         (install_t), or add it to the node image's policy (packaging/selinux and docs/selinux.md of node-image-pivot)"
    )]
    Domain {
        /// Of this process.
        context: String,
    },
    /// Conflicts, and the strategy is to fail.
    #[error("{0}")]
    Conflicts(String),
}

impl Refusal {
    /// Returns the stable name of the check, for `error.refusals[].id` in the status document.
    pub fn id(&self) -> &'static str {
        match self {
            Self::OldKernel { .. } => "old-kernel",
            Self::NoOverlay => "no-overlay",
            Self::NotAllowed => "not-allowed",
            Self::TooDeep { .. } => "too-deep",
            Self::NotStackable(_) => "not-stackable",
            Self::Unlocked { .. } => "unlocked",
            Self::ModulesMounted(_) => "modules-mounted",
            Self::Missing { .. } => "missing",
            Self::OsRelease => "os-release",
            Self::Architecture { .. } => "architecture",
            Self::Metadata(_) => "metadata",
            Self::TooLittle { .. } => "too-little",
            Self::Trial(_) => "trial",
            Self::Sshd(_) => "sshd",
            Self::EtcReadOnly => "etc-read-only",
            Self::EtcLocked => "etc-locked",
            Self::Domain { .. } => "domain",
            Self::Conflicts(_) => "conflicts",
        }
    }
}

fn too_deep_remedy(layers: &[String]) -> &'static str {
    match layers.first().map(String::as_str) {
        Some("sysext") => {
            "run `systemd-sysext unmerge`; the extensions cannot be merged again as long as the node image's /usr is in place"
        }
        _ => "unmount the topmost one, or use a bootimage without it",
    }
}

/// All the reasons, none of them hidden by another.
#[derive(Debug)]
pub struct Refusals(pub Vec<Refusal>);

/// The result of a check: reasons against the switch, and warnings, a line each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Reasons not to switch.
    pub refusals: Vec<Refusal>,
    /// Facts that an administrator should know and that do not prevent the switch.
    pub warnings: Vec<String>,
}

/// What is needed and what is free, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Of what: `memory`, or room on a file system.
    pub what: String,
    /// Named parts of what is needed.
    pub parts: Vec<(&'static str, u64)>,
    /// What is free.
    pub free: u64,
}

impl Need {
    /// All parts together.
    pub fn sum(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn parts(&self) -> String {
        let part = |(name, bytes): &(&str, u64)| format!("{} {name}", human_bytes(*bytes));
        self.parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    /// The refusal, if it is too little.
    pub fn check(self) -> Option<Refusal> {
        (self.sum() > self.free).then_some(Refusal::TooLittle { need: self })
    }
}
