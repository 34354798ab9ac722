//! Issue 4, item 7 on a real machine: a system that was installed to a disk becomes the node image, through power cuts,
//! and stays a system that ostree can clean, check and deploy to.
//! `cargo test -p testbed --test disk -- --nocapture`

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::{succeed, wait_for};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, node_files, wait_pivoted};
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(240);
const PIVOT: Duration = Duration::from_secs(420);
const OURS: &str = "/sysroot/ostree/repo/extensions/node-image-pivot";

/// What a shell script finds on the disk of a machine that is off: `$PWD` is its root.
fn on_disk(disk: &Path, script: &str) -> Result<String> {
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation", "private", "bash", "-euc"]);
    shell.arg(format!("mount -o loop \"$0\" /mnt; cd /mnt; {{ {script}; }} 2>&1; cd /; umount /mnt")).arg(disk);
    Ok(String::from_utf8(succeed(&mut shell)?.stdout)?.trim_end().to_owned())
}

/// Everything that is visible in the repo is whole, whatever has happened.
fn sound(disk: &Path) -> Result<()> {
    on_disk(disk, "ostree fsck -q --repo=ostree/repo").map(drop)
}

#[test]
fn an_installed_system_pivots_and_stays_one() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b")?);
    let mut checks = Checks::new("machine: installed to a disk, power cuts, node image b");
    let registry = Registry::start(&images.storage, &work_dir("vm-disk-registry")?, None, None)?;
    let (installed, work) = (images.disk()?, work_dir("vm-disk-image")?);
    let disk = work.join("disk.img");
    succeed(Command::new("cp").arg("--sparse=always").arg(installed.join("disk.img")).arg(&disk))?;
    let start = |kargs: &str| {
        let limit = Duration::from_secs(700);
        let (boot, disk, kargs) = (installed.as_path(), Some(disk.as_path()), [kargs.trim()]);
        let setup = vm::Setup { name: "vm-disk", boot, disk, kargs: &kargs, memory_mib: 2048, cpu: vm::CPU, limit };
        Vm::start(images, &setup, |files| node_files(files, &expected.image.by_digest(), vm::HOST, registry.port))
    };
    let kargs = std::fs::read_to_string(installed.join("kargs"))?;

    let guest = start(&kargs)?;
    if !checks.check("ssh answers", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    checks.check("the power goes in the middle of the pull", || {
        wait_for("objects", Duration::from_secs(240), || {
            Ok(guest.status()?["progress"]["objects_done"].as_u64().unwrap_or(0) >= 100)
        })?;
        guest.ask(&format!("test -d {OURS}/boot-*/incoming")).map(drop)
    });
    guest.power_cut();
    checks.check("nothing of it is visible, and the repo is sound", || {
        same(on_disk(&disk, "ostree refs --repo=ostree/repo --list coreos")?, String::new())?;
        sound(&disk)
    });

    let guest = start(&kargs)?;
    if !checks.check("it comes up again", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    let before = Before::of(&guest);
    checks.check("it is the base system again", || before.map(drop));
    if !checks.check("it becomes the node image", || wait_pivoted(&guest, &Checks::new("progress"), PIVOT)) {
        return checks.finish();
    }
    becomes(&guest, &expected, &mut checks);
    costs_one_copy(&guest, &mut checks);
    stays_ostrees(&guest, &mut checks);
    guest.power_cut();

    checks.check("after another power cut, the repo is sound", || sound(&disk));
    let kargs = on_disk(&disk, "grep -ho 'ostree=[^ ]*' boot/loader/entries/*.conf | sort | head -n 1")?;
    let guest = start(&kargs)?;
    if !checks.check("the new deployment boots", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    checks.check("it is the one that was deployed", || {
        let later = guest.ask("ostree rev-parse --repo=/sysroot/ostree/repo later")?;
        contains(&guest.ask("ostree admin status")?, &format!("* testbed {later}"))
    });
    if checks.check("it becomes the node image", || wait_pivoted(&guest, &Checks::new("progress"), PIVOT)) {
        becomes(&guest, &expected, &mut checks);
        checks.check("and fetched no layer: all objects were there", || {
            same(guest.status()?["cost"]["bytes_fetched"].as_u64(), Some(0))
        });
        checks.check("of the last boot, nothing is left", || one_boot(&guest));
        installed_to_the_existing_root(&guest, &mut checks);
    }
    checks.finish()
}

fn becomes(guest: &Vm, expected: &Expected<'_>, checks: &mut Checks) {
    checks.check("/usr is the node image's", || {
        contains(&guest.ask("cat /usr/lib/os-release")?, expected.os)?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        contains(&guest.ask("oc version")?, "Server Version: 4.99.0")
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
}

fn one_boot(guest: &Vm) -> Result<()> {
    let id = guest.ask("cat /proc/sys/kernel/random/boot_id")?;
    same(guest.ask(&format!("cd {OURS} && echo boot-*"))?, format!("boot-{id}"))
}

fn costs_one_copy(guest: &Vm, checks: &mut Checks) {
    checks.check("it is stored in the system's repo, not in RAM", || {
        same(guest.status()?["cost"]["ram_store_bytes"].as_u64(), Some(0))?;
        guest.ask("! findmnt -n -S node-image-store").map(drop)
    });
    checks.check("what was pulled half before the power cut is gone", || one_boot(guest));
    checks.check("/usr is made of links to the repo's objects: no second copy", || {
        let links: u32 = guest.ask(&format!("stat -c %h {OURS}/boot-*/usr/bin/oc"))?.parse()?;
        // du counts a file once: what it shows for ours is what the repo does not hold.
        let own: u64 =
            guest.ask(&format!("du -sm /sysroot/ostree/repo/objects {OURS} | tail -n 1 | cut -f 1"))?.parse()?;
        if links < 2 || own > 40 {
            bail!("{links} links, {own} MiB of its own");
        }
        Ok(())
    });
    checks.check("/sysroot is read-only for everybody else", || {
        contains(&guest.ask("findmnt -n -o OPTIONS /sysroot")?, "ro")?;
        same(guest.run("touch /sysroot/x")?.status, 1)
    });
}

fn stays_ostrees(guest: &Vm, checks: &mut Checks) {
    checks.check("ostree admin status", || contains(&guest.ask("ostree admin status")?, "* testbed "));
    checks.check("ostree admin cleanup takes nothing of the node image", || {
        guest.ask("ostree admin cleanup")?;
        contains(&guest.ask("ostree refs --repo=/sysroot/ostree/repo")?, "coreos/node-image")?;
        guest.ask("ostree ls -R --repo=/sysroot/ostree/repo coreos/node-image /usr/bin")?;
        contains(&guest.ask("oc version")?, "Server Version: 4.99.0")
    });
    checks.check("a deployment can be made", || {
        let make = "mount -o remount,rw /sysroot && cd /sysroot/ostree && \
                    ostree commit --repo=repo --branch=later --tree=ref=testbed/bootimage --bootable";
        guest.ask(&format!("unshare -m sh -c '{make}'"))?;
        // Merging /etc, it would rebuild the SELinux policy, and for that want bubblewrap, which the test's trees lack.
        guest.ask("ostree admin deploy --no-merge --os=testbed later")?;
        contains(&guest.ask("ostree admin status")?, "(pending)")
    });
}

/// What the assisted installer does to the repo under a system that is pivoted, before it deploys there.
fn installed_to_the_existing_root(guest: &Vm, checks: &mut Checks) {
    const REF: &str = "refs/heads/coreos/node-image";
    checks.check("the ref is where an installer to the existing root looks for it", || {
        guest.ask(&format!("stat /ostree/repo/{REF}")).map(drop)
    });
    checks.check("it deletes the ref, touches tmp/node-image and lets ostree clean: all of /usr stays readable", || {
        let acts = "mount -o remount,rw /sysroot && ostree refs --repo /ostree/repo --delete coreos/node-image && \
                    touch /ostree/repo/tmp/node-image && ostree admin cleanup && ostree prune --refs-only --repo=/ostree/repo";
        guest.ask(&format!("unshare -m sh -c '{acts}'"))?;
        guest.ask(&format!("test ! -e /ostree/repo/{REF} && find /usr -xdev -type f -exec cat {{}} + >/dev/null"))?;
        contains(&guest.ask("oc version")?, "Server Version: 4.99.0")
    });
}
