//! One annotation for each message, whoever is killed, and with whichever configuration it goes on.

use std::collections::BTreeSet;

use natter::testing::{
    bus::{Connection, consumer_state},
    runtime::unix_ms,
    subject::{rooms_stream, worker_consumer},
};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{
    LIMITS, annotated, letters, log, metric, metric_is, said_by_hand, say, start, text, worker,
};
use crate::support::{
    LONG, dedicated_nats,
    endpoint::{Endpoint, Say},
    eventually,
    mesh::Mesh,
};

/// Waits until a worker has no message in hand or before it, as the server says.
async fn all_is_done(mesh: &Mesh, worker: &str) {
    let (config, consumer) = (&mesh.config, worker_consumer(worker));
    let connection = Connection::open(&config.nats, "test").await.unwrap();
    eventually("all is done", LONG, async || {
        for part in 0..config.nats.partitions {
            let stream = rooms_stream(&config.region(), part);
            let state = consumer_state(&connection, &stream, &consumer, LONG).await;
            let state = state
                .map_err(|error| error.to_string())?
                .ok_or("no consumer")?;
            if state.pending + state.ack_pending > 0 {
                return Err(format!("{state:?}"));
            }
        }
        Ok(())
    })
    .await;
    connection.close().await;
}

/// Checks that each message `m0`, `m1` … of a room has one annotation.
async fn each_has_one(mesh: &Mesh, room: &str, count: usize) {
    let said = log(mesh, room, "annotation").await;
    let targets = said
        .iter()
        .filter_map(|stored| stored.record.target.clone());
    let targets: BTreeSet<String> = targets.collect();
    let all = (0..count).map(|n| format!("kim/m{n}")).collect();
    assert_eq!((targets, said.len()), (all, count), "{room}");
}

/// The process is killed with jobs in hand: some were not answered, of one the annotation is stored, and the stream has
/// forgotten its id when the message is redelivered.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_leaves_no_message_with_two_annotations_or_none() {
    let endpoint = Endpoint::closed(|asked| Say::Json(json!({"id": asked.id()}))).await;
    let toml = worker(
        "sure",
        &endpoint,
        "timeout = '60s'\nalert = 'sure.id = \"m0\"'",
    );
    let (mesh, mut workers) = start(&format!("streams.duplicate_window = '1s'\n{toml}")).await;
    for n in 0..5 {
        text(&mesh, "chat:a", &format!("m{n}"), "hi").await;
    }
    let asked = endpoint.asked_times(5).await;
    workers.process.kill().await;
    // What it had still published of the first one.
    let first = asked.iter().find(|asked| asked.id() == "m0").unwrap();
    let of = (first.header("webhook-id"), "kim/m0");
    let body = json!({"sure": {"id": "m0"}});
    said_by_hand(&mesh, "chat:a", "sure", of, &body).await;
    endpoint.open_gate();
    let workers = mesh.start_workers().await;
    for n in 0..5 {
        let id = format!("m{n}");
        annotated(&mesh, "chat:a", &id, "sure", json!({"id": id})).await;
    }
    all_is_done(&mesh, "sure").await;
    let said = log(&mesh, "chat:a", "annotation").await;
    assert_eq!(said.len(), 5, "{said:?}");
    // The first one was not asked about again, and yet the rest of its work was done.
    let again = endpoint.asked().into_iter().skip(asked.len());
    let mut again: Vec<String> = again.map(|asked| asked.id().to_owned()).collect();
    again.sort_unstable();
    assert_eq!(again, ["m1", "m2", "m3", "m4"]);
    let told = log(&mesh, "chat:a", "system").await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(metric(&workers, "alerts_total").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_server_that_is_killed_costs_no_annotation_and_doubles_none() {
    let mut nats = dedicated_nats().await;
    let endpoint = Endpoint::closed(|asked| Say::Json(json!({"id": asked.id()}))).await;
    // Only failures of the endpoint make dead letters.
    let more = "concurrency = 4\ntimeout = '60s'\nmax_deliver = 1";
    let toml = worker("sure", &endpoint, more);
    let mesh = Mesh::start(&nats.url(), 1, &format!("{LIMITS}{toml}")).await;
    let _workers = mesh.start_workers().await;
    for n in 0..20 {
        text(&mesh, "chat:a", &format!("m{n}"), "hi").await;
    }
    endpoint.asked_times(4).await;
    nats.server.kill().await;
    // Nothing can be published now.
    endpoint.open_gate();
    nats.server.restart().await.unwrap();
    for n in 0..20 {
        let id = format!("m{n}");
        annotated(&mesh, "chat:a", &id, "sure", json!({"id": id})).await;
    }
    all_is_done(&mesh, "sure").await;
    each_has_one(&mesh, "chat:a", 20).await;
    assert!(endpoint.most_open() <= 4, "{}", endpoint.most_open());
    assert_eq!(letters(&mesh).await, [json!(null); 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_are_killed_at_any_time_annotate_each_message_once() {
    let endpoint = Endpoint::start(|asked| Say::Json(json!({"id": asked.id()}))).await;
    let (mesh, mut workers) = start(&worker("sure", &endpoint, "concurrency = 4")).await;
    let rooms = ["chat:a", "chat:b", "chat:c"];
    let mut asked = 0;
    for n in 0..30 {
        for room in rooms {
            text(&mesh, room, &format!("m{n}"), "hi").await;
        }
        if n % 10 == 9 {
            endpoint.asked_times(asked + 5).await;
            workers.process.kill().await;
            asked = endpoint.asked().len();
            workers = mesh.start_workers().await;
        }
    }
    all_is_done(&mesh, "sure").await;
    for room in rooms {
        each_has_one(&mesh, room, 30).await;
    }
    assert!(endpoint.most_open() <= 4, "{}", endpoint.most_open());
    assert_eq!(letters(&mesh).await, [json!(null); 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_share_the_messages_and_one_goes_on_with_those_of_another() {
    let endpoint = Endpoint::closed(|asked| Say::Json(json!({"id": asked.id()}))).await;
    let more = "concurrency = 2\ntimeout = '60s'";
    let (mesh, mut first) = start(&worker("shared", &endpoint, more)).await;
    let second = mesh.start_workers().await;
    for n in 0..20 {
        text(&mesh, "chat:a", &format!("m{n}"), "hi").await;
    }
    endpoint.asked_times(4).await;
    metric_is(&first, "open", 2).await;
    metric_is(&second, "open", 2).await;
    first.process.kill().await;
    endpoint.open_gate();
    all_is_done(&mesh, "shared").await;
    each_has_one(&mesh, "chat:a", 20).await;
    assert_eq!(endpoint.most_open(), 4);
    assert_eq!(metric(&second, "annotated_total").await, 20);
}

/// A server that is killed may lose what it knows of a consumer's last deliveries and acknowledgements. It then delivers
/// messages once more as if for the first time, and the stream may have forgotten the ids of their annotations.
#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_is_found_although_the_delivery_claims_to_be_the_first() {
    let endpoint = Endpoint::start(|asked| Say::Json(json!({"id": asked.id()}))).await;
    let toml = worker("sure", &endpoint, "");
    let (mesh, mut workers) = start(&format!("streams.duplicate_window = '1s'\n{toml}")).await;
    workers.process.kill().await;
    let ack = say(&mesh, "chat:a", json!({"id": "m0", "body": "hi"})).await;
    let digest = Sha256::digest("$worker.sure\nchat:a/kim/m0");
    let hex: String = digest[..16].iter().map(|it| format!("{it:02x}")).collect();
    let body = json!({"sure": {"id": "m0"}});
    said_by_hand(
        &mesh,
        "chat:a",
        "sure",
        (&format!("w~{hex}"), "kim/m0"),
        &body,
    )
    .await;
    let ts = ack["ts"].as_u64().unwrap();
    eventually("the stream has forgotten the id", LONG, async || {
        let age = unix_ms().saturating_sub(ts);
        (age > 3000).then_some(()).ok_or(age.to_string())
    })
    .await;
    let _workers = mesh.start_workers().await;
    text(&mesh, "chat:a", "m1", "hi").await;
    annotated(&mesh, "chat:a", "m1", "sure", json!({"id": "m1"})).await;
    all_is_done(&mesh, "sure").await;
    each_has_one(&mesh, "chat:a", 2).await;
    let asked = endpoint.asked();
    assert!(asked.iter().all(|asked| asked.id() == "m1"), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_with_a_changed_configuration() {
    let endpoint = Endpoint::start(|_| Say::Status(503)).await;
    let (mesh, mut workers) = start(&worker("new", &endpoint, "")).await;
    text(&mesh, "chat:a", "m0", "hi").await;
    text(&mesh, "chat:b", "m0", "hi").await;
    // Both wait for another attempt.
    endpoint.asked_times(2).await;
    workers.process.kill().await;
    text(&mesh, "chat:a", "m1", "hi").await;
    text(&mesh, "chat:b", "m1", "hi").await;
    let path = mesh.dir().join("natter.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let changed = config.replace("\"chat:*\"", "\"chat:b\"").replace(
        "annotation = \"new\"",
        "annotation = \"other\"\nordered = true",
    );
    assert_ne!(config, changed);
    std::fs::write(&path, changed).unwrap();
    let before = endpoint.asked().len();
    endpoint.behave(|asked| Say::Json(json!({"id": asked.id()})));
    let _workers = mesh.start_workers().await;
    for id in ["m0", "m1"] {
        annotated(&mesh, "chat:b", id, "other", json!({"id": id})).await;
    }
    all_is_done(&mesh, "new").await;
    each_has_one(&mesh, "chat:a", 0).await;
    each_has_one(&mesh, "chat:b", 2).await;
    let asked = endpoint.asked();
    let rooms = asked[before..].iter().map(|asked| &asked.body["room"]);
    assert!(rooms.clone().all(|room| room == "chat:b"), "{asked:?}");
}
