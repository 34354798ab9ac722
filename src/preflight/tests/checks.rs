//! Tests of each refusal: its cause, and the remedy in its message.

#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;

use super::*;

fn mounts(lines: &str) -> Vec<Mount> {
    let root = "22 1 7:0 / / ro,relatime shared:1 - squashfs /dev/loop0 ro\n";
    overlay_root::parse(format!("{root}{lines}").as_bytes())
}

#[test]
fn a_mount_over_the_modules_is_refused() {
    for (target, refused) in [
        ("/usr/lib/modules", true),
        ("/usr/lib/modules/6.12/extra", true),
        ("/usr/lib", true),
        ("/usr/lib/modules-load.d", false),
        ("/usr/share", false),
        ("/lib/modules", false),
    ] {
        let refusal =
            check_modules(&mounts(&format!("70 22 8:1 / {target} ro - ext4 /dev/sda ro\n")), Path::new("/usr"));
        assert_eq!(refusal.is_some(), refused, "{target}");
        assert!(refusal.is_none_or(|refusal| refusal.to_string().contains(&format!("{target} is a mount point"))));
    }
}

#[test]
fn a_directory_that_hides_files_of_the_machine_in_usr_local_is_refused() {
    use std::os::unix::fs::symlink;
    let link = |usr: &Path| symlink("../var/usrlocal", usr.join("local")).unwrap();
    let directory = |usr: &Path| std::fs::create_dir_all(usr.join("local/bin")).unwrap();
    type Make<'a> = &'a dyn Fn(&Path);
    let rows: [(&str, Make<'_>, Make<'_>, Option<&str>, bool); 6] = [
        ("a file is hidden", &link, &directory, Some("bin/bootkube.sh"), true),
        ("directories only", &link, &directory, None, false),
        ("both are links", &link, &link, Some("bin/bootkube.sh"), false),
        ("the machine has a directory", &directory, &link, Some("bin/bootkube.sh"), false),
        ("both are directories", &directory, &directory, Some("bin/bootkube.sh"), false),
        ("the image has none", &link, &|_| {}, Some("bin/bootkube.sh"), false),
    ];
    for (name, booted, new, file, refused) in rows {
        let temp = tempfile::tempdir().unwrap();
        let [booted_usr, new_usr, var] = ["usr", "new", "var/usrlocal"].map(|path| temp.path().join(path));
        for directory in [&booted_usr, &new_usr, &var.join("bin")] {
            std::fs::create_dir_all(directory).unwrap();
        }
        if let Some(file) = file {
            std::fs::write(var.join(file), "").unwrap();
        }
        booted(&booted_usr);
        new(&new_usr);
        let open = |path: &Path| std::fs::File::open(path).unwrap();
        let refusal = check_local(open(&booted_usr).as_fd(), open(&new_usr).as_fd()).unwrap();
        assert_eq!(refusal.is_some(), refused, "{name}");
        if let Some(refusal) = refusal {
            let text = refusal.to_string();
            assert!(text.starts_with("/usr/local is a link to ../var/usrlocal here"), "{text}");
            assert!(text.contains("would hide /usr/local/bin/bootkube.sh of this machine"), "{text}");
        }
    }
}

/// A link to itself stands for a directory that root cannot read either.
#[test]
fn a_usr_local_that_cannot_be_read_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("local", temp.path().join("local")).unwrap();
    std::fs::create_dir_all(temp.path().join("new/local")).unwrap();
    let open = |path: &Path| std::fs::File::open(path).unwrap();
    let found = check_local(open(temp.path()).as_fd(), open(&temp.path().join("new")).as_fd());
    assert!(found.unwrap_err().to_string().contains("/usr/local"));
}

#[test]
fn an_old_kernel_is_refused() {
    let of = check_kernel;
    assert_eq!(of(Ok(()), Ok(())), None);
    assert_eq!(of(Err(Errno::NODEV), Ok(())), Some(Refusal::NoOverlay));
    assert_eq!(of(Err(Errno::PERM), Ok(())), Some(Refusal::NotAllowed));
    for (overlay, openat2, since) in [(Err(Errno::NOSYS), Ok(()), "5.2"), (Ok(()), Err(Errno::NOSYS), "5.6")] {
        let refusal = of(overlay, openat2).map(|refusal| refusal.to_string()).unwrap_or_default();
        assert!(refusal.contains(&format!("boot a bootimage with Linux {since}")), "{refusal}");
    }
    assert_eq!(of(overlay_root::overlay_support(), openat2_support()), None, "this machine");
}

#[test]
fn a_commit_for_another_machine_or_that_cannot_boot_is_refused() {
    let of = |arch: Option<&str>, bootable: Option<bool>| {
        let text = |key: &str| arch.filter(|_| key == "coreos-assembler.basearch").map(str::to_owned);
        check_metadata(&text, &|key| bootable.filter(|_| key == "ostree.bootable"), "x86_64")
    };
    assert_eq!(of(None, None), []);
    assert_eq!(of(Some("x86_64"), Some(true)), []);
    let refusals = of(Some("s390x"), Some(false));
    assert_eq!(refusals.len(), 2);
    assert!(refusals[0].to_string().contains("not bootable"));
    assert!(refusals[1].to_string().contains("commit is for s390x, and this machine is x86_64"));
}

#[test]
fn another_distribution_or_major_release_is_refused_or_reported() {
    let usr = |os_release: &str| {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(directory.path().join("lib")).expect("a directory");
        std::fs::write(directory.path().join("lib/os-release"), os_release).expect("a file");
        (std::fs::File::open(directory.path()).expect("a directory"), directory)
    };
    let el9 = usr("ID=rhel\nVERSION_ID=9.6\n");
    let look = |image: &str, permitted| check_same_system(el9.0.as_fd(), usr(image).0.as_fd(), permitted);
    for image in ["ID=rhel\nVERSION_ID=9.8\n", "NAME=x\n"] {
        assert_eq!(look(image, false), Findings::default(), "{image}");
    }
    for (image, name) in [("ID=rhel\nVERSION_ID=10.0\n", "rhel 10"), ("ID=centos\nVERSION_ID=9\n", "centos 9")] {
        let refused = look(image, false);
        let message = refused.refusals[0].to_string();
        assert!(message.contains(&format!("the node image is {name} and the booted system is rhel 9")), "{message}");
        assert!(message.contains("os_mismatch") && refused.warnings.is_empty(), "{message}");
        let permitted = look(image, true);
        assert_eq!(permitted.refusals, []);
        assert_eq!(permitted.warnings, [format!("the node image is {name} and the booted system is rhel 9")]);
    }
}

#[test]
fn an_os_release_needs_an_id() {
    for (text, expected) in [
        ("NAME=x\nID=rhel\n", true),
        ("ID=\"fedora\"", true),
        ("NAME=x\n", false),
        ("ID=\n", false),
        ("ID=\"\"\n", false),
        ("VERSION_ID=9\n", false),
        ("", false),
    ] {
        assert_eq!(names_a_system(text.as_bytes()), expected, "{text:?}");
    }
    assert!(!names_a_system(b"ID=\xff\n"));
}

#[test]
fn a_locked_or_read_only_etc_and_a_usr_that_accepts_no_overlay_are_refused() {
    use rustix::mount::{MountFlags, mount, mount_remount};
    use support::testing::private;
    private(|scratch| {
        let etc = scratch.join("etc");
        std::fs::create_dir(&etc).expect("a directory");
        mount("etc", &etc, "tmpfs", MountFlags::empty(), None).expect("a tmpfs");
        let image = || Err("not a composefs root".to_owned());
        let check = |usr: &Path| check_system(&[], usr, &etc, &image).err().unwrap_or_default();
        assert_eq!(check(scratch), []);
        for flag in ["i", "a"] {
            let chattr =
                |sign: &str| std::process::Command::new("chattr").arg(format!("{sign}{flag}")).arg(&etc).status();
            assert!(chattr("+").expect("chattr").success(), "chattr on a tmpfs needs Linux 6.6 or later");
            assert_eq!(check(scratch), [Refusal::EtcLocked]);
            assert!(chattr("-").expect("chattr").success());
        }
        // The kernel refuses an overlay although the mount table shows no reason.
        let choice = check_system(&[], Path::new("/proc"), &etc, &image).expect("a complete tree");
        assert_eq!(choice.base, Base::Bound("/proc".into()));
        assert!(choice.why_not_better.is_some_and(|why| why.contains("/proc")));
        mount_remount(&etc, MountFlags::BIND | MountFlags::RDONLY, "").expect("read-only");
        assert_eq!(check(scratch), [Refusal::EtcReadOnly]);
    });
}
