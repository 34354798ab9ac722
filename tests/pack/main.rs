//! Tests of `node-image-pivot pack`: real cpio unpacks the archive, and `carry.sh` in it hands the agent to a root;
//! `ignition-config` accepts the fragment.
#![allow(clippy::unwrap_used)]

mod ignition;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A program of this machine in place of the two binaries, which are large. `--version` succeeds.
const STAND_IN: &str = "/usr/bin/true";
/// Lets writes beyond a number of 512 bytes fail, in a shell.
const LIMITED: &str = "trap '' XFSZ; ulimit -f";
const ARCHIVE_SCRIPT: &str = "usr/lib/node-image-pivot/carry.sh";

/// A directory with an installation, a configuration and credentials.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        bench.copy(STAND_IN, "installed/usr/bin/node-image-pivot");
        bench.copy(STAND_IN, "installed/usr/lib/systemd/system-generators/node-image-pivot-generator");
        bench.put("config/50-image.toml", "image = \"registry.example.test/node:1\"\n");
        bench.put("auth.json", "{\"auths\": {}}\n");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn make_parent(&self, name: &str) -> PathBuf {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        self.path(name)
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.make_parent(name), text).unwrap();
    }

    fn copy(&self, from: &str, name: &str) {
        fs::copy(from, self.make_parent(name)).unwrap();
    }

    /// Runs `pack` with these words in this directory.
    fn pack(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_node-image-pivot"));
        command.arg("pack").args(words.split(' ')).current_dir(self.0.path()).output().unwrap()
    }

    /// Packs an archive with everything, and unpacks it with cpio into a directory.
    fn unpacked(&self, name: &str) -> PathBuf {
        succeeds(&self.pack("initrd --root installed --config config --auth auth.json --output archive"));
        let directory = self.path(name);
        fs::create_dir_all(&directory).unwrap();
        shell(&directory, "gzip -dc ../archive | cpio --quiet -idm");
        directory
    }
}

fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Runs a shell command in a directory and returns its output.
fn shell(directory: &Path, command: &str) -> String {
    succeeds(&Command::new("sh").args(["-euc", command]).current_dir(directory).output().unwrap())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Returns the paths of all files and links below a directory.
fn files(directory: &Path) -> BTreeSet<String> {
    let list = shell(directory, "find . ! -type d -printf '%P\\n'");
    list.lines().map(str::to_owned).collect()
}

#[test]
fn cpio_unpacks_the_archive() {
    let bench = Bench::new();
    let unpacked = bench.unpacked("unpacked");
    let wants = unpacked.join("etc/systemd/system/initrd.target.wants/node-image-pivot-carry.service");
    assert_eq!(fs::canonicalize(&wants).unwrap(), unpacked.join("etc/systemd/system/node-image-pivot-carry.service"));
    assert!(
        fs::read_to_string(&wants).unwrap().contains("\nTimeoutStartSec="),
        "the boot does not wait without a limit"
    );
    let carried = unpacked.join("usr/lib/node-image-pivot/carry");
    let agent = carried.join("agent/node-image-pivot/bin/node-image-pivot");
    assert_eq!(fs::read(&agent).unwrap(), fs::read(STAND_IN).unwrap());
    assert_eq!(mode(&agent), 0o755);
    let list = shell(bench.0.path(), "gzip -dc archive | cpio --quiet -tvn");
    for line in list.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        assert_eq!(fields[2..4], ["0", "0"], "root owns {line}");
        assert!(line.contains("1970"), "no time is recorded: {line}");
    }
}

/// The kernel accepts an uncompressed archive after this one only at a multiple of four bytes.
#[test]
fn equal_parts_give_equal_bytes_of_an_aligned_size() {
    let bench = Bench::new();
    let words = ["initrd --output", "ignition --output"];
    for (form, words) in words.iter().enumerate() {
        let mut packed = ["one", "two"].map(|name| {
            let file = format!("{name}-{form}");
            succeeds(&bench.pack(&format!("{words} {file} --root installed --config config --auth auth.json")));
            fs::read(bench.path(&file)).unwrap()
        });
        assert!(packed[0] == packed[1], "{words}");
        let printed = bench.pack(&format!("{words} - --root installed --config config --auth auth.json"));
        assert!(printed.status.success() && printed.stdout == packed[0], "{words} -");
        assert!(form > 0 || packed[0].len() % 4 == 0);
        packed[0].clear();
    }
}

#[test]
fn only_the_owner_can_read_a_package_with_secrets() {
    let bench = Bench::new();
    for form in ["initrd", "ignition"] {
        for (auth, expected) in [("", 0o644), (" --auth auth.json", 0o600)] {
            // An older file that all users can read is replaced.
            bench.put("package", "");
            succeeds(&bench.pack(&format!("{form} --root installed --output package{auth}")));
            assert_eq!(mode(&bench.path("package")), expected, "{form}{auth}");
        }
    }
    let settings = bench.unpacked("unpacked").join("usr/lib/node-image-pivot/carry/settings");
    assert_eq!(mode(&settings.join("credstore/node-image-pivot.auth")), 0o600);
    assert_eq!(mode(&settings.join("credstore")), 0o700);
}

/// A write that fails leaves the file with the mode that it had during the write.
#[test]
fn other_users_can_read_no_secret_in_a_directory_while_it_is_written() {
    let bench = Bench::new();
    let credentials = bench.path("tree/usr/lib/node-image-pivot/carry/settings/credstore");
    fs::create_dir_all(&credentials).unwrap();
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o755)).unwrap();
    bench.put("auth.json", &format!("{{\"auths\": {{}}}}{}", " ".repeat(1 << 20)));
    let pack = "pack initrd --directory tree --root installed --auth auth.json";
    let program = env!("CARGO_BIN_EXE_node-image-pivot");
    shell(bench.0.path(), &format!("umask 022; {LIMITED} 1024; ! {program} {pack}"));
    assert_eq!(mode(&credentials.join("node-image-pivot.auth")), 0o600);
    assert_eq!(mode(&credentials), 0o700, "a directory of the initramfs or of an earlier build");
}

/// The kernel follows a link of the initramfs only if the archive has no entry of that name.
#[test]
fn no_entry_replaces_a_link_of_an_initramfs_with_merged_directories() {
    let bench = Bench::new();
    let top: BTreeSet<_> =
        files(&bench.unpacked("unpacked")).iter().map(|path| path.split('/').next().unwrap().to_owned()).collect();
    assert_eq!(top, BTreeSet::from(["etc".to_owned(), "usr".to_owned()]), "bin, lib, lib64 and sbin are links there");
    assert!(
        files(&bench.path("unpacked"))
            .iter()
            .all(|path| path.starts_with("etc/systemd/system/") || path.starts_with("usr/lib/node-image-pivot/"))
    );
}

/// Adds a real root, of a live system, to an unpacked initramfs.
fn real_root(initramfs: &Path) -> PathBuf {
    let root = initramfs.join("sysroot");
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(root.join("usr/bin/skopeo"), "").unwrap();
    fs::create_dir_all(initramfs.join("run")).unwrap();
    fs::write(initramfs.join("run/ostree-live"), "").unwrap();
    root
}

/// Does what node-image-pivot-carry.service does, with a stand-in for mount and an agent that ends with `status`.
fn carry(bench: &Bench, initramfs: &Path, status: &str) -> String {
    for name in ["mount", "umount"] {
        bench.put(&format!("bin/{name}"), &format!("#!/bin/sh\necho {name} >>{}/mounts\n", initramfs.display()));
        fs::set_permissions(bench.path("bin").join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", bench.path("bin").display(), std::env::var("PATH").unwrap());
    let run = |part: &str| {
        let mut script = Command::new("sh");
        script.arg(initramfs.join(ARCHIVE_SCRIPT)).arg(part).arg(initramfs);
        script.env("PATH", &path).env("EXIT_STATUS", status).output().unwrap()
    };
    let begin = run("begin");
    assert_eq!(begin.stderr, b"");
    let said = String::from_utf8(begin.stdout).unwrap();
    assert_eq!(begin.status.success(), said.is_empty(), "status 1 skips the trial: {said}");
    said + &succeeds(&run("end"))
}

const SETTINGS: [&str; 3] = ["credstore/node-image-pivot.auth", "node-image-pivot.conf.d/50-image.toml", "ostree-live"];
const AGENT: [&str; 12] = [
    "node-image-pivot/bin/node-image-pivot",
    "node-image-pivot/bin/node-image-pivot-generator",
    "node-image-pivot/dbus/org.nodeimage.Pivot1.conf",
    "node-image-pivot/selinux/node-image-pivot-domain.cil",
    "node-image-pivot/selinux/node-image-pivot.cil",
    "systemd/system-generators/node-image-pivot-generator",
    "systemd/system/node-image-finish.service",
    "systemd/system/node-image-overlay.service",
    "systemd/system/node-image-overlay.target",
    "systemd/system/node-image-pivot.target",
    "systemd/system/node-image-pivotd.service",
    "systemd/system/node-image-pull.service",
];
const LIVE: &str = "tmpfiles.d/node-image-pivot.conf";

fn in_run<'a>(more: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    SETTINGS.into_iter().chain(more).map(str::to_owned).collect()
}

#[test]
fn the_script_carries_a_working_set_to_run() {
    let bench = Bench::new();
    let initramfs = bench.unpacked("initramfs");
    real_root(&initramfs);
    let run = initramfs.join("run");
    for _ in ["once", "and again"] {
        assert_eq!(carry(&bench, &initramfs, "0"), "node-image-pivot: carried the agent into the real root\n");
        assert_eq!(files(&run), in_run(AGENT.into_iter().chain([LIVE])));
    }
    assert_eq!(mode(&run.join("credstore/node-image-pivot.auth")), 0o600);
    assert_eq!(mode(&run.join("credstore")), 0o700);
    for program in ["node-image-pivot/bin/node-image-pivot", "systemd/system-generators/node-image-pivot-generator"] {
        assert_eq!(mode(&run.join(program)), 0o755);
    }
    let pull = fs::read_to_string(run.join("systemd/system/node-image-pull.service")).unwrap();
    assert!(pull.contains("\nExecStart=/run/node-image-pivot/bin/node-image-pivot pull\n"), "{pull}");
}

/// An installed disk keeps `/etc` and `/var`.
#[test]
fn the_script_adds_nothing_to_etc_and_var_of_an_installed_disk() {
    let bench = Bench::new();
    let initramfs = bench.unpacked("initramfs");
    real_root(&initramfs);
    fs::remove_file(initramfs.join("run/ostree-live")).unwrap();
    carry(&bench, &initramfs, "0");
    assert!(!initramfs.join("run").join(LIVE).exists());
}

/// An agent of the real root would read an incomplete configuration.
#[test]
fn a_copy_to_run_that_fails_is_reported_and_leaves_nothing() {
    for (size, incomplete) in [(10, "agent"), (8192, "configuration")] {
        let bench = Bench::new();
        bench.put("config/50-image.toml", &"#".repeat(size));
        let initramfs = bench.unpacked("initramfs");
        real_root(&initramfs);
        let carry = format!("exec 2>&1; {LIMITED} 8; sh {ARCHIVE_SCRIPT} begin . || sh {ARCHIVE_SCRIPT} end .");
        let said = shell(&initramfs, &carry);
        let (causes, message): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with("cp: "));
        assert!(!causes.is_empty(), "{incomplete}");
        assert_eq!(message, ["node-image-pivot: cannot copy the agent to /run; the boot continues without the agent"]);
        assert_eq!(files(&initramfs.join("run")), BTreeSet::from(["ostree-live".to_owned()]));
    }
}

/// The configuration does not start anything without the generator.
#[test]
fn a_root_that_cannot_run_the_agent_gets_the_reason_and_no_generator() {
    type Change = fn(&Path);
    let table: [(Change, &str, &str, &str); 4] = [
        (
            |root| fs::write(root.join("usr/bin/node-image-pivot"), "").unwrap(),
            "0",
            "the real root has an agent, which is used; only the configuration was carried",
            "",
        ),
        (
            |root| fs::remove_file(root.join("usr/bin/skopeo")).unwrap(),
            "0",
            "the agent cannot work in the real root: /usr/bin/skopeo is missing; the boot continues without the agent",
            "",
        ),
        (
            |_| (),
            "127",
            "the agent cannot run in the real root (status 127); the boot continues without the agent",
            "mount\numount\n",
        ),
        (
            |root| fs::remove_dir_all(root.join("../usr/lib/node-image-pivot/carry/units")).unwrap(),
            "0",
            "cannot carry the agent into the real root; the boot continues without it",
            "mount\numount\n",
        ),
    ];
    for (change, status, said, mounts) in table {
        let bench = Bench::new();
        let initramfs = bench.unpacked("initramfs");
        change(&real_root(&initramfs));
        assert_eq!(carry(&bench, &initramfs, status), format!("node-image-pivot: {said}\n"));
        assert_eq!(fs::read_to_string(initramfs.join("mounts")).unwrap_or_default(), mounts, "{said}");
        let found = files(&initramfs.join("run"));
        assert!(found.is_superset(&in_run([])), "{said}: {found:?}");
        assert!(!found.iter().any(|path| path.starts_with("systemd/")), "{said}: {found:?}");
    }
}

#[test]
fn wrong_input_is_refused_with_the_reason() {
    let table = [
        ("--root nothing", "cannot read nothing/usr/bin/node-image-pivot: No such file"),
        ("--root script", "cannot pack script/usr/bin/node-image-pivot: not an ELF program"),
        ("--root mixed", "cannot pack programs of different machines: the agent is for "),
        ("--root installed --config nothing", "cannot read nothing: No such file"),
        ("--root installed --config installed", "it has no *.toml file"),
        ("--root installed --config invalid", "50-image.toml: line 1, column 1: unknown field `imag`"),
        ("--root installed --auth nothing", "cannot read nothing: No such file"),
        ("--root installed --auth config/50-image.toml", "cannot pack config/50-image.toml: expected JSON: "),
        (
            "--root installed --auth list.json",
            "cannot pack list.json: expected containers-auth.json(5) with the object",
        ),
    ];
    let bench = Bench::new();
    bench.put("script/usr/bin/node-image-pivot", "#!/bin/sh\n");
    bench.copy(STAND_IN, "mixed/usr/bin/node-image-pivot");
    let mut other = fs::read(STAND_IN).unwrap();
    other[18] ^= 1;
    let name = "mixed/usr/lib/systemd/system-generators/node-image-pivot-generator";
    fs::write(bench.make_parent(name), other).unwrap();
    bench.put("invalid/50-image.toml", "imag = 1\n");
    bench.put("list.json", "[]");
    for form in ["initrd", "ignition"] {
        for (words, expected) in &table {
            let output = bench.pack(&format!("{form} --output package {words}"));
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.contains(expected) && output.status.code() == Some(1), "{words}: {said}");
            assert!(!bench.path("package").exists(), "{words}");
        }
    }
}

/// The generator is found beside the program, as cargo builds it, and in an installation.
#[test]
fn the_program_packs_itself_with_its_generator() {
    for generator in ["bin/node-image-pivot-generator", "lib/systemd/system-generators/node-image-pivot-generator"] {
        let bench = Bench::new();
        let agent = bench.make_parent("usr/bin/node-image-pivot");
        fs::hard_link(env!("CARGO_BIN_EXE_node-image-pivot"), &agent)
            .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_node-image-pivot"), &agent).map(drop))
            .unwrap();
        let pack =
            || Command::new(&agent).args(["pack", "initrd", "--directory"]).arg(bench.path("tree")).output().unwrap();
        let said = String::from_utf8(pack().stderr).unwrap();
        assert!(said.contains("cannot find the generator: ") && said.contains("or name the root"), "{said}");
        bench.copy(STAND_IN, &format!("usr/{generator}"));
        // A second time over the first one.
        for _ in 0..2 {
            succeeds(&pack());
        }
        let carried = bench.path("tree/usr/lib/node-image-pivot/carry/agent/node-image-pivot/bin/node-image-pivot");
        assert_eq!(fs::metadata(carried).unwrap().len(), fs::metadata(&agent).unwrap().len());
        assert!(bench.path("tree").join(ARCHIVE_SCRIPT).exists());
    }
}
