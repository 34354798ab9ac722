//! Checks the `default.target` that systemd uses, and the target after the pivot, for kernel command lines, configured
//! defaults and the output of other generators.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use boot_config::search::{ALL, Search};
use boot_config::target::{DefaultTarget, default_target};
use boot_config::under;

const OUTPUT: [&str; 3] = ["/run/systemd/generator", "/run/systemd/generator.early", "/run/systemd/generator.late"];

/// The output directory of another generator, which replaces an existing link, as `ln -sf` does.
#[derive(Debug, Clone, Copy)]
enum Other {
    None,
    Before(&'static str),
    After(&'static str),
}

fn link(root: &Path, directory: &str, to: &str) {
    let link = under(root, directory).join("default.target");
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&link);
    symlink(to, link).unwrap();
}

/// Runs the generator and another one. `etc` is the administrator's default target. Returns the default target that
/// systemd uses, and the target that the agent isolates after a pivot.
fn boot(cmdline: &str, etc: Option<&str>, other: Other) -> (String, String) {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for (path, text) in [
        ("/proc/cmdline", cmdline),
        ("/etc/node-image-pivot.conf.d/50-image.toml", "image = \"registry.example.com/node:1\"\n"),
        ("/usr/lib/systemd/system/node-image-pivot.target", "[Unit]\n"),
    ] {
        let path = under(root, path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    link(root, "/usr/lib/systemd/system", "graphical.target");
    if let Some(target) = etc {
        link(root, "/etc/systemd/system", target);
    }
    OUTPUT.iter().for_each(|path| fs::create_dir_all(under(root, path)).unwrap());
    if let Other::Before(directory) = other {
        link(root, directory, "other.target");
    }
    let mut generator = Command::new(env!("CARGO_BIN_EXE_node-image-pivot-generator"));
    generator.env("NODE_IMAGE_PIVOT_GENERATOR_ROOT", root).args(OUTPUT.map(|path| under(root, path)));
    assert!(generator.status().unwrap().success());
    if let Other::After(directory) = other {
        link(root, directory, "other.target");
    }
    let used = ALL.iter().find_map(|path| fs::read_link(under(root, path).join("default.target")).ok());
    let used = used.unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let DefaultTarget::Name(original) = default_target(&Search::complete(root)).target else { panic!("masked") };
    (used, original)
}

#[test]
fn another_generators_redirect_wins() {
    use Other::{After, Before, None as Alone};
    let [normal, early, late] = OUTPUT;
    const OURS: &str = "node-image-pivot.target";
    for (cmdline, etc, other, used, original) in [
        ("quiet", None, Alone, OURS, "graphical.target"),
        ("quiet", Some("admin.target"), Alone, OURS, "admin.target"),
        // An unknown generator wins if its link would also win without this generator, in either order.
        ("quiet", None, Before(normal), "other.target", "other.target"),
        ("quiet", None, After(normal), "other.target", "other.target"),
        ("quiet", None, Before(early), "other.target", "other.target"),
        ("quiet", None, After(early), "other.target", "other.target"),
        ("quiet", Some("admin.target"), Before(early), "other.target", "other.target"),
        ("quiet", Some("admin.target"), After(early), "other.target", "other.target"),
        // Its link has lower priority than a configured default, also without this generator.
        ("quiet", None, Before(late), OURS, "graphical.target"),
        ("quiet", None, After(late), OURS, "graphical.target"),
        ("quiet", Some("admin.target"), Before(normal), OURS, "admin.target"),
        ("quiet", Some("admin.target"), After(normal), OURS, "admin.target"),
        // The generator does not redirect if the command line has an argument of a known generator.
        ("systemd.run=/bin/true", None, After(normal), "other.target", "other.target"),
        ("systemd.run=/bin/true", Some("admin.target"), After(normal), "admin.target", "admin.target"),
        ("coreos.inst.install_dev=/dev/sda", None, After(normal), "other.target", "other.target"),
        ("coreos.inst.install_dev=", None, Alone, OURS, "graphical.target"),
        // systemd itself boots to another target.
        ("systemd.unit=rescue.target", None, Alone, "graphical.target", "graphical.target"),
        ("rescue", None, Alone, "graphical.target", "graphical.target"),
        ("emergency", None, Alone, "graphical.target", "graphical.target"),
        ("single", None, Alone, "graphical.target", "graphical.target"),
        ("1", None, Alone, "graphical.target", "graphical.target"),
        ("3", None, Alone, "graphical.target", "graphical.target"),
        ("5", None, Alone, "graphical.target", "graphical.target"),
        // Arguments for the initramfs.
        ("rd.systemd.unit=rescue.target rd.systemd.run=x rd.break", None, Alone, OURS, "graphical.target"),
    ] {
        let expected = (used.to_owned(), original.to_owned());
        assert_eq!(boot(cmdline, etc, other), expected, "{cmdline}, /etc: {etc:?}, {other:?}");
    }
}
