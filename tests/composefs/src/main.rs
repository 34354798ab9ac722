//! Unpacks an image with composefs-rs: IMAGE (for example `oci:DIR`) to the directories REPO and ROOT.

use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use composefs::fsverity::Sha256HashValue;
use composefs::generic_tree::{OciTransformOptions, Stat};
use composefs::repository::{Repository, RepositoryConfig};
use composefs::tree::{Directory, FileSystem, Inode, LeafContent};
use composefs_oci::PullOptions;
use rustix::fs::{CWD, XattrFlags, lsetxattr};

type Tree = FileSystem<Sha256HashValue>;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, repo, root] = args.as_slice() else { bail!("expected: IMAGE REPO ROOT") };
    let (repo, _) = Repository::init_path(CWD, repo, RepositoryConfig::default().set_insecure())?;
    let repo: Arc<Repository<Sha256HashValue>> = Arc::new(repo);
    let pulled = composefs_oci::pull(&repo, image, None, PullOptions::default()).await?;
    let options = OciTransformOptions::default();
    let tree = composefs_oci::image::create_filesystem(&repo, &pulled.config_digest, None, &options)?;
    let root = Path::new(root);
    composefs::fs::write_to_path(&repo, &tree, root)?;
    own(&tree.root, root, &tree)
}

/// Gives what composefs-rs wrote its owner, mode and attributes.
fn own(dir: &Directory<Sha256HashValue>, path: &Path, tree: &Tree) -> Result<()> {
    for (name, inode) in dir.entries() {
        let path = path.join(name);
        let (stat, is_link) = match inode {
            Inode::Directory(dir) => {
                own(dir, &path, tree)?;
                (&dir.stat, false)
            }
            Inode::Leaf(id, _) => {
                let leaf = tree.leaf(*id);
                (&leaf.stat, matches!(leaf.content, LeafContent::Symlink(_)))
            }
        };
        apply(stat, is_link, &path).with_context(|| format!("cannot change {}", path.display()))?;
    }
    Ok(())
}

fn apply(stat: &Stat, is_link: bool, path: &Path) -> Result<()> {
    lchown(path, Some(stat.st_uid), Some(stat.st_gid))?;
    if !is_link {
        fs::set_permissions(path, fs::Permissions::from_mode(stat.st_mode & 0o7777))?;
    }
    for (name, value) in &stat.xattrs {
        lsetxattr(path, &**name, value, XattrFlags::empty())?;
    }
    Ok(())
}
