//! Workers: annotations by HTTP, whatever the endpoints do and whoever is killed.

mod kills;

use std::time::Duration;

use async_nats::HeaderMap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use natter::testing::{
    bus::{Connection, Reader, Stored},
    mesh::provision::connect,
    model::{Class, Epoch, RoomId, partition_of},
    runtime::{unix_ms, unix_s},
    subject::{Subjects, rooms_stream},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::time::timeout;

use crate::support::{
    LONG,
    endpoint::{Asked, Endpoint, Say},
    eventually, is_running,
    mesh::{Edge, Mesh, ask, http, token},
    mongodb_url, nats_url,
    raw::Raw,
    up::Up,
};

const SECRET: &str = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The configuration of a worker of this endpoint in all rooms of `chat`, with more keys.
pub(crate) fn worker(name: &str, endpoint: &Endpoint, more: &str) -> String {
    let url = endpoint.url();
    format!(
        "[[workers]]\nname = '{name}'\nrooms = ['chat:*']\nurl = '{url}'\nsecret = 'whsec_{SECRET}'\n\
         annotation = '{name}'\nallow = ['127.0.0.1']\n{more}\n"
    )
}

/// So that a test may say much at once.
const LIMITS: &str = "limits.commands_per_second = 100000\nlimits.commands_burst = 100000\n";

/// An edge with these workers, without MongoDB, and the process that runs them.
async fn start(toml: &str) -> (Mesh, Edge) {
    let mesh = Mesh::start(nats_url(), 1, &format!("{LIMITS}{toml}")).await;
    let workers = mesh.start_workers().await;
    (mesh, workers)
}

async fn call(mesh: &Mesh, method: &str, path: &str, body: Value) -> Value {
    let (status, answer) = ask(mesh.edges[0].address, (method, path), &token("kim"), &body).await;
    assert!(
        (200..300).contains(&status),
        "{path} {body}: {status} {answer}"
    );
    answer
}

async fn say(mesh: &Mesh, room: &str, fields: Value) -> Value {
    call(mesh, "POST", &format!("/v1/rooms/{room}/messages"), fields).await
}

async fn text(mesh: &Mesh, room: &str, id: &str, text: &str) {
    say(mesh, room, json!({"id": id, "body": {"text": text}})).await;
}

/// A message as history shows it.
async fn shown(mesh: &Mesh, room: &str, id: &str) -> Result<Value, String> {
    let path = format!("/v1/rooms/{room}/messages?limit=100");
    let page = mesh.get(0, &path).await?;
    let messages = page["messages"].as_array().unwrap().iter();
    let found = messages.clone().find(|message| message["id"] == id);
    found.cloned().ok_or_else(|| page.to_string())
}

/// Waits until a message has an annotation.
async fn annotated(mesh: &Mesh, room: &str, id: &str, name: &str, value: Value) {
    eventually(&format!("{id} has its annotation"), LONG, async || {
        let message = shown(mesh, room, id).await?;
        match message["annotations"][name] == value {
            true => Ok(()),
            false => Err(message.to_string()),
        }
    })
    .await;
}

/// The entries of a kind in the log of a room, in its order.
async fn log(mesh: &Mesh, room: &str, kind: &str) -> Vec<Stored> {
    let (config, room) = (&mesh.config, RoomId::parse(room).unwrap());
    let connection = Connection::open(&config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &config.nats);
    let part = partition_of(&room, config.nats.partitions);
    let subjects = Subjects::new(&config.nats.prefix);
    let filter = subjects.publish(&config.region(), part, &room, Class::Ev);
    let stream = rooms_stream(&config.region(), part);
    let epoch = Epoch::parse("any").unwrap();
    let (all, after) = reader.log(&stream, epoch, &filter, 1).await.unwrap();
    assert_eq!(after, 0, "the log is longer than a page");
    connection.close().await;
    let of_kind = |stored: &Stored| stored.record.kind == Some(kind);
    all.into_iter().filter(of_kind).collect()
}

/// The value of a counter or gauge of the workers.
async fn metric(workers: &Edge, name: &str) -> u64 {
    let (_, text) = http(workers.address, "GET", "/metrics", "", "")
        .await
        .unwrap();
    let of_metric = |line: &&str| line.starts_with(&format!("natter_worker_{name}{{"));
    let values = text.lines().filter(of_metric);
    values
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

pub(crate) async fn metric_is(workers: &Edge, name: &str, value: u64) {
    eventually(
        &format!("{name} is {value}"),
        LONG,
        async || match metric(workers, name).await {
            found if found == value => Ok(()),
            found => Err(found.to_string()),
        },
    )
    .await;
}

/// `natter worker dead --json`, and what `natter worker retry` says.
pub(crate) async fn tool(mesh: &Mesh, args: &[&str]) -> (bool, String) {
    let mut command = mesh.command(args).await;
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

async fn letters(mesh: &Mesh) -> Vec<Value> {
    let (_, said) = tool(mesh, &["worker", "dead", "--json"]).await;
    said.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Waits until there are so many dead letters.
pub(crate) async fn dead(mesh: &Mesh, count: usize) -> Vec<Value> {
    eventually(&format!("{count} dead letters"), LONG, async || {
        let letters = letters(mesh).await;
        match letters.len() == count {
            true => Ok(letters),
            false => Err(format!("{letters:?}")),
        }
    })
    .await
}

/// Waits until who follows all rooms is told of `chat:a` with a summary that is right.
async fn told(staff: &mut Raw, is_right: impl Fn(&Value) -> bool) {
    let is_told = async {
        loop {
            let push = staff.json().await;
            let mut rooms = push["rooms"].as_array().into_iter().flatten();
            if rooms.any(|room| room["room"] == "chat:a" && is_right(room)) {
                return;
            }
        }
    };
    timeout(LONG, is_told).await.expect("nothing was told");
}

/// Publishes an annotation of a worker, as its process does.
pub(crate) async fn said_by_hand(
    mesh: &Mesh,
    room: &str,
    worker: &str,
    of: (&str, &str),
    body: &Value,
) {
    let ((id, target), parsed) = (of, RoomId::parse(room).unwrap());
    let subjects = Subjects::new(&mesh.config.nats.prefix);
    let part = partition_of(&parsed, mesh.config.nats.partitions);
    let subject = subjects.publish(&mesh.config.region(), part, &parsed, Class::Ev);
    let user = format!("$worker.{worker}");
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("Nats-Msg-Id", &*format!("{room}/{user}/{id}")),
        ("Natter-From", &user),
        ("Natter-Id", id),
        ("Natter-Kind", "annotation"),
        ("Natter-Target", target),
    ] {
        headers.insert(name, value);
    }
    let client = connect(&mesh.config.nats).await.unwrap();
    let request = async_nats::Request::new()
        .headers(headers)
        .payload(body.to_string().into());
    let ack = client.send_request(subject, request).await.unwrap();
    let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
    assert!(ack["seq"].is_u64(), "{ack}");
}

/// Checks a signature as the specification says, not as natter does.
fn assert_signed(asked: &Asked) {
    let (id, timestamp) = (
        asked.header("webhook-id"),
        asked.header("webhook-timestamp"),
    );
    let mut hmac = Hmac::<Sha256>::new_from_slice(&STANDARD.decode(SECRET).unwrap()).unwrap();
    hmac.update(&[format!("{id}.{timestamp}.").as_bytes(), &asked.raw].concat());
    let expected = format!("v1,{}", STANDARD.encode(hmac.finalize().into_bytes()));
    assert_eq!(asked.header("webhook-signature"), expected);
    assert!(unix_s().abs_diff(timestamp.parse().unwrap()) < 60);
    assert_eq!(asked.header("content-type"), "application/json");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_become_annotations_and_alerts() {
    let endpoint =
        Endpoint::start(
            |asked| match asked.body["message"]["body"]["text"].as_str().unwrap() {
                "nothing" => Say::Status(204),
                text => {
                    Say::Json(json!({"score": if text.contains("awful") { -0.9 } else { 0.1 }}))
                }
            },
        )
        .await;
    let toml = worker("mood", &endpoint, "alert = 'mood.score < -0.5'");
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), &toml).await;
    let workers = mesh.start_workers().await;
    let mut staff = Raw::open(mesh.edges[0].address, &token("staff")).await;
    let watch = json!({"op": "watch", "rid": 1, "pattern": "chat:*"});
    assert_eq!(staff.call(watch).await["watch"], 1);
    let group = json!({"namespace": "chat", "kind": "group", "name": "a", "members": ["kim", "lee"], "title": "A"});
    call(&mesh, "POST", "/v1/rooms", group).await;
    text(&mesh, "chat:a", "m1", "fine").await;
    annotated(&mesh, "chat:a", "m1", "mood", json!({"score": 0.1})).await;
    let asked = endpoint.asked();
    let [first] = &asked[..] else {
        panic!("{asked:?}")
    };
    assert_signed(first);
    let about = &first.body;
    assert_eq!(
        (&about["room"], &about["worker"]),
        (&json!("chat:a"), &json!("mood"))
    );
    assert_eq!(about["record"]["title"], "A", "{about}");
    let mut message = shown(&mesh, "chat:a", "m1").await.unwrap();
    message.as_object_mut().unwrap().remove("annotations");
    assert_eq!(about["message"], message, "as history shows it");
    assert_eq!(shown(&mesh, "chat:a", "m1").await.unwrap()["from"], "kim");
    text(&mesh, "chat:a", "m2", "nothing").await;
    metric_is(&workers, "empty_total", 1).await;
    // An edit is worked on with what the message is now.
    let edit = json!({"id": "e1", "kind": "edit", "target": "m1", "body": {"text": "awful"}});
    say(&mesh, "chat:a", edit).await;
    annotated(&mesh, "chat:a", "m1", "mood", json!({"score": -0.9})).await;
    let last = endpoint.asked().pop().unwrap();
    assert_eq!(last.body["message"]["body"]["text"], "awful");
    assert!(
        last.body["message"]["edited_at"].is_u64(),
        "{:?}",
        last.body
    );
    // The alert is in the record, in summaries, and told.
    let alert = eventually("the room is marked", LONG, async || {
        let record = mesh.get(0, "/v1/rooms/chat:a").await?;
        match &record["alert"] {
            Value::Null => Err(record.to_string()),
            alert => Ok(alert.clone()),
        }
    })
    .await;
    assert_eq!(
        (&alert["worker"], &alert["message"]),
        (&json!("mood"), &json!("kim/m1"))
    );
    assert!(unix_ms().abs_diff(alert["at"].as_u64().unwrap()) < 60_000);
    let inbox = call(&mesh, "GET", "/v1/inbox", Value::Null).await;
    assert_eq!(inbox["rooms"][0]["alert"], alert, "{inbox}");
    told(&mut staff, |room| room["alert"] == alert).await;
    eventually("the directory has it", LONG, async || {
        let found = mesh.get(0, "/v1/rooms?namespace=chat").await?;
        match found["rooms"][0]["alert"] == alert {
            true => Ok(()),
            false => Err(found.to_string()),
        }
    })
    .await;
    eventually("the room is told", LONG, async || {
        let told = log(&mesh, "chat:a", "system").await;
        let told: Vec<Value> = told
            .iter()
            .map(|stored| serde_json::from_slice(&stored.record.body).unwrap())
            .filter(|body: &Value| body["action"] == "alert")
            .collect();
        let expected = json!({"action": "alert", "by": "$worker.mood", "message": "kim/m1"});
        match told == [expected] {
            true => Ok(()),
            false => Err(format!("{told:?}")),
        }
    })
    .await;
    metric_is(&workers, "alerts_total", 1).await;
    let record = call(&mesh, "PATCH", "/v1/rooms/chat:a", json!({"alert": false})).await;
    assert_eq!(record["alert"], Value::Null);
    told(&mut staff, |room| room["alert"].is_null()).await;
    // A room that nobody has made gets a record.
    text(&mesh, "chat:b", "m3", "awful").await;
    eventually("the other room is marked", LONG, async || {
        let record = mesh.get(0, "/v1/rooms/chat:b").await?;
        match record["alert"]["message"] == "kim/m3" {
            true => Ok(()),
            false => Err(record.to_string()),
        }
    })
    .await;
    // A reaction and the annotations themselves are nothing for it.
    say(
        &mesh,
        "chat:a",
        json!({"kind": "reaction", "target": "m1", "body": "👍"}),
    )
    .await;
    text(&mesh, "chat:a", "m4", "the end").await;
    annotated(&mesh, "chat:a", "m4", "mood", json!({"score": 0.1})).await;
    assert_eq!(endpoint.asked().len(), 5);
    metric_is(&workers, "annotated_total", 4).await;
    metric_is(&workers, "pending", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn never_more_requests_are_open_than_allowed() {
    let endpoint = Endpoint::closed(|asked| Say::Json(json!({"id": asked.id()}))).await;
    let (mesh, workers) = start(&worker(
        "slow",
        &endpoint,
        "concurrency = 3\ntimeout = '60s'",
    ))
    .await;
    let count = 60;
    for room in ["chat:a", "chat:b", "chat:c"] {
        let messages: Vec<Value> = (0..count / 3)
            .map(|n| json!({"room": room, "id": format!("m{n}"), "body": n}))
            .collect();
        let said = json!({"messages": messages});
        let answer = call(&mesh, "POST", "/v1/messages", said).await;
        assert!(!answer.to_string().contains("error"), "{answer}");
    }
    endpoint.asked_times(3).await;
    metric_is(&workers, "pending", count).await;
    assert_eq!(metric(&workers, "open").await, 3);
    endpoint.open_gate();
    metric_is(&workers, "annotated_total", count).await;
    assert_eq!(endpoint.most_open(), 3);
    assert_eq!(endpoint.asked().len(), 60);
    for room in ["chat:a", "chat:b", "chat:c"] {
        let said = log(&mesh, room, "annotation").await;
        let mut targets: Vec<_> = said
            .iter()
            .filter_map(|one| one.record.target.clone())
            .collect();
        targets.sort_unstable();
        targets.dedup();
        assert_eq!((said.len(), targets.len()), (20, 20), "{room}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_request_is_repeated_and_then_kept_until_somebody_retries_it() {
    let endpoint = Endpoint::start(|_| Say::Status(500)).await;
    let (mesh, workers) = start(&worker("keeps", &endpoint, "max_deliver = 2")).await;
    text(&mesh, "chat:a", "m1", "hi").await;
    let letters = dead(&mesh, 1).await;
    let letter = &letters[0];
    assert_eq!(
        (&letter["worker"], &letter["room"], &letter["id"]),
        (&json!("keeps"), &json!("chat:a"), &json!("m1"))
    );
    assert_eq!(letter["reason"], "the answer is 500 Internal Server Error");
    let asked = endpoint.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].header("webhook-id"), asked[1].header("webhook-id"));
    metric_is(&workers, "failed_total", 2).await;
    metric_is(&workers, "dead_total", 1).await;
    metric_is(&workers, "dead_letters", 1).await;
    let (ok, said) = tool(&mesh, &["worker", "retry"]).await;
    assert!(!ok && said.contains("500 Internal Server Error"), "{said}");
    assert_eq!(dead(&mesh, 1).await.len(), 1);
    endpoint.behave(|_| Say::Json(json!({"well": true})));
    let number = letter["number"].to_string();
    let (ok, said) = tool(&mesh, &["worker", "retry", &number]).await;
    assert!(ok, "{said}");
    annotated(&mesh, "chat:a", "m1", "keeps", json!({"well": true})).await;
    assert!(letters_are_gone(&mesh).await);
    // What was too much for the endpoint is repeated when it wants that.
    let mut first = true;
    endpoint.behave(move |_| match std::mem::take(&mut first) {
        true => Say::With(429, "retry-after", "2".to_owned()),
        false => Say::Json(json!({"well": true})),
    });
    let before = (endpoint.asked().len(), std::time::Instant::now());
    text(&mesh, "chat:a", "m2", "hi").await;
    endpoint.asked_times(before.0 + 2).await;
    assert!(before.1.elapsed() >= Duration::from_millis(1900));
    annotated(&mesh, "chat:a", "m2", "keeps", json!({"well": true})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_erased_is_in_no_dead_letter() {
    let endpoint = Endpoint::start(|_| Say::Status(500)).await;
    let toml = worker("keeps", &endpoint, "max_deliver = 1");
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), &toml).await;
    let _workers = mesh.start_workers().await;
    for room in ["chat:a", "chat:b"] {
        text(&mesh, room, "m1", "hi").await;
    }
    dead(&mesh, 2).await;
    call(&mesh, "DELETE", "/v1/rooms/chat:a/messages", Value::Null).await;
    let letters = dead(&mesh, 1).await;
    assert_eq!(letters[0]["room"], "chat:b");
    call(&mesh, "DELETE", "/v1/users/kim/messages", Value::Null).await;
    assert!(letters_are_gone(&mesh).await);
}

async fn letters_are_gone(mesh: &Mesh) -> bool {
    dead(mesh, 0).await.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_an_endpoint_does_is_bounded() {
    let secret = Endpoint::start(|_| Say::Json(json!({}))).await;
    let inner = format!("http://127.0.0.1:{}/", secret.port);
    let endpoint = Endpoint::start(move |asked| match asked.id() {
        "bad" => Say::Status(400),
        "text" => Say::Json(json!("a text")),
        "large" => Say::Large(9000),
        "away" => Say::With(302, "location", inner.clone()),
        "hang" => Say::Hang,
        _ => Say::Json(json!({"ok": 1})),
    })
    .await;
    let more = "max_deliver = 1\ntimeout = '1s'\nconcurrency = 2";
    let mut toml = worker("one", &endpoint, more);
    // A name that resolves to an address that is not public, and is not allowed.
    let port = secret.port;
    toml.push_str(&format!(
        "[[workers]]\nname = 'inside'\nrooms = ['chat:inside']\nurl = 'http://localhost:{port}/?key=hidden'\n\
         secret = 'whsec_{SECRET}'\nannotation = 'x'\nmax_deliver = 1\nallow = ['10.0.0.0/8']\n"
    ));
    let (mesh, workers) = start(&toml).await;
    for id in ["bad", "text", "large", "away", "hang"] {
        text(&mesh, "chat:a", id, "hi").await;
    }
    text(&mesh, "chat:inside", "in", "hi").await;
    metric_is(&workers, "rejected_total", 3).await;
    let letters = dead(&mesh, 3).await;
    let mut reasons: Vec<&str> = letters
        .iter()
        .filter_map(|it| it["reason"].as_str())
        .collect();
    reasons.sort_unstable();
    assert_eq!(
        reasons[1..],
        ["no answer within 1s", "the answer is 302 Found"]
    );
    assert!(
        reasons[0].starts_with("localhost has the address "),
        "{reasons:?}"
    );
    assert!(!reasons[0].contains("hidden"), "{reasons:?}");
    assert_eq!(secret.asked().len(), 0);
    // It goes on all the same.
    text(&mesh, "chat:a", "good", "hi").await;
    annotated(&mesh, "chat:a", "good", "one", json!({"ok": 1})).await;
    let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
    assert!(
        said.contains("3 messages were not accepted by workers or hooks"),
        "{said}"
    );
    assert!(!said.contains("no process takes messages"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_worker_gets_each_message_of_a_room_after_the_one_before_it_is_done() {
    let mut failures = 2;
    let endpoint = Endpoint::start(move |asked| match asked.id() {
        "m1" if failures > 0 => {
            failures -= 1;
            Say::Status(503)
        }
        id => Say::Json(json!({"id": id})),
    })
    .await;
    let (mesh, workers) = start(&worker("row", &endpoint, "ordered = true")).await;
    let count = 12;
    for n in 0..count {
        text(&mesh, "chat:a", &format!("m{n}"), "hi").await;
    }
    metric_is(&workers, "annotated_total", count).await;
    let asked: Vec<String> = endpoint
        .asked()
        .iter()
        .map(|it| it.id().to_owned())
        .collect();
    let mut expected: Vec<String> = (0..count).map(|n| format!("m{n}")).collect();
    expected.splice(1..2, ["m1", "m1", "m1"].map(str::to_owned));
    assert_eq!(asked, expected);
    assert_eq!(endpoint.most_open(), 1);
    let said = log(&mesh, "chat:a", "annotation").await;
    let targets: Vec<_> = said
        .iter()
        .filter_map(|one| one.record.target.clone())
        .collect();
    let expected: Vec<String> = (0..count).map(|n| format!("kim/m{n}")).collect();
    assert_eq!(targets, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_old_is_skipped_and_what_was_said_meanwhile_is_not() {
    let endpoint = Endpoint::start(|_| Say::Json(json!({"ok": 1}))).await;
    let (mesh, mut workers) = start(&worker("young", &endpoint, "max_age = '2s'")).await;
    // It has made its consumers.
    workers.process.kill().await;
    let ack = say(&mesh, "chat:a", json!({"id": "old", "body": 1})).await;
    let ts = ack["ts"].as_u64().unwrap();
    eventually("it is old", LONG, async || {
        let age = unix_ms().saturating_sub(ts);
        (age > 2000).then_some(()).ok_or(age.to_string())
    })
    .await;
    text(&mesh, "chat:a", "new", "hi").await;
    let workers = mesh.start_workers().await;
    annotated(&mesh, "chat:a", "new", "young", json!({"ok": 1})).await;
    metric_is(&workers, "expired_total", 1).await;
    let asked: Vec<String> = endpoint
        .asked()
        .iter()
        .map(|it| it.id().to_owned())
        .collect();
    assert_eq!(asked, ["new"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn up_shows_how_a_worker_works() {
    let data = tempfile::tempdir().unwrap();
    let flags = ["--no-mongodb", "--demo-worker", "--edges", "1"];
    let up = Up::start(data.path(), &flags).await;
    let edge = up.report["regions"][0]["edges"][0]["http"]
        .as_str()
        .unwrap();
    let edge = edge.strip_prefix("http://").unwrap().parse().unwrap();
    let token = up.report["token"].as_str().unwrap();
    let room = "/v1/rooms/chat:lobby";
    let path = format!("{room}/messages");
    let body = json!({"id": "m1", "body": {"text": "hello, this is awful"}});
    let (status, answer) = ask(edge, ("POST", &path), token, &body).await;
    assert_eq!(status, 200, "{answer}");
    eventually("it is translated, and noticed", LONG, async || {
        let (_, page) = ask(edge, ("GET", &path), token, &Value::Null).await;
        let (_, record) = ask(edge, ("GET", room), token, &Value::Null).await;
        let said = &page["messages"][0]["annotations"];
        let is_translated = said["translation"]["ko"] == "안녕하세요, this is 끔찍한";
        match is_translated && record["alert"]["worker"] == "mood" {
            true => Ok(()),
            false => Err(format!("{page} {record}")),
        }
    })
    .await;
    let workers = &up.report["regions"][0]["workers"][0];
    let pid = u32::try_from(workers["pid"].as_u64().unwrap()).unwrap();
    assert!(up.end(Signal::TERM).await.success());
    assert!(!is_running(pid));
}
