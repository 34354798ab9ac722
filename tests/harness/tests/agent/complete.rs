//! `pull --complete`: the agent fetches the rest of the image, which the pivot does not need.

use anyhow::{Context, Result, bail};
use testbed::check::{contains, same};
use testbed::container::{Bed, Serving};
use testbed::derived::derive;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::other_agent::{self, wait_for_agent};
use testbed::page::{self, FOLLOWED};
use testbed::proc::wait_for;
use testbed::scenario::{configured_later, unit_is};
use testbed::scenarios;
use testbed::suite::Suite;

use super::{Known, SOON, no_unit_has_failed, state, the_machine_becomes_its_node_image, wait_state};

const STORE: &str = "/run/node-image-pivot/store";
/// Units, mounts and /etc.
const RUNNING: &str = "systemctl show -p Id -p MainPID -p ActiveState -p InvocationID '*.service' '*.target' | grep -v '^$'; \
    grep -v node-image-store /proc/self/mountinfo; \
    cd /etc && find . -xdev -printf '%p %i %m %u %g %l\\n' | sort";

/// A deployment needs the whole image: the agent fetches the rest after the pivot, and running services are unaffected. The
/// node image ships another agent, which does all of this.
#[test]
fn the_rest_of_the_image_can_be_fetched_after_the_pivot() -> Result<()> {
    let mut suite = Suite::new("agent: pull --complete, deploy and undo by the agent of the node image");
    let work = work_dir("agent-rest-image")?;
    let (storage, image) = derive(Images::ensure()?, "node-a", &work, &[other_agent::FILE])?;
    let mut bed = Bed::boot_from(&storage, &image.by_digest(), "agent-rest", Serving::AtBoot, |_| Ok(()))?;
    let taken_over = scenarios![
        the_machine_becomes_its_node_image,
        the_agent_of_the_node_image_takes_over_after_the_isolation after the_machine_becomes_its_node_image,
    ];
    suite.run(&mut bed, &taken_over);
    let before = bed.guest.ask(RUNNING)?;
    let mut known = Known { bed, before };
    suite.run(
        &mut known,
        &scenarios![
            the_pivot_leaves_objects_out,
            pull_complete_is_refused_with_numbers_when_there_is_too_little_room,
            pull_complete_fetches_the_rest,
            the_store_passes_fsck after pull_complete_fetches_the_rest,
            modules_and_kernel_of_the_node_image_are_stored after pull_complete_fetches_the_rest,
            pull_complete_changes_no_service_mount_or_file_in_etc,
            pull_complete_sets_refs_again_that_another_program_removed after pull_complete_fetches_the_rest,
            pull_complete_does_not_ask_the_registry_again after pull_complete_fetches_the_rest,
            a_hook_refuses_the_deployment after pull_complete_does_not_ask_the_registry_again,
            deploy_writes_the_image_to_a_disk_without_the_registry after pull_complete_does_not_ask_the_registry_again,
            a_repeated_deploy_has_nothing_to_do after deploy_writes_the_image_to_a_disk_without_the_registry,
            a_caller_of_the_bus_deploys_with_the_image_that_updates_follow after a_repeated_deploy_has_nothing_to_do,
            the_command_accepts_the_same_image after a_caller_of_the_bus_deploys_with_the_image_that_updates_follow,
            deploy_refuses_the_read_only_sysroot_of_the_running_system,
            an_undo_is_refused_during_a_deployment_to_the_own_sysroot,
            all_was_done_by_the_agent_of_the_node_image,
            an_undo_is_followed_by_no_agent_that_reads_another_format,
            a_run_after_the_boot_is_over_isolates_nothing after an_undo_is_followed_by_no_agent_that_reads_another_format,
            the_agent_of_the_bootimage_takes_over_after_the_undo after a_run_after_the_boot_is_over_isolates_nothing,
            the_agent_of_the_bootimage_deploys_for_a_node_image_with_an_older_one
                after the_agent_of_the_bootimage_takes_over_after_the_undo,
        ],
    );
    suite.run(&mut known.bed, &scenarios![no_unit_has_failed]);
    suite.finish()
}

/// Before the isolation, the agent of the bootimage completes what it has begun.
fn the_agent_of_the_node_image_takes_over_after_the_isolation(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    wait_for_agent(guest, other_agent::PROGRAM)?;
    same(state(guest)?, "done".into())?;
    unit_is(guest, "node-image-finish.service", "active")
}

fn the_pivot_leaves_objects_out(known: &mut Known) -> Result<()> {
    known.bed.guest.ask(&format!("ls {STORE}/repo/state/*.commitpartial")).map(drop)
}

fn pull_complete_is_refused_with_numbers_when_there_is_too_little_room(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    let used: u64 = guest.ask(&format!("du -sk {STORE} | cut -f1"))?.trim().parse()?;
    let limit = format!("echo 'ram_limit = \"{}KiB\"' >/etc/node-image-pivot.conf.d/90-limit.toml", used + 2048);
    guest.ask(&limit)?;
    let answer = guest.run("node-image-pivot pull --complete")?;
    guest.ask("rm /etc/node-image-pivot.conf.d/90-limit.toml")?;
    same(answer.status, 11)?;
    contains(&answer.text, "MiB are free")?;
    contains(&answer.text, "ram_limit")?;
    same(state(guest)?, "done".into())?;
    same(guest.ask(RUNNING)?, known.before.clone())
}

fn pull_complete_fetches_the_rest(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    contains(&guest.ask("node-image-pivot pull --complete")?, "the node store has all of")?;
    guest.ask(&format!("! ls {STORE}/repo/state/*.commitpartial")).map(drop)
}

fn the_store_passes_fsck(known: &mut Known) -> Result<()> {
    known.bed.guest.ask(&format!("ostree fsck --repo={STORE}/repo")).map(drop)
}

fn modules_and_kernel_of_the_node_image_are_stored(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(&format!("ostree ls -R --repo={STORE}/repo coreos/node-image /usr/lib/modules | grep -q '[.]ko'"))?;
    let checksum = format!(
        "ostree ls -C --repo={STORE}/repo coreos/node-image $(ostree ls -R --nul-filenames-only \
         --repo={STORE}/repo coreos/node-image /usr/lib/modules | tr '\\0' '\\n' | grep vmlinuz | head -n1)"
    );
    contains(&guest.ask(&checksum)?, "vmlinuz")
}

fn pull_complete_changes_no_service_mount_or_file_in_etc(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    same(state(guest)?, "done".into())?;
    same(guest.ask(RUNNING)?, known.before.clone())?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())
}

fn pull_complete_does_not_ask_the_registry_again(known: &mut Known) -> Result<()> {
    known.bed.registry.stop();
    contains(&known.bed.guest.ask("node-image-pivot pull --complete")?, "the node store has all of")
}

fn pull_complete_sets_refs_again_that_another_program_removed(known: &mut Known) -> Result<()> {
    let refs = format!("ostree refs --repo={STORE}/repo --list ostree/container");
    let (guest, delete) = (&known.bed.guest, refs.replace("--list", "--delete"));
    let before = guest.ask(&refs)?;
    contains(&before, "ostree/container/image/docker_3A__2F__2F_registry")?;
    let after = guest
        .ask(&format!("{delete} && ! {refs} | grep . && node-image-pivot pull --complete >/dev/null 2>&1 && {refs}"))?;
    same(after, before)
}

const DEPLOY_OWN: &str = "node-image-pivot deploy --sysroot /sysroot --stateroot testbed";
const DEPLOY: &str = "node-image-pivot deploy --sysroot /var/disk --stateroot node --karg root=LABEL=root";

fn a_hook_refuses_the_deployment(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(
        "mkdir -p /etc/node-image-pivot/pre-deploy.d /etc/node-image-pivot/post-deploy.d
         cd /etc/node-image-pivot; printf '#!/bin/sh\necho not today; exit 1\n' >pre-deploy.d/10-refuse
         printf '#!/bin/sh\necho \"$NODE_IMAGE_PIVOT_HOOK $NODE_IMAGE_PIVOT_SYSROOT\" >>/run/deployed\n' >post-deploy.d/10-note
         printf '#!/bin/sh\nexit 7\n' >post-deploy.d/20-fail; chmod +x *-deploy.d/*",
    )?;
    let answer = guest.run(DEPLOY)?;
    same(answer.status, 10)?;
    contains(&answer.text, "not today")?;
    guest.ask("rm -r /etc/node-image-pivot/pre-deploy.d; test ! -e /run/deployed").map(drop)
}

/// Replaces the placeholders in commands of docs/single-node.md.
fn on_the_disk(commands: &str) -> String {
    commands.replace("/mnt", "/var/disk").replace("NAME", "node").replace("root=UUID=…", "quiet")
}

/// The registry is down. The image comes from the node store and the booted repo.
fn deploy_writes_the_image_to_a_disk_without_the_registry(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(&format!("set -e; mkdir /var/disk\n{}", on_the_disk(&page::commands().sysroot)))?;
    let done = guest.ask(DEPLOY)?;
    contains(&done, "in the stateroot node boots commit")?;
    contains(&done, "the hook /etc/node-image-pivot/post-deploy.d/20-fail")?;
    same(guest.ask("cat /run/deployed; rm -r /etc/node-image-pivot")?, "post-deploy /var/disk".into())?;
    contains(&guest.ask("node-image-pivot report")?, "deploy")?;
    let journal = guest.ask("journalctl --no-pager -o cat -u node-image-pivotd.service")?;
    let place = |text: &str| journal.rfind(text).with_context(|| format!("no {text:?} in the journal"));
    let (needed, written) = (place("the deployment needs ")?, place("objects to /var/disk")?);
    if needed > written {
        bail!("the needed space is stated after the first write");
    }
    guest.ask("ostree fsck -q --repo=/var/disk/ostree/repo")?;
    contains(&guest.ask("cat /var/disk/boot/loader/entries/*.conf")?, "root=LABEL=root")?;
    let origin = guest.ask("cat /var/disk/ostree/deploy/node/deploy/*.origin")?;
    contains(&origin, "container-image-reference=ostree-unverified-registry:registry.example.test/")?;
    contains(&guest.ask("cat /var/disk/ostree/deploy/node/deploy/*.0/usr/lib/os-release")?, "Debian GNU/Linux 13")?;
    same(state(guest)?, "done".into())?;
    same(guest.ask(RUNNING)?, known.before.clone())
}

fn a_repeated_deploy_has_nothing_to_do(known: &mut Known) -> Result<()> {
    contains(&known.bed.guest.ask(DEPLOY)?, "nothing to do")
}

/// The disk has the objects already.
fn a_caller_of_the_bus_deploys_with_the_image_that_updates_follow(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    let call = |image: &str| {
        format!(
            "busctl --timeout=infinity call org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1 Deploy ssass \
             /var/disk other 1 quiet {image}"
        )
    };
    let done = guest.ask(&format!("ostree admin os-init --sysroot /var/disk other && {}", call(FOLLOWED)))?;
    contains(&done, "in the stateroot other boots commit")?;
    let origin = guest.ask("cat /var/disk/ostree/deploy/other/deploy/*.origin")?;
    contains(&origin, &format!("container-image-reference={FOLLOWED}"))?;
    contains(&guest.ask("cat /var/disk/boot/loader/entries/*.conf")?, "options quiet ")?;
    let refused = guest.run(&call("latest"))?;
    same(refused.status, 1)?;
    contains(&refused.text, "latest")?;
    same(guest.ask(RUNNING)?, known.before.clone())
}

fn the_command_accepts_the_same_image(known: &mut Known) -> Result<()> {
    let deploy = on_the_disk(&page::commands().deploy).replace("--stateroot node", "--stateroot other");
    contains(&deploy, FOLLOWED)?;
    contains(&known.bed.guest.ask(&deploy)?, "nothing to do")
}

fn deploy_refuses_the_read_only_sysroot_of_the_running_system(known: &mut Known) -> Result<()> {
    let answer = known.bed.guest.run(DEPLOY_OWN)?;
    same(answer.status, 10)?;
    contains(&answer.text, "the sysroot of the running system: its file system or that of /boot is read-only")
}

/// A hook waits until the deployment is cancelled.
fn an_undo_is_refused_during_a_deployment_to_the_own_sysroot(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(&format!(
        "mkdir /run/node-image-pivot/pre-deploy.d && cd /run/node-image-pivot/pre-deploy.d
         printf '#!/bin/sh\ntouch /run/waiting\nexec sleep infinity\n' >10-wait && chmod +x 10-wait
         systemd-run -q --collect --unit=deploying {DEPLOY_OWN}"
    ))?;
    wait_for("the hook", SOON, || Ok(guest.run("test -e /run/waiting")?.status == 0))?;
    same(guest.status()?["call"].as_str(), Some("deploy"))?;
    for command in ["undo", "keep"] {
        let answer = guest.run(&format!("node-image-pivot {command}"))?;
        same(answer.status, 10)?;
        contains(&answer.text, "a phase is under way")?;
    }
    guest.ask("node-image-pivot cancel && rm -r /run/node-image-pivot/pre-deploy.d")?;
    wait_for("the end of the call", SOON, || Ok(guest.unit("deploying.service", "LoadState")? == "not-found"))
}

fn all_was_done_by_the_agent_of_the_node_image(known: &mut Known) -> Result<()> {
    wait_for_agent(&known.bed.guest, other_agent::PROGRAM)?;
    same(known.bed.guest.ask(RUNNING)?, known.before.clone())
}

const ETC_PLAN: &str = "/run/node-image-pivot/etc-plan.json";

/// Only the agent that has written a file of another format can use it.
fn an_undo_is_followed_by_no_agent_that_reads_another_format(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(&format!("cp {ETC_PLAN} /run/plan; jq 'del(.checksum) | .schema = 3' /run/plan >{ETC_PLAN}"))?;
    guest.ask("node-image-pivot undo")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    wait_for("the refusal", SOON, || {
        let notes = guest.status()?["notes"].to_string();
        Ok(notes.contains("cannot take over, and this one continues") && notes.contains("another agent wrote it"))
    })?;
    wait_for_agent(guest, other_agent::PROGRAM)?;
    guest.ask(&format!("cp /run/plan {ETC_PLAN}")).map(drop)
}

/// A machine that has finished its boot is in use: the next run restarts services, and an isolate would end this one.
fn a_run_after_the_boot_is_over_isolates_nothing(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask(
        "systemd-run -q --unit=installer sleep infinity
         systemctl daemon-reload; systemctl restart node-image-pivotd.service
         systemctl get-default | grep -qx multi-user.target || exit 1
         node-image-pivot run",
    )?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    same(state(guest)?, "switched".into())?;
    same(guest.ask("jq -r .flow /run/node-image-pivot/units.json")?, "live".into())?;
    same(guest.ask("systemctl list-jobs --no-legend | wc -l")?, "0".into())?;
    unit_is(guest, "installer.service", "active")
}

fn the_agent_of_the_bootimage_takes_over_after_the_undo(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    wait_for_agent(guest, other_agent::PROGRAM)?;
    guest.ask("node-image-pivot undo")?;
    wait_for_agent(guest, "/usr/bin/node-image-pivot")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn the_agent_of_the_bootimage_deploys_for_a_node_image_with_an_older_one(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    guest.ask("touch /run/older && node-image-pivot run")?;
    wait_for("the refusal", SOON, || Ok(guest.status()?["notes"].to_string().contains("cannot take over")))?;
    let again = DEPLOY.replace("--stateroot node", "--stateroot again");
    let done = guest.ask(&format!("ostree admin os-init --sysroot /var/disk again && {again}"))?;
    contains(&done, "in the stateroot again boots commit")?;
    guest.ask("systemctl is-active node-image-pivotd.service && ! pidof /run/other-agent").map(drop)
}

/// A registry that goes down during `pull --complete` delays no other command.
#[test]
fn keep_and_undo_do_not_wait_for_a_download() -> Result<()> {
    let mut suite = Suite::new("agent: undo during pull --complete");
    let mut bed = Bed::boot("agent-beside", "node-b", Serving::AtBoot, configured_later)?;
    bed.guest.wait_unit("multi-user.target", "active", SOON)?;
    bed.guest.ask("mv /etc/later /etc/node-image-pivot.conf.d; node-image-pivot run --try 10m")?;
    bed.registry.stop();
    suite.run(
        &mut bed,
        &scenarios![
            a_cancel_answers_after_the_end_of_the_download,
            status_shows_that_the_download_waits_for_the_registry,
            keep_is_answered_during_the_download after status_shows_that_the_download_waits_for_the_registry,
            an_undo_ends_the_download after status_shows_that_the_download_waits_for_the_registry,
        ],
    );
    suite.finish()
}

/// The download does not hold the record, so that the status names no call.
fn a_cancel_answers_after_the_end_of_the_download(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("systemd-run -q --unit=first node-image-pivot pull --complete")?;
    wait_state(&bed.guest, "waiting")?;
    contains(&bed.guest.ask("node-image-pivot cancel --json")?, r#""state":"switched""#)?;
    bed.guest.wait_unit("first.service", "failed", SOON)?;
    bed.guest.ask("systemctl reset-failed first.service").map(drop)
}

fn status_shows_that_the_download_waits_for_the_registry(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("systemd-run -q --unit=rest --property=RemainAfterExit=no node-image-pivot pull --complete")?;
    wait_state(&bed.guest, "waiting")
}

fn keep_is_answered_during_the_download(bed: &mut Bed) -> Result<()> {
    contains(&bed.guest.ask("timeout 20 node-image-pivot keep")?, "the switch stays")
}

fn an_undo_ends_the_download(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("timeout 100 node-image-pivot undo")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    guest.wait_unit("rest.service", "failed", SOON)?;
    same(guest.unit("rest.service", "ExecMainStatus")?, "12".into())?;
    same(state(guest)?, "pulled".into())
}
