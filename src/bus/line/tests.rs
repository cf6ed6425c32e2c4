//! Headers as they are written, and as they are read again.

use std::{sync::atomic::Ordering, time::Duration};

use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};
use figment::providers::{Format as _, Toml};
use proptest::prelude::*;
use serde_json::json;

use super::{Arrival, HeaderWriter, Line, LineError, protocol};
use crate::{
    bus::{Outgoing, Record, publish::write_headers, record::pairs},
    config::Config,
    model::{Class, Epoch, RoomId},
    protocol::{Draft, Publication},
    subject::header,
};

/// Values that have caused trouble: escapes, line ends, all kinds of white space, text that looks like our own escapes,
/// characters outside the basic multilingual plane.
const HOSTILE: &[&str] = &[
    "CORP\\kim",
    "a\"b",
    "\"",
    "\\",
    "\\u0041",
    "a\r\nNatter-From: lee",
    "\n",
    "\0",
    "\u{1}\t\u{7f}\u{85}\u{9b}",
    "안녕",
    "👋",
    "\u{2028}x\u{2029}",
    " kim  ",
    "\u{a0}kim\u{3000}",
    "\u{feff}kim\u{feff}",
    "=41",
    "=",
    "=+5",
    "a==\r",
    "/",
    "a//b/",
    "[\"a\"]",
    "null",
    ":",
    "Natter-Id: x",
    "\u{fffd}\u{ffff}\u{10ffff}",
    "\u{202e}abc",
    "e\u{301}",
    "*.>",
    "%2F",
];

/// A publication by `user` with `texts` in every field that accepts any text.
fn publication(user: &str, texts: &[&str]) -> Publication {
    let body = serde_json::value::to_raw_value(texts).unwrap();
    let draft = Draft {
        id: None,
        kind: Some("annotation"),
        body: Some(&body),
        target: Some(&format!("{user}/m0")),
        reply_to: Some(&format!("{user}/m9")),
        mentions: Some(texts.iter().map(|&text| text.to_owned()).collect()),
    };
    Publication::new(RoomId::parse("chat:a").unwrap(), draft).unwrap()
}

/// The published message as a server delivers it, read by a line and by async-nats.
fn both_readers(publication: &Publication, user: &str) -> [Record; 2] {
    let outgoing = Outgoing {
        publication,
        user,
        id: "m1",
        after: None,
        original_ts: None,
    };
    let mut block = Vec::new();
    let mut writer = HeaderWriter::new(&mut block);
    writer
        .add(header::SEQUENCE, "1")
        .add(header::TIME_STAMP, "2026-11-20T13:31:20Z");
    write_headers(&outgoing, "edge", &mut writer);
    writer.end();
    let body = publication.body.get();
    let (headers, all) = (block.len(), block.len() + body.len());
    let mut sent = BytesMut::from(format!("HMSG s 1 {headers} {all}\r\n").as_bytes());
    sent.extend_from_slice(&block);
    sent.extend_from_slice(body.as_bytes());
    sent.extend_from_slice(b"\r\n");
    let arrival: Arrival = match protocol::next_op(&mut sent).unwrap().unwrap() {
        protocol::Op::Message(arrival) => arrival,
        other => panic!("{other:?}"),
    };
    assert!(sent.is_empty());
    let mut map = HeaderMap::new();
    for line in std::str::from_utf8(&block).unwrap().lines().skip(1) {
        if let Some((name, value)) = line.split_once(':') {
            map.append(name, value.trim());
        }
    }
    let epoch = Epoch::parse("k3").unwrap();
    let body = Bytes::copy_from_slice(body.as_bytes());
    let headers = arrival.headers();
    [
        Record::stored(headers.iter(), arrival.payload(), Class::Ev, epoch).unwrap(),
        Record::stored(pairs(&map), body, Class::Ev, epoch).unwrap(),
    ]
}

fn comes_back(user: &str, texts: &[&str]) {
    let publication = publication(user, texts);
    for record in both_readers(&publication, user) {
        assert_eq!((&*record.from, &*record.id), (user, "m1"));
        assert_eq!(record.target, Some(format!("{user}/m0")));
        assert_eq!(record.reply_to, Some(format!("{user}/m9")));
        assert_eq!(record.kind, Some("annotation"));
        let mentions = record.mentions.as_deref().unwrap_or("none were read");
        assert_eq!(mentions, json!(texts).to_string());
        assert_eq!(record.body, publication.body.get());
    }
}

#[test]
fn hostile_values_come_back_from_headers() {
    for user in HOSTILE {
        comes_back(user, HOSTILE);
        comes_back(user, &[user, "lee"]);
    }
}

proptest! {
    #[test]
    fn any_values_come_back_from_headers(
        user in "\\PC{1,40}|[ =\\r\\n\\t\\x00-\\x1f\\x7f-\\u{a0}A-F0-9\\\\\"]{1,40}",
        other in "\\PC{0,40}|[ =\\r\\n\\x00-\\x1f\\x7f-\\u{a0}\\u{2000}-\\u{2030}\\\\\"]{0,40}",
    ) {
        comes_back(&user, &[&other, &user]);
    }
}

#[tokio::test]
async fn headers_that_no_stream_takes_are_not_sent() {
    let config = Config::with_defaults(Toml::string("")).unwrap();
    let (line, _driver) = Line::new(&config.nats, "test").unwrap();
    // For publishers the line looks connected.
    line.0.up.store(true, Ordering::Release);
    for (size, taken) in [(1, true), (59, true), (61, false), (900, false)] {
        let value = "v".repeat(size * 1024);
        let headers = |headers: &mut HeaderWriter<'_>| {
            headers.add("A", &value);
        };
        let published = line.publish("s", headers, b"x");
        assert_eq!(published.is_ok(), taken, "{size}: {published:?}");
        if let Err(error) = published {
            assert!(error.to_string().contains("the limit is 61440"), "{error}");
            let asked = line
                .request("s", headers, b"x", Duration::from_secs(1))
                .await;
            assert!(matches!(asked, Err(LineError::TooLarge { .. })));
        }
    }
}
