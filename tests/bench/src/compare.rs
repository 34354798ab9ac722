//! The whole run: all cases, both sides in turns, and what came of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use tempfile::TempDir;

use crate::before;
use crate::deploying::Deploying;
use crate::etc;
use crate::fixture;
use crate::images::{self, Case, Images, Set};
use crate::limit;
use crate::listing;
use crate::proc::{output, run};
use crate::profile;
use crate::proxy::Proxy;
use crate::registry::Registry;
use crate::side::{Sample, Side};
use crate::summary::Runs;
use crate::svg;
use crate::table;

/// Selection of runs, by the variables of `make bench`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Number of pulls of each image by each side, after a warm-up.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// One round without warm-up, on small images: shows that the benchmark works, not how fast anything is.
    #[arg(long)]
    pub quick: bool,
    /// Only cases whose name contains this.
    #[arg(long)]
    pub cases: Option<String>,
    /// A commit of this project, whose importer is one more side of each round.
    #[arg(long)]
    pub before: Option<String>,
    /// Run the agent's side once more under perf, and print the shares of its CPU time.
    #[arg(long)]
    pub profile: bool,
    /// A directory that `benchmark images` made, instead of the test bed's. Repeatable.
    #[arg(long, conflicts_with = "quick")]
    pub images: Vec<PathBuf>,
    /// Directory of bench.json, bench.md and bench.svg.
    #[arg(long, default_value = "target")]
    pub out: PathBuf,
}

/// Entries of the `/etc` that is merged; and in the quick mode.
const ETC_ENTRIES: (usize, usize) = (5000, 100);

/// Runs everything; prints the table and writes the files.
///
/// # Errors
/// When a side fails, or the two sides' trees differ. A missed goal is not an error.
pub fn compare(options: &Options) -> Result<()> {
    let quick = options.quick || std::env::var("BENCH_QUICK").is_ok_and(|value| value == "1");
    let rounds = if quick { 1 } else { options.rounds };
    ensure!(rounds > 0, "BENCH_ROUNDS must be at least 1");
    let oracle = oracle(quick)?;
    let before = options.before.as_deref().map(before::program).transpose()?;
    let small = tempfile::tempdir_in("/dev/shm")?;
    let (mut sets, mut deployments) = (Vec::new(), Vec::new());
    for dir in options.sets(quick, small.path(), &oracle)? {
        let images = Images::read(&dir)?;
        let bench = Bench::start(&dir, oracle.clone(), before.clone())?;
        let cases: Vec<&Case> = images.cases.iter().filter(|case| options.selects(&case.name)).collect();
        let runs =
            cases.iter().map(|case| bench.case(case, rounds, quick, options.profile)).collect::<Result<Vec<_>>>()?;
        for case in cases {
            deployments.extend(bench.deploying().runs(case, rounds)?);
        }
        sets.push((images, runs));
    }
    let runs: Vec<&Runs> = sets.iter().flat_map(|(_, runs)| runs).collect();
    ensure!(!runs.is_empty(), "no case is called like {}", options.cases.as_deref().unwrap_or_default());

    let entries = if quick { ETC_ENTRIES.1 } else { ETC_ENTRIES.0 };
    let etc = etc::measure(tempfile::tempdir_in("/dev/shm")?.path(), entries)?;
    let text = table::table(&sets, &deployments, &etc, (rounds, options.before.as_deref()));
    println!("{text}");
    fs::create_dir_all(&options.out)?;
    let cases: Vec<_> = runs.iter().map(|run| json!({ "runs": run, "rows": run.rows() })).collect();
    let deployed: Vec<_> =
        deployments.iter().map(|run| json!({ "runs": run, "rows": run.deployment_rows() })).collect();
    let base = |images: &Images| {
        json!({ "bytes": images.base_bytes, "files": images.base_files,
                                         "compressed": images.base_compressed })
    };
    let bases: Vec<_> = sets.iter().map(|(images, _)| base(images)).collect();
    let record = json!({
        "unix_time": SystemTime::UNIX_EPOCH.elapsed()?.as_secs(),
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "quick": quick,
        "rounds": rounds,
        "before": options.before,
        "bases": bases,
        "cases": cases,
        "deployments": deployed,
        "etc": etc,
    });
    for (name, content) in
        [("bench.json", serde_json::to_string_pretty(&record)?), ("bench.md", text), ("bench.svg", svg::svg(&runs))]
    {
        let path = options.out.join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        eprintln!("benchmark: {}", path.display());
    }
    Ok(())
}

impl Options {
    fn selects(&self, case: &str) -> bool {
        self.cases.as_ref().is_none_or(|part| case.contains(part))
    }

    /// Directories of the sets that have selected cases, built if they are missing.
    fn sets(&self, quick: bool, scratch: &Path, oracle: &Path) -> Result<Vec<PathBuf>> {
        if !self.images.is_empty() {
            return Ok(self.images.clone());
        }
        let selected = Set::ALL.into_iter().filter(|set| set.cases().iter().any(|case| self.selects(case)));
        if !quick {
            return selected.map(testbed_images).collect();
        }
        let inputs = fixture::inputs(scratch, oracle)?;
        let build = |set: Set| {
            let dir = scratch.join(set.stage());
            images::build(&inputs, set, &dir).map(|_| dir)
        };
        selected.map(build).collect()
    }
}

/// Values that all runs of a set share.
struct Bench<'a> {
    images: &'a Path,
    oracle: PathBuf,
    /// The benchmark program of an earlier commit.
    before: Option<PathBuf>,
    proxy: Proxy,
    registry: Registry,
    scratch: TempDir,
    /// A copy of the registry's storage by hard links, because the limit's manifests are added to it.
    _storage: TempDir,
}

impl<'a> Bench<'a> {
    fn start(images: &'a Path, oracle: PathBuf, before: Option<PathBuf>) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let storage = tempfile::tempdir_in(images)?;
        run("cp", ["-al", &Images::storage(images).display().to_string(), &storage.path().display().to_string()])?;
        let registry = Registry::start(&storage.path().join("storage"), scratch.path())?;
        let proxy = Proxy::start(registry.address.clone())?;
        Ok(Self { images, oracle, before, proxy, registry, scratch, _storage: storage })
    }

    /// All runs of a case.
    fn case(&self, case: &Case, rounds: usize, quick: bool, profile: bool) -> Result<Runs> {
        eprintln!("benchmark: {}: {}", case.name, case.what);
        let mut result = Runs::of(case.clone());
        // The warm-up fills the page cache, and looks closer at the result than one would between measurements.
        let (ours, incumbent, fetched) = self.compared(case)?;
        let held = case.held.iter().filter(|layer| fetched.contains(*layer)).count();
        ensure!(held == 0, "{}: fetched {held} layers that the booted repo holds", case.name);
        let limit = limit::image_of(&self.registry.address, &case.image, &fetched)?;
        if quick {
            result.ours.push(ours);
            result.incumbent.push(incumbent);
        }
        while result.ours.len() < rounds {
            result.ours.push(self.side(Side::Ours, &case.image, &[])?.0);
            result.incumbent.push(self.side(Side::Incumbent, &case.incumbent, &[])?.0);
            if self.before.is_some() {
                result.before.push(self.side(Side::Before, &case.image, &[])?.0);
            }
        }
        while let Some(image) = limit.as_ref().filter(|_| result.limit.len() < rounds) {
            result.limit.push(self.side(Side::Limit, image, &[])?.0);
        }
        if profile {
            let samples = self.scratch.path().join("perf.data");
            self.side(Side::Ours, &case.image, &[("--profile", &samples)])?;
            result.profile = Some(profile::read(&samples)?);
        }
        for (ours, incumbent) in result.ours.iter().zip(&result.incumbent) {
            same_tree(&case.name, ours, incumbent)?;
        }
        for (ours, before) in result.ours.iter().zip(&result.before) {
            same_tree(&case.name, ours, before)?;
        }
        Ok(result)
    }

    fn deploying(&self) -> Deploying<'_> {
        Deploying { images: self.images, oracle: &self.oracle, proxy: &self.proxy }
    }

    /// Runs one side once, with options that name files. Returns its costs and the blobs that it requested.
    fn side(&self, side: Side, image: &str, files: &[(&str, &Path)]) -> Result<(Sample, BTreeSet<String>)> {
        let place = tempfile::tempdir_in(self.scratch.path())?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["side", side.word(), "--image", &format!("{}/{image}", self.proxy.address)]);
        command.arg("--images").arg(self.images).arg("--oracle").arg(&self.oracle).arg("--place").arg(place.path());
        if let Some(before) = &self.before {
            command.arg("--before").arg(before);
        }
        for (option, file) in files {
            command.arg(option).arg(file);
        }
        self.proxy.take();
        let said = output(command.stdin(Stdio::null())).with_context(|| format!("{image}: {}", side.word()))?;
        let (bytes, blobs) = self.proxy.take();
        let mut sample: Sample = serde_json::from_str(&said).context("reading what a run took")?;
        (sample.bytes, sample.blobs) = (bytes, blobs.len() as u64);
        let seconds = sample.wall;
        eprintln!("benchmark:   {:9} {seconds:7.2} s wall {:7.2} s CPU", side.word(), sample.cpu);
        Ok((sample, blobs))
    }

    /// One run of each side, whose results are compared file by file.
    fn compared(&self, case: &Case) -> Result<(Sample, Sample, BTreeSet<String>)> {
        let image = &case.image;
        let [own, other] = ["ours", "incumbent"].map(|name| self.scratch.path().join(name));
        let (ours, fetched) = self.side(Side::Ours, image, &[("--listing", &own)])?;
        let (incumbent, _) = self.side(Side::Incumbent, &case.incumbent, &[("--listing", &other)])?;
        same_tree(image, &ours, &incumbent)?;
        let (own, other) = (fs::read_to_string(own)?, fs::read_to_string(other)?);
        ensure!(!own.is_empty(), "{image}: the new /usr is empty");
        if let Some(difference) = listing::difference(&own, &other) {
            anyhow::bail!("{image}: the two sides' /usr differ:\n{difference}");
        }
        Ok((ours, incumbent, fetched))
    }
}

fn same_tree(name: &str, ours: &Sample, incumbent: &Sample) -> Result<()> {
    let (own, other) = (&ours.tree, &incumbent.tree);
    ensure!(own == other, "{name}: the two sides' commits have different trees: ours {own}, the other {other}");
    Ok(())
}

/// Returns the oracle program, built if it is missing. `PIVOT_ORACLE` names another one. The quick mode uses that of the
/// tests, which is compiled faster.
fn oracle(quick: bool) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PIVOT_ORACLE") {
        return Ok(path.into());
    }
    let told = bed(if quick { "oracle" } else { "incumbent" }, Stdio::piped())?;
    Ok(told.lines().last().context("the test bed says not where the oracle is")?.into())
}

/// The images, built when they are not.
fn testbed_images(set: Set) -> Result<PathBuf> {
    let told = bed(set.stage(), Stdio::inherit())?;
    Ok(Path::new(told.lines().last().context("the test bed says not where the images are")?).join("images"))
}

/// Returns the answer of the test bed's build script for `target`, or its standard error.
fn bed(target: &str, error: Stdio) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bed/build.sh");
    let mut command = Command::new("bash");
    command.arg(script).arg(target).env_remove("CARGO_TARGET_DIR").env("PIVOT_BENCHMARK", std::env::current_exe()?);
    let output = command.stderr(error).output().context("starting the test bed's build.sh")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success(), "the test bed's {target} cannot be built\n{error}");
    Ok(if out.is_empty() { error } else { out })
}
