//! Writers of a tree: a cpio archive, and a directory.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, Result};
use cpio::newc::{self, ModeFileType};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::entry::{Node, Tree};
use support::ignore_missing;

/// Returns the tree as a cpio archive in the format "newc", compressed with gzip, which all kernels of distributions
/// unpack. It is padded to four bytes, so that any other archive may follow it.
///
/// # Errors
/// A file is larger than 4 GiB.
pub fn archive(tree: &Tree<'_>) -> io::Result<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    for (number, (path, node)) in (1..).zip(tree) {
        let (kind, mode, content): (_, _, &[u8]) = match node {
            Node::Directory { mode } => (ModeFileType::Directory, *mode, &[]),
            Node::File { mode, content } => (ModeFileType::Regular, *mode, content),
            Node::Link(target) => (ModeFileType::Symlink, 0o777, target.as_bytes()),
        };
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let header = newc::Builder::new(path).ino(number).mode(mode).set_mode_file_type(kind);
        let mut file = header.write(&mut out, size);
        file.write_all(content)?;
        file.finish()?;
    }
    newc::trailer(&mut out)?;
    let mut archive = out.finish()?;
    archive.resize(archive.len().next_multiple_of(4), 0);
    Ok(archive)
}

/// Writes the tree into a directory, which may have some of its directories. Files and links are replaced.
///
/// # Errors
/// The message names the entry that cannot be written.
pub fn write_tree(tree: &Tree<'_>, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    tree.iter().try_for_each(|(path, node)| {
        let place = directory.join(path);
        write_node(node, &place).with_context(|| format!("cannot write {}", place.display()))
    })
}

fn write_node(node: &Node<'_>, place: &Path) -> io::Result<()> {
    let permissions = |mode: &u32| fs::Permissions::from_mode(*mode);
    match node {
        // A private directory is private also if it exists.
        Node::Directory { mode } if *mode & 0o077 != 0 && place.is_dir() => Ok(()),
        Node::Directory { mode } => {
            if !place.is_dir() {
                fs::create_dir(place)?;
            }
            fs::set_permissions(place, permissions(mode))
        }
        Node::File { mode, content } => {
            ignore_missing(fs::remove_file(place))?;
            // The mode of the first moment: another user could keep a secret open.
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(*mode).open(place)?;
            file.set_permissions(permissions(mode))?;
            file.write_all(content)
        }
        Node::Link(target) => ignore_missing(fs::remove_file(place)).and_then(|()| symlink(target, place)),
    }
}
