//! In the place of the installer's scripts: what others rely on, line by line; docs/contract.md has the table. On
//! virtual machines, with kernels and cgroups of their own; podman.rs has podman, in a container.
//! `cargo test -p testbed --test dropin -- --test-threads=1 --nocapture`

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::check::{Checks, contains, same};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::proxy::Proxy;
use testbed::registry::{Registry, registries_conf};
use testbed::scenario::{node_files, wait_pivoted};
use testbed::vm::{self, Vm};

const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);
const UNITS: [&str; 2] = ["node-image-pull.service", "node-image-overlay.service"];

/// A library of functions as a cluster installer writes it. There is no podman to ask: it falls back by itself.
fn release_image_script(spec: &str) -> String {
    format!(
        "#!/usr/bin/env bash\nRELEASE_IMAGE_DIGEST=$(podman inspect --format '{{{{index .RepoDigests 0}}}}' '{spec}') || {{\n\
         \techo 'no digest known'\n\tRELEASE_IMAGE_DIGEST='{spec}'\n}}\n\
         image_for() {{\n\tpodman run --rm \"$RELEASE_IMAGE_DIGEST\" image \"$1\"\n}}\n"
    )
}

/// What a service record says, an entry each: stage, phase, result.
fn record(guest: &dyn Guest, unit: &str) -> Result<Vec<String>> {
    let text = guest.ask(&format!("cat /var/log/openshift/{unit}.json"))?;
    let entries: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("no service record:\n{text}"))?;
    let word = |entry: &Value, key: &str| entry[key].as_str().unwrap_or("-").to_owned();
    for entry in &entries {
        if entry["timestamp"].as_str().is_none_or(|time| time.len() != 20) {
            bail!("a timestamp is missing or malformed:\n{text}");
        }
        if (entry["result"] == "failure") != entry["errorMessage"].is_string() {
            bail!("a failure without a message, or the other way round:\n{text}");
        }
    }
    Ok(entries.iter().map(|e| ["stage", "phase", "result"].map(|key| word(e, key)).join(" ")).collect())
}

/// Two containers of the bootimage's runtime: one below a service, one that was detached.
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
    for i in $(seq 50); do [ "$(runc state one 2>/dev/null | jq -r .status)" = running ] && exit 0; sleep 0.1; done
    exit 1
"#;

/// The assisted flow as its installer runs it, on a machine that has long booted and runs containers.
#[test]
fn the_assisted_flow_keeps_the_contract() -> Result<()> {
    let images = Images::ensure()?;
    let boot = images.boot_runtime()?;
    let mut checks = Checks::new("drop-in: the assisted flow, with running containers and the installer's own script");
    let registry = Registry::start(&images.storage, &work_dir("dropin-live-registry")?, None, None)?;
    let release = images.image("release")?;
    let script = "/var/usrlocal/bin/release-image.sh";
    let setup = vm::Setup {
        name: "dropin-live",
        boot: &boot,
        disk: None,
        kargs: &[],
        memory_mib: 2048,
        cpu: vm::CPU,
        limit: Duration::from_secs(900),
    };
    let guest = Vm::start(images, &setup, |files| {
        node_files(files, "", vm::HOST, registry.port)?;
        std::fs::remove_dir_all(files.root().join("etc/node-image-pivot.conf.d"))?;
        files.put("/etc/no-var-tmpfs", 0o644, "")?;
        files.put("/var/log/openshift/bootkube.json", 0o644, "[]\n")?;
        files.put(script, 0o755, &release_image_script("registry.example.test/cluster/release:no-such-tag"))
    })?;
    guest.wait_ssh(Duration::from_secs(300))?;
    guest.wait_unit("multi-user.target", "active", Duration::from_secs(300))?;
    checks.check("a medium with the script on it boots as always: nothing is redirected", || {
        same(guest.ask("systemctl get-default")?, "multi-user.target".into())?;
        same(guest.unit(UNITS[0], "ActiveState")?, "inactive".into())?;
        // A live medium by the marker alone, as PXE has it.
        guest.ask("test -e /run/ostree-live && ! grep -q coreos.liveiso /proc/cmdline").map(drop)
    });
    if !checks.check("containers run", || guest.ask(CONTAINERS).map(drop)) {
        return checks.finish();
    }
    let start = || guest.ask(&format!("systemctl start --no-block {}", UNITS.join(" ")));
    let pids = "for one in one two; do runc state $one | jq .pid; done";
    let services = "systemctl show -p Id -p MainPID -p InvocationID -p ActiveState '*.service' '*.target' '*.mount' | \
                    awk -v RS= '{$1=$1; print}'";
    let before: BTreeSet<String> = guest.ask(services)?.lines().map(str::to_owned).collect();
    let (containers, mounts) = (guest.ask(pids)?, guest.ask("findmnt -rno TARGET | grep ^/var || true")?);

    checks.check("a payload that is not there: failed, with the reason in the unit's status text", || {
        start()?;
        guest.wait_unit(UNITS[0], "failed", SOON)?;
        contains(&guest.unit(UNITS[0], "StatusText")?, "no-such-tag")?;
        contains(&guest.ask("journalctl -u node-image-pull.service")?, "no-such-tag")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())
    });
    checks.check("its service record says the same", || {
        same(
            record(&guest, "node-image-pull")?,
            vec![
                "- service start -".into(),
                "resolve stage start -".into(),
                "resolve stage end failure".into(),
                "- service end failure".to_owned(),
            ],
        )
    });
    let spec = format!("registry.example.test/cluster/release@{}", release.digest);
    let text = release_image_script(&spec).replace('\'', "'\\''");
    guest.ask(&format!("printf %s '{text}' >{script}"))?;

    let mut seen: [Vec<String>; 2] = Default::default();
    if !checks.check("started again without blocking, both become active", || {
        start()?;
        let begun = Instant::now();
        while seen[1].last().is_none_or(|state| state != "active") {
            for (unit, seen) in UNITS.iter().zip(&mut seen) {
                // While systemd re-executes itself it answers nobody. Whoever polls asks again.
                let Ok(state) = guest.unit(unit, "ActiveState") else { continue };
                if seen.last() != Some(&state) {
                    seen.push(state);
                }
            }
            if begun.elapsed() > PIVOT || seen.iter().any(|states| states.iter().skip(1).any(|s| s == "failed")) {
                bail!("{seen:?}\n{}", guest.run("systemctl status --no-pager 'node-image-*'")?.text);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }) {
        return checks.finish();
    }
    checks.check("ActiveState on the way: activating, then active, and nothing else", || {
        for states in &mut seen {
            states.retain(|state| !(state == "inactive" || state == "failed"));
            same(states.clone(), vec!["activating".into(), "active".to_owned()])?;
        }
        Ok(())
    });
    checks.check("the payload is the script's, the node image the payload's", || {
        contains(&guest.ask("journalctl -u node-image-pivotd.service")?, &format!("names the release payload {spec}"))?;
        let status = guest.status()?;
        same(status["digest"].as_str(), Some(images.image("node-a")?.digest.as_str()))
    });
    checks.check(
        "/usr/bin/oc, kubelet and the runtime's CLI are there, /usr is read-only in PID 1's namespace",
        || {
            guest.ask("oc version --client && test -x /usr/bin/kubelet && ctr --version")?;
            contains(&guest.ask("nsenter -t 1 -m findmnt -no OPTIONS /usr | tail -n 1")?, "ro")
        },
    );
    checks.check(
        "nothing was stopped: all that was active is, and only sshd, logind and what runs old code restarted",
        || {
            let after: BTreeSet<String> = guest.ask(services)?.lines().map(str::to_owned).collect();
            let active = |all: &BTreeSet<String>| -> BTreeSet<String> {
                // A newer systemd takes the credentials of services that have long ended away.
                let ids = all
                    .iter()
                    .filter(|line| line.contains("ActiveState=active") && !line.contains("Id=run-credentials-"));
                ids.filter_map(|line| line.split(' ').find_map(|word| word.strip_prefix("Id=")).map(str::to_owned))
                    .collect()
            };
            let gone: Vec<_> = active(&before).difference(&active(&after)).cloned().collect();
            same(gone, Vec::<String>::new())?;
            for unit in ["multi-user.target", "container-one.service", "base-legacy.service", "dbus.service"] {
                let line = |all: &BTreeSet<String>| {
                    let id = format!("Id={unit}");
                    all.iter().find(|line| line.split(' ').any(|word| word == id)).cloned()
                };
                same(line(&after), line(&before))?;
            }
            same(guest.unit("node-image-finish.service", "ActiveState")?, "inactive".into())
        },
    );
    checks.check("containers have their PIDs, and programs can be started in them", || {
        same(guest.ask(pids)?, containers.clone())?;
        for one in ["one", "two"] {
            same(guest.ask(&format!("runc exec {one} echo alive"))?, "alive".into())?;
        }
        Ok(())
    });
    checks.check("a new container starts, with the node image's runtime", || {
        guest.ask("old=$(echo /sysroot/ostree/deploy/testbed/deploy/*/usr/sbin/runc); test -f $old && ! cmp -s $(command -v runc) $old")?;
        let config = "jq '.process.args = [\"echo\", \"new\"] | .root.path = \"/var/lib/testbed/bundle/rootfs\"' \
                      ../bundle/config.json >config.json";
        guest.ask(&format!("mkdir -p /var/lib/testbed/new && cd /var/lib/testbed/new && {config}"))?;
        contains(&guest.ask("systemd-run --quiet --wait --pipe --working-directory=/var/lib/testbed/new runc run three")?, "new")
    });
    checks.check("nothing was mounted below /var, whatever /etc/no-var-tmpfs says", || {
        same(guest.ask("findmnt -rno TARGET | grep ^/var || true")?, mounts.clone())?;
        guest.ask("findmnt -n -S node-image-store >/dev/null").map(drop)
    });
    checks.check(
        "the system's repo has no ref of ours: an installer to the existing root does nothing about it",
        || {
            guest.ask("! stat /ostree/repo/refs/heads/coreos/node-image 2>/dev/null")?;
            guest.ask("! stat /ostree/repo/tmp/node-image 2>/dev/null").map(drop)
        },
    );
    checks.check("on a system in use, sysctl and binfmt are left alone, and the journal says so", || {
        let journal = guest.ask("journalctl -u node-image-pivotd.service -o cat")?;
        contains(
            &journal,
            "systemd-sysctl.service does not run again, though lib/sysctl.d differs: this system is in use",
        )?;
        contains(&journal, "systemd-modules-load.service runs again: lib/modules-load.d differs")?;
        contains(&journal, "systemd-sysusers was run: lib/sysusers.d differs")?;
        contains(&journal, "systemd-hwdb update is not run: the node image brings its own database")
    });
    checks.check("the service records are complete", || {
        let pull = record(&guest, "node-image-pull")?;
        let stages = |of: &[&str]| -> Vec<String> {
            let stage = |name: &&str| [format!("{name} stage start -"), format!("{name} stage end success")];
            let ends = ["- service start -".to_owned()].into_iter().chain(of.iter().flat_map(stage));
            ends.chain(["- service end success".to_owned()]).collect()
        };
        same(pull[4..].to_vec(), stages(&["resolve", "pull", "stage"]))?;
        same(record(&guest, "node-image-overlay")?, stages(&["switch", "refresh"]))?;
        same(guest.ask("cat /var/log/openshift/bootkube.json")?, "[]".into())
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// A bootstrap node's files: everything that others attach to our units, and hooks.
fn bootstrap_files(files: &Files, image: &str, proxy: &Proxy) -> Result<()> {
    node_files(files, image, "127.0.0.1", 1)?;
    files.put("/etc/node-image-pivot.conf.d/60-hooks.toml", 0o644, "[hooks]\ntimeout = 4\n")?;
    // A name that only the proxy knows.
    let mirror = registries_conf("mirror.example.test", 5000);
    files.put("/etc/containers/registries.conf.d/50-testbed.conf", 0o644, &mirror)?;
    let http = format!("http://{}:{}", vm::HOST, proxy.port);
    let environment = format!("[Manager]\nDefaultEnvironment=HTTP_PROXY={http} HTTPS_PROXY={http} NO_PROXY=.svc\n");
    files.put("/etc/systemd/system.conf.d/10-default-env.conf", 0o644, &environment)?;
    files.put("/var/usrlocal/bin/bootstrap-service-record.sh", 0o755, "")?;
    let slow = |name: &str, unit: &str| {
        let text = format!(
            "[Unit]\nDefaultDependencies=no\n{unit}\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
             ExecStart=/bin/sh -c 'sleep 2; test ! -e /run/pull-began; touch /run/{name}'\n"
        );
        files.put(&format!("/etc/systemd/system/{name}.service"), 0o644, &text)
    };
    slow("my-dns", "")?;
    slow("attached", "Before=node-image-pull.service")?;
    files.put(
        "/etc/systemd/system/node-image-pull.service.d/dns.conf",
        0o644,
        "[Unit]\nWants=my-dns.service\nAfter=my-dns.service\n[Service]\nExecStartPre=/bin/touch /run/pull-began\n",
    )?;
    let wants = "[Unit]\nWants=attached.service\n";
    files.put("/etc/systemd/system/node-image-pivot.target.d/attached.conf", 0o644, wants)?;

    let hook = |path: &str, text: &str| {
        files.put(&format!("/etc/node-image-pivot/{path}"), 0o755, &format!("#!/bin/sh\n{text}\n"))
    };
    hook("pre-switch.d/10-gate", "env >/run/pre-environment; test -e /run/open || { echo the gate is shut; exit 7; }")?;
    hook("pre-switch.d/20-slow", "test ! -e /run/slow || { echo takes too long; sleep 60; }")?;
    hook("post-switch.d/10-count", "base-tool; env >/run/post-environment; echo >>/run/count-10")?;
    hook("post-switch.d/20-fails", "echo cannot do it >&2; exit 4")?;
    let kill = "echo >>/run/count-30; test $(wc -l </run/count-30) -gt 1 || \
                { kill -9 $(systemctl show -p MainPID --value node-image-pivotd.service); sleep 3; }";
    hook("post-switch.d/30-kills-the-agent-once", kill)?;

    files.put("/etc/tmpfiles.d/old-links.conf", 0o644, "L /var/opt/gone - - - - ../../usr/lib/opt/gone\n")?;
    files.put("/var/lib/kept-app/data", 0o600, "the machine's own\n")
}

#[test]
fn what_others_attach_keeps_working() -> Result<()> {
    let images = Images::ensure()?;
    let image = images.image("node-small")?;
    let mut checks = Checks::new("drop-in: hooks, proxies, units of others, /var and /opt, in the bootstrap flow");
    let registry = Registry::start(&images.storage, &work_dir("dropin-boot-registry")?, None, None)?;
    let proxy = Proxy::start(registry.port)?;
    let setup = vm::Setup {
        name: "dropin-boot",
        boot: &images.boot,
        disk: None,
        kargs: &[],
        memory_mib: 2048,
        cpu: vm::CPU,
        limit: Duration::from_secs(900),
    };
    let guest = Vm::start(images, &setup, |files| bootstrap_files(files, &image.by_digest(), &proxy))?;
    guest.wait_ssh(Duration::from_secs(300))?;
    let refused = |word: &str| {
        wait_for("the refusal", PIVOT, || {
            let error = guest.status()?["error"].clone();
            Ok(error["class"] == "refused" && error["message"].as_str().is_some_and(|text| text.contains(word)))
        })?;
        guest.wait_unit(UNITS[1], "failed", SOON)?;
        contains(&guest.unit(UNITS[1], "StatusText")?, word)?;
        contains(&guest.unit(UNITS[1], "StatusText")?, "the running system is unchanged")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        guest.ask("test ! -e /run/node-image-pivot/pivoted && test ! -e /opt/cni").map(drop)
    };
    if !checks.check("a hook that fails refuses the switch, with what it said", || {
        refused("exit status: 7): the gate is shut")
    }) {
        return checks.finish();
    }
    checks.check("the pull waited for a unit that a drop-in names, and for one that names ours", || {
        guest.ask("test -e /run/my-dns && test -e /run/attached && test -e /run/pull-began")?;
        same(guest.unit("my-dns.service", "Result")?, "success".into())?;
        same(guest.unit("attached.service", "Result")?, "success".into())
    });
    checks.check("the pull went through the proxy of the manager's environment, and could not have gone else", || {
        let requests = proxy.requests();
        if !requests.iter().any(|line| line.starts_with("GET http://mirror.example.test:5000/v2/")) {
            bail!("asked of the proxy: {requests:?}");
        }
        guest.ask("! getent hosts mirror.example.test").map(drop)
    });
    checks.check("what a hook is told", || {
        let told = guest.ask("cat /run/pre-environment")?;
        for line in [
            "NODE_IMAGE_PIVOT_HOOK=pre-switch",
            "NODE_IMAGE_PIVOT_FLOW=bootstrap",
            "NODE_IMAGE_PIVOT_TARGET=multi-user.target",
            "NODE_IMAGE_PIVOT_PLAN=/run/node-image-pivot/plan.json",
            &format!("NODE_IMAGE_PIVOT_DIGEST={}", image.digest),
        ] {
            contains(&told, line)?;
        }
        guest.ask("! grep -q NOTIFY_SOCKET /run/pre-environment").map(drop)
    });
    guest.ask("touch /run/open /run/slow")?;
    guest.run("systemctl start node-image-finish.service")?;
    checks.check("one that takes too long is stopped, and refuses, too", || {
        refused("stopped after 4 s (hooks.timeout): takes too long")?;
        guest.ask("! pgrep -x sleep").map(drop)
    });
    guest.ask("rm /run/slow && systemctl start --no-block node-image-finish.service")?;
    if !checks.check("when they agree, the switch is made", || {
        wait_for("another attempt", SOON, || Ok(guest.status()?["state"] != "failed"))?;
        wait_pivoted(&guest, PIVOT)
    }) {
        return checks.finish();
    }
    after_the_switch(&guest, &mut checks);
    checks.check("service records, since the installer's library is there: two refusals, then success", || {
        let overlay = record(&guest, "node-image-overlay")?;
        let ends: Vec<_> =
            overlay.iter().filter(|entry| entry.starts_with("- service end")).map(String::as_str).collect();
        same(ends, vec!["- service end failure", "- service end failure", "- service end success"])?;
        contains(&guest.ask("cat /var/log/openshift/node-image-overlay.json")?, "the gate is shut")?;
        contains(&record(&guest, "node-image-finish")?.join("\n"), "finish stage end success")
    });
    checks.check("only the unit that a failing hook failed is not well", || {
        same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
    });
    checks.finish()
}

fn after_the_switch(guest: &Vm, checks: &mut Checks) {
    let journal = || guest.ask("journalctl -u node-image-pivotd.service -o cat");
    checks.check("hooks after it: each once, also though the agent was killed in one of them", || {
        same(guest.ask("wc -l </run/count-10")?, "1".into())?;
        same(guest.ask("wc -l </run/count-30")?, "2".into())?;
        contains(&guest.ask("cat /run/post-environment")?, "NODE_IMAGE_PIVOT_HOOK=post-switch")?;
        contains(&journal()?, "post-switch hook 10-count: base-tool 1.0")
    });
    checks.check("one that fails is a warning", || {
        let notes = guest.status()?["notes"].to_string();
        contains(
            &notes,
            "warning: the hook /etc/node-image-pivot/post-switch.d/20-fails failed (exit status: 4): cannot do it",
        )
    });
    checks.check("of the node image's own hooks, those after the switch run and those before it do not", || {
        let journal = journal()?;
        contains(&journal, "post-switch hook 50-image: hook of the node image")?;
        same(journal.contains("runs too late"), false)
    });
    checks.check("what the node image has for /opt and /var arrives", || {
        same(guest.ask("/opt/cni/bin/bridge")?, "bridge of the node image".into())?;
        same(
            guest.ask("stat -c '%a %U' /var/lib/small-app/data; cat /var/lib/small-app/data")?,
            "640 root\nfrom the factory".into(),
        )
    });
    checks.check("what is there is not overwritten, and a link of the bootimage to nothing is gone", || {
        same(guest.ask("cat /var/lib/kept-app/data")?, "the machine's own".into())?;
        guest.ask("test ! -L /opt/gone").map(drop)
    });
    checks.check("sysctl and modules-load ran again for what the merge brought", || {
        same(guest.ask("cat /proc/sys/net/ipv4/ip_default_ttl")?, "63".into())?;
        contains(&journal()?, "systemd-sysctl.service runs again: etc/sysctl.d differs")?;
        contains(&journal()?, "systemd-modules-load.service runs again: etc/modules-load.d differs")
    });
    checks.check("new units are enabled as the image's own links say, whatever presets say", || {
        same(guest.unit("small-enabled.service", "ActiveState")?, "active".into())?;
        same(guest.run("systemctl is-enabled small-disabled.service")?.text.trim().to_owned(), "disabled".to_owned())?;
        same(guest.unit("small-disabled.service", "ActiveState")?, "inactive".into())
    });
    checks.check("nothing is run whose inputs are as they were", || {
        let journal = journal()?;
        for tool in ["ldconfig", "systemd-sysusers", "systemd-hwdb update", "udevadm control --reload"] {
            contains(&journal, &format!("{tool} is not run: its inputs are as they were"))?;
            same(journal.contains(&format!("{tool} was run")), false)?;
        }
        contains(&journal, "systemd-binfmt.service does not run again: its inputs are as they were")
    });
}
