//! Bootimages without the agent, as published media are, and the agent that their initramfs carries or Ignition writes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::disk::on_disk;
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

/// Appends a packed agent to the initramfs of each boot loader entry of a disk, as in docs/deliver.md.
pub fn append_to_entries(packed: &Path, disk: &Path) -> Result<()> {
    let script = format!(
        "for initramfs in boot/ostree/*/initramfs*; do
             cp --preserve \"$initramfs\" boot/new; cat '{}' >>boot/new; mv boot/new \"$initramfs\"
         done",
        packed.display()
    );
    on_disk(disk, &script).map(drop)
}

/// Puts the command of a carried agent in the search path, as an administrator of an installed system may do.
pub fn command_file(files: &Files) -> Result<()> {
    let command = "#!/bin/sh\nexec /run/node-image-pivot/bin/node-image-pivot \"$@\"\n";
    files.put("/var/usrlocal/bin/node-image-pivot", 0o755, command)
}

/// Adds the files of a node whose agent brings its configuration and its credentials.
pub fn stock_files(files: &Files, mirror_port: u16) -> Result<()> {
    node_files(files, "", HOST, mirror_port)?;
    let carried = ["etc/node-image-pivot.conf.d", "var/roothome/.docker"];
    carried.iter().try_for_each(|carried| Ok(fs::remove_dir_all(files.root().join(carried))?))
}
