//! Medians, ratios and goals: what the numbers say, as plain data.

use serde::Serialize;

use crate::images::{Case, Set};
use crate::profile::Profile;
use crate::side::Sample;

/// A MiB in bytes.
const MIB: f64 = 1_048_576.0;

/// Measures of each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Seconds.
    Wall,
    /// Seconds.
    Cpu,
    /// Bytes from the registry.
    Fetched,
    /// Layers and configs that were requested.
    Blobs,
    /// Bytes.
    Rss,
    /// Bytes.
    SkopeoRss,
    /// Bytes.
    TmpfsPeak,
    /// Bytes, when the incumbent has deleted its repo, as it does on a live ISO.
    TmpfsResident,
    /// Bytes, when the incumbent has kept it, as it does after a PXE boot. Ours keeps its store in both.
    TmpfsKept,
}

impl Measure {
    /// All, in the order of the table.
    pub const ALL: [Measure; 9] = [
        Measure::Wall,
        Measure::Cpu,
        Measure::Fetched,
        Measure::Blobs,
        Measure::Rss,
        Measure::SkopeoRss,
        Measure::TmpfsPeak,
        Measure::TmpfsResident,
        Measure::TmpfsKept,
    ];

    /// Its name and unit in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Wall => "wall, s",
            Self::Cpu => "CPU, s",
            Self::Fetched => "fetched, MiB",
            Self::Blobs => "blobs fetched (layers, config)",
            Self::Rss => "peak RSS of the importer, MiB",
            Self::SkopeoRss => "peak RSS of skopeo, MiB",
            Self::TmpfsPeak => "tmpfs peak, MiB",
            Self::TmpfsResident => "tmpfs resident (live ISO), MiB",
            Self::TmpfsKept => "tmpfs resident (PXE), MiB",
        }
    }

    /// The value in a sample, in seconds or bytes.
    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Wall => sample.wall,
            Self::Cpu => sample.cpu,
            Self::Fetched => sample.bytes as f64,
            Self::Blobs => sample.blobs as f64,
            Self::Rss => sample.rss as f64,
            Self::SkopeoRss => sample.skopeo_rss as f64,
            Self::TmpfsPeak => sample.tmpfs_peak as f64,
            Self::TmpfsResident => sample.tmpfs_resident as f64,
            Self::TmpfsKept => sample.tmpfs_end as f64,
        }
    }

    /// A value in the unit of the label.
    pub fn shown(self, value: f64) -> String {
        match self {
            Self::Wall | Self::Cpu => format!("{value:.2}"),
            Self::Blobs => format!("{value:.0}"),
            _ => format!("{:.1}", value / MIB),
        }
    }

    /// Target of a case.
    pub fn goal(self, case: &str) -> Option<Goal> {
        match (self, case) {
            (Self::Wall, "older-base" | "nothing-in-common") => Some(Goal::Ratio(0.25)),
            (Self::TmpfsPeak, "older-base") => Some(Goal::Ratio(0.35)),
            (Self::Wall, case) if Set::Plain.cases().contains(&case) => Some(Goal::Ratio(0.25)),
            (Self::TmpfsPeak, case) if Set::Plain.cases().contains(&case) => Some(Goal::Ratio(0.35)),
            (Self::TmpfsResident | Self::TmpfsKept, "older-base") => Some(Goal::Ratio(0.5)),
            (Self::Wall, "deploy-same-base") => Some(Goal::Ratio(0.4)),
            (Self::Fetched, "deploy-same-base") => Some(Goal::Ratio(0.15)),
            (Self::Fetched, _) => Some(Goal::Ratio(1.0)),
            (Self::Rss, _) => Some(Goal::Bytes(150.0 * MIB)),
            _ => None,
        }
    }
}

/// An upper bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Of ours to the incumbent's.
    Ratio(f64),
    /// Of ours, in bytes.
    Bytes(f64),
}

impl Goal {
    /// True if the target is met. A ratio counts with the two digits that the table prints.
    pub fn met(self, ours: f64, ratio: Option<f64>) -> bool {
        match self {
            Self::Ratio(bound) => ratio.is_some_and(|ratio| (ratio * 100.0).round() <= (bound * 100.0).round()),
            Self::Bytes(bound) => ours <= bound,
        }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ratio(bound) => write!(f, "≤ {bound:.2}"),
            Self::Bytes(bound) => write!(f, "≤ {:.0} MiB", bound / MIB),
        }
    }
}

/// All runs of one case.
#[derive(Debug, Clone, Serialize)]
pub struct Runs {
    /// The case.
    pub case: Case,
    /// Our rounds.
    pub ours: Vec<Sample>,
    /// The incumbent's.
    pub incumbent: Vec<Sample>,
    /// Those of an earlier commit's importer; empty if none was named.
    pub before: Vec<Sample>,
    /// The limit's; empty if our side fetched no layer.
    pub limit: Vec<Sample>,
    /// The profile of a further round of ours, if it was requested.
    pub profile: Option<Profile>,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Name of the value.
    pub measure: Measure,
    /// Median of the incumbent's rounds, seconds or bytes.
    pub incumbent: f64,
    /// Median of ours.
    pub ours: f64,
    /// Ours to the incumbent's; `None` when that is zero.
    pub ratio: Option<f64>,
    /// The goal in words.
    pub goal: Option<String>,
    /// True if the target is met.
    pub met: Option<bool>,
}

impl Runs {
    /// No runs of a case.
    pub fn of(case: Case) -> Self {
        Self { case, ours: Vec::new(), incumbent: Vec::new(), before: Vec::new(), limit: Vec::new(), profile: None }
    }

    /// The lines of the table.
    pub fn rows(&self) -> Vec<Row> {
        Measure::ALL.into_iter().map(|measure| self.row(measure)).collect()
    }

    /// The lines for a deployment to a disk, of which the other measures are not taken.
    pub fn deployment_rows(&self) -> Vec<Row> {
        [Measure::Wall, Measure::Fetched].into_iter().map(|measure| self.row(measure)).collect()
    }

    /// One of them.
    pub fn row(&self, measure: Measure) -> Row {
        let side = |samples: &[Sample]| median(samples.iter().map(|sample| measure.of(sample)).collect());
        let (ours, incumbent) = (side(&self.ours), side(&self.incumbent));
        let ratio = (incumbent > 0.0).then(|| ours / incumbent);
        let goal = measure.goal(&self.case.name);
        let met = goal.map(|goal| goal.met(ours, ratio));
        Row { measure, incumbent, ours, ratio, goal: goal.map(|goal| goal.to_string()), met }
    }

    /// Our median, that of the earlier commit, and their ratio.
    pub fn since(&self, measure: Measure) -> Option<(f64, f64, f64)> {
        let of = |samples: &[Sample]| median(samples.iter().map(|sample| measure.of(sample)).collect());
        let (ours, before) = (of(&self.ours), of(&self.before));
        (before > 0.0).then(|| (ours, before, ours / before))
    }

    /// Seconds of the limit, and how many times that ours takes.
    pub fn distance(&self) -> Option<(f64, f64)> {
        let limit = median(self.limit.iter().map(|sample| sample.wall).collect());
        (limit > 0.0).then(|| (limit, self.row(Measure::Wall).ours / limit))
    }
}

/// Median seconds of each step of a side, in the order of the steps.
pub fn steps(samples: &[Sample]) -> Vec<(String, f64)> {
    let Some(first) = samples.first() else { return Vec::new() };
    let of = |name: &str| {
        let all = samples.iter().flat_map(|sample| &sample.steps).filter(|step| step.0 == name).map(|step| step.1);
        median(all.collect())
    };
    first.steps.iter().map(|(name, _)| (name.clone(), of(name))).collect()
}

/// The middle value, the mean of the two middle ones, or 0 for none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(name: &str, ours: &[f64], incumbent: &[f64]) -> Runs {
        let case = Case {
            name: name.into(),
            growth: None,
            what: String::new(),
            image: String::new(),
            incumbent: String::new(),
            held: Vec::new(),
            layers: 0,
            compressed: 0,
            changed_bytes: 0,
        };
        let samples = |walls: &[f64]| walls.iter().map(|wall| Sample { wall: *wall, ..Sample::default() }).collect();
        Runs {
            case,
            ours: samples(ours),
            incumbent: samples(incumbent),
            limit: samples(&[0.5]),
            before: samples(&[2.0]),
            profile: None,
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_goal_is_met_at_its_bound_and_missed_above_it() {
        for (ours, met) in [(0.25, true), (0.26, false)] {
            let row = runs("older-base", &[ours, 9.0, 0.1], &[1.0]).row(Measure::Wall);
            assert_eq!((row.ratio, row.met), (Some(ours), Some(met)));
            assert_eq!(row.goal.as_deref(), Some("≤ 0.25"));
        }
        let row = runs("same-base", &[1.0], &[1.0]).row(Measure::Wall);
        assert_eq!((row.goal, row.met), (None, None));
        for (ratio, met) in [(0.9, true), (1.0002, true), (1.0051, false), (1.1, false)] {
            assert_eq!(Goal::Ratio(1.0).met(0.0, Some(ratio)), met, "{ratio}");
        }
        assert!(!Goal::Ratio(1.0).met(0.0, None));
        assert!(Goal::Bytes(150.0 * MIB).met(150.0 * MIB, None));
        assert!(!Goal::Bytes(150.0 * MIB).met(150.0 * MIB + 1.0, None));
        // Nothing to compare with is not a success.
        assert_eq!(runs("older-base", &[1.0], &[0.0]).row(Measure::Wall).met, Some(false));
    }

    #[test]
    fn distance_from_the_limit() {
        assert_eq!(runs("older-base", &[1.0], &[4.0]).distance(), Some((0.5, 2.0)));
    }

    #[test]
    fn ratio_to_an_earlier_commit() {
        let mut runs = runs("same-base", &[1.0], &[4.0]);
        assert_eq!(runs.since(Measure::Wall), Some((1.0, 2.0, 0.5)));
        runs.before.clear();
        assert_eq!(runs.since(Measure::Wall), None);
    }
}
