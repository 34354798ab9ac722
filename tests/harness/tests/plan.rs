//! Looking before leaping: what the switch would do, and every refusal that a container can bring about.
//! `cargo test -p testbed --test plan -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::check::{Checks, contains, same};
use testbed::container::{Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::registry::Registry;
use testbed::scenario::node_files;

const SOON: Duration = Duration::from_secs(60);

fn document(guest: &dyn Guest) -> Result<Value> {
    let text = guest.ask("node-image-pivot plan --json")?;
    serde_json::from_str(&text).with_context(|| format!("plan --json is not JSON:\n{text}"))
}

fn has(list: &Value, key: &str, word: &str) -> Result<()> {
    let found = list.as_array().is_some_and(|list| list.iter().any(|one| one[key] == word));
    if found { Ok(()) } else { bail!("nothing in the list has {key} {word}:\n{list:#}") }
}

#[test]
fn a_plan_tells_everything_and_refusals_touch_nothing() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("plan: what would happen, and what refuses");
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("plan-registry")?, Some(network.pid()), None)?;
    let setup = Setup { name: "plan", boot: &images.boot, kargs: &[], live: true };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &images.image("node-b")?.by_digest(), "127.0.0.1", registry.port)?;
        // Nothing happens by itself.
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    guest.ask("cp -a /etc /run/etc-before")?;
    let untouched = || -> Result<()> {
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(
            guest.ask(
                "diff -r --no-dereference /run/etc-before /etc 2>&1 | grep -v 'is a socket\\|is a fifo' || true",
            )?,
            String::new(),
        )
    };

    checks.check("plan --json: /usr, packages, /etc, memory", || {
        let answer = document(&guest)?;
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
        untouched()
    });
    checks.check("plan says the same in words", || {
        let words = guest.ask("node-image-pivot plan")?;
        for part in ["/usr: ", "base-tool 1.0", "/etc: ", "memory: "] {
            contains(&words, part)?;
        }
        Ok(())
    });
    checks.check("diff-etc is a patch of what the switch will do", || {
        guest.ask("node-image-pivot diff-etc >/run/diff")?;
        contains(&guest.ask("cat /run/diff")?, "\n+++ b/etc/")?;
        untouched()
    });
    checks.check("nothing secret is shown, unless asked for; the plan is of now", || {
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
    });
    checks.check("a mount below /usr is warned of", || {
        guest.ask("mount -t tmpfs tmpfs /usr/share/doc")?;
        let words = guest.ask("node-image-pivot plan");
        guest.ask("umount /usr/share/doc")?;
        contains(&words?, "warning: /usr/share/doc is a mount point and is hidden")
    });

    // Each of them: told, exit 10, and nothing is changed. A refusal makes the next call begin anew.
    let overlay = "mkdir -p /run/lower /run/upper /run/work; mount -t overlay";
    for (name, make, words, unmake) in [
        (
            "conflicts, and the strategy is fail",
            "printf '[etc]\\nstrategy = \"fail\"\\n' >/etc/node-image-pivot.conf.d/90-fail.toml".to_owned(),
            "conflict in /etc/base-tool/admin-edited.conf",
            "rm /etc/node-image-pivot.conf.d/90-fail.toml",
        ),
        (
            "a read-only /etc",
            "mount --bind /etc /etc && mount -o remount,bind,ro /etc".to_owned(),
            "/etc is mounted read-only",
            "umount -l /etc",
        ),
        (
            "a /usr that was made writable",
            format!("{overlay} overlay -o lowerdir=/usr,upperdir=/run/upper,workdir=/run/work /usr"),
            "ostree admin unlock",
            "umount -l /usr",
        ),
        (
            "a system extension over something else",
            format!(
                "{overlay} below -o ro,lowerdir=/run/lower:/usr /usr && mount -t overlay sysext -o ro,lowerdir=/run/work:/usr /usr"
            ),
            "systemd-sysext unmerge",
            "umount -l /usr && umount -l /usr",
        ),
    ] {
        checks.check(&format!("refused: {name}"), || {
            guest.ask(&make)?;
            let answer = guest.run("node-image-pivot plan --json");
            guest.ask(unmake)?;
            let answer = answer?;
            contains(&answer.text, words)?;
            same(answer.status, 10)?;
            untouched()
        });
    }

    checks.check("the switch does what the diff said", || {
        let answer = guest.run("node-image-pivot run")?;
        if answer.status != 0 {
            bail!("run: {}\n{}", answer.status, answer.text);
        }
        // What the refresh writes by itself is no part of the plan.
        let listed = guest.ask("sed -n 's,^diff --git a/etc/.* b/etc/,,p' /run/diff | sort -u")?;
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
    });
    checks.check("afterwards: plan says so, diff-etc refuses", || {
        same(document(&guest)?["state"].clone(), "switched".into())?;
        let answer = guest.run("node-image-pivot diff-etc")?;
        same(answer.status, 10)?;
        contains(&answer.text, "already switched")
    });
    checks.finish()
}
