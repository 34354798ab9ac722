//! What a unit is defined as: its fragment, the drop-ins of all its names, and the links that want it. Pure: the
//! files are data here, [`super::files`] reads them.
//!
//! Source of the rules: systemd.unit(5), systemd.syntax(7). Left out on purpose: what generators write and what is
//! transient. It is made anew at each reload, or by whoever made it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// A file of a directory with unit files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Its text. A link to the unit's own name somewhere else is one, too.
    File(String),
    /// An empty file, or a link to `/dev/null`.
    Masked,
    /// A link to another name: an alias of that.
    Alias(String),
    /// `NAME.d`, `NAME.wants`, `NAME.requires`: file names, with their text where that matters. `None` is a file or
    /// a link that is masked.
    Directory(BTreeMap<String, Option<String>>),
}

/// One directory of the search path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitDirectory {
    /// As the machine has it, such as `/usr/lib/systemd/system`.
    pub path: String,
    /// What is in it.
    pub entries: BTreeMap<String, Entry>,
}

/// All unit files of a system, the directory that wins first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitFiles(pub Vec<UnitDirectory>);

/// Sections with their keys, each with its values in order. An empty assignment has emptied the list before it.
pub type Settings = BTreeMap<String, BTreeMap<String, Vec<String>>>;

/// What a unit is, in effect.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Where its fragment is; absent for one that has drop-ins only.
    pub fragment: Option<String>,
    /// Whether it is masked.
    #[serde(default)]
    pub masked: bool,
    /// Fragment and drop-ins together.
    pub settings: Settings,
}

impl Definition {
    /// The last value of a key that has one value.
    pub fn value(&self, section: &str, key: &str) -> Option<&str> {
        self.values(section, key).last().map(String::as_str)
    }

    /// Of the socket `name`: the service that it starts. `None` where each connection has its own.
    pub fn service_of(&self, name: &str) -> Option<String> {
        if self.value("Socket", "Accept").is_some_and(is_true) {
            return None;
        }
        let same_name = || name.strip_suffix(".socket").map(|stem| format!("{stem}.service"));
        self.value("Socket", "Service").map(str::to_owned).or_else(same_name)
    }

    /// All values of a key.
    pub fn values(&self, section: &str, key: &str) -> &[String] {
        self.settings.get(section).and_then(|keys| keys.get(key)).map_or(&[], Vec::as_slice)
    }
}

/// systemd.syntax(7).
pub(super) fn is_true(word: &str) -> bool {
    matches!(word.to_ascii_lowercase().as_str(), "1" | "yes" | "y" | "true" | "t" | "on")
}

/// Aliases of aliases are followed so far.
const DEPTH: usize = 8;

impl UnitFiles {
    /// The definition of `name`, or `None` when there is no file for it.
    pub fn definition(&self, name: &str) -> Option<Definition> {
        let found = self.fragment(name, DEPTH);
        let primary = found.as_ref().map_or(name, |found| found.name.as_str());
        let drop_ins = self.drop_ins(&self.names(primary));
        if found.is_none() && drop_ins.is_empty() {
            return None;
        }
        let mut definition = Definition::default();
        if let Some(found) = &found {
            definition.fragment = Some(found.path.clone());
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

    /// All that `target` pulls in, itself included and what is masked left out: `Wants=`, `Requires=`, `BindsTo=`,
    /// `Upholds=` and the links in `.wants` and `.requires`, and theirs.
    pub fn pulled_in(&self, target: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut pending = vec![target.to_owned()];
        while let Some(name) = pending.pop() {
            let name = self.fragment(&name, DEPTH).map_or(name, |found| found.name);
            if !seen.insert(name.clone()) {
                continue;
            }
            let definition = self.definition(&name).unwrap_or_default();
            if definition.masked {
                seen.remove(&name);
                continue;
            }
            for key in ["Wants", "Requires", "BindsTo", "Upholds"] {
                let lists = definition.values("Unit", key).iter();
                pending.extend(lists.flat_map(|list| list.split_whitespace()).map(str::to_owned));
            }
            for name in self.names(&name) {
                for suffix in ["wants", "requires", "upholds"] {
                    // As with drop-ins, the first directory that has a name decides about it.
                    let mut links = BTreeMap::new();
                    for (unit, link) in self.directories(&format!("{name}.{suffix}")).flatten() {
                        links.entry(unit).or_insert(link.is_some());
                    }
                    pending.extend(links.into_iter().filter(|(_, counts)| *counts).map(|(unit, _)| unit.clone()));
                }
            }
        }
        seen
    }

    fn directories(&self, name: &str) -> impl Iterator<Item = &BTreeMap<String, Option<String>>> {
        self.0.iter().filter_map(move |dir| match dir.entries.get(name) {
            Some(Entry::Directory(files)) => Some(files),
            _ => None,
        })
    }

    fn fragment(&self, name: &str, depth: usize) -> Option<Found<'_>> {
        let template = template_of(name);
        let candidates = [Some(name.to_owned()), template.map(|(stem, _, suffix)| format!("{stem}@.{suffix}"))];
        for candidate in candidates.into_iter().flatten() {
            for dir in &self.0 {
                let path = || format!("{}/{candidate}", dir.path);
                match dir.entries.get(&candidate) {
                    Some(Entry::File(text)) => {
                        return Some(Found { name: name.into(), path: path(), text: Some(text) });
                    }
                    Some(Entry::Masked) => return Some(Found { name: name.into(), path: path(), text: None }),
                    Some(Entry::Alias(target)) if depth > 0 => {
                        // An alias of a template is one of each of its instances.
                        let target = match (template_of(target), template) {
                            (Some((stem, "", suffix)), Some((_, instance, _))) => format!("{stem}@{instance}.{suffix}"),
                            _ => target.clone(),
                        };
                        return self.fragment(&target, depth - 1);
                    }
                    Some(Entry::Alias(_) | Entry::Directory(_)) | None => {}
                }
            }
        }
        None
    }

    /// The unit's names, its own first. An alias of the template of an instance is one of the instance.
    fn names(&self, primary: &str) -> Vec<String> {
        let mut names = vec![primary.to_owned()];
        let template = template_of(primary);
        for (name, entry) in self.0.iter().flat_map(|dir| &dir.entries) {
            let Entry::Alias(target) = entry else { continue };
            let alias = match (template_of(target), template_of(name), template) {
                (Some((stem, "", suffix)), Some((alias, "", _)), Some((own, instance, kind)))
                    if (stem, suffix) == (own, kind) =>
                {
                    format!("{alias}@{instance}.{suffix}")
                }
                _ if target == primary => name.clone(),
                _ => continue,
            };
            if !names.contains(&alias) {
                names.push(alias);
            }
        }
        names
    }

    /// By file name, which is the order in which they apply; of one name only that of the first directory.
    fn drop_ins(&self, names: &[String]) -> BTreeMap<&str, Option<&String>> {
        let mut found = BTreeMap::new();
        for folder in names.iter().flat_map(|name| drop_in_directories(name)) {
            for (file, text) in self.directories(&folder).flatten().filter(|(file, _)| file.ends_with(".conf")) {
                found.entry(file.as_str()).or_insert(text.as_ref());
            }
        }
        found
    }
}

struct Found<'a> {
    /// The name that it is an alias of, or its own.
    name: String,
    path: String,
    /// `None`: masked.
    text: Option<&'a String>,
}

/// `getty@tty1.service` is `("getty", "tty1", "service")`.
fn template_of(name: &str) -> Option<(&str, &str, &str)> {
    let (stem, rest) = name.split_once('@')?;
    let (instance, suffix) = rest.rsplit_once('.')?;
    Some((stem, instance, suffix))
}

/// Where drop-ins of a name are: its own directory, that of its template, those of its dashed prefixes, that of its kind.
fn drop_in_directories(name: &str) -> Vec<String> {
    let mut folders = vec![format!("{name}.d")];
    if let Some((stem, instance, suffix)) = template_of(name)
        && !instance.is_empty()
    {
        folders.push(format!("{stem}@.{suffix}.d"));
    }
    if let Some((stem, suffix)) = name.rsplit_once('.') {
        let stem = stem.split('@').next().unwrap_or(stem);
        let dashes = stem.char_indices().rev().filter(|&(at, letter)| letter == '-' && at + 1 < stem.len());
        folders.extend(dashes.map(|(at, _)| format!("{}.{suffix}.d", &stem[..=at])));
        folders.push(format!("{suffix}.d"));
    }
    folders
}

/// Adds what a file says. Comments, blank lines and the order of sections and keys are nothing; lines that end in a
/// backslash go on in the next one.
fn parse(text: &str, into: &mut Settings) {
    let mut section = String::new();
    let mut pending = String::new();
    for line in text.lines() {
        let line = line.trim();
        // Also in the middle of a continued line.
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(start) = line.strip_suffix('\\') {
            pending.push_str(start);
            pending.push(' ');
            continue;
        }
        pending.push_str(line);
        assignment(pending.trim(), &mut section, into);
        pending.clear();
    }
    assignment(pending.trim(), &mut section, into);
}

fn assignment(line: &str, section: &mut String, into: &mut Settings) {
    if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        name.clone_into(section);
        return;
    }
    let Some((key, value)) = line.split_once('=') else { return };
    let (key, value) = (key.trim(), value.trim());
    let keys = into.entry(section.clone()).or_default();
    if value.is_empty() {
        keys.remove(key);
    } else {
        keys.entry(key.to_owned()).or_default().push(value.to_owned());
    }
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
