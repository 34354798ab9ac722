//! `make demo`: a bootimage boots in a virtual machine and becomes its node image while you watch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::registry::Registry;
use testbed::scenario::node_files;
use testbed::vm::{HOST, Setup, Vm};

const LIMIT: Duration = Duration::from_secs(600);

/// Lines of the console that are about the pivot; `--all` shows every line.
fn of_interest(line: &str) -> bool {
    ["node-image", "node image", "multi-user.target", "Linux version", "login:"].iter().any(|w| line.contains(w))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let all = args.iter().any(|a| a == "--all");
    let images = Pair::demo()?;
    let image = &images.image;
    let registry = Registry::start(&images.storage, &work_dir("demo-registry")?, None, None)?;
    println!("Booting the live bootimage (Debian 12, base system only); it becomes\n{}\n", image.by_digest());
    let setup = Setup { limit: LIMIT, ..Setup::live("demo", &images.boot) };
    let vm = Vm::start(&images, &setup, |files| {
        node_files(files, &image.by_digest(), HOST, registry.port)?;
        // The progress is for people: on the console it belongs.
        files.put(
            "/etc/systemd/system/node-image-pull.service.d/50-demo.conf",
            0o644,
            "[Service]\nStandardOutput=journal+console\n",
        )
    })?;

    let mut shown = 0;
    let mut pivoted = None;
    let mut ssh = false;
    while pivoted.is_none() {
        if vm.age() > LIMIT {
            bail!("no end within {} s; see {}", LIMIT.as_secs(), vm.work().display());
        }
        show(&vm, &mut shown, all);
        std::thread::sleep(Duration::from_millis(500));
        // Questions cost the guest little, but only once it has an sshd at all.
        ssh = ssh || vm.console.since(0).contains("OpenBSD Secure Shell server");
        if !ssh {
            continue;
        }
        let Ok(status) = vm.status() else { continue };
        bar(&vm, &status);
        match status["state"].as_str() {
            Some("done") if vm.unit("multi-user.target", "ActiveState").is_ok_and(|s| s == "active") => {
                pivoted = Some(Instant::now());
            }
            Some("failed") => {
                println!("\n{}", vm.run("node-image-pivot status; systemctl status --no-pager 'node-image-*'")?.text);
                bail!("the pivot failed");
            }
            _ => {}
        }
    }
    show(&vm, &mut shown, all);
    println!(
        "\n\nmulti-user.target of the node image, {:.0} s after power on (software emulation).\n",
        vm.age().as_secs_f64()
    );
    println!("{}", vm.ask("node-image-pivot status")?);
    println!("{}", vm.ask("node-image-pivot report")?);
    let picture = work_dir("demo-picture")?.join("pivot.svg");
    std::fs::write(&picture, vm.ask("node-image-pivot report --svg -")?)
        .with_context(|| format!("cannot write {}", picture.display()))?;
    for command in
        ["base-tool", "oc version", "curl -sS http://127.0.0.1:8080/", "uptime -p", "systemctl is-system-running"]
    {
        println!("# {command}\n{}", vm.run(command).context("asking the pivoted system")?.text.trim_end());
    }
    println!("\nThe timeline as a picture: {}", picture.display());
    Ok(())
}

fn show(vm: &Vm, shown: &mut usize, all: bool) {
    let text = vm.console.since(0);
    // Whole lines only: the last one may still grow.
    let end = text.rfind('\n').map_or(0, |i| i + 1);
    for line in text.get(*shown..end).unwrap_or_default().lines().filter(|l| all || of_interest(l)) {
        println!("\r\x1b[K{:6.1} s  {line}", vm.age().as_secs_f64());
    }
    *shown = end.max(*shown);
}

fn bar(vm: &Vm, status: &serde_json::Value) {
    let number = |key: &str| status["progress"][key].as_u64().unwrap_or(0);
    let (fetched, total) = (number("bytes_fetched"), number("bytes_total").max(1));
    let filled = (fetched * 30 / total).min(30) as usize;
    print!(
        "\r\x1b[K{:6.1} s  [{}{}] {:8} {:4}/{} MiB  layers {}/{}  objects {}/{}",
        vm.age().as_secs_f64(),
        "#".repeat(filled),
        "-".repeat(30 - filled),
        status["phase"].as_str().unwrap_or("-"),
        fetched >> 20,
        total >> 20,
        number("layers_done"),
        number("layers_total"),
        number("objects_done"),
        number("objects_wanted"),
    );
    // A terminal shows it at once, a file at the next line.
    let _ = std::io::Write::flush(&mut std::io::stdout());
}
