//! Our side: the work of the agent between resolving and the switch, in a separate process.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use node_store::image::{ImageSettings, PullSpec, Source};
use node_store::import::{self, PullOptions, PulledImage};
use node_store::store::{BootedRepo, NODE_IMAGE_REF, NodeStore};
use ostree::gio::Cancellable;
use overlay_root::Base;
use overlay_root::delta::{Booted, Keep};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::watch::high_water_mark;

/// The delta tree's name beside the repo, as in the agent's store.
const DELTA: &str = "usr";

/// Image to pull, and its destination.
#[derive(Debug, Clone, Args)]
pub struct PullTask {
    /// The image, HOST:PORT/NAME:TAG.
    #[arg(long)]
    image: String,
    /// The booted repo.
    #[arg(long)]
    booted: PathBuf,
    /// The booted commit.
    #[arg(long)]
    commit: String,
    /// A directory on a tmpfs.
    pub root: PathBuf,
}

/// Costs that the side reports itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pulled {
    /// The commit in the store.
    pub commit: String,
    /// Seconds from opening the store to the ref.
    pub pull_seconds: f64,
    /// Seconds for the delta tree.
    pub stage_seconds: f64,
    /// Peak resident memory in bytes.
    pub rss: u64,
    /// Layers read.
    pub layers_fetched: u64,
    /// Layers not needed.
    pub layers_skipped: u64,
    /// Content objects written.
    pub objects_written: u64,
    /// Files in the delta tree.
    pub delta_files: u64,
}

/// Pulls and stages.
pub fn pull(task: &PullTask) -> Result<Pulled> {
    let start = Instant::now();
    let pulled = import(task, false)?;
    let pull_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let store = NodeStore::open(&task.root)?;
    let (booted, out) = (Booted::Commit(task.commit.parse()?), task.root.join(DELTA));
    let delta = overlay_root::delta::compare(&store, booted, pulled.commit, &Keep::default())?.build(&out)?;
    Ok(Pulled {
        commit: pulled.commit.to_string(),
        pull_seconds,
        stage_seconds: start.elapsed().as_secs_f64(),
        rss: high_water_mark(std::process::id()).unwrap_or(0),
        layers_fetched: pulled.layers_fetched,
        layers_skipped: pulled.layers_skipped,
        objects_written: pulled.objects_written,
        delta_files: delta.counts.added + delta.counts.changed,
    })
}

/// Pulls the objects that a pivot needs, or all.
pub fn import(task: &PullTask, complete: bool) -> Result<PulledImage> {
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(async {
        let booted = BootedRepo { path: task.booted.clone(), commit: Some(task.commit.parse()?) };
        let store = NodeStore::on_tmpfs(&task.root, Some(&booted))?;
        let source = Source::open(&ImageSettings { insecure: true, ..ImageSettings::default() }).await?;
        let image = source.resolve(&task.image.parse::<PullSpec>()?).await?;
        let (options, progress) = (PullOptions { complete, ..PullOptions::default() }, Arc::default());
        let cancel = CancellationToken::new();
        Ok(import::pull(&source, &image, &store, Some(&booted), &options, progress, &cancel).await?)
    })
}

/// Opens a repo.
pub fn open(repo: &Path) -> Result<ostree::Repo> {
    let opened = ostree::Repo::new_for_path(repo);
    opened.open(Cancellable::NONE).with_context(|| format!("opening {}", repo.display()))?;
    Ok(opened)
}

/// The root of the tree in the node store below `root`, which must be what the store's ref names.
pub fn tree(root: &Path, commit: &str) -> Result<String> {
    let repo = NodeStore::open(root)?.repo_path().to_owned();
    let named = open(&repo)?.resolve_rev(NODE_IMAGE_REF, false)?.context("the node store has no ref")?;
    anyhow::ensure!(named == commit, "the node store's ref names {named}, not {commit}");
    tree_of(&repo, commit)
}

/// The checksums of the directory tree and of the directory itself that a commit or ref has as its root.
pub fn tree_of(repo: &Path, commit: &str) -> Result<String> {
    let repo = open(repo)?;
    let commit = repo.resolve_rev(commit, false)?.context("no such commit")?;
    let (variant, _) = repo.load_commit(&commit)?;
    // (metadata, parent, related, subject, body, time, root dirtree, root dirmeta): ostree's OstreeCommit.
    let checksum = |index| variant.child_value(index).get::<Vec<u8>>().map(hex::encode).context("malformed commit");
    Ok(format!("{} {}", checksum(6)?, checksum(7)?))
}

/// Shows `act` the new `/usr`: the delta below `root` over the booted one.
pub fn with_new_usr<T>(root: &Path, booted_usr: &Path, act: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let tree = overlay_root::open_new_usr(&root.join(DELTA), &Base::Directory(booted_usr.to_owned()), "benchmark")?;
    act(Path::new(&format!("/proc/self/fd/{}", tree.as_fd().as_raw_fd())))
}
