#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_retried_phase_keeps_its_first_start() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Resolve);
    let start = tracker.status().timeline[0].start_unix_ms;
    tracker.fail(LastError {
        class: "network".into(),
        message: "refused".into(),
        attempt: 1,
        next_retry_unix: Some(1),
        ..LastError::default()
    });
    assert_eq!(tracker.status().state, State::Waiting);
    std::thread::sleep(std::time::Duration::from_millis(5));
    tracker.begin(Phase::Resolve);
    tracker.end(Phase::Resolve, State::Running);
    let status = tracker.status();
    assert_eq!(status.timeline.len(), 1);
    assert_eq!(status.timeline[0].start_unix_ms, start);
    assert!(status.timeline[0].duration_ms.unwrap() >= 5);
    assert_eq!(status.error, None, "a success clears the failure");
}

#[tokio::test]
async fn the_timeline_has_attempts_and_the_end_of_each_span() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Pull);
    tracker.fail(LastError { class: "network".into(), next_retry_unix: Some(1), ..LastError::default() });
    tracker.begin(Phase::Pull);
    tracker.fail(LastError { class: "policy".into(), message: "a\nb".into(), ..LastError::default() });
    let job = tracker.timed(Subject::Job, "restart a.service", std::future::ready(Err::<(), _>("it failed")));
    assert!(job.await.is_err());
    drop(tracker.span(Subject::Hook, "50-x"));
    let spans = tracker.timeline().spans;
    let shown: Vec<_> =
        spans.iter().map(|span| (span.subject, &*span.name, span.result, span.detail.as_deref())).collect();
    let expected = [
        (Subject::Phase, "pull", Some(SpanResult::Failed), Some("a; b")),
        (Subject::Wait, "network", Some(SpanResult::Done), Some("")),
        (Subject::Job, "restart a.service", Some(SpanResult::Failed), Some("it failed")),
        (Subject::Hook, "50-x", Some(SpanResult::Interrupted), None),
    ];
    assert_eq!(shown, expected);
    assert!(spans[0].cpu_ms.is_some(), "also of a phase that failed");
    tracker.restart(None);
    assert_eq!(tracker.timeline(), Timeline::default());
}

#[test]
fn a_phase_that_runs_again_gets_a_new_start_and_the_failure_stays() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Switch);
    tracker.end(Phase::Switch, State::Running);
    let first = tracker.status().timeline[0].start_unix_ms;
    tracker.fail(LastError { class: "local".into(), ..LastError::default() });
    std::thread::sleep(std::time::Duration::from_millis(5));
    tracker.begin(Phase::Switch);
    let status = tracker.status();
    assert!(status.timeline[0].start_unix_ms > first);
    assert_eq!(status.timeline[0].duration_ms, None);
    assert!(status.error.is_some(), "the failure stays until a success");
}

#[test]
fn the_share_of_a_phase_ends_with_it() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Refresh);
    for (from, done, total, percent) in
        [(0, 1, 4, 25), (0, 3, 4, 75), (75, 0, 10, 75), (75, 5, 10, 87), (75, 0, 0, 100)]
    {
        tracker.share(from, done, total);
        assert_eq!(tracker.status().percent, Some(percent), "{from} {done} {total}");
    }
    tracker.end(Phase::Refresh, State::Switched);
    assert_eq!(tracker.status().percent, None);
}

#[test]
fn a_restart_keeps_the_target_only() {
    let tracker = Tracker::new(Status { target: Some("multi-user.target".into()), ..Status::default() });
    tracker.begin(Phase::Pull);
    tracker.progress.update(|now| now.bytes_fetched += 7);
    tracker.note("a note");
    tracker.update(|status| {
        status.digest = Some("sha256:0".into());
        status.commit = Some("0".into());
        status.cost.bytes_fetched = 7;
    });
    tracker.end(Phase::Pull, State::Pulled);
    tracker.restart(Some("quay.io/x/y".into()));
    let expected =
        Status { target: Some("multi-user.target".into()), image: Some("quay.io/x/y".into()), ..Status::default() };
    assert_eq!(tracker.status(), expected);
    assert_eq!(tracker.progress.snapshot().bytes_fetched, 0);
}

#[test]
fn work_beside_the_pivot_is_shown_and_leaves_nothing() {
    let tracker = Tracker::new(Status { state: State::Switched, phase: Some(Phase::Refresh), ..Status::default() });
    let before = tracker.status();
    let mut watch = tracker.watch();
    let beside = tracker.beside(Phase::Pull);
    beside.tracker().begin(Phase::Pull);
    beside.tracker().progress.update(|now| now.bytes_fetched += 7);
    let shown = tracker.status();
    assert_eq!((shown.state, shown.phase, shown.progress.bytes_fetched), (State::Running, Some(Phase::Pull), 7));
    assert!(watch.has_changed().unwrap(), "watchers of the document wake up");
    watch.mark_unchanged();
    assert_eq!(tracker.pivot_status(), before, "the recorded document is unchanged");
    tracker.begin(Phase::Finish);
    assert_eq!(tracker.status().phase, Some(Phase::Finish), "a running phase of the pivot hides other work");
    tracker.end(Phase::Finish, State::Done);
    drop(beside);
    assert_eq!((tracker.status().state, tracker.status().progress.bytes_fetched), (State::Done, 0));
}

#[test]
fn a_deployment_beside_the_pivot_shows_its_share() {
    let tracker = Tracker::new(Status { state: State::Switched, phase: Some(Phase::Refresh), ..Status::default() });
    let before = tracker.status();
    let beside = tracker.beside(Phase::Deploy);
    beside.tracker().begin(Phase::Deploy);
    beside.tracker().share(0, 40, 100);
    let shown = tracker.status();
    assert_eq!((shown.state, shown.phase, shown.percent), (State::Running, Some(Phase::Deploy), Some(40)));
    beside.end(None);
    assert_eq!(tracker.status(), before);
}

#[test]
fn the_end_of_one_work_beside_the_pivot_hides_no_other() {
    let tracker = Tracker::new(Status { state: State::Switched, phase: Some(Phase::Refresh), ..Status::default() });
    let begin = |phase| {
        let beside = tracker.beside(phase);
        beside.tracker().begin(phase);
        beside
    };
    let (deploy, pull) = (begin(Phase::Deploy), begin(Phase::Pull));
    assert_eq!(tracker.status().phase, Some(Phase::Pull));
    pull.end(None);
    assert_eq!(tracker.status().phase, Some(Phase::Deploy));
    let pull = begin(Phase::Pull);
    drop(deploy);
    assert_eq!(tracker.status().phase, Some(Phase::Pull));
    drop(pull);
    assert_eq!((tracker.status().state, tracker.status().phase), (State::Switched, Some(Phase::Refresh)));
}

#[test]
fn a_pull_that_has_ended_has_no_rate() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Pull);
    while tracker.status().progress.bytes_per_second == 0 {
        tracker.progress.update(|now| now.bytes_fetched += 1 << 20);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    tracker.end(Phase::Pull, State::Pulled);
    let progress = tracker.status().progress;
    assert!(progress.bytes_fetched > 0);
    assert_eq!(progress.bytes_per_second, 0);
}

#[test]
fn a_pull_beside_the_pivot_ends_in_the_timeline() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Refresh);
    tracker.end(Phase::Refresh, State::Switched);
    let begin = || {
        let beside = tracker.beside(Phase::Pull);
        beside.tracker().begin(Phase::Pull);
        beside
    };
    begin().end(None);
    begin().end(Some(&"no such layer"));
    let beside = begin();
    tracker.begin(Phase::Finish);
    tracker.fail(LastError { message: "undo failed".into(), ..LastError::default() });
    beside.tracker().fail(LastError { class: "network".into(), next_retry_unix: Some(1), ..LastError::default() });
    drop(beside);
    let spans = tracker.timeline().spans;
    let shown: Vec<_> = spans.iter().map(|span| (&*span.name, span.result, span.detail.as_deref())).collect();
    let expected = [
        ("refresh", Some(SpanResult::Done), None),
        ("pull", Some(SpanResult::Done), None),
        ("pull", Some(SpanResult::Failed), Some("no such layer")),
        ("pull", Some(SpanResult::Interrupted), None),
        ("finish", Some(SpanResult::Failed), Some("undo failed")),
        ("network", Some(SpanResult::Interrupted), Some("")),
    ];
    assert_eq!(shown, expected);
    assert!(spans.iter().all(|span| span.subject == Subject::Wait || span.cpu_ms.is_some()));
}

#[test]
fn without_another_attempt_the_state_is_failed() {
    let tracker = Tracker::new(Status::default());
    tracker.begin(Phase::Pull);
    tracker.fail(LastError { class: "not-found".into(), message: "no such tag".into(), ..LastError::default() });
    assert_eq!(tracker.status().state, State::Failed);
    assert_eq!(tracker.status().phase, Some(Phase::Pull), "the failed phase stays in the document");
}
