//! A second client protocol, for tests only: it shows that `codec` is all that a protocol takes.
//!
//! A text message has one or more lines, each a JSON object with other words than `natter.v1` has:
//! `{"n":1,"do":"enter","in":"chat:a","from":"<cursor>"}`. Every frame of the server is one such line.

use bytes::Bytes;
use serde_json::{Value, json, value::RawValue};

use super::{Encoded, Request, Tag};
use crate::{
    model::RoomId,
    protocol::{
        Codec, Command, Draft, ErrorCode, Event, MessagePush, Publication, Refused, Reply,
        ResumeAt, Wants,
    },
    wire::text_frame,
};

/// The WebSocket subprotocol.
pub(super) const SUBPROTOCOL: &str = Codec::Lines.name();

fn line(value: &Value) -> Bytes {
    text_frame(format!("{value}\n").as_bytes())
}

fn number(tag: &Tag) -> Option<u64> {
    match tag {
        Tag::Number(number) => Some(*number),
        Tag::None | Tag::Call(_) | Tag::Stomp(_) => None,
    }
}

pub(super) fn decode(text: &str, mut each: impl FnMut(Request)) {
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let read = serde_json::from_str::<Value>(line);
        let tag = read.as_ref().ok().and_then(|line| line["n"].as_u64());
        let command = read
            .map_err(|error| Refused::new(ErrorCode::BadJson, error.to_string()))
            .and_then(|line| command(&line));
        let tag = tag.map_or(Tag::None, Tag::Number);
        each(Request { tag, command });
    }
}

fn command(line: &Value) -> Result<Command, Refused> {
    let room = || {
        let name = line["in"].as_str().unwrap_or_default();
        RoomId::parse(name).map_err(|error| Refused::new(ErrorCode::BadRoom, error.to_string()))
    };
    match line["do"].as_str() {
        Some("enter") => Ok(Command::Join {
            room: room()?,
            since: line["from"]
                .as_str()
                .map(|from| Box::new(ResumeAt::Cursor(from.to_owned()).into())),
            wants: Wants::default(),
            token: None,
            subscription: None,
        }),
        Some("say") => {
            let body = RawValue::from_string(line["what"].to_string());
            let body = body.map_err(|error| Refused::new(ErrorCode::BadJson, error.to_string()))?;
            let draft = Draft {
                id: line["key"].as_str(),
                body: Some(&body),
                ..Draft::default()
            };
            Ok(Command::Send(Box::new(Publication::new(room()?, draft)?)))
        }
        Some("exit") => Ok(Command::Leave { room: room()? }),
        Some("alive") => Ok(Command::Ping),
        _ => Err(Refused::new(
            ErrorCode::UnknownOp,
            "enter, say, exit or alive",
        )),
    }
}

pub(super) fn reply(tag: &Tag, reply: &Reply) -> Bytes {
    let n = number(tag);
    line(&match reply {
        Reply::Joined(joined) => {
            let at = joined.cursor.as_ref().map(ToString::to_string);
            json!({"n": n, "in": joined.room, "at": at, "missed": joined.replay, "lost": joined.reason})
        }
        Reply::Published(said) => {
            let at = said.cursor.as_ref().map(ToString::to_string);
            json!({"n": n, "key": said.id, "at": at, "again": said.dup})
        }
        Reply::Left { room } => json!({"n": n, "out": room}),
        other => json!({"n": n, "yes": format!("{other:?}")}),
    })
}

pub(super) fn refusal(tag: &Tag, refused: &Refused) -> Bytes {
    line(&json!({"n": number(tag), "no": refused.code.as_str(), "why": refused.message}))
}

pub(super) fn event(event: &Event) -> Bytes {
    line(&json!({"news": format!("{event:?}")}))
}

pub(super) fn message(message: &MessagePush<'_>) -> Encoded {
    let body: Value = serde_json::from_slice(message.body).unwrap_or_default();
    let at = message.cursor.map(ToString::to_string);
    let said =
        json!({"in": message.room, "who": message.from, "key": message.id, "at": at, "what": body});
    Encoded {
        frame: line(&said),
        body: None,
    }
}

#[path = "beside_native.rs"]
mod beside_native;
