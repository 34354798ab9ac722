//! Pulls that are cancelled, and pulls at the same time.

use super::waits::holder_of_the_lock;
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_waits_for_another_one_and_can_be_cancelled() {
    let bench = Bench::new();
    let store = bench.store("store", None);
    let spec = bench.push(&image(&bench, 1, 1), "os:1");
    let source = Source::open(&settings()).await.unwrap();
    let image = source.resolve(&spec.parse().unwrap()).await.unwrap();
    let (options, cancel) = (PullOptions::default(), CancellationToken::new());
    cancel.cancel();
    let told = pull(&source, &image, &store, None, &options, Arc::default(), &cancel).await.unwrap_err();
    assert_eq!(told.kind, Kind::Cancelled);
    // Two at once: the second waits for the first and takes its result.
    let cancel = CancellationToken::new();
    let other = Source::open(&settings()).await.unwrap();
    let (one, two) = tokio::join!(
        pull(&source, &image, &store, None, &options, Arc::default(), &cancel),
        pull(&other, &image, &store, None, &options, Arc::default(), &cancel),
    );
    assert_eq!(one.unwrap(), two.unwrap());
    let held = loop {
        // A child process that another test starts holds the locks of this process until it calls exec.
        match store.lock() {
            Err(node_store::store::LockError::Held { .. }) => tokio::task::yield_now().await,
            held => break held.unwrap(),
        }
    };
    let other_image = node_store::image::ResolvedImage {
        digest: format!("sha256:{}", "1".repeat(64)).parse().unwrap(),
        ..image.clone()
    };
    let (progress, waiting) = (Arc::<PullProgress>::default(), CancellationToken::new());
    let pulling = pull(&source, &other_image, &store, None, &options, progress.clone(), &waiting);
    let (told, ()) = tokio::join!(pulling, async {
        holder_of_the_lock(&progress).await;
        waiting.cancel();
    });
    assert!(told.unwrap_err().message.contains("pid"), "says who holds the lock");
    drop(held);
}
