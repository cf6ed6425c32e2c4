//! What was said in durable rooms is in MongoDB, once, whatever fails on the way.

mod storm;

use std::{collections::BTreeSet, process::Output, time::Duration};

use futures_util::TryStreamExt as _;
use mongodb::bson::{Document as Fields, doc};
use natter::testing::{
    bus::{Connection, Reader},
    history::{Status, status},
    servers::{Mongod, MongodOptions, free_port},
    store::Store,
};
use serde_json::{Value, json};

use crate::support::{
    self, LONG, eventually, is_running, launcher,
    mesh::{Mesh, http, token},
    mongodb_url, nats_url, signal,
};

/// The collection of messages of a mesh.
async fn messages(mesh: &Mesh) -> mongodb::Collection<Fields> {
    let client = mongodb::Client::with_uri_str(mesh.config.mongodb.url.expose());
    let database = client
        .await
        .unwrap()
        .database(&mesh.config.mongodb.database);
    database.collection("messages")
}

/// The `_id`s of all messages.
async fn keys(mesh: &Mesh) -> BTreeSet<String> {
    let messages = messages(mesh).await;
    let found = messages
        .find(doc! { "place": { "$exists": true } })
        .projection(doc! { "_id": 1 });
    let found: Vec<Fields> = found.await.unwrap().try_collect().await.unwrap();
    let keys: BTreeSet<String> = found
        .iter()
        .map(|document| document.get_str("_id").unwrap().to_owned())
        .collect();
    assert_eq!(keys.len(), found.len());
    keys
}

/// Publishes over HTTP at the first edge.
async fn say(mesh: &Mesh, room: &str, id: &str, body: Value) {
    let headers = format!("Authorization: Bearer {}\r\n", token("kim"));
    let body = json!({ "id": id, "body": body }).to_string();
    let path = format!("/v1/rooms/{room}/messages");
    let (status, answer) = http(mesh.edges[0].address, "POST", &path, &headers, &body)
        .await
        .unwrap();
    assert_eq!(status, 200, "{answer}");
}

async fn lag(mesh: &Mesh) -> Status {
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &mesh.config.nats);
    status(&connection, &reader, &mesh.config).await.unwrap()
}

/// Waits until everything is confirmed.
async fn caught_up(mesh: &Mesh, deadline: Duration) {
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &mesh.config.nats);
    eventually("history has everything", deadline, async || {
        match status(&connection, &reader, &mesh.config).await {
            Ok(Status {
                lag_messages: 0, ..
            }) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn run(mesh: &Mesh, args: &[&str]) -> Output {
    mesh.command(args).await.output().unwrap()
}

/// The lines of `natter history dead --json`.
async fn dead(mesh: &Mesh) -> Vec<Value> {
    let output = run(mesh, &["history", "dead", "--json"]).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn a_poison_message_becomes_a_dead_letter_and_stops_nobody() {
    let toml = "[history]\nmax_deliver = 2\n[nats]\npartitions = 1\n";
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), toml).await;
    let room = "chat:poison";
    say(&mesh, room, "first", json!("before")).await;
    caught_up(&mesh, LONG).await;
    let database = messages(&mesh)
        .await
        .client()
        .database(&mesh.config.mongodb.database);
    let refuse = |what: Fields| {
        let command = doc! { "collMod": "messages", "validator": what };
        let database = database.clone();
        async move { database.run_command(command).await.unwrap() }
    };
    refuse(doc! { "_id": { "$not": { "$regex": "bad" } } }).await;

    say(&mesh, room, "bad-1", json!({"text": "안녕"})).await;
    // Straight into the stream, under a subject that is no room's.
    let nats = natter::testing::mesh::provision::connect(&mesh.config.nats)
        .await
        .unwrap();
    let region = &mesh.config.region;
    let odd = format!("{}.in.{region}.0.odd", mesh.config.nats.prefix);
    nats.request(odd.clone(), "odd".into()).await.unwrap();
    for n in 0..20 {
        say(&mesh, room, &format!("good-{n}"), json!(n)).await;
    }
    // The others are there while it is still tried.
    let good = |keys: &BTreeSet<String>| keys.iter().filter(|key| key.contains("good")).count();
    eventually("the others are written", LONG, async || {
        match good(&keys(&mesh).await) {
            20 => Ok(()),
            n => Err(n.to_string()),
        }
    })
    .await;
    caught_up(&mesh, LONG).await;
    let letters = dead(&mesh).await;
    let by = |letter: &&Value, subject: &str| letter["subject"] == subject;
    assert_eq!(letters.len(), 2, "{letters:?}");
    let odd_letter = letters.iter().find(|letter| by(letter, &odd)).unwrap();
    assert!(
        odd_letter["reason"]
            .as_str()
            .unwrap()
            .contains("not a room's")
    );
    let letter = letters.iter().find(|letter| !by(letter, &odd)).unwrap();
    assert_eq!(
        (&letter["room"], &letter["id"]),
        (&json!(room), &json!("bad-1"))
    );
    assert_eq!(
        (&letter["from"], &letter["body"]),
        (&json!("kim"), &Value::Null)
    );
    let reason = letter["reason"].as_str().unwrap();
    assert!(reason.to_lowercase().contains("validation"), "{reason}");
    assert_eq!(lag(&mesh).await.dead_letters, 2);
    let shown = run(&mesh, &["history", "dead", "--body"]).await;
    assert!(String::from_utf8_lossy(&shown.stdout).contains(r#"{"text":"안녕"}"#));

    // As long as the cause is there, a retry says so.
    let number = letter["number"].to_string();
    let output = run(&mesh, &["history", "retry", &number]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("kim/bad-1"));
    refuse(doc! {}).await;
    let output = run(&mesh, &["history", "retry", &number]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let key = format!("{room}/kim/bad-1");
    assert!(keys(&mesh).await.contains(&key));
    let store = Store::open(&mesh.config.mongodb).await.unwrap();
    let found = store.get(&[key]).await.unwrap();
    assert_eq!(found[0].folded.body(), Some(r#"{"text":"안녕"}"#));
    assert_eq!(
        found[0].folded.base.as_ref().unwrap().place.seq,
        letter["seq"].as_u64().unwrap()
    );
    let left = dead(&mesh).await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["subject"], json!(odd));
}

#[tokio::test]
async fn a_worker_waits_for_mongodb_and_says_so() {
    let port = free_port().unwrap();
    let toml = "[nats]\npartitions = 1\n[mongodb]\nread_timeout = \"500ms\"\n";
    let url = format!("mongodb://127.0.0.1:{port}/?replicaSet=natter");
    let mut mesh = Mesh::with_history(nats_url(), &url, (1, 0), toml).await;
    say(
        &mesh,
        "chat:early",
        "one",
        json!("said before MongoDB was there"),
    )
    .await;
    let number = mesh.add_worker("/healthz").await;
    let address = mesh.workers[number].address;
    let log = mesh.worker_log(number);
    eventually("it says what it waits for", LONG, async || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.contains("waiting for MongoDB")
            .then_some(())
            .ok_or(text)
    })
    .await;
    let (code, body) = http(address, "GET", "/readyz", "", "").await.unwrap();
    assert_eq!((code, body.as_str()), (503, "starting\n"));
    // The lag shows without a worker.
    assert_eq!(lag(&mesh).await.lag_messages, 1);
    let pid = mesh.workers[number].process.pid().unwrap();
    assert!(is_running(pid));

    let dir = tempfile::tempdir().unwrap();
    let options = MongodOptions {
        binary: support::binaries().await.mongod.clone().unwrap(),
        dir: dir.path().join("mongo"),
        log: None,
        port,
    };
    let _mongod = Mongod::start(launcher(), options).await.unwrap();
    caught_up(&mesh, LONG).await;
    assert_eq!(keys(&mesh).await.len(), 1);
    assert!(is_running(pid), "it was started again");
    let (code, _) = http(address, "GET", "/readyz", "", "").await.unwrap();
    assert_eq!(code, 200);

    // A planned end writes what is there and is clean.
    signal(pid, rustix::process::Signal::TERM);
    let status = mesh.workers[number].process.exited().await;
    assert!(status.unwrap().success());
}

#[tokio::test]
async fn wrong_credentials_end_nothing() {
    let url = mongodb_url().replacen("mongodb://", "mongodb://kim:wrong-secret@", 1);
    let mut mesh = Mesh::with_history(nats_url(), &url, (0, 0), "[nats]\npartitions = 1\n").await;
    let number = mesh.add_worker("/healthz").await;
    let log = mesh.worker_log(number);
    let text = eventually("it says what is wrong", LONG, async || {
        let text = std::fs::read_to_string(&log).unwrap();
        if text.contains("waiting for MongoDB") {
            Ok(text)
        } else {
            Err(text)
        }
    })
    .await;
    assert!(text.to_lowercase().contains("authentication"), "{text}");
    assert!(!text.contains("wrong-secret"), "{text}");
    assert!(is_running(mesh.workers[number].process.pid().unwrap()));
}

/// A planned end while MongoDB is away is clean, and what was in hand is written by the next worker.
#[tokio::test]
async fn a_worker_ends_in_order_without_mongodb() {
    let mut mongod = support::dedicated_mongod().await;
    // What is not given back does not come again within this test.
    let toml = "[nats]\npartitions = 1\n[mongodb]\nread_timeout = \"500ms\"\n[history]\nack_wait = \"1h\"\n";
    let mut mesh = Mesh::with_history(nats_url(), &mongod.url(), (1, 1), toml).await;
    say(&mesh, "chat:a", "before", json!(1)).await;
    caught_up(&mesh, LONG).await;
    mongod.server.kill().await;
    for n in 0..20 {
        say(&mesh, "chat:a", &format!("m{n}"), json!(n)).await;
    }
    eventually("the worker has them in hand", LONG, async || {
        let status = lag(&mesh).await;
        (status.partitions[0].ack_pending == 20)
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    })
    .await;
    let process = &mut mesh.workers[0].process;
    signal(process.pid().unwrap(), rustix::process::Signal::TERM);
    assert!(process.exited().await.unwrap().success());
    let text = std::fs::read_to_string(mesh.worker_log(0)).unwrap();
    assert!(!text.contains("did not stop cleanly"), "{text}");
    // Said once, however often it was tried.
    assert_eq!(text.matches("does not take a batch").count(), 1, "{text}");
    mongod.server.restart().await.unwrap();
    mesh.workers[0].process.start().await.unwrap();
    caught_up(&mesh, LONG).await;
    assert_eq!(keys(&mesh).await.len(), 21);
}

/// What is said while there is no primary is written when there is one again.
#[tokio::test]
async fn batches_wait_for_a_primary() {
    let mongod = support::dedicated_mongod().await;
    let toml = "[nats]\npartitions = 1\n[mongodb]\nread_timeout = \"500ms\"\n";
    let mesh = Mesh::with_history(nats_url(), &mongod.url(), (1, 1), toml).await;
    say(&mesh, "chat:a", "before", json!(1)).await;
    caught_up(&mesh, LONG).await;
    let worker = mesh.workers[0].process.pid().unwrap();

    let url = mongod
        .url()
        .replace("replicaSet=natter", "directConnection=true");
    let client = mongodb::Client::with_uri_str(url).await.unwrap();
    let admin = client.database("admin");
    admin
        .run_command(doc! { "replSetStepDown": 3600, "force": true })
        .await
        .unwrap();
    for n in 0..20 {
        say(&mesh, "chat:a", &format!("m{n}"), json!(n)).await;
    }
    let log = mesh.worker_log(0);
    let text = eventually("it says that it can't write", LONG, async || {
        let text = std::fs::read_to_string(&log).unwrap();
        if text.contains("does not take a batch") {
            Ok(text)
        } else {
            Err(text)
        }
    })
    .await;
    assert_eq!(lag(&mesh).await.lag_messages, 20, "{text}");
    assert_eq!(lag(&mesh).await.dead_letters, 0, "{text}");

    // A replica set of one elects itself.
    admin
        .run_command(doc! { "replSetFreeze": 0 })
        .await
        .unwrap();
    caught_up(&mesh, LONG).await;
    assert_eq!(keys(&mesh).await.len(), 21);
    assert!(is_running(worker), "it was started again");
}

/// Messages that fill a request by bytes, a NATS server that is killed, and a stream that begins anew.
#[tokio::test]
async fn the_consumer_goes_on_after_all_that_may_happen_to_its_stream() {
    let mut nats = support::dedicated_nats().await;
    let toml = "[nats]\npartitions = 1\n[history]\nbatch_bytes = \"64KiB\"\nack_wait = \"3s\"\n";
    let mesh = Mesh::with_history(&nats.url(), mongodb_url(), (1, 1), toml).await;
    let large = "x".repeat(60_000);
    for n in 0..30 {
        say(&mesh, "chat:a", &format!("large-{n}"), json!(large)).await;
    }
    caught_up(&mesh, LONG).await;
    assert_eq!(keys(&mesh).await.len(), 30);
    let log = std::fs::read_to_string(mesh.worker_log(0)).unwrap();
    assert!(
        !log.contains("is lost"),
        "a request that is full is no loss: {log}"
    );

    nats.server.kill().await;
    nats.server.restart().await.unwrap();
    edge_ready(&mesh).await;
    say(&mesh, "chat:a", "after-restart", json!(1)).await;
    caught_up(&mesh, LONG).await;
    assert_eq!(keys(&mesh).await.len(), 31);

    let client = natter::testing::mesh::provision::connect(&mesh.config.nats)
        .await
        .unwrap();
    let delete = format!("$JS.API.STREAM.DELETE.ROOMS_{}_0", mesh.config.region);
    client.request(delete, "".into()).await.unwrap();
    mesh.provision().await;
    // The first may still be taken for one of before by the edge, which has the old epoch; history has not.
    for n in 0..3 {
        say(&mesh, "chat:a", &format!("anew-{n}"), json!(n)).await;
    }
    caught_up(&mesh, LONG).await;
    let all = keys(&mesh).await;
    assert_eq!(all.len(), 34, "{all:?}");
    let store = Store::open(&mesh.config.mongodb).await.unwrap();
    let of = async |id: &str| {
        let found = store.get(&[format!("chat:a/kim/{id}")]).await.unwrap();
        found[0].folded.base.clone().unwrap().place
    };
    let (before, after) = (of("after-restart").await, of("anew-0").await);
    assert_ne!(before.epoch, after.epoch);
    assert_eq!((before.seq, after.seq), (31, 1));
}

/// Waits until the first edge takes messages.
async fn edge_ready(mesh: &Mesh) {
    eventually("the edge is ready", LONG, async || {
        match http(mesh.edges[0].address, "GET", "/readyz", "", "").await {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn a_namespace_without_history_is_not_written() {
    let toml = "[namespaces.notes]\ndurable = true\ntyping = false\nhistory = false\n[nats]\npartitions = 2\n";
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 2), toml).await;
    for n in 0..10 {
        for room in ["notes:a", "notes:b", "chat:a", "chat:b"] {
            say(&mesh, room, &format!("m{n}"), json!(n)).await;
        }
    }
    caught_up(&mesh, LONG).await;
    let keys = keys(&mesh).await;
    assert_eq!(keys.len(), 20, "{keys:?}");
    assert!(keys.iter().all(|key| key.starts_with("chat:")), "{keys:?}");
    let output = run(&mesh, &["history", "status", "--json"]).await;
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["lag_messages"], 0);
    assert_eq!(status["partitions"].as_array().unwrap().len(), 2);
}
