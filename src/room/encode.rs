//! Frames that a room pushes, encoded once for all receivers.

use bytes::Bytes;

use crate::{
    bus::Record,
    model::{Cursor, RoomId},
    protocol::native::Writer,
    wire::{text_frame, text_of},
};

/// What stands before the cursor in a `msg`. It can't stand in what comes before it: there, quotes are escaped.
const CURSOR: &[u8] = b"\"cursor\":\"";

/// `msg`; ephemeral messages have no cursor.
pub(super) fn message(room: &RoomId, record: &Record, cursor: Option<&Cursor>) -> Bytes {
    let mut out = Vec::with_capacity(record.body.len() + 256);
    let mut writer = Writer::new(&mut out, "msg");
    writer
        .string("room", room.as_str())
        .string("id", &record.id)
        .string("from", &record.from)
        .number("ts", record.ts);
    if let Some(cursor) = cursor {
        writer.string("cursor", &cursor.to_string());
    }
    writer.raw("body", &record.body);
    if let Some(kind) = record.kind {
        writer.string("kind", kind);
    }
    if let Some(target) = &record.target {
        writer.string("target", target);
    }
    if let Some(reply_to) = &record.reply_to {
        writer.string("reply_to", reply_to);
    }
    if let Some(mentions) = &record.mentions {
        writer.raw("mentions", mentions.as_bytes());
    }
    writer.end();
    text_frame(&out)
}

/// A `msg` with another cursor: for a session that has another place than the room after the same message.
pub(super) fn with_cursor(frame: &Bytes, cursor: &Cursor) -> Bytes {
    let Some((before, _, after)) = split(frame) else {
        return frame.clone();
    };
    let cursor = cursor.to_string();
    let mut out = Vec::with_capacity(before.len() + cursor.len() + after.len());
    out.extend_from_slice(before);
    out.extend_from_slice(cursor.as_bytes());
    out.extend_from_slice(after);
    text_frame(&out)
}

/// The cursor of a `msg`.
pub(super) fn cursor_of(frame: &Bytes) -> Option<Cursor> {
    std::str::from_utf8(split(frame)?.1).ok()?.parse().ok()
}

/// What comes before the cursor of a `msg`, the cursor, what comes after it.
fn split(frame: &Bytes) -> Option<(&[u8], &[u8], &[u8])> {
    let text = text_of(frame);
    let at = memchr::memmem::find(text, CURSOR)? + CURSOR.len();
    let (before, rest) = text.split_at(at);
    let end = memchr::memchr(b'"', rest)?;
    let (cursor, after) = rest.split_at(end);
    Some((before, cursor, after))
}

/// `typing`.
pub(super) fn typing(room: &RoomId, user: &str) -> Bytes {
    let mut out = Vec::with_capacity(64);
    Writer::new(&mut out, "typing")
        .string("room", room.as_str())
        .string("user", user)
        .end();
    text_frame(&out)
}

/// `read`.
pub(super) fn read(room: &RoomId, user: &str, cursor: &Cursor) -> Bytes {
    let mut out = Vec::with_capacity(128);
    Writer::new(&mut out, "read")
        .string("room", room.as_str())
        .string("user", user)
        .string("cursor", &cursor.to_string())
        .end();
    text_frame(&out)
}

/// `kicked`.
pub(super) fn kicked(room: &RoomId, code: &str) -> Bytes {
    let mut out = Vec::with_capacity(64);
    Writer::new(&mut out, "kicked")
        .string("room", room.as_str())
        .string("code", code)
        .end();
    text_frame(&out)
}
