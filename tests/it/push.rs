//! Notifications for users who are away. The push services are stand-ins of this test, on this machine: they take what real
//! ones take, and decrypt it with the keys of the subscription.

mod apns;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use natter::testing::{
    auth::{Grant, Right},
    bus::{Connection as Nats, consumer_state},
    runtime::{unix_ms, unix_s},
    subject::rooms_stream,
};
use serde_json::{Value, json};

use crate::support::{
    LONG,
    browser::Browser,
    calls::reply,
    endpoint::{Asked, Endpoint, Say},
    eventually,
    mesh::{Edge, Mesh, ask, http, token_with},
    nats_url,
};

/// Made for this test: `natter notifier key`.
const PRIVATE: &str = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw";
const PUBLIC: &str =
    "BP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A8";

fn toml(more: &str) -> String {
    format!(
        "presence.users = true\npresence.lease = '3s'\n\
         limits.commands_per_second = 100000\nlimits.commands_burst = 100000\n\
         [namespaces.crew]\ndurable = true\ntyping = false\naccess = 'members'\ncreate = 'members'\n\
         [push]\nafter = '3s'\nallow = ['127.0.0.1']\nsubject = 'mailto:ops@example.org'\n\
         vapid_private_key = '{PRIVATE}'\nvapid_public_key = '{PUBLIC}'\n{more}\n"
    )
}

fn token(user: &str) -> String {
    let all = [Right::Read, Right::Write, Right::History];
    let hour = Duration::from_secs(3600);
    token_with(user, hour, vec![Grant::new("*:*", &all)])
}

fn boss() -> String {
    let hour = Duration::from_secs(3600);
    token_with("boss", hour, vec![Grant::new("*:*", &Right::ALL)])
}

async fn done(address: SocketAddr, method: &str, path: &str, token: &str, body: Value) -> Value {
    let (status, answer) = ask(address, (method, path), token, &body).await;
    assert!(
        (200..300).contains(&status),
        "{method} {path} {body}: {status} {answer}"
    );
    answer
}

async fn devices(address: SocketAddr, user: &str) -> Vec<String> {
    let reply = done(address, "GET", "/v1/devices", &token(user), Value::Null).await;
    let devices = reply["devices"].as_array().unwrap().iter();
    devices
        .map(|device| device["device"].as_str().unwrap().to_owned())
        .collect()
}

/// A group of these users, made by `boss`.
async fn group(address: SocketAddr, name: &str, members: &[&str], title: &str) -> String {
    let title = Some(title).filter(|title| !title.is_empty());
    let room = json!({
        "kind": "group", "namespace": "crew", "name": name, "members": members, "title": title,
    });
    let made = done(address, "POST", "/v1/rooms", &boss(), room).await;
    made["room"].as_str().unwrap().to_owned()
}

async fn say(address: SocketAddr, room: &str, from: &str, fields: Value) -> Value {
    let path = format!("/v1/rooms/{room}/messages");
    done(address, "POST", &path, &token(from), fields).await
}

/// The browsers of users, and the service that reaches them.
struct Browsers {
    service: Endpoint,
    all: BTreeMap<String, Browser>,
}

impl Browsers {
    fn new(service: Endpoint) -> Self {
        Self {
            service,
            all: BTreeMap::new(),
        }
    }

    fn url(&self, user: &str, device: &str) -> String {
        format!("http://127.0.0.1:{}/{user}/{device}", self.service.port)
    }

    async fn subscribe(&mut self, address: SocketAddr, user: &str, device: &str) {
        let browser = Browser::new();
        let url = self.url(user, device);
        let body = json!({"kind": "webpush", "subscription": browser.subscription(&url)});
        let path = format!("/v1/devices/{device}");
        done(address, "PUT", &path, &token(user), body).await;
        self.all.insert(format!("/{user}/{device}"), browser);
    }

    /// What a request says, after its signature was checked.
    fn open(&self, asked: &Asked) -> Value {
        for (name, value) in [("content-encoding", "aes128gcm"), ("ttl", "86400")] {
            assert_eq!(asked.header(name), value);
        }
        assert!(asked.header("topic").len() <= 32);
        let authorization = asked.header("authorization");
        let fields = authorization.strip_prefix("vapid t=").unwrap();
        let (jwt, key) = fields.split_once(", k=").unwrap();
        assert_eq!(key, PUBLIC);
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[format!("http://127.0.0.1:{}", self.service.port)]);
        let (x, y) = public_coordinates();
        let key = DecodingKey::from_ec_components(&x, &y).unwrap();
        let claims = jsonwebtoken::decode::<Value>(jwt, &key, &validation);
        let claims = claims.unwrap().claims;
        assert_eq!(claims["sub"], "mailto:ops@example.org");
        assert!(claims["exp"].as_u64().unwrap() <= unix_s() + 24 * 3600);
        self.all[&asked.path].open(&asked.raw)
    }

    /// The path and the message of each request.
    fn told(&self) -> Vec<(String, Value)> {
        let asked = self.service.asked();
        let told = asked
            .iter()
            .map(|asked| (asked.path.clone(), self.open(asked)));
        told.collect()
    }
}

fn public_coordinates() -> (String, String) {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let point = URL_SAFE_NO_PAD.decode(PUBLIC).unwrap();
    (
        URL_SAFE_NO_PAD.encode(&point[1..33]),
        URL_SAFE_NO_PAD.encode(&point[33..]),
    )
}

/// The value of a counter of the notifier.
async fn metric(notifier: &Edge, name: &str, label: &str) -> u64 {
    let (_, text) = http(notifier.address, "GET", "/metrics", "", "")
        .await
        .unwrap();
    let of_metric =
        |line: &&str| line.starts_with(&format!("natter_push_{name}")) && line.contains(label);
    let values = text.lines().filter(of_metric);
    values
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

async fn metric_is(notifier: &Edge, name: &str, label: &str, value: u64) {
    eventually(
        &format!("{name} {label} is {value}"),
        LONG,
        async || match metric(notifier, name, label).await {
            found if found == value => Ok(()),
            found => Err(found.to_string()),
        },
    )
    .await;
}

/// Waits until no message waits for being read, or is in hand, as the server says.
async fn all_is_done(mesh: &Mesh) {
    let config = &mesh.config;
    let connection = Nats::open(&config.nats, "test").await.unwrap();
    eventually("all is done", LONG, async || {
        for part in 0..config.nats.partitions {
            let stream = rooms_stream(&config.region(), part);
            let state = consumer_state(&connection, &stream, "push", LONG).await;
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

/// Quiet hours around now, or around the other side of the day.
fn hours(around_now: bool) -> String {
    let hour = unix_ms() / 3_600_000 % 24 + if around_now { 0 } else { 12 };
    format!("{:02}:00-{:02}:00", (hour + 23) % 24, (hour + 2) % 24)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_who_is_notified() {
    let mesh = Mesh::start(nats_url(), 1, &toml("")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(Endpoint::start(|_| Say::Status(201)).await);
    let all = [
        "away", "awake", "sender", "present", "reader", "muter", "blocker", "banned", "removed",
        "asleep", "without",
    ];
    let room = group(address, "table", &all, "The crew").await;
    for user in all.iter().filter(|user| **user != "without") {
        browsers.subscribe(address, user, "laptop").await;
    }
    let at = |user: &str| token(user);
    let path = format!("/v1/inbox/{room}");
    done(
        address,
        "PATCH",
        &path,
        &at("muter"),
        json!({"muted": true}),
    )
    .await;
    done(
        address,
        "PUT",
        "/v1/users/blocker/blocks/sender",
        &at("blocker"),
        Value::Null,
    )
    .await;
    let path = format!("/v1/rooms/{room}/members/banned");
    done(address, "PUT", &path, &boss(), json!({"state": "banned"})).await;
    let path = format!("/v1/rooms/{room}/members/removed");
    done(address, "DELETE", &path, &boss(), Value::Null).await;
    done(
        address,
        "PATCH",
        "/v1/devices",
        &at("asleep"),
        json!({"quiet": hours(true)}),
    )
    .await;
    done(
        address,
        "PATCH",
        "/v1/devices",
        &at("awake"),
        json!({"quiet": hours(false)}),
    )
    .await;
    // These have sessions, in no room.
    let _present = mesh.connect(0, "present").await;
    let mut reader = mesh.connect(0, "reader").await;
    reply(&mut reader, "ping", json!({})).await;

    let said = say(
        address,
        &room,
        "sender",
        json!({"id": "1", "body": {"text": "hi all"}}),
    )
    .await;
    // The reader sees it and goes. Before that, it was not decided.
    let path = format!("/v1/rooms/{room}/read");
    done(
        address,
        "PUT",
        &path,
        &at("reader"),
        json!({"cursor": said["cursor"]}),
    )
    .await;
    reader.close().await;

    metric_is(&notifier, "sent", "webpush", 2).await;
    for reason in ["present", "read", "muted", "blocked", "quiet"] {
        let label = format!("reason=\"{reason}\"");
        eventually(
            &format!("{reason} is counted"),
            LONG,
            async || match metric(&notifier, "skipped", &label).await {
                0 => Err("0".to_owned()),
                _ => Ok(()),
            },
        )
        .await;
    }
    all_is_done(&mesh).await;
    let told = browsers.told();
    let paths: BTreeSet<&str> = told.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(
        paths,
        BTreeSet::from(["/away/laptop", "/awake/laptop"]),
        "{told:?}"
    );
    assert_eq!(told.len(), 2);
    let note = &told[0].1;
    assert_eq!(note["title"], "sender in The crew");
    assert_eq!(note["text"], "hi all");
    assert_eq!(
        (&note["room"], &note["message"]),
        (&json!(room), &json!("sender/1"))
    );
    assert_eq!(note["badge"], 1);
    assert_eq!(metric(&notifier, "failed", "").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_without_reading_is_notified_later_and_who_reads_is_not() {
    let mesh = Mesh::start(nats_url(), 2, &toml("content = 'none'\nbadge = false")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(Endpoint::start(|_| Say::Status(201)).await);
    let room = group(address, "later", &["kim", "lee", "max"], "").await;
    for user in ["kim", "lee"] {
        browsers.subscribe(address, user, "laptop").await;
    }
    let kim = mesh.connect(1, "kim").await;
    let lee = mesh.connect(1, "lee").await;
    let said = say(
        address,
        &room,
        "max",
        json!({"id": "1", "body": {"text": "hi"}}),
    )
    .await;
    kim.close().await;
    lee.close().await;
    // On another device, which has no session.
    let path = format!("/v1/rooms/{room}/read");
    done(
        address,
        "PUT",
        &path,
        &token("lee"),
        json!({"cursor": said["cursor"]}),
    )
    .await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    all_is_done(&mesh).await;
    // At each look at the message.
    assert!(metric(&notifier, "skipped", "reason=\"read\"").await >= 1);
    let told = browsers.told();
    assert_eq!(told.len(), 1, "{told:?}");
    let (path, note) = &told[0];
    assert_eq!(path, "/kim/laptop");
    assert_eq!(
        (&note["title"], &note["text"], &note["badge"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );

    // A message that is deleted while it waits is not told.
    let kim = mesh.connect(1, "kim").await;
    say(
        address,
        &room,
        "max",
        json!({"id": "2", "body": {"text": "oops"}}),
    )
    .await;
    say(
        address,
        &room,
        "max",
        json!({"id": "3", "kind": "delete", "target": "2", "body": {}}),
    )
    .await;
    kim.close().await;
    all_is_done(&mesh).await;
    assert_eq!(browsers.told().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn mentioned_users_of_an_open_room_are_notified_and_others_are_not() {
    let mesh = Mesh::start(nats_url(), 1, &toml("")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(Endpoint::start(|_| Say::Status(201)).await);
    for user in ["kim", "lee", "banned", "max"] {
        browsers.subscribe(address, user, "laptop").await;
    }
    let made = json!({"kind": "open", "namespace": "chat", "name": "town"});
    done(address, "POST", "/v1/rooms", &boss(), made).await;
    let path = "/v1/rooms/chat:town/members/banned";
    done(address, "PUT", path, &boss(), json!({"state": "banned"})).await;
    let mentions = json!(["kim", "banned", "max", "kim"]);
    let fields = json!({"id": "1", "body": {"text": "look"}, "mentions": mentions});
    say(address, "chat:town", "max", fields).await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    all_is_done(&mesh).await;
    let told = browsers.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].0, "/kim/laptop");
    assert_eq!(told[0].1["title"], "max in town");
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_are_gone_are_removed_and_a_service_that_is_busy_is_asked_again() {
    let mesh = Mesh::start(nats_url(), 1, &toml("devices = 2")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut busy = 2;
    let service = Endpoint::start(move |asked| match &*asked.path {
        "/kim/gone" => Say::Status(410),
        "/kim/laptop" if busy > 0 => {
            busy -= 1;
            Say::Status(503)
        }
        _ => Say::Status(201),
    });
    let mut browsers = Browsers::new(service.await);
    let room = group(address, "gone", &["kim", "max"], "").await;
    browsers.subscribe(address, "kim", "gone").await;
    browsers.subscribe(address, "kim", "laptop").await;
    assert_eq!(devices(address, "kim").await, ["gone", "laptop"]);
    let third = json!({"kind": "fcm", "token": "x"});
    let (status, answer) = ask(address, ("PUT", "/v1/devices/third"), &token("kim"), &third).await;
    assert_eq!(
        (status, &answer["code"]),
        (429, &json!("limit")),
        "{answer}"
    );
    let (status, answer) = ask(address, ("PUT", "/v1/devices/a.b"), &token("kim"), &third).await;
    assert_eq!(
        (status, &answer["code"]),
        (400, &json!("bad_request")),
        "{answer}"
    );
    say(
        address,
        &room,
        "max",
        json!({"id": "1", "body": {"text": "hi"}}),
    )
    .await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    metric_is(&notifier, "gone", "webpush", 1).await;
    assert_eq!(devices(address, "kim").await, ["laptop"]);
    let to_laptop = || {
        browsers
            .told()
            .into_iter()
            .filter(|(path, _)| path == "/kim/laptop")
    };
    assert_eq!(to_laptop().count(), 3);
    done(
        address,
        "DELETE",
        "/v1/devices/laptop",
        &token("kim"),
        Value::Null,
    )
    .await;
    assert_eq!(devices(address, "kim").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_device_is_notified_once_whoever_is_killed_and_however_many_notifiers_run() {
    let mesh = Mesh::start(
        nats_url(),
        1,
        &toml("concurrency = 8\nbadge = false\ntimeout = '60s'"),
    )
    .await;
    let mut first = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let service = Endpoint::closed(|_| Say::Status(201)).await;
    let mut browsers = Browsers::new(service.clone());
    let users: Vec<String> = (0..10).map(|n| format!("u{n}")).collect();
    let mut members: Vec<&str> = users.iter().map(String::as_str).collect();
    members.push("max");
    let room = group(address, "once", &members, "").await;
    for user in &users {
        for device in ["laptop", "phone"] {
            browsers.subscribe(address, user, device).await;
        }
    }
    for n in 0..5 {
        say(
            address,
            &room,
            "max",
            json!({"id": n.to_string(), "body": {"text": "hi"}}),
        )
        .await;
    }
    // As many as one process may have open at one service, none of which is answered.
    service.asked_times(6).await;
    first.process.kill().await;
    let _second = mesh.start_notifier(&[]).await;
    let _third = mesh.start_notifier(&[]).await;
    service.asked_times(6 + 12).await;
    service.open_gate();
    all_is_done(&mesh).await;
    let told = browsers.told();
    let distinct: BTreeSet<(String, String)> = told
        .iter()
        .map(|(path, note)| (path.clone(), note["message"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(distinct.len(), told.len(), "a device was notified twice");
    assert_eq!(told.len(), 5 * 10 * 2);
}

fn key_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/keys")
        .join(name)
}

/// Checks the signature of a token, and returns its header and claims.
fn verified(jwt: &str, algorithm: Algorithm, file: &str) -> (jsonwebtoken::Header, Value) {
    let pem = std::fs::read(key_file(file)).unwrap();
    let key = match algorithm {
        Algorithm::RS256 => DecodingKey::from_rsa_pem(&pem),
        _ => DecodingKey::from_ec_pem(&pem),
    };
    let mut validation = Validation::new(algorithm);
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    let token = jsonwebtoken::decode::<Value>(jwt, &key.unwrap(), &validation).unwrap();
    (token.header, token.claims)
}

/// A stand-in of FCM, HTTP v1, with its service of tokens; over HTTP/1.1.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_fcm_is_notified_and_gets_its_badge() {
    let mut tokens = 0;
    let fcm = Endpoint::start(move |asked| match &*asked.path {
        "/token" => {
            tokens += 1;
            Say::Json(json!({"access_token": format!("t{tokens}"), "expires_in": 3600}))
        }
        // The first token is worth nothing.
        _ if asked.header("authorization") == "Bearer t1" => Say::Status(401),
        _ if asked.body["message"]["token"] == "gone" => Say::Refuse(
            404,
            json!({"error": {"details": [{"errorCode": "UNREGISTERED"}]}}),
        ),
        "/v1/projects/natter-test/messages:send" => Say::Json(json!({"name": "1"})),
        _ => Say::Status(404),
    })
    .await;
    let base = format!("http://127.0.0.1:{}", fcm.port);
    let account = json!({
        "type": "service_account",
        "project_id": "natter-test",
        "private_key_id": "key-1",
        "private_key": std::fs::read_to_string(key_file("rsa_private.pem")).unwrap(),
        "client_email": "push@example.org",
        "token_uri": format!("{base}/token"),
    });
    let more = format!(
        "fcm_url = '{base}/'\nfcm_service_account = {:?}",
        account.to_string()
    );
    let mesh = Mesh::start(nats_url(), 1, &toml(&more)).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let room = group(address, "fcm", &["kim", "max"], "Tea").await;
    for (device, token_of) in [("phone", "one"), ("old", "gone")] {
        let body = json!({"kind": "fcm", "token": token_of});
        done(
            address,
            "PUT",
            &format!("/v1/devices/{device}"),
            &token("kim"),
            body,
        )
        .await;
    }
    let said = say(
        address,
        &room,
        "max",
        json!({"id": "1", "body": {"text": "hi"}}),
    )
    .await;
    metric_is(&notifier, "sent", "fcm", 1).await;
    metric_is(&notifier, "gone", "fcm", 1).await;
    assert_eq!(devices(address, "kim").await, ["phone"]);
    let asked = fcm.asked();
    let first = asked.iter().find(|asked| asked.path == "/token").unwrap();
    let form = String::from_utf8(first.raw.to_vec()).unwrap();
    let assertion = form.split("assertion=").nth(1).unwrap();
    let (header, claims) = verified(assertion, Algorithm::RS256, "rsa_public.pem");
    assert_eq!(header.kid.as_deref(), Some("key-1"));
    assert_eq!(claims["aud"], format!("{base}/token"));
    let is_sent = |asked: &&Asked| {
        asked.header("authorization") == "Bearer t2" && asked.body["message"]["token"] == "one"
    };
    let messages = asked.iter().filter(|asked| asked.path.ends_with(":send"));
    let sent: Vec<&Asked> = messages.filter(is_sent).collect();
    assert_eq!(sent.len(), 1);
    let message = &sent[0].body["message"];
    assert_eq!(
        message["notification"],
        json!({"title": "max in Tea", "body": "hi"})
    );
    assert_eq!(
        message["data"],
        json!({"room": room, "message": "max/1", "badge": "1"})
    );

    // Read elsewhere: the badge goes, and nothing is shown.
    let path = format!("/v1/rooms/{room}/read");
    done(
        address,
        "PUT",
        &path,
        &token("kim"),
        json!({"cursor": said["cursor"]}),
    )
    .await;
    metric_is(&notifier, "sent", "fcm", 2).await;
    let asked = fcm.asked();
    let message = &asked.last().unwrap().body["message"];
    assert_eq!(message.get("notification"), None);
    assert_eq!(message["data"]["badge"], "0");
    assert_eq!(message["apns"]["payload"]["aps"]["badge"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_ones_own_is_notified_over_all_regions_and_bad_keys_are_named() {
    let service = Endpoint::start(|_| Say::Status(204)).await;
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let url = service.url();
    let more = format!("webhook_url = '{url}'\nwebhook_secret = '{secret}'\nbadge = false");
    let regions = ["seoul", "virginia"];
    let mut regions =
        crate::support::regions::Regions::start_with(&regions, &toml(&more), Duration::ZERO).await;
    for region in ["seoul", "virginia"] {
        regions.mesh(region).add_edge().await;
    }
    let seoul = regions.at("seoul").edges[0].address;
    let virginia = regions.at("virginia").edges[0].address;
    let notifier = regions.at("virginia").start_notifier(&[]).await;
    let device = json!({"kind": "webhook", "token": "pager-7"});
    done(seoul, "PUT", "/v1/devices/pager", &token("kim"), device).await;
    let room = group(seoul, "far", &["kim", "lee", "max"], "").await;
    let device = json!({"kind": "webhook", "token": "pager-8"});
    done(seoul, "PUT", "/v1/devices/pager", &token("lee"), device).await;
    // Here, in the other region.
    let _lee = regions.at("seoul").connect(0, "lee").await;
    eventually(
        "the other region has heard of it",
        LONG,
        async || match devices(virginia, "lee").await.len() {
            1 => Ok(()),
            _ => Err(String::new()),
        },
    )
    .await;
    eventually("the room is known there", LONG, async || {
        let path = format!("/v1/rooms/{room}");
        let (status, answer) = ask(virginia, ("GET", &path), &token("max"), &Value::Null).await;
        if status == 200 {
            Ok(())
        } else {
            Err(answer.to_string())
        }
    })
    .await;
    say(
        virginia,
        &room,
        "max",
        json!({"id": "1", "body": {"text": "hi"}}),
    )
    .await;
    metric_is(&notifier, "skipped", "reason=\"present\"", 1).await;
    all_is_done(regions.at("virginia")).await;
    let asked = service.asked();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert!(asked[0].header("webhook-signature").starts_with("v1,"));
    let body = &asked[0].body;
    assert_eq!(
        (&body["user"], &body["token"], &body["device"]),
        (&json!("kim"), &json!("pager-7"), &json!("pager"))
    );

    let mesh = regions.at("seoul");
    let mut command = mesh.command(&["notifier"]).await;
    command.env("NATTER__PUSH__VAPID_PUBLIC_KEY", "");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("push.vapid_public_key"),
        "{said}"
    );
    assert!(said.contains(PUBLIC) && !said.contains(PRIVATE), "{said}");
}

/// A service that takes nothing for longer than a message is kept in hand: it is notified when the service is back, once.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_service_does_not_take_is_sent_when_it_is_back() {
    let mut refused = 0;
    let service = Endpoint::start(move |_| {
        refused += 1;
        match refused {
            1..=6 => Say::Status(503),
            _ => Say::Status(201),
        }
    })
    .await;
    let mesh = Mesh::start(nats_url(), 1, &toml("")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(service);
    let room = group(address, "away", &["kim", "lee"], "").await;
    browsers.subscribe(address, "kim", "laptop").await;
    say(address, &room, "lee", json!({"id": "1", "body": "hi"})).await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    all_is_done(&mesh).await;
    assert_eq!(browsers.told().len(), 7);
    assert_eq!(metric(&notifier, "failed", "").await, 0);
}

/// A deletion is seen however much was said of the room in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_deleted_behind_many_changes_notifies_nobody() {
    let mesh = Mesh::start(nats_url(), 1, &toml("")).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(Endpoint::start(|_| Say::Status(201)).await);
    let room = group(address, "long", &["kim", "lee"], "").await;
    browsers.subscribe(address, "kim", "laptop").await;
    // The consumer is there, and nobody takes from it until all was said.
    let mut notifier = mesh.start_notifier(&[]).await;
    notifier.process.stop().await.unwrap();
    say(address, &room, "lee", json!({"id": "1", "body": "hi"})).await;
    for batch in 0..11 {
        let reaction = |n: usize| {
            json!({"room": room, "id": format!("r{batch}.{n}"), "kind": "reaction", "target": "lee/1",
                "body": {"key": "x", "remove": n % 2 == 1}})
        };
        let all: Vec<Value> = (0..100).map(reaction).collect();
        let body = json!({ "messages": all });
        let answer = done(address, "POST", "/v1/messages", &token("lee"), body).await;
        assert!(!answer.to_string().contains("error"), "{answer}");
    }
    say(
        address,
        &room,
        "lee",
        json!({"kind": "delete", "target": "1"}),
    )
    .await;
    say(address, &room, "lee", json!({"id": "2", "body": "ho"})).await;
    let notifier = mesh.start_notifier(&[]).await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    all_is_done(&mesh).await;
    let told = browsers.told();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].1["message"], "lee/2");
}

/// With turns for four requests at once, one service has three of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_hangs_holds_up_only_its_own_devices() {
    let hangs = Endpoint::start(|_| Say::Hang).await;
    let mesh = Mesh::start(nats_url(), 1, &toml("concurrency = 4")).await;
    let notifier = mesh.start_notifier(&[]).await;
    let address = mesh.edges[0].address;
    let mut browsers = Browsers::new(Endpoint::start(|_| Say::Status(201)).await);
    let slow: Vec<String> = (0..8).map(|n| format!("slow{n}")).collect();
    let mut members: Vec<&str> = slow.iter().map(String::as_str).collect();
    members.extend(["kim", "lee"]);
    let room = group(address, "mixed", &members, "").await;
    for user in &slow {
        let url = format!("http://127.0.0.1:{}/{user}", hangs.port);
        let body = json!({"kind": "webpush", "subscription": Browser::new().subscription(&url)});
        done(address, "PUT", "/v1/devices/laptop", &token(user), body).await;
    }
    browsers.subscribe(address, "kim", "laptop").await;
    say(address, &room, "lee", json!({"id": "1", "body": "hi"})).await;
    metric_is(&notifier, "sent", "webpush", 1).await;
    // While it hangs: no more than three of the four.
    assert_eq!(hangs.most_open(), 3);
    assert_eq!(browsers.told().len(), 1);
}
