//! Sparse files in plain layers, as GNU tar writes them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use node_store::image::Kind;

use super::derived::{Labels, base, complete};
use super::fixture::{Compress, RawLayer, listing, run};
use super::layers::{by_ostree_ext, difference, oracle, raw, raw_layer};
use super::{Bench, failure, fsck, try_pull_with};

const MIB: u64 = 1 << 20;

/// Files with holes at the start, in the middle, at the end, everywhere, and in many places.
fn holes(dir: &Path) {
    let dir = dir.join("usr/share/holes");
    fs::create_dir_all(&dir).unwrap();
    let write = |name: &str, parts: &[(u64, usize)], size: u64| {
        let file = File::create(dir.join(name)).unwrap();
        parts.iter().for_each(|(at, length)| file.write_all_at(&vec![b'd'; *length], *at).unwrap());
        file.set_len(size).unwrap();
    };
    write("start", &[(3 * MIB, 700)], 3 * MIB + 700);
    write("end", &[(0, 700)], 5 * MIB);
    write("middle", &[(0, 4096), (8 * MIB, 4096)], 8 * MIB + 4096);
    write("all", &[], 20 * MIB);
    write("small", &[(40_960, 10)], 100_000);
    let many: Vec<(u64, usize)> = (0..150).map(|at| (at * 65_536, 4096)).collect();
    write("many", &many, 10 * MIB);
    write("none", &[(0, 1000)], 1000);
    write("empty", &[], 0);
    write(&"long-name-".repeat(15), &[(MIB, 5)], 2 * MIB);
}

/// GNU tar's four ways to write them.
const FORMATS: [(&str, &[&str], &[u8]); 4] = [
    ("gnu", &["--format=gnu"], b"ustar  "),
    ("0.0", &["--format=posix", "--sparse-version=0.0"], b"GNU.sparse.numbytes"),
    ("0.1", &["--format=posix", "--sparse-version=0.1"], b"GNU.sparse.map"),
    ("1.0", &["--format=posix", "--sparse-version=1.0"], b"GNU.sparse.realsize"),
];

fn archive(tree: &Path, options: &[&str], mark: &[u8]) -> RawLayer {
    let out = tree.with_extension("tar");
    let mut args = vec!["--sparse", "--hole-detection=raw", "--owner=0", "--group=0", "--numeric-owner", "--sort=name"];
    args.extend(options);
    args.extend(["-C", tree.to_str().unwrap(), "-cf", out.to_str().unwrap(), "usr/share/holes"]);
    run("tar", &args);
    let tar = fs::read(out).unwrap();
    assert!(tar.len() < 3 * MIB as usize && tar.windows(mark.len()).any(|part| part == mark), "it is sparse");
    RawLayer { tar, components: None, compress: Compress::Gzip }
}

#[tokio::test(flavor = "multi_thread")]
async fn sparse_files_keep_content_and_holes() {
    let bench = Bench::new();
    let (tree, oracle) = (bench.path("holes"), oracle());
    holes(&tree);
    let plain = {
        let out = bench.path("plain.tar");
        let args = ["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-C", tree.to_str().unwrap()];
        run("tar", &[&args[..], &["-cf", out.to_str().unwrap(), "usr/share/holes"]].concat());
        RawLayer { tar: fs::read(out).unwrap(), components: None, compress: Compress::Gzip }
    };
    let bottom = base(&bench, Labels::None);
    let mut image = bottom.clone();
    image.layers.push(plain);
    let spec = bench.push(&image, "sparse:plain");
    let expected = by_ostree_ext(&oracle, &spec, &bench.path("oracle")).unwrap();
    for (format, options, mark) in FORMATS {
        let mut image = bottom.clone();
        image.layers.push(archive(&tree, options, mark));
        let spec = bench.push(&image, &format!("sparse:{format}"));
        let store = bench.store(&format!("store-{format}"), None);
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        fsck(store.repo_path());
        let ours = listing(store.repo_path(), "coreos/node-image");
        assert!(ours == expected, "{format}: {}", difference(&ours, &expected));
        let (repo, out) = (format!("--repo={}", store.repo_path().display()), bench.path(&format!("out-{format}")));
        run("ostree", &["checkout", &repo, "coreos/node-image", out.to_str().unwrap()]);
        let mut kept = 0;
        for entry in fs::read_dir(tree.join("usr/share/holes")).unwrap().map(Result::unwrap) {
            let here = out.join("usr/share/holes").join(entry.file_name());
            assert!(fs::read(&here).unwrap() == fs::read(entry.path()).unwrap(), "{format} {here:?}");
            kept += fs::metadata(&here).unwrap().blocks() * 512;
        }
        assert!(kept < 3 * MIB, "{format}: {kept} bytes are kept of 50 MiB");
        // ostree-ext 0.15.3 refuses all four. Should another one take them, it must be the same tree.
        let theirs = by_ostree_ext(&oracle, &spec, &bench.path("oracle"));
        let told = theirs.as_ref().err().map(|told| told.lines().take(8).collect::<Vec<_>>().join(" "));
        println!("ostree-ext, sparse format {format}: {told:?}");
        assert!(theirs.is_err() || theirs.is_ok_and(|theirs| theirs == expected), "{format}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sparse_files_without_room_are_refused() {
    let bench = Bench::new();
    let small = bench.path("small");
    fs::create_dir_all(&small).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=64m", "tmpfs", small.to_str().unwrap()]);
    let bottom = base(&bench, Labels::None);
    let sparse = |size: u64, stored: &[u8]| {
        let size = size.to_string();
        let map = format!("1\n0\n{}\n", stored.len());
        let mut content = map.into_bytes();
        content.resize(512, 0);
        content.extend(stored);
        let pax: [(&[u8], &[u8]); 4] = [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"usr/share/vast"),
            (b"GNU.sparse.realsize", size.as_bytes()),
        ];
        raw(b"GNUSparseFile.0/vast", b'0', b"", &content, &pax)
    };
    let started = std::time::Instant::now();
    let store = |name: &str| {
        let root = small.join(name);
        fs::create_dir_all(&root).unwrap();
        node_store::store::NodeStore::on_tmpfs(&root, None).unwrap()
    };
    for (name, entries, kind, words) in [
        ("fits", vec![sparse(40 * MIB, b"x")], None, ""),
        ("store", vec![sparse(100 * MIB, b"x")], Some(Kind::NoSpace), "104857600"),
        ("peta", vec![sparse(1 << 50, b"x")], Some(Kind::BadFormat), "1125899906842624"),
        ("max", vec![sparse(u64::MAX, b"x")], Some(Kind::BadFormat), "18446744073709551615"),
        ("over", vec![sparse(100, &[b'x'; 600])], Some(Kind::BadFormat), "sparse file of 100 bytes"),
        ("many", vec![sparse(40 * MIB, b"x"); 110], Some(Kind::BadFormat), "the limit of 4294967296 bytes"),
    ] {
        let mut image = bottom.clone();
        image.layers.push(raw_layer(&entries));
        let spec = bench.push(&image, &format!("vast:{name}"));
        let Some(kind) = kind else {
            try_pull_with(&spec, &store(name), None, complete()).await.unwrap();
            continue;
        };
        // The store is small: only what is asked about may fail.
        let root = small.join("one");
        let _ = fs::remove_dir_all(&root);
        let told = failure(&spec, &store("one")).await;
        assert_eq!(told.kind, kind, "{name}: {told}");
        assert!(told.message.contains(words) && told.message.contains("layer 5"), "{name}: {told}");
    }
    println!("{} s", started.elapsed().as_secs());
    run("umount", &["-l", small.to_str().unwrap()]);
}
