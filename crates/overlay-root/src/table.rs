//! The mount table, `/proc/PID/mountinfo`, as plain data: parsing and queries, without system calls.
//!
//! Format source: proc_pid_mountinfo(5).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Directory below `/usr` whose content stays the booted system's.
pub(crate) const MODULES: &str = "lib/modules";

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Id of the mount.
    pub id: u64,
    /// Id of the mount that holds the mount point.
    pub parent: u64,
    /// Directory of the file system that is mounted, unescaped: `/`, or another one for a bind mount.
    pub root: PathBuf,
    /// Mount point, unescaped.
    pub target: PathBuf,
    /// True if this mount is read-only, even if the file system is writable.
    pub read_only: bool,
    /// Type of the file system, for example `overlay`.
    pub fstype: String,
    /// Source of the mount, unescaped: a device, or any name that the mounting program chose.
    pub source: OsString,
    /// Options of the super block, as the kernel prints them.
    pub super_options: OsString,
}

impl Mount {
    /// Returns true if this mount has the name: as its source, or, for a bind mount, as the name of the mounted directory.
    fn is_named(&self, name: &str) -> bool {
        self.source == name || self.is_bound(name)
    }

    /// Returns true if this is a bind mount of a directory of this name. The directory may be removed.
    fn is_bound(&self, name: &str) -> bool {
        self.existing_root().file_name().is_some_and(|root| root == name)
    }

    /// Returns true if this is a bind mount of a directory of this name, or of a file or directory below it.
    pub fn shows_part_of(&self, name: &str) -> bool {
        self.existing_root().iter().any(|part| part == name)
    }

    /// Returns the root without the kernel's mark of a removed directory.
    fn existing_root(&self) -> &Path {
        let root = self.root.as_os_str().as_bytes();
        Path::new(OsStr::from_bytes(root.strip_suffix(b"//deleted").unwrap_or(root)))
    }
}

/// Visibility of a mount at its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposure {
    /// The mount does not exist.
    Absent,
    /// A path lookup finds the mount.
    OnTop,
    /// The mount exists, but another mount covers it.
    Covered,
}

/// Parses the text of a mountinfo file. Lines without the documented form are ignored. The kernel may add fields, but does
/// not remove these.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (root, target) = (fields.nth(1)?, fields.next()?);
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    let read_only = has_option(fields.next()?, |option| option == b"ro");
    // Any number of optional fields, up to the separator "-".
    fields.by_ref().find(|field| *field == b"-")?;
    let fstype = fields.next()?;
    let source = fields.next()?;
    let super_options = fields.next().unwrap_or_default();
    Some(Mount {
        id,
        parent,
        root: path(root),
        target: path(target),
        read_only,
        fstype: String::from_utf8_lossy(fstype).into_owned(),
        source: OsString::from_vec(unescape(source)),
        super_options: OsString::from_vec(super_options.to_vec()),
    })
}

/// Returns true if one of the comma-separated `options` is `wanted`.
fn has_option(options: &[u8], wanted: impl Fn(&[u8]) -> bool) -> bool {
    options.split(|byte| *byte == b',').any(wanted)
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Decodes the kernel's octal escapes such as `\040` (blank, tab, newline, backslash, hash).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let value = code.map(|digits| digits.iter().fold(0u32, |sum, d| sum * 8 + u32::from(d - b'0')));
        match value.and_then(|value| u8::try_from(value).ok()) {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// Returns the visibility of the mount named `source` at `target`.
pub fn exposure(mounts: &[Mount], target: &Path, source: &str) -> Exposure {
    match top(mounts, target) {
        Some(mount) if mount.is_named(source) => Exposure::OnTop,
        _ if mounts.iter().any(|mount| mount.target == target && mount.is_named(source)) => Exposure::Covered,
        _ => Exposure::Absent,
    }
}

/// Returns the topmost mount at `target`, or `None` if `target` is not a mount point.
pub fn top<'a>(mounts: &'a [Mount], target: &Path) -> Option<&'a Mount> {
    let stack = || mounts.iter().filter(|mount| mount.target == target);
    // Ids and the order of lines do not show which mount is on top: a tree that was built detached has an old id. The
    // topmost mount is the one that is not the parent of another mount at the same target.
    stack().find(|mount| !stack().any(|other| other.parent == mount.id))
}

/// Returns the mount that holds `path`. `path` must not contain links.
pub fn holding<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    path.ancestors().find_map(|place| top(mounts, place))
}

/// Returns the mount points below `target`, which a mount at `target` would hide.
pub fn mounts_below(mounts: &[Mount], target: &Path) -> Vec<PathBuf> {
    let mut below: Vec<PathBuf> = mounts
        .iter()
        .filter(|mount| mount.target.starts_with(target) && mount.target != target)
        .map(|mount| mount.target.clone())
        .collect();
    below.sort();
    below.dedup();
    below
}

/// Returns the sources of the longest chain of stacked overlays at `path`, topmost first. The kernel allows 2, so a new
/// overlay on `path` is possible if there is at most 1.
///
/// Lower directories are found by the paths in the mount options. A path that no longer exists (composefs detaches its
/// erofs) counts as a normal file system. Therefore the result may be too short, but not too long, and the kernel may
/// still refuse an overlay.
pub fn overlay_stack(mounts: &[Mount], path: &Path) -> Vec<String> {
    stack_of(mounts, path, &mut Vec::new())
}

/// Returns true if an overlay at `path` is mounted on the directory below it, as `systemd-sysext merge` does. A program that
/// mounted it can unmount it again.
pub fn is_extended(mounts: &[Mount], path: &Path) -> bool {
    let top = top(mounts, path).filter(|mount| mount.fstype == "overlay");
    top.is_some_and(|mount| lower_dirs(&mount.super_options).iter().any(|lower| lower == path))
}

fn stack_of(mounts: &[Mount], path: &Path, visited: &mut Vec<u64>) -> Vec<String> {
    // An overlay cannot be its own lower layer: at the same path, the mount below it is the layer.
    let visible: Vec<Mount> = mounts.iter().filter(|mount| !visited.contains(&mount.id)).cloned().collect();
    let Some(mount) = holding(&visible, path) else { return Vec::new() };
    if mount.fstype != "overlay" {
        return Vec::new();
    }
    visited.push(mount.id);
    let below = lower_dirs(&mount.super_options).into_iter().map(|dir| stack_of(mounts, &dir, visited));
    let deepest = below.max_by_key(Vec::len).unwrap_or_default();
    visited.pop();
    std::iter::once(mount.source.to_string_lossy().into_owned()).chain(deepest).collect()
}

/// Returns the source of the overlay that makes `path` writable, if there is one. It has an upper layer, and is mounted at
/// `path`, or holds `path` and is mounted read-write.
pub fn writable_overlay(mounts: &[Mount], path: &Path) -> Option<String> {
    let mount = holding(mounts, path).filter(|mount| mount.fstype == "overlay")?;
    let has_upper = has_option(mount.super_options.as_bytes(), |option| option.starts_with(b"upperdir="));
    let writable = has_upper && (mount.target == path || !mount.read_only);
    writable.then(|| mount.source.to_string_lossy().into_owned())
}

/// Returns true if `path` is on a read-only overlay in which the content of files comes from a data-only layer, as composefs
/// mounts it.
pub fn is_data_overlay(mounts: &[Mount], path: &Path) -> bool {
    let Some(overlay) = holding(mounts, path).filter(|mount| mount.fstype == "overlay") else { return false };
    let options = &overlay.super_options;
    let has = |wanted: &dyn Fn(&[u8]) -> bool| has_option(options.as_bytes(), wanted);
    let has_data = has(&|option| {
        option.starts_with(b"datadir+=")
            || option.starts_with(b"lowerdir=") && option.windows(2).any(|bytes| bytes == b"::")
    });
    let has_upper = has(&|option| option.starts_with(b"upperdir="));
    has_data && !has_upper
}

/// Returns true if `path` is on an overlay that reads only content with a digest of fs-verity. The overlay may have an upper
/// layer, as ostree mounts a root with `transient-ro`.
pub fn requires_verity(mounts: &[Mount], path: &Path) -> bool {
    let overlay = holding(mounts, path).filter(|mount| mount.fstype == "overlay");
    overlay.is_some_and(|mount| has_option(mount.super_options.as_bytes(), |option| option == b"verity=require"))
}

/// Returns the mount points that would disappear together with the mount named `source` at `target`: those on this mount,
/// directly or on each other. The kernel modules in a bound tree are not listed, because they are part of it.
pub fn mounted_on(mounts: &[Mount], target: &Path, source: &str) -> Vec<PathBuf> {
    let at_target = || mounts.iter().filter(|mount| mount.target == target);
    let trees: Vec<u64> = at_target().filter(|mount| mount.is_bound(source)).map(|mount| mount.id).collect();
    // A later mount on the kernel modules has their mount as its parent.
    let is_part = |mount: &Mount| {
        trees.contains(&mount.parent) && mount.target == target.join(MODULES) && mount.root.ends_with(MODULES)
    };
    let mut on: Vec<u64> = at_target().filter(|mount| mount.is_named(source)).map(|mount| mount.id).collect();
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(&parent) = on.get(next) {
        next += 1;
        for mount in mounts.iter().filter(|mount| mount.parent == parent) {
            if !on.contains(&mount.id) {
                on.push(mount.id);
                found.extend(Some(mount.target.clone()).filter(|_| !is_part(mount)));
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

fn lower_dirs(options: &OsString) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for option in options.as_bytes().split(|byte| *byte == b',') {
        let value = option.strip_prefix(b"lowerdir+=").or_else(|| option.strip_prefix(b"lowerdir="));
        for dir in value.unwrap_or_default().split(|byte| *byte == b':').filter(|dir| !dir.is_empty()) {
            dirs.push(PathBuf::from(OsString::from_vec(unescape(dir))));
        }
    }
    dirs
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIVE: &str = "\
22 1 7:0 / / ro,relatime shared:1 - squashfs /dev/loop0 ro\n\
23 22 7:0 /usr /usr ro,relatime shared:2 master:4 - squashfs /dev/loop0 ro\n\
24 22 0:30 / /run rw,nosuid shared:3 - tmpfs tmpfs rw,size=10k\n\
25 22 0:31 / /with\\040blank\\134and\\011tab rw - ext4 /dev/\\043x rw\n\
nonsense\n";

    fn live_with(extra: &str) -> Vec<Mount> {
        parse(format!("{LIVE}{extra}").as_bytes())
    }

    #[test]
    fn lines_are_parsed_and_unescaped() {
        let mounts = live_with("");
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[1].target, Path::new("/usr"));
        assert_eq!(mounts[1].fstype, "squashfs");
        assert_eq!(mounts[3].target, Path::new("/with blank\\and\ttab"));
        assert_eq!(mounts[3].source, "/dev/#x");
    }

    #[test]
    fn invalid_escapes_are_unchanged() {
        assert_eq!(unescape(b"a\\9b\\04"), b"a\\9b\\04");
        assert_eq!(unescape(b"\\777"), b"\\777");
        assert_eq!(unescape(b"\\"), b"\\");
    }

    #[test]
    fn the_topmost_mount_follows_from_parents() {
        // The first mount has the smaller id, because it was built before the other one was mounted.
        let mounts = live_with("12 40 0:50 / /usr ro - overlay ours ro\n40 23 0:51 / /usr ro - tmpfs other ro\n");
        assert_eq!(exposure(&mounts, Path::new("/usr"), "ours"), Exposure::OnTop);
        assert_eq!(exposure(&mounts, Path::new("/usr"), "other"), Exposure::Covered);
        assert_eq!(exposure(&mounts, Path::new("/usr"), "none"), Exposure::Absent);
        assert_eq!(exposure(&mounts, Path::new("/usr/lib"), "ours"), Exposure::Absent);
    }

    #[test]
    fn a_path_is_on_the_nearest_mount() {
        let mounts = live_with("30 22 254:4 / /sysroot ro - xfs /dev/vda4 rw\n");
        let on = |path: &str| holding(&mounts, Path::new(path)).unwrap().fstype.clone();
        assert_eq!([on("/sysroot/ostree/repo"), on("/sysroot"), on("/sysrootless")], ["xfs", "xfs", "squashfs"]);
    }

    #[test]
    fn mounts_below_compares_whole_components() {
        let mounts = live_with("30 23 0:50 / /usr/share/oem ro - ext4 x ro\n31 22 0:52 / /usrlocal ro - ext4 x ro\n");
        assert_eq!(mounts_below(&mounts, Path::new("/usr")), [PathBuf::from("/usr/share/oem")]);
    }

    #[test]
    fn mounted_on_returns_direct_and_indirect_mounts() {
        let mounts = live_with(
            "60 23 0:60 / /usr ro - overlay ours ro\n61 60 0:61 / /usr/share rw - tmpfs a rw\n\
             62 61 0:62 / /usr/share/x rw - tmpfs b rw\n63 23 0:63 / /usr/local rw - tmpfs hidden rw\n",
        );
        let on = |source| mounted_on(&mounts, Path::new("/usr"), source);
        assert_eq!(on("ours"), [PathBuf::from("/usr/share"), PathBuf::from("/usr/share/x")]);
        assert!(on("absent").is_empty());
        let covered = live_with("60 23 0:60 / /usr ro - overlay ours ro\n61 60 0:61 / /usr ro - overlay sysext ro\n");
        assert_eq!(mounted_on(&covered, Path::new("/usr"), "ours"), [PathBuf::from("/usr")]);
    }

    #[test]
    fn a_bound_tree_is_named_by_its_directory_and_its_modules_are_a_part_of_it() {
        let usr = Path::new("/usr");
        let mounts = live_with(
            "60 23 0:60 /ours /usr ro - tmpfs store rw\n61 60 7:0 /usr/lib/modules /usr/lib/modules ro - squashfs x ro\n\
             62 60 0:62 / /usr/share rw - tmpfs a rw\n63 61 0:63 / /usr/lib/modules/x rw - tmpfs b rw\n",
        );
        assert_eq!(exposure(&mounts, usr, "ours"), Exposure::OnTop);
        assert_eq!(exposure(&mounts, usr, "our"), Exposure::Absent);
        assert_eq!(mounted_on(&mounts, usr, "ours"), [Path::new("/usr/lib/modules/x"), Path::new("/usr/share")]);
        assert!(mounts.iter().any(|mount| mount.shows_part_of("ours")));
    }

    #[test]
    fn a_removed_tree_is_still_seen() {
        let mounts = live_with("60 23 0:60 /ours//deleted /usr ro - tmpfs store rw\n");
        assert_eq!(exposure(&mounts, Path::new("/usr"), "ours"), Exposure::OnTop);
        for (root, expected) in
            [("/ours/share/x", true), ("/ours//deleted", true), ("/our", false), ("/", false), ("/x/yours", false)]
        {
            let mounts = live_with(&format!("60 22 0:60 {root} /x ro - tmpfs store rw\n"));
            assert_eq!(mounts.iter().any(|mount| mount.shows_part_of("ours")), expected, "{root}");
        }
    }

    #[test]
    fn other_mounts_on_the_kernel_modules_are_listed() {
        let (usr, modules) = (Path::new("/usr"), [PathBuf::from("/usr/lib/modules")]);
        let later = live_with(
            "60 23 0:60 /ours /usr ro - tmpfs store rw\n61 60 7:0 /usr/lib/modules /usr/lib/modules ro - squashfs x ro\n\
             62 61 8:1 /srv/lib/modules /usr/lib/modules ro - ext4 y ro\n",
        );
        assert_eq!(mounted_on(&later, usr, "ours"), modules);
        let overlay = live_with(
            "60 23 0:60 / /usr ro - overlay ours ro\n61 60 8:1 /srv/lib/modules /usr/lib/modules ro - ext4 y ro\n",
        );
        assert_eq!(mounted_on(&overlay, usr, "ours"), modules);
    }

    #[test]
    fn only_an_overlay_on_its_own_lower_directory_extends_it() {
        for (line, expected) in [
            ("60 23 0:60 / /usr ro - overlay sysext ro,lowerdir=/run/x:/usr", true),
            ("60 23 0:60 / /usr ro - overlay sysext ro,lowerdir+=/run/x,lowerdir+=/usr", true),
            ("60 23 0:60 / /usr ro - overlay live ro,lowerdir=/run/x:/run/y", false),
            ("60 22 0:60 / /opt ro - overlay sysext ro,lowerdir=/run/x:/opt", false),
        ] {
            assert_eq!(is_extended(&live_with(&format!("{line}\n")), Path::new("/usr")), expected, "{line}");
        }
    }

    #[test]
    fn a_writable_overlay_is_found_at_usr_and_at_the_root() {
        const UPPER: &str = "overlay name rw,lowerdir=l,upperdir=u,workdir=w";
        const NO_UPPER: &str = "overlay name ro,lowerdir=l:m";
        for (line, expected) in [
            (format!("60 23 0:60 / /usr rw - {UPPER}"), true),
            (format!("60 23 0:60 / /usr ro,relatime - {UPPER}"), true),
            (format!("60 1 0:60 / / rw,relatime shared:1 - {UPPER}"), true),
            (format!("60 1 0:60 / / ro,relatime - {UPPER}"), false),
            (format!("60 1 0:60 / / ro - {NO_UPPER}"), false),
            (format!("60 22 0:60 / /etc rw - {UPPER}"), false),
            ("60 22 0:60 / /usr rw - ext4 name rw,upperdir=u".to_owned(), false),
        ] {
            // Only this line, because the root of a composefs system holds /usr.
            let mounts = parse(format!("{line}\n").as_bytes());
            let found = writable_overlay(&mounts, Path::new("/usr"));
            assert_eq!(found, expected.then(|| "name".to_owned()), "{line}");
        }
        // A separate mount at /usr, as with a plain ostree root, is not writable through the root.
        let root = "60 1 0:60 / / rw - overlay name rw,lowerdir=l,upperdir=u\n61 60 7:0 /usr /usr ro - squashfs x ro\n";
        assert_eq!(writable_overlay(&parse(root.as_bytes()), Path::new("/usr")), None);
    }

    #[test]
    fn an_overlay_with_a_data_layer_is_recognized() {
        let of = |line: &str| is_data_overlay(&parse(format!("{line}\n").as_bytes()), Path::new("/usr"));
        for (options, expected) in [
            ("ro,lowerdir+=/run/gone,datadir+=/sysroot/objects,redirect_dir=on,metacopy=on", true),
            ("ro,lowerdir=/run/gone::/sysroot/objects,metacopy=on", true),
            ("ro,lowerdir+=/run/gone,datadir+=/o,metacopy=on,verity=require", true),
            ("ro,lowerdir=/a:/b", false),
            ("rw,lowerdir+=/run/gone,datadir+=/o,upperdir=/u,workdir=/w", false),
        ] {
            assert_eq!(of(&format!("22 1 0:40 / / ro - overlay composefs {options}")), expected, "{options}");
        }
        assert!(!of("22 1 0:40 / / ro - ext4 /dev/vda datadir+=/x"));
    }

    #[test]
    fn required_digests_are_seen_below_an_upper_layer_too() {
        let of = |line: &str| requires_verity(&parse(format!("22 1 0:40 / / {line}\n").as_bytes()), Path::new("/"));
        assert!(of("ro - overlay composefs ro,lowerdir+=/run/gone,datadir+=/o,verity=require"));
        assert!(of("ro - overlay composefs rw,lowerdir+=/run/gone,datadir+=/o,upperdir=/u,workdir=/w,verity=require"));
        assert!(!of("ro - overlay composefs ro,lowerdir+=/run/gone,datadir+=/o,verity=on"));
        assert!(!of("ro - ext4 /dev/vda ro"));
    }

    #[test]
    fn stacked_overlays_are_counted() {
        let overlay_depth = |mounts: &[Mount], path: &Path| overlay_stack(mounts, path).len();
        assert_eq!(overlay_depth(&live_with(""), Path::new("/usr")), 0);
        let composefs = "22 1 0:40 / / ro - overlay composefs ro,lowerdir+=/run/gone,datadir+=/sysroot/objects\n";
        assert_eq!(overlay_depth(&parse(composefs.as_bytes()), Path::new("/usr")), 1);
        let sysext = format!("{composefs}60 22 0:60 / /usr ro - overlay sysext ro,lowerdir=/run/x:/usr\n");
        assert_eq!(overlay_depth(&parse(sysext.as_bytes()), Path::new("/usr")), 2);
        let ours = live_with("60 23 0:60 / /usr ro - overlay ours ro,lowerdir=/run/delta:/usr\n");
        assert_eq!(overlay_depth(&ours, Path::new("/usr")), 1);
    }
}
