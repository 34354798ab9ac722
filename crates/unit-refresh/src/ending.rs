//! Finds the units that isolating a target would start and that may end the boot, such as updaters that reboot. Pure.

use std::collections::BTreeSet;

use super::action::{Action, Class};
use super::definition::{Definition, UnitFiles};
use super::policy::{Policy, Wish};

/// Updaters whose commands do not show that they may reboot. Sources: the unit files of Fedora and RHEL CoreOS, bootc,
/// Debian, openSUSE MicroOS and Flatcar.
const UPDATERS: &[&str] = &[
    "apt-daily-upgrade.timer",
    "bootc-fetch-apply-updates.service",
    "bootc-fetch-apply-updates.timer",
    "dnf-automatic-install.timer",
    "dnf-automatic.timer",
    "dnf5-automatic.timer",
    "locksmithd.service",
    "rebootmgr.service",
    "rpm-ostreed-automatic.service",
    "rpm-ostreed-automatic.timer",
    "systemd-sysupdate-reboot.timer",
    "transactional-update.timer",
    "unattended-upgrades.service",
    "update-engine.service",
    "zincati.service",
];

/// Commands of systemctl, and values of `SuccessAction=` without their suffix, that end the boot. Each also has a target.
const ENDS: &[&str] = &["exit", "halt", "kexec", "poweroff", "reboot", "soft-reboot"];

/// Returns the units that isolating `target` would start and that may end the boot. Only unit files of the image count:
/// those in `/etc` and `/run` are the administrator's or the installer's. A unit that the configuration names exactly is
/// left out, unless the configuration stops it.
pub fn holds(files: &UnitFiles, target: &str, active: &BTreeSet<String>, policy: &Policy) -> Vec<Action> {
    let permitted = |name: &str| policy.of(name).is_some_and(|(rule, wish)| rule == name && wish != Wish::Stop);
    // A reboot needs the units of these targets. Only the unit that names such a target is held.
    let needed: BTreeSet<_> = ENDS.iter().flat_map(|end| files.pulled_in(&format!("{end}.target"))).collect();
    let is_candidate = |name: &String| !needed.contains(name) && !active.contains(name) && !permitted(name);
    let candidates = files.pulled_in(target).into_iter().filter(is_candidate);
    let hold = |name: String| {
        let definition = files.definition(&name)?;
        definition.fragment.as_ref().filter(|path| path.starts_with("/usr/lib/"))?;
        let cause = cause(files, &name, &definition)?;
        Some(Action::new(name, Class::Hold, format!("{cause}; it is not started before the next boot")))
    };
    candidates.filter_map(hold).collect()
}

/// Returns the reason for which a unit may end the boot.
fn cause(files: &UnitFiles, name: &str, definition: &Definition) -> Option<String> {
    let own = own_cause(name, definition);
    own.or_else(|| {
        let started = triggered(name, definition)?;
        if is_end(&started) {
            return Some(format!("it starts {started}"));
        }
        let cause = own_cause(&started, &files.definition(&started)?)?;
        Some(format!("it starts {started}: {cause}"))
    })
}

fn own_cause(name: &str, definition: &Definition) -> Option<String> {
    if UPDATERS.contains(&name) {
        return Some("an updater that may reboot".to_owned());
    }
    for key in ["Wants", "Requires", "BindsTo", "Upholds", "OnSuccess"] {
        let mut named = definition.values("Unit", key).iter().flat_map(|list| list.split_whitespace());
        if let Some(end) = named.find(|name| is_end(name)) {
            return Some(format!("its {key}= names {end}"));
        }
    }
    let action = definition.value("Unit", "SuccessAction").filter(|action| {
        let action = action.trim_end_matches("-force").trim_end_matches("-immediate");
        ENDS.contains(&action)
    });
    if let Some(action) = action {
        return Some(format!("its SuccessAction= is {action}"));
    }
    let keys = ["ExecStartPre", "ExecStart", "ExecStartPost"];
    let ending = keys.iter().flat_map(|key| definition.values("Service", key)).find(|command| ends_boot(command))?;
    Some(format!("it runs {}", ending.trim_start_matches(['@', '-', ':', '+', '!', '|'])))
}

/// Returns the unit that a timer or path starts.
fn triggered(name: &str, definition: &Definition) -> Option<String> {
    let (stem, section) = match name.rsplit_once('.')? {
        (stem, "timer") => (stem, "Timer"),
        (stem, "path") => (stem, "Path"),
        _ => return None,
    };
    Some(definition.value(section, "Unit").map_or_else(|| format!("{stem}.service"), str::to_owned))
}

/// Returns true for a target that ends the boot.
fn is_end(unit: &str) -> bool {
    unit.strip_suffix(".target").is_some_and(|name| ENDS.contains(&name))
}

/// Returns true if a command line ends the boot, also inside the text of a shell.
fn ends_boot(line: &str) -> bool {
    // Each part between separators of a shell is a command.
    line.split([';', '&', '|', '(', ')', '{', '}']).any(|command| {
        let words: Vec<&str> = command.split([' ', '\t', '"', '\'']).filter(|word| !word.is_empty()).collect();
        (0..words.len()).any(|at| is_ending_call(words[at], &words[at + 1..], at == 0))
    })
}

/// Returns true if `program` with these arguments ends the boot. Other words than the first may be arguments, unless they
/// are paths of programs.
fn is_ending_call(program: &str, arguments: &[&str], first: bool) -> bool {
    let program = program.trim_start_matches(['@', '-', ':', '+', '!']);
    let (directory, name) = program.rsplit_once('/').unwrap_or(("", program));
    let is_program = first || matches!(directory, "/bin" | "/sbin" | "/usr/bin" | "/usr/sbin");
    let has = |words: &[&str]| arguments.iter().any(|word| words.contains(word));
    match name {
        "systemctl" => {
            let mut verbs = arguments.iter().filter(|word| !word.starts_with('-'));
            let verb = verbs.next().copied().unwrap_or_default();
            ENDS.contains(&verb) || matches!(verb, "start" | "isolate") && verbs.any(|unit| is_end(unit))
        }
        "reboot" | "poweroff" | "halt" => is_program,
        "shutdown" => is_program && !has(&["-c"]),
        "bootc" => has(&["upgrade", "update", "switch"]) && has(&["--apply"]),
        "rpm-ostree" => is_program && has(&["--reboot", "-r", "--trigger-automatic-update-policy"]),
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::definition::{Entry, UnitDirectory};
    use super::*;

    #[test]
    fn commands_that_end_the_boot() {
        for command in [
            "/usr/bin/systemctl reboot",
            "-/bin/systemctl --no-block poweroff",
            "systemctl --force --force kexec",
            "systemctl isolate reboot.target",
            "systemctl start --no-block soft-reboot.target",
            "/sbin/reboot",
            "/usr/sbin/shutdown -r +1",
            "@/usr/sbin/shutdown shutdown -h now",
            "/bin/sh -c \"update && systemctl reboot\"",
            "/bin/bash -c 'if test -e /run/x; then /sbin/reboot; fi'",
            "/usr/bin/env bash -c 'touch /x; reboot'",
            "/usr/bin/bootc update --apply --quiet",
            "/usr/bin/bootc upgrade --quiet --apply",
            "/usr/bin/rpm-ostree upgrade --quiet --trigger-automatic-update-policy",
            "rpm-ostree rebase --reboot x",
        ] {
            assert!(ends_boot(command), "{command}");
        }
        for command in [
            "/usr/bin/systemctl restart reboot-watcher.service",
            "/usr/bin/systemctl is-active reboot.target",
            "/usr/bin/systemctl daemon-reload",
            "/usr/sbin/shutdown -c",
            "/usr/bin/echo reboot",
            "/usr/bin/rm -f /run/reboot",
            "/usr/bin/test -e /etc/halt",
            "/usr/libexec/x --socket /run/shutdown",
            "/usr/bin/echo rpm-ostree -r",
            "/usr/lib/x --on-failure reboot",
            "/usr/bin/bootc upgrade --check",
            "/usr/bin/bootc status --apply",
            "/usr/bin/rpm-ostree status",
            "/usr/lib/systemd/systemd-update-done",
            "",
        ] {
            assert!(!ends_boot(command), "{command}");
        }
    }

    /// Returns the unit files of an image whose final target wants all of `units`, and those of an administrator.
    fn files(units: &[(&str, &str)], etc: &[(&str, &str)]) -> UnitFiles {
        let file = |&(name, text): &(&str, &str)| (name.to_owned(), Entry::File(text.to_owned()));
        let wants = |name: &str| (name.to_owned(), Some(String::new()));
        let all = units.iter().chain(etc).map(|(name, _)| wants(name)).collect();
        let target = ("multi-user.target.wants".to_owned(), Entry::Directory(all));
        let of = |path: &str, entries| UnitDirectory { path: path.to_owned(), entries };
        UnitFiles(vec![
            of("/etc/systemd/system", etc.iter().map(file).collect()),
            of("/usr/lib/systemd/system", units.iter().map(file).chain([target]).collect()),
        ])
    }

    fn held(files: &UnitFiles, active: &[&str], policy: &Policy) -> Vec<(String, String)> {
        let active = active.iter().map(|&name| name.to_owned()).collect();
        let actions = holds(files, "multi-user.target", &active, policy);
        assert!(actions.iter().all(|action| action.class == Class::Hold && action.jobs().is_empty()));
        let cause = |reason: &str| reason.strip_suffix("; it is not started before the next boot").unwrap().to_owned();
        actions.into_iter().map(|action| (action.unit, cause(&action.reason))).collect()
    }

    #[test]
    fn units_that_may_end_the_boot_are_held_back() {
        let reboots = ("job.service", "[Service]\nExecStart=/usr/bin/true\nExecStart=-/usr/bin/systemctl reboot\n");
        let reset = "[Service]\nExecStart=/sbin/reboot\nExecStart=\nExecStart=/usr/bin/true\n";
        for (name, text, expected) in [
            (
                "zincati.service",
                "[Service]\nExecStart=/usr/libexec/zincati agent\n",
                Some("an updater that may reboot"),
            ),
            ("rpm-ostreed-automatic.timer", "[Timer]\nOnBootSec=1h\n", Some("an updater that may reboot")),
            ("a.service", reboots.1, Some("it runs /usr/bin/systemctl reboot")),
            ("job.timer", "[Timer]\nOnBootSec=1h\n", Some("it starts job.service: it runs /usr/bin/systemctl reboot")),
            ("b.path", "[Path]\nUnit=job.service\n", Some("it starts job.service: it runs /usr/bin/systemctl reboot")),
            ("c.timer", "[Timer]\nUnit=reboot.target\n", Some("it starts reboot.target")),
            ("d.service", "[Unit]\nSuccessAction=reboot-force\n", Some("its SuccessAction= is reboot-force")),
            ("e.service", "[Unit]\nOnSuccess=poweroff.target\n", Some("its OnSuccess= names poweroff.target")),
            ("watchdog.service", "[Unit]\nFailureAction=reboot\n[Service]\nExecStart=/bin/x\n", None),
            ("shutdown.service", "[Unit]\nBefore=reboot.target\n[Service]\nExecStop=/sbin/reboot\n", None),
            ("reset.service", reset, None),
            ("kubelet.service", "[Service]\nExecStart=/usr/bin/kubelet\n", None),
            ("other.timer", "[Timer]\nUnit=missing.service\n", None),
        ] {
            let mut all = files(&[(name, text)], &[]);
            // Only the timer and the path start it.
            all.0[1].entries.insert(reboots.0.to_owned(), Entry::File(reboots.1.to_owned()));
            let found = held(&all, &[], &Policy::default());
            let expected: Vec<_> = expected.into_iter().map(|cause| (name.to_owned(), cause.to_owned())).collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn running_units_and_those_of_the_administrator_are_left_alone() {
        let reboots = "[Service]\nExecStart=/sbin/reboot\n";
        let image = files(&[("a.service", reboots)], &[]);
        assert_eq!(held(&image, &[], &Policy::default()).len(), 1);
        assert_eq!(held(&image, &["a.service"], &Policy::default()), []);
        // The installer's own units reboot the machine when it is installed.
        assert_eq!(held(&files(&[], &[("a.service", reboots)]), &[], &Policy::default()), []);
        assert_eq!(held(&files(&[("a.service", reboots)], &[("a.service", "")]), &[], &Policy::default()), []);
        let policy = |rule, wish| Policy::new([(rule, wish)]).unwrap();
        assert_eq!(held(&image, &[], &policy("a.service", "never")), []);
        assert_eq!(held(&image, &[], &policy("a.service", "stop")).len(), 1);
        assert_eq!(held(&image, &[], &policy("a*", "restart")).len(), 1, "only an exact name permits it");
    }

    #[test]
    fn units_that_a_reboot_needs_are_not_held_back() {
        let names = "[Unit]\nWants=reboot.target\n[Service]\nExecStart=/usr/bin/true\n";
        let mut image = files(&[("a.service", names)], &[]);
        for (name, text) in [
            ("reboot.target", "[Unit]\nRequires=systemd-reboot.service\n"),
            ("systemd-reboot.service", "[Unit]\nSuccessAction=reboot-force\n"),
        ] {
            image.0[1].entries.insert(name.to_owned(), Entry::File(text.to_owned()));
        }
        let held = held(&image, &[], &Policy::default());
        assert_eq!(held, [("a.service".to_owned(), "its Wants= names reboot.target".to_owned())]);
    }
}
