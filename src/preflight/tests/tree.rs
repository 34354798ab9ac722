//! Tests of the checks on trees of a real overlayfs.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use support::testing::private;

use overlay_root::Base;

use super::{Machine, Refusal, check_content, check_runs};

#[test]
fn etc_is_labelled_by_the_policy_of_the_new_tree() {
    use std::os::fd::AsFd;

    private(|scratch| {
        let over = scratch.join("over");
        let policy = over.join("etc/selinux/test");
        for directory in ["contexts/files", "policy"] {
            fs::create_dir_all(policy.join(directory)).unwrap();
        }
        fs::write(over.join("etc/selinux/config"), "SELINUX=enforcing\nSELINUXTYPE=test\n").unwrap();
        fs::write(policy.join("policy/policy.31"), "").unwrap();
        let contexts = "/\t-d\tsystem_u:object_r:root_t:s0\n/etc(/.*)?\tsystem_u:object_r:etc_t:s0\n/etc/secret\t--\tsystem_u:object_r:secret_t:s0\n";
        fs::write(policy.join("contexts/files/file_contexts"), contexts).unwrap();
        fs::write(over.join("etc/secret"), "").unwrap();
        fs::create_dir_all(scratch.join("etc/old")).unwrap();
        let tree = overlay_root::open_new_usr(&over, &Base::default(), "nip:usr").unwrap();
        let [base, new] = ["etc", "over/etc"].map(|path| etc_merge::open_dir(&scratch.join(path)).unwrap());
        let mut plan =
            etc_merge::plan(base.as_fd(), new.as_fd(), base.as_fd(), &etc_merge::Defaults::default()).unwrap();
        let labelled = super::label_plan(&mut plan, tree.as_fd(), scratch).unwrap();
        assert_eq!(labelled, plan.changes.len() - 1, "all changes except removals");
        let label = |path: &str| {
            let change = plan.changes.iter().find(|change| change.path == etc_merge::Bytes::from(path)).unwrap();
            change.label.clone().map(|label| String::from_utf8(label.0).unwrap())
        };
        assert_eq!(label("secret").unwrap(), "system_u:object_r:secret_t:s0\0");
        assert_eq!(label("selinux/config").unwrap(), "system_u:object_r:etc_t:s0\0");
        assert_eq!(label("old"), None);
        assert!(!scratch.join("policy-root").exists());
    });
}

/// Returns a program that is marked as needing a CPU that does not exist: one level above x86-64-v4 in the ELF property
/// note (x86-64 psABI, `GNU_PROPERTY_X86_ISA_1_NEEDED`), which the C library's loader checks.
fn for_a_newer_cpu(scratch: &Path) -> Vec<u8> {
    fs::write(scratch.join("cpu.c"), "int main(void) { return 0; }\n").unwrap();
    let built = std::process::Command::new("cc")
        .args(["-Wl,-z,x86-64-v4", "-o", "cpu-program", "cpu.c"])
        .current_dir(scratch)
        .status()
        .unwrap();
    assert!(built.success());
    let mut program = fs::read(scratch.join("cpu-program")).unwrap();
    let needed = [0xc000_8002u32.to_le_bytes(), 4u32.to_le_bytes()].concat();
    let at = program.windows(8).position(|window| window == needed).unwrap() + 8;
    program[at..at + 4].copy_from_slice(&0x10u32.to_le_bytes());
    program
}

#[test]
fn a_tree_that_cannot_boot_is_refused() {
    private(|scratch| {
        let delta = scratch.join("delta");
        fs::create_dir_all(delta.join("lib/systemd")).unwrap();
        fs::create_dir_all(scratch.join("empty")).unwrap();
        let tree = overlay_root::open_new_usr(&delta, &Base::Directory(scratch.join("empty")), "nip:usr").unwrap();
        let machine = Machine::here().unwrap();
        let missing = check_content(tree.as_fd(), machine);
        assert!(missing.len() == 4 && missing.iter().all(|one| matches!(one, Refusal::Missing { .. })), "{missing:?}");

        let over = scratch.join("over");
        for directory in ["lib/systemd", "bin", "etc"] {
            fs::create_dir_all(over.join(directory)).unwrap();
        }
        fs::write(over.join("lib/os-release"), "NAME=x\n").unwrap();
        let mut foreign = fs::read("/usr/bin/true").unwrap();
        foreign[18..20].copy_from_slice(&[22, 0]);
        fs::write(over.join("lib/systemd/systemd"), foreign).unwrap();
        let tree = overlay_root::open_new_usr(&over, &Base::default(), "nip:usr").unwrap();
        let refusals = check_content(tree.as_fd(), machine);
        assert!(matches!(refusals[..], [Refusal::OsRelease, Refusal::Architecture { .. }]), "{refusals:?}");

        fs::write(over.join("lib/os-release"), "NAME=x\nID=test\n").unwrap();
        fs::remove_file(over.join("lib/systemd/systemd")).unwrap();
        fs::copy("/usr/bin/true", over.join("lib/systemd/systemd")).unwrap();
        let tree = overlay_root::open_new_usr(&over, &Base::default(), "nip:usr").unwrap();
        assert_eq!(check_content(tree.as_fd(), machine), []);
        let unmerged = |_: std::os::fd::BorrowedFd<'_>, _: &Path| Ok(());
        let report = check_runs(&tree, &unmerged).unwrap();
        assert!(report.refusals.is_empty() && report.warnings.is_empty(), "{report:?}");
        let report = check_runs(&tree, &|_, _| anyhow::bail!("disk full")).unwrap();
        assert!(report.refusals.is_empty(), "the running /etc is used: {report:?}");
        assert!(report.warnings[0].contains("disk full"));

        // A program without its loader, and a loader that is not a program, so that nothing runs.
        let usr = Path::new("/usr");
        let trial_of = |name: &str, path: &str, content: &[u8]| {
            let broken = scratch.join(name);
            let file = broken.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, content).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            let tree = overlay_root::DetachedTree::overlay(&[&broken, &over, usr], "nip:usr").unwrap();
            check_runs(&tree, &unmerged).unwrap().refusals
        };
        let refusals = trial_of("script", "bin/true", b"#!/no/such/loader\n");
        assert!(matches!(refusals[..], [Refusal::Trial(_)]), "{refusals:?}");
        assert!(refusals[0].to_string().contains("/usr/bin/true"), "{}", refusals[0]);
        let loader = fs::canonicalize("/lib64/ld-linux-x86-64.so.2").unwrap();
        let refusals = trial_of("loader", loader.strip_prefix("/usr").unwrap().to_str().unwrap(), b"not a loader");
        assert!(refusals.len() >= 2 && refusals.iter().all(|one| matches!(one, Refusal::Trial(_))), "{refusals:?}");
        assert!(refusals.iter().any(|one| one.to_string().contains("systemd --version")), "{refusals:?}");
        if cfg!(target_arch = "x86_64") {
            let refusals = trial_of("cpu", "bin/true", &for_a_newer_cpu(scratch));
            assert!(refusals[0].to_string().contains("CPU ISA level is lower than required"), "{refusals:?}");
        }
    });
}
