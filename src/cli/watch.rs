//! `status --watch`: a live line on a terminal, and few plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::drive::{unix_now, uptime};
use super::pauses::Pauses;
use super::say;
use super::show::{asked, exit_of, page, recorded, stopped};
use crate::agent::StateDir;
use crate::report::{self, Outcome, Phase, Report, State, Status, Timeline};

/// Interval at which the status is read.
const LOOK: Duration = Duration::from_secs(1);
/// Time to wait for a daemon that does not answer.
const ABSENT: Duration = Duration::from_secs(60);
/// Forms of the live line, for a pull and for all else.
const PULL: &str = "{spinner} pull [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
const OTHER: &str = "{spinner} {wide_msg}";

/// Shows the status until the pivot has ended.
pub(super) async fn watch(paths: &StateDir, json: bool) -> Result<Outcome> {
    let mut screen = Screen::new(json);
    let mut absent_since = None;
    loop {
        let status = match asked(paths).await {
            Ok(status) => {
                absent_since = None;
                status
            }
            // The unit restarts a daemon that died. After ABSENT, no further change is expected.
            Err(error) if absent_since.is_some_and(|since: Instant| since.elapsed() >= ABSENT) => return Err(error),
            Err(error) => {
                absent_since.get_or_insert_with(Instant::now);
                let status = recorded(paths).ok_or(error)?;
                Status { agent: Some(stopped().await), ..status }
            }
        };
        screen.show(&status)?;
        if let Some(exit) = exit_of(&status) {
            screen.end(status);
            return Ok(exit);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The output of a watch.
struct Screen {
    json: bool,
    last: Option<Status>,
    /// The live line of a terminal.
    bar: Option<ProgressBar>,
    lines: Lines,
}

impl Screen {
    fn new(json: bool) -> Self {
        let live = !json && std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { json, last: None, bar: live.then(|| ProgressBar::new(0)), lines: Lines::default() }
    }

    fn show(&mut self, status: &Status) -> Result<()> {
        if self.json {
            if self.last.as_ref() != Some(status) {
                say::out(serde_json::to_string(status)?);
                self.last = Some(status.clone());
            }
        } else if let Some(bar) = &self.bar {
            bar.set_style(ProgressStyle::with_template(if is_pull(status) { PULL } else { OTHER })?);
            bar.set_length(status.progress.bytes_total);
            bar.set_position(status.progress.bytes_fetched);
            bar.set_message(line(status, unix_now()));
            bar.tick();
        } else if let Some(line) = self.lines.next(status, unix_now(), uptime()) {
            say::out(line);
        }
        Ok(())
    }

    /// Shows the end.
    fn end(self, status: Status) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if !self.json {
            page(&Report::new(status, Timeline::default())).iter().for_each(say::out);
        }
    }
}

fn is_pull(status: &Status) -> bool {
    (status.phase, status.state) == (Some(Phase::Pull), State::Running) && status.progress.bytes_total > 0
}

/// Returns the state of the agent if it does not run, otherwise the state of the pivot.
fn line(status: &Status, now: u64) -> String {
    match &status.agent {
        Some(agent) if !agent.running => format!("agent: {}", agent.line()),
        _ => report::state_line(status, now),
    }
}

/// Selects the plain lines: one in five seconds, if it differs from the last one in more than a countdown.
#[derive(Default)]
struct Lines {
    key: Option<(Option<Phase>, State, u32, bool)>,
    last: String,
    pauses: Pauses,
}

impl Lines {
    /// Returns the line to print. `now` is for the text, `uptime` for the pauses.
    fn next(&mut self, status: &Status, now: u64, uptime: u64) -> Option<String> {
        let attempt = status.error.as_ref().map_or(0, |error| error.attempt);
        let is_absent = status.agent.as_ref().is_some_and(|agent| !agent.running);
        let key = Some((status.phase, status.state, attempt, is_absent));
        let line = line(status, now);
        let changed = self.key != key || (is_pull(status) && line != self.last);
        if !changed || !self.pauses.progress_is_due(uptime) {
            return None;
        }
        (self.key, self.last) = (key, line.clone());
        Some(line)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_line_in_five_seconds_at_most() {
        let mut lines = Lines::default();
        let mut status = Status { state: State::Running, phase: Some(Phase::Pull), ..Status::default() };
        (status.progress.bytes_total, status.progress.layers_done) = (1000, 1);
        let mut shown = Vec::new();
        for second in 100..130 {
            status.progress.bytes_fetched += 1;
            status.phase = Some(if second < 117 { Phase::Pull } else { Phase::Stage });
            shown.extend(lines.next(&status, 10_000 - 60 * second, second).map(|_| second));
        }
        assert_eq!(shown, [100, 105, 110, 115, 120]);
    }

    #[test]
    fn the_forms_of_the_live_line_are_valid() {
        for form in [PULL, OTHER] {
            assert!(ProgressStyle::with_template(form).is_ok(), "{form}");
        }
    }
}
