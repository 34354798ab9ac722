//! Services that a pull needs before the original target starts them: the network, name resolution, and the time, which the
//! check of certificates needs.

use std::fs;
use std::path::Path;

use crate::preset::Presets;
use crate::search::{Found, Search};
use crate::under;

/// Services that bring up the network, name resolution and the time on supported systems.
const SERVICES: [&str; 7] = [
    "NetworkManager.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "chronyd.service",
    "chrony.service",
    "systemd-timesyncd.service",
    "ntpd.service",
];

/// Directories in which the [`SERVICES`] are enabled, depending on distribution and version.
const WANTS: [&str; 4] =
    ["multi-user.target.wants", "network-online.target.wants", "network.target.wants", "sysinit.target.wants"];

/// Returns those of [`SERVICES`] that are enabled and not masked. On a first boot, `presets` adds the services that PID 1
/// will enable by preset after the generators have run.
pub fn enabled(units: &Search<'_>, presets: Option<&Presets>) -> Vec<&'static str> {
    let enabled = |name: &str| {
        let Found::File(path) = units.find(name) else { return false };
        WANTS.iter().any(|wants| units.pulls_in(wants, name))
            || presets.is_some_and(|presets| presets.enable(name) && can_be_enabled(units.root, &path))
    };
    SERVICES.into_iter().filter(|name| enabled(name)).collect()
}

/// Returns true if the unit file at `path` can be enabled. Aliases and files without `[Install]` cannot.
fn can_be_enabled(root: &Path, path: &Path) -> bool {
    let place = under(root, path);
    let text = if place.is_symlink() { Vec::new() } else { fs::read(place).unwrap_or_default() };
    String::from_utf8_lossy(&text).lines().any(|line| line.trim() == "[Install]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::tests::root;

    const NM: &str = "NetworkManager.service";

    #[test]
    fn services_count_if_they_are_enabled() {
        let (time, link_to_time) = (
            "usr/lib/systemd/system/chronyd.service",
            "etc/systemd/system/multi-user.target.wants/chronyd.service -> x",
        );
        // On Debian the service is `chrony.service`, with the alias `chronyd.service`.
        let (debian, link_to_debian) =
            ("usr/lib/systemd/system/chrony.service", "etc/systemd/system/multi-user.target.wants/chrony.service -> x");
        let unit = "usr/lib/systemd/system/NetworkManager.service";
        let link = "etc/systemd/system/multi-user.target.wants/NetworkManager.service -> /usr/lib/systemd/system/x";
        let shipped = "usr/lib/systemd/system/sysinit.target.wants/NetworkManager.service -> ../NetworkManager.service";
        let not_wanted = |mask: &str| format!("etc/systemd/system/sysinit.target.wants/NetworkManager.service{mask}");
        for (entries, expected) in [
            (vec![unit, link], vec![NM]),
            (vec![unit, shipped], vec![NM]),
            (vec![unit], vec![]),
            (vec![link], vec![]),
            (vec![unit, link, "etc/systemd/system/NetworkManager.service -> /dev/null"], vec![]),
            (vec![unit, link, "run/systemd/system/NetworkManager.service -> ../../../dev/null"], vec![]),
            (vec![unit, link, "etc/systemd/system/NetworkManager.service ="], vec![]),
            (vec![unit, shipped, &not_wanted(" -> /dev/null")], vec![]),
            (vec![unit, shipped, &not_wanted(" -> ../../../../dev/null")], vec![]),
            (vec![unit, shipped, &not_wanted(" =")], vec![]),
            (vec![unit, link, time, link_to_time], vec![NM, "chronyd.service"]),
            (vec![debian, link_to_debian], vec!["chrony.service"]),
            (vec![time], vec![]),
        ] {
            let root = root(&entries);
            assert_eq!(enabled(&Search::configured(root.path(), &[]), None), expected, "{entries:?}");
        }
        let root = root(&[unit, link]);
        assert_eq!(enabled(&Search::configured(root.path(), &[NM.to_owned()]), None), [""; 0], "systemd.mask=");
    }

    #[test]
    fn on_a_first_boot_presets_count_too() {
        let unit = "usr/lib/systemd/system/NetworkManager.service";
        for (entries, expected) in [
            (vec![unit], vec![NM]),
            (vec![unit, "etc/systemd/system/NetworkManager.service -> /dev/null"], vec![]),
            (vec!["usr/lib/systemd/system/NetworkManager.service -> other.service"], vec![]),
            (vec![], vec![]),
        ] {
            let root = root(&entries);
            let presets = Presets::read(root.path());
            assert_eq!(enabled(&Search::configured(root.path(), &[]), Some(&presets)), expected, "{entries:?}");
        }
    }
}
