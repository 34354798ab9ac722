//! Parses the kernel command line: the `node-image-pivot…` keys, and other arguments that select the boot's target.
//!
//! The line is split into words as systemd does: white space separates words, `"` and `'` quote, a backslash is an
//! ordinary character, and an unclosed quote ends with the line. If a key is repeated, the last value counts. A key may
//! be written with `_` for `-`. Keys that start with `rd.` apply only to the initramfs.

use std::fs;
use std::path::Path;

use crate::{Problem, under};

/// The arguments of the kernel command line that concern the pivot.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// `node-image-pivot=`, unchecked.
    pub mode: Option<String>,
    /// `node-image-pivot.image=`: a pull spec.
    pub image: Option<String>,
    /// `node-image-pivot.release-image=`: a pull spec.
    pub release_image: Option<String>,
    /// `node-image-pivot.target=`: a unit name, unchecked.
    pub target: Option<String>,
    /// The unit to boot to instead of `default.target`: `systemd.unit=`, or the target that `rescue`, `emergency`, `single`
    /// or a runlevel digit stands for.
    pub unit: Option<String>,
    /// The argument that makes another generator redirect this boot.
    pub other_generator: Option<&'static str>,
    /// `systemd.mask=`: units that are masked for this boot.
    pub masks: Vec<String>,
    /// Keys that start with `node-image-pivot.` and that this version does not define.
    pub unknown: Vec<String>,
}

impl CommandLine {
    /// Parses the text of `/proc/cmdline`. Never fails: unrelated arguments are skipped.
    pub fn parse(text: &str) -> Self {
        Self::from_words(words(text))
    }

    /// Reads the command line of the machine whose root is `root`.
    ///
    /// In a container it is the command line of PID 1, as in systemd: `/proc/cmdline` belongs to the host.
    ///
    /// # Errors
    /// Fails if the file in `/proc` cannot be read.
    pub fn read(root: &Path) -> Result<Self, Problem> {
        let container = under(root, "/run/systemd/container").exists();
        let path = under(root, if container { "/proc/1/cmdline" } else { "/proc/cmdline" });
        let bytes =
            fs::read(&path).map_err(|e| Problem(format!("cannot read {}: {e}; is /proc mounted?", path.display())))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(if container { Self::from_words(text.split('\0').map(String::from)) } else { Self::parse(&text) })
    }

    /// Interprets a command line that is already split into words.
    fn from_words(words: impl IntoIterator<Item = String>) -> Self {
        let mut line = Self::default();
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => line.assign(key, value),
                // A bare `node-image-pivot` gets an empty value, which the check of the mode refuses.
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
            // Arguments of systemd-run-generator and coreos-installer-generator.
            "systemd.run" | "systemd.run-success-action" if given.is_some() => {
                self.other_generator = Some("systemd.run=");
            }
            "coreos.inst.install-dev" if given.is_some() => self.other_generator = Some("coreos.inst.install_dev="),
            other if other.starts_with("node-image-pivot.") => self.unknown.push(key.to_owned()),
            _ => {}
        }
    }
}

/// Appends `.service` to a name without a suffix.
fn unit_name(name: String) -> String {
    if name.contains('.') { name } else { format!("{name}.service") }
}

/// Returns the unit that systemd boots to for a word without a value, or `None` for other words.
fn bare_word_unit(word: &str) -> Option<&'static str> {
    Some(match word {
        "emergency" | "-b" => "emergency.target",
        "rescue" | "single" | "-s" | "s" | "S" | "1" => "rescue.target",
        "2" | "3" | "4" => "multi-user.target",
        "5" => "graphical.target",
        _ => return None,
    })
}

/// Splits a command line into words and removes their quotes.
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
    fn the_last_value_of_a_key_counts() {
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
    fn arguments_of_other_generators_are_known() {
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
    fn masked_units_are_collected() {
        let line = CommandLine::parse("systemd.mask=a.target systemd.mask=sshd rd.systemd.mask=b.target systemd.mask=");
        assert_eq!(line.masks, ["a.target", "sshd.service"]);
    }

    #[test]
    fn the_unit_to_boot_to_is_systemds() {
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
