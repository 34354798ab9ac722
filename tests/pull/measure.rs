//! Costs of pulls of large images.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use node_store::image::Source;
use node_store::import::{PullOptions, pull};
use node_store::store::{BootedRepo, NodeStore};
use node_store::{PullProgress, SpanResult};
use tokio_util::sync::CancellationToken;

use super::derived::{Labels, base};
use super::fixture::{Compress, run};
use super::layers::{raw, raw_layer};
use super::registry::Registry;
use super::tree::noise;
use super::{Bench, fsck, image, settings, try_pull_with};

/// Not a test but a measurement: pulls OCI layouts named in `PIVOT_LAYOUTS` (`DIR:TAG`, comma-separated)
/// against the repo `PIVOT_BOOTED` (with the commit `PIVOT_BOOTED_COMMIT`) and against nothing, to
/// `/dev/shm`, and prints what it cost. `cargo test --release --test pull -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs large images; prints numbers"]
async fn measure() {
    let temp = tempfile::tempdir().unwrap();
    let registry = Registry::start(temp.path(), None);
    let booted = std::env::var("PIVOT_BOOTED").ok().map(|path| BootedRepo {
        path: path.into(),
        commit: std::env::var("PIVOT_BOOTED_COMMIT").ok().and_then(|commit| commit.parse().ok()),
    });
    for (index, layout) in
        std::env::var("PIVOT_LAYOUTS").unwrap_or_default().split(',').filter(|l| !l.is_empty()).enumerate()
    {
        let spec = registry.push(Path::new(layout), &format!("measured:{index}"));
        for (what, booted) in [("nothing booted", None), ("booted", booted.as_ref())] {
            let root = tempfile::tempdir_in("/dev/shm").unwrap();
            let store = NodeStore::on_tmpfs(root.path(), booted).unwrap();
            let (start, cpu, skopeo) = (std::time::Instant::now(), cpu_seconds("self"), cpu_seconds("children"));
            let pulled =
                try_pull_with(&spec, &store, booted, PullOptions { complete: booted.is_none(), ..Default::default() })
                    .await
                    .unwrap();
            let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds("self") - cpu);
            // A child's time is known once it has been reaped.
            while has_children() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let skopeo = cpu_seconds("children") - skopeo;
            let stored = run("du", &["-sm", root.path().to_str().unwrap()]);
            println!(
                "{layout} {what}: {wall:.1} s wall, {cpu:.1} s CPU, skopeo {skopeo:.1} s CPU, {} MiB peak RSS, {} MiB stored; {pulled:?}",
                peak_rss_mib(),
                stored.split_whitespace().next().unwrap(),
            );
            if booted.is_none() {
                fsck(store.repo_path());
            }
        }
    }
}

/// Several layers at once with the largest zstd window that is taken, and bombs: a hundred times their size,
/// a gigabyte in all. The pull runs in a separate process, which reports its use of memory.
#[tokio::test(flavor = "multi_thread")]
async fn memory_is_bounded_whatever_the_layers() {
    const MOST_MIB: u64 = 150;
    if let Ok(spec) = std::env::var("PIVOT_BOUNDED") {
        let root = tempfile::tempdir().unwrap();
        let store = NodeStore::on_tmpfs(root.path(), None).unwrap();
        // As many as a machine of any size reads.
        let options = PullOptions { complete: true, parallel: Some(4), ..PullOptions::default() };
        try_pull_with(&spec, &store, None, options).await.unwrap();
        return println!("peak {} MiB", peak_rss_mib());
    }
    let bench = Bench::new();
    let mut image = base(&bench, Labels::None);
    for (at, compress) in
        [23, 24, 25, 25, 25].map(Compress::ZstdWindow).into_iter().chain([Compress::Gzip; 2]).enumerate()
    {
        // In /opt, so that nothing is stored; noise that comes again within the window, so that all of it is used.
        let mut content = noise(40 << 20, at as u8);
        match compress {
            Compress::ZstdWindow(_) => content.extend_from_within(..40 << 20),
            _ => content = vec![0; 400 << 20],
        }
        let mut layer = raw_layer(&[raw(b"opt/large", b'0', b"", &content, &[])]);
        layer.compress = compress;
        image.layers.push(layer);
    }
    let spec = bench.push(&image, "bounded:1");
    drop(image);
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "measure::memory_is_bounded_whatever_the_layers", "--nocapture"])
        .env("PIVOT_BOUNDED", &spec)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let peak = told.split("peak ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    println!("{peak} MiB");
    assert!(peak.parse::<u64>().unwrap() <= MOST_MIB, "{peak} MiB");
}

/// Returns true if this process has children that it has not reaped.
fn has_children() -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default()).any(|list| !list.is_empty())
}

/// Returns user and system time of this process, or of its ended children.
fn cpu_seconds(whose: &str) -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let at = if whose == "self" { 11 } else { 13 };
    (fields[at].parse::<f64>().unwrap() + fields[at + 1].parse::<f64>().unwrap()) / 100.0
}

/// The most that was resident of this process so far.
pub fn peak_rss_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn each_read_of_a_layer_has_its_times_and_bytes() {
    let bench = Bench::new();
    let store = bench.store("store", None);
    let spec = bench.push(&image(&bench, 1, 1), "timed:1");
    let source = Source::open(&settings()).await.unwrap();
    let image = source.resolve(&spec.parse().unwrap()).await.unwrap();
    let progress = Arc::<PullProgress>::default();
    let (options, cancel) = (PullOptions { complete: true, ..PullOptions::default() }, CancellationToken::new());
    let pulled = pull(&source, &image, &store, None, &options, progress.clone(), &cancel).await.unwrap();
    let reads = progress.take_reads();
    assert_eq!(reads.len() as u64, pulled.layers_fetched);
    assert_eq!(reads.iter().map(|read| read.fetch.bytes).sum::<u64>(), pulled.bytes_fetched);
    let (mut written, mut seen) = (0, std::collections::BTreeSet::new());
    for read in reads {
        assert_eq!((read.result, read.fetch.bytes), (Some(SpanResult::Done), read.size), "{read:?}");
        let (decompress, write) = (read.decompress.unwrap(), read.write.unwrap());
        assert!(decompress.bytes > 0, "{decompress:?}");
        for part in [read.fetch, decompress, write] {
            assert!(part.start_ms >= read.fetch.start_ms && part.end_ms >= part.start_ms, "{part:?}");
        }
        assert!(seen.insert(read.index));
        written += write.bytes;
    }
    assert_eq!(written, progress.snapshot().bytes_written);
}
