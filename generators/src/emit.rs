//! Writes the redirect into the generator directories.
//!
//! If `/etc` or `/run` has a `default.target`, the link is written to the early directory (second argument), which has
//! priority over both: a default target that an installer or administrator set there does not disable the pivot. Otherwise
//! the link is written to the normal directory, where another generator may replace it. If the generator is called with a
//! single directory, as systemd.generator(7) allows for tests, the link is written there.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use boot_config::{Problem, TARGET_VARIABLE, under};

/// The paths to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The directory of normal priority, for drop-ins.
    pub normal: PathBuf,
    /// The link that redirects the boot.
    pub link: PathBuf,
    /// The mark for later runs; see [`boot_config::mark::REDIRECTED`].
    pub mark: PathBuf,
}

/// The result of [`redirect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// This boot is redirected to the pivot target.
    Redirected,
    /// Another generator has already redirected this boot.
    LeftToOther,
}

/// Redirects the boot to `pivot_target`. The mark and the drop-ins are written first and the link last, so that a redirected
/// boot always knows its `original` target. The function is idempotent, and keeps another generator's `default.target`.
///
/// The pull starts `services`, because the targets for which they are enabled are reached only after the pivot.
///
/// # Errors
/// Fails if a file or the link cannot be written. The boot is then not redirected.
pub fn redirect(output: &Output, pivot_target: &Path, original: &str, services: &[&str]) -> Result<Outcome, Problem> {
    write(&output.mark, "").map_err(|e| problem(&output.mark, &e))?;
    let dropin = output.normal.join("node-image-pivotd.service.d/50-default-target.conf");
    // A backslash is the only character of a unit name that must be escaped in Environment=.
    let value = original.replace('\\', r"\\");
    let text = format!(
        "# Written by node-image-pivot-generator: the target to isolate after the pivot.\n\
         [Service]\nEnvironment={TARGET_VARIABLE}={value}\n"
    );
    write(&dropin, &text).map_err(|e| problem(&dropin, &e))?;
    if !services.is_empty() {
        let dropin = output.normal.join("node-image-pull.service.d/50-services.conf");
        let text = format!(
            "# Written by node-image-pivot-generator: services enabled for targets that are reached after the pivot.\n\
             [Unit]\nWants={}\n",
            services.join(" ")
        );
        write(&dropin, &text).map_err(|e| problem(&dropin, &e))?;
    }
    let link = &output.link;
    match symlink(pivot_target, link) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => match fs::read_link(link) {
            Ok(existing) if existing == pivot_target => Ok(Outcome::Redirected),
            _ => Ok(Outcome::LeftToOther),
        },
        result => result.map(|()| Outcome::Redirected).map_err(|e| problem(link, &e)),
    }
}

/// Makes the boot start the agent, whose unit file is `agent`, so that it removes the trees of earlier boots.
///
/// # Errors
/// Fails if the link cannot be written. The trees then stay.
pub fn clean_up(normal: &Path, agent: &Path) -> Result<(), Problem> {
    let wants = normal.join("multi-user.target.wants");
    let link = agent.file_name().map(|name| wants.join(name)).unwrap_or_default();
    let linked = fs::create_dir_all(&wants).and_then(|()| match symlink(agent, &link) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    });
    linked.map_err(|error| {
        Problem(format!("cannot write {}: {error}; the trees of earlier boots stay in the ostree repo", link.display()))
    })
}

/// Copies the agent's unit files to the early directory, whose units have priority over those in `/etc`. A link would be
/// ignored: systemd takes it for an alias of the unit to itself.
///
/// # Errors
/// Fails if a file cannot be read or written. The installer's units stay those that systemd uses.
pub fn take_over(early: &Path, root: &Path, units: &[PathBuf]) -> Result<(), Problem> {
    let copies: Vec<_> = units.iter().filter_map(|unit| Some((unit, early.join(unit.file_name()?)))).collect();
    let copied = copies.iter().try_for_each(|(unit, copy)| {
        let problem = |path: &Path, verb: &str, error: &io::Error| {
            let path = path.display();
            Problem(format!(
                "cannot {verb} {path}: {error}; the installer's units stay in use, and the agent redirects nothing"
            ))
        };
        let text = fs::read_to_string(under(root, unit)).map_err(|e| problem(unit, "read", &e))?;
        let origin = format!("# Copied by node-image-pivot-generator from {}.\n", unit.display());
        write(copy, &(origin + &text)).map_err(|e| problem(copy, "write", &e))
    });
    if copied.is_err() {
        // An error means that the copy does not exist.
        copies.iter().for_each(|(_, copy)| drop(fs::remove_file(copy)));
    }
    copied
}

fn problem(path: &Path, error: &io::Error) -> Problem {
    Problem(format!("cannot write {}: {error}; this boot is not redirected", path.display()))
}

/// Writes a file atomically, without fsync: `/run` does not survive a power cut.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension("new");
    fs::write(&temporary, text)?;
    fs::rename(temporary, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn output(root: &Path) -> Output {
        Output { normal: root.join("n"), link: root.join("default.target"), mark: root.join("mark") }
    }

    #[test]
    fn another_generators_link_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        let output = output(temp.path());
        symlink("system-update.target", temp.path().join("default.target")).unwrap();
        assert_eq!(redirect(&output, Path::new("/p"), "a.target", &[]), Ok(Outcome::LeftToOther));
        assert_eq!(fs::read_link(temp.path().join("default.target")).unwrap(), Path::new("system-update.target"));
    }

    #[test]
    fn backslashes_are_escaped() {
        let temp = tempfile::tempdir().unwrap();
        let output = output(temp.path());
        redirect(&output, Path::new("/p"), r"a\x2db.target", &[]).unwrap();
        let text =
            fs::read_to_string(output.normal.join("node-image-pivotd.service.d/50-default-target.conf")).unwrap();
        assert!(text.ends_with("\nEnvironment=NODE_IMAGE_PIVOT_TARGET=a\\\\x2db.target\n"), "{text}");
    }
}
