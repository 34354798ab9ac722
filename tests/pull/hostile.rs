//! Images made to do harm: each is refused with its reason, or has no effect.

use node_store::image::Kind;
use node_store::store::NodeStore;

use super::derived::{Labels, base, complete};
use super::fixture::{Compress, listing};
use super::layers::{raw, raw_layer};
use super::{Bench, failure, fsck, image, try_pull_with};

fn file(path: &[u8]) -> Vec<u8> {
    raw(path, b'0', b"", b"content", &[])
}

fn symlink(path: &[u8], target: &[u8]) -> Vec<u8> {
    raw(path, b'2', target, b"", &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_plain_layers_are_refused() {
    let bench = Bench::new();
    let bottom = base(&bench, Labels::None);
    let long = |bytes: usize| vec![b'n'; bytes];
    let deep = b"d/".repeat(300);
    let claims = |size: u64| {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..5].copy_from_slice(b"usr/x");
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let pax = |key: &[u8], value: &[u8]| raw(b"usr/x", b'0', b"", b"", &[(key, value)]);
    for (name, entries, words) in [
        ("up", vec![file(b"usr/../../etc/passwd")], "escapes"),
        ("up-pax", vec![pax(b"path", b"usr/../../x")], "escapes"),
        ("up-link", vec![raw(b"usr/x", b'1', b"../etc/shadow", b"", &[])], "escapes"),
        ("nul", vec![pax(b"path", b"usr/a\0b")], "not a valid path"),
        ("deep", vec![pax(b"path", &[b"usr/", &deep[..]].concat())], "not a valid path"),
        ("wide", vec![pax(b"path", &[b"usr/", &long(256)[..]].concat())], "not a valid path"),
        ("target", vec![raw(b"usr/x", b'2', b"", b"", &[(b"linkpath", &long(5000))])], "expected 1 to 4095 bytes"),
        ("below-symlink", vec![symlink(b"usr/x", b"/etc"), file(b"usr/x/passwd")], "below /usr/x"),
        ("below-dots", vec![symlink(b"usr/x", b"../../.."), file(b"usr/x/etc/passwd")], "below /usr/x"),
        ("white-symlink", vec![symlink(b"usr/x", b"/etc"), file(b"usr/x/.wh.passwd")], "below /usr/x"),
        ("opaque-file", vec![file(b"usr/x"), file(b"usr/x/.wh..wh..opq")], "below /usr/x"),
        ("whiteout", vec![file(b"usr/.wh...")], "whiteout without a name"),
        ("type", vec![raw(b"usr/x", b'Z', b"", b"", &[])], "unknown type"),
        ("claims", vec![claims(1 << 30)], "ends early"),
        ("claims-more", vec![claims(1 << 50)], "1125899906842624"),
        ("claims-most", vec![claims(u64::MAX >> 1)], "9223372036854775807"),
        ("pax-size", vec![pax(b"size", b"18446744073709551615")], "18446744073709551615"),
        ("pax-owner", vec![pax(b"uid", b"4294967296")], "4294967296"),
        ("pax-bomb", vec![raw(b"x", b'x', b"", &long(2 << 20), &[])], "more than 1048576"),
        ("name-bomb", vec![raw(b"x", b'L', b"", &long(2 << 20), &[])], "more than 1048576"),
        ("half-end", vec![file(b"usr/x"), vec![0; 512], file(b"usr/y")], "half an end"),
        ("circle", vec![raw(b"usr/x", b'1', b"usr/y", b"", &[]), raw(b"usr/y", b'1', b"usr/x", b"", &[])], "hardlink"),
    ] {
        let mut image = bottom.clone();
        let mut layer = raw_layer(&entries);
        if name == "claims" {
            layer.tar.truncate(512);
        }
        image.layers.push(layer);
        let spec = bench.push(&image, &format!("hostile:{name}"));
        let told = failure(&spec, &bench.store("store", None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "{name}: {told}");
        assert!(told.message.contains(words) && told.message.contains("layer 5"), "{name}: {told}");
    }
    let mut image = bottom.clone();
    image.layers.push(raw_layer(&[file(b"usr/x")]));
    image.layers[5].compress = Compress::GzipAndMore;
    let told = failure(&bench.push(&image, "hostile:more"), &bench.store("store", None)).await;
    assert!(told.kind == Kind::BadFormat && told.message.contains("layer 5"), "{told}");
    image.layers[5].compress = Compress::ZstdWindow(26);
    let told = failure(&bench.push(&image, "hostile:window"), &bench.store("store", None)).await;
    assert!(told.kind == Kind::BadFormat && told.message.contains("32 MiB"), "{told}");
}

/// Layers that look bad and are not: paths stay inside, and the last of equal entries counts.
#[tokio::test(flavor = "multi_thread")]
async fn odd_plain_layers_are_imported_safely() {
    let bench = Bench::new();
    let mut image = base(&bench, Labels::None);
    image.layers.push(raw_layer(&[
        file(b"/usr/absolute"),
        symlink(b"usr/outside", b"../../../../etc/passwd"),
        file(b"usr/twice"),
        raw(b"usr/twice", b'0', b"", b"second", &[]),
        file(b"usr/turned"),
        symlink(b"usr/turned", b"twice"),
        // Links have no content, whatever they say.
        raw(b"usr/link", b'1', b"usr/twice", b"", &[]),
        // A name for other readers.
        raw(b"short", b'0', b"", b"x", &[(b"path", b"usr/renamed")]),
    ]));
    image.layers[5].compress = Compress::GzipMembers;
    image.layers[5].tar.extend([7; 1000]);
    let store = bench.store("harmless", None);
    try_pull_with(&bench.push(&image, "hostile:harmless"), &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let repo = format!("--repo={}", store.repo_path().display());
    let cat = |path: &str| super::fixture::run("ostree", &["cat", &repo, "coreos/node-image", path]);
    assert_eq!(
        (cat("/usr/absolute"), cat("/usr/twice"), cat("/usr/link")),
        ("content".into(), "second".into(), "second".into())
    );
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(all.contains("/usr/turned -> twice") && all.contains("/usr/renamed") && !all.contains("/short"), "{all}");
}

/// Returns the offset of the header of the first entry of this type with content whose name, cut at 100 bytes, ends so.
fn find(tar: &[u8], kind: u8, suffix: &str, with_content: bool) -> usize {
    let mut at = 0;
    while at < tar.len() {
        let header = tar::Header::from_byte_slice(&tar[at..at + 512]);
        let name = header.as_old().name.split(|byte| *byte == 0).next().unwrap();
        let fits = header.as_old().linkflag == [kind] && name.ends_with(suffix.as_bytes());
        if fits && (size(tar, at) > 0 || !with_content) {
            return at;
        }
        at += 512 + size(tar, at);
    }
    panic!("no {suffix}");
}

/// Returns the bytes of content, with padding, that the header has.
fn size(tar: &[u8], at: usize) -> usize {
    let size = tar::Header::from_byte_slice(&tar[at..at + 512]).entry_size().unwrap();
    (size as usize).next_multiple_of(512)
}

/// Rewrites the header of the first regular content object.
fn rewrite(tar: &mut [u8], change: impl Fn(&mut tar::Header)) {
    let at = find(tar, b'0', ".file", true);
    let mut header = tar::Header::from_byte_slice(&tar[at..at + 512]).clone();
    change(&mut header);
    header.set_cksum();
    tar[at..at + 512].copy_from_slice(header.as_bytes());
}

/// Removes an entry and the long names (1 KiB each) before it.
fn remove(tar: &mut Vec<u8>, at: usize, names: usize) {
    let end = at + 512 + size(tar, at);
    tar.drain(at - names * 1024..end);
}

#[tokio::test(flavor = "multi_thread")]
async fn altered_objects_of_commit_layers_are_refused() {
    let bench = Bench::new();
    type Spoil = fn(&mut Vec<u8>);
    let spoiled: [(&str, usize, Spoil, Kind, &str); 7] = [
        ("mode", 1, |tar| rewrite(tar, |header| header.set_mode(0o4711)), Kind::BadFormat, "has the checksum"),
        ("owner", 1, |tar| rewrite(tar, |header| header.set_uid(7)), Kind::BadFormat, "has the checksum"),
        (
            "xattrs",
            1,
            |tar| {
                let at = find(tar, b'0', ".file-x", true);
                tar[at + 512] ^= 1;
            },
            Kind::BadFormat,
            "have the checksum",
        ),
        (
            "no-xattrs",
            1,
            |tar| {
                let at = find(tar, b'0', ".file-x", true);
                remove(tar, at, 1);
            },
            Kind::BadFormat,
            "lacks the extended attributes",
        ),
        (
            "no-link",
            1,
            |tar| {
                let at = find(tar, b'1', ".file-x", false);
                remove(tar, at, 2);
            },
            Kind::BadFormat,
            "without its extended attributes",
        ),
        (
            "dirtree",
            0,
            |tar| {
                let at = find(tar, b'0', ".dirtre", true);
                tar[at + 512] ^= 1;
            },
            Kind::BadFormat,
            "has the checksum",
        ),
        (
            "no-dirtree",
            0,
            |tar| {
                let at = find(tar, b'0', ".dirtre", true);
                remove(tar, at, 1);
            },
            Kind::BadFormat,
            ".dirtree is missing",
        ),
    ];
    for (name, layer, spoil, kind, words) in spoiled {
        let mut image = image(&bench, 1, 1);
        spoil(&mut image.layers[layer].tar);
        let told = failure(&bench.push(&image, &format!("hostile:{name}")), &bench.store(name, None)).await;
        assert!(told.kind == kind && told.message.contains(words), "{name}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_entries_of_commit_layers_are_refused() {
    let bench = Bench::new();
    let object = |kind: &str| format!("sysroot/ostree/repo/objects/ab/{}.{kind}", "cd".repeat(31));
    let entry = |kind: &str, link: &[u8]| {
        let path = object(kind);
        raw(b"x", if link.is_empty() { b'0' } else { b'1' }, link, b"", &[(b"path", path.as_bytes())])
    };
    for (name, entries, words) in [
        ("late", vec![entry("dirtree", b"")], "belongs in the first layer"),
        ("link-out", vec![entry("file-xattrs-link", b"etc/passwd")], "to etc/passwd"),
        ("link-up", vec![entry("file-xattrs-link", b"../etc/passwd")], "escapes"),
        ("link-none", vec![], "lacks the extended attributes"),
        ("no-object", vec![entry("filez", b"")], "does not name an object"),
    ] {
        let mut image = image(&bench, 1, 1);
        let entries: Vec<u8> = if name == "link-none" {
            let (path, target) = (object("file-xattrs-link"), object("file-xattrs"));
            raw(b"x", b'1', b"", b"", &[(b"linkpath", target.as_bytes()), (b"path", path.as_bytes())])
        } else {
            entries.concat()
        };
        let tar = &mut image.layers[1].tar;
        tar.splice(0..0, entries);
        let told = failure(&bench.push(&image, &format!("hostile:{name}")), &bench.store(name, None)).await;
        assert!(told.kind == Kind::BadFormat && told.message.contains(words), "{name}: {told}");
    }
}

/// Every object of every layer twice, and hardlinks in the tree again: the same tree.
#[tokio::test(flavor = "multi_thread")]
async fn duplicated_objects_change_nothing() {
    let bench = Bench::new();
    let mut image = image(&bench, 1, 1);
    for layer in &mut image.layers {
        let end = layer.tar.len() - 1024;
        layer.tar = [&layer.tar[..end], &layer.tar].concat();
    }
    let spec = bench.push(&image, "hostile:twice");
    let store: NodeStore = bench.store("twice", None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &image.commit));
}
