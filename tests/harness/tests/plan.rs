//! The switch shown before it is done, and each refusal that a container can cause.
//! `make check-one NAME=plan`

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use testbed::check::{contains, same};
use testbed::container::{Bed, Serving};
use testbed::derived::Storage;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::scenario::configured_later;
use testbed::scenarios;
use testbed::suite::Suite;

const SOON: Duration = Duration::from_secs(150);

fn document(guest: &dyn Guest) -> Result<Value> {
    let text = guest.ask("node-image-pivot plan --json")?;
    serde_json::from_str(&text).with_context(|| format!("plan --json is not JSON:\n{text}"))
}

fn has(list: &Value, key: &str, word: &str) -> Result<()> {
    let found = list.as_array().is_some_and(|list| list.iter().any(|one| one[key] == word));
    if found { Ok(()) } else { bail!("nothing in the list has {key} {word}:\n{list:#}") }
}

/// Checks that programs and /etc are those of the beginning.
fn unchanged(guest: &dyn Guest) -> Result<()> {
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    let differences = "diff -r --no-dereference /run/etc-before /etc 2>&1 | grep -v 'is a socket\\|is a fifo' || true";
    same(guest.ask(differences)?, String::new())
}

#[test]
fn a_plan_shows_the_switch_and_a_refusal_changes_nothing() -> Result<()> {
    let mut suite = Suite::new("plan: the switch shown before it is done, and refusals");
    let (images, work) = (Images::ensure()?, work_dir("plan-images")?);
    let storage = Storage::new(images, &work)?;
    let others = other_systems(images, &storage)?;
    let node = images.image("node-b")?.by_digest();
    let mut bed = Bed::boot_from(&storage.path, &node, "plan", Serving::AtBoot, configured_later)?;
    bed.guest.wait_unit("multi-user.target", "active", SOON)?;
    bed.guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    bed.guest.ask("cp -a /etc /run/etc-before")?;
    suite.each("another_distribution", None, &mut bed, others.map(|row| (row.name, row)), another_distribution);
    suite.run(
        &mut bed,
        &scenarios![
            plan_json_has_usr_packages_etc_and_memory,
            plan_shows_the_same_in_words,
            diff_etc_is_a_patch_of_what_the_switch_will_do,
            diff_etc_shows_secrets_on_request_only_and_is_current,
            plan_warns_of_a_mount_below_usr,
            users_who_are_not_root_are_refused_on_the_bus,
        ],
    );
    suite.each("refused", None, &mut bed, refusals().map(|row| (row.name, row)), refused);
    suite.run(
        &mut bed,
        &scenarios![
            the_switch_does_what_the_diff_said after diff_etc_is_a_patch_of_what_the_switch_will_do,
            plan_reports_the_switch_and_diff_etc_refuses_afterwards after the_switch_does_what_the_diff_said,
        ],
    );
    suite.finish()
}

fn plan_json_has_usr_packages_etc_and_memory(bed: &mut Bed) -> Result<()> {
    let answer = document(&bed.guest)?;
    same(answer["state"].clone(), "staged".into())?;
    let plan = &answer["plan"];
    for key in ["added", "added_bytes", "changed", "changed_bytes", "replaced_bytes", "removed", "removed_bytes"] {
        if plan["usr"][key].as_u64().unwrap_or_default() == 0 {
            bail!("usr.{key}: {}", plan["usr"]);
        }
    }
    has(&plan["packages"]["added"], "name", "cluster-node")?;
    has(&plan["packages"]["removed"], "name", "base-legacy")?;
    has(&plan["packages"]["changed"], "name", "base-tool")?;
    has(&plan["etc"]["decisions"], "path", "base-tool/admin-edited.conf")?;
    if plan["memory"]["needed_bytes"].as_u64() <= Some(64 << 20) || plan["memory"]["available_bytes"].is_null() {
        bail!("memory: {}", plan["memory"]);
    }
    unchanged(&bed.guest)
}

fn plan_shows_the_same_in_words(bed: &mut Bed) -> Result<()> {
    let words = bed.guest.ask("node-image-pivot plan")?;
    ["/usr: ", "base-tool 1.0", "/etc: ", "memory: "].iter().try_for_each(|part| contains(&words, part))
}

fn diff_etc_is_a_patch_of_what_the_switch_will_do(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("node-image-pivot diff-etc >/run/diff")?;
    contains(&bed.guest.ask("cat /run/diff")?, "\n+++ b/etc/")?;
    unchanged(&bed.guest)
}

fn diff_etc_shows_secrets_on_request_only_and_is_current(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let diff = "node-image-pivot diff-etc";
    let find = "sed -n 's,^+++ b/,/,p' /run/diff | while read -r f; do test -f $f && echo $f && break; done";
    let path = guest.ask(find)?;
    let shown = format!("+++ b{path}\n");
    let mode = guest.ask(&format!("stat -c %a {path}"))?;
    guest.ask(&format!("chmod 600 {path}"))?;
    let (without, with) = (guest.ask(diff)?, guest.ask(&format!("{diff} --secrets"))?);
    guest.ask(&format!("chmod {mode} {path}"))?;
    contains(&without, "--secrets shows it")?;
    contains(&with, &shown)?;
    same(without.contains(&shown), false)
}

fn plan_warns_of_a_mount_below_usr(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("mount -t tmpfs tmpfs /usr/share/doc")?;
    let words = bed.guest.ask("node-image-pivot plan");
    bed.guest.ask("umount /usr/share/doc")?;
    contains(&words?, "warning: /usr/share/doc is a mount point and is hidden")
}

/// Calls every method of the introspected interface as an unprivileged user. That user may read the report and the
/// properties, and cannot reach the private socket.
fn users_who_are_not_root_are_refused_on_the_bus(bed: &mut Bed) -> Result<()> {
    const NAME: &str = "org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1";
    const USER: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    let guest = &bed.guest;
    let methods = guest.ask(&format!("busctl introspect {NAME} | awk '$2 == \"method\" {{ print $1, $3 }}'"))?;
    for line in methods.lines() {
        let (method, signature) = line.split_once(' ').context(methods.clone())?;
        let arguments = match signature {
            "-" => "",
            "b" => "b true",
            "t" => "t 60",
            "ssass" => "ssass / os 0 registry.example.test/node:1",
            other => bail!("no argument for {method} with the signature {other}"),
        };
        let answer = guest.run(&format!("{USER} busctl call {NAME} {} {arguments}", method.trim_start_matches('.')))?;
        same((method, answer.status), (method, i32::from(method != ".Report")))?;
        contains(&answer.text, if method == ".Report" { "s \"{" } else { "Access denied" })?;
    }
    same(methods.lines().count() > 10, true)?;
    contains(&guest.ask(&format!("{USER} busctl get-property {NAME} State"))?, "pulled")?;
    contains(&guest.run(&format!("{USER} node-image-pivot run"))?.text, "must be root")?;
    unchanged(guest)
}

/// A configuration that results in a node image of another distribution.
struct OtherSystem {
    name: &'static str,
    configuration: String,
    is_refused: bool,
}

/// The base system under another name, and a release payload that names it.
fn other_systems(images: &Images, storage: &Storage) -> Result<[OtherSystem; 3]> {
    let os_release = "ID=another\nVERSION_ID=12\nPRETTY_NAME=\"Another System 12\"\n";
    let node = storage.add_files("another", images.image("node-small")?, &[("usr/lib/os-release", os_release)])?;
    let tag = json!({ "name": "rhel-coreos", "from": { "kind": "DockerImage", "name": node.by_digest() } });
    let references = json!({ "kind": "ImageStream", "apiVersion": "image.openshift.io/v1", "spec": { "tags": [tag] } });
    let files = [("release-manifests/image-references", references.to_string())];
    let files = files.each_ref().map(|(path, text)| (*path, text.as_str()));
    let payload = storage.add_files("another-release", images.image("release")?, &files)?;
    let (image, payload) =
        (format!("image = \"{}\"\n", node.by_digest()), format!("release_image = \"{}\"\n", payload.by_digest()));
    let permitted = format!("{payload}os_mismatch = \"warn\"\n");
    Ok([
        OtherSystem { name: "chosen in a release payload", configuration: payload, is_refused: true },
        OtherSystem { name: "with os_mismatch = warn", configuration: permitted, is_refused: false },
        OtherSystem { name: "named by image", configuration: image, is_refused: false },
    ])
}

/// `plan` refuses the node image, or shows the difference as a warning.
fn another_distribution(bed: &mut Bed, other: &OtherSystem) -> Result<()> {
    const DIRECTORY: &str = "/run/node-image-pivot.conf.d";
    const DIFFERENCE: &str = "the node image is another 12 and the booted system is debian 12";
    let guest = &bed.guest;
    guest.ask(&format!("mkdir {DIRECTORY} && printf %s '{}' >{DIRECTORY}/90-another.toml", other.configuration))?;
    let (words, json) = (guest.run("node-image-pivot plan")?, guest.run("node-image-pivot plan --json")?);
    let status = guest.status()?;
    guest.ask(&format!("rm -r {DIRECTORY}"))?;
    contains(&words.text, DIFFERENCE)?;
    contains(&json.text, DIFFERENCE)?;
    if other.is_refused {
        same([words.status, json.status], [10, 10])?;
        same(status["error"]["refusals"][0]["id"].as_str(), Some("os-mismatch"))?;
    } else {
        same([words.status, json.status], [0, 0])?;
        let document: Value = serde_json::from_str(&json.text).with_context(|| json.text.clone())?;
        same(document["state"].clone(), "staged".into())?;
        contains(&document["plan"]["warnings"].to_string(), DIFFERENCE)?;
    }
    unchanged(guest)
}

/// A fault of the machine, and the words of the refusal.
struct Fault {
    name: &'static str,
    make: &'static str,
    words: &'static str,
    unmake: &'static str,
    /// True if the fault is found without the node image.
    of_machine: bool,
}

fn refusals() -> [Fault; 4] {
    [
        Fault {
            name: "conflicts, and the strategy is fail",
            make: "printf '[etc]\\nstrategy = \"fail\"\\n' >/etc/node-image-pivot.conf.d/90-fail.toml",
            words: "conflict in /etc/base-tool/admin-edited.conf",
            unmake: "rm /etc/node-image-pivot.conf.d/90-fail.toml",
            of_machine: false,
        },
        Fault {
            name: "a read-only /etc",
            make: "mount --bind /etc /etc && mount -o remount,bind,ro /etc",
            words: "/etc is mounted read-only",
            unmake: "umount -l /etc",
            of_machine: true,
        },
        Fault {
            name: "a /usr that was made writable",
            make: "mkdir -p /run/lower /run/upper /run/work; \
                   mount -t overlay overlay -o lowerdir=/usr,upperdir=/run/upper,workdir=/run/work /usr",
            words: "ostree admin unlock",
            unmake: "umount -l /usr",
            of_machine: true,
        },
        Fault {
            name: "a system extension over another mount",
            make: "mkdir -p /run/lower /run/upper /run/work; \
                   mount -t overlay below -o ro,lowerdir=/run/lower:/usr /usr && \
                   mount -t overlay sysext -o ro,lowerdir=/run/work:/usr /usr",
            words: "systemd-sysext unmerge",
            unmake: "umount -l /usr && umount -l /usr",
            of_machine: true,
        },
    ]
}

/// Counts the requests that the registry has answered. An earlier plan has made some.
fn requests(bed: &Bed) -> Result<usize> {
    match bed.registry.log().lines().filter(|line| line.contains("HTTP/1.")).count() {
        0 => bail!("the registry has no log"),
        count => Ok(count),
    }
}

/// A refusal makes the next call begin again, so each fault is refused by a complete check. A fault of the machine is found
/// before the first request to the registry.
fn refused(bed: &mut Bed, fault: &Fault) -> Result<()> {
    let before = requests(bed)?;
    bed.guest.ask(fault.make)?;
    let answer = bed.guest.run("node-image-pivot plan --json");
    bed.guest.ask(fault.unmake)?;
    let answer = answer?;
    contains(&answer.text, fault.words)?;
    same(answer.status, 10)?;
    if fault.of_machine {
        same(requests(bed)?, before)?;
    }
    unchanged(&bed.guest)
}

fn the_switch_does_what_the_diff_said(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let answer = guest.run("node-image-pivot run")?;
    if answer.status != 0 {
        bail!("run: {}\n{}", answer.status, answer.text);
    }
    let listed = guest.ask("sed -n 's,^diff --git a/etc/.* b/etc/,,p' /run/diff | sort -u")?;
    // The plan does not contain files that the refresh writes.
    let list = |dir: &str, out: &str| {
        guest.ask(&format!(
            "cd {dir}; find . -xdev ! -type d \\( -type l -printf '%P %l\\n' -o -type f -printf '%P %m %U %G ' -exec sha256sum {{}} \\; \\) | \
             grep -Ev '^((passwd|group|shadow|gshadow|subuid|subgid)-?|ld.so.cache|.updated|.pwd.lock) ' | sort >{out}"
        ))
    };
    list("/run/etc-before", "/run/list-before")?;
    list("/etc", "/run/list-after")?;
    let changed = guest.ask("comm -3 /run/list-before /run/list-after | sed 's,^\t,,; s, .*,,' | sort -u")?;
    same(changed, listed)
}

fn plan_reports_the_switch_and_diff_etc_refuses_afterwards(bed: &mut Bed) -> Result<()> {
    same(document(&bed.guest)?["state"].clone(), "switched".into())?;
    let answer = bed.guest.run("node-image-pivot diff-etc")?;
    same(answer.status, 10)?;
    contains(&answer.text, "already switched")
}
