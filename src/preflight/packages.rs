//! Lists the packages of a tree from a database that can be read without a package manager: dpkg's status file in the
//! tree, or the list that rpm-ostree writes into a commit.

use std::collections::{BTreeMap, BTreeSet};

use ostree::glib::VariantDict;
use serde::{Deserialize, Serialize};

/// Path of dpkg's status file in an ostree system, relative to `/usr`.
pub const DPKG_STATUS: &str = "lib/sysimage/dpkg/status";
/// The commit metadata key of rpm-ostree's list, `a(sssss)`: name, epoch, version, release, architecture.
const RPM_LIST: &str = "rpmostree.rpmdb.pkglist";

/// Versions by name. The name has the architecture if several can be installed together.
pub type Packages = BTreeMap<String, String>;

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
}

/// A package in two versions. Only the package manager can tell which one is newer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageChange {
    /// Name.
    pub name: String,
    /// The booted system's version.
    pub from: String,
    /// The node image's version.
    pub to: String,
}

/// Differences of two package lists, sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageChanges {
    /// Packages of the node image only.
    pub added: Vec<Package>,
    /// Packages of the booted system only.
    pub removed: Vec<Package>,
    /// Packages of both, in different versions.
    pub changed: Vec<PackageChange>,
}

impl PackageChanges {
    /// Compares the booted system's packages with the node image's.
    pub fn between(old: &Packages, new: &Packages) -> Self {
        let mut changes = Self::default();
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let package = |version: &String| Package { name: name.clone(), version: version.clone() };
            match (old.get(name), new.get(name)) {
                (None, Some(version)) => changes.added.push(package(version)),
                (Some(version), None) => changes.removed.push(package(version)),
                (Some(from), Some(to)) if from != to => {
                    changes.changed.push(PackageChange { name: name.clone(), from: from.clone(), to: to.clone() });
                }
                _ => {}
            }
        }
        changes
    }
}

/// Returns the packages of dpkg's status file (deb822 paragraphs, dpkg(1)) that are installed completely or in part.
/// Paragraphs without a name or a version are skipped.
pub fn dpkg(status: &str) -> Packages {
    let mut packages = Packages::new();
    for paragraph in status.split("\n\n") {
        let field =
            |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let (Some(name), Some(version)) = (field("Package"), field("Version")) else { continue };
        // The words are want, error and state. `config-files`: the package was removed, its configuration was not.
        let state = field("Status").and_then(|status| status.split_whitespace().nth(2));
        if matches!(state, None | Some("not-installed" | "config-files")) {
            continue;
        }
        let key = match (field("Multi-Arch"), field("Architecture")) {
            (Some("same"), Some(arch)) => format!("{name}:{arch}"),
            _ => name.to_owned(),
        };
        packages.insert(key, version.to_owned());
    }
    packages
}

/// Returns the packages of rpm-ostree's list in a commit's metadata, or `None` if there is no list. A package that is
/// installed in several versions (kernels) has them in one text, separated by commas.
pub fn rpm(metadata: &VariantDict) -> Option<Packages> {
    let list: Vec<(String, String, String, String, String)> = metadata.lookup(RPM_LIST).ok().flatten()?;
    let mut packages = Packages::new();
    for (name, epoch, version, release, arch) in list {
        let epoch = if epoch.is_empty() || epoch == "0" { String::new() } else { format!("{epoch}:") };
        let version = format!("{epoch}{version}-{release}");
        let versions = packages.entry(format!("{name}.{arch}")).or_default();
        if !versions.is_empty() {
            versions.push_str(", ");
        }
        versions.push_str(&version);
    }
    Some(packages)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ostree::glib::prelude::*;

    use super::*;

    #[test]
    fn installed_packages_are_read_from_dpkg_status() {
        let status = "\
Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 5.2-1\nDescription: a shell\n Package: no\n .\n Version: no\n
Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n
Package: libc6\nStatus: hold ok installed\nArchitecture: amd64\nMulti-Arch: same\nVersion: 2.36-9+deb12u4\n
Package: libc6\nStatus: install ok installed\nArchitecture: i386\nMulti-Arch: same\nVersion: 2.36-9+deb12u4\n
Package: half\nStatus: install reinstreq half-installed\nVersion: 2\n
Package: without-version\nStatus: install ok not-installed\n\nnonsense";
        let packages = dpkg(status);
        let shown: Vec<String> = packages.iter().map(|(name, version)| format!("{name} {version}")).collect();
        assert_eq!(shown, ["bash 5.2-1", "half 2", "libc6:amd64 2.36-9+deb12u4", "libc6:i386 2.36-9+deb12u4"]);
        assert!(dpkg("").is_empty());
    }

    #[test]
    fn packages_are_read_from_the_list_in_a_commit() {
        let metadata = VariantDict::new(None);
        assert_eq!(rpm(&metadata), None);
        let row = |name: &str, epoch: &str, version: &str| -> (String, String, String, String, String) {
            (name.into(), epoch.into(), version.into(), "1.el9".into(), "x86_64".into())
        };
        let list =
            vec![row("bash", "0", "5.1"), row("kernel", "", "5.14"), row("kernel", "", "5.15"), row("bind", "32", "9")];
        metadata.insert_value(RPM_LIST, &list.to_variant());
        let packages = rpm(&metadata).unwrap();
        assert_eq!(packages["bash.x86_64"], "5.1-1.el9");
        assert_eq!(packages["bind.x86_64"], "32:9-1.el9");
        assert_eq!(packages["kernel.x86_64"], "5.14-1.el9, 5.15-1.el9");
    }

    #[test]
    fn added_removed_and_changed_packages_are_listed() {
        let list = |rows: &[(&str, &str)]| -> Packages {
            rows.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
        };
        let changes = PackageChanges::between(
            &list(&[("a", "1"), ("b", "1"), ("c", "1")]),
            &list(&[("b", "2"), ("c", "1"), ("d", "1")]),
        );
        assert_eq!(changes.added, [Package { name: "d".into(), version: "1".into() }]);
        assert_eq!(changes.removed, [Package { name: "a".into(), version: "1".into() }]);
        assert_eq!(changes.changed, [PackageChange { name: "b".into(), from: "1".into(), to: "2".into() }]);
    }
}
