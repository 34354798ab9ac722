//! Bootimages without the agent, as published media are, and the agent that their initramfs carries or Ignition writes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::files::Files;
use crate::images::agent;
use crate::proc::succeed;
use crate::scenario::node_files;
use crate::vm::HOST;

/// Packs the agent into the directory `into` with `form`, the arguments of `pack`. The package has a configuration that
/// names `image`, and credentials.
pub fn pack(form: &[&str], image: &str, into: &Path) -> Result<PathBuf> {
    let config = into.join("config");
    fs::create_dir(&config)?;
    fs::write(config.join("50-testbed.toml"), format!("image = \"{image}\"\n"))?;
    fs::write(into.join("auth.json"), "{\"auths\": {}}\n")?;
    let mut pack = Command::new(agent()?.join("usr/bin/node-image-pivot"));
    pack.arg("pack").args(form).args(["--output", "packed", "--config", "config", "--auth", "auth.json"]);
    succeed(pack.current_dir(into))?;
    Ok(into.join("packed"))
}

/// Creates a live bootimage in the directory `into`: that of `stock` with other archives as its initramfs, as a PXE server
/// delivers them. `into` may have a kernel.
pub fn with_initramfs(stock: &Path, archives: &[PathBuf], into: &Path) -> Result<()> {
    let initramfs = archives.iter().map(fs::read).collect::<Result<Vec<_>, _>>()?.concat();
    fs::write(into.join("initramfs.img"), initramfs)?;
    let mut missing = ["vmlinuz", "sysroot.squashfs", "kargs"].into_iter().filter(|name| !into.join(name).exists());
    missing.try_for_each(|name| Ok(symlink(stock.join(name), into.join(name))?))
}

/// Adds the files of a node whose agent brings its configuration and its credentials.
pub fn stock_files(files: &Files, mirror_port: u16) -> Result<()> {
    node_files(files, "", HOST, mirror_port)?;
    let carried = ["etc/node-image-pivot.conf.d", "var/roothome/.docker"];
    carried.iter().try_for_each(|carried| Ok(fs::remove_dir_all(files.root().join(carried))?))
}
