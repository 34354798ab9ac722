//! `status` and `report`: show the status document of the daemon, or of the record if no daemon answers on the socket or the
//! system bus.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::say;
use crate::agent::{Agent, StateDir};
use crate::bus::Client;
use crate::report::{self, AgentState, Outcome, Report, State, Status, Timeline};

/// Rows of the smallest screen, without the row of the next prompt.
const SCREEN: usize = 23;
/// Columns of the smallest screen.
const COLUMNS: usize = 80;
/// Largest number of events that `status` lists.
const EVENTS: usize = 5;
/// Largest number of rows that the deviations fill.
const DEVIATIONS: usize = 6;
/// Time limit for systemd's answer about the agent's unit.
const SYSTEMD: Duration = Duration::from_secs(10);

/// Returns the report as a JSON document: the daemon's, or that of the record.
pub(super) async fn current(paths: &StateDir) -> Result<String> {
    let error = match reported(paths).await {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    // An older agent has no report.
    if let Ok(status) = asked(paths).await {
        return Ok(serde_json::to_string(&Report::new(status, Timeline::default()))?);
    }
    let agent = stopped().await;
    // Only root can read the record; other users get the daemon's error.
    if !rustix::process::geteuid().is_root() {
        return Err(error.context(format!("the agent is {}", agent.line())));
    }
    let mut report = Agent::recorded_report(paths);
    report.status.agent = Some(agent);
    Ok(serde_json::to_string(&report)?)
}

/// Asks systemd about the unit of an agent that does not answer.
pub(super) async fn stopped() -> AgentState {
    let command = ["systemctl", "show", "--property=ActiveState,Result", "node-image-pivotd.service"];
    let shown = support::command::run(&command, SYSTEMD).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&shown);
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    AgentState {
        running: false,
        unit: value("ActiveState="),
        result: value("Result=").filter(|word| word != "success"),
    }
}

/// Asks the daemon for its status.
pub(super) async fn asked(paths: &StateDir) -> Result<Status> {
    Client::connect(&paths.socket()).await?.status().await
}

/// Asks the daemon for its report.
async fn reported(paths: &StateDir) -> Result<String> {
    Client::connect(&paths.socket()).await?.report().await
}

pub(super) fn recorded(paths: &StateDir) -> Option<Status> {
    rustix::process::geteuid().is_root().then(|| Agent::recorded_status(paths))
}

/// Reads a report. That of an agent of another version is read without its timeline if the timeline has another form.
pub(super) fn parse(text: &str) -> Result<Report> {
    let bare = |error: serde_json::Error| {
        let mut document: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
        document.remove("timeline").ok_or(error)?;
        serde_json::from_value(document.into())
    };
    serde_json::from_str(text).or_else(bare).context("cannot read the agent's report")
}

pub(super) async fn status(paths: &StateDir, json: bool, exit_code: bool) -> Result<Outcome> {
    let text = current(paths).await?;
    if json {
        // As the agent wrote it: it may have fields that this program does not know.
        let document: serde_json::Value = serde_json::from_str(&text)?;
        say::out(&document["status"]);
    }
    let report = parse(&text)?;
    if !json {
        page(&report).iter().for_each(say::out);
    }
    Ok(if exit_code { exit_of(&report.status).unwrap_or(unfinished(&report.status)) } else { Outcome::Done })
}

/// Returns the outcome of a pivot that has not ended. Without an agent it will not end.
fn unfinished(status: &Status) -> Outcome {
    match &status.agent {
        Some(agent) if !agent.running && agent.unit.as_deref().is_none_or(|unit| unit == "failed") => Outcome::Internal,
        _ => Outcome::Pending,
    }
}

/// Returns the lines of `status`, which fit one screen also if it wraps them.
pub(super) fn page(report: &Report) -> Vec<String> {
    let (status, now) = (&report.status, report.now_unix());
    let mut lines = Vec::new();
    if let Some(agent) = &status.agent {
        lines.push(cut(format!("agent: {}", agent.line()), 2));
    }
    lines.push(cut(report::state_line(status, now), 6));
    if let Some(diagnosis) = &status.diagnosis {
        lines.push(cut(diagnosis.advice(), 2));
        lines.extend(status.explain_command().map(|command| cut(format!("explained by: {command}"), 3)));
    }
    lines.extend(deviations(status));
    let events = report.events();
    // A row stays for the units.
    let most = EVENTS.min(SCREEN.saturating_sub(rows(&lines) + 1));
    let events = events[events.len().saturating_sub(most)..].iter().map(|event| cut(event.clone(), 1));
    let events: Vec<_> = events.collect();
    let left = SCREEN.saturating_sub(rows(&lines) + events.len() + 1);
    lines.extend(report::old_lines(status).take(left).map(|line| cut(line, 1)));
    if status.still_old.len() > left {
        lines.push(format!("and {} more units; see status --json", status.still_old.len() - left));
    }
    lines.extend(events);
    lines
}

/// Returns lines for the deviations, and one more if they do not fit.
fn deviations(status: &Status) -> Vec<String> {
    let mut lines: Vec<_> = report::deviation_lines(status).map(|line| cut(line, 3)).collect();
    let fits = |shown: &usize| rows(&lines[..*shown]) <= DEVIATIONS;
    let shown = (0..=lines.len()).rev().find(fits).unwrap_or(0);
    let hidden = lines.split_off(shown).len();
    if hidden > 0 {
        lines.push(format!("but: {hidden} more lines; see report"));
    }
    lines
}

/// Returns the number of rows that these lines need on the smallest screen.
fn rows(lines: &[String]) -> usize {
    lines.iter().map(|line| line.chars().count().div_ceil(COLUMNS)).sum()
}

/// Returns the line, or its beginning if it needs more rows of a screen.
fn cut(line: String, rows: usize) -> String {
    const MORE: &str = ".. (see report)";
    let letters = rows * COLUMNS;
    match line.chars().count() > letters {
        true => line.chars().take(letters - MORE.len()).chain(MORE.chars()).collect(),
        false => line,
    }
}

pub(super) async fn report(paths: &StateDir, json: bool, svg: Option<&Path>) -> Result<Outcome> {
    let text = current(paths).await?;
    if json {
        // A field of a newer agent is printed, too.
        say::out(text);
        return Ok(Outcome::Done);
    }
    let report = parse(&text)?;
    match svg {
        Some(file) if file == Path::new("-") => say::raw(report::plot(&report).as_bytes()),
        Some(file) => {
            std::fs::write(file, report::plot(&report)).with_context(|| format!("cannot write {}", file.display()))?;
        }
        None => say::raw(report::summary(&report).as_bytes()),
    }
    Ok(Outcome::Done)
}

/// Explains these names, or all.
pub(super) fn explain(names: &[String], json: bool) -> Result<Outcome> {
    let mut explained: Vec<_> = report::explanations().collect();
    if let Some(unknown) = names.iter().find(|name| !explained.iter().any(|known| known.name == **name)) {
        say::error(&format!("unknown name \"{unknown}\": node-image-pivot explain lists all"));
        return Ok(Outcome::Internal);
    }
    explained.retain(|known| names.is_empty() || names.iter().any(|name| name == known.name));
    match json {
        true => say::out(serde_json::to_string_pretty(&serde_json::json!({"schema": 1, "names": explained}))?),
        false => explained.iter().for_each(|explanation| say::out(explanation.line())),
    }
    Ok(Outcome::Done)
}

/// Returns the outcome that ends a watch, or `None` while the status may still change.
pub(super) fn exit_of(status: &Status) -> Option<Outcome> {
    match status.state {
        // While a phase after the switch runs, the state is `running`.
        State::Done | State::NothingToDo | State::Switched => Some(Outcome::Done),
        State::Failed => Some(status.error.as_ref().map(|error| error.outcome).unwrap_or_default()),
        State::Idle | State::Running | State::Waiting | State::Pulled | State::Other => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::{LastError, Reason, SpanResult, StaleUnit, Subject};

    #[test]
    fn the_first_line_is_about_the_agent_and_events_are_listed() {
        let agent = AgentState { running: false, unit: Some("failed".into()), result: Some("start-limit-hit".into()) };
        let error =
            LastError { class: "network".into(), message: "refused".into(), attempt: 6, ..LastError::default() };
        let status = Status { agent: Some(agent), error: Some(error), ..Status::default() };
        assert_eq!(unfinished(&status), Outcome::Internal);
        let mut timeline = Timeline::default();
        for (subject, name) in [(Subject::Mount, "the mount"), (Subject::Undo, "undo at the end of the trial period")] {
            timeline.begin(subject, name, 5_000);
            timeline.end(subject, None, 6_000, SpanResult::Done);
        }
        let report = Report { boot_unix_ms: 1_795_000_000_000, ..Report::new(status, timeline) };
        let lines = page(&report);
        assert!(
            lines[0].starts_with("agent: not running: node-image-pivotd.service failed (start-limit-hit)"),
            "{lines:?}"
        );
        assert_eq!(
            lines[1..],
            [
                "no call runs; the last attempt failed (network): refused",
                "2026-11-18T11:06:45Z switch",
                "2026-11-18T11:06:45Z undo at the end of the trial period",
            ]
        );
        assert_eq!(unfinished(&Status::default()), Outcome::Pending);
    }

    #[test]
    fn the_page_fits_one_screen() {
        let unit = |number| StaleUnit { unit: format!("{number}{}.service", "u".repeat(90)), files: vec!["x".into()] };
        let refusals = vec![Reason { id: "conflicts".into(), message: "m".into() }; 9];
        let error = LastError { message: "long ".repeat(400), refusals, attempt: 1, ..LastError::default() };
        let agent = AgentState { running: false, unit: Some("failed".into()), result: Some("start-limit-hit".into()) };
        let long = Status {
            agent: Some(agent),
            state: State::Failed,
            error: Some(error),
            deviations: vec!["deviation ".repeat(20); 5],
            still_old: (0..40).map(unit).collect(),
            ..Status::default()
        };
        let long = Status { diagnosis: long.diagnose(), ..long };
        let short = Status { still_old: long.still_old.clone(), ..Status::default() };
        for (status, spans) in [(long, 9), (short, 0)] {
            let mut timeline = Timeline::default();
            for at in 0..spans {
                timeline.begin(Subject::Undo, "undo", at);
                timeline.end(Subject::Undo, None, at, SpanResult::Failed);
                timeline.latest(Subject::Undo, "undo").unwrap().detail = Some("d".repeat(300));
            }
            let lines = page(&Report::new(status, timeline));
            assert!((20..=SCREEN).contains(&rows(&lines)), "{lines:#?}");
            assert!(lines.iter().any(|line| line.starts_with("and ") && line.contains(" more units")), "{lines:#?}");
        }
    }

    #[test]
    fn each_deviation_and_each_name_is_shown_or_counted() {
        let image = |digit: &str| format!("registry.example.com/openshift/node@sha256:{}", digit.repeat(64));
        let other = format!(
            "this system is switched to {}, and the configuration asks for {}; run undo, then run again",
            image("a"),
            image("b")
        );
        let of = |deviations| page(&Report::new(Status { deviations, ..Status::default() }, Timeline::default()));
        let lines = of(vec!["one".into(), "two".into(), "three".into(), other.clone()]);
        assert_eq!(&lines[1..4], ["but: one", "but: two", "but: three"]);
        assert!(lines[4].ends_with("; run undo, then run again"), "{lines:#?}");
        assert_eq!(of(vec![other; 4])[3..], ["but: 2 more lines; see report"]);

        let ids = ["conflicts", "too-deep", "not-stackable", "os-mismatch", "old-kernel", "conflicts"];
        let refusals = ids.map(|id| Reason { id: id.into(), message: "m".into() }).into();
        let error = Some(LastError { refusals, ..LastError::default() });
        let status = Status { state: State::Failed, error, ..Status::default() };
        let lines = page(&Report::new(Status { diagnosis: status.diagnose(), ..status }, Timeline::default()));
        let explained =
            "explained by: node-image-pivot explain conflicts too-deep not-stackable os-mismatch old-kernel";
        assert!(lines.iter().any(|line| line == explained), "{lines:#?}");
    }

    #[test]
    fn a_timeline_of_another_form_does_not_hide_the_status() {
        let text = r#"{"status": {"state": "done"}, "timeline": {"spans": 7}}"#;
        assert_eq!(parse(text).unwrap().status.state, State::Done);
        for damaged in ["7", "{", r#"{"status": 7}"#, r#"{"status": 7, "timeline": {"spans": 7}}"#] {
            assert!(parse(damaged).is_err(), "{damaged}");
        }
    }

    #[test]
    fn a_watch_ends_in_a_final_state() {
        let of = |state, outcome: Option<Outcome>| {
            let error = outcome.map(|outcome| LastError { outcome, ..LastError::default() });
            exit_of(&Status { state, error, ..Status::default() })
        };
        for state in [State::Done, State::NothingToDo, State::Switched] {
            assert_eq!(of(state, None), Some(Outcome::Done), "{state:?}");
        }
        // A failure stays in the document while the next attempt runs.
        for state in [State::Idle, State::Running, State::Waiting, State::Pulled] {
            assert_eq!(of(state, Some(Outcome::GaveUp)), None, "{state:?}");
        }
        for outcome in [Outcome::Refused, Outcome::Permanent, Outcome::GaveUp, Outcome::Cancelled, Outcome::Internal] {
            assert_eq!(of(State::Failed, Some(outcome)), Some(outcome), "{outcome:?}");
        }
        assert_eq!(of(State::Failed, None), Some(Outcome::Internal));
    }
}
