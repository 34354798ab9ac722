//! Parses the text of unit files by the rules of systemd.syntax(7). Pure.

use std::collections::BTreeMap;

/// Values by section and key, in order. Values that a later empty assignment resets are left out.
pub(super) type Settings = BTreeMap<String, BTreeMap<String, Vec<String>>>;

/// The byte order mark, which systemd accepts once, at the beginning of a line.
const BOM: char = '\u{feff}';

/// Keys whose list an empty value does not reset.
const ADDING: &[(&str, &[&str])] = &[
    (
        "Unit",
        &[
            "After",
            "Before",
            "BindTo",
            "BindsTo",
            "Conflicts",
            "JoinsNamespaceOf",
            "OnFailure",
            "OnSuccess",
            "PartOf",
            "PropagateReloadFrom",
            "PropagateReloadTo",
            "PropagatesReloadTo",
            "PropagatesStopTo",
            "ReloadPropagatedFrom",
            "Requires",
            "RequiresMountsFor",
            "Requisite",
            "StopPropagatedFrom",
            "Upholds",
            "Wants",
            "WantsMountsFor",
        ],
    ),
    ("Service", &["Sockets"]),
];

/// Returns true if `word` is one of systemd's words for true.
pub(super) fn is_true(word: &str) -> bool {
    matches!(word.to_ascii_lowercase().as_str(), "1" | "yes" | "y" | "true" | "t" | "on")
}

/// Adds the settings of one file. Comments and blank lines are skipped, also inside a continued line. A line that ends in
/// an unescaped backslash continues in the next line.
pub(super) fn parse(text: &str, into: &mut Settings) {
    let mut section = None;
    let mut pending = String::new();
    let mut marked = false;
    for line in text.lines() {
        if line.trim_start().starts_with(['#', ';']) || line.trim().is_empty() {
            continue;
        }
        let line = match line.strip_prefix(BOM).filter(|_| !marked) {
            Some(rest) => {
                marked = true;
                rest
            }
            None => line,
        };
        pending.push_str(line);
        if is_continued(&pending) {
            pending.pop();
            pending.push(' ');
            continue;
        }
        assignment(pending.trim(), &mut section, into);
        pending.clear();
    }
    assignment(pending.trim(), &mut section, into);
}

/// Returns true if the line ends in an odd number of backslashes.
fn is_continued(line: &str) -> bool {
    line.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1
}

/// Adds the assignment of one line. Assignments before the first section are ignored.
fn assignment(line: &str, section: &mut Option<String>, into: &mut Settings) {
    if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        *section = Some(name.to_owned());
        return;
    }
    let (Some((key, value)), Some(section)) = (line.split_once('='), section) else { return };
    let (key, value) = (key.trim(), value.trim());
    let adds = ADDING.iter().any(|(name, keys)| name == section && keys.contains(&key));
    let keys = into.entry(section.clone()).or_default();
    match (value.is_empty(), adds) {
        (false, _) => keys.entry(key.to_owned()).or_default().push(value.to_owned()),
        (true, false) => drop(keys.remove(key)),
        (true, true) => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_for_true_are_those_of_systemd() {
        for (word, expected) in [
            ("1", true),
            ("Yes", true),
            ("y", true),
            ("true", true),
            ("t", true),
            ("ON", true),
            ("no", false),
            ("", false),
        ] {
            assert_eq!(is_true(word), expected, "{word}");
        }
    }

    #[test]
    fn lines_are_read_as_systemd_reads_them() {
        for (text, key, expected) in [
            ("# c\n ; c\n[Service]\nK=/a \\\n# in the middle\n  b\n", "K", &["/a    b"] as &[&str]),
            ("[Service]\nK=a \\\n\n  \nb\n", "K", &["a  b"]),
            ("[Service]\nK=X=1\nK= Y=2 \n", "K", &["X=1", "Y=2"]),
            ("[Service]\nK=u\nK=\n", "K", &[]),
            ("[Service]\nK=a\\\\\nL=b\n", "K", &["a\\\\"]),
            ("[Service]\nK=a\\\\\\\nL=b\n", "K", &["a\\\\ L=b"]),
            ("[Service]\nK=a\\ \nL=b\n", "L", &["b"]),
            ("[Service]\r\nK=a\r\n", "K", &["a"]),
            ("[Service]\nK=a \\", "K", &["a"]),
            ("\u{feff}[Service]\nK=a\n", "K", &["a"]),
            ("# c\n\u{feff}[Service]\nK=a\n", "K", &["a"]),
            ("K=a\n[Service]\nL=b\n", "K", &[]),
            ("[Service]\nnonsense\nK=a\n", "K", &["a"]),
        ] {
            let mut settings = Settings::new();
            parse(text, &mut settings);
            let values = settings.get("Service").and_then(|keys| keys.get(key)).cloned().unwrap_or_default();
            assert_eq!(values, expected, "{text:?}");
        }
    }

    #[test]
    fn an_empty_value_does_not_reset_dependencies() {
        let mut settings = Settings::new();
        parse(
            "[Unit]\nWants=a.service\nWants=\nDocumentation=x\nDocumentation=\n[Service]\nSockets=s.socket\nSockets=\n",
            &mut settings,
        );
        assert_eq!(settings["Unit"]["Wants"], ["a.service"]);
        assert_eq!(settings["Service"]["Sockets"], ["s.socket"]);
        assert!(!settings["Unit"].contains_key("Documentation"));
    }
}
