//! Reasons why a deployment was not made.

use std::path::PathBuf;

use ostree::{gio, glib};
use support::human_bytes;

use super::reference::BadReference;

/// Reason why a deployment was not made. The disk boots as before.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The directory has no ostree sysroot.
    #[error("cannot use the sysroot {path}: {source}; create it with ostree admin init-fs", path = .path.display())]
    NoSysroot {
        /// The directory.
        path: PathBuf,
        /// Error of libostree.
        source: glib::Error,
    },
    /// The sysroot is that of the running system, which cannot get a deployment.
    #[error(
        "cannot deploy to {}, the sysroot of the running system: its file system or that of /boot is read-only, or libostree \
         does not find the booted deployment there; deploy to another disk", .0.display()
    )]
    Booted(PathBuf),
    /// The disk has a deployment that its boot loader entries do not name: its `/boot` is not mounted.
    #[error(
        "{path} has the deployment {deployment}, but no boot loader entry for it: mount the disk's /boot at {path}/boot; if \
         the deployment is left over, remove it with ostree admin cleanup --sysroot {path}",
        path = .path.display(), deployment = .deployment.display()
    )]
    NoBoot {
        /// The sysroot.
        path: PathBuf,
        /// Directory of the deployment.
        deployment: PathBuf,
    },
    /// The stateroot does not exist.
    #[error(
        "the sysroot {path} has no stateroot {name:?}; create it with ostree admin os-init --sysroot {path} NAME",
        path = .path.display()
    )]
    NoStateroot {
        /// The sysroot.
        path: PathBuf,
        /// The requested name.
        name: String,
    },
    /// The repo of the sysroot cannot have deployments of systems.
    #[error("the repo of the sysroot {} does not have the mode bare; create it with ostree admin init-fs", .0.display())]
    Mode(PathBuf),
    /// Objects of the repo must have fs-verity, which cannot be enabled there.
    #[error(
        "cannot deploy to {}: objects of its ostree repo must have fs-verity ([ex-integrity] in its configuration, a root with \
         verity=require, or composefs with verity or signed in the image's prepare-root.conf), which cannot be enabled there: \
         {cause}; nothing was written; use a file system and a kernel with fs-verity (on ext4, tune2fs -O verity DEVICE while it is not mounted), \
         or deploy to another sysroot", path.display()
    )]
    Sealed {
        /// The sysroot.
        path: PathBuf,
        /// Answer of the kernel.
        cause: String,
    },
    /// The node store has no complete image of this digest. A complete pull writes none if the first layer of a plain
    /// image has a name or a symlink target that is not UTF-8.
    #[error(
        "cannot deploy {0}: the node store has no complete image of it; run pull --complete, or if the first layer has a name \
         or a symlink target that is not UTF-8, which ostree cannot store, rebuild the image without it"
    )]
    Incomplete(String),
    /// The argument cannot be in a boot loader entry, or libostree sets it.
    #[error(
        "cannot add the kernel argument {0:?}: an argument is not empty, has no white space or control characters, and is \
         not ostree=; repeat --karg for several"
    )]
    KernelArg(String),
    /// The name of the image cannot be in an origin.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// A file system of the disk is too small.
    #[error(
        "too little space on {}: {} are needed and {} are free; nothing was written; free some, or use a larger disk",
        .path.display(), listed(parts), human_bytes(*free)
    )]
    TooLittle {
        /// Directory on the file system.
        path: PathBuf,
        /// Needed bytes by purpose.
        parts: Vec<(&'static str, u64)>,
        /// Free bytes.
        free: u64,
    },
    /// The file system of the disk has too few inodes.
    #[error(
        "too few inodes on {}: {needed} are needed and {free} are free; nothing was written; remove files, or create the file \
         system with more inodes",
        .path.display()
    )]
    TooFewInodes {
        /// Directory on the file system.
        path: PathBuf,
        /// Needed inodes.
        needed: u64,
        /// Free inodes.
        free: u64,
    },
    /// The caller cancelled the call.
    #[error("the deployment was cancelled")]
    Cancelled,
    /// libostree or the file system failed.
    #[error(
        "cannot {step}: {cause}; the disk boots as before; run deploy again, which continues with the missing objects"
    )]
    Failed {
        /// The failed step, such as "write the deployment".
        step: &'static str,
        /// Cause of the failure.
        cause: String,
    },
}

/// Returns the sum of needed bytes and its parts, for a message.
pub(crate) fn listed(parts: &[(&'static str, u64)]) -> String {
    let sum = human_bytes(parts.iter().map(|(_, bytes)| bytes).sum());
    let parts = parts.iter().map(|(name, bytes)| format!("{} {name}", human_bytes(*bytes)));
    format!("{sum} ({})", parts.collect::<Vec<_>>().join(", "))
}

/// Returns a function that makes the failure of a step of an error of libostree.
pub(crate) fn failed(step: &'static str) -> impl FnOnce(glib::Error) -> DeployError {
    move |error| match error.matches(gio::IOErrorEnum::Cancelled) {
        true => DeployError::Cancelled,
        false => DeployError::Failed { step, cause: error.message().to_owned() },
    }
}
