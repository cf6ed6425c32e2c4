//! What a server loses on the live path is found by comparing rooms with their streams, and storms cost little.

use natter::testing::client::Connection;
use serde_json::{Value, json};

use crate::support::{
    self, LONG,
    calls::{next, reply},
    eventually,
    mesh::Mesh,
};

/// A JetStream API request.
async fn api(client: &async_nats::Client, subject: String, request: Value) -> Value {
    let answer = client
        .request(subject, request.to_string().into())
        .await
        .unwrap();
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(answer.get("error"), None, "{answer}");
    answer
}

/// Publishes to the stream while it does not republish, as if the leader had died between storing and republishing.
async fn publish_unseen(mesh: &Mesh, messages: &[(&str, &str, &str)]) {
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let stream = format!("ROOMS_{}_0", mesh.config.region);
    let info = api(&client, format!("$JS.API.STREAM.INFO.{stream}"), json!({})).await;
    let config = info["config"].clone();
    let mut silent = config.clone();
    silent.as_object_mut().unwrap().remove("republish");
    api(&client, format!("$JS.API.STREAM.UPDATE.{stream}"), silent).await;
    let (prefix, region) = (&mesh.config.nats.prefix, &mesh.config.region);
    for (room, class, body) in messages {
        let subject = format!("{prefix}.in.{region}.0.chat.{room}.{class}");
        let ack = client
            .request(subject, (*body).to_owned().into())
            .await
            .unwrap();
        assert!(ack.payload.starts_with(b"{\"stream\""), "{ack:?}");
    }
    api(&client, format!("$JS.API.STREAM.UPDATE.{stream}"), config).await;
}

async fn body(connection: &mut Connection) -> Value {
    let frame = next(connection).await.json();
    assert_eq!(frame["op"], "msg", "{frame}");
    frame["body"].clone()
}

#[tokio::test]
async fn what_the_server_never_republished_arrives_all_the_same() {
    let toml = "nats.partitions = 1\nrooms.resync = '2s'\nedge.shards = 1";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    reply(&mut kim, "send", json!({"room": "chat:a", "body": 1})).await;
    // The pushed message may come before its ack or after it.
    reply(&mut kim, "leave", json!({"room": "chat:a"})).await;
    let since = joined["cursor"].clone();
    reply(&mut kim, "join", json!({"room": "chat:a", "since": since})).await;
    assert_eq!(body(&mut kim).await, json!(1));
    // The last message of a quiet room.
    publish_unseen(&mesh, &[("a", "msg", "2")]).await;
    assert_eq!(body(&mut kim).await, json!(2));
    // Counted once all that was missing is handed out.
    eventually("the cause is counted", LONG, async || {
        match mesh.metric(0, "natter_gap_detected_total", "resync").await {
            0 => Err("not yet".to_owned()),
            _some => Ok(()),
        }
    })
    .await;
    // A gap that the next message of the same class shows.
    publish_unseen(&mesh, &[("a", "msg", "3"), ("a", "ev", "4")]).await;
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let (prefix, region) = (&mesh.config.nats.prefix, &mesh.config.region);
    let publish = async |class: &str, body: &'static str| {
        let subject = format!("{prefix}.in.{region}.0.chat.a.{class}");
        client.request(subject, body.into()).await.unwrap();
    };
    publish("msg", "5").await;
    assert_eq!(
        [
            body(&mut kim).await,
            body(&mut kim).await,
            body(&mut kim).await
        ],
        [3, 4, 5]
    );
    // A loss of the other class, which the next message can't show: it comes late, but it comes, once.
    publish_unseen(&mesh, &[("a", "ev", "6")]).await;
    publish("msg", "7").await;
    let mut both = [body(&mut kim).await, body(&mut kim).await];
    both.sort_by_key(Value::as_u64);
    assert_eq!(both, [6, 7]);
    publish("ev", "8").await;
    assert_eq!(body(&mut kim).await, json!(8));
}

#[tokio::test]
async fn a_reconnect_storm_reads_the_stream_a_few_times_a_room() {
    const SESSIONS: usize = 300;
    const MESSAGES: usize = 400;
    let toml = "rooms.ring = '1KiB'\nedge.shards = 1\nrooms.resync = '1h'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    reply(&mut kim, "leave", json!({"room": "chat:a"})).await;
    let mut cursors = vec![joined["cursor"].clone()];
    for i in 0..MESSAGES {
        let ack = reply(&mut kim, "send", json!({"room": "chat:a", "body": i})).await;
        cursors.push(ack["cursor"].clone());
    }
    let before = mesh.metric(0, "natter_replay_requests_total", "").await;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(mesh.connect(0, "lee").await);
    }
    // All at once, each from another place.
    for (i, session) in sessions.iter().enumerate() {
        let join = json!({"room": "chat:a", "since": cursors[i]});
        session.commands().send("join", join).await.unwrap();
    }
    for (i, session) in sessions.iter_mut().enumerate() {
        let joined = next(session).await.json();
        assert_eq!(joined["replay"], json!(MESSAGES - i), "{joined}");
        for expected in i..MESSAGES {
            assert_eq!(body(session).await, json!(expected));
        }
    }
    let reads = mesh.metric(0, "natter_replay_requests_total", "").await - before;
    println!("{SESSIONS} sessions resumed from {SESSIONS} places with {reads} reads of the stream");
    assert!(reads <= SESSIONS as u64 / 5, "{reads} reads");
}

#[tokio::test]
async fn a_room_that_nobody_is_in_is_forgotten() {
    let mesh = Mesh::start(support::nats_url(), 1, "rooms.idle = '100ms'").await;
    let mut kim = mesh.connect(0, "kim").await;
    for room in ["chat:a", "live:b"] {
        reply(&mut kim, "join", json!({"room": room})).await;
        reply(&mut kim, "leave", json!({"room": room})).await;
    }
    eventually("no room is left", LONG, async || {
        match mesh.metric(0, "natter_room_active", "").await {
            0 => Ok(()),
            some => Err(format!("{some} rooms")),
        }
    })
    .await;
    let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    assert_eq!(joined["op"], "joined");
}
