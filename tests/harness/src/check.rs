//! Assertions that fail with what they saw instead.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::guest::Guest;

/// Fails with both values unless they are equal.
pub fn same<T: PartialEq + std::fmt::Debug>(seen: T, wanted: T) -> Result<()> {
    if seen != wanted {
        bail!("saw {seen:?}, wanted {wanted:?}");
    }
    Ok(())
}

/// Fails with the text unless it contains one of the words, in any case.
pub fn contains_any(text: &str, words: &[&str]) -> Result<()> {
    let lower = text.to_lowercase();
    if !words.iter().any(|w| lower.contains(&w.to_lowercase())) {
        bail!("none of {words:?} in:\n{text}");
    }
    Ok(())
}

/// Fails with the text unless it contains the words.
pub fn contains(text: &str, words: &str) -> Result<()> {
    if !text.contains(words) {
        bail!("no {words:?} in:\n{text}");
    }
    Ok(())
}

/// Fails with the failed units of a guest, if it has any.
pub fn nothing_failed(guest: &dyn Guest) -> Result<()> {
    same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
}

/// Fails with the lines that differ.
pub fn same_text(seen: &str, wanted: &str) -> Result<()> {
    let [left, right] = [seen, wanted].map(|text| text.lines().collect::<BTreeSet<_>>());
    let lines: Vec<_> = left.symmetric_difference(&right).collect();
    if !lines.is_empty() {
        bail!("these lines are on one side only: {lines:#?}");
    }
    Ok(())
}

/// Lists kind, mode, owner, link and content of all of /etc, without caches, which an undo does not restore.
pub fn etc(guest: &dyn Guest) -> Result<String> {
    guest.ask(
        "cd /etc && { find . -xdev ! -name ld.so.cache ! -name .updated ! -name .pwd.lock \
         -printf '%p %y %m %U %G %l\n' | LC_ALL=C sort; \
         find . -xdev -type f ! -name ld.so.cache ! -name .updated ! -name .pwd.lock -print0 | LC_ALL=C sort -z \
         | xargs -0 sha256sum; }",
    )
}
