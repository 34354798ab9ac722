//! The assisted flow as its installer runs it, on a machine that has long booted and runs containers.

use anyhow::{Result, bail};
use serde_json::{Value, json};
use testbed::check::{contains, nothing_failed, same};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::in_use::Running;
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{node_files, unit_is};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::table::Flow;
use testbed::unpivoted::left_alone;
use testbed::vm::{self, Medium, Vm};

use super::{BOOT, PIVOT, SOON, UNITS, boot, installer, journal, record};

/// Returns a library of functions as a cluster installer writes it. The machine has no podman, so the script falls back.
fn release_image_script(spec: &str) -> String {
    format!(
        "#!/usr/bin/env bash\nRELEASE_IMAGE_DIGEST=$(podman inspect --format '{{{{index .RepoDigests 0}}}}' '{spec}') || {{\n\
         \techo 'no digest known'\n\tRELEASE_IMAGE_DIGEST='{spec}'\n}}\n\
         image_for() {{\n\tpodman run --rm \"$RELEASE_IMAGE_DIGEST\" image \"$1\"\n}}\n"
    )
}

/// Starts two containers of the bootimage's runtime: one below a service, one detached.
const CONTAINERS: &str = r#"
    set -e
    mkdir -p /var/lib/testbed/bundle/rootfs/{usr/bin,proc,sys,dev,tmp}
    cd /var/lib/testbed/bundle
    for link in bin lib lib64; do ln -s usr/$link rootfs/$link; done
    for program in sh sleep cat echo; do
        cp -L --parents /usr/bin/$program rootfs
        for library in $(ldd /usr/bin/$program | grep -o '/lib[^ ]*'); do cp -L --parents /usr$library rootfs; done
    done
    runc spec
    jq '.process.terminal = false | .process.args = ["sleep", "infinity"]' config.json >new && mv new config.json
    # Below systemd's cgroups: a shell that was brought in from outside is in none of them.
    systemd-run --quiet --unit=container-one --working-directory=$PWD runc run one
    systemd-run --quiet --unit=starts-two --wait --working-directory=$PWD runc run --detach two
    for i in $(seq 600); do [ "$(runc state one 2>/dev/null | jq -r .status)" = running ] && exit 0; sleep 0.1; done
    exit 1
"#;

/// The script of the installer that names the release payload.
const SCRIPT: &str = "/var/usrlocal/bin/release-image.sh";
/// Directory of the installer's other files, until the installer writes them.
const LATER: &str = "/var/lib/testbed/installer";
const PIDS: &str = "for one in one two; do runc state $one | jq .pid; done";
const MOUNTS: &str = "findmnt -rno TARGET | grep ^/var || true";

/// A machine with running containers, and what it looked like before the switch.
struct Assisted {
    guest: Vm,
    _registry: Registry,
    /// Pull spec of the release payload that exists.
    payload: String,
    services: Running,
    containers: String,
    mounts: String,
    /// States of both units on the way to active.
    states: [Vec<String>; 2],
}

impl Assisted {
    fn boot() -> Result<Self> {
        let images = Images::ensure()?;
        let registry = Registry::start(&images.storage, &work_dir("dropin-live-registry")?, None, None)?;
        let guest = boot("dropin-live", &images.boot_runtime()?, Medium::Pxe, |files| {
            node_files(files, "", vm::HOST, registry.port)?;
            std::fs::remove_dir_all(files.root().join("etc/node-image-pivot.conf.d"))?;
            // Without the two further attempts that confirm a missing tag, the service record has one.
            files.put("/etc/node-image-pivot.conf.d/60-keys.toml", 0o644, "[retry]\ndenied = 0\n")?;
            // By its own address: a source that cannot be reached beside a mirror that lacks the tag is tried again.
            let address = format!("{}:{}", vm::HOST, registry.port);
            let insecure = format!("[[registry]]\nlocation = \"{address}\"\ninsecure = true\n");
            files.put("/etc/containers/registries.conf.d/60-address.conf", 0o644, &insecure)?;
            files.put("/etc/no-var-tmpfs", 0o644, "")?;
            installer::put(files, LATER)?;
            files.put("/var/log/openshift/bootkube.json", 0o644, "[]\n")?;
            files.put(SCRIPT, 0o755, &release_image_script(&format!("{address}/cluster/release:no-such-tag")))
        })?;
        guest.wait_unit("multi-user.target", "active", BOOT)?;
        Ok(Assisted {
            guest,
            _registry: registry,
            payload: format!("registry.example.test/cluster/release@{}", images.image("release")?.digest),
            services: Running::default(),
            containers: String::new(),
            mounts: String::new(),
            states: Default::default(),
        })
    }

    fn start_both(&self) -> Result<()> {
        self.guest.ask(&format!("systemctl start --no-block {}", UNITS.join(" "))).map(drop)
    }
}

#[test]
fn the_assisted_flow_keeps_the_contract() -> Result<()> {
    let mut suite = Suite::new("drop-in: the assisted flow, with running containers and the installer's own script");
    let mut assisted = Assisted::boot()?;
    left_alone(&mut suite, &assisted.guest);
    suite.run(
        &mut assisted,
        &scenarios![
            a_medium_with_the_script_boots_without_a_redirection,
            containers_run,
            a_missing_payload_fails_with_the_reason_in_the_status_text after containers_run,
            the_service_record_has_the_failure after a_missing_payload_fails_with_the_reason_in_the_status_text,
            the_installers_own_units_appear after containers_run,
            a_node_image_of_the_next_release_is_refused after the_installers_own_units_appear,
            both_units_become_active_when_started_again_without_blocking after a_node_image_of_the_next_release_is_refused,
        ],
    );
    suite.run_after("both_units_become_active_when_started_again_without_blocking", &mut assisted, &after_the_switch());
    suite.covers(&assisted.guest, Flow::Assisted, "the_assisted_flow_keeps_the_contract");
    suite.finish()
}

/// Returns the scenarios about a machine that has been switched in use.
fn after_the_switch() -> [Scenario<Assisted>; 12] {
    scenarios![
        both_units_were_activating_and_then_active_and_nothing_else,
        the_units_stay_those_of_the_agent,
        the_payload_is_that_of_the_script_and_the_node_image_that_of_the_payload,
        programs_of_the_node_image_are_there_and_usr_is_read_only,
        active_units_stay_active_and_listed_services_are_not_restarted,
        containers_keep_their_processes_and_run_new_programs,
        a_new_container_starts_with_the_runtime_of_the_node_image,
        nothing_is_mounted_below_var,
        the_repo_of_the_system_has_no_ref_of_the_agent,
        sysctl_and_binfmt_are_left_alone_and_the_journal_says_so,
        the_service_records_are_complete,
        no_unit_has_failed,
    ]
}

/// The medium is live by the marker alone: PXE.
fn a_medium_with_the_script_boots_without_a_redirection(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    same(guest.ask("systemctl get-default")?, "multi-user.target".into())?;
    unit_is(guest, UNITS[0], "inactive")?;
    guest.ask("test -e /run/ostree-live && ! grep -q coreos.liveiso /proc/cmdline").map(drop)
}

fn containers_run(assisted: &mut Assisted) -> Result<()> {
    assisted.guest.ask(CONTAINERS)?;
    assisted.services = Running::of(&assisted.guest)?;
    assisted.containers = assisted.guest.ask(PIDS)?;
    assisted.mounts = assisted.guest.ask(MOUNTS)?;
    Ok(())
}

fn a_missing_payload_fails_with_the_reason_in_the_status_text(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    assisted.start_both()?;
    guest.wait_unit(UNITS[0], "failed", SOON)?;
    contains(&guest.unit(UNITS[0], "StatusText")?, "no-such-tag")?;
    contains(&guest.ask("journalctl -u node-image-pull.service")?, "no-such-tag")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn the_service_record_has_the_failure(assisted: &mut Assisted) -> Result<()> {
    same(
        record(&assisted.guest, "node-image-pull")?,
        vec![
            "- service start -".into(),
            "resolve stage start -".into(),
            "resolve stage end failure".into(),
            "- service end failure".to_owned(),
        ],
    )
}

/// An installer writes its files to the running system, then reloads systemd.
fn the_installers_own_units_appear(assisted: &mut Assisted) -> Result<()> {
    assisted.guest.ask(&format!("cp -a {LATER}/etc {LATER}/var / && systemctl daemon-reload"))?;
    installer::is_taken_over(&assisted.guest)
}

fn a_node_image_of_the_next_release_is_refused(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    let text = release_image_script(&assisted.payload).replace('\'', "'\\''");
    guest.ask(&format!("printf %s '{text}' >{SCRIPT}"))?;
    assisted.start_both()?;
    wait_for("a refusal", PIVOT, || Ok(guest.status()?["error"]["refusals"][0]["id"].is_string()))?;
    guest.wait_unit(UNITS[0], "failed", SOON)?;
    let status = guest.status()?;
    same(status["error"]["refusals"][0]["id"].as_str(), Some("os-mismatch"))?;
    contains(&guest.ask("node-image-pivot status")?, "the node image is debian 13 and the booted system is debian 12")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn both_units_become_active_when_started_again_without_blocking(assisted: &mut Assisted) -> Result<()> {
    let key = "echo 'os_mismatch = \"warn\"' >/etc/node-image-pivot.conf.d/61-mismatch.toml";
    assisted.guest.ask(key)?;
    assisted.start_both()?;
    let (guest, seen) = (&assisted.guest, &mut assisted.states);
    let failed = |seen: &[Vec<String>; 2]| seen.iter().any(|states| states.iter().skip(1).any(|s| s == "failed"));
    wait_for("both units", PIVOT, || {
        for (unit, seen) in UNITS.iter().zip(&mut *seen) {
            // systemd does not answer while it re-executes itself; the next round asks again.
            let Ok(state) = guest.unit(unit, "ActiveState") else { continue };
            if seen.last() != Some(&state) {
                seen.push(state);
            }
        }
        Ok(failed(seen) || seen[1].last().is_some_and(|state| state == "active"))
    })?;
    if failed(seen) {
        bail!("{seen:?}\n{}", guest.run("systemctl status --no-pager 'node-image-*'")?.text);
    }
    Ok(())
}

fn both_units_were_activating_and_then_active_and_nothing_else(assisted: &mut Assisted) -> Result<()> {
    for states in &mut assisted.states {
        states.retain(|state| !(state == "inactive" || state == "failed"));
        same(states.clone(), vec!["activating".into(), "active".to_owned()])?;
    }
    Ok(())
}

fn the_units_stay_those_of_the_agent(assisted: &mut Assisted) -> Result<()> {
    installer::is_taken_over(&assisted.guest)
}

fn the_payload_is_that_of_the_script_and_the_node_image_that_of_the_payload(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    let journal = guest.ask("journalctl -u node-image-pivotd.service")?;
    contains(&journal, &format!("names the release payload {}", assisted.payload))?;
    let (reason, status) = ("/usr/local/bin/node-image-pull.sh names it", guest.status()?);
    contains(&journal, reason)?;
    let plan: Value = serde_json::from_str(&guest.ask("cat /run/node-image-pivot/plan.json")?)?;
    for document in [&status, &plan] {
        same(document["image_choice"].clone(), json!({ "tag": "rhel-coreos", "reason": reason }))?;
    }
    contains(&plan["warnings"].to_string(), "the node image is debian 13 and the booted system is debian 12")?;
    same(status["digest"].as_str(), Some(Images::ensure()?.image("node-a")?.digest.as_str()))
}

fn programs_of_the_node_image_are_there_and_usr_is_read_only(assisted: &mut Assisted) -> Result<()> {
    assisted.guest.ask("oc version --client && test -x /usr/bin/kubelet && ctr --version")?;
    contains(&assisted.guest.ask("nsenter -t 1 -m findmnt -no OPTIONS /usr | tail -n 1")?, "ro")
}

fn active_units_stay_active_and_listed_services_are_not_restarted(assisted: &mut Assisted) -> Result<()> {
    let (before, after) = (&assisted.services, &Running::of(&assisted.guest)?);
    // runc mounts itself there for as long as it starts a container.
    let transient = |unit: &str| unit.starts_with("run-runc-");
    let (active, active_after) = (before.active(), after.active());
    let gone: Vec<_> = active.difference(&active_after).filter(|unit| !transient(unit)).copied().collect();
    same(gone, Vec::<&str>::new())?;
    for unit in ["multi-user.target", "container-one.service", "base-legacy.service", "dbus.service"] {
        same(after.unit(unit), before.unit(unit))?;
    }
    unit_is(&assisted.guest, "node-image-finish.service", "inactive")
}

fn containers_keep_their_processes_and_run_new_programs(assisted: &mut Assisted) -> Result<()> {
    same(assisted.guest.ask(PIDS)?, assisted.containers.clone())?;
    for one in ["one", "two"] {
        same(assisted.guest.ask(&format!("runc exec {one} echo alive"))?, "alive".into())?;
    }
    Ok(())
}

fn a_new_container_starts_with_the_runtime_of_the_node_image(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    guest.ask("old=$(echo /sysroot/ostree/deploy/testbed/deploy/*/usr/sbin/runc); test -f $old && ! cmp -s $(command -v runc) $old")?;
    let config = "jq '.process.args = [\"echo\", \"new\"] | .root.path = \"/var/lib/testbed/bundle/rootfs\"' \
                  ../bundle/config.json >config.json";
    guest.ask(&format!("mkdir -p /var/lib/testbed/new && cd /var/lib/testbed/new && {config}"))?;
    contains(
        &guest.ask("systemd-run --quiet --wait --pipe --working-directory=/var/lib/testbed/new runc run three")?,
        "new",
    )
}

/// The file /etc/no-var-tmpfs is there, and the agent has no use for it.
fn nothing_is_mounted_below_var(assisted: &mut Assisted) -> Result<()> {
    same(assisted.guest.ask(MOUNTS)?, assisted.mounts.clone())?;
    assisted.guest.ask("findmnt -n -S node-image-store >/dev/null").map(drop)
}

/// An installer to the existing root looks for the ref, and has nothing to delete.
fn the_repo_of_the_system_has_no_ref_of_the_agent(assisted: &mut Assisted) -> Result<()> {
    assisted.guest.ask("! stat /ostree/repo/refs/heads/coreos/node-image 2>/dev/null")?;
    assisted.guest.ask("! stat /ostree/repo/tmp/node-image 2>/dev/null").map(drop)
}

fn sysctl_and_binfmt_are_left_alone_and_the_journal_says_so(assisted: &mut Assisted) -> Result<()> {
    let journal = journal(&assisted.guest)?;
    contains(
        &journal,
        "systemd-sysctl.service does not run again, though lib/sysctl.d differs: this system is in use",
    )?;
    contains(&journal, "systemd-modules-load.service runs again: lib/modules-load.d differs")?;
    contains(&journal, "systemd-sysusers was run: lib/sysusers.d differs")?;
    contains(&journal, "systemd-hwdb update is not run: the node image brings its own database")
}

fn the_service_records_are_complete(assisted: &mut Assisted) -> Result<()> {
    let guest = &assisted.guest;
    let pull = record(guest, "node-image-pull")?;
    let stages = |of: &[&str]| -> Vec<String> {
        let stage = |name: &&str| [format!("{name} stage start -"), format!("{name} stage end success")];
        let ends = ["- service start -".to_owned()].into_iter().chain(of.iter().flat_map(stage));
        ends.chain(["- service end success".to_owned()]).collect()
    };
    // The missing payload, then the refusal.
    let complete = stages(&["resolve", "pull", "stage"]);
    let mut refused = complete.clone();
    refused[6..].iter_mut().for_each(|end| *end = end.replace("success", "failure"));
    same(pull[4..].to_vec(), [refused, complete].concat())?;
    same(record(guest, "node-image-overlay")?, stages(&["switch", "refresh"]))?;
    same(guest.ask("cat /var/log/openshift/bootkube.json")?, "[]".into())
}

fn no_unit_has_failed(assisted: &mut Assisted) -> Result<()> {
    nothing_failed(&assisted.guest)
}
