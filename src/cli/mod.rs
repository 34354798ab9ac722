//! The command line: one file per group of subcommands, no logic of its own.
//!
//! Every command but `daemon` is a client of the daemon. Exit codes are part of the contract, see
//! [`Outcome`].

mod daemon;
mod drive;
mod plan;
mod say;
mod show;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::agent::Paths;
use crate::report::Outcome;
use drive::Call;

/// Turns the running base system into the cluster's node image, without a reboot.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show where the pivot stands.
    Status {
        /// The whole status document.
        #[arg(long)]
        json: bool,
        /// Show it again whenever it changes, until the pivot is done or has failed.
        #[arg(long)]
        watch: bool,
    },
    /// Show what happened: phases and how long they took, what was fetched, the RAM it cost.
    Report,
    /// Say what the switch would change; pulls and stages first, which changes nothing that runs.
    Plan {
        /// As a JSON document, with every path of /etc and every package.
        #[arg(long)]
        json: bool,
    },
    /// Show what the switch would change in /etc as a unified diff; pulls and stages first. Conflicts, of which
    /// the local version stays, are shown as comments.
    DiffEtc {
        /// Also show the content of files that not everybody may read.
        #[arg(long)]
        secrets: bool,
    },
    /// Resolve, pull and stage the node image; the running system is untouched.
    Pull {
        /// Also fetch what the pivot does not need (kernel modules), so that the image can be deployed to a disk;
        /// at any time, also after the pivot.
        #[arg(long)]
        complete: bool,
    },
    /// Switch /usr and /etc to the node image and refresh what runs; pulls first if needed.
    Overlay,
    /// Isolate to the target that the machine would have booted to.
    Finish,
    /// All phases in the foreground; isolates only on a machine that booted into the pivot target.
    Run {
        /// In the end also fetch what the pivot does not need, as `pull --complete` does.
        #[arg(long)]
        complete: bool,
        /// Undo the switch this long after it began, unless `keep` is called before: seconds, or a number
        /// with s, m or h, such as 10m.
        #[arg(long = "try", value_name = "TIME", value_parser = drive::seconds)]
        try_for: Option<u64>,
    },
    /// Keep a switch that was made with `run --try`.
    Keep,
    /// Put /usr and /etc back as they were before the switch.
    Undo,
    /// End a pull that runs or waits.
    Cancel,
    /// Run the daemon; started by node-image-pivotd.service.
    Daemon,
    /// Print a shell completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// Runs the command line and returns its exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            say::error(&format!("cannot start: {error}"));
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
    let paths = Paths::default();
    match command {
        Command::Status { json, watch: false } => show::status(&paths, json).await,
        Command::Status { json, watch: true } => show::watch(&paths, json).await,
        Command::Report => show::report(&paths).await,
        Command::Plan { json: false } => drive::drive(&paths, Call::of("Plan")).await,
        Command::Plan { json: true } => plan::json(&paths).await,
        Command::DiffEtc { secrets } => plan::diff_etc(&paths, secrets).await,
        Command::Pull { complete: false } => drive::drive(&paths, Call::of("Pull")).await,
        Command::Pull { complete: true } => drive::drive(&paths, Call::of("Complete")).await,
        Command::Overlay => drive::drive(&paths, Call::of("Overlay")).await,
        Command::Finish => drive::drive(&paths, Call::of("Finish")).await,
        Command::Run { complete, try_for } => {
            let method = if try_for.is_some() { "Try" } else { "Run" };
            match drive::drive(&paths, Call { method, seconds: try_for }).await? {
                Outcome::Done if complete => drive::drive(&paths, Call::of("Complete")).await,
                exit => Ok(exit),
            }
        }
        Command::Keep => drive::drive(&paths, Call::of("Keep")).await,
        Command::Undo => drive::drive(&paths, Call::of("Undo")).await,
        Command::Cancel => drive::cancel(&paths).await,
        Command::Daemon => daemon::daemon(paths).await,
        Command::Completions { shell } => {
            // By way of memory: clap panics when it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "node-image-pivot", &mut script);
            say::raw(&script);
            Ok(Outcome::Done)
        }
        Command::Man => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Arguments::command()).render(&mut page)?;
            say::raw(&page);
            Ok(Outcome::Done)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
