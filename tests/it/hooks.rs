//! Event hooks: what happens is told at least once and in order, whatever the receivers do and whoever is killed.

mod examples;
mod presence;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use natter::testing::runtime::unix_s;
use serde_json::{Value, json};
use sha2::Sha256;

use crate::support::{
    LONG,
    endpoint::{Asked, Endpoint, Say},
    eventually,
    mesh::{Edge, Mesh, ask, http, token},
    mongodb_url, nats_url,
    regions::Regions,
};

const SECRET: &str = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The key that replaces it.
const NEXT: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

const OF_LOGS: &str = "'message.created', 'message.edited', 'message.deleted', 'reaction.added', 'reaction.removed', 'annotation.added', 'room.created', 'room.updated', 'room.deleted', 'room.alert', 'member.added', 'member.removed', 'member.banned', 'upload.completed'";

/// So that a test may say much at once.
const LIMITS: &str = "limits.commands_per_second = 100000\nlimits.commands_burst = 100000\n";

/// The configuration of a hook of this endpoint in all rooms of `chat`, with more keys.
fn hook(name: &str, endpoint: &Endpoint, events: &str, more: &str) -> String {
    let url = endpoint.url();
    format!(
        "[[hooks]]\nname = '{name}'\nrooms = ['chat:*']\nurl = '{url}'\nsecret = 'whsec_{SECRET}'\n\
         events = [{events}]\nallow = ['127.0.0.1']\n{more}\n"
    )
}

async fn start(toml: &str) -> (Mesh, Edge) {
    let mesh = Mesh::start(nats_url(), 1, &format!("{LIMITS}{toml}")).await;
    let hooks = mesh.start_hooks(0).await;
    (mesh, hooks)
}

async fn call(mesh: &Mesh, method: &str, path: &str, user: &str, body: Value) -> Value {
    let (status, answer) = ask(mesh.edges[0].address, (method, path), &token(user), &body).await;
    assert!(
        (200..300).contains(&status),
        "{path} {body}: {status} {answer}"
    );
    answer
}

async fn say(mesh: &Mesh, room: &str, fields: Value) -> Value {
    call(
        mesh,
        "POST",
        &format!("/v1/rooms/{room}/messages"),
        "kim",
        fields,
    )
    .await
}

async fn text(mesh: &Mesh, room: &str, id: &str) {
    say(mesh, room, json!({"id": id, "body": {"text": id}})).await;
}

/// The type of an event.
fn kind(asked: &Asked) -> &str {
    asked.body["type"].as_str().unwrap()
}

/// The events that were accepted or not, the first time that each was sent.
fn first_times(endpoint: &Endpoint) -> Vec<Asked> {
    let mut seen = BTreeSet::new();
    let mut all = endpoint.asked();
    all.retain(|asked| seen.insert(asked.header("webhook-id").to_owned()));
    all
}

/// Waits until so many events were told.
async fn told(endpoint: &Endpoint, count: usize) -> Vec<Asked> {
    eventually(&format!("{count} events"), LONG, async || {
        let told = first_times(endpoint);
        match told.len() >= count {
            true => Ok(told),
            false => Err(format!("{:?}", told.iter().map(kind).collect::<Vec<_>>())),
        }
    })
    .await
}

/// The ids of the messages of a room, in the order in which they were told first.
fn order(told: &[Asked], room: &str) -> Vec<String> {
    let of_room = told
        .iter()
        .filter(|asked| asked.body["data"]["room"] == room);
    let ids = of_room.map(|asked| {
        asked.body["data"]["message"]["id"]
            .as_str()
            .unwrap()
            .to_owned()
    });
    ids.collect()
}

/// Checks a signature as the specification says, not as natter does; returns how many there are.
fn signatures(asked: &Asked, key: &str) -> usize {
    let (id, timestamp) = (
        asked.header("webhook-id"),
        asked.header("webhook-timestamp"),
    );
    let mut hmac = Hmac::<Sha256>::new_from_slice(&STANDARD.decode(key).unwrap()).unwrap();
    hmac.update(&[format!("{id}.{timestamp}.").as_bytes(), &asked.raw].concat());
    let expected = format!("v1,{}", STANDARD.encode(hmac.finalize().into_bytes()));
    let given: Vec<&str> = asked.header("webhook-signature").split(' ').collect();
    assert!(given.contains(&&*expected), "{given:?}");
    assert!(unix_s().abs_diff(timestamp.parse().unwrap()) < 60);
    given.len()
}

async fn metric(hooks: &Edge, name: &str) -> u64 {
    let (_, text) = http(hooks.address, "GET", "/metrics", "", "")
        .await
        .unwrap();
    let of_metric = |line: &&str| line.starts_with(&format!("natter_hook_{name}{{"));
    let values = text.lines().filter(of_metric);
    values
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

async fn metric_is(hooks: &Edge, name: &str, value: u64) {
    eventually(
        &format!("{name} is {value}"),
        LONG,
        async || match metric(hooks, name).await {
            found if found == value => Ok(()),
            found => Err(found.to_string()),
        },
    )
    .await;
}

async fn tool(mesh: &Mesh, args: &[&str]) -> (bool, String) {
    let mut command = mesh.command(args).await;
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

/// Waits until there are so many dead letters.
async fn dead(mesh: &Mesh, count: usize) -> Vec<Value> {
    eventually(&format!("{count} dead letters"), LONG, async || {
        let (_, said) = tool(mesh, &["hooks", "dead", "--json"]).await;
        let letters: Vec<Value> = said
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        match letters.len() == count {
            true => Ok(letters),
            false => Err(format!("{letters:?}")),
        }
    })
    .await
}

/// Every type that comes from logs, in two regions: each region tells what it has stored, once, and in order.
#[tokio::test(flavor = "multi_thread")]
async fn each_region_tells_every_type_of_event_once() {
    let endpoint = Endpoint::start(|_| Say::Status(204)).await;
    let (seoul, virginia) = ("seoul", "virginia");
    let folder = tempfile::tempdir().unwrap();
    let toml = format!(
        "mongodb.url = '{}'\n[uploads]\nstorage = 'local'\nfolder = {:?}\nsecret = 'a secret of uploads, long enough to be one'\n{}",
        mongodb_url(),
        folder.path(),
        hook("all", &endpoint, OF_LOGS, "")
    );
    let mut regions =
        Regions::start_with(&[seoul, virginia], &toml, std::time::Duration::ZERO).await;
    let mut processes = Vec::new();
    for region in [seoul, virginia] {
        let mesh = regions.mesh(region);
        mesh.add_edge().await;
        mesh.add_worker("/readyz").await;
        processes.push(mesh.start_hooks(0).await);
    }
    let mesh = regions.at(seoul);
    let group = json!({"namespace": "chat", "kind": "group", "name": "a", "members": ["kim", "lee"], "title": "A"});
    call(mesh, "POST", "/v1/rooms", "boss", group).await;
    let wanted = json!({"name": "a.txt", "type": "text/plain", "size": 2});
    let upload = call(mesh, "POST", "/v1/rooms/chat:a/uploads", "kim", wanted).await;
    let upload = upload["upload"].clone();
    assert!(upload.is_string(), "{upload}");
    for fields in [
        json!({"id": "m1", "body": {"text": "hi"}, "mentions": ["lee"]}),
        json!({"id": "m2", "body": {"text": "see", "attachments": [{"upload": upload, "name": "a.txt"}]}}),
        json!({"id": "e1", "kind": "edit", "target": "m1", "body": {"text": "hello"}}),
        // The same upload once more is nothing new.
        json!({"id": "e2", "kind": "edit", "target": "m2", "body": {"text": "look", "attachments": [{"upload": upload}]}}),
        json!({"id": "r1", "kind": "reaction", "target": "m1", "body": "👍"}),
        json!({"id": "r2", "kind": "reaction", "target": "m1", "body": {"key": "👍", "remove": true}}),
        json!({"id": "a1", "kind": "annotation", "target": "m1", "body": {"mood": 1}}),
        json!({"id": "d1", "kind": "delete", "target": "m1"}),
    ] {
        say(mesh, "chat:a", fields).await;
    }
    for (method, path, body) in [
        ("PUT", "/members/ann", json!({"role": "member"})),
        ("PUT", "/members/ann", json!({"state": "banned"})),
        ("DELETE", "/members/lee", Value::Null),
        ("PATCH", "", json!({"title": "B"})),
    ] {
        call(
            mesh,
            method,
            &format!("/v1/rooms/chat:a{path}"),
            "boss",
            body,
        )
        .await;
    }
    // In the other region, in a room that both know.
    text(regions.at(virginia), "chat:b", "v1").await;
    text(mesh, "chat:b", "s1").await;
    let expected = [
        "room.created",
        "message.created",
        "message.created",
        "upload.completed",
        "message.edited",
        "message.edited",
        "reaction.added",
        "reaction.removed",
        "annotation.added",
        "message.deleted",
        "member.added",
        "member.banned",
        "member.removed",
        "room.updated",
    ];
    let told = told(&endpoint, expected.len() + 2).await;
    let of_a: Vec<&Asked> = told
        .iter()
        .filter(|asked| asked.body["data"]["room"] == "chat:a")
        .collect();
    let kinds: Vec<&str> = of_a.iter().map(|asked| kind(asked)).collect();
    assert_eq!(kinds, expected);
    let at = |index: usize| &of_a[index].body["data"];
    assert_eq!(
        (&at(0)["title"], &at(0)["members"]),
        (&json!("A"), &json!(["kim", "lee"]))
    );
    // As history shows it, without what came later.
    assert_eq!(at(1)["message"]["body"], json!({"text": "hi"}));
    assert_eq!(
        (&at(1)["message"]["from"], &at(1)["message"]["mentions"]),
        (&json!("kim"), &json!(["lee"]))
    );
    assert_eq!(
        (&at(3)["upload"], &at(3)["target"]),
        (&upload, &json!("kim/m2"))
    );
    assert_eq!(
        (&at(4)["target"], &at(4)["body"]),
        (&json!("kim/m1"), &json!({"text": "hello"}))
    );
    assert_eq!((&at(6)["by"], &at(6)["key"]), (&json!("kim"), &json!("👍")));
    assert_eq!(at(8)["annotations"], json!({"mood": 1}));
    assert_eq!(at(9)["target"], "kim/m1");
    assert_eq!(
        (&at(11)["user"], &at(11)["by"]),
        (&json!("ann"), &json!("boss"))
    );
    assert_eq!(at(13)["title"], "B");
    for asked in &told {
        assert_eq!(signatures(asked, SECRET), 1);
        assert!(asked.body["at"].as_u64().unwrap() / 1000 <= unix_s() + 60);
    }
    let of_b: BTreeMap<&str, &str> = told
        .iter()
        .filter(|asked| asked.body["data"]["room"] == "chat:b")
        .map(|asked| {
            let message = &asked.body["data"]["message"];
            let origin = message["cursor"]
                .as_str()
                .unwrap()
                .split('.')
                .next()
                .unwrap();
            (message["id"].as_str().unwrap(), origin)
        })
        .collect();
    assert_eq!(of_b, BTreeMap::from([("v1", virginia), ("s1", seoul)]));
    // Nothing was told twice: nobody failed.
    assert_eq!(endpoint.asked().len(), told.len());
    for hooks in &processes {
        metric_is(hooks, "pending", 0).await;
    }
    // The log is erased with the room, and its end is told all the same.
    let before = told.len();
    call(mesh, "DELETE", "/v1/rooms/chat:a", "boss", Value::Null).await;
    eventually("the end of the room is told", LONG, async || {
        let told = first_times(&endpoint).split_off(before);
        let mut kinds: Vec<&str> = told.iter().map(kind).collect();
        kinds.sort_unstable();
        // Each region announces the erasure in its own log. The room ends once.
        kinds.dedup_by(|a, b| a == b && *a == "message.deleted");
        let is_told = kinds == ["message.deleted", "room.deleted"];
        is_told.then_some(()).ok_or(format!("{kinds:?}"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_of_a_worker_is_told() {
    let worker = Endpoint::start(|_| Say::Json(json!({"score": -1}))).await;
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let url = worker.url();
    let toml = format!(
        "[[workers]]\nname = 'mood'\nrooms = ['chat:*']\nurl = '{url}'\nsecret = 'whsec_{SECRET}'\nannotation = 'mood'\nalert = 'mood.score < 0'\nallow = ['127.0.0.1']\n{}",
        hook("all", &endpoint, "'room.alert', 'annotation.added'", "")
    );
    let (mesh, _hooks) = start(&toml).await;
    let _workers = mesh.start_workers().await;
    text(&mesh, "chat:a", "m1").await;
    let told = told(&endpoint, 2).await;
    let kinds: Vec<&str> = told.iter().map(kind).collect();
    assert_eq!(kinds, ["annotation.added", "room.alert"]);
    let data = &told[1].body["data"];
    assert_eq!(
        (&data["by"], &data["message"]),
        (&json!("$worker.mood"), &json!("kim/m1"))
    );
}

/// A room whose event is not accepted waits, and others go on; then it goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_keeps_its_order_and_holds_up_no_other() {
    let mut refused = 3;
    let endpoint = Endpoint::start(move |asked| {
        match asked.body["data"]["message"]["id"] == "a3" && refused > 0 {
            true => {
                refused -= 1;
                Say::Status(503)
            }
            false => Say::Status(200),
        }
    })
    .await;
    let (mesh, hooks) = start(&hook("row", &endpoint, "'message.created'", "")).await;
    for n in 0..8 {
        for room in ["a", "b", "c"] {
            text(&mesh, &format!("chat:{room}"), &format!("{room}{n}")).await;
        }
    }
    metric_is(&hooks, "delivered_total", 24).await;
    let asked = endpoint.asked();
    for room in ["a", "b", "c"] {
        let all: Vec<String> = (0..8).map(|n| format!("{room}{n}")).collect();
        assert_eq!(order(&first_times(&endpoint), &format!("chat:{room}")), all);
    }
    // Each attempt has the same id, and nothing of the room is sent in between.
    let of_a: Vec<String> = order(&asked, "chat:a");
    assert_eq!(of_a[3..7], ["a3", "a3", "a3", "a3"]);
    let ids: BTreeSet<&str> = asked
        .iter()
        .filter(|asked| asked.body["data"]["message"]["id"] == "a3")
        .map(|asked| asked.header("webhook-id"))
        .collect();
    assert_eq!((ids.len(), asked.len()), (1, 27));
    // While it waited, the others went on.
    let at = |id: &str, last: bool| {
        let is_it = |asked: &Asked| asked.body["data"]["message"]["id"] == id;
        match last {
            true => asked.iter().rposition(is_it).unwrap(),
            false => asked.iter().position(is_it).unwrap(),
        }
    };
    assert!(at("b7", false) < at("a3", true) && at("c7", false) < at("a3", true));
    metric_is(&hooks, "failed_total", 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_was_down_gets_everything_and_what_is_too_old_is_kept() {
    let endpoint = Endpoint::start(|_| Say::Status(500)).await;
    let (mesh, hooks) = start(&hook(
        "down",
        &endpoint,
        "'message.created'",
        "retry_for = '8s'",
    ))
    .await;
    for n in 0..5 {
        text(&mesh, "chat:a", &format!("m{n}")).await;
    }
    // They wait behind the first one, which fails until it is too old; then so are the others.
    let letters = dead(&mesh, 5).await;
    let numbers: Vec<&Value> = letters.iter().map(|letter| &letter["id"]).collect();
    assert_eq!(numbers, ["m0", "m1", "m2", "m3", "m4"]);
    assert_eq!(
        (&letters[0]["hook"], &letters[0]["room"]),
        (&json!("down"), &json!("chat:a"))
    );
    assert_eq!(
        letters[0]["reason"],
        "the answer is 500 Internal Server Error"
    );
    metric_is(&hooks, "dead_total", 5).await;
    metric_is(&hooks, "dead_letters", 5).await;
    let (ok, said) = tool(&mesh, &["hooks", "retry"]).await;
    assert!(!ok && said.contains("500 Internal Server Error"), "{said}");
    endpoint.behave(|_| Say::Status(200));
    let before = endpoint.asked().len();
    let (ok, said) = tool(&mesh, &["hooks", "retry"]).await;
    assert!(ok, "{said}");
    dead(&mesh, 0).await;
    let again = endpoint.asked().split_off(before);
    assert_eq!(order(&again, "chat:a"), ["m0", "m1", "m2", "m3", "m4"]);
    let first = &endpoint.asked()[0];
    assert_eq!(first.header("webhook-id"), again[0].header("webhook-id"));
    // It goes on.
    text(&mesh, "chat:a", "m5").await;
    told(&endpoint, 6).await;
    let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
    assert!(!said.contains("the hook down"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_answers_410_disables_its_hook_until_somebody_enables_it() {
    let endpoint = Endpoint::start(|_| Say::Status(410)).await;
    let (mesh, hooks) = start(&hook("gone", &endpoint, "'message.created'", "")).await;
    for n in 0..3 {
        text(&mesh, "chat:a", &format!("m{n}")).await;
    }
    metric_is(&hooks, "disabled", 1).await;
    assert_eq!(endpoint.asked().len(), 1);
    eventually("doctor says so", LONG, async || {
        let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
        let is_told = said.contains("the hook gone is disabled: its receiver has answered 410");
        is_told.then_some(()).ok_or(said)
    })
    .await;
    // Also for a process that starts now.
    let mut hooks = hooks;
    hooks.process.kill().await;
    let hooks = mesh.start_hooks(1).await;
    metric_is(&hooks, "disabled", 1).await;
    text(&mesh, "chat:a", "m3").await;
    endpoint.behave(|_| Say::Status(200));
    let (ok, _) = tool(&mesh, &["hooks", "enable", "other"]).await;
    assert!(!ok);
    let (ok, said) = tool(&mesh, &["hooks", "enable", "gone"]).await;
    assert!(ok, "{said}");
    let told = told(&endpoint, 4).await;
    assert_eq!(order(&told, "chat:a"), ["m0", "m1", "m2", "m3"]);
    metric_is(&hooks, "disabled", 0).await;
    let (ok, _) = tool(&mesh, &["hooks", "enable", "gone"]).await;
    assert!(!ok, "it is not disabled any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_receiver_does_is_bounded() {
    let secret = Endpoint::start(|_| Say::Status(200)).await;
    let inner = format!("http://127.0.0.1:{}/", secret.port);
    let endpoint = Endpoint::start(move |asked| {
        let room = asked.body["data"]["room"].as_str().unwrap();
        match room.trim_start_matches("chat:") {
            "away" => Say::With(302, "location", inner.clone()),
            "hang" => Say::Hang,
            "bad" => Say::Status(401),
            "large" => Say::Large(50_000_000),
            _ => Say::Status(200),
        }
    })
    .await;
    let more = "retry_for = '2s'\ntimeout = '1s'\nordered = false";
    let mut toml = hook("one", &endpoint, "'message.created'", more);
    // A name that resolves to an address that is not public, and is not allowed.
    let port = secret.port;
    toml.push_str(&format!(
        "[[hooks]]\nname = 'inside'\nrooms = ['chat:inside']\nurl = 'http://localhost:{port}/?key=hidden'\n\
         secret = 'whsec_{SECRET}'\nevents = ['message.created']\nretry_for = '1s'\nallow = ['10.0.0.0/8']\n"
    ));
    let (mesh, _hooks) = start(&toml).await;
    for room in ["away", "hang", "bad", "large", "inside"] {
        text(&mesh, &format!("chat:{room}"), "m1").await;
    }
    // A large body is of no interest: its status counts.
    let letters = dead(&mesh, 4).await;
    let mut reasons: Vec<&str> = letters
        .iter()
        .filter_map(|it| it["reason"].as_str())
        .collect();
    reasons.sort_unstable();
    assert_eq!(
        reasons[1..],
        [
            "no answer within 1s",
            "the answer is 302 Found",
            "the answer is 401 Unauthorized"
        ]
    );
    assert!(
        reasons[0].starts_with("localhost has the address "),
        "{reasons:?}"
    );
    assert!(!reasons[0].contains("hidden"), "{reasons:?}");
    assert_eq!(secret.asked().len(), 0);
    // It goes on all the same.
    text(&mesh, "chat:good", "m1").await;
    eventually("the next event is told", LONG, async || {
        let asked = endpoint.asked();
        let is_there = asked
            .iter()
            .any(|asked| asked.body["data"]["room"] == "chat:good");
        is_there.then_some(()).ok_or(asked.len().to_string())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_exchanged_without_a_gap() {
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let toml = hook("key", &endpoint, "'message.created'", "");
    let (mesh, mut hooks) = start(&toml).await;
    let path = mesh.dir().join("natter.toml");
    let original = std::fs::read_to_string(&path).unwrap();
    let old = format!("secret = \"whsec_{SECRET}\"");
    assert!(original.contains(&old), "{original}");
    for (n, (secrets, keys)) in [
        (old.clone(), &[SECRET][..]),
        (
            format!("secret = [\"whsec_{NEXT}\", \"whsec_{SECRET}\"]"),
            &[NEXT, SECRET],
        ),
        (format!("secret = \"whsec_{NEXT}\""), &[NEXT]),
    ]
    .into_iter()
    .enumerate()
    {
        std::fs::write(&path, original.replace(&old, &secrets)).unwrap();
        hooks.process.stop().await.unwrap();
        hooks = mesh.start_hooks(n).await;
        text(&mesh, "chat:a", &format!("m{n}")).await;
        let told = told(&endpoint, n + 1).await;
        for key in keys {
            assert_eq!(signatures(&told[n], key), keys.len());
        }
    }
    drop(hooks);
}

/// Processes that are killed with requests open: everything is told, in the order of each room.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_loses_nothing_and_keeps_the_order() {
    let mut number = 0;
    let endpoint = Endpoint::start(move |_| {
        number += 1;
        match number % 5 {
            0 => Say::Status(503),
            _ => Say::Status(200),
        }
    })
    .await;
    let (mesh, mut first) = start(&hook("sure", &endpoint, "'message.created'", "")).await;
    // It waits until the other one is gone.
    let mut second = mesh.start_hooks(1).await;
    let rooms = ["chat:a", "chat:b", "chat:c"];
    for n in 0..60 {
        for room in rooms {
            text(&mesh, room, &format!("m{n}")).await;
        }
        if n == 20 {
            first.process.kill().await;
            first = mesh.start_hooks(2).await;
        }
        if n == 40 {
            second.process.kill().await;
            second = mesh.start_hooks(3).await;
        }
    }
    let told = told(&endpoint, 180).await;
    for room in rooms {
        let all: Vec<String> = (0..60).map(|n| format!("m{n}")).collect();
        assert_eq!(order(&told, room), all, "{room}");
    }
    assert_eq!(dead(&mesh, 0).await.len(), 0);
    drop((first, second));
}

/// One that is slow has never more requests open than allowed, and members do not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_receiver_holds_up_nobody() {
    let endpoint = Endpoint::closed(|_| Say::Status(200)).await;
    let more = "concurrency = 3\ntimeout = '60s'";
    let (mesh, hooks) = start(&hook("slow", &endpoint, "'message.created'", more)).await;
    for n in 0..12 {
        text(&mesh, &format!("chat:r{n}"), "m1").await;
    }
    endpoint.asked_times(3).await;
    metric_is(&hooks, "pending", 12).await;
    assert_eq!(metric(&hooks, "open").await, 3);
    endpoint.open_gate();
    metric_is(&hooks, "delivered_total", 12).await;
    assert_eq!(endpoint.most_open(), 3);
}

/// The configuration of `[nats]` for a test in which rooms must share a partition.
const ONE_PARTITION: &str = "nats.partitions = 1\n";

/// A receiver that refuses one room while `is_refused` says so.
async fn refuses(room: &'static str, is_refused: &Arc<AtomicBool>) -> Endpoint {
    let is_refused = Arc::clone(is_refused);
    Endpoint::start(move |asked| {
        match asked.body["data"]["room"] == room && is_refused.load(Ordering::Relaxed) {
            true => Say::Status(500),
            false => Say::Status(200),
        }
    })
    .await
}

/// Waits until these events of a room were accepted in their order, each as late as that.
async fn accepted_in_order(endpoint: &Endpoint, room: &str, ids: &[String], from: usize) {
    let what = format!("{} events of {room}", ids.len());
    let accepted = eventually(&what, LONG, async || {
        let mut accepted = order(&endpoint.asked()[from..], room);
        accepted.dedup();
        let is_all = accepted.last() == ids.last();
        is_all
            .then_some(accepted.clone())
            .ok_or(format!("{accepted:?}"))
    })
    .await;
    assert_eq!(accepted, ids);
}

/// A room whose event is refused goes on talking, more than a process has in hand: others do not wait for it, nothing of
/// it becomes a dead letter, and in the end it is told in its order, also by another process.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_is_refused_and_goes_on_talking_holds_up_no_other() {
    let is_refused = Arc::new(AtomicBool::new(true));
    let endpoint = refuses("chat:poison", &is_refused).await;
    let toml = hook("row", &endpoint, "'message.created'", "");
    let (mesh, mut hooks) = start(&format!("{ONE_PARTITION}{toml}")).await;
    let ids = |of: &str, count: usize| -> Vec<String> {
        (0..count).map(|n| format!("{of}{n}")).collect()
    };
    let (poison, good) = (ids("p", 300), ids("g", 40));
    for (n, id) in poison.iter().enumerate() {
        text(&mesh, "chat:poison", id).await;
        // Some are said when the room waits apart.
        if let Some(id) = (n % 10 == 5).then(|| good.get(n / 10)).flatten() {
            text(&mesh, "chat:good", id).await;
        }
    }
    for id in &good[30..] {
        text(&mesh, "chat:good", id).await;
    }
    accepted_in_order(&endpoint, "chat:good", &good, 0).await;
    let refused = order(&first_times(&endpoint), "chat:poison");
    assert_eq!(refused, ["p0"], "none passes the one that is refused");
    assert_eq!(dead(&mesh, 0).await.len(), 0);
    // Nothing but the one that is refused is left for the consumer: the rest waits in the stream.
    eventually("one is in hand", LONG, async || {
        match metric(&hooks, "pending").await {
            1 => Ok(()),
            left => Err(left.to_string()),
        }
    })
    .await;
    // Another process finds where the room goes on.
    hooks.process.kill().await;
    let hooks = mesh.start_hooks(1).await;
    text(&mesh, "chat:poison", "p300").await;
    text(&mesh, "chat:good", "g40").await;
    accepted_in_order(&endpoint, "chat:good", &ids("g", 41), 0).await;
    let from = endpoint.asked().len();
    is_refused.store(false, Ordering::Relaxed);
    accepted_in_order(&endpoint, "chat:poison", &ids("p", 301), from).await;
    // Then it is a room like any other.
    text(&mesh, "chat:poison", "p301").await;
    accepted_in_order(&endpoint, "chat:poison", &ids("p", 302), from).await;
    metric_is(&hooks, "pending", 0).await;
    let of_poison = order(&endpoint.asked()[from..], "chat:poison");
    assert_eq!(of_poison.len(), 302, "each was sent once");
}

/// What was read of a room that waits apart becomes a dead letter as any other event.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_apart_becomes_a_dead_letter_when_it_is_too_old() {
    let is_refused = Arc::new(AtomicBool::new(true));
    let endpoint = refuses("chat:poison", &is_refused).await;
    let toml = hook("row", &endpoint, "'message.created'", "retry_for = '6s'");
    let (mesh, _hooks) = start(&format!("{ONE_PARTITION}{toml}")).await;
    let ids: Vec<String> = (0..20).map(|n| format!("p{n}")).collect();
    for id in &ids {
        text(&mesh, "chat:poison", id).await;
    }
    text(&mesh, "chat:good", "g0").await;
    let letters = dead(&mesh, ids.len()).await;
    let found: Vec<&str> = letters.iter().filter_map(|it| it["id"].as_str()).collect();
    assert_eq!(found, ids);
    is_refused.store(false, Ordering::Relaxed);
    let (ok, said) = tool(&mesh, &["hooks", "retry"]).await;
    assert!(ok, "{said}");
    dead(&mesh, 0).await;
}

/// A process that waits for the lease does not go on with a hook that the other one has disabled.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_takes_over_heeds_the_410_of_the_one_before() {
    let endpoint = Endpoint::start(|_| Say::Status(410)).await;
    let (mesh, mut first) = start(&hook("gone", &endpoint, "'message.created'", "")).await;
    let second = mesh.start_hooks(1).await;
    text(&mesh, "chat:a", "m0").await;
    metric_is(&first, "disabled", 1).await;
    metric_is(&second, "disabled", 1).await;
    first.process.kill().await;
    text(&mesh, "chat:a", "m1").await;
    // The lease of the dead one is over by then.
    let third = mesh.start_hooks(2).await;
    metric_is(&third, "disabled", 1).await;
    assert_eq!(endpoint.asked().len(), 1);
    endpoint.behave(|_| Say::Status(200));
    let (ok, said) = tool(&mesh, &["hooks", "enable", "gone"]).await;
    assert!(ok, "{said}");
    let told = told(&endpoint, 2).await;
    assert_eq!(order(&told, "chat:a"), ["m0", "m1"]);
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_hooks_of_presence_too() {
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let who = hook("who", &endpoint, "'user.online'", "");
    let toml = format!("presence.users = true\n{ONE_PARTITION}{who}");
    let mesh = Mesh::start(nats_url(), 1, &toml).await;
    let never = "the hook who has never run";
    let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
    assert!(said.contains(never) && said.contains("KV_hooks_"), "{said}");
    let mut hooks = mesh.start_hooks(0).await;
    eventually("it runs", LONG, async || {
        let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
        (!said.contains("the hook who")).then_some(()).ok_or(said)
    })
    .await;
    hooks.process.stop().await.unwrap();
    eventually("nobody takes its events", LONG, async || {
        let (_, said) = tool(&mesh, &["doctor", "--json"]).await;
        let is_told = said.contains("no process takes messages for the hook who");
        is_told.then_some(()).ok_or(said)
    })
    .await;
}
