//! The same image in every form that registries serve it in.

use super::derived::complete;
use super::fixture::{Compress, listing, run};
use super::{Bench, fsck, image, try_pull_with};

/// Compressions, and docker's media types and manifest lists as skopeo converts to them.
#[tokio::test(flavor = "multi_thread")]
async fn every_compression_and_media_type_gives_the_same_tree() {
    use Compress::{Gzip, GzipMembers, None as Plain, Zstd, ZstdChunked, ZstdWindow};
    let bench = Bench::new();
    let bottom = image(&bench, 1, 1);
    let expected = listing(&bench.repo.path, &bottom.commit);
    for (name, compress, docker) in [
        ("gzip", Gzip, false),
        ("members", GzipMembers, false),
        ("zstd", Zstd, false),
        ("chunked", ZstdChunked, false),
        ("window", ZstdWindow(25), false),
        ("plain", Plain, false),
        ("docker-gzip", Gzip, true),
        ("docker-plain", Plain, true),
        ("docker-list", Gzip, true),
    ] {
        let mut image = bottom.clone();
        image.layers.iter_mut().for_each(|layer| layer.compress = compress);
        let layout = bench.path("layout");
        let _ = std::fs::remove_dir_all(&layout);
        if name == "docker-list" {
            let mut other = image.clone();
            other.architecture = "s390x".into();
            image.write_with(&other, &layout);
        } else {
            image.write(&layout);
        }
        let spec = match docker {
            false => bench.registry.push(&layout, &format!("media:{name}")),
            true => bench.registry.push_docker(&layout, &format!("media:{name}")),
        };
        let raw = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &format!("docker://{spec}")]);
        assert_eq!(raw.contains("vnd.docker.distribution.manifest.v2+json"), docker, "{name}: {raw}");
        assert_eq!(raw.contains("manifest.list.v2+json"), name == "docker-list", "{name}: {raw}");
        let store = bench.store(name, None);
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert!(pulled.complete && pulled.commit == image.id(), "{name}: {pulled:?}");
        fsck(store.repo_path());
        assert_eq!(listing(store.repo_path(), "coreos/node-image"), expected, "{name}");
    }
}
