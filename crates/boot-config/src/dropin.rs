//! The configuration's drop-in files: which ones count, and in which order.
//!
//! `*.toml` from `node-image-pivot.conf.d` in `/usr/lib`, `/run` and `/etc`. A file hides the file of
//! the same name in an earlier directory; a link to `/dev/null` hides it and adds nothing. What is
//! left is sorted by file name, whatever directory it is in, and read in that order: later wins.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{Problem, under};

/// The directories, weakest first.
pub const DIRECTORIES: [&str; 3] =
    ["/usr/lib/node-image-pivot.conf.d", "/run/node-image-pivot.conf.d", "/etc/node-image-pivot.conf.d"];

/// Larger files are refused: a generator must not be made to read without end.
const MAX_BYTES: u64 = 1 << 20;

/// One drop-in file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// The path on the machine, for messages.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// All fragments that count, in the order in which they are to be applied.
///
/// A missing directory is an empty one. A file that cannot be read is an error, since what it would
/// have said is unknown: the caller must not act as if it had said nothing.
pub fn fragments(root: &Path) -> Result<Vec<Fragment>, Problem> {
    let mut by_name: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in DIRECTORIES {
        let directory = Path::new(directory);
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
    let problem = |what: &str| Problem(format!("{}: {what}; correct the file or remove it", path.display()));
    let metadata = fs::metadata(&place).map_err(|e| problem(&e.to_string()))?;
    // Opening a named pipe would wait for a writer for ever.
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
    fn order_replacement_and_masks() {
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
    fn nothing_there_is_nothing_said() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(fragments(root.path()), Ok(vec![]));
    }

    #[test]
    fn what_cannot_be_read_is_an_error_that_names_the_file() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        let message = fragments(root).unwrap_err().to_string();
        assert!(message.starts_with("/etc/node-image-pivot.conf.d/10-a.toml: not a regular file; "), "{message}");
        fs::remove_dir(under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        symlink("nowhere", under(root, "/etc/node-image-pivot.conf.d/10-a.toml")).unwrap();
        assert!(fragments(root).is_err(), "a dangling link is not a mask");
    }
}
