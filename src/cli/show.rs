//! `status` and `report`: the status document, from the daemon or, when it does not run, from what
//! it left behind.

use std::time::Duration;

use anyhow::Result;

use super::Exit;
use super::drive::unix_now;
use crate::agent::{Paths, Record};
use crate::bus::Client;
use crate::report::{self, State, Status};

async fn current(paths: &Paths) -> Result<Status> {
    match Client::connect(&paths.socket()).await {
        Ok(client) => client.status().await,
        // The record is root's; for others the daemon's silence is the answer.
        Err(error) => Record::load(paths).map(|record| record.status).map_err(|_| error),
    }
}

pub(super) async fn status(paths: &Paths, json: bool) -> Result<Exit> {
    print(&current(paths).await?, json)?;
    Ok(Exit::Done)
}

pub(super) async fn report(paths: &Paths) -> Result<Exit> {
    print!("{}", report::summary(&current(paths).await?));
    Ok(Exit::Done)
}

pub(super) async fn watch(paths: &Paths, json: bool) -> Result<Exit> {
    let mut last = None;
    loop {
        let status = current(paths).await?;
        if last.as_ref() != Some(&status) {
            print(&status, json)?;
        }
        match status.state {
            State::Done | State::NothingToDo => return Ok(Exit::Done),
            State::Failed => return Ok(Exit::Permanent),
            _ => last = Some(status),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn print(status: &Status, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(status)?);
    } else {
        println!("{}", report::state_line(status, unix_now()));
    }
    Ok(())
}
