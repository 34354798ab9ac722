//! Costs of one flow, as its guest reports them, and the table of two of them.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testbed::guest::Guest;

use super::Side;
use super::memory::Samples;

/// Costs from the start of the pull to multi-user.target. Times in seconds from that start.
pub struct Sample {
    /// Side that was measured.
    pub side: Side,
    /// Name, start and end of each step.
    pub steps: Vec<(String, f64, f64)>,
    /// Bytes of memory beyond those at the start.
    pub memory: Vec<(f64, f64)>,
    end: f64,
    /// Bytes that all network interfaces received.
    received: u64,
    failed: Vec<String>,
}

/// Waits until multi-user.target is active and no job is left.
pub fn wait(guest: &dyn Guest, (limit, pause): (Duration, Duration)) -> Result<()> {
    let start = Instant::now();
    let done = "systemctl is-active -q multi-user.target && [ -z \"$(systemctl list-jobs --no-legend)\" ]";
    while !guest.run(done).is_ok_and(|answer| answer.status == 0) {
        if start.elapsed() > limit {
            bail!("multi-user.target is not active after {} s", limit.as_secs());
        }
        std::thread::sleep(pause);
    }
    Ok(())
}

impl Sample {
    /// Asks a guest whose flow has ended.
    pub fn take(guest: &dyn Guest, side: Side, memory: Samples) -> Result<Self> {
        let seconds = |unit: &str, property: &str| -> Result<f64> {
            let text = guest.unit(unit, property)?;
            Ok(text.parse::<f64>().with_context(|| format!("{unit}: {property} is {text:?}"))? / 1e6)
        };
        let start = seconds(side.pull_unit(), "ExecMainStartTimestampMonotonic")?;
        let end = seconds("multi-user.target", "ActiveEnterTimestampMonotonic")? - start;
        // Wall-clock time at the start of the pull, to which the steps are relative.
        let clocks = guest.ask("echo $EPOCHREALTIME $(cut -d' ' -f1 /proc/uptime)")?;
        let clocks: Vec<f64> = clocks.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [unix, uptime] = clocks[..] else { bail!("the clocks are {clocks:?}") };
        let start_unix = unix - uptime + start;
        let steps = match side {
            Side::Agent => of_agent(guest, start_unix)?,
            Side::Incumbent => of_incumbent(guest, start_unix, end)?,
        };
        let at_start =
            memory.iter().rev().find(|(time, _)| *time <= start).or(memory.first()).map_or(0, |(_, bytes)| *bytes);
        let beyond = |(time, bytes): &(f64, u64)| (time - start, *bytes as f64 - at_start as f64);
        let interfaces = guest.ask("cat /proc/net/dev")?;
        let failed = guest.ask("systemctl --failed --no-legend --plain")?;
        Ok(Self {
            side,
            steps,
            memory: memory.iter().map(beyond).filter(|(time, _)| *time >= 0.0).collect(),
            end,
            received: interfaces.lines().filter_map(received).sum(),
            failed: failed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect(),
        })
    }

    /// Seconds to multi-user.target.
    pub fn wall(&self) -> f64 {
        self.end
    }

    fn peak(&self) -> f64 {
        self.memory.iter().map(|(_, bytes)| *bytes).fold(0.0, f64::max)
    }

    fn resident(&self) -> f64 {
        self.memory.last().map_or(0.0, |(_, bytes)| *bytes)
    }
}

/// Bytes that an interface received, by its line in `/proc/net/dev`.
fn received(line: &str) -> Option<u64> {
    line.split_once(':')?.1.split_whitespace().next()?.parse().ok()
}

/// The phases in the agent's status.
fn of_agent(guest: &dyn Guest, start: f64) -> Result<Vec<(String, f64, f64)>> {
    let status = guest.status()?;
    let phases = status["timeline"].as_array().context("the status has no timeline")?;
    let phase = |phase: &serde_json::Value| {
        let begin = phase["start_unix_ms"].as_f64()? / 1e3 - start;
        Some((phase["phase"].as_str()?.to_owned(), begin, begin + phase["duration_ms"].as_f64()? / 1e3))
    };
    phases.iter().map(phase).collect::<Option<_>>().context("the timeline has an unknown form")
}

/// The steps that the scripts noted. Each ends with the start of the next, the last with the flow.
fn of_incumbent(guest: &dyn Guest, start: f64, end: f64) -> Result<Vec<(String, f64, f64)>> {
    let text = guest.ask("cat /run/incumbent-steps")?;
    let begins: Vec<(f64, &str)> = text
        .lines()
        .map(|line| {
            let (time, name) = line.split_once(' ').context("a step without a name")?;
            Ok((time.parse::<f64>()? - start, name))
        })
        .collect::<Result<_>>()?;
    let ends = begins.iter().skip(1).map(|(begin, _)| *begin).chain([end]);
    Ok(begins.iter().zip(ends).map(|((begin, name), end)| ((*name).to_owned(), *begin, end)).collect())
}

/// Both as a table in Markdown, with the goals.
pub fn table(incumbent: &Sample, agent: &Sample) -> String {
    let mut out = String::from("| | incumbent | agent | ratio | goal | |\n|---|---:|---:|---:|---|---|\n");
    let mut row = |name: &str, digits: usize, of: &dyn Fn(&Sample) -> f64, goal: Option<f64>| {
        let (theirs, ours) = (of(incumbent), of(agent));
        let ratio = ours / theirs;
        let (bound, met) = match goal {
            Some(goal) => (format!("≤ {goal:.2}"), if ratio <= goal { "met" } else { "**not met**" }),
            None => (String::new(), ""),
        };
        let _ = writeln!(out, "| {name} | {theirs:.digits$} | {ours:.digits$} | {ratio:.2} | {bound} | {met} |");
    };
    let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
    row("wall, s", 2, &Sample::wall, Some(0.5));
    row("received, MiB", 1, &|sample| mebibytes(sample.received as f64), None);
    row("memory peak, MiB", 0, &|sample| mebibytes(sample.peak()), Some(0.35));
    row("memory resident, MiB", 0, &|sample| mebibytes(sample.resident()), None);
    let (theirs, ours) = (incumbent.failed.len(), agent.failed.len());
    let met = if ours == 0 { "met" } else { "**not met**" };
    let _ = writeln!(out, "| failed units | {theirs} | {ours} | | 0 | {met} |");
    for sample in [incumbent, agent] {
        let steps: Vec<_> =
            sample.steps.iter().map(|(name, begin, end)| format!("{name} {:.2}", end - begin)).collect();
        let failed =
            if sample.failed.is_empty() { String::new() } else { format!("; failed: {}", sample.failed.join(", ")) };
        let _ = writeln!(out, "\nSteps of the {}: {}{failed}.", sample.side.word(), steps.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(side: Side, end: f64, failed: &[&str]) -> Sample {
        let steps = vec![("pull".to_owned(), 0.0, end)];
        let failed = failed.iter().map(|unit| (*unit).to_owned()).collect();
        Sample { side, steps, memory: vec![(0.0, 0.0), (end, end * 1e9)], end, received: 1 << 20, failed }
    }

    #[test]
    fn goals_are_ratios_to_the_incumbent() {
        let incumbent = sample(Side::Incumbent, 10.0, &["old.service"]);
        let text = table(&incumbent, &sample(Side::Agent, 3.0, &[]));
        assert!(text.contains("| wall, s | 10.00 | 3.00 | 0.30 | ≤ 0.50 | met |"), "{text}");
        assert!(text.contains("| failed units | 1 | 0 | | 0 | met |") && !text.contains("not met"), "{text}");
        let missed = table(&incumbent, &sample(Side::Agent, 6.0, &["new.service"]));
        assert_eq!(missed.matches("**not met**").count(), 3, "{missed}");
        let picture = super::super::picture::draw(&[&incumbent]);
        assert!(picture.contains("pull 10.0 s") && picture.trim_end().ends_with("</svg>"), "{picture}");
    }

    #[test]
    fn bytes_of_an_interface() {
        assert_eq!(received("    lo: 1234 5 0 0 0 0 0 0 1234 5 0"), Some(1234));
        assert_eq!(received(" face |bytes packets"), None);
    }
}
