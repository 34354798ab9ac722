//! The choice of the mount for the new `/usr`: one overlay over the image of a composefs root, or an overlay over `/usr`.

use std::path::Path;

use super::refusal::Refusal;
use overlay_root::{Base, Composefs, Mount};

/// Finds the image of a composefs root, or returns the reason why it cannot.
pub type Image<'a> = dyn Fn() -> Result<Composefs, String> + 'a;
/// Returns true if the kernel accepts a further overlay on the new `/usr` with this base, or its error for the first one.
pub type Probe<'a> = dyn Fn(&Base) -> Result<bool, String> + 'a;

/// The mount that the switch will make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChoice {
    /// The layers below the delta tree.
    pub base: Base,
    /// True if a further overlay can be mounted on the new `/usr`.
    pub has_room: bool,
    /// Reason why the new `/usr` of a composefs root is stacked on the booted one.
    pub why_stacked: Option<String>,
}

/// Chooses the layers for the new `usr`. Only a trial mount shows the answer of the kernel, because the mount table does
/// not contain every stacked file system.
///
/// # Errors
/// `usr` is writable, or on too many overlays, or the kernel accepts no overlay.
pub fn choose(mounts: &[Mount], usr: &Path, image: &Image<'_>, probe: &Probe<'_>) -> Result<BaseChoice, Refusal> {
    if let Some(source_name) = overlay_root::writable_overlay(mounts, usr) {
        return Err(Refusal::Unlocked { source_name });
    }
    let layers = overlay_root::overlay_stack(mounts, usr);
    if layers.len() > 1 {
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
    let has_room = probe(&base).map_err(|error| {
        let flat = why_stacked.as_ref().map(|why| format!("; over its composefs image: {why}"));
        Refusal::NotStackable(error + &flat.unwrap_or_default())
    })?;
    Ok(BaseChoice { base, has_room, why_stacked })
}

/// Chooses the image of the composefs root, or returns the reason why it cannot be used.
fn flat(mounts: &[Mount], usr: &Path, image: &Image<'_>, probe: &Probe<'_>) -> Result<BaseChoice, String> {
    if overlay_root::requires_verity(mounts, usr) {
        return Err("the root requires fs-verity, and the agent cannot verify the image".to_owned());
    }
    let base = Base::Composefs(image()?);
    Ok(BaseChoice { has_room: probe(&base)?, base, why_stacked: None })
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
    if overlay_root::overlay_stack(mounts, usr).first().is_some_and(|source| source == "sysext") {
        warnings.push(
            "system extensions are merged on /usr: their files stay visible where the node image has none".into(),
        );
    }
    if let Some(why) = &choice.why_stacked {
        warnings.push(format!("the new /usr is stacked on the composefs root, not over its image: {why}"));
    }
    if !choice.has_room {
        warnings.push(
            "until an undo, the kernel accepts no further overlay on the node image's /usr: systemd-sysext merge, bootc \
             usr-overlay and podman -v /usr/…:O fail"
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

    fn choice(
        lines: &str,
        image: Result<Composefs, &str>,
        flat: Answer,
        stacked: Answer,
    ) -> Result<BaseChoice, Refusal> {
        let probe = |base: &Base| {
            let answer = if matches!(base, Base::Composefs(_)) { flat } else { stacked };
            answer.map_err(str::to_owned)
        };
        let image = || image.clone().map_err(str::to_owned);
        choose(&overlay_root::parse(lines.as_bytes()), Path::new("/usr"), &image, &probe)
    }

    #[test]
    fn every_root_and_kernel_has_one_mount_or_a_refusal() {
        let stacked = |has_room, why: Option<&str>| {
            Ok(BaseChoice { base: Base::default(), has_room, why_stacked: why.map(str::to_owned) })
        };
        let flat = |has_room| Ok(BaseChoice { base: Base::Composefs(image()), has_room, why_stacked: None });
        let unverified = "the root requires fs-verity, and the agent cannot verify the image";
        let refused = |why: &str| Err(Refusal::NotStackable(why.to_owned()));
        type Row<'a> = (&'a str, &'a str, Result<Composefs, &'a str>, Answer, Answer, Result<BaseChoice, Refusal>);
        let rows: [Row<'_>; 11] = [
            ("plain root", PLAIN, Ok(image()), Ok(true), Ok(true), stacked(true, None)),
            ("/usr on another overlay", OTHER, Ok(image()), Ok(true), Ok(false), stacked(false, None)),
            ("merged extensions", &format!("{PLAIN}{SYSEXT}"), Ok(image()), Ok(true), Ok(false), stacked(false, None)),
            ("no overlay fits", PLAIN, Ok(image()), Ok(true), Err("s"), refused("s")),
            ("composefs", COMPOSEFS, Ok(image()), Ok(true), Ok(false), flat(true)),
            ("composefs with fs-verity", VERITY, Ok(image()), Ok(true), Ok(true), stacked(true, Some(unverified))),
            ("the image counts as a level", COMPOSEFS, Ok(image()), Ok(false), Err("s"), flat(false)),
            ("no image", COMPOSEFS, Err("gone"), Ok(true), Ok(false), stacked(false, Some("gone"))),
            ("no data layers", COMPOSEFS, Ok(image()), Err("f"), Ok(false), stacked(false, Some("f"))),
            ("neither", COMPOSEFS, Ok(image()), Err("f"), Err("s"), refused("s; over its composefs image: f")),
            (
                "neither, no image",
                COMPOSEFS,
                Err("gone"),
                Ok(true),
                Err("s"),
                refused("s; over its composefs image: gone"),
            ),
        ];
        for (name, lines, image, flat, stacked, expected) in rows {
            assert_eq!(choice(lines, image, flat, stacked), expected, "{name}");
        }
        for writable in [format!("{PLAIN}{UNLOCKED}"), TRANSIENT_ROOT.to_owned()] {
            let refusal = choice(&writable, Ok(image()), Ok(true), Ok(true)).map_err(|refusal| refusal.to_string());
            let text = refusal.err().unwrap_or_default();
            assert!(text.contains("ostree admin unlock") && text.contains("transient = true"), "{text}");
        }
        for (over, remedy) in [(SYSEXT, "systemd-sysext unmerge"), (MINE, "unmount the topmost one")] {
            let refusal = choice(&format!("{COMPOSEFS}{over}"), Ok(image()), Ok(true), Ok(true));
            let text = refusal.map_err(|refusal| refusal.to_string()).err().unwrap_or_default();
            assert!(text.contains("2 stacked overlays") && text.contains(remedy), "{text}");
        }
    }

    #[test]
    fn hidden_mounts_missing_room_and_unverified_files_give_warnings() {
        let of = |lines: &str, flat: Answer| {
            let choice = choice(lines, Ok(image()), flat, Ok(false));
            let mounts = overlay_root::parse(lines.as_bytes());
            choice.map_or_else(
                |refusal| vec![refusal.to_string()],
                |choice| warnings(&mounts, Path::new("/usr"), &choice),
            )
        };
        assert_eq!(of(COMPOSEFS, Ok(true)), [""; 0]);
        let cases: [(String, Answer, &[&str]); 4] = [
            (COMPOSEFS.to_owned(), Ok(false), &["no further overlay"]),
            (COMPOSEFS.to_owned(), Err("no data layers"), &["over its image: no data layers", "no further overlay"]),
            (VERITY.to_owned(), Ok(true), &["over its image: the root requires", "no further overlay", "by fs-verity"]),
            (
                format!("{PLAIN}{SYSEXT}70 60 8:1 / /usr/share/oem ro - ext4 /dev/sda ro\n"),
                Ok(true),
                &["/usr/share/oem is a mount point and is hidden", "system extensions", "no further overlay"],
            ),
        ];
        for (lines, flat, expected) in cases {
            let found = of(&lines, flat);
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (line, words) in found.iter().zip(expected) {
                assert!(line.contains(words), "{found:?}");
            }
        }
    }
}
