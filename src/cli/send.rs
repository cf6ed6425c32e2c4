//! `natter send ROOM [TEXT…]`: sends a message to a room and waits until it is stored.

use std::{io::BufRead as _, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};

use super::connect::{Connect, print_line, room, run_tool};
use crate::{
    auth::Right,
    client::{Draft, Publisher},
    config::{Config, ConfigError},
    model::{Kind, MessageId, Reference, RoomId, without_mark},
};

/// Lines that are read ahead of the edge's acknowledgements; at that number stdin is not read.
const LINES_AHEAD: usize = 16;
/// After this time without an acknowledgement, the reason is printed.
const QUIET: Duration = Duration::from_secs(2);

/// Arguments of `natter send`.
#[derive(Debug, Args)]
pub(super) struct Send {
    /// The room, as namespace:name.
    #[arg(value_parser = room)]
    room: RoomId,
    /// Text of the message, sent as {"text": …}; without it each line of stdin is sent.
    text: Vec<String>,
    #[command(flatten)]
    connect: Connect,
    /// Id of the message: a repeated id is stored once.
    #[arg(long, requires = "text", value_parser = id)]
    id: Option<MessageId>,
    /// message, edit, delete, reaction, annotation, pin or unpin.
    #[arg(long, value_parser = kind)]
    kind: Option<Kind>,
    /// The message to which any other kind than a message refers: USER/ID, or ID for one of your own.
    #[arg(long, value_name = "REFERENCE", value_parser = reference)]
    target: Option<String>,
    /// The message that this one answers: USER/ID, or ID for one of your own.
    #[arg(long, value_name = "REFERENCE", value_parser = reference)]
    reply_to: Option<String>,
    /// TEXT, or each line, is the body itself, as JSON.
    #[arg(long)]
    json_body: bool,
}

fn id(text: &str) -> Result<MessageId, String> {
    MessageId::parse(text).map_err(|error| error.to_string())
}

fn kind(text: &str) -> Result<Kind, String> {
    Kind::parse(text).ok_or_else(|| {
        let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
        format!("must be one of {}", known.join(", "))
    })
}

/// Parsed only to check it; sent as it was given.
fn reference(text: &str) -> Result<String, String> {
    match Reference::parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Sends TEXT or the lines of stdin, one after the other, and prints the cursor of each.
pub(super) fn run(
    send: Send,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let about = send.kind.unwrap_or_default() != Kind::Message;
    if about && send.target.is_none() {
        bail!("--kind needs --target: the message it refers to");
    }
    let pins = send.kind.is_some_and(|kind| kind.pins().is_some());
    let mut rights = vec![Right::Read, Right::Write];
    if pins {
        rights.push(Right::Moderate);
    }
    let target = send.connect.target(&send.room, &rights, config)?;
    run_tool(async move {
        let publisher = Publisher::open(target);
        // A delete and a pin need no text.
        let wordless = pins || send.kind == Some(Kind::Delete);
        if wordless && send.text.is_empty() {
            return publish(&publisher, &send, Value::Null).await.map(drop);
        }
        if !send.text.is_empty() {
            let body = send.body(&send.text.join(" "))?;
            return publish(&publisher, &send, body).await.map(drop);
        }
        let mut lines = stdin_lines();
        let mut number = 0;
        while let Some(line) = lines.recv().await {
            number += 1;
            let line = line.context("can't read stdin")?;
            if line.trim().is_empty() {
                continue;
            }
            let at_line = || format!("line {number} was not sent");
            let body = send.body(&line).with_context(at_line)?;
            if !publish(&publisher, &send, body)
                .await
                .with_context(at_line)?
            {
                break;
            }
        }
        Ok(())
    })
}

/// `false`: the reader of the cursors has gone.
async fn publish(publisher: &Publisher, send: &Send, body: Value) -> anyhow::Result<bool> {
    let mut draft = Draft::new(send.room.as_str(), body);
    if let Some(id) = &send.id {
        id.as_str().clone_into(&mut draft.id);
    }
    draft.kind = send.kind.map(|kind| kind.as_str().to_owned());
    draft.target.clone_from(&send.target);
    draft.reply_to.clone_from(&send.reply_to);
    let mut publishing = std::pin::pin!(publisher.publish(&draft));
    let outcome = match timeout(QUIET, &mut publishing).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => {
            let trouble = publisher.trouble().unwrap_or_default();
            eprintln!("natter: not stored yet, retrying; {trouble}");
            publishing.await
        }
    };
    let ack = outcome.with_context(|| format!("message {}", draft.id))?;
    if ack.dup {
        eprintln!("natter: {} was already stored", ack.id);
    }
    // Ephemeral rooms have no cursors, so the id is printed.
    print_line(ack.cursor.as_deref().unwrap_or(&ack.id))
}

impl Send {
    fn body(&self, text: &str) -> anyhow::Result<Value> {
        if self.json_body {
            serde_json::from_slice(without_mark(text.as_bytes())).context("the body is not JSON")
        } else {
            Ok(json!({"text": text}))
        }
    }
}

/// The lines of stdin. They are read by a separate thread, because a blocking read can't be cancelled and Ctrl-C must
/// not wait for it.
fn stdin_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, lines) = mpsc::channel(LINES_AHEAD);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let failed = line.is_err();
            if sender.blocking_send(line).is_err() || failed {
                return;
            }
        }
    });
    lines
}
