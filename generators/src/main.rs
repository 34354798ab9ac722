//! The systemd generator, which systemd calls with one or three output directories (systemd.generator(7)).
//!
//! It never fails the boot: it logs each error as one line in the kernel's log, leaves the boot unchanged, and exits with
//! status 0.

use std::env;
use std::panic;
use std::path::PathBuf;

use boot_config::{Problem, cmdline::CommandLine, mark, under};
use node_image_pivot_generator::decide::{Decision, Place, decide};
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

fn run(root: &std::path::Path, sink: Sink) {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let Some(normal) = arguments.next() else {
        return sink.log(Level::Warning, "called without an output directory; only systemd calls the generator");
    };
    let environment = facts::Environment {
        in_initrd: flag("SYSTEMD_IN_INITRD").unwrap_or(false),
        first_boot: flag("SYSTEMD_FIRST_BOOT"),
    };
    match decide(facts::gather(root, environment)) {
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
            let link_to = match place {
                Place::Normal => normal.clone(),
                Place::Early => arguments.next().unwrap_or_else(|| normal.clone()),
            };
            let output = Output { normal, link: link_to.join("default.target"), mark: under(root, mark::REDIRECTED) };
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

/// Returns the value of a variable that systemd 251 and later set to 0 or 1.
fn flag(name: &str) -> Option<bool> {
    env::var(name).ok().map(|value| !matches!(value.as_str(), "" | "0" | "no" | "false"))
}
