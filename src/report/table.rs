//! The report as text: the diagnosis, the state and the timeline as a table.

use std::fmt::Write;

use super::text::state_line;
use super::timeline::Span;
use super::words::{human_ms, one_line, timestamp};
use super::{Report, SpanResult, Subject};
use node_store::LayerRead;
use support::human_bytes;

/// Number of layers that are listed, the slowest first.
const SLOWEST: usize = 5;

/// Returns the report as text. That of a failed pivot begins with the cause, the state of the system and the next step.
pub fn summary(report: &Report) -> String {
    let (status, now_unix) = (&report.status, report.now_unix());
    let mut out = String::new();
    // Writing to a String cannot fail.
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<12}{}", one_line(value));
    };
    if let Some(diagnosis) = status.diagnose() {
        line("cause", &diagnosis.cause);
        if let Some(standing) = diagnosis.standing {
            line("system", standing.sentence());
        }
        match diagnosis.next_unix {
            Some(at) => line("next", &format!("another attempt in {} s", at.saturating_sub(now_unix))),
            None => line("next", &format!("fix the cause, then run {}", diagnosis.command)),
        }
        if let Some(since) = diagnosis.since_unix {
            line("since", &format!("{}, {} failed attempts", timestamp(since * 1000), diagnosis.attempts));
        }
        status.explain_command().iter().for_each(|command| line("explain", command));
    }
    line("state", &state_line(status, now_unix));
    for deviation in &status.deviations {
        line("but", deviation);
    }
    let choice = status.image_choice.as_ref().map(ToString::to_string);
    for (name, value) in [
        ("image", &status.image),
        ("", &choice),
        ("digest", &status.digest),
        ("commit", &status.commit),
        ("target", &status.target),
    ] {
        value.iter().for_each(|value| line(name, value));
    }
    if status.progress.layers_total > 0 {
        line(
            "fetched",
            &format!(
                "{} of an image of {} layers; {} objects, {} written",
                human_bytes(status.cost.bytes_fetched),
                status.progress.layers_total,
                status.progress.objects_done,
                human_bytes(status.progress.bytes_written),
            ),
        );
        line("RAM", &format!("{} in the node store", human_bytes(status.cost.ram_store_bytes)));
    }
    for note in &status.notes {
        line("", note);
    }
    out.push_str(&table(report));
    out
}

/// Returns the timeline as a table; times count from its begin.
fn table(report: &Report) -> String {
    let timeline = &report.timeline;
    let Some(first) = timeline.spans.first() else { return String::new() };
    let mut out =
        format!("\n{:>9} {:>13} {:>9} {:>11} {:>11}  \n", "begin", "duration", "CPU", "peak memory", "fetched");
    let mut row = |start_ms: u64, duration: &str, cells: [String; 3], name: &str| {
        let begin = start_ms.saturating_sub(first.start_ms) as f64 / 1_000.0;
        let [cpu, memory, fetched] = cells;
        let line = format!("{begin:>8.1}s {duration:>13} {cpu:>9} {memory:>11} {fetched:>11}  {name}");
        let _ = writeln!(out, "{}", line.trim_end());
    };
    for span in &timeline.spans {
        let (ms, bytes) = (|value: Option<u64>| value.map(human_ms), |value: Option<u64>| value.map(human_bytes));
        let cells = [ms(span.cpu_ms), bytes(span.peak_memory_bytes), bytes(span.bytes)].map(Option::unwrap_or_default);
        row(span.start_ms, &human_ms(span.duration_ms(report.now_ms)), cells, &name(span));
        let (start, end) = (span.start_ms, span.end_ms.unwrap_or(report.now_ms));
        let is_read_in = |layer: &&LayerRead| span.bytes.is_some() && (start..=end).contains(&layer.fetch.start_ms);
        let mut layers: Vec<&LayerRead> = timeline.layers.iter().filter(is_read_in).collect();
        layers.sort_by_key(|layer| std::cmp::Reverse(layer.duration_ms()));
        for layer in layers.iter().take(SLOWEST) {
            let cpu = [layer.decompress, layer.write].into_iter().flatten().filter_map(|part| part.cpu_ms).sum();
            let cells = [human_ms(cpu), String::new(), human_bytes(layer.fetch.bytes)];
            let name = format!("  layer {} {}{}", layer.index, layer.digest, ending(layer.result));
            row(layer.fetch.start_ms, &human_ms(layer.duration_ms()), cells, &name);
        }
        if layers.len() > SLOWEST {
            let rest = format!("  and {} faster layers", layers.len() - SLOWEST);
            row(start, "", Default::default(), &rest);
        }
    }
    if timeline.dropped > 0 {
        let _ = writeln!(out, "{} entries were dropped", timeline.dropped);
    }
    out
}

fn name(span: &Span) -> String {
    let indent = match span.subject {
        Subject::Phase | Subject::Undo => "",
        Subject::Job => "    ",
        _ => "  ",
    };
    let kind = match span.subject {
        Subject::Wait => "wait: ",
        Subject::Hook => "hook ",
        _ => "",
    };
    let merged = span.merged.map(|merged| format!(", {merged} times")).unwrap_or_default();
    let detail = span.detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
    let line = format!("{kind}{}{merged}{}{detail}", span.name, ending(span.result));
    format!("{indent}{}", one_line(&line))
}

fn ending(result: Option<SpanResult>) -> &'static str {
    match result {
        Some(SpanResult::Done) => "",
        Some(SpanResult::Failed) => " failed",
        Some(SpanResult::Interrupted) => " interrupted",
        Some(SpanResult::NotNeeded) => " not needed",
        Some(SpanResult::Other) => " ended",
        None => " is running",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::timeline::tests::pivot;
    use super::super::{LastError, Outcome, Phase, Reason, Standing, State, Status};
    use super::*;

    #[test]
    fn the_table_has_each_span_and_the_slowest_layers() {
        let report = Report { now_ms: 100_000, ..Report::new(Status::default(), pivot(12)) };
        let text = summary(&report);
        let rows: Vec<&str> = text.lines().skip_while(|line| !line.contains("peak memory")).collect();
        let has = |part: &str| assert!(rows.iter().any(|row| row.contains(part)), "{part}\n{text}");
        has("  9.0 s    90.0 MiB   238.4 MiB  pull");
        has("30.0 s                                      wait: network");
        has("     1.5 s                                        try-restart chronyd.service failed");
        has("  layer 3 sha256:000000000003");
        has("  and 7 faster layers");
        assert!(rows.iter().all(|row| row.len() <= 120), "{text}");
    }

    #[test]
    fn the_report_of_a_failure_begins_with_cause_system_and_next_step() {
        let digest = "0a".repeat(32);
        let refusal = |id: &str| Reason { id: id.into(), message: "m".into() };
        let error = LastError {
            class: "unauthorized".into(),
            message: format!("q.io/x@sha256:{digest}: denied\ncheck the auth file"),
            attempt: 3,
            outcome: Outcome::Permanent,
            standing: Some(Standing::Unchanged),
            refusals: ["conflicts", "too-deep", "conflicts"].map(refusal).into(),
            ..LastError::default()
        };
        let status = Status { state: State::Failed, phase: Some(Phase::Pull), error: Some(error), ..Status::default() };
        let text = summary(&Report::new(status, pivot(1)));
        let begin: Vec<&str> = text.lines().take(4).collect();
        assert_eq!(
            begin,
            [
                "cause       q.io/x@sha256:0a0a0a0a0a0a: denied; check the auth file",
                "system      the running system is unchanged",
                "next        fix the cause, then run node-image-pivot run",
                "explain     node-image-pivot explain conflicts too-deep",
            ]
        );
    }
}
