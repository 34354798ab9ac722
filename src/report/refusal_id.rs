//! The stable names of refusals, and the classes of failures, with their explanations.
//!
//! `explain` prints the documentation of these values, so that none can be without one.

use node_store::image::Kind;
use serde::Serialize;
use strum::{EnumIter, EnumMessage, IntoEnumIterator, IntoStaticStr};

/// The stable name of a reason for a refusal, `error.refusals[].id` in the status document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, EnumMessage, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum RefusalId {
    /// The node image's programs are for another machine. Use the node image for this architecture.
    Architecture,
    /// The sysroot for a deployment is that of the running system, on a read-only medium or without its boot loader entries.
    /// Use the one of another disk.
    BootedSysroot,
    /// A phase is under way. Wait for its end (`node-image-pivot status --watch`), or end a pull with `node-image-pivot
    /// cancel`.
    Busy,
    /// The configuration is invalid. The message names the file, the key and the accepted values.
    Configuration,
    /// `/etc` and the node image changed the same files, and `etc.strategy` is `fail`. Compare them with
    /// `node-image-pivot diff-etc`, then set `etc.strategy = "keep"` or change the files.
    Conflicts,
    /// The node image's SELinux policy lacks the domain of the agent. Run the agent in a domain that both policies have, or
    /// add the domain to the node image.
    Domain,
    /// The directory `/etc` is immutable or append-only. Run `chattr -i -a /etc`.
    EtcLocked,
    /// `/etc` is mounted read-only. Make it writable first.
    EtcReadOnly,
    /// The trial period is over, so the switch is being undone and cannot be kept. Switch again after the undo.
    Expired,
    /// A switch or an undo has begun and is not complete. Run `node-image-pivot undo`, or start the unit of the switch again.
    HalfDone,
    /// A `pre-switch` or `pre-deploy` hook failed. The message has its last lines. Fix the cause, or disable the hook with a
    /// link to `/dev/null`.
    Hook,
    /// The image that updates of a disk should follow is invalid. Correct `--imgref`.
    ImageReference,
    /// The node store has no complete image to deploy. Run `node-image-pivot pull --complete`. If the first layer of a plain
    /// image has a name or a symlink target that is not UTF-8, which ostree cannot store, rebuild the image without it.
    Incomplete,
    /// A kernel argument for a deployment is empty, has white space or control characters, or is `ostree=`. Correct `--karg`,
    /// and repeat it for several arguments.
    KernelArgument,
    /// `/usr/local` is a link on the machine and a directory in the node image, so that the switch would hide files of the
    /// machine. Use a node image with the link, or move the files.
    LocalHidden,
    /// The record of a switch is lost or damaged, and the system is switched. Run `node-image-pivot undo`, or reboot.
    LostRecord,
    /// The metadata of the node image's commit exclude this machine, or any boot. Use another node image.
    Metadata,
    /// The node image lacks a file that every bootable system has. Use another node image.
    Missing,
    /// The mode is `off`: on the kernel command line (`node-image-pivot=off`) or in a drop-in file (`mode`).
    ModeOff,
    /// The modules of the running kernel are on a mount that the new `/usr` would hide. Unmount it.
    ModulesMounted,
    /// The running system has no node image that could be deployed, because it has the cluster's programs already.
    NoNodeImage,
    /// The kernel has no overlay file system. Load the module `overlay`, or boot another bootimage.
    NoOverlay,
    /// The sysroot for a deployment lacks the stateroot. Create it with `ostree admin os-init`.
    NoStateroot,
    /// Nothing was switched, so there is nothing to undo.
    NoSwitch,
    /// The directory for a deployment has no ostree sysroot. Mount the disk there, with its `/boot`, or run
    /// `ostree admin init-fs`.
    NoSysroot,
    /// No switch is in its trial period, so there is nothing to keep. `node-image-pivot run --try` begins one.
    NoTrial,
    /// The agent lacks the capability to mount. Start it through `node-image-pivotd.service`.
    NotAllowed,
    /// The kernel refuses an overlay on `/usr`, and a bind mount of a complete tree. Use a bootimage with `/usr` on another
    /// file system.
    NotStackable,
    /// The kernel lacks a system call that the switch needs. Boot a bootimage with Linux 5.6 or later.
    OldKernel,
    /// The switch is in its trial period, and a deployment to the running system would boot the node image next in any case.
    /// Run `node-image-pivot keep` or `node-image-pivot undo` first.
    OnTrial,
    /// The node image is another distribution or major release than the booted system. Configure the image of this system
    /// (`image_tags`), or set `os_mismatch = "warn"`.
    OsMismatch,
    /// The node image's os-release does not name a system. Use another node image.
    OsRelease,
    /// The system is switched to another image than the configured one. Run `node-image-pivot undo`, then
    /// `node-image-pivot run`.
    OtherImage,
    /// The repo of the sysroot for a deployment does not have the mode `bare`: create it with `ostree admin init-fs`. Or its
    /// objects must have fs-verity, which its file system or the kernel does not support: use another disk or kernel.
    RepoMode,
    /// The node image's sshd rejects this machine's configuration or host keys. Correct `/etc/ssh` so that `sshd -t` of both
    /// systems passes, or disable and stop sshd.
    Sshd,
    /// A file in `/run/node-image-pivot` is missing, damaged, or of another version, boot or image. The message names the
    /// file and the remedy.
    StateFile,
    /// The system is switched already. Run `node-image-pivot undo` first.
    Switched,
    /// Overlays are already stacked on `/usr`, and the kernel accepts no other one. Run `systemd-sysext unmerge` if system
    /// extensions are merged.
    TooDeep,
    /// Memory or disk space is too small. The message has the needed and the free bytes. Add some, or stop something that
    /// uses it.
    TooLittle,
    /// A program of the node image does not run on this machine. The image may need another CPU, or its C library may be
    /// broken. Use another node image.
    Trial,
    /// `/usr` is writable through an overlay, so it may differ from the booted commit. Reboot without `ostree admin unlock`
    /// and without `transient = true` in prepare-root.conf.
    Unlocked,
    /// A mount would prevent the undo: over `/usr`, below it since the switch, or a read-only `/etc`. The message names it.
    /// Unmount it, then run `node-image-pivot undo` again.
    WayBack,
}

impl RefusalId {
    /// Returns the stable name.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Classes that are not of a pull.
const OTHER_CLASSES: [(&str, &str); 2] = [
    (
        "refused",
        "A check refused before anything changed. `error.refusals[].id` names it: node-image-pivot explain ID.",
    ),
    (
        "interrupted",
        "The agent was killed during a switch or an undo. Start the unit of the switch again to complete it, or run \
         `node-image-pivot undo`.",
    ),
];

/// The explanation of a refusal or a class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Stable name.
    pub name: &'static str,
    /// Its kind.
    pub kind: NameKind,
    /// Meaning and remedy.
    pub text: String,
    /// The part of the documentation that lists it.
    pub page: &'static str,
}

/// The kinds of names that `explain` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NameKind {
    /// A reason for a refusal.
    Refusal,
    /// A class of failures.
    Class,
}

impl Explanation {
    fn new(name: &'static str, kind: NameKind, text: &str) -> Self {
        let page = match kind {
            NameKind::Refusal => "docs/troubleshooting.md#refusals",
            NameKind::Class => "docs/troubleshooting.md#classes-of-failures",
        };
        Self { name, kind, text: text.split_whitespace().collect::<Vec<_>>().join(" "), page }
    }

    /// Returns the explanation as one line.
    pub fn line(&self) -> String {
        let kind = match self.kind {
            NameKind::Refusal => "Refusal",
            NameKind::Class => "Class of failures",
        };
        format!("{}: {kind}. {} See {}.", self.name, self.text, self.page)
    }
}

/// Returns the explanations of all refusals and classes.
pub fn explanations() -> impl Iterator<Item = Explanation> {
    let refusal =
        |id: RefusalId| Explanation::new(id.as_str(), NameKind::Refusal, id.get_documentation().unwrap_or_default());
    let class = |kind: Kind| {
        let text = format!("{} Remedy: {}.", kind.get_documentation().unwrap_or_default(), kind.advice());
        Explanation::new(kind.as_str(), NameKind::Class, &text)
    };
    let others = OTHER_CLASSES.into_iter().map(|(name, text)| Explanation::new(name, NameKind::Class, text));
    RefusalId::iter().map(refusal).chain(Kind::iter().map(class)).chain(others)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn page(name: &str) -> String {
        std::fs::read_to_string(format!("{}/docs/{name}.md", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// Returns the first cells of the tables in a part of a page.
    fn names(page: &str, part: &str) -> BTreeSet<String> {
        let part = page.split_once(&format!("\n## {part}\n")).unwrap().1;
        let part = part.split("\n## ").next().unwrap();
        let cells = part.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        cells.map(|(name, _)| name.to_owned()).collect()
    }

    #[test]
    fn troubleshooting_lists_exactly_the_names_that_are_explained() {
        let page = page("troubleshooting");
        for (kind, part) in [(NameKind::Refusal, "Refusals"), (NameKind::Class, "Classes of failures")] {
            let of_kind = explanations().filter(|known| known.kind == kind);
            let (known, pages): (BTreeSet<_>, BTreeSet<_>) =
                of_kind.map(|known| (known.name.to_owned(), known.page)).unzip();
            assert_eq!(known, names(&page, part), "{part}");
            let anchor = part.to_lowercase().replace(' ', "-");
            assert_eq!(Vec::from_iter(pages), [format!("docs/troubleshooting.md#{anchor}")]);
        }
    }

    /// `UPDATE_DOCS=1` writes the table again.
    #[test]
    fn the_table_of_refusals_has_their_explanations() {
        let rows = explanations().filter(|known| known.kind == NameKind::Refusal);
        let rows: String = rows.map(|known| format!("| `{}` | {} |\n", known.name, known.text)).collect();
        let page = page("troubleshooting");
        let begin = page.find("| `architecture` |").unwrap();
        let end = begin + page[begin..].find("\n\n").unwrap() + 1;
        if std::env::var_os("UPDATE_DOCS").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/troubleshooting.md");
            std::fs::write(path, format!("{}{rows}{}", &page[..begin], &page[end..])).unwrap();
        } else {
            assert_eq!(page[begin..end], rows, "run this test with UPDATE_DOCS=1");
        }
    }

    #[test]
    fn every_refusal_and_class_is_explained_and_documented() {
        let commands = page("commands");
        for known in explanations() {
            let line = known.line();
            let documented = known.kind == NameKind::Class || commands.contains(&format!("`{}`", known.name));
            assert!(documented, "{line} is missing in commands.md");
            assert!(known.text.len() > 20 && known.text.ends_with('.'), "{line}");
        }
        let text = |name: &str| explanations().find(|known| known.name == name).unwrap().line();
        assert!(text("too-little").starts_with("too-little: Refusal. Memory or disk space"));
        assert!(text("network").contains("check name resolution"));
    }

    #[test]
    fn names_are_unique() {
        let names: Vec<_> = explanations().map(|known| known.name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
