//! What administrators and images say about units: the `[units]` table of the configuration, and a key in unit files.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};

use support::pattern;

/// What somebody wants done to a unit that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// A word that is no [`Wish`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoWish(String);

impl fmt::Display for NoWish {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "\"{}\" is not a class; write reload, restart, never or stop", self.0)
    }
}

impl std::error::Error for NoWish {}

impl FromStr for Wish {
    type Err = NoWish;

    fn from_str(word: &str) -> Result<Self, NoWish> {
        match word {
            "reload" => Ok(Wish::Reload),
            "restart" => Ok(Wish::Restart),
            "never" => Ok(Wish::Never),
            "stop" => Ok(Wish::Stop),
            _ => Err(NoWish(word.to_owned())),
        }
    }
}

/// Patterns of unit names with what is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy(BTreeMap<String, Wish>);

/// What units may be called by: those that the plan looks at.
pub const KINDS: &[&str] = &[".service", ".socket", ".timer", ".path", ".mount"];

/// How the names of our own units begin.
pub const OWN: &str = "node-image-";

impl Policy {
    /// Checks patterns and words.
    ///
    /// # Errors
    /// Names the first pattern or word that is none, and what may be written.
    pub fn new<'a>(rules: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut checked = BTreeMap::new();
        for (pattern, word) in rules {
            ensure!(
                pattern.ends_with('*') || KINDS.iter().any(|kind| pattern.ends_with(kind)),
                "\"{pattern}\" matches no unit; write a name with its suffix ({}), or a pattern with * and ?",
                KINDS.join(" ")
            );
            ensure!(!pattern.starts_with(OWN), "\"{pattern}\": the agent's own units are never touched");
            checked.insert(pattern.to_owned(), word.parse()?);
        }
        Ok(Self(checked))
    }

    /// What is wanted for `unit`, and by which pattern: its own name, else the longest pattern that matches.
    pub fn of(&self, unit: &str) -> Option<(&str, Wish)> {
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
    fn the_nearest_rule_wins() {
        let policy = Policy::new([("*", "never"), ("crio*", "reload"), ("crio.service", "restart")]).unwrap();
        assert_eq!(policy.of("crio.service"), Some(("crio.service", Wish::Restart)));
        assert_eq!(policy.of("crio-wipe.service"), Some(("crio*", Wish::Reload)));
        assert_eq!(policy.of("x.timer"), Some(("*", Wish::Never)));
        assert_eq!(Policy::default().of("x.timer"), None);
    }

    #[test]
    fn what_is_refused() {
        for pattern in ["a.service", "a.socket", "a.timer", "a.path", "a.mount", "?.service", "a*"] {
            assert!(Policy::new([(pattern, "never")]).is_ok(), "{pattern}");
        }
        for (pattern, word, expected) in [
            ("a.service", "restrat", "\"restrat\" is not a class; write reload, restart, never or stop"),
            ("a", "restart", "\"a\" matches no unit"),
            ("", "restart", "matches no unit"),
            ("multi-user.target", "restart", "matches no unit"),
            ("node-image-pivotd.service", "restart", "own units are never touched"),
        ] {
            let message = Policy::new([(pattern, word)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
