use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;
use serde_json::{Value, json};

use super::{proto, *};
use crate::{
    codec::{Codec, Encoded, Request, Tag},
    model::{Cursor, Region, RoomId},
    protocol::*,
    wire::text_of,
};

fn decoded(text: &str) -> Vec<Request> {
    let mut all = Vec::new();
    Codec::Centrifugal(Form::Json).decode(text, |request| all.push(request));
    all
}

fn one(text: &str) -> (Tag, Result<Command, Refused>) {
    let mut all = decoded(text);
    assert_eq!(all.len(), 1, "{text}");
    let Request { tag, command } = all.remove(0);
    (tag, command)
}

fn tag(id: u32, method: Method) -> Tag {
    Tag::Call(Call { id, method })
}

fn room(name: &str) -> RoomId {
    RoomId::parse(name).unwrap()
}

fn cursor(text: &str) -> Cursor {
    text.parse().unwrap()
}

/// The JSON of a text frame.
fn shown(frame: &Bytes) -> Value {
    let text = text_of(frame);
    assert!(!text.contains(&b'\n'), "{frame:?}");
    serde_json::from_slice(text).unwrap()
}

/// The message of a binary frame.
fn opened(frame: &Bytes) -> proto::Reply {
    assert_eq!(frame[0], 0x82);
    let mut payload = text_of(frame);
    let reply = proto::Reply::decode_length_delimited(&mut payload).unwrap();
    assert!(payload.is_empty());
    reply
}

#[test]
fn one_frame_has_several_commands_in_order() {
    let all = decoded(concat!(
        r#"{"id":1,"connect":{"token":"t","name":"js","headers":{"a":"b"}}}"#,
        "\n",
        r#"{"id":2,"subscribe":{"channel":"chat:a","flag":1}}"#,
        "\n",
        r#"{"send":{"data":1}}"#,
        "\n{}\n",
        r#"{"id":3,"ping":{}}"#,
        "\n",
    ));
    let tags: Vec<Tag> = all.iter().map(|request| request.tag.clone()).collect();
    let subscribe = Method::Subscribe { recovers: false };
    let expected = [
        tag(1, Method::Connect),
        tag(2, subscribe),
        tag(0, Method::Send),
        Tag::None,
        tag(3, Method::Ping),
    ];
    assert_eq!(tags, expected);
    assert!(matches!(&all[0].command, Ok(Command::Auth { token: Some(t), .. }) if t == "t"));
    assert!(
        matches!(&all[1].command, Ok(Command::Join { room, since: None, .. }) if room.as_str() == "chat:a")
    );
    assert!(all[2].command.is_err());
    assert!(matches!(&all[3].command, Ok(Command::Pong)));
    assert!(matches!(&all[4].command, Ok(Command::Ping)));
}

#[test]
fn what_is_no_command_ends_the_message() {
    for text in [
        "x",
        "[]",
        r#"{"id":1}"#,
        r#"{"id":1,"dance":{}}"#,
        r#"{"subscribe":{"channel":"chat:a"}}"#,
        r#"{"id":-1,"ping":{}}"#,
        r#"[1]"#,
        r#"{"id":4294967296,"ping":{}}"#,
        r#"{"id":1,"publish":{"channel":7}}"#,
    ] {
        let (tag, command) = one(text);
        assert_eq!(tag, Tag::None, "{text}");
        assert!(command.is_err(), "{text}");
    }
    assert_eq!(decoded("").len() + decoded("\n\n").len(), 0);
    let after = decoded("x\n{\"id\":1,\"ping\":{}}");
    assert_eq!(after.len(), 1);
}

#[test]
fn the_body_is_the_clients_text() {
    for body in [
        "null",
        "0",
        "[1, 2]",
        r#""\ud55c 한""#,
        r#"{ "a" :  1.0e2 }"#,
    ] {
        let text = format!(r#"{{"id":9,"publish":{{"channel":"chat:a","data":{body}}}}}"#);
        let (_, command) = one(&text);
        match command {
            Ok(Command::Send(publication)) => assert_eq!(publication.body.get(), body),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn refused_commands_name_the_reason_and_keep_their_id() {
    for (text, code) in [
        (r#"{"id":1,"publish":{"channel":"chat:a"}}"#, 107),
        (
            r#"{"id":1,"publish":{"channel":"chat:a","type":1,"data":1}}"#,
            107,
        ),
        (r#"{"id":1,"publish":{"channel":"a b","data":1}}"#, 107),
        (r#"{"id":1,"subscribe":{"channel":""}}"#, 107),
        (
            r#"{"id":1,"subscribe":{"channel":"chat:a","tf":{"op":"and"}}}"#,
            107,
        ),
        (r#"{"id":1,"subscribe":{"channel":"chat:a","type":1}}"#, 107),
        (r#"{"id":1,"rpc":{"method":"dance"}}"#, 104),
        (
            r#"{"id":1,"rpc":{"method":"room.join","data":{"room":"chat:a"}}}"#,
            104,
        ),
        (
            r#"{"id":1,"rpc":{"method":"room.read","data":{"room":"chat:a"}}}"#,
            107,
        ),
        (
            r#"{"id":1,"history":{"channel":"chat:a","since":{"offset":5,"epoch":"x"}}}"#,
            112,
        ),
    ] {
        let (tag, command) = one(text);
        let refused = command.expect_err(text);
        let frame = Codec::Centrifugal(Form::Json)
            .refusal(&tag, &refused)
            .unwrap();
        let shown = shown(&frame);
        assert_eq!(shown["id"], 1, "{text}");
        assert_eq!(shown["error"]["code"], code, "{text}");
        let binary = Codec::Centrifugal(Form::Protobuf)
            .refusal(&tag, &refused)
            .unwrap();
        let error = opened(&binary).error.unwrap();
        assert_eq!(error.code, code);
        assert!(!error.message.is_empty());
    }
    // A client takes an error of these as a reason to reconnect, or does not wait for a reply.
    let (tag, command) = one(r#"{"id":7,"unsubscribe":{"channel":"a b"}}"#);
    let frame = Codec::Centrifugal(Form::Json).refusal(&tag, &command.unwrap_err());
    assert_eq!(shown(&frame.unwrap()), json!({"id": 7, "unsubscribe": {}}));
    let (tag, command) = one(r#"{"send":{"data":1}}"#);
    assert_eq!(
        Codec::Centrifugal(Form::Json).refusal(&tag, &command.unwrap_err()),
        None
    );
}

#[test]
fn only_temporary_errors_are_retried() {
    for code in ErrorCode::ALL {
        let refused = Refused::new(code, "why");
        let tag = tag(1, Method::Publish);
        let frame = Codec::Centrifugal(Form::Json)
            .refusal(&tag, &refused)
            .unwrap();
        let error = &shown(&frame)["error"];
        // Temporary errors of Centrifugo, without the ones of paging.
        let temporary = matches!(error["code"].as_u64().unwrap(), 100 | 111);
        assert_eq!(error["temporary"].as_bool().unwrap_or_default(), temporary);
        assert!(!code.retry() || temporary, "{code:?}");
    }
    let refused = Refused::new(ErrorCode::Unauthorized, "expired");
    for (method, expected) in [(Method::Connect, 109), (Method::Refresh, 101)] {
        let frame = Codec::Centrifugal(Form::Json).refusal(&tag(1, method), &refused);
        assert_eq!(shown(&frame.unwrap())["error"]["code"], expected);
    }
}

fn joined(replay: u64, reset: bool) -> JoinReply {
    JoinReply {
        room: room("chat:a"),
        cursor: Some(cursor("mars.q.2.b_seoul.k3.7.a1")),
        head: Some(cursor("mars.q.2.b_seoul.k3.8.c")),
        replay,
        reset,
        reason: None,
        marker: None,
        own: Region::parse("seoul").unwrap(),
        validity: None,
    }
}

#[test]
fn a_subscription_stands_before_the_messages_that_follow() {
    let at = |seq: u64, fingerprint: u64| seq << 16 | fingerprint;
    for (recovers, reply, expected) in [
        (
            false,
            joined(0, false),
            json!({"recoverable": true, "positioned": true, "epoch": "seoul.k3_mars.q.2.b", "offset": at(8, 0xc)}),
        ),
        (
            true,
            joined(1, false),
            json!({"recoverable": true, "positioned": true, "epoch": "seoul.k3_mars.q.2.b", "offset": at(7, 0xa1),
                "recovered": true, "was_recovering": true}),
        ),
        (
            true,
            joined(0, true),
            json!({"recoverable": true, "positioned": true, "epoch": "seoul.k3_mars.q.2.b", "offset": at(8, 0xc),
                "was_recovering": true}),
        ),
        (
            true,
            JoinReply {
                cursor: None,
                head: None,
                ..joined(0, true)
            },
            json!({"was_recovering": true}),
        ),
    ] {
        let tag = tag(3, Method::Subscribe { recovers });
        let frame = Codec::Centrifugal(Form::Json)
            .reply(&tag, &Reply::Joined(reply))
            .unwrap();
        assert_eq!(shown(&frame), json!({"id": 3, "subscribe": expected}));
    }
}

#[test]
fn replies_have_the_object_of_their_method() {
    let validity = Validity {
        exp: 1000,
        ttl: Some(0),
    };
    let authed = |ttl| {
        Reply::Authed(Box::new(AuthReply {
            user: "kim".into(),
            validity: Validity { ttl, ..validity },
            session: "s1".to_owned(),
            stream: None,
            joined: vec![(joined(0, false), false)],
        }))
    };
    let presence = || {
        Reply::Presence(PresenceReply {
            room: room("chat:a"),
            count: 3,
            users: Vec::new(),
            next: None,
        })
    };
    let refreshed = || Reply::Refreshed(validity);
    let sub = json!({"recoverable": true, "positioned": true, "epoch": "seoul.k3_mars.q.2.b", "offset": 8 << 16 | 0xc});
    let version = version();
    for (method, reply, expected) in [
        (
            Method::Connect,
            authed(None),
            json!({"connect": {"client": "s1", "version": version, "ping": 25, "pong": true,
                "subs": {"chat:a": sub}}}),
        ),
        (
            Method::Connect,
            authed(Some(0)),
            json!({"connect": {"client": "s1", "version": version, "ping": 25, "pong": true,
                "expires": true, "ttl": 1, "subs": {"chat:a": sub}}}),
        ),
        (
            Method::Refresh,
            refreshed(),
            json!({"refresh": {"expires": true, "ttl": 1}}),
        ),
        (
            Method::SubRefresh,
            refreshed(),
            json!({"sub_refresh": {"expires": true, "ttl": 1}}),
        ),
        (
            Method::Presence,
            presence(),
            json!({"presence": {"presence": {}}}),
        ),
        (
            Method::PresenceStats,
            presence(),
            json!({"presence_stats": {"num_clients": 3, "num_users": 3}}),
        ),
        (
            Method::History { reverse: false },
            Reply::History(HistoryReply::empty(room("chat:a"))),
            json!({"history": {"publications": [], "epoch": "", "offset": 0}}),
        ),
        (Method::Ping, Reply::Pong, json!({"ping": {}})),
        (Method::Rpc, Reply::Done, json!({"rpc": {"data": {}}})),
        (
            Method::Unsubscribe,
            Reply::Left {
                room: room("chat:a"),
            },
            json!({"unsubscribe": {}}),
        ),
    ] {
        let mut expected = expected;
        expected["id"] = json!(3);
        let frame = Codec::Centrifugal(Form::Json)
            .reply(&tag(3, method), &reply)
            .unwrap();
        assert_eq!(shown(&frame), expected);
        let binary = opened(
            &Codec::Centrifugal(Form::Protobuf)
                .reply(&tag(3, method), &reply)
                .unwrap(),
        );
        assert_eq!(serde_json::to_value(binary).unwrap(), expected);
    }
}

fn version() -> String {
    format!("natter {}", env!("CARGO_PKG_VERSION"))
}

fn past(seq: u64) -> Box<serde_json::value::RawValue> {
    let message = json!({"id": format!("m{seq}"), "from": "kim", "ts": 5, "cursor": format!("seoul.k3.{seq}.1"),
        "body": seq, "mentions": ["lee"]});
    serde_json::value::to_raw_value(&message).unwrap()
}

#[test]
fn a_page_of_history_is_in_the_order_that_was_asked_for() {
    let page = |reverse| {
        let reply = Reply::History(HistoryReply {
            messages: vec![past(3), past(4)],
            head: Some(cursor("seoul.k3.9.2")),
            own: Region::parse("seoul"),
            ..HistoryReply::empty(room("chat:a"))
        });
        let tag = tag(1, Method::History { reverse });
        shown(&Codec::Centrifugal(Form::Json).reply(&tag, &reply).unwrap())["history"].take()
    };
    let publication = |seq: u64| {
        json!({"data": seq, "info": {"user": "kim", "client": ""}, "offset": seq << 16 | 1, "time": 5,
            "tags": {"id": format!("m{seq}"), "mentions": "[\"lee\"]"}})
    };
    let at = json!({"epoch": "seoul.k3", "offset": 9 << 16 | 2});
    let whole = |publications: Value| json!({"publications": publications, "epoch": at["epoch"], "offset": at["offset"]});
    assert_eq!(page(false), whole(json!([publication(3), publication(4)])));
    assert_eq!(page(true), whole(json!([publication(4), publication(3)])));
}

#[test]
fn events_have_no_offset_and_some_are_not_told() {
    let room = || room("chat:a");
    let change = |state| Event::Presence {
        room: room(),
        change: PresenceChange::User {
            user: "kim".into(),
            state,
            info: None,
            at: 1,
        },
    };
    let push = |content: Value| {
        let mut push = json!({"push": {"channel": "chat:a"}});
        let fields = push["push"].as_object_mut().unwrap();
        fields.extend(content.as_object().unwrap().clone());
        Some(push)
    };
    let kicked = |code| Event::Kicked { room: room(), code };
    for (event, expected) in [
        (
            Event::Typing {
                room: room(),
                user: "kim".to_owned(),
            },
            push(json!({"pub": {"data": {"user": "kim"}, "tags": {"event": "typing"}}})),
        ),
        (
            Event::Read {
                room: room(),
                user: "kim".to_owned(),
                cursor: cursor("seoul.k3.7.a1"),
            },
            push(
                json!({"pub": {"data": {"user": "kim", "cursor": "seoul.k3.7.a1"}, "tags": {"event": "read"}}}),
            ),
        ),
        (
            change(PresenceState::Join),
            push(json!({"join": {"info": {"user": "kim", "client": "kim"}}})),
        ),
        (
            change(PresenceState::Leave),
            push(json!({"leave": {"info": {"user": "kim", "client": "kim"}}})),
        ),
        (change(PresenceState::Unreachable), None),
        (
            kicked("forbidden"),
            push(json!({"unsubscribe": {"code": 2000, "reason": "forbidden"}})),
        ),
        (
            kicked("banned"),
            push(json!({"unsubscribe": {"code": 2000, "reason": "banned"}})),
        ),
        (
            kicked("closed"),
            push(json!({"unsubscribe": {"code": 2000, "reason": "closed"}})),
        ),
        (
            kicked("epoch"),
            push(json!({"unsubscribe": {"code": 2500, "reason": "epoch"}})),
        ),
        (Event::TokenExpiring { exp: 1 }, None),
        (Event::Reconnect { after_ms: 1 }, None),
    ] {
        let frame = Codec::Centrifugal(Form::Json).event(&event);
        assert_eq!(frame.as_ref().map(shown), expected);
        let binary = Codec::Centrifugal(Form::Protobuf).event(&event);
        let binary = binary.map(|frame| serde_json::to_value(opened(&frame)).unwrap());
        assert_eq!(binary, expected);
    }
}

#[test]
fn every_close_has_a_reason_that_is_no_json_and_the_code_says_whether_to_come_back() {
    for close in Close::ALL {
        let frame = (Codec::Centrifugal(Form::Json).close_frame())(close);
        let code = u16::from_be_bytes([frame[2], frame[3]]);
        let reason = std::str::from_utf8(&frame[4..]).unwrap();
        assert!(!reason.is_empty());
        assert!(serde_json::from_str::<Value>(reason).is_err(), "{reason}");
        let is_final = matches!(code, 3500..4000 | 1009);
        let expected = match close {
            Close::BadToken
            | Close::Protocol
            | Close::Unsupported
            | Close::InvalidUtf8
            | Close::ClientProtocol
            | Close::Stale
            | Close::Revoked
            | Close::Disconnected
            | Close::TooBig => true,
            Close::Normal
            | Close::GoingAway
            | Close::Draining
            | Close::Internal
            | Close::Expired
            | Close::TooSlow
            | Close::PingTimeout
            | Close::TooMany => false,
        };
        assert_eq!(is_final, expected, "{close:?}");
    }
}

#[test]
fn pings_are_empty_replies() {
    assert_eq!(&Codec::Centrifugal(Form::Json).ping()[..], b"\x81\x02{}");
    assert_eq!(&Codec::Centrifugal(Form::Protobuf).ping()[..], [0x82, 1, 0]);
}

/// A message, with the given body, cursor and mentions.
fn pushed(codec: Codec, body: &str, at: &str, mentions: Option<&str>) -> Encoded {
    let room = room("chat:a");
    let cursor = cursor(at);
    codec.message(&MessagePush {
        room: &room,
        id: "m1",
        from: "ki\"m",
        ts: 12,
        cursor: Some(&cursor),
        place: cursor.get(&Region::parse("seoul").unwrap()),
        body: body.as_bytes(),
        kind: None,
        target: None,
        reply_to: Some("lee/m0"),
        mentions,
    })
}

proptest! {
    #[test]
    fn messages_are_the_same_in_both_encodings(text in ".*", seq in 0..1_u64 << 37, fingerprint: u16, many: bool) {
        let body = serde_json::to_string(&json!({"text": text})).unwrap();
        let at = format!("seoul.k3.{seq}.{fingerprint:x}");
        let mentions = many.then_some(r#"["a","b"]"#);
        let mut tags = json!({"id": "m1", "reply_to": "lee/m0"});
        if let Some(mentions) = mentions {
            tags["mentions"] = json!(mentions);
        }
        let mut publication = json!({"data": {"text": text}, "info": {"user": "ki\"m", "client": ""}, "tags": tags, "time": 12});
        let offset = seq << 16 | u64::from(fingerprint);
        if offset != 0 {
            publication["offset"] = json!(offset);
        }
        let expected = json!({"push": {"channel": "chat:a", "pub": publication}});
        let Encoded { frame, body: range } = pushed(Codec::Centrifugal(Form::Json), &body, &at, mentions);
        prop_assert_eq!(&frame[range.unwrap()], body.as_bytes());
        let mut written = shown(&frame);
        // 0 may be written or not.
        if offset == 0 {
            written["push"]["pub"].as_object_mut().unwrap().remove("offset");
        }
        prop_assert_eq!(&written, &expected);
        let Encoded { frame, .. } = pushed(Codec::Centrifugal(Form::Protobuf), &body, &at, mentions);
        prop_assert_eq!(serde_json::to_value(opened(&frame)).unwrap(), expected);
    }

    #[test]
    fn any_bytes_are_commands_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let check = |request: Request| if let Err(refused) = request.command {
            assert!(!refused.message.is_empty());
        };
        Codec::Centrifugal(Form::Protobuf).decode_binary(&bytes, check);
        Codec::Centrifugal(Form::Json).decode(&String::from_utf8_lossy(&bytes), check);
    }
}

#[test]
fn line_breaks_between_tokens_do_not_split_a_message() {
    let body = "{\r\n  \"a\": [1,\n2]\n}";
    let Encoded { frame, body: range } =
        pushed(Codec::Centrifugal(Form::Json), body, "seoul.k3.7.1", None);
    assert_eq!(range, None);
    assert_eq!(shown(&frame)["push"]["pub"]["data"], json!({"a": [1, 2]}));
    let Encoded { frame, .. } = pushed(
        Codec::Centrifugal(Form::Protobuf),
        body,
        "seoul.k3.7.1",
        None,
    );
    let push = opened(&frame).push.unwrap();
    assert_eq!(push.publication.unwrap().data, body.as_bytes());
}

#[test]
fn a_message_of_another_region_has_its_cursor_as_a_tag() {
    let Encoded { frame, .. } = pushed(Codec::Centrifugal(Form::Json), "1", "mars.q.2.b", None);
    let publication = &shown(&frame)["push"]["pub"];
    assert_eq!(publication.get("offset"), None);
    assert_eq!(publication["tags"]["cursor"], "mars.q.2.b");
}

#[test]
fn protobuf_commands_mean_the_same_as_json() {
    let commands = [
        r#"{"id":1,"connect":{"token":"t","subs":{"chat:a":{"recover":true,"epoch":"seoul.k3","offset":65537}}}}"#,
        r#"{"id":2,"subscribe":{"channel":"chat:a","recover":true,"epoch":"seoul.k3","offset":65537,"join_leave":true,"flag":3,"data":{"typing":true}}}"#,
        r#"{"id":3,"publish":{"channel":"chat:a","data":{"x": 1}}}"#,
        r#"{"id":4,"history":{"channel":"chat:a","limit":-1,"reverse":true,"since":{"offset":65537,"epoch":"seoul.k3"}}}"#,
        r#"{"id":5,"rpc":{"method":"room.read","data":{"room":"chat:a","cursor":"seoul.k3.1.1"}}}"#,
        r#"{"id":6,"sub_refresh":{"channel":"chat:a","token":"t"}}"#,
        r#"{"id":7,"presence_stats":{"channel":"chat:a"}}"#,
    ];
    let mut message = Vec::new();
    for command in commands {
        let command: proto::Command = serde_json::from_str(command).unwrap();
        command.encode_length_delimited(&mut message).unwrap();
    }
    let mut binary = Vec::new();
    Codec::Centrifugal(Form::Protobuf).decode_binary(&message, |request| binary.push(request));
    let text = decoded(&commands.join("\n"));
    assert_eq!(format!("{binary:?}"), format!("{text:?}"));
    let Ok(Command::Join { since, wants, .. }) = &text[1].command else {
        panic!("{:?}", text[1]);
    };
    let since = since.as_ref().unwrap();
    assert_eq!(since.at, ResumeAt::Cursor("seoul.k3.1.1".to_owned()));
    assert_eq!(since.only, Region::parse("seoul"));
    assert!(since.or_refuse && wants.typing && wants.presence && !wants.read);
}
