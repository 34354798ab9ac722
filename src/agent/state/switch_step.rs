//! The steps of a switch, in their order: `plan` shows them, switch and refresh apply them, rollback and undo undo them.

use serde::{Deserialize, Serialize};

/// A step that changes files and mounts; the phase switch applies it, and a failed switch rolls it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
pub enum FileStep {
    /// The ref of the node image in the store.
    #[strum(serialize = "the ref of the node image")]
    Ref,
    /// The mark that keeps a generator from arming the pivot again.
    #[strum(serialize = "the mark for the generator")]
    Marker,
    /// The mount of the node image's `/usr`.
    #[strum(serialize = "the mount of /usr")]
    Usr,
    /// The merge of `/etc`.
    #[strum(serialize = "the merge of /etc")]
    Etc,
}

/// A step in which the running system adopts the files; the phase refresh applies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
pub enum LiveStep {
    /// The loaded SELinux policy, and the labels that only it knows.
    #[strum(serialize = "the SELinux policy")]
    Policy,
    /// PID 1 and the managers of users.
    #[strum(serialize = "the re-execution of systemd")]
    Manager,
    /// Accounts, caches and the message bus.
    #[strum(serialize = "accounts, caches and the message bus")]
    Files,
    /// The units that run old code.
    #[strum(serialize = "the unit plan")]
    Units,
}

/// A step of the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SwitchStep {
    /// Of the phase switch.
    File(FileStep),
    /// Of the phase refresh.
    Live(LiveStep),
}

impl FileStep {
    /// The order of a switch. The mark is set before `/usr` changes, so that no generator arms the pivot again.
    pub const ALL: [Self; 4] = [Self::Ref, Self::Marker, Self::Usr, Self::Etc];
}

impl LiveStep {
    /// The order of a refresh. The policy is first, because confined programs cannot use the new files until the kernel
    /// knows their labels. PID 1 follows, because it may be unable to start services until it is re-executed from the new
    /// `/usr`.
    pub const ALL: [Self; 4] = [Self::Policy, Self::Manager, Self::Files, Self::Units];
}

impl SwitchStep {
    /// The order of an undo. `/usr` is the last of the restored files, because PID 1 may be unable to start services from
    /// then on. The running system adopts the restored files forwards: PID 1 looks labels up in the loaded policy, and
    /// units are restarted with caches that are rebuilt. The mark is last, so that a generator that runs before does not
    /// arm the pivot again.
    pub const UNDO: [Self; 8] = [
        Self::File(FileStep::Etc),
        Self::File(FileStep::Ref),
        Self::File(FileStep::Usr),
        Self::Live(LiveStep::Policy),
        Self::Live(LiveStep::Files),
        Self::Live(LiveStep::Manager),
        Self::Live(LiveStep::Units),
        Self::File(FileStep::Marker),
    ];

    /// Returns all steps in the order of a switch.
    pub fn all() -> impl Iterator<Item = Self> {
        FileStep::ALL.into_iter().map(Self::File).chain(LiveStep::ALL.into_iter().map(Self::Live))
    }

    /// Returns a noun phrase for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::File(step) => step.into(),
            Self::Live(step) => step.into(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_undo_has_each_step_of_the_switch_once() {
        let names = |steps: &mut dyn Iterator<Item = SwitchStep>| {
            let mut names: Vec<_> = steps.map(|step| serde_json::to_string(&step).unwrap()).collect();
            names.sort();
            names
        };
        let all = names(&mut SwitchStep::all());
        assert_eq!(names(&mut SwitchStep::UNDO.into_iter()), all);
        assert_eq!(all.iter().filter(|name| *name == "\"usr\"").count(), 1);
    }
}
