//! Files that get their final SELinux label after the last layer of a plain image: how often the store has them.

use std::collections::BTreeSet;

use node_store::store::ObjectType;

use super::derived::{CONTEXTS, complete};
use super::fixture::{fsck, listing};
use super::layers::{Item, What, item, link};
use super::plain::{of, policy, system};
use super::{Bench, try_pull_with};

/// Neither a component nor a booted system tells the policy: each file gets its label after the merge.
#[tokio::test(flavor = "multi_thread")]
async fn relabelled_files_are_stored_once() {
    let bench = Bench::new();
    let note = vec![("user.note".to_owned(), b"kept".to_vec())];
    let update = vec![
        Item { xattrs: note, ..item("usr/bin/noted", What::File(b"noted".to_vec(), 0o755)) },
        link("usr/share/noted", "usr/bin/noted"),
        link("usr/share/nolabel/kubelet", "usr/bin/kubelet"),
        link("usr/share/kubelet", "usr/bin/kubelet"),
        item("usr/share/link", What::Symlink("stable".into())),
    ];
    let other = policy("test", &CONTEXTS.replace("bin_t", "tool_t"));
    let images = [
        ("labelled", vec![system(), update.clone(), policy("test", CONTEXTS)], 3, 3),
        ("again", vec![system(), update.clone(), policy("test", CONTEXTS)], 0, 3),
        ("other-labels", vec![system(), update.clone(), other], 1, 3),
        ("unlabelled", vec![system(), update], 0, 0),
    ];
    let store = bench.store("store", None);
    for (name, layers, fetched, of_policy) in images {
        let spec = bench.push(&of(&layers), &format!("stored:{name}"));
        let whole = bench.store(name, None);
        let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
        let listed = listing(whole.repo_path(), "coreos/node-image");
        let content: BTreeSet<String> = listed
            .lines()
            .filter(|line| line.starts_with(['-', 'l']))
            .map(|line| line.split_whitespace().nth(4).unwrap().to_owned())
            .collect();
        let stored: BTreeSet<String> = whole.content_objects().unwrap().iter().map(ToString::to_string).collect();
        let more: Vec<&String> = stored.difference(&content).collect();
        assert_eq!(more.len(), of_policy, "{name}: only files of the policy have a first object: {more:?}");
        assert!(content.is_subset(&stored), "{name}");
        fsck(whole.repo_path());

        store.remove_ref().unwrap();
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert_eq!((pulled.commit, pulled.layers_fetched), (expected.commit, fetched), "{name}");
        // As a tmpfs before Linux 6.6 holds them.
        for id in store.content_objects().unwrap() {
            let path = store.object_path(&id, ObjectType::File);
            let mut value = [0; 16];
            let Ok(length) = rustix::fs::lgetxattr(&path, "user.note", &mut value) else { continue };
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::lsetxattr(&path, "trusted.node-image-pivot.user.note", &value[..length], flags).unwrap();
            rustix::fs::lremovexattr(&path, "user.note").unwrap();
        }
    }
}

/// A pull of the same layers with a policy relabels the files that the earlier image has without labels.
#[tokio::test(flavor = "multi_thread")]
async fn relabelling_removes_no_object_of_an_earlier_image() {
    let bench = Bench::new();
    let store = bench.store("store", None);
    for (name, layers) in [("unlabelled", vec![system()]), ("labelled", vec![system(), policy("test", CONTEXTS)])] {
        let spec = bench.push(&of(&layers), &format!("published:{name}"));
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        fsck(store.repo_path());
    }
}
