//! Writes the redirect into the generator directories.
//!
//! Where `/etc` or `/run` has a `default.target`, the link goes to the early directory (second argument), which wins over
//! both: an installer or administrator who set a default there did not mean to skip the pivot. Else it goes to the
//! ordinary directory, where another generator's link may replace it. With a single directory, as systemd's
//! documentation allows for tests and old versions, it goes there.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use boot_config::Problem;
use boot_config::TARGET_VARIABLE;

/// The places of all that is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The directory of ordinary priority, for drop-ins.
    pub normal: PathBuf,
    /// The link that redirects.
    pub link: PathBuf,
    /// The mark for later runs, see [`boot_config::mark::REDIRECTED`].
    pub mark: PathBuf,
}

/// The result of [`redirect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// This boot goes to the pivot target.
    Redirected,
    /// Another generator has redirected it already.
    LeftToOther,
}

/// Redirects: the mark and the drop-ins for the agent and the pull first, the link last, so that the boot is never
/// redirected without a way back. Doing it again changes nothing. Another generator's `default.target` stays.
///
/// `services`: those that the pull has to start, because what they are enabled for comes after it.
pub fn redirect(output: &Output, pivot_target: &Path, original: &str, services: &[&str]) -> Result<Outcome, Problem> {
    write(&output.mark, "").map_err(|e| problem(&output.mark, &e))?;
    let dropin = output.normal.join("node-image-pivotd.service.d/50-default-target.conf");
    // A backslash is the only character of a unit name that Environment= takes specially.
    let value = original.replace('\\', r"\\");
    let text = format!(
        "# Written by node-image-pivot-generator: where this boot goes after the pivot.\n\
         [Service]\nEnvironment={TARGET_VARIABLE}={value}\n"
    );
    write(&dropin, &text).map_err(|e| problem(&dropin, &e))?;
    if !services.is_empty() {
        let dropin = output.normal.join("node-image-pull.service.d/50-services.conf");
        let text = format!(
            "# Written by node-image-pivot-generator: enabled here, but for a target that comes after the pivot.\n\
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

fn problem(path: &Path, error: &io::Error) -> Problem {
    Problem(format!("cannot write {}: {error}; this boot is left alone", path.display()))
}

/// Whole or not at all.
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
    fn another_generators_link_stays() {
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
