//! Presets (systemd.preset(5)): units that PID 1 enables on a first boot, after the generators have run.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::under;

/// Directories of preset files, in descending priority.
const DIRECTORIES: [&str; 4] = [
    "/etc/systemd/system-preset",
    "/run/systemd/system-preset",
    "/usr/local/lib/systemd/system-preset",
    "/usr/lib/systemd/system-preset",
];

/// The rules of all preset files, in the order in which systemd reads them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Presets(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    enable: bool,
    pattern: String,
}

impl Presets {
    /// Reads the preset files of the machine whose root is `root`, sorted by name regardless of the directory. Of files with
    /// the same name, the one with the highest priority counts. An unreadable file counts as empty.
    pub fn read(root: &Path) -> Self {
        let mut by_name: BTreeMap<OsString, PathBuf> = BTreeMap::new();
        for directory in DIRECTORIES {
            let entries = fs::read_dir(under(root, directory)).into_iter().flatten().flatten();
            for entry in entries.filter(|entry| Path::new(&entry.file_name()).extension() == Some("preset".as_ref())) {
                by_name.entry(entry.file_name()).or_insert(entry.path());
            }
        }
        // Named pipes are skipped, because they would block the boot.
        let files = by_name.into_values().filter(|path| path.is_file());
        let texts = files.map(|path| fs::read(path).unwrap_or_default());
        Self(texts.flat_map(|text| rules(&String::from_utf8_lossy(&text))).collect())
    }

    /// Returns true if `unit` is enabled by the first rule that matches, or if no rule matches.
    pub fn enable(&self, unit: &str) -> bool {
        self.0.iter().find(|rule| matches(rule.pattern.as_bytes(), unit.as_bytes())).is_none_or(|rule| rule.enable)
    }
}

fn rules(text: &str) -> Vec<Rule> {
    let rule = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let enable = match words.next()? {
            "enable" => true,
            // `ignore` leaves a unit unchanged. The caller checks only units that no link enables.
            "disable" | "ignore" => false,
            _ => return None,
        };
        // Further words are instances of a template.
        words.next().map(|pattern| Rule { enable, pattern: pattern.to_owned() })
    };
    text.lines().filter_map(rule).collect()
}

/// Returns true if `name` matches `pattern`, by fnmatch(3) with `FNM_NOESCAPE`.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skipped| matches(rest, &name[skipped..])),
        Some((&first, rest)) => {
            let Some((&byte, tail)) = name.split_first() else { return false };
            let (fits, rest) = match (first, set(rest)) {
                (b'?', _) => (true, rest),
                (b'[', Some((set, behind))) => (in_set(set, byte), behind),
                _ => (first == byte, rest),
            };
            fits && matches(rest, tail)
        }
    }
}

/// Splits `a-z]rest` after the end of the set. A `]` at the beginning, or after `!`, is a member.
fn set(pattern: &[u8]) -> Option<(&[u8], &[u8])> {
    let negation = usize::from(matches!(pattern.first(), Some(b'!' | b'^')));
    let end = pattern.iter().skip(negation + 1).position(|&byte| byte == b']')? + negation + 1;
    Some((&pattern[..end], &pattern[end + 1..]))
}

fn in_set(set: &[u8], byte: u8) -> bool {
    let (negated, mut members) = match set {
        [b'!' | b'^', members @ ..] => (true, members),
        members => (false, members),
    };
    let mut found = false;
    while let [first, rest @ ..] = members {
        members = match rest {
            [b'-', last, rest @ ..] => {
                found |= (*first..=*last).contains(&byte);
                rest
            }
            _ => {
                found |= *first == byte;
                rest
            }
        };
    }
    found != negated
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn patterns_match_as_fnmatch_does() {
        for (pattern, name, expected) in [
            ("chronyd.service", "chronyd.service", true),
            ("chronyd.service", "chronyd.socket", false),
            ("*", "chronyd.service", true),
            ("chrony*.service", "chronyd.service", true),
            ("systemd-*d.service", "systemd-networkd.service", true),
            ("systemd-*d.service", "systemd-network.service", false),
            ("chrony?.service", "chronyd.service", true),
            ("chrony?.service", "chrony.service", false),
            ("chrony[a-f].service", "chronyd.service", true),
            ("chrony[!a-f].service", "chronyd.service", false),
            ("chrony[^a-f].service", "chronyz.service", true),
            ("chrony[]d].service", "chronyd.service", true),
            ("chrony[", "chrony[", true),
            (r"chrony\*", r"chrony\d", true),
            ("", "chronyd.service", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_first_rule_of_the_first_file_decides() {
        let (etc, run, usr) =
            ("etc/systemd/system-preset", "run/systemd/system-preset", "usr/lib/systemd/system-preset");
        let ignition = (format!("{etc}/20-ignition.preset"), "enable chronyd.service\n");
        let default = (format!("{usr}/99-default.preset"), "disable *\n");
        for (files, expected) in [
            (vec![], true),
            (vec![default.clone()], false),
            (vec![default.clone(), ignition.clone()], true),
            // Sorted by name over all directories: 10 comes before 20.
            (vec![ignition.clone(), (format!("{usr}/10-a.preset"), "disable chronyd.service\n")], false),
            // The stronger directory replaces a file of the same name.
            (vec![(format!("{usr}/20-ignition.preset"), "disable *\n"), ignition.clone()], true),
            (vec![(format!("{run}/20-ignition.preset"), "disable *\n"), default.clone()], false),
            (
                vec![
                    (format!("{etc}/10-a.preset"), "# disable *\n; disable *\n\n  enable\tchrony* \n"),
                    default.clone(),
                ],
                true,
            ),
            (vec![(format!("{etc}/10-a.preset"), "ignore chronyd.service\n")], false),
            (vec![(format!("{etc}/10-a.preset"), "enabled chronyd.service\ndisable\n"), default.clone()], false),
            (vec![(format!("{etc}/10-a.preset.rpmsave"), "enable *\n"), default.clone()], false),
        ] {
            let root = tempfile::tempdir().unwrap();
            for (path, text) in &files {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            assert_eq!(Presets::read(root.path()).enable("chronyd.service"), expected, "{files:?}");
        }
    }

    #[test]
    fn a_link_to_dev_null_hides_a_preset_file() {
        let root = tempfile::tempdir().unwrap();
        let [etc, usr] =
            ["etc/systemd/system-preset", "usr/lib/systemd/system-preset"].map(|path| root.path().join(path));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(&usr).unwrap();
        fs::write(usr.join("10-a.preset"), "disable *\n").unwrap();
        symlink("/dev/null", etc.join("10-a.preset")).unwrap();
        assert!(Presets::read(root.path()).enable("chronyd.service"));
    }
}
