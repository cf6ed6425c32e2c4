//! Writing frames for a client.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::json;

use super::{
    Asked, TOPIC, What,
    frame::{Lines, VERSIONS},
    suffix,
};
use crate::{
    codec::{Codec, Encoded, Names, Tag},
    model::RoomId,
    protocol::{
        Event, JoinReply, MessagePush, PresenceChange, Refused, Reply, RoomSubscription,
        SubscribedTo,
    },
    wire::{FrameBuilder, Framing},
};

/// Initial capacity for the headers of a frame.
const HEADERS: usize = 320;

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

/// What the server says of its signs of life, in ms: the shortest time after which it gives one, and wants one.
const BEATS: &str = "1000,1000";

fn begin(codec: Codec, command: &str) -> Lines {
    Lines::command(codec, FrameBuilder::with_capacity(HEADERS), command)
}

/// A line end between two frames.
#[must_use]
pub fn sign_of_life() -> Bytes {
    let mut frame = FrameBuilder::with_capacity(1);
    frame.put_u8(b'\n');
    frame.finish()
}

/// The answer to a frame, if it has one.
pub(in crate::codec) fn reply(codec: Codec, tag: &Tag, reply: &Reply) -> Option<Bytes> {
    let Tag::Stomp(asked) = tag else {
        return None;
    };
    match (&asked.what, reply) {
        (What::Connect { version }, Reply::Authed(authed)) => {
            let mut lines = begin(codec, "CONNECTED");
            lines
                .header("version", version.as_str())
                .header("heart-beat", BEATS)
                .header("session", &authed.session)
                .header("server", concat!("natter/", env!("CARGO_PKG_VERSION")))
                .header("user-name", &authed.user)
                .end();
            Some(lines.out.finish())
        }
        (What::Subscribe { id, resumes: true }, Reply::Joined(joined)) if joined.reset => {
            Some(reset(codec, asked, id, joined))
        }
        (What::Committed, _) => None,
        _ => {
            let out = FrameBuilder::with_capacity(HEADERS);
            Some(receipt(codec, out, asked.receipt.as_deref()?, None).finish())
        }
    }
}

/// Writes a RECEIPT. `reset`: why the subscription could not resume.
fn receipt(codec: Codec, out: FrameBuilder, id: &str, reset: Option<&str>) -> FrameBuilder {
    let mut lines = Lines::command(codec, out, "RECEIPT");
    lines.header("receipt-id", id);
    if let Some(reason) = reset {
        lines.header("event", "reset").header("reason", reason);
    }
    lines.end();
    lines.out
}

/// Tells a subscription that it could not resume: in the receipt, if one was asked for, and as a message without an id of
/// natter's.
fn reset(codec: Codec, asked: &Asked, id: &str, joined: &JoinReply) -> Bytes {
    let reason = joined.reason.unwrap_or_default();
    let mut out = FrameBuilder::with_capacity(HEADERS);
    if let Some(receipt) = &asked.receipt {
        out = self::receipt(codec, out, receipt, Some(reason));
    }
    let mut lines = Lines::command(codec, out, "MESSAGE");
    let destination = format!("{TOPIC}{}", Names::Stomp.name(&joined.room));
    let body = json!({ "reason": reason }).to_string();
    lines
        .header("subscription", id)
        .header("destination", &destination)
        .header("message-id", &event_id())
        .header("event", "reset")
        .body(JSON, body.as_bytes());
    lines.out.finish()
}

/// The `message-id` of what is not a message.
fn event_id() -> String {
    format!("$natter/{}", ulid::Ulid::new())
}

/// The frame ERROR. The connection is closed after it.
pub(in crate::codec) fn refusal(codec: Codec, tag: &Tag, refused: &Refused) -> Bytes {
    let mut lines = begin(codec, "ERROR");
    if let Tag::Stomp(asked) = tag {
        if let Some(receipt) = &asked.receipt {
            lines.header("receipt-id", receipt);
        }
        if matches!(asked.what, What::Connect { .. }) {
            lines.header("version", VERSIONS);
        }
    }
    let body = refused.to_string();
    lines
        .header("message", refused.code.as_str())
        .body(TEXT, body.as_bytes());
    lines.out.finish()
}

/// The first fragment of a MESSAGE: what is a subscription's own.
pub(in crate::codec) fn head(codec: Codec, subscription: &RoomSubscription) -> Bytes {
    let out = FrameBuilder::new(Framing::FirstFragment, 64);
    let mut lines = Lines::command(codec, out, "MESSAGE");
    lines.header("subscription", &subscription.id);
    lines.out.finish()
}

/// The rest of a MESSAGE, without its end.
fn rest(codec: Codec, room: &RoomId, of: SubscribedTo, room_for: usize) -> Lines {
    let out = FrameBuilder::new(Framing::LastFragment, HEADERS + room_for);
    let mut lines = Lines::of(codec, out);
    let name = Names::Stomp.name(room);
    lines.header("destination", &[TOPIC, &name, suffix(of)].concat());
    lines
}

/// The rest of the MESSAGE of an event, if there are subscriptions for it.
pub(in crate::codec) fn event(codec: Codec, event: &Event) -> Option<Bytes> {
    let (room, of, body) = match event {
        Event::Typing { room, user } => (room, SubscribedTo::Typing, json!({ "user": user })),
        Event::Presence { room, change } => {
            let body = match change {
                PresenceChange::Count(count) => json!({ "count": count }),
                PresenceChange::User {
                    user,
                    state,
                    info,
                    at,
                } => json!({ "user": user, "state": state.as_str(), "info": info, "at": at }),
            };
            (room, SubscribedTo::Presence, body)
        }
        Event::Read { .. }
        | Event::Kicked { .. }
        | Event::Inbox(_)
        | Event::TokenExpiring { .. }
        | Event::Reconnect { .. } => return None,
    };
    let body = body.to_string();
    let mut lines = rest(codec, room, of, body.len());
    lines
        .header("message-id", &event_id())
        .body(JSON, body.as_bytes());
    Some(lines.out.finish())
}

/// The rest of a MESSAGE.
pub(in crate::codec) fn message(codec: Codec, message: &MessagePush<'_>) -> Encoded {
    // A text is a JSON string; see `read::send`.
    let text = message.body.first() == Some(&b'"');
    let text = text.then(|| serde_json::from_slice::<String>(message.body).ok());
    let (content_type, body) = match text.flatten() {
        Some(text) => (TEXT, Cow::Owned(text.into_bytes())),
        None => (JSON, Cow::Borrowed(message.body)),
    };
    let mut lines = rest(codec, message.room, SubscribedTo::Messages, body.len());
    let id = format!("{}/{}", message.from, message.id);
    match message.cursor {
        Some(cursor) => {
            let ack = format!("{};{cursor}", message.room);
            // In old versions an ACK names this.
            let id = match codec {
                Codec::StompOld => format!("{id};{ack}"),
                _ => id,
            };
            lines
                .header("message-id", &id)
                .header("ack", &ack)
                .header("cursor", &cursor.to_string());
        }
        None => {
            lines.header("message-id", &id);
        }
    }
    lines
        .header("from", message.from)
        .header("id", message.id)
        .number("timestamp", message.ts);
    for (name, value) in [
        ("kind", message.kind),
        ("target", message.target),
        ("reply-to", message.reply_to),
        ("mentions", message.mentions),
    ] {
        if let Some(value) = value {
            lines.header(name, value);
        }
    }
    let range = lines.body(content_type, &body);
    let payload = lines.out.len();
    let frame = lines.out.finish();
    let header = frame.len() - payload;
    let is_as_stored = matches!(body, Cow::Borrowed(_));
    Encoded {
        body: is_as_stored.then(|| header + range.start..header + range.end),
        frame,
    }
}
