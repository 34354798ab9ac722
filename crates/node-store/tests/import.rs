//! Imports an image from a directory, without a registry or a mount. `make check-cross` runs this on emulated processors,
//! where byte order and page size differ. skopeo and ostree are programs of the machine that emulates.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use node_store::PullProgress;
use node_store::image::{ImageSettings, PullSpec, Source, machine_architecture};
use node_store::import::{PullOptions, PulledImage, pull};
use node_store::store::NodeStore;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

/// Checksums of the root directory's entries, which include the checksums of all other objects, and of its attributes.
const TREE: [&str; 2] = [
    "956aad0327c604883216000434a26830063db31e0c4ee5a287f1141445f9bbca",
    "2c06545acdbd78911b267874a55130c5bc3515b8e318a8d04f138ee3721f79fd",
];

const CONTEXTS: &str = "/.*\tsystem_u:object_r:default_t:s0\n/usr(/.*)?\tsystem_u:object_r:usr_t:s0\n\
                        /usr/bin/bash\t--\tsystem_u:object_r:shell_exec_t:s0\n";

/// Adds a file, or a directory if the path ends with a slash.
fn add(layer: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, owner: (u64, u64), content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    let kind = if path.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular };
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    layer.append_data(&mut header, path, content).unwrap();
}

fn add_link(layer: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, target: &str) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o777);
    header.set_size(0);
    layer.append_link(&mut header, path, target).unwrap();
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A small system with a policy, all kinds of entries, owners, modes and a file capability.
fn system() -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    let dirs =
        ["./", "boot/", "etc/", "proc/", "sysroot/", "usr/", "usr/bin/", "usr/lib/", "usr/lib/ostree/", "usr/share/"];
    dirs.iter().for_each(|path| add(&mut layer, path, 0o755, (0, 0), b""));
    for (path, content) in [
        ("usr/lib/ostree/prepare-root.conf", "[composefs]\nenabled = yes\n"),
        ("usr/lib/os-release", "ID=test\n"),
        ("usr/lib/systemd/systemd", "init"),
        ("usr/lib/modules/6.1/vmlinuz", "kernel"),
        ("usr/share/removed", "in the first layer only"),
        ("etc/app.conf", "version = 1\n"),
        ("etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=test\n"),
        ("etc/selinux/test/contexts/files/file_contexts", CONTEXTS),
        ("etc/selinux/test/policy/policy.31", "not a policy"),
    ] {
        add(&mut layer, path, 0o644, (0, 0), content.as_bytes());
    }
    add(&mut layer, "usr/bin/bash", 0o755, (0, 0), &noise(300_000));
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    layer.append_pax_extensions([("SCHILY.xattr.security.capability", capability)]).unwrap();
    add(&mut layer, "usr/bin/ping", 0o4755, (81, 70_000), b"ping");
    add_link(&mut layer, "bin", tar::EntryType::Symlink, "usr/bin");
    add_link(&mut layer, "usr/bin/sh", tar::EntryType::Link, "usr/bin/bash");
    layer.into_inner().unwrap()
}

/// A layer over [`system`] that changes, adds and removes files.
fn changes() -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, "etc/app.conf", 0o600, (0, 5), b"version = 2\n");
    add(&mut layer, "usr/share/.wh.removed", 0o644, (0, 0), b"");
    add(&mut layer, "usr/share/large", 0o644, (0, 0), &noise(200_000).repeat(2));
    layer.into_inner().unwrap()
}

/// Writes a blob. Returns its descriptor.
fn blob(layout: &Path, media_type: &str, data: &[u8]) -> Value {
    let digest = hex::encode(Sha256::digest(data));
    fs::write(layout.join("blobs/sha256").join(&digest), data).unwrap();
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len() })
}

/// Writes an image for this machine's architecture.
fn write_image(layout: &Path) {
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let (system, changes) = (system(), changes());
    let diff_ids = [&system, &changes].map(|layer| format!("sha256:{}", hex::encode(Sha256::digest(layer))));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gzip.write_all(&system).unwrap();
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let layers = [
        blob(layout, &format!("{layer}+gzip"), &gzip.finish().unwrap()),
        blob(layout, &format!("{layer}+zstd"), &zstd::encode_all(changes.as_slice(), 3).unwrap()),
    ];
    let config = json!({
        "architecture": machine_architecture(), "os": "linux", "config": { "Labels": { "containers.bootc": "1" } },
        "created": "2023-11-14T22:13:20Z", "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob(layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let manifest = blob(layout, media_type, manifest.to_string().as_bytes());
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string()).unwrap();
}

async fn import(layout: &Path, store: &NodeStore) -> PulledImage {
    let source = Source::open(&ImageSettings::default()).await.unwrap();
    let image = source.resolve(&format!("oci:{}", layout.display()).parse::<PullSpec>().unwrap()).await.unwrap();
    let options = PullOptions { complete: true, ..PullOptions::default() };
    let (progress, cancel) = (Arc::new(PullProgress::default()), CancellationToken::new());
    pull(&source, &image, store, None, &options, progress, &cancel).await.unwrap()
}

/// Runs the machine's ostree, which is not emulated.
fn ostree(store: &NodeStore, arguments: &[&str]) -> String {
    let output = Command::new("ostree").arg(format!("--repo={}", store.repo_path().display())).args(arguments).output();
    let output = output.unwrap();
    assert!(output.status.success(), "ostree {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_has_the_same_checksums_on_each_processor() {
    let temp = tempfile::tempdir().unwrap();
    let (layout, root) = (temp.path().join("image"), temp.path().join("store"));
    write_image(&layout);
    fs::create_dir(&root).unwrap();
    let store = NodeStore::on_tmpfs(&root, None).unwrap();
    let pulled = import(&layout, &store).await;
    assert_eq!((pulled.complete, pulled.layers_fetched), (true, 2));
    ostree(&store, &["fsck"]);
    let commit = pulled.commit.to_string();
    let listing = ostree(&store, &["ls", "-R", "-C", "-X", &commit]);
    let root: Vec<_> = listing.lines().next().unwrap().split_whitespace().skip(4).take(2).collect();
    assert_eq!(root, TREE, "{listing}");
    assert!(ostree(&store, &["show", &commit]).contains("2023-11-14 22:13:20 +0000"));
    assert_eq!(import(&layout, &store).await.commit.to_string(), commit, "again, with the layers in the store");
}
