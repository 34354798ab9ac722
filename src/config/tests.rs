#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::settings::{OsMismatch, RamLimit};
use super::*;
use node_store::store::Wish;
use unit_refresh::Policy;

impl Settings {
    /// Returns the settings of the system below `root` with this kernel command line and an empty environment. Paths in
    /// the result do not include `root`.
    pub(crate) fn load_from(root: &Path, cmdline: &str) -> Result<Self> {
        Self::load_with(root, &CommandLine::parse(cmdline), &Environment::default())
    }
}

/// Creates a root with drop-in files: (directory, name, text).
fn root(files: &[(&str, &str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (directory, name, text) in files {
        let directory = root.path().join(directory).join("node-image-pivot.conf.d");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), text).unwrap();
    }
    root
}

fn load(files: &[(&str, &str, &str)], cmdline: &str) -> Result<Settings> {
    Settings::load_from(root(files).path(), cmdline)
}

fn etc(text: &str) -> Result<Settings> {
    load(&[("etc", "50.toml", text)], "")
}

fn image(name: &str) -> Option<ImageSource> {
    Some(ImageSource::Image(name.parse().unwrap()))
}

fn release(name: &str) -> Option<ImageSource> {
    Some(ImageSource::Release(name.parse().unwrap()))
}

#[test]
fn nothing_configured_gives_the_documented_defaults() {
    let expected = Settings {
        image: None,
        image_tags: None,
        os_mismatch: OsMismatch::Refuse,
        mode: Mode::Auto,
        target: "multi-user.target".to_owned(),
        probe_paths: ["/usr/bin/oc", "/usr/bin/kubelet"].map(PathBuf::from).to_vec(),
        registry: Registry {
            auth_file: None,
            retry: Retry {
                initial: Duration::from_secs(2),
                maximum: Duration::from_secs(60),
                attempts: 0,
                denied: Duration::from_secs(120),
                unknown: Duration::from_secs(1800),
            },
        },
        complete: false,
        store: StoreSettings { place: Wish::Auto, ram_limit: RamLimit::Percent(60) },
        etc_strategy: EtcStrategy::Keep,
        hooks_timeout: Duration::from_secs(120),
        units: Policy::default(),
    };
    assert_eq!(load(&[], "quiet").unwrap(), expected);
}

#[test]
fn every_key_is_read() {
    let settings = etc("image = \"r.io/n:1\"\nimage_tags = [\"a\"]\nos_mismatch = \"warn\"\nmode = \"force\"\ntarget = \"a.target\"\n\
         probe_paths = [\"/usr/bin/crio\"]\nauth_file = \"/etc/auth.json\"\nram_limit = \"3GiB\"\nstore = \"disk\"\n\
         complete = true\n[retry]\ninitial = 0.5\nmaximum = 8\nattempts = 3\ndenied = 0\nunknown = 60\n[etc]\nstrategy = \"fail\"\n\
         [hooks]\ntimeout = 5\n[units]\n\"crio*\" = \"never\"\n")
    .unwrap();
    let expected = Settings {
        image: image("r.io/n:1"),
        image_tags: Some(vec!["a".to_owned()]),
        os_mismatch: OsMismatch::Warn,
        mode: Mode::Force,
        target: "a.target".to_owned(),
        probe_paths: vec![PathBuf::from("/usr/bin/crio")],
        registry: Registry {
            auth_file: Some(PathBuf::from("/etc/auth.json")),
            retry: Retry {
                initial: Duration::from_millis(500),
                maximum: Duration::from_secs(8),
                attempts: 3,
                denied: Duration::ZERO,
                unknown: Duration::from_secs(60),
            },
        },
        complete: true,
        store: StoreSettings { place: Wish::Disk, ram_limit: RamLimit::Bytes(3 << 30) },
        etc_strategy: EtcStrategy::Fail,
        hooks_timeout: Duration::from_secs(5),
        units: Policy::new([("crio*", "never")]).unwrap(),
    };
    assert_eq!(settings, expected);
}

#[test]
fn the_last_source_with_an_image_wins() {
    let vendor = ("usr/lib", "10.toml", "image = \"r.io/vendor:1\"");
    for (files, cmdline, expected) in [
        (vec![vendor], "", image("r.io/vendor:1")),
        (vec![vendor, ("etc", "20.toml", "release_image = \"r.io/etc:1\"")], "", release("r.io/etc:1")),
        (vec![vendor, ("etc", "05.toml", "release_image = \"r.io/etc:1\"")], "", image("r.io/vendor:1")),
        (vec![vendor, ("run", "10.toml", "mode = \"auto\"")], "", None),
        (vec![vendor, ("etc", "20.toml", "image = \"\"")], "", None),
        (vec![vendor, ("etc", "20.toml", "image = \"\"\nrelease_image = \"r.io/etc:1\"")], "", release("r.io/etc:1")),
        (vec![vendor], "node-image-pivot.release-image=r.io/line:1", release("r.io/line:1")),
        (vec![vendor], "node-image-pivot.image=", image("r.io/vendor:1")),
    ] {
        assert_eq!(load(&files, cmdline).unwrap().image, expected, "{files:?} {cmdline}");
    }
}

#[test]
fn another_system_is_permitted_by_the_key_or_by_a_named_image() {
    for (text, permitted) in [
        ("", false),
        ("release_image = \"r.io/n:1\"", false),
        ("image = \"r.io/n:1\"", true),
        ("release_image = \"r.io/n:1\"\nos_mismatch = \"warn\"", true),
    ] {
        assert_eq!(etc(text).unwrap().permits_another_system(), permitted, "{text}");
    }
}

#[test]
fn invalid_values_name_source_key_and_expected_values() {
    for (text, expected) in [
        ("mode = \"on\"", "/etc/node-image-pivot.conf.d/50.toml: mode: unknown mode \"on\": expected auto"),
        ("image = \"a\"\nrelease_image = \"b\"", "50.toml: both image and release_image are set; remove one"),
        ("image = \"fedora\"", "50.toml: image: invalid pull spec \"fedora\": it has no registry"),
        ("image = \"oci:x\"", "its path is not absolute; write registry/name:tag"),
        ("release_image = \"q.io/x\"", "50.toml: release_image: invalid pull spec"),
        ("imgae = \"a\"", "unknown field `imgae`"),
        ("image_tags = []", "image_tags: the list is empty"),
        ("os_mismatch = \"ignore\"", "os_mismatch: unknown reaction \"ignore\": expected refuse or warn"),
        ("target = \"multi-user\"", "target: invalid target \"multi-user\": expected the name of a target"),
        ("target = \"node-image-pivot.target\"", "expected the target to isolate after the pivot"),
        ("probe_paths = [\"bin/oc\"]", "probe_paths: invalid path \"bin/oc\": expected an absolute path"),
        ("auth_file = \"auth.json\"", "auth_file: invalid path \"auth.json\": expected an absolute path"),
        ("ram_limit = \"0%\"", "ram_limit: invalid limit \"0%\": expected 1% to 95%, or a size"),
        ("ram_limit = \"96%\"", "ram_limit: invalid limit \"96%\""),
        ("store = \"tape\"", "store: unknown store \"tape\": expected auto, ram or disk"),
        ("ram_limit = 0", "ram_limit: invalid limit \"0\""),
        ("ram_limit = \"99999999999TiB\"", "invalid limit"),
        ("ram_limit = \"3 GB\"", "invalid limit"),
        ("[retry]\ninitial = 0", "retry.initial: invalid duration 0: expected seconds"),
        ("[retry]\nunknown = -1", "retry.unknown: invalid duration -1"),
        ("[retry]\nmaximum = nan", "retry.maximum: invalid duration NaN"),
        ("[retry]\nmaximum = 1e9", "invalid duration"),
        ("[hooks]\ntimeout = 0", "hooks.timeout: invalid duration 0"),
        ("[units]\n\"a.service\" = \"kill\"", "units.a.service: unknown action \"kill\": expected reload, restart"),
        ("[units]\nssh = \"never\"", "units.ssh: invalid unit pattern \"ssh\""),
        ("[units]\n\"node-image-pull.service\" = \"stop\"", "the agent's own units are never touched"),
        ("[etc]\nstrategy = \"merge\"", "etc.strategy: unknown strategy \"merge\": expected keep or fail"),
    ] {
        let message = format!("{:#}", etc(text).unwrap_err());
        assert!(message.contains(expected) && message.contains("50.toml"), "{text}: {message}");
    }
    for (cmdline, expected) in [
        ("node-image-pivot=on", "kernel command line: mode: unknown mode \"on\""),
        ("node-image-pivot.target=x", "kernel command line: target: invalid target \"x\""),
        ("node-image-pivot.imgae=x", "kernel command line: unknown key node-image-pivot.imgae"),
        (
            "node-image-pivot.image=a node-image-pivot.release-image=b",
            "kernel command line: both image and release_image are set",
        ),
    ] {
        let message = format!("{:#}", load(&[], cmdline).unwrap_err());
        assert!(message.contains(expected), "{cmdline}: {message}");
    }
}

#[test]
fn the_target_is_the_one_that_the_machine_would_have_booted_into() {
    let root = root(&[]);
    let units = root.path().join("etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    symlink("/usr/lib/systemd/system/graphical.target", units.join("default.target")).unwrap();
    let target = |cmdline, original: Option<&str>| {
        let environment = Environment { original_target: original.map(str::to_owned), ..Environment::default() };
        Settings::load_with(root.path(), &CommandLine::parse(cmdline), &environment).unwrap().target
    };
    assert_eq!(target("", None), "graphical.target");
    assert_eq!(target("", Some("a.target")), "a.target");
    assert_eq!(target("node-image-pivot.target=b.target", Some("a.target")), "b.target");
    let generated = root.path().join("run/systemd/generator.early");
    fs::create_dir_all(&generated).unwrap();
    symlink("/usr/lib/systemd/system/node-image-pivot.target", generated.join("default.target")).unwrap();
    assert_eq!(target("", Some("a.target")), "a.target", "the agent's own redirect is ignored");
    fs::remove_file(generated.join("default.target")).unwrap();
    symlink("other.target", generated.join("default.target")).unwrap();
    assert_eq!(target("", Some("a.target")), "other.target", "another generator redirected this boot");
    assert_eq!(target("node-image-pivot.target=b.target", Some("a.target")), "b.target");
}

#[test]
fn an_auth_file_that_exists_is_used_by_precedence() {
    let root = root(&[]);
    let write = |path: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{}").unwrap();
    };
    let environment =
        Environment { credentials_directory: Some(PathBuf::from("/run/credentials/d")), ..Environment::default() };
    let auth = || Settings::load_with(root.path(), &CommandLine::default(), &environment).unwrap().registry.auth_file;
    assert_eq!(auth(), None, "a credential that does not exist is not used");
    write("root/.docker/config.json");
    assert_eq!(auth().as_deref(), Some(Path::new("/root/.docker/config.json")));
    write("run/credentials/d/node-image-pivot.auth");
    assert_eq!(auth().as_deref(), Some(Path::new("/run/credentials/d/node-image-pivot.auth")));
    fs::create_dir_all(root.path().join("etc/node-image-pivot.conf.d")).unwrap();
    fs::write(root.path().join("etc/node-image-pivot.conf.d/a.toml"), "auth_file = \"/a\"").unwrap();
    assert_eq!(auth().as_deref(), Some(Path::new("/a")));
}

#[test]
fn a_later_file_replaces_single_unit_rules() {
    let vendor = ("usr/lib", "10.toml", "[units]\n\"a.service\" = \"stop\"\n\"b.service\" = \"never\"");
    let local = ("etc", "20.toml", "[units]\n\"a.service\" = \"reload\"");
    let expected = Policy::new([("a.service", "reload"), ("b.service", "never")]).unwrap();
    assert_eq!(load(&[vendor, local], "").unwrap().units, expected);
}

#[test]
fn limits_are_converted_to_bytes() {
    let limit = |text: &str| etc(&format!("ram_limit = {text}")).unwrap().store.ram_limit;
    assert_eq!(limit("\"50%\"").bytes(16 << 30), 8 << 30);
    assert_eq!(limit("4096"), RamLimit::Bytes(4096));
    assert_eq!(limit("\"512 MiB\""), RamLimit::Bytes(512 << 20));
    assert_eq!(limit("\"2TiB\"").bytes(1 << 30), 1 << 30, "limited to the machine's memory");
}

#[test]
fn the_delay_doubles_up_to_the_maximum() {
    let retry = |text: &str| etc(&format!("[retry]\n{text}")).unwrap().registry.retry;
    let seconds = |retry: &Retry, failed| retry.delay_after(failed, 0.0).map(|delay| delay.as_secs_f64());
    let standard = retry("");
    let delays: Vec<_> = (1..=7).map(|failed| seconds(&standard, failed).unwrap()).collect();
    assert_eq!(delays, [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
    assert_eq!(seconds(&standard, u32::MAX), Some(60.0), "without a limit of attempts");
    assert_eq!(standard.delay_after(1, 1.0), Some(Duration::from_millis(1500)));
    let limited = retry("attempts = 2");
    assert_eq!((seconds(&limited, 1), seconds(&limited, 2)), (Some(2.0), None));
    assert_eq!(seconds(&retry("maximum = 1"), 1), Some(1.0), "a maximum below the default initial delay");
    assert_eq!(seconds(&retry("initial = 90"), 5), Some(90.0), "an initial delay above the default maximum");
}

#[test]
fn each_configured_value_is_listed_with_its_source() {
    let text = "image = \"q.io/x:1\"\n[retry]\nattempts = 3\n[units]\n\"a.service\" = \"never\"\n";
    let root = root(&[("etc", "50-x.toml", text)]);
    let line = CommandLine::parse("node-image-pivot=force");
    let lines = Settings::inputs(root.path(), &line, &Environment::default()).unwrap().lines();
    let file = "/etc/node-image-pivot.conf.d/50-x.toml";
    for expected in [
        format!("image = \"q.io/x:1\" ({file})"),
        "mode = \"force\" (kernel command line)".to_owned(),
        format!("retry.attempts = 3 ({file})"),
        format!("units.a.service = \"never\" ({file})"),
    ] {
        assert!(lines.contains(&expected), "{expected}: {lines:?}");
    }
}
