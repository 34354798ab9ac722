//! The table on standard output, in Markdown, so that it can be pasted into `docs/benchmarks.md`.

use std::fmt::Write;

use crate::etc::EtcTimes;
use crate::images::Images;
use crate::profile::{Part, Profile};
use crate::summary::{Measure, Row, Runs, steps};

/// Everything as text.
pub fn table(sets: &[(Images, Vec<Runs>)], deployments: &[Runs], etc: &EtcTimes, run: (usize, Option<&str>)) -> String {
    let (mut out, (rounds, before)) = (String::new(), run);
    for (images, runs) in sets {
        // Writing to a string does not fail.
        let _ = write(&mut out, images, runs, rounds);
    }
    let all: Vec<&Runs> = sets.iter().flat_map(|(_, runs)| runs).collect();
    let _ = before.map(|revision| write_before(&mut out, &all, revision));
    let _ = write_profiles(&mut out, &all);
    let _ = write_deployments(&mut out, deployments);
    let _ = writeln!(
        out,
        "\n### /etc\n\n{} entries, each changed by the node image: plan {:.3} s, apply {:.3} s, undo {:.3} s.",
        etc.entries, etc.plan, etc.apply, etc.undo
    );
    out
}

fn write(out: &mut String, images: &Images, runs: &[Runs], rounds: usize) -> Result<(), std::fmt::Error> {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    writeln!(
        out,
        "Booted: a base of {:.0} MB in {} files, {:.0} MB compressed, imported from its image. Medians of {rounds} round{}.",
        megabytes(images.base_bytes),
        images.base_files,
        megabytes(images.base_compressed),
        if rounds == 1 { "" } else { "s" },
    )?;
    for run in runs.iter().filter(|run| run.case.growth.is_none()) {
        writeln!(out, "\n### {}\n", run.case.name)?;
        let (what, layers, size) = (&run.case.what, run.case.layers, megabytes(run.case.compressed));
        writeln!(out, "Node image: {what}. {size:.0} MB compressed in {layers} layers.\n")?;
        writeln!(out, "| | incumbent | ours | ratio | goal | |\n|---|---:|---:|---:|---|---|")?;
        run.rows().iter().try_for_each(|row| writeln!(out, "| {}", cells(row)))?;
        writeln!(out, "\nSteps: incumbent {}; ours {}.", told(&steps(&run.incumbent)), ours(run))?;
        if let Some((limit, factor)) = run.distance() {
            let parts = told(&steps(&run.limit));
            writeln!(
                out,
                "Limit for the layers that ours fetched: {limit:.2} s ({parts}); ours takes {factor:.2} times that."
            )?;
        }
    }
    if runs.iter().all(|run| run.case.growth.is_none()) {
        return writeln!(out);
    }
    writeln!(out, "\n### Growth with the share of changed content\n")?;
    writeln!(out, "| changed | | incumbent | ours | ratio | goal | |\n|---|---|---:|---:|---:|---|---|")?;
    for run in runs.iter().filter(|run| run.case.growth.is_some()) {
        for (at, row) in run.rows().into_iter().filter(|row| row.measure != Measure::SkopeoRss).enumerate() {
            let first = run.case.growth.filter(|_| at == 0).map_or(String::new(), |percent| format!("{percent} %"));
            writeln!(out, "| {first} | {}", cells(&row))?;
        }
    }
    writeln!(out)?;
    for run in runs.iter().filter(|run| run.case.growth.is_some()) {
        let factor = run.distance().map_or(String::new(), |(limit, factor)| {
            format!(" Limit {limit:.2} s, ours takes {factor:.2} times that.")
        });
        writeln!(out, "* {}: {}.{factor}", run.case.name, run.case.what)?;
    }
    Ok(())
}

/// Compares with the importer of an earlier commit.
fn write_before(out: &mut String, runs: &[&Runs], revision: &str) -> std::fmt::Result {
    writeln!(out, "\n### Since {revision}\n\n| case | | {revision} | ours | ratio |\n|---|---|---:|---:|---:|")?;
    for run in runs {
        for measure in Measure::ALL {
            let Some((ours, before, ratio)) = run.since(measure) else { continue };
            let (name, label) = (&run.case.name, measure.label());
            let (ours, before) = (measure.shown(ours), measure.shown(before));
            writeln!(out, "| {name} | {label} | {before} | {ours} | {ratio:.2} |")?;
        }
    }
    Ok(())
}

/// Writes the shares of the CPU time of the runs under perf.
fn write_profiles(out: &mut String, runs: &[&Runs]) -> std::fmt::Result {
    let profiles: Vec<_> = runs.iter().filter_map(|run| Some((&run.case.name, run.profile.as_ref()?))).collect();
    if profiles.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n### Shares of the CPU time of ours\n")?;
    let names: String = profiles.iter().map(|(name, _)| format!(" `{name}` |")).collect();
    writeln!(out, "| part |{names} in the limit |\n|---|{}---|", "---:|".repeat(profiles.len()))?;
    let mut line = |label: &str, parts: &dyn Fn(Part) -> bool, last: &str| {
        let share = |profile: &Profile| {
            let samples = |wanted: &dyn Fn(Part) -> bool| {
                profile.iter().filter(|(part, _)| wanted(**part)).map(|(_, samples)| samples).sum::<u64>() as f64
            };
            format!(" {:.0} % |", 100.0 * samples(parts) / samples(&|_| true))
        };
        let shares: String = profiles.iter().map(|(_, profile)| share(profile)).collect();
        writeln!(out, "| {label} |{shares} {last} |")
    };
    for part in Part::ALL {
        line(part.label(), &|other| other == part, if part.in_limit() { "yes" } else { "no" })?;
    }
    line("the parts of the limit together", &Part::in_limit, "")
}

fn write_deployments(out: &mut String, deployments: &[Runs]) -> std::fmt::Result {
    if deployments.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n### Deployment to a disk\n")?;
    writeln!(out, "| image | | incumbent | ours | ratio | goal | |\n|---|---|---:|---:|---:|---|---|")?;
    for run in deployments {
        let name = run.case.name.trim_start_matches("deploy-");
        run.deployment_rows().iter().try_for_each(|row| writeln!(out, "| {name} | {}", cells(row)))?;
    }
    Ok(())
}

/// Returns the cells of a row, from the name of the measure on.
fn cells(row: &Row) -> String {
    let shown = |value| row.measure.shown(value);
    let (goal, met) = (row.goal.as_deref().unwrap_or(""), verdict(row));
    let (label, ratio) = (row.measure.label(), ratio(row));
    format!("{label} | {} | {} | {ratio} | {goal} | {met} |", shown(row.incumbent), shown(row.ours))
}

fn ratio(row: &Row) -> String {
    row.ratio.map_or("–".into(), |ratio| format!("{ratio:.2}"))
}

fn verdict(row: &Row) -> String {
    let verdict = match row.met {
        Some(true) => "met",
        Some(false) => "**not met**",
        None => return String::new(),
    };
    // A ratio of 1.00 may hide some more bytes.
    if row.measure == Measure::Fetched && row.ours > row.incumbent {
        return format!("{verdict}: {:.1} KiB more", (row.ours - row.incumbent) / 1024.0);
    }
    verdict.to_owned()
}

fn told(steps: &[(String, f64)]) -> String {
    steps.iter().map(|(name, seconds)| format!("{name} {seconds:.2}")).collect::<Vec<_>>().join(", ")
}

fn ours(run: &Runs) -> String {
    let Some(pulled) = run.ours.last().and_then(|sample| sample.pulled.as_ref()) else { return String::new() };
    format!(
        "pull {:.2}, stage {:.2}; {} layers fetched, {} not; {} objects written, {} files in the delta",
        pulled.pull_seconds,
        pulled.stage_seconds,
        pulled.layers_fetched,
        pulled.layers_skipped,
        pulled.objects_written,
        pulled.delta_files
    )
}
