//! What history costs: how fast messages come from the streams into MongoDB, beside a bare loop that inserts the same
//! documents, and how long pages and searches take over a million messages. Real processes on this machine; run with
//! `cargo bench --bench history`. Results stand in `benches/RESULTS.md`.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark prints, and fails as tests do"
)]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, jetstream};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongodb::bson::{RawDocumentBuf, doc};
use natter::testing::{
    client::Commands,
    config::Config,
    model::{Class, RoomId, partition_of},
    servers::{Process, Spec, free_port},
    store::Store,
    subject::{Subjects, header},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use support::{
    LONG, cpu_time, dedicated_mongod, dedicated_nats, launcher,
    mesh::{Mesh, answers, http, token},
    natter, unique,
};

/// Messages of one comparison with the bare loop.
const MESSAGES: usize = 100_000;
/// Comparisons: alternating, so that a slow hour of the machine meets both.
const RUNS: usize = 3;
/// Messages and rooms that pages are read from.
const LARGE: usize = 1_000_000;
const ROOMS: usize = 1_000;
/// Calls that are timed for each kind of question.
const CALLS: usize = 1_000;
/// As `history.batch_messages`.
const BATCH: usize = 1_000;

const WORDS: &[&str] = &[
    "message",
    "server",
    "hello",
    "tomorrow",
    "meeting",
    "please",
    "thanks",
    "question",
    "answer",
    "deploy",
    "weekend",
    "coffee",
    "release",
    "window",
    "customer",
    "invoice",
    "delivery",
    "weather",
    "안녕하세요",
    "감사합니다",
    "내일",
    "회의",
    "배송",
    "문의",
    "こんにちは",
    "ありがとう",
];

/// A text of some 10 words, two of them rare.
fn text(rng: &mut StdRng) -> String {
    let mut words: Vec<String> = (0..rng.random_range(4..14))
        .map(|_| WORDS[rng.random_range(0..WORDS.len())].to_owned())
        .collect();
    words.extend((0..2).map(|_| format!("w{}", rng.random_range(0..50_000))));
    words.join(" ")
}

fn room(number: usize) -> RoomId {
    RoomId::parse(&format!("chat:room{number:04}")).unwrap()
}

/// Publishes messages to the streams as an edge does, a thousand acknowledgements at a time in flight.
async fn publish(config: &Config, messages: usize, rooms: usize) {
    let client = async_nats::connect(&config.nats.url).await.unwrap();
    let jetstream = jetstream::new(client);
    let subjects = Subjects::new(&config.nats.prefix);
    let region = config.region();
    let mut rng = StdRng::seed_from_u64(7);
    let mut acks = Vec::with_capacity(1_000);
    for number in 0..messages {
        let room = room(rng.random_range(0..rooms));
        let part = partition_of(&room, config.nats.partitions);
        let user = format!("user{:03}", rng.random_range(0..500));
        let id = format!("m{number:08}");
        let mut headers = HeaderMap::new();
        headers.insert(header::MSG_ID, format!("{room}/{user}/{id}"));
        headers.insert(header::FROM, user);
        headers.insert(header::ID, id);
        let body = json!({ "text": text(&mut rng) }).to_string();
        let subject = subjects.publish(&region, part, &room, Class::Msg);
        acks.push(
            jetstream
                .publish_with_headers(subject, headers, body.into())
                .await
                .unwrap(),
        );
        if acks.len() == 1_000 || number + 1 == messages {
            for ack in acks.drain(..) {
                ack.await.unwrap();
            }
        }
    }
}

/// Memory that a process holds at most, in MiB.
fn peak_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024
}

async fn start_history(mesh: &Mesh, mongodb: &str, database: &str) -> Process {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let env = [
        ("NATTER__HISTORY__LISTEN", address.to_string()),
        ("NATTER__MONGODB__URL", mongodb.to_owned()),
        ("NATTER__MONGODB__DATABASE", database.to_owned()),
    ];
    let spec = Spec {
        name: "history".to_owned(),
        program: natter(),
        args: vec![
            "history".into(),
            "--config".into(),
            mesh.dir().join("natter.toml").into(),
        ],
        env: env
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        log: mesh.dir().join("history.log"),
        ready: answers(address, "/healthz"),
        alive: Arc::new(|_pid| Box::pin(async { Ok(()) })),
        ready_within: LONG,
        stop_within: LONG,
    };
    let mut process = Process::new(launcher(), spec);
    process.start().await.unwrap();
    process
}

/// Waits until the collection has so many documents.
async fn ingested(client: &mongodb::Client, database: &str, messages: usize) {
    let collection = client
        .database(database)
        .collection::<RawDocumentBuf>("messages");
    while collection.estimated_document_count().await.unwrap() < messages as u64 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn rate(messages: usize, took: Duration) -> f64 {
    messages as f64 / took.as_secs_f64()
}

fn micros(took: Duration, messages: usize) -> f64 {
    took.as_secs_f64() * 1e6 / messages as f64
}

/// One comparison: the service empties full streams, then a loop inserts the documents that it made.
async fn compare(nats: &str, mongod: &support::DedicatedMongod) {
    let mesh = Mesh::without_edges(nats, "").await;
    publish(&mesh.config, MESSAGES, 200).await;
    let (client, pid) = (
        mongodb::Client::with_uri_str(mongod.url()).await.unwrap(),
        mongod.server.pid().unwrap(),
    );
    let database = unique("ingest");
    let before = cpu_time(pid);
    let started = Instant::now();
    let mut history = start_history(&mesh, &mongod.url(), &database).await;
    ingested(&client, &database, MESSAGES).await;
    let took = started.elapsed();
    let service = history.pid().unwrap();
    println!(
        "service               {:>7.0} /s   service {:>5.1} µs, mongod {:>5.1} µs of CPU a message, service at most {} MiB",
        rate(MESSAGES, took),
        micros(cpu_time(service), MESSAGES),
        micros(cpu_time(pid).saturating_sub(before), MESSAGES),
        peak_mib(service),
    );
    history.stop().await;

    let source = client
        .database(&database)
        .collection::<RawDocumentBuf>("messages");
    let documents: Vec<RawDocumentBuf> = source
        .find(doc! {})
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(documents.len(), MESSAGES);
    for in_flight in [1, 4] {
        let bare = unique("bare");
        let mut config = mesh.config.mongodb.clone();
        config.url = serde_json::from_value(json!(mongod.url())).unwrap();
        config.database.clone_from(&bare);
        Store::open(&config).await.unwrap().prepare().await.unwrap();
        let target = client
            .database(&bare)
            .collection::<RawDocumentBuf>("messages");
        let before = cpu_time(pid);
        let started = Instant::now();
        stream::iter(documents.chunks(BATCH))
            .for_each_concurrent(in_flight, |batch| {
                let insert = target.insert_many(batch).ordered(false);
                async move { drop(insert.await.unwrap()) }
            })
            .await;
        println!(
            "bare loop, {in_flight} in flight {:>7.0} /s   mongod {:>5.1} µs of CPU a message   ratio {:.2}",
            rate(MESSAGES, started.elapsed()),
            micros(cpu_time(pid).saturating_sub(before), MESSAGES),
            started.elapsed().as_secs_f64() / took.as_secs_f64(),
        );
        client.database(&bare).drop().await.unwrap();
    }
    client.database(&database).drop().await.unwrap();
}

/// Times calls one after the other; prints their median, 99th percentile and slowest.
async fn timed<F: Future<Output = Value>>(what: &str, calls: usize, mut call: impl FnMut() -> F) {
    let mut took = Vec::with_capacity(calls);
    let mut messages = 0;
    for _ in 0..calls {
        let started = Instant::now();
        let answer = call().await;
        took.push(started.elapsed());
        messages += answer["messages"].as_array().map_or(0, Vec::len);
        assert!(answer.get("partial").is_none(), "{answer}");
    }
    took.sort();
    let ms = |at: usize| took[at.min(took.len() - 1)].as_secs_f64() * 1e3;
    println!(
        "{what:<44} p50 {:>7.2} ms   p99 {:>7.2} ms   max {:>7.2} ms   {:.1} messages",
        ms(calls / 2),
        ms(calls * 99 / 100),
        ms(calls),
        messages as f64 / calls as f64,
    );
}

async fn history(commands: &Commands, fields: Value) -> Value {
    let reply = commands.call("history", fields).await.unwrap().json();
    assert_eq!(reply["op"], "history", "{reply}");
    reply
}

/// A GET with a token; the answer's JSON, `null` where it has no body.
async fn get(address: std::net::SocketAddr, path: &str, headers: &str) -> Value {
    let headers = format!("Authorization: Bearer {}\r\n{headers}", token("bench"));
    let (status, body) = http(address, "GET", path, &headers, "").await.unwrap();
    assert!([200, 304].contains(&status), "{status} {body}");
    serde_json::from_str(&body).unwrap_or_default()
}

async fn pages(nats: &str, mongod: &support::DedicatedMongod) {
    let mut mesh = Mesh::start(nats, 1, "").await;
    let started = Instant::now();
    publish(&mesh.config, LARGE, ROOMS).await;
    eprintln!("{LARGE} published in {:?}", started.elapsed());
    let database = unique("pages");
    let client = mongodb::Client::with_uri_str(mongod.url()).await.unwrap();
    let started = Instant::now();
    let service = start_history(&mesh, &mongod.url(), &database).await;
    ingested(&client, &database, LARGE).await;
    let pid = mongod.server.pid().unwrap();
    println!(
        "{LARGE} messages in {ROOMS} rooms: {:.0} /s into MongoDB, mongod at most {} MiB",
        rate(LARGE, started.elapsed()),
        peak_mib(pid)
    );
    let sizes = client
        .database(&database)
        .run_command(doc! { "collStats": "messages" })
        .await
        .unwrap();
    println!(
        "indexes and documents: {} {} {}",
        sizes.get("storageSize").unwrap(),
        sizes.get("totalIndexSize").unwrap(),
        sizes.get("indexSizes").unwrap()
    );

    let connection = mesh.connect(0, "bench").await;
    let commands = connection.commands().clone();
    let mut rng = StdRng::seed_from_u64(11);
    let mut anchors = Vec::new();
    for _ in 0..CALLS {
        let room = room(rng.random_range(0..ROOMS));
        let page = history(&commands, json!({ "room": room, "limit": 200 })).await;
        let messages = page["messages"].as_array().unwrap();
        let message = &messages[rng.random_range(0..messages.len())];
        anchors.push((
            room,
            message["cursor"].clone(),
            format!(
                "{}/{}",
                message["from"].as_str().unwrap(),
                message["id"].as_str().unwrap()
            ),
        ));
    }
    for limit in [50, 200] {
        timed(&format!("newest page of {limit}"), CALLS, || {
            let room = room(rng.random_range(0..ROOMS));
            history(&commands, json!({ "room": room, "limit": limit }))
        })
        .await;
    }
    let mut next = anchors.iter().cycle();
    timed("page of 50 before a cursor", CALLS, || {
        let (room, cursor, _) = next.next().unwrap();
        history(
            &commands,
            json!({ "room": room, "before": cursor, "limit": 50 }),
        )
    })
    .await;
    timed("page of 50 from the room's beginning", CALLS, || {
        let (room, ..) = next.next().unwrap();
        history(&commands, json!({ "room": room, "after": "", "limit": 50 }))
    })
    .await;
    timed("page of 50 around a message id", CALLS, || {
        let (room, _, reference) = next.next().unwrap();
        history(
            &commands,
            json!({ "room": room, "around": reference, "limit": 50 }),
        )
    })
    .await;
    let address = mesh.edges[0].address;
    timed("search in a room: a rare word", CALLS / 5, || {
        let room = room(rng.random_range(0..ROOMS));
        let path = format!("/v1/rooms/{room}/search?q=w{}", rng.random_range(0..50_000));
        async move { get(address, &path, "").await }
    })
    .await;
    timed("search in a room: a frequent word", CALLS / 5, || {
        let room = room(rng.random_range(0..ROOMS));
        let path = format!("/v1/rooms/{room}/search?q=hello");
        async move { get(address, &path, "").await }
    })
    .await;
    timed("search in a room: part of a Korean word", CALLS / 5, || {
        let room = room(rng.random_range(0..ROOMS));
        let path = format!("/v1/rooms/{room}/search?q=%EC%95%88%EB%85%95");
        async move { get(address, &path, "").await }
    })
    .await;
    timed("search in all rooms: a rare word", CALLS / 5, || {
        let path = format!("/v1/search?q=w{}", rng.random_range(0..50_000));
        async move { get(address, &path, "").await }
    })
    .await;
    timed("search in all rooms: a frequent word", 20, || async move {
        get(address, "/v1/search?q=hello", "").await
    })
    .await;
    drop(service);
    for edge in &mut mesh.edges {
        edge.process.stop().await;
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let nats = dedicated_nats().await;
        let mongod = dedicated_mongod().await;
        for run in 1..=RUNS {
            println!("ingest of {MESSAGES} messages, run {run}");
            compare(&nats.url(), &mongod).await;
        }
        pages(&nats.url(), &mongod).await;
    });
}
