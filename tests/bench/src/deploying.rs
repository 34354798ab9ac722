//! Deployments to a disk: after a pivot from the node store, and by ostree-ext from the registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use node_store::store::NodeStore;
use ostree::gio::Cancellable;

use crate::images::{Case, Images, repo_arg};
use crate::ours::{self, PullTask};
use crate::proc::{output, run};
use crate::proxy::Proxy;
use crate::side::Sample;
use crate::summary::Runs;

/// The case whose image is deployed. In others, changed files such as os-release are invalid.
const CASE: &str = "same-base";
const STATEROOT: &str = "node";

/// Image in a node store, and its destination.
#[derive(Debug, Clone, Args)]
pub struct DeployTask {
    #[command(flatten)]
    pull: PullTask,
    /// Ostree sysroot with the stateroot.
    #[arg(long)]
    sysroot: PathBuf,
}

/// Completes the pull and deploys, as `node-image-pivot deploy` does.
pub fn deploy(task: &DeployTask) -> Result<()> {
    let pulled = ours::import(&task.pull, true)?;
    let request = disk_deploy::Request {
        sysroot: task.sysroot.clone(),
        stateroot: STATEROOT.to_owned(),
        ..disk_deploy::Request::default()
    };
    let store = NodeStore::open(&task.pull.root)?;
    disk_deploy::deploy(&store, &pulled.image, &request, &|_| (), &Cancellable::new())?;
    Ok(())
}

/// Programs, images and the registry of the deployments.
pub struct Deploying<'a> {
    /// Directory of the images.
    pub images: &'a Path,
    /// ostree-ext as a program.
    pub oracle: &'a Path,
    /// Counts what the registry sends.
    pub proxy: &'a Proxy,
}

impl Deploying<'_> {
    /// Deploys the image of a case in turns, each time to a new sysroot on a tmpfs. Returns `None` for other cases.
    pub fn runs(&self, case: &Case, rounds: usize) -> Result<Option<Runs>> {
        if case.name != CASE {
            return Ok(None);
        }
        let case = Case { name: format!("deploy-{}", case.name), ..case.clone() };
        let mut runs = Runs::of(case);
        for _ in 0..rounds {
            runs.ours.push(self.ours(&runs.case.image)?);
            runs.incumbent.push(self.incumbent(&runs.case.incumbent)?);
        }
        for (ours, incumbent) in runs.ours.iter().zip(&runs.incumbent) {
            ensure!(ours.tree == incumbent.tree, "{}: the two deployments have different trees", runs.case.name);
        }
        Ok(Some(runs))
    }

    /// The pull of the pivot is not part of the costs.
    fn ours(&self, image: &str) -> Result<Sample> {
        let place = tempfile::tempdir_in("/dev/shm")?;
        let commit = Images::read(self.images)?.booted_commit;
        let (store, program) = (place.path().join("store"), std::env::current_exe()?);
        fs::create_dir(&store)?;
        let arguments = |command: &mut Command| {
            command.args(["--image", &format!("{}/{image}", self.proxy.address), "--commit", &commit, "--booted"]);
            command.arg(Images::booted_repo(self.images)).arg(&store);
        };
        let mut pull = Command::new(&program);
        arguments(pull.arg("pull"));
        output(&mut pull)?;
        let sysroot = new_sysroot(place.path())?;
        let mut deploy = Command::new(&program);
        arguments(deploy.arg("deploy").arg("--sysroot").arg(&sysroot));
        self.cost("ours", &sysroot, deploy)
    }

    fn incumbent(&self, image: &str) -> Result<Sample> {
        let place = tempfile::tempdir_in("/dev/shm")?;
        let sysroot = new_sysroot(place.path())?;
        let mut deploy = Command::new(self.oracle);
        deploy.arg("deploy").arg("--sysroot").arg(&sysroot).args(["--stateroot", STATEROOT]);
        deploy.arg(format!("ostree-unverified-registry:{}/{image}", self.proxy.address));
        self.cost("incumbent", &sysroot, deploy)
    }

    fn cost(&self, side: &str, sysroot: &Path, mut command: Command) -> Result<Sample> {
        self.proxy.take();
        let start = Instant::now();
        // Otherwise the deployment is immutable, and its directory cannot be removed.
        output(command.env("OSTREE_SYSROOT_DEBUG", "mutable-deployments"))?;
        let (wall, bytes) = (start.elapsed().as_secs_f64(), self.proxy.take().0);
        eprintln!("benchmark:   {side:9} {wall:7.2} s wall, deployment to a disk");
        let deployments = fs::read_dir(sysroot.join("ostree/deploy").join(STATEROOT).join("deploy"))?;
        let names = deployments.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let commits: Vec<String> = names.filter_map(|name| name.strip_suffix(".0").map(str::to_owned)).collect();
        let [commit] = commits.as_slice() else { anyhow::bail!("{side}: {} deployments", commits.len()) };
        Ok(Sample { wall, bytes, tree: ours::tree_of(&sysroot.join("ostree/repo"), commit)?, ..Sample::default() })
    }
}

/// Creates a sysroot without a boot loader.
fn new_sysroot(place: &Path) -> Result<PathBuf> {
    let sysroot = place.join("disk");
    fs::create_dir(&sysroot)?;
    let (path, repo) = (sysroot.display().to_string(), repo_arg(&sysroot.join("ostree/repo")));
    run("ostree", ["admin", "init-fs", "--modern", &path])?;
    run("ostree", ["admin", "os-init", "--sysroot", &path, STATEROOT])?;
    run("ostree", ["config", &repo, "set", "sysroot.bootloader", "none"])?;
    Ok(sysroot)
}
