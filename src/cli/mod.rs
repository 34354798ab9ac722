//! The command line, one file for each group of subcommands.
//!
//! Every command except `check`, `daemon`, `explain`, `gather`, `pack`, `completions` and `man` is a client of the daemon.
//! [`Outcome`] defines the exit codes, which are stable.

mod answer;
mod case;
mod check;
mod completions;
mod daemon;
mod drive;
mod gather;
mod man;
mod pack;
mod pauses;
mod plan;
mod redact;
mod say;
mod show;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use disk_deploy::OstreeReference;

use crate::agent::{self, StateDir};
use crate::report::{Outcome, RefusalId};
use drive::Call;

/// Turn the running base system into its node image
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the state of the pivot
    Status {
        /// Print the whole status document
        #[arg(long)]
        json: bool,
        /// Show each change, until the pivot is done or has failed
        #[arg(long)]
        watch: bool,
        /// Exit with 0 only if the pivot has succeeded
        ///
        /// Exits like the call that failed, and with 14 while the pivot has not ended.
        #[arg(long)]
        exit_code: bool,
    },
    /// Show the timeline: phases, layers, restarts and their cost
    ///
    /// The report of a failed pivot begins with the cause, the state of the system and the next step.
    Report {
        /// Print the report as a JSON document
        #[arg(long)]
        json: bool,
        /// Draw the timeline to this SVG file, or to - for stdout
        #[arg(long, value_name = "FILE", conflicts_with = "json")]
        svg: Option<PathBuf>,
    },
    /// Check if this machine can switch, without a node image
    ///
    /// Runs the checks of the record, the kernel, the mounts, /etc, the configuration and free memory. Changes nothing and
    /// fetches nothing. Exits with 10 if a check refuses. `plan` also checks the node image.
    Check {
        /// Print the result of each check as a JSON document
        #[arg(long)]
        json: bool,
        /// Accept a refusal of this check; can be repeated
        ///
        /// Only the exit code changes: the pivot itself does not ignore a refusal.
        #[arg(long, value_name = "ID", value_parser = check::id())]
        ignore: Vec<RefusalId>,
    },
    /// Show what the switch would change
    ///
    /// Pulls and stages first, which does not touch the running system.
    Plan {
        /// Print a JSON document with every path of /etc and every package
        #[arg(long)]
        json: bool,
    },
    /// Show the changes to /etc as a unified diff
    ///
    /// Pulls and stages first, which does not touch the running system. A conflict keeps the local version and is shown
    /// as a comment.
    DiffEtc {
        /// Include the content of files that are not world-readable
        #[arg(long)]
        secrets: bool,
    },
    /// Resolve, pull and stage the node image
    ///
    /// Does not touch the running system. The configuration names the image: in a registry, or on this machine as
    /// oci:DIR[:TAG], oci-archive:FILE[:TAG], dir:DIR or containers-storage:NAME.
    Pull {
        /// Also fetch what only a deployment to a disk needs
        ///
        /// These are the objects below /usr/lib/modules. Works at any time, also after the pivot.
        #[arg(long)]
        complete: bool,
    },
    /// Switch /usr and /etc to the node image
    ///
    /// Pulls first if needed, and restarts the services that changed.
    Overlay,
    /// Isolate to the original default target
    Finish,
    /// Run all phases in the foreground
    ///
    /// Isolates only on a machine that booted into the pivot target.
    Run {
        /// Afterwards, also fetch what `pull --complete` fetches
        #[arg(long)]
        complete: bool,
        /// Undo the switch after this time unless `keep` is called
        ///
        /// The time begins with the switch: seconds, or a number with suffix s, m or h, for example 10m.
        #[arg(long = "try", value_name = "TIME", value_parser = drive::seconds)]
        try_for: Option<u64>,
    },
    /// Write an archive for a support case, without secrets
    ///
    /// It has status, report and record, the journals and states of the units, the effective configuration, mounts and
    /// versions. Names and addresses remain. Works without a running agent.
    Gather {
        /// New file for the archive, or - for stdout [default: /var/tmp/node-image-pivot-TIME.tar.gz]
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Explain refusals and classes of failures
    ///
    /// `status` and `status --json` show these names. Without a name, explains all.
    Explain {
        /// Print a JSON document
        #[arg(long)]
        json: bool,
        /// Names of refusals and classes, such as too-little or network
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Deploy the node image to a disk
    ///
    /// Writes it from the node store to the ostree repo of the disk, without a second download, as the system that the
    /// disk boots next. Pulls first if needed. Does not change /usr and /etc of the running system. With --sysroot /, it
    /// changes the boot loader entries, and removes deployments that were waiting for the next boot.
    Deploy {
        /// Mounted root file system of the disk, or / for the running system
        #[arg(long, value_name = "PATH")]
        sysroot: PathBuf,
        /// Existing stateroot for the deployment
        #[arg(long, value_name = "NAME")]
        stateroot: String,
        /// Add a kernel argument; can be repeated
        #[arg(long = "karg", value_name = "ARG")]
        kernel_args: Vec<String>,
        /// Image that updates of the disk follow
        ///
        /// For example ostree-unverified-registry:quay.io/example/node:latest. Default: the node image by digest.
        #[arg(long, value_name = "REFERENCE")]
        imgref: Option<OstreeReference>,
        /// Print the answer as a JSON document
        #[arg(long)]
        json: bool,
    },
    /// Keep a switch that was made with `run --try`
    Keep {
        /// Print the answer as a JSON document
        #[arg(long)]
        json: bool,
    },
    /// Restore /usr and /etc from before the switch
    Undo {
        /// Print the answer as a JSON document
        #[arg(long)]
        json: bool,
    },
    /// Cancel the running or waiting pull
    Cancel {
        /// Print the answer as a JSON document
        #[arg(long)]
        json: bool,
    },
    /// Pack the agent for machines whose image lacks it
    Pack {
        #[command(subcommand)]
        form: pack::Form,
    },
    /// Run the daemon, as node-image-pivotd.service does
    Daemon {
        /// Only check that this program can continue from the record of another one
        #[arg(long, hide = true)]
        check: bool,
    },
    /// Print a shell completion script
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print a manual page
    Man {
        /// Section: 1 (commands), 5 (configuration) or 8 (daemon)
        #[arg(default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
        section: u8,
    },
}

/// Runs the command line and returns its exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            say::error(&format!("cannot start the async runtime: {error}"));
            return ExitCode::from(Outcome::Internal.exit_code());
        }
    };
    let exit = match runtime.block_on(dispatch(arguments.command)) {
        Ok(exit) => exit,
        Err(error) => {
            say::error(&format!("{error:#}"));
            Outcome::Internal
        }
    };
    ExitCode::from(exit.exit_code())
}

async fn dispatch(command: Command) -> anyhow::Result<Outcome> {
    let paths = StateDir::default();
    match command {
        Command::Status { json, watch: true, .. } => watch::watch(&paths, json).await,
        Command::Status { json, exit_code, .. } => show::status(&paths, json, exit_code).await,
        Command::Report { json, svg } => show::report(&paths, json, svg.as_deref()).await,
        Command::Check { json, ignore } => check::check(&paths, json, &ignore).await,
        Command::Plan { json: false } => drive::drive(&paths, Call::Plain("Plan")).await,
        Command::Plan { json: true } => plan::json(&paths).await,
        Command::DiffEtc { secrets } => plan::diff_etc(&paths, secrets).await,
        Command::Pull { complete: false } => drive::drive(&paths, Call::Plain("Pull")).await,
        Command::Pull { complete: true } => drive::drive(&paths, Call::Plain("Complete")).await,
        Command::Overlay => drive::drive(&paths, Call::Plain("Overlay")).await,
        Command::Finish => drive::drive(&paths, Call::Plain("Finish")).await,
        Command::Run { complete, try_for } => {
            let call = try_for.map_or(Call::Plain("Run"), Call::Try);
            match drive::drive(&paths, call).await? {
                Outcome::Done if complete => drive::drive(&paths, Call::Plain("Complete")).await,
                exit => Ok(exit),
            }
        }
        Command::Gather { output } => gather::gather(&paths, output.as_deref()).await,
        Command::Explain { json, names } => show::explain(&names, json),
        Command::Deploy { sysroot, stateroot, kernel_args, imgref, json } => {
            let sysroot = std::path::absolute(sysroot)?;
            let sysroot = sysroot.to_str().context("cannot use the sysroot: its path is not UTF-8")?;
            let imgref = imgref.map(|imgref| imgref.to_string()).unwrap_or_default();
            answer::answer(&paths, Call::Deploy(sysroot.to_owned(), stateroot, kernel_args, imgref), json).await
        }
        Command::Keep { json } => answer::answer(&paths, Call::Plain("Keep"), json).await,
        Command::Undo { json } => answer::answer(&paths, Call::Plain("Undo"), json).await,
        Command::Cancel { json } => answer::cancel(&paths, json).await,
        Command::Pack { form } => pack::pack(&form),
        Command::Daemon { check: true } => Ok(agent::check_record(&paths).map(|()| Outcome::Done)?),
        Command::Daemon { check: false } => daemon::daemon(paths).await,
        Command::Completions { shell } => {
            say::raw(completions::script(shell).as_bytes());
            Ok(Outcome::Done)
        }
        Command::Man { section } => {
            let page = man::page(section, Arguments::command()).context("the sections are 1, 5 and 8")?;
            say::raw(page.as_bytes());
            Ok(Outcome::Done)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use completions::tests::commands;

    #[test]
    fn help_fits_into_100_columns() {
        for (words, command) in commands() {
            let about = command.get_about().unwrap().to_string();
            assert!(about.chars().count() <= 60 && !about.ends_with('.'), "{words:?}: {about}");
            for help in [command.clone().render_help(), command.clone().render_long_help()] {
                for line in help.to_string().lines() {
                    assert!(line.chars().count() <= 100, "{words:?}: {line}");
                }
            }
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
