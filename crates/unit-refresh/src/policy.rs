//! Actions that administrators and images request: the `[units]` table of the configuration, and a key in unit files.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use support::pattern;

/// The action that an administrator or an image requests for a changed unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, strum::EnumString)]
#[strum(serialize_all = "kebab-case", parse_err_ty = NoWish, parse_err_fn = unknown)]
pub enum Wish {
    /// Reload it.
    Reload,
    /// Restart it.
    Restart,
    /// Leave it alone.
    Never,
    /// Stop it.
    Stop,
}

/// Error returned when a string is not a valid [`Wish`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown action \"{0}\": expected reload, restart, never or stop")]
pub struct NoWish(String);

fn unknown(word: &str) -> NoWish {
    NoWish(word.to_owned())
}

/// Requested actions by pattern of unit names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy(BTreeMap<String, Wish>);

/// Suffixes of the unit types that the plan considers.
pub(super) const KINDS: &[&str] = &[".service", ".socket", ".timer", ".path", ".mount"];

/// Prefix of the names of the agent's own units.
pub(super) const OWN: &str = "node-image-";

impl Policy {
    /// Parses pairs of a pattern and an action.
    ///
    /// # Errors
    /// Names the first invalid pattern or action, and the expected form.
    pub fn new<'a>(rules: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut checked = BTreeMap::new();
        for (pattern, word) in rules {
            ensure!(
                pattern.ends_with('*') || KINDS.iter().any(|kind| pattern.ends_with(kind)),
                "invalid unit pattern \"{pattern}\": expected a name with its suffix ({}), or a pattern with * and ?",
                KINDS.join(" ")
            );
            ensure!(
                !pattern.starts_with(OWN),
                "invalid unit pattern \"{pattern}\": the agent's own units are never touched"
            );
            checked.insert(pattern.to_owned(), word.parse()?);
        }
        Ok(Self(checked))
    }

    /// Returns the action requested for `unit`, and the pattern that requests it: its exact name, or else the longest pattern
    /// that matches.
    pub(super) fn of(&self, unit: &str) -> Option<(&str, Wish)> {
        let exact = self.0.get_key_value(unit);
        let fits = |pattern: &str| pattern::matches(pattern.as_bytes(), unit.as_bytes());
        let found = exact
            .or_else(|| self.0.iter().filter(|(pattern, _)| fits(pattern)).max_by_key(|(pattern, _)| pattern.len()));
        found.map(|(pattern, wish)| (pattern.as_str(), *wish))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_pattern_wins() {
        let policy = Policy::new([("*", "never"), ("crio*", "reload"), ("crio.service", "restart")]).unwrap();
        assert_eq!(policy.of("crio.service"), Some(("crio.service", Wish::Restart)));
        assert_eq!(policy.of("crio-wipe.service"), Some(("crio*", Wish::Reload)));
        assert_eq!(policy.of("x.timer"), Some(("*", Wish::Never)));
        assert_eq!(Policy::default().of("x.timer"), None);
    }

    #[test]
    fn invalid_patterns_and_actions_are_refused() {
        for pattern in ["a.service", "a.socket", "a.timer", "a.path", "a.mount", "?.service", "a*"] {
            assert!(Policy::new([(pattern, "never")]).is_ok(), "{pattern}");
        }
        for (pattern, word, expected) in [
            ("a.service", "restrat", "unknown action \"restrat\": expected reload, restart, never or stop"),
            ("a", "restart", "invalid unit pattern \"a\": expected a name with its suffix"),
            ("", "restart", "invalid unit pattern"),
            ("multi-user.target", "restart", "invalid unit pattern"),
            ("node-image-pivotd.service", "restart", "own units are never touched"),
        ] {
            let message = Policy::new([(pattern, word)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
