//! Programs and files of /usr in tight loops while it changes: at no moment is /usr missing or mixed.

use anyhow::{Result, bail};
use testbed::check::same;
use testbed::guest::Guest;
use testbed::proc::wait_for;
use testbed::scenarios;
use testbed::suite::Suite;

use super::SOON;
use super::bed::Bed;

/// Starts the loops. The second has builtins only: it reads tens of thousands of times a second. It reads three times,
/// first and last from the same file. Those two may differ only if the switch came between them.
const LOOPS: &str = r#"
        cat >/run/looks <<'END'
        exec 2>>/run/fails
        runs=0
        while [ ! -e /run/stop ]; do /usr/bin/true || echo "true: $?" >&2; runs=$((runs + 1)); done
        echo $runs >/run/runs
END
        cat >/run/pairs <<'END'
        exec 2>>/run/fails
        pairs=0 seen1=0 seen2=0
        while [ ! -e /run/stop ]; do
            read -r _ _ a </usr/lib/base-tool/data || echo "data" >&2
            { read -r _; read -r _ _ b; } </usr/bin/base-tool || echo "base-tool" >&2
            read -r _ _ c </usr/lib/base-tool/data || echo "data" >&2
            [ "$a" != "$c" ] || [ "$a" = "$b" ] || echo "mixed: $a $b $c" >&2
            [ "$c" != 1.0 ] || seen1=1
            [ "$c" != 2.0 ] || seen2=$((seen2 + 1))
            pairs=$((pairs + 1))
        done
        echo $pairs $seen1 $seen2 >/run/pairs.count
END
        rm -f /run/stop /run/fails
        systemd-run -q --unit=looks bash /run/looks; systemd-run -q --unit=pairs bash /run/pairs"#;

#[test]
fn usr_changes_in_one_step() -> Result<()> {
    let mut suite = Suite::new("transaction: /usr in one step");
    let mut bed = Bed::start("transaction-step", "node-b")?;
    bed.agent("pull")?;
    bed.guest.ask(LOOPS)?;
    suite.run(
        &mut bed,
        &scenarios![
            three_switches_and_undos_succeed_under_both_loops,
            no_read_failed_and_no_read_was_mixed after three_switches_and_undos_succeed_under_both_loops,
        ],
    );
    suite.finish()
}

fn three_switches_and_undos_succeed_under_both_loops(bed: &mut Bed) -> Result<()> {
    for _ in 0..3 {
        bed.agent("run")?;
        bed.agent("undo")?;
    }
    Ok(())
}

fn no_read_failed_and_no_read_was_mixed(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("touch /run/stop")?;
    wait_for("the loops' end", SOON, || Ok(guest.run("test -s /run/runs -a -s /run/pairs.count")?.status == 0))?;
    let (runs, count) = (guest.ask("cat /run/runs")?, guest.ask("cat /run/pairs.count")?);
    println!("       {runs} runs of true; pairs: {count}");
    same(guest.ask("cat /run/fails")?, String::new())?;
    let [pairs, seen1, seen2] = count.split(' ').map(|n| n.parse::<u64>().unwrap_or(0)).collect::<Vec<_>>()[..] else {
        bail!("{count}")
    };
    if pairs < 1000 || seen1 == 0 || seen2 == 0 || runs.parse::<u64>()? < 100 {
        bail!("too few reads to mean anything: {count}");
    }
    Ok(())
}
