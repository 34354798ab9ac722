//! The choice of the mount for the new `/usr`: one overlay over the image of a composefs root, an overlay over `/usr`, or a
//! bind mount of a complete tree.

use std::path::Path;

use rustix::io::Errno;

use super::refusal::Refusal;
use overlay_root::{Base, Composefs, Mount};
use support::{BlockSize, human_bytes};

/// Finds the image of a composefs root, or returns the reason why it cannot.
pub type Image<'a> = dyn Fn() -> Result<Composefs, String> + 'a;
/// Returns true if the kernel accepts a further overlay on the new `/usr` of this kind.
pub type Probe<'a> = dyn Fn(&Base) -> Result<bool, NoMount> + 'a;

/// Reason why the first mount of a trial failed, with its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoMount {
    /// The kernel refuses such a mount on this `/usr`, and always will.
    Refused(String),
    /// Another error, which says nothing about the next attempt.
    Failed(String),
}

impl From<anyhow::Error> for NoMount {
    fn from(error: anyhow::Error) -> Self {
        let refused = error.downcast_ref::<Errno>() == Some(&Errno::INVAL);
        let why = format!("{error:#}");
        if refused { Self::Refused(why) } else { Self::Failed(why) }
    }
}

impl NoMount {
    fn why(self) -> String {
        match self {
            Self::Refused(why) | Self::Failed(why) => why,
        }
    }
}

/// The mount that the switch will make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChoice {
    /// The way in which the new `/usr` replaces the booted one.
    pub base: Base,
    /// True if a further overlay can be mounted on the new `/usr`.
    pub has_room: bool,
    /// Reason why a better way is not possible: one overlay over the image of a composefs root, or any overlay.
    pub why_not_better: Option<String>,
}

/// Chooses the mount for the new `usr`: an overlay wherever the kernel accepts one. Only a trial mount shows its answer,
/// because the mount table does not contain every stacked file system.
///
/// # Errors
/// `usr` is writable, or an overlay that can be unmounted makes it too deep, or the kernel accepts no mount.
pub fn choose(mounts: &[Mount], usr: &Path, image: &Image<'_>, probe: &Probe<'_>) -> Result<BaseChoice, Refusal> {
    if let Some(source_name) = overlay_root::writable_overlay(mounts, usr) {
        return Err(Refusal::Unlocked { source_name });
    }
    let layers = overlay_root::overlay_stack(mounts, usr);
    let is_extended = overlay_root::is_extended(mounts, usr) || has_extensions(&layers);
    if layers.len() > 1 && is_extended {
        return Err(Refusal::TooDeep { layers });
    }
    let mut why_stacked = None;
    if overlay_root::is_data_overlay(mounts, usr) {
        match flat(mounts, usr, image, probe) {
            Ok(choice) => return Ok(choice),
            Err(why) => why_stacked = Some(why),
        }
    }
    let base = Base::Directory(usr.to_owned());
    match probe(&base) {
        Ok(has_room) => Ok(BaseChoice { base, has_room, why_not_better: why_stacked }),
        Err(no_overlay) => {
            let is_refused = matches!(no_overlay, NoMount::Refused(_));
            let flat = why_stacked.map(|why| format!("; over its composefs image: {why}"));
            let why = no_overlay.why() + &flat.unwrap_or_default();
            match is_refused {
                // A complete tree would hide the extensions, and a file system below may count as a level, too.
                true if is_extended => Err(Refusal::TooDeep { layers }),
                true => bound(usr, why, probe),
                false => Err(Refusal::NotStackable(why)),
            }
        }
    }
}

/// Returns true if systemd-sysext has merged extensions on these layers.
fn has_extensions(layers: &[String]) -> bool {
    layers.first().is_some_and(|source| source == "sysext")
}

/// Chooses a complete tree, because the kernel accepts no overlay for the reason `why`.
fn bound(usr: &Path, why: String, probe: &Probe<'_>) -> Result<BaseChoice, Refusal> {
    let base = Base::Bound(usr.to_owned());
    match probe(&base) {
        Ok(has_room) => Ok(BaseChoice { base, has_room, why_not_better: Some(why) }),
        Err(error) => Err(Refusal::NotStackable(format!("{why}; a bind mount of a complete tree: {}", error.why()))),
    }
}

/// Chooses the image of the composefs root, or returns the reason why it cannot be used.
fn flat(mounts: &[Mount], usr: &Path, image: &Image<'_>, probe: &Probe<'_>) -> Result<BaseChoice, String> {
    if overlay_root::requires_verity(mounts, usr) {
        return Err("the root requires fs-verity, and the agent cannot verify the image".to_owned());
    }
    let base = Base::Composefs(image()?);
    Ok(BaseChoice { has_room: probe(&base).map_err(NoMount::why)?, base, why_not_better: None })
}

/// Describes the space that a complete tree needs at most for copies of booted files, a line, before the node image is
/// known.
pub fn estimate(base: &Base) -> Option<String> {
    let Base::Bound(usr) = base else { return None };
    let modules = usr.join("lib/modules");
    let (mut bytes, mut entries, mut left) = (0_u64, 0_u64, vec![usr.clone()]);
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(stat) = entry.metadata() else { continue };
            entries += 1;
            if stat.is_dir() {
                left.extend(Some(entry.path()).filter(|path| *path != modules));
            } else {
                bytes = bytes.saturating_add(BlockSize::page().allocated(stat.len()));
            }
        }
    }
    Some(format!(
        "a complete tree of the node image: a node store in RAM needs at most {} more for copies of the {entries} entries of the \
         booted /usr, and a store on the disk needs inodes for directories",
        human_bytes(bytes)
    ))
}

/// Returns warnings about mounts that the new `/usr` hides, and about its layers, a line each.
pub fn warnings(mounts: &[Mount], usr: &Path, choice: &BaseChoice) -> Vec<String> {
    let hidden = overlay_root::mounts_below(mounts, usr);
    let mut warnings: Vec<String> = hidden
        .iter()
        .map(|hidden| {
            format!("{} is a mount point and is hidden by the new {} until an undo", hidden.display(), usr.display())
        })
        .collect();
    if has_extensions(&overlay_root::overlay_stack(mounts, usr)) {
        warnings.push(
            "system extensions are merged on /usr: their files stay visible where the node image has none".into(),
        );
    }
    match (&choice.base, &choice.why_not_better) {
        (Base::Bound(_), Some(why)) => warnings
            .push(format!("the kernel accepts no overlay on the booted /usr ({why}): the new /usr is a complete tree")),
        (_, Some(why)) => {
            warnings.push(format!("the new /usr is stacked on the composefs root, not over its image: {why}"));
        }
        (_, None) => {}
    }
    if !choice.has_room {
        warnings.push(
            "until an undo, the kernel accepts no further overlay on the node image's /usr: systemd-sysext merge, bootc \
             usr-overlay and podman -v /usr/…:O fail, and runc copies its program to memory at each start"
                .into(),
        );
    }
    if overlay_root::requires_verity(mounts, usr) {
        warnings.push(
            "the booted /usr is verified by fs-verity at each read; files of the node image that differ from it are not: \
             their objects were compared with their checksums once, when they were imported"
                .into(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "22 1 7:0 / / ro,relatime shared:1 - squashfs /dev/loop0 ro\n";
    const COMPOSEFS: &str = "22 1 0:40 / / ro - overlay composefs ro,lowerdir+=/run/gone,datadir+=/sysroot/objects\n";
    const VERITY: &str =
        "22 1 0:40 / / ro - overlay composefs ro,lowerdir=/run/gone::/sysroot/objects,verity=require\n";
    const DEEP: &str = "20 1 0:40 / /a ro - overlay one ro,lowerdir=/x:/y\n\
        22 1 0:41 / / ro - overlay two ro,lowerdir=/a:/b\n";
    const OTHER: &str = "22 1 0:40 / / ro - overlay live ro,lowerdir=/a:/b\n";
    const SYSEXT: &str = "60 22 0:60 / /usr ro - overlay sysext ro,lowerdir=/run/x:/usr\n";
    const MINE: &str = "60 22 0:60 / /usr ro - overlay mine ro,lowerdir=/run/x:/usr\n";
    const UNLOCKED: &str =
        "60 22 0:60 / /usr rw - overlay overlay rw,lowerdir=usr,upperdir=/var/o/u,workdir=/var/o/w\n";
    const TRANSIENT_ROOT: &str =
        "22 1 0:60 / / rw - overlay composefs rw,lowerdir+=/run/gone,upperdir=/run/u,workdir=/run/w,datadir+=/o\n";

    fn image() -> Composefs {
        Composefs { path: "/i.cfs".into(), objects: "/o".into() }
    }

    /// The kernel's answers for one base: an error, or room for another overlay.
    type Answer = Result<bool, &'static str>;
    /// A bind mount of a complete tree.
    const BINDS: Answer = Ok(true);

    fn choice(
        lines: &str,
        image: Result<Composefs, &str>,
        [flat, stacked, bound]: [Answer; 3],
    ) -> Result<BaseChoice, Refusal> {
        let probe = |base: &Base| {
            let answer = match base {
                Base::Composefs(_) => flat,
                Base::Directory(_) => stacked,
                Base::Bound(_) => bound,
            };
            answer.map_err(|why| match why {
                "EIO" => NoMount::Failed(why.to_owned()),
                _ => NoMount::Refused(why.to_owned()),
            })
        };
        let image = || image.clone().map_err(str::to_owned);
        choose(&overlay_root::parse(lines.as_bytes()), Path::new("/usr"), &image, &probe)
    }

    #[test]
    fn every_root_and_kernel_has_one_mount_or_a_refusal() {
        let made = |base: Base, has_room, why: Option<&str>| {
            Ok(BaseChoice { base, has_room, why_not_better: why.map(str::to_owned) })
        };
        let stacked = |has_room, why: Option<&str>| made(Base::default(), has_room, why);
        let flat = |has_room| made(Base::Composefs(image()), has_room, None);
        let bound = |why: &str| made(Base::Bound("/usr".into()), true, Some(why));
        let unverified = "the root requires fs-verity, and the agent cannot verify the image";
        let refused = |why: &str| Err(Refusal::NotStackable(why.to_owned()));
        let extended = &format!("{PLAIN}{SYSEXT}");
        type Row<'a> = (&'a str, &'a str, Result<Composefs, &'a str>, [Answer; 3], Result<BaseChoice, Refusal>);
        let rows: [Row<'_>; 14] = [
            ("plain root", PLAIN, Ok(image()), [Ok(true), Ok(true), BINDS], stacked(true, None)),
            ("/usr on another overlay", OTHER, Ok(image()), [Ok(true), Ok(false), BINDS], stacked(false, None)),
            ("merged extensions", extended, Ok(image()), [Ok(true), Ok(false), BINDS], stacked(false, None)),
            ("an error", PLAIN, Ok(image()), [Ok(true), Err("EIO"), BINDS], refused("EIO")),
            ("no overlay fits", PLAIN, Ok(image()), [Ok(true), Err("s"), BINDS], bound("s")),
            ("a deep root", DEEP, Ok(image()), [Ok(true), Err("s"), BINDS], bound("s")),
            (
                "no mount",
                PLAIN,
                Ok(image()),
                [Ok(true), Err("s"), Err("b")],
                refused("s; a bind mount of a complete tree: b"),
            ),
            ("composefs", COMPOSEFS, Ok(image()), [Ok(true), Ok(false), BINDS], flat(true)),
            ("with fs-verity", VERITY, Ok(image()), [Ok(true), Ok(true), BINDS], stacked(true, Some(unverified))),
            ("the image counts", COMPOSEFS, Ok(image()), [Ok(false), Err("s"), BINDS], flat(false)),
            ("no image", COMPOSEFS, Err("gone"), [Ok(true), Ok(false), BINDS], stacked(false, Some("gone"))),
            ("no data layers", COMPOSEFS, Ok(image()), [Err("f"), Ok(false), BINDS], stacked(false, Some("f"))),
            ("neither", COMPOSEFS, Ok(image()), [Err("f"), Err("s"), BINDS], bound("s; over its composefs image: f")),
            (
                "no image",
                COMPOSEFS,
                Err("gone"),
                [Ok(true), Err("s"), BINDS],
                bound("s; over its composefs image: gone"),
            ),
        ];
        for (name, lines, image, answers, expected) in rows {
            assert_eq!(choice(lines, image, answers), expected, "{name}");
        }
        for writable in [format!("{PLAIN}{UNLOCKED}"), TRANSIENT_ROOT.to_owned()] {
            let refusal =
                choice(&writable, Ok(image()), [Ok(true), Ok(true), BINDS]).map_err(|refusal| refusal.to_string());
            let text = refusal.err().unwrap_or_default();
            assert!(text.contains("ostree admin unlock") && text.contains("transient = true"), "{text}");
        }
        for extended in [extended.clone(), format!("{PLAIN}{}", SYSEXT.replace(",lowerdir=/run/x:/usr", ""))] {
            let refusal = choice(&extended, Ok(image()), [Ok(true), Err("s"), BINDS]);
            assert!(matches!(refusal, Err(Refusal::TooDeep { .. })), "extensions are not hidden: {refusal:?}");
        }
        for (over, remedy) in [(SYSEXT, "systemd-sysext unmerge"), (MINE, "unmount the topmost one")] {
            let refusal = choice(&format!("{COMPOSEFS}{over}"), Ok(image()), [Ok(true), Ok(true), BINDS]);
            let text = refusal.map_err(|refusal| refusal.to_string()).err().unwrap_or_default();
            assert!(text.contains("stacked overlays") && text.contains(remedy), "{text}");
        }
    }

    #[test]
    fn hidden_mounts_missing_room_and_unverified_files_give_warnings() {
        let of = |lines: &str, flat: Answer, stacked: Answer| {
            let choice = choice(lines, Ok(image()), [flat, stacked, BINDS]);
            let mounts = overlay_root::parse(lines.as_bytes());
            choice.map_or_else(
                |refusal| vec![refusal.to_string()],
                |choice| warnings(&mounts, Path::new("/usr"), &choice),
            )
        };
        assert_eq!(of(COMPOSEFS, Ok(true), Ok(false)), [""; 0]);
        let bound = of(PLAIN, Ok(true), Err("EINVAL"));
        assert!(bound.len() == 1 && bound[0].ends_with("/usr (EINVAL): the new /usr is a complete tree"), "{bound:?}");
        let cases: [(String, Answer, &[&str]); 4] = [
            (COMPOSEFS.to_owned(), Ok(false), &["usr-overlay and podman -v /usr/…:O fail, and runc copies"]),
            (COMPOSEFS.to_owned(), Err("no data layers"), &["over its image: no data layers", "no further overlay"]),
            (VERITY.to_owned(), Ok(true), &["over its image: the root requires", "no further overlay", "by fs-verity"]),
            (
                format!("{PLAIN}{SYSEXT}70 60 8:1 / /usr/share/oem ro - ext4 /dev/sda ro\n"),
                Ok(true),
                &["/usr/share/oem is a mount point and is hidden", "system extensions", "no further overlay"],
            ),
        ];
        for (lines, flat, expected) in cases {
            let found = of(&lines, flat, Ok(false));
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (line, words) in found.iter().zip(expected) {
                assert!(line.contains(words), "{found:?}");
            }
        }
    }
}
