//! Failpoints: named places, each directly before an act, where a test kills the agent or makes the act fail.
//!
//! They exist in unit tests and with the cargo feature `failpoints`. Without it, [`hit`] does nothing, and a test
//! checks that the shipped binary contains none. The calls of [`hit`] are in the functions that perform acts (write a
//! file, mount, change an entry of `/etc`, start a program, call systemd), not beside the callers. A new act that uses
//! such a function has a failpoint without further code.
//!
//! # Use from another process
//!
//! The environment variable `NODE_IMAGE_PIVOT_FAILPOINTS` names a directory with two optional files:
//!
//! * `armed`: one line `NAME SKIP ACTION`. NAME is the name of a hit, that is the point's name and its detail (for
//!   example `write state.json`), or `*` for each hit. SKIP is the number of hits to let pass first. ACTION is `kill`
//!   (SIGKILL), `enospc`, `eio` or `sleep` (2 s). The point removes the file and then acts, so it acts once.
//! * `hits`: the agent appends the name of each hit to this file, once for each name and process.
//!
//! # Use from a test of the same process
//!
//! `arm_thread(skip, errno)` makes one later hit on the calling thread fail; `disarm_thread()` tells whether it did.
//!
//! # Example
//!
//! ```
//! use support::failpoint::{Point, hit};
//!
//! fn replace(name: &str) -> std::io::Result<()> {
//!     hit(Point::Write, name)?;
//!     // The act.
//!     Ok(())
//! }
//! # replace("state.json").unwrap();
//! ```

use std::fmt::Display;
use std::io;

/// The failpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Point {
    /// Before the agent saves its record; the detail is the record's step.
    Record,
    /// Before a file in a directory of the agent is replaced; the detail is its name.
    Write,
    /// Before a file in a directory of the agent is removed; the detail is its name.
    Remove,
    /// Before an entry of the delta tree is created.
    Delta,
    /// Before the complete delta tree is renamed to its final name.
    DeltaPublish,
    /// Before a detached overlay is created.
    Overlay,
    /// Before a trial run of a program of the new tree.
    Trial,
    /// Before the new `/usr` is mounted over the old one.
    Expose,
    /// After the new `/usr` is mounted, before it is verified.
    Exposed,
    /// Before the new `/usr` is unmounted.
    Withdraw,
    /// Before the node store's ref is set or removed; the detail says which.
    Ref,
    /// Before the undo journal of `/etc` is created.
    EtcRecord,
    /// Before the node image's version of a conflicting entry is saved.
    EtcAside,
    /// Before the content that a change replaces is saved.
    EtcSave,
    /// Before the journal line of a change is written.
    EtcBegin,
    /// After the first half of a journal line is written.
    EtcJournal,
    /// Before each block of a file's content is written.
    EtcContent,
    /// Before the staging directory in `/etc` is created or removed.
    EtcStaging,
    /// Before a new version of an entry is created in the staging directory.
    EtcMake,
    /// Before each of owner, mode, attributes and label is set.
    EtcMetadata,
    /// Before an entry is removed.
    EtcUnlink,
    /// Before a new version is renamed to its final name.
    EtcRename,
    /// Before the file system of `/etc` or of the undo journal is synced.
    EtcSync,
    /// Before a change of `/etc` is reverted.
    EtcRevert,
    /// Before the plan in the undo journal is removed. Without a plan the journal does not count.
    EtcRecordEnd,
    /// Before the directory of an ended undo journal is removed.
    EtcRecordRemove,
    /// Before a program is started; the detail is its name.
    Tool,
    /// Before the agent asks the message bus to reload its configuration.
    ReloadBus,
    /// Before a call of systemd that changes something; the detail is the method.
    Systemd,
}

impl Point {
    /// Returns the name in the files `armed` and `hits`.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Does nothing: the feature `failpoints` is off.
///
/// # Errors
/// Never.
#[cfg(not(any(test, feature = "failpoints")))]
#[inline(always)]
pub fn hit(_: Point, _: impl Display) -> io::Result<()> {
    Ok(())
}

/// Reports that the agent has reached `point`, and does what the point is armed with. The name of the hit is the
/// point's name, followed by a space and `detail` if that is not empty.
///
/// # Errors
/// The error that the point is armed with, or an invalid line in the file `armed`.
#[cfg(any(test, feature = "failpoints"))]
pub fn hit(point: Point, detail: impl Display) -> io::Result<()> {
    let name = format!("{} {detail}", point.name());
    live::hit(name.trim_end())
}

/// Calls `act`: the feature `failpoints` is off.
#[cfg(not(any(test, feature = "failpoints")))]
pub fn suspended<T>(act: impl FnOnce() -> T) -> T {
    act()
}

#[cfg(any(test, feature = "failpoints"))]
pub use live::{arm_thread, disarm_thread, suspended};

#[cfg(any(test, feature = "failpoints"))]
mod live {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::path::Path;
    use std::sync::Mutex;
    use std::{fs, io};

    use rustix::io::Errno;

    /// The environment variable that names the directory of `armed` and `hits`.
    const DIRECTORY: &str = "NODE_IMAGE_PIVOT_FAILPOINTS";

    thread_local! {
        /// The number of hits on this thread to let pass, and the error of the next one.
        static ARMED: Cell<Option<(usize, Errno)>> = const { Cell::new(None) };
        /// True while [`suspended`] runs on this thread.
        static SUSPENDED: Cell<bool> = const { Cell::new(false) };
    }
    /// The line of `armed` that was read last, and the number of hits that it applied to.
    static PASSED: Mutex<(String, usize)> = Mutex::new((String::new(), 0));
    /// The names that this process has appended to `hits`.
    static RECORDED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

    /// Makes one hit on this thread fail with `errno`, after `skip` hits that succeed. Replaces an earlier call.
    pub fn arm_thread(skip: usize, errno: Errno) {
        ARMED.set(Some((skip, errno)));
    }

    /// Ends the effect of [`arm_thread`]. Returns true if no hit has failed yet.
    pub fn disarm_thread() -> bool {
        ARMED.take().is_some()
    }

    /// Calls `act` with all failpoints of this thread switched off: for a trial run, whose acts do not change the
    /// system.
    pub fn suspended<T>(act: impl FnOnce() -> T) -> T {
        SUSPENDED.set(true);
        let result = act();
        SUSPENDED.set(false);
        result
    }

    pub(super) fn hit(name: &str) -> io::Result<()> {
        if SUSPENDED.get() {
            return Ok(());
        }
        if let Some((skip, errno)) = ARMED.get() {
            ARMED.set(skip.checked_sub(1).map(|skip| (skip, errno)));
            return if skip == 0 { Err(errno.into()) } else { Ok(()) };
        }
        let Some(directory) = std::env::var_os(DIRECTORY) else { return Ok(()) };
        let directory = Path::new(&directory);
        record(directory, name);
        let Ok(line) = fs::read_to_string(directory.join("armed")) else { return Ok(()) };
        let mut words = line.trim().rsplitn(3, ' ');
        let (Some(action), Some(skip), Some(armed)) = (words.next(), words.next(), words.next()) else {
            return Err(io::Error::other(format!("invalid line in armed {line:?}: expected NAME SKIP ACTION")));
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
            _ => Err(io::Error::other(format!("unknown action {action:?}: expected kill, enospc, eio or sleep"))),
        }
    }

    fn record(directory: &Path, name: &str) {
        let Ok(mut hits) = fs::OpenOptions::new().append(true).open(directory.join("hits")) else { return };
        let mut recorded = crate::lock(&RECORDED);
        if recorded.insert(name.to_owned()) {
            let _ = writeln!(hits, "{name}");
        }
    }

    fn is_due(line: &str, skip: &str) -> bool {
        let mut passed = crate::lock(&PASSED);
        if passed.0 != line {
            *passed = (line.to_owned(), 0);
        }
        passed.1 += 1;
        passed.1 > skip.parse().unwrap_or(0)
    }
}
