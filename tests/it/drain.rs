//! A planned end: everybody is told, nobody loses anything.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use natter::testing::{
    client::{CallError, Commands, Connection},
    protocol::Close,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::Notify, task::JoinSet};

use crate::support::{
    self, LONG,
    calls::{next, reply},
    eventually,
    mesh::Mesh,
    signal,
};

const SESSIONS: usize = 500;
const ROOMS: usize = 20;
/// Every so many sessions one that publishes.
const PUBLISHER_EVERY: usize = 25;
/// Acknowledgements of each publisher before the drain begins.
const BEFORE: usize = 5;

/// What one session saw of its room.
struct Seen {
    room: String,
    /// Ids in the order in which they came.
    ids: Vec<String>,
    cursor: Value,
}

impl Seen {
    fn push(&mut self, frame: &Value) {
        let cursor = frame["cursor"].clone();
        assert!(
            sequence(&cursor) > sequence(&self.cursor),
            "a cursor went back: {} to {cursor}",
            self.cursor
        );
        self.cursor = cursor;
        self.ids.push(frame["id"].as_str().unwrap().to_owned());
    }
}

fn sequence(cursor: &Value) -> u64 {
    let text = cursor.as_str().unwrap();
    text.split('.').nth(2).unwrap().parse().unwrap()
}

/// The end of one session at the draining edge.
struct Drained {
    seen: Seen,
    told: Instant,
}

async fn session(mut connection: Connection, mut seen: Seen) -> Drained {
    let mut told = None;
    while let Some(frame) = connection.next().await {
        let frame = frame.json();
        match frame["op"].as_str() {
            Some("msg") if told.is_none() => seen.push(&frame),
            Some("reconnect") => {
                assert!(frame["after_ms"].is_u64(), "{frame}");
                assert!(told.replace(Instant::now()).is_none(), "told twice");
            }
            _ => panic!("{frame} after {told:?}"),
        }
    }
    let end = connection.end().unwrap();
    assert_eq!((end.code, end.reason.as_str()), (4010, "draining"));
    let told = told.expect("closed without `reconnect`");
    Drained { seen, told }
}

/// Publishes one after the other until the session ends: the ids that were acknowledged, and the last, which may not be.
async fn publish(
    commands: Commands,
    room: String,
    name: String,
    warm: Arc<Notify>,
) -> (Vec<String>, String) {
    let mut acked = Vec::new();
    loop {
        let id = format!("{name}-{}", acked.len());
        let fields = json!({"room": room, "id": id, "body": id});
        match commands.call("send", fields).await {
            Ok(ack) => {
                assert_eq!(ack.json()["id"], json!(id));
                acked.push(id);
            }
            Err(CallError::Closed(_)) => return (acked, id),
            Err(other) => panic!("{other}"),
        }
        if acked.len() == BEFORE {
            warm.notify_one();
        }
    }
}

#[tokio::test]
async fn a_drained_edge_tells_everybody_and_loses_nothing() {
    let toml = "edge.drain_spread = '2s'\nedge.drain_timeout = '60s'";
    let mut mesh = Mesh::start(support::nats_url(), 2, toml).await;
    let mut sessions = JoinSet::new();
    let mut publishers = JoinSet::new();
    let mut publishing = Vec::new();
    for n in 0..SESSIONS {
        let room = format!("chat:r{}", n % ROOMS);
        let mut connection = mesh.connect(0, &format!("user{n}")).await;
        let joined = reply(&mut connection, "join", json!({"room": room})).await;
        let seen = Seen {
            room: room.clone(),
            ids: Vec::new(),
            cursor: joined["cursor"].clone(),
        };
        if n % PUBLISHER_EVERY == n / ROOMS % PUBLISHER_EVERY {
            publishing.push((n, room, connection.commands().clone()));
        }
        sessions.spawn(session(connection, seen));
    }
    // Not before all are there: a session's part of the log begins where it joined.
    let mut warm = Vec::new();
    for (n, room, commands) in publishing {
        let notify = Arc::new(Notify::new());
        warm.push(Arc::clone(&notify));
        publishers.spawn(publish(commands, room, format!("user{n}"), notify));
    }
    for publisher in &warm {
        tokio::time::timeout(LONG, publisher.notified())
            .await
            .expect("publishers publish");
    }

    let address = mesh.edges[0].address;
    mesh.edges[0].process.terminate();
    eventually(
        "new connections are refused",
        LONG,
        async || match TcpStream::connect(address).await {
            Err(_refused) => Ok(()),
            Ok(_) => Err("still accepted".to_owned()),
        },
    )
    .await;
    let drained = async {
        let mut drained = Vec::new();
        while let Some(session) = sessions.join_next().await {
            drained.push(session.unwrap());
        }
        drained
    };
    let drained = tokio::time::timeout(2 * LONG, drained)
        .await
        .expect("sessions are closed");
    let status = tokio::time::timeout(LONG, mesh.edges[0].process.exited())
        .await
        .expect("the edge ends")
        .unwrap();
    assert_eq!(status.code(), Some(0), "{status}");

    // Not all at once: or the next edge gets all of them at once.
    assert_eq!(drained.len(), SESSIONS);
    let first = drained.iter().map(|drained| drained.told).min().unwrap();
    let buckets: BTreeSet<u128> = drained
        .iter()
        .map(|drained| drained.told.duration_since(first).as_millis() / 100)
        .collect();
    println!("told in {} tenths of a second: {buckets:?}", buckets.len());
    assert!(buckets.len() >= 3, "{buckets:?}");

    // On the other edge everybody goes on where they were, and what was not acknowledged is repeated with the same id.
    let mut expected: HashMap<String, BTreeSet<String>> = HashMap::new();
    let mut helper = mesh.connect(1, "helper").await;
    let mut unacked = 0;
    while let Some(publisher) = publishers.join_next().await {
        let (acked, last) = publisher.unwrap();
        assert!(acked.len() >= BEFORE);
        let (user, _) = last.split_once('-').unwrap();
        let n: usize = user.trim_start_matches("user").parse().unwrap();
        let room = format!("chat:r{}", n % ROOMS);
        let mut again = mesh.connect(1, user).await;
        let fields = json!({"room": room, "id": last, "body": last});
        let ack = reply(&mut again, "send", fields).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        unacked += u32::from(ack["dup"] == json!(true));
        let ids = expected.entry(room).or_default();
        ids.extend(acked);
        ids.insert(last);
    }
    println!("{unacked} messages were stored whose acknowledgement the drain had cut off");
    for room in 0..ROOMS {
        let fields = json!({"room": format!("chat:r{room}"), "id": "end", "body": 0});
        assert_eq!(reply(&mut helper, "send", fields).await["op"], "ack");
    }
    let mut orders: HashMap<String, Vec<String>> = HashMap::new();
    for Drained { mut seen, .. } in drained {
        let mut connection = mesh.connect(1, "back").await;
        let join = json!({"room": seen.room, "since": seen.cursor});
        let joined = reply(&mut connection, "join", join).await;
        assert_eq!(joined.get("reset"), None, "{joined}");
        while seen.ids.last().is_none_or(|id| id != "end") {
            seen.push(&next(&mut connection).await.json());
        }
        seen.ids.pop();
        let once: BTreeSet<String> = seen.ids.iter().cloned().collect();
        assert_eq!(once.len(), seen.ids.len(), "a repeat in {}", seen.room);
        let difference: Vec<_> = once.symmetric_difference(&expected[&seen.room]).collect();
        assert!(difference.is_empty(), "{}: {difference:?}", seen.room);
        let order = orders
            .entry(seen.room.clone())
            .or_insert_with(|| seen.ids.clone());
        assert_eq!(*order, seen.ids, "another order in {}", seen.room);
    }
}

#[tokio::test]
async fn an_edge_without_sessions_drains_at_once() {
    let toml = "edge.drain_spread = '1h'\nedge.drain_timeout = '2h'";
    let mut mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let status = tokio::time::timeout(LONG, async {
        mesh.edges[0].process.terminate();
        mesh.edges[0].process.exited().await
    });
    let status = status.await.expect("nobody is waited for").unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
}

#[tokio::test]
async fn a_drain_that_is_late_is_cut_with_another_exit_code() {
    let nats = support::dedicated_nats().await;
    let toml = "edge.drain_spread = '100ms'\nedge.drain_timeout = '1s'";
    let mut mesh = Mesh::start(&nats.url(), 1, toml).await;
    let kim = mesh.connect(0, "kim").await;
    // A command that is answered only when the publish timeout is over.
    signal(nats.server.pid().unwrap(), Signal::STOP);
    let send = json!({"room": "chat:a", "body": 1});
    kim.commands().send("send", send).await.unwrap();
    eventually("the edge has taken it", LONG, async || {
        match mesh
            .metric(0, "natter_command_received_total", "send")
            .await
        {
            1 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    mesh.edges[0].process.terminate();
    let status = tokio::time::timeout(LONG, mesh.edges[0].process.exited())
        .await
        .expect("the edge ends")
        .unwrap();
    assert_eq!(status.code(), Some(1), "{status}");
}

/// Nothing waits in a drain for a socket that is open but quiet.
#[tokio::test]
async fn a_half_made_handshake_does_not_hold_up_a_drain() {
    let mut mesh = Mesh::start(support::nats_url(), 1, "edge.drain_spread = '0s'").await;
    let quiet = TcpStream::connect(mesh.edges[0].address).await.unwrap();
    mesh.edges[0].process.terminate();
    let status = tokio::time::timeout(LONG, mesh.edges[0].process.exited())
        .await
        .expect("the edge ends")
        .unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
    drop(quiet);
}

#[tokio::test]
async fn an_edge_drains_also_while_nats_is_away() {
    let mut nats = support::dedicated_nats().await;
    let mut mesh = Mesh::start(&nats.url(), 1, "edge.drain_spread = '100ms'").await;
    let mut kim = mesh.connect(0, "kim").await;
    reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    nats.server.kill().await;
    let told = tokio::spawn(async move {
        let mut told = false;
        while let Some(frame) = kim.next().await {
            told |= frame.op() == "reconnect";
        }
        (told, kim.end().map(|end| end.code))
    });
    let status = mesh.edges[0].process.stop().await.expect("it ran");
    assert_eq!(status.code(), Some(0), "{status}");
    assert_eq!(told.await.unwrap(), (true, Some(Close::Draining.code())));
}
