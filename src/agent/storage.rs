//! Which node store this machine has, and opening it.

use std::path::Path;

use anyhow::Context as _;
use tracing::info;

use super::{Paths, StagedRoot};
use crate::config::Settings;
use crate::mount::{self, Namespace};
use crate::store::{self, BootedRepo, Kind, NodeStore, SystemRepo};

/// The source that mount tables show for the node store's tmpfs.
const STORE_SOURCE: &str = "node-image-store";
/// There on every live medium, be it an ISO or PXE.
const LIVE_MARKER: &str = "/run/ostree-live";

/// Opens the node store, making it where there is none, and the booted repo. The answer is the same for
/// all of a boot, as long as the configuration is.
pub(super) fn open(paths: &Paths, settings: &Settings) -> anyhow::Result<(NodeStore, Option<BootedRepo>)> {
    let booted = BootedRepo::discover()?;
    let mounts = Namespace::init().mounts()?;
    let system = booted.as_ref().map(|booted| look(&booted.path, &mounts)).transpose()?;
    let kind = store::decide(settings.store, system.as_ref()).context("the node store cannot be on the disk")?;
    let store = match (&kind, &system) {
        (Kind::Disk, Some(repo)) => {
            info!("the node store is the system's repo {}", repo.path.display());
            on_disk(&repo.path, &mounts)?
        }
        (reason, _) => {
            if let Kind::Ram(Some(why)) = reason {
                info!("the node store is in RAM: {why}");
            }
            let root = paths.store();
            let limit = settings.ram_limit.bytes(total_memory()?);
            mount::tmpfs(&Namespace::init(), &root, limit, STORE_SOURCE)?;
            NodeStore::on_tmpfs(&root, booted.as_ref())?
        }
    };
    Ok((store, booted))
}

/// Opens the node store that `staged` was staged in, whatever the configuration says by now.
pub(super) fn of(paths: &Paths, staged: &StagedRoot) -> anyhow::Result<NodeStore> {
    if staged.delta.directory.starts_with(paths.store()) {
        return NodeStore::open(&paths.store());
    }
    let booted =
        BootedRepo::discover()?.context("the booted system's ostree repo, which is the node store, is gone")?;
    let repo = booted.path.canonicalize().with_context(|| format!("looking for {}", booted.path.display()))?;
    on_disk(&repo, &Namespace::init().mounts()?)
}

fn on_disk(repo: &Path, mounts: &[mount::Mount]) -> anyhow::Result<NodeStore> {
    let mount = mount::holding(mounts, repo).context("the system's repo is on no mount")?;
    let view = mount::writable_view(&Namespace::init(), &mount.target, repo)?;
    NodeStore::on_disk(repo, Some(view))
}

fn look(repo: &Path, mounts: &[mount::Mount]) -> anyhow::Result<SystemRepo> {
    let path = repo.canonicalize().with_context(|| format!("looking for {}", repo.display()))?;
    let mount = mount::holding(mounts, &path).with_context(|| format!("{} is on no mount", path.display()))?;
    let config = path.join("config");
    Ok(SystemRepo {
        live: Path::new(LIVE_MARKER).exists(),
        config: std::fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?,
        fstype: mount.fstype.clone(),
        source: mount.source.clone().into(),
        read_only: mount.super_options.as_encoded_bytes().split(|byte| *byte == b',').any(|option| option == b"ro"),
        path,
    })
}

/// The machine's memory in bytes.
fn total_memory() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    mem_total(&text).context("/proc/meminfo has no MemTotal")
}

/// `MemTotal:` of proc_meminfo(5), which is in KiB, in bytes.
fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        assert_eq!(mem_total("MemTotal:       24684084 kB\nMemFree: 1 kB\n"), Some(24_684_084 * 1024));
        assert_eq!(mem_total("MemFree: 1 kB\n"), None);
        assert_eq!(mem_total("MemTotal: lots kB\n"), None);
    }
}
