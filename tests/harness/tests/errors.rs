//! Bad input gives a clear error and leaves the system unchanged. A separate container boots with each input.
//! `make check-one NAME=errors`

use std::time::Duration;

use anyhow::Result;
use testbed::check::{contains_any, same};
use testbed::container::{Bed, Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::node_files;
use testbed::scenarios;
use testbed::suite::Suite;

struct Case {
    /// Name of the fault.
    name: &'static str,
    /// The pull spec, or the name of an image of the test bed.
    image: &'static str,
    /// The error has one of these words.
    words: &'static [&'static str],
    /// True if the registry asks for a login that the node does not have.
    login: bool,
}

const CASES: &[Case] = &[
    Case {
        name: "wrong-spec",
        image: "registry.example.test/UPPER CASE:::",
        words: &["pull spec", "reference", "invalid"],
        login: false,
    },
    Case {
        name: "no-such-tag",
        image: "registry.example.test/cluster/node-a:nosuchtag",
        words: &["nosuchtag", "manifest unknown", "not found"],
        login: false,
    },
    Case {
        name: "no-such-image",
        image: "registry.example.test/cluster/nosuchimage:latest",
        words: &["nosuchimage", "name unknown", "not found"],
        login: false,
    },
    Case {
        name: "401",
        image: "good-small",
        words: &["unauthorized", "authentication", "credentials", "401"],
        login: true,
    },
    Case { name: "not-a-system", image: "plain", words: &["is not an operating system"], login: false },
    Case {
        name: "other-architecture",
        image: "other-arch",
        words: &["architecture", "arm64", "aarch64"],
        login: false,
    },
    Case {
        name: "corrupt-blob",
        image: "corrupt",
        words: &["digest", "checksum", "corrupt", "decompress", "gzip"],
        login: false,
    },
    Case {
        name: "truncated-blob",
        image: "truncated",
        words: &["truncated", "unexpected", "digest", "short", "size", "corrupt"],
        login: false,
    },
    Case { name: "no-system", image: "good-small", words: &["lacks /usr/lib/systemd/systemd"], login: false },
    Case { name: "entry-escapes", image: "escape-dots", words: &["..", "escape", "outside", "path"], login: false },
    Case { name: "object-escapes", image: "escape-object", words: &["..", "escape", "outside", "path"], login: false },
];

/// Hash of all that the base system consists of. Left out are files that each boot makes for itself, and numbers of loop
/// devices and peer groups, which the kernel shares out among all containers.
fn fingerprint(guest: &dyn Guest) -> Result<String> {
    guest.ask(
        "{ cd /etc; find . -xdev -type f ! -path './ssh/ssh_host*' ! -name .updated ! -name .pwd.lock ! -name 50-testbed.toml ! -name 50-testbed.conf ! -name machine-id -print0 | sort -z | xargs -0 sha256sum; \
           find . -xdev | sort; grep ' /usr ' /proc/self/mountinfo | cut -d' ' -f4- | sed -E 's/(shared|master):[0-9]+//g; s,/dev/loop[0-9]+,loop,'; ls -lR /usr/bin /usr/lib/systemd; } | sha256sum",
    )
}

/// Returns the fingerprint of a boot with the agent switched off.
fn unchanged_fingerprint() -> Result<String> {
    let (images, network) = (Images::ensure()?, Network::new()?);
    let kargs = &["node-image-pivot=off"][..];
    let setup = Setup { kargs, ..Setup::live("error-none", &images.boot) };
    let guest = Container::start(images, &network, &setup, |files| node_files(files, "x", "127.0.0.1", 5000))?;
    guest.wait_unit("ssh.service", "active", Duration::from_secs(180))?;
    let unchanged = fingerprint(&guest)?;
    guest.power_off()?;
    Ok(unchanged)
}

/// A container that is asked to pull a bad image.
struct Refusing<'a> {
    case: &'static Case,
    unchanged: &'a str,
    bed: Bed,
}

impl<'a> Refusing<'a> {
    fn boot(case: &'static Case, unchanged: &'a str) -> Result<Self> {
        let (images, network) = (Images::ensure()?, Network::new()?);
        let login = case.login.then_some(("core", "secret"));
        let folder = format!("error-{}", case.name);
        let work = work_dir(&format!("{folder}-registry"))?;
        let registry = Registry::start(&images.storage, &work, Some(network.pid()), login)?;
        let image = images.by_name.get(case.image).map_or_else(|| case.image.to_string(), |i| i.by_digest());
        let setup = Setup::live(&folder, &images.boot);
        let guest =
            Container::start(images, &network, &setup, |files| node_files(files, &image, "127.0.0.1", registry.port))?;
        guest.wait_unit("ssh.service", "active", Duration::from_secs(180))?;
        Ok(Refusing { case, unchanged, bed: Bed { guest, registry, network } })
    }
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let mut suite = Suite::new("containers: bad input");
    let unchanged = unchanged_fingerprint()?;
    for case in CASES {
        suite.part(case.name);
        let mut refusing = None;
        suite.each("a_container_boots", None, &mut refusing, [(case.name, case)], |refusing, case| {
            *refusing = Some(Refusing::boot(case, &unchanged)?);
            Ok(())
        });
        let Some(mut refusing) = refusing else { continue };
        suite.run(
            &mut refusing,
            &scenarios![
                status_has_a_clear_error,
                systemctl_status_has_the_error after status_has_a_clear_error,
                the_system_is_unchanged_and_no_file_has_escaped,
                a_new_ssh_login_works,
            ],
        );
    }
    suite.finish()
}

fn status_has_a_clear_error(refusing: &mut Refusing<'_>) -> Result<()> {
    let guest = &refusing.bed.guest;
    wait_for("an error", Duration::from_secs(180), || Ok(guest.status()?["error"]["message"].is_string()))?;
    let status = guest.status()?;
    let message = status["error"]["message"].as_str().unwrap_or_default();
    println!("       {}: {message}", status["error"]["class"].as_str().unwrap_or("no class"));
    contains_any(message, refusing.case.words)
}

fn systemctl_status_has_the_error(refusing: &mut Refusing<'_>) -> Result<()> {
    let guest = &refusing.bed.guest;
    wait_for("the reason in systemctl status", Duration::from_secs(180), || {
        let answer = guest.run("systemctl status --no-pager -l node-image-pull.service")?;
        contains_any(&answer.text, refusing.case.words).map(|()| true)
    })
}

fn the_system_is_unchanged_and_no_file_has_escaped(refusing: &mut Refusing<'_>) -> Result<()> {
    let guest = &refusing.bed.guest;
    same(fingerprint(guest)?, refusing.unchanged.to_string())?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    let find = "find / -xdev -path /sysroot -prune -o -name 'evil*' -print; find /run /var /etc /tmp -name 'evil*'";
    same(guest.ask(find)?, String::new())
}

fn a_new_ssh_login_works(refusing: &mut Refusing<'_>) -> Result<()> {
    same(refusing.bed.guest.login("echo in")?.text.trim().into(), "in".to_string())
}
