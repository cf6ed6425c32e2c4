//! Watches of rooms by name and by pattern.

use std::{collections::BTreeSet, time::Duration};

use natter::testing::auth::{Grant, Right};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{TOML, Watcher, boss, by_room, done, follower, make, pages, say, token, user};
use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, ask, token_with},
    raw::Raw,
    regions::Regions,
};

/// Makes groups of ann and bob.
async fn groups(mesh: &Mesh, count: usize) -> Vec<String> {
    let mut rooms = Vec::new();
    for number in 0..count {
        let group = json!({ "namespace": "crew", "kind": "group", "name": format!("g{number:03}"), "members": ["ann", "bob"] });
        rooms.push(make(mesh.edges[0].address, group, &boss()).await);
    }
    rooms
}

/// The next push of a watch.
async fn push(raw: &mut Raw) -> Value {
    let push = timeout(LONG, raw.json()).await.expect("nothing was pushed");
    assert_eq!(push["op"], "inbox", "{push}");
    push
}

/// Pushes until one tells something of a room: its summary, or `gone`.
async fn told(raw: &mut Raw, room: &str) -> Value {
    loop {
        let push = push(raw).await;
        if let Some(summary) = by_room(&push["rooms"]).remove(room) {
            return summary;
        }
        if push["gone"]
            .as_array()
            .is_some_and(|gone| gone.contains(&json!(room)))
        {
            return json!("gone");
        }
    }
}

/// Waits until a room is gone.
async fn gone(raw: &mut Raw, room: &str) {
    while told(raw, room).await != "gone" {}
}

async fn nothing_is_left(mesh: &Mesh) {
    for (number, _) in mesh.edges.iter().enumerate() {
        for gauge in ["natter_watch_subscriptions", "natter_session_watching"] {
            eventually("no watch is left", LONG, async || {
                match mesh.metric(number, gauge, "").await {
                    0 => Ok(()),
                    some => Err(format!("{gauge} {some}")),
                }
            })
            .await;
        }
    }
}

#[tokio::test]
async fn rooms_are_watched_by_name_and_refusals_are_named() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let rooms = groups(&mesh, 3).await;
    let closed =
        json!({ "namespace": "crew", "kind": "group", "name": "other", "members": ["bob"] });
    let closed = make(at, closed, &boss()).await;
    let grants = vec![
        Grant::new("crew:*", &[Right::Read, Right::Write]),
        Grant::new("live:*", &[Right::Read, Right::Write]),
    ];
    let ann = token_with("ann", Duration::from_secs(3600), grants);
    let mut raw = Raw::open(at, &ann).await;
    let many: Vec<String> = (0..501).map(|number| format!("crew:r{number}")).collect();
    for (fields, code) in [
        (json!({ "rooms": [] }), "bad_request"),
        (json!({ "rooms": many }), "bad_request"),
        (json!({ "rooms": ["nothing"] }), "bad_room"),
        (json!({ "rooms": rooms, "mine": true }), "bad_request"),
        (json!({ "rooms": rooms, "filter": {} }), "bad_request"),
        (json!({ "rooms": rooms, "limit": 0 }), "bad_request"),
        (json!({ "rooms": [closed] }), "forbidden"),
        (json!({ "rooms": ["none:a"] }), "unknown_namespace"),
        (json!({ "watch": 1, "after": "crew:a" }), "bad_request"),
        (json!({ "watch": 1 }), "bad_request"),
    ] {
        let mut command = json!({ "op": "watch", "rid": 1 });
        command
            .as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let reply = raw.call(command).await;
        assert_eq!(reply["code"], code, "{fields}: {reply}");
    }
    say(at, &rooms[1], "bob", "before").await;
    let named = json!([
        rooms[2], rooms[0], closed, "other:a", rooms[1], rooms[0], "live:tv"
    ]);
    let first = raw
        .call(json!({ "op": "watch", "rid": 2, "rooms": named, "limit": 2 }))
        .await;
    assert_eq!(
        (&first["watch"], &first["op"]),
        (&json!(1), &json!("watching")),
        "{first}"
    );
    let refused: Vec<_> = first["refused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (&it["room"], &it["code"]))
        .collect();
    assert_eq!(
        refused,
        [
            (&json!(closed), &json!("forbidden")),
            (&json!("other:a"), &json!("unknown_namespace"))
        ],
        "{first}"
    );
    assert_eq!(
        by_room(&first["rooms"]).into_keys().collect::<Vec<_>>(),
        rooms[..2]
    );
    let next = raw
        .call(json!({ "op": "watch", "rid": 3, "watch": 1, "after": first["next"] }))
        .await;
    assert_eq!(
        by_room(&next["rooms"]).into_keys().collect::<Vec<_>>(),
        [&rooms[2], "live:tv"]
    );
    assert_eq!(
        (next["next"].clone(), first["rooms"][1]["unread"].clone()),
        (Value::Null, json!(1))
    );

    // Every sort of room is told, those that are not named are not.
    say(at, &closed, "bob", "secret").await;
    say(at, &rooms[0], "bob", "hello").await;
    let summary = told(&mut raw, &rooms[0]).await;
    assert_eq!(
        (&summary["last"]["text"], &summary["unread"]),
        (&json!("hello"), &json!(1))
    );
    let path = "/v1/rooms/live:tv/messages";
    done(
        at,
        "POST",
        path,
        &ann,
        json!({ "body": { "text": "goal" } }),
    )
    .await;
    let summary = told(&mut raw, "live:tv").await;
    assert_eq!(
        (&summary["last"]["text"], &summary["unread"]),
        (&json!("goal"), &json!(0))
    );

    // A second watch is told by itself, and has the next number; what has ended is not told.
    for number in 2..=8 {
        let reply = raw
            .call(json!({ "op": "watch", "rid": 4, "rooms": [rooms[0]] }))
            .await;
        assert_eq!(reply["watch"], number, "{reply}");
    }
    let reply = raw
        .call(json!({ "op": "watch", "rid": 5, "mine": true }))
        .await;
    assert_eq!(reply["code"], "limit", "{reply}");
    for number in 2..=8 {
        let reply = raw
            .call(json!({ "op": "unwatch", "rid": 6, "watch": number }))
            .await;
        assert_eq!(reply["op"], "ok", "{reply}");
    }
    let reply = raw
        .call(json!({ "op": "watch", "rid": 7, "mine": true }))
        .await;
    assert_eq!(reply["watch"], 9, "{reply}");
    say(at, &rooms[2], "bob", "both").await;
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        let push = push(&mut raw).await;
        assert!([1, 9].contains(&push["watch"].as_u64().unwrap()), "{push}");
        if by_room(&push["rooms"]).contains_key(&rooms[2]) {
            seen.insert(push["watch"].as_u64().unwrap());
        }
    }

    // Who is removed from a room is told, and then nothing more of it. `mine` may say so twice: the record and the signal
    // come on ways of their own.
    let path = format!("/v1/rooms/{}/members/ann", rooms[0]);
    done(at, "DELETE", &path, &boss(), Value::Null).await;
    let mut out = BTreeSet::new();
    while out.len() < 2 {
        let push = push(&mut raw).await;
        if push["gone"] == json!([rooms[0]]) {
            out.insert(push["watch"].as_u64().unwrap());
        }
    }
    say(at, &rooms[0], "bob", "without ann").await;
    say(at, &rooms[1], "bob", "with ann").await;
    loop {
        let push = push(&mut raw).await;
        let told = by_room(&push["rooms"]);
        assert!(
            push["gone"].is_null() || push["gone"] == json!([rooms[0]]),
            "{push}"
        );
        assert!(!told.contains_key(&rooms[0]), "{push}");
        if told
            .get(&rooms[1])
            .is_some_and(|it| it["last"]["text"] == "with ann")
        {
            break;
        }
    }

    // A token that covers less.
    let narrow = token_with(
        "ann",
        Duration::from_secs(3600),
        vec![Grant::new("live:*", &[Right::Read])],
    );
    let reply = raw
        .call(json!({ "op": "refresh", "rid": 8, "token": narrow }))
        .await;
    assert_eq!(reply["op"], "refreshed");
    gone(&mut raw, &rooms[1]).await;
    drop(raw);
    nothing_is_left(&mesh).await;
}

#[tokio::test]
async fn mentions_are_counted_up_to_200_unread_messages() {
    let toml = TOML.replace("unread_cap = 6", "unread_cap = 1000");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let at = mesh.edges[0].address;
    let room = groups(&mesh, 1).await.remove(0);
    let path = format!("/v1/rooms/{room}/messages");
    let mention = async |users: Value| {
        let body = json!({ "body": { "text": "x" }, "mentions": users });
        done(at, "POST", &path, &user("bob"), body).await;
    };
    mention(json!(["ann", "cat"])).await;
    mention(json!(["cat"])).await;
    let mut watchers = Vec::new();
    for what in [json!({ "mine": true }), json!({ "rooms": [room] })] {
        watchers.push(Watcher::new(at, &user("ann"), what).await);
    }
    for _ in 2..199 {
        say(at, &room, "bob", "x").await;
    }
    mention(json!(["ann"])).await;
    let expected = |watcher: &Watcher| {
        let one = &watcher.rooms[&room];
        (one["unread"].clone(), one["mentions"].clone())
    };
    for watcher in &mut watchers {
        watcher.settles(at, "200 messages").await;
        assert_eq!(expected(watcher), (json!(200), json!(2)));
    }
    mention(json!(["ann"])).await;
    for watcher in &mut watchers {
        watcher.settles(at, "201 messages").await;
        assert_eq!(expected(watcher), (json!(201), Value::Null));
    }
    let head = watchers[0].rooms[&room]["head"].clone();
    let read = format!("/v1/rooms/{room}/read");
    done(at, "PUT", &read, &user("ann"), json!({ "cursor": head })).await;
    mention(json!(["ann"])).await;
    for watcher in &mut watchers {
        watcher.settles(at, "after reading").await;
        assert_eq!(expected(watcher), (json!(1), json!(1)));
    }
}

#[tokio::test]
async fn a_pattern_needs_the_right_follow_and_ends_with_it() {
    let mesh = Mesh::start(support::nats_url(), 2, TOML).await;
    let at = mesh.edges[0].address;
    let rooms = groups(&mesh, 4).await;
    for room in &rooms {
        say(at, room, "bob", "first").await;
    }
    let mut ann = Raw::open(at, &user("ann")).await;
    let reply = ann
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*" }))
        .await;
    assert_eq!(reply["code"], "forbidden", "{reply}");
    let one = token_with(
        "one",
        Duration::from_secs(3600),
        vec![Grant::new(&rooms[0], &Right::ALL)],
    );
    let mut one = Raw::open(at, &one).await;
    let reply = one
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*" }))
        .await;
    assert_eq!(reply["code"], "forbidden", "{reply}");
    let mut op = Raw::open(at, &follower("op")).await;
    for (pattern, filter, code, names) in [
        ("crew", json!({}), "bad_request", "pattern"),
        ("crew:g*", json!({}), "bad_request", "pattern"),
        ("none:*", json!({}), "unknown_namespace", "none"),
        ("*:*", json!({}), "forbidden", "follow"),
        ("live:*", json!({}), "forbidden", "follow"),
        (
            "crew:*",
            json!({ "staff": ["a"] }),
            "bad_request",
            "filter.staff",
        ),
        ("crew:*", json!({ "text": 7 }), "bad_request", "filter.text"),
        (
            "crew:*",
            json!({ "annotation": "x" }),
            "bad_request",
            "filter.annotation",
        ),
        ("crew:*", json!(7), "bad_request", "filter must"),
    ] {
        let reply = op
            .call(json!({ "op": "watch", "rid": 1, "pattern": pattern, "filter": filter }))
            .await;
        assert_eq!(reply["code"], code, "{pattern} {filter}: {reply}");
        assert!(
            reply["message"].as_str().unwrap().contains(names),
            "{reply}"
        );
    }
    let all = token_with(
        "all",
        Duration::from_secs(3600),
        vec![Grant::new("*:*", &[Right::Follow, Right::Write])],
    );
    let mut all = Raw::open(mesh.edges[1].address, &all).await;
    let reply = all
        .call(json!({ "op": "watch", "rid": 1, "pattern": "*:*" }))
        .await;
    assert_eq!(
        (&reply["watch"], &reply["partial"]),
        (&json!(1), &json!(true)),
        "{reply}"
    );
    assert_eq!(
        by_room(&reply["rooms"]).into_keys().collect::<Vec<_>>(),
        rooms
    );
    let reply = op
        .call(json!({ "op": "watch", "rid": 2, "pattern": "crew:*", "limit": 3 }))
        .await;
    assert_eq!(
        (&reply["partial"], &reply["next"]),
        (&Value::Null, &json!(rooms[2])),
        "{reply}"
    );
    // Where the follower has not read, nothing is counted.
    assert!(reply["rooms"][0]["unread"].is_null() && reply["rooms"][0]["last"]["text"] == "first");

    say(mesh.edges[1].address, &rooms[3], "bob", "second").await;
    for raw in [&mut op, &mut all] {
        let mut summary = told(raw, &rooms[3]).await;
        while summary["last"]["text"] != "second" {
            summary = told(raw, &rooms[3]).await;
        }
    }
    let path = "/v1/rooms/live:tv/messages";
    let body = json!({ "body": { "text": "goal" } });
    let viewer = token_with(
        "tv",
        Duration::from_secs(3600),
        vec![Grant::new("live:*", &[Right::Write])],
    );
    done(at, "POST", path, &viewer, body).await;
    assert_eq!(told(&mut all, "live:tv").await["last"]["text"], "goal");

    // Of a room from which the follower is banned, or that has ended, nothing is told any more.
    let path = format!("/v1/rooms/{}/members/op", rooms[0]);
    done(at, "PUT", &path, &boss(), json!({ "state": "banned" })).await;
    gone(&mut op, &rooms[0]).await;
    // Without a history service the messages stay, and the record says that the room has ended.
    let path = format!("/v1/rooms/{}", rooms[1]);
    let (status, _) = ask(at, ("DELETE", &path), &boss(), &Value::Null).await;
    assert_ne!(status, 403);
    gone(&mut op, &rooms[1]).await;
    say(at, &rooms[0], "bob", "not for op").await;
    say(at, &rooms[2], "bob", "for op").await;
    loop {
        let push = push(&mut op).await;
        assert!(!by_room(&push["rooms"]).contains_key(&rooms[0]), "{push}");
        if by_room(&push["rooms"])
            .get(&rooms[2])
            .is_some_and(|it| it["last"]["text"] == "for op")
        {
            break;
        }
    }
    let (_raw, _, fresh) = pages(at, &follower("op"), &json!({ "pattern": "crew:*" })).await;
    assert_eq!(fresh.into_keys().collect::<Vec<_>>(), rooms[2..]);

    let narrow = token("op", &[Right::Read]);
    let reply = op
        .call(json!({ "op": "refresh", "rid": 3, "token": narrow }))
        .await;
    assert_eq!(reply["op"], "refreshed");
    let ended = push(&mut op).await;
    assert_eq!(
        (&ended["watch"], &ended["ended"]),
        (&json!(1), &json!("forbidden")),
        "{ended}"
    );
    let reply = op
        .call(json!({ "op": "unwatch", "rid": 4, "watch": 1 }))
        .await;
    assert_eq!(reply["code"], "bad_request", "{reply}");
    drop((op, all, _raw));
    nothing_is_left(&mesh).await;
}

#[tokio::test]
async fn a_room_is_told_when_it_is_unanswered_and_gone_when_it_is_answered() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let rooms = groups(&mesh, 3).await;
    say(at, &rooms[0], "bob", "anybody there?").await;
    say(at, &rooms[1], "bob", "hello?").await;
    say(at, &rooms[1], "ann", "hello").await;
    let filter = json!({ "unanswered_for": "2s", "staff": ["an*"] });
    let mut op = Raw::open(at, &follower("op")).await;
    let reply = op
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*", "filter": filter }))
        .await;
    assert_eq!(reply["op"], "watching", "{reply}");
    // Whether it waits already or is shown at once depends on how long the watch took to begin.
    let mut summary = by_room(&reply["rooms"]).remove(&rooms[0]);
    if summary.is_none() {
        summary = Some(told(&mut op, &rooms[0]).await);
    }
    assert_eq!(summary.unwrap()["last"]["text"], "anybody there?");
    say(at, &rooms[2], "bob", "a question").await;
    assert_eq!(told(&mut op, &rooms[2]).await["last"]["text"], "a question");
    say(at, &rooms[0], "ann", "yes").await;
    gone(&mut op, &rooms[0]).await;
    // The time begins anew with each message.
    say(at, &rooms[2], "bob", "and another one").await;
    gone(&mut op, &rooms[2]).await;
    assert_eq!(
        told(&mut op, &rooms[2]).await["last"]["text"],
        "and another one"
    );
}

#[tokio::test]
async fn annotations_decide_whether_a_room_is_told() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let rooms = groups(&mesh, 2).await;
    let annotate = async |room: &str, score: f64| {
        let annotation = json!({ "kind": "annotation", "target": "bob/m1", "body": { "sentiment": { "score": score } } });
        done(
            at,
            "POST",
            &format!("/v1/rooms/{room}/messages"),
            &boss(),
            annotation,
        )
        .await;
    };
    for room in &rooms {
        let message = json!({ "id": "m1", "body": { "text": "grr" } });
        done(
            at,
            "POST",
            &format!("/v1/rooms/{room}/messages"),
            &user("bob"),
            message,
        )
        .await;
    }
    annotate(&rooms[0], -0.75).await;
    annotate(&rooms[1], 0.5).await;
    let filter = json!({ "annotation": "sentiment.score < -0.5" });
    let mut op = Raw::open(at, &follower("op")).await;
    let reply = op
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*", "filter": filter }))
        .await;
    assert_eq!(
        by_room(&reply["rooms"]).into_keys().collect::<Vec<_>>(),
        [&*rooms[0]],
        "{reply}"
    );
    annotate(&rooms[1], -0.9).await;
    assert_eq!(told(&mut op, &rooms[1]).await["last"]["text"], "grr");
    annotate(&rooms[0], 0.1).await;
    gone(&mut op, &rooms[0]).await;
}

#[tokio::test]
async fn a_push_is_bounded_and_says_how_much_more_there_is() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let mut op = Raw::open(at, &follower("op")).await;
    let reply = op
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*" }))
        .await;
    assert_eq!(reply["rooms"], json!([]), "{reply}");
    let rooms = groups(&mesh, 150).await;
    let long = "긴 글 ".repeat(60);
    let mut wanted = BTreeSet::new();
    for room in &rooms {
        say(at, room, "bob", &long).await;
        wanted.insert(room.clone());
    }
    let mut most = 0;
    let mut pushes = 0;
    while !wanted.is_empty() {
        let push = push(&mut op).await;
        let bytes = push.to_string().len();
        assert!(bytes <= 20_000, "{bytes}");
        most = most.max(push["more"].as_u64().unwrap_or_default());
        pushes += 1;
        for room in by_room(&push["rooms"]).into_keys() {
            wanted.remove(&room);
        }
    }
    assert!(most > 0 && pushes >= 5, "{most} {pushes}");
}

#[tokio::test]
async fn what_is_said_in_another_region_is_told() {
    let both = ["seoul", "virginia"];
    let mut regions = Regions::start_with(&both, TOML, Duration::ZERO).await;
    for region in both {
        regions.mesh(region).add_edge().await;
    }
    let [seoul, virginia] = both.map(|region| regions.at(region).edges[0].address);
    let group =
        json!({ "namespace": "crew", "kind": "group", "name": "far", "members": ["ann", "bob"] });
    let room = make(seoul, group, &boss()).await;
    say(seoul, &room, "bob", "here").await;
    let mut watchers = Vec::new();
    for (token, what) in [
        (user("ann"), json!({ "mine": true })),
        (user("ann"), json!({ "rooms": [room] })),
        (follower("op1"), json!({ "pattern": "crew:*" })),
        (
            follower("op2"),
            json!({ "pattern": "crew:*", "filter": { "text": "there" } }),
        ),
    ] {
        watchers.push(Watcher::new(seoul, &token, what).await);
    }
    eventually(
        "the record has reached the other region",
        LONG,
        async || {
            let path = format!("/v1/rooms/{room}/messages");
            let body = json!({ "id": "far", "body": { "text": "there" }, "mentions": ["ann"] });
            let answer = ask(virginia, ("POST", &path), &user("bob"), &body).await;
            match answer.0 {
                200..300 => Ok(()),
                _ => Err(answer.1.to_string()),
            }
        },
    )
    .await;
    for watcher in &mut watchers {
        eventually("it is told", LONG, async || {
            watcher.settles(seoul, "a message of another region").await;
            match watcher.rooms.get(&room) {
                Some(summary) if summary["last"]["text"] == "there" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    assert_eq!(watchers[0].rooms[&room]["mentions"], 1);
    say(seoul, &room, "bob", "here again").await;
    for watcher in &mut watchers {
        watcher.settles(seoul, "a message of the own region").await;
    }
    assert!(watchers[3].rooms.is_empty(), "{:?}", watchers[3].rooms);

    // The signal may arrive before the record does.
    let path = format!("/v1/rooms/{room}");
    done(virginia, "PATCH", &path, &boss(), json!({ "title": "Far" })).await;
    for watcher in &mut watchers[..3] {
        eventually("the title is told", LONG, async || {
            watcher.settles(seoul, "a title of another region").await;
            match watcher.rooms.get(&room) {
                Some(summary) if summary["title"] == "Far" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_long_list_is_told_in_parts_and_once() {
    let toml = format!("limits.outbox = '128KiB'\n{TOML}");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let at = mesh.edges[0].address;
    let rooms = groups(&mesh, 30).await;
    let info = json!({ "info": { "about": "x".repeat(8000) } });
    for room in &rooms {
        done(
            at,
            "PATCH",
            &format!("/v1/rooms/{room}"),
            &boss(),
            info.clone(),
        )
        .await;
    }
    let mut raw = Raw::open(at, &user("ann")).await;
    let reply = raw
        .call(json!({ "op": "watch", "rid": 1, "rooms": rooms, "limit": 1 }))
        .await;
    assert_eq!(reply["op"], "watching", "{reply}");
    // All rooms are looked at again.
    let refresh = json!({ "op": "refresh", "rid": 2, "token": user("ann") });
    let reply = raw.call(refresh.clone()).await;
    assert_eq!(reply["op"], "refreshed", "{reply}");
    let mut wanted: BTreeSet<String> = rooms.iter().cloned().collect();
    while !wanted.is_empty() {
        let push = push(&mut raw).await;
        let bytes = push.to_string().len();
        assert!(bytes <= 65 * 1024, "{bytes}");
        for room in by_room(&push["rooms"]).into_keys() {
            assert!(wanted.remove(&room), "{room} is told twice");
        }
    }
    // What is as it was told is not told again.
    let reply = raw.call(refresh).await;
    assert_eq!(reply["op"], "refreshed", "{reply}");
    say(at, &rooms[7], "bob", "hello").await;
    let push = push(&mut raw).await;
    assert_eq!(
        by_room(&push["rooms"]).into_keys().collect::<Vec<_>>(),
        [&*rooms[7]]
    );
}

#[tokio::test]
async fn a_room_with_many_members_is_told_to_those_whom_its_record_concerns() {
    let mesh = Mesh::start(support::nats_url(), 2, TOML).await;
    let [one, other] = [0, 1].map(|edge| mesh.edges[edge].address);
    let mut members: Vec<String> = (0..120).map(|number| format!("m{number}")).collect();
    members.push("ann".to_owned());
    let large =
        json!({ "namespace": "crew", "kind": "group", "name": "large", "members": members });
    let room = make(one, large, &boss()).await;
    let mut ann = Watcher::new(other, &user("ann"), json!({ "mine": true })).await;
    assert!(ann.rooms.contains_key(&room));
    let path = format!("/v1/rooms/{room}");
    done(one, "PATCH", &path, &boss(), json!({ "title": "Many" })).await;
    assert_eq!(told(&mut ann.raw, &room).await["title"], "Many");
    let path = format!("{path}/members/ann");
    done(one, "DELETE", &path, &boss(), Value::Null).await;
    gone(&mut ann.raw, &room).await;
}

#[tokio::test]
async fn an_assignment_in_a_room_that_the_edge_has_not_read_is_told() {
    let mesh = Mesh::start(support::nats_url(), 2, TOML).await;
    let [one, other] = [0, 1].map(|edge| mesh.edges[edge].address);
    let rooms = groups(&mesh, 2).await;
    let assign = async |room: &str| {
        let path = format!("/v1/rooms/{room}");
        done(one, "PATCH", &path, &boss(), json!({ "assignee": "op" })).await;
    };
    for room in &rooms {
        say(one, room, "bob", "help").await;
    }
    assign(&rooms[0]).await;
    let mut op = Raw::open(other, &follower("op")).await;
    let filter = json!({ "assignee": "op" });
    let reply = op
        .call(json!({ "op": "watch", "rid": 1, "pattern": "crew:*", "filter": filter, "limit": 1 }))
        .await;
    assert_eq!(
        by_room(&reply["rooms"]).into_keys().collect::<Vec<_>>(),
        [&*rooms[0]],
        "{reply}"
    );
    assign(&rooms[1]).await;
    assert_eq!(told(&mut op, &rooms[1]).await["last"]["text"], "help");
}

#[tokio::test]
async fn the_record_of_an_ephemeral_room_does_not_hide_it() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let all = token_with(
        "all",
        Duration::from_secs(3600),
        vec![Grant::new("*:*", &Right::ALL)],
    );
    let mut op = Raw::open(at, &all).await;
    let filter = json!({ "text": "goal" });
    let reply = op
        .call(json!({ "op": "watch", "rid": 1, "pattern": "live:*", "filter": filter }))
        .await;
    assert_eq!(reply["op"], "watching", "{reply}");
    let shout = async |room: &str, text: &str| {
        let path = format!("/v1/rooms/{room}/messages");
        let body = json!({ "body": { "text": text } });
        done(at, "POST", &path, &all, body).await;
    };
    let tv = json!({ "namespace": "live", "kind": "open", "name": "tv" });
    let tv = make(at, tv, &all).await;
    shout(&tv, "goal").await;
    assert_eq!(told(&mut op, &tv).await["last"]["text"], "goal");
    let path = format!("/v1/rooms/{tv}");
    done(at, "PATCH", &path, &all, json!({ "title": "TV" })).await;
    shout("live:radio", "goal").await;
    loop {
        let push = push(&mut op).await;
        assert!(push["gone"].is_null(), "{push}");
        if by_room(&push["rooms"]).contains_key("live:radio") {
            break;
        }
    }
    // The newest message decides.
    shout(&tv, "a second goal").await;
    shout(&tv, "nothing").await;
    gone(&mut op, &tv).await;
}
