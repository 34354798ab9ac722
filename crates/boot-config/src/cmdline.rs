//! The kernel command line: `node-image-pivot…` keys, and others that decide where the boot goes.
//!
//! Words are split as systemd splits them: by white space, `"` and `'` quote, a backslash is an
//! ordinary character, an unclosed quote ends with the line. Of a key given twice the last one wins.
//! A key may be written with `_` for `-`. Keys that start with `rd.` are the initramfs's business.

use std::fs;
use std::path::Path;

use crate::{Problem, under};

/// The arguments of the kernel command line that concern the pivot.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// `node-image-pivot=`, not yet checked.
    pub mode: Option<String>,
    /// `node-image-pivot.image=`: a pull spec.
    pub image: Option<String>,
    /// `node-image-pivot.release-image=`: a pull spec.
    pub release_image: Option<String>,
    /// `node-image-pivot.target=`: a unit name, not yet checked.
    pub target: Option<String>,
    /// The unit that the boot goes to instead of `default.target`: `systemd.unit=`, or what
    /// `rescue`, `emergency`, `single` or a runlevel digit stands for.
    pub unit: Option<String>,
    /// The argument that makes another generator redirect this boot.
    pub other_generator: Option<&'static str>,
    /// `systemd.mask=`: units that are masked for this boot.
    pub masks: Vec<String>,
    /// Keys that start with `node-image-pivot.` and mean nothing to this version.
    pub unknown: Vec<String>,
}

impl CommandLine {
    /// Parses the text of `/proc/cmdline`. Never fails: what is not ours is skipped.
    pub fn parse(text: &str) -> Self {
        Self::from_words(words(text))
    }

    /// The command line of the machine whose root is `root`.
    ///
    /// In a container it is that of PID 1, as systemd has it: `/proc/cmdline` is the host's there.
    pub fn read(root: &Path) -> Result<Self, Problem> {
        let container = under(root, "/run/systemd/container").exists();
        let path = under(root, if container { "/proc/1/cmdline" } else { "/proc/cmdline" });
        let bytes =
            fs::read(&path).map_err(|e| Problem(format!("cannot read {}: {e}; is /proc mounted?", path.display())))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(if container { Self::from_words(text.split('\0').map(String::from)) } else { Self::parse(&text) })
    }

    /// Interprets words that are already split.
    pub fn from_words(words: impl IntoIterator<Item = String>) -> Self {
        let mut line = Self::default();
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => line.assign(key, value),
                // A bare `node-image-pivot` has no value; the check of the mode refuses an empty one.
                None if word.replace('_', "-") == "node-image-pivot" => line.mode = Some(String::new()),
                None => line.unit = bare_word_unit(&word).map(String::from).or(line.unit),
            }
        }
        line
    }

    fn assign(&mut self, key: &str, value: &str) {
        let given = (!value.is_empty()).then(|| value.to_owned());
        match key.replace('_', "-").as_str() {
            "node-image-pivot" => self.mode = Some(value.to_owned()),
            "node-image-pivot.image" => self.image = given,
            "node-image-pivot.release-image" => self.release_image = given,
            "node-image-pivot.target" => self.target = given,
            "systemd.unit" => self.unit = given,
            "systemd.mask" => self.masks.extend(given.map(unit_name)),
            // systemd-run-generator's; coreos-installer-generator's.
            "systemd.run" | "systemd.run-success-action" if given.is_some() => {
                self.other_generator = Some("systemd.run=");
            }
            "coreos.inst.install-dev" if given.is_some() => self.other_generator = Some("coreos.inst.install_dev="),
            other if other.starts_with("node-image-pivot.") => self.unknown.push(key.to_owned()),
            _ => {}
        }
    }
}

/// Returns the name of a unit, which is a service if it has no suffix.
fn unit_name(name: String) -> String {
    if name.contains('.') { name } else { format!("{name}.service") }
}

/// The unit that systemd starts for a word without a value, or `None` when it is not such a word.
fn bare_word_unit(word: &str) -> Option<&'static str> {
    Some(match word {
        "emergency" | "-b" => "emergency.target",
        "rescue" | "single" | "-s" | "s" | "S" | "1" => "rescue.target",
        "2" | "3" | "4" => "multi-user.target",
        "5" => "graphical.target",
        _ => return None,
    })
}

/// Splits a command line into words, without their quotes.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut current: Option<String> = None;
    let mut quote: Option<char> = None;
    for c in text.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                current.get_or_insert_default();
            }
            (None, c) if c.is_ascii_whitespace() || c == '\0' => words.extend(current.take()),
            (_, c) => current.get_or_insert_default().push(c),
        }
    }
    words.extend(current);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_systemd_does() {
        for (text, expected) in [
            ("", vec![]),
            ("  a  b\n", vec!["a", "b"]),
            (r#"a="b c" d"#, vec!["a=b c", "d"]),
            (r#""a=b c" 'd "e'"#, vec!["a=b c", "d \"e"]),
            (r#"a="" b"#, vec!["a=", "b"]),
            (r#"a=\"b c"#, vec![r"a=\b c"]),
            (r#"a "open to the end"#, vec!["a", "open to the end"]),
        ] {
            assert_eq!(words(text), expected, "{text}");
        }
    }

    #[test]
    fn keys() {
        let some = |s: &str| Some(s.to_owned());
        let line = CommandLine::parse(
            "root=/dev/vda node-image-pivot=off node_image_pivot=force node-image-pivot.image=a \
             node-image-pivot.image=\"b\" node-image-pivot.release_image=r@sha256:0 node-image-pivot.target=x.target \
             node-image-pivot.imgae=c quiet",
        );
        let expected = CommandLine {
            mode: some("force"),
            image: some("b"),
            release_image: some("r@sha256:0"),
            target: some("x.target"),
            unit: None,
            other_generator: None,
            masks: vec![],
            unknown: vec!["node-image-pivot.imgae".to_owned()],
        };
        assert_eq!(line, expected);
        assert_eq!(CommandLine::parse("node-image-pivot").mode, some(""), "a bare key is not a mode");
        assert_eq!(CommandLine::parse("node-image-pivot.image=a node-image-pivot.image=").image, None);
    }

    #[test]
    fn arguments_of_other_generators() {
        for (text, expected) in [
            ("quiet ro", None),
            ("systemd.run=/bin/true", Some("systemd.run=")),
            ("systemd.run_success_action=none", Some("systemd.run=")),
            ("rd.systemd.run=/bin/true systemd.run", None),
            ("coreos.inst.install_dev=/dev/sda", Some("coreos.inst.install_dev=")),
            ("coreos.inst.install_dev= coreos.inst.insecure=1", None),
            ("coreos.liveiso=x coreos.live.rootfs_url=y", None),
        ] {
            assert_eq!(CommandLine::parse(text).other_generator, expected, "{text}");
        }
    }

    #[test]
    fn masked_units() {
        let line = CommandLine::parse("systemd.mask=a.target systemd.mask=sshd rd.systemd.mask=b.target systemd.mask=");
        assert_eq!(line.masks, ["a.target", "sshd.service"]);
    }

    #[test]
    fn the_unit_the_boot_goes_to() {
        for (text, unit) in [
            ("quiet ro", None),
            ("systemd.unit=foo.target", Some("foo.target")),
            ("rd.systemd.unit=foo.target rd.break", None),
            ("single", Some("rescue.target")),
            ("emergency", Some("emergency.target")),
            ("3", Some("multi-user.target")),
            ("rescue systemd.unit=default.target", Some("default.target")),
            ("systemd.unit=a.target 5", Some("graphical.target")),
            ("systemd.unit=a.target systemd.unit=", None),
            ("emergency=no", None),
        ] {
            assert_eq!(CommandLine::parse(text).unit.as_deref(), unit, "{text}");
        }
    }
}
