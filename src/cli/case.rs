//! Records for a support case: each unit of a phase writes its begin and its end to its own journal, which log gatherers
//! collect. The journal's catalog (`packaging/catalog`) explains both.

use std::time::Duration;

use libsystemd::logging::{Priority, journal_send};

use crate::config::Settings;
use crate::report::{self, Outcome, Report};
use unit_refresh::Flow;

/// `MESSAGE_ID=` of the begin and of the end. Stable.
pub(super) const BEGIN: &str = "5b2c6d0e9d4f4f7c8a3b1f6e2d7c9a10";
pub(super) const END: &str = "c1f0a8e47b3d4a52b6e9d3705f8a2b11";
/// Time limit for the versions of other programs.
const LIMIT: Duration = Duration::from_secs(10);

/// Records the begin of a unit: versions, flow and configuration with its sources, without secrets.
pub(super) async fn begin(unit: &str, flow: Option<Flow>) {
    let flow = flow.map_or("unknown", <&str>::from);
    let mut lines = vec![format!("{unit} begins: {}, flow {flow}", versions().await)];
    match Settings::configured() {
        Ok(configured) => lines.extend(configured),
        Err(error) => lines.push(format!("invalid configuration: {error:#}")),
    }
    send(Priority::Notice, &lines.join("\n"), BEGIN, &[("FLOW", flow)]);
}

/// Returns the versions of the agent, the kernel, systemd and skopeo.
pub(super) async fn versions() -> String {
    format!(
        "node-image-pivot {}, Linux {}, {}, {}",
        env!("CARGO_PKG_VERSION"),
        rustix::system::uname().release().to_string_lossy(),
        version(&["systemctl", "--version"]).await,
        version(&["skopeo", "--version"]).await,
    )
}

/// Records the end of a unit: its outcome and the report, with conflicts and restarts.
pub(super) fn end(unit: &str, outcome: Outcome, report: Option<&Report>) {
    let (priority, word) = match outcome {
        Outcome::Done => (Priority::Notice, "has succeeded"),
        Outcome::Cancelled => (Priority::Notice, "was cancelled"),
        _ => (Priority::Error, "has failed"),
    };
    let summary = report.map(report::summary).unwrap_or_default();
    let text = format!("{unit} {word}\n{summary}");
    let fields = end_fields(outcome, report);
    let fields: Vec<_> = fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
    send(priority, &text, END, &fields);
}

/// Returns the fields of the record of an end; `IMAGE` only if it is known.
fn end_fields(outcome: Outcome, report: Option<&Report>) -> Vec<(&'static str, String)> {
    let image = report.and_then(|report| report.status.digest.clone()).map(|digest| ("IMAGE", digest));
    let fields = [("OUTCOME", outcome.as_str().to_owned()), ("EXIT_CODE", outcome.exit_code().to_string())];
    fields.into_iter().chain(image).collect()
}

fn send(priority: Priority, text: &str, id: &str, fields: &[(&str, &str)]) {
    let fields = fields.iter().copied().chain([("MESSAGE_ID", id)]);
    // Without a journal there is nothing to collect.
    let _ = journal_send(priority, text.trim_end(), fields);
}

/// Returns the first line of a program's version, or that it is unknown.
async fn version(command: &[&str]) -> String {
    let shown = support::command::run(command, LIMIT).await.unwrap_or_default();
    let shown = String::from_utf8_lossy(&shown);
    shown.lines().next().map_or_else(|| format!("{} unknown", command[0]), report::one_line)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::Status;

    #[test]
    fn the_catalog_explains_each_record() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/catalog/node-image-pivot.catalog");
        let catalog = std::fs::read_to_string(path).unwrap();
        let ids: Vec<&str> = catalog.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
        assert_eq!(ids, [BEGIN, END]);
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit())));
    }

    #[test]
    fn the_end_has_the_word_of_the_outcome_and_a_known_image() {
        let of = |outcome, report: Option<&Report>| {
            end_fields(outcome, report).iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(of(Outcome::GaveUp, None), ["OUTCOME=gave-up", "EXIT_CODE=13"]);
        let status = Status { digest: Some("sha256:0".into()), ..Status::default() };
        let report = Report { status, ..Report::default() };
        assert_eq!(of(Outcome::Done, Some(&report)), ["OUTCOME=done", "EXIT_CODE=0", "IMAGE=sha256:0"]);
    }

    #[tokio::test]
    async fn a_missing_program_has_an_unknown_version() {
        assert_eq!(version(&["/nonexistent/skopeo"]).await, "/nonexistent/skopeo unknown");
        assert!(version(&["echo", "systemd 252"]).await.starts_with("systemd 252"));
    }
}
