//! Who is in a room: snapshots, pushes, pages, policies, bursts, drains.

use std::time::Duration;

use natter::testing::{
    auth::{Claims, Grant, Right, issue},
    client::Connection,
    model::RoomId,
    runtime::unix_s,
    subject::{bucket, presence_keys},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    self, LONG,
    calls::{next, reply},
    eventually,
    mesh::{Mesh, SECRET, http, token, token_with},
    presence::{Follower, bucket_of, living},
    signal,
};

fn names(reply: &Value) -> Vec<&str> {
    let users = reply["users"].as_array().unwrap();
    users.iter().map(|u| u["user"].as_str().unwrap()).collect()
}

async fn join(mesh: &Mesh, edge: usize, user: &str, room: &str) -> Connection {
    let mut connection = mesh.connect(edge, user).await;
    let joined = reply(&mut connection, "join", json!({"room": room})).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    connection
}

/// What a presence command answers once `count` users are there.
async fn list_of(connection: &mut Connection, room: &str, count: u64) -> Value {
    let commands = connection.commands();
    eventually("the list is complete", LONG, async || {
        let fields = json!({"room": room, "limit": 1000});
        let answer = commands.call("presence", fields).await;
        let answer = answer.map_err(|error| error.to_string())?.json();
        if answer["count"] == json!(count) {
            Ok(answer)
        } else {
            Err(answer.to_string())
        }
    })
    .await
}

#[tokio::test]
async fn users_come_and_go_over_edges_and_tabs() {
    let mesh = Mesh::start(support::nats_url(), 2, "edge.shards = 2").await;
    let room = "chat:lobby";
    let mut kim = Follower::join(&mesh, 0, "kim", room).await;
    assert_eq!(kim.users.len(), 1, "who asks is there themselves");

    let mut claims = Claims::new("lee@x.org", unix_s() + 3600);
    claims.grants = vec![Grant::new("*:*", &Right::ALL)];
    claims.info = serde_json::from_str(r#"{"name":"이 \"Lee\""}"#).ok();
    let named = issue(&claims, SECRET).unwrap();
    let mut lee = Connection::open(&mesh.endpoint(1), Some(&named))
        .await
        .unwrap();
    reply(&mut lee, "join", json!({"room": room})).await;
    kim.until(&["kim", "lee@x.org"]).await;
    let push = kim.pushed().await.pop().unwrap();
    assert_eq!(push["info"], json!({"name": "이 \"Lee\""}));
    let since = push["at"].as_u64().unwrap();

    // Both edges show the same, over both protocols.
    let expected = json!([
        {"user": "kim", "since": kim.users["kim"]},
        {"user": "lee@x.org", "info": {"name": "이 \"Lee\""}, "since": since},
    ]);
    for edge in [0, 1] {
        let mut asks = mesh.connect(edge, "operator").await;
        let answer = list_of(&mut asks, room, 2).await;
        assert_eq!(answer["users"], expected, "edge {edge}");
        assert_eq!(answer.get("next"), None);
        let headers = format!("Authorization: Bearer {}\r\n", token("operator"));
        let path = "/v1/rooms/chat%3Alobby/presence?limit=1";
        let (status, body) = http(mesh.edges[edge].address, "GET", path, &headers, "")
            .await
            .unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200, "{body}");
        assert_eq!(
            body,
            json!({"room": room, "count": 2, "users": [expected[0]], "next": "kim"})
        );
    }

    // More tabs of theirs, on either edge and on other shards, are nothing new; nor is it when they go.
    let mut tabs = Vec::new();
    for tab in 0..4 {
        tabs.push(join(&mesh, tab % 2, "lee@x.org", room).await);
    }
    for tab in tabs {
        tab.close().await;
    }
    // Who joins again, or another room, has not left.
    reply(&mut lee, "join", json!({"room": room})).await;
    reply(&mut lee, "join", json!({"room": "chat:other"})).await;
    let park = join(&mesh, 1, "park", room).await;
    kim.until(&["kim", "lee@x.org", "park"]).await;
    let pushes = kim.pushed().await;
    assert_eq!(pushes.len(), 1, "{pushes:?}");

    // Leaving, and a connection that ends in whatever way.
    reply(&mut lee, "leave", json!({"room": room})).await;
    kim.until(&["kim", "park"]).await;
    drop(park);
    kim.until(&["kim"]).await;
    let left = list_of(&mut lee, room, 1).await;
    assert_eq!(names(&left), ["kim"]);

    // A token that loses the right is told nothing more.
    kim.pushed().await;
    let hour = Duration::from_secs(3600);
    let less = token_with("kim", hour, vec![Grant::new("*:*", &[Right::Read])]);
    let refreshed = reply(&mut kim.connection, "refresh", json!({"token": less})).await;
    assert_eq!(refreshed["op"], "refreshed");
    let mut asks = Follower::join(&mesh, 0, "asks", room).await;
    reply(&mut lee, "join", json!({"room": room})).await;
    asks.until(&["asks", "kim", "lee@x.org"]).await;
    assert_eq!(kim.pushed().await, [] as [Value; 0]);
}

#[tokio::test]
async fn keys_are_for_people_to_read() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let _kim = join(&mesh, 0, "kim@x.org", "chat:lobby").await;
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    let entry = eventually("the key is written", LONG, async || {
        let room = RoomId::parse("chat:lobby").unwrap();
        living(&presence, &presence_keys(&room))
            .await
            .pop()
            .ok_or_else(String::new)
    })
    .await;
    let (user, lease) = entry.key.rsplit_once('.').unwrap();
    assert_eq!(user, "chat.lobby.kim=40x=2Eorg");
    assert!(lease.starts_with("edge-0-"), "{lease}");
    let value: Value = serde_json::from_slice(entry.value.as_ref().unwrap()).unwrap();
    assert!(value["since"].is_u64(), "{value}");
    let edges = bucket_of(&mesh, bucket::EDGES).await;
    let leases = living(&edges, ">").await;
    let keys: Vec<&str> = leases.iter().map(|entry| &*entry.key).collect();
    assert_eq!(keys, [&*format!("used.{lease}"), lease]);
}

#[tokio::test]
async fn long_lists_come_in_pages() {
    let mesh = Mesh::start(support::nats_url(), 2, "").await;
    let room = "chat:big";
    let mut members = Vec::new();
    let mut expected = Vec::new();
    for i in 0..45 {
        expected.push(format!("user {i:02}"));
        members.push(join(&mesh, i % 2, &expected[i], room).await);
    }
    for edge in [0, 1] {
        let mut asks = mesh.connect(edge, "operator").await;
        list_of(&mut asks, room, 45).await;
        let (mut found, mut after, mut pages) = (Vec::new(), Value::Null, 0);
        loop {
            let fields = json!({"room": room, "limit": 10, "after": after});
            let page = reply(&mut asks, "presence", fields).await;
            found.extend(names(&page).into_iter().map(str::to_owned));
            pages += 1;
            after = page["next"].clone();
            if after.is_null() {
                break;
            }
        }
        assert_eq!((&found, pages), (&expected, 5));
    }
}

#[tokio::test]
async fn what_may_not_be_seen_is_refused() {
    let toml = "namespaces.dark = {durable = true, typing = true, presence = 'off'}";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let hour = Duration::from_secs(3600);
    let little = token_with("lee", hour, vec![Grant::new("*:*", &[Right::Read])]);
    let mut lee = Connection::open(&mesh.endpoint(0), Some(&little))
        .await
        .unwrap();
    let mut kim = mesh.connect(0, "kim").await;
    for (who, op, fields, code) in [
        (0, "presence", json!({"room": "chat:a"}), "forbidden"),
        (
            0,
            "join",
            json!({"room": "chat:a", "presence": true}),
            "forbidden",
        ),
        (1, "presence", json!({"room": "dark:a"}), "bad_request"),
        (
            1,
            "join",
            json!({"room": "dark:a", "presence": true}),
            "bad_request",
        ),
        (
            1,
            "presence",
            json!({"room": "nowhere:a"}),
            "unknown_namespace",
        ),
        (
            1,
            "presence",
            json!({"room": "chat:a", "limit": 1001}),
            "bad_request",
        ),
    ] {
        let connection = if who == 0 { &mut lee } else { &mut kim };
        let answer = reply(connection, op, fields.clone()).await;
        assert_eq!(answer["code"], code, "{op} {fields}: {answer}");
    }
    // Joining without asking for it is another matter.
    let joined = reply(
        &mut lee,
        "join",
        json!({"room": "chat:a", "presence": false}),
    )
    .await;
    assert_eq!(joined["op"], "joined");
    let address = mesh.edges[0].address;
    for (token, path, status, code) in [
        (&little, "chat:a/presence", 403, "forbidden"),
        (&token("kim"), "dark:a/presence", 400, "bad_request"),
        (
            &token("kim"),
            "nowhere:a/presence",
            404,
            "unknown_namespace",
        ),
        (&token("kim"), "chat.a/presence", 400, "bad_room"),
        (&token("kim"), "chat:a/presence?limit=0", 400, "bad_request"),
        (&token("kim"), "chat:a/presence?limit=x", 400, "bad_request"),
    ] {
        let headers = format!("Authorization: Bearer {token}\r\n");
        let path = format!("/v1/rooms/{path}");
        let (found, body) = http(address, "GET", &path, &headers, "").await.unwrap();
        assert!(
            found == status && body.contains(code),
            "{path}: {found} {body}"
        );
    }
}

#[tokio::test]
async fn large_rooms_and_rooms_of_counts_tell_how_many() {
    let mesh = Mesh::start(support::nats_url(), 2, "limits.presence_push_max = 5").await;
    for (room, named) in [("chat:big", true), ("live:match", false)] {
        let mut asks = mesh.connect(0, "asks").await;
        let fields = json!({"room": room, "presence": true});
        reply(&mut asks, "join", fields).await;
        let mut members = Vec::new();
        for i in 0..12 {
            members.push(join(&mesh, i % 2, &format!("user{i}"), room).await);
        }
        let mut pushes = Vec::new();
        while pushes
            .last()
            .is_none_or(|last: &Value| last["count"] != json!(13))
        {
            pushes.push(next(&mut asks).await.json());
        }
        let users = pushes
            .iter()
            .filter(|push| push["user"].is_string())
            .count();
        assert!(if named { users <= 5 } else { users == 0 }, "{pushes:#?}");
        let list = list_of(&mut asks, room, 13).await;
        assert_eq!(names(&list).len(), if named { 13 } else { 0 });

        // When most have left, names are told again.
        for member in members {
            member.close().await;
        }
        let mut told = loop {
            let push = next(&mut asks).await.json();
            if push["count"] == json!(1) {
                break push;
            }
        };
        if named {
            // The client's list is stale since the count; it follows the names from here.
            let mut n = 0;
            while told["user"].is_null() {
                n += 1;
                let visitor = join(&mesh, 1, &format!("visitor{n}"), room).await;
                told = next(&mut asks).await.json();
                visitor.close().await;
            }
            assert!(told["user"].as_str().unwrap().starts_with("visitor"));
        }
    }
}

/// 10,000 joins and leaves in one room within some seconds: writes to NATS and pushes stay bounded, and in the end everybody
/// has it right.
#[tokio::test]
async fn a_storm_of_joins_and_leaves_is_coalesced() {
    const USERS: u64 = 100;
    const ROUNDS: u64 = 50;
    let mesh = Mesh::start(support::nats_url(), 2, "limits.commands_burst = 100000").await;
    let room = "chat:storm";
    let mut near = Follower::join(&mesh, 0, "near", room).await;
    let mut far = Follower::join(&mesh, 1, "far", room).await;
    near.until(&["far", "near"]).await;
    far.until(&["far", "near"]).await;
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    let before = presence.newest(">").await.unwrap();
    near.pushed().await;
    far.pushed().await;

    let started = std::time::Instant::now();
    let mut users = Vec::new();
    for i in 0..USERS {
        users.push(mesh.connect(0, &format!("user{i:03}")).await);
    }
    let mut storm = tokio::task::JoinSet::new();
    for (i, mut user) in users.into_iter().enumerate() {
        storm.spawn(async move {
            for _ in 0..ROUNDS {
                reply(&mut user, "join", json!({"room": room})).await;
                reply(&mut user, "leave", json!({"room": room})).await;
            }
            // Every other one stays in the end.
            if i % 2 == 0 {
                reply(&mut user, "join", json!({"room": room})).await;
            }
            user
        });
    }
    let users = storm.join_all().await;
    let stayed: Vec<String> = (0..USERS)
        .step_by(2)
        .map(|i| format!("user{i:03}"))
        .collect();
    let mut expected: Vec<&str> = stayed.iter().map(String::as_str).collect();
    expected.extend(["far", "near"]);
    expected.sort_unstable();

    for follower in [&mut near, &mut far] {
        // As a client does: after a count the list is asked for again.
        let deadline = tokio::time::Instant::now() + LONG;
        while follower
            .users
            .keys()
            .map(String::as_str)
            .ne(expected.iter().copied())
        {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{:?}",
                follower.users
            );
            follower.load().await;
        }
    }
    let took = started.elapsed();
    let writes = presence.newest(">").await.unwrap() - before;
    let seconds = took.as_secs() + 2;
    // A key: two writes at once, then one a second.
    let most = USERS * (2 + seconds);
    let (near, far) = (
        near.pushed().await.len() as u64,
        far.pushed().await.len() as u64,
    );
    // A second: 200 names, or a count; two windows may touch.
    let pushes = 2 * 201 + 201 * seconds;
    println!(
        "{} joins and leaves in {took:.1?}: {writes} writes (at most {most}), {near} pushes here and {far} there (at most {pushes})",
        USERS * ROUNDS * 2,
    );
    assert!(writes <= most && writes <= USERS * ROUNDS / 2, "{writes}");
    assert!(near <= pushes && far <= pushes, "{near} {far}");
    drop(users);
}

/// An edge that is drained: whoever comes back elsewhere is never shown as gone, the others are when it ends.
#[tokio::test]
async fn who_moves_on_when_an_edge_drains_was_never_gone() {
    let toml = "edge.drain_spread = '100ms'";
    let mut mesh = Mesh::start(support::nats_url(), 2, toml).await;
    let room = "chat:move";
    let mut watches = Follower::join(&mesh, 1, "watches", room).await;
    let mut movers = Vec::new();
    for i in 0..20 {
        movers.push(join(&mesh, 0, &format!("user{i:02}"), room).await);
    }
    let all: Vec<String> = (0..20).map(|i| format!("user{i:02}")).collect();
    let mut expected: Vec<&str> = all.iter().map(String::as_str).collect();
    expected.push("watches");
    watches.until(&expected).await;
    watches.pushed().await;

    signal(mesh.edges[0].process.pid().unwrap(), Signal::TERM);
    let mut moved = Vec::new();
    for (i, mut connection) in movers.into_iter().enumerate() {
        while connection.next().await.is_some() {}
        if i < 10 {
            moved.push(join(&mesh, 1, &all[i], room).await);
        }
    }
    mesh.edges[0].process.exited().await;
    let mut expected: Vec<&str> = all[..10].iter().map(String::as_str).collect();
    expected.push("watches");
    watches.until(&expected).await;
    let left: Vec<Value> = watches
        .pushed()
        .await
        .into_iter()
        .map(|push| {
            assert_eq!(push["state"], "leave", "{push}");
            push["user"].clone()
        })
        .collect();
    assert_eq!(
        left,
        all[10..].iter().map(|user| json!(user)).collect::<Vec<_>>()
    );
    // Nothing is left behind.
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    let edges = bucket_of(&mesh, bucket::EDGES).await;
    eventually("the drained edge's keys are gone", LONG, async || {
        let keys = [living(&presence, ">").await, living(&edges, ">").await].concat();
        let left: Vec<String> = keys
            .into_iter()
            .map(|entry| entry.key)
            .filter(|key| key.contains("edge-0-"))
            .collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await;
}

/// Contract 5: messages wait for nothing but their stream, also when the buckets of presence and read markers are gone.
#[tokio::test]
async fn messages_go_on_without_the_buckets() {
    let mesh = Mesh::start(support::nats_url(), 2, "rooms.join_timeout = '1s'").await;
    let client = natter::testing::mesh::provision::connect(&mesh.config.nats)
        .await
        .unwrap();
    for name in [bucket::PRESENCE, bucket::LASTREAD, bucket::EDGES] {
        let stream = natter::testing::subject::bucket_stream(name, &mesh.config.region());
        let subject = format!("$JS.API.STREAM.DELETE.{stream}");
        let answer = client.request(subject, "".into()).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(answer["success"], true, "{answer}");
    }
    let room = "chat:bare";
    let fields = json!({"room": room, "presence": true, "read": true});
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(1, "lee").await;
    for member in [&mut kim, &mut lee] {
        let joined = reply(member, "join", fields.clone()).await;
        assert_eq!(joined["op"], "joined", "{joined}");
        assert_eq!(joined.get("marker"), None);
    }
    let ack = reply(&mut kim, "send", json!({"room": room, "body": 1})).await;
    assert_eq!(ack["op"], "ack", "{ack}");
    let push = loop {
        let frame = next(&mut lee).await.json();
        if frame["op"] == "msg" {
            break frame;
        }
    };
    assert_eq!(push["cursor"], ack["cursor"]);
    // What needs them says so.
    for (op, fields) in [
        ("presence", json!({"room": room})),
        ("readers", json!({"room": room})),
        ("unread", json!({"rooms": [room]})),
        ("read", json!({"room": room, "cursor": ack["cursor"]})),
    ] {
        let answer = reply(&mut lee, op, fields).await;
        assert_eq!(answer["code"], "unavailable", "{op}: {answer}");
    }
    // And when they are back, so is everything.
    mesh.provision().await;
    let list = list_of(&mut lee, room, 2).await;
    assert_eq!(names(&list), ["kim", "lee"]);
    let read = reply(
        &mut lee,
        "read",
        json!({"room": room, "cursor": ack["cursor"]}),
    )
    .await;
    assert_eq!(read["cursor"], ack["cursor"], "{read}");
}
