//! The kernel command line: `node-image-pivot…` keys, and the unit that the boot was told to go to.
//!
//! Words are split as systemd splits them: by white space, `"` and `'` quote, a backslash is an
//! ordinary character, an unclosed quote ends with the line. Of a key given twice the last one wins.
//! A key may be written with `_` for `-`. Keys that start with `rd.` are the initramfs's business.

use std::fs;
use std::path::Path;

use crate::{Problem, under};

/// What the kernel command line says that concerns the pivot.
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
                // A bare `node-image-pivot` says nothing; an empty mode is refused by whoever checks it.
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
            other if other.starts_with("node-image-pivot.") => self.unknown.push(key.to_owned()),
            _ => {}
        }
    }
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
            unknown: vec!["node-image-pivot.imgae".to_owned()],
        };
        assert_eq!(line, expected);
        assert_eq!(CommandLine::parse("node-image-pivot").mode, some(""), "a bare key is not a mode");
        assert_eq!(CommandLine::parse("node-image-pivot.image=a node-image-pivot.image=").image, None);
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
