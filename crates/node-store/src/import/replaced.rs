//! Content objects of plain layers of which only a copy with another SELinux label is left.
//!
//! A file gets its final label after the merge of all layers. Then the store has it twice, and the first object is
//! removed. The list of the layer still names that object, so another pull must find its content and its label.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::store::ObjectId;
use support::lock;

/// The copy of a removed object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Replacement {
    /// The object with the same content, owner, mode and attributes, except for the label.
    pub copy: ObjectId,
    /// Label of the removed object.
    pub label: Option<Arc<[u8]>>,
}

/// The removed objects of a store, with a line in a file for each.
#[derive(Debug)]
pub(super) struct Replaced {
    path: PathBuf,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    known: HashMap<ObjectId, Replacement>,
    /// Open after the first addition.
    file: Option<File>,
}

impl Replaced {
    /// Reads the file at `path`, if it exists. A line that a kill cut short, or that is damaged, is ignored: a pull fetches
    /// the layer of its object again.
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let text = support::if_found(std::fs::read(&path))?.unwrap_or_default();
        let mut labels = HashSet::new();
        let known = String::from_utf8_lossy(&text).lines().filter_map(|line| parse(line, &mut labels)).collect();
        Ok(Self { path, list: Mutex::new(List { known, file: None }) })
    }

    /// Returns the replacement of an object.
    pub(super) fn find(&self, id: &ObjectId) -> Option<Replacement> {
        lock(&self.list).known.get(id).cloned()
    }

    /// Records a replacement, before the object is removed.
    pub(super) fn add(&self, id: ObjectId, replacement: Replacement) -> io::Result<()> {
        let label = replacement.label.as_deref().map_or_else(|| "-".to_owned(), hex::encode);
        let mut list = lock(&self.list);
        let mut line = format!("{id} {} {label}\n", replacement.copy);
        let file = match &mut list.file {
            Some(file) => file,
            none => {
                if let Some(dir) = self.path.parent() {
                    std::fs::create_dir_all(dir)?;
                }
                // Ends a line that a kill cut short.
                line.insert(0, '\n');
                none.insert(OpenOptions::new().create(true).append(true).open(&self.path)?)
            }
        };
        file.write_all(line.as_bytes())?;
        list.known.insert(id, replacement);
        Ok(())
    }
}

fn parse(line: &str, labels: &mut HashSet<Arc<[u8]>>) -> Option<(ObjectId, Replacement)> {
    let mut parts = line.split(' ');
    let (id, copy, label) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
    let label = match label {
        "-" => None,
        label => {
            let label: Arc<[u8]> = hex::decode(label).ok()?.into();
            // The value of the attribute ends with a zero byte.
            label.ends_with(&[0]).then_some(())?;
            // Equal labels share memory.
            let known = labels.get(&label).cloned();
            labels.insert(label.clone());
            known.or(Some(label))
        }
    };
    Some((id, Replacement { copy, label }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn replacements_outlive_a_kill() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lists/replaced");
        let id = |byte| ObjectId([byte; 32]);
        let labelled = |byte, label: Option<&[u8]>| Replacement { copy: id(byte), label: label.map(Arc::from) };
        let first = Replaced::open(path.clone()).unwrap();
        first.add(id(1), labelled(2, Some(b"a:b\0"))).unwrap();
        first.add(id(3), labelled(4, None)).unwrap();
        let mut cut = OpenOptions::new().append(true).open(&path).unwrap();
        cut.write_all(format!("{} {} {}\n", id(5), id(6), hex::encode("a:")).as_bytes()).unwrap();
        cut.write_all(b"\xff\xfe\n").unwrap();
        cut.write_all(format!("{} {}", id(5), id(6)).as_bytes()).unwrap();
        let again = Replaced::open(path.clone()).unwrap();
        again.add(id(7), labelled(8, None)).unwrap();
        for list in [again, Replaced::open(path).unwrap()] {
            assert_eq!(list.find(&id(1)), Some(labelled(2, Some(b"a:b\0"))));
            assert_eq!(list.find(&id(3)), Some(labelled(4, None)));
            assert_eq!((list.find(&id(5)), list.find(&id(7))), (None, Some(labelled(8, None))));
        }
    }
}
