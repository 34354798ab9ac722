//! The fragment for Ignition.

use std::collections::BTreeMap;
use std::fs;

use ignition_config::Config;
use sha2::{Digest, Sha256};

use super::{Bench, STAND_IN, shell, succeeds};

/// Packs a fragment, and returns it with the source, the compression and the hash of each file.
fn fragment(
    bench: &Bench,
    more: &str,
) -> (ignition_config::v3_4::Config, BTreeMap<String, ignition_config::v3_4::Resource>) {
    let words = format!("ignition --root installed --config config --auth auth.json --output fragment.ign{more}");
    succeeds(&bench.pack(&words));
    let text = fs::read_to_string(bench.path("fragment.ign")).unwrap();
    let (config, warnings) = Config::parse_str(&text).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    let Config::V3_4(config) = config else { panic!("another version: {config:?}") };
    let files = config.storage.iter().flat_map(|storage| storage.files.iter().flatten());
    let contents = files.map(|file| (file.path.clone(), file.contents.clone().unwrap())).collect();
    (config, contents)
}

/// Returns the content of a compressed data URL, decoded by programs of others.
fn decoded(bench: &Bench, resource: &ignition_config::v3_4::Resource) -> Vec<u8> {
    assert_eq!(resource.compression.as_deref(), Some("gzip"));
    bench.put("data", resource.source.as_ref().unwrap().strip_prefix("data:;base64,").unwrap());
    shell(bench.0.path(), "base64 -d data | gzip -dc >content");
    fs::read(bench.path("content")).unwrap()
}

#[test]
fn ignition_gets_the_same_files() {
    let bench = Bench::new();
    let (config, contents) = fragment(&bench, "");
    let expected = [
        "/etc/credstore/node-image-pivot.auth",
        "/etc/dbus-1/system.d/org.nodeimage.Pivot1.conf",
        "/etc/node-image-pivot.conf.d/50-image.toml",
        "/etc/systemd/system-generators/node-image-pivot-generator",
        "/etc/systemd/system/node-image-finish.service",
        "/etc/systemd/system/node-image-overlay.service",
        "/etc/systemd/system/node-image-pivot.target",
        "/etc/systemd/system/node-image-pivotd.service",
        "/etc/systemd/system/node-image-pull.service",
        "/var/usrlocal/bin/node-image-pivot",
        "/var/usrlocal/share/selinux/packages/node-image-pivot-domain.cil",
        "/var/usrlocal/share/selinux/packages/node-image-pivot.cil",
    ];
    assert_eq!(contents.keys().map(String::as_str).collect::<Vec<_>>(), expected);
    let program = fs::read(STAND_IN).unwrap();
    assert!(decoded(&bench, &contents["/var/usrlocal/bin/node-image-pivot"]) == program);
    assert!(decoded(&bench, &contents["/etc/systemd/system-generators/node-image-pivot-generator"]) == program);
    assert_eq!(decoded(&bench, &contents["/etc/credstore/node-image-pivot.auth"]), b"{\"auths\": {}}\n");
    let pull = String::from_utf8(decoded(&bench, &contents["/etc/systemd/system/node-image-pull.service"])).unwrap();
    assert!(pull.contains("\nExecStart=/var/usrlocal/bin/node-image-pivot pull\n"), "{pull}");

    let storage = config.storage.unwrap();
    let modes: BTreeMap<_, _> =
        storage.files.unwrap().into_iter().map(|file| (file.path, file.mode.unwrap())).collect();
    assert_eq!(modes["/var/usrlocal/bin/node-image-pivot"], 0o755);
    assert_eq!(modes["/etc/credstore/node-image-pivot.auth"], 0o600);
    let directories: Vec<_> = storage.directories.unwrap().into_iter().map(|one| (one.path, one.mode)).collect();
    assert_eq!(directories, [("/etc/credstore".to_owned(), Some(0o700))]);
    let links: Vec<_> = storage.links.unwrap().into_iter().map(|link| (link.path, link.target.unwrap())).collect();
    let alias = ("/etc/systemd/system/node-image-overlay.target".to_owned(), "node-image-pivot.target".to_owned());
    assert_eq!(links, [alias]);
}

#[test]
fn ignition_fetches_the_programs_from_a_url_and_verifies_them() {
    let bench = Bench::new();
    let (_, contents) = fragment(&bench, " --url https://example.test/agent/");
    let hash = format!("sha256-{}", hex::encode(Sha256::digest(fs::read(STAND_IN).unwrap())));
    let remote: Vec<_> =
        contents.values().filter(|content| !content.source.as_ref().unwrap().starts_with("data:")).collect();
    assert_eq!(
        remote.iter().map(|content| content.source.as_deref().unwrap()).collect::<Vec<_>>(),
        ["https://example.test/agent/node-image-pivot-generator", "https://example.test/agent/node-image-pivot"]
    );
    for content in remote {
        assert_eq!(content.verification.as_ref().unwrap().hash.as_deref(), Some(hash.as_str()));
        assert_eq!(content.compression, None);
    }
    // An ISO reserves a small area.
    assert!(fs::metadata(bench.path("fragment.ign")).unwrap().len() < 128 << 10);
}

/// Ignition refuses a version that is newer than itself.
#[test]
fn an_older_version_of_the_specification_has_the_same_content() {
    let bench = Bench::new();
    let pack = |more: &str| {
        succeeds(&bench.pack(&format!("ignition --root installed --config config --output fragment.ign{more}")));
        fs::read_to_string(bench.path("fragment.ign")).unwrap()
    };
    let newest = pack("");
    for version in ["3.2.0", "3.3.0", "3.4.0"] {
        let text = pack(&format!(" --spec {version}"));
        assert_eq!(text.replace(version, "3.4.0"), newest);
        let (config, warnings) = Config::parse_str(&text).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let read = match config {
            Config::V3_2(config) => config.ignition.version,
            Config::V3_3(config) => config.ignition.version,
            Config::V3_4(config) => Some(config.ignition.version),
            other => panic!("another version: {other:?}"),
        };
        assert_eq!(read.as_deref(), Some(version));
    }
}

#[test]
fn the_butane_example_has_a_valid_configuration() {
    let bench = Bench::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/ignition/bootstrap.bu");
    let example = fs::read_to_string(example).unwrap();
    let (_, inline) = example.split_once("path: /etc/node-image-pivot.conf.d/50-image.toml\n").unwrap();
    let (_, inline) = inline.split_once("inline: |\n").unwrap();
    bench.put("config/50-image.toml", inline.lines().next().unwrap().trim_start());
    let (_, contents) = fragment(&bench, "");
    assert!(contents.contains_key("/etc/node-image-pivot.conf.d/50-image.toml"));
}
