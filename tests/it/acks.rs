//! What is stored is acknowledged, in time, also when something that the acknowledgement says can't be read.

use std::time::Duration;

use futures_util::StreamExt as _;
use natter::testing::{
    model::{Class, RoomId, partition_of},
    subject::{Subjects, direct_get, rooms_stream},
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::support::{
    mesh::{Mesh, token},
    nats_url,
    raw::{Raw, bearer, request},
};

/// How a stream answers who asks for one of its messages.
#[derive(Debug, Clone, Copy)]
enum Reads {
    /// Not at all.
    Silent,
    /// It does not have it (yet).
    Missing,
    /// With what can't be read.
    Malformed,
}

const TIMEOUT: Duration = Duration::from_secs(2);

/// Far longer than a publish may take; who waits for a read waits longer still.
const AT_MOST: Duration = Duration::from_secs(30);

#[tokio::test]
async fn what_was_stored_is_acknowledged_whatever_can_not_be_read() {
    let toml = "[nats]\npartitions = 1\npublish_timeout = \"2s\"\nread_timeout = \"60s\"";
    let mesh = Mesh::start(nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let client = async_nats::connect(nats_url()).await.unwrap();
    let (origin, prefix) = (mesh.config.region(), &mesh.config.nats.prefix);
    let stream = rooms_stream(&origin, 0);
    // In place of the stream: somebody who acknowledges, and then does what a stream may do.
    let delete = format!("$JS.API.STREAM.DELETE.{stream}");
    let deleted = client.request(delete, "".into()).await.unwrap();
    let deleted: Value = serde_json::from_slice(&deleted.payload).unwrap();
    assert_eq!(deleted["success"], true, "{deleted}");

    let mut kim = Raw::open(address, &token("kim")).await;
    let half = TIMEOUT / 2;
    let mut newest = 100;
    for (number, (reads, pause, is_new)) in [
        (Reads::Malformed, Duration::ZERO, true),
        (Reads::Missing, Duration::ZERO, true),
        (Reads::Silent, Duration::ZERO, true),
        // What the stream took of the time the reads don't have.
        (Reads::Silent, half, true),
        (Reads::Malformed, half, true),
        // No news: the stream is looked at before the cursor is told, and is not there.
        (Reads::Malformed, Duration::ZERO, false),
        (Reads::Silent, half, false),
    ]
    .into_iter()
    .enumerate()
    {
        let room = format!("chat:r{number}");
        let id = RoomId::parse(&room).unwrap();
        let part = partition_of(&id, 1);
        let subject = Subjects::new(prefix).stored_all(&origin, part, &id);
        let of_room = Subjects::new(prefix).publish(&origin, part, &id, Class::Msg);
        let mut published = client.subscribe(subject).await.unwrap();
        let mut asked = client.subscribe(direct_get(&stream)).await.unwrap();
        // When it answers, the server has taken the subscriptions.
        client.request("$JS.API.INFO", "".into()).await.unwrap();
        let seq = if is_new { newest + 10 } else { 1 };
        newest = newest.max(seq + 1);
        let answering = client.clone();
        let stream = stream.clone();
        let stand_in = tokio::spawn(async move {
            let mut seq = seq;
            loop {
                tokio::select! {
                    Some(message) = published.next() => {
                        sleep(pause).await;
                        let ack = json!({"stream": stream, "seq": seq}).to_string();
                        let reply = message.reply.unwrap();
                        answering.publish(reply, ack.into()).await.unwrap();
                        seq += u64::from(is_new);
                    }
                    Some(message) = asked.next() => {
                        let mut headers = async_nats::HeaderMap::new();
                        let reply = message.reply.unwrap();
                        match reads {
                            Reads::Silent => continue,
                            Reads::Missing => {}
                            // Whose it is, and not where it is.
                            Reads::Malformed => headers.insert("Nats-Subject", &*of_room),
                        }
                        let answer = answering.publish_with_headers(reply, headers, "".into());
                        answer.await.unwrap();
                    }
                }
            }
        });
        let what = format!("{reads:?} after {pause:?}, new: {is_new}");

        let path = format!("/v1/rooms/{room}/messages");
        let headers = bearer(&token("kim"));
        let body = r#"{"id":"a","body":1}"#;
        let answer = timeout(AT_MOST, request(address, "POST", &path, &headers, body));
        let answer = answer.await.unwrap_or_else(|_| panic!("too late: {what}"));
        assert_eq!(answer.status, 200, "{what}: {}", answer.json());
        assert_eq!(answer.json()["ts"], 0, "{what}: {}", answer.json());
        let seq_of = |answer: &Value| {
            let cursor = answer["cursor"].as_str().unwrap_or_default();
            cursor.split('.').nth(2).and_then(|seq| seq.parse().ok())
        };
        assert_eq!(seq_of(&answer.json()), Some(seq), "{what}");

        let send = json!({"op": "send", "rid": number, "room": room, "id": "b", "body": 2});
        let ack = timeout(AT_MOST, kim.call(send)).await;
        let ack = ack.unwrap_or_else(|_| panic!("too late: {what}"));
        assert_eq!(
            (&ack["op"], &ack["ts"]),
            (&json!("ack"), &json!(0)),
            "{what}: {ack}"
        );
        assert_eq!(seq_of(&ack), Some(seq + u64::from(is_new)), "{what}");
        stand_in.abort();
    }
}
