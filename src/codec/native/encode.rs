//! Encoding replies, events and messages.

use std::io;

use bytes::Bytes;
use serde::Serialize;

use crate::{
    codec::{Encoded, Tag, put_json_string},
    model::Cursor,
    protocol::{Event, MessagePush, PresenceChange, Refused, Reply},
    wire::{FrameBuilder, Framing},
};

/// Initial capacity for a small reply or event.
const SMALL: usize = 128;

/// Room for the words of a message or an acknowledgement, for its numbers, and for each component of its cursor. A frame is
/// written without growing, and not cut to its length afterwards.
const WORDS: usize = 112;
const COMPONENT: usize = 32;

/// Writes the payload of a frame: one JSON object.
struct Writer {
    out: FrameBuilder,
}

impl Writer {
    /// Begins an object with `op`. `room_for` is its initial capacity in bytes.
    fn new(framing: Framing, op: &str, room_for: usize) -> Self {
        let mut out = FrameBuilder::new(framing, room_for);
        out.put(b"{\"op\":\"");
        out.put(op.as_bytes());
        out.put_u8(b'"');
        Self { out }
    }

    /// Begins a reply. On a stream, whose commands are in its request, it has no number.
    fn reply(framing: Framing, op: &str, tag: &Tag) -> Self {
        Self::reply_of(framing, op, tag, SMALL)
    }

    fn reply_of(framing: Framing, op: &str, tag: &Tag, room_for: usize) -> Self {
        let mut writer = Self::new(framing, op, room_for);
        match tag {
            _ if framing == Framing::Bare => &mut writer,
            Tag::Number(rid) => writer.number("rid", *rid),
            Tag::None | Tag::Call(_) | Tag::Stomp(_) => writer.raw("rid", b"null"),
        };
        writer
    }

    fn key(&mut self, key: &str) {
        self.out.put(b",\"");
        self.out.put(key.as_bytes());
        self.out.put(b"\":");
    }

    /// A number.
    fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        self.out.put(itoa::Buffer::new().format(value).as_bytes());
        self
    }

    /// A text, escaped.
    fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        put_json_string(&mut self.out, value);
        self
    }

    /// A cursor, which contains no characters that need escaping.
    fn cursor(&mut self, key: &str, cursor: &Cursor) -> &mut Self {
        use io::Write as _;
        self.key(key);
        write!(self.out, "\"{cursor}\"").expect("writing to memory");
        self
    }

    /// JSON text that is already valid.
    fn raw(&mut self, key: &str, json: &[u8]) -> &mut Self {
        self.key(key);
        self.out.put(json);
        self
    }

    /// `true` or `false`.
    fn boolean(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, if value { b"true" } else { b"false" })
    }

    /// Ends the object.
    fn end(mut self) -> Bytes {
        self.out.put_u8(b'}');
        self.out.finish()
    }

    /// Ends the object with the fields of `fields`, a struct of which at least one field is always written.
    fn end_with(mut self, fields: &impl Serialize) -> Bytes {
        let spliced = Spliced {
            out: &mut self.out,
            opened: false,
        };
        serde_json::to_writer(spliced, fields).expect("writing plain data to memory");
        self.out.finish()
    }
}

/// Appends the fields of an object to the object that was begun: replaces its opening brace by a comma.
struct Spliced<'a> {
    out: &'a mut FrameBuilder,
    opened: bool,
}

impl io::Write for Spliced<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if !self.opened
            && let Some(rest) = part.strip_prefix(b"{")
        {
            self.opened = true;
            self.out.put_u8(b',');
            self.out.put(rest);
        } else {
            self.out.put(part);
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The frame of a reply.
pub(in crate::codec) fn reply(framing: Framing, tag: &Tag, reply: &Reply) -> Bytes {
    let begin = |op| Writer::reply(framing, op, tag);
    match reply {
        Reply::Pong => begin("pong").end(),
        Reply::Done => begin("ok").end(),
        Reply::Authed(authed) => begin("authed").end_with(authed),
        Reply::Refreshed(validity) => begin("refreshed").end_with(validity),
        Reply::Left { room } => {
            let mut writer = begin("left");
            writer.string("room", room.as_str());
            writer.end()
        }
        Reply::Joined(joined) => begin("joined").end_with(joined),
        Reply::Published(published) => {
            let positions = published
                .cursor
                .as_ref()
                .map_or(0, |it| it.positions().len());
            let texts = published.room.as_str().len() + published.id.len();
            let room_for = WORDS + texts + COMPONENT * positions;
            Writer::reply_of(framing, "ack", tag, room_for).end_with(published)
        }
        Reply::Read(read) => begin("ok").end_with(read),
        Reply::Presence(presence) => begin("presence").end_with(presence),
        Reply::Readers(readers) => begin("readers").end_with(readers),
        Reply::Unread(unread) => begin("unread").end_with(unread),
        Reply::History(page) => begin("history").end_with(page),
        Reply::Search(found) => begin("search").end_with(found),
        Reply::Room(record) => begin("room").end_with(record),
        Reply::Inbox(inbox) => begin("inbox").end_with(inbox),
        Reply::Watching(watching) => begin("watching").end_with(watching),
    }
}

/// An `error` reply.
pub(in crate::codec) fn refusal(framing: Framing, tag: &Tag, refused: &Refused) -> Bytes {
    let mut writer = Writer::reply(framing, "error", tag);
    writer
        .string("code", refused.code.as_str())
        .string("message", &refused.message)
        .boolean("retry", refused.code.retry());
    if let Some(ms) = refused.retry_after_ms {
        writer.number("retry_after_ms", ms);
    }
    writer.end()
}

/// The frame of an event.
pub(in crate::codec) fn event(framing: Framing, event: &Event) -> Bytes {
    let mut writer = Writer::new(framing, event.name(), SMALL);
    match event {
        Event::Typing { room, user } => {
            writer.string("room", room.as_str()).string("user", user);
        }
        Event::Read { room, user, cursor } => {
            writer
                .string("room", room.as_str())
                .string("user", user)
                .cursor("cursor", cursor);
        }
        Event::Presence { room, change } => {
            writer.string("room", room.as_str());
            match change {
                PresenceChange::Count(users) => writer.number("count", *users as u64),
                PresenceChange::User {
                    user,
                    state,
                    info,
                    at,
                } => {
                    writer.string("user", user).string("state", state.as_str());
                    if let Some(info) = info {
                        writer.raw("info", info.get().as_bytes());
                    }
                    writer.number("at", *at)
                }
            };
        }
        Event::Kicked { room, code } => {
            writer.string("room", room.as_str()).string("code", code);
        }
        Event::Inbox(push) => return writer.end_with(push),
        Event::TokenExpiring { exp } => {
            writer.number("exp", *exp);
        }
        Event::Reconnect { after_ms } => {
            writer.number("after_ms", *after_ms);
        }
    }
    writer.end()
}

/// `msg`; ephemeral messages have no cursor.
pub(in crate::codec) fn message(framing: Framing, message: &MessagePush<'_>) -> Encoded {
    let text = |text: Option<&str>| text.map_or(0, |text| text.len() + 16);
    let texts = message.room.as_str().len() + message.id.len() + message.from.len();
    let more = text(message.target) + text(message.reply_to) + text(message.mentions);
    let positions = message.cursor.map_or(0, |it| it.positions().len());
    let room_for = WORDS + texts + more + COMPONENT * positions + message.body.len();
    let mut writer = Writer::new(framing, "msg", room_for);
    writer
        .string("room", message.room.as_str())
        .string("id", message.id)
        .string("from", message.from)
        .number("ts", message.ts);
    if let Some(cursor) = message.cursor {
        writer.cursor("cursor", cursor);
    }
    writer.raw("body", message.body);
    let body_end = writer.out.len();
    if let Some(kind) = message.kind {
        writer.string("kind", kind);
    }
    if let Some(target) = message.target {
        writer.string("target", target);
    }
    if let Some(reply_to) = message.reply_to {
        writer.string("reply_to", reply_to);
    }
    if let Some(mentions) = message.mentions {
        writer.raw("mentions", mentions.as_bytes());
    }
    let payload = writer.out.len() + 1;
    let frame = writer.end();
    let end = frame.len() - payload + body_end;
    Encoded {
        frame,
        body: Some(end - message.body.len()..end),
    }
}
