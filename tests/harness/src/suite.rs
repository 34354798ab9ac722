//! The runner of a machine test: named scenarios that run in order and share one guest.

use std::fmt::Display;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::guest::Guest;
use crate::table::{self, Flow};

/// A behaviour of a guest. `B` is the bed: the guest and all that its scenarios share.
pub struct Scenario<B> {
    /// Name of the behaviour that `run` shows.
    pub name: &'static str,
    /// Scenario that must have passed earlier; otherwise this one is skipped and counts as failed.
    pub after: Option<&'static str>,
    /// Function that shows the behaviour. Its error says what it saw instead.
    pub run: fn(&mut B) -> Result<()>,
}

/// Lists functions as scenarios, each under its own name: `scenarios![boots, pulls after boots]`.
#[macro_export]
macro_rules! scenarios {
    ($($run:ident $(after $earlier:ident)?),* $(,)?) => {
        [$($crate::suite::Scenario {
            name: stringify!($run),
            after: $crate::scenarios!(@ $($earlier)?),
            run: $run,
        }),*]
    };
    (@) => { None };
    (@ $earlier:ident) => { Some(stringify!($earlier)) };
}

/// Runs scenarios, reports each with its time, and remembers which passed.
pub struct Suite {
    title: String,
    part: String,
    start: Instant,
    results: Vec<(String, bool)>,
    passed: usize,
    failed: Vec<String>,
    rows: Vec<table::Row>,
}

impl Suite {
    /// Begins a suite.
    pub fn new(title: &str) -> Self {
        println!("== {title}");
        Suite {
            title: title.to_owned(),
            part: String::new(),
            start: Instant::now(),
            results: Vec::new(),
            passed: 0,
            failed: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds the system of the guest, a flow and the name of assertions to the rows that the page of tested systems must have.
    pub fn covers(&mut self, guest: &dyn Guest, flow: Flow, assertions: &'static str) {
        match table::system(guest) {
            Ok(system) => table::add(&mut self.rows, system, flow, assertions),
            Err(error) => self.failed.push(format!("{assertions}: {error:#}")),
        }
    }

    /// Begins a part, such as the second boot of a machine. Tells apart scenarios that run in several parts.
    pub fn part(&mut self, name: &str) {
        println!("  --   {:6.1} s  {name}", self.start.elapsed().as_secs_f64());
        self.part = format!("{name}: ");
    }

    /// Runs scenarios in order. Returns true if all have passed.
    pub fn run<B>(&mut self, bed: &mut B, scenarios: &[Scenario<B>]) -> bool {
        self.run_all(bed, None, scenarios)
    }

    /// Runs scenarios that all need the one called `earlier`.
    pub fn run_after<B>(&mut self, earlier: &str, bed: &mut B, scenarios: &[Scenario<B>]) -> bool {
        self.run_all(bed, Some(earlier), scenarios)
    }

    /// Runs a scenario for each row of a table; all rows need the scenario `after`.
    pub fn each<B, T>(
        &mut self,
        name: &str,
        after: Option<&str>,
        bed: &mut B,
        rows: impl IntoIterator<Item = (impl Display, T)>,
        mut run: impl FnMut(&mut B, &T) -> Result<()>,
    ) {
        let mut all = true;
        for (label, row) in rows {
            all &= self.one(&format!("{name} [{label}]"), &[after], || run(bed, &row));
        }
        self.results.push((name.to_owned(), all));
    }

    /// Returns true if the latest scenario of this name has passed.
    pub fn passed(&self, name: &str) -> bool {
        self.results.iter().rev().find(|(one, _)| one == name).is_some_and(|(_, passed)| *passed)
    }

    /// Ends the suite. Fails if any scenario has failed, or if the page of tested systems has other rows.
    pub fn finish(self) -> Result<()> {
        let (seconds, passed, failed) = (self.start.elapsed().as_secs_f64(), self.passed, self.failed.len());
        println!("== {}: {passed} passed, {failed} failed, {seconds:.0} s", self.title);
        if !self.failed.is_empty() {
            bail!("{}: failed: {}", self.title, self.failed.join("; "));
        }
        table::compare(&self.title, &self.rows)
    }

    fn run_all<B>(&mut self, bed: &mut B, earlier: Option<&str>, scenarios: &[Scenario<B>]) -> bool {
        let mut all = true;
        for scenario in scenarios {
            all &= self.one(scenario.name, &[earlier, scenario.after], || (scenario.run)(bed));
        }
        all
    }

    fn one(&mut self, name: &str, needs: &[Option<&str>], run: impl FnOnce() -> Result<()>) -> bool {
        let missing = needs.iter().flatten().find(|earlier| !self.passed(earlier));
        let begun = Instant::now();
        let (word, text) = match missing {
            Some(earlier) => ("SKIP", format!("\n       needs {earlier}, which has not passed")),
            None => match run() {
                Ok(()) => ("ok", String::new()),
                Err(error) => ("FAIL", format!("\n       {}", format!("{error:#}").replace('\n', "\n       "))),
            },
        };
        let (at, took) = (self.start.elapsed().as_secs_f64(), begun.elapsed().as_secs_f64());
        println!("  {word:4} {at:6.1} s  {name} ({took:.1} s){text}");
        self.results.push((name.to_owned(), word == "ok"));
        match word {
            "ok" => self.passed += 1,
            _ => self.failed.push(format!("{}{name}", self.part)),
        }
        word == "ok"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boots(ran: &mut Vec<&'static str>) -> Result<()> {
        ran.push("boots");
        Ok(())
    }

    fn breaks(ran: &mut Vec<&'static str>) -> Result<()> {
        ran.push("breaks");
        bail!("broken")
    }

    fn uses(ran: &mut Vec<&'static str>) -> Result<()> {
        ran.push("uses");
        Ok(())
    }

    #[test]
    fn scenarios_run_in_order_and_all_must_pass() {
        let (mut suite, mut ran) = (Suite::new("test"), Vec::new());
        assert!(suite.run(&mut ran, &scenarios![boots, uses after boots]));
        assert_eq!(ran, ["boots", "uses"]);
        assert!(suite.finish().is_ok());
    }

    #[test]
    fn a_scenario_is_skipped_and_fails_when_the_one_it_needs_has_not_passed() {
        let (mut suite, mut ran) = (Suite::new("test"), Vec::new());
        assert!(!suite.run(&mut ran, &scenarios![breaks, uses after breaks, boots after uses, boots]));
        assert!(!suite.run_after("unknown", &mut ran, &scenarios![uses]));
        assert_eq!(ran, ["breaks", "boots"]);
        let error = suite.finish().err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("test: failed: breaks; uses; boots; uses"));
    }

    #[test]
    fn a_table_passes_if_all_of_its_rows_pass() {
        let mut suite = Suite::new("test");
        let odd = |_: &mut (), row: &u8| if row % 2 == 1 { Ok(()) } else { bail!("even") };
        suite.each("odd", None, &mut (), [("one", 1), ("three", 3)], odd);
        assert!(suite.passed("odd"));
        suite.part("again");
        suite.each("odd", Some("odd"), &mut (), [("two", 2), ("five", 5)], odd);
        assert!(!suite.passed("odd"));
        let error = suite.finish().err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("test: failed: again: odd [two]"));
    }
}
