//! The switch on a composefs root: `/` is an overlay of an erofs image with all metadata and the repo's objects as
//! data-only layer.

use std::fs::File;
use std::os::unix::fs::{chown, lchown};

use rustix::fs::{CWD, XattrFlags, setxattr};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, move_mount,
};

use super::*;
use overlay_root::{Composefs, DetachedTree};

/// Writes the metadata of a commit as a composefs image. Each file is a hole with the path of its object.
fn write_image(repo: &Path, commit: &str, scratch: &Path, image: &Path) {
    let tree = scratch.join("metadata");
    let listed = ostree(&["ls", &format!("--repo={}", repo.display()), "-R", "-C", commit, "/usr"]);
    fs::create_dir(&tree).unwrap();
    for line in listed.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let [kind_and_mode, uid, gid, size, object, ..] = words[..] else { panic!("{line}") };
        let (kind, mode) = kind_and_mode.split_at(1);
        let name = words.iter().find(|word| word.starts_with('/')).unwrap();
        let path = tree.join(&name[1..]);
        let (uid, gid) = (uid.parse().ok(), gid.parse().ok());
        match kind {
            "d" => fs::create_dir_all(&path).unwrap(),
            "l" => {
                symlink(words.last().unwrap(), &path).unwrap();
                lchown(&path, uid, gid).unwrap();
                continue;
            }
            _ => {
                File::create(&path).unwrap().set_len(size.parse().unwrap()).unwrap();
                let data = format!("/{}/{}.file", &object[..2], &object[2..]);
                setxattr(&path, "trusted.overlay.redirect", data.as_bytes(), XattrFlags::empty()).unwrap();
                setxattr(&path, "trusted.overlay.metacopy", b"", XattrFlags::empty()).unwrap();
            }
        }
        chown(&path, uid, gid).unwrap();
        let mode = u32::from_str_radix(mode, 8).unwrap() & 0o7777;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let made = Command::new("mkfs.erofs").arg("--quiet").arg(image).arg(&tree).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Mounts a root as ostree-prepare-root does, and detaches its image.
fn mount_root(image: &Composefs, root: &Path) {
    let erofs = root.with_file_name("image-mount");
    fs::create_dir(&erofs).unwrap();
    fs::create_dir(root).unwrap();
    let mount = Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(&image.path).arg(&erofs).status();
    assert!(mount.unwrap().success());
    let overlay = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in [
        ("source", Path::new("composefs")),
        ("redirect_dir", Path::new("on")),
        ("metacopy", Path::new("on")),
        ("lowerdir+", &erofs),
        ("datadir+", &image.objects),
    ] {
        fsconfig_set_string(&overlay, key, value).unwrap();
    }
    fsconfig_create(&overlay).unwrap();
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let tree = rustix::mount::fsmount(&overlay, FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
    move_mount(&tree, "", CWD, root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
    rustix::mount::unmount(&erofs, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Returns a booted system with a composefs root whose image is in `directory`.
fn machine<'a>(scratch: &'a Path, directory: &Path) -> Machine<'a> {
    Machine::booted(scratch, |repo, commit| {
        let image = Composefs { path: directory.join("booted.cfs"), objects: repo.join("objects") };
        write_image(repo, commit, scratch, &image.path);
        mount_root(&image, &scratch.join("root"));
        (scratch.join("root/usr"), Base::Composefs(image))
    })
}

/// Mounts another overlay over `usr`, as `systemd-sysext`, `podman -v …:O` and `bootc usr-overlay` do.
fn stack(scratch: &Path, usr: &Path) -> anyhow::Result<DetachedTree> {
    let top = scratch.join("extension");
    write(&top, &[("bin/extension", "more")]);
    let tree = DetachedTree::overlay(&[&top, usr], "extension");
    fs::remove_dir_all(&top).unwrap();
    tree
}

#[test]
fn an_overlay_fits_on_the_new_usr_of_a_composefs_root() {
    private(|scratch| {
        // The image on a tmpfs can be mounted only through a loop device, and the one on a disk also directly.
        let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for (name, directory) in [("ram", scratch), ("disk", disk.path())] {
            let scratch = scratch.join(name);
            fs::create_dir(&scratch).unwrap();
            let machine = machine(&scratch, directory);
            let mounts = here().mounts().unwrap();
            assert!(overlay_root::is_data_overlay(&mounts, &machine.usr));
            assert!(machine.base.probe().unwrap(), "{name}: room for another overlay");
            assert!(!Base::Directory(machine.usr.clone()).probe().unwrap(), "{name}: no room after a stacked one");

            machine.switch();
            machine.compare();
            assert_eq!(here().mounts().unwrap().len(), mounts.len() + 1, "{name}: no mount is left");
            assert_eq!(overlay_root::overlay_stack(&here().mounts().unwrap(), &machine.usr).len(), 1);
            assert!(stack(&scratch, &machine.usr).is_ok(), "{name}");
            machine.undo();
            assert_eq!(describe(&machine.usr), machine.booted_usr);
            assert_eq!(describe(&machine.etc), machine.local_etc);
            assert_eq!(here().mounts().unwrap(), mounts);
        }
    });
}

#[test]
fn nothing_fits_on_a_new_usr_that_is_stacked_on_a_composefs_root() {
    private(|scratch| {
        let mut machine = machine(scratch, scratch);
        machine.base = Base::Directory(machine.usr.clone());
        machine.switch();
        machine.compare();
        assert!(stack(scratch, &machine.usr).is_err());
        machine.undo();
        assert_eq!(describe(&machine.usr), machine.booted_usr);
    });
}

#[test]
fn system_extensions_are_merged_on_the_new_usr_of_a_composefs_root() {
    private(|scratch| {
        let machine = machine(scratch, scratch);
        machine.switch();
        // systemd-sysext mounts in a namespace of its own, and its mounts propagate from there.
        rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
        rustix::mount::mount("run", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
        let extension = Path::new("/run/extensions/more");
        write(extension, &[("usr/lib/extension-release.d/extension-release.more", "ID=_any\n")]);
        write(&extension.join(machine.usr.strip_prefix("/").unwrap()), &[("bin/extension", "more")]);
        let sysext = |verb: &str| {
            let mut command = Command::new("systemd-sysext");
            let ran = command.arg(verb).env("SYSTEMD_SYSEXT_HIERARCHIES", &machine.usr).output().unwrap();
            assert!(ran.status.success(), "{verb}: {}", String::from_utf8_lossy(&ran.stderr));
        };
        sysext("merge");
        assert_eq!(fs::read_to_string(machine.usr.join("bin/extension")).unwrap(), "more");
        assert_eq!(fs::read_to_string(machine.usr.join("bin/bash")).unwrap(), "bash 6");
        sysext("unmerge");
        machine.compare();
        machine.undo();
        assert_eq!(describe(&machine.usr), machine.booted_usr);
    });
}
