//! The definition of a unit: its fragment, the drop-ins of all its names, and the links that want it. Pure:
//! [`super::files`] reads the files.
//!
//! Source of the rules: systemd.unit(5). Generated and transient units are deliberately excluded, because systemd creates
//! them again at each reload.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::names::{dependency, folders, template, with_instance};
use super::syntax::{Settings, is_true, parse};

/// An entry of a unit directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// A unit file, with its text. Also a link to a file outside the search path, whatever the name of that file.
    File(String),
    /// An empty file, or a link to one or to `/dev/null`.
    Masked,
    /// A link to another name in the search path: an alias of that unit.
    Alias(String),
    /// `NAME.d`, `NAME.wants`, `NAME.requires` or `NAME.upholds`: the file names, and the text of drop-ins (empty for
    /// links). `None` is a masked file or link.
    Directory(BTreeMap<String, Option<String>>),
}

/// A directory of the search path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct UnitDirectory {
    /// Path on the machine, such as `/usr/lib/systemd/system`.
    pub(super) path: String,
    /// Files, links and directories, by name.
    pub(super) entries: BTreeMap<String, Entry>,
}

/// All unit files of a system, by directory in descending priority.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitFiles(pub(super) Vec<UnitDirectory>);

/// The definition of a unit by its files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Path of the unit file; `None` if the unit has drop-ins only.
    pub(super) fragment: Option<String>,
    /// True if the unit is masked.
    #[serde(default)]
    pub(super) masked: bool,
    /// Settings of the unit file and its drop-ins.
    pub(super) settings: Settings,
}

impl Definition {
    /// Returns the last value of a key.
    pub(super) fn value(&self, section: &str, key: &str) -> Option<&str> {
        self.values(section, key).last().map(String::as_str)
    }

    /// Returns the service that the socket `name` starts, or `None` if it starts one service per connection.
    pub(super) fn service_of(&self, name: &str) -> Option<String> {
        if self.value("Socket", "Accept").is_some_and(is_true) {
            return None;
        }
        let same_name = || name.strip_suffix(".socket").map(|stem| format!("{stem}.service"));
        self.value("Socket", "Service").map(str::to_owned).or_else(same_name)
    }

    /// Returns all values of a key, in order.
    pub(super) fn values(&self, section: &str, key: &str) -> &[String] {
        self.settings.get(section).and_then(|keys| keys.get(key)).map_or(&[], Vec::as_slice)
    }
}

/// The largest number of alias links that systemd follows to a unit file.
const FOLLOWED: usize = 8;

impl UnitFiles {
    /// Returns the definition of `name`, or `None` if it has neither a unit file nor a drop-in.
    pub fn definition(&self, name: &str) -> Option<Definition> {
        let found = self.fragment(name);
        let names = self.names(name, found.as_ref());
        let drop_ins = self.drop_ins(&names);
        if found.is_none() && drop_ins.is_empty() {
            return None;
        }
        let mut definition = Definition::default();
        if let Some(found) = &found {
            definition.fragment = Some(found.path());
            match found.text {
                Some(text) => parse(text, &mut definition.settings),
                None => definition.masked = true,
            }
        }
        for text in drop_ins.values().copied().flatten() {
            parse(text, &mut definition.settings);
        }
        definition.settings.retain(|_, keys| !keys.is_empty());
        Some(definition)
    }

    /// Returns `target` and all units that it pulls in, directly or indirectly, without masked units. A unit is pulled in
    /// by `Wants=`, `Requires=`, `BindsTo=` and `Upholds=`, and by links in `.wants`, `.requires` and `.upholds`.
    pub fn pulled_in(&self, target: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut pending = vec![target.to_owned()];
        while let Some(name) = pending.pop() {
            let found = self.fragment(&name);
            let names = self.names(&name, found.as_ref());
            let Some(name) = names.first() else { continue };
            if found.is_some_and(|found| found.text.is_none()) || !seen.insert(name.clone()) {
                continue;
            }
            let definition = self.definition(name).unwrap_or_default();
            let mut wanted: Vec<&str> = Vec::new();
            for key in ["Wants", "Requires", "BindsTo", "Upholds"] {
                wanted.extend(definition.values("Unit", key).iter().flat_map(|list| list.split_whitespace()));
            }
            for suffix in ["wants", "requires", "upholds"] {
                // As with drop-ins, the first directory that has a link of this name takes precedence.
                let mut links = BTreeMap::new();
                for (unit, link) in self.directories(&names, suffix).into_iter().flatten() {
                    links.entry(unit.as_str()).or_insert(link.is_some());
                }
                wanted.extend(links.into_iter().filter(|(_, counts)| *counts).map(|(unit, _)| unit));
            }
            pending.extend(wanted.into_iter().filter_map(|wanted| dependency(wanted, name)));
        }
        seen
    }

    /// Finds the unit file of `name` or of its template, following aliases.
    fn fragment(&self, name: &str) -> Option<Found<'_>> {
        self.resolve(name).or_else(|| self.resolve(&template(name)?))
    }

    fn resolve(&self, name: &str) -> Option<Found<'_>> {
        let mut name = name;
        for _ in 0..=FOLLOWED {
            let (dir, file, entry) = self.0.iter().find_map(|dir| {
                let (file, entry) = dir.entries.get_key_value(name)?;
                (!matches!(entry, Entry::Directory(_))).then_some((dir, file, entry))
            })?;
            let text = match entry {
                Entry::Alias(target) => {
                    name = target;
                    continue;
                }
                Entry::File(text) => Some(text),
                Entry::Masked | Entry::Directory(_) => None,
            };
            return Some(Found { dir, file, text });
        }
        None
    }

    /// Returns all names of a unit: first its primary name (that of its unit file, if it has one), then its aliases.
    fn names(&self, name: &str, found: Option<&Found<'_>>) -> Vec<String> {
        let Some(found) = found else { return vec![name.to_owned()] };
        let primary = with_instance(found.file, name);
        let mut names = vec![primary.clone()];
        for (alias, entry) in self.0.iter().flat_map(|dir| &dir.entries) {
            if !matches!(entry, Entry::Alias(_)) {
                continue;
            }
            // An alias of a masked unit is not one of this unit's names.
            let Some(target) = self.resolve(alias).filter(|target| target.text.is_some()) else { continue };
            let alias = match with_instance(target.file, alias) {
                target if target == primary => alias.clone(),
                // An alias of a template applies to each instance that has no unit file itself.
                target if target == found.file => with_instance(alias, name),
                _ => continue,
            };
            if !names.contains(&alias) {
                names.push(alias);
            }
        }
        names
    }

    /// Returns the directories with this suffix that belong to the names, in the order in which systemd searches them:
    /// by name, then by position in the search path, then from the most specific prefix to the least specific. The
    /// directories of the unit type (`service.d`) are last.
    fn directories(&self, names: &[String], suffix: &str) -> Vec<&BTreeMap<String, Option<String>>> {
        let kind = names.first().and_then(|name| name.rsplit_once('.')).map(|(_, kind)| vec![kind.to_owned()]);
        let mut found = Vec::new();
        for folders in names.iter().map(|name| folders(name)).chain(kind) {
            for dir in &self.0 {
                found.extend(folders.iter().filter_map(|name| match dir.entries.get(&format!("{name}.{suffix}")) {
                    Some(Entry::Directory(files)) => Some(files),
                    _ => None,
                }));
            }
        }
        found
    }

    /// Returns the drop-ins in the order in which they apply, by file name. Of equal names the first one found counts.
    fn drop_ins(&self, names: &[String]) -> BTreeMap<&str, Option<&String>> {
        let mut found = BTreeMap::new();
        for (file, text) in self.directories(names, "d").into_iter().flatten() {
            if file.ends_with(".conf") && !file.starts_with('.') {
                found.entry(file.as_str()).or_insert(text.as_ref());
            }
        }
        found
    }
}

/// The unit file that [`UnitFiles::resolve`] found.
struct Found<'a> {
    dir: &'a UnitDirectory,
    /// The name of the file, after aliases are resolved.
    file: &'a str,
    /// `None` if the unit is masked.
    text: Option<&'a String>,
}

impl Found<'_> {
    fn path(&self) -> String {
        format!("{}/{}", self.dir.path, self.file)
    }
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
