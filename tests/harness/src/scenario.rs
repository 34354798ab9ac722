//! Scenarios that machines and containers share about a guest that pivots.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::check::{contains, contains_any, nothing_failed, same};
use crate::files::Files;
use crate::guest::Guest;
use crate::images::Image;
use crate::proc::wait_for;
use crate::registry::registries_conf;
use crate::scenarios;
use crate::suite::{Scenario, Suite};
use crate::table::Flow;

/// Values by which the node images differ.
pub struct Expected<'a> {
    /// The image.
    pub image: &'a Image,
    /// Start of `systemctl --version`.
    pub systemd: &'a str,
    /// Name of the system in the new /usr.
    pub os: &'a str,
    /// Start of the version that sshd states.
    pub ssh: &'a str,
    /// Type of the file system that is mounted as the new /usr.
    pub usr: &'a str,
}

impl<'a> Expected<'a> {
    /// Debian 13 over Debian 12.
    pub fn node_a(image: &'a Image) -> Self {
        Expected { image, systemd: "systemd 257", os: "Debian GNU/Linux 13", ssh: "OpenSSH_10", usr: "overlay" }
    }

    /// Debian 12 with newer, more and fewer packages.
    pub fn node_b(image: &'a Image) -> Self {
        Expected { image, systemd: "systemd 252", os: "Debian GNU/Linux 12", ssh: "OpenSSH_9.2", usr: "overlay" }
    }
}

/// Puts the files of an administrator or of Ignition: the node image, the mirror, local changes in /etc.
pub fn node_files(files: &Files, image: &str, mirror_host: &str, mirror_port: u16) -> Result<()> {
    files.put("/etc/node-image-pivot.conf.d/50-testbed.toml", 0o644, &format!("image = \"{image}\"\n"))?;
    files.put(
        "/etc/containers/registries.conf.d/50-testbed.conf",
        0o644,
        &registries_conf(mirror_host, mirror_port),
    )?;
    files.put("/var/roothome/.docker/config.json", 0o600, "{\"auths\": {}}\n")?;
    files.put("/etc/base-tool/admin-edited.conf", 0o644, "edited by the administrator\n")?;
    files.put("/etc/base-tool/admin-added.conf", 0o644, "added by the administrator\n")?;
    // systemd-tmpfiles removes it at boot, before any pivot.
    files.put("/etc/tmpfiles.d/testbed.conf", 0o644, "r /etc/base-tool/admin-removed.conf\n")
}

/// Hides the configuration of the agent in /etc/later. An installer's medium boots so: the generator leaves the boot
/// alone, and the image is known later.
pub fn configured_later(files: &Files) -> Result<()> {
    let etc = files.root().join("etc");
    Ok(std::fs::rename(etc.join("node-image-pivot.conf.d"), etc.join("later"))?)
}

/// Moves the configuration that [`configured_later`] has hidden to its place. Installers write units, too, and let systemd
/// reload. That runs the generator with the image configured.
pub fn configured_now(guest: &dyn Guest) -> Result<()> {
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d && systemctl daemon-reload").map(drop)
}

/// Values of the base system that the pivot must not change.
pub struct Before {
    boot_id: String,
    modules: String,
    /// Main process of the service that only the bootimage has, 0 where it has not started.
    pub(crate) legacy: String,
}

impl Before {
    /// Reads them while the base system runs.
    pub fn of(guest: &dyn Guest) -> Result<Self> {
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        Ok(Before {
            boot_id: guest.ask("cat /proc/sys/kernel/random/boot_id")?,
            modules: modules(guest)?,
            legacy: guest.unit("base-legacy.service", "MainPID")?,
        })
    }
}

fn modules(guest: &dyn Guest) -> Result<String> {
    // A container has the kernel of the machine that it runs on, and no modules for it.
    if guest.has_own_kernel() {
        guest.ask("sha256sum /usr/lib/modules/$(uname -r)/modules.dep")
    } else {
        Ok(String::new())
    }
}

/// Waits until the pivot has succeeded or failed, and shows its progress.
pub fn wait_pivoted(guest: &dyn Guest, limit: Duration) -> Result<()> {
    let mut last = String::new();
    wait_for("the pivot's end", limit, || {
        let Ok(status) = guest.status() else { return Ok(false) };
        let now = format!("{} {}", status["state"].as_str().unwrap_or("?"), status["phase"].as_str().unwrap_or(""));
        if now != last {
            println!("       state: {now}");
            last = now;
        }
        if status["state"] == "failed" {
            return Ok(true);
        }
        Ok(guest.unit("node-image-finish.service", "ActiveState")? == "active"
            && guest.unit("multi-user.target", "ActiveState")? == "active"
            && guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0")
    })?;
    if last.starts_with("failed") {
        bail!(
            "the pivot failed:\n{}",
            guest.run("node-image-pivot status; systemctl status --no-pager 'node-image-*'")?.text
        );
    }
    Ok(())
}

/// Checks that a unit is in a state.
pub fn unit_is(guest: &dyn Guest, unit: &str, state: &str) -> Result<()> {
    same(format!("{unit} {}", guest.unit(unit, "ActiveState")?), format!("{unit} {state}"))
}

/// A guest that has become its node image, what was seen before, and what is expected.
pub(crate) struct Pivoted<'a> {
    pub(crate) guest: &'a dyn Guest,
    pub(crate) before: Option<&'a Before>,
    pub(crate) expected: &'a Expected<'a>,
}

/// Runs every scenario about a system that has become its node image in the bootstrap flow. `earlier` is the scenario in
/// which it did, `before` what was seen before.
pub fn pivoted(
    suite: &mut Suite,
    earlier: &str,
    guest: &dyn Guest,
    before: Option<&Before>,
    expected: &Expected<'_>,
) -> bool {
    suite.covers(guest, Flow::Bootstrap, "pivoted");
    let mut bed = Pivoted { guest, before, expected };
    let mut all = suite.run_after(earlier, &mut bed, &in_both_flows());
    all &= suite.run_after(
        earlier,
        &mut bed,
        &scenarios![
            oc_runs_and_reaches_the_node_agent,
            the_container_runtime_answers_its_command,
            the_installed_systemd_is_that_of_the_node_image,
            services_of_the_node_image_are_active,
            node_hello_answers_as_the_user_that_sysusers_made,
            tmpfiles_of_the_node_image_exist,
            the_service_that_only_the_bootimage_had_is_inactive,
        ],
    );
    if guest.has_own_kernel() {
        let kernel = scenarios![
            modules_of_the_running_kernel_are_unchanged,
            a_module_that_was_not_loaded_loads,
            modules_load_d_of_the_node_image_was_applied
        ];
        all &= suite.run_after(earlier, &mut bed, &kernel);
    }
    all & suite.run_after(
        earlier,
        &mut bed,
        &scenarios![
            the_user_manager_of_a_new_login_runs,
            no_unit_has_failed,
            systemd_reports_running,
            the_units_of_the_pivot_succeeded,
            the_default_target_is_that_of_the_machine,
            status_json_has_the_whole_pivot,
            a_second_run_has_nothing_to_do,
            a_daemon_reload_does_not_redirect_the_boot_again,
        ],
    )
}

/// Returns the scenarios about a system that has become its node image that hold in the bootstrap and in the assisted flow.
pub(crate) fn in_both_flows<'a>() -> [Scenario<Pivoted<'a>>; 17] {
    scenarios![
        the_boot_id_is_unchanged,
        usr_is_that_of_the_node_image,
        usr_is_a_mount_of_the_agent_and_read_only,
        kubectl_runs,
        base_tool_is_newer,
        pid_1_is_the_installed_systemd,
        a_file_became_a_directory,
        users_and_groups_of_the_node_image_exist,
        files_that_only_the_bootimage_had_are_removed,
        a_file_in_etc_that_the_administrator_changed_is_kept,
        a_file_in_etc_that_the_administrator_added_is_kept,
        a_file_in_etc_that_the_administrator_deleted_stays_deleted,
        a_new_default_appears_in_etc,
        a_changed_default_replaces_the_old_one_in_etc,
        a_removed_default_is_removed_from_etc,
        the_root_password_and_the_machine_id_are_unchanged,
        a_new_ssh_login_reaches_the_new_sshd,
    ]
}

fn the_boot_id_is_unchanged(bed: &mut Pivoted<'_>) -> Result<()> {
    let before = bed.before.context("the base system was not seen before")?;
    same(bed.guest.ask("cat /proc/sys/kernel/random/boot_id")?, before.boot_id.clone())
}

fn usr_is_that_of_the_node_image(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("cat /usr/lib/os-release")?, bed.expected.os)
}

fn usr_is_a_mount_of_the_agent_and_read_only(bed: &mut Pivoted<'_>) -> Result<()> {
    let mount = bed.guest.ask("findmnt -n -o FSTYPE,SOURCE --target /usr/bin | tail -n 1")?;
    contains(&mount, "node-image")?;
    same(mount.split(' ').next(), Some(bed.expected.usr))?;
    same(bed.guest.run("touch /usr/x")?.status, 1)
}

fn oc_runs_and_reaches_the_node_agent(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("oc version")?, "Server Version: 4.99.0")
}

fn kubectl_runs(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("kubectl version --client 2>&1")?, "lient")
}

fn the_container_runtime_answers_its_command(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("ctr version")?, "Server:")
}

fn base_tool_is_newer(bed: &mut Pivoted<'_>) -> Result<()> {
    same(bed.guest.ask("base-tool")?, "base-tool 2.0".into())
}

fn the_installed_systemd_is_that_of_the_node_image(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("systemctl --version")?, bed.expected.systemd)
}

fn pid_1_is_the_installed_systemd(bed: &mut Pivoted<'_>) -> Result<()> {
    let running = bed.guest.ask("systemctl show --property=Version --value | cut -d. -f1 | cut -d' ' -f1")?;
    contains(bed.expected.systemd, &running)
}

fn a_file_became_a_directory(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("test -f /usr/lib/base-tool/becomes-dir/file").map(drop)
}

fn services_of_the_node_image_are_active(bed: &mut Pivoted<'_>) -> Result<()> {
    let services = ["containerd.service", "kubelet.service", "node-hello.service"];
    services.iter().try_for_each(|unit| unit_is(bed.guest, unit, "active"))
}

fn node_hello_answers_as_the_user_that_sysusers_made(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.ask("curl -fsS http://127.0.0.1:8080/")?, bed.expected.os)?;
    same(
        bed.guest.ask("stat -c %U /proc/$(systemctl show -p MainPID --value node-hello.service)")?,
        "kubelet-svc".into(),
    )
}

fn tmpfiles_of_the_node_image_exist(bed: &mut Pivoted<'_>) -> Result<()> {
    same(bed.guest.ask("stat -c %U /run/kubelet-svc/created-by-tmpfiles")?, "kubelet-svc".into())
}

/// Looks for the users and groups of the image's `passwd` and `group` files, beside those of sysusers.
fn users_and_groups_of_the_node_image_exist(bed: &mut Pivoted<'_>) -> Result<()> {
    let all = "for file in passwd group; do cut -d: -f1 /usr/etc/$file | xargs getent $file || exit; done";
    bed.guest.ask(&format!("{{ {all}; }} >/dev/null")).map(drop)
}

fn files_that_only_the_bootimage_had_are_removed(bed: &mut Pivoted<'_>) -> Result<()> {
    let paths = ["/usr/bin/base-legacy", "/usr/lib/base-tool/only-in-1", "/usr/bin/nc.openbsd"];
    paths.iter().try_for_each(|path| bed.guest.ask(&format!("test ! -e {path}")).map(drop))
}

fn the_service_that_only_the_bootimage_had_is_inactive(bed: &mut Pivoted<'_>) -> Result<()> {
    unit_is(bed.guest, "base-legacy.service", "inactive")
}

pub(crate) fn modules_of_the_running_kernel_are_unchanged(bed: &mut Pivoted<'_>) -> Result<()> {
    let before = bed.before.context("the base system was not seen before")?;
    same(modules(bed.guest)?, before.modules.clone())
}

fn a_module_that_was_not_loaded_loads(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("! grep -q ^vxlan /proc/modules && modprobe vxlan && grep -q ^vxlan /proc/modules").map(drop)
}

fn modules_load_d_of_the_node_image_was_applied(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("grep -q ^dummy /proc/modules").map(drop)
}

fn base_tool_conf(guest: &dyn Guest, name: &str) -> Result<String> {
    guest.ask(&format!("cat /etc/base-tool/{name}"))
}

fn a_file_in_etc_that_the_administrator_changed_is_kept(bed: &mut Pivoted<'_>) -> Result<()> {
    same(base_tool_conf(bed.guest, "admin-edited.conf")?, "edited by the administrator".into())
}

fn a_file_in_etc_that_the_administrator_added_is_kept(bed: &mut Pivoted<'_>) -> Result<()> {
    same(base_tool_conf(bed.guest, "admin-added.conf")?, "added by the administrator".into())
}

fn a_file_in_etc_that_the_administrator_deleted_stays_deleted(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("test ! -e /etc/base-tool/admin-removed.conf").map(drop)
}

fn a_new_default_appears_in_etc(bed: &mut Pivoted<'_>) -> Result<()> {
    same(base_tool_conf(bed.guest, "new-default.conf")?, "arrives".into())
}

fn a_changed_default_replaces_the_old_one_in_etc(bed: &mut Pivoted<'_>) -> Result<()> {
    same(base_tool_conf(bed.guest, "changed-default.conf")?, "default of 2.0".into())
}

fn a_removed_default_is_removed_from_etc(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("test ! -e /etc/base-tool/removed-default.conf")?;
    bed.guest.ask("test ! -e /etc/base-legacy.conf").map(drop)
}

fn the_root_password_and_the_machine_id_are_unchanged(bed: &mut Pivoted<'_>) -> Result<()> {
    let id = "journalctl -q -n 1 -b -o json | jq -er ._MACHINE_ID | grep -qxFf /etc/machine-id";
    bed.guest.ask(&format!("grep -q '^root:.6.testbed' /etc/shadow && {id}")).map(drop)
}

fn a_new_ssh_login_reaches_the_new_sshd(bed: &mut Pivoted<'_>) -> Result<()> {
    contains(&bed.guest.login("/usr/sbin/sshd -V 2>&1; id -un")?.text, bed.expected.ssh)
}

fn the_user_manager_of_a_new_login_runs(bed: &mut Pivoted<'_>) -> Result<()> {
    let answer = bed.guest.login("systemctl is-active user@0.service; loginctl --no-legend list-sessions")?;
    contains_any(&answer.text, &["active"])
}

pub(crate) fn no_unit_has_failed(bed: &mut Pivoted<'_>) -> Result<()> {
    nothing_failed(bed.guest)
}

pub(crate) fn systemd_reports_running(bed: &mut Pivoted<'_>) -> Result<()> {
    same(bed.guest.run("systemctl is-system-running --wait")?.text.trim().into(), "running".to_string())
}

fn the_units_of_the_pivot_succeeded(bed: &mut Pivoted<'_>) -> Result<()> {
    for unit in ["node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"] {
        same(
            format!("{unit} {} {}", bed.guest.unit(unit, "ActiveState")?, bed.guest.unit(unit, "Result")?),
            format!("{unit} active success"),
        )?;
    }
    Ok(())
}

fn the_default_target_is_that_of_the_machine(bed: &mut Pivoted<'_>) -> Result<()> {
    same(bed.guest.ask("systemctl get-default")?, "multi-user.target".into())?;
    bed.guest.ask("! readlink /run/systemd/generator.early/default.target | grep node-image").map(drop)
}

fn status_json_has_the_whole_pivot(bed: &mut Pivoted<'_>) -> Result<()> {
    let status = bed.guest.status()?;
    same(status["schema"].as_i64(), Some(1))?;
    same(status["state"].as_str(), Some("done"))?;
    same(status["digest"].as_str(), Some(bed.expected.image.digest.as_str()))?;
    let (image, commit) = (bed.expected.image, status["commit"].as_str());
    if image.commit.is_some() {
        same(commit, image.commit.as_deref())?;
    } else {
        // The importer made the commit of a plain image.
        let repo = "--repo=/run/node-image-pivot/store/repo";
        let show = format!("ostree show {repo} --print-metadata-key=ostree.manifest-digest {}", commit.unwrap_or("?"));
        contains(&bed.guest.ask(&show)?, &image.digest)?;
    }
    let phases: Vec<_> =
        status["timeline"].as_array().into_iter().flatten().filter_map(|p| p["phase"].as_str()).collect();
    same(phases, vec!["resolve", "pull", "stage", "switch", "refresh", "finish"])?;
    if status["cost"]["bytes_fetched"].as_u64().is_none_or(|n| n == 0) {
        bail!("no cost: {status}");
    }
    Ok(())
}

fn a_second_run_has_nothing_to_do(bed: &mut Pivoted<'_>) -> Result<()> {
    let mounts = bed.guest.ask("grep -c . /proc/self/mountinfo")?;
    let answer = bed.guest.run("node-image-pivot run")?;
    same(answer.status, 0)?;
    contains_any(&answer.text, &["nothing to do", "the pivot is done"])?;
    same(bed.guest.ask("grep -c . /proc/self/mountinfo")?, mounts)
}

fn a_daemon_reload_does_not_redirect_the_boot_again(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("systemctl daemon-reload")?;
    same(bed.guest.ask("systemctl get-default")?, "multi-user.target".into())
}
