//! The set of plain images: the same trees as those of the encapsulated set, with one layer for each package.
//!
//! The incumbent imports the same layers over an encapsulated commit that has only `prepare-root.conf`. That of the booted
//! system also has the SELinux policy, so that ostree-ext labels the layers, as the importers of plain images do. Otherwise
//! the booted repo would have two copies of each file.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use ostree::gio::Cancellable;
use ostree::glib::VariantDict;
use ostree::prelude::*;

use super::layout::Layout;
use super::tree::{self, Tree};
use super::{Builder, Case, Images, MONTH, repo_arg, told};
use crate::ours;
use crate::proc::{output, run};
use crate::registry::Registry;

/// The largest packages have one layer each, all others share the last one.
const LAYERS: &str = "400";
/// Lets ostree-ext accept content in any top-level directory, as importers of plain images do.
const PREPARE_ROOT: &str = "[composefs]\nenabled = yes\n";
/// Refs of images in the booted repo.
const IMAGES: &str = "ostree/container/image";
/// Name of the booted image in its ref, as ostree-ext escapes `docker://bench/plain`.
const BOOTED: &str = "docker_3A__2F__2F_bench/plain";

/// Names of an image in the registry: as a plain one, and over the encapsulated commit.
struct Pushed {
    plain: String,
    incumbent: String,
    digest: String,
}

impl Builder<'_> {
    pub(super) fn plain(&mut self) -> Result<Images> {
        let mut tree = self.base()?;
        let (base_bytes, base_files) = (tree.bytes(), tree.files());
        let (empty, labelled) = (self.empty_base("empty", None)?, self.empty_base("labelled", Some(&tree))?);
        let mut layout = self.export_plain(&tree)?;
        let booted = self.push_both(&labelled, &mut layout, "plain-base")?;
        let base_compressed = layout.compressed_size()?;
        let booted_commit = self.record(&self.import(&booted.incumbent)?, &layout, &booted.digest)?;
        self.check_out_booted(&booted_commit)?;
        let held: BTreeSet<String> = layout.diff_ids()?.into_iter().map(str::to_owned).collect();
        let (node_layer, added) = self.node_layer()?;

        node_layer.append_to(&mut layout)?;
        let pushed = self.push_both(&empty, &mut layout, "plain-same-base")?;
        let what = format!("the booted base itself, and {added}");
        let mut cases = vec![self.plain_case(&layout, "plain-same-base", &pushed, what, 0, &held)?];

        tree.alter_kernel()?;
        let changed = tree.alter_until(MONTH)?;
        let mut layout = self.export_plain(&tree)?;
        node_layer.append_to(&mut layout)?;
        let pushed = self.push_both(&empty, &mut layout, "plain-older-base")?;
        let difference = told(changed, base_bytes, &tree);
        let what = format!("{difference}, kernel, modules and initramfs among them; and {added}");
        cases.push(self.plain_case(&layout, "plain-older-base", &pushed, what, changed, &held)?);

        let pushed = self.mirror(&empty, &mut layout)?;
        let what = "the image of `plain-older-base` from a mirror that recompressed every layer with zstd".to_owned();
        cases.push(self.plain_case(&layout, "recompressed", &pushed, what, changed, &held)?);
        Ok(Images { booted_commit, base_bytes, base_files, base_compressed, cases })
    }

    /// The encapsulated commit below the layers of the incumbent, with the SELinux policy of `labelled`.
    fn empty_base(&self, name: &str, labelled: Option<&Tree>) -> Result<Layout> {
        let [root, repo, layout] = ["root", "repo", "oci"].map(|part| self.work.join(format!("{name}-{part}")));
        super::init(&repo)?;
        fs::create_dir_all(root.join("usr/lib/ostree"))?;
        fs::write(root.join("usr/lib/ostree/prepare-root.conf"), PREPARE_ROOT)?;
        let mut commit = std::process::Command::new("ostree");
        commit.args(["commit", &repo_arg(&repo), "--branch=bench", "--no-bindings"]);
        commit.arg(format!("--tree=dir={}", root.display()));
        let policy = labelled.map(|tree| tree.root().join(tree::POLICY)).filter(|policy| policy.exists());
        if let Some(policy) = policy {
            fs::create_dir_all(root.join("usr/etc"))?;
            run("cp", ["-a", &policy.display().to_string(), &root.join("usr/etc/").display().to_string()])?;
            commit.arg(format!("--selinux-policy={}", root.display()));
        }
        output(&mut commit)?;
        self.export(&repo, &["encapsulate", "--single"], &layout, &format!("oci:{}:latest", layout.display()))?;
        Layout::read(&layout)
    }

    /// Commits the tree as it is now and writes it as a plain image.
    fn export_plain(&self, tree: &Tree) -> Result<Layout> {
        self.commit(tree)?;
        let layout = self.work.join("oci");
        self.export(&self.source, &["plain", "--max-layers", LAYERS], &layout, &layout.display().to_string())?;
        Layout::read(&layout)
    }

    /// Pushes a plain image, and its layers over the encapsulated commit.
    fn push_both(&self, empty: &Layout, layout: &mut Layout, tag: &str) -> Result<Pushed> {
        self.each(empty, layout, tag, |layout, image| self.registry.push(layout.path(), image))
    }

    /// The same through a mirror that recompresses. Its registry is another one, so that skopeo does not know that it has
    /// the layers already.
    fn mirror(&self, empty: &Layout, layout: &mut Layout) -> Result<Pushed> {
        let work = self.work.join("mirror");
        fs::create_dir_all(&work)?;
        let mirror = Registry::start(&Images::storage(self.out), &work)?;
        self.each(empty, layout, "recompressed", |layout, image| mirror.push_recompressed(layout.path(), image))
    }

    fn each(
        &self,
        empty: &Layout,
        layout: &mut Layout,
        tag: &str,
        push: impl Fn(&Layout, &str) -> Result<String>,
    ) -> Result<Pushed> {
        let (plain, incumbent) = (format!("bench/{tag}:plain"), format!("bench/{tag}:incumbent"));
        let mut over = empty.below(layout)?;
        over.write()?;
        push(&over, &incumbent)?;
        layout.write()?;
        let digest = push(layout, &plain)?;
        Ok(Pushed { plain, incumbent, digest })
    }

    fn plain_case(
        &self,
        layout: &Layout,
        name: &str,
        pushed: &Pushed,
        what: String,
        changed_bytes: u64,
        held: &BTreeSet<String>,
    ) -> Result<Case> {
        let layers = self.registry.layers(&pushed.plain)?;
        let compressed = layers.iter().map(|(_, size)| size).sum();
        let with_ids = layers.iter().zip(layout.diff_ids()?);
        let held: Vec<String> =
            with_ids.filter(|(_, diff_id)| held.contains(*diff_id)).map(|((digest, _), _)| digest.clone()).collect();
        eprintln!("benchmark: {name}: {:.0} MB compressed; {what}", compressed as f64 / 1e6);
        Ok(Case {
            name: name.into(),
            growth: None,
            what,
            image: pushed.plain.clone(),
            incumbent: pushed.incumbent.clone(),
            held,
            layers: layers.len(),
            compressed,
            changed_bytes,
        })
    }

    /// Makes the plain image the booted one: a commit of the same tree as importers of plain images write it. Returns the
    /// commit.
    fn record(&self, imported: &str, image: &Layout, digest: &str) -> Result<String> {
        let repo = ours::open(&Images::booted_repo(self.out))?;
        let (root, _) = repo.read_commit(imported, Cancellable::NONE)?;
        let metadata = VariantDict::new(None);
        metadata.insert("ostree.manifest-digest", digest);
        metadata.insert("ostree.manifest", image.manifest());
        metadata.insert("ostree.container.image-config", image.config());
        let root = root.downcast_ref::<ostree::RepoFile>().context("the root is not a directory of a commit")?;
        let commit = repo.write_commit(None, Some("plain"), None, Some(&metadata.end()), root, Cancellable::NONE)?;
        for name in repo.list_refs(Some(IMAGES), Cancellable::NONE)?.keys() {
            repo.set_ref_immediate(None, &format!("{IMAGES}/{name}"), None, Cancellable::NONE)?;
        }
        repo.set_ref_immediate(None, &format!("{IMAGES}/{BOOTED}"), Some(&commit), Cancellable::NONE)?;
        Ok(commit.to_string())
    }
}
