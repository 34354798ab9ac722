//! Compares two definitions of a unit, and ignores differences that do not affect a running unit. Pure.

use super::definition::Definition;

/// The difference between a unit's definition in the new tree and the one that it was started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Difference {
    /// No difference, or only one that a reload of systemd applies without affecting the running unit.
    #[default]
    Same,
    /// Only the commands that reload the unit differ.
    Reload,
    /// These keys differ, for example `[Service] ExecStart=`.
    Changed(Vec<String>),
    /// The new tree has no unit file for it.
    Gone,
    /// The new tree masks it.
    Masked,
}

/// The key in `[Unit]` with which an image requests an action for the unit.
pub(super) const KEY: &str = "X-NodeImagePivot";

/// Keys of `[Service]` that systemd itself uses after the start. A reload of systemd applies them to a running service.
const MANAGERS: &[&str] = &[
    "ExecStop",
    "ExecStopPost",
    "FinalKillSignal",
    "KillMode",
    "KillSignal",
    "Restart",
    "RestartForceExitStatus",
    "RestartKillSignal",
    "RestartMaxDelaySec",
    "RestartMode",
    "RestartPreventExitStatus",
    "RestartSec",
    "RestartSteps",
    "SendSIGHUP",
    "SendSIGKILL",
    "SuccessExitStatus",
    "TimeoutAbortSec",
    "TimeoutSec",
    "TimeoutStartFailureMode",
    "TimeoutStartSec",
    "TimeoutStopFailureMode",
    "TimeoutStopSec",
    "WatchdogSignal",
];

/// Keys that are used only when the service is reloaded.
const RELOADS: &[&str] = &["ExecReload", "ExecReloadPost"];

/// Returns true if a change of this key does not affect a running unit. `[Unit]` holds order, dependencies and conditions,
/// which systemd uses at the next job. The exception is `JoinsNamespaceOf=`, which puts processes into a namespace.
fn is_harmless(section: &str, key: &str) -> bool {
    match section {
        "Unit" => key != "JoinsNamespaceOf",
        "Install" => true,
        "Service" => key.starts_with("X-") || MANAGERS.contains(&key),
        _ => section.starts_with("X-") || key.starts_with("X-"),
    }
}

/// Compares the definition that a unit was started with to that of the new tree. Returns [`Difference::Same`] for a unit
/// that had no unit file: a transient or generated one, or a mount that was made without systemd.
pub fn compare(old: Option<&Definition>, new: Option<&Definition>) -> Difference {
    let Some(old) = old.filter(|old| old.fragment.is_some() && !old.masked) else { return Difference::Same };
    let Some(new) = new.filter(|new| new.fragment.is_some()) else { return Difference::Gone };
    if new.masked {
        return Difference::Masked;
    }
    let mut changed = Vec::new();
    let mut reload = false;
    let sections: std::collections::BTreeSet<_> = old.settings.keys().chain(new.settings.keys()).collect();
    for section in sections {
        let keys = |definition: &Definition| definition.settings.get(section).cloned().unwrap_or_default();
        let (before, after) = (keys(old), keys(new));
        let names: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
        for key in names {
            if is_harmless(section, key) || before.get(key) == after.get(key) {
                continue;
            }
            if section == "Service" && RELOADS.contains(&key.as_str()) {
                reload = true;
            } else {
                changed.push(format!("[{section}] {key}="));
            }
        }
    }
    match (changed.is_empty(), reload) {
        (false, _) => Difference::Changed(changed),
        (true, true) => Difference::Reload,
        (true, false) => Difference::Same,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::definition::{Entry, UnitDirectory, UnitFiles};
    use super::*;
    use proptest::prelude::*;

    fn defined(text: &str) -> Definition {
        let entries = [("a.service".to_owned(), Entry::File(text.to_owned()))].into();
        UnitFiles(vec![UnitDirectory { path: "/d".into(), entries }]).definition("a.service").unwrap()
    }

    fn between(old: &str, new: &str) -> Difference {
        compare(Some(&defined(old)), Some(&defined(new)))
    }

    #[test]
    fn keys_that_matter_are_differences() {
        let changed = |keys: &[&str]| Difference::Changed(keys.iter().map(|&key| key.to_owned()).collect());
        let start = "[Service]\nExecStart=/bin/a\n";
        for (old, new, expected) in [
            (start, start, Difference::Same),
            (start, "# x\n[Unit]\nDescription=b\nAfter=c.service\n[Service]\nExecStart = /bin/a\n", Difference::Same),
            (start, "[Service]\nExecStart=/bin/a\n[Install]\nWantedBy=x.target\n", Difference::Same),
            (
                start,
                "[Service]\nExecStart=/bin/a\nTimeoutStopSec=3\nExecStop=/bin/b\nRestart=always\n",
                Difference::Same,
            ),
            (start, "[Service]\nExecStart=/bin/a\nX-Foo=1\n[X-Bar]\nA=b\n", Difference::Same),
            (start, "[Service]\nExecStart=/bin/a\nExecReload=/bin/kill -HUP $MAINPID\n", Difference::Reload),
            (start, "[Service]\nExecStart=/bin/a\nExecReloadPost=/bin/true\n", Difference::Reload),
            (start, "[Service]\nExecStart=/bin/a -x\n", changed(&["[Service] ExecStart="])),
            (start, "[Service]\nExecStart=/bin/a\nUser=b\nExecReload=/c\n", changed(&["[Service] User="])),
            (
                start,
                "[Unit]\nJoinsNamespaceOf=b.service\n[Service]\nExecStart=/bin/a\n",
                changed(&["[Unit] JoinsNamespaceOf="]),
            ),
            ("[Timer]\nOnBootSec=1\n", "[Timer]\nOnBootSec=2\n", changed(&["[Timer] OnBootSec="])),
            // The order of one key's values matters: these are commands.
            (
                "[Service]\nExecStartPre=/a\nExecStartPre=/b\n",
                "[Service]\nExecStartPre=/b\nExecStartPre=/a\n",
                changed(&["[Service] ExecStartPre="]),
            ),
        ] {
            assert_eq!(between(old, new), expected, "{old}\n->\n{new}");
        }
    }

    #[test]
    fn units_without_a_file_in_one_tree() {
        let some = defined("[Service]\nExecStart=/bin/a\n");
        let drop_in_only = Definition { fragment: None, ..some.clone() };
        let masked = Definition { masked: true, ..some.clone() };
        for (old, new, expected) in [
            (None, None, Difference::Same),
            (None, Some(&some), Difference::Same),
            (Some(&drop_in_only), None, Difference::Same),
            (Some(&masked), Some(&some), Difference::Same),
            (Some(&some), None, Difference::Gone),
            (Some(&some), Some(&drop_in_only), Difference::Gone),
            (Some(&some), Some(&masked), Difference::Masked),
        ] {
            assert_eq!(compare(old, new), expected, "{old:?} {new:?}");
        }
    }

    proptest! {
        /// Comments, blank lines, spaces around `=`, and the order of sections and of different keys are ignored.
        #[test]
        fn formatting_is_not_a_difference(
            keys in proptest::collection::btree_map("[A-W][a-z]{1,8}", "[a-z/][a-z /]{0,8}[a-z]", 1..6),
            comment in "[ -~]{0,20}",
        ) {
            let lines = |keys: Vec<(&String, &String)>, equals: &str| {
                keys.iter().map(|(key, value)| format!("{key}{equals}{value}\n")).collect::<String>()
            };
            let old = format!("[Unit]\nAfter=x\n[Service]\n{}", lines(keys.iter().collect(), "="));
            let reversed = lines(keys.iter().rev().collect(), "  =\t");
            let new = format!("; {comment}\n[Service]\n\n{reversed}#{comment}\n[Unit]\nDescription={comment}\nAfter=x\n");
            prop_assert_eq!(between(&old, &new), Difference::Same);
        }

        /// A definition equals itself, and the comparison gives the same result in both directions.
        #[test]
        fn comparison_is_symmetric(old in "(\\[Service\\]\n)?([A-C]=[a-c]?\n){0,5}", new in "(\\[Service\\]\n)?([A-C]=[a-c]?\n){0,5}") {
            prop_assert_eq!(between(&old, &old), Difference::Same);
            prop_assert_eq!(between(&old, &new), between(&new, &old));
        }
    }
}
