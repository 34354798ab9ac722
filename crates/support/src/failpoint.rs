//! Failpoints: named places, one before each act, where a test makes the agent die or the act fail.
//!
//! They exist with the cargo feature `failpoints` and in unit tests; what is shipped has none (a test
//! looks). They sit in the wrappers through which acts are done (files, mounts, entries of `/etc`,
//! programs, systemd), not beside the calls: a new act that goes through one of these has its failpoint.
//!
//! A point is told `armed` in the directory that `NODE_IMAGE_PIVOT_FAILPOINTS` names: one line `NAME SKIP
//! ACTION`, where NAME is as [`hit`] writes it or `*` for any, SKIP is how many hits pass before, and
//! ACTION is `kill`, `enospc`, `eio` or `sleep` (2 s). It acts once: the file is removed first. Where a file `hits` is in that
//! directory, the name of each point is appended to it, once for each process.

use std::fmt::Display;
use std::io;

macro_rules! points {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Every failpoint there is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point { $($(#[$doc])* $variant,)* }

        impl Point {
            /// All of them.
            pub const ALL: &[Point] = &[$(Point::$variant,)*];

            /// Its name in the test's files.
            pub fn name(self) -> &'static str {
                match self { $(Point::$variant => $name,)* }
            }
        }
    };
}

points! {
    /// Before the record is saved; the detail is its step.
    Record = "record",
    /// Before a file of the agent's own directories is replaced; the detail is its name.
    Write = "write",
    /// Before one is removed.
    Remove = "remove",
    /// Before an entry of the delta tree is made.
    Delta = "delta",
    /// Before the finished delta tree gets its name.
    DeltaPublish = "delta-publish",
    /// Before an overlay is put together; nobody sees it yet.
    Overlay = "overlay",
    /// Before a program of the new tree is tried.
    Trial = "trial",
    /// Before the new `/usr` appears.
    Expose = "expose",
    /// After that, before it is looked at.
    Exposed = "exposed",
    /// Before it is taken away.
    Withdraw = "withdraw",
    /// Before the node store's ref is set or removed; the detail says which.
    Ref = "ref",
    /// Before the undo record of `/etc` is made.
    EtcRecord = "etc-record",
    /// Before a conflicting version of the node image is saved.
    EtcAside = "etc-aside",
    /// Before content that an act replaces is saved.
    EtcSave = "etc-save",
    /// Before the journal's line about an act.
    EtcBegin = "etc-begin",
    /// In the middle of that line.
    EtcJournal = "etc-journal",
    /// Before a piece of a file's content is written.
    EtcContent = "etc-content",
    /// Before the directory for new versions is made or removed.
    EtcStaging = "etc-staging",
    /// Before a new version is made in it.
    EtcMake = "etc-make",
    /// Before each of owner, mode and attributes is set.
    EtcDress = "etc-dress",
    /// Before an entry is removed.
    EtcUnlink = "etc-unlink",
    /// Before a new version is renamed into its place.
    EtcRename = "etc-rename",
    /// Before the file system of `/etc`, or of its undo record, is synced.
    EtcSync = "etc-sync",
    /// Before an act is taken back.
    EtcTakeBack = "etc-take-back",
    /// Before the undo record's plan is removed, which ends the record.
    EtcForget = "etc-forget",
    /// Before the rest of it is.
    EtcForgotten = "etc-forgotten",
    /// Before a program is started; the detail is its name.
    Tool = "tool",
    /// Before the message bus is told to reload.
    ReloadBus = "reload-bus",
    /// Before a call to systemd that changes something; the detail is what.
    Systemd = "systemd",
}

/// Without the feature: nothing.
///
/// # Errors
/// None.
#[cfg(not(any(test, feature = "failpoints")))]
#[inline(always)]
pub fn hit(_: Point, _: impl Display) -> io::Result<()> {
    Ok(())
}

/// The agent is at `point`; its name is followed by a space and `detail` where that is not empty.
///
/// # Errors
/// What the point is armed with.
#[cfg(any(test, feature = "failpoints"))]
pub fn hit(point: Point, detail: impl Display) -> io::Result<()> {
    let name = format!("{} {detail}", point.name());
    live::hit(name.trim_end())
}

/// Without the feature: `act`.
#[cfg(not(any(test, feature = "failpoints")))]
pub fn rehearse<T>(act: impl FnOnce() -> T) -> T {
    act()
}

#[cfg(any(test, feature = "failpoints"))]
pub use live::fail_here;
#[cfg(any(test, feature = "failpoints"))]
pub use live::rehearse;

#[cfg(any(test, feature = "failpoints"))]
mod live {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::path::Path;
    use std::sync::Mutex;
    use std::{fs, io};

    use rustix::io::Errno;

    /// Names the directory of a test's files.
    const DIRECTORY: &str = "NODE_IMAGE_PIVOT_FAILPOINTS";

    thread_local! {
        /// How many hits on this thread pass before one fails, and how; counts down.
        static HERE: Cell<Option<(usize, Errno)>> = const { Cell::new(None) };
    }
    thread_local! {
        /// Whether this thread rehearses.
        static REHEARSAL: Cell<bool> = const { Cell::new(false) };
    }
    /// The armed line that was read last, and how often its point was hit.
    static PASSED: Mutex<(String, usize)> = Mutex::new((String::new(), 0));
    /// What was written to `hits`.
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

    /// Lets one hit on this thread fail, after `skip` that do not. Returns whether the one from before
    /// is still to come.
    pub fn fail_here(failure: Option<(usize, Errno)>) -> bool {
        HERE.replace(failure).is_some()
    }

    /// Runs `act`, whose points are none: it does in private what will be done for real later.
    pub fn rehearse<T>(act: impl FnOnce() -> T) -> T {
        REHEARSAL.set(true);
        let done = act();
        REHEARSAL.set(false);
        done
    }

    pub(super) fn hit(name: &str) -> io::Result<()> {
        if REHEARSAL.get() {
            return Ok(());
        }
        if let Some((skip, errno)) = HERE.get() {
            HERE.set(skip.checked_sub(1).map(|skip| (skip, errno)));
            return if skip == 0 { Err(errno.into()) } else { Ok(()) };
        }
        let Some(directory) = std::env::var_os(DIRECTORY) else { return Ok(()) };
        let directory = Path::new(&directory);
        tell(directory, name);
        let Ok(line) = fs::read_to_string(directory.join("armed")) else { return Ok(()) };
        let mut words = line.trim().rsplitn(3, ' ');
        let (Some(action), Some(skip), Some(armed)) = (words.next(), words.next(), words.next()) else {
            return Err(io::Error::other(format!("not a failpoint: {line}")));
        };
        if (armed != name && armed != "*") || !is_due(&line, skip) {
            return Ok(());
        }
        fs::remove_file(directory.join("armed"))?;
        match action {
            "kill" => nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).map_err(Into::into),
            "enospc" => Err(Errno::NOSPC.into()),
            "eio" => Err(Errno::IO.into()),
            "sleep" => {
                std::thread::sleep(std::time::Duration::from_secs(2));
                Ok(())
            }
            _ => Err(io::Error::other(format!("not a failpoint's action: {action}"))),
        }
    }

    fn tell(directory: &Path, name: &str) {
        let Ok(mut hits) = fs::OpenOptions::new().append(true).open(directory.join("hits")) else { return };
        let mut told = TOLD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if told.insert(name.to_owned()) {
            let _ = writeln!(hits, "{name}");
        }
    }

    fn is_due(line: &str, skip: &str) -> bool {
        let mut passed = PASSED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if passed.0 != line {
            *passed = (line.to_owned(), 0);
        }
        passed.1 += 1;
        passed.1 > skip.parse().unwrap_or(0)
    }
}
