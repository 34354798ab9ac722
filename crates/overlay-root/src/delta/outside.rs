//! Content of a commit outside `/usr`, which the switch does not make visible.

use std::path::Path;

use anyhow::Result;

use super::build::Booted;
use super::compare::{Directory, Listing, Tree};
use super::source::StoreTree;
use node_store::store::{NodeStore, ObjectId};

/// Top-level directories that are not compared: they belong to the machine or are mount points. `/usr` is in the delta.
const NOT_COMPARED: [&str; 11] =
    ["usr", "etc", "var", "boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "lost+found"];
/// Limit of the paths in the message.
const SHOWN: usize = 12;

/// Returns one line with the paths outside `/usr` that differ between the target commit and the booted system, or `None`
/// if there are none. Compares the root directory and one level below it.
///
/// # Errors
/// A tree cannot be read.
pub fn outside_usr(store: &NodeStore, booted: Booted<'_>, commit: ObjectId) -> Result<Option<String>> {
    let tree = StoreTree(store);
    let new = tree.root_of(commit)?;
    let found = match booted {
        Booted::Commit(booted) => differences(&tree, &tree.root_of(booted)?, &new)?,
        // Without a booted commit, only missing paths count.
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

/// Returns the paths, relative to the root, of entries of `new` that `old` lacks or that differ from `old`.
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
    use crate::delta::compare::Checksum;

    struct Trees(HashMap<Checksum, Listing>);

    impl Tree for Trees {
        fn list(&self, tree: &Checksum) -> Result<Listing> {
            Ok(self.0.get(tree).cloned().unwrap_or_default())
        }

        fn size(&self, _: &Checksum) -> Result<u64> {
            Ok(0)
        }
    }

    fn id(byte: u8) -> Checksum {
        ObjectId([byte; 32])
    }

    fn listing(files: &[(&str, u8)], directories: &[(&str, u8)]) -> Listing {
        let directory = |byte: &u8| Directory { tree: id(*byte), meta: id(0) };
        Listing {
            files: files.iter().map(|(name, byte)| (name.to_string(), id(*byte))).collect(),
            directories: directories.iter().map(|(name, byte)| (name.to_string(), directory(byte))).collect(),
        }
    }

    #[test]
    fn changed_paths_outside_usr_are_listed() {
        let trees = Trees(HashMap::from([
            (id(1), listing(&[("x", 1)], &[])),
            (id(2), listing(&[("x", 1), ("y", 2)], &[("z", 9)])),
        ]));
        let old = listing(&[("bin", 1), ("foo", 2)], &[("opt", 1), ("same", 1), ("usr", 1), ("run", 1), ("gone", 1)]);
        let new = listing(
            &[("bin", 1), ("foo", 3), ("new", 4)],
            &[("opt", 2), ("same", 1), ("usr", 2), ("run", 2), ("srv", 1), ("data", 8)],
        );
        let found = differences(&trees, &old, &new).unwrap();
        assert_eq!(found, ["data", "foo", "new", "opt/y", "opt/z", "srv/x"]);
        let text = line(&found).unwrap();
        assert!(text.contains("/data, /foo, /new, /opt/y"), "{text}");
        assert_eq!(line(&[]), None);
        assert!(line(&vec!["x".to_owned(); 20]).unwrap().contains("and 8 more"));
    }
}
