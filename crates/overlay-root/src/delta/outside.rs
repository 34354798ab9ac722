//! Content that a commit has at the top of its tree, outside `/usr`: the switch shows none of it.

use std::path::Path;

use anyhow::Result;

use super::build::Booted;
use super::compare::{Directory, Listing, Tree};
use super::source::RepoTree;

/// Directories that belong to the machine or are mounted over; `/usr` is compared elsewhere.
const NOT_COMPARED: [&str; 11] =
    ["usr", "etc", "var", "boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "lost+found"];
/// The most paths that are named.
const SHOWN: usize = 12;

/// Returns one line that names the paths at the top of the target commit, and one directory below, that the booted
/// system has not or has otherwise; `None` if there are none.
///
/// # Errors
/// When a tree cannot be read.
pub fn outside_usr(repo: &ostree::Repo, booted: Booted<'_>, commit: &str) -> Result<Option<String>> {
    let tree = RepoTree::new(repo);
    let new = tree.root_of(commit)?;
    let found = match booted {
        Booted::Commit(booted) => differences(&tree, &tree.root_of(booted)?, &new)?,
        // No commit to compare with: what is not there at all.
        Booted::Directory(usr) => {
            let root = usr.parent().unwrap_or(Path::new("/"));
            let mut all = differences(&tree, &Listing::default(), &new)?;
            all.retain(|path| root.join(path).symlink_metadata().is_err());
            all
        }
    };
    Ok(line(&found))
}

fn line(found: &[String]) -> Option<String> {
    let shown: Vec<String> = found.iter().take(SHOWN).map(|path| format!("/{path}")).collect();
    let more = match found.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = shown.join(", ");
    (!found.is_empty())
        .then(|| format!("the node image differs outside /usr in {shown}{more}: the switch changes /usr and /etc only"))
}

/// The paths, relative to the root, that `new` has and `old` has not or has otherwise.
fn differences(tree: &dyn Tree, old: &Listing, new: &Listing) -> Result<Vec<String>> {
    let mut found: Vec<String> = changed_files(old, new, "");
    for (name, directory) in &new.directories {
        let before = old.directories.get(name);
        if NOT_COMPARED.contains(&name.as_str()) || before.is_some_and(|before| before.tree == directory.tree) {
            continue;
        }
        let list = |directory: &Directory| tree.list(&directory.tree);
        let after = list(directory)?;
        if before.is_none() && after == Listing::default() {
            found.push(name.clone());
        }
        let before = before.map(list).transpose()?.unwrap_or_default();
        let differs = |(child, directory): &(&String, &Directory)| {
            before.directories.get(*child).is_none_or(|before| before.tree != directory.tree)
        };
        found.extend(after.directories.iter().filter(differs).map(|(child, _)| format!("{name}/{child}")));
        found.extend(changed_files(&before, &after, &format!("{name}/")));
    }
    found.sort();
    Ok(found)
}

fn changed_files(old: &Listing, new: &Listing, prefix: &str) -> Vec<String> {
    let changed = new.files.iter().filter(|(name, object)| old.files.get(*name) != Some(object));
    changed.map(|(name, _)| format!("{prefix}{name}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::delta::Checksum;

    struct Trees(HashMap<Checksum, Listing>);

    impl Tree for Trees {
        fn list(&self, tree: &Checksum) -> Result<Listing> {
            Ok(self.0.get(tree).cloned().unwrap_or_default())
        }

        fn size(&self, _: &Checksum) -> Result<u64> {
            Ok(0)
        }
    }

    fn listing(files: &[(&str, u8)], directories: &[(&str, u8)]) -> Listing {
        let directory = |byte: &u8| Directory { tree: [*byte; 32], meta: [0; 32] };
        Listing {
            files: files.iter().map(|(name, byte)| (name.to_string(), [*byte; 32])).collect(),
            directories: directories.iter().map(|(name, byte)| (name.to_string(), directory(byte))).collect(),
        }
    }

    #[test]
    fn content_outside_usr_is_named() {
        let trees = Trees(HashMap::from([
            ([1; 32], listing(&[("x", 1)], &[])),
            ([2; 32], listing(&[("x", 1), ("y", 2)], &[("z", 9)])),
        ]));
        let old = listing(&[("bin", 1), ("foo", 2)], &[("opt", 1), ("same", 1), ("usr", 1), ("run", 1), ("gone", 1)]);
        let new = listing(
            &[("bin", 1), ("foo", 3), ("new", 4)],
            &[("opt", 2), ("same", 1), ("usr", 2), ("run", 2), ("srv", 1), ("data", 8)],
        );
        let found = differences(&trees, &old, &new).unwrap();
        assert_eq!(found, ["data", "foo", "new", "opt/y", "opt/z", "srv/x"]);
        let told = line(&found).unwrap();
        assert!(told.contains("/data, /foo, /new, /opt/y"), "{told}");
        assert_eq!(line(&[]), None);
        assert!(line(&vec!["x".to_owned(); 20]).unwrap().contains("and 8 more"));
    }
}
