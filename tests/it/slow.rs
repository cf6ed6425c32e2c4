//! Readers that are too slow, and a NATS subscription that overflows: who is behind loses nothing and harms nobody.

use std::net::SocketAddr;

use natter::client::Connection;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    resume::{next, reply},
    support::{
        self, LONG, eventually,
        mesh::{Mesh, token},
        raw::{Dial, Raw, bearer},
        signal,
    },
};

/// Reads `n` messages whose bodies begin with their number, from `first` on.
async fn read_in_order(connection: &mut Connection, first: usize, n: usize) {
    for expected in first..first + n {
        let frame = next(connection).await.json();
        assert_eq!(frame["op"], "msg", "{frame}");
        assert_eq!(number(&frame), expected);
    }
}

fn number(frame: &Value) -> usize {
    let body = frame["body"].as_str().unwrap();
    body.split(' ').next().unwrap().parse().unwrap()
}

async fn a_slow_reader(toml: &str) {
    const BODY: usize = 60 * 1024;
    const CLOSED: &str = "code=\"too_slow\"";
    // How much is sent before it is closed depends on the machine: all of it can be replayed.
    let toml = format!("rooms.replay_max_bytes = '128MiB'\nrooms.replay_memory = '256MiB'\n{toml}");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let address: SocketAddr = mesh.edges[0].address;
    let headers = bearer(&token("slow"));
    let dial = Dial {
        headers: &headers,
        receive_buffer: Some(4096),
        ..Dial::default()
    };
    let mut slow = Raw::dial(address, dial).await;
    let join = json!({"op": "join", "rid": 1, "room": "chat:a"});
    let joined = slow.call(join).await;
    let mut readers = Vec::new();
    for _ in 0..3 {
        let mut reader = mesh.connect(0, "lee").await;
        reply(&mut reader, "join", json!({"room": "chat:a"})).await;
        readers.push(reader);
    }
    let mut kim = mesh.connect(0, "kim").await;
    let padding = "x".repeat(BODY);
    // The kernel holds a few MiB for the one that does not read; then it is our turn. All others get each message before
    // the next is sent.
    let mut sent = 0;
    loop {
        let fields = json!({"room": "chat:a", "body": format!("{sent} {padding}")});
        let ack = reply(&mut kim, "send", fields).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        for reader in &mut readers {
            read_in_order(reader, sent, 1).await;
        }
        sent += 1;
        let closed = mesh.metric(0, "natter_session_closed_total", CLOSED).await;
        if closed > 0 {
            assert_eq!(closed, 1);
            break;
        }
        assert!(sent < 1000, "nobody is too slow after {sent} messages");
    }
    // A few more, to show that the others go on.
    for n in sent..sent + 5 {
        let fields = json!({"room": "chat:a", "body": format!("{n} {padding}")});
        reply(&mut kim, "send", fields).await;
        for reader in &mut readers {
            read_in_order(reader, n, 1).await;
        }
    }
    let sent = sent + 5;
    // It reads at last: whole messages in order, then the close frame. From there it resumes.
    let (frames, code, reason) = slow.until_close().await;
    assert_eq!((code, reason.as_str()), (4003, "too_slow"));
    for (expected, frame) in frames.iter().enumerate() {
        assert_eq!(number(frame), expected);
    }
    let cursor = frames.last().map_or(&joined["cursor"], |f| &f["cursor"]);
    let mut back = mesh.connect(0, "slow").await;
    let join = json!({"room": "chat:a", "since": cursor});
    let joined = reply(&mut back, "join", join).await;
    assert_eq!(joined.get("reset"), None, "{joined}");
    assert_eq!(joined["replay"], json!(sent - frames.len()));
    read_in_order(&mut back, frames.len(), sent - frames.len()).await;
    eprintln!("{} of {sent} messages before the close", frames.len());
}

#[tokio::test]
async fn a_reader_that_never_reads_is_closed_and_resumes() {
    a_slow_reader("edge.shards = 1").await;
}

#[tokio::test]
async fn a_small_outbox_closes_sooner_and_loses_nothing_either() {
    a_slow_reader("edge.shards = 1\nlimits.outbox = '64KiB'").await;
}

#[tokio::test]
async fn a_reader_whose_socket_stands_still_is_closed_though_little_waits() {
    // The outbox would take all of it: it is the time without progress that ends it.
    let toml = "edge.shards = 1\nlimits.outbox = '1GiB'\nlimits.outbox_stall = '1s'";
    a_slow_reader(toml).await;
}

/// Publishes past all edges, as fast as NATS takes it, with the edge frozen.
async fn burst(mesh: &Mesh, room: &str, messages: usize) {
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    let (prefix, region) = (&mesh.config.nats.prefix, &mesh.config.region);
    let subject = format!("{prefix}.in.{region}.0.chat.{room}.msg");
    for n in 0..messages {
        nats.publish(subject.clone(), format!("\"{n}\"").into())
            .await
            .unwrap();
    }
    nats.flush().await.unwrap();
    let stream = format!("ROOMS_{region}_0");
    eventually("the stream has all", LONG, async || {
        let mut stream = async_nats::jetstream::new(nats.clone())
            .get_stream(&stream)
            .await
            .unwrap();
        match stream.info().await.unwrap().state.messages {
            all if all == messages as u64 => Ok(()),
            some => Err(format!("{some} messages")),
        }
    })
    .await;
}

#[tokio::test]
async fn a_subscription_that_drops_messages_loses_none() {
    const MESSAGES: usize = 6_000;
    // With these the room is too large to be served in one turn: what comes meanwhile waits, up to the capacity.
    const MORE: usize = 130;
    let toml = "edge.shards = 1\nnats.partitions = 1\nnats.subscription_capacity = 1024\n\
                limits.outbox = '64MiB'\nrooms.resync = '1h'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut members = Vec::new();
    for _ in 0..3 {
        let mut member = mesh.connect(0, "kim").await;
        reply(&mut member, "join", json!({"room": "chat:a"})).await;
        members.push(member);
    }
    for _ in 0..MORE {
        let mut member = Raw::open(mesh.edges[0].address, &token("lee")).await;
        let join = json!({"op": "join", "rid": 1, "room": "chat:a"});
        assert_eq!(member.call(join).await["op"], "joined");
        // What it gets is counted by the edge.
        tokio::spawn(
            async move { tokio::io::copy(&mut member.stream, &mut tokio::io::sink()).await },
        );
    }
    let reading = members.into_iter().map(|mut member| {
        tokio::spawn(async move {
            read_in_order(&mut member, 0, MESSAGES).await;
            member
        })
    });
    let reading: Vec<_> = reading.collect();
    // Frozen, the edge finds all of it in its socket at once.
    let pid = mesh.edges[0].process.pid().unwrap();
    signal(pid, Signal::STOP);
    burst(&mesh, "a", MESSAGES).await;
    signal(pid, Signal::CONT);
    for member in reading {
        let mut member = tokio::time::timeout(2 * LONG, member)
            .await
            .expect("messages are missing")
            .unwrap();
        // Exactly once: nothing comes after the last.
        assert_eq!(reply(&mut member, "ping", json!({})).await["op"], "pong");
    }
    // Noted where they are dropped, or found first by the comparison that a busy room gets after every 1,000 messages.
    let gaps = mesh.metric(0, "natter_gap_detected_total", "").await;
    let events = mesh.metric(0, "natter_nats_slow_consumer_total", "").await;
    let filled = mesh.metric(0, "natter_gap_filled_total", "").await;
    println!("{gaps} gaps, {events} events, {filled} messages read from the stream");
    assert!(events > 0, "nothing was dropped: the test shows nothing");
    assert!(gaps > 0 && filled > 0);
    let expected = ((3 + MORE) * MESSAGES) as u64;
    eventually("everybody has everything", LONG, async || {
        let delivered = mesh.metric(0, "natter_message_delivered_total", "").await;
        assert!(delivered <= expected, "{delivered} of {expected}");
        (delivered == expected)
            .then_some(())
            .ok_or_else(|| delivered.to_string())
    })
    .await;
}
