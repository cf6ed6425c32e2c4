//! `text/event-stream`: the pushes of `natter.v1` as events, and the messages that a poll collects.
//!
//! The name of an event is the `op` of its push, and its data is the push. The id of a message or of a `joined` is a
//! cursor. A stream of several rooms needs an id that says where the client stands in all of them: there the outlet
//! replaces the first line of a frame, which has the room's cursor.
//!
//! Source: <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

use std::io::Write as _;

use bytes::Bytes;

use super::{Encoded, Tag, native};
use crate::{
    model::Cursor,
    protocol::{Close, Event, MessagePush, Refused, Reply},
    wire::{FrameBuilder, Framing, ID},
};

/// Capacity for what stands around the data.
const ROOM: usize = 128;

/// Begins a frame that moves the position of the client.
fn put_id(out: &mut FrameBuilder, cursor: &Cursor) {
    out.put(ID);
    write!(out, "{cursor}").expect("writing to memory");
}

/// An event. White space of the data that breaks a line breaks it in the event too; a carriage return becomes a line
/// feed.
fn frame(name: &str, cursor: Option<&Cursor>, data: &[u8]) -> Bytes {
    let mut out = FrameBuilder::new(Framing::Bare, data.len() + ROOM);
    if let Some(cursor) = cursor {
        put_id(&mut out, cursor);
        out.put_u8(b'\n');
    }
    writeln!(out, "event: {name}").expect("writing to memory");
    for line in data.split(|byte| matches!(byte, b'\n' | b'\r')) {
        out.put(b"data: ");
        out.put(line);
        out.put_u8(b'\n');
    }
    out.put_u8(b'\n');
    out.finish()
}

/// The event of a reply.
pub(super) fn reply(reply: &Reply) -> Bytes {
    let data = native::reply(Framing::Bare, &Tag::None, reply);
    match reply {
        Reply::Joined(joined) => frame("joined", joined.cursor.as_ref(), &data),
        _ => frame("ok", None, &data),
    }
}

/// The event `refused`. Its name is not `error`: a browser reports a lost connection by that name.
pub(super) fn refusal(refused: &Refused) -> Bytes {
    let data = native::refusal(Framing::Bare, &Tag::None, refused);
    frame("refused", None, &data)
}

/// The event of a push.
pub(super) fn event(event: &Event) -> Bytes {
    let data = native::event(Framing::Bare, event);
    frame(event.name(), None, &data)
}

/// The event of a message.
pub(super) fn message(message: &MessagePush<'_>) -> Encoded {
    let data = native::message(Framing::Bare, message).frame;
    Encoded {
        frame: frame("msg", message.cursor, &data),
        body: None,
    }
}

/// A comment, which keeps an idle connection alive.
pub(super) fn ping() -> Bytes {
    Bytes::from_static(b":\n\n")
}

/// The event `close`, the last of a stream.
pub(super) fn close(close: Close) -> Bytes {
    let data = format!(
        "{{\"op\":\"close\",\"code\":{},\"reason\":\"{}\"}}",
        close.code(),
        close.reason()
    );
    frame("close", None, data.as_bytes())
}

/// A message for a poll: its cursor in a line, and its JSON.
pub(super) fn polled(message: &MessagePush<'_>) -> Encoded {
    let data = native::message(Framing::Bare, message).frame;
    let mut out = FrameBuilder::new(Framing::Bare, data.len() + ROOM);
    if let Some(cursor) = message.cursor {
        put_id(&mut out, cursor);
    }
    out.put_u8(b'\n');
    out.put(&data);
    Encoded {
        frame: out.finish(),
        body: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_breaks_of_the_data_are_kept_as_lines() {
        let cursor: Cursor = "seoul.k3.7.a".parse().unwrap();
        let sent = frame("msg", Some(&cursor), b"{\"a\":\n1,\r\"b\":2}");
        let text = "id: seoul.k3.7.a\nevent: msg\ndata: {\"a\":\ndata: 1,\ndata: \"b\":2}\n\n";
        assert_eq!(sent, text.as_bytes());
    }
}
