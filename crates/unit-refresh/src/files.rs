//! Reads the unit files of the running system, or of a system whose `/usr` is not mounted yet.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use super::definition::{Entry, UnitDirectory, UnitFiles};
use super::names::is_alias;

/// The directory for masks of the kernel command line (`systemd.mask=`). All other files in it belong to generators.
const EARLY: &str = "/run/systemd/generator.early";

/// Directories with unit files, in descending priority: those of systemd.unit(5), except the directories of transient and
/// generated units other than [`EARLY`].
const DIRECTORIES: &[&str] = &[
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    EARLY,
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
];

/// The remaining directories of systemd's search path. A link into one of them is an alias.
const OTHERS: &[&str] = &["/run/systemd/transient", "/run/systemd/generator", "/run/systemd/generator.late"];

/// The largest number of links that are followed to a file.
const FOLLOWED: usize = 8;

/// Size limit of unit files in bytes. systemd refuses larger files.
const MAX_BYTES: u64 = 4 << 20;

/// Files below `/etc` that the merge will change: path of the new version, or `None` for a removal.
pub type EtcChanges = BTreeMap<PathBuf, Option<PathBuf>>;

/// The trees from which the unit files of a system are read.
#[derive(Debug, Clone, Default)]
pub struct Root {
    /// The current or future `/usr`.
    pub usr: PathBuf,
    /// Changes of the merge to `/etc`, by path relative to `/etc`.
    pub etc: EtcChanges,
}

impl Root {
    /// Returns the root of the running system.
    pub fn running() -> Self {
        Self { usr: "/usr".into(), etc: BTreeMap::new() }
    }

    /// Reads all unit files.
    ///
    /// # Errors
    /// Fails if an existing directory cannot be listed. An unreadable file is treated as absent.
    pub fn unit_files(&self) -> io::Result<UnitFiles> {
        DIRECTORIES.iter().map(|path| self.directory(path)).collect::<io::Result<_>>().map(UnitFiles)
    }

    /// Returns the release of systemd, for example 252, by the file name of `libsystemd-shared`. Returns `None` if the
    /// library is missing.
    pub fn systemd_release(&self) -> Option<u32> {
        let of = |directory: PathBuf| {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries.filter_map(|entry| release_of(Path::new(&entry.file_name()))).max()
        };
        // Debian uses one directory per architecture.
        let architectures = fs::read_dir(self.usr.join("lib")).into_iter().flatten().flatten();
        let directories = architectures.filter(|entry| entry.file_name().to_string_lossy().ends_with("-linux-gnu"));
        let places = directories.map(|entry| entry.path().join("systemd"));
        places.chain([self.usr.join("lib/systemd"), self.usr.join("lib64/systemd")]).filter_map(of).max()
    }

    /// Returns the current location of a path of that system, or `None` if the merge removes it. `/usr/local` does not belong
    /// to the image.
    fn place(&self, path: &Path) -> Option<PathBuf> {
        if let Ok(relative) = path.strip_prefix("/etc")
            && let Some(change) = self.etc.get(relative)
        {
            return change.clone();
        }
        if path.starts_with("/usr/local") {
            return Some(path.to_owned());
        }
        Some(path.strip_prefix("/usr").map_or_else(|_| path.to_owned(), |relative| self.usr.join(relative)))
    }

    /// Lists the names in a directory of that system. A missing directory is empty.
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        let listed = match path.starts_with("/usr") {
            true => self.place(path),
            false => Some(path.to_owned()),
        };
        match listed.map(fs::read_dir) {
            Some(Ok(entries)) => {
                for entry in entries {
                    // A name that is not UTF-8 cannot be the name of a unit.
                    names.extend(entry?.file_name().into_string());
                }
            }
            Some(Err(error)) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(error);
            }
            _ => {}
        }
        if let Ok(relative) = path.strip_prefix("/etc") {
            let added = self.etc.iter().filter(|(_, change)| change.is_some());
            for (changed, _) in added.filter(|(changed, _)| changed.parent() == Some(relative)) {
                names.extend(changed.file_name().and_then(|name| name.to_str()).map(str::to_owned));
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn directory(&self, path: &str) -> io::Result<UnitDirectory> {
        let mut entries = BTreeMap::new();
        for name in self.list(Path::new(path))? {
            if let Some(entry) = self.entry(&Path::new(path).join(&name), &name)? {
                entries.insert(name, entry);
            }
        }
        Ok(UnitDirectory { path: path.to_owned(), entries })
    }

    fn entry(&self, path: &Path, name: &str) -> io::Result<Option<Entry>> {
        let Some(place) = self.place(path) else { return Ok(None) };
        let Ok(metadata) = fs::symlink_metadata(&place) else { return Ok(None) };
        if path.starts_with(EARLY) {
            return Ok(self.is_mask(path).then_some(Entry::Masked));
        }
        if metadata.is_dir() {
            return self.folder(path, name);
        }
        if let Some(target) = self.link(path)
            && is_searched(&target)
        {
            let alias = target.file_name().and_then(|last| last.to_str());
            // systemd ignores a link that is not a valid alias, and continues with the next directory.
            return Ok(alias.filter(|alias| is_alias(name, alias)).map(|alias| Entry::Alias(alias.to_owned())));
        }
        // A dangling link is not a mask: systemd treats it as missing.
        let exists = self.follow(path).is_some_and(|place| place.exists());
        Ok(exists.then(|| self.text(path).map_or(Entry::Masked, Entry::File)))
    }

    /// Reads a directory of drop-ins with their text, or of links that pull in units.
    fn folder(&self, path: &Path, name: &str) -> io::Result<Option<Entry>> {
        let drop_ins = name.ends_with(".d");
        let wants = [".wants", ".requires", ".upholds"].iter().any(|suffix| name.ends_with(suffix));
        if !drop_ins && !wants {
            return Ok(None);
        }
        let mut files = BTreeMap::new();
        for file in self.list(path)? {
            let path = path.join(&file);
            if self.place(&path).is_none() {
                continue;
            }
            if drop_ins {
                files.insert(file, self.text(&path));
            } else if self.is_mask(&path) {
                files.insert(file, None);
            } else if self.link(&path).is_some() {
                files.insert(file, Some(String::new()));
            }
        }
        Ok(Some(Entry::Directory(files)))
    }

    /// Returns the target of a link as a path of that system, or `None` for another kind of file.
    fn link(&self, path: &Path) -> Option<PathBuf> {
        let target = fs::read_link(self.place(path)?).ok()?;
        Some(normal(&path.parent()?.join(target)))
    }

    /// Follows links to a file and returns its current location, or `None` after too many links.
    fn follow(&self, path: &Path) -> Option<PathBuf> {
        let mut path = path.to_owned();
        for _ in 0..FOLLOWED {
            match self.link(&path) {
                Some(target) => path = target,
                None => return self.place(&path),
            }
        }
        None
    }

    /// Returns true if systemd treats the file as a mask: an empty file or a device, also through links.
    fn is_mask(&self, path: &Path) -> bool {
        let metadata = self.follow(path).and_then(|place| fs::metadata(place).ok());
        metadata.is_some_and(|metadata| match metadata.is_file() {
            true => metadata.len() == 0,
            false => !metadata.is_dir(),
        })
    }

    /// Returns the text of a file, through links; `None` if it is masked, empty or unreadable.
    fn text(&self, path: &Path) -> Option<String> {
        let place = self.follow(path)?;
        let metadata = fs::metadata(&place).ok()?;
        if !metadata.is_file() || metadata.len() == 0 || metadata.len() > MAX_BYTES {
            return None;
        }
        fs::read(&place).ok().map(|text| String::from_utf8_lossy(&text).into_owned())
    }
}

/// Removes `.` and `..`, and replaces `/lib` by `/usr/lib`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => drop(normal.pop()),
            Component::Normal(name) if name == "lib" && normal == Path::new("/") => normal.push("usr/lib"),
            Component::Normal(name) => normal.push(name),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}

/// Returns true if a path is below a directory of systemd's search path.
fn is_searched(path: &Path) -> bool {
    DIRECTORIES.iter().chain(OTHERS).any(|dir| path.starts_with(dir))
}

/// Returns the release in the name of systemd's shared library, such as `libsystemd-shared-255.4-1.fc40.so`.
pub(super) fn release_of(path: &Path) -> Option<u32> {
    release(path.file_name()?.to_str()?.strip_prefix("libsystemd-shared-")?)
}

/// Returns the release in a version of systemd: 252 for `252.39-1~deb12u1`.
pub fn release(version: &str) -> Option<u32> {
    version.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_release_is_the_first_number_of_a_version() {
        for (version, expected) in
            [("252.39-1~deb12u1", Some(252)), ("257", Some(257)), ("v257", None), ("", None), ("249.11-rc1", Some(249))]
        {
            assert_eq!(release(version), expected, "{version}");
        }
    }

    #[test]
    fn the_release_of_systemd_is_in_its_librarys_name() {
        for (library, expected) in [
            ("lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so", Some(252)),
            ("lib/systemd/libsystemd-shared-255.4-1.fc40.so", Some(255)),
            ("lib64/systemd/libsystemd-shared-239.so", Some(239)),
            ("lib/systemd/libsystemd-core-252.so", None),
            ("lib/systemd/libsystemd-shared-.so", None),
            ("share/libsystemd-shared-252.so", None),
        ] {
            let temp = tempfile::tempdir().unwrap();
            put(temp.path(), library, "");
            let root = Root { usr: temp.path().to_owned(), ..Root::default() };
            assert_eq!(root.systemd_release(), expected, "{library}");
        }
    }

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Reads a `/usr` that is not mounted, with the changes that the merge will make to `/etc`.
    #[test]
    fn a_tree_that_is_not_mounted_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let (usr, new_etc) = (temp.path().join("usr"), temp.path().join("etc"));
        let lib = "lib/systemd/system";
        put(&usr, &format!("{lib}/nip-test-a.service"), "[Service]\nExecStart=/a\n");
        put(&usr, &format!("{lib}/nip-test-a.service.d/x.conf"), "[Service]\nExecStart=/b\n");
        put(&usr, &format!("{lib}/nip-test-empty.service"), "");
        put(&usr, "share/nip-test-linked.service", "[Service]\nExecStart=/c\n");
        symlink("/dev/null", usr.join(lib).join("nip-test-null.service")).unwrap();
        symlink("nip-test-a.service", usr.join(lib).join("nip-test-alias.service")).unwrap();
        symlink("/usr/share/nip-test-linked.service", usr.join(lib).join("nip-test-linked.service")).unwrap();
        for (folder, name, target) in [
            ("wants", "nip-test-a.service", "../nip-test-a.service"),
            ("wants", "nip-test-not.service", "/dev/null"),
            ("requires", "nip-test-b.service", "../nip-test-b.service"),
            ("upholds", "nip-test-c.service", "../nip-test-c.service"),
        ] {
            let folder = usr.join(lib).join(format!("nip-test.target.{folder}"));
            fs::create_dir_all(&folder).unwrap();
            symlink(target, folder.join(name)).unwrap();
        }
        for (name, length) in [("nip-test-long.service", MAX_BYTES), ("nip-test-longer.service", MAX_BYTES + 1)] {
            fs::File::create(usr.join(lib).join(name)).unwrap().set_len(length).unwrap();
        }
        put(&new_etc, "systemd/system/nip-test-new.service", "[Service]\nExecStart=/d\n");
        let etc = ["nip-test-new.service", "nip-test-a.service.d/y.conf"].map(|name| {
            let path = Path::new("systemd/system").join(name);
            (path.clone(), name.ends_with(".service").then(|| new_etc.join(path)))
        });
        let files = Root { usr, etc: etc.into() }.unit_files().unwrap();
        let exec = |name: &str| files.definition(name).unwrap().values("Service", "ExecStart").to_vec();
        assert_eq!(exec("nip-test-a.service"), ["/a", "/b"]);
        assert_eq!(exec("nip-test-alias.service"), ["/a", "/b"]);
        assert_eq!(exec("nip-test-linked.service"), ["/c"]);
        assert_eq!(exec("nip-test-new.service"), ["/d"]);
        for name in ["nip-test-null.service", "nip-test-empty.service", "nip-test-longer.service"] {
            assert!(files.definition(name).unwrap().masked, "{name}");
        }
        assert!(!files.definition("nip-test-long.service").unwrap().masked);
        let wanted: Vec<_> = files.pulled_in("nip-test.target").into_iter().collect();
        assert_eq!(wanted, ["nip-test-a.service", "nip-test-b.service", "nip-test-c.service", "nip-test.target"]);
    }

    /// Reads links in `/etc/systemd/system` of a system that is not mounted, by their targets.
    #[test]
    fn links_are_masks_aliases_or_separate_files() {
        let temp = tempfile::tempdir().unwrap();
        let (usr, new_etc) = (temp.path().join("usr"), temp.path().join("etc"));
        put(&usr, "lib/systemd/system/nip-test.service", "[Service]\nExecStart=/a\n");
        put(&usr, "share/nip/other.service", "[Service]\nExecStart=/b\n");
        put(&usr, "share/nip/empty", "");
        symlink("/dev/null", usr.join("share/nip/null")).unwrap();
        let text = |exec: &str| Some(Entry::File(format!("[Service]\nExecStart={exec}\n")));
        let alias = || Some(Entry::Alias("nip-test.service".into()));
        let rows = [
            ("/dev/null", Some(Entry::Masked)),
            ("../../../dev/null", Some(Entry::Masked)),
            ("/usr/share/nip/null", Some(Entry::Masked)),
            ("../../../usr/share/nip/empty", Some(Entry::Masked)),
            ("/usr/lib/systemd/system/nip-test.service", alias()),
            ("/lib/systemd/system/nip-test.service", alias()),
            ("nip-test.service", alias()),
            ("/run/systemd/generator/nip-test.service", alias()),
            ("/usr/share/nip/other.service", text("/b")),
            ("../../../usr/share/nip/../nip/other.service", text("/b")),
            ("/usr/share/nip/missing.service", None),
            ("nip-test.socket", None),
            ("nip-test@.service", None),
        ];
        fs::create_dir_all(new_etc.join("systemd/system")).unwrap();
        let name = |index: usize| format!("nip-link-{index}.service");
        let etc = rows.iter().enumerate().map(|(index, (target, _))| {
            let path = Path::new("systemd/system").join(name(index));
            symlink(target, new_etc.join(&path)).unwrap();
            (path.clone(), Some(new_etc.join(path)))
        });
        let root = Root { etc: etc.collect(), usr };
        let files = root.unit_files().unwrap();
        let etc = files.0.iter().find(|dir| dir.path == "/etc/systemd/system").unwrap();
        for (index, (target, expected)) in rows.iter().enumerate() {
            assert_eq!(etc.entries.get(&name(index)), expected.as_ref(), "{target}");
        }
    }

    #[test]
    fn only_links_pull_in_units() {
        let temp = tempfile::tempdir().unwrap();
        let folder = "lib/systemd/system/nip-test.target.wants";
        put(temp.path(), &format!("{folder}/regular.service"), "x");
        put(temp.path(), &format!("{folder}/empty.service"), "");
        for (name, target) in
            [("null", "/dev/null"), ("relative", "../../../../../dev/null"), ("wanted", "../wanted.service")]
        {
            symlink(target, temp.path().join(folder).join(format!("{name}.service"))).unwrap();
        }
        let files = Root { usr: temp.path().to_owned(), ..Root::default() }.unit_files().unwrap();
        let found = files.0.iter().find_map(|dir| dir.entries.get("nip-test.target.wants"));
        let Some(Entry::Directory(found)) = found else { panic!("{found:?}") };
        let found: Vec<_> = found.iter().map(|(name, link)| (name.as_str(), link.is_some())).collect();
        let expected =
            [("empty.service", false), ("null.service", false), ("relative.service", false), ("wanted.service", true)];
        assert_eq!(found, expected);
    }

    /// Compares the search path with that of systemd.
    #[test]
    fn directories_are_those_of_systemd_in_its_order() {
        let output = std::process::Command::new("systemd-analyze").arg("unit-paths").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let paths = String::from_utf8(output.stdout).unwrap();
        // /lib is /usr/lib.
        let paths: Vec<_> = paths.lines().filter(|path| !path.starts_with("/lib/") && !OTHERS.contains(path)).collect();
        assert_eq!(paths, DIRECTORIES);
    }

    #[test]
    fn a_directory_that_cannot_be_listed_is_an_error() {
        let usr = tempfile::tempdir().unwrap();
        let root = Root { usr: usr.path().into(), etc: EtcChanges::new() };
        assert!(root.unit_files().is_ok(), "missing directories");
        fs::create_dir(usr.path().join("lib")).unwrap();
        symlink("systemd", usr.path().join("lib/systemd")).unwrap();
        assert!(root.unit_files().is_err(), "a link to itself");
    }
}
