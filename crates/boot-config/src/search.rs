//! Finds unit files and all forms of masks by systemd's rules (systemd.unit(5)).

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use crate::under;

/// Directories of system units in descending priority, without the output of generators.
const CONFIGURED: &[&str] =
    &["/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"];

/// Directories of system units in descending priority, with the output of generators.
pub const ALL: &[&str] = &[
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/run/systemd/generator.late",
];

/// The largest number of links to follow. A longer chain counts as a loop.
pub(crate) const MAX_LINKS: usize = 16;

/// The unit files of the machine whose root is `root`.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// Prefix of every path.
    pub root: &'a Path,
    /// Directories in descending priority.
    pub directories: &'a [&'static str],
    /// Units that the kernel command line masks.
    pub masks: &'a [String],
}

/// The result of a search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No directory has the unit, or its link is dangling.
    Missing,
    /// The unit is masked: by the kernel command line, a link that ends at `/dev/null`, or an empty file.
    Masked,
    /// The unit's file or link.
    File(PathBuf),
}

impl<'a> Search<'a> {
    /// Searches only the directories that are complete before generators run. A generator must not treat its own output, or
    /// that of a concurrent generator, as configuration.
    pub fn configured(root: &'a Path, masks: &'a [String]) -> Self {
        Self { root, directories: CONFIGURED, masks }
    }

    /// Searches only the directories of distributions and of the initramfs, which a file in `/etc` hides.
    pub fn hidden_by_etc(root: &'a Path) -> Self {
        Self { root, directories: &CONFIGURED[1..], masks: &[] }
    }

    /// Searches all directories, as systemd does after the generators have run.
    pub fn complete(root: &'a Path) -> Self {
        Self { root, directories: ALL, masks: &[] }
    }

    /// Finds the file of `name`.
    pub fn find(&self, name: &str) -> Found {
        match self.first(name) {
            _ if self.masks.iter().any(|mask| mask == name) => Found::Masked,
            None => Found::Missing,
            Some(path) => match self.end(&path) {
                End::Null | End::Empty => Found::Masked,
                End::Nowhere => Found::Missing,
                End::File => Found::File(path),
            },
        }
    }

    /// Returns true if `wants/name` exists and is not masked. systemd uses only the name of the link and ignores its target,
    /// unless the target is a mask.
    pub fn pulls_in(&self, wants: &str, name: &str) -> bool {
        let entry = self.first(&format!("{wants}/{name}"));
        entry.is_some_and(|path| !matches!(self.end(&path), End::Null | End::Empty))
    }

    /// Returns the directory entry of that name with the highest priority.
    pub(crate) fn first(&self, name: &str) -> Option<PathBuf> {
        self.candidates(name).next()
    }

    /// Returns all directory entries of that name in descending priority.
    pub(crate) fn candidates(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let paths = self.directories.iter().map(move |directory| Path::new(directory).join(name));
        paths.filter(|path| fs::symlink_metadata(under(self.root, path)).is_ok())
    }

    /// Finds the end of the links that begin at `path`.
    pub(crate) fn end(&self, path: &Path) -> End {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            if path == Path::new("/dev/null") {
                return End::Null;
            }
            let place = under(self.root, &path);
            let Ok(link) = fs::read_link(&place) else {
                return match fs::metadata(&place) {
                    Ok(found) if found.file_type().is_char_device() => End::Null,
                    Ok(found) if found.is_file() && found.len() == 0 => End::Empty,
                    Ok(found) if found.is_file() => End::File,
                    _ => End::Nowhere,
                };
            };
            path = absolute(&path, &link);
        }
        End::Nowhere
    }
}

/// The end of a chain of links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// `/dev/null`.
    Null,
    /// An empty file.
    Empty,
    /// A file with content.
    File,
    /// A dangling link, a loop, or a directory.
    Nowhere,
}

/// Returns the absolute target of the link `link` at `path`.
fn absolute(path: &Path, link: &Path) -> PathBuf {
    let mut absolute = PathBuf::new();
    for component in path.parent().unwrap_or(Path::new("/")).join(link).components() {
        match component {
            Component::ParentDir => {
                absolute.pop();
            }
            Component::CurDir => {}
            other => absolute.push(other),
        }
    }
    absolute
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::symlink;

    /// Creates a root with unit files (`path`), empty files (`path =`) and links (`path -> target`).
    pub(crate) fn root(entries: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for entry in entries {
            let (path, link) = entry.split_once(" -> ").map_or((*entry, None), |(path, link)| (path, Some(link)));
            let (path, text) = path.strip_suffix(" =").map_or((path, "[Unit]\n[Install]\n"), |path| (path, ""));
            let place = root.path().join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            match link {
                Some(link) => symlink(link, place).unwrap(),
                None => fs::write(place, text).unwrap(),
            }
        }
        root
    }

    #[test]
    fn every_form_of_mask_is_known() {
        let (etc, usr) = ("etc/systemd/system/a.target", "usr/lib/systemd/system/a.target");
        let file = |path: &str| Found::File(Path::new("/").join(path));
        for (entries, expected) in [
            (vec![usr], file(usr)),
            (vec![usr, etc], file(etc)),
            (vec![], Found::Missing),
            (vec![usr, "etc/systemd/system/a.target -> /dev/null"], Found::Masked),
            (vec![usr, "run/systemd/system/a.target -> /dev/null"], Found::Masked),
            (vec![usr, "etc/systemd/system/a.target -> ../../../dev/null"], Found::Masked),
            (vec![usr, "etc/systemd/system/a.target -> /etc/null", "etc/null -> /dev/null"], Found::Masked),
            (vec![usr, "etc/systemd/system/a.target ="], Found::Masked),
            (vec![usr, "etc/systemd/system/a.target -> /opt/a.target", "opt/a.target ="], Found::Masked),
            (vec![usr, "etc/systemd/system/a.target -> /opt/a.target", "opt/a.target"], file(etc)),
            // A file in /etc wins over a mask in /run.
            (vec![usr, etc, "run/systemd/system/a.target -> /dev/null"], file(etc)),
            (vec![usr, "etc/systemd/system/a.target -> /opt/a.target"], Found::Missing),
            (vec![usr, "etc/systemd/system/a.target -> a.target"], Found::Missing),
        ] {
            let root = root(&entries);
            assert_eq!(Search::configured(root.path(), &[]).find("a.target"), expected, "{entries:?}");
        }
        let root = root(&[usr]);
        let masks = ["a.target".to_owned()];
        assert_eq!(Search::configured(root.path(), &masks).find("a.target"), Found::Masked, "by the command line");
    }
}
