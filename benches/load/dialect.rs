//! How each kind of server is spoken to: what a client sends, and how what it receives is told apart by scanning.

use super::support::mesh::token;

/// Length of the body of every message, in bytes.
pub(crate) const BODY: usize = 256;

/// The end of a body: when it was due and its number in its room, always of the same length. It stands at the end so that it
/// is found without parsing what is before it.
const TAIL: usize = r#","t":"0000000000000000","n":"0000000000"}"#.len();

/// A body of [`BODY`] bytes: due `t` µs after the start of the load, the `n`th of its room.
pub(crate) fn body(t: u64, n: u64) -> Vec<u8> {
    let tail = format!(r#","t":"{t:016}","n":"{n:010}"}}"#);
    let pad = BODY - tail.len() - r#"{"p":"""#.len();
    format!(r#"{{"p":"{}"{tail}"#, "x".repeat(pad)).into_bytes()
}

/// What [`body`] was made of.
fn tail(body: &[u8]) -> Option<(u64, u64)> {
    let tail = body.last_chunk::<TAIL>()?;
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse().ok();
    Some((number(&tail[6..22])?, number(&tail[29..39])?))
}

/// Something that a server said.
pub(crate) enum Seen<'a> {
    /// A message: when it was due, its number, and where its room stands after it, if the server tells.
    Message(u64, u64, Option<&'a str>),
    /// The room is entered.
    Joined,
    /// A publish is confirmed.
    Acked,
    /// To be sent back.
    Answer(&'static [u8]),
    /// What should not have come.
    Refused(&'a [u8]),
}

/// One kind of server. Another one is one more implementation.
pub(crate) trait Dialect {
    /// Path and headers of the handshake.
    fn handshake(&self, user: &str) -> (&str, String);
    /// What enters a room, after the handshake; `since`: after that place.
    fn enter(&self, room: &str, since: Option<&str>) -> Vec<u8>;
    /// What says `body` in a room.
    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8>;
    /// Whether frames are text.
    fn is_text(&self) -> bool;
    /// Looks through the payload of a frame; `carry` is what the last one left unfinished.
    fn take(&self, payload: &[u8], carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>));
}

/// natter's own protocol.
pub(crate) struct Natter;

impl Dialect for Natter {
    fn handshake(&self, user: &str) -> (&str, String) {
        ("/ws", format!("Authorization: Bearer {}\r\n", token(user)))
    }

    fn enter(&self, room: &str, since: Option<&str>) -> Vec<u8> {
        let since = since.map_or(String::new(), |since| format!(r#","since":"{since}""#));
        format!(r#"{{"op":"join","rid":0,"room":"{room}"{since}}}"#).into_bytes()
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        let mut out = format!(r#"{{"op":"send","rid":{rid},"room":"{room}","id":"{rid}","body":"#)
            .into_bytes();
        out.extend_from_slice(body);
        out.push(b'}');
        out
    }

    fn is_text(&self) -> bool {
        true
    }

    fn take(&self, payload: &[u8], _carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        // `op` comes first, and a message's body last.
        let op = payload.get(7..).unwrap_or_default();
        if op.starts_with(b"msg\"") {
            match payload.split_last().and_then(|(_, rest)| tail(rest)) {
                Some((t, n)) => seen(Seen::Message(t, n, cursor(payload))),
                None => seen(Seen::Refused(payload)),
            }
        } else if op.starts_with(b"ack\"") {
            seen(Seen::Acked);
        } else if op.starts_with(b"joined\"") {
            // What could not be resumed would show as a loss without its cause.
            match find(payload, b"\"reset\":true") {
                Some(_) => seen(Seen::Refused(payload)),
                None => seen(Seen::Joined),
            }
        } else {
            seen(Seen::Refused(payload));
        }
    }
}

fn cursor(payload: &[u8]) -> Option<&str> {
    let mark = b"\"cursor\":\"";
    let start = find(payload.get(..payload.len() - BODY)?, mark)? + mark.len();
    let rest = &payload[start..];
    let end = rest.iter().position(|byte| *byte == b'"')?;
    std::str::from_utf8(&rest[..end]).ok()
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// NATS' own protocol over nats-server's WebSocket.
pub(crate) struct Nats;

impl Dialect for Nats {
    fn handshake(&self, _user: &str) -> (&str, String) {
        ("/", String::new())
    }

    fn enter(&self, room: &str, _since: Option<&str>) -> Vec<u8> {
        format!(
            "CONNECT {{\"verbose\":false,\"pedantic\":false,\"headers\":true}}\r\nSUB {room} 1\r\nPING\r\n"
        )
        .into_bytes()
    }

    fn publish(&self, room: &str, _rid: u64, body: &[u8]) -> Vec<u8> {
        let mut out = format!("PUB {room} {}\r\n", body.len()).into_bytes();
        out.extend_from_slice(body);
        out.extend_from_slice(b"\r\n");
        out
    }

    fn is_text(&self) -> bool {
        false
    }

    fn take(&self, payload: &[u8], carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        if !carry.is_empty() {
            carry.extend_from_slice(payload);
            let whole = std::mem::take(carry);
            return self.take(&whole, carry, seen);
        }
        let mut rest = payload;
        while let Some(end) = find(rest, b"\r\n") {
            let (line, after) = (&rest[..end], &rest[end + 2..]);
            if line.starts_with(b"MSG ") {
                let length = line.rsplit(|byte| *byte == b' ').next();
                let length: usize = length
                    .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
                    .unwrap_or_default();
                if after.len() < length + 2 {
                    break;
                }
                match tail(&after[..length]) {
                    Some((t, n)) => seen(Seen::Message(t, n, None)),
                    None => seen(Seen::Refused(line)),
                }
                rest = &after[length + 2..];
                continue;
            }
            match line {
                b"PING" => seen(Seen::Answer(b"PONG\r\n")),
                b"PONG" => seen(Seen::Joined),
                b"+OK" => {}
                line if line.starts_with(b"INFO ") => {}
                line => seen(Seen::Refused(line)),
            }
            rest = after;
        }
        carry.extend_from_slice(rest);
    }
}
