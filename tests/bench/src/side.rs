//! One run of one side, in a separate process: a fresh tmpfs in a separate mount namespace, the steps,
//! and what they took.
//!
//! The process adopts what its programs leave behind (a subreaper, as in prctl(2)), so that every process that
//! ran, skopeo among them, ends as its child and is in its account of children's CPU time exactly once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use crate::images::{Images, repo_arg};
use crate::limit;
use crate::listing;
use crate::ours::{self, Pulled};
use crate::profile;
use crate::watch::{Watch, used};

/// Side that pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// This agent: pull into the node store, then the delta tree.
    Ours,
    /// The importer of an earlier commit, in the same way.
    Before,
    /// A temporary repo, the booted repo copied into it, ostree-ext's pull, a checkout.
    Incumbent,
    /// skopeo copies the blobs to a directory, then all are decompressed.
    Limit,
}

impl Side {
    /// Its word on the command line and in messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Before => "before",
            Self::Incumbent => "incumbent",
            Self::Limit => "limit",
        }
    }
}

/// Subject of a run.
#[derive(Debug, Clone, Args)]
pub struct Task {
    /// Side that pulls.
    #[arg(value_enum)]
    pub side: Side,
    /// The image, HOST:PORT/NAME:TAG.
    #[arg(long)]
    pub image: String,
    /// The directory of the images.
    #[arg(long)]
    pub images: PathBuf,
    /// ostree-ext as a program.
    #[arg(long)]
    pub oracle: PathBuf,
    /// The benchmark program of an earlier commit, for that side.
    #[arg(long)]
    pub before: Option<PathBuf>,
    /// An empty directory, for a tmpfs that only this run sees.
    #[arg(long)]
    pub place: PathBuf,
    /// Also write here what is in the resulting `/usr`, file by file.
    #[arg(long)]
    pub listing: Option<PathBuf>,
    /// Run our side under perf, which writes its samples to this file.
    #[arg(long)]
    pub profile: Option<PathBuf>,
}

/// Costs of a run. Sizes in bytes, times in seconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// From the start of the first step to the end of the last.
    pub wall: f64,
    /// User and system time of all processes.
    pub cpu: f64,
    /// Bytes that the registry sent, counted by the process that started the run.
    pub bytes: u64,
    /// Blobs that the registry was asked for, counted likewise.
    pub blobs: u64,
    /// Peak resident memory of the importing process.
    pub rss: u64,
    /// The same of the largest skopeo.
    pub skopeo_rss: u64,
    /// Most that was in use on the tmpfs.
    pub tmpfs_peak: u64,
    /// In use afterwards, when what is not needed any more is gone.
    pub tmpfs_resident: u64,
    /// In use when the last step was over. For the incumbent that is before it deletes its repo, which it does on
    /// a live ISO only.
    pub tmpfs_end: u64,
    /// Name and seconds of each step.
    pub steps: Vec<(String, f64)>,
    /// Checksums of the root of the tree: equal for equal trees.
    pub tree: String,
    /// Reports of our pull and our staging.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pulled: Option<Pulled>,
}

/// Does the task; this process must have only one thread.
pub fn run(task: &Task) -> Result<Sample> {
    private_tmpfs(&task.place)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("becoming a subreaper")?;
    let images = Images::read(&task.images)?;
    let mut run = Run { task, images: &images, place: task.place.clone(), steps: Vec::new(), watch: None };
    run.watch = Some(Watch::start(&run.place));
    let before = used(&run.place)?;
    let start = Instant::now();
    let outcome = match task.side {
        Side::Ours => run.ours(&std::env::current_exe()?)?,
        Side::Before => run.ours(task.before.as_ref().context("no program of an earlier commit")?)?,
        Side::Incumbent => run.incumbent()?,
        Side::Limit => run.limit()?,
    };
    let wall = start.elapsed().as_secs_f64();
    reap()?;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let cpu = (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6;
    let peaks = run.watch.take().context("the run was not watched")?.finish()?;
    let tmpfs_end = used(&run.place)? - before;
    if task.side == Side::Incumbent {
        fs::remove_dir_all(run.place.join("repo"))?;
    }
    let mut sample = Sample {
        wall,
        cpu,
        rss: peaks.rss,
        skopeo_rss: peaks.skopeo_rss,
        tmpfs_peak: peaks.tmpfs.saturating_sub(before),
        tmpfs_resident: used(&run.place)? - before,
        tmpfs_end,
        tree: outcome.tree,
        ..Sample::default()
    };
    if let Some(pulled) = outcome.pulled {
        // Its own last word; the watch may have missed the last 20 ms.
        sample.rss = sample.rss.max(pulled.rss);
        sample.pulled = Some(pulled);
    }
    sample.steps = std::mem::take(&mut run.steps);
    if let Some(path) = &task.listing {
        run.list(path)?;
    }
    Ok(sample)
}

struct Run<'a> {
    task: &'a Task,
    images: &'a Images,
    place: PathBuf,
    steps: Vec<(String, f64)>,
    watch: Option<Watch>,
}

#[derive(Default)]
struct Outcome {
    tree: String,
    pulled: Option<Pulled>,
}

impl Run<'_> {
    fn ours(&mut self, program: &Path) -> Result<Outcome> {
        let mut program = match &self.task.profile {
            Some(file) => profile::recorded(program, file),
            None => Command::new(program),
        };
        program.arg("pull").args(["--image", &self.task.image, "--commit", &self.images.booted_commit, "--booted"]);
        program.arg(Images::booted_repo(&self.task.images)).arg(&self.place);
        let pulled: Pulled = serde_json::from_str(&self.step("pull and stage", &mut program)?)?;
        Ok(Outcome { tree: ours::tree(&self.place, &pulled.commit)?, pulled: Some(pulled) })
    }

    fn incumbent(&mut self) -> Result<Outcome> {
        let (repo, root) = (self.place.join("repo"), self.place.join("checkout"));
        let arg = repo_arg(&repo);
        self.step("ostree init", Command::new("ostree").args(["init", "--mode=bare", &arg]))?;
        let booted = Images::booted_repo(&self.task.images);
        // Layers' refs name commits that may be bound to the ref they were built under.
        self.step(
            "ostree pull-local",
            Command::new("ostree").args(["pull-local", "--disable-verify-bindings", &arg]).arg(booted),
        )?;
        let mut oracle = Command::new(&self.task.oracle);
        oracle.arg("import").arg("--repo").arg(&repo);
        oracle.arg(format!("ostree-unverified-registry:{}", self.task.image));
        let commit = self.step("ostree-ext pull", &mut oracle)?;
        self.step("ostree checkout", Command::new("ostree").args(["checkout", "-H", &arg, &commit]).arg(root))?;
        Ok(Outcome { tree: ours::tree_of(&repo, &commit)?, pulled: None })
    }

    fn limit(&mut self) -> Result<Outcome> {
        let blobs = self.place.join("blobs");
        let (from, to) = (format!("docker://{}", self.task.image), format!("dir:{}", blobs.display()));
        let args = ["copy", "-q", "--insecure-policy", "--src-tls-verify=false", &from, &to];
        self.step("skopeo copy", Command::new("skopeo").args(args))?;
        let start = Instant::now();
        limit::decompress(&blobs)?;
        self.steps.push(("decompress".into(), start.elapsed().as_secs_f64()));
        Ok(Outcome::default())
    }

    /// Runs a program as the next step; its output.
    fn step(&mut self, name: &str, command: &mut Command) -> Result<String> {
        let start = Instant::now();
        // A pipe without a reader would block it, a file on the tmpfs would count.
        let file = tempfile::tempfile()?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file.try_clone()?).spawn();
        let child = child.with_context(|| format!("starting {}", command.get_program().display()))?;
        if let Some(watch) = &self.watch {
            watch.program(child.id());
        }
        let output = child.wait_with_output()?;
        self.steps.push((name.to_owned(), start.elapsed().as_secs_f64()));
        if !output.status.success() {
            bail!("{name}: {command:?}: {}\n{}", output.status, end_of(file)?);
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Writes what is in the new `/usr`, without kernel modules, which the booted system's hide.
    fn list(&self, path: &Path) -> Result<()> {
        match self.task.side {
            Side::Ours | Side::Before => {
                let booted = Images::booted_root(&self.task.images).join("usr");
                ours::with_new_usr(&self.place, &booted, |usr| listing::write(usr, path))
            }
            Side::Incumbent => listing::write(&self.place.join("checkout/usr"), path),
            Side::Limit => Ok(()),
        }
    }
}

/// The end of what a program said.
fn end_of(mut file: fs::File) -> Result<String> {
    use std::io::{Read, Seek};
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(15)..].join("\n"))
}

/// Directory of skopeo's database of blobs.
const SKOPEO_CACHE: &str = "/var/lib/containers/cache";

/// A tmpfs that only this process and its children see, and one for skopeo's cache; both go with them.
fn private_tmpfs(place: &Path) -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).context("a mount namespace of its own (as root?)")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    // skopeo syncs a database in its cache for each blob. On a live medium, /var is in RAM.
    let cache = Path::new(SKOPEO_CACHE);
    fs::create_dir_all(cache).with_context(|| format!("creating {SKOPEO_CACHE}"))?;
    for target in [place, cache] {
        mount(Some("benchmark"), target, Some("tmpfs"), MsFlags::empty(), Some("size=90%,mode=755"))
            .with_context(|| format!("mounting a tmpfs on {}", target.display()))?;
    }
    Ok(())
}

/// Waits until no child is left, adopted ones included. A proxy ends soon after the process that started it.
fn reap() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(nix::errno::Errno::ECHILD) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(WaitStatus::StillAlive) => {
                ensure!(
                    Instant::now() < deadline,
                    "a process that a step started does not end; its CPU time is unknown"
                );
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(_) => {}
        }
    }
}
