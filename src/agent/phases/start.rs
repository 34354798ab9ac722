//! The decision to start the pivot.

use std::path::Path;

use crate::config::{Mode, Settings};

/// The decision about a pivot that has not begun.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    Go,
    NothingToDo(String),
    Refuse,
}

/// Decides by the configured mode and by the probe paths that exist.
pub(super) fn decide(settings: &Settings, exists: &dyn Fn(&Path) -> bool) -> Start {
    match settings.mode {
        Mode::Off => Start::Refuse,
        Mode::Force => Start::Go,
        Mode::Auto => match settings.probe_paths.iter().find(|path| exists(path)) {
            Some(path) => Start::NothingToDo(format!("{} exists", path.display())),
            None => Start::Go,
        },
    }
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
        assert_eq!(decide(&settings(""), &base_only), Start::Go);
        assert_eq!(decide(&settings(""), &has_oc), Start::NothingToDo("/usr/bin/oc exists".into()));
        assert_eq!(decide(&settings("node-image-pivot=force"), &has_oc), Start::Go);
        assert_eq!(decide(&settings("node-image-pivot=off"), &base_only), Start::Refuse);
    }
}
