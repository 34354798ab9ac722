//! Names, symlink targets and attributes that are not UTF-8.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use node_store::image::Kind;
use node_store::store::{NodeStore, ObjectType};

use super::derived::{Labels, base, complete};
use super::fixture::{Repo, listing, run};
use super::layers::{by_ostree_ext, oracle, raw, raw_layer};
use super::{Bench, failure, fsck, try_pull_with};

fn file(path: &[u8]) -> Vec<u8> {
    raw(path, b'0', b"", b"content", &[])
}

/// Why such names are refused: libostree and ostree-ext refuse them too.
#[tokio::test(flavor = "multi_thread")]
async fn ostree_itself_cannot_name_them() {
    let bench = Bench::new();
    let tree = bench.path("name");
    fs::create_dir_all(tree.join("usr")).unwrap();
    fs::write(tree.join("usr").join(OsStr::from_bytes(b"caf\xe9")), "x").unwrap();
    let (repo, dir) = (format!("--repo={}", bench.repo.path.display()), format!("--tree=dir={}", tree.display()));
    let output = Command::new("ostree").args(["commit", &repo, "-b", "x", &dir, "-s", "x"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("Invalid UTF-8"), "{told}");
    let mut image = base(&bench, Labels::None);
    image.layers.push(raw_layer(&[file(b"usr/caf\xe9")]));
    let spec = bench.push(&image, "utf8:name");
    let theirs = by_ostree_ext(&oracle(), &spec, &bench.path("oracle")).unwrap_err();
    assert!(theirs.contains("invalid UTF-8"), "{theirs}");
}

/// Why such targets are refused: libostree takes them, with a complaint of GLib's, but its checksum does
/// not cover them, so that one symlink is taken for another.
#[test]
fn ostree_mistakes_one_such_target_for_another() {
    let temp = tempfile::tempdir().unwrap();
    let (repo, tree) = (Repo::create(&temp.path().join("repo")), temp.path().join("tree"));
    fs::create_dir_all(&tree).unwrap();
    for (name, target) in [("one", b"caf\xe9"), ("two", b"bar\xfe")] {
        std::os::unix::fs::symlink(OsStr::from_bytes(target), tree.join(name)).unwrap();
    }
    let commit = repo.commit(&tree, "x");
    let out = temp.path().join("out");
    let path = format!("--repo={}", repo.path.display());
    run("ostree", &["checkout", &path, &commit, out.to_str().unwrap()]);
    assert_eq!(fs::read_link(out.join("one")).unwrap(), fs::read_link(out.join("two")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_do_not_stay_are_accepted() {
    let bench = Bench::new();
    let mut image = base(&bench, Labels::Own);
    image.layers.push(raw_layer(&[
        file(b"usr/share/caf\xe9"),
        file(b"usr/share/\xfe/deep/\xff"),
        file(b"usr/share/replaced/\xff"),
        file(b"usr/share/emptied/\xff"),
        raw(b"usr/share/alias", b'1', b"usr/share/caf\xe9", b"", &[]),
        raw(b"usr/share/symlink", b'2', b"../caf\xe9", b"", &[]),
        raw(b"usr/share/null\xff", b'3', b"", b"", &[]),
        raw(b"usr/share/pipe\xff", b'6', b"", b"", &[]),
        file(b"usr/share/.wh.nothing\xff"),
        file(b"opt/\xff"),
        file(b"top\xff/x"),
        file(b"run/\xff"),
        file(b"tmp/\xff/x"),
        file(b"sysroot/\xff"),
    ]));
    image.layers.push(raw_layer(&[
        file(b"usr/share/.wh.caf\xe9"),
        file(b"usr/share/.wh.\xfe"),
        file(b"usr/share/replaced"),
        file(b"usr/share/emptied/.wh..wh..opq"),
        file(b"usr/share/emptied/good"),
        file(b"usr/share/symlink"),
    ]));
    let spec = bench.push(&image, "utf8:gone");
    let store = bench.store("gone", None);
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let text = pulled.warnings.join("\n");
    for words in [
        "device /usr/share/null\\xff (1)",
        "fifo /usr/share/pipe\\xff (1)",
        "/opt (1)",
        "/run (1)",
        "/tmp (1)",
        "/top\\xff (1)",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let repo = format!("--repo={}", store.repo_path().display());
    for path in ["/usr/share/alias", "/usr/share/replaced", "/usr/share/emptied/good", "/usr/share/symlink"] {
        assert_eq!(run("ostree", &["cat", &repo, "coreos/node-image", path]), "content", "{path}");
    }
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(!all.contains("/caf") && !all.contains("\\x"), "{all}");
    // From the kept lists of the layers, too.
    fs::remove_file(bench.path("gone").join("pulled.json")).unwrap();
    let again = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    assert_eq!((again.commit, again.bytes_fetched), (pulled.commit, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_stay_are_refused_by_layer_and_path() {
    let bench = Bench::new();
    let later = raw_layer(&[file(b"usr/share/other")]);
    for (name, entries, shown, what) in [
        ("file", vec![file(b"usr/share/caf\xe9")], "/usr/share/caf\\xe9 ", "a name that is not UTF-8"),
        ("etc", vec![file(b"etc/\xff.conf")], "/usr/etc/\\xff.conf ", "a name that is not UTF-8"),
        ("dir", vec![raw(b"usr/\xff", b'5', b"", b"", &[])], "/usr/\\xff ", "a name that is not UTF-8"),
        ("below", vec![file(b"usr/\xff/a"), file(b"usr/\xfe")], "(and 1 more such paths)", "a name that is not UTF-8"),
        ("link", vec![raw(b"usr/\xff", b'1', b"usr/bin/bash", b"", &[])], "/usr/\\xff ", "a name that is not UTF-8"),
        ("target", vec![raw(b"usr/s", b'2', b"/caf\xe9", b"", &[])], "/usr/s ", "a target that is not UTF-8"),
    ] {
        let mut image = base(&bench, Labels::None);
        image.layers.extend([raw_layer(&entries), later.clone()]);
        let spec = bench.push(&image, &format!("utf8:{name}"));
        let told = failure(&spec, &bench.store(name, None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "{name}: {told}");
        for words in [shown, what, "layer 5 (sha256:", "utf8@sha256:", "rename or remove it"] {
            assert!(told.to_string().contains(words), "{name}, {words}: {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_are_kept_byte_for_byte() {
    let bench = Bench::new();
    let long = vec![0xa5; 60_000];
    let mut image = base(&bench, Labels::None);
    image.layers.push(raw_layer(&[
        raw(b"usr/bytes", b'0', b"", b"x", &[(b"SCHILY.xattr.trusted.caf\xe9", b"\xff\x00=\n\xfe")]),
        raw(b"usr/long", b'0', b"", b"x", &[(b"SCHILY.xattr.trusted.long", &long)]),
        raw(b"usr/dir", b'5', b"", b"", &[(b"SCHILY.xattr.trusted.\xff", b"\xff")]),
    ]));
    let spec = bench.push(&image, "xattrs:kept");
    // ext4 has room for 4 KiB of attributes; the agent's store is a tmpfs.
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = NodeStore::on_tmpfs(root.path(), None).unwrap();
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let repo = format!("--repo={}", store.repo_path().display());
    let object = |path: &str| {
        let shown = run("ostree", &["ls", "-C", &repo, "coreos/node-image", path]);
        store.object_path(&shown.split_whitespace().nth(4).unwrap().parse().unwrap(), ObjectType::File)
    };
    let read = |path: &str, name: &[u8]| {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(object(path), OsStr::from_bytes(name), value.as_mut_slice()).unwrap();
        value.truncate(length);
        value
    };
    assert_eq!(read("/usr/bytes", b"trusted.caf\xe9"), b"\xff\x00=\n\xfe");
    assert!(read("/usr/long", b"trusted.long") == long);
    assert!(run("ostree", &["ls", "-d", "-X", &repo, "coreos/node-image", "/usr/dir"]).contains("0xff"));
    for (name, key, length) in
        [("value", "trusted.x".to_owned(), 65_537), ("name", format!("trusted.{}", "x".repeat(250)), 1)]
    {
        let key = format!("SCHILY.xattr.{key}");
        let mut image = base(&bench, Labels::None);
        image.layers.push(raw_layer(&[raw(b"usr/x", b'0', b"", b"x", &[(key.as_bytes(), &vec![b'v'; length])])]));
        let told = failure(&bench.push(&image, &format!("xattrs:{name}")), &bench.store(name, None)).await;
        assert!(told.kind == Kind::BadFormat && told.message.contains("the limits of Linux"), "{told}");
    }
}
