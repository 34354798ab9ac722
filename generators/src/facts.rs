//! Gathers the facts that the decision needs. Changes nothing.

use std::fs;
use std::path::{Path, PathBuf};

use crate::decide::Facts;
use crate::installer::Installer;
use boot_config::cmdline::CommandLine;
use boot_config::preset::Presets;
use boot_config::search::{Found, Search};
use boot_config::{DEFAULT_PROBE_PATHS, Mode, Problem, dropin, mark, services, target, under};

/// The mark that PID 1 writes on a first boot.
const FIRST_BOOT: &str = "/run/systemd/first-boot";

/// Links that request an offline update. systemd-system-update-generator redirects the boot if one of them exists.
const UPDATE_LINKS: [&str; 2] = ["/system-update", "/etc/system-update"];

/// The agent's directory in the system's repo. `boot-ID` has the trees of a boot.
const AGENT_DIR: &str = "/sysroot/ostree/repo/extensions/node-image-pivot";

/// The unit of the agent.
const AGENT: &str = "node-image-pivotd.service";

/// The keys of the configuration that the generator uses. It skips all other keys, which cannot affect the decision. The
/// agent refuses unknown keys.
#[derive(Debug, Default)]
struct Keys {
    mode: Mode,
    image: bool,
    target: Option<String>,
    probe_paths: Option<Vec<PathBuf>>,
}

/// Facts from the environment of the generator, which systemd 251 and later set.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Environment {
    /// `$SYSTEMD_IN_INITRD`.
    pub in_initrd: bool,
    /// `$SYSTEMD_FIRST_BOOT`.
    pub first_boot: Option<bool>,
}

/// Gathers all facts of the system whose root is `root`. Never fails: errors become the fact [`Facts::unclear`].
pub fn gather(root: &Path, environment: Environment) -> Facts {
    let exists = |path: &Path| fs::symlink_metadata(under(root, path)).is_ok();
    let in_initrd = environment.in_initrd;
    let mut facts = Facts {
        in_initrd,
        pivoted: !in_initrd && mark::is_pivoted(root),
        booted: !in_initrd && mark::has_booted(root),
        installer: if in_initrd { None } else { Installer::find(root) },
        started: exists(Path::new(mark::STARTED)),
        ..Facts::default()
    };
    // The other facts cannot affect the decision. A reload is quick then.
    if in_initrd || facts.pivoted || facts.booted && facts.installer.is_none() {
        return facts;
    }
    let (line, keys) = match CommandLine::read(root).and_then(|line| Ok((keys(root, &line)?, line))) {
        Ok((keys, line)) => (line, keys),
        Err(Problem(what)) => return Facts { unclear: Some(what), ..facts },
    };
    let probe_paths = keys.probe_paths.unwrap_or_else(|| DEFAULT_PROBE_PATHS.map(PathBuf::from).to_vec());
    facts.mode = keys.mode;
    facts.unit = line.unit;
    facts.other_generator = line.other_generator;
    facts.update_pending = UPDATE_LINKS.iter().any(|path| exists(Path::new(path)));
    let units = Search::configured(root, &line.masks);
    facts.default_target = target::default_target(&units);
    facts.pivot_target = match units.find(target::PIVOT_TARGET) {
        Found::File(path) => Some(path),
        Found::Masked | Found::Missing => None,
    };
    let needed = target::PIVOT_UNITS.into_iter().chain(keys.target.as_deref());
    facts.masked = needed.filter(|name| units.find(name) == Found::Masked).map(str::to_owned).next();
    facts.binary = probe_paths.into_iter().find(|path| exists(path));
    facts.cleaner = match units.find(AGENT) {
        Found::File(path) if has_trees(root) => Some(path),
        _ => None,
    };
    facts.image = keys.image;
    facts.target = keys.target;
    let first_boot = environment.first_boot.unwrap_or_else(|| exists(Path::new(FIRST_BOOT)));
    facts.services = services::enabled(&units, first_boot.then(|| Presets::read(root)).as_ref());
    facts
}

/// Returns true if the system's repo has trees of a boot. Before the agent is started, they are those of earlier ones.
fn has_trees(root: &Path) -> bool {
    let mut entries = fs::read_dir(under(root, Path::new(AGENT_DIR))).into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"boot-"))
}

fn keys(root: &Path, line: &CommandLine) -> Result<Keys, Problem> {
    let mut keys = Keys::default();
    for fragment in dropin::fragments(root)? {
        let at = |what: String| Problem(format!("{}: {what}", fragment.path.display()));
        let table: toml::Table = fragment.text.parse().map_err(|e: toml::de::Error| at(e.message().to_owned()))?;
        let text = |key: &str| match table.get(key) {
            None => Ok(None),
            Some(toml::Value::String(value)) => Ok(Some(value.as_str())),
            Some(_) => Err(at(format!("{key} must be a string"))),
        };
        if let Some(mode) = text("mode")? {
            keys.mode = mode.parse().map_err(|Problem(what)| at(format!("mode: {what}")))?;
        }
        // A file with either key replaces the image of earlier files. An empty value removes it.
        let images = [text("image")?, text("release_image")?];
        if images.iter().any(Option::is_some) {
            keys.image = images.into_iter().flatten().any(|value| !value.is_empty());
        }
        if let Some(name) = text("target")? {
            target::check_name(name).map_err(|Problem(what)| at(format!("target: {what}")))?;
            keys.target = Some(name.to_owned());
        }
        if let Some(value) = table.get("probe_paths") {
            keys.probe_paths =
                Some(paths(value).ok_or_else(|| at("probe_paths must be a list of absolute paths".to_owned()))?);
        }
    }
    let at = |what: String| Problem(format!("kernel command line: {what}"));
    if let Some(mode) = &line.mode {
        keys.mode = mode.parse().map_err(|Problem(what)| at(format!("node-image-pivot: {what}")))?;
    }
    if let Some(name) = &line.target {
        target::check_name(name).map_err(|Problem(what)| at(format!("target: {what}")))?;
        keys.target = Some(name.clone());
    }
    keys.image |= line.image.is_some() || line.release_image.is_some();
    Ok(keys)
}

fn paths(value: &toml::Value) -> Option<Vec<PathBuf>> {
    let paths = value.as_array()?.iter().map(|item| item.as_str().map(PathBuf::from));
    paths.collect::<Option<Vec<_>>>().filter(|paths| paths.iter().all(|path| path.is_absolute()))
}
