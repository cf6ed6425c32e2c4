//! `natter tail ROOM`: shows a room in a terminal.

use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use super::connect::{Connect, on_one_line, print_line, room, run_tool, stdout_closed};
use crate::{
    auth::Right,
    client::{Event, Frame, Room},
    config::{Config, ConfigError},
    model::RoomId,
};

/// Arguments of `natter tail`.
#[derive(Debug, Args)]
pub(super) struct Tail {
    /// The room, as namespace:name.
    #[arg(value_parser = room)]
    room: RoomId,
    #[command(flatten)]
    connect: Connect,
    /// Begin after this cursor instead of now.
    #[arg(long, value_name = "CURSOR")]
    since: Option<String>,
    /// Print every push as it was received, one JSON object per line.
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Message {
    from: String,
    #[serde(default)]
    ts: u64,
    #[serde(default)]
    body: Value,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    target: Option<String>,
    #[serde(default)]
    reply_to: Option<String>,
}

/// Follows the room until Ctrl-C, a closed stdout, or an error that retrying can't cure.
pub(super) fn run(
    tail: Tail,
    config: impl FnOnce() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let target = tail
        .connect
        .target(&tail.room, &[Right::Read, Right::Write], config)?;
    run_tool(async move {
        let room = Room::follow(target, tail.room.as_str(), tail.since);
        tokio::select! {
            ended = follow(room, &tail.room, tail.json) => ended,
            () = stdout_closed() => Ok(()),
        }
    })
}

async fn follow(mut room: Room, id: &RoomId, json: bool) -> anyhow::Result<()> {
    let mut rejoin = false;
    while let Some(event) = room.next().await {
        match event {
            Event::Joined {
                cursor,
                replay,
                reset,
            } => {
                let at = cursor.as_deref().unwrap_or("no cursor");
                match reset {
                    Some(reason) => {
                        eprintln!(
                            "natter: can't resume in {id} ({reason}); messages may be missing here; now at {at}"
                        );
                    }
                    None if rejoin || replay > 0 => {
                        eprintln!("natter: in {id} at {at}, {replay} missed");
                    }
                    None => eprintln!("natter: in {id} at {at}"),
                }
                rejoin = true;
            }
            Event::Message(frame) => {
                let line = if json {
                    on_one_line(frame.text())
                } else {
                    readable(&frame)
                };
                if !print_line(&line)? {
                    return Ok(());
                }
            }
            Event::Typing { user } if json => {
                let frame = serde_json::json!({"op": "typing", "room": id, "user": user});
                if !print_line(&frame.to_string())? {
                    return Ok(());
                }
            }
            Event::Other(frame) if json => {
                if !print_line(&on_one_line(frame.text()))? {
                    return Ok(());
                }
            }
            Event::Other(frame) if frame.op() == "token_expiring" => {
                eprintln!("natter: the token is about to expire");
            }
            Event::Typing { .. } | Event::Other(_) => {}
            Event::Disconnected { why, retry_in } => {
                eprintln!("natter: {why}; next try in {:.1} s", retry_in.as_secs_f64());
            }
            Event::Reconnected { url } => eprintln!("natter: connected to {url}"),
            Event::Stopped(stop) => return Err(stop.into()),
        }
    }
    Ok(())
}

/// `12:03:04 kim: text`, times in UTC.
fn readable(frame: &Frame) -> String {
    let message: Message = match frame.fields() {
        Ok(message) => message,
        Err(_not_as_documented) => return safe(&on_one_line(frame.text())),
    };
    let seconds = message.ts / 1000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let body = match message.body.get("text").and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => message.body.to_string(),
    };
    let mut about = String::new();
    if let (Some(kind), Some(target)) = (&message.kind, &message.target) {
        about = format!(" [{kind} {target}]");
    } else if let Some(original) = &message.reply_to {
        about = format!(" [to {original}]");
    }
    let from = safe(&message.from);
    let body = safe(&body);
    let about = safe(&about);
    format!("{hour:02}:{minute:02}:{second:02} {from}{about}: {body}")
}

/// Text of others must not control the terminal (escape sequences) or forge lines: control characters are shown as
/// symbols, and further lines of a message are indented.
fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\n         "),
            '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(frame: Value) -> String {
        readable(&Frame::parse(&frame.to_string()).unwrap())
    }

    #[test]
    fn messages_are_readable() {
        let ts = (12 * 3600 + 3 * 60 + 4) * 1000;
        let text =
            serde_json::json!({"op":"msg","id":"1","from":"kim","ts":ts,"body":{"text":"안녕"}});
        assert_eq!(shown(text), "12:03:04 kim: 안녕");
        let other =
            serde_json::json!({"op":"msg","id":"1","from":"kim","ts":ts,"body":{"a":[1,2]}});
        assert_eq!(shown(other), r#"12:03:04 kim: {"a":[1,2]}"#);
        let edit = serde_json::json!({"op":"msg","id":"1","from":"kim","ts":ts,"kind":"edit","target":"kim/0","body":{"text":"x"}});
        assert_eq!(shown(edit), "12:03:04 kim [edit kim/0]: x");
    }

    #[test]
    fn a_frame_of_another_kind_can_not_drive_the_terminal() {
        let frame = "{\"op\":\"msg\",\n\"id\":\"\u{9b}2J\u{7f}\",\"from\":1}";
        assert_eq!(
            readable(&Frame::parse(frame).unwrap()),
            "{\"op\":\"msg\",\"id\":\"\u{fffd}2J\u{fffd}\",\"from\":1}"
        );
    }

    #[test]
    fn messages_can_not_drive_the_terminal() {
        let hostile = serde_json::json!({"op":"msg","id":"1","from":"k\u{1b}[2J","ts":0,"body":{"text":"a\n00:00:00 lee: b\u{7}"}});
        let line = shown(hostile);
        assert!(
            !line.contains('\u{1b}') && !line.contains('\u{7}'),
            "{line:?}"
        );
        assert!(!line.contains("\n00"), "{line:?}");
    }
}
