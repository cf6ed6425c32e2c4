//! A message of a room as it lies in a stream or comes live.

use std::{
    borrow::Cow,
    time::{SystemTime, UNIX_EPOCH},
};

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::{
    model::{Class, Epoch, Fingerprint, Kind, MessageId, header_escape, header_unescape},
    subject::header,
};

/// Sender of a message that a NATS client published by hand, without headers. Tokens can't have it: a `sub` must not begin
/// with `$`.
pub const BY_HAND: &str = "$nats";

/// One message of a room.
#[derive(Debug, Clone)]
pub struct Record {
    /// Sequence in the origin's stream; 0 for an ephemeral message.
    pub seq: u64,
    /// In a republished message: the previous sequence on the same subject.
    pub previous: Option<u64>,
    /// The log subject it came by.
    pub class: Class,
    /// When the stream stored it (an edge sent it, if ephemeral), in ms since 1970.
    pub ts: u64,
    /// See [`Fingerprint`].
    pub fingerprint: Fingerprint,
    /// The sender's id; made of epoch and sequence where the publisher gave none.
    pub id: String,
    /// The sender.
    pub from: String,
    /// The word of the kind, `None` for a plain message.
    pub kind: Option<&'static str>,
    /// What it is about.
    pub target: Option<String>,
    /// Whether its sender edits or deletes by the right `moderate`.
    pub moderated: bool,
    /// What it answers.
    pub reply_to: Option<String>,
    /// JSON array of users.
    pub mentions: Option<String>,
    /// The body: valid JSON text.
    pub body: Bytes,
}

/// A message on a room's subject that is not one of natter's.
#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    /// No sequence, or one that is not a number.
    #[error("header {} is missing or not a number", header::SEQUENCE)]
    Sequence,
    /// No time stamp, or one that is not RFC 3339.
    #[error("header {} is missing or not a time", header::TIME_STAMP)]
    Time,
}

/// The last value of a header. A publisher can set headers that the server sets too; the server appends its own.
pub(super) fn last<'a>(headers: &'a HeaderMap, name: &'static str) -> Option<&'a str> {
    headers.get_last(name).map(async_nats::HeaderValue::as_str)
}

/// When the stream stored a message, in ms since 1970.
pub(super) fn stored_time(headers: &HeaderMap) -> Result<u64, BadRecord> {
    last(headers, header::TIME_STAMP)
        .and_then(|text| humantime::parse_rfc3339(text).ok())
        .ok_or(BadRecord::Time)
        .map(unix_ms)
}

/// What the stream de-duplicates by: room, sender and id.
#[must_use]
pub fn message_key(room: &str, from: &str, id: &str) -> String {
    format!("{room}/{}/{id}", header_escape(from))
}

impl Record {
    /// Reads a message that a stream stored: republished, or answered to a direct get.
    ///
    /// # Errors
    /// [`BadRecord`] if it has not the headers that the server gives.
    pub fn stored(
        headers: &HeaderMap,
        payload: Bytes,
        class: Class,
        epoch: Epoch,
    ) -> Result<Self, BadRecord> {
        let seq = last(headers, header::SEQUENCE)
            .and_then(|text| text.parse().ok())
            .ok_or(BadRecord::Sequence)?;
        let ts = stored_time(headers)?;
        let mut record = Self::at(Some(headers), payload, class, epoch, (seq, ts));
        record.previous = last(headers, header::LAST_SEQUENCE).and_then(|text| text.parse().ok());
        Ok(record)
    }

    /// Reads a message that a stream stored at `place`, its sequence and its time in ms since 1970.
    #[must_use]
    pub(super) fn at(
        headers: Option<&HeaderMap>,
        payload: Bytes,
        class: Class,
        epoch: Epoch,
        (seq, ts): (u64, u64),
    ) -> Self {
        let mut record = Self::with_headers(headers, payload, class, ts);
        record.seq = seq;
        record.fingerprint = match headers.and_then(|headers| headers.get(header::MSG_ID)) {
            Some(key) => Fingerprint::of(key.as_str().as_bytes()),
            None => Fingerprint::of(&record.body),
        };
        if record.id.is_empty() {
            record.id = format!("{epoch}-{seq}");
        }
        record
    }

    /// Reads an ephemeral message; `now` in ms stands in for a missing time.
    #[must_use]
    pub fn ephemeral(headers: Option<&HeaderMap>, payload: Bytes, now: u64) -> Self {
        let ts = headers
            .and_then(|headers| last(headers, header::TS))
            .and_then(|text| text.parse().ok())
            .unwrap_or(now);
        let mut record = Self::with_headers(headers, payload, Class::Msg, ts);
        if record.id.is_empty() {
            record.id = ulid::Ulid::new().to_string();
        }
        record
    }

    fn with_headers(headers: Option<&HeaderMap>, payload: Bytes, class: Class, ts: u64) -> Self {
        let text = |name| headers.and_then(|headers| last(headers, name));
        let unescaped = |name| text(name).map(header_unescape).map(Cow::into_owned);
        let valid_id = |id: &&str| MessageId::parse(id).is_ok();
        let json_array =
            |text: &&str| text.starts_with('[') && serde_json::from_str::<Vec<&str>>(text).is_ok();
        Self {
            seq: 0,
            previous: None,
            class,
            ts,
            fingerprint: Fingerprint::default(),
            id: text(header::ID)
                .filter(valid_id)
                .unwrap_or_default()
                .to_owned(),
            from: unescaped(header::FROM).unwrap_or_else(|| BY_HAND.to_owned()),
            kind: text(header::KIND)
                .and_then(Kind::parse)
                .filter(|kind| *kind != Kind::Message)
                .map(Kind::as_str),
            target: unescaped(header::TARGET),
            moderated: text(header::MODERATED).is_some(),
            reply_to: unescaped(header::REPLY_TO),
            mentions: text(header::MENTIONS).filter(json_array).map(str::to_owned),
            body: json_or_string(payload),
        }
    }
}

/// The payload, if it is JSON; else the same as a JSON string, bytes that are not UTF-8 replaced.
///
/// The check costs less than a microsecond a message and is not repeated per receiver; without it one publish by hand could
/// break the frames of a whole room.
fn json_or_string(payload: Bytes) -> Bytes {
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&payload).is_ok()
        && std::str::from_utf8(&payload).is_ok();
    if is_json {
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
        ] {
            let record =
                Record::stored(&server_headers(), Bytes::from(payload), Class::Msg, epoch())
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
            &server_headers(),
            Bytes::from_static(&[0xff, b'a']),
            Class::Msg,
            epoch(),
        );
        assert_eq!(record.unwrap().body, "\"\u{fffd}a\"");
    }

    #[test]
    fn the_servers_headers_win_over_the_publishers() {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEQUENCE, "7");
        headers.append(header::SEQUENCE, "42");
        headers.insert(header::TIME_STAMP, "2026-11-20T13:31:20Z");
        headers.insert(header::MENTIONS, "[1] \"");
        headers.insert(header::ID, "a b");
        let record = Record::stored(&headers, Bytes::from("1"), Class::Msg, epoch()).unwrap();
        assert_eq!(record.seq, 42);
        assert_eq!(record.mentions, None);
        assert_eq!(record.id, "k3-42");
    }

    #[test]
    fn a_message_without_the_servers_headers_is_refused() {
        let mut headers = server_headers();
        headers.insert(header::TIME_STAMP, "yesterday");
        assert!(Record::stored(&headers, Bytes::new(), Class::Msg, epoch()).is_err());
        assert!(Record::stored(&HeaderMap::new(), Bytes::new(), Class::Msg, epoch()).is_err());
    }
}
