//! Renders the status document as text: a line for `systemctl status`, and a bar for the console.

use node_store::ProgressSnapshot;
use support::human_bytes;

use super::words::{one_line, short_digests};
use super::{State, Status};

/// Renders the progress of a pull as a bar of `width` cells, followed by numbers.
fn progress_line(progress: &ProgressSnapshot, width: usize) -> String {
    let share = if progress.bytes_total == 0 {
        0.0
    } else {
        (progress.bytes_fetched as f64 / progress.bytes_total as f64).min(1.0)
    };
    let full = (share * width as f64) as usize;
    let rate = match progress.bytes_per_second {
        0 => String::new(),
        rate => format!(" ({}/s)", human_bytes(rate)),
    };
    format!(
        "[{}{}] {:3.0}%  {} of {}{rate}, layer {} of {}, {} objects",
        "#".repeat(full),
        ".".repeat(width - full),
        share * 100.0,
        human_bytes(progress.bytes_fetched),
        human_bytes(progress.bytes_total),
        progress.layers_done,
        progress.layers_total,
        progress.objects_done,
    )
}

/// Returns the state of the pivot as one line, for the unit's `Status:` and the console. `now_unix` is the time in seconds
/// since the epoch.
pub fn state_line(status: &Status, now_unix: u64) -> String {
    short_digests(&one_line(&state_text(status, now_unix)))
}

/// Returns a line for `STATUS=`: the diagnosis, or else the state.
pub fn status_line(status: &Status, now_unix: u64) -> String {
    match status.diagnose() {
        Some(diagnosis) => diagnosis.line(now_unix),
        None => state_line(status, now_unix),
    }
}

/// Returns a line about the running call, for a call that waits for its end, or `None` if no call is running.
pub fn waiting_line(status: &Status, now_unix: u64) -> Option<String> {
    let call = status.call.as_deref()?;
    Some(one_line(&format!("waiting for `{call}`, which is under way: {}", state_text(status, now_unix))))
}

fn state_text(status: &Status, now_unix: u64) -> String {
    let phase = status.phase.map_or("", |phase| phase.as_str());
    match (status.state, &status.error) {
        (State::Waiting, Some(error)) => {
            let wait = error.next_retry_unix.unwrap_or(now_unix).saturating_sub(now_unix);
            format!(
                "{phase}: attempt {} failed ({}): {}; next attempt in {wait} s",
                error.attempt, error.class, error.message
            )
        }
        (State::Failed, Some(error)) => format!("{phase} failed ({}): {}", error.class, error.message),
        (State::Running, _) if status.waiting_for.is_some() => {
            format!("{phase}: waiting: {}", status.waiting_for.as_deref().unwrap_or_default())
        }
        // The total is known only after the first layer.
        (State::Running, _) if status.progress.layers_done > 0 && phase == "pull" => {
            format!("pull: {}", progress_line(&status.progress, 20))
        }
        (State::Running, _) => match status.percent {
            Some(percent) => format!("{phase} is running: {percent}%"),
            None => format!("{phase} is running"),
        },
        (State::Idle, Some(error)) => {
            format!("no call runs; the last attempt failed ({}): {}", error.class, error.message)
        }
        (State::Idle, None) => "no pivot was requested yet".to_owned(),
        (State::Other, _) => "the agent is of another version; see status --json".to_owned(),
        (State::Pulled, _) => "the node image is pulled and staged; the running system is unchanged".to_owned(),
        (State::Switched, _) => format!("/usr and /etc are the node image's{}", trial_period(status, now_unix)),
        (State::Done, _) => format!("the pivot is done{}", trial_period(status, now_unix)),
        (State::NothingToDo, _) => "nothing to do: this system already has the cluster's binaries".to_owned(),
        (State::Waiting | State::Failed, None) => format!("{phase} failed"),
    }
}

/// Returns the remaining trial period as the end of a sentence, or an empty text without one.
fn trial_period(status: &Status, now_unix: u64) -> String {
    match status.undo_unix {
        Some(at) => format!("; undone in {} s unless kept (node-image-pivot keep)", at.saturating_sub(now_unix)),
        None => String::new(),
    }
}

/// Returns a line for each deviation, with short digests.
pub fn deviation_lines(status: &Status) -> impl Iterator<Item = String> {
    status.deviations.iter().map(|line| format!("but: {}", short_digests(&one_line(line))))
}

/// Returns a line for each unit that still runs the bootimage's code.
pub fn old_lines(status: &Status) -> impl Iterator<Item = String> {
    status.still_old.iter().map(|old| {
        let first = old.files.first().map_or("", String::as_str);
        let more = match old.files.len() {
            0 | 1 => String::new(),
            files => format!(" and {} more", files - 1),
        };
        one_line(&format!("still runs the bootimage's code: {} (/usr/{first}{more})", old.unit))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{LastError, Phase, StaleUnit};
    use super::*;

    #[test]
    fn bytes_are_shown_in_binary_units() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(3 << 30), "3.0 GiB");
        assert!(human_bytes(u64::MAX).ends_with("TiB"));
    }

    #[test]
    fn a_bar_never_overflows() {
        let mut progress = ProgressSnapshot { bytes_total: 100, bytes_fetched: 250, ..Default::default() };
        assert!(progress_line(&progress, 10).starts_with("[##########] 100%"));
        progress.bytes_total = 0;
        assert!(progress_line(&progress, 10).starts_with("[..........]   0%"));
        progress = ProgressSnapshot { bytes_total: 100, bytes_fetched: 42, ..Default::default() };
        assert!(progress_line(&progress, 10).starts_with("[####......]  42%"));
    }

    #[test]
    fn progress_shows_bytes_rate_and_layers() {
        let mut progress = ProgressSnapshot {
            layers_total: 500,
            layers_done: 120,
            bytes_total: 1 << 30,
            bytes_fetched: 1 << 28,
            bytes_per_second: 12 << 20,
            objects_done: 34_000,
            ..Default::default()
        };
        let expected = "[##........]  25%  256.0 MiB of 1.0 GiB (12.0 MiB/s), layer 120 of 500, 34000 objects";
        assert_eq!(progress_line(&progress, 10), expected);
        progress.bytes_per_second = 0;
        assert_eq!(progress_line(&progress, 10), expected.replace(" (12.0 MiB/s)", ""));
    }

    #[test]
    fn a_message_becomes_one_line_without_control_characters() {
        for (message, expected) in [
            ("too little RAM\nfree 1 GiB", "stage failed (refused): too little RAM; free 1 GiB"),
            ("x\nSTOPPING=1", "stage failed (refused): x; STOPPING=1"),
            ("x\r\n\x1b[2J\0y\n", "stage failed (refused): x ;  [2J y"),
        ] {
            let error = LastError { class: "refused".into(), message: message.into(), ..LastError::default() };
            let status =
                Status { state: State::Failed, phase: Some(Phase::Stage), error: Some(error), ..Status::default() };
            assert_eq!(state_line(&status, 0), expected);
        }
    }

    #[test]
    fn a_document_of_another_version_is_shown() {
        let text = r#"{"state": "paused", "added": 1, "error": {"class": "x", "message": "m", "attempt": 1, "outcome": "new"}}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        assert_eq!(
            (status.state, status.error.as_ref().unwrap().outcome),
            (State::Other, crate::report::Outcome::Internal)
        );
        assert!(state_line(&status, 0).contains("another version"));
        assert_eq!(serde_json::from_str::<Status>("{}").unwrap(), Status::default());
    }

    #[test]
    fn a_wait_shows_its_cause_and_the_next_attempt() {
        let status = Status {
            state: State::Waiting,
            phase: Some(Phase::Resolve),
            error: Some(LastError {
                class: "network".into(),
                message: "connection refused".into(),
                attempt: 3,
                next_retry_unix: Some(110),
                ..LastError::default()
            }),
            ..Status::default()
        };
        assert_eq!(
            state_line(&status, 100),
            "resolve: attempt 3 failed (network): connection refused; next attempt in 10 s"
        );
    }

    #[test]
    fn a_phase_shows_its_share() {
        let status =
            Status { state: State::Running, phase: Some(Phase::Refresh), percent: Some(75), ..Status::default() };
        assert_eq!(state_line(&status, 0), "refresh is running: 75%");
        assert_eq!(state_line(&Status { percent: None, ..status }, 0), "refresh is running");
    }

    #[test]
    fn a_trial_period_shows_its_end() {
        let status = Status { state: State::Switched, undo_unix: Some(700), ..Status::default() };
        assert_eq!(
            state_line(&status, 100),
            "/usr and /etc are the node image's; undone in 600 s unless kept (node-image-pivot keep)"
        );
        let kept = Status { undo_unix: None, ..status };
        assert_eq!(state_line(&kept, 100), "/usr and /etc are the node image's");
    }

    #[test]
    fn stale_units_are_listed_with_a_file() {
        let old = |unit: &str, files: &[&str]| StaleUnit {
            unit: unit.into(),
            files: files.iter().map(|&file| file.into()).collect(),
        };
        let still_old = vec![old("dbus.service", &["bin/dbus-daemon", "lib/libc.so.6"]), old("a\nb", &["x"])];
        let lines: Vec<_> = old_lines(&Status { still_old, ..Status::default() }).collect();
        assert_eq!(
            lines,
            [
                "still runs the bootimage's code: dbus.service (/usr/bin/dbus-daemon and 1 more)",
                "still runs the bootimage's code: a; b (/usr/x)"
            ]
        );
    }

    #[test]
    fn a_waiting_call_names_the_running_one() {
        let waiting_for = Some("/x/.lock is locked by pid 7 (ostree)".to_owned());
        let status = Status { state: State::Running, phase: Some(Phase::Pull), waiting_for, ..Status::default() };
        assert_eq!(waiting_line(&status, 0), None);
        let status = Status { call: Some("run".into()), ..status };
        let line = "waiting for `run`, which is under way: pull: waiting: /x/.lock is locked by pid 7 (ostree)";
        assert_eq!(waiting_line(&status, 0).as_deref(), Some(line));
    }

    #[test]
    fn a_wait_for_a_lock_names_its_holder() {
        let waiting_for = Some("/x/.lock is locked by pid 7 (ostree)".to_owned());
        let phase = Some(Phase::Pull);
        let status = Status { state: State::Running, phase, waiting_for, ..Status::default() };
        assert_eq!(state_line(&status, 0), "pull: waiting: /x/.lock is locked by pid 7 (ostree)");
    }
}
