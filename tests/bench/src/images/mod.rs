//! Builds what is pulled: one booted repo, and node images that differ from it in known shares.
//!
//! The base tree is a real one, made larger by the `/usr` of a second release and by an altered second copy
//! of its `/usr`, both below `/usr/lib/more`, each file with its package's name, so that it is spread over the
//! layers as in a large system. A share is changed by altering all files of packages, chosen in an order that
//! looks random and is the same each time, until they make up that share of all bytes; what a smaller share
//! has altered is altered in a larger one too. The booted repo is filled by importing the base's image, so
//! that it has the refs of its layers as on a real system.

mod layer;
mod layout;
mod plain;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::ours;
use crate::proc::{output, run};
use crate::registry::Registry;
use layout::Layout;
use tree::Tree;

/// The file in the directory of the images that says what there is.
pub const LIST: &str = "cases.json";

/// A booted base with the images that are pulled over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Set {
    /// Encapsulated images, some with a plain layer.
    Encapsulated,
    /// Plain images with one layer for each package.
    Plain,
}

impl Set {
    /// All, in the order of the table.
    pub const ALL: [Self; 2] = [Self::Encapsulated, Self::Plain];

    /// Its cases, in the order of the table.
    pub fn cases(self) -> &'static [&'static str] {
        match self {
            Self::Encapsulated => {
                &["same-base", "older-base", "nothing-in-common", "growth-1", "growth-10", "growth-50", "growth-100"]
            }
            Self::Plain => &["plain-same-base", "plain-older-base", "recompressed"],
        }
    }

    /// The stage of the test bed that builds it.
    pub fn stage(self) -> &'static str {
        match self {
            Self::Encapsulated => "bench",
            Self::Plain => "bench-plain",
        }
    }
}

/// A commit in a repo.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The repo's directory, of mode bare.
    pub repo: PathBuf,
    /// Ref or checksum.
    pub rev: String,
}

impl std::str::FromStr for Commit {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repo, rev) = text.rsplit_once('=').context("a commit is given as REPO=REF")?;
        Ok(Self { repo: repo.into(), rev: rev.into() })
    }
}

/// Sources of the images: trees with a dpkg database in `/usr/lib/sysimage/dpkg`.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The base operating system.
    pub base: Commit,
    /// Another release, for more real content.
    pub more: Commit,
    /// The base with what a node needs: what it has at paths that the base lacks becomes the node layer.
    pub node: Commit,
    /// ostree-ext as a program (`tests/oracle`).
    pub oracle: PathBuf,
}

/// Everything built, as [`LIST`] holds it. Paths are relative to its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Images {
    /// The booted commit: the base's image as ostree-ext imported it.
    pub booted_commit: String,
    /// Content of the base in bytes, files counted once per path.
    pub base_bytes: u64,
    /// Its number of files and links.
    pub base_files: u64,
    /// Compressed size of the base's image in bytes.
    pub base_compressed: u64,
    /// In the order of the table.
    pub cases: Vec<Case>,
}

/// One image to be pulled over the booted base.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Case {
    /// A word, see [`Set::cases`].
    pub name: String,
    /// The share of changed content in percent, for the growth curve; `None` for the three main cases.
    pub growth: Option<u8>,
    /// Description of the image.
    pub what: String,
    /// Name and tag in the registry.
    pub image: String,
    /// The same for the incumbent: it cannot import plain images.
    pub incumbent: String,
    /// Digests of layers that the booted repo holds, and that must not be fetched. Known for plain images.
    pub held: Vec<String>,
    /// Number of its layers.
    pub layers: usize,
    /// Compressed size of all its layers in bytes.
    pub compressed: u64,
    /// Bytes of the base's content that are changed.
    pub changed_bytes: u64,
}

impl Images {
    /// Reads the list.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(LIST);
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is malformed", path.display()))
    }

    /// The repo of the booted system.
    pub fn booted_repo(dir: &Path) -> PathBuf {
        dir.join("booted/repo")
    }

    /// The booted system's root, checked out of it.
    pub fn booted_root(dir: &Path) -> PathBuf {
        dir.join("booted/root")
    }

    /// The registry's storage.
    pub fn storage(dir: &Path) -> PathBuf {
        dir.join("storage")
    }
}

/// The share that changes within a month of updates, in percent: kernel and initramfs always, and then
/// packages. It is what two bases of this project's first measurements differed by (625 of 1,326 MB).
const MONTH: u8 = 47;

/// Builds a set in `out`, which must be empty and on one file system.
pub fn build(inputs: &Inputs, set: Set, out: &Path) -> Result<Images> {
    let work = out.join("work");
    for dir in [work.as_path(), &Images::storage(out), &out.join("booted")] {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let registry = Registry::start(&Images::storage(out), &work)?;
    let mut builder = Builder { inputs, out, work: &work, registry: &registry, source: work.join("repo") };
    let mut images = match set {
        Set::Encapsulated => builder.encapsulated()?,
        Set::Plain => builder.plain()?,
    };
    images.cases.sort_by_key(|case| set.cases().iter().position(|name| *name == case.name));
    drop(registry);
    fs::remove_dir_all(&work)?;
    fs::write(out.join(LIST), serde_json::to_vec_pretty(&images)?)?;
    Ok(images)
}

struct Builder<'a> {
    inputs: &'a Inputs,
    out: &'a Path,
    work: &'a Path,
    registry: &'a Registry,
    source: PathBuf,
}

impl Builder<'_> {
    /// The base, which has its own content and that of another release.
    fn base(&self) -> Result<Tree> {
        init(&self.source)?;
        let mut tree = Tree::check_out(&self.inputs.base, &self.work.join("tree"))?;
        tree.graft(&self.inputs.more, "release", false)?;
        tree.graft(&self.inputs.base, "copy", true)?;
        tree.weigh()?;
        Ok(tree)
    }

    fn encapsulated(&mut self) -> Result<Images> {
        let mut tree = self.base()?;
        let (base_bytes, base_files) = (tree.bytes(), tree.files());

        let mut layout = self.encapsulate(&tree)?;
        let (image, base_compressed) = self.push(&layout, "base")?;
        let booted_commit = self.import(&image)?;
        let same =
            ours::tree_of(&Images::booted_repo(self.out), &booted_commit)? == ours::tree_of(&self.source, "bench")?;
        ensure!(same, "ostree-ext's import of the base is not the tree that it was made from");
        self.check_out_booted(&booted_commit)?;
        let (node_layer, added) = self.node_layer()?;

        let mut cases = Vec::new();
        node_layer.append_to(&mut layout)?;
        layout.write()?;
        let what = format!("the booted base itself, and {added}");
        cases.push(self.case(&layout, "same-base", None, what, 0)?);

        for percent in [1, 10] {
            cases.push(self.growth(&mut tree, percent, base_bytes)?);
        }
        tree.alter_kernel()?;
        let changed = tree.alter_until(MONTH)?;
        let mut layout = self.encapsulate(&tree)?;
        node_layer.append_to(&mut layout)?;
        layout.write()?;
        let what =
            format!("{}, kernel, modules and initramfs among them; and {added}", told(changed, base_bytes, &tree));
        cases.push(self.case(&layout, "older-base", None, what, changed)?);
        cases.push(self.growth(&mut tree, 50, base_bytes)?);

        let changed = tree.alter_until(100)?;
        let mut layout = self.encapsulate(&tree)?;
        let what = format!(
            "every file changed that is neither empty nor SELinux policy nor prepare-root.conf ({:.0} MB)",
            changed as f64 / 1e6
        );
        cases.push(self.case(&layout, "growth-100", Some(100), what.clone(), changed)?);
        node_layer.append_to(&mut layout)?;
        layout.write()?;
        cases.push(self.case(&layout, "nothing-in-common", None, format!("{what}; and {added}"), changed)?);

        Ok(Images { booted_commit, base_bytes, base_files, base_compressed, cases })
    }

    /// The layer with the programs of a node, and words for it.
    fn node_layer(&self) -> Result<(layer::Layer, String)> {
        let layer = layer::make(&self.inputs.node, &self.inputs.base, self.work)?;
        let added = format!("{:.0} MB of node programs in one plain layer", layer.bytes as f64 / 1e6);
        Ok((layer, added))
    }

    /// The base with so many percent of it changed.
    fn growth(&self, tree: &mut Tree, percent: u8, base_bytes: u64) -> Result<Case> {
        let changed = tree.alter_until(percent)?;
        let what = told(changed, base_bytes, tree);
        self.case(&self.encapsulate(tree)?, &format!("growth-{percent}"), Some(percent), what, changed)
    }

    /// Commits the tree as it is now and writes it as a chunked image; its OCI layout.
    fn encapsulate(&self, tree: &Tree) -> Result<Layout> {
        self.commit(tree)?;
        let layout = self.work.join("oci");
        self.export(&self.source, &["encapsulate"], &layout, &format!("oci:{}:latest", layout.display()))?;
        Layout::read(&layout)
    }

    /// Writes the commit in a repo as an image to an OCI layout.
    fn export(&self, repo: &Path, args: &[&str], layout: &Path, to: &str) -> Result<()> {
        let _ = fs::remove_dir_all(layout);
        let mut oracle = std::process::Command::new(&self.inputs.oracle);
        oracle.args(args).args(["--ref", "bench", "--name", "bench", "--repo"]).arg(repo);
        output(oracle.arg(to)).map(drop)
    }

    /// Commits the tree as it is now.
    fn commit(&self, tree: &Tree) -> Result<()> {
        let repo = repo_arg(&self.source);
        let mut commit = std::process::Command::new("ostree");
        commit.args(["commit", &repo, "--branch=bench", "--no-bindings", "--timestamp=2026-01-01 00:00:00 +0000"]);
        // ostree-ext deploys only images of bootable commits.
        commit.arg("--bootable");
        commit.arg(format!("--tree=dir={}", tree.root().display()));
        // Labelled, as real ones are; ostree-ext would relabel one that is not, and make another tree of it.
        if tree.root().join(tree::POLICY).exists() {
            commit.arg(format!("--selinux-policy={}", tree.root().display()));
        }
        output(&mut commit)?;
        // What only the previous state had: the disk need not hold all of them at once.
        run("ostree", ["prune", &repo, "--refs-only", "--depth=0"]).map(drop)
    }

    /// Name in the registry and compressed size.
    fn push(&self, layout: &Layout, tag: &str) -> Result<(String, u64)> {
        let image = format!("bench/node:{tag}");
        self.registry.push(layout.path(), &image)?;
        Ok((image, layout.compressed_size()?))
    }

    fn case(&self, layout: &Layout, name: &str, growth: Option<u8>, what: String, changed_bytes: u64) -> Result<Case> {
        let (image, compressed) = self.push(layout, name)?;
        eprintln!("benchmark: {name}: {:.0} MB compressed; {what}", compressed as f64 / 1e6);
        let (incumbent, layers) = (image.clone(), layout.layers()?.len());
        Ok(Case {
            name: name.into(),
            growth,
            what,
            image,
            incumbent,
            held: Vec::new(),
            layers,
            compressed,
            changed_bytes,
        })
    }

    /// Imports the base's image to what plays the booted system's disk; the commit.
    fn import(&self, image: &str) -> Result<String> {
        let repo = Images::booted_repo(self.out);
        init(&repo)?;
        let mut oracle = std::process::Command::new(&self.inputs.oracle);
        oracle.arg("import").arg("--repo").arg(&repo);
        output(oracle.arg(format!("ostree-unverified-registry:{}/{image}", self.registry.address)))
    }

    /// Checks out the root of the booted system.
    fn check_out_booted(&self, commit: &str) -> Result<()> {
        let (repo, root) = (Images::booted_repo(self.out), Images::booted_root(self.out));
        run("ostree", ["checkout", "-H", &repo_arg(&repo), commit, &root.display().to_string()]).map(drop)
    }
}

/// A bare repo that is not synced to disk: a build that is killed starts again.
fn init(repo: &Path) -> Result<()> {
    run("ostree", ["init", "--mode=bare", &repo_arg(repo)])?;
    run("ostree", ["config", &repo_arg(repo), "set", "core.fsync", "false"]).map(drop)
}

fn told(changed: u64, all: u64, tree: &Tree) -> String {
    let (changed_mb, all_mb) = (changed as f64 / 1e6, all as f64 / 1e6);
    format!(
        "{changed_mb:.0} of {all_mb:.0} MB ({:.1} %) changed, in {} of {} packages",
        changed as f64 / all as f64 * 100.0,
        tree.altered_units(),
        tree.units()
    )
}

/// `--repo=PATH`.
pub fn repo_arg(repo: &Path) -> String {
    format!("--repo={}", repo.display())
}
