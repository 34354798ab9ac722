//! Facts about units, as PID 1 reports them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result};
use zbus::OwnedObjectPath;

use super::Manager;
use super::jobs::not_loaded;
use super::manager::UNIT;
use super::policy::KINDS;

const SERVICE: &str = "org.freedesktop.systemd1.Service";

/// A unit as `ListUnits` returns it.
pub struct Unit {
    /// Name of the unit, for example `sshd.service`.
    pub name: String,
    /// Active state: `active`, `inactive`, `failed`, `activating` and so on.
    pub active: String,
    /// Number of its job, or 0.
    job: u32,
    /// D-Bus object path of the unit.
    pub(super) path: OwnedObjectPath,
}

impl Unit {
    /// Returns true if the unit is active and of a type that the plan considers.
    pub fn is_active(&self) -> bool {
        matches!(self.active.as_str(), "active" | "reloading") && KINDS.iter().any(|kind| self.name.ends_with(kind))
    }
}

impl Manager {
    /// Returns true if `unit` is active or has a job. A target that is being reached has a job: its own start.
    pub async fn is_active_or_queued(&self, unit: &str) -> Result<bool> {
        let wanted = |one: &Unit| one.name == unit && (one.active == "active" || one.job != 0);
        Ok(self.list().await?.iter().any(wanted))
    }

    /// Lists all loaded units.
    pub async fn list(&self) -> Result<Vec<Unit>> {
        type Row = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);
        let reply = self.call("ListUnits", &()).await?;
        let rows: Vec<Row> = reply.body().deserialize().context("cannot decode the unit list of systemd")?;
        Ok(rows.into_iter().map(|row| Unit { name: row.0, active: row.3, job: row.7, path: row.6 }).collect())
    }

    /// Returns those of `units` that have a job, and those that failed.
    pub async fn pending_and_failed(&self, units: &BTreeSet<&str>) -> Result<(Vec<String>, Vec<String>)> {
        let mut listed = self.list().await?;
        listed.retain(|unit| units.contains(unit.name.as_str()));
        let of = |wanted: fn(&&Unit) -> bool| listed.iter().filter(wanted).map(|unit| unit.name.clone()).collect();
        Ok((of(|unit| unit.job != 0), of(|unit| unit.active == "failed")))
    }

    pub(super) async fn path_of(&self, unit: &str) -> Result<OwnedObjectPath> {
        let reply = self.call("GetUnit", &(unit,)).await?;
        reply.body().deserialize().with_context(|| format!("cannot decode the path of {unit}"))
    }

    /// Returns the `InvocationID` of the current run of `unit`; empty if it never ran or is not loaded.
    pub async fn invocation(&self, unit: &str) -> Result<Vec<u8>> {
        let path = match self.path_of(unit).await {
            Ok(path) => path,
            Err(error) => return not_loaded(error).map(|()| Vec::new()),
        };
        self.property(path.as_str(), UNIT, "InvocationID").await
    }

    /// Returns true if the socket starts one service per connection.
    pub(super) async fn accepts(&self, socket: &str) -> Result<bool> {
        let path = self.path_of(socket).await?;
        self.property(path.as_str(), "org.freedesktop.systemd1.Socket", "Accept").await
    }

    /// Returns the cgroup of a service, relative to the cgroup root; empty if it has none.
    pub(super) async fn control_group(&self, unit: &Unit) -> Result<String> {
        self.property(unit.path.as_str(), SERVICE, "ControlGroup").await
    }

    /// Returns the commands of a service's `ExecStart=`, each with the path of its program as the first argument.
    pub(super) async fn commands(&self, unit: &Unit) -> Result<Vec<Vec<PathBuf>>> {
        let rows: Vec<CommandRow> = self.property(unit.path.as_str(), SERVICE, "ExecStart").await?;
        Ok(rows.into_iter().map(words).collect())
    }

    /// Returns the path of the unit file; empty if the unit has none.
    pub(super) async fn fragment(&self, unit: &Unit) -> Result<PathBuf> {
        self.property::<String>(unit.path.as_str(), UNIT, "FragmentPath").await.map(PathBuf::from)
    }
}

/// A command of a service: path, arguments, ignored failure, and six values about its last run.
type CommandRow = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

/// Returns the path and the arguments of a command. With `ExecStart=@`, the first argument may be any name.
fn words(row: CommandRow) -> Vec<PathBuf> {
    [row.0].into_iter().chain(row.1.into_iter().skip(1)).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_as_active() {
        for (name, active, expected) in [
            ("a.service", "active", true),
            ("a.mount", "reloading", true),
            ("a.service", "activating", false),
            ("a.service", "failed", false),
            ("a.target", "active", false),
        ] {
            let unit = Unit { name: name.into(), active: active.into(), job: 0, path: OwnedObjectPath::default() };
            assert_eq!(unit.is_active(), expected, "{name} {active}");
        }
    }

    #[test]
    fn commands_begin_with_their_program() {
        let argv = ["name", "-x", "/usr/x"].map(str::to_owned).to_vec();
        let row: CommandRow = ("/usr/bin/a".into(), argv, false, 0, 0, 0, 0, 7, 0, 0);
        assert_eq!(words(row), ["/usr/bin/a", "-x", "/usr/x"].map(PathBuf::from));
    }
}
