//! The part of the NATS client protocol that a [`Line`](super::Line) needs, after
//! <https://docs.nats.io/reference/reference-protocols/nats-protocol>, without I/O.

use bytes::{Buf, Bytes, BytesMut};
use serde::Deserialize;

/// Longest line without a payload. The `INFO` of a server in a large cluster is far shorter.
const MAX_LINE: usize = 1 << 20;

/// Largest message: twice the maximum that nats-server can be configured to accept.
const MAX_MESSAGE: usize = 128 << 20;

/// An operation sent by a server.
#[derive(Debug)]
pub(crate) enum Op {
    Info(Bytes),
    Message(Arrival),
    Ping,
    Pong,
    Ok,
    Error(String),
}

/// The server does not speak the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("a line or message is too long")]
    TooLong,
    #[error("not an operation: {0:?}")]
    Malformed(String),
}

/// The fields of a server's `INFO` that are used.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Info {
    pub(super) max_payload: usize,
    pub(super) tls_required: bool,
    pub(super) nonce: Option<String>,
    pub(super) connect_urls: Vec<String>,
    pub(super) ldm: bool,
}

/// A received message: slices of the bytes that were read.
#[derive(Debug, Clone)]
pub struct Arrival {
    sid: u64,
    /// Subject, headers and payload, one after the other.
    bytes: Bytes,
    subject: usize,
    headers: usize,
}

impl Arrival {
    /// The subscription's number.
    #[must_use]
    pub fn sid(&self) -> u64 {
        self.sid
    }

    /// The subject; empty if it is not UTF-8.
    #[must_use]
    pub fn subject(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.subject]).unwrap_or_default()
    }

    /// The headers; none if they are not UTF-8.
    #[must_use]
    pub fn headers(&self) -> Headers<'_> {
        Headers(std::str::from_utf8(&self.bytes[self.subject..self.headers]).unwrap_or_default())
    }

    /// The payload, without a copy.
    #[must_use]
    pub fn payload(&self) -> Bytes {
        self.bytes.slice(self.headers..)
    }
}

/// The headers of a message: `NATS/1.0` with an optional status, then one line per header.
#[derive(Debug, Clone, Copy)]
pub struct Headers<'a>(&'a str);

impl<'a> Headers<'a> {
    /// Names and values in their order. A name may occur more than once.
    pub fn iter(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let pair = |line: &'a str| {
            line.split_once(':')
                .map(|(name, value)| (name, value.trim()))
        };
        self.0.split("\r\n").skip(1).filter_map(pair)
    }

    /// The last value of a header.
    #[must_use]
    pub fn last(self, name: &str) -> Option<&'a str> {
        let (_, value) = self.iter().filter(|(found, _)| *found == name).last()?;
        Some(value)
    }

    /// The status of an answer that is not a message: code and description.
    #[must_use]
    pub fn status(self) -> Option<(u16, &'a str)> {
        let line = self
            .0
            .split("\r\n")
            .next()?
            .strip_prefix("NATS/1.0")?
            .trim();
        let (code, text) = line.split_once(' ').unwrap_or((line, ""));
        Some((code.parse().ok()?, text.trim()))
    }
}

/// Takes the next operation from `buffer`; `None` if it is not complete yet.
pub(crate) fn next_op(buffer: &mut BytesMut) -> Result<Option<Op>, ProtocolError> {
    let Some(end) = memchr::memchr(b'\n', buffer) else {
        return if buffer.len() > MAX_LINE {
            Err(ProtocolError::TooLong)
        } else {
            Ok(None)
        };
    };
    let line = buffer[..end].trim_ascii_end();
    let word = line
        .split(u8::is_ascii_whitespace)
        .next()
        .unwrap_or_default();
    let op = if word.eq_ignore_ascii_case(b"MSG") {
        return message(buffer, end, false);
    } else if word.eq_ignore_ascii_case(b"HMSG") {
        return message(buffer, end, true);
    } else if word.eq_ignore_ascii_case(b"INFO") {
        let (from, to) = (word.len(), line.len());
        let line = buffer.split_to(end + 1).freeze();
        return Ok(Some(Op::Info(line.slice(from..to))));
    } else if word.eq_ignore_ascii_case(b"PING") {
        Op::Ping
    } else if word.eq_ignore_ascii_case(b"PONG") {
        Op::Pong
    } else if word.eq_ignore_ascii_case(b"+OK") {
        Op::Ok
    } else if word.eq_ignore_ascii_case(b"-ERR") {
        let text = String::from_utf8_lossy(&line[word.len()..]);
        Op::Error(text.trim().trim_matches('\'').to_owned())
    } else {
        return Err(malformed(line));
    };
    buffer.advance(end + 1);
    Ok(Some(op))
}

/// `MSG <subject> <sid> [reply] <bytes>` or `HMSG <subject> <sid> [reply] <bytes of headers> <bytes of all>`, then the
/// bytes and a line end.
fn message(
    buffer: &mut BytesMut,
    end: usize,
    with_headers: bool,
) -> Result<Option<Op>, ProtocolError> {
    let line = &buffer[..end];
    let mut words = [(0, 0); 6];
    let mut count = 0;
    let mut at = 0;
    for word in line.split(u8::is_ascii_whitespace) {
        if !word.is_empty() {
            *words.get_mut(count).ok_or_else(|| malformed(line))? = (at, at + word.len());
            count += 1;
        }
        at += word.len() + 1;
    }
    let number = |index: usize| -> Option<usize> {
        let (from, to) = *words[..count].get(index)?;
        std::str::from_utf8(&line[from..to]).ok()?.parse().ok()
    };
    let sizes = if with_headers { 2 } else { 1 };
    let read = || {
        // The optional reply subject is not used here.
        if count != 3 + sizes && count != 4 + sizes {
            return None;
        }
        let sid = number(2)? as u64;
        let total = number(count - 1)?;
        let headers = if with_headers { number(count - 2)? } else { 0 };
        (headers <= total).then_some((sid, headers, total))
    };
    let (sid, headers, total) = read().ok_or_else(|| malformed(line))?;
    if total > MAX_MESSAGE {
        return Err(ProtocolError::TooLong);
    }
    let whole = end + 1 + total + 2;
    if buffer.len() < whole {
        // Reserve once for the whole message.
        buffer.reserve(whole - buffer.len());
        return Ok(None);
    }
    let (from, to) = words[1];
    let (subject, mut message) = (to - from, buffer.split_to(whole));
    message.truncate(whole - 2);
    // Move the subject directly in front of the headers, over the numbers, which are no longer needed.
    let start = end + 1 - subject;
    message.copy_within(from..to, start);
    message.advance(start);
    Ok(Some(Op::Message(Arrival {
        sid,
        bytes: message.freeze(),
        subject,
        headers: subject + headers,
    })))
}

fn malformed(line: &[u8]) -> ProtocolError {
    let start = &line[..line.len().min(64)];
    ProtocolError::Malformed(String::from_utf8_lossy(start).into_owned())
}

/// Writes the headers of one message.
#[derive(Debug)]
pub struct HeaderWriter<'a>(&'a mut Vec<u8>);

impl<'a> HeaderWriter<'a> {
    /// Begins headers at the end of `out`.
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        out.extend_from_slice(b"NATS/1.0\r\n");
        Self(out)
    }

    /// Adds a header. Line ends in the value become spaces, so that a value can't add further headers.
    pub fn add(&mut self, name: &str, value: &str) -> &mut Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b": ");
        let from = self.0.len();
        self.0.extend_from_slice(value.as_bytes());
        for byte in &mut self.0[from..] {
            if matches!(byte, b'\r' | b'\n') {
                *byte = b' ';
            }
        }
        self.0.extend_from_slice(b"\r\n");
        self
    }

    pub(super) fn end(self) {
        self.0.extend_from_slice(b"\r\n");
    }
}

/// Writes a publish. `headers` is empty or was written by a [`HeaderWriter`].
pub(super) fn publish(
    out: &mut Vec<u8>,
    subject: &str,
    reply: Option<(&str, u64)>,
    headers: &[u8],
    payload: &[u8],
) {
    let mut number = itoa::Buffer::new();
    out.reserve(subject.len() + headers.len() + payload.len() + 96);
    out.extend_from_slice(if headers.is_empty() {
        b"PUB "
    } else {
        b"HPUB "
    });
    out.extend_from_slice(subject.as_bytes());
    if let Some((inbox, token)) = reply {
        out.push(b' ');
        out.extend_from_slice(inbox.as_bytes());
        out.extend_from_slice(number.format(token).as_bytes());
    }
    if !headers.is_empty() {
        out.push(b' ');
        out.extend_from_slice(number.format(headers.len()).as_bytes());
    }
    out.push(b' ');
    out.extend_from_slice(number.format(headers.len() + payload.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(headers);
    out.extend_from_slice(payload);
    out.extend_from_slice(b"\r\n");
}

/// Writes `SUB <subject> <sid>`.
pub(super) fn subscribe(out: &mut Vec<u8>, subject: &str, sid: u64) {
    out.extend_from_slice(b"SUB ");
    out.extend_from_slice(subject.as_bytes());
    out.push(b' ');
    out.extend_from_slice(itoa::Buffer::new().format(sid).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Writes `UNSUB <sid>`.
pub(super) fn unsubscribe(out: &mut Vec<u8>, sid: u64) {
    out.extend_from_slice(b"UNSUB ");
    out.extend_from_slice(itoa::Buffer::new().format(sid).as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ops(pieces: &[&[u8]]) -> Vec<String> {
        let mut buffer = BytesMut::new();
        let mut seen = Vec::new();
        for piece in pieces {
            buffer.extend_from_slice(piece);
            while let Some(op) = next_op(&mut buffer).unwrap() {
                seen.push(match op {
                    Op::Message(m) => format!(
                        "{} {} {:?} {:?}",
                        m.sid(),
                        m.subject(),
                        m.headers().iter().collect::<Vec<_>>(),
                        m.payload()
                    ),
                    other => format!("{other:?}"),
                });
            }
        }
        assert!(buffer.is_empty(), "{buffer:?}");
        seen
    }

    #[test]
    fn operations_are_read() {
        let text = b"INFO {\"max_payload\":5}\r\n+OK\r\nMSG a.b 1 5\r\nhello\r\nmsg  x  7 reply.to 0\r\n\r\n\
            HMSG s 9 23 25\r\nNATS/1.0\r\nA: 1\r\nA:2\r\n\r\nhi\r\nPING\r\nPONG\r\n-ERR 'Permissions Violation'\r\n";
        assert_eq!(
            ops(&[text]),
            [
                "Info(b\" {\\\"max_payload\\\":5}\")",
                "Ok",
                "1 a.b [] b\"hello\"",
                "7 x [] b\"\"",
                "9 s [(\"A\", \"1\"), (\"A\", \"2\")] b\"hi\"",
                "Ping",
                "Pong",
                "Error(\"Permissions Violation\")",
            ]
        );
    }

    #[test]
    fn the_last_value_counts_and_statuses_are_told() {
        let mut buffer = BytesMut::from(
            &b"HMSG r 1 30 30\r\nNATS/1.0 503 No Responders\r\n\r\n\r\nHMSG r 1 23 23\r\nNATS/1.0\r\nA: 1\r\nA:2\r\n\r\n\r\n"[..],
        );
        let mut next = || match next_op(&mut buffer).unwrap().unwrap() {
            Op::Message(message) => message,
            other => panic!("{other:?}"),
        };
        let first = next();
        assert_eq!(first.headers().status(), Some((503, "No Responders")));
        let second = next();
        assert_eq!(second.headers().status(), None);
        assert_eq!(second.headers().last("A"), Some("2"));
        assert_eq!(second.headers().last("B"), None);
    }

    #[test]
    fn what_is_no_operation_is_refused() {
        for bad in [
            "HELLO\r\n",
            "MSG a 1\r\n",
            "MSG a b 5\r\nhello\r\n",
            "MSG a 1 r x 5\r\nhello\r\n",
            "MSG a 1 -5\r\n",
            "HMSG a 1 7 5\r\nhello\r\n",
            "MSG a 1 999999999999\r\n",
            "\r\n",
        ] {
            assert!(next_op(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
        let endless = vec![b'x'; MAX_LINE + 1];
        let error = next_op(&mut BytesMut::from(&endless[..])).unwrap_err();
        assert_eq!(error, ProtocolError::TooLong);
    }

    #[test]
    fn no_value_can_add_a_header() {
        let mut headers = Vec::new();
        let mut writer = HeaderWriter::new(&mut headers);
        writer.add("A", "1\r\nNats-Msg-Id: x").add("B", "2");
        writer.end();
        assert_eq!(
            String::from_utf8(headers).unwrap(),
            "NATS/1.0\r\nA: 1  Nats-Msg-Id: x\r\nB: 2\r\n\r\n"
        );
    }

    proptest! {
        /// A written publish becomes a valid delivery by changing its first word and reply. It must be read correctly,
        /// wherever the reads cut it.
        #[test]
        fn messages_survive_any_cut(
            messages in prop::collection::vec(
                ("[a-z.]{1,9}", 1..99u64, prop::collection::vec(("[A-Z]{1,4}", "[a-z0-9]{0,6}"), 0..3), prop::collection::vec(any::<u8>(), 0..40)),
                0..6,
            ),
            cuts in prop::collection::vec(1..30usize, 1..40),
        ) {
            let (mut text, mut expected) = (Vec::new(), Vec::new());
            for (subject, sid, headers, payload) in &messages {
                let mut block = Vec::new();
                if !headers.is_empty() {
                    let mut writer = HeaderWriter::new(&mut block);
                    for (name, value) in headers {
                        writer.add(name, value);
                    }
                    writer.end();
                }
                let word = if block.is_empty() { "MSG" } else { "HMSG" };
                let mut published = Vec::new();
                publish(&mut published, &format!("{subject} {sid}"), None, &block, payload);
                let rest = published.iter().position(|b| *b == b' ').unwrap();
                text.extend_from_slice(word.as_bytes());
                text.extend_from_slice(&published[rest..]);
                expected.push(format!("{sid} {subject} {headers:?} {:?}", Bytes::copy_from_slice(payload)));
            }
            let (mut pieces, mut rest) = (Vec::new(), &text[..]);
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(ops(&pieces), expected);
        }
    }
}
