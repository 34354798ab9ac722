//! Assertions that fail with what they saw instead.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::guest::Guest;

/// A running list of assertions.
pub struct Checks {
    title: String,
    start: Instant,
    passed: usize,
    failed: Vec<String>,
}

impl Checks {
    /// Start a list.
    pub fn new(title: &str) -> Self {
        println!("== {title}");
        Checks { title: title.to_string(), start: Instant::now(), passed: 0, failed: Vec::new() }
    }

    /// One assertion: `Err` says what was seen instead.
    pub fn check(&mut self, name: &str, assertion: impl FnOnce() -> Result<()>) -> bool {
        let result = assertion();
        // When it was settled, since power on.
        let at = self.start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("  ok   {at:6.1} s  {name}");
                true
            }
            Err(error) => {
                println!("  FAIL {at:6.1} s  {name}\n       {}", format!("{error:#}").replace('\n', "\n       "));
                self.failed.push(name.to_string());
                false
            }
        }
    }

    /// A moment worth a line in the record, without judgement.
    pub fn note(&self, text: &str) {
        println!("  --   {:6.1} s  {text}", self.start.elapsed().as_secs_f64());
    }

    /// The verdict.
    pub fn finish(self) -> Result<()> {
        let seconds = self.start.elapsed().as_secs_f64();
        println!("== {}: {} ok, {} failed, {seconds:.0} s", self.title, self.passed, self.failed.len());
        if !self.failed.is_empty() {
            bail!("{}: failed: {}", self.title, self.failed.join("; "));
        }
        Ok(())
    }
}

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
