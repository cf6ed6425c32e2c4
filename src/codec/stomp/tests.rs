use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    codec::{Codec, Request, Tag},
    model::{Cursor, RoomId},
    protocol::*,
    wire::text_of,
};

const MOST: usize = 1 << 20;
const CONNECT: &str = "CONNECT\naccept-version:1.2\nhost:x\n\n\0";

fn read(reader: &mut FrameReader, bytes: &[u8]) -> Vec<Request> {
    let mut all = Vec::new();
    reader.read(bytes, |request| all.push(request));
    all
}

/// A reader that is connected with a version.
fn connected(version: &str) -> FrameReader {
    let mut reader = FrameReader::new(MOST);
    let connect = format!("CONNECT\naccept-version:{version}\n\n\0");
    let all = read(&mut reader, connect.as_bytes());
    assert!(all[0].command.is_ok(), "{all:?}");
    reader
}

fn one(reader: &mut FrameReader, frame: &str) -> Result<Command, Refused> {
    let mut all = read(reader, frame.as_bytes());
    assert_eq!(all.len(), 1, "{frame:?}");
    all.remove(0).command
}

fn refused(frame: &str) -> ErrorCode {
    let command = one(&mut connected("1.2"), frame);
    command.expect_err(frame).code
}

fn sent(reader: &mut FrameReader, frame: &str) -> Publication {
    match one(reader, frame) {
        Ok(Command::Send(publication)) => *publication,
        other => panic!("{frame:?}: {other:?}"),
    }
}

#[test]
fn frames_may_be_cut_anywhere_and_several_may_come_at_once() {
    let bytes = concat!(
        "\n\r\nCONNECT\r\naccept-version:1.0,1.2,9\r\npasscode:a:b\\n\r\n\r\n\0\n",
        "SUBSCRIBE\nid:s\ndestination:/topic/chat:a\n\n\0\n\n",
        "SEND\ndestination:/topic/chat.a\ncontent-length:3\n\n\"\0\"\0",
        "SEND\ndestination:/topic/chat:a\n\n{\"x\": 1}\0\n",
        "DISCONNECT\nreceipt:r\n\n\0",
    )
    .replace("\"\0\"", "123");
    let whole = format!("{:?}", read(&mut FrameReader::new(MOST), bytes.as_bytes()));
    assert_eq!(whole.matches("Request {").count(), 5, "{whole}");
    // The password is not unescaped, and ends with its line.
    assert!(whole.contains("a:b\\\\n"), "{whole}");
    for size in 1..40 {
        let mut reader = FrameReader::new(MOST);
        let all = bytes
            .as_bytes()
            .chunks(size)
            .flat_map(|chunk| read(&mut reader, chunk));
        let all: Vec<Request> = all.collect();
        assert_eq!(format!("{all:?}"), whole, "{size}");
    }
}

#[test]
fn headers_are_unescaped_as_the_version_says() {
    let id = |version: &str, value: &str| {
        let frame = format!("SEND\ndestination:/topic/chat:a\nreply-to:{value}\n\n1\0");
        let command = one(&mut connected(version), &frame);
        match command {
            Ok(Command::Send(publication)) => publication.reply_to,
            other => Some(format!("{other:?}")),
        }
    };
    assert_eq!(id("1.2", "k\\\\m/ab").as_deref(), Some("k\\m/ab"));
    assert_eq!(id("1.1", "k\\m/ab").as_deref(), Some("k\\m/ab"));
    assert!(id("1.2", "a\\tb").unwrap().contains("unknown escape"));
}

#[test]
fn bodies_are_json_or_texts() {
    let reader = &mut connected("1.2");
    for (headers, body, stored) in [
        ("", "{\"x\" : 1}", "{\"x\" : 1}"),
        ("", "42", "42"),
        ("", "hi", "\"hi\""),
        ("", "", "\"\""),
        ("", "{\"x\"", "\"{\\\"x\\\"\""),
        ("content-type:text/plain;charset=utf-8\n", "42", "\"42\""),
        ("content-type:application/json\n", "\"hi\"", "\"hi\""),
    ] {
        let frame = format!("SEND\ndestination:/topic/chat:a\n{headers}\n{body}\0");
        assert_eq!(sent(reader, &frame).body.get(), stored);
    }
    let publication = sent(
        reader,
        "SEND\ndestination:/topic/chat:a\nidempotency-key:m1\nreply-to:lee/m0\nmentions:[\"lee\"]\n\n1\0",
    );
    assert_eq!(publication.id.unwrap().as_str(), "m1");
    assert_eq!(publication.reply_to.as_deref(), Some("lee/m0"));
    assert_eq!(publication.mentions.json(), Some("[\"lee\"]"));
    let publication = sent(
        reader,
        "SEND\ndestination:/topic/chat:a\nkind:unpin\ntarget:lee/m0\n\n\0",
    );
    assert_eq!(publication.kind.pins(), Some(false));
    assert_eq!(publication.target.unwrap().0, "lee/m0");
}

#[test]
fn what_can_not_be_read_is_refused_and_ends_the_reading() {
    for (frame, code) in [
        ("DANCE\n\n\0", ErrorCode::UnknownOp),
        ("SEND\n\n1\0", ErrorCode::BadRequest),
        ("SEND\ndestination:/queue/a\n\n1\0", ErrorCode::BadRoom),
        (
            "SUBSCRIBE\nid:s\ndestination:/topic/chat.*\n\n\0",
            ErrorCode::BadRoom,
        ),
        (
            "SEND\ndestination:/topic/chat:a.#\n\n1\0",
            ErrorCode::BadRoom,
        ),
        ("SEND\ndestination:/topic/chat:\n\n1\0", ErrorCode::BadRoom),
        (
            "SEND\ndestination:/topic/chat:a.presence\n\n1\0",
            ErrorCode::BadRequest,
        ),
        ("SEND\ndestination\n\n1\0", ErrorCode::BadRequest),
        ("SEND\ncontent-length:x\n\n1\0", ErrorCode::BadRequest),
        ("SEND\ncontent-length:1\n\n12\0", ErrorCode::BadRequest),
        ("SEND\ncontent-length:99999999\n\n", ErrorCode::TooLarge),
        ("SUBSCRIBE\nid:s\n\n\0", ErrorCode::BadRequest),
        (
            "SUBSCRIBE\nid:s\ndestination:/topic/chat:a\nx-stream-offset:latest\n\n\0",
            ErrorCode::BadRequest,
        ),
        (
            "SUBSCRIBE\nid:s\ndestination:/topic/chat:a.typing\ncursor:c\n\n\0",
            ErrorCode::BadRequest,
        ),
        ("BEGIN\n\n\0", ErrorCode::BadRequest),
        ("COMMIT\ntransaction:t\n\n\0", ErrorCode::BadRequest),
        ("ABORT\ntransaction:t\n\n\0", ErrorCode::BadRequest),
        (
            "SEND\ntransaction:t\ndestination:/topic/chat:a\n\n1\0",
            ErrorCode::BadRequest,
        ),
        (CONNECT, ErrorCode::Unauthorized),
    ] {
        assert_eq!(refused(frame), code, "{frame:?}");
        let reader = &mut connected("1.2");
        read(reader, frame.as_bytes());
        let after = read(reader, b"SEND\ndestination:/topic/chat:a\n\n1\0");
        assert!(after.is_empty(), "{frame:?}");
    }
    let first = one(
        &mut FrameReader::new(MOST),
        "SEND\ndestination:/topic/chat:a\n\n1\0",
    );
    assert_eq!(first.unwrap_err().code, ErrorCode::Unauthorized);
    let old = one(
        &mut FrameReader::new(MOST),
        "CONNECT\naccept-version:0.9\n\n\0",
    );
    assert!(old.unwrap_err().message.contains("1.0,1.1,1.2"));
}

#[test]
fn memory_is_bounded_while_a_frame_does_not_end() {
    for (begin, code) in [
        ("SEND\nx:", ErrorCode::BadRequest),
        ("SEND\n\n", ErrorCode::TooLarge),
    ] {
        let mut reader = connected("1.2");
        let mut all = read(&mut reader, begin.as_bytes());
        let part = vec![b'x'; 4096];
        let mut came = 0;
        while all.is_empty() {
            all = read(&mut reader, &part);
            came += part.len();
            assert!(came <= MOST + 2 * part.len(), "{begin:?}");
        }
        assert_eq!(all.remove(0).command.unwrap_err().code, code);
    }
    let many = "NACK\n\n\0".repeat(1001);
    let all = read(&mut connected("1.2"), many.as_bytes());
    assert_eq!(all.len(), 1001);
    assert!(all[999].command.is_ok() && all[1000].command.is_err());
}

#[test]
fn a_transaction_is_passed_on_as_a_whole_or_not_at_all() {
    let send = |n: usize| format!("SEND\ntransaction:t\ndestination:/topic/chat:a\n\n{n}\0");
    let bodies = |all: &[Request]| {
        let bodies = all.iter().filter_map(|request| match &request.command {
            Ok(Command::Send(publication)) => Some(publication.body.get().to_owned()),
            _ => None,
        });
        bodies.collect::<Vec<_>>()
    };
    let reader = &mut connected("1.2");
    let all = format!("BEGIN\ntransaction:t\n\n\0{}{}", send(1), send(2));
    assert!(bodies(&read(reader, all.as_bytes())).is_empty());
    let all = read(reader, b"COMMIT\ntransaction:t\nreceipt:r\n\n\0");
    assert_eq!(bodies(&all), ["1", "2"]);
    // A refusal of each of them names the receipt of the COMMIT, and only the last says that all is done.
    let receipt = |request: &Request| Codec::Stomp.reply(&request.tag, &Reply::Done).is_some();
    let receipts: Vec<bool> = all.iter().map(receipt).collect();
    let refused = Refused::new(ErrorCode::Forbidden, "no");
    let error = Codec::Stomp.refusal(&all[0].tag, &refused).unwrap();
    assert!(shown(&error).contains("receipt-id:r\n"));
    assert_eq!(receipts, [false, false, true]);

    let all = format!(
        "BEGIN\ntransaction:t\n\n\0{}ABORT\ntransaction:t\n\n\0",
        send(3)
    );
    assert!(bodies(&read(reader, all.as_bytes())).is_empty());
    read(reader, b"BEGIN\ntransaction:t\n\n\0");
    let full: String = (0..100).map(send).collect();
    assert!(
        read(reader, full.as_bytes())
            .iter()
            .all(|it| it.command.is_ok())
    );
    let one_more = one(reader, &send(100)).unwrap_err();
    assert_eq!(one_more.code, ErrorCode::Limit);
}

#[test]
fn subscriptions_have_names_and_acknowledgements_move_markers() {
    let reader = &mut connected("1.2");
    let subscribe =
        |id: &str, more: &str| format!("SUBSCRIBE\nid:{id}\ndestination:/topic/chat:a{more}\n\n\0");
    let Ok(Command::Join {
        subscription,
        wants,
        since,
        ..
    }) = one(reader, &subscribe("a", "\ncursor:c"))
    else {
        panic!("a join");
    };
    assert_eq!(subscription.unwrap().of, SubscribedTo::Messages);
    assert_eq!(
        (since.unwrap().at, wants),
        (ResumeAt::Cursor("c".to_owned()), Wants::default())
    );
    let Ok(Command::Join { wants, .. }) = one(reader, &subscribe("b", ".typing")) else {
        panic!("a join");
    };
    assert!(wants.typing);
    let Ok(Command::Unsubscribe { room, id }) = one(reader, "UNSUBSCRIBE\nid:b\n\n\0") else {
        panic!("an end");
    };
    assert_eq!((room.as_str(), &*id), ("chat:a", "b"));
    assert!(matches!(
        one(reader, "UNSUBSCRIBE\nid:b\n\n\0"),
        Ok(Command::Ping)
    ));
    for ack in ["id:chat\\ca;k.1.2", "message-id:ki;m/id;chat\\ca;k.1.2"] {
        match one(reader, &format!("ACK\n{ack}\n\n\0")) {
            Ok(Command::Read { room, cursor }) => {
                assert_eq!((room.as_str(), &*cursor), ("chat:a", "k.1.2"));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(one(reader, "ACK\nid:x\n\n\0"), Ok(Command::Ping)));
    assert!(one(reader, &subscribe("a", "")).is_err());
}

#[test]
fn destinations_are_rooms_of_any_text() {
    for (destination, room) in [
        ("chat.lobby", "chat:lobby"),
        ("chat.a.b", "chat:a=2Eb"),
        ("chat:서울 #1", "chat:=EC=84=9C=EC=9A=B8=20=231"),
        ("chat:a/b", "chat:a=2Fb"),
        ("chat:a=2Fb", "chat:a=3D2Fb"),
    ] {
        let frame = format!("SEND\ndestination:/topic/{destination}\n\n1\0");
        let publication = sent(&mut connected("1.1"), &frame);
        assert_eq!(publication.room.as_str(), room);
    }
    let room = RoomId::named("chat", "서울 #1").unwrap();
    let typing = Event::Typing {
        room: room.clone(),
        user: "kim".into(),
    };
    let frame = Codec::StompOld.event(&typing).unwrap();
    assert!(shown(&frame).contains("destination:/topic/chat:서울 #1.typing\n"));
}

#[test]
fn subscriptions_begin_where_rabbitmq_says() {
    for (offset, at) in [
        ("next", None),
        ("first", Some(ResumeAt::Before(First::Oldest))),
        ("last", Some(ResumeAt::Before(First::Last))),
        ("offset=0", Some(ResumeAt::Before(First::Sequence(0)))),
        ("offset=1042", Some(ResumeAt::Before(First::Sequence(1042)))),
        (
            "timestamp=1763600000",
            Some(ResumeAt::Before(First::Time(1_763_600_000_000))),
        ),
        (
            "timestamp=18446744073709551615",
            Some(ResumeAt::Before(First::Time(u64::MAX))),
        ),
        ("cursor=a=b", Some(ResumeAt::Cursor("a=b".to_owned()))),
    ] {
        let frame =
            format!("SUBSCRIBE\nid:s\ndestination:/topic/chat:a\nx-stream-offset:{offset}\n\n\0");
        match one(&mut connected("1.2"), &frame) {
            Ok(Command::Join { since, .. }) => assert_eq!(since.map(|it| it.at), at, "{offset}"),
            other => panic!("{offset}: {other:?}"),
        }
    }
    for offset in [
        "",
        "last=1",
        "offset",
        "offset=",
        "offset=-1",
        "timestamp=1.5",
        "first=1",
    ] {
        let frame =
            format!("SUBSCRIBE\nid:s\ndestination:/topic/chat:a\nx-stream-offset:{offset}\n\n\0");
        assert_eq!(refused(&frame), ErrorCode::BadRequest, "{offset}");
    }
}

#[test]
fn signs_of_life_are_what_both_sides_want() {
    let seconds = |n| Some(std::time::Duration::from_secs(n));
    for (text, client, server) in [
        ("0,0", None, None),
        ("10000,20000", seconds(10), seconds(20)),
        ("1,0", seconds(1), None),
        (" 2000 , 3000 ", seconds(2), seconds(3)),
    ] {
        let frame = format!("CONNECT\naccept-version:1.2\nheart-beat:{text}\n\n\0");
        match one(&mut FrameReader::new(MOST), &frame) {
            Ok(Command::Auth { beats, .. }) => {
                let beats = beats.map(|beats| *beats).unwrap_or_default();
                assert_eq!((beats.client, beats.server), (client, server))
            }
            other => panic!("{other:?}"),
        }
    }
    for text in ["", "1", "x,y", "-1,0"] {
        let frame = format!("CONNECT\naccept-version:1.2\nheart-beat:{text}\n\n\0");
        assert!(one(&mut FrameReader::new(MOST), &frame).is_err(), "{text}");
    }
}

fn shown(frame: &Bytes) -> &str {
    std::str::from_utf8(text_of(frame)).unwrap()
}

fn pushed(codec: Codec, body: &str) -> Bytes {
    let room = RoomId::parse("chat:a").unwrap();
    let cursor: Cursor = "seoul.k3.7.a1".parse().unwrap();
    let encoded = codec.message(&MessagePush {
        room: &room,
        id: "m1",
        from: "ki\\m",
        ts: 12,
        cursor: Some(&cursor),
        place: None,
        body: body.as_bytes(),
        kind: None,
        target: None,
        reply_to: Some("lee/m0"),
        mentions: None,
    });
    if let Some(range) = encoded.body {
        assert_eq!(&encoded.frame[range], body.as_bytes());
    }
    encoded.frame
}

#[test]
fn a_message_is_two_fragments() {
    let subscription = RoomSubscription {
        id: "s:1".into(),
        of: SubscribedTo::Messages,
    };
    let head = Codec::Stomp.head(&subscription);
    assert_eq!(head[0], 0x01);
    assert_eq!(shown(&head), "MESSAGE\nsubscription:s\\c1\n");
    assert_eq!(
        shown(&Codec::StompOld.head(&subscription)),
        "MESSAGE\nsubscription:s:1\n"
    );
    let rest = pushed(Codec::Stomp, "{\"x\":1}");
    assert_eq!(rest[0], 0x80);
    assert_eq!(
        shown(&rest),
        "destination:/topic/chat\\ca\nmessage-id:ki\\\\m/m1\nack:chat\\ca;seoul.k3.7.a1\ncursor:seoul.k3.7.a1\n\
         from:ki\\\\m\nid:m1\ntimestamp:12\nreply-to:lee/m0\ncontent-type:application/json\ncontent-length:7\n\n{\"x\":1}\0"
    );
    let old = pushed(Codec::StompOld, "\"한\"");
    assert_eq!(
        shown(&old),
        "destination:/topic/chat:a\nmessage-id:ki\\\\m/m1;chat:a;seoul.k3.7.a1\nack:chat:a;seoul.k3.7.a1\ncursor:seoul.k3.7.a1\n\
         from:ki\\\\m\nid:m1\ntimestamp:12\nreply-to:lee/m0\ncontent-type:text/plain\ncontent-length:3\n\n한\0"
    );
}

#[test]
fn only_what_asks_for_it_is_answered() {
    let tag = |receipt: Option<&str>, what| {
        let receipt = receipt.map(str::to_owned);
        Tag::Stomp(std::sync::Arc::new(Asked { receipt, what }))
    };
    let reply = |tag: &Tag| Codec::Stomp.reply(tag, &Reply::Done);
    assert_eq!(reply(&tag(None, What::Other)), None);
    let receipt = reply(&tag(Some("a:b"), What::Other)).unwrap();
    assert_eq!(shown(&receipt), "RECEIPT\nreceipt-id:a\\cb\n\n\0");
    let refused = Refused::new(ErrorCode::Forbidden, "no");
    let error = Codec::Stomp
        .refusal(&tag(Some("r"), What::Other), &refused)
        .unwrap();
    assert_eq!(
        shown(&error),
        "ERROR\nreceipt-id:r\nmessage:forbidden\ncontent-type:text/plain\ncontent-length:13\n\nforbidden: no\0"
    );
}

proptest! {
    #[test]
    fn any_bytes_are_commands_or_refused(
        parts in prop::collection::vec(prop_oneof![
            Just(b"SEND\ndestination:/topic/chat:a\n\n1\0".to_vec()),
            Just(b"BEGIN\ntransaction:t\n\n\0".to_vec()),
            Just(b"COMMIT\ntransaction:t\n\n\0".to_vec()),
            Just(b"content-length:5\n\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..20),
        ], 0..20),
        size in 1..50_usize,
    ) {
        let mut reader = connected("1.1");
        let mut refusals = 0;
        for chunk in parts.concat().chunks(size) {
            refusals += read(&mut reader, chunk).iter().filter(|it| it.command.is_err()).count();
        }
        prop_assert!(refusals <= 1);
    }
}
