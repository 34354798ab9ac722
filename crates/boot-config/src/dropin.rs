//! Finds the drop-in files of the configuration and their order.
//!
//! The files are `*.toml` in `node-image-pivot.conf.d` below `/usr/lib`, `/run` and `/etc`. A file replaces the file of the
//! same name in an earlier directory. A link to `/dev/null` hides it. The remaining files apply in the order of their
//! names, regardless of the directory; later files win.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{Problem, under};

/// The directories of drop-in files, in ascending priority.
const DIRECTORIES: [&str; 3] =
    ["/usr/lib/node-image-pivot.conf.d", "/run/node-image-pivot.conf.d", "/etc/node-image-pivot.conf.d"];

/// Size limit in bytes. It bounds the time that a generator spends reading.
const MAX_BYTES: u64 = 1 << 20;

/// A drop-in file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// Path on the machine, for messages.
    pub path: PathBuf,
    /// Content of the file.
    pub text: String,
}

/// Returns all drop-in files that apply, in ascending priority. A missing directory counts as empty.
///
/// # Errors
/// Fails if a directory cannot be listed or a file cannot be read. The caller must not treat an unreadable file as
/// missing: it may contain `mode = "off"`.
pub fn fragments(root: &Path) -> Result<Vec<Fragment>, Problem> {
    selected(root, &DIRECTORIES.map(Path::new))
}

/// Returns the drop-in files of a single directory, which has an absolute path, in ascending priority.
///
/// # Errors
/// Fails as [`fragments`].
pub fn fragments_in(directory: &Path) -> Result<Vec<Fragment>, Problem> {
    selected(Path::new("/"), &[directory])
}

fn selected(root: &Path, directories: &[&Path]) -> Result<Vec<Fragment>, Problem> {
    let mut by_name: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let entries = match fs::read_dir(under(root, directory)) {
            Ok(entries) => entries,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            Err(e) => return Err(Problem(format!("cannot list {}: {e}", directory.display()))),
        };
        for entry in entries {
            let entry = entry.map_err(|e| Problem(format!("cannot list {}: {e}", directory.display())))?;
            let name = entry.file_name();
            if Path::new(&name).extension().is_some_and(|extension| extension == "toml") {
                by_name.insert(name.clone(), directory.join(name));
            }
        }
    }
    by_name.into_values().filter_map(|path| read(root, path).transpose()).collect()
}

fn read(root: &Path, path: PathBuf) -> Result<Option<Fragment>, Problem> {
    let place = under(root, &path);
    if fs::read_link(&place).is_ok_and(|target| target == Path::new("/dev/null")) {
        return Ok(None);
    }
    let problem =
        |cause: &str| Problem(format!("cannot read {}: {cause}; correct the file or remove it", path.display()));
    let metadata = fs::metadata(&place).map_err(|e| problem(&e.to_string()))?;
    // Opening a named pipe would block until a writer opens it.
    if !metadata.is_file() {
        return Err(problem("not a regular file"));
    }
    if metadata.len() > MAX_BYTES {
        return Err(problem("larger than 1 MiB"));
    }
    let text = fs::read_to_string(&place).map_err(|e| problem(&e.to_string()))?;
    Ok(Some(Fragment { path, text }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(root: &Path, path: &str, text: &str) {
        let path = under(root, path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn files_are_ordered_replaced_and_masked() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "/usr/lib/node-image-pivot.conf.d/10-a.toml", "hidden");
        write(root, "/usr/lib/node-image-pivot.conf.d/50-b.toml", "vendor b");
        write(root, "/usr/lib/node-image-pivot.conf.d/70-masked.toml", "masked");
        write(root, "/usr/lib/node-image-pivot.conf.d/readme.txt", "not ours");
        write(root, "/run/node-image-pivot.conf.d/60-c.toml", "run c");
        write(root, "/etc/node-image-pivot.conf.d/10-a.toml", "etc a");
        symlink("/dev/null", under(root, "/etc/node-image-pivot.conf.d/70-masked.toml")).unwrap();
        let got: Vec<_> = fragments(root)
            .unwrap()
            .into_iter()
            .map(|f| (f.path.to_str().unwrap().replace("/node-image-pivot.conf.d", ""), f.text))
            .collect();
        let expected = [("/etc/10-a.toml", "etc a"), ("/usr/lib/50-b.toml", "vendor b"), ("/run/60-c.toml", "run c")];
        assert_eq!(got, expected.map(|(path, text)| (path.to_owned(), text.to_owned())));
    }

    #[test]
    fn missing_directories_are_empty() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(fragments(root.path()), Ok(vec![]));
    }

    #[test]
    fn an_unreadable_file_is_an_error_that_names_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        let message = fragments(root).unwrap_err().to_string();
        assert!(
            message.starts_with("cannot read /etc/node-image-pivot.conf.d/10-a.toml: not a regular file; "),
            "{message}"
        );
        fs::remove_dir(under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        symlink("nowhere", under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        assert!(fragments(root).is_err(), "a dangling link is not a mask");
    }
}
