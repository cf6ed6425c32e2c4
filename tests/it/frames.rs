//! What a client can do wrong with WebSocket frames, and what it may do though few do.

use natter::testing::{protocol::Close, wire::MAX_FRAGMENTS};
use serde_json::{Value, json};

use crate::support::{
    self,
    calls::reply,
    mesh::{Mesh, token},
    raw::{BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, Raw, TEXT, frame, head},
};

/// Payload that makes a message of `limits.frame` too large.
const LIMIT: usize = 1 << 20;

/// A text message of invalid UTF-8: `a`, the first two bytes of a character of three, `b`.
const NOT_UTF8: &[u8] = b"a\xed\x95b";

async fn mesh() -> Mesh {
    // One thread serves all: a session that could hold it up would hold up the others.
    Mesh::start(
        support::nats_url(),
        1,
        "edge.shards = 1\nnats.partitions = 1",
    )
    .await
}

async fn raw(mesh: &Mesh) -> Raw {
    Raw::open(mesh.edges[0].address, &token("kim")).await
}

fn fragments(number: usize, payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame(TEXT, payload);
    for _ in 1..number {
        bytes.extend(frame(CONTINUATION, payload));
    }
    bytes
}

fn unmasked(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![FIN | TEXT, u8::try_from(payload.len()).unwrap()];
    bytes.extend(payload);
    bytes
}

#[tokio::test]
async fn hostile_frames_are_closed_with_their_code_and_the_others_are_served() {
    let split_character = [frame(TEXT, b"\xed\x95"), frame(FIN | CONTINUATION, b"b")].concat();
    let ping_in_two = [frame(PING, b""), frame(FIN | CONTINUATION, b"")].concat();
    let two_texts = [frame(TEXT, b"{"), frame(FIN | TEXT, b"}")].concat();
    // A length of 5 in the form for 16 bits, and one of 300 in the form for 64.
    let long_form = vec![FIN | TEXT, 0x80 | 126, 0, 5];
    let longer_form = [&[FIN | TEXT, 0x80 | 127][..], &300_u64.to_be_bytes()].concat();
    let cases: Vec<(&str, Vec<u8>, Close)> = vec![
        (
            "a message over the limit",
            frame(FIN | TEXT, &vec![b' '; LIMIT + 1]),
            Close::TooBig,
        ),
        (
            "the head of a message just over the limit, and nothing more",
            head(FIN | TEXT, LIMIT as u64 + 1),
            Close::TooBig,
        ),
        (
            "the head of a message over all memory",
            head(FIN | TEXT, u64::MAX >> 1),
            Close::TooBig,
        ),
        (
            "a length with the highest bit",
            head(FIN | TEXT, u64::MAX),
            Close::Protocol,
        ),
        (
            "fragments without an end",
            fragments(512, &[b' '; 16 * 1024]),
            Close::TooBig,
        ),
        (
            "empty fragments without an end",
            fragments(usize::from(MAX_FRAGMENTS) + 1, b""),
            Close::TooBig,
        ),
        (
            "text that is not UTF-8",
            frame(FIN | TEXT, NOT_UTF8),
            Close::InvalidUtf8,
        ),
        (
            "text that is not UTF-8, in fragments",
            split_character,
            Close::InvalidUtf8,
        ),
        (
            "unmasked",
            unmasked(br#"{"op":"ping","rid":1}"#),
            Close::Protocol,
        ),
        (
            "reserved bit 1",
            frame(FIN | 0x40 | TEXT, b"{}"),
            Close::Protocol,
        ),
        (
            "reserved bit 2",
            frame(FIN | 0x20 | TEXT, b"{}"),
            Close::Protocol,
        ),
        (
            "reserved bit 3",
            frame(FIN | 0x10 | TEXT, b"{}"),
            Close::Protocol,
        ),
        (
            "a reserved bit in a ping",
            frame(FIN | 0x40 | PING, b""),
            Close::Protocol,
        ),
        ("reserved opcode 3", frame(FIN | 0x3, b""), Close::Protocol),
        ("reserved opcode 11", frame(FIN | 0xB, b""), Close::Protocol),
        (
            "binary",
            frame(FIN | BINARY, br#"{"op":"ping","rid":1}"#),
            Close::Unsupported,
        ),
        (
            "a continuation of nothing",
            frame(FIN | CONTINUATION, b"{}"),
            Close::Protocol,
        ),
        ("a text inside a text", two_texts, Close::Protocol),
        ("a ping in fragments", ping_in_two, Close::Protocol),
        (
            "a ping of 126 bytes",
            frame(FIN | PING, &[0; 126]),
            Close::Protocol,
        ),
        ("a length in too long a form", long_form, Close::Protocol),
        (
            "a length in much too long a form",
            longer_form,
            Close::Protocol,
        ),
        (
            "a close code of one byte",
            frame(FIN | CLOSE, &[3]),
            Close::Protocol,
        ),
        (
            "a close code that is never sent",
            frame(FIN | CLOSE, &1005_u16.to_be_bytes()),
            Close::Protocol,
        ),
        (
            "a close reason that is not UTF-8",
            frame(FIN | CLOSE, b"\x03\xe8\xff"),
            Close::InvalidUtf8,
        ),
    ];
    let mesh = mesh().await;
    let mut lee = mesh.connect(0, "lee").await;
    reply(&mut lee, "join", json!({"room": "chat:a"})).await;
    for (n, (what, bytes, close)) in cases.iter().enumerate() {
        let mut hostile = raw(&mesh).await;
        // A command before it is answered: it came while all was well.
        hostile.text(r#"{"op":"ping","rid":7}"#).await;
        hostile.write(bytes).await;
        let (frames, code, reason) = hostile.until_close().await;
        assert_eq!(
            (code, reason.as_str()),
            (close.code(), close.reason()),
            "{what}"
        );
        assert_eq!(frames, [json!({"op": "pong", "rid": 7})], "{what}");
        // The other session was there all the time, and a new one gets in.
        let ack = reply(&mut lee, "send", json!({"room": "chat:a", "body": n})).await;
        assert_eq!(ack["op"], "ack", "after {what}: {ack}");
        let pong = raw(&mesh).await.call(json!({"op": "ping", "rid": 1})).await;
        assert_eq!(pong["op"], "pong", "after {what}");
    }
    for close in [
        Close::TooBig,
        Close::Protocol,
        Close::InvalidUtf8,
        Close::Unsupported,
    ] {
        let expected = cases.iter().filter(|case| case.2 == close).count() as u64;
        let label = format!("code=\"{}\"", close.reason());
        let counted = mesh.metric(0, "natter_session_closed_total", &label).await;
        assert_eq!(counted, expected, "{label}");
    }
}

#[tokio::test]
async fn a_hundred_commands_in_one_segment_get_a_hundred_replies_in_order() {
    let mesh = mesh().await;
    let mut kim = raw(&mesh).await;
    let command = |rid: u64| match rid {
        0 => json!({"op": "join", "rid": rid, "room": "chat:a"}),
        _ => match rid % 5 {
            0 => json!({"op": "ping", "rid": rid}),
            1 => json!({"op": "typing", "rid": rid, "room": "chat:a"}),
            2 => json!({"op": "sing", "rid": rid}),
            _ => json!({"op": "send", "rid": rid, "room": "chat:a", "body": rid}),
        },
    };
    let expected = |rid: u64| match rid {
        0 => "joined",
        _ => match rid % 5 {
            0 => "pong",
            1 => "ok",
            2 => "error",
            _ => "ack",
        },
    };
    let bytes: Vec<u8> = (0..100)
        .flat_map(|rid| frame(FIN | TEXT, command(rid).to_string().as_bytes()))
        .collect();
    assert!(
        bytes.len() < 64 * 1024,
        "one write, one segment on loopback"
    );
    kim.write(&bytes).await;
    let mut rid = 0;
    let mut bodies = Vec::new();
    while rid < 100 {
        let frame = kim.json().await;
        match frame["op"].as_str() {
            Some("msg") => bodies.push(frame["body"].as_u64().unwrap()),
            Some("typing") => {}
            op => {
                assert_eq!(frame["rid"], json!(rid), "{frame}");
                assert_eq!(op, Some(expected(rid)), "{frame}");
                rid += 1;
            }
        }
    }
    let sent: Vec<u64> = (1..100).filter(|rid| expected(*rid) == "ack").collect();
    while bodies.len() < sent.len() {
        let frame = kim.json().await;
        if frame["op"] == "msg" {
            bodies.push(frame["body"].as_u64().unwrap());
        }
    }
    assert_eq!(bodies, sent);
}

#[tokio::test]
async fn a_command_may_come_byte_by_byte_and_in_fragments() {
    let mesh = mesh().await;
    let mut kim = raw(&mesh).await;
    let body = "안녕 👋".repeat(50);
    let text = json!({"op": "send", "rid": 1, "room": "chat:a", "body": body}).to_string();
    // TCP_NODELAY: mostly a segment each.
    for byte in frame(FIN | TEXT, text.as_bytes()) {
        kim.write(&[byte]).await;
    }
    let ack = kim.json().await;
    assert_eq!((&ack["op"], &ack["rid"]), (&json!("ack"), &json!(1)));
    // Fragments of 7 bytes cut characters of three and four, and pings stand between them.
    let text = text.replace("\"rid\":1", "\"rid\":2");
    let pieces: Vec<&[u8]> = text.as_bytes().chunks(7).collect();
    let mut pings = 0;
    for (n, piece) in pieces.iter().enumerate() {
        let opcode = if n == 0 { TEXT } else { CONTINUATION };
        let fin = if n + 1 == pieces.len() { FIN } else { 0 };
        kim.write(&frame(fin | opcode, piece)).await;
        if n % 40 == 3 {
            kim.write(&frame(FIN | PING, &[u8::try_from(n % 256).unwrap()]))
                .await;
            pings += 1;
        }
    }
    for n in 0..pings {
        let expected = u8::try_from((n * 40 + 3) % 256).unwrap();
        assert_eq!(kim.frame().await, Some((FIN | PONG, vec![expected])));
    }
    let ack = kim.json().await;
    assert_eq!((&ack["op"], &ack["rid"]), (&json!("ack"), &json!(2)));
    let mut lee = raw(&mesh).await;
    let cursor = ack["cursor"].as_str().unwrap();
    let joined = lee
        .call(json!({"op": "join", "rid": 3, "room": "chat:a", "since": cursor}))
        .await;
    assert_eq!(joined["head"], json!(cursor));
}

#[tokio::test]
async fn pings_are_answered_with_the_same_payload_and_a_close_with_a_close() {
    let mesh = mesh().await;
    let mut kim = raw(&mesh).await;
    let full: Vec<u8> = (0..125).collect();
    for payload in [&b""[..], b"\0", "안녕".as_bytes(), &full] {
        kim.write(&frame(FIN | PING, payload)).await;
        assert_eq!(kim.frame().await, Some((FIN | PONG, payload.to_vec())));
    }
    // A pong that nobody asked for is nothing.
    kim.write(&frame(FIN | PONG, b"x")).await;
    let goodbyes: [&[u8]; 4] = [
        b"",
        &1000_u16.to_be_bytes(),
        b"\x03\xe9bye",
        &4999_u16.to_be_bytes(),
    ];
    for goodbye in goodbyes {
        let mut kim = raw(&mesh).await;
        let command = r#"{"op":"send","rid":1,"room":"chat:a","body":1}"#;
        let after = r#"{"op":"ping","rid":2}"#;
        let bytes = [
            frame(FIN | TEXT, command.as_bytes()),
            frame(FIN | CLOSE, goodbye),
            // Nothing after a close frame means anything.
            frame(FIN | TEXT, after.as_bytes()),
        ];
        kim.write(&bytes.concat()).await;
        let (frames, code, _) = kim.until_close().await;
        assert_eq!(code, 1000);
        let late = frames.iter().any(|frame: &Value| frame["rid"] == 2);
        assert!(!late, "{frames:?}");
    }
    let closed = mesh
        .metric(0, "natter_session_closed_total", "code=\"closed\"")
        .await;
    assert_eq!(closed, 4);
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_closed_and_one_that_does_is_not() {
    let mesh = mesh().await;
    let (mut silent, mut alive) = (raw(&mesh).await, raw(&mesh).await);
    let (done, mut over) = tokio::sync::oneshot::channel::<()>();
    let answering = tokio::spawn(async move {
        let mut pings = 0;
        loop {
            tokio::select! {
                received = alive.frame() => {
                    let (opcode, payload) = received.expect("the peer that answers is kept");
                    assert_eq!(opcode, FIN | PING);
                    alive.write(&frame(FIN | PONG, &payload)).await;
                    pings += 1;
                }
                _ = &mut over => return (alive, pings),
            }
        }
    });
    let mut pings = 0;
    let close = loop {
        let (opcode, payload) = silent
            .frame()
            .await
            .expect("a close frame comes before the end");
        if opcode == FIN | CLOSE {
            break payload;
        }
        assert_eq!(opcode, FIN | PING);
        pings += 1;
    };
    assert!(pings >= 1);
    let code = u16::from_be_bytes([close[0], close[1]]);
    assert_eq!(code, Close::PingTimeout.code());
    done.send(()).unwrap();
    let (mut alive, answered) = answering.await.unwrap();
    assert!(answered >= 1);
    assert_eq!(
        alive.call(json!({"op": "ping", "rid": 1})).await["op"],
        "pong"
    );
}
