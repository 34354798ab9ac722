//! Images on this machine, in each form that skopeo opens, with the host's skopeo and with a newer one.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::fixture::{Compress, Image, fsck, run};
use super::signed::{Trust, accept};
use super::{Bench, image};

/// Transports with their pull specs.
struct Copies(Vec<(&'static str, String)>);

impl Copies {
    /// Writes the image in all forms. The image store is a private one.
    fn of(trust: &Trust<'_>, image: &Image, name: &str) -> Self {
        let layout = trust.text(&format!("{name}-layout"));
        image.write(Path::new(&layout));
        let place = |form: &str| trust.text(&format!("{name}-{form}"));
        let copies = Self(vec![
            ("oci", format!("oci:{}:v1", place("oci"))),
            ("oci-archive", format!("oci-archive:{}:v1", place("archive.tar"))),
            ("dir", format!("dir:{}", place("dir"))),
            (
                "containers-storage",
                format!("containers-storage:[vfs@{}+{}]localhost/os:v1", place("store"), place("run")),
            ),
        ]);
        for (_, spec) in &copies.0 {
            // The newer skopeo is started through its own loader, and cannot start itself again to unpack layers.
            run("skopeo", &["copy", "--quiet", &format!("oci:{layout}"), spec]);
        }
        copies
    }
}

fn told(answer: &Value) -> &str {
    answer["told"].as_str().unwrap_or_else(|| panic!("accepted: {answer}"))
}

#[test]
fn each_form_gives_the_commit_of_the_image() {
    let bench = Bench::new();
    let trust = Trust::new(&bench);
    let compressed = image(&bench, 1, 1);
    let mut plain = compressed.clone();
    plain.layers.iter_mut().for_each(|layer| layer.compress = Compress::None);
    for (name, image, skopeo) in [
        ("new", &compressed, Some(trust.skopeo.as_path())),
        ("host", &compressed, None),
        ("host-uncompressed", &plain, None),
    ] {
        for (transport, spec) in Copies::of(&trust, image, name).0 {
            let store = format!("{name}-{transport}-pulled");
            let answer = trust.pull(&spec, &store, skopeo);
            // skopeo before 1.13 lists no layers of an image store, and finds only uncompressed ones by their names.
            if name == "host" && transport == "containers-storage" && answer["commit"].is_null() {
                assert!(told(&answer).contains("install skopeo 1.13"), "{answer}");
                assert_eq!(answer["permanent"], true, "{answer}");
                continue;
            }
            assert_eq!(answer["commit"], image.commit, "{name} {spec}: {answer}");
            fsck(&bench.path(&store).join("repo"));
            let pinned = answer["pinned"].as_str().unwrap();
            assert!(pinned.starts_with(&format!("{spec}@sha256:")), "{pinned}");
            let again = trust.pull(pinned, &format!("{store}-again"), skopeo);
            assert_eq!(again["commit"], image.commit, "by digest: {again}");
        }
    }
}

#[test]
fn altered_images_are_refused() {
    let bench = Bench::new();
    let trust = Trust::new(&bench);
    let image = image(&bench, 1, 1);
    let other = format!("sha256:{}", "0".repeat(64));
    for (which, skopeo) in [("new", Some(trust.skopeo.as_path())), ("host", None)] {
        let copies = Copies::of(&trust, &image, which);
        for (transport, spec) in &copies.0 {
            let answer = trust.pull(&format!("{spec}@{other}"), &format!("{which}-{transport}-digest"), skopeo);
            assert_eq!((&answer["kind"], &answer["permanent"]), (&json!("bad-digest"), &json!(true)), "{answer}");
            assert!(told(&answer).contains(&format!("expected {other}")), "{answer}");
        }
        // The largest file is a layer.
        for (form, spec) in [("dir", &copies.0[2].1), ("oci/blobs/sha256", &copies.0[0].1)] {
            let directory = bench.path(&format!("{which}-{form}"));
            let size = |path: &std::path::PathBuf| fs::metadata(path).unwrap().len();
            let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
            let largest = files.max_by_key(size).unwrap();
            let good = fs::read(&largest).unwrap();
            let mut altered = good.clone();
            altered[good.len() / 2] ^= 0xff;
            for (how, content, kind) in [("altered", &altered[..], "bad-digest"), ("cut", &good[..100], "truncated")] {
                fs::write(&largest, content).unwrap();
                let answer = trust.pull(spec, &format!("{which}-{}-{how}", form.replace('/', "-")), skopeo);
                assert_eq!(answer["kind"], kind, "{which} {how}: {answer}");
                assert_ne!(answer["class"], "Transient", "retries end: {answer}");
            }
        }
    }
}

#[test]
fn the_policy_applies_to_each_form() {
    let bench = Bench::new();
    let trust = Trust::new(&bench);
    let copies = Copies::of(&trust, &image(&bench, 1, 1), "image");
    for (transport, spec) in &copies.0 {
        let reject = json!([{ "type": "reject" }]);
        let policy = json!({ "default": accept(), "transports": { transport.to_owned(): { "": reject } } });
        trust.put("policy.json", &policy.to_string());
        for (which, skopeo) in [("new", Some(trust.skopeo.as_path())), ("host", None)] {
            trust.refused(&format!("{which} {transport}"), spec, skopeo);
        }
    }
}

#[test]
fn a_missing_image_is_named() {
    let bench = Bench::new();
    let trust = Trust::new(&bench);
    let copies = Copies::of(&trust, &image(&bench, 1, 1), "image");
    let nowhere = trust.text("nowhere");
    let store = format!("containers-storage:[vfs@{nowhere}+{nowhere}/run]localhost/os:v1");
    let cases = [
        (format!("oci:{nowhere}:v1"), "local", format!("{nowhere} does not exist")),
        (format!("oci-archive:{nowhere}"), "local", format!("{nowhere} does not exist")),
        (format!("dir:{nowhere}"), "local", format!("{nowhere} does not exist")),
        (store, "local", format!("{nowhere} does not exist")),
        (format!("dir:{}", trust.text("containers")), "local", "manifest.json".to_owned()),
        (copies.0[0].1.replace(":v1", ":v2"), "not-found", "v2".to_owned()),
        (copies.0[3].1.replace(":v1", ":v2"), "not-found", "v2".to_owned()),
    ];
    for (which, skopeo) in [("new", Some(trust.skopeo.as_path())), ("host", None)] {
        for (index, (spec, kind, words)) in cases.iter().enumerate() {
            let answer = trust.pull(spec, &format!("{which}-{index}"), skopeo);
            assert_eq!(answer["kind"], *kind, "{spec}: {answer}");
            assert!(told(&answer).contains(words.as_str()), "{spec}: {answer}");
        }
    }
}
