//! The reasons not to switch, with their messages and stable names.

use super::elf::Machine;
use crate::report::RefusalId;
use node_store::image::System;
use support::human_bytes;

/// A reason not to switch. The message names the cause and the remedy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// The kernel lacks a system call that the switch needs.
    #[error("this kernel lacks {feature}; boot a bootimage with Linux {since} or later")]
    OldKernel {
        /// The missing system call.
        feature: &'static str,
        /// The first Linux version that has it.
        since: &'static str,
    },
    /// The kernel has no overlay file system.
    #[error("this kernel has no overlay file system; load or enable overlay")]
    NoOverlay,
    /// The daemon lacks the capability to mount.
    #[error("the daemon may not mount (no CAP_SYS_ADMIN); start it through node-image-pivotd.service")]
    NotAllowed,
    /// The overlay would exceed the kernel's limit for stacked file systems.
    #[error(
        "the kernel accepts no further overlay on the booted /usr, which already consists of stacked overlays ({}); {}",
        layers.join(" over "), too_deep_remedy(layers)
    )]
    TooDeep {
        /// Sources of the stacked mounts, as the mount table names them, topmost first.
        layers: Vec<String>,
    },
    /// The kernel refuses an overlay and a bind mount on `/usr`; holds its errors.
    #[error("the kernel refuses an overlay on /usr: {0}; use a bootimage with /usr on another file system")]
    NotStackable(String),
    /// `/usr` is on an overlay with an upper directory.
    #[error(
        "/usr may differ from the booted commit: the overlay {source_name:?} makes it writable; reboot without \
         `ostree admin unlock` (`bootc usr-overlay`, `rpm-ostree usroverlay`) and without `transient = true` under [root] \
         in /etc/ostree/prepare-root.conf"
    )]
    Unlocked {
        /// Source in the mount table.
        source_name: String,
    },
    /// The booted kernel's modules are on a mount that the switch would hide.
    #[error("the new /usr would hide the modules of the running kernel: {0} is a mount point; unmount it")]
    ModulesMounted(String),
    /// The node image has a directory in the place of the link `/usr/local`, and files of the machine are behind the link.
    #[error(
        "/usr/local is a link to {link} here and a directory in the node image: the switch would hide {file} of this \
         machine; use a node image with the link, or move such files and correct the paths of the units that use them"
    )]
    LocalHidden {
        /// Target of the link.
        link: String,
        /// One of the files.
        file: String,
    },
    /// The node image lacks a required file or directory.
    #[error("the node image lacks /usr/{path}, which every bootable system has; use another node image")]
    Missing {
        /// Relative to `/usr`.
        path: &'static str,
    },
    /// The node image's os-release lacks `ID=`.
    #[error("the node image's /usr/lib/os-release does not name a system (no ID=); use another node image")]
    OsRelease,
    /// The node image is another distribution or major release, and the configuration does not permit that.
    #[error(
        "the node image is {image} and the booted system is {booted}; configure the node image of this system, for example \
         by image_tags, or set os_mismatch = \"warn\""
    )]
    OsMismatch {
        /// The node image's system.
        image: System,
        /// The booted system.
        booted: System,
    },
    /// The node image's programs are for another machine.
    #[error("the node image is built for {image} and this machine is {here}; use the node image for {here}")]
    Architecture {
        /// Machine of the image's programs.
        image: Machine,
        /// Machine of this program.
        here: Machine,
    },
    /// The commit's metadata exclude this machine or any boot; holds the predicate of the sentence.
    #[error("the node image's commit {0}; use another node image")]
    Metadata(String),
    /// Memory or disk space is too small for the remaining steps.
    #[error(
        "too little {}: {} are needed ({}) and {} are free; add some, or stop something that uses it",
        need.what, human_bytes(need.sum()), need.parts(), human_bytes(need.free)
    )]
    TooLittle {
        /// The needed and the free bytes.
        need: Need,
    },
    /// A program of the new tree does not run on this machine; holds the command and its error.
    #[error("{0}; the node image may need another CPU, or its C library may be broken; use another node image")]
    Trial(String),
    /// The new sshd would not start; holds the output of its `sshd -t`.
    #[error(
        "the node image's sshd rejects this machine's configuration or host keys, which the running sshd accepts, and \
         would not start: {0}; correct /etc/ssh so that `sshd -t` of both passes, or disable and stop sshd"
    )]
    Sshd(String),
    /// `/etc` is on a read-only mount.
    #[error("/etc is mounted read-only; make it writable first")]
    EtcReadOnly,
    /// `/etc` itself is immutable or append-only.
    #[error("cannot merge /etc: the directory is immutable or append-only; run `chattr -i -a /etc`")]
    EtcLocked,
    /// The new policy lacks the agent's domain. The kernel checks each access through an overlay also against the domain
    /// that mounted it.
    #[error(
        "the node image's SELinux policy does not know {context}, in which this agent runs: once that policy is loaded, \
         the kernel would deny every access to the new /usr; run the agent in a domain that both policies have \
         (install_t), or add it to the node image's policy (packaging/selinux and docs/selinux.md of node-image-pivot)"
    )]
    Domain {
        /// SELinux context of this process.
        context: String,
    },
    /// `/etc` has conflicts and `etc.strategy` is `fail`; holds the list.
    #[error("{0}")]
    Conflicts(String),
}

impl Refusal {
    /// Returns the stable name of the check, for `error.refusals[].id` in the status document.
    pub fn id(&self) -> RefusalId {
        match self {
            Self::OldKernel { .. } => RefusalId::OldKernel,
            Self::NoOverlay => RefusalId::NoOverlay,
            Self::NotAllowed => RefusalId::NotAllowed,
            Self::TooDeep { .. } => RefusalId::TooDeep,
            Self::NotStackable(_) => RefusalId::NotStackable,
            Self::Unlocked { .. } => RefusalId::Unlocked,
            Self::ModulesMounted(_) => RefusalId::ModulesMounted,
            Self::LocalHidden { .. } => RefusalId::LocalHidden,
            Self::Missing { .. } => RefusalId::Missing,
            Self::OsRelease => RefusalId::OsRelease,
            Self::OsMismatch { .. } => RefusalId::OsMismatch,
            Self::Architecture { .. } => RefusalId::Architecture,
            Self::Metadata(_) => RefusalId::Metadata,
            Self::TooLittle { .. } => RefusalId::TooLittle,
            Self::Trial(_) => RefusalId::Trial,
            Self::Sshd(_) => RefusalId::Sshd,
            Self::EtcReadOnly => RefusalId::EtcReadOnly,
            Self::EtcLocked => RefusalId::EtcLocked,
            Self::Domain { .. } => RefusalId::Domain,
            Self::Conflicts(_) => RefusalId::Conflicts,
        }
    }
}

fn too_deep_remedy(layers: &[String]) -> &'static str {
    match layers.first().map(String::as_str) {
        Some("sysext") => {
            "run `systemd-sysext unmerge`; after the switch, `systemd-sysext merge` works again where the plan does not warn \
             that the kernel accepts no further overlay"
        }
        _ => "unmount the topmost one, or use a bootimage without it",
    }
}

/// All refusals of one group of checks.
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

/// Needed and free memory or disk space, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The resource as the message names it: `memory`, or space on a file system.
    pub what: String,
    /// Needed bytes by purpose.
    pub parts: Vec<(&'static str, u64)>,
    /// Free bytes.
    pub free: u64,
}

impl Need {
    /// Returns the needed bytes in total.
    pub fn sum(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn parts(&self) -> String {
        let part = |(name, bytes): &(&str, u64)| format!("{} {name}", human_bytes(*bytes));
        self.parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    /// Returns a refusal if more is needed than free.
    pub fn check(self) -> Option<Refusal> {
        (self.sum() > self.free).then_some(Refusal::TooLittle { need: self })
    }
}
