//! Pulls the same node images with this agent and as the incumbent does, side by side, and says what each costs.
//!
//! `docs/benchmarks.md` says what is measured and how. Each run of a side is a separate process
//! (`benchmark side …`), so that its memory, its CPU time and its tmpfs are its own.

mod before;
mod compare;
mod deploying;
mod etc;
mod fixture;
mod images;
mod limit;
mod listing;
mod ours;
mod proc;
mod profile;
mod proxy;
mod registry;
mod side;
mod summary;
mod svg;
mod table;
mod watch;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare the two sides on all cases.
    Compare(compare::Options),
    /// Build the images that are pulled.
    Images {
        /// Base operating system, REPO=REF.
        #[arg(long)]
        base: images::Commit,
        /// Another release, for more real content.
        #[arg(long)]
        more: images::Commit,
        /// The base with a node's programs.
        #[arg(long)]
        node: images::Commit,
        /// ostree-ext as a program.
        #[arg(long)]
        oracle: PathBuf,
        /// Kind of the images.
        #[arg(long, value_enum)]
        set: images::Set,
        /// An empty directory.
        out: PathBuf,
    },
    /// One run of one side; prints what it took.
    #[command(hide = true)]
    Side(side::Task),
    /// Our side's part of a run.
    #[command(hide = true)]
    Pull(ours::PullTask),
    /// Our side's deployment to a disk.
    #[command(hide = true)]
    Deploy(deploying::DeployTask),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Compare(options) => compare::compare(&options),
        Command::Images { base, more, node, oracle, set, out } => {
            images::build(&images::Inputs { base, more, node, oracle }, set, &out).map(drop)
        }
        Command::Side(task) => print(&side::run(&task)?),
        Command::Pull(task) => print(&ours::pull(&task)?),
        Command::Deploy(task) => deploying::deploy(&task),
    }
}

fn print(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
