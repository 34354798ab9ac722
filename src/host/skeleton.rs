//! Creates the entries of `/var` and `/opt` that the node image's content expects.
//!
//! A commit has no `/var`. An image defines its content in tmpfiles.d, which systemd-tmpfiles applies, and in two
//! directories of `/usr`: `/usr/share/factory/var`, a skeleton of `/var`, and `/usr/lib/opt`, which has the packages of
//! `/opt`. This module writes lines for systemd-tmpfiles that create the missing entries.
//!
//! Existing entries are not changed, with one exception: a link in `/opt` to a path in `/usr/lib/opt` that the node image
//! lacks is removed. It came from the bootimage, and it would keep a service from creating a directory of that name.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use support::if_found;
use tracing::warn;

const FACTORY: &str = "usr/share/factory/var";
const OPT_CONTENT: &str = "usr/lib/opt";

/// Returns lines of tmpfiles.d(5) for the entries that the system below `root` lacks.
///
/// # Errors
/// A directory cannot be read.
pub(super) fn lines(root: &Path) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    let factory = root.join(FACTORY);
    if factory.is_dir() {
        missing(root, &factory, &root.join("var"), &mut lines)?;
    }
    if let Some(opt) = opt(root) {
        for entry in sorted(&root.join(OPT_CONTENT))? {
            let Some(name) = entry.file_name() else { continue };
            if absent(&opt.join(name))? {
                lines.extend(line("L", root, &opt.join(name), &into_usr(root, &opt).join(name)));
            }
        }
    }
    Ok(lines)
}

/// Removes links in `/opt` whose targets in `/usr/lib/opt` do not exist. Returns them.
///
/// # Errors
/// A link cannot be removed.
pub(super) fn remove_dangling(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let Some(opt) = opt(root) else { return Ok(removed) };
    for entry in sorted(&opt)? {
        let Ok(target) = fs::read_link(&entry) else { continue };
        let target = lexical(opt.strip_prefix(root).unwrap_or(&opt), &target);
        if target.starts_with(OPT_CONTENT) && absent(&root.join(target))? {
            fs::remove_file(&entry)?;
            removed.push(entry);
        }
    }
    Ok(removed)
}

/// Appends lines for the entries that `from` has and `to` lacks. Does not follow a link in `to`: an administrator chose
/// its target.
fn missing(root: &Path, from: &Path, to: &Path, lines: &mut Vec<String>) -> io::Result<()> {
    for source in sorted(from)? {
        let Some(name) = source.file_name() else { continue };
        let place = to.join(name);
        let kind = fs::symlink_metadata(&source)?.file_type();
        if !absent(&place)? {
            if kind.is_dir() && fs::symlink_metadata(&place)?.is_dir() {
                missing(root, &source, &place, lines)?;
            }
        } else if kind.is_symlink() {
            lines.extend(line("L", root, &place, &fs::read_link(&source)?));
        } else {
            let source = Path::new("/").join(source.strip_prefix(root).unwrap_or(&source));
            lines.extend(line("C", root, &place, &source));
        }
    }
    Ok(())
}

/// Returns the directory of `/opt`, which is a link to `/var/opt` on ostree systems, or `None` if it does not exist.
fn opt(root: &Path) -> Option<PathBuf> {
    let opt = root.join("opt");
    match fs::read_link(&opt) {
        Ok(target) => Some(root.join(lexical(Path::new(""), &target))).filter(|path| path.is_dir()),
        Err(_) => opt.is_dir().then_some(opt),
    }
}

/// Returns the relative path from `directory` to `/usr/lib/opt`, which is valid at any mount point of the root.
fn into_usr(root: &Path, directory: &Path) -> PathBuf {
    let up = directory.strip_prefix(root).unwrap_or(directory).components().map(|_| "..");
    up.chain([OPT_CONTENT]).collect()
}

/// Returns the target of a link in `directory`, relative to the root, without reading the file system.
fn lexical(directory: &Path, target: &Path) -> PathBuf {
    let mut path = if target.is_absolute() { PathBuf::new() } else { directory.to_owned() };
    for component in target.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn absent(path: &Path) -> io::Result<bool> {
    Ok(if_found(fs::symlink_metadata(path))?.is_none())
}

fn sorted(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = if_found(fs::read_dir(directory))?.into_iter().flatten();
    let mut entries: Vec<_> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    entries.sort();
    Ok(entries)
}

/// Returns a line that creates `place`, or `None` if its name has a control character: the tool does not decode escapes in
/// the path, so a line end would end the line.
fn line(kind: &str, root: &Path, place: &Path, argument: &Path) -> Option<String> {
    let place = Path::new("/").join(place.strip_prefix(root).unwrap_or(place));
    let named = place.to_str().filter(|name| !name.contains(char::is_control));
    let Some(name) = named else {
        warn!("skipped {}: tmpfiles.d cannot express this name", place.display());
        return None;
    };
    let name = name.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    // The argument is the rest of the line, so quotes would be part of it.
    Some(format!("{kind} \"{name}\" - - - - {}", escaped(argument)))
}

/// Returns an argument for tmpfiles.d(5) with C escapes and without specifiers.
fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'%' => text.push_str("%%"),
            b'\\' => text.push_str("\\\\"),
            0x20..=0x7e => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree(paths: &[&str]) -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        for path in paths {
            let (path, target) = path.split_once(" -> ").map_or((*path, None), |(path, target)| (path, Some(target)));
            let full = temp.path().join(path);
            fs::create_dir_all(full.parent().unwrap()).unwrap();
            match target {
                Some(target) => symlink(target, full).unwrap(),
                None if path.ends_with('/') => fs::create_dir_all(full).unwrap(),
                None => fs::write(full, path).unwrap(),
            }
        }
        temp
    }

    #[test]
    fn only_missing_entries_get_a_line() {
        let temp = tree(&[
            "usr/share/factory/var/lib/app/data",
            "usr/share/factory/var/lib/there/new one",
            "usr/share/factory/var/lib/there/mine",
            "usr/share/factory/var/lib/elsewhere/x",
            "usr/share/factory/var/run -> ../run",
            "usr/share/factory/var/file-here/x",
            "usr/lib/opt/cni/bin/bridge",
            "usr/lib/opt/vendor/x",
            "opt -> var/opt",
            "var/opt/vendor/own",
            "var/lib/there/mine",
            "var/lib/elsewhere -> /srv/elsewhere",
            "var/file-here",
        ]);
        assert_eq!(
            lines(temp.path()).unwrap(),
            [
                "C \"/var/lib/app\" - - - - /usr/share/factory/var/lib/app",
                "C \"/var/lib/there/new one\" - - - - /usr/share/factory/var/lib/there/new one",
                "L \"/var/run\" - - - - ../run",
                "L \"/var/opt/cni\" - - - - ../../usr/lib/opt/cni",
            ]
        );
        assert_eq!(lines(tree(&["var/", "usr/"]).path()).unwrap(), [""; 0]);
        let plain = tree(&["opt/", "usr/lib/opt/cni/x"]);
        assert_eq!(lines(plain.path()).unwrap(), ["L \"/opt/cni\" - - - - ../usr/lib/opt/cni"]);
        // A place that cannot be read is an error, not a missing entry.
        assert!(lines(tree(&["usr/share/factory/var/x", "var"]).path()).is_err());
        assert!(lines(tree(&["usr/lib/opt", "opt/"]).path()).is_err());
    }

    #[test]
    fn only_dangling_links_are_removed() {
        let temp = tree(&[
            "opt -> var/opt",
            "usr/lib/opt/kept/x",
            "var/opt/kept -> ../../usr/lib/opt/kept",
            "var/opt/cni -> ../../usr/lib/opt/cni",
            "var/opt/absolute -> /usr/lib/opt/absolute",
            "var/opt/admin -> /srv/not-mounted-yet",
            "var/opt/file",
        ]);
        let removed = remove_dangling(temp.path()).unwrap();
        assert_eq!(removed, ["absolute", "cni"].map(|name| temp.path().join("var/opt").join(name)));
        let left: Vec<_> = sorted(&temp.path().join("var/opt")).unwrap();
        assert_eq!(left, ["admin", "file", "kept"].map(|name| temp.path().join("var/opt").join(name)));
    }

    #[test]
    fn names_with_control_characters_are_skipped() {
        let temp = tree(&["usr/share/factory/var/line\nend", "usr/share/factory/var/fine", "var/"]);
        assert_eq!(lines(temp.path()).unwrap(), ["C \"/var/fine\" - - - - /usr/share/factory/var/fine"]);
    }

    #[test]
    fn systemd_tmpfiles_accepts_the_lines() {
        let name = "s p%a\"c\\e'\u{e9}";
        let temp = tree(&[&format!("usr/share/factory/var/{name}/data"), &format!("usr/lib/opt/{name}/x"), "opt/"]);
        fs::create_dir(temp.path().join("var")).unwrap();
        let text = lines(temp.path()).unwrap().join("\n") + "\n";
        let file = temp.path().join("lines.conf");
        fs::write(&file, text).unwrap();
        let root = format!("--root={}", temp.path().display());
        let made =
            std::process::Command::new("systemd-tmpfiles").args([&root, "--create"]).arg(&file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        assert!(temp.path().join("var").join(name).join("data").exists());
        assert_eq!(fs::read_link(temp.path().join("opt").join(name)).unwrap(), Path::new("../usr/lib/opt").join(name));
    }
}
