//! Unusual booted repos: metadata objects that a power cut left empty, short or altered, and other modes than `bare`.

use std::fs;
use std::path::{Path, PathBuf};

use node_store::image::Kind;
use node_store::store::{BootedRepo, NodeStore, ObjectType};

use super::derived::{CONTEXTS, Labels, base, complete};
use super::fixture::{Image, listing, run};
use super::layers::{file, layer};
use super::plain::{labelled_system, of, policy};
use super::{Bench, fsck, try_pull, try_pull_with};

/// The largest object of a kind: in each, something is listed that matters.
fn largest(repo: &Path, kind: &str) -> PathBuf {
    let directories = fs::read_dir(repo.join("objects")).unwrap().flatten();
    let files = directories.flat_map(|directory| fs::read_dir(directory.path()).unwrap().flatten());
    let objects = files.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == kind));
    objects.max_by_key(|path| (path.symlink_metadata().unwrap().len(), path.clone())).unwrap()
}

fn spoil(object: &Path, how: &str) {
    let mut bytes = fs::read(object).unwrap();
    fs::remove_file(object).unwrap();
    if how == "missing" {
        return;
    }
    let third = bytes.len() / 3;
    match how {
        "empty" => bytes.clear(),
        "truncated" => bytes.truncate(third),
        _ => bytes[third] ^= 1,
    }
    fs::write(object, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_metadata_of_the_booted_repo_are_read_from_the_image() {
    let bench = Bench::new();
    let image = base(&bench, Labels::Own);
    let plain = bench.push(&image, "os:plain");
    let mut above = image.clone();
    above.layers.push(layer(&[file("usr/share/more", "more")]));
    let above = bench.push(&above, "os:above");
    let whole = bench.store("whole", None);
    let derived = try_pull_with(&above, &whole, None, complete()).await.unwrap().commit.to_string();
    for (number, (kind, how)) in [
        ("commit", "empty"),
        ("dirtree", "empty"),
        ("dirtree", "altered"),
        ("dirtree", "missing"),
        ("dirmeta", "truncated"),
        ("file", "missing"),
    ]
    .iter()
    .enumerate()
    {
        // A RAM store, and the repo itself.
        for (spec, commit, on_disk) in [(&plain, &image.commit, false), (&above, &derived, true)] {
            let path = bench.path(&format!("booted{number}-{on_disk}"));
            run("cp", &["-a", bench.repo.path.to_str().unwrap(), path.to_str().unwrap()]);
            spoil(&largest(&path, kind), how);
            let booted = BootedRepo { path: path.clone(), commit: Some(image.id()) };
            let store = match on_disk {
                false => bench.store(&format!("store{number}"), Some(&booted)),
                true => NodeStore::on_disk(&path, None).unwrap(),
            };
            let what = format!("{how} {kind}, on disk: {on_disk}");
            let pulled = try_pull_with(spec, &store, Some(&booted), complete()).await;
            let pulled = pulled.unwrap_or_else(|failure| panic!("{what}: {failure}"));
            assert_eq!(&pulled.commit.to_string(), commit, "{what}");
            assert_eq!(listing(store.repo_path(), commit), listing(whole.repo_path(), commit), "{what}");
            if on_disk {
                fsck(&path);
            }
        }
    }
}

/// The image whose policy labels programs otherwise than that of [`labelled_system`].
fn relabelling() -> Image {
    of(&[labelled_system(), policy("test", &CONTEXTS.replace("bin_t", "tool_t"))])
}

/// Every file is copied with another label, which takes its owner, mode and attributes.
#[tokio::test(flavor = "multi_thread")]
async fn booted_repos_of_other_modes_lead_to_the_same_commit() {
    let bench = Bench::new();
    let mut derived = base(&bench, Labels::Missing);
    derived.layers.push(layer(&[file("usr/share/more", "more")]));
    let below = bench.store("below", None);
    let system = try_pull_with(&bench.push(&of(&[labelled_system()]), "os:system"), &below, None, complete()).await;
    let system = (below.repo_path().to_owned(), system.unwrap().commit);
    let rows =
        [("derived", derived.clone(), (bench.repo.path.clone(), derived.id())), ("plain", relabelling(), system)];
    for (kind, image, (source, booted_commit)) in rows {
        let spec = bench.push(&image, &format!("os:{kind}"));
        let whole = bench.store(&format!("whole-{kind}"), None);
        let commit = try_pull_with(&spec, &whole, None, complete()).await.unwrap().commit.to_string();
        let expected = listing(whole.repo_path(), &commit);
        for mode in ["bare", "bare-user", "archive"] {
            let path = bench.path(&format!("{kind}-{mode}"));
            let (mode_option, repo) = (format!("--mode={mode}"), format!("--repo={}", path.display()));
            run("ostree", &["init", &mode_option, &repo]);
            run("ostree", &["pull-local", &repo, source.to_str().unwrap(), &booted_commit.to_string()]);
            let booted = BootedRepo { path, commit: Some(booted_commit) };
            let store = bench.store(&format!("store-{kind}-{mode}"), Some(&booted));
            let pulled = try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
            assert_eq!(pulled.commit.to_string(), commit, "{kind} {mode}");
            assert_eq!(listing(store.repo_path(), &commit), expected, "{kind} {mode}");
            assert_eq!(NodeStore::on_disk(&booted.path, None).is_ok(), mode == "bare", "{kind} {mode}");
        }
    }
}

/// Pulls a system whose `/usr/bin/bash` [`relabelling`] relabels. Returns the name and the path of that object.
async fn booted_bash(bench: &Bench) -> (BootedRepo, String, PathBuf) {
    let booted = bench.store("booted", None);
    let system = bench.push(&of(&[labelled_system()]), "os:system");
    let commit = try_pull_with(&system, &booted, None, complete()).await.unwrap().commit;
    let shown = run(
        "ostree",
        &["ls", "-C", "--repo", booted.repo_path().to_str().unwrap(), "coreos/node-image", "/usr/bin/bash"],
    );
    let id = shown.split_whitespace().nth(4).unwrap();
    let object = booted.object_path(&id.parse().unwrap(), ObjectType::File);
    (BootedRepo { path: booted.repo_path().to_owned(), commit: Some(commit) }, id.to_owned(), object)
}

/// A copy of a damaged object would be an object with a valid name.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_content_of_the_booted_repo_is_not_relabelled() {
    let bench = Bench::new();
    let (booted, id, object) = booted_bash(&bench).await;
    let mut content = fs::read(&object).unwrap();
    content[0] ^= 1;
    fs::write(&object, content).unwrap();
    let store = bench.store("store", Some(&booted));
    let refused = try_pull(&bench.push(&relabelling(), "os:new"), &store, Some(&booted)).await.unwrap_err();
    assert!(refused.kind == Kind::Local && refused.message.contains(&id), "{refused}");
    assert!(refused.to_string().contains("/usr/bin/bash") && refused.to_string().contains("ostree fsck"), "{refused}");
    assert_eq!(store.resolve_ref().unwrap(), None);
}

/// The kernel reports another label for such an object.
#[tokio::test(flavor = "multi_thread")]
async fn content_of_the_booted_repo_whose_label_is_not_in_the_loaded_policy_is_relabelled() {
    let bench = Bench::new();
    let (booted, _, object) = booted_bash(&bench).await;
    support::xattr::set(&object, support::xattr::LABEL, b"system_u:object_r:unlabeled_t:s0").unwrap();
    let spec = bench.push(&relabelling(), "os:new");
    let [store, whole] = [("store", Some(&booted)), ("whole", None)].map(|(name, of)| bench.store(name, of));
    let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
    assert_eq!(pulled.commit, try_pull_with(&spec, &whole, None, complete()).await.unwrap().commit);
}
