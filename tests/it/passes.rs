//! A room so large that serving it takes several turns of its shard: who comes, leaves or vanishes meanwhile harms nobody, and
//! gets each message once, from where they came in.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures_util::future::join_all;
use natter::testing::client::{Connection, Endpoint};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::support::{
    self,
    calls::{next, reply},
    mesh::{Mesh, token},
};

/// More than are served in one turn.
const MEMBERS: usize = 300;
const MESSAGES: usize = 1000;
/// Publishes that wait for their acknowledgement.
const IN_FLIGHT: usize = 50;
const COMING_AND_GOING: usize = 12;
const ROOM: &str = "chat:large";

async fn open(endpoint: &Endpoint, user: &str) -> Connection {
    Connection::open(endpoint, Some(&token(user)))
        .await
        .unwrap()
}

async fn message(connection: &mut Connection) -> Value {
    let frame = next(connection).await.json();
    assert_eq!(frame["op"], "msg", "{frame}");
    frame
}

/// Comes, reads some messages in a row, and goes, in one way or another; how often.
async fn come_and_go(endpoint: Endpoint, seed: u64, over: Arc<AtomicBool>) -> usize {
    let mut random = StdRng::seed_from_u64(seed);
    let mut visits = 0;
    let mut since: Option<(Value, u64)> = None;
    while !over.load(Ordering::Relaxed) {
        let mut visitor = open(&endpoint, &format!("visitor-{seed}")).await;
        let mut fields = json!({"room": ROOM});
        if let Some((cursor, _)) = &since {
            fields["since"] = cursor.clone();
        }
        let joined = reply(&mut visitor, "join", fields).await;
        assert_eq!(joined["op"], "joined", "{joined}");
        assert_eq!(joined.get("reset"), None, "{joined}");
        let mut last = since.take();
        for _ in 0..random.random_range(1..40) {
            let frame = message(&mut visitor).await;
            let number = frame["body"].as_u64().unwrap();
            if let Some((_, last)) = last {
                assert_eq!(number, last + 1, "visitor {seed}");
            }
            last = Some((frame["cursor"].clone(), number));
        }
        match random.random_range(0..3) {
            // Behind its reply nothing comes: `reply` takes what was before it.
            0 => {
                reply(&mut visitor, "leave", json!({"room": ROOM})).await;
                let pong = reply(&mut visitor, "ping", json!({})).await;
                assert_eq!(pong["op"], "pong");
            }
            // Gone without a word, perhaps in the middle of a pass.
            1 => drop(visitor),
            // Back, where it was.
            _ => since = last,
        }
        visits += 1;
    }
    visits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_while_a_large_room_is_served() {
    let toml =
        "edge.shards = 1\nlimits.commands_per_second = 100000\nlimits.commands_burst = 100000";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let endpoint = mesh.endpoint(0);
    let members = join_all((0..MEMBERS).map(|n| {
        let endpoint = endpoint.clone();
        async move {
            let mut member = open(&endpoint, &format!("member-{n}")).await;
            reply(&mut member, "join", json!({"room": ROOM})).await;
            member
        }
    }))
    .await;
    let reading = members.into_iter().map(|mut member| {
        tokio::spawn(async move {
            for expected in 0..MESSAGES {
                let frame = message(&mut member).await;
                assert_eq!(frame["body"], json!(expected));
            }
            // Nothing comes twice.
            let pong = reply(&mut member, "ping", json!({})).await;
            assert_eq!(pong["op"], "pong");
        })
    });
    let reading: Vec<_> = reading.collect();
    let over = Arc::new(AtomicBool::new(false));
    let visitors: Vec<_> = (0..COMING_AND_GOING as u64)
        .map(|seed| tokio::spawn(come_and_go(endpoint.clone(), seed, Arc::clone(&over))))
        .collect();

    let kim = open(&endpoint, "kim").await;
    for first in (0..MESSAGES).step_by(IN_FLIGHT) {
        let sends = (first..first + IN_FLIGHT).map(|n| {
            let fields = json!({"room": ROOM, "body": n});
            kim.commands().call("send", fields)
        });
        for ack in join_all(sends).await {
            ack.unwrap();
        }
    }
    for member in reading {
        member.await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    // Who waits for one more message gets it.
    let mut visits = join_all(visitors);
    let mut number = MESSAGES;
    let visits: usize = loop {
        let fields = json!({"room": ROOM, "body": number});
        tokio::select! {
            visits = &mut visits => break visits.into_iter().map(Result::unwrap).sum(),
            acked = kim.commands().call("send", fields) => acked.unwrap(),
        };
        number += 1;
    };
    eprintln!("{visits} visits while {MESSAGES} messages were served to {MEMBERS} members");
    assert!(visits > COMING_AND_GOING, "nobody came and went");
}
