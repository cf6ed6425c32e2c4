//! The exact text that is read and written.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    codec::{Encoded, Request, Tag},
    model::{Cursor, Region, RoomId},
    protocol::*,
    wire::{Framing, text_of},
};

fn decoded(text: &str) -> Result<Command, Refused> {
    decode(text).command
}

fn refused(text: &str) -> (Option<u64>, &'static str) {
    let Request { tag, command } = decode(text);
    let rid = match tag {
        Tag::None => None,
        Tag::Number(rid) => Some(rid),
        Tag::Call(_) | Tag::Stomp(_) => panic!("a tag of another protocol"),
    };
    (rid, command.expect_err(text).code.as_str())
}

fn sent(text: &str) -> Publication {
    match decoded(text) {
        Ok(Command::Send(publication)) => *publication,
        other => panic!("not a send: {other:?}"),
    }
}

#[test]
fn refusals_name_the_code_and_keep_the_rid() {
    for (text, expected) in [
        ("", (None, "bad_json")),
        ("{", (None, "bad_json")),
        ("nonsense", (None, "bad_json")),
        ("[]", (None, "bad_request")),
        ("5", (None, "bad_request")),
        (r#"{"op":"ping"}"#, (None, "bad_request")),
        (r#"{"op":"ping","rid":-1}"#, (None, "bad_request")),
        (r#"{"op":"ping","rid":1.5}"#, (None, "bad_request")),
        (r#"{"rid":7}"#, (Some(7), "bad_request")),
        (r#"{"op":"sing","rid":7}"#, (Some(7), "unknown_op")),
        (r#"{"op":5,"rid":7}"#, (Some(7), "bad_request")),
        (r#"{"op":"join","rid":7}"#, (Some(7), "bad_request")),
        (
            r#"{"op":"join","rid":7,"room":5}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"join","rid":7,"room":"chat.x"}"#,
            (Some(7), "bad_room"),
        ),
        (r#"{"op":"auth","rid":7}"#, (Some(7), "bad_request")),
        (
            r#"{"op":"send","rid":7,"room":"chat:x"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"id":"a b"}"#,
            (Some(7), "bad_id"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"shout"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"edit"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"edit","target":"a b"}"#,
            (Some(7), "bad_id"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"target":"a"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"reply_to":"/"}"#,
            (Some(7), "bad_id"),
        ),
        (
            r#"{"op":"read","rid":7,"room":"chat:x"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"read","rid":7,"cursor":"a.b.1.1"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"presence","rid":7,"room":"chat:x","limit":0}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"readers","rid":7,"room":"chat:x","limit":1001}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"join","rid":7,"room":"chat:x","presence":"yes"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"history","rid":7,"room":"chat:x","limit":201}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"history","rid":7,"room":"chat:x","thread":["kim/1"]}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"history","rid":7,"room":"chat:x","before":"a","after":"b"}"#,
            (Some(7), "bad_request"),
        ),
        (r#"{"op":"unread","rid":7}"#, (Some(7), "bad_request")),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","kind":"pin"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"settings","rid":7,"title":"x"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"settings","rid":7,"room":"chat:x","frozen":"no"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"settings","rid":7,"room":"chat:x","version":7}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"member","rid":7,"room":"chat:x","role":"owner"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"member","rid":7,"room":"chat:x","user":"kim","role":"king"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"arrange","rid":7,"room":"chat.x","muted":true}"#,
            (Some(7), "bad_room"),
        ),
        (
            r#"{"op":"block","rid":7,"user":"kim"}"#,
            (Some(7), "bad_request"),
        ),
        (
            r#"{"op":"unread","rid":7,"rooms":["chat:x","chat.y"]}"#,
            (Some(7), "bad_room"),
        ),
        (
            r#"{"op":"send","rid":7,"room":"chat:x","body":1,"mentions":"kim"}"#,
            (Some(7), "bad_request"),
        ),
    ] {
        assert_eq!(refused(text), expected, "{text}");
    }
}

#[test]
fn what_is_too_long_is_named_with_the_limit() {
    let long = "u".repeat(257);
    let longest = format!("{}/{}", "u".repeat(256), "i".repeat(64));
    for (fields, named) in [
        (
            json!({"reply_to": format!("{longest}i")}),
            "reply_to has 322 bytes, the limit is 321",
        ),
        (
            json!({"reply_to": format!("{}/1", "x".repeat(900_000))}),
            "reply_to has 900002 bytes",
        ),
        (
            json!({"kind": "edit", "target": format!("{longest}i")}),
            "target has 322 bytes",
        ),
        (
            json!({"kind": "delete", "target": "안".repeat(300_000)}),
            "target has 900000 bytes",
        ),
        (
            json!({"mentions": vec!["a"; 101]}),
            "mentions has 101 users, the limit is 100",
        ),
        (
            json!({"mentions": ["a", long]}),
            "a user in mentions has 257 bytes, the limit is 256",
        ),
        (
            json!({"mentions": vec!["\u{1}".repeat(120); 100]}),
            "mentions, as JSON, has 72301 bytes, the limit is 32768",
        ),
        (
            json!({"mentions": vec!["\\".repeat(256); 100]}),
            "mentions, as JSON, has 51501 bytes",
        ),
    ] {
        let mut fields = fields_with_body(fields);
        let room = RoomId::parse("chat:x").unwrap();
        let over_http = decode_publication(room, fields.to_string().as_bytes()).unwrap_err();
        fields["op"] = json!("send");
        let refusal = decoded(&fields.to_string()).unwrap_err();
        for refusal in [over_http, refusal] {
            assert_eq!(refusal.code, ErrorCode::TooLarge, "{refusal:?}");
            assert!(refusal.message.starts_with(named), "{refusal:?}");
        }
    }
    let mentions = vec!["안".repeat(85); 100];
    for fits in [
        json!({"reply_to": longest, "mentions": mentions}),
        json!({"kind": "edit", "target": longest, "mentions": vec!["\u{1f}".repeat(50); 100]}),
    ] {
        let mut fields = fields_with_body(fits);
        fields["op"] = json!("send");
        decoded(&fields.to_string()).unwrap();
    }
}

fn fields_with_body(mut fields: serde_json::Value) -> serde_json::Value {
    for (key, value) in [
        ("body", json!(1)),
        ("rid", json!(1)),
        ("room", json!("chat:x")),
    ] {
        fields[key] = value;
    }
    fields
}

/// What only one command reads, others ignore, whatever it is.
#[test]
fn fields_of_other_commands_are_ignored() {
    let send = json!({
        "op": "send", "rid": 1, "room": "chat:x", "body": 1, "user": 7, "role": "king", "state": [], "muted_until": -1,
        "frozen": "no", "slow_mode_s": "x", "assignee": {}, "version": 7, "muted": 1, "pinned": "x", "blocked": "x",
    });
    assert_eq!(sent(&send.to_string()).body.get(), "1");
}

/// A refusal does not repeat long input in full.
#[test]
fn complaints_are_short() {
    let long = "x".repeat(500_000);
    for text in [
        json!({"op": "ping", "rid": long}),
        json!({"op": long, "rid": 1}),
        json!({"op": "join", "rid": 1, "room": long}),
        json!({"op": "join", "rid": 1, "room": "chat:x", "presence": long}),
        json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "id": long}),
        json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "kind": long}),
        json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "reply_to": long}),
        json!({"op": "unread", "rid": 1, "rooms": [long]}),
        json!({"op": "member", "rid": 1, "room": "chat:x", "user": "kim", "role": long}),
        json!(long),
    ] {
        let refusal = decoded(&text.to_string()).unwrap_err();
        assert!(refusal.message.len() < 1000, "{}", refusal.message.len());
    }
}

#[test]
fn a_byte_order_mark_before_json_is_dropped() {
    let send = "{\"op\":\"send\",\"rid\":1,\"room\":\"chat:x\",\"body\":\"\u{feff}\",\"cursor\":\"c\",\"rooms\":[\"chat:x\"]}";
    let marked = format!("\u{feff}{send}");
    let publication = sent(&marked);
    assert_eq!(publication.body.get(), "\"\u{feff}\"");
    let bytes = marked.as_bytes();
    let room = RoomId::parse("chat:x").unwrap();
    assert_eq!(
        decode_publication(room, bytes).unwrap().body.get(),
        "\"\u{feff}\""
    );
    assert_eq!(decode_read(bytes).unwrap(), "c");
    assert_eq!(decode_unread(bytes).unwrap().len(), 1);
    // Only the first character, and only once, is taken as a byte order mark.
    for text in [
        format!("\u{feff}{marked}"),
        format!(" {marked}"),
        format!("{send}\u{feff}"),
    ] {
        assert_eq!(refused(&text), (None, "bad_json"), "{text:?}");
    }
}

#[test]
fn null_is_a_body_and_nothing_is_not() {
    let null = r#"{"op":"send","rid":1,"room":"chat:x","body":null}"#;
    let publication = sent(null);
    assert_eq!(publication.body.get(), "null");
}

#[test]
fn a_send_keeps_its_body_to_the_letter() {
    let body = "{ \"text\" : \"안녕 👋 \\u0041\" ,\"n\":1.0e3}";
    let text = format!(
        r#"{{"body":{body},"op":"send","unknown":[1],"rid":0,"room":"chat:x","reply_to":"kim/1","mentions":["a","b"]}}"#
    );
    let publication = sent(&text);
    assert_eq!(publication.body.get(), body);
    assert_eq!(publication.reply_to.as_deref(), Some("kim/1"));
    assert_eq!(publication.mentions.json(), Some(r#"["a","b"]"#));
    let delete = r#"{"op":"send","rid":1,"room":"chat:x","kind":"delete","target":"1"}"#;
    let publication = sent(delete);
    assert_eq!(publication.body.get(), "null");
}

#[test]
fn replies_are_what_they_always_were_to_the_letter() {
    let room = || RoomId::parse("chat:a").unwrap();
    let cursor = |text: &str| text.parse::<Cursor>().unwrap();
    let one = || cursor("seoul.k3.7.a1");
    let raw = |json: &str| serde_json::value::RawValue::from_string(json.to_owned()).unwrap();
    let user = |state| PresentUser {
        user: "kim".into(),
        info: Some(Arc::from(raw("{\"name\" : \"Kim\"}"))),
        since: 5,
        state,
    };
    let validity = Validity {
        exp: 9,
        ttl: Some(1),
    };
    let own = Region::parse("seoul").unwrap();
    for (told, expected) in [
        (Reply::Pong, r#"{"op":"pong","rid":7}"#),
        (Reply::Done, r#"{"op":"ok","rid":7}"#),
        (
            Reply::Authed(Box::new(AuthReply {
                user: "a\"b".into(),
                validity,
                session: "s".to_owned(),
                stream: None,
                joined: Vec::new(),
            })),
            r#"{"op":"authed","rid":7,"user":"a\"b","exp":9}"#,
        ),
        (
            Reply::Refreshed(validity),
            r#"{"op":"refreshed","rid":7,"exp":9}"#,
        ),
        (
            Reply::Left { room: room() },
            r#"{"op":"left","rid":7,"room":"chat:a"}"#,
        ),
        (
            Reply::Joined(JoinReply {
                room: room(),
                cursor: Some(one()),
                head: Some(cursor("mars.q.2.b_seoul.k3.8.c")),
                replay: 1,
                reset: false,
                reason: None,
                marker: Some(one()),
                own: own.clone(),
                validity: Some(validity),
            }),
            r#"{"op":"joined","rid":7,"room":"chat:a","cursor":"seoul.k3.7.a1","head":"mars.q.2.b_seoul.k3.8.c","replay":1,"marker":"seoul.k3.7.a1"}"#,
        ),
        (
            Reply::Joined(JoinReply {
                room: room(),
                cursor: None,
                head: None,
                replay: 0,
                reset: true,
                reason: Some("ephemeral"),
                marker: None,
                own: own.clone(),
                validity: None,
            }),
            r#"{"op":"joined","rid":7,"room":"chat:a","replay":0,"reset":true,"reason":"ephemeral"}"#,
        ),
        (
            Reply::Published(PublishReply {
                room: room(),
                id: "m1".to_owned(),
                cursor: Some(one()),
                ts: 12,
                dup: false,
            }),
            r#"{"op":"ack","rid":7,"room":"chat:a","id":"m1","cursor":"seoul.k3.7.a1","ts":12,"dup":false}"#,
        ),
        (
            Reply::Read(ReadReply { cursor: one() }),
            r#"{"op":"ok","rid":7,"cursor":"seoul.k3.7.a1"}"#,
        ),
        (
            Reply::Presence(PresenceReply {
                room: room(),
                count: 2,
                users: vec![user(None), user(Some("unreachable"))],
                next: Some("kim".into()),
            }),
            r#"{"op":"presence","rid":7,"room":"chat:a","count":2,"users":[{"user":"kim","info":{"name" : "Kim"},"since":5},{"user":"kim","info":{"name" : "Kim"},"since":5,"state":"unreachable"}],"next":"kim"}"#,
        ),
        (
            Reply::Readers(ReadersReply {
                room: room(),
                readers: vec![ReaderBody {
                    user: "kim".to_owned(),
                    cursor: one(),
                    at: 3,
                }],
                next: None,
            }),
            r#"{"op":"readers","rid":7,"room":"chat:a","readers":[{"user":"kim","cursor":"seoul.k3.7.a1","at":3}]}"#,
        ),
        (
            Reply::History(HistoryReply {
                room: room(),
                messages: vec![raw("{\"id\": 1}"), raw("{}")],
                prev: Some("p".to_owned()),
                next: None,
                partial: true,
                head: Some(one()),
                own: Some(own.clone()),
            }),
            r#"{"op":"history","rid":7,"room":"chat:a","messages":[{"id": 1},{}],"prev":"p","partial":true}"#,
        ),
    ] {
        let frame = reply(Framing::Text, &Tag::Number(7), &told);
        assert_eq!(std::str::from_utf8(text_of(&frame)), Ok(expected));
    }
}

#[test]
fn events_are_what_they_always_were_to_the_letter() {
    let room = || RoomId::parse("chat:a").unwrap();
    let presence = |change| Event::Presence {
        room: room(),
        change,
    };
    let user = |state, info: Option<&str>| {
        let info = info.map(|json| serde_json::value::RawValue::from_string(json.to_owned()));
        presence(PresenceChange::User {
            user: "kim".into(),
            state,
            info: info.map(|info| Arc::from(info.unwrap())),
            at: 5,
        })
    };
    for (told, expected) in [
        (
            Event::Typing {
                room: room(),
                user: "kim".to_owned(),
            },
            r#"{"op":"typing","room":"chat:a","user":"kim"}"#,
        ),
        (
            Event::Read {
                room: room(),
                user: "kim".to_owned(),
                cursor: "seoul.k3.7.a1".parse().unwrap(),
            },
            r#"{"op":"read","room":"chat:a","user":"kim","cursor":"seoul.k3.7.a1"}"#,
        ),
        (
            presence(PresenceChange::Count(3)),
            r#"{"op":"presence","room":"chat:a","count":3}"#,
        ),
        (
            user(PresenceState::Join, Some("{\"a\":1}")),
            r#"{"op":"presence","room":"chat:a","user":"kim","state":"join","info":{"a":1},"at":5}"#,
        ),
        (
            user(PresenceState::Leave, None),
            r#"{"op":"presence","room":"chat:a","user":"kim","state":"leave","at":5}"#,
        ),
        (
            Event::Kicked {
                room: room(),
                code: "reset",
            },
            r#"{"op":"kicked","room":"chat:a","code":"reset"}"#,
        ),
        (
            Event::TokenExpiring { exp: 9 },
            r#"{"op":"token_expiring","exp":9}"#,
        ),
        (
            Event::Reconnect { after_ms: 40 },
            r#"{"op":"reconnect","after_ms":40}"#,
        ),
    ] {
        let frame = event(Framing::Text, &told);
        assert_eq!(std::str::from_utf8(text_of(&frame)), Ok(expected));
    }
}

proptest! {
    #[test]
    fn whatever_is_written_is_json(text in "\\PC*|[\\x00-\\x7f]*", number: u64, rooms in 0..3_usize) {
        let json = |frame: &Bytes| -> serde_json::Value { serde_json::from_slice(text_of(frame)).unwrap() };
        let room = RoomId::parse("chat:x").unwrap();
        let refused = Refused::new(ErrorCode::BadRequest, text.clone());
        let error = json(&refusal(Framing::Text, &Tag::Number(number), &refused));
        let expected = json!({"op": "error", "rid": number, "code": "bad_request", "message": text, "retry": false});
        prop_assert_eq!(error, expected);
        let error = json(&refusal(Framing::Text, &Tag::None, &refused));
        prop_assert_eq!(&error["rid"], &serde_json::Value::Null);
        let typing = json(&event(Framing::Text, &Event::Typing { room: room.clone(), user: text.clone() }));
        prop_assert_eq!(typing, json!({"op": "typing", "room": "chat:x", "user": text}));
        let unread: Vec<UnreadBody> = (0..rooms)
            .map(|_| UnreadBody { room: room.clone(), count: number, capped: number % 2 == 0 })
            .collect();
        let unread = json(&reply(Framing::Text, &Tag::Number(number), &Reply::Unread(UnreadReply { rooms: unread })));
        prop_assert_eq!(unread["rid"].as_u64(), Some(number));
        prop_assert_eq!(unread["op"].as_str(), Some("unread"));
        let list = unread["rooms"].as_array().unwrap();
        prop_assert_eq!(list.len(), rooms);
        for item in list {
            prop_assert_eq!(item["count"].as_u64(), Some(number));
            prop_assert_eq!(item.get("capped").is_some(), number % 2 == 0);
        }
        let body = serde_json::to_vec(&text).unwrap();
        let push = MessagePush {
            room: &room,
            id: "1",
            from: &text,
            ts: number,
            cursor: None,
            place: None,
            body: &body,
            kind: None,
            target: Some(&text),
            reply_to: None,
            mentions: Some("[\"a\"]"),
        };
        let Encoded { frame, body: at } = message(Framing::Text, &push);
        prop_assert_eq!(&frame[at.unwrap()], &body[..]);
        let expected = json!({
            "op": "msg", "room": "chat:x", "id": "1", "from": text, "ts": number, "body": text, "target": text,
            "mentions": ["a"],
        });
        prop_assert_eq!(json(&frame), expected);
    }

    #[test]
    fn any_text_is_decoded_or_refused(text in "\\PC{0,200}|\\{(\"[a-z_]{1,8}\":(\"[a-z:]*\"|[0-9]{1,3}|null),?){0,6}\\}") {
        if let Err(refusal) = decoded(&text) {
            prop_assert!(!refusal.message.is_empty());
        }
    }
}
