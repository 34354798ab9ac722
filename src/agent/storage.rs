//! Chooses and opens the node store of this machine.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tracing::info;

use super::{Error, StateDir};
use crate::config::StoreSettings;
use crate::preflight::{self, Memory, Refusal, Refusals};
use crate::report::RefusalId;
use node_store::store::{self, BootedRepo, Kind, NoDisk, NodeStore, SystemRepo};
use overlay_root::delta::Delta;
use overlay_root::{Mount, Namespace};

/// The source that mount tables show for the node store's tmpfs.
const STORE_SOURCE: &str = "node-image-store";
/// Exists on live systems, booted from an ISO or over PXE.
const LIVE_MARKER: &str = "/run/ostree-live";

/// The choice of the node store.
struct Choice {
    booted: Option<BootedRepo>,
    system: Option<SystemRepo>,
    kind: Kind,
    mounts: Vec<Mount>,
}

impl Choice {
    fn make(settings: StoreSettings) -> anyhow::Result<Self> {
        let booted = BootedRepo::discover()?;
        let mounts = Namespace::init().mounts()?;
        let system = booted.as_ref().map(|booted| look(&booted.path, &mounts)).transpose()?;
        let kind = store::decide(settings.place, system.as_ref()).context("the node store cannot be on the disk")?;
        Ok(Self { booted, system, kind, mounts })
    }

    /// Returns the size limit of a store in RAM, which follows free memory.
    fn limit(&self, root: &Path, settings: StoreSettings) -> anyhow::Result<u64> {
        let memory = Memory::now()?;
        let used = self.mounts.iter().any(|mount| mount.target == root && mount.source == STORE_SOURCE);
        let used = if used { overlay_root::tmpfs_used(root)? } else { 0 };
        Ok(preflight::store_limit(settings.ram_limit.bytes(memory.total), used, memory)?)
    }
}

/// Opens the node store, creating it if it is missing, and the booted repo. The choice depends on the boot and the
/// configuration only.
///
/// # Errors
/// [`Refusal`] if there is too little memory for a RAM store; another error if the store cannot be opened.
pub(super) fn open(paths: &StateDir, settings: StoreSettings) -> anyhow::Result<(NodeStore, Option<BootedRepo>)> {
    let choice = Choice::make(settings)?;
    let store = match (&choice.kind, &choice.system) {
        (Kind::Disk, Some(repo)) => {
            info!("the node store is the system's repo {}", repo.path.display());
            on_disk(&repo.path, &choice.mounts)?
        }
        (reason, _) => {
            if let Kind::Ram(Some(why)) = reason {
                info!("the node store is in RAM: {why}");
            }
            let root = paths.store();
            overlay_root::tmpfs(&Namespace::init(), &root, choice.limit(&root, settings)?, STORE_SOURCE)?;
            NodeStore::on_tmpfs(&root, choice.booted.as_ref())?
        }
    };
    Ok((store, choice.booted))
}

/// Checks that there is a place for the node store, and the memory that every pivot needs. Creates no store.
///
/// # Errors
/// As [`open`].
pub(super) fn check(paths: &StateDir, settings: StoreSettings) -> Result<(), Error> {
    let choice = Choice::make(settings).map_err(unchosen)?;
    match choice.kind {
        Kind::Disk => Ok(()),
        Kind::Ram(_) => choice.limit(&paths.store(), settings).map(drop).map_err(refused),
    }
}

/// Returns the error of a choice that failed. The configuration is the cause only if it asks for a disk that cannot be used.
fn unchosen(error: anyhow::Error) -> Error {
    match error.is::<NoDisk>() {
        true => Error::refused(RefusalId::Configuration, format!("{error:#}")),
        false => error.into(),
    }
}

/// Returns the refusal within an error of [`open`].
pub(super) fn refused(error: anyhow::Error) -> Error {
    match error.downcast::<Refusal>() {
        Ok(refusal) => Refusals(vec![refusal]).into(),
        Err(error) => error.into(),
    }
}

/// Returns the path of the delta tree in this machine's node store. Creates no store.
pub(super) fn delta_path(paths: &StateDir) -> anyhow::Result<PathBuf> {
    let opened = NodeStore::open(&paths.store()).or_else(|error| {
        in_system_repo().with_context(|| format!("the node store in RAM cannot be opened: {error:#}"))
    });
    Ok(opened?.delta_path())
}

/// Opens the node store that holds `delta`, independent of the present configuration.
pub(super) fn of(paths: &StateDir, delta: &Delta) -> anyhow::Result<NodeStore> {
    if delta.directory.starts_with(paths.store()) { NodeStore::open(&paths.store()) } else { in_system_repo() }
}

fn in_system_repo() -> anyhow::Result<NodeStore> {
    let booted =
        BootedRepo::discover()?.context("the booted system has no ostree repo, which would be the node store")?;
    let repo = booted.path.canonicalize().with_context(|| format!("looking for {}", booted.path.display()))?;
    on_disk(&repo, &Namespace::init().mounts()?)
}

/// Removes the trees that earlier boots left in the system's repo, also on a system that needs no node store.
pub(super) fn remove_earlier_boots() -> anyhow::Result<()> {
    let Some(booted) = BootedRepo::discover()? else { return Ok(()) };
    remove_earlier_boots_from(&booted.path, &Namespace::init())
}

fn remove_earlier_boots_from(repo: &Path, namespace: &Namespace) -> anyhow::Result<()> {
    let repo = repo.canonicalize().with_context(|| format!("looking for {}", repo.display()))?;
    if store::earlier_boots(&repo)?.is_empty() {
        return Ok(());
    }
    let view = writable(&repo, namespace, &namespace.mounts()?)?;
    store::remove_earlier_boots(&PathBuf::from(format!("/proc/self/fd/{}", view.as_raw_fd())))?;
    info!("removed the trees of earlier boots from {}", repo.display());
    Ok(())
}

fn on_disk(repo: &Path, mounts: &[Mount]) -> anyhow::Result<NodeStore> {
    NodeStore::on_disk(repo, Some(writable(repo, &Namespace::init(), mounts)?))
}

/// Opens `repo` for writing, although its mount may be read-only.
fn writable(repo: &Path, namespace: &Namespace, mounts: &[Mount]) -> anyhow::Result<OwnedFd> {
    let mount = overlay_root::holding(mounts, repo).context("the system's repo is on no mount")?;
    overlay_root::writable_view(namespace, &mount.target, repo)
}

fn look(repo: &Path, mounts: &[Mount]) -> anyhow::Result<SystemRepo> {
    let path = repo.canonicalize().with_context(|| format!("looking for {}", repo.display()))?;
    let mount = overlay_root::holding(mounts, &path).with_context(|| format!("{} is on no mount", path.display()))?;
    let config = path.join("config");
    let config = std::fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    let verified_root = overlay_root::requires_verity(mounts, Path::new("/"));
    Ok(SystemRepo {
        sealed: verified_root || store::sealing(&config, || store::has_sealed_object(&path)) == store::Sealing::Must,
        live: Path::new(LIVE_MARKER).exists(),
        config,
        fstype: mount.fstype.clone(),
        source: mount.source.clone().into(),
        read_only: mount.super_options.as_encoded_bytes().split(|byte| *byte == b',').any(|option| option == b"ro"),
        path,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::mount::MountFlags;
    use support::testing::private;

    use super::*;

    #[test]
    fn trees_of_earlier_boots_are_removed_without_a_node_store() {
        private(|disk| {
            let here = Namespace::of(rustix::thread::gettid().as_raw_nonzero().get());
            remove_earlier_boots_from(disk, &here).unwrap();
            let ours = disk.join("extensions/node-image-pivot");
            let this = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let this = format!("boot-{}", this.trim());
            for name in [&this, "boot-1/usr/bin", "boot-2/node-image", "derived"] {
                std::fs::create_dir_all(ours.join(name)).unwrap();
            }
            let object = disk.join("object");
            std::fs::write(&object, "x").unwrap();
            std::fs::hard_link(&object, ours.join("boot-1/usr/bin/tool")).unwrap();
            let flags = MountFlags::BIND | MountFlags::RDONLY;
            rustix::mount::mount_remount(disk, flags, "").unwrap();
            remove_earlier_boots_from(disk, &here).unwrap();
            assert_eq!(object.metadata().unwrap().nlink(), 1, "ostree can free its space");
            let mut left: Vec<_> = ours.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
            left.sort();
            assert_eq!(left, [this.as_str(), "derived"]);
        });
    }

    #[test]
    fn only_a_disk_that_cannot_be_used_is_a_fault_of_the_configuration() {
        let asked = anyhow::Error::new(NoDisk::NotBooted).context("the node store cannot be on the disk");
        let reasons = unchosen(asked).reasons().to_vec();
        assert_eq!(reasons[0].id, "configuration");
        assert!(reasons[0].message.starts_with("the node store cannot be on the disk: "), "{reasons:?}");
        let unreadable = anyhow::Error::from(std::io::Error::from_raw_os_error(5)).context("reading config");
        assert!(unchosen(unreadable).reasons().is_empty());
    }
}
