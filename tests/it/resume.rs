//! Joining, resuming, and what becomes of a cursor.

use std::time::Duration;

use natter::testing::client::Connection;
use serde_json::{Value, json};

use crate::support::{
    self, LONG,
    calls::{command, next, reply},
    mesh::Mesh,
};

/// `n` pushes of messages: their bodies.
async fn bodies(connection: &mut Connection, n: usize) -> Vec<Value> {
    let mut bodies = Vec::new();
    while bodies.len() < n {
        let frame = next(connection).await.json();
        assert_eq!(frame["op"], "msg", "{frame}");
        bodies.push(frame["body"].clone());
    }
    bodies
}

async fn send(connection: &mut Connection, room: &str, body: Value) -> Value {
    let ack = reply(connection, "send", json!({"room": room, "body": body})).await;
    assert_eq!(ack["op"], "ack", "{ack}");
    ack
}

#[tokio::test]
async fn a_client_resumes_on_another_edge_from_memory_and_from_the_stream() {
    let mesh = Mesh::start(support::nats_url(), 2, "rooms.ring = '4KiB'").await;
    let mut here = mesh.connect(0, "kim").await;
    let joined = reply(&mut here, "join", json!({"room": "chat:a"})).await;
    let mut cursors = vec![joined["cursor"].as_str().unwrap().to_owned()];
    for i in 0..100 {
        // The sender's own message comes before its ack, or right after it.
        let ack = send(&mut here, "chat:a", json!({"text": format!("안녕 {i} 👋")})).await;
        cursors.push(ack["cursor"].as_str().unwrap().to_owned());
    }
    for (i, cursor) in cursors.iter().enumerate().step_by(9) {
        for edge in [0, 1] {
            let mut there = mesh.connect(edge, "lee").await;
            let joined = reply(
                &mut there,
                "join",
                json!({"room": "chat:a", "since": cursor}),
            )
            .await;
            assert_eq!(joined["cursor"], json!(cursor), "{joined}");
            assert_eq!(joined["head"], json!(cursors[100]));
            assert_eq!(joined["replay"], json!(100 - i));
            assert_eq!(joined.get("reset"), None);
            let expected: Vec<Value> = (i..100)
                .map(|n| json!({"text": format!("안녕 {n} 👋")}))
                .collect();
            assert_eq!(bodies(&mut there, 100 - i).await, expected);
        }
    }
}

#[tokio::test]
async fn many_rooms_share_a_bounded_memory_and_nobody_loses_what_it_drops() {
    const ROOMS: usize = 40;
    const MESSAGES: usize = 6;
    const BOUND: u64 = 512 * 1024;
    let toml = "edge.shards = 1\n[rooms]\nring = '128KiB'\nring_memory = '512KiB'\n\
                [limits]\nrooms_per_session = 100\ncommands_per_second = 10000\ncommands_burst = 10000";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let name = |room: usize| format!("chat:r{room}");
    let body = |room: usize, n: usize| json!(format!("{room} {n} {}", "x".repeat(8 * 1024)));
    let mut starts = Vec::new();
    for room in 0..ROOMS {
        let joined = reply(&mut kim, "join", json!({"room": name(room)})).await;
        starts.push(joined["cursor"].clone());
    }
    // More than three times the bound. It holds after each room.
    let held = async || mesh.metric(0, "natter_ring_memory_bytes", "").await;
    let mut most = 0;
    for room in 0..ROOMS {
        for n in 0..MESSAGES {
            send(&mut kim, &name(room), body(room, n)).await;
        }
        most = held().await.max(most);
    }
    assert!((BOUND / 2..=BOUND).contains(&most), "{most} bytes");
    for (room, start) in starts.iter().enumerate() {
        let mut lee = mesh.connect(0, "lee").await;
        let join = json!({"room": name(room), "since": start});
        let joined = reply(&mut lee, "join", join).await;
        assert_eq!(joined["replay"], json!(MESSAGES), "{joined}");
        assert_eq!(joined.get("reset"), None, "{joined}");
        let expected: Vec<Value> = (0..MESSAGES).map(|n| body(room, n)).collect();
        assert!(bodies(&mut lee, MESSAGES).await == expected, "room {room}");
    }
    // The rooms in which somebody spoke last are in memory, the others in the stream.
    for (source, rooms) in [("ring", 5), ("stream", ROOMS as u64 / 2)] {
        let label = format!("result=\"{source}\"");
        let joins = mesh.metric(0, "natter_join_result_total", &label).await;
        assert!(joins >= rooms, "{joins} joins from the {source}");
    }
    // Frames that were made for those who resumed count, too.
    assert!(held().await <= BOUND);
}

#[tokio::test]
async fn every_cursor_that_leads_nowhere_has_its_reason() {
    let toml = "streams.max_msgs_per_room = 20\nrooms.replay_max = 10\nrooms.ring = '1KiB'";
    let mut mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let start = reply(&mut kim, "join", json!({"room": "chat:a"})).await["cursor"].clone();
    reply(&mut kim, "leave", json!({"room": "chat:a"})).await;
    let mut cursors = Vec::new();
    for i in 0..60 {
        cursors.push(
            send(&mut kim, "chat:a", json!(i)).await["cursor"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
    }
    let head = json!(cursors[59]);
    let changed = |index: usize, change: &dyn Fn(&mut Vec<String>)| {
        let mut parts: Vec<String> = cursors[index].split('.').map(str::to_owned).collect();
        change(&mut parts);
        parts.join(".")
    };
    let cases = [
        // More than replay_max behind, still in the stream, and long gone.
        (cursors[45].clone(), Some("replay_max")),
        (cursors[5].clone(), Some("replay_max")),
        (start.as_str().unwrap().to_owned(), Some("replay_max")),
        (changed(55, &|p| p[1] = "zz".to_owned()), Some("epoch")),
        (
            changed(55, &|p| p[0] = "elsewhere".to_owned()),
            Some("epoch"),
        ),
        (changed(55, &|p| p[3] = "1".to_owned()), Some("epoch")),
        (changed(59, &|p| p[3] = "1".to_owned()), Some("epoch")),
        (changed(59, &|p| p[2] = "999999".to_owned()), Some("future")),
        ("zz.k.1.1".to_owned(), Some("epoch")),
        (cursors[49].clone(), None),
        (cursors[59].clone(), None),
    ];
    // On an edge that knows the room, and on one that has never seen it.
    mesh.add_edge().await;
    for edge in [0, 1] {
        for (since, reason) in &cases {
            let mut lee = mesh.connect(edge, "lee").await;
            let joined = reply(&mut lee, "join", json!({"room": "chat:a", "since": since})).await;
            assert_eq!(joined["head"], head, "{since}");
            assert_eq!(
                joined.get("reason").cloned(),
                reason.map(|r| json!(r)),
                "{since}: {joined}"
            );
            if reason.is_some() {
                assert_eq!(joined["reset"], json!(true));
                assert_eq!(joined["cursor"], head);
                assert_eq!(joined["replay"], json!(0));
            } else {
                let behind = 59 - cursors.iter().position(|cursor| cursor == since).unwrap();
                assert_eq!(joined["replay"], json!(behind));
                bodies(&mut lee, behind).await;
            }
            // Whatever came of it, the room goes on live.
            let ack = reply(&mut lee, "ping", json!({})).await;
            assert_eq!(ack["op"], "pong");
        }
        let mut lee = mesh.connect(edge, "lee").await;
        for malformed in ["", "x", "a.b.c", "a.b.1.1_", "a.b.1.zz"] {
            let error = reply(
                &mut lee,
                "join",
                json!({"room": "chat:a", "since": malformed}),
            )
            .await;
            assert_eq!(error["code"], "bad_cursor", "{malformed}: {error}");
        }
    }
}

/// The first ring holds nothing that is asked for, so the stream answers; the second one holds all of it.
#[tokio::test]
async fn a_namespace_replays_more_or_less_than_others() {
    for ring in ["1KiB", "1MiB"] {
        let toml = format!(
            "rooms.replay_max = 10\nrooms.ring = '{ring}'\nedge.shards = 1\n[namespaces.more]\ndurable = true\ntyping = true\n\
             replay_max = 30\n[namespaces.less]\ndurable = true\ntyping = true\nreplay_max = 5"
        );
        let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
        let mut kim = mesh.connect(0, "kim").await;
        for (room, most) in [("chat:a", 10), ("more:a", 30), ("less:a", 5)] {
            let mut reader = mesh.connect(0, "reader").await;
            reply(&mut reader, "join", json!({"room": room})).await;
            let mut cursors = Vec::new();
            for i in 0..=most + 1 {
                cursors.push(send(&mut kim, room, json!(i)).await["cursor"].clone());
            }
            // So all of them are in the ring, if they fit.
            assert_eq!(bodies(&mut reader, most + 2).await.len(), most + 2);
            for (since, reason) in [
                (&cursors[1], Value::Null),
                (&cursors[0], json!("replay_max")),
            ] {
                let mut lee = mesh.connect(0, "lee").await;
                let joined = reply(&mut lee, "join", json!({"room": room, "since": since})).await;
                assert_eq!(joined["reason"], reason, "{ring} {room}: {joined}");
                if reason.is_null() {
                    assert_eq!(bodies(&mut lee, most).await.len(), most);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_cursor_before_what_a_trimmed_stream_holds_resets() {
    let mesh = Mesh::start(
        support::nats_url(),
        1,
        "nats.partitions = 1\nrooms.ring = '1KiB'\nedge.shards = 1",
    )
    .await;
    let mut kim = mesh.connect(0, "kim").await;
    let empty = reply(&mut kim, "join", json!({"room": "chat:quiet"})).await["cursor"].clone();
    let old = send(&mut kim, "chat:a", json!(0)).await["cursor"].clone();
    for i in 1..50 {
        send(&mut kim, "chat:a", json!(i)).await;
    }
    let near = send(&mut kim, "chat:a", json!(50)).await["cursor"].clone();
    send(&mut kim, "chat:a", json!(51)).await;
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    let stream = format!("ROOMS_{}_0", mesh.config.region);
    // Keeps the last message: that of `near` itself is gone, but nothing after it.
    async_nats::jetstream::new(nats)
        .get_stream(&stream)
        .await
        .unwrap()
        .purge()
        .keep(1)
        .await
        .unwrap();
    let mut lee = mesh.connect(0, "lee").await;
    let joined = reply(&mut lee, "join", json!({"room": "chat:a", "since": old})).await;
    assert_eq!(
        (&joined["reset"], &joined["reason"]),
        (&json!(true), &json!("trimmed")),
        "{joined}"
    );
    let joined = reply(&mut lee, "join", json!({"room": "chat:a", "since": near})).await;
    assert_eq!(joined["replay"], json!(1), "{joined}");
    // A room in which nobody has ever spoken, and whose hub was there all the time, has lost nothing.
    let joined = reply(
        &mut lee,
        "join",
        json!({"room": "chat:quiet", "since": empty}),
    )
    .await;
    assert_eq!(joined.get("reset"), None, "{joined}");
}

/// Edges do not have to know the same sequence up to which a room is empty.
#[tokio::test]
async fn who_was_in_a_room_where_nobody_has_spoken_goes_on_at_any_edge() {
    let mut mesh = Mesh::start(support::nats_url(), 1, "nats.partitions = 1").await;
    let mut kim = mesh.connect(0, "kim").await;
    let join = async |connection: &mut Connection, since: &Value| {
        let fields = json!({"room": "chat:quiet", "since": since});
        let joined = reply(connection, "join", fields).await;
        let is_whole = joined["replay"] == 0 && joined.get("reset").is_none();
        assert!(joined["op"] == "joined" && is_whole, "{joined}");
        joined["head"].clone()
    };
    let before = join(&mut kim, &Value::Null).await;
    for i in 0..5 {
        send(&mut kim, "chat:busy", json!(i)).await;
    }
    // It has not seen the room before, and finds the stream further on.
    let later = mesh.add_edge().await;
    let mut lee = mesh.connect(later, "lee").await;
    let after = join(&mut lee, &before).await;
    assert_ne!(before, after);
    // And back, where it is known to be empty only up to the first place.
    let mut park = mesh.connect(0, "park").await;
    join(&mut park, &after).await;
    send(&mut kim, "chat:quiet", json!("at last")).await;
    assert_eq!(bodies(&mut lee, 1).await, [json!("at last")]);
    assert_eq!(bodies(&mut park, 1).await, [json!("at last")]);
}

#[tokio::test]
async fn a_stream_that_is_made_anew_resets_who_was_there() {
    let mesh = Mesh::start(support::nats_url(), 2, "nats.partitions = 1").await;
    let mut kim = mesh.connect(0, "kim").await;
    reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    let mut cursor = json!(null);
    for i in 0..5 {
        cursor = send(&mut kim, "chat:a", json!(i)).await["cursor"].clone();
    }
    let mut lee = mesh.connect(1, "lee").await;
    reply(&mut lee, "join", json!({"room": "chat:a"})).await;
    bodies_until_quiet(&mut kim).await;
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    let name = format!("ROOMS_{}_0", mesh.config.region);
    async_nats::jetstream::new(nats)
        .delete_stream(&name)
        .await
        .unwrap();
    mesh.provision().await;
    // A message through the other edge, which has not been told either: what it gets to see can't be.
    let ack = send(&mut lee, "chat:a", json!("anew")).await;
    let fresh = ack["cursor"].as_str().unwrap().to_owned();
    let epoch = |cursor: &str| cursor.split('.').nth(1).unwrap().to_owned();
    assert_ne!(epoch(&fresh), epoch(cursor.as_str().unwrap()));
    let kicked = next(&mut kim).await.json();
    assert_eq!(kicked["op"], "kicked", "{kicked}");
    assert_eq!(
        (&kicked["room"], &kicked["code"]),
        (&json!("chat:a"), &json!("reset"))
    );
    let joined = reply(&mut kim, "join", json!({"room": "chat:a", "since": cursor})).await;
    assert_eq!(
        (&joined["reset"], &joined["reason"]),
        (&json!(true), &json!("epoch")),
        "{joined}"
    );
    assert_eq!(joined["head"], json!(fresh));
    let ack = send(&mut lee, "chat:a", json!("more")).await;
    let pushed = next(&mut kim).await.json();
    assert_eq!(
        (&pushed["body"], &pushed["cursor"]),
        (&json!("more"), &ack["cursor"])
    );
}

/// Takes the pushes of messages that are on their way: all are there once a `pong` has come.
async fn bodies_until_quiet(connection: &mut Connection) -> usize {
    command(connection, "ping", json!({})).await.len() - 1
}

#[tokio::test]
async fn a_publish_is_stored_once_however_often_and_wherever_it_is_repeated() {
    let mut mesh = Mesh::start(support::nats_url(), 2, "").await;
    let mut reader = mesh.connect(1, "reader").await;
    reply(&mut reader, "join", json!({"room": "chat:a"})).await;
    let send = json!({"room": "chat:a", "id": "once", "body": "first"});
    let mut kim = mesh.connect(0, "kim").await;
    let first = reply(&mut kim, "send", send.clone()).await;
    assert_eq!(first["dup"], json!(false), "{first}");
    let check = |again: Value| {
        assert_eq!(again["dup"], json!(true), "{again}");
        assert_eq!(
            (&again["cursor"], &again["ts"]),
            (&first["cursor"], &first["ts"])
        );
    };
    // On the same edge, with another body too: the first wins.
    check(reply(&mut kim, "send", send.clone()).await);
    check(
        reply(
            &mut kim,
            "send",
            json!({"room": "chat:a", "id": "once", "body": "other"}),
        )
        .await,
    );
    let mut there = mesh.connect(1, "kim").await;
    check(reply(&mut there, "send", send.clone()).await);
    let headers = format!("Authorization: Bearer {}\r\n", support::mesh::token("kim"));
    let (status, body) = support::mesh::http(
        mesh.edges[1].address,
        "POST",
        "/v1/rooms/chat%3Aa/messages",
        &headers,
        r#"{"id":"once","body":"over http"}"#,
    )
    .await
    .unwrap();
    assert_eq!(status, 200, "{body}");
    check(serde_json::from_str(&body).unwrap());
    mesh.edges[0].process.kill().await;
    mesh.edges[0].process.start().await.unwrap();
    let mut kim = mesh.connect(0, "kim").await;
    check(reply(&mut kim, "send", send.clone()).await);
    // Another user's message of the same id is another message.
    let mut lee = mesh.connect(0, "lee").await;
    let other = reply(&mut lee, "send", send).await;
    assert_eq!(other["dup"], json!(false), "{other}");
    let seen: Vec<Value> = command(&mut reader, "ping", json!({})).await;
    let seen: Vec<(&Value, &Value)> = seen
        .iter()
        .filter(|frame| frame["op"] == "msg")
        .map(|frame| (&frame["from"], &frame["body"]))
        .collect();
    assert_eq!(seen[0], (&json!("kim"), &json!("first")));
    assert!(seen.len() <= 2, "{seen:?}");
}

#[tokio::test]
async fn messages_published_by_hand_appear_like_any_other() {
    let nats = support::dedicated_nats().await;
    let toml = "region = 'local'\nnats.prefix = 'natter'";
    let mesh = Mesh::start(&nats.url(), 1, toml).await;
    let client = async_nats::connect(nats.url()).await.unwrap();
    let mut kim = mesh.connect(0, "kim").await;
    for (room, subject) in [
        ("chat:lobby", "natter.pub.chat.lobby"),
        ("live:now", "natter.pub.live.now"),
    ] {
        reply(&mut kim, "join", json!({"room": room})).await;
        client
            .publish(subject, r#"{"text":"hi"}"#.into())
            .await
            .unwrap();
        let pushed = next(&mut kim).await.json();
        assert_eq!(
            (&pushed["op"], &pushed["room"]),
            (&json!("msg"), &json!(room)),
            "{pushed}"
        );
        assert_eq!(
            (&pushed["from"], &pushed["body"]),
            (&json!("$nats"), &json!({"text": "hi"}))
        );
        assert!(
            pushed["id"].is_string() && pushed["ts"].is_u64(),
            "{pushed}"
        );
        client
            .publish(subject, "not \"JSON\"".into())
            .await
            .unwrap();
        assert_eq!(next(&mut kim).await.json()["body"], json!("not \"JSON\""));
    }
    // What a client sends can be read by a person with any NATS client.
    let mut live = client.subscribe("natter.live.>").await.unwrap();
    // Answered by the server itself, after it has processed the subscription.
    client.request("nobody", "".into()).await.unwrap_err();
    send(&mut kim, "chat:lobby", json!({"text": "안녕"})).await;
    let message = tokio::time::timeout(LONG, futures_util::StreamExt::next(&mut live))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(message.payload, r#"{"text":"안녕"}"#);
    let headers = message.headers.unwrap();
    assert_eq!(headers.get("Natter-From").unwrap().as_str(), "kim");
    assert!(headers.get("Nats-Sequence").is_some());
}

#[tokio::test]
async fn joins_during_a_storm_have_neither_gap_nor_repeat() {
    const JOINS: usize = 50;
    const PER_SECOND: u64 = 2000;
    let mesh = Mesh::start(
        support::nats_url(),
        2,
        "limits.commands_per_second = 100000",
    )
    .await;
    let mut kim = mesh.connect(0, "kim").await;
    let start = reply(&mut kim, "join", json!({"room": "chat:a"})).await["cursor"].clone();
    reply(&mut kim, "leave", json!({"room": "chat:a"})).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let storm = tokio::spawn({
        let (commands, stop) = (kim.commands().clone(), stop.clone());
        async move {
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            let mut sent = 0_u64;
            while !stop.is_cancelled() {
                tick.tick().await;
                for _ in 0..PER_SECOND / 100 {
                    commands
                        .send("send", json!({"room": "chat:a", "body": sent}))
                        .await
                        .unwrap();
                    sent += 1;
                }
            }
            sent
        }
    });
    let drain = tokio::spawn(async move {
        let mut acks = 0_u64;
        while let Some(frame) = kim.next().await {
            assert_eq!(frame.op(), "ack", "{}", frame.text());
            acks += 1;
        }
        acks
    });
    let mut cursors = vec![start];
    let mut replayed = Vec::new();
    for round in 0..JOINS {
        let mut lee = mesh.connect(round % 2, "lee").await;
        // As new members, with the cursor of the one before, or with an older one, whose backlog comes from the stream.
        let fields = match round % 4 {
            0 => json!({"room": "chat:a"}),
            behind => {
                json!({"room": "chat:a", "since": cursors[cursors.len().saturating_sub(behind)]})
            }
        };
        let joined = reply(&mut lee, "join", fields).await;
        let reset = joined.get("reset").is_some();
        assert!(!reset, "round {round}: {joined}");
        replayed.push(joined["replay"].as_u64().unwrap());
        let backlog = joined["replay"].as_u64().unwrap();
        let mut expected = None;
        let mut last = json!(null);
        for at in 0..backlog + 300 {
            let frame = next(&mut lee).await.json();
            assert_eq!(frame["op"], "msg", "{frame}");
            let number = frame["body"].as_u64().unwrap();
            if let Some(expected) = expected {
                assert_eq!(number, expected, "round {round}, message {at}");
            }
            if at + 1 == backlog {
                assert_eq!(frame["cursor"], joined["head"], "round {round}");
            }
            expected = Some(number + 1);
            last = frame["cursor"].clone();
        }
        cursors.push(last);
    }
    stop.cancel();
    let sent = storm.await.unwrap();
    println!("joins {JOINS}, messages sent {sent}, replayed at join {replayed:?}");
    drop(mesh);
    let acks = drain.await.unwrap();
    assert!(acks > 0 && acks <= sent);
}

#[tokio::test]
async fn a_client_with_backlog_in_many_rooms_is_not_too_slow_for_it() {
    const ROOMS: usize = 30;
    const MESSAGES: usize = 150;
    let toml = "limits.outbox = '256KiB'\nlimits.commands_burst = 100000";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut since = Vec::new();
    for room in 0..ROOMS {
        let room = format!("chat:r{room}");
        since.push(reply(&mut kim, "join", json!({"room": room})).await["cursor"].clone());
        reply(&mut kim, "leave", json!({"room": room})).await;
    }
    let padding = "x".repeat(2000);
    for number in 0..MESSAGES {
        for room in 0..ROOMS {
            let send = json!({"room": format!("chat:r{room}"), "body": [number, padding]});
            kim.commands().send("send", send).await.unwrap();
        }
        for _ in 0..ROOMS {
            assert_eq!(next(&mut kim).await.op(), "ack");
        }
    }
    // All joins at once; 9 MB come back, while the outbox may hold 256 KiB and the client has not begun to read.
    let mut lee = mesh.connect(0, "lee").await;
    for (room, since) in since.iter().enumerate() {
        let join = json!({"room": format!("chat:r{room}"), "since": since});
        lee.commands().send("join", join).await.unwrap();
    }
    let mut seen = vec![0; ROOMS];
    let mut joined = 0;
    while seen.iter().sum::<usize>() < ROOMS * MESSAGES {
        let frame = next(&mut lee).await.json();
        let name = frame["room"].as_str().unwrap();
        let room: usize = name.strip_prefix("chat:r").unwrap().parse().unwrap();
        if frame["op"] == "joined" {
            joined += 1;
            assert_eq!(frame["replay"], json!(MESSAGES), "{frame}");
        } else {
            assert_eq!(frame["body"][0], json!(seen[room]), "room {room}");
            seen[room] += 1;
        }
    }
    assert_eq!(joined, ROOMS);
}

#[tokio::test]
async fn what_a_member_has_seen_of_a_region_that_is_not_seen_here_is_kept_for_it() {
    let mut mesh = Mesh::start(support::nats_url(), 1, "edge.shards = 1").await;
    let mut kim = mesh.connect(0, "kim").await;
    // She speaks from outside: her own messages don't come between.
    let mut mia = mesh.connect(0, "mia").await;
    let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    send(&mut mia, "chat:a", json!(0)).await;
    bodies(&mut kim, 1).await;
    let further = |cursor: &Value| json!(format!("{}_zz.k.7.1", cursor.as_str().unwrap()));
    mesh.add_edge().await;
    for edge in [0, 1] {
        let mut lee = mesh.connect(edge, "lee").await;
        let since = further(&joined["cursor"]);
        let resumed = reply(&mut lee, "join", json!({"room": "chat:a", "since": since})).await;
        assert_eq!(resumed.get("reset"), None, "{resumed}");
        assert_eq!(resumed["replay"], json!(edge + 1));
        let mut last = Value::Null;
        for n in 0..=edge {
            last = next(&mut lee).await.json();
            assert_eq!(last["body"], json!(n));
            assert!(
                last["cursor"].as_str().unwrap().ends_with("_zz.k.7.1"),
                "{last}"
            );
        }
        assert_eq!(resumed["head"], last["cursor"]);
        // And then live; the others get no more than they know of.
        send(&mut mia, "chat:a", json!(edge + 1)).await;
        let live = next(&mut kim).await.json();
        assert_eq!(
            next(&mut lee).await.json()["cursor"],
            further(&live["cursor"])
        );
    }
}
