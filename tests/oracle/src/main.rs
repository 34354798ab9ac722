//! ostree-ext as a program: what node images are written with, and the importer that ours is compared with.

use std::num::{NonZeroU32, NonZeroUsize};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use ostree_ext::container::deploy::{deploy, prune, DeployOpts};
use ostree_ext::container::store::{ImageImporter, PrepareResult};
use ostree_ext::container::{Config, ExportOpts, ImageReference, OstreeImageReference, SignatureSource};
use ostree_ext::containers_image_proxy::ImageProxyConfig;
use ostree_ext::sysroot::SysrootLock;
use ostree_ext::{gio, ostree};

mod components;
mod plain;

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The commit to write as an image.
#[derive(Args)]
struct Source {
    /// Repository that holds the commit.
    #[arg(long)]
    repo: String,
    /// Ref or checksum of the commit.
    #[arg(long = "ref")]
    reference: String,
    /// Value of the label org.opencontainers.image.title.
    #[arg(long)]
    name: String,
}

#[derive(Subcommand)]
enum Command {
    /// Write a commit as a chunked container image; prints the digest of its manifest.
    Encapsulate {
        #[command(flatten)]
        source: Source,
        /// Value of the image's `architecture` label (as node images carry it, RPM spelling).
        #[arg(long, default_value = "x86_64")]
        architecture: String,
        /// Most layers that packages are spread over (the commit layer not counted).
        #[arg(long, default_value_t = NonZeroU32::new(36).expect("not zero"))]
        max_layers: NonZeroU32,
        /// All content in one layer; for trees without a dpkg database.
        #[arg(long)]
        single: bool,
        /// Destination: `oci:DIR:TAG`, `docker://HOST/NAME:TAG`.
        dest: String,
    },
    /// Write the tree of a commit as a plain image with a layer for each package; prints the digest of its manifest.
    Plain {
        #[command(flatten)]
        source: Source,
        /// Most layers. The largest packages have one each, the others share the last.
        #[arg(long, default_value_t = NonZeroUsize::new(64).expect("not zero"))]
        max_layers: NonZeroUsize,
        /// Directory of the OCI layout.
        layout: std::path::PathBuf,
    },
    /// Import an image into a repository, as the incumbent does; prints the merge commit.
    Import {
        /// Repository to import to; must exist.
        #[arg(long)]
        repo: String,
        /// Container auth file.
        #[arg(long)]
        authfile: Option<std::path::PathBuf>,
        /// `ostree-unverified-registry:HOST/NAME:TAG`, `ostree-unverified-image:oci:DIR:TAG`, ….
        image: OstreeImageReference,
    },
    /// Deploy an image to a sysroot, as `ostree container image deploy` does; prints the merge commit.
    Deploy {
        /// Sysroot with the stateroot.
        #[arg(long)]
        sysroot: String,
        /// Name of the stateroot.
        #[arg(long)]
        stateroot: String,
        /// As for `import`.
        image: OstreeImageReference,
    },
    /// Remove images that are not deployed, and their layers; prints the number of images, layers and objects.
    Prune {
        /// Sysroot to clean.
        #[arg(long)]
        sysroot: String,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Encapsulate { source: Source { repo, reference, name }, architecture, max_layers, single, dest } => {
            let repo = open(&repo)?;
            let dest = ImageReference::try_from(dest.as_str())?;
            let commit = repo.require_rev(&reference)?;
            let components = if single { None } else { Some(components::of_commit(&repo, &commit)?) };
            let labels =
                [("org.opencontainers.image.title".to_string(), name), ("architecture".to_string(), architecture)];
            let config = Config { labels: Some(labels.into()), cmd: None };
            let mut opts = ExportOpts::default();
            opts.max_layers = Some(max_layers);
            opts.contentmeta = components.as_ref();
            opts.legacy_version_label = true;
            let digest = ostree_ext::container::encapsulate(&repo, &commit, &config, Some(opts), &dest).await?;
            println!("{digest}");
        }
        Command::Plain { source: Source { repo, reference, name }, max_layers, layout } => {
            let repo = open(&repo)?;
            let commit = repo.require_rev(&reference)?;
            let components = components::of_commit(&repo, &commit)?;
            let labels = [("org.opencontainers.image.title", name.as_str()), ("containers.bootc", "1")];
            let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
            println!("{}", plain::write(&repo, &commit, &components, labels, max_layers.get(), (&layout, "latest"))?);
        }
        Command::Import { repo, authfile, mut image } => {
            // Both spellings of "unverified" are fine here; the policy.json of this machine decides.
            image.sigverify = SignatureSource::ContainerPolicyAllowInsecure;
            let mut proxy = ImageProxyConfig::default();
            proxy.authfile = authfile;
            proxy.insecure_skip_tls_verification = Some(true);
            let mut importer = ImageImporter::new(&open(&repo)?, &image, proxy).await?;
            let state = match importer.prepare().await? {
                PrepareResult::AlreadyPresent(state) => state,
                PrepareResult::Ready(prepared) => importer.import(prepared).await?,
            };
            println!("{}", state.merge_commit);
        }
        Command::Deploy { sysroot, stateroot, image } => {
            let mut options = DeployOpts::default();
            let mut proxy = ImageProxyConfig::default();
            proxy.insecure_skip_tls_verification = Some(true);
            options.proxy_cfg = Some(proxy);
            let state = deploy(&load(&sysroot)?, &stateroot, &image, Some(options)).await?;
            println!("{}", state.merge_commit);
        }
        Command::Prune { sysroot } => {
            let sysroot = SysrootLock::new_from_sysroot(&load(&sysroot)?).await?;
            let pruned = prune(&sysroot)?;
            println!("{} {} {}", pruned.n_images, pruned.n_layers, pruned.n_objects_pruned);
        }
    }
    Ok(())
}

fn load(path: &str) -> Result<ostree::Sysroot> {
    let sysroot = ostree::Sysroot::new(Some(&gio::File::for_path(path)));
    sysroot.load(gio::Cancellable::NONE).with_context(|| format!("loading the sysroot {path}"))?;
    Ok(sysroot)
}

fn open(path: &str) -> Result<ostree::Repo> {
    let repo = ostree::Repo::new(&gio::File::for_path(path));
    repo.open(gio::Cancellable::NONE).with_context(|| format!("opening the repository {path}"))?;
    Ok(repo)
}
