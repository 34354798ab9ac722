//! The disk of an installed system, while its machine is off.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::proc::{succeed, wait_for};

/// Shell functions: `mount_disk` mounts the disk `$disk` at /mnt, and `check_disk` checks its file systems. The partitions
/// are those that tests/bed/disk.sh makes: /boot in MiB 1 to 257, and the root behind it. Two copies of a disk, with the same
/// UUIDs, may be mounted at the same time.
const FUNCTIONS: &str = r#"
    mib=1048576
    mount_disk() {
        if [ -z "$partitioned" ]; then mount -o loop "$disk" /mnt; return; fi
        mount -t xfs -o loop,nouuid,offset=$((257 * mib)) "$disk" /mnt
        mount -o loop,offset=$mib,sizelimit=$((256 * mib)) "$disk" /mnt/boot
    }
    check_disk() {
        if [ -z "$partitioned" ]; then e2fsck -fn "$disk"; return; fi
        e2fsck -fn "$disk?offset=$mib"
        root=$(losetup --find --show --read-only --offset $((257 * mib)) "$disk")
        trap 'losetup --detach "$root"' EXIT
        xfs_repair -n "$root"
    }"#;

/// Copies the disk of an installed system to a directory. Returns the copy.
pub fn copy(installed: &Path, to: &Path) -> Result<PathBuf> {
    let disk = to.join("disk.img");
    succeed(Command::new("cp").arg("--sparse=always").arg(installed.join("disk.img")).arg(&disk))?;
    Ok(disk)
}

/// Returns true if the disk has partitions. Otherwise it is the file system of the root.
pub(crate) fn is_partitioned(disk: &Path) -> Result<bool> {
    let mut signature = [0; 2];
    File::open(disk)?.read_exact_at(&mut signature, 510)?;
    Ok(signature == [0x55, 0xaa])
}

/// Runs a shell script with [`FUNCTIONS`], in a separate mount namespace, and returns its standard output.
fn run(disk: &Path, script: &str, argument: &Path) -> Result<String> {
    let partitioned = if is_partitioned(disk)? { "yes" } else { "" };
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation", "private", "bash", "-euc", &format!("{FUNCTIONS}\n{script}"), "bash"]);
    shell.arg(argument).env("disk", disk).env("partitioned", partitioned);
    Ok(String::from_utf8(succeed(&mut shell)?.stdout)?.trim_end().to_owned())
}

/// Runs a shell script in the root of the disk, with /boot, and returns its output.
pub fn on_disk(disk: &Path, script: &str) -> Result<String> {
    run(disk, &format!("mount_disk; cd /mnt; {{ {script}\n}} 2>&1; cd /; umount --recursive /mnt"), Path::new(""))
}

/// Copies files to /var of the installed system. A file replaces a link, whose target may be a file of this machine.
pub(crate) fn put_var(disk: &Path, files: &Path) -> Result<()> {
    let copy = "cp -a --remove-destination \"$1\"/var/. /mnt/ostree/deploy/testbed/var/";
    run(disk, &format!("mount_disk; {copy}; umount --recursive /mnt"), files).map(drop)
}

/// Waits until no loop device has the disk. The kernel unmounts a file system some time after the last process of a killed
/// container has ended, and until then refuses another mount of an xfs file system with the same UUID.
pub(crate) fn wait_until_detached(disk: &Path) -> Result<()> {
    wait_for("the end of the loop devices of the disk", Duration::from_secs(180), || {
        Ok(succeed(Command::new("losetup").arg("--associated").arg(disk))?.stdout.is_empty())
    })
}

/// Checks the file systems. They must have been mounted since the last power cut, because a log is not replayed here.
pub(crate) fn check(disk: &Path) -> Result<()> {
    run(disk, "check_disk", Path::new("")).map(drop)
}

/// Returns the kernel arguments of a boot loader entry: the first one boots next.
pub fn entry(disk: &Path, number: u32) -> Result<String> {
    let script = "ls boot/loader/entries/*.conf | sort -rV | sed -n";
    on_disk(disk, &format!("{script} {number}p | xargs sed -n 's/^options //p'"))
}

/// Copies kernel and initramfs of the first boot loader entry to `vmlinuz` and `initramfs.img` in a directory, as a boot
/// loader loads them. Returns the entry's kernel arguments.
pub fn load_entry(disk: &Path, to: &Path) -> Result<String> {
    let find = r#"
        entry=$(ls boot/loader/entries/*.conf | sort -rV | head -n 1)
        field() { sed -n "s,^$1 /\(boot/\)*,boot/,p" "$entry"; }"#;
    let to = to.display();
    on_disk(disk, &format!("{find}\n cp $(field linux) '{to}/vmlinuz'; cp $(field initrd) '{to}/initramfs.img'"))?;
    entry(disk, 1)
}
