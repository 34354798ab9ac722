//! Tests of `make install`: it installs the listed files, the switch keeps them, and systemd accepts the units.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use overlay_root::delta::Keep;

/// Files that `make install` installs below `/usr`, sorted; links included.
const SHIPPED: &[&str] = &[
    "bin/node-image-pivot",
    "lib/dracut/modules.d/98node-image-pivot/module-setup.sh",
    "lib/systemd/catalog/node-image-pivot.catalog",
    "lib/systemd/system-generators/node-image-pivot-generator",
    "lib/systemd/system/node-image-finish.service",
    "lib/systemd/system/node-image-overlay.service",
    "lib/systemd/system/node-image-overlay.target",
    "lib/systemd/system/node-image-pivot.target",
    "lib/systemd/system/node-image-pivotd.service",
    "lib/systemd/system/node-image-pull.service",
    "share/bash-completion/completions/node-image-pivot",
    "share/dbus-1/system.d/org.nodeimage.Pivot1.conf",
    "share/fish/vendor_completions.d/node-image-pivot.fish",
    "share/man/man1/node-image-pivot.1",
    "share/man/man5/node-image-pivot.conf.5",
    "share/man/man8/node-image-pivotd.8",
    "share/selinux/packages/node-image-pivot-domain.cil",
    "share/selinux/packages/node-image-pivot.cil",
    "share/zsh/site-functions/_node-image-pivot",
];

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    output
}

/// Installs into a new directory.
fn installed() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let build = stand_ins();
    run(&mut install(root.path(), build.path()));
    root
}

/// Programs in place of the binaries, which need not be built for this.
fn stand_ins() -> tempfile::TempDir {
    let build = tempfile::tempdir().unwrap();
    for name in ["node-image-pivot", "node-image-pivot-generator"] {
        let path = build.path().join(name);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        // The manual page and the completions are what the program itself prints.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    build
}

/// Installs the binaries in `build` into `root`, with a umask that hides new files from other users, and an environment
/// that has variables of the same names for other programs.
fn install(root: &Path, build: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", "umask 077 && exec make \"$@\"", "sh", "-s", "-C"])
        .arg(project())
        .arg("install")
        .arg(format!("DESTDIR={}", root.display()))
        .arg(format!("BUILD={}", build.display()))
        .envs([("BUILD", "/nonexistent"), ("PREFIX", "/nonexistent")])
        // A make that runs these tests must not hand its own settings down.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    command
}

fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => pending.push(entry.path()),
                false => drop(found.insert(entry.path().strip_prefix(directory).unwrap().to_owned())),
            }
        }
    }
    found
}

#[test]
fn the_agents_list_is_what_make_installs() {
    let root = installed();
    assert_eq!(files(root.path()), SHIPPED.iter().map(|path| Path::new("usr").join(path)).collect());
    assert!(SHIPPED.is_sorted(), "the list is sorted");
}

#[test]
fn installed_files_are_readable_by_all_users() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("a name with spaces");
    run(&mut install(&root, stand_ins().path()));
    assert_eq!(files(&root).len(), SHIPPED.len());
    for path in files(&root) {
        for part in path.ancestors().map(|part| root.join(part)).filter(|part| !part.is_symlink()) {
            let mode = fs::metadata(&part).unwrap().permissions().mode();
            assert_eq!(mode & 0o044, 0o044, "{}: {mode:o}", part.display());
        }
    }
}

#[test]
fn a_prefix_that_systemd_does_not_search_is_refused() {
    let (root, build) = (tempfile::tempdir().unwrap(), stand_ins());
    let output = install(root.path(), build.path()).arg("PREFIX=/usr/local").output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot install below /usr/local: "), "{said}");
    assert_eq!(files(root.path()), BTreeSet::new());
}

/// A lock file may name a release of a dependency that needs a newer Rust than the packages declare.
#[test]
fn the_declared_rust_version_covers_all_locked_dependencies() {
    let output = run(Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version=1", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(project()));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |version: &str| -> Vec<u32> { version.split('.').take(2).map(|part| part.parse().unwrap()).collect() };
    let declared = env!("CARGO_PKG_RUST_VERSION");
    for package in metadata["packages"].as_array().unwrap() {
        let Some(needed) = package["rust_version"].as_str() else { continue };
        assert!(number(needed) <= number(declared), "{} needs Rust {needed}, declared is {declared}", package["name"]);
    }
    for (file, before) in [("packaging/rpm/node-image-pivot.spec", "cargo >= "), ("Makefile", "a Rust toolchain (")] {
        let text = fs::read_to_string(project().join(file)).unwrap();
        assert!(text.contains(&format!("{before}{declared}")), "{file} names another version of Rust than {declared}");
    }
}

#[test]
fn a_release_needs_the_same_version_in_all_files_and_in_the_tag() {
    const FILES: [&str; 6] = [
        "Cargo.toml",
        "Cargo.lock",
        "CHANGELOG.md",
        "packaging/version.sh",
        "packaging/rpm/node-image-pivot.spec",
        "packaging/debian/changelog",
    ];
    let (version, changed) = (env!("CARGO_PKG_VERSION"), "987.6.5");
    let tag = format!("v{version}");
    for (file, arguments, expected) in [
        (None, &[][..], Ok(())),
        (None, &[tag.as_str()], Ok(())),
        (None, &["v987.6.5"], Err("is not v")),
        (Some("CHANGELOG.md"), &[tag.as_str()], Err("no heading")),
        (Some("Cargo.lock"), &[], Err("Cargo.lock")),
        (Some("packaging/rpm/node-image-pivot.spec"), &[], Err("node-image-pivot.spec")),
        (Some("packaging/debian/changelog"), &[], Err("debian/changelog")),
    ] {
        let copy = tempfile::tempdir().unwrap();
        for name in FILES {
            let text = fs::read_to_string(project().join(name)).unwrap();
            let text = if file == Some(name) { text.replace(version, changed) } else { text };
            fs::create_dir_all(copy.path().join(name).parent().unwrap()).unwrap();
            fs::write(copy.path().join(name), text).unwrap();
        }
        let script = copy.path().join("packaging/version.sh");
        let output = Command::new("sh").arg(script).args(arguments).output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match expected {
            Ok(()) => assert_eq!(out.trim(), version, "{arguments:?}: {error}"),
            Err(cause) => assert!(!output.status.success() && error.contains(cause), "{file:?}: {out}{error}"),
        }
    }
}

#[test]
fn packages_are_written_to_target_or_outside_the_source_tree() {
    let copy = tempfile::tempdir().unwrap();
    let tree = copy.path().join("tree");
    fs::create_dir_all(tree.join("packaging")).unwrap();
    let build = tree.join("packaging/build.sh");
    fs::copy(project().join("packaging/build.sh"), &build).unwrap();
    std::os::unix::fs::symlink(&tree, copy.path().join("link")).unwrap();
    for (output, refused) in [
        ("/", true),
        ("tree", true),
        ("tree/target", true),
        ("tree/packages", true),
        ("tree/target/../packages", true),
        (".", true),
        ("tree/target/packages", false),
        ("packages", false),
    ] {
        for tree in ["tree", "link"] {
            let program = format!("{tree}/packaging/build.sh");
            let output = Command::new("sh").args([&program, tree, output]).current_dir(&copy).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            // The copy lacks the next script.
            let expected = if refused { "cannot write packages to" } else { "version.sh" };
            assert!(!output.status.success() && error.contains(expected) && build.exists(), "{error}");
        }
    }
}

#[test]
fn the_workflow_pins_the_compiler_and_compares_the_tag() {
    let workflow = fs::read_to_string(project().join(".github/workflows/ci.yml")).unwrap();
    let pinned = workflow.split_once("RUST: ").unwrap().1.split_whitespace().next().unwrap();
    assert!(pinned.split('.').count() == 3 && pinned.split('.').all(|part| part.parse::<u32>().is_ok()), "{pinned}");
    let check = "run: sh packaging/version.sh \"$GITHUB_REF_NAME\"";
    assert!(workflow.find(check).unwrap() < workflow.find("run: .ci/run").unwrap(), "before the long checks");
}

#[test]
fn installed_files_outlive_the_switch() {
    let keep = Keep::default();
    for path in SHIPPED {
        assert!(keep.is_kept(Path::new(path)), "/usr/{path} would be hidden by a node image that lacks it");
    }
}

#[test]
fn systemd_analyze_accepts_the_units() {
    let root = installed();
    let units = root.path().join("usr/lib/systemd/system");
    // verify looks for the program of ExecStart= on this machine; point it to the installed one.
    for unit in files(&units) {
        let path = units.join(&unit);
        if !path.is_symlink() {
            let binary = root.path().join("usr/bin/node-image-pivot");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.replace("/usr/bin/node-image-pivot", binary.to_str().unwrap())).unwrap();
        }
    }
    let names = files(&units);
    let output = run(Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=one"])
        .args(names.iter().map(|name| units.join(name)))
        .env("SYSTEMD_UNIT_PATH", format!("{}:", units.display())));
    let said = String::from_utf8(output.stderr).unwrap();
    // Units of this machine that ours pull in may have other faults.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("node-image")).collect();
    assert!(ours.is_empty(), "{}", ours.join("\n"));
}

/// Settings that other units rely on, and settings that protect the agent from the switch and the isolate.
#[test]
fn units_have_the_settings_that_others_rely_on() {
    let unit = |name: &str| fs::read_to_string(project().join("units").join(name)).unwrap();
    let has = |name: &str, line: &str| unit(name).lines().any(|l| l == line);
    let oneshots = ["node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"];
    for name in oneshots {
        for line in ["Type=oneshot", "RemainAfterExit=yes", "TimeoutStartSec=infinity"] {
            assert!(has(name, line), "{name}: {line}");
        }
        assert!(!unit(name).contains("[Install]\n"), "{name} cannot be enabled");
    }
    for name in oneshots.iter().chain(&["node-image-pivotd.service"]) {
        assert!(has(name, "IgnoreOnIsolate=yes"), "{name} survives the isolate");
        for sandbox in ["Private", "Protect", "MountFlags", "ReadOnly", "RootDirectory", "DynamicUser"] {
            let others = ["ProtectClock=", "ProtectHostname="];
            let concerned =
                |line: &str| line.starts_with(sandbox) && !others.iter().any(|other| line.starts_with(other));
            let found = unit(name).lines().any(concerned);
            assert!(!found, "{name}: {sandbox}… would give it a separate mount namespace");
        }
    }
    let pull = unit("node-image-pull.service");
    let wants: Vec<_> = pull.lines().filter_map(|line| line.strip_prefix("Wants=")).collect();
    let expected = ["node-image-pivotd.service", "network.target network-online.target"];
    assert_eq!(wants, expected, "a network manager or resolver that is disabled stays off");
    assert!(has("node-image-overlay.service", "Requires=node-image-pull.service"));
    assert!(has("node-image-finish.service", "Requires=node-image-overlay.service"));
    assert!(has("node-image-pivot.target", "AllowIsolate=yes"));
    assert!(has("node-image-pivotd.service", "RestartPreventExitStatus=2"), "wrong usage");
    assert!(has("node-image-pivotd.service", "WatchdogSec=5min"), "the agent's signs of life are read");
}

/// Names of the settings that `systemd-analyze security` misses in a unit.
fn missing_limits(unit: &str) -> Vec<String> {
    let output = run(Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--json=short"])
        .arg(project().join("units").join(unit)));
    let settings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let missing = settings.as_array().unwrap().iter().filter(|setting| setting["set"] == false);
    missing.map(|setting| setting["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_threat_model_explains_each_limit_that_a_unit_lacks() {
    let page = fs::read_to_string(project().join("docs/threat-model.md")).unwrap().replace("\\|", "|");
    let heading = "### The agent and the oneshot units";
    let section = page.split_once(heading).unwrap().1.split("\n### ").next().unwrap();
    let units = files(&project().join("units"));
    let services: Vec<_> =
        units.iter().filter_map(|unit| unit.to_str()).filter(|unit| unit.ends_with(".service")).collect();
    assert!(!services.is_empty());
    for unit in services {
        let missing = missing_limits(unit);
        assert!(!missing.is_empty(), "{unit}: systemd-analyze lists no setting");
        for setting in missing {
            assert!(section.contains(&format!("`{setting}`")), "{unit} lacks {setting}, without a reason in {heading}");
        }
    }
}

#[test]
fn a_program_that_cannot_be_read_fails_the_check_of_symbol_versions() {
    let floor = |program: &str| {
        let mut script = Command::new("sh");
        script.arg(project().join("tests/floor.sh")).arg(program).output().unwrap()
    };
    let output = floor("missing-program");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot read the symbol versions of missing-program"), "{said}");
    assert_eq!(output.status.code(), Some(1));
    assert!(floor(env!("CARGO_BIN_EXE_node-image-pivot")).status.success());
}
