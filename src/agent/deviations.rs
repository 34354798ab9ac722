//! Compares the running system with the result of the switch, each time the status is read.

use std::path::Path;

use super::auto_undo::TrialPeriod;
use super::new_usr::{USR, USR_SOURCE};
use super::state::{Asked, Record, Step};
use crate::config::{ImageSource, Settings};
use overlay_root::{Exposure, Mount, Namespace};

/// The part of the record that is read without waiting for its lock.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    /// Trial period of the switch.
    pub(super) trial: Option<TrialPeriod>,
    /// Request that the switch followed; `None` when nothing is switched or a phase is under way.
    switched: Option<Option<Asked>>,
}

impl Standing {
    pub(super) fn of(record: &Record) -> Self {
        let at_rest = matches!(record.step, Step::Refreshed(_) | Step::Finished(_));
        Self { trial: record.trial, switched: at_rest.then(|| record.asked.clone()) }
    }

    /// Returns the present deviations from a finished switch, one per line.
    pub(super) fn deviations(&self) -> Vec<String> {
        let Some(asked) = &self.switched else { return Vec::new() };
        let mut lines: Vec<String> = Namespace::init().mounts().iter().filter_map(|mounts| of_usr(mounts)).collect();
        // A broken configuration is reported by the call that needs it.
        let configured = Settings::load().ok().map(|settings| Asked::by(&settings));
        lines.extend(other_image(asked.as_ref(), configured.as_ref()));
        lines
    }
}

/// Returns a line if programs do not see the node image's `/usr`.
fn of_usr(mounts: &[Mount]) -> Option<String> {
    let usr = Path::new(USR);
    match overlay_root::exposure(mounts, usr, USR_SOURCE) {
        Exposure::OnTop => None,
        Exposure::Absent => Some("/usr is not the node image's: its mount is gone; run undo".to_owned()),
        Exposure::Covered => {
            let over = overlay_root::top(mounts, usr)?;
            Some(format!("{} ({}) is mounted over the node image's /usr", over.source.display(), over.fstype))
        }
    }
}

/// Returns a line if the configuration asks for another image than the one that was switched to.
pub(super) fn other_image(switched: Option<&Asked>, configured: Option<&Asked>) -> Option<String> {
    let (switched, configured) = (switched?, configured?);
    let (old, new) = (switched.source.as_ref()?, configured.source.as_ref()?);
    let named = |source: &ImageSource, tags: &Option<Vec<String>>| match tags {
        Some(tags) => format!("{} (image_tags: {})", source.spec(), tags.join(", ")),
        None => source.spec().to_string(),
    };
    (old != new || switched.image_tags != configured.image_tags).then(|| {
        format!(
            "this system is switched to {}, and the configuration asks for {}; run undo, then run again",
            named(old, &switched.image_tags),
            named(new, &configured.image_tags)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usr_that_is_not_the_node_images_is_reported() {
        const BASE: &str = "23 22 7:0 /usr /usr ro - squashfs x ro\n";
        const OURS: &str = "60 23 0:60 / /usr ro - overlay node-image ro\n";
        const UNLOCK: &str = "61 60 0:61 / /usr rw - overlay unlock rw,upperdir=u\n";
        let of = |lines: &str| of_usr(&overlay_root::parse(format!("{BASE}{lines}").as_bytes()));
        assert_eq!(of(OURS), None);
        assert!(of("").is_some_and(|line| line.contains("its mount is gone")));
        let covered = of(&format!("{OURS}{UNLOCK}"));
        assert_eq!(covered.as_deref(), Some("unlock (overlay) is mounted over the node image's /usr"));
    }

    #[test]
    fn another_image_is_reported_and_other_settings_are_not() {
        let asked = |text: &str| {
            let dir = tempfile::tempdir().expect("a directory");
            let conf = dir.path().join("etc/node-image-pivot.conf.d");
            std::fs::create_dir_all(&conf).expect("a directory");
            std::fs::write(conf.join("50.toml"), text).expect("a file");
            Asked::by(&Settings::load_from(dir.path(), "").expect("settings"))
        };
        let image = asked("image = \"quay.io/a/b:1\"");
        for (text, reported) in [
            ("image = \"quay.io/a/b:1\"", false),
            ("image = \"quay.io/a/b:1\"\ncomplete = true", false),
            ("image = \"quay.io/a/b:2\"", true),
            ("release_image = \"quay.io/a/b:1\"", true),
            ("", false),
        ] {
            assert_eq!(other_image(Some(&image), Some(&asked(text))).is_some(), reported, "{text}");
        }
        assert_eq!(other_image(None, Some(&image)), None, "nothing was asked for yet");
        let line = other_image(Some(&image), Some(&asked("image = \"quay.io/a/b:2\""))).unwrap_or_default();
        assert!(
            line.contains("quay.io/a/b:1") && line.contains("quay.io/a/b:2") && line.contains("run undo"),
            "{line}"
        );
        let release = asked("release_image = \"quay.io/a/b:1\"");
        let tagged = asked("release_image = \"quay.io/a/b:1\"\nimage_tags = [\"stream-10\"]");
        let line = other_image(Some(&release), Some(&tagged)).unwrap_or_default();
        assert!(line.contains("asks for quay.io/a/b:1 (image_tags: stream-10);"), "{line}");
        assert_eq!(other_image(Some(&tagged), Some(&tagged)), None);
    }
}
