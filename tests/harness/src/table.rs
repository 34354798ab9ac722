//! The table in docs/tested.md of systems, flows and assertions. Each suite compares the rows that it has run with the page.

use std::collections::BTreeSet;
use std::fmt::{Display, Formatter};

use anyhow::{Context, Result, bail};

use crate::guest::Guest;
use crate::images::project;

/// The page with the table.
const PAGE: &str = "docs/tested.md";

/// The way in which a system boots, and becomes its node image or does not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flow {
    /// The boot is redirected: pull, switch, isolate of multi-user.target.
    Bootstrap,
    /// An installer starts the units on a live system that has booted: no isolate.
    Assisted,
    /// The agent leaves the system alone.
    LeftAlone,
}

impl Display for Flow {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Flow::Bootstrap => "bootstrap",
            Flow::Assisted => "assisted",
            Flow::LeftAlone => "left alone",
        })
    }
}

/// A row: a system that ran a flow and was checked.
#[derive(Debug, PartialEq)]
pub(crate) struct Row {
    system: String,
    flow: Flow,
    assertions: BTreeSet<&'static str>,
}

/// Adds assertions to the row of their system and flow.
pub(crate) fn add(rows: &mut Vec<Row>, system: String, flow: Flow, assertions: &'static str) {
    match rows.iter_mut().find(|row| row.system == system && row.flow == flow) {
        Some(row) => drop(row.assertions.insert(assertions)),
        None => rows.push(Row { system, flow, assertions: BTreeSet::from([assertions]) }),
    }
}

/// Compares the rows of a suite with those in the page.
///
/// # Errors
/// The rows differ. The error has the lines that belong in the page.
pub(crate) fn compare(suite: &str, rows: &[Row]) -> Result<()> {
    let run = lines(suite, rows);
    if listed(&page()?, suite)? != run {
        bail!("the rows of this suite in {PAGE} are out of date; replace them with\n{}", run.join("\n"));
    }
    Ok(())
}

fn page() -> Result<String> {
    std::fs::read_to_string(project().join(PAGE)).with_context(|| format!("reading {PAGE}"))
}

/// Returns the lines of the table of suites. The page also has a table of forms.
fn table(page: &str) -> Result<impl Iterator<Item = &str>> {
    let (_, table) = page.split_once("| suite |").with_context(|| format!("{PAGE} lacks the table of suites"))?;
    Ok(table.lines().skip(2))
}

fn listed<'a>(page: &'a str, suite: &str) -> Result<Vec<&'a str>> {
    Ok(table(page)?.filter(|line| line.starts_with(&format!("| {suite} |"))).collect())
}

fn lines(suite: &str, rows: &[Row]) -> Vec<String> {
    let line = |row: &Row| {
        let assertions: Vec<_> = row.assertions.iter().map(|name| format!("`{name}`")).collect();
        format!("| {suite} | {} | {} | {} |", row.system, row.flow, assertions.join(", "))
    };
    rows.iter().map(line).collect()
}

/// Describes the root, /etc, /var and /boot of a guest, as it has mounted them. A suite of Debian that moves has no version,
/// and its kernel has another one each month.
pub(crate) fn system(guest: &dyn Guest) -> Result<String> {
    let script = "on() { findmnt -nro FSTYPE --target $1 | tail -n 1; }
        at() { findmnt -nro FSTYPE --mountpoint $1 | tail -n 1 | grep . || echo -; }
        case $(findmnt -nro FSTYPE,SOURCE --target / | tail -n 1) in
            'overlay composefs') root=composefs:$(on /sysroot) ;; 'overlay '*) root=overlays ;; *) root=$(on /) ;;
        esac
        echo $root $(on /etc) $(at /run/ephemeral) $(on /var) $(at /boot) $(at /run/media/iso)
        grep -o coreos.liveiso /proc/cmdline || echo -
        grep -ho /root.squashfs /sys/block/loop*/loop/backing_file 2>/dev/null | head -n 1 | grep . || echo -
        test ! -e /run/ostree-live || echo live
        grep -q ^VERSION_ID= /usr/lib/os-release && uname -r || echo of that suite";
    let text = guest.ask(script)?;
    let kernel = if guest.has_own_kernel() { Some(text.lines().last().unwrap_or_default()) } else { None };
    describe(&text, kernel).with_context(|| format!("a system of no known kind:\n{text}"))
}

/// Describes a guest by its mounts. `kernel` is the release of its own kernel.
fn describe(text: &str, kernel: Option<&str>) -> Option<String> {
    let mut lines = text.lines();
    let mounts: Vec<_> = lines.next()?.split(' ').collect();
    let &[root, etc, ephemeral, var, boot, iso] = mounts.as_slice() else { return None };
    let (below, root) = (root.rsplit(':').next()?, root.replace(':', " on "));
    let (argument, in_initramfs) = (lines.next()? != "-", lines.next()? != "-");
    let live = lines.next()? == "live";
    let medium = match (kernel, live, argument, iso, in_initramfs) {
        (None, true, ..) => format!("container: {root}"),
        (None, false, ..) => format!("container on a disk: {root}"),
        (_, true, true, "iso9660", false) => format!("ISO: {root} on a loop device on iso9660"),
        (_, true, false, "-", true) => format!("PXE: {root} in the initramfs"),
        (_, false, false, "-", false) => format!("disk: {root}"),
        _ => return None,
    };
    let mut parts = vec![medium];
    if etc == "overlay" {
        parts.push(if ephemeral == "-" { "/etc overlay".into() } else { format!("/etc overlay on {ephemeral}") });
    }
    parts.extend((var != below).then(|| format!("/var {var}")));
    parts.extend((boot != "-" && boot != below && kernel.is_some()).then(|| format!("/boot {boot}")));
    parts.extend(
        kernel.map(|release| format!("Linux {}", release.splitn(3, '.').take(2).collect::<Vec<_>>().join("."))),
    );
    Some(parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_are_described_by_their_mounts() {
        let live = "squashfs overlay ext4 tmpfs - ";
        for (text, kernel, expected) in [
            (
                format!("{live}iso9660\ncoreos.liveiso\n-\nlive\n6.1.0-50-cloud-amd64"),
                Some("6.1.0-50-cloud-amd64"),
                Some("ISO: squashfs on a loop device on iso9660, /etc overlay on ext4, /var tmpfs, Linux 6.1"),
            ),
            (
                format!("{live}-\n-\n/root.squashfs\nlive\n5.10.0-9"),
                Some("5.10.0-9"),
                Some("PXE: squashfs in the initramfs, /etc overlay on ext4, /var tmpfs, Linux 5.10"),
            ),
            ("xfs xfs - xfs ext4 -\n-\n-\n6.1.0".into(), Some("6.1.0"), Some("disk: xfs, /boot ext4, Linux 6.1")),
            (
                "composefs:squashfs overlay - tmpfs - -\n-\n-\nlive\n6".into(),
                None,
                Some("container: composefs on squashfs, /etc overlay, /var tmpfs"),
            ),
            (
                "composefs:ext4 ext4 - ext4 ext4 -\n-\n-\n6.12.1".into(),
                Some("6.12.1"),
                Some("disk: composefs on ext4, Linux 6.12"),
            ),
            ("overlays xfs - xfs - -\n-\n-\n6".into(), None, Some("container on a disk: overlays, /var xfs")),
            // A live medium without the argument whose root is not in the initramfs.
            (format!("{live}-\n-\n-\nlive\n6.1.0"), Some("6.1.0"), None),
        ] {
            assert_eq!(describe(&text, kernel).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn assertions_of_one_system_and_flow_are_one_row() {
        let mut rows = Vec::new();
        for (flow, assertions) in
            [(Flow::Bootstrap, "pivoted"), (Flow::LeftAlone, "left_alone"), (Flow::Bootstrap, "a")]
        {
            add(&mut rows, "ISO".into(), flow, assertions);
        }
        assert_eq!(
            lines("machine", &rows),
            ["| machine | ISO | bootstrap | `a`, `pivoted` |", "| machine | ISO | left alone | `left_alone` |"]
        );
    }

    #[test]
    fn the_table_of_forms_has_no_rows_of_a_suite() -> Result<()> {
        let page =
            "| form | like |\n|---|---|\n| container | b |\n\n| suite | system |\n|---|---|\n| container | c |\n";
        assert_eq!(listed(page, "container")?, ["| container | c |"]);
        Ok(())
    }

    /// The suites themselves compare their own rows.
    #[test]
    fn each_row_of_the_page_belongs_to_a_suite() -> Result<()> {
        let page = page()?;
        let tests = project().join("tests/harness/tests");
        let sources = std::process::Command::new("grep").args(["-rhE", "-A1", "Suite::new\\("]).arg(tests).output()?;
        let sources = String::from_utf8(sources.stdout)?;
        let rows = table(&page)?.filter_map(|line| line.strip_prefix("| ")?.split_once(" |"));
        let unknown: Vec<_> =
            rows.map(|(suite, _)| suite).filter(|suite| !sources.contains(&format!("\"{suite}\""))).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        Ok(())
    }
}
