//! The decision to start the pivot.

use std::path::Path;

use crate::agent::Error;
use crate::config::{Mode, Settings};
use crate::report::RefusalId;

/// The decision about a pivot that has not begun.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::agent) enum Start {
    Go,
    NothingToDo(String),
}

/// Decides by the configured mode and by the probe paths that exist.
///
/// # Errors
/// The mode is `off`.
pub(in crate::agent) fn decide(settings: &Settings, exists: &dyn Fn(&Path) -> bool) -> Result<Start, Error> {
    let found = match settings.mode {
        Mode::Off => {
            return Err(Error::refused(
                RefusalId::ModeOff,
                "the mode is \"off\": node-image-pivot= on the kernel command line, or `mode` in a drop-in file",
            ));
        }
        Mode::Force => None,
        Mode::Auto => settings.probe_paths.iter().find(|path| exists(path)),
    };
    Ok(found.map_or(Start::Go, |path| Start::NothingToDo(format!("{} exists", path.display()))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_and_the_probe_paths_decide_about_the_start() {
        let settings = |line: &str| Settings::load_from(Path::new("/nonexistent"), line).unwrap();
        let has_oc = |path: &Path| path == Path::new("/usr/bin/oc");
        let base_only = |_: &Path| false;
        let decide = |line: &str, exists: &dyn Fn(&Path) -> bool| decide(&settings(line), exists);
        assert_eq!(decide("", &base_only).unwrap(), Start::Go);
        assert_eq!(decide("", &has_oc).unwrap(), Start::NothingToDo("/usr/bin/oc exists".into()));
        assert_eq!(decide("node-image-pivot=force", &has_oc).unwrap(), Start::Go);
        assert_eq!(decide("node-image-pivot=off", &base_only).unwrap_err().reasons()[0].id, "mode-off");
    }
}
