//! Assertions that fail with what they saw instead.

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
