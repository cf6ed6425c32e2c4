//! A message of a room, as it is stored in a stream or arrives live.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use async_nats::HeaderMap;
use bytes::{Buf as _, Bytes};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, Visitor},
};

use crate::{
    model::{
        Class, Cursor, Epoch, Fingerprint, Kind, MAX_JSON_DEPTH, MessageId, Reference,
        header_escape, header_unescape, json_flaw, without_mark,
    },
    subject::header,
};

/// Sender of a message that a NATS client published without our headers. No token can have it: a `sub` must not begin
/// with `$`.
pub const BY_HAND: &str = "$nats";

/// One message of a room.
#[derive(Debug, Clone)]
pub struct Record {
    /// Sequence in the origin's stream; 0 for an ephemeral message.
    pub seq: u64,
    /// Only in a republished message: the previous sequence on the same subject.
    pub previous: Option<u64>,
    /// The class of the subject it was published to.
    pub class: Class,
    /// When the stream stored it (if ephemeral: when an edge sent it), in ms since 1970.
    pub ts: u64,
    /// When an imported message was sent, in ms since 1970. Always before `ts`.
    pub original_ts: Option<u64>,
    /// See [`Fingerprint`].
    pub fingerprint: Fingerprint,
    /// The sender's id; made of epoch and sequence if the publisher gave none.
    pub id: String,
    /// The sender.
    pub from: String,
    /// The name of the kind; `None` for a plain message.
    pub kind: Option<&'static str>,
    /// The message it refers to.
    pub target: Option<String>,
    /// Whether the sender edits or deletes with the right `moderate`.
    pub moderated: bool,
    /// The message it answers.
    pub reply_to: Option<String>,
    /// JSON array of users.
    pub mentions: Option<String>,
    /// The sender's position at other origins.
    pub after: Option<Cursor>,
    /// The body: valid JSON text without [`crate::model::Flaw`]s.
    pub body: Bytes,
}

/// A message on a room's subject without the server's headers.
#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    /// No sequence, or one that is not a number.
    #[error("header {} is missing or not a number", header::SEQUENCE)]
    Sequence,
    /// No time stamp, or one that is not RFC 3339.
    #[error("header {} is missing or not a time", header::TIME_STAMP)]
    Time,
}

/// The last value of a header. A publisher can set the same headers as the server; the server appends its own.
pub(super) fn last<'a>(headers: &'a HeaderMap, name: &'static str) -> Option<&'a str> {
    headers.get_last(name).map(async_nats::HeaderValue::as_str)
}

/// When the stream stored a message, in ms since 1970.
pub(super) fn stored_time(headers: &HeaderMap) -> Result<u64, BadRecord> {
    rfc3339_ms(last(headers, header::TIME_STAMP).ok_or(BadRecord::Time)?)
}

/// The key by which the stream deduplicates: room, sender and id.
#[must_use]
pub fn message_key(room: &str, from: &str, id: &str) -> String {
    [room, "/", &header_escape(from), "/", id].concat()
}

/// The names and values of a message's headers.
pub(super) fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers.iter().flat_map(|(name, values)| {
        let name: &str = name.as_ref();
        values.iter().map(move |value| (name, value.as_str()))
    })
}

/// The headers from which a record is made.
#[derive(Default)]
struct Fields<'a> {
    sequence: Option<&'a str>,
    previous: Option<&'a str>,
    time_stamp: Option<&'a str>,
    key: Option<&'a str>,
    id: Option<&'a str>,
    from: Option<&'a str>,
    kind: Option<&'a str>,
    target: Option<&'a str>,
    moderated: bool,
    reply_to: Option<&'a str>,
    mentions: Option<&'a str>,
    after: Option<&'a str>,
    ts: Option<&'a str>,
    original_ts: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// The last value of each header counts, except for the deduplication id, where the first one does, as in the
    /// server.
    fn of(headers: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut fields = Self::default();
        for (name, value) in headers {
            let field = match name {
                header::SEQUENCE => &mut fields.sequence,
                header::LAST_SEQUENCE => &mut fields.previous,
                header::TIME_STAMP => &mut fields.time_stamp,
                header::MSG_ID if fields.key.is_none() => &mut fields.key,
                header::ID => &mut fields.id,
                header::FROM => &mut fields.from,
                header::KIND => &mut fields.kind,
                header::TARGET => &mut fields.target,
                header::REPLY_TO => &mut fields.reply_to,
                header::MENTIONS => &mut fields.mentions,
                header::AFTER => &mut fields.after,
                header::TS => &mut fields.ts,
                header::ORIGINAL_TIME => &mut fields.original_ts,
                header::MODERATED => {
                    fields.moderated = true;
                    continue;
                }
                _ => continue,
            };
            *field = Some(value);
        }
        fields
    }
}

/// An RFC 3339 time in ms since 1970.
pub(super) fn rfc3339_ms(text: &str) -> Result<u64, BadRecord> {
    let time = humantime::parse_rfc3339(text).map_err(|_unreadable| BadRecord::Time)?;
    Ok(unix_ms(time))
}

impl Record {
    /// Reads a stored message: republished, or the answer to a direct get.
    ///
    /// # Errors
    /// [`BadRecord`] if headers of the server are missing.
    pub fn stored<'a>(
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        payload: Bytes,
        class: Class,
        epoch: Epoch,
    ) -> Result<Self, BadRecord> {
        let fields = Fields::of(headers);
        let seq = fields
            .sequence
            .and_then(|text| text.parse().ok())
            .ok_or(BadRecord::Sequence)?;
        let ts = rfc3339_ms(fields.time_stamp.ok_or(BadRecord::Time)?)?;
        let previous = fields.previous.and_then(|text| text.parse().ok());
        let mut record = Self::placed(&fields, payload, class, epoch, (seq, ts));
        record.previous = previous;
        Ok(record)
    }

    /// Reads a message stored at `place`: its sequence, and its time in ms since 1970.
    #[must_use]
    pub(super) fn at(
        headers: Option<&HeaderMap>,
        payload: Bytes,
        class: Class,
        epoch: Epoch,
        place: (u64, u64),
    ) -> Self {
        let fields = Fields::of(headers.into_iter().flat_map(pairs));
        Self::placed(&fields, payload, class, epoch, place)
    }

    fn placed(
        fields: &Fields<'_>,
        payload: Bytes,
        class: Class,
        epoch: Epoch,
        (seq, ts): (u64, u64),
    ) -> Self {
        let mut record = Self::with(fields, payload, class, ts);
        record.seq = seq;
        let original = fields.original_ts.and_then(|text| text.parse().ok());
        // Whoever may publish by hand can set it; a message of the future would stay the newest one.
        record.original_ts = original.filter(|original| *original < ts);
        record.fingerprint = match fields.key {
            Some(key) => Fingerprint::of(key.as_bytes()),
            None => Fingerprint::of(&record.body),
        };
        if record.id.is_empty() {
            record.id = format!("{epoch}-{seq}");
        }
        record
    }

    /// The time that is shown, in ms since 1970.
    #[must_use]
    pub fn shown_ts(&self) -> u64 {
        self.original_ts.unwrap_or(self.ts)
    }

    /// Whether it mentions a user.
    #[must_use]
    pub fn mentions_user(&self, user: &str) -> bool {
        let users = self.mentions.as_deref().map(serde_json::from_str);
        users
            .and_then(Result::ok)
            .is_some_and(|users: Vec<std::borrow::Cow<'_, str>>| users.iter().any(|it| it == user))
    }

    /// Whether it deletes another message of its room, and may.
    #[must_use]
    pub fn deletes(&self, other: &Self) -> bool {
        let target = self.target.as_deref().map(Reference::parse);
        let Some(Ok(target)) = target else {
            return false;
        };
        self.kind.and_then(Kind::parse) == Some(Kind::Delete)
            && (target.is_by(&self.from) || self.moderated)
            && target.id.as_str() == other.id
            && target.user.as_deref().unwrap_or(&self.from) == other.from
    }

    /// Reads an ephemeral message; `now` in ms replaces a missing time.
    #[must_use]
    pub fn ephemeral<'a>(
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        payload: Bytes,
        now: u64,
    ) -> Self {
        let fields = Fields::of(headers);
        let ts = fields.ts.and_then(|text| text.parse().ok()).unwrap_or(now);
        let mut record = Self::with(&fields, payload, Class::Msg, ts);
        if record.id.is_empty() {
            record.id = ulid::Ulid::new().to_string();
        }
        record
    }

    fn with(fields: &Fields<'_>, payload: Bytes, class: Class, ts: u64) -> Self {
        let unescaped = |text| header_unescape(text).into_owned();
        let valid_id = |id: &&str| MessageId::is_valid(id);
        let texts = |text: &&str| {
            text.starts_with('[') && serde_json::from_str::<Vec<AnyText>>(text).is_ok()
        };
        Self {
            seq: 0,
            previous: None,
            class,
            ts,
            original_ts: None,
            fingerprint: Fingerprint::default(),
            id: fields.id.filter(valid_id).unwrap_or_default().to_owned(),
            from: fields.from.map_or_else(|| BY_HAND.to_owned(), unescaped),
            kind: fields
                .kind
                .and_then(Kind::parse)
                .filter(|kind| *kind != Kind::Message)
                .map(Kind::as_str),
            target: fields.target.map(unescaped),
            moderated: fields.moderated,
            reply_to: fields.reply_to.map(unescaped),
            mentions: fields.mentions.filter(texts).map(str::to_owned),
            // Nobody waits for a cursor that can't be parsed.
            after: fields.after.and_then(|text| text.parse().ok()),
            body: json_or_string(payload),
        }
    }
}

/// A JSON string that is checked but not kept.
struct AnyText;

impl<'de> Deserialize<'de> for AnyText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = AnyText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, _text: &str) -> Result<AnyText, E> {
                Ok(AnyText)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// The payload, if it is JSON that clients can read. Otherwise the payload as a JSON string, with invalid UTF-8
/// replaced. A byte order mark is removed in both cases.
///
/// The check takes less than a microsecond per message and is made once, not per receiver. Without it, one message
/// published by hand could break the frames of a whole room.
fn json_or_string(mut payload: Bytes) -> Bytes {
    let marked = payload.len() - without_mark(&payload).len();
    payload.advance(marked);
    let is_json = |text| serde_json::from_str::<IgnoredAny>(text).is_ok();
    if simdutf8::basic::from_utf8(&payload).is_ok_and(is_json)
        && json_flaw(&payload, MAX_JSON_DEPTH).is_none()
    {
        return payload;
    }
    let text = String::from_utf8_lossy(&payload);
    serde_json::to_vec(&text).map_or_else(|_impossible| Bytes::from_static(b"null"), Bytes::from)
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch() -> Epoch {
        Epoch::parse("k3").unwrap()
    }

    fn server_headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEQUENCE, "42");
        headers.insert(header::LAST_SEQUENCE, "40");
        headers.insert(header::TIME_STAMP, "2026-11-20T13:31:20.706346506Z");
        headers
    }

    #[test]
    fn a_publish_by_hand_gets_defaults() {
        for (payload, body) in [
            ("{\"text\":\"hi\"}", "{\"text\":\"hi\"}"),
            ("hi \"there\"", "\"hi \\\"there\\\"\""),
            ("", "\"\""),
            ("{\"a\":1}{", "\"{\\\"a\\\":1}{\""),
            // A byte order mark is not part of the body.
            ("\u{feff}{\"a\": 1}", "{\"a\": 1}"),
            ("\u{feff}hi", "\"hi\""),
            ("\u{feff}", "\"\""),
            ("\u{feff}\u{feff}1", "\"\u{feff}1\""),
            (" [\"\u{feff}\"]\n", " [\"\u{feff}\"]\n"),
            // JSON that clients can't read becomes a string.
            (r#"["\ud83d"]"#, r#""[\"\\ud83d\"]""#),
            (r#"{"\uDC00\ud83d":1}"#, r#""{\"\\uDC00\\ud83d\":1}""#),
            (r#""\ud83d\udc4b""#, r#""\ud83d\udc4b""#),
            // Kept exactly: numbers, repeated keys, NUL.
            (
                r#"{"a":1.0e3,"a":123456789012345678901234567890,"":"\u0000\/"}"#,
                r#"{"a":1.0e3,"a":123456789012345678901234567890,"":"\u0000\/"}"#,
            ),
        ] {
            let record = Record::stored(
                pairs(&server_headers()),
                Bytes::from(payload),
                Class::Msg,
                epoch(),
            )
            .unwrap();
            assert_eq!(record.body, body);
            assert_eq!(
                (record.id.as_str(), record.from.as_str()),
                ("k3-42", BY_HAND)
            );
            assert_eq!(
                (record.seq, record.previous, record.ts),
                (42, Some(40), 1_795_181_480_706)
            );
        }
        let record = Record::stored(
            pairs(&server_headers()),
            Bytes::from_static(&[0xff, b'a']),
            Class::Msg,
            epoch(),
        );
        assert_eq!(record.unwrap().body, "\"\u{fffd}a\"");
    }

    #[test]
    fn what_is_nested_too_deep_comes_as_text() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")] {
            let levels = open.matches(['[', '{']).count();
            let nested = |times| format!("{}1{}", open.repeat(times), close.repeat(times));
            let shown = |body: String| json_or_string(Bytes::from(body));
            let most = MAX_JSON_DEPTH / levels;
            assert_eq!(shown(nested(most)), nested(most));
            for times in [most + 1, 20_000] {
                let text: String = serde_json::from_slice(&shown(nested(times))).unwrap();
                assert_eq!(text, nested(times));
            }
        }
    }

    #[test]
    fn mentions_by_hand_are_a_list_of_texts_or_nothing() {
        for (text, taken) in [
            (r#"["CORP\\kim","lee"]"#, true),
            (r#"["\u0000\ud83d\udc4b","\n"]"#, true),
            (r#"["\ud83d"]"#, false),
            (r#"["a",1]"#, false),
            (r#"[["a"]]"#, false),
            (r#"{"a":"b"}"#, false),
            (r#"["a"] x"#, false),
            ("[]", true),
            ("", false),
        ] {
            let mut headers = server_headers();
            headers.insert(header::MENTIONS, text);
            let record =
                Record::stored(pairs(&headers), Bytes::from("1"), Class::Msg, epoch()).unwrap();
            assert_eq!(record.mentions.as_deref(), taken.then_some(text));
        }
    }

    #[test]
    fn the_servers_headers_win_over_the_publishers() {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEQUENCE, "7");
        headers.append(header::SEQUENCE, "42");
        headers.insert(header::TIME_STAMP, "2026-11-20T13:31:20Z");
        headers.insert(header::MENTIONS, "[1] \"");
        headers.insert(header::ID, "a b");
        let record =
            Record::stored(pairs(&headers), Bytes::from("1"), Class::Msg, epoch()).unwrap();
        assert_eq!(record.seq, 42);
        assert_eq!(record.mentions, None);
        assert_eq!(record.id, "k3-42");
    }

    #[test]
    fn a_message_without_the_servers_headers_is_refused() {
        let mut headers = server_headers();
        headers.insert(header::TIME_STAMP, "yesterday");
        assert!(Record::stored(pairs(&headers), Bytes::new(), Class::Msg, epoch()).is_err());
        assert!(
            Record::stored(pairs(&HeaderMap::new()), Bytes::new(), Class::Msg, epoch()).is_err()
        );
    }
}
