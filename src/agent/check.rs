//! `check`: the checks that need no node image, without a call of the agent. They change nothing.

use std::path::Path;

use serde::Serialize;
use strum::IntoStaticStr;

use super::new_usr::USR;
use super::phases::{Start, check_system, decide, wanted};
use super::state::{self, StateDir, Step};
use super::{Error, storage};
use crate::config::Settings;
use crate::preflight;
use crate::report::{Outcome, RefusalId, one_line};
use overlay_root::Namespace;

const RECORD: [RefusalId; 3] = [RefusalId::HalfDone, RefusalId::LostRecord, RefusalId::Switched];
const MACHINE: [RefusalId; 9] = [
    RefusalId::OldKernel,
    RefusalId::NoOverlay,
    RefusalId::NotAllowed,
    RefusalId::TooDeep,
    RefusalId::NotStackable,
    RefusalId::Unlocked,
    RefusalId::ModulesMounted,
    RefusalId::EtcReadOnly,
    RefusalId::EtcLocked,
];
const SETTINGS: [RefusalId; 3] = [RefusalId::Configuration, RefusalId::ModeOff, RefusalId::TooLittle];

/// Returns the ids of all checks, in their order.
pub fn checks() -> impl Iterator<Item = RefusalId> {
    RECORD.into_iter().chain(MACHINE).chain(SETTINGS)
}

/// The result of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum CheckResult {
    /// It permits the switch.
    Passed,
    /// It refuses the switch.
    Refused,
    /// It refuses the switch, and the caller ignores it.
    Ignored,
    /// An earlier refusal prevents it.
    NotRun,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name.
    pub id: &'static str,
    /// Its result.
    pub result: CheckResult,
    /// Cause and remedy of a refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The answer of `check`. `schema` changes only if a field is removed or changes its meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checks {
    /// Version of this document: 1.
    pub schema: u32,
    /// True if all checks could be made, and none refuses that the caller does not ignore.
    pub passed: bool,
    /// All checks, in their order.
    pub checks: Vec<Check>,
    /// Facts that do not prevent the switch, a line each.
    pub warnings: Vec<String>,
    /// Cause for which the other checks could not be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Checks {
    /// Runs the checks on this machine. Those in `ignored` are shown, but do not count.
    pub async fn run(paths: &StateDir, ignored: &[RefusalId]) -> Self {
        let mut found = Found::default();
        let error = found.look(paths, Settings::load()).await.err();
        found.judge(ignored, error)
    }

    /// Returns the outcome: a refusal is certain, also if other checks could not be made.
    pub fn outcome(&self) -> Outcome {
        match self.checks.iter().any(|check| check.result == CheckResult::Refused) {
            true => Outcome::Refused,
            false if self.error.is_some() => Outcome::Internal,
            false => Outcome::Done,
        }
    }

    /// Returns a line for each check and each warning, and one about the result.
    pub fn lines(&self) -> Vec<String> {
        let line = |check: &Check| {
            let result: &str = check.result.into();
            let message = check.message.as_ref().map(|message| format!(": {}", one_line(message)));
            format!("{result:<8} {}{}", check.id, message.unwrap_or_default())
        };
        let mut lines: Vec<_> = self.checks.iter().map(line).collect();
        lines.extend(self.warnings.iter().map(|warning| format!("warning  {}", one_line(warning))));
        lines.extend(self.error.iter().map(|error| format!("error    {}", one_line(error))));
        let end = match self.outcome() {
            Outcome::Done => "no check refuses the switch; node-image-pivot plan checks the node image",
            Outcome::Refused => "the switch would be refused; node-image-pivot explain ID explains a check",
            _ => "no check refuses the switch, but not all could be made",
        };
        lines.push(end.to_owned());
        lines
    }
}

/// The checks that were made, each with its refusal.
#[derive(Default)]
struct Found {
    made: Vec<(RefusalId, Option<String>)>,
    warnings: Vec<String>,
}

impl Found {
    async fn look(&mut self, paths: &StateDir, settings: anyhow::Result<Settings>) -> Result<(), Error> {
        if self.add(&RECORD, of_record(&state::open(paths).step))?.is_none() {
            return Ok(());
        }
        let mounts = Namespace::init().mounts()?;
        if let Some(choice) = self.add(&MACHINE, check_system(&mounts))? {
            self.warnings.extend(preflight::warnings(&mounts, Path::new(USR), &choice));
            self.warnings.extend(preflight::estimate(&choice.base));
        }
        let settings = settings.map_err(|error| Error::refused(RefusalId::Configuration, format!("{error:#}")));
        let Some(settings) = self.add(&SETTINGS[..1], settings)? else { return Ok(()) };
        // The pivot decides about its start before it looks for an image.
        let start = decide(&settings, &|path| path.exists());
        if let Some(Start::NothingToDo(reason)) = self.add(&SETTINGS[1..2], start)? {
            self.warnings.push(format!("nothing to do: {reason}"));
            return Ok(());
        }
        // The pull would end with this cause.
        let wanted = wanted(settings.image.as_ref()).await;
        let wanted = wanted.map_err(|failure| Error::refused(RefusalId::Configuration, failure.to_string()));
        if self.add(&SETTINGS[..1], wanted)?.is_some() {
            self.add(&SETTINGS[2..], storage::check(paths, settings.store))?;
        }
        Ok(())
    }

    /// Adds checks that were made together. Returns their value if none refuses.
    fn add<T>(&mut self, ids: &[RefusalId], result: Result<T, Error>) -> Result<Option<T>, Error> {
        let (value, refusals) = match result {
            Ok(value) => (Some(value), Vec::new()),
            Err(error) if error.reasons().iter().all(|reason| known(&reason.id).is_none()) => return Err(error),
            Err(error) => (None, error.reasons().to_vec()),
        };
        let refused = refusals.iter().filter_map(|reason| Some((known(&reason.id)?, Some(reason.message.clone()))));
        let refused: Vec<_> = refused.collect();
        let prevented = |id| refused.iter().any(|(by, _)| *by == id || prevents(*by, id));
        self.made.extend(ids.iter().filter(|id| !prevented(**id)).map(|id| (*id, None)));
        self.made.extend(refused);
        Ok(value)
    }

    fn judge(self, ignored: &[RefusalId], error: Option<Error>) -> Checks {
        let judged = checks().map(|id| {
            let (result, message) = match self.made.iter().rev().find(|(made, _)| *made == id) {
                None => (CheckResult::NotRun, None),
                Some((_, None)) => (CheckResult::Passed, None),
                Some((_, refusal)) if ignored.contains(&id) => (CheckResult::Ignored, refusal.clone()),
                Some((_, refusal)) => (CheckResult::Refused, refusal.clone()),
            };
            Check { id: id.as_str(), result, message }
        });
        let checks: Vec<_> = judged.collect();
        let error = error.map(|error| error.to_string());
        let passed = error.is_none() && checks.iter().all(|check| check.result != CheckResult::Refused);
        Checks { schema: 1, passed, checks, warnings: self.warnings, error }
    }
}

fn known(id: &str) -> Option<RefusalId> {
    checks().find(|known| known.as_str() == id)
}

/// Returns true if the check `id` is not made after the refusal `by`, which is of the same call.
fn prevents(by: RefusalId, id: RefusalId) -> bool {
    use RefusalId::{Configuration, NoOverlay, NotAllowed, NotStackable, OldKernel, TooDeep, TooLittle, Unlocked};
    match by {
        OldKernel | NoOverlay | NotAllowed => matches!(id, OldKernel | NoOverlay | NotAllowed | NotStackable),
        Unlocked => matches!(id, TooDeep | NotStackable),
        TooDeep => id == NotStackable,
        Configuration => id == TooLittle,
        _ => false,
    }
}

/// Refuses a system that is switched, because its `/usr` is not the one that the checks are about.
fn of_record(step: &Step) -> Result<(), Error> {
    match step {
        Step::Lost { message, .. } => Err(Error::refused(RefusalId::LostRecord, message.clone())),
        Step::Switching(_) | Step::Undoing(_) => Err(Error::refused(
            RefusalId::HalfDone,
            "a switch or an undo is under way or was interrupted; see node-image-pivot status",
        )),
        step if step.is_before_switch() => Ok(()),
        _ => Err(Error::refused(RefusalId::Switched, "this system is switched already; run undo before another check")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::mount::{MountFlags, mount_bind, mount_remount};
    use support::testing::private;

    use super::super::state::{refreshed, staged};
    use super::*;

    const IMAGE: &str = "node-image-pivot=force node-image-pivot.image=127.0.0.1:1/none:1 ";

    /// Runs the checks with this kernel command line.
    fn look(dir: &StateDir, line: &str) -> Found {
        let settings = Settings::load_from(Path::new("/nonexistent"), line);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut found = Found::default();
        runtime.block_on(found.look(dir, settings)).unwrap();
        found
    }

    fn of(checks: &Checks, id: RefusalId) -> CheckResult {
        checks.checks.iter().find(|check| check.id == id.as_str()).unwrap().result
    }

    #[test]
    fn the_checks_find_a_fault_of_the_machine_and_of_the_configuration() {
        private(|scratch| {
            let dir = StateDir::below(scratch);
            mount_bind("/etc", "/etc").unwrap();
            mount_remount("/etc", MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
            use CheckResult::{Ignored, NotRun, Passed, Refused};
            for (line, ignored, configuration, mode, etc) in [
                (IMAGE, &[][..], Passed, Passed, Refused),
                (IMAGE, &[RefusalId::EtcReadOnly], Passed, Passed, Ignored),
                ("node-image-pivot=off node-image-pivot.image=q.io/y:1", &[], Passed, Refused, Refused),
                ("node-image-pivot=off", &[], Refused, Refused, Refused),
                ("node-image-pivot=never", &[RefusalId::Configuration], Ignored, NotRun, Refused),
            ] {
                let checks = look(&dir, line).judge(ignored, None);
                let found = [RefusalId::Configuration, RefusalId::ModeOff, RefusalId::EtcReadOnly];
                assert_eq!(found.map(|id| of(&checks, id)), [configuration, mode, etc], "{line}: {checks:?}");
                assert!(!checks.passed || ignored == [RefusalId::EtcReadOnly], "{line}");
                assert!(
                    !checks
                        .checks
                        .iter()
                        .any(|check| check.message.is_some() != matches!(check.result, Refused | Ignored))
                );
            }
        });
    }

    #[test]
    fn a_machine_with_nothing_to_do_needs_no_image() {
        let scratch = tempfile::tempdir().unwrap();
        let mut settings = Settings::load_from(Path::new("/nonexistent"), "").unwrap();
        settings.probe_paths = vec!["/".into()];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut found = Found::default();
        runtime.block_on(found.look(&StateDir::below(scratch.path()), Ok(settings))).unwrap();
        assert!(found.warnings.contains(&"nothing to do: / exists".to_owned()), "{:?}", found.warnings);
        let checks = found.judge(&[], None);
        let found = SETTINGS.map(|id| of(&checks, id));
        assert_eq!(found, [CheckResult::Passed, CheckResult::Passed, CheckResult::NotRun]);
    }

    #[test]
    fn checks_behind_a_refusal_are_not_run() {
        use CheckResult::{NotRun, Passed, Refused};
        let ids = [RefusalId::NoOverlay, RefusalId::Unlocked, RefusalId::TooDeep, RefusalId::NotStackable];
        for (refused, expected) in [
            (RefusalId::OldKernel, [NotRun, Passed, Passed, NotRun]),
            (RefusalId::NoOverlay, [Refused, Passed, Passed, NotRun]),
            (RefusalId::Unlocked, [Passed, Refused, NotRun, NotRun]),
            (RefusalId::TooDeep, [Passed, Passed, Refused, NotRun]),
            (RefusalId::EtcLocked, [Passed; 4]),
        ] {
            let mut found = Found::default();
            found.add::<()>(&MACHINE, Err(Error::refused(refused, "m"))).unwrap();
            let checks = found.judge(&[], None);
            assert_eq!(ids.map(|id| of(&checks, id)), expected, "{refused:?}");
        }
    }

    #[test]
    fn a_refusal_of_another_check_counts() {
        let mut found = Found::default();
        found.add(&SETTINGS[..1], Ok(())).unwrap();
        found.add::<()>(&SETTINGS[2..], Err(Error::refused(RefusalId::Configuration, "the repo is sealed"))).unwrap();
        let checks = found.judge(&[], None);
        let found = [RefusalId::Configuration, RefusalId::TooLittle].map(|id| of(&checks, id));
        assert_eq!((checks.passed, found), (false, [CheckResult::Refused, CheckResult::NotRun]));
        assert!(Found::default().add::<()>(&SETTINGS, Err(Error::refused(RefusalId::StateFile, "m"))).is_err());
    }

    #[test]
    fn an_error_keeps_the_results_before_it() {
        use CheckResult::{NotRun, Passed};
        for (refused, outcome) in [(None, Outcome::Internal), (Some(RefusalId::EtcLocked), Outcome::Refused)] {
            let mut found = Found::default();
            found.add(&RECORD, Ok(())).unwrap();
            refused.into_iter().for_each(|id| drop(found.add::<()>(&MACHINE, Err(Error::refused(id, "m")))));
            let error = found.add::<()>(&SETTINGS[2..], Err(anyhow::anyhow!("cannot read\nthe repo").into()));
            let checks = found.judge(&[], error.err());
            assert_eq!((checks.passed, checks.outcome()), (false, outcome));
            assert_eq!([RefusalId::Switched, RefusalId::TooLittle].map(|id| of(&checks, id)), [Passed, NotRun]);
            assert!(checks.lines().contains(&"error    cannot read; the repo".to_owned()), "{:?}", checks.lines());
        }
    }

    #[test]
    fn only_refusals_that_are_not_ignored_count() {
        let found = || {
            let refusals = preflight::Refusals(vec![preflight::Refusal::EtcReadOnly, preflight::Refusal::EtcLocked]);
            let mut found = Found::default();
            assert_eq!(found.add::<()>(&MACHINE, Err(refusals.into())).unwrap(), None);
            assert!(found.add::<()>(&SETTINGS, Err(anyhow::anyhow!("unreadable").into())).is_err());
            found
        };
        let both = [RefusalId::EtcReadOnly, RefusalId::EtcLocked];
        for (ignored, passed) in [(&both[..0], false), (&both[..1], false), (&both[1..], false), (&both, true)] {
            assert_eq!(found().judge(ignored, None).passed, passed, "{ignored:?}");
        }
        let document = serde_json::to_value(found().judge(&both[..1], None)).unwrap();
        let results = [&document["checks"][0]["result"], &document["checks"][3]["result"], &document["checks"][10]];
        let locked = serde_json::json!({"id": "etc-read-only", "result": "ignored",
                                        "message": preflight::Refusal::EtcReadOnly.to_string()});
        assert_eq!(results, [&"not-run".into(), &"passed".into(), &locked]);
    }

    #[test]
    fn a_switched_system_is_not_checked() {
        let lost = Step::Lost { message: "it is lost".into(), tree: staged().into() };
        for (step, id) in [
            (lost, Some(RefusalId::LostRecord)),
            (Step::Switching(staged()), Some(RefusalId::HalfDone)),
            (Step::Refreshed(refreshed()), Some(RefusalId::Switched)),
            (Step::Staged(staged()), None),
            (Step::Idle, None),
        ] {
            let mut found = Found::default();
            assert_eq!(found.add(&RECORD, of_record(&step)).unwrap().is_none(), id.is_some());
            let checks = found.judge(&[], None);
            assert_eq!(checks.passed, id.is_none());
            id.iter().for_each(|id| assert_eq!(of(&checks, *id), CheckResult::Refused));
        }
    }

    #[test]
    fn each_check_is_a_line_with_its_id() {
        let check = |id, result, message: Option<&str>| Check { id, result, message: message.map(str::to_owned) };
        let checks = Checks {
            schema: 1,
            passed: false,
            checks: vec![
                check("old-kernel", CheckResult::Passed, None),
                check("etc-locked", CheckResult::Ignored, Some("run\nchattr")),
                check("too-deep", CheckResult::Refused, Some("x")),
                check("too-little", CheckResult::NotRun, None),
            ],
            warnings: vec!["w".into()],
            error: None,
        };
        assert_eq!(
            checks.lines(),
            [
                "passed   old-kernel",
                "ignored  etc-locked: run; chattr",
                "refused  too-deep: x",
                "not-run  too-little",
                "warning  w",
                "the switch would be refused; node-image-pivot explain ID explains a check",
            ]
        );
    }
}
