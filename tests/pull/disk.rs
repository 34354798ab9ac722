//! The disk store: a system's own repo, on file systems of real block devices.

use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::fixture::run_in_namespace;
use super::waits::{files_below, holder_of_the_lock, wait_for_files};
use super::*;
use ostree::gio::Cancellable;

/// A small disk with a mounted file system, whose power can be cut.
pub(super) struct Disk {
    image: PathBuf,
    dir: PathBuf,
}

impl Disk {
    pub(super) fn new(bench: &Bench, fstype: &str, mib: u64) -> Self {
        let disk = Self { image: bench.path(&format!("{fstype}.img")), dir: bench.path(&format!("{fstype}-sysroot")) };
        fs::create_dir_all(&disk.dir).unwrap();
        fs::File::create(&disk.image).unwrap().set_len(mib << 20).unwrap();
        // The commands of docs/single-node.md.
        let commands = page::commands().file_system.replace("ext4", fstype);
        let commands = commands.replace("DEVICE", disk.image.to_str().unwrap());
        run("sh", &["-ec", &commands.replace("/mnt", disk.dir.to_str().unwrap())]);
        disk
    }

    fn mount(&self) {
        run("mount", &["-o", "loop", self.image.to_str().unwrap(), self.dir.to_str().unwrap()]);
    }

    /// Cuts the power: the file system loses all that it has not written to the disk.
    pub(super) fn power_cut(&self) {
        run("xfs_io", &["-x", "-c", "shutdown", self.dir.to_str().unwrap()]);
    }

    /// Mounts it again: the file system replays its log.
    pub(super) fn power_on(&self) {
        let gone = Instant::now() + Duration::from_secs(120);
        while !Command::new("umount").arg(&self.dir).stderr(Stdio::null()).status().unwrap().success() {
            assert!(Instant::now() < gone, "{} stays busy", self.dir.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.mount();
    }

    pub(super) fn repo(&self) -> PathBuf {
        self.dir.join("ostree/repo")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.dir).status();
    }
}

/// Removes the ref and the agent's files, so that the next pull starts from the beginning.
pub(super) fn forget(store: &NodeStore) {
    store.remove_ref().unwrap();
    fs::remove_dir_all(store.root()).unwrap();
    let _ = fs::remove_dir_all(store.repo_path().join("extensions/node-image-pivot/derived"));
}

/// An installed system: a disk whose repo has the old commit, with a ref, and maybe nothing else.
pub(super) struct System {
    pub(super) disk: Disk,
    pub(super) booted: BootedRepo,
}

impl System {
    pub(super) fn install(bench: &Bench, fstype: &str, mib: u64, commit: &str) -> Self {
        let disk = Disk::new(bench, fstype, mib);
        fs::create_dir_all(disk.dir.join("ostree")).unwrap();
        let repo = Repo::create(&disk.repo());
        run("ostree", &["pull-local", repo_option(&repo.path).as_str(), bench.repo.path.to_str().unwrap(), commit]);
        run("ostree", &["refs", repo_option(&repo.path).as_str(), "--create=booted", commit]);
        rustix::fs::sync();
        let booted = BootedRepo { path: disk.repo(), commit: commit.parse().ok() };
        Self { disk, booted }
    }

    pub(super) fn store(&self) -> NodeStore {
        NodeStore::on_disk(&self.disk.repo(), None).unwrap()
    }

    /// Checks that all visible objects of the repo are complete.
    pub(super) fn is_sound(&self) {
        let repo = self.disk.repo();
        run("ostree", &["fsck", "-q", &repo_option(&repo)]);
        // fsck looks only at what complete commits need.
        let opened = ostree::Repo::new_for_path(&repo);
        opened.open(Cancellable::NONE).unwrap();
        for id in (BootedRepo { path: repo.clone(), commit: None }).content_objects().unwrap() {
            opened.fsck_object(ostree::ObjectType::File, &id.to_string(), Cancellable::NONE).unwrap();
        }
        let objects = BootedRepo { path: repo.clone(), commit: None };
        if let Some(commit) = self.store().resolve_ref().unwrap() {
            assert!(objects.object_path(&commit, ObjectType::Commit).exists(), "the ref names a commit that is there");
            // The rest of it is the kernel's modules, which the pull leaves out.
            run(
                "ostree",
                &["ls", "-R", &repo_option(&repo), "coreos/node-image", "/usr/bin", "/usr/etc", "/usr/share"],
            );
        }
    }
}

pub(super) fn repo_option(repo: &Path) -> String {
    format!("--repo={}", repo.display())
}

/// Starts the agent's pull as a separate process.
pub(super) fn spawn_pull(spec: &str, system: &System, complete: bool) -> Child {
    let (repo, commit) = (system.disk.repo(), system.booted.commit.unwrap());
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "disk::child_pull"])
        .env("PIVOT_CHILD", format!("{spec} {} {commit} {complete}", repo.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of other tests"]
async fn child_pull() {
    let Ok(arguments) = std::env::var("PIVOT_CHILD") else { return };
    let words: Vec<_> = arguments.split(' ').collect();
    let booted = BootedRepo { path: words[1].into(), commit: words[2].parse().ok() };
    let options = PullOptions { complete: words[3] == "true", ..PullOptions::default() };
    let store = NodeStore::on_disk(&booted.path, None).unwrap();
    try_pull_with(words[0], &store, Some(&booted), options).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_repo_of_the_system_stores_the_node_image_and_stays_sound() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let system = System::install(&bench, "ext4", 64, &old.commit);
    let spec = bench.push(&new, "os:2");
    let store = system.store();
    let before = system.booted.content_objects().unwrap();
    let pulled = try_pull(&spec, &store, Some(&system.booted)).await.unwrap();
    assert_eq!((pulled.objects_written, pulled.complete), (4, false), "{pulled:?}");
    assert_eq!(system.booted.content_objects().unwrap().len(), before.len() + 4);
    assert_eq!(store.content_objects().unwrap(), system.booted.content_objects().unwrap(), "nothing waits any more");
    system.is_sound();
    let option = repo_option(&system.disk.repo());
    let clean = || run("ostree", &["prune", &option, "--refs-only"]);

    // ostree's own cleaning takes nothing of it, and the next pull finds all of it.
    clean();
    assert_eq!(try_pull(&spec, &store, Some(&system.booted)).await.unwrap(), pulled);
    // The delta tree costs no content.
    let booted = overlay_root::delta::Booted::Commit(old.id());
    let keep = overlay_root::delta::Keep::default();
    let difference = overlay_root::delta::compare(&store, booted, new.id(), &keep).unwrap();
    let delta = difference.build(&store.delta_build_path()).unwrap();
    assert_eq!((delta.counts.copied, delta.counts.changed + delta.counts.added), (0, 4), "{delta:?}");
    assert_eq!(fs::metadata(store.delta_path().join("bin/kubelet")).unwrap().nlink(), 2);

    // After a reboot (another name for this boot's directory is one), the objects are still there.
    let ours = system.disk.repo().join("extensions/node-image-pivot");
    fs::rename(store.root(), ours.join("boot-another")).unwrap();
    let store = system.store();
    assert!(!ours.join("boot-another").exists() && !store.delta_path().exists());
    let again = try_pull(&spec, &store, Some(&system.booted)).await.unwrap();
    assert_eq!((again.layers_fetched, again.objects_written), (0, 0), "{again:?}");

    // Complete, for a deployment: then ostree checks all of it.
    let complete = PullOptions { complete: true, ..PullOptions::default() };
    let pulled = try_pull_with(&spec, &store, Some(&system.booted), complete).await.unwrap();
    assert!(pulled.complete && pulled.objects_written == 2, "{pulled:?}");
    system.is_sound();
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &new.commit));
    let out = bench.path("out");
    run("ostree", &["checkout", "-H", &option, "coreos/node-image", system.disk.dir.join("out").to_str().unwrap()]);
    run("ostree", &["checkout", "-U", &option, "coreos/node-image", out.to_str().unwrap()]);

    // Forgotten: ostree removes the objects that only the node image had.
    fs::remove_dir_all(system.disk.dir.join("out")).unwrap();
    forget(&store);
    run("ostree", &["refs", &option, "--delete", "ostree/container"]);
    clean();
    assert_eq!(system.booted.content_objects().unwrap(), before);
    assert_eq!(fs::read_dir(&ours).unwrap().count(), 1, "only the lock");
    system.is_sound();
}

/// `kill -9` at any moment: what others see stays sound, and the next attempt goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pull_leaves_a_sound_repo_and_is_resumed() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let system = System::install(&bench, "xfs", 320, &old.commit);
    let spec = bench.push(&new, "os:2");
    for more in [0, 1, 2, 4, 8, 16] {
        let before = files_below(&system.disk.repo());
        let mut child = spawn_pull(&spec, &system, false);
        wait_for_files(&mut child, &system.disk.repo(), before, more);
        child.kill().unwrap();
        child.wait().unwrap();
        let (all, named) =
            (system.store().content_objects().unwrap().len(), system.booted.content_objects().unwrap().len());
        println!("killed after {more} files: {named} objects, {} more wait", all - named);
        system.is_sound();
    }
    let pulled = try_pull(&spec, &system.store(), Some(&system.booted)).await.unwrap();
    assert_eq!(pulled.commit, new.id());
    system.is_sound();
}

#[test]
fn a_power_cut_leaves_a_sound_repo() {
    run_in_namespace("disk::power_cuts");
}

/// The power goes at any moment of the pull, and at every step of its end.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a_power_cut_leaves_a_sound_repo calls it"]
async fn power_cuts() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let spec = bench.push(&new, "os:2");
    let kubelet = run("ostree", &["ls", "-C", &repo_option(&bench.repo.path), &new.commit, "/usr/bin/kubelet"]);
    let kubelet = kubelet.split_whitespace().find(|word| word.len() == 64).unwrap().to_owned();
    let object = |name: &str, kind: &str| format!("objects/{}/{}.{kind}", &name[..2], &name[2..]);
    let seen = [
        format!("state/{}.commitpartial", new.commit),
        object(&kubelet, "file"),
        object(&new.commit, "commit"),
        "refs/heads/coreos/node-image".to_owned(),
    ];
    for fstype in ["ext4", "xfs"] {
        let system = System::install(&bench, fstype, 320, &old.commit);
        let before = system.booted.content_objects().unwrap();
        let moments = [1, 4, 16].map(|files| (files, None)).into_iter();
        for (files, path) in moments.chain(seen.iter().map(|path| (0, Some(path)))) {
            let already = files_below(&system.disk.repo());
            let mut child = spawn_pull(&spec, &system, false);
            wait_for_files(&mut child, &system.disk.repo(), already, files);
            while let Some(path) = path
                && !system.disk.repo().join(path).exists()
                && child.try_wait().unwrap().is_none()
            {
                std::thread::yield_now();
            }
            system.disk.power_cut();
            let ended = child.wait().unwrap();
            system.disk.power_on();
            let found = BootedRepo { path: system.disk.repo(), commit: None }.content_objects().unwrap();
            let there = seen.iter().map(|path| u8::from(system.disk.repo().join(path).exists()));
            println!(
                "{fstype}, {files} files, {path:?}: {} new objects; {:?}; {ended}",
                found.len() - before.len(),
                there.collect::<Vec<_>>()
            );
            assert!(found.is_superset(&before));
            system.is_sound();
            // For the next round, as if never pulled.
            forget(&system.store());
            run("ostree", &["prune", &repo_option(&system.disk.repo()), "--refs-only"]);
            assert_eq!(system.booted.content_objects().unwrap(), before);
        }
        let pulled = try_pull(&spec, &system.store(), Some(&system.booted)).await.unwrap();
        system.disk.power_cut();
        system.disk.power_on();
        assert_eq!(system.store().resolve_ref().unwrap(), Some(pulled.commit), "what was reported done is on the disk");
        system.is_sound();
    }
}

/// Another process prunes all the time, and removes no object that the pull has just written.
#[tokio::test(flavor = "multi_thread")]
async fn a_prune_during_a_pull_removes_nothing_of_it() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let system = System::install(&bench, "ext4", 64, &old.commit);
    let spec = bench.push(&new, "os:2");
    let (over, option) = (Arc::new(AtomicBool::new(false)), repo_option(&system.disk.repo()));
    let pruner = {
        let (over, option) = (over.clone(), option.clone());
        std::thread::spawn(move || {
            let mut rounds = 0;
            while !over.load(Ordering::SeqCst) {
                let pruned = Command::new("ostree").args(["prune", &option, "--refs-only"]).output().unwrap();
                let errors = String::from_utf8_lossy(&pruned.stderr);
                // Between listing and reading, `forget` may remove a ref.
                assert!(pruned.status.success() || errors.contains("Listing refs"), "{errors}");
                rounds += 1;
            }
            rounds
        })
    };
    for round in 0..4 {
        let store = system.store();
        let pulled = try_pull(&spec, &store, Some(&system.booted)).await.unwrap();
        assert_eq!(pulled.objects_written, 4, "round {round}: {pulled:?}");
        for path in ["/usr/bin/kubelet", "/usr/bin/ping", "/usr/share/only-in-2"] {
            run("ostree", &["cat", &option, "coreos/node-image", path]);
        }
        system.is_sound();
        forget(&store);
        run("ostree", &["prune", &option, "--refs-only"]);
    }
    over.store(true, Ordering::SeqCst);
    println!("{} prunes meanwhile", pruner.join().unwrap());
}

/// While another process prunes, the pull waits and reports for which one; and it can be cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_waits_for_the_lock_and_reports_its_holder() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let system = System::install(&bench, "ext4", 64, &old.commit);
    let spec = bench.push(&new, "os:2");
    let store = system.store();
    // A process that holds libostree's lock as a prune does, until its input ends.
    let mut holder = Command::new("python3")
        .args([
            "-c",
            "import fcntl, struct, sys\nfile = open(sys.argv[1], 'w')\n\
             fcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0))\n\
             print('held', flush=True)\nsys.stdin.read()",
        ])
        .arg(system.disk.repo().join(".lock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();

    let source = Source::open(&settings()).await.unwrap();
    let resolved = source.resolve(&spec.parse::<PullSpec>().unwrap()).await.unwrap();
    let (progress, cancel) = (Arc::new(PullProgress::default()), CancellationToken::new());
    let options = PullOptions::default();
    let pulling = pull(&source, &resolved, &store, Some(&system.booted), &options, progress.clone(), &cancel);
    let (pulled, what) = tokio::join!(pulling, async {
        let what = holder_of_the_lock(&progress).await;
        drop(holder.stdin.take());
        what
    });
    println!("waited: {what}");
    let lock = system.disk.repo().join(".lock").display().to_string();
    assert!(what.starts_with(&lock) && what.contains(&format!("pid {} (python3)", holder.id())), "{what}");
    assert_eq!(progress.waiting_for(), None);
    assert_eq!(pulled.unwrap().commit, new.id());
    holder.wait().unwrap();
    system.is_sound();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_reported_with_numbers() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let system = System::install(&bench, "ext4", 64, &old.commit);
    let spec = bench.push(&new, "os:2");
    let store = system.store();
    let filler = system.disk.dir.join("filler");
    let (free, _) = store.space().unwrap();
    let file = fs::File::create(&filler).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - (3 << 20)).unwrap();
    let told = try_pull(&spec, &store, Some(&system.booted)).await.unwrap_err();
    println!("{told}");
    assert_eq!(told.kind, Kind::NoSpace);
    for words in [
        "MiB are free, of which 3 % are reserved for the system, and",
        store.repo_path().to_str().unwrap(),
        "free some space on that disk",
    ] {
        assert!(told.to_string().contains(words), "{words}: {told}");
    }
    assert_eq!(store.resolve_ref().unwrap(), None);
    system.is_sound();
    assert!(store.content_objects().unwrap().len() > system.booted.content_objects().unwrap().len(), "some wait");
    store.discard_unpublished().unwrap();
    assert_eq!(system.store().content_objects().unwrap(), system.booted.content_objects().unwrap(), "none any more");
    drop(file);
    fs::remove_file(&filler).unwrap();
    let store = system.store();
    let pulled = try_pull(&spec, &store, Some(&system.booted)).await.unwrap();
    assert_eq!(pulled.commit, new.id());
    system.is_sound();
}
