//! A deployment to the sysroot of the running system: the child process sees a deployment as its root directory, with other
//! files at `/usr`, as after a pivot.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use disk_deploy::{next_image, start_watcher};
use ostree::gio;
use overlay_root::{Namespace, with_writable};

use super::Bench;
use super::deploying::{Setup, encapsulated, pulled};
use super::derived::Labels;
use super::failing::Small;
use super::fixture::run;
use super::image_refs::sysroot;
use super::waits::files_below;

/// Runs the child in the deployment `$1` of the disk `$2`. `$3` is the node store, `$4` the directory of the program `$5`,
/// `$6` is `ro` or `rw` for /sysroot, and `$7` has the options for /boot.
const BOOTED: &str = r#"
    cd "$1"
    mkdir -p sysroot run proc dev store program var usr
    for name in bin lib lib64; do [ -L $name ] || [ -e $name ] || ln -s usr/$name $name; done
    [ -L ostree ] || ln -s sysroot/ostree ostree
    mount --bind . "$1"; cd "$1"
    mount --bind "$2" sysroot
    [ -d boot ] || mkdir boot
    mount --bind "$2/boot" boot
    mount --bind /usr usr
    mount --bind "$3" store
    mount --bind "$4" program
    mount --rbind /proc proc
    mount --rbind /dev dev
    mount -t tmpfs run run
    touch run/ostree-booted
    mount -o "remount,bind,$6" sysroot
    mount -o "remount,$7" boot
    mkdir run/outer
    pivot_root . run/outer
    exec chroot . "/program/$5" --ignored --exact deploying::child_deploy --nocapture"#;

/// Deploys `setup` to the sysroot `path` of the system that runs from the deployment `root`. `private` makes /sysroot and
/// /boot writable for the call, as the agent does.
fn deploy_from(root: &Path, setup: &Setup, path: &str, modes: [&str; 2], private: bool) -> String {
    let program = std::env::current_exe().unwrap();
    let (dir, name) = (program.parent().unwrap(), program.file_name().unwrap());
    let pinned = setup.image.pinned.to_string();
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation", "private", "bash", "-euc", BOOTED, "booted"]);
    shell.arg(root).arg(&setup.disk).arg(setup.store.root()).arg(dir).arg(name).args(modes);
    shell.env("PIVOT_CHILD", ["/store", path, &pinned, "quiet", ""].join("|"));
    if private {
        shell.env("PIVOT_PRIVATE", "1");
    }
    let output = shell.env("OSTREE_SYSROOT_DEBUG", "mutable-deployments").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text.lines().find_map(|line| line.split_once("RESULT "));
    let result = result.unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&output.stderr))).1;
    println!("{result}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    result.to_owned()
}

/// Returns the names of the threads that are in another mount namespace.
fn threads_elsewhere() -> Vec<String> {
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap().path());
    // Another thread may end meanwhile.
    let others = threads.filter(|thread| fs::read_link(thread.join("ns/mnt")).is_ok_and(|other| other != own));
    others.filter_map(|thread| fs::read_to_string(thread.join("comm")).ok()).collect()
}

/// Runs a deployment in the child as the agent does.
pub(super) fn in_private<T: Send>(deploy: impl FnOnce() -> T + Send) -> T {
    let is_first = fs::read_dir("/boot/loader/entries").unwrap().count() == 1;
    assert_eq!(next_image().is_none(), is_first, "the booted deployment is the next one");
    let own = Namespace::of(std::process::id().try_into().unwrap());
    start_watcher();
    let result = with_writable(&own, &["/sysroot", "/boot"].map(Path::new), || {
        let result = deploy();
        // libostree runs bubblewrap for an image with an SELinux policy.
        let program = gio::Subprocess::newv(&["true".as_ref()], gio::SubprocessFlags::NONE).unwrap();
        program.wait(gio::Cancellable::NONE).unwrap();
        Ok(result)
    });
    for place in ["/sysroot", "/boot"] {
        assert!(fs::write(Path::new(place).join("new"), "").is_err(), "{place} is read-only outside");
    }
    assert!(next_image().is_some_and(|image| image.contains("/os@sha256:")), "{:?}", next_image());
    // The thread of the call may end a moment later.
    let begin = Instant::now();
    while let names = threads_elsewhere()
        && !names.is_empty()
    {
        assert!(begin.elapsed() < Duration::from_secs(60), "threads that stay in the private namespace: {names:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    result.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_running_system_stays_as_the_rollback_of_the_deployed_image() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let boot = Small::mount(&bench, "boot", "64m");
    let old = pulled(&bench, &spec, disk, "first").await;
    assert!(old.deploy("root=UUID=1", "").starts_with("Deployed"));
    let root = old.deployments().remove(0);
    // /boot becomes a separate file system.
    let place = old.disk.join("boot");
    run("cp", &["-a", &format!("{}/.", place.display()), &boot.0]);
    run("mount", &["--bind", &boot.0, place.to_str().unwrap()]);
    fs::write(root.join("etc/local.conf"), "local").unwrap();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "2"), "os:2");
    let new = pulled(&bench, &spec, old.disk.clone(), "second").await;

    let before = files_below(&new.repo());
    let writable = ["rw", "bind,rw"];
    for (path, modes) in [("/", ["ro", "bind,rw"]), ("/", ["rw", "bind,ro"]), ("/sysroot", writable)] {
        let refused = deploy_from(&root, &new, path, modes, false);
        assert!(refused.starts_with("error Booted"), "{path} {modes:?}: {refused}");
    }
    let loader = ["boot/loader", "boot/hidden"].map(|path| new.disk.join(path));
    fs::rename(&loader[0], &loader[1]).unwrap();
    let refused = deploy_from(&root, &new, "/", writable, false);
    assert!(refused.starts_with("error Booted"), "without boot loader entries: {refused}");
    fs::rename(&loader[1], &loader[0]).unwrap();
    assert_eq!((files_below(&new.repo()), new.entries().len()), (before, 1), "nothing is written");

    // On CoreOS, the file system of /boot is read-only, too.
    let done = deploy_from(&root, &new, "/", ["ro", "ro"], true);
    assert!(done.starts_with("Deployed") && done.ends_with("existed: false }"), "{done}");
    assert!(deploy_from(&root, &new, "/", ["ro", "ro"], true).ends_with("existed: true }"));
    new.is_sound();
    let entries = new.entries();
    assert!(entries[0].contains(" quiet") && entries[0].contains("root=UUID=1"), "{entries:?}");
    assert_eq!((entries.len(), entries[1].contains("quiet")), (2, false), "{entries:?}");
    let deployed = new.deployments().into_iter().find(|path| *path != root).unwrap();
    assert_eq!(fs::read_to_string(deployed.join("etc/local.conf")).unwrap(), "local");
    assert_eq!(fs::read_to_string(deployed.join("etc/app/app.conf")).unwrap(), "version = 2\n");
    // A cleanup from elsewhere keeps both.
    run("ostree", &["admin", "cleanup", "--sysroot", new.disk.to_str().unwrap()]);
    assert_eq!(new.deployments().len(), 2);
    new.is_sound();
}
