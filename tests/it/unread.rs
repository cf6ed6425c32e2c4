//! Unread counts against counting by hand.

use std::collections::BTreeMap;

use natter::testing::{
    model::{Class, RoomId, partition_of},
    subject::Subjects,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::support::{
    self,
    calls::{next, reply},
    mesh::{Mesh, http, token},
};

const ROOMS: usize = 500;
const CAP: u64 = 8;

/// Everything that a stream holds, in the order of its sequences: subject and sequence.
async fn stored(client: &async_nats::Client, stream: &str) -> Vec<(String, u64)> {
    let info = client
        .request(format!("$JS.API.STREAM.INFO.{stream}"), "".into())
        .await
        .unwrap();
    let info: Value = serde_json::from_slice(&info.payload).unwrap();
    let last = info["state"]["last_seq"].as_u64().unwrap();
    let first = info["state"]["first_seq"].as_u64().unwrap();
    let mut found = Vec::new();
    for seq in first..=last {
        let request = json!({"seq": seq}).to_string();
        let answer = client
            .request(format!("$JS.API.DIRECT.GET.{stream}"), request.into())
            .await
            .unwrap();
        // 404 where the message was trimmed.
        if answer.status.is_none() {
            let headers = answer.headers.unwrap();
            let subject = headers
                .get_last("Nats-Subject")
                .unwrap()
                .as_str()
                .to_owned();
            found.push((subject, seq));
        }
    }
    found
}

/// What a user has of a room, and how much is new to them.
#[derive(Debug)]
struct Expected {
    marker: Option<u64>,
    count: u64,
}

#[tokio::test]
async fn unread_counts_equal_what_counting_by_hand_finds() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let toml = format!(
        "limits.unread_cap = {CAP}\nlimits.commands_per_second = 100000\nlimits.commands_burst = 100000\n\
         nats.partitions = 4\nedge.shards = 1\nstreams.max_msgs_per_room = 12\nrooms.replay_max = 10"
    );
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let (prefix, region) = (&mesh.config.nats.prefix, mesh.config.region());
    let subjects = Subjects::new(prefix);
    let rooms: Vec<RoomId> = (0..ROOMS)
        .map(|n| RoomId::parse(&format!("chat:r{n}")).unwrap())
        .collect();
    let subject =
        |room: &RoomId, class| subjects.publish(&region, partition_of(room, 4), room, class);

    // Messages and what refers to them, mixed over all rooms; some rooms stay empty, some have more than the stream keeps.
    let mut kim = mesh.connect(0, "kim").await;
    let mut positions: BTreeMap<&RoomId, Vec<u64>> = BTreeMap::new();
    let mut plan: Vec<(&RoomId, &str)> = Vec::new();
    // As many as the cap and one more, none of them read, in streams that lose nothing.
    let at_cap: Vec<&RoomId> = rooms
        .iter()
        .filter(|room| partition_of(room, 4) != 0)
        .take(2)
        .collect();
    for room in &rooms {
        let messages = match rng.random_range(0..10) {
            _ if room == at_cap[0] => CAP,
            _ if room == at_cap[1] => CAP + 1,
            0 => 0,
            1 => rng.random_range(12..20),
            _ => rng.random_range(1..8),
        };
        plan.extend((0..messages).map(|_| (room, "message")));
        let kinds = ["edit", "delete", "reaction", "annotation"];
        plan.extend((0..rng.random_range(0..5)).map(|_| (room, kinds[rng.random_range(0..4)])));
    }
    for at in (1..plan.len()).rev() {
        plan.swap(at, rng.random_range(0..=at));
    }
    for chunk in plan.chunks(256) {
        let acks = chunk.iter().map(async |(room, kind)| {
            let class = if *kind == "message" {
                Class::Msg
            } else {
                Class::Ev
            };
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Natter-From", "writer");
            if *kind != "message" {
                headers.insert("Natter-Kind", *kind);
                headers.insert("Natter-Target", "writer/1");
            }
            let subject = subject(room, class);
            let ack = client.request_with_headers(subject, headers, "1".into());
            (*room, ack.await.unwrap())
        });
        for (room, ack) in futures_util::future::join_all(acks).await {
            let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
            let seq = ack["seq"].as_u64().unwrap_or_else(|| panic!("{ack}"));
            positions.entry(room).or_default().push(seq);
        }
    }
    // One stream loses its beginning, so that some markers lie before all there is.
    let purged = format!("ROOMS_{region}_0");
    let all = stored(&client, &purged).await;
    let keep_from = all[all.len() / 3].1;
    let purge = json!({"seq": keep_from}).to_string();
    client
        .request(format!("$JS.API.STREAM.PURGE.{purged}"), purge.into())
        .await
        .unwrap();

    // Markers: at any message of the room (deleted, trimmed or not), between two, at the head, or none at all.
    let epoch: Vec<String> = {
        let mut epochs = Vec::new();
        for part in 0..4 {
            let info = client
                .request(
                    format!("$JS.API.STREAM.INFO.ROOMS_{region}_{part}"),
                    "".into(),
                )
                .await
                .unwrap();
            let info: Value = serde_json::from_slice(&info.payload).unwrap();
            epochs.push(
                info["config"]["metadata"]["natter.epoch"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
            );
        }
        epochs
    };
    let mut expected: BTreeMap<&RoomId, Expected> = BTreeMap::new();
    for room in &rooms {
        let mut seqs = positions.get(room).cloned().unwrap_or_default();
        seqs.sort_unstable();
        let marker = match (rng.random_range(0..4), seqs.is_empty()) {
            _ if at_cap.contains(&room) => None,
            (0, _) | (_, true) => None,
            (1, _) => seqs.last().copied(),
            (2, _) => Some(seqs[rng.random_range(0..seqs.len())]),
            _ => Some(seqs[rng.random_range(0..seqs.len())].saturating_sub(1)),
        };
        expected.insert(room, Expected { marker, count: 0 });
    }
    // Set in the order of the rooms, pipelined.
    let mut waiting = 0;
    for (room, expected) in &expected {
        let Some(marker) = expected.marker else {
            continue;
        };
        let part = usize::from(partition_of(room, 4));
        let cursor = format!("{region}.{}.{marker}.1", epoch[part]);
        let read = json!({"room": room.as_str(), "cursor": cursor});
        kim.commands().send("read", read).await.unwrap();
        waiting += 1;
    }
    for _ in 0..waiting {
        let ok = next(&mut kim).await.json();
        assert_eq!(ok["op"], "ok", "{ok}");
    }

    // The oracle: every message of every stream, looked at.
    for part in 0..4 {
        for (subject, seq) in stored(&client, &format!("ROOMS_{region}_{part}")).await {
            let parsed = subjects.parse_stored(&subject).unwrap();
            if parsed.class != Class::Msg {
                continue;
            }
            let expected = expected.get_mut(&parsed.room).unwrap();
            if seq > expected.marker.unwrap_or(0) {
                expected.count += 1;
            }
        }
    }
    let before = mesh.metric(0, "natter_unread_requests_total", "").await;
    let ask: Vec<&str> = rooms.iter().map(RoomId::as_str).collect();
    let started = std::time::Instant::now();
    let answer = reply(&mut kim, "unread", json!({"rooms": ask})).await;
    let took = started.elapsed();
    let requests = mesh.metric(0, "natter_unread_requests_total", "").await - before;
    let counts = answer["rooms"]
        .as_array()
        .unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(counts.len(), ROOMS);
    let (mut some, mut capped) = (0, 0);
    for (room, found) in rooms.iter().zip(counts) {
        let Expected { marker, count } = &expected[room];
        let mut right = json!({"room": room.as_str(), "count": count.min(&CAP)});
        if *count > CAP {
            right["capped"] = json!(true);
            capped += 1;
        }
        some += usize::from(*count > 0);
        assert_eq!(
            *found,
            right,
            "marker {marker:?}, {:?}",
            positions.get(room)
        );
    }
    println!(
        "{ROOMS} rooms, {some} with unread messages, {capped} above the cap: {requests} requests to NATS, {took:?}"
    );
    assert!(
        some > ROOMS / 4 && some < ROOMS && capped > 0,
        "{some} {capped}"
    );
    // One for the markers, one a partition for the heads, one a room that is not read to its end.
    assert_eq!(requests, 1 + 4 + some as u64);

    // What is read to the end costs no count.
    let read: Vec<&str> = rooms
        .iter()
        .zip(counts)
        .filter(|(_, count)| count["count"] == 0)
        .map(|(room, _)| room.as_str())
        .collect();
    let before = mesh.metric(0, "natter_unread_requests_total", "").await;
    reply(&mut kim, "unread", json!({"rooms": read})).await;
    let requests = mesh.metric(0, "natter_unread_requests_total", "").await - before;
    assert!(requests <= 5, "{requests}");
}

#[tokio::test]
async fn a_marker_of_an_older_stream_counts_as_none() {
    let mesh = Mesh::start(support::nats_url(), 1, "nats.partitions = 1").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(0, "lee").await;
    let mut cursor = json!(null);
    for i in 0..5 {
        let ack = reply(&mut kim, "send", json!({"room": "chat:a", "body": i})).await;
        cursor = ack["cursor"].clone();
    }
    let read = json!({"room": "chat:a", "cursor": cursor});
    assert_eq!(reply(&mut lee, "read", read.clone()).await["op"], "ok");
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    async_nats::jetstream::new(nats)
        .delete_stream(format!("ROOMS_{}_0", mesh.config.region))
        .await
        .unwrap();
    mesh.provision().await;
    let mut fresh = json!(null);
    for i in 0..3 {
        let ack = reply(&mut kim, "send", json!({"room": "chat:a", "body": i})).await;
        fresh = ack["cursor"].clone();
    }
    let unread = reply(&mut lee, "unread", json!({"rooms": ["chat:a"]})).await;
    assert_eq!(unread["rooms"][0]["count"], json!(3), "{unread}");
    let joined = reply(&mut lee, "join", json!({"room": "chat:a"})).await;
    assert_eq!(joined.get("marker"), None, "{joined}");
    assert_eq!(reply(&mut lee, "read", read).await["code"], "bad_cursor");
    // The lower sequence of the new stream replaces the higher one of the old.
    let read = json!({"room": "chat:a", "cursor": fresh});
    assert_eq!(reply(&mut lee, "read", read).await["cursor"], fresh);
    let unread = reply(&mut lee, "unread", json!({"rooms": ["chat:a"]})).await;
    assert_eq!(unread["rooms"][0]["count"], json!(0), "{unread}");
}

/// Two hundred sessions that ask for 500 rooms each, again and again, and joins that have to be read from the stream at the same
/// time: each join is served, and whoever asks gets counts, or `unavailable` and the advice to ask again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joins_are_served_while_many_ask_what_is_new() {
    const ASKERS: usize = 200;
    const JOINS: usize = 20;
    const MISSED: usize = 100;
    let toml = "edge.shards = 1\nrooms.ring = '1KiB'\nrooms.idle = '1s'\nnats.partitions = 4";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let subjects = Subjects::new(&mesh.config.nats.prefix);
    let region = mesh.config.region();
    let rooms: Vec<RoomId> = (0..ROOMS)
        .map(|n| RoomId::parse(&format!("chat:r{n}")).unwrap())
        .collect();
    for chunk in rooms.chunks(64) {
        let said = chunk.iter().map(async |room| {
            let subject = subjects.publish(&region, partition_of(room, 4), room, Class::Msg);
            client.request(subject, "1".into()).await.unwrap();
        });
        futures_util::future::join_all(said).await;
    }
    let mut kim = mesh.connect(0, "kim").await;
    let start = reply(&mut kim, "join", json!({"room": "chat:a"})).await["cursor"].clone();
    for n in 0..MISSED {
        let fields = json!({"room": "chat:a", "body": format!("{n} {}", "x".repeat(100))});
        assert_eq!(reply(&mut kim, "send", fields).await["op"], "ack");
    }

    let ask: Vec<&str> = rooms.iter().map(RoomId::as_str).collect();
    let ask = json!({ "rooms": ask });
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut askers = tokio::task::JoinSet::new();
    for n in 0..ASKERS {
        let mut asker = mesh.connect(0, &format!("asker-{n}")).await;
        let (ask, stopped) = (ask.clone(), stopped.clone());
        askers.spawn(async move {
            let (mut counted, mut refused) = (0, 0);
            while !*stopped.borrow() {
                let answer = reply(&mut asker, "unread", ask.clone()).await;
                if answer["op"] == "unread" {
                    let rooms = answer["rooms"].as_array().unwrap();
                    assert!(rooms.iter().all(|room| room["count"] == 1), "{answer}");
                    counted += 1;
                } else {
                    let told = (&answer["code"], &answer["retry"]);
                    assert_eq!(told, (&json!("unavailable"), &json!(true)), "{answer}");
                    refused += 1;
                }
            }
            (counted, refused)
        });
    }
    // From here on somebody always waits.
    support::eventually("they ask", support::LONG, async || {
        match mesh.metric(0, "natter_unread_requests_total", "").await {
            some if some > ROOMS as u64 => Ok(()),
            some => Err(some.to_string()),
        }
    })
    .await;
    let before = mesh.metric(0, "natter_unread_requests_total", "").await;
    for _ in 0..JOINS {
        let mut lee = mesh.connect(0, "lee").await;
        let join = json!({"room": "chat:a", "since": start});
        let joined = reply(&mut lee, "join", join).await;
        assert_eq!(joined["replay"], json!(MISSED), "{joined}");
        for n in 0..MISSED {
            let message = next(&mut lee).await.json();
            let body = message["body"].as_str().unwrap();
            assert!(body.starts_with(&format!("{n} ")), "{message}");
        }
    }
    let during = mesh.metric(0, "natter_unread_requests_total", "").await - before;
    stop.send(true).unwrap();
    let (mut counted, mut refused) = (0, 0);
    while let Some(asker) = askers.join_next().await {
        let (some, others) = asker.unwrap();
        counted += some;
        refused += others;
    }
    println!("{JOINS} joins during {during} reads; {counted} answers, {refused} refused");
    assert!(during > 0 && counted > 0, "{during} {counted}");
}

/// One user's questions over HTTP, many at once: some are refused, and another user's is answered.
#[tokio::test]
async fn one_user_that_asks_all_the_time_does_not_keep_others_from_it() {
    let mesh = Mesh::start(support::nats_url(), 1, "nats.partitions = 1").await;
    let mut kim = mesh.connect(0, "kim").await;
    let rooms: Vec<String> = (0..40).map(|n| format!("chat:r{n}")).collect();
    for room in &rooms {
        let ack = reply(&mut kim, "send", json!({"room": room, "body": 1})).await;
        assert_eq!(ack["op"], "ack", "{ack}");
    }
    let body = json!({"rooms": rooms}).to_string();
    let ask = async |user: &str| {
        let headers = format!("Authorization: Bearer {}\r\n", token(user));
        let address = mesh.edges[0].address;
        let answer = http(address, "POST", "/v1/unread", &headers, &body).await;
        let (status, body) = answer.unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert!(
            status == 200 || (status, &body["code"]) == (503, &json!("unavailable")),
            "{status} {body}"
        );
        (status, body)
    };
    let many = futures_util::future::join_all((0..60).map(|_| ask("lee")));
    let (many, (status, answer)) = tokio::join!(many, ask("park"));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["rooms"][7]["count"], json!(1), "{answer}");
    let answered = many.iter().filter(|(status, _)| *status == 200).count();
    println!("{answered} of {} were answered", many.len());
    assert!(answered > 0);
    // Nothing is left behind: the next one is answered.
    assert_eq!(ask("lee").await.0, 200);
}
