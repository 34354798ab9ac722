//! What pulls of large images cost.

use std::fs;
use std::path::Path;
use std::time::Duration;

use node_image_pivot::import::PullOptions;
use node_image_pivot::store::{BootedRepo, NodeStore};

use super::fixture::run;
use super::registry::Registry;
use super::{fsck, try_pull_with};

/// Not a test but a measurement: pulls OCI layouts named in `PIVOT_LAYOUTS` (`DIR:TAG`, comma-separated)
/// against the repo `PIVOT_BOOTED` (with the commit `PIVOT_BOOTED_COMMIT`) and against nothing, to
/// `/dev/shm`, and prints what it cost. `cargo test --release --test pull -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs large images; prints numbers"]
async fn measure() {
    let temp = tempfile::tempdir().unwrap();
    let registry = Registry::start(temp.path(), None);
    let booted = std::env::var("PIVOT_BOOTED")
        .ok()
        .map(|path| BootedRepo { path: path.into(), commit: std::env::var("PIVOT_BOOTED_COMMIT").ok() });
    for (index, layout) in
        std::env::var("PIVOT_LAYOUTS").unwrap_or_default().split(',').filter(|l| !l.is_empty()).enumerate()
    {
        let spec = registry.push(Path::new(layout), &format!("measured:{index}"));
        for (what, booted) in [("nothing booted", None), ("booted", booted.as_ref())] {
            let root = tempfile::tempdir_in("/dev/shm").unwrap();
            let store = NodeStore::on_tmpfs(root.path(), booted).unwrap();
            let (start, cpu, skopeo) = (std::time::Instant::now(), cpu_seconds("self"), cpu_seconds("children"));
            let pulled =
                try_pull_with(&spec, &store, booted, PullOptions { complete: booted.is_none(), parallel: None })
                    .await
                    .unwrap();
            let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds("self") - cpu);
            tokio::time::sleep(Duration::from_millis(300)).await;
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

/// User and system time of this process, or of its ended children.
fn cpu_seconds(whose: &str) -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let at = if whose == "self" { 11 } else { 13 };
    (fields[at].parse::<f64>().unwrap() + fields[at + 1].parse::<f64>().unwrap()) / 100.0
}

fn peak_rss_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}
