//! Bad input: a clear error and an untouched system. Each on a container of its own, booted with that input.
//! `cargo test -p testbed --test errors -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::Result;
use testbed::check::{Checks, contains_any, same};
use testbed::container::{Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::node_files;

struct Case {
    /// What is wrong.
    name: &'static str,
    /// The pull spec, or the name of an image of the test bed.
    image: &'static str,
    /// The error has one of these words.
    words: &'static [&'static str],
    /// Whether the registry asks for a login that the node does not have.
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
    Case { name: "not-encapsulated", image: "plain", words: &["ostree", "encapsulated"], login: false },
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

/// Everything that the base system consists of, in one line; without what each boot makes for itself, and without the
/// numbers that the kernel gives to loop devices and peer groups of all containers on this machine.
fn fingerprint(guest: &dyn Guest) -> Result<String> {
    guest.ask(
        "{ cd /etc; find . -xdev -type f ! -path './ssh/ssh_host*' ! -name .updated ! -name .pwd.lock ! -name 50-testbed.toml ! -name 50-testbed.conf ! -name machine-id -print0 | sort -z | xargs -0 sha256sum; \
           find . -xdev | sort; grep ' /usr ' /proc/self/mountinfo | cut -d' ' -f4- | sed -E 's/(shared|master):[0-9]+//g; s,/dev/loop[0-9]+,loop,'; ls -lR /usr/bin /usr/lib/systemd; } | sha256sum",
    )
}

fn refused(case: &Case, images: &Images, untouched: &str, checks: &mut Checks) -> Result<()> {
    let network = Network::new()?;
    let login = case.login.then_some(("core", "secret"));
    let folder = format!("error-{}", case.name);
    let registry =
        Registry::start(&images.storage, &work_dir(&format!("{folder}-registry"))?, Some(network.pid()), login)?;
    let image = images.by_name.get(case.image).map_or_else(|| case.image.to_string(), |i| i.by_digest());
    let setup = Setup { name: &folder, boot: &images.boot, kargs: &[], live: true };
    let guest =
        Container::start(images, &network, &setup, |files| node_files(files, &image, "127.0.0.1", registry.port))?;
    guest.wait_unit("ssh.service", "active", Duration::from_secs(30))?;
    let name = case.name;
    checks.check(&format!("{name}: a clear error"), || {
        wait_for("an error", Duration::from_secs(60), || Ok(guest.status()?["error"]["message"].is_string()))?;
        let status = guest.status()?;
        let message = status["error"]["message"].as_str().unwrap_or_default();
        println!("       {}: {message}", status["error"]["class"].as_str().unwrap_or("no class"));
        contains_any(message, case.words)
    });
    checks.check(&format!("{name}: systemctl status tells it"), || {
        wait_for("the reason in systemctl status", Duration::from_secs(30), || {
            contains_any(&guest.run("systemctl status --no-pager -l node-image-pull.service")?.text, case.words)
                .map(|()| true)
        })
    });
    checks.check(&format!("{name}: the system is untouched"), || {
        same(fingerprint(&guest)?, untouched.to_string())?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(
            guest.ask(
                "find / -xdev -path /sysroot -prune -o -name 'evil*' -print; find /run /var /etc /tmp -name 'evil*'",
            )?,
            String::new(),
        )
    });
    checks.check(&format!("{name}: a new ssh login works"), || {
        same(guest.login("echo in")?.text.trim().into(), "in".to_string())
    });
    Ok(())
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("containers: bad input");
    // What "untouched" means: the same boot with the agent switched off.
    let network = Network::new()?;
    let setup = Setup { name: "error-none", boot: &images.boot, kargs: &["node-image-pivot=off"], live: true };
    let guest = Container::start(images, &network, &setup, |files| node_files(files, "x", "127.0.0.1", 5000))?;
    guest.wait_unit("ssh.service", "active", Duration::from_secs(30))?;
    let untouched = fingerprint(&guest)?;
    guest.power_off()?;
    for case in CASES {
        if let Err(error) = refused(case, images, &untouched, &mut checks) {
            checks.check(&format!("{}: runs", case.name), || Err(error));
        }
    }
    checks.finish()
}
