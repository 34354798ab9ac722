//! A tree of files that knows which package each belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::{Commit, repo_arg};
use crate::proc::run;

/// Directory of dpkg's lists of files, one for each package.
pub const DPKG_INFO: &str = "usr/lib/sysimage/dpkg/info";
/// The SELinux policy: never altered, because it is read.
pub const POLICY: &str = "usr/etc/selinux";
/// The same: it says how the root is put together.
const PREPARE_ROOT: &str = "usr/lib/ostree/prepare-root.conf";
/// The generated initramfs, which is in no package and changes with the kernel.
const KERNEL: &str = "kernel";
/// Bits that are flipped in the first byte of an altered file. Sizes stay the same, and so does the packing of packages
/// into layers, as it does from one release to the next; lists of dpkg stay text.
const CHANGED: u8 = 1;
/// The same for the second copy of the base: something else, or altering the original would give the copy.
const COPY: u8 = 2;

/// A checked-out tree that can be changed by shares.
pub struct Tree {
    root: PathBuf,
    /// Not altered yet, in the order in which they are chosen.
    waiting: Vec<Unit>,
    altered: Vec<Unit>,
    files: u64,
}

/// The files that change together: a package, or the kernel with all that comes with it.
struct Unit {
    name: String,
    files: Vec<PathBuf>,
    bytes: u64,
}

impl Tree {
    /// Copies a commit to `root`.
    pub fn check_out(commit: &Commit, root: &Path) -> Result<Self> {
        check_out(commit, None, root)?;
        Ok(Self { root: root.to_owned(), waiting: Vec::new(), altered: Vec::new(), files: 0 })
    }

    /// The tree's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Adds another tree's `/usr`, without kernel modules, at `/usr/lib/more/NAME`, its packages as packages
    /// called `NAME-…`; altered, so that it shares nothing with that tree, if `alter`.
    pub fn graft(&mut self, commit: &Commit, name: &str, alter: bool) -> Result<()> {
        let place = format!("usr/lib/more/{name}");
        let dir = self.root.join(&place);
        fs::create_dir_all(dir.parent().context("no parent")?)?;
        check_out(commit, Some("/usr"), &dir)?;
        let info = self.root.join(DPKG_INFO);
        ensure!(info.is_dir(), "{} has no {DPKG_INFO}", self.root.display());
        let mut lists: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let from = dir.join(DPKG_INFO.strip_prefix("usr/").unwrap_or(DPKG_INFO));
        for (path, package) in owners(&from)? {
            let Some(below) = path.strip_prefix("usr/") else { continue };
            writeln!(lists.entry(package).or_default(), "/{place}/{below}")?;
        }
        for (package, list) in lists {
            fs::write(info.join(format!("{name}-{package}.list")), list)?;
        }
        for gone in ["lib/modules", "lib/sysimage"] {
            if dir.join(gone).exists() {
                fs::remove_dir_all(dir.join(gone))?;
            }
        }
        if alter {
            for_each_file(&dir, &mut |path, size| if size > 0 { flip(path, COPY) } else { Ok(()) })?;
        }
        Ok(())
    }

    /// Finds the packages and their sizes. To be called when the tree is whole.
    pub fn weigh(&mut self) -> Result<()> {
        let owners = owners(&self.root.join(DPKG_INFO))?;
        let mut units: BTreeMap<String, Unit> = BTreeMap::new();
        let (root, mut files) = (self.root.clone(), 0);
        for_each_file(&self.root, &mut |path, size| {
            files += 1;
            let name = path.strip_prefix(&root)?.to_str().context("a file name that is not UTF-8")?;
            let unit = match owners.get(name) {
                _ if name.starts_with("usr/lib/modules/") => KERNEL,
                Some(package) => package,
                None => "unpackaged",
            };
            let new = || Unit { name: unit.to_owned(), files: Vec::new(), bytes: 0 };
            let unit = units.entry(unit.to_owned()).or_insert_with(new);
            if size > 0 && !name.starts_with(POLICY) && name != PREPARE_ROOT {
                unit.files.push(path.to_owned());
                unit.bytes += size;
            }
            Ok(())
        })?;
        self.files = files;
        self.waiting = units.into_values().collect();
        self.waiting.sort_by_key(|unit| Sha256::digest(&unit.name).to_vec());
        Ok(())
    }

    /// Size of all files in bytes.
    pub fn bytes(&self) -> u64 {
        self.waiting.iter().chain(&self.altered).map(|unit| unit.bytes).sum()
    }

    /// Number of files, links among them.
    pub fn files(&self) -> u64 {
        self.files
    }

    /// Number of packages.
    pub fn units(&self) -> usize {
        self.waiting.len() + self.altered.len()
    }

    /// Number of packages altered so far.
    pub fn altered_units(&self) -> usize {
        self.altered.len()
    }

    /// Alters packages until they make up `percent` of all bytes (the kernel only at 100); how many bytes are
    /// altered then.
    pub fn alter_until(&mut self, percent: u8) -> Result<u64> {
        let limit = self.bytes() * u64::from(percent) / 100;
        for unit in std::mem::take(&mut self.waiting) {
            let fits = self.altered_bytes() + unit.bytes <= limit && unit.name != KERNEL;
            if fits || percent == 100 { self.alter(unit)? } else { self.waiting.push(unit) }
        }
        Ok(self.altered_bytes())
    }

    /// Alters kernel, modules and initramfs.
    pub fn alter_kernel(&mut self) -> Result<()> {
        match self.waiting.iter().position(|unit| unit.name == KERNEL) {
            Some(at) => {
                let kernel = self.waiting.remove(at);
                self.alter(kernel)
            }
            None => Ok(()),
        }
    }

    fn alter(&mut self, unit: Unit) -> Result<()> {
        unit.files.iter().try_for_each(|path| flip(path, CHANGED))?;
        self.altered.push(unit);
        Ok(())
    }

    fn altered_bytes(&self) -> u64 {
        self.altered.iter().map(|unit| unit.bytes).sum()
    }
}

/// Flips bits of the first byte.
fn flip(path: &Path, bits: u8) -> Result<()> {
    let flip = || -> std::io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0)?;
        file.write_all_at(&[byte[0] ^ bits], 0)
    };
    flip().with_context(|| format!("altering {}", path.display()))
}

/// Calls `each` for every file and link below `dir`, with the size in bytes, 0 for a link.
pub fn for_each_file(dir: &Path, each: &mut dyn FnMut(&Path, u64) -> Result<()>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            for_each_file(&entry.path(), each)?;
        } else {
            each(&entry.path(), if kind.is_file() { entry.metadata()?.len() } else { 0 })?;
        }
    }
    Ok(())
}

/// Copies a commit, or a directory of it, to `to`.
pub fn check_out(commit: &Commit, below: Option<&str>, to: &Path) -> Result<()> {
    let mut args = vec!["checkout".to_owned(), repo_arg(&commit.repo), "--force-copy".to_owned()];
    args.extend(below.map(|below| format!("--subpath={below}")));
    args.extend([commit.rev.clone(), to.display().to_string()]);
    run("ostree", args).map(drop)
}

/// Path in the tree → package, from dpkg's lists; with merged /usr, and /etc as usr/etc, as the tree has them.
fn owners(info: &Path) -> Result<BTreeMap<String, String>> {
    let mut owners = BTreeMap::new();
    let names: BTreeSet<PathBuf> = fs::read_dir(info)
        .with_context(|| format!("reading {}", info.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    for path in names {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(package) = name.and_then(|name| name.strip_suffix(".list")) else { continue };
        let package = package.split(':').next().unwrap_or(package);
        for line in fs::read_to_string(&path)?.lines() {
            let line = line.trim_start_matches('/');
            let path = match line.split('/').next() {
                Some("bin" | "sbin" | "lib" | "lib32" | "lib64" | "libx32" | "etc") => format!("usr/{line}"),
                _ => line.to_owned(),
            };
            owners.insert(path, package.to_owned());
        }
    }
    Ok(owners)
}
