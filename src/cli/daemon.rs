//! `daemon`: opens the agent with its record and serves calls until SIGTERM or SIGINT.

use anyhow::Result;
use libsystemd::daemon::{NotifyState, notify};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::drive::unix_now;
use crate::agent::{Agent, Boot, StateDir};
use crate::bus;
use crate::report::{self, Outcome};

pub(super) async fn daemon(paths: StateDir) -> Result<Outcome> {
    start_log();
    let socket = paths.socket();
    let agent = Agent::open(paths, Boot::look().await)?;
    bus::serve(agent.clone(), &socket).await?;
    agent.attend();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _ = notify(false, &[NotifyState::Ready]);

    let mut watch = agent.tracker().watch();
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            changed = watch.changed() => {
                if changed.is_err() {
                    break;
                }
                let line = report::state_line(&watch.borrow_and_update(), unix_now());
                let _ = notify(false, &[NotifyState::Status(line)]);
            }
        }
    }
    let _ = notify(false, &[NotifyState::Stopping]);
    // Waits for a running switch or undo. If it cannot be completed, the failure makes the unit start another daemon, which
    // completes it.
    let stopped = agent.stop().await;
    Ok(if stopped.is_unfinished() { Outcome::Internal } else { Outcome::Done })
}

/// Starts logging to the journal, or to stderr if there is no journal.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NODE_IMAGE_PIVOT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    match tracing_journald::layer() {
        Ok(journal) => registry.with(journal.with_syslog_identifier("node-image-pivot".into())).init(),
        Err(_) => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}
