//! Node images on the machine itself: each form that `image` accepts, pulled by the service. With the skopeo of the
//! bootimage, the agent itself reads the signature policy; a newer skopeo enforces it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use testbed::check::{contains, same};
use testbed::container::Bed;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::Images;
use testbed::scenario::wait_pivoted;
use testbed::scenarios;
use testbed::suite::Suite;

use super::{PIVOT, state};

/// Place of a newer skopeo before it is installed.
const NEWER: &str = "/var/newer-skopeo";
const POLICY: &str = "/etc/containers/policy.json";
const CONFIGURATION: &str = "/etc/node-image-pivot.conf.d/50-testbed.toml";

/// Transport and pull spec of an image.
type Form = (&'static str, &'static str);

const FORMS: [Form; 4] = [
    ("oci", "oci:/var/forms/oci:v1"),
    ("oci-archive", "oci-archive:/var/forms/archive.tar:v1"),
    ("dir", "dir:/var/forms/dir"),
    ("containers-storage", "containers-storage:localhost/node:v1"),
];

/// Adds a newer skopeo to the files of a container, at a place where no program finds it.
pub fn carry_a_newer_skopeo(files: &Files) -> Result<()> {
    files.copy(&Images::skopeo()?, NEWER)
}

/// Runs the scenarios on a base system that can reach its registry. The last one makes it a node.
pub fn run(suite: &mut Suite, bed: &mut Bed) {
    suite.part("images on this machine");
    suite.run(bed, &scenarios![an_image_is_copied_to_each_form]);
    let copied = Some("an_image_is_copied_to_each_form");
    suite.each("refused_and_pulled", copied, bed, rows(), |bed, form| {
        refused_and_pulled(bed, *form, "policy.json rejects the image")
    });
    suite.run(bed, &scenarios![a_newer_skopeo_is_installed after an_image_is_copied_to_each_form]);
    let newer = Some("a_newer_skopeo_is_installed");
    suite.each("refused_and_pulled_by_a_newer_skopeo", newer, bed, rows(), |bed, form| {
        refused_and_pulled(bed, *form, "the signature policy /etc/containers/policy.json refuses")
    });
    suite
        .run(bed, &scenarios![the_machine_becomes_an_image_in_a_local_directory after an_image_is_copied_to_each_form]);
}

fn rows() -> [(&'static str, Form); 4] {
    FORMS.map(|form| (form.0, form))
}

/// Copies a node image from the registry. An old skopeo reads only uncompressed layers from an image store.
fn an_image_is_copied_to_each_form(bed: &mut Bed) -> Result<()> {
    let [oci, archive, dir, store] = FORMS.map(|(_, spec)| spec);
    let image = Images::ensure()?.image("node-small")?.by_digest();
    let copies = [
        ["", &format!("docker://{image}"), oci],
        ["", oci, archive],
        ["--dest-decompress", oci, dir],
        ["", dir, store],
    ];
    let copies = copies.map(|words| format!("skopeo copy --quiet {}", words.join(" ")));
    let prepare = format!("rm /etc/node-image-pivot.conf.d/90-off.toml; mkdir /var/forms && {}", copies.join(" && "));
    bed.guest.ask(&prepare).map(drop)
}

fn a_newer_skopeo_is_installed(bed: &mut Bed) -> Result<()> {
    contains(&bed.guest.ask("skopeo --version")?, "version 1.9.")?;
    bed.guest.ask(&format!("cp -a {NEWER}/. /usr/local/bin"))?;
    contains(&bed.guest.ask("skopeo --version")?, "version 1.18.")
}

/// The policy and a wrong digest are refused before anything is stored. The refusal by the policy has these words.
fn refused_and_pulled(bed: &mut Bed, (transport, spec): Form, words: &str) -> Result<()> {
    let guest = &bed.guest;
    let policy = guest.ask(&format!("cat {POLICY}"))?;
    let reject = json!({ "default": [{ "type": "insecureAcceptAnything" }],
                         "transports": { transport: { "": [{ "type": "reject" }] } } });
    let put = |policy: &str| guest.ask(&format!("printf %s '{policy}' >{POLICY}"));
    let store = "find /run/node-image-pivot/store/repo/{objects,refs} -type f 2>/dev/null | sort | sha256sum";
    let before = guest.ask(store)?;

    put(&reject.to_string())?;
    let refused = pull(guest, spec, 11);
    put(&policy)?;
    let error = refused?;
    same(error["class"].as_str(), Some("policy"))?;
    let message = error["message"].to_string();
    [words, spec].iter().try_for_each(|part| contains(&message, part))?;

    let wrong = format!("sha256:{}", "0".repeat(64));
    let error = pull(guest, &format!("{spec}@{wrong}"), 11)?;
    same(error["class"].as_str(), Some("bad-digest"))?;
    contains(&error["message"].to_string(), &format!("expected {wrong}"))?;
    same(guest.ask(store)?, before)?;

    same(pull(guest, spec, 0)?, Value::Null)?;
    same(state(guest)?, "pulled".into())?;
    let digest = format!("sha256:{}", manifest(guest, spec)?);
    same(guest.status()?["digest"].as_str(), Some(digest.as_str()))?;
    let planned = guest.ask("jq -r .image /run/node-image-pivot/plan.json")?;
    same(planned, format!("{spec}@{digest}"))?;
    same(guest.run("test -e /usr/lib/opt/cni/bin/bridge")?.status, 1)
}

/// Returns the checksum of the manifest in an image, computed without the agent.
fn manifest(guest: &dyn Guest, spec: &str) -> Result<String> {
    guest.ask(&format!("/usr/bin/skopeo inspect --raw {spec} 2>/dev/null | sha256sum | cut -d' ' -f1"))
}

/// Configures the image and pulls it. Returns the error in the status document.
fn pull(guest: &dyn Guest, spec: &str, exit_code: i32) -> Result<Value> {
    configure(guest, spec)?;
    let answer = guest.run("node-image-pivot pull")?;
    same(answer.status, exit_code).with_context(|| answer.text)?;
    Ok(guest.status()?["error"].take())
}

fn configure(guest: &dyn Guest, spec: &str) -> Result<()> {
    guest.ask(&format!("echo 'image = \"{spec}\"' >{CONFIGURATION}")).map(drop)
}

fn the_machine_becomes_an_image_in_a_local_directory(bed: &mut Bed) -> Result<()> {
    bed.registry.stop();
    let guest = &bed.guest;
    let spec = format!("{}@sha256:{}", FORMS[0].1, manifest(guest, FORMS[0].1)?);
    configure(guest, &spec)?;
    guest.ask("systemctl start --no-block node-image-finish.service")?;
    wait_pivoted(guest, PIVOT)?;
    same(guest.status()?["image"].as_str(), Some(spec.as_str()))?;
    guest.ask("test -x /usr/lib/opt/cni/bin/bridge && systemctl is-active small-enabled.service").map(drop)
}
