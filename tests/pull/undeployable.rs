//! Disks and images that `deploy` refuses before it writes anything.

use std::fs;

use super::Bench;
use super::deploying::{encapsulated, pulled};
use super::derived::{Labels, changed_base};
use super::failing::Small;
use super::fixture::run;
use super::image_refs::sysroot;
use super::waits::files_below;

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_cannot_get_the_deployment_are_refused_and_unchanged() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, mount) = sysroot(&bench, "disk", "3m");
    let mut setup = pulled(&bench, &spec, disk, "store").await;
    let before = files_below(&setup.disk);
    let refused = setup.deploy("", "");
    assert!(refused.starts_with("error TooLittle") && refused.contains("for objects"), "{refused}");
    assert_eq!(files_below(&setup.disk), before, "nothing is written");
    let used: u64 = run("df", &["--output=iused", &mount.0]).split_whitespace().nth(1).unwrap().parse().unwrap();
    run("mount", &["-o", &format!("remount,size=64m,nr_inodes={}", used + 30), &mount.0]);
    let refused = setup.deploy("", "");
    assert!(refused.starts_with("error TooFewInodes"), "{refused}");
    run("mount", &["-o", "remount,nr_inodes=100000", &mount.0]);
    let boot = Small::mount(&bench, "disk/boot", "4k");
    let refused = setup.deploy("", "");
    assert!(refused.starts_with("error TooLittle") && refused.contains("for the kernel"), "{refused}");
    drop(boot);
    assert_eq!(files_below(&setup.disk), before, "nothing is written");
    fs::rename(setup.disk.join("ostree/deploy/node"), setup.disk.join("ostree/deploy/other")).unwrap();
    assert!(setup.deploy("", "").starts_with("error NoStateroot"));
    fs::rename(setup.disk.join("ostree/deploy/other"), setup.disk.join("ostree/deploy/node")).unwrap();
    let disk = std::mem::replace(&mut setup.disk, bench.path("nothing"));
    assert!(setup.deploy("", "").starts_with("error NoSysroot"));
    setup.disk = disk;
    let (config, before) = (setup.repo().join("config"), files_below(&setup.disk));
    let plain = fs::read_to_string(&config).unwrap();
    for (keys, refused) in [("fsverity=yes", true), ("fsverity=true\ncomposefs=yes", true), ("fsverity=maybe", false)] {
        fs::write(&config, format!("{plain}\n[ex-integrity]\n{keys}\n")).unwrap();
        assert!(!refused || setup.deploy("", "").starts_with("error Sealed"), "{keys}");
        assert!(!refused || files_below(&setup.disk) == before, "{keys}: nothing is written");
    }
    assert!(setup.deploy("", "").starts_with("Deployed"));
    setup.is_sound();
}

/// Its root would read no file.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_verified_root_is_refused_where_no_object_can_get_fs_verity() {
    for files in [&[("usr/lib", "verity")][..], &[("usr/lib", "yes"), ("usr/etc", "verity")]] {
        let bench = Bench::new();
        let image = changed_base(&bench, Labels::None, &format!("-bootable-verified-{}", files.len()), &|path| {
            for (dir, word) in files {
                let dir = path.join(dir).join("ostree");
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("prepare-root.conf"), format!("[composefs]\nenabled={word}\n")).unwrap();
            }
        });
        let (disk, _mount) = sysroot(&bench, "disk", "64m");
        let setup = pulled(&bench, &bench.push(&image, "os:1"), disk, "store").await;
        let before = files_below(&setup.disk);
        let refused = setup.deploy("", "");
        assert!(refused.starts_with("error Sealed") && refused.contains("prepare-root.conf"), "{refused}");
        assert_eq!(files_below(&setup.disk), before, "nothing is written");
    }
}

/// libostree removes all deployments that it does not find.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_boot_is_not_mounted_is_refused_and_unchanged() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let first = pulled(&bench, &spec, disk, "first").await;
    assert!(first.deploy("", "").starts_with("Deployed"));
    let spec = bench.push(&encapsulated(&bench, Labels::None, "2"), "os:2");
    let second = pulled(&bench, &spec, first.disk.clone(), "second").await;
    let boot = ["boot", "hidden"].map(|name| first.disk.join(name));
    fs::rename(&boot[0], &boot[1]).unwrap();
    fs::create_dir(&boot[0]).unwrap();
    let before = files_below(&first.disk);
    for setup in [&second, &first] {
        let refused = setup.deploy("", "");
        assert!(refused.starts_with("error NoBoot") && refused.contains("/disk/boot;"), "{refused}");
    }
    assert_eq!(files_below(&first.disk), before, "nothing is written");
    fs::remove_dir(&boot[0]).unwrap();
    fs::rename(&boot[1], &boot[0]).unwrap();
    assert!(second.deploy("", "").starts_with("Deployed"));
    second.is_sound();
    assert_eq!(second.entries().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_which_objects_are_missing_is_not_written() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let setup = pulled(&bench, &spec, disk, "store").await;
    let object = run("find", &[setup.store.repo_path().to_str().unwrap(), "-name", "*.file"]);
    fs::remove_file(object.lines().next().unwrap()).unwrap();
    let before = files_below(&setup.disk);
    let failed = setup.deploy("", "");
    assert!(failed.contains("neither the node store nor the booted repo has it"), "{failed}");
    assert_eq!(files_below(&setup.disk), before, "nothing is written");
}
