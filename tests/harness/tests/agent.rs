//! What an operator does when things go wrong: stop, kill, mend, undo. On a real systemd in a container.
//! `cargo test -p testbed --test agent -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{Checks, contains, contains_any, same};
use testbed::container::{Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{node_files, wait_pivoted};

const PIVOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);

fn setup<'a>(name: &'a str, images: &'a Images) -> Setup<'a> {
    Setup { name, boot: &images.boot, kargs: &[], live: true }
}

fn state(guest: &dyn Guest) -> Result<String> {
    Ok(guest.status()?["state"].as_str().unwrap_or_default().to_owned())
}

/// A wrong image at first: the message says so, the mended configuration is enough, nothing is restarted.
#[test]
fn a_wrong_image_is_mended() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: a wrong image, mended");
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("agent-mend-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(images, &network, &setup("agent-mend", images), |files| {
        node_files(files, &images.image("plain")?.by_digest(), "127.0.0.1", registry.port)
    })?;
    checks.check("the pull fails for good", || guest.wait_unit("node-image-pull.service", "failed", SOON));
    checks.check("status says why, also when the daemon is down", || {
        contains(&guest.ask("node-image-pivot status")?, "not ostree-encapsulated")?;
        guest.ask("systemctl stop node-image-pivotd.service")?;
        contains(&guest.ask("node-image-pivot status")?, "not ostree-encapsulated")
    });
    checks.check("a plan fails with the documented exit code", || same(guest.run("node-image-pivot plan")?.status, 11));
    checks.check("a broken configuration is refused, by name", || {
        guest.ask(
            "cp -a /etc/node-image-pivot.conf.d /run/conf && echo 'imgae = 1' >/etc/node-image-pivot.conf.d/90-x.toml",
        )?;
        let answer = guest.run("node-image-pivot plan")?;
        same(answer.status, 10)?;
        contains(&answer.text, "90-x.toml")?;
        guest.ask("rm /etc/node-image-pivot.conf.d/90-x.toml").map(drop)
    });
    let right = images.image("node-b")?.by_digest();
    guest.ask(&format!("sed -i 's#^image = .*#image = \"{right}\"#' /etc/node-image-pivot.conf.d/*.toml"))?;
    checks.check("mended: starting the last unit does it all", || {
        guest.ask("systemctl start --no-block node-image-finish.service")?;
        wait_for("the end of the old failure", SOON, || Ok(state(&guest)? != "failed"))?;
        wait_pivoted(&guest, PIVOT)?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// Killed while it waits, while it pulls and after the switch: it goes on where it was.
#[test]
fn a_killed_daemon_goes_on() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: kill -9");
    let network = Network::new()?;
    let mut registry = Registry::start(&images.storage, &work_dir("agent-kill-registry")?, Some(network.pid()), None)?;
    registry.stop();
    let guest = Container::start(images, &network, &setup("agent-kill", images), |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", registry.port)
    })?;
    let kill = "systemctl kill -s KILL node-image-pivotd.service";
    checks.check("killed while it waits for the registry", || {
        wait_for("waiting", SOON, || Ok(state(&guest)? == "waiting"))?;
        guest.ask(kill)?;
        wait_for("waiting again", SOON, || Ok(state(&guest)? == "waiting"))?;
        same(guest.unit("node-image-pull.service", "ActiveState")?, "activating".into())
    });
    registry.resume()?;
    checks.check("killed in the middle of the pull", || {
        wait_for("objects", SOON, || Ok(guest.status()?["progress"]["objects_done"].as_u64() > Some(0)))?;
        guest.ask(kill).map(drop)
    });
    checks.check("it becomes the node image all the same", || wait_pivoted(&guest, PIVOT));
    checks.check("killed afterwards: it comes back and knows where it is", || {
        guest.ask(kill)?;
        wait_for("done", SOON, || Ok(state(&guest)? == "done"))?;
        contains(&guest.ask("node-image-pivot run")?, "nothing to do")
    });
    checks.check("one mount of the node image over /usr", || {
        same(guest.ask("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?, "1".into())
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// Whoever asks and goes away does not find the machine switched hours later.
#[test]
fn a_call_ends_with_its_caller() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: stop and cancel");
    let network = Network::new()?;
    let mut registry = Registry::start(&images.storage, &work_dir("agent-stop-registry")?, Some(network.pid()), None)?;
    registry.stop();
    let guest = Container::start(images, &network, &setup("agent-stop", images), |files| {
        node_files(files, &images.image("node-b")?.by_digest(), "127.0.0.1", registry.port)
    })?;
    wait_for("waiting", SOON, || Ok(state(&guest)? == "waiting"))?;
    checks.check("systemctl stop ends the pull", || {
        guest.ask("systemctl stop node-image-finish.service node-image-overlay.service node-image-pull.service")?;
        wait_for("the end of the call", SOON, || Ok(state(&guest)? == "failed"))?;
        contains(&guest.ask("node-image-pivot status")?, "cancelled")
    });
    checks.check("cancel says that nothing runs", || {
        contains(&guest.ask("node-image-pivot cancel")?, "nothing was running")
    });
    checks.check("cancel ends a call, which says so", || {
        guest.ask("systemd-run --unit=asked node-image-pivot overlay")?;
        wait_for("waiting", SOON, || Ok(state(&guest)? == "waiting"))?;
        contains(&guest.ask("node-image-pivot cancel")?, "cancelled")?;
        guest.wait_unit("asked.service", "failed", SOON)?;
        same(guest.unit("asked.service", "ExecMainStatus")?, "12".into())
    });
    registry.resume()?;
    checks.check("nothing happens when the registry is back", || {
        std::thread::sleep(Duration::from_secs(5));
        same(state(&guest)?, "failed".into())?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())
    });
    checks.check("undo has nothing to undo, and says so", || {
        let answer = guest.run("node-image-pivot undo")?;
        same(answer.status, 10)?;
        contains(&answer.text, "nothing was switched")
    });
    checks.check("off refuses", || {
        guest.ask("echo 'mode = \"off\"' >/etc/node-image-pivot.conf.d/90-off.toml")?;
        let answer = guest.run("node-image-pivot run")?;
        same(answer.status, 10)?;
        contains(&answer.text, "off")
    });
    checks.finish()
}

/// There and back, and there again.
#[test]
fn undo_brings_back_what_was() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: undo");
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("agent-undo-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(images, &network, &setup("agent-undo", images), |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", registry.port)?;
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    // Caches that ldconfig and systemd write, and users that sysusers makes, are nobody's to take back.
    let fingerprint = "cd /etc; find . -xdev \\( -type f -o -type l \\) ! -name ld.so.cache ! -name .updated ! -name '*passwd*' \
                       ! -name '*group*' ! -name '*shadow*' ! -name .pwd.lock -printf '%p %m %u %g %l\\n' | sort | sha256sum; \
                       find . -xdev -type f ! -name ld.so.cache ! -name .updated ! -name '*passwd*' ! -name '*group*' \
                       ! -name '*shadow*' -print0 | sort -z | xargs -0 sha256sum | sha256sum";
    let before = guest.ask(fingerprint)?;
    checks.check("plan says what would change, and changes nothing", || {
        contains(&guest.ask("node-image-pivot plan")?, "/usr:")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(guest.ask(fingerprint)?, before.clone())
    });
    let switch = || -> Result<()> {
        let answer = guest.run("node-image-pivot run")?;
        if answer.status != 0 {
            bail!("run: {}\n{}", answer.status, answer.text);
        }
        same(guest.ask("base-tool")?, "base-tool 2.0".into())
    };
    checks.check("run switches, and isolates nothing", || {
        switch()?;
        same(guest.unit("multi-user.target", "ActiveState")?, "active".into())
    });
    checks.check("undo: the old programs run, PID 1 is the old one", || {
        guest.ask("node-image-pivot undo")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        contains_any(&guest.ask("systemctl --version")?, &["systemd 252"])?;
        contains_any(&guest.ask("busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager Version")?, &["252"])
    });
    checks.check("undo: /etc is as it was", || same(guest.ask(fingerprint)?, before.clone()));
    checks.check("undo: the loader's cache is that of the old /usr", || {
        guest.ask("ldconfig -C /run/ld.so.cache && cmp /etc/ld.so.cache /run/ld.so.cache").map(drop)
    });
    checks.check("undo: a new ssh login works", || {
        same(guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
    });
    checks.check("undo: /usr is not covered, status says staged", || {
        same(guest.run("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?.text.trim().into(), "0".to_string())?;
        same(state(&guest)?, "pulled".into())
    });
    checks.check("and again", switch);
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// A registry that is gone during `pull --complete` holds up nothing.
#[test]
fn a_download_beside_the_pivot_holds_up_nothing() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: undo during pull --complete");
    let network = Network::new()?;
    let mut registry =
        Registry::start(&images.storage, &work_dir("agent-beside-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(images, &network, &setup("agent-beside", images), |files| {
        node_files(files, &images.image("node-b")?.by_digest(), "127.0.0.1", registry.port)?;
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d; node-image-pivot run --try 10m")?;
    registry.stop();
    let ask = "systemd-run -q --unit=rest --property=RemainAfterExit=no node-image-pivot pull --complete";
    checks.check("it waits for the registry, and status shows that", || {
        guest.ask(ask)?;
        wait_for("waiting", SOON, || Ok(state(&guest)? == "waiting"))
    });
    checks.check("keep is answered meanwhile", || {
        contains(&guest.ask("timeout 20 node-image-pivot keep")?, "the switch stays")
    });
    checks.check("an undo ends it", || {
        guest.ask("timeout 100 node-image-pivot undo")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        guest.wait_unit("rest.service", "failed", SOON)?;
        same(guest.unit("rest.service", "ExecMainStatus")?, "12".into())?;
        same(state(&guest)?, "pulled".into())
    });
    checks.finish()
}

/// For a deployment: the rest of the image, after the pivot, and nothing that runs notices.
#[test]
fn the_rest_comes_after_the_pivot() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: pull --complete after the pivot");
    let network = Network::new()?;
    let mut registry = Registry::start(&images.storage, &work_dir("agent-rest-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(images, &network, &setup("agent-rest", images), |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", registry.port)
    })?;
    wait_pivoted(&guest, PIVOT)?;
    const STORE: &str = "/run/node-image-pivot/store";
    let running = "systemctl show -p Id -p MainPID -p ActiveState -p InvocationID '*.service' '*.target' | grep -v '^$'; \
                   grep -v node-image-store /proc/self/mountinfo; \
                   cd /etc && find . -xdev -printf '%p %i %m %u %g %l\\n' | sort";
    let before = guest.ask(running)?;
    checks.check("the pivot has left something out", || {
        guest.ask(&format!("ls {STORE}/repo/state/*.commitpartial")).map(drop)
    });
    checks.check("too little room: refused with numbers, and the pivot is none the worse", || {
        let used: u64 = guest.ask(&format!("du -sk {STORE} | cut -f1"))?.trim().parse()?;
        let limit = format!("echo 'ram_limit = \"{}KiB\"' >/etc/node-image-pivot.conf.d/90-limit.toml", used + 2048);
        guest.ask(&limit)?;
        let answer = guest.run("node-image-pivot pull --complete")?;
        guest.ask("rm /etc/node-image-pivot.conf.d/90-limit.toml")?;
        same(answer.status, 11)?;
        contains(&answer.text, "MiB are free")?;
        contains(&answer.text, "ram_limit")?;
        same(state(&guest)?, "done".into())?;
        same(guest.ask(running)?, before.clone())
    });
    checks.check("pull --complete fetches the rest", || {
        contains(&guest.ask("node-image-pivot pull --complete")?, "the node store has all of")?;
        guest.ask(&format!("! ls {STORE}/repo/state/*.commitpartial")).map(drop)
    });
    checks.check("the store passes ostree fsck", || guest.ask(&format!("ostree fsck --repo={STORE}/repo")).map(drop));
    checks.check("modules of the node image's own kernel are there", || {
        guest.ask(&format!("ostree ls -R --repo={STORE}/repo coreos/node-image /usr/lib/modules | grep -q '[.]ko'"))?;
        let checksum = format!(
            "ostree ls -C --repo={STORE}/repo coreos/node-image $(ostree ls -R --nul-filenames-only \
             --repo={STORE}/repo coreos/node-image /usr/lib/modules | tr '\\0' '\\n' | grep vmlinuz | head -n1)"
        );
        contains(&guest.ask(&checksum)?, "vmlinuz")
    });
    checks.check("nothing that runs noticed", || {
        same(state(&guest)?, "done".into())?;
        same(guest.ask(running)?, before.clone())?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())
    });
    registry.stop();
    checks.check("once complete, the registry is not asked again", || {
        contains(&guest.ask("node-image-pivot pull --complete")?, "the node store has all of")
    });
    checks.check("undo still works", || {
        guest.ask("node-image-pivot undo")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())
    });
    checks.check(
        "a machine that has arrived is in use: the next run restarts what it may, and isolates nothing",
        || {
            // An isolation would end this one.
            guest.ask(
                "systemd-run -q --unit=installer sleep infinity
             systemctl daemon-reload; systemctl restart node-image-pivotd.service
             systemctl get-default | grep -qx multi-user.target || exit 1
             node-image-pivot run",
            )?;
            same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
            same(state(&guest)?, "switched".into())?;
            same(guest.ask("jq -r .flow /run/node-image-pivot/units.json")?, "live".into())?;
            same(guest.ask("systemctl list-jobs --no-legend | wc -l")?, "0".into())?;
            same(guest.unit("installer.service", "ActiveState")?, "active".into())
        },
    );
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// systemd boots into such a default target all the same; so do we.
#[test]
fn a_target_that_may_not_be_isolated_is_started() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: a target without AllowIsolate=");
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("agent-plain-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(images, &network, &setup("agent-plain", images), |files| {
        node_files(files, &images.image("node-b")?.by_digest(), "127.0.0.1", registry.port)?;
        files.put("/etc/node-image-pivot.conf.d/60-target.toml", 0o644, "target = \"plain.target\"\n")?;
        files.put(
            "/etc/systemd/system/plain.target",
            0o644,
            "[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\n",
        )
    })?;
    checks.check("it is reached", || {
        wait_pivoted(&guest, PIVOT)?;
        guest.wait_unit("plain.target", "active", SOON)?;
        same(state(&guest)?, "done".into())
    });
    checks.check("the journal says how", || {
        contains(&guest.ask("journalctl -b -u node-image-pivotd.service")?, "plain.target cannot be isolated")
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// Somebody mends the machine while the pivot goes on: he is not thrown out.
#[test]
fn nobody_is_isolated_away_from_rescue() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("agent: rescue in the meantime");
    let network = Network::new()?;
    let mut registry =
        Registry::start(&images.storage, &work_dir("agent-rescue-registry")?, Some(network.pid()), None)?;
    registry.stop();
    let guest = Container::start(images, &network, &setup("agent-rescue", images), |files| {
        // Nobody sits at the console.
        let shell = "[Service]\nExecStart=\nExecStart=/usr/bin/sleep infinity\n";
        files.put("/etc/systemd/system/rescue.service.d/50-testbed.conf", 0o644, shell)?;
        node_files(files, &images.image("node-b")?.by_digest(), "127.0.0.1", registry.port)
    })?;
    wait_for("waiting", SOON, || Ok(state(&guest)? == "waiting"))?;
    guest.ask("systemctl --no-block isolate rescue.target")?;
    guest.wait_unit("rescue.target", "active", SOON)?;
    registry.resume()?;
    checks.check("everything but the isolation is done, and it is said why", || {
        guest.wait_unit("node-image-finish.service", "failed", PIVOT)?;
        let status = guest.ask("node-image-pivot status")?;
        contains(&status, "the machine is in rescue.target")?;
        contains(&status, "start node-image-finish.service")?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        same(guest.unit("node-image-overlay.service", "ActiveState")?, "active".into())
    });
    checks.check("it is still in rescue", || {
        same(guest.unit("rescue.target", "ActiveState")?, "active".into())?;
        same(guest.unit("multi-user.target", "ActiveState")?, "inactive".into())
    });
    checks.check("the way out leads to the end", || {
        guest.ask("systemctl --no-block default")?;
        guest.wait_unit("multi-user.target", "active", SOON)?;
        guest.ask("systemctl start node-image-finish.service")?;
        wait_pivoted(&guest, SOON)?;
        same(state(&guest)?, "done".into())
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}
