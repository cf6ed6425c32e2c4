//! `natter history export ROOM`: all messages of a room, as JSON lines.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use tokio::time::sleep;

use super::connect::{Connect, on_one_line, print_line, room, run_tool, stdout_closed};
use crate::{
    auth::Right,
    client::{CallError, ConnectError, Connection, Target},
    config::{Config, ConfigError},
    model::RoomId,
};

/// Messages of one page: the maximum of an edge.
const PAGE: usize = 200;

/// Maximum number of attempts to read one page.
const ATTEMPTS: u32 = 8;

/// Pause before the second attempt, doubled after each further one, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Print all messages of a room as JSON lines, the oldest first, each in its current version.
///
/// Exit code 1 if something may be missing (MongoDB or the history service is away). The rest is printed anyway.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The room, as namespace:name.
    #[arg(value_parser = room)]
    room: RoomId,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
    next: Option<String>,
    #[serde(default)]
    partial: bool,
}

/// Prints the room's messages.
pub(super) fn run(
    export: Export,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<ExitCode> {
    let rights = [Right::Read, Right::History];
    let target = export.connect.target(&export.room, &rights, config)?;
    let mut partial = false;
    run_tool(async {
        tokio::select! {
            printed = print(Pages::new(target, export.room.clone()), &mut partial) => printed,
            () = stdout_closed() => Ok(()),
        }
    })?;
    if partial {
        eprintln!(
            "natter: not all of {} can be read at the moment: some messages may be missing",
            export.room
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

async fn print(mut pages: Pages, partial: &mut bool) -> anyhow::Result<()> {
    let mut after = Some(String::new());
    while let Some(from) = after {
        let text = pages.read(&from).await?;
        let page: Page<'_> = serde_json::from_str(&text).context("the answer is not a page")?;
        *partial |= page.partial;
        for message in page.messages {
            if !print_line(&on_one_line(message.get()))? {
                // The reader has gone, so nothing is missing for it.
                *partial = false;
                return Ok(());
            }
        }
        after = page.next;
    }
    Ok(())
}

/// Reads pages over a connection, and connects again when it ends.
struct Pages {
    target: Target,
    room: RoomId,
    connection: Option<Connection>,
    turn: usize,
}

impl Pages {
    fn new(target: Target, room: RoomId) -> Self {
        Self {
            target,
            room,
            connection: None,
            turn: 0,
        }
    }

    /// The JSON text of the page after a cursor.
    async fn read(&mut self, after: &str) -> anyhow::Result<String> {
        let mut pause = PAUSE;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.try_read(after).await {
                Ok(text) => return Ok(text),
                Err(error) => error,
            };
            let lasting = match error.downcast_ref::<CallError>() {
                Some(CallError::Refused(refusal)) => !refusal.retry,
                Some(CallError::Closed(_) | CallError::Timeout) => false,
                None => matches!(
                    error.downcast_ref(),
                    Some(
                        ConnectError::Refused {
                            status: 400..=428,
                            ..
                        } | ConnectError::BadToken
                    )
                ),
            };
            if lasting || attempt == ATTEMPTS {
                return Err(error.context(format!("can't read the history of {}", self.room)));
            }
            if !matches!(error.downcast_ref(), Some(CallError::Refused(_))) {
                // The connection ended or was not established: try the next edge.
                self.connection = None;
                self.turn += 1;
            }
            eprintln!("natter: {error:#}; retrying");
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn try_read(&mut self, after: &str) -> anyhow::Result<String> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let endpoints = &self.target.endpoints;
                let Some(endpoint) = endpoints.get(self.turn % endpoints.len().max(1)) else {
                    bail!("no URL was given");
                };
                let token = self.target.token.get().map_err(anyhow::Error::msg)?;
                none.insert(Connection::open(endpoint, Some(&token)).await?)
            }
        };
        let fields = json!({ "room": self.room, "after": after, "limit": PAGE });
        let reply = connection.commands().call("history", &fields).await?;
        Ok(reply.text().to_owned())
    }
}
