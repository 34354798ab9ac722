//! The systemd generator. Called with one or three output directories; see systemd.generator(7).
//!
//! It never fails the boot: whatever goes wrong is one line in the kernel's log, and exit status 0
//! with the boot left as it was.

use std::env;
use std::panic;
use std::path::PathBuf;

use node_image_pivot_generator::decide::{Decision, decide};
use node_image_pivot_generator::emit::{self, Output};
use node_image_pivot_generator::kmsg::{Level, Sink};
use node_image_pivot_generator::{Problem, cmdline::CommandLine, facts};

/// Put in front of every path that is read, and makes messages go to standard error: for tests.
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
        return sink.log(Level::Warning, "called without an output directory; it is for systemd to call");
    };
    let early = arguments.next().unwrap_or_else(|| normal.clone());
    match decide(facts::gather(root, in_initrd())) {
        Decision::Leave(reason) => {
            if let Some(level) = reason.level() {
                sink.log(level, &format!("not redirecting this boot: {reason}"));
            }
        }
        Decision::Redirect { pivot_target, original, services } => {
            // The agent refuses a misspelt key; whoever reads the console should know already.
            for key in CommandLine::read(root).unwrap_or_default().unknown {
                sink.log(Level::Warning, &format!("unknown key on the kernel command line: {key}"));
            }
            match emit::redirect(&Output { normal, early }, &pivot_target, &original, &services) {
                Ok(()) => {
                    sink.log(Level::Notice, &format!("this boot goes to the node image first, then to {original}"));
                }
                Err(Problem(what)) => sink.log(Level::Warning, &what),
            }
        }
    }
}

/// Set by systemd 251 and later to 0 or 1.
fn in_initrd() -> bool {
    env::var("SYSTEMD_IN_INITRD").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "no" | "false"))
}
