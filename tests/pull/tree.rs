//! The system tree that the fixture's images hold.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

/// A small system tree: all kinds of entries that an image may have. `version` changes some of them.
pub fn tree(dir: &Path, version: u8) {
    for path in ["usr/bin", "usr/etc/app", "usr/lib/modules/6.1/kernel", "usr/share/empty", "usr/share/deep/er"] {
        fs::create_dir_all(dir.join(path)).unwrap();
    }
    let write = |path: &str, content: &[u8]| fs::write(dir.join(path), content).unwrap();
    write("usr/bin/bash", &vec![b'b'; 3000]);
    write("usr/bin/kubelet", &noise(2_000_000, version));
    write("usr/bin/ping", format!("ping {version}").as_bytes());
    write("usr/etc/app/app.conf", format!("version = {version}\n").as_bytes());
    write("usr/etc/hostname", b"");
    write("usr/share/empty/zero", b"");
    write("usr/share/stable", &noise(700_000, 0));
    write(&format!("usr/share/only-in-{version}"), &[version]);
    write("usr/lib/modules/6.1/vmlinuz", &noise(500_000, 100 + version));
    write("usr/lib/modules/6.1/kernel/net.ko", &noise(100_000, 50 + version));
    let long = format!("usr/share/deep/er/{}", "long-name-".repeat(20));
    write(&long, b"long");
    symlink("bash", dir.join("usr/bin/sh")).unwrap();
    symlink("..//bin/bash", dir.join("usr/bin/denormal")).unwrap();
    symlink("x/".repeat(90), dir.join("usr/share/far")).unwrap();
    fs::set_permissions(dir.join("usr/bin/ping"), fs::Permissions::from_mode(0o4755)).unwrap();
    chown(dir.join("usr/share/stable"), Some(81), Some(82)).unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(dir.join(path), name, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set("usr/bin/ping", "security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    set("usr/bin/bash", "security.selinux", b"system_u:object_r:shell_exec_t:s0\0");
    set("usr/bin/sh", "security.selinux", b"system_u:object_r:bin_t:s0\0");
    set("usr/share", "trusted.note", b"on a directory");
}

/// Bytes that do not compress.
pub fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed);
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(length)
    .collect()
}

/// Kernel, one large file, tools, one stable file; the rest with the commit.
pub fn chunker(path: &str) -> Option<&'static str> {
    match path {
        path if path.starts_with("usr/lib/modules") => Some("kernel-core,kernel-modules"),
        "usr/bin/kubelet" => Some("kubelet"),
        path if path.starts_with("usr/bin") => Some("bash"),
        path if path.starts_with("usr/share/stable") => Some("stable"),
        _ => None,
    }
}
