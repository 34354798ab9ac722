//! The systemd generator, which systemd calls with one or three output directories (systemd.generator(7)).
//!
//! It never fails the boot: it logs each error as one line in the kernel's log, leaves the boot unchanged, and exits with
//! status 0.

use std::env;
use std::panic;
use std::path::{Path, PathBuf};

use boot_config::{Problem, cmdline::CommandLine, mark, under};
use node_image_pivot_generator::decide::{Decision, Facts, Place, cleaner, decide, taken_over};
use node_image_pivot_generator::emit::{self, Outcome, Output};
use node_image_pivot_generator::facts;
use node_image_pivot_generator::kmsg::{Level, Sink};

/// Variable for tests: prefix of every path that is read. If it is set, messages are written to standard error.
const ROOT_VARIABLE: &str = "NODE_IMAGE_PIVOT_GENERATOR_ROOT";

fn main() {
    let root = env::var_os(ROOT_VARIABLE).map(PathBuf::from);
    let sink = if root.is_some() { Sink::Stderr } else { Sink::Kernel };
    panic::set_hook(Box::new(move |info| {
        sink.log(Level::Warning, &format!("this is a bug, please report it: {info}"));
    }));
    let _ = panic::catch_unwind(|| run(&root.unwrap_or_else(|| PathBuf::from("/")), sink));
}

fn run(root: &Path, sink: Sink) {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let Some(normal) = arguments.next() else {
        return sink.log(Level::Warning, "called without an output directory; only systemd calls the generator");
    };
    let environment = facts::Environment {
        in_initrd: flag("SYSTEMD_IN_INITRD").unwrap_or(false),
        first_boot: flag("SYSTEMD_FIRST_BOOT"),
    };
    let early = arguments.next().unwrap_or_else(|| normal.clone());
    let facts = facts::gather(root, environment);
    if let Err(Problem(what)) = take_over(root, sink, &early, &facts) {
        mark::forget_redirect(root);
        return sink.log(Level::Warning, &what);
    }
    if let Some(agent) = cleaner(&facts) {
        match emit::clean_up(&normal, agent) {
            Ok(()) => sink.log(Level::Info, "starting the agent, which removes the trees of an earlier boot"),
            Err(Problem(what)) => sink.log(Level::Warning, &what),
        }
    }
    match decide(facts) {
        Decision::Leave(reason) => {
            mark::forget_redirect(root);
            if let Some(level) = reason.level() {
                sink.log(level, &format!("not redirecting this boot: {reason}"));
            }
        }
        Decision::Redirect { place, pivot_target, original, services } => {
            // The agent will refuse an unknown key. The warning is on the console earlier.
            for key in CommandLine::read(root).unwrap_or_default().unknown {
                sink.log(Level::Warning, &format!("unknown key on the kernel command line: {key}"));
            }
            let directory = match place {
                Place::Normal => &normal,
                Place::Early => &early,
            };
            let link = directory.join("default.target");
            let output = Output { normal, link, mark: under(root, mark::REDIRECTED) };
            match emit::redirect(&output, &pivot_target, &original, &services) {
                Ok(Outcome::Redirected) => {
                    sink.log(Level::Notice, &format!("redirecting this boot to the node image, then to {original}"));
                }
                Ok(Outcome::LeftToOther) => {
                    mark::forget_redirect(root);
                    let link = output.link.display();
                    sink.log(Level::Info, &format!("not redirecting this boot: {link} belongs to another generator"));
                }
                Err(Problem(what)) => {
                    mark::forget_redirect(root);
                    sink.log(Level::Warning, &what);
                }
            }
        }
    }
}

/// Takes over the units of an installer, if there are any.
fn take_over(root: &Path, sink: Sink, early: &Path, facts: &Facts) -> Result<(), Problem> {
    let units = taken_over(facts);
    if units.is_empty() {
        return Ok(());
    }
    emit::take_over(early, root, units)?;
    let names: Vec<_> = units.iter().filter_map(|unit| unit.file_name()?.to_str()).collect();
    // After the switch, this occurs at every daemon-reload.
    let level = if facts.pivoted { Level::Debug } else { Level::Notice };
    sink.log(level, &format!("taking over units of an installer in /etc: {}", names.join(", ")));
    Ok(())
}

/// Returns the value of a variable that systemd 251 and later set to 0 or 1.
fn flag(name: &str) -> Option<bool> {
    env::var(name).ok().map(|value| !matches!(value.as_str(), "" | "0" | "no" | "false"))
}
