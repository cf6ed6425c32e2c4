//! deploy/nats: nats-servers with the configuration, the users and the TLS of a deployment, and natter on them.

mod site;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use async_nats::Client;
use futures_util::StreamExt as _;
use natter::testing::{
    client::Connection,
    mesh::accounts,
    model::{Class, Region, RoomId, partition_of},
    subject::{Subjects, api, rooms_stream},
};
use serde_json::{Value, json};

use self::site::{
    Mesh, Natter, PARTITIONS, Ports, REGIONS, Server, Setting, client, deploy, example, password,
    start, violations,
};
use crate::support::{
    LONG,
    calls::reply,
    config,
    endpoint::{Asked, Endpoint, Say},
    eventually,
    mesh::{self, http, token},
    overheard::Overheard,
    unique,
};

const ROOM: &str = "chat:lobby";

/// A request that is answered with JSON without an error.
async fn ask(client: &Client, subject: &str, body: &str) -> Value {
    let answer = client.request(subject.to_owned(), body.to_owned().into());
    let answer = answer
        .await
        .unwrap_or_else(|error| panic!("{subject}: {error}"));
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert!(answer.get("error").is_none(), "{subject}: {answer}");
    answer
}

async fn call(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<Value, String> {
    let headers = format!("Authorization: Bearer {}\r\n", token("kim"));
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let (status, answer) = http(address, method, path, &headers, &body)
        .await
        .map_err(|error| error.to_string())?;
    if status == 200 {
        Ok(serde_json::from_str(&answer).unwrap())
    } else {
        Err(format!("{method} {path}: {status} {answer}"))
    }
}

/// Everything that edges and the history service do with NATS: through two edges of one region.
async fn use_it(first: SocketAddr, second: SocketAddr) {
    let endpoint = |address: SocketAddr| format!("ws://{address}/ws").parse().unwrap();
    let connect = async |address, user| {
        natter::testing::client::Connection::open(&endpoint(address), Some(&token(user)))
            .await
            .unwrap()
    };
    let (mut kim, mut lee) = (connect(first, "kim").await, connect(second, "lee").await);
    let join = json!({"room": ROOM, "presence": true, "read": true});
    for user in [&mut kim, &mut lee] {
        let joined = reply(user, "join", join.clone()).await;
        assert_eq!(joined["op"], "joined", "{joined}");
        let joined = reply(user, "join", json!({"room": "live:stage"})).await;
        assert_eq!(joined["op"], "joined", "{joined}");
    }
    let mut cursor = Value::Null;
    for n in 0..3 {
        let fields =
            json!({"room": ROOM, "id": format!("m{n}"), "body": {"text": format!("hello {n}")}});
        let ack = reply(&mut kim, "send", fields).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        cursor = ack["cursor"].clone();
    }
    for (op, fields) in [
        (
            "send",
            json!({"room": ROOM, "kind": "edit", "target": "m0", "body": {"text": "edited"}}),
        ),
        ("send", json!({"room": "live:stage", "body": 1})),
        ("typing", json!({"room": ROOM})),
        ("read", json!({"room": ROOM, "cursor": cursor})),
        ("unread", json!({"rooms": [ROOM]})),
        ("readers", json!({"room": ROOM})),
    ] {
        let answer = reply(&mut kim, op, fields).await;
        assert_ne!(answer["op"], "error", "{op}: {answer}");
    }
    // A ticket of one edge, on the other, which asks the first.
    let ticket = call(first, "POST", "/v1/tickets", &Value::Null)
        .await
        .unwrap();
    let ticket = ticket["ticket"].as_str().unwrap();
    let path = format!("/v1/rooms/chat:lobby/poll?ticket={ticket}");
    let (status, body) = http(second, "GET", &path, "", "").await.unwrap();
    assert_eq!(status, 204, "{body}");
    // A record of a room, its index, and a block; the other edge hears of changes.
    let group = json!({"namespace": "chat", "kind": "group", "name": "made", "members": ["kim"]});
    for (method, path, body) in [
        ("POST", "/v1/rooms", group),
        ("PUT", "/v1/users/kim/blocks/lee", Value::Null),
    ] {
        let (status, answer) = mesh::ask(first, (method, path), &token("kim"), &body).await;
        assert!(matches!(status, 201 | 204), "{path}: {status} {answer}");
    }
    call(second, "GET", "/v1/rooms/chat:made", &Value::Null)
        .await
        .unwrap();
    call(
        first,
        "PATCH",
        "/v1/rooms/chat:made",
        &json!({"title": "T"}),
    )
    .await
    .unwrap();
    eventually("the other edge has heard of a change", LONG, async || {
        let record = call(second, "GET", "/v1/rooms/chat:made", &Value::Null).await?;
        if record["title"] == "T" {
            Ok(())
        } else {
            Err(record.to_string())
        }
    })
    .await;
    // A replay from the beginning, on the other edge.
    let mut late = connect(second, "park").await;
    let page = call(second, "GET", "/v1/rooms/chat:lobby/messages", &Value::Null)
        .await
        .unwrap();
    let oldest = page["messages"][0]["cursor"].clone();
    let joined = reply(&mut late, "join", json!({"room": ROOM, "since": oldest})).await;
    assert!(
        joined["op"] == "joined" && joined["replay"].as_u64() >= Some(2),
        "{joined}"
    );
    eventually("both edges show everybody", LONG, async || {
        for edge in [first, second] {
            let shown = call(edge, "GET", "/v1/rooms/chat:lobby/presence", &Value::Null).await?;
            if shown["count"] != 3 {
                return Err(shown.to_string());
            }
        }
        Ok(())
    })
    .await;
    eventually("history has everything", LONG, async || {
        let page = call(second, "GET", "/v1/rooms/chat:lobby/messages", &Value::Null).await?;
        let found = call(
            second,
            "GET",
            "/v1/rooms/chat:lobby/search?q=hello",
            &Value::Null,
        )
        .await?;
        if page.get("partial").is_none() && found["messages"].as_array().map(Vec::len) == Some(2) {
            Ok(())
        } else {
            Err(format!("{page} {found}"))
        }
    })
    .await;
    // Purges, deletes, and announces.
    eventually("a user's messages are erased", LONG, async || {
        call(first, "DELETE", "/v1/users/park/messages", &Value::Null).await
    })
    .await;
    eventually("the room is erased", LONG, async || {
        call(first, "DELETE", "/v1/rooms/chat:lobby", &Value::Null).await
    })
    .await;
}

/// Tries what must be denied; panics where the server did not say so.
async fn denied(servers: &[Server], url: &str, user: &str, publish: &[&str], subscribe: &[&str]) {
    let client = client(url, user, None).await;
    for subject in publish {
        client
            .publish((*subject).to_owned(), "{}".into())
            .await
            .unwrap();
    }
    let mut kept = Vec::new();
    for subject in subscribe {
        kept.push(client.subscribe((*subject).to_owned()).await.unwrap());
    }
    client.flush().await.unwrap();
    let wanted = publish.iter().map(|subject| ("Publish", subject));
    let wanted = wanted.chain(subscribe.iter().map(|subject| ("Subscription", subject)));
    for (what, subject) in wanted {
        // What is published by hand, or to the server's own domain by its name, is judged by where that leads.
        let mapped = subject.replace("natter.pub.", "natter.put.local.");
        let mapped = mapped.replace("$JS.local.API.", "$JS.API.");
        let (said, about) = (format!("{what} Violation"), format!("Subject \"{mapped}\""));
        let by = format!("\"natter/user:{user}\"");
        eventually(&format!("{user} is denied {subject}"), LONG, async || {
            let violations = violations(servers);
            let found = violations
                .iter()
                .any(|line| [&said, &about, &by].iter().all(|part| line.contains(*part)));
            found.then_some(()).ok_or_else(|| violations.join("\n"))
        })
        .await;
    }
}

/// `NATTER_TEST_WRITE=1` writes them.
#[test]
fn the_accounts_of_the_example_regions_are_those_that_natter_prints() {
    for region in REGIONS {
        let file = deploy().join(format!("accounts/{region}.conf"));
        let text = accounts(&example(region, 16));
        if std::env::var_os("NATTER_TEST_WRITE").is_some() {
            fs::write(&file, &text).unwrap();
        }
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            text,
            "{}: NATTER_TEST_WRITE=1 writes it",
            file.display()
        );
    }
}

/// What was found to make a mesh heal soon is in both places.
#[test]
fn the_servers_of_a_deployment_are_tuned_as_those_of_natter_up() {
    let read =
        |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    for (ours, laptops, keys) in [
        ("parts/server.conf", "server.conf", &["max_payload: "][..]),
        ("parts/leaf.conf", "server.conf", &["reconnect: "]),
        (
            "spine.conf",
            "spine.conf",
            &[
                "max_payload: ",
                "ping_interval: ",
                "ping_max: ",
                "reject_unknown_cluster: ",
            ],
        ),
    ] {
        let (ours, laptops) = (
            read(&format!("deploy/nats/{ours}")),
            read(&format!("nats/{laptops}")),
        );
        for key in keys {
            let value = |text: &str| -> Option<String> {
                let mut lines = text.lines().map(str::trim);
                let line = lines.find_map(|line| line.strip_prefix(key))?;
                Some(line.split(" #").next().unwrap().to_owned())
            };
            assert_eq!(value(&ours), value(&laptops), "{key}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_user_may_do_what_it_needs_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let natter = Natter {
        dir: dir.path(),
        region: "local",
        url: String::new(),
        replicas: 1,
        partitions: 4,
        regions: &["local"],
        ca: None,
        database: unique("deploy"),
        leafnodes: String::new(),
        workers: String::new(),
        keys: Vec::new(),
    };
    let ports = Ports::free();
    let accounts =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("nats/accounts.conf"));
    let setting = Setting {
        dir: dir.path(),
        name: "nats",
        file: "one.conf",
        accounts: accounts.unwrap(),
        ports: &ports,
        env: vec![
            ("SERVER_NAME", "nats".to_owned()),
            ("REGION", "local".to_owned()),
        ],
        tls: PathBuf::new(),
        gateways: Vec::new(),
    };
    let servers = [start(setting).await];
    let url = format!("nats://127.0.0.1:{}", servers[0].client);
    let natter = Natter {
        url: url.clone(),
        ..natter
    };

    // What each needs.
    natter.tool("provision", &["provision"]).await;
    let again = natter.tool("provision", &["provision", "--dry-run"]).await;
    assert!(
        !again.contains("create") && !again.contains("update"),
        "{again}"
    );
    let (_history, _) = natter.start("history", "history").await;
    let (mut first, first_address) = natter.start("edge", "edge-1").await;
    let (_second, second_address) = natter.start("edge", "edge-2").await;
    use_it(first_address, second_address).await;
    let status = natter.tool("history", &["history", "status"]).await;
    assert!(status.contains("instance"), "{status}");
    natter.tool("history", &["history", "dead"]).await;

    // A person who looks.
    let operator = client(&url, "operator", None).await;
    let subjects = Subjects::new("natter");
    let room = RoomId::parse(ROOM).unwrap();
    let local = Region::parse("local").unwrap();
    let part = partition_of(&room, 4);
    let stream = rooms_stream(&local, part);
    let mut live = operator
        .subscribe(subjects.live(&local, part, &room))
        .await
        .unwrap();
    operator.flush().await.unwrap();
    ask(
        &operator,
        &format!("$JS.API.STREAM.INFO.{stream}"),
        r#"{"subjects_filter":">"}"#,
    )
    .await;
    ask(&operator, "$JS.API.STREAM.LIST", "").await;
    ask(&operator, "$JS.API.CONSUMER.LIST.ROOMS_local_0", "{}").await;
    ask(&operator, "$SRV.STATS.natter-history", "").await;
    // A person who may publish by hand: through both mappings.
    let admin = client(&url, "admin", None).await;
    let ack = ask(&admin, &subjects.by_hand(&room), r#"{"text":"by hand"}"#).await;
    assert_eq!(ack["stream"], json!(stream));
    let seen = live.next().await.unwrap();
    assert_eq!(&seen.payload[..], br#"{"text":"by hand"}"#);

    // A record without an index is listed, and gets its index, by the history service.
    let stamp = json!({"at": 1, "origin": "local", "role": "member", "state": "in"});
    let record = json!({"kind": "group", "created": 1, "by": "kim", "members": {"kim": stamp}});
    ask(&admin, "$KV.rooms_local.chat.lost", &record.to_string()).await;
    for path in ["/v1/inbox", "/v1/rooms"] {
        eventually(path, LONG, async || {
            let page = call(first_address, "GET", path, &Value::Null).await?;
            let found = page["rooms"].as_array().unwrap().iter();
            let lost = found
                .map(|room| &room["room"])
                .any(|room| room == "chat:lost");
            lost.then_some(()).ok_or(page.to_string())
        })
        .await;
    }

    // The keys of an edge that died are purged by another one: the only purge an edge may do.
    let endpoint = format!("ws://{first_address}/ws").parse().unwrap();
    let mut last = natter::testing::client::Connection::open(&endpoint, Some(&token("choi")))
        .await
        .unwrap();
    let joined = reply(&mut last, "join", json!({"room": ROOM, "presence": true})).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    let keys = async || {
        let filter = r#"{"subjects_filter":"$KV.presence_local.*.*.choi.*"}"#;
        let info = ask(&operator, "$JS.API.STREAM.INFO.KV_presence_local", filter).await;
        info["state"]["subjects"]
            .as_object()
            .map_or(0, serde_json::Map::len)
    };
    eventually("there is a key", LONG, async || {
        if keys().await == 1 {
            Ok(())
        } else {
            Err("none".to_owned())
        }
    })
    .await;
    first.kill().await;
    eventually("the key is purged", LONG, async || {
        if keys().await == 0 {
            Ok(())
        } else {
            Err("still there".to_owned())
        }
    })
    .await;
    assert_eq!(violations(&servers), [""; 0]);
    // It may do what the doctor thinks that an edge must.
    let found = natter.tool("edge", &["doctor"]).await;
    assert!(found.contains("problems 0"), "{found}");

    // What nobody may do.
    let config_of = async |stream: &str| {
        ask(&admin, &format!("$JS.API.STREAM.INFO.{stream}"), "").await["config"].clone()
    };
    let before = (
        config_of(&stream).await,
        ask(&admin, "$JS.API.STREAM.NAMES", "").await,
    );
    let streams = [
        "$JS.API.STREAM.DELETE.ROOMS_local_0",
        "$JS.API.STREAM.PURGE.KV_lastread_local",
        "$JS.API.CONSUMER.CREATE.ROOMS_local_0.other",
        "$JS.API.CONSUMER.DURABLE.CREATE.ROOMS_local_0.history",
        "$JS.API.CONSUMER.DELETE.ROOMS_local_0.history",
        "$JS.API.STREAM.SNAPSHOT.ROOMS_local_0",
        "$KV.control_local.x",
        "natter.in.virginia.0.chat.lobby.msg",
        "natter.live.local.local.0.chat.lobby.msg",
        "natter.pub.chat.lobby",
        "_INBOX.edge.x",
    ];
    let create = "$JS.API.STREAM.CREATE.OTHER";
    let own = format!("$JS.API.STREAM.PURGE.{stream}");
    let with =
        |more: &[&'static str]| -> Vec<&str> { streams.iter().chain(more).copied().collect() };
    let rooms = ["natter.in.>", "_INBOX.>", ">"];
    let mut tried = with(&[
        create,
        "$JS.API.STREAM.UPDATE.ROOMS_local_0",
        "$JS.API.STREAM.MSG.DELETE.ROOMS_local_0",
        "$KV.presence_virginia.x",
        "natter.dead.local.0.chat.lobby.msg",
    ]);
    tried.push(&own);
    denied(&servers, &url, "edge", &tried, &rooms).await;
    let tried = with(&[
        create,
        "$JS.API.STREAM.UPDATE.ROOMS_local_0",
        "$JS.API.STREAM.PURGE.KV_presence_local",
        "natter.in.local.0.chat.lobby.msg",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "$KV.presence_local.x",
        "$KV.rooms_local.chat.x",
        "$KV.inbox_local.kim.blocks.user.lee",
    ]);
    denied(&servers, &url, "history", &tried, &rooms).await;
    let mut tried = with(&[
        "natter.in.local.0.chat.lobby.msg",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "$KV.presence_local.x",
    ]);
    tried.push(&own);
    denied(&servers, &url, "provision", &tried, &rooms).await;
    let mut tried = with(&[
        create,
        "$JS.API.STREAM.UPDATE.ROOMS_local_0",
        "$JS.API.STREAM.MSG.DELETE.ROOMS_local_0",
        "$JS.API.CONSUMER.MSG.NEXT.ROOMS_local_0.history",
        "natter.in.local.0.chat.lobby.msg",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "$KV.presence_local.x",
        "$JS.ACK.ROOMS_local_0.history.1.1.1.1.1",
    ]);
    tried.push(&own);
    denied(&servers, &url, "operator", &tried, &rooms).await;
    let mut tried = with(&[
        create,
        "$JS.API.STREAM.UPDATE.ROOMS_local_0",
        "$JS.API.STREAM.INFO.ROOMS_local_0",
        "$JS.API.DIRECT.GET.ROOMS_local_0",
        "$JS.virginia.API.STREAM.INFO.ROOMS_virginia_0",
        "$JS.virginia.API.STREAM.PURGE.ROOMS_virginia_0",
        "$JS.virginia.API.CONSUMER.CREATE.ROOMS_virginia_0.history",
        // Its rights are for other regions.
        "$JS.local.API.CONSUMER.CREATE.ROOMS_local_0",
        "$JS.API.CONSUMER.MSG.NEXT.ROOMS_local_0.history",
        "natter.in.local.0.chat.lobby.msg",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "$KV.presence_local.x",
        "$JSC.R.x",
        "_INBOX.mirrors.x",
    ]);
    tried.push(&own);
    let heard = [&rooms[..], &["natter.live.>", "$JS.>", "_INBOX.history.>"]].concat();
    denied(&servers, &url, "mirrors", &tried, &heard).await;
    let after = (
        config_of(&stream).await,
        ask(&admin, "$JS.API.STREAM.NAMES", "").await,
    );
    assert_eq!(before, after);
}

/// The user of workers and hooks is printed for a configuration that has some.
#[tokio::test(flavor = "multi_thread")]
async fn the_user_of_workers_may_do_what_they_need_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::start(|asked| match asked.id() {
        "bad" => Say::Status(500),
        _ => Say::Json(json!({"score": -1})),
    })
    .await;
    let url = endpoint.url();
    let workers = format!(
        "[{{name = \"mood\", rooms = [\"chat:*\"], url = \"{url}\", annotation = \"mood\", max_deliver = 1, \
         secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\", alert = \"mood.score < 0\", allow = [\"127.0.0.1\"]}}]"
    );
    let receiver = Endpoint::start(|asked| match asked.body["data"]["message"]["id"].as_str() {
        Some("bad") => Say::Status(500),
        _ => Say::Status(204),
    })
    .await;
    let url = receiver.url();
    let hooks = format!(
        "[{{name = \"all\", rooms = [\"chat:*\"], url = \"{url}\", retry_for = \"1s\", allow = [\"127.0.0.1\"], \
         secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\", events = [\"message.created\", \"user.online\"]}}]"
    );
    let ports = Ports::free();
    let setting = Setting {
        dir: dir.path(),
        name: "nats",
        file: "one.conf",
        accounts: accounts(&config(&format!(
            "workers = {workers}\nhooks = {hooks}\npresence.users = true"
        ))),
        ports: &ports,
        env: vec![
            ("SERVER_NAME", "nats".to_owned()),
            ("REGION", "local".to_owned()),
        ],
        tls: PathBuf::new(),
        gateways: Vec::new(),
    };
    let servers = [start(setting).await];
    let url = format!("nats://127.0.0.1:{}", servers[0].client);
    let natter = Natter {
        dir: dir.path(),
        region: "local",
        url: url.clone(),
        replicas: 1,
        partitions: 4,
        regions: &["local"],
        ca: None,
        database: unique("deploy"),
        leafnodes: String::new(),
        workers,
        keys: vec![
            ("NATTER__HOOKS", hooks),
            ("NATTER__PRESENCE__USERS", "true".to_owned()),
        ],
    };
    natter.tool("provision", &["provision"]).await;
    let (_edge, edge) = natter.start("edge", "edge").await;
    let (_worker, _) = natter.start("worker", "worker").await;
    let (_hooks, _) = natter.start("hooks", "hooks").await;
    let socket = format!("ws://{edge}/ws").parse().unwrap();
    let _kim = Connection::open(&socket, Some(&token("kim")))
        .await
        .unwrap();
    let say = async |body: Value| {
        let path = "/v1/rooms/chat:lobby/messages";
        call(edge, "POST", path, &body).await.unwrap();
    };
    let group = json!({"namespace": "chat", "kind": "group", "name": "lobby", "members": ["kim"]});
    let (status, answer) = mesh::ask(edge, ("POST", "/v1/rooms"), &token("kim"), &group).await;
    assert_eq!(status, 201, "{answer}");
    say(json!({"id": "m1", "body": "hi"})).await;
    say(json!({"kind": "edit", "target": "m1", "body": "ho"})).await;
    say(json!({"id": "bad", "body": "hi"})).await;
    eventually("everything is done", LONG, async || {
        let record = call(edge, "GET", "/v1/rooms/chat:lobby", &Value::Null).await?;
        let page = call(edge, "GET", "/v1/rooms/chat:lobby/messages", &Value::Null).await?;
        let dead = natter.tool("worker", &["worker", "dead"]).await;
        let asked = endpoint.asked().len();
        let is_marked = record["alert"]["worker"] == "mood";
        if is_marked && page.to_string().contains("\"mood\"") && dead.contains("bad") && asked == 3
        {
            Ok(())
        } else {
            Err(format!("{record} {page} {dead} {asked}"))
        }
    })
    .await;
    endpoint.behave(|_| Say::Status(204));
    natter.tool("worker", &["worker", "retry"]).await;
    assert_eq!(natter.tool("worker", &["worker", "dead"]).await, "");
    eventually("the receiver is told", LONG, async || {
        let asked = receiver.asked();
        let of = |kind: &str| asked.iter().any(|asked| asked.body["type"] == kind);
        let dead = natter.tool("worker", &["hooks", "dead"]).await;
        match of("message.created") && of("user.online") && dead.contains("bad") {
            true => Ok(()),
            false => Err(format!("{asked:?} {dead}")),
        }
    })
    .await;
    receiver.behave(|_| Say::Status(204));
    natter.tool("worker", &["hooks", "retry"]).await;
    assert_eq!(natter.tool("worker", &["hooks", "dead"]).await, "");
    assert_eq!(violations(&servers), [""; 0]);
    let tried = [
        "natter.in.local.0.chat.lobby.msg",
        "natter.in.virginia.0.chat.lobby.ev",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "natter.svc.history.local.erase",
        "natter.dead.local.0.chat.lobby.msg",
        "$KV.presence_local.x",
        "$KV.control_local.x",
        "$JS.API.STREAM.DELETE.ROOMS_local_0",
        "$JS.API.STREAM.PURGE.ROOMS_local_0",
        "$JS.API.STREAM.MSG.DELETE.ROOMS_local_0",
        "$JS.API.CONSUMER.CREATE.ROOMS_local_0.other",
        "$JS.API.CONSUMER.MSG.NEXT.ROOMS_local_0.history",
        "$JS.ACK.ROOMS_local_0.history.1.1.1.1.1",
    ];
    let heard = ["natter.in.>", "natter.live.>", "_INBOX.>", ">"];
    denied(&servers, &url, "worker", &tried, &heard).await;
}

/// The user of notifiers is printed for a configuration that has a service.
#[tokio::test(flavor = "multi_thread")]
async fn the_user_of_notifiers_may_do_what_they_need_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    // One device is gone, and is removed.
    let service = Endpoint::start(|asked| match asked.body["token"].as_str() {
        Some("gone") => Say::Status(410),
        _ => Say::Status(204),
    })
    .await;
    let (url, secret) = (service.url(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    let push = format!("[push]\nwebhook_url = '{url}'\nwebhook_secret = '{secret}'");
    let ports = Ports::free();
    let setting = Setting {
        dir: dir.path(),
        name: "nats",
        file: "one.conf",
        accounts: accounts(&config(&push)),
        ports: &ports,
        env: vec![
            ("SERVER_NAME", "nats".to_owned()),
            ("REGION", "local".to_owned()),
        ],
        tls: PathBuf::new(),
        gateways: Vec::new(),
    };
    let servers = [start(setting).await];
    let url = format!("nats://127.0.0.1:{}", servers[0].client);
    let natter = Natter {
        dir: dir.path(),
        region: "local",
        url: url.clone(),
        replicas: 1,
        partitions: 4,
        regions: &["local"],
        ca: None,
        database: unique("deploy"),
        leafnodes: String::new(),
        workers: String::new(),
        keys: vec![
            ("NATTER__PRESENCE__USERS", "true".to_owned()),
            ("NATTER__PUSH__WEBHOOK_URL", service.url()),
            ("NATTER__PUSH__WEBHOOK_SECRET", secret.to_owned()),
            ("NATTER__PUSH__ALLOW", "[\"127.0.0.1\"]".to_owned()),
            ("NATTER__PUSH__AFTER", "1s".to_owned()),
        ],
    };
    natter.tool("provision", &["provision"]).await;
    let (_edge, edge) = natter.start("edge", "edge").await;
    let (_notifier, notifier) = natter.start("notifier", "notifier").await;
    let group = json!({"namespace": "chat", "kind": "group", "name": "lobby", "members": ["lee"]});
    let (status, answer) = mesh::ask(edge, ("POST", "/v1/rooms"), &token("kim"), &group).await;
    assert_eq!(status, 201, "{answer}");
    for (device, its) in [("pager", "7"), ("old", "gone")] {
        let path = format!("/v1/devices/{device}");
        let body = json!({"kind": "webhook", "token": its});
        let (status, answer) = mesh::ask(edge, ("PUT", &path), &token("lee"), &body).await;
        assert_eq!(status, 204, "{answer}");
    }
    let path = "/v1/rooms/chat:lobby/messages";
    let said = call(edge, "POST", path, &json!({"id": "m1", "body": "hi"}))
        .await
        .unwrap();
    eventually(
        "it is notified, and the old device is gone",
        LONG,
        async || {
            let (_, found) =
                mesh::ask(edge, ("GET", "/v1/devices"), &token("lee"), &Value::Null).await;
            let notified = service
                .asked()
                .iter()
                .any(|asked| asked.body["token"] == "7");
            let names = found["devices"].as_array().map_or(0, Vec::len);
            if notified && names == 1 {
                Ok(())
            } else {
                Err(found.to_string())
            }
        },
    )
    .await;
    // It follows what is read.
    let body = json!({"cursor": said["cursor"]});
    let path = "/v1/rooms/chat:lobby/read";
    let (status, answer) = mesh::ask(edge, ("PUT", path), &token("lee"), &body).await;
    assert_eq!(status, 200, "{answer}");
    eventually("the badge is updated", LONG, async || {
        let asked = service.asked();
        let badge = |asked: &&Asked| asked.body["message"] == Value::Null;
        match asked.iter().find(badge) {
            Some(asked) if asked.body["badge"] == 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let (status, _) = mesh::http(notifier, "GET", "/readyz", "", "")
        .await
        .unwrap();
    assert_eq!(status, 200);
    assert_eq!(violations(&servers), [""; 0]);
    let tried = [
        "natter.in.local.0.chat.lobby.msg",
        "natter.in.local.0.chat.lobby.ev",
        "natter.eph.chat.lobby",
        "natter.edge.orders",
        "natter.edge.user.kim",
        "natter.svc.history.local.erase",
        "$KV.presence_local.x",
        "$KV.lastread_local.x",
        "$KV.rooms_local.chat.x",
        "$KV.inbox_local.kim.chat.lobby",
        "$KV.control_local.x",
        "$JS.API.STREAM.DELETE.ROOMS_local_0",
        "$JS.API.STREAM.PURGE.KV_devices_local",
        "$JS.API.CONSUMER.CREATE.ROOMS_local_0.other",
        "$JS.API.CONSUMER.MSG.NEXT.ROOMS_local_0.history",
        "$JS.ACK.ROOMS_local_0.history.1.1.1.1.1",
    ];
    let heard = ["natter.in.>", "natter.live.>", "_INBOX.>", ">"];
    denied(&servers, &url, "notifier", &tried, &heard).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn regions_of_three_servers_with_tls_are_a_mesh() {
    let mesh = Mesh::of_three(&REGIONS[..2]).await;
    let ca = mesh.ca();
    let natter = Natter {
        dir: mesh.dir.path(),
        region: "seoul",
        url: mesh.url(0),
        replicas: 3,
        partitions: PARTITIONS,
        regions: &REGIONS[..2],
        ca: Some(ca.clone()),
        database: unique("deploy"),
        leafnodes: String::new(),
        workers: String::new(),
        keys: Vec::new(),
    };
    // Both regions, and their mirrors, over one connection, through the spines.
    let text = eventually("the mesh is provisioned", LONG, async || {
        natter.try_tool("provision", &["provision"]).await
    })
    .await;
    assert!(text.contains("frankfurt"), "{text}");
    eventually("nothing is wrong", LONG, async || {
        natter.try_tool("admin", &["doctor"]).await
    })
    .await;
    // Of both: a page that lacks what another region has in hand says so. They help mirrors on.
    let natter = Natter {
        leafnodes: mesh.leafnodes(0),
        ..natter
    };
    let (_history, _) = natter.start("history", "history").await;
    let away = Natter {
        region: "frankfurt",
        url: mesh.url(1),
        leafnodes: mesh.leafnodes(1),
        ..natter.clone()
    };
    let (_history_there, _) = away.start("history", "history-there").await;
    let (_first, first) = natter.start("edge", "edge-1").await;
    let (_second, second) = natter.start("edge", "edge-2").await;
    use_it(first, second).await;

    // What is said here arrives in the mirror there, for the edges there.
    let first_url = |region: usize| mesh.url(region).split(',').next().unwrap().to_owned();
    let (here, there) = (first_url(0), first_url(1));
    let room = RoomId::parse(ROOM).unwrap();
    let part = partition_of(&room, PARTITIONS);
    let seoul = Region::parse("seoul").unwrap();
    let frankfurt = Region::parse("frankfurt").unwrap();
    let subjects = Subjects::new("natter");
    let edge_there = client(&there, "edge", Some(&ca)).await;
    let mut live = edge_there
        .subscribe(subjects.live(&frankfurt, part, &room))
        .await
        .unwrap();
    let signals = edge_there
        .subscribe(subjects.ephemeral(&room))
        .await
        .unwrap();
    let signals = tokio::sync::Mutex::new(signals);
    edge_there.flush().await.unwrap();
    let edge_here = client(&here, "edge", Some(&ca)).await;
    ask(
        &edge_here,
        &subjects.publish(&seoul, part, &room, Class::Msg),
        "\"over the sea\"",
    )
    .await;
    // A new mirror republishes what was before as well.
    loop {
        let message = tokio::time::timeout(LONG, live.next()).await;
        if message.expect("in time").unwrap().payload == "\"over the sea\"" {
            break;
        }
    }
    eventually("a signal reaches the other region", LONG, async || {
        edge_here
            .publish(subjects.ephemeral(&room), "1".into())
            .await
            .unwrap();
        edge_here.flush().await.unwrap();
        let short = std::time::Duration::from_millis(100);
        let mut signals = signals.lock().await;
        let seen = tokio::time::timeout(short, signals.next()).await;
        seen.map(drop).map_err(|error| error.to_string())
    })
    .await;
    // A member there sees what is said here, and is seen here: edges and users of both regions.
    let (mut there_edge, third) = away.start("edge", "edge-3").await;
    let endpoint = format!("ws://{third}/ws").parse().unwrap();
    let mut han = natter::testing::client::Connection::open(&endpoint, Some(&token("han")))
        .await
        .unwrap();
    let joined = reply(&mut han, "join", json!({"room": ROOM, "presence": true})).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    let said = json!({"id": "far", "body": {"text": "from seoul"}});
    call(first, "POST", "/v1/rooms/chat:lobby/messages", &said)
        .await
        .unwrap();
    loop {
        let frame = tokio::time::timeout(LONG, han.next()).await;
        if frame.expect("in time").unwrap().json()["id"] == "far" {
            break;
        }
    }
    eventually("han is seen from the other region", LONG, async || {
        let path = "/v1/rooms/chat:lobby/presence";
        let shown = call(first, "GET", path, &Value::Null).await?;
        let users = shown["users"].as_array().unwrap();
        let here = users.iter().any(|user| user["user"] == "han");
        here.then_some(()).ok_or_else(|| shown.to_string())
    })
    .await;
    // What its edge leaves when it dies is purged from the mirror here, too.
    let admin = client(&here, "admin", Some(&ca)).await;
    let keys = async || {
        let filter = r#"{"subjects_filter":"$KV.presence_frankfurt.*.*.han.*"}"#;
        let stream = "$JS.API.STREAM.INFO.KV_presence_frankfurt";
        let info = ask(&admin, stream, filter).await;
        info["state"]["subjects"]
            .as_object()
            .map_or(0, serde_json::Map::len)
    };
    assert_eq!(keys().await, 1);
    there_edge.kill().await;
    eventually("its keys are purged from the mirror", LONG, async || {
        let left = keys().await;
        (left == 0).then_some(()).ok_or_else(|| left.to_string())
    })
    .await;
    for servers in &mesh.regions {
        assert_eq!(violations(servers), [""; 0]);
    }
    // Each of the three takes who helps mirrors on, and an edge may do here what it must, too.
    eventually("mirrors can be helped on", LONG, async || {
        natter.try_tool("admin", &["doctor"]).await
    })
    .await;
    let found = natter.tool("edge", &["doctor"]).await;
    assert!(found.contains("problems 0"), "{found}");
}

/// A request of a mirror that was lost in a cut is answered after it: only because the history service has repeated it, as a
/// user that may do no more.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_mirror_asked_during_a_cut_is_asked_again_by_the_history_service() {
    let mut mesh = Mesh::of_one(&REGIONS[..2]).await;
    let natter = Natter {
        dir: mesh.dir.path(),
        region: "frankfurt",
        url: mesh.url(1),
        replicas: 1,
        partitions: PARTITIONS,
        regions: &REGIONS[..2],
        // Of the ports for leaf nodes.
        ca: Some(mesh.ca()),
        database: unique("deploy"),
        leafnodes: mesh.leafnodes(1),
        workers: String::new(),
        keys: Vec::new(),
    };
    eventually("the mesh is provisioned", LONG, async || {
        natter.try_tool("provision", &["provision"]).await
    })
    .await;
    let (_history, _) = natter.start("history", "history").await;
    let sys = client(&natter.url, "sys", None).await;
    eventually("it listens", LONG, async || {
        let subject = format!("{}CONNZ", api::PING_SERVERS);
        let shown = ask(&sys, &subject, r#"{"subscriptions":true}"#).await;
        let connections = shown["data"]["connections"].as_array().unwrap();
        let its = connections.iter().find(|connection| {
            connection["name"] == "natter history mirrors"
                && connection["subscriptions_list"]
                    .as_array()
                    .is_some_and(|list| list.contains(&json!(api::CONSUMER_ANSWERS)))
        });
        its.map(drop).ok_or_else(|| shown.to_string())
    })
    .await;
    // What mirrors ask when they are made is not what this is about.
    let admin = client(&natter.url, "admin", None).await;
    let seoul = Region::parse("seoul").unwrap();
    for part in 0..PARTITIONS {
        let info = api::stream_info(&rooms_stream(&seoul, part));
        eventually("the mirror hears its origin", LONG, async || {
            let answer = ask(&admin, &info, "").await;
            // Nanoseconds since it heard something; -1: never.
            match answer["mirror"]["active"].as_i64() {
                Some(active) if active >= 0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    // A mirror in frankfurt hears nothing for 10 s, and asks again.
    let spine = &mut mesh.regions[0].last_mut().unwrap().process;
    spine.kill().await;
    let mut overheard = Overheard::listen(&admin).await;
    let reply = overheard.asked().await;
    spine.start().await.unwrap();
    overheard.answered(&reply).await;
    for servers in &mesh.regions {
        assert_eq!(violations(servers), [""; 0]);
    }

    // The server takes nobody else as a leaf node.
    eventually("mirrors can be helped on", LONG, async || {
        natter.try_tool("admin", &["doctor"]).await
    })
    .await;
    for (user, password) in [("mirrors", "wrong"), ("admin", &*password("admin"))] {
        let who = [
            ("NATTER__MIRRORS__USER", user),
            ("NATTER__MIRRORS__PASSWORD", password),
        ];
        let found = natter.try_tool_with("admin", &["doctor"], &who).await;
        let found = found.unwrap_err();
        assert!(found.contains("refuses the leaf node"), "{user}: {found}");
    }
    // And we send no password to one whose certificate we don't trust.
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/keys/nats-ca.pem");
    let other = [("SSL_CERT_FILE", other)];
    let found = natter.try_tool_with("admin", &["doctor"], &other).await;
    let found = found.unwrap_err();
    assert!(found.contains("can't be reached as a leaf node"), "{found}");
}
