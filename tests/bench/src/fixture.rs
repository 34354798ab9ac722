//! Small trees, made by code, for the quick mode: it shows that the benchmark works, its numbers mean nothing.

use std::fs;
use std::path::Path;

use anyhow::Result;
use sha2::{Digest, Sha256};

use crate::images::{Commit, Inputs, repo_arg};
use crate::proc::run;

/// Packages in the base, and files in each.
const PACKAGES: u32 = 24;
const FILES: u32 = 4;

/// Three commits in three repos below `dir`.
pub fn inputs(dir: &Path, oracle: &Path) -> Result<Inputs> {
    let commit = |name: &str, release: u32, node: bool| -> Result<Commit> {
        let (root, repo) = (dir.join(name), dir.join(format!("{name}-repo")));
        tree(&root, release, node)?;
        run("ostree", ["init", "--mode=bare", &repo_arg(&repo)])?;
        run("ostree", ["commit", &repo_arg(&repo), "--branch", name, &format!("--tree=dir={}", root.display())])?;
        Ok(Commit { repo, rev: name.to_owned() })
    };
    Ok(Inputs {
        base: commit("base", 1, false)?,
        more: commit("more", 2, false)?,
        node: commit("node", 1, true)?,
        oracle: oracle.to_owned(),
    })
}

fn tree(root: &Path, release: u32, node: bool) -> Result<()> {
    let put = |path: &str, content: &[u8]| -> Result<()> {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        Ok(fs::write(path, content)?)
    };
    let mut packages: Vec<String> = (0..PACKAGES).map(|number| format!("package-{number}")).collect();
    if node {
        packages.push("kubelet".into());
    }
    for (number, package) in packages.iter().enumerate() {
        let mut list = String::from("/.\n/usr\n");
        for file in 0..FILES {
            let path = format!("usr/lib/{package}/file-{file}");
            put(&path, &noise(1000 + 5000 * (number as u32 % 7) + file, &format!("{release} {path}")))?;
            list.push_str(&format!("/{path}\n"));
        }
        put(&format!("usr/etc/{package}.conf"), format!("default of {release}\n").as_bytes())?;
        list.push_str(&format!("/etc/{package}.conf\n"));
        put(&format!("usr/lib/sysimage/dpkg/info/{package}.list"), list.as_bytes())?;
    }
    put("usr/lib/modules/6.1.0/vmlinuz", &noise(300_000, "kernel"))?;
    put("usr/lib/modules/6.1.0/initramfs.img", &noise(500_000, "initramfs"))?;
    put("usr/lib/os-release", b"ID=fixture\n")?;
    put("usr/lib/ostree/prepare-root.conf", b"[composefs]\nenabled = yes\n")?;
    put("usr/lib/systemd/systemd", b"not a real program")?;
    put("usr/lib/empty", b"")?;
    std::os::unix::fs::symlink("os-release", root.join("usr/lib/release"))?;
    Ok(())
}

/// Bytes that do not compress, the same for the same seed.
fn noise(length: u32, seed: &str) -> Vec<u8> {
    let blocks = (0_u32..).flat_map(|block| Sha256::digest(format!("{seed} {block}")).to_vec());
    blocks.take(length as usize).collect()
}
