//! What a list of rooms costs, and being told of rooms that one is not in.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use natter::testing::{
    auth::{Grant, Right},
    client::{Connection, Endpoint},
};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{Begin, Bench, Cost, Peer, Runs, Table, Target, print, publishers, row};
use crate::support::{
    mesh::{ask, token_with},
    raw::Raw,
};

/// Requests under way while rooms are made.
const AT_ONCE: usize = 16;

pub(super) fn token(user: &str) -> String {
    token_with(
        user,
        Duration::from_secs(3600),
        vec![Grant::new("*:*", &Right::ALL)],
    )
}

pub(super) async fn post(address: SocketAddr, path: &str, user: &str, body: Value) {
    let (status, answer) = ask(address, ("POST", path), &token(user), &body).await;
    assert!((200..300).contains(&status), "{path}: {answer}");
}

/// Makes rooms `log:r0`, `log:r1`, …, each with two members: one of `watchers` in turn, and one of its own.
async fn make_rooms(address: SocketAddr, rooms: usize, watchers: usize) {
    stream::iter(0..rooms)
        .for_each_concurrent(AT_ONCE, |room| async move {
            let members = [format!("w{}", room % watchers), format!("other-{room}")];
            let name = format!("r{room}");
            let new =
                json!({ "namespace": "log", "kind": "group", "name": name, "members": members });
            post(address, "/v1/rooms", "desk", new).await;
        })
        .await;
}

/// A session that begins to watch, goes on in a task of its own, and counts what it is told.
async fn watch(tasks: &mut JoinSet<()>, mut raw: Raw, what: Value, told: &Arc<Told>) {
    let mut command = json!({ "op": "watch", "rid": 1 });
    let fields = what.as_object().unwrap().clone();
    command.as_object_mut().unwrap().extend(fields);
    let reply = raw.call(command).await;
    assert_eq!(reply["op"], "watching", "{reply}");
    let told = Arc::clone(told);
    tasks.spawn(async move {
        while let Some((_, text)) = raw.frame().await {
            let text = String::from_utf8(text).unwrap();
            told.bytes.fetch_add(text.len() as u64, Ordering::Relaxed);
            told.pushes.fetch_add(1, Ordering::Relaxed);
            // A summary begins with its room.
            let rooms = text.matches("{\"room\":").count() as u64;
            told.summaries.fetch_add(rooms, Ordering::Relaxed);
        }
    });
}

/// What all watching sessions were told.
#[derive(Debug, Default)]
struct Told {
    pushes: AtomicU64,
    summaries: AtomicU64,
    bytes: AtomicU64,
}

impl Told {
    fn take(&self) -> [f64; 3] {
        [&self.pushes, &self.summaries, &self.bytes].map(|it| it.swap(0, Ordering::Relaxed) as f64)
    }
}

/// Messages to rooms that nobody is in, µs a message of edge and NATS; then what the watchers were told: pushes,
/// summaries and kilobytes a second.
fn load(
    bench: &Bench,
    (scenario, name): (&str, &str),
    target: &Target,
    (rooms, rate): (usize, f64),
    told: &Told,
) -> (Cost, Vec<f64>) {
    let mut swarm = target.swarm(rooms);
    let publishers = publishers(&mut swarm, rooms);
    swarm.load(publishers.clone(), rooms, rate, COMPARED);
    swarm.reset();
    let said = |swarm: &super::Swarm| (0..rooms).map(|room| swarm.said(room)).sum::<u64>();
    let before = said(&swarm);
    told.take();
    let begin = Begin::now(&target.servers);
    swarm.load(publishers, rooms, rate, bench.time);
    let cost = begin.end();
    let messages = said(&swarm) - before;
    print(scenario, name, &swarm.tally, 0, &cost);
    let each = |server| cost.cpu_of(server) / messages.max(1) as f64;
    let a_second = told.take().map(|figure| figure / cost.seconds);
    let [pushes, summaries, bytes] = a_second;
    let figures = vec![
        each("edge"),
        each("nats"),
        pushes,
        summaries,
        bytes / 1000.0,
    ];
    (cost, figures)
}

/// 200 rooms of two at 2,000 messages/s: without records, with records and nobody watching, watched by one user, by one
/// member of each, by both.
pub(super) fn watch_rooms(bench: &mut Bench) -> Table {
    const ROOMS: usize = 200;
    const RATE: f64 = 10.0;
    let cases = [
        ("rooms without records", None, 0),
        ("with records, nobody watches", Some(1), 0),
        ("one user watches all 200", Some(1), 1),
        ("one member of each watches it", Some(ROOMS), ROOMS),
        ("both members of each watch it", Some(ROOMS), 2 * ROOMS),
    ];
    let mut all = [(); 5].map(|()| Runs::default());
    for _ in 0..bench.runs {
        for ((name, users, watching), runs) in cases.iter().zip(&mut all) {
            let figures = bench.quiet(|| {
                let target = bench.target(Peer::Durable);
                let address = target.addresses[0];
                let told = Arc::new(Told::default());
                let mut tasks = JoinSet::new();
                bench.runtime.block_on(async {
                    if let Some(users) = users {
                        make_rooms(address, ROOMS, *users).await;
                    }
                    for user in 0..*watching {
                        let name = match user.checked_sub(ROOMS) {
                            None => format!("w{user}"),
                            Some(room) => format!("other-{room}"),
                        };
                        let raw = Raw::open(address, &token(&name)).await;
                        watch(&mut tasks, raw, json!({ "mine": true }), &told).await;
                    }
                });
                load(bench, ("watch", name), &target, (ROOMS, RATE), &told)
            });
            runs.add(figures);
        }
    }
    let names = cases.map(|(name, ..)| name);
    table(
        "Watch: 200 durable rooms of two at 10 messages/s each, nobody in them",
        &COLUMNS,
        &names,
        &all,
    )
}

/// A row for each of `names`, with its runs.
fn table(
    title: &'static str,
    columns: &'static [&'static str],
    names: &[&str],
    all: &[Runs],
) -> Table {
    let rows = names.iter().zip(all);
    Table {
        title,
        columns,
        rows: rows.map(|(name, runs)| row(&[name], runs)).collect(),
    }
}

const COLUMNS: [&str; 6] = [
    "who watches",
    "edge, µs a message",
    "NATS, µs a message",
    "pushes/s",
    "summaries/s",
    "kB/s",
];

/// 10,000 rooms at 1,000 messages/s, with and without somebody who follows them all.
pub(super) fn follow(bench: &mut Bench) -> Table {
    const ROOMS: usize = 10_000;
    const RATE: f64 = 0.1;
    let names = ["nobody", "one follower", "ten followers"];
    let mut all = [(); 3].map(|()| Runs::default());
    for _ in 0..bench.runs {
        for ((name, followers), runs) in names.iter().zip([0, 1, 10]).zip(&mut all) {
            let figures = bench.quiet(|| {
                let target = bench.target(Peer::Durable);
                let address = target.addresses[0];
                let told = Arc::new(Told::default());
                let mut tasks = JoinSet::new();
                bench.runtime.block_on(async {
                    for number in 0..followers {
                        let user = format!("desk{number}");
                        let what = json!({ "pattern": "log:*" });
                        let raw = Raw::open(address, &token(&user)).await;
                        watch(&mut tasks, raw, what, &told).await;
                    }
                });
                load(bench, ("follow", name), &target, (ROOMS, RATE), &told)
            });
            runs.add(figures);
        }
    }
    table(
        "Follow: 10,000 durable rooms at 1,000 messages/s in all, nobody in them",
        &COLUMNS,
        &names,
        &all,
    )
}

/// What the edge keeps for a session that watches its own rooms, in which nothing happens.
pub(super) fn inbox_memory(bench: &mut Bench) -> Table {
    const USERS: usize = 1000;
    /// What the first ones bring with them is not theirs.
    const FIRST: usize = 200;
    let cases = [("10 rooms", 10), ("100 rooms", 100)];
    let mut all = [(); 2].map(|()| Runs::default());
    for _ in 0..bench.runs {
        for ((_, rooms), runs) in cases.iter().zip(&mut all) {
            let target = bench.target(Peer::Durable);
            let address = target.addresses[0];
            let endpoint: Endpoint = format!("ws://{address}/ws").parse().unwrap();
            let bytes = bench.runtime.block_on(async {
                // All are in the same rooms: of the records, an edge keeps a limited number for all sessions.
                for room in 0..*rooms {
                    let members: Vec<String> = (0..USERS).map(|user| format!("w{user}")).collect();
                    let name = format!("r{room}");
                    let new = json!({ "namespace": "log", "kind": "group", "name": name, "members": members });
                    post(address, "/v1/rooms", "desk", new).await;
                }
                // They answer pings, however long it takes.
                let mut sessions = Vec::new();
                for user in 0..USERS {
                    let token = token(&format!("w{user}"));
                    sessions.push(Connection::open(&endpoint, Some(&token)).await.unwrap());
                }
                let mut before = 0;
                for (number, session) in sessions.iter().enumerate() {
                    if number == FIRST {
                        sleep(COMPARED).await;
                        before = target.edge().memory().0;
                    }
                    let mine = json!({ "mine": true });
                    session.commands().call("watch", mine).await.unwrap();
                }
                sleep(COMPARED).await;
                target.edge().memory().0.saturating_sub(before)
            });
            runs.add(vec![bytes as f64 / (USERS - FIRST) as f64]);
        }
    }
    table(
        "Inbox, idle: 1,000 sessions that watch their own durable rooms",
        &["rooms of each", "bytes a session"],
        &cases.map(|(name, _)| name),
        &all,
    )
}

/// After this time the edge has compared a new watch with what is stored.
const COMPARED: Duration = Duration::from_secs(6);

/// The list of a user with 500 rooms.
pub(super) fn inbox(bench: &mut Bench) -> Table {
    const ROOMS: usize = 500;
    const MESSAGES: usize = 5;
    const TIMES: u32 = 20;
    let target = bench.target(Peer::Durable);
    let address = target.addresses[0];
    bench.runtime.block_on(async {
        make_rooms(address, ROOMS, 1).await;
        stream::iter(0..ROOMS * MESSAGES)
            .for_each_concurrent(AT_ONCE, |number| async move {
                let (room, text) = (number % ROOMS, format!("message {number} of the benchmark"));
                let path = format!("/v1/rooms/log:r{room}/messages");
                let body = json!({ "body": { "text": text } });
                post(address, &path, &format!("other-{room}"), body).await;
            })
            .await;
    });
    let questions = [
        ("the first 50", Some("/v1/inbox?limit=50")),
        ("the first 200", Some("/v1/inbox?limit=200")),
        ("watch {mine: true}", None),
    ];
    let mut all = [(); 3].map(|()| Runs::default());
    let requests = Arc::new(AtomicU64::new(0));
    let _counting = bench
        .runtime
        .block_on(count_requests(&bench.nats.url(), &requests));
    for _ in 0..bench.runs {
        for ((_, path), runs) in questions.iter().zip(&mut all) {
            let figures = bench.quiet(|| {
                requests.store(0, Ordering::Relaxed);
                let begin = Begin::now(&target.servers);
                let (bytes, each) = bench.runtime.block_on(async {
                    let (mut bytes, begun) = (0, Instant::now());
                    for _ in 0..TIMES {
                        bytes = match path {
                            Some(path) => listed(address, path).await,
                            None => watched(address).await,
                        };
                    }
                    (bytes, begun.elapsed() / TIMES)
                });
                let cost = begin.end();
                let of = |server| cost.cpu_of(server) / f64::from(TIMES) / 1000.0;
                let figures = vec![
                    each.as_secs_f64() * 1000.0,
                    of("edge"),
                    of("nats"),
                    requests.load(Ordering::Relaxed) as f64 / f64::from(TIMES),
                    bytes as f64 / 1000.0,
                ];
                (cost, figures)
            });
            runs.add(figures);
        }
    }
    let names = questions.map(|(name, _)| name);
    table(
        "Inbox: a user with 500 durable rooms, 5 unread messages in each; one request after the other",
        &[
            "question",
            "ms",
            "edge, ms of CPU",
            "NATS, ms of CPU",
            "requests to JetStream",
            "kB",
        ],
        &names,
        &all,
    )
}

/// The bytes of the answer.
async fn listed(address: SocketAddr, path: &str) -> usize {
    let (status, answer) = ask(address, ("GET", path), &token("w0"), &Value::Null).await;
    assert_eq!(status, 200, "{answer}");
    assert!(!answer["rooms"].as_array().unwrap().is_empty(), "{answer}");
    answer.to_string().len()
}

/// The bytes of the first reply of a watch.
async fn watched(address: SocketAddr) -> usize {
    let mut raw = Raw::open(address, &token("w0")).await;
    let reply = raw
        .call(json!({ "op": "watch", "rid": 1, "mine": true }))
        .await;
    assert_eq!(reply["op"], "watching", "{reply}");
    reply.to_string().len()
}

/// Counts what is asked of JetStream, also direct gets.
async fn count_requests(url: &str, requests: &Arc<AtomicU64>) -> JoinSet<()> {
    let client = async_nats::connect(url).await.unwrap();
    let mut asked = client.subscribe("$JS.API.>").await.unwrap();
    client.flush().await.unwrap();
    let requests = Arc::clone(requests);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while asked.next().await.is_some() {
            requests.fetch_add(1, Ordering::Relaxed);
        }
    });
    tasks
}
