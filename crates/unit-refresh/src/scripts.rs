//! Finds scripts, which a program interprets, by the arguments of a process or of a unit's command.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Programs whose first file argument is a script, even if it has no interpreter line.
const INTERPRETERS: &[&str] = &[
    "ash",
    "bash",
    "dash",
    "ksh",
    "lua",
    "node",
    "perl",
    "php",
    "platform-python",
    "python",
    "ruby",
    "sh",
    "tclsh",
    "zsh",
];

/// Splits the text of `/proc/PID/cmdline`.
pub(super) fn split(cmdline: &[u8]) -> Vec<PathBuf> {
    cmdline.split(|&byte| byte == 0).map(|argument| PathBuf::from(OsStr::from_bytes(argument))).collect()
}

/// Returns the script that `program` interprets, by its `arguments`, of which the first is the program's name. The kernel
/// inserts the script's path after the words of the interpreter line (execve(2)).
pub(super) fn of(arguments: &[PathBuf], program: &Path) -> Option<PathBuf> {
    // These options are followed by text or by the name of a module, not by a file.
    let arguments = arguments.iter().skip(1).take_while(|word| !matches!(word.as_os_str().as_bytes(), b"-c" | b"-m"));
    let path = arguments.into_iter().find(|word| word.is_absolute())?;
    let mut start = [0; 2];
    let interpreted = match File::open(path).and_then(|mut file| file.read_exact(&mut start)) {
        Ok(()) => start == *b"#!" || is_interpreter(program),
        // The script may exist only in the other tree.
        Err(error) => error.kind() == ErrorKind::NotFound && is_interpreter(program),
    };
    interpreted.then(|| path.clone())
}

/// Returns true for an interpreter, with or without a version suffix such as `/usr/bin/python3.11`.
fn is_interpreter(program: &Path) -> bool {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_end_matches(|letter: char| letter.is_ascii_digit() || matches!(letter, '.' | '-'));
    INTERPRETERS.contains(&name)
}

/// Returns the paths relative to `root` that name the same file as `path`: itself, and the targets of its links.
pub(super) fn below(path: &Path, root: &Path) -> BTreeSet<String> {
    let beside = path.parent().and_then(|parent| parent.canonicalize().ok()).zip(path.file_name());
    let places = [Some(path.to_owned()), beside.map(|(parent, name)| parent.join(name)), path.canonicalize().ok()];
    let relative = |place: PathBuf| place.strip_prefix(root).ok().map(|place| place.to_string_lossy().into_owned());
    places.into_iter().flatten().filter_map(relative).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_script_of_a_command_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let (script, data) = (temp.path().join("script"), temp.path().join("data"));
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        std::fs::write(&data, "data").unwrap();
        let (script, data) = (script.to_str().unwrap(), data.to_str().unwrap());
        for (program, arguments, expected) in [
            ("/usr/bin/bash", &["/bin/bash", "-e", script, data] as &[&str], Some(script)),
            ("/usr/bin/python3.11", &["python3", script], Some(script)),
            ("/usr/bin/python3.11", &["python3", data], Some(data)),
            ("/usr/bin/python3.11", &["python3", "/nonexistent/script"], Some("/nonexistent/script")),
            ("/usr/bin/python3.11", &["python3", "-m", "module", script], None),
            ("/usr/bin/bash", &["bash", "-c", script], None),
            ("/usr/bin/guile", &["guile", script], Some(script)),
            ("/usr/bin/dnsmasq", &["dnsmasq", data], None),
            ("/usr/bin/dnsmasq", &["dnsmasq", "/nonexistent/data"], None),
            ("/usr/bin/bash", &["bash", "relative"], None),
            ("/usr/bin/bash", &[script], None),
            ("/usr/bin/bash", &[], None),
        ] {
            let arguments: Vec<_> = arguments.iter().map(PathBuf::from).collect();
            assert_eq!(
                of(&arguments, Path::new(program)).as_deref(),
                expected.map(Path::new),
                "{program} {arguments:?}"
            );
        }
    }

    #[test]
    fn a_path_names_its_link_and_its_file() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("bin")).unwrap();
        std::fs::write(root.join("bin/real"), "").unwrap();
        std::os::unix::fs::symlink("bin", root.join("sbin")).unwrap();
        std::os::unix::fs::symlink("real", root.join("bin/link")).unwrap();
        let of = |path: &str| below(&root.join(path), &root).into_iter().collect::<Vec<_>>();
        assert_eq!(of("sbin/link"), ["bin/link", "bin/real", "sbin/link"]);
        assert_eq!(of("sbin/missing"), ["bin/missing", "sbin/missing"]);
        assert_eq!(below(Path::new("/elsewhere"), &root), BTreeSet::new());
    }

    #[test]
    fn arguments_are_split_at_null_bytes() {
        assert_eq!(split(b"/bin/sh\0-e\0/x y\0"), ["/bin/sh", "-e", "/x y", ""].map(PathBuf::from));
    }
}
