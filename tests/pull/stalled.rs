//! One layer that a registry stalls, beside layers that it serves.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use node_store::image::{Class, ImageSettings, Source};
use node_store::import::{PullOptions, PulledImage, pull};
use node_store::store::NodeStore;
use tokio_util::sync::CancellationToken;

use super::faults::{Fault, Faults};
use super::fixture::{Image, listing, run};
use super::layers::{What, item};
use super::plain::{labelled_system, of};
use super::tree::noise;
use super::{Bench, Failure, image, settings};

/// A plain image with four layers upon that of a system.
fn plain_image() -> Image {
    let layer =
        |at: u8| vec![item(&format!("usr/bin/tool{at}"), What::File(noise(300_000 * usize::from(at), at), 0o755))];
    of(&[labelled_system(), layer(1), layer(2), layer(3), layer(4)])
}

/// An image behind a proxy, and its layers from the largest to the smallest, without the first one.
fn behind(bench: &Bench, image: &Image) -> (String, Faults, Vec<String>) {
    let direct = bench.push(image, "os:1");
    let faults = Faults::before(&bench.registry.address);
    let layout = format!("oci:{}", bench.path("layout").display());
    let manifest: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
    let mut layers = manifest["layers"].as_array().unwrap()[1..].to_vec();
    layers.sort_by_key(|layer| std::cmp::Reverse(layer["size"].as_u64().unwrap()));
    let digest = |layer: &serde_json::Value| layer["digest"].as_str().unwrap().to_owned();
    (direct.replace(&bench.registry.address, &faults.address), faults, layers.iter().map(digest).collect())
}

/// Pulls with a short time limit if the registry stalls a layer.
async fn attempt(spec: &str, store: &NodeStore, stalls: bool, authfile: Option<&Path>) -> Result<PulledImage, Failure> {
    let (idle_timeout, authfile) = (stalls.then_some(Duration::from_secs(5)), authfile.map(Path::to_owned));
    let source = Source::open(&ImageSettings { idle_timeout, authfile, ..settings() }).await?;
    let image = source.resolve(&spec.parse()?).await?;
    let options = PullOptions { complete: true, parallel: Some(2), ..PullOptions::default() };
    pull(&source, &image, store, None, &options, Default::default(), &CancellationToken::new()).await
}

/// Returns true if a program with this argument runs.
fn runs_with(argument: &Path) -> bool {
    let argument = argument.to_str().unwrap();
    let lines = fs::read_dir("/proc").unwrap().flatten().map(|entry| fs::read(entry.path().join("cmdline")));
    lines.flatten().any(|line| line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_layers_are_read_and_the_stalled_one_alone_is_fetched_again() {
    let bench = Bench::new();
    stalled(&bench, &image(&bench, 1, 1)).await;
    stalled(&Bench::new(), &plain_image()).await;
}

async fn stalled(bench: &Bench, image: &Image) {
    let (spec, faults, layers) = behind(bench, image);
    let store = bench.store("store", None);
    let authfile = bench.path("auth.json");
    fs::write(&authfile, "{}").unwrap();
    faults.plan(&layers[0], Fault::Stall, 50);
    faults.served();
    let told = attempt(&spec, &store, true, Some(&authfile)).await.unwrap_err();
    println!("{told}");
    assert_eq!(told.kind.class(), Class::Transient, "{told}");
    assert!(told.message.contains(&layers[0]) && told.message.contains("received nothing for 5 s"), "{told}");
    let before = faults.served();
    assert!(layers[1..].iter().all(|layer| before.contains(layer)), "all others: {before:?}");
    // The registry is silent for longer than anything of the attempt may live.
    let deadline = Instant::now() + Duration::from_secs(20);
    while runs_with(&authfile) {
        assert!(Instant::now() < deadline, "skopeo still runs");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    faults.plan("", Fault::Stall, 0);
    let pulled = attempt(&spec, &store, false, None).await.unwrap();
    assert!(pulled.complete && pulled.layers_fetched == 1, "{pulled:?}");
    let after = faults.served();
    assert!(after.contains(&layers[0]) && !layers[1..].iter().any(|layer| after.contains(layer)), "{after:?}");
    if !image.commit.is_empty() {
        assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &image.commit));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_fails_at_once_does_not_stop_the_others() {
    let bench = Bench::new();
    let (spec, faults, layers) = behind(&bench, &image(&bench, 1, 1));
    faults.plan(&layers[0], Fault::Answer(503, ""), 50);
    faults.served();
    let told = attempt(&spec, &bench.store("store", None), false, None).await.unwrap_err();
    assert!(told.kind.class() == Class::Transient && told.message.contains(&layers[0]), "{told}");
    let served = faults.served();
    assert!(layers[1..].iter().all(|layer| served.contains(layer)), "all others: {served:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_serves_no_layer_is_not_asked_for_all_of_them() {
    let bench = Bench::new();
    let (spec, faults, layers) = behind(&bench, &image(&bench, 1, 1));
    for layer in &layers {
        fs::write(bench.registry.blob(layer), "").unwrap();
    }
    let told = attempt(&spec, &bench.store("store", None), false, None).await.unwrap_err();
    assert_eq!(told.kind.class(), Class::Transient, "{told}");
    let asked = faults.served();
    let asked = layers.iter().filter(|layer| asked.contains(layer)).count();
    // Two are read at once; a third may have begun before the second failed.
    assert!(asked <= 3, "{asked} layers were asked for");
}
