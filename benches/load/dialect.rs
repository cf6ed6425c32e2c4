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
    /// The request of a member whose messages come in the response, and what ends each piece of it. `None`: they come over a
    /// WebSocket. A client that enters no room has a WebSocket in any case.
    fn stream(&self, _user: &str, _room: &str) -> Option<(String, &'static [u8])> {
        None
    }
    /// What begins a session, after the handshake.
    fn hello(&self, _user: &str) -> Vec<u8> {
        Vec::new()
    }
    /// What a client that enters no room sends before it publishes, if it has to wait for the answer.
    fn alone(&self) -> Option<Vec<u8>> {
        None
    }
    /// What enters a room; `since`: after that place.
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
    // Fast, so that the clients take little of the cores that the servers are measured on.
    memchr::memmem::find(text, what)
}

/// NATS' own protocol over nats-server's WebSocket.
pub(crate) struct Nats;

impl Dialect for Nats {
    fn handshake(&self, _user: &str) -> (&str, String) {
        ("/", String::new())
    }

    fn alone(&self) -> Option<Vec<u8>> {
        // NATS wants its greeting; nobody says anything in this room.
        Some(self.enter("nothing.at.all", None))
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

/// Where a body begins.
const BEGIN: &[u8] = br#"{"p":""#;

/// The message whose body is somewhere in `payload`.
fn message_in(payload: &[u8]) -> Seen<'_> {
    let body = find(payload, BEGIN).and_then(|at| payload.get(at..at + BODY));
    match body.and_then(tail) {
        Some((t, n)) => Seen::Message(t, n, None),
        None => Seen::Refused(payload),
    }
}

/// Centrifugo's protocol in JSON.
pub(crate) struct CentrifugalJson;

impl Dialect for CentrifugalJson {
    fn handshake(&self, _user: &str) -> (&str, String) {
        ("/connection/websocket", String::new())
    }

    fn hello(&self, user: &str) -> Vec<u8> {
        format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, token(user)).into_bytes()
    }

    fn enter(&self, room: &str, _since: Option<&str>) -> Vec<u8> {
        format!(r#"{{"id":2,"subscribe":{{"channel":"{room}","flag":1}}}}"#).into_bytes()
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        let mut out = format!(
            r#"{{"id":{},"publish":{{"channel":"{room}","data":"#,
            rid + 3
        )
        .into_bytes();
        out.extend_from_slice(body);
        out.extend_from_slice(b"}}");
        out
    }

    fn is_text(&self) -> bool {
        true
    }

    fn take(&self, payload: &[u8], _carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        if payload.starts_with(br#"{"push":"#) {
            seen(message_in(payload));
        } else if payload == b"{}" {
            seen(Seen::Answer(b"{}"));
        } else if find(payload, br#""publish":{}"#).is_some() {
            seen(Seen::Acked);
        } else if find(payload, br#""subscribe":{"#).is_some() {
            seen(Seen::Joined);
        } else if find(payload, br#""connect":{"#).is_none() {
            seen(Seen::Refused(payload));
        }
    }
}

/// Centrifugo's protocol in Protobuf.
pub(crate) struct CentrifugalProtobuf;

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// A command, after its length.
fn protobuf(id: u64, method: u8, fields: &[(u8, &[u8])]) -> Vec<u8> {
    let mut request = Vec::new();
    for (number, bytes) in fields {
        field(*number, bytes, &mut request);
    }
    let mut command = vec![1 << 3];
    varint(id, &mut command);
    field(method, &request, &mut command);
    let mut out = Vec::new();
    varint(command.len() as u64, &mut out);
    out.extend(command);
    out
}

impl Dialect for CentrifugalProtobuf {
    fn handshake(&self, _user: &str) -> (&str, String) {
        let protocol = "Sec-WebSocket-Protocol: centrifuge-protobuf\r\n";
        ("/connection/websocket", protocol.to_owned())
    }

    fn hello(&self, user: &str) -> Vec<u8> {
        protobuf(1, 4, &[(1, token(user).as_bytes())])
    }

    fn enter(&self, room: &str, _since: Option<&str>) -> Vec<u8> {
        protobuf(2, 5, &[(1, room.as_bytes())])
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        protobuf(rid + 3, 7, &[(1, room.as_bytes()), (2, body)])
    }

    fn is_text(&self) -> bool {
        false
    }

    fn take(&self, payload: &[u8], _carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        if payload == [0] {
            return seen(Seen::Answer(&[0]));
        }
        // Two bytes of length, if it is above 127.
        let reply = &payload[if payload[0] < 0x80 { 1 } else { 2 }..];
        if reply[0] == 4 << 3 | 2 {
            return seen(message_in(payload));
        }
        // An id, and then the field of the method.
        let id = reply[1..]
            .iter()
            .position(|byte| *byte < 0x80)
            .unwrap_or_default();
        match reply.get(id + 2).map(|tag| tag >> 3) {
            Some(5) => {}
            Some(6) => seen(Seen::Joined),
            Some(8) => seen(Seen::Acked),
            _ => seen(Seen::Refused(payload)),
        }
    }
}

/// `text/event-stream`. Publishers speak natter's own protocol.
pub(crate) struct Events;

impl Dialect for Events {
    fn stream(&self, user: &str, room: &str) -> Option<(String, &'static [u8])> {
        let token = token(user);
        let text = format!(
            "GET /v1/rooms/{room}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        Some((text, b"\n\n"))
    }

    fn handshake(&self, user: &str) -> (&str, String) {
        Natter.handshake(user)
    }

    fn enter(&self, room: &str, since: Option<&str>) -> Vec<u8> {
        Natter.enter(room, since)
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        Natter.publish(room, rid, body)
    }

    fn is_text(&self) -> bool {
        true
    }

    fn take(&self, payload: &[u8], carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        // An event ends with its data; the comment of a ping and the time to wait before a retry have none.
        let mark = b"data: ";
        match find(payload, mark) {
            Some(at) => Natter.take(&payload[at + mark.len()..], carry, seen),
            None if payload.starts_with(b"{") => Natter.take(payload, carry, seen),
            None => {}
        }
    }
}

/// Centrifugo's transport `http_stream` in JSON. Publishers have a WebSocket.
pub(crate) struct CentrifugalStream;

impl Dialect for CentrifugalStream {
    fn stream(&self, user: &str, room: &str) -> Option<(String, &'static [u8])> {
        let mut body = CentrifugalJson.hello(user);
        body.push(b'\n');
        body.extend(CentrifugalJson.enter(room, None));
        let body = String::from_utf8(body).unwrap();
        let text = format!(
            "POST /connection/http_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Some((text, b"\n"))
    }

    fn handshake(&self, user: &str) -> (&str, String) {
        CentrifugalJson.handshake(user)
    }

    fn hello(&self, user: &str) -> Vec<u8> {
        CentrifugalJson.hello(user)
    }

    fn enter(&self, room: &str, since: Option<&str>) -> Vec<u8> {
        CentrifugalJson.enter(room, since)
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        CentrifugalJson.publish(room, rid, body)
    }

    fn is_text(&self) -> bool {
        true
    }

    fn take(&self, payload: &[u8], carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        CentrifugalJson.take(payload, carry, seen);
    }
}

/// STOMP 1.2.
pub(crate) struct Stomp;

impl Dialect for Stomp {
    fn handshake(&self, _user: &str) -> (&str, String) {
        ("/stomp", "Sec-WebSocket-Protocol: v12.stomp\r\n".to_owned())
    }

    fn hello(&self, user: &str) -> Vec<u8> {
        format!(
            "CONNECT\naccept-version:1.2\npasscode:{}\n\n\0",
            token(user)
        )
        .into_bytes()
    }

    fn enter(&self, room: &str, _since: Option<&str>) -> Vec<u8> {
        format!("SUBSCRIBE\nid:sub-0\ndestination:/topic/{room}\nreceipt:in\n\n\0").into_bytes()
    }

    fn publish(&self, room: &str, rid: u64, body: &[u8]) -> Vec<u8> {
        let length = body.len();
        let mut out =
            format!("SEND\ndestination:/topic/{room}\nreceipt:{rid}\ncontent-length:{length}\n\n")
                .into_bytes();
        out.extend_from_slice(body);
        out.push(0);
        out
    }

    fn is_text(&self) -> bool {
        true
    }

    fn take(&self, payload: &[u8], _carry: &mut Vec<u8>, seen: &mut dyn FnMut(Seen<'_>)) {
        // A message comes as two fragments: its subscription, and the rest.
        if payload.starts_with(b"destination:") {
            seen(message_in(payload));
        } else if payload.starts_with(b"RECEIPT\nreceipt-id:in") {
            seen(Seen::Joined);
        } else if payload.starts_with(b"RECEIPT\n") {
            seen(Seen::Acked);
        } else if !payload.starts_with(b"MESSAGE\n") && !payload.starts_with(b"CONNECTED\n") {
            seen(Seen::Refused(payload));
        }
    }
}
