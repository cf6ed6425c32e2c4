//! The rooms of a user: the list, and what a session that watches is told.

mod watch;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use natter::testing::auth::{Grant, Right};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, ask, token_with},
    raw::Raw,
};

const TOML: &str = "limits.commands_per_second = 100000\nlimits.commands_burst = 100000\nlimits.unread_cap = 6\n\
    [namespaces.crew]\ndurable = true\ntyping = false\naccess = 'members'\ncreate = 'members'\n";

fn token(user: &str, can: &[Right]) -> String {
    token_with(
        user,
        Duration::from_secs(3600),
        vec![Grant::new("crew:*", can)],
    )
}

/// A user without special rights.
fn user(name: &str) -> String {
    token(name, &[Right::Read, Right::Write, Right::History])
}

fn boss() -> String {
    token("boss", &Right::ALL)
}

async fn get(address: SocketAddr, path: &str, token: &str) -> Value {
    let (status, answer) = ask(address, ("GET", path), token, &Value::Null).await;
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

async fn make(address: SocketAddr, room: Value, token: &str) -> String {
    let (status, answer) = ask(address, ("POST", "/v1/rooms"), token, &room).await;
    assert!(status == 200 || status == 201, "{room}: {answer}");
    answer["room"].as_str().unwrap().to_owned()
}

async fn done(address: SocketAddr, method: &str, path: &str, token: &str, body: Value) -> Value {
    let (status, answer) = ask(address, (method, path), token, &body).await;
    assert!(
        (200..300).contains(&status),
        "{method} {path} {body}: {status} {answer}"
    );
    answer
}

async fn say(address: SocketAddr, room: &str, from: &str, text: &str) -> Value {
    let path = format!("/v1/rooms/{room}/messages");
    done(
        address,
        "POST",
        &path,
        &user(from),
        json!({ "body": { "text": text } }),
    )
    .await
}

/// The summaries of a list, by room.
fn by_room(rooms: &Value) -> BTreeMap<String, Value> {
    let rooms = rooms.as_array().unwrap().iter();
    rooms
        .map(|room| (room["room"].as_str().unwrap().to_owned(), room.clone()))
        .collect()
}

/// A client that watches, and what it knows from the first pages and the pushes alone.
struct Watcher {
    raw: Raw,
    token: String,
    what: Value,
    number: Value,
    rooms: BTreeMap<String, Value>,
}

/// The rooms of a new watch: all its pages. Reads of one user at once are limited, so it may have to be repeated.
async fn pages(
    address: SocketAddr,
    token: &str,
    what: &Value,
) -> (Raw, Value, BTreeMap<String, Value>) {
    eventually("a watch begins", LONG, async || {
        let mut raw = Raw::open(address, token).await;
        let mut command = json!({ "op": "watch", "rid": 1 });
        let fields = command.as_object_mut().unwrap();
        fields.extend(what.as_object().unwrap().clone());
        let mut rooms = BTreeMap::new();
        loop {
            let reply = raw.call(command).await;
            if reply["code"] == "unavailable" {
                return Err(reply.to_string());
            }
            if reply["code"] == "forbidden" {
                // None of the rooms may be read.
                return Ok((raw, Value::Null, rooms));
            }
            assert_eq!(reply["op"], "watching", "{what}: {reply}");
            rooms.extend(by_room(&reply["rooms"]));
            if reply["next"].is_null() {
                return Ok((raw, reply["watch"].clone(), rooms));
            }
            command = json!({ "op": "watch", "rid": 2, "watch": reply["watch"], "after": reply["next"], "limit": 7 });
        }
    })
    .await
}

impl Watcher {
    async fn new(address: SocketAddr, token: &str, what: Value) -> Self {
        let (raw, number, rooms) = pages(address, token, &what).await;
        Self {
            raw,
            token: token.to_owned(),
            what,
            number,
            rooms,
        }
    }

    /// Takes in what was pushed, until the rooms are as `wanted`, or nothing came for a while.
    async fn take_in(&mut self, wanted: &BTreeMap<String, Value>) {
        while self.rooms != *wanted {
            let Ok(push) = timeout(Duration::from_millis(300), self.raw.json()).await else {
                return;
            };
            assert_eq!(
                (&push["op"], &push["watch"]),
                (&json!("inbox"), &self.number),
                "{push}"
            );
            self.rooms.extend(by_room(&push["rooms"]));
            for gone in push["gone"].as_array().into_iter().flatten() {
                self.rooms.remove(gone.as_str().unwrap());
            }
        }
    }

    /// Waits until what it knows equals what a new watch is told.
    async fn settles(&mut self, address: SocketAddr, why: &str) {
        // Before the edge closes the other connections, which do not answer pings.
        let end = tokio::time::Instant::now() + LONG / 2;
        loop {
            let (_raw, _, mut fresh) = pages(address, &self.token, &self.what).await;
            if self.what["mine"] == true {
                let path = "/v1/inbox?archived=true";
                fresh.extend(by_room(&get(address, path, &self.token).await["rooms"]));
            }
            self.take_in(&fresh).await;
            if self.rooms == fresh {
                return;
            }
            if tokio::time::Instant::now() > end {
                let differs: Vec<_> = fresh
                    .iter()
                    .filter(|(room, it)| self.rooms.get(*room) != Some(it))
                    .map(|(room, it)| format!("{it}\n  is {:?}", self.rooms.get(room)))
                    .collect();
                let names: Vec<_> = self.rooms.keys().collect();
                panic!(
                    "{} {why}: {} {names:?} {differs:#?}",
                    self.what,
                    fresh.len()
                );
            }
        }
    }
}

/// A user who may follow, without being in any room.
fn follower(name: &str) -> String {
    token(name, &[Right::Read, Right::Follow])
}

/// As Zulip does for its events: after random operations, over two edges, what a client derived from the pushes equals what
/// it would fetch.
#[tokio::test]
async fn what_a_watcher_knows_equals_a_fresh_list() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mesh = Mesh::start(support::nats_url(), 2, TOML).await;
    let edges = [mesh.edges[0].address, mesh.edges[1].address];
    let (ann, boss) = (user("ann"), boss());
    let mut rooms = Vec::new();
    for number in 0..6 {
        let group = json!({ "namespace": "crew", "kind": "group", "key": format!("g{number}"), "members": ["ann", "bob", "cat"] });
        rooms.push(make(edges[number % 2], group, &boss).await);
    }
    let mut watchers = vec![
        Watcher::new(edges[0], &ann, json!({ "mine": true })).await,
        Watcher::new(edges[1], &ann, json!({ "rooms": rooms })).await,
    ];
    assert!(watchers.iter().all(|watcher| watcher.rooms.len() == 6));
    for (number, filter) in [
        json!({}),
        json!({ "from": "b*" }),
        json!({ "text": ".1" }),
        json!({ "mentions": "ann" }),
        json!({ "assignee": "op" }),
        json!({ "unanswered_for": "1s", "staff": ["a*"] }),
        json!({ "from": "cat", "mentions": "ann", "assignee": "op" }),
    ]
    .into_iter()
    .enumerate()
    {
        let what = json!({ "pattern": "crew:*", "filter": filter });
        let token = match number {
            // Who is let in everywhere has read markers, too.
            0 => boss.clone(),
            _ => follower(&format!("op{number}")),
        };
        watchers.push(Watcher::new(edges[number % 2], &token, what).await);
    }
    let mut done_so_far = Vec::new();
    for round in 0..8 {
        for step in 0..rng.random_range(1..12) {
            let edge = edges[rng.random_range(0..2)];
            let room = rooms[rng.random_range(0..rooms.len())].clone();
            let is_in = watcher_is_in(edge, &room, &boss).await;
            let groups = room.contains("group-");
            let op = rng.random_range(0..20);
            match op {
                0..=9 => {
                    let from = ["bob", "cat"][op % 2 * usize::from(groups)];
                    let users = ["ann", "cat"];
                    let mentions = &users[..rng.random_range(0..3)];
                    let body = json!({ "body": { "text": format!("{round}.{step}") }, "mentions": mentions });
                    let path = format!("/v1/rooms/{room}/messages");
                    done(edge, "POST", &path, &user(from), body).await;
                }
                10 | 11 if is_in => drop(say(edge, &room, "ann", "me").await),
                12..=14 if is_in => {
                    let list = by_room(&get(edge, "/v1/inbox", &ann).await["rooms"]);
                    let head = list
                        .get(&room)
                        .map(|it| it["head"].clone())
                        .unwrap_or_default();
                    if head.is_string() {
                        let path = format!("/v1/rooms/{room}/read");
                        let cursor = json!({ "cursor": head });
                        done(edge, "PUT", &path, &ann, cursor.clone()).await;
                        done(edge, "PUT", &path, &boss, cursor).await;
                    }
                }
                15 if is_in => drop(
                    done(
                        edge,
                        "DELETE",
                        &format!("/v1/rooms/{room}/members/ann"),
                        &boss,
                        Value::Null,
                    )
                    .await,
                ),
                15 | 16 => drop(
                    done(
                        edge,
                        "PUT",
                        &format!("/v1/rooms/{room}/members/ann"),
                        &boss,
                        json!({ "state": "in" }),
                    )
                    .await,
                ),
                17 => {
                    let assignee = ["op", ""][rng.random_range(0..2)];
                    let title =
                        json!({ "title": format!("title {round}.{step}"), "assignee": assignee });
                    done(edge, "PATCH", &format!("/v1/rooms/{room}"), &boss, title).await;
                }
                18 => {
                    let how = json!({ "pinned": rng.random::<bool>(), "muted": rng.random::<bool>(), "archived": rng.random_range(0..4) == 0 });
                    done(edge, "PATCH", &format!("/v1/inbox/{room}"), &ann, how).await;
                }
                _ => {
                    let dm = json!({ "namespace": "crew", "kind": "dm", "ref": format!("{round}.{step}"), "members": ["ann", "bob"] });
                    rooms.push(make(edge, dm, &user("bob")).await);
                }
            }
            done_so_far.push((op, room));
        }
        for watcher in &mut watchers {
            let why = format!("round {round}: {done_so_far:?}");
            watcher.settles(edges[round % 2], &why).await;
        }
    }
}

/// Whether ann is in a room.
async fn watcher_is_in(address: SocketAddr, room: &str, boss: &str) -> bool {
    let record = get(address, &format!("/v1/rooms/{room}"), boss).await;
    let members = record["members"].as_array().unwrap();
    members.iter().any(|member| member["user"] == "ann")
}

#[tokio::test]
async fn the_list_has_pinned_rooms_first_then_the_newest() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let (ann, bob) = (user("ann"), user("bob"));
    let mut rooms = Vec::new();
    for number in 0..5 {
        let dm = json!({ "namespace": "crew", "kind": "dm", "ref": format!("item/{number}"), "members": ["ann", "bob"], "title": format!("T{number}") });
        rooms.push(make(at, dm, &bob).await);
    }
    for number in [3, 1, 4, 0, 2] {
        say(at, &rooms[number], "bob", &format!("about {number}")).await;
    }
    done(
        at,
        "PATCH",
        &format!("/v1/inbox/{}", rooms[4]),
        &ann,
        json!({ "pinned": true }),
    )
    .await;
    let names = |list: &Value| -> Vec<String> {
        let rooms = list["rooms"].as_array().unwrap().iter();
        rooms
            .map(|room| room["ref"].as_str().unwrap().to_owned())
            .collect()
    };
    let first = get(at, "/v1/inbox?limit=3", &ann).await;
    assert_eq!(names(&first), ["item/4", "item/2", "item/0"]);
    let one = &first["rooms"][1];
    let expected = ("dm", "T2", json!(["bob"]), 1, "about 2", "bob");
    assert_eq!(
        (
            one["kind"].as_str().unwrap(),
            one["title"].as_str().unwrap(),
            one["peers"].clone(),
            one["unread"].as_u64().unwrap(),
            one["last"]["text"].as_str().unwrap(),
            one["last"]["from"].as_str().unwrap(),
        ),
        expected
    );
    let next = first["next"].as_str().unwrap();
    let second = get(at, &format!("/v1/inbox?limit=3&after={next}"), &ann).await;
    assert_eq!(names(&second), ["item/1", "item/3"]);
    assert_eq!(second.get("next"), None);
    // Bob has sent everything, and so has read it.
    let of_bob = get(at, "/v1/inbox", &bob).await;
    assert!(
        of_bob["rooms"]
            .as_array()
            .unwrap()
            .iter()
            .all(|room| room["unread"] == 0),
        "{of_bob}"
    );
    // More unread messages than are counted.
    for _ in 0..8 {
        say(at, &rooms[0], "bob", "more").await;
    }
    let list = by_room(&get(at, "/v1/inbox", &ann).await["rooms"]);
    assert_eq!(
        (&list[&rooms[0]]["unread"], &list[&rooms[0]]["capped"]),
        (&json!(6), &json!(true))
    );
    done(
        at,
        "PATCH",
        &format!("/v1/inbox/{}", rooms[0]),
        &ann,
        json!({ "archived": true }),
    )
    .await;
    assert_eq!(names(&get(at, "/v1/inbox", &ann).await).len(), 4);
    assert_eq!(
        names(&get(at, "/v1/inbox?archived=true", &ann).await),
        ["item/0"]
    );
    for (path, code) in [
        ("/v1/inbox?limit=0", "bad_request"),
        ("/v1/inbox?limit=201", "bad_request"),
        ("/v1/inbox?after=x", "bad_request"),
    ] {
        let (status, answer) = ask(at, ("GET", path), &ann, &Value::Null).await;
        assert_eq!(
            (status, answer["code"].as_str().unwrap()),
            (400, code),
            "{path}"
        );
    }
    let (status, answer) = ask(
        at,
        ("PATCH", "/v1/inbox/crew:nothing"),
        &ann,
        &json!({ "muted": true }),
    )
    .await;
    assert_eq!(
        (status, answer["code"].as_str().unwrap()),
        (404, "unknown_room")
    );
    // Somebody who is in no room.
    assert_eq!(
        get(at, "/v1/inbox", &user("dan")).await,
        json!({ "rooms": [] })
    );
}

#[tokio::test]
async fn a_watch_ends_and_its_refusals_are_named() {
    let mesh = Mesh::start(support::nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let dm = json!({ "namespace": "crew", "kind": "dm", "members": ["ann", "bob"] });
    let room = make(at, dm, &user("bob")).await;
    let mut raw = Raw::open(at, &user("ann")).await;
    for (command, code) in [
        (json!({ "op": "watch", "rid": 1 }), "bad_request"),
        (
            json!({ "op": "unwatch", "rid": 2, "watch": 1 }),
            "bad_request",
        ),
        (json!({ "op": "unwatch", "rid": 3 }), "bad_request"),
        (
            json!({ "op": "inbox", "rid": 4, "limit": 0 }),
            "bad_request",
        ),
        (
            json!({ "op": "room", "rid": 5, "room": "crew:nothing" }),
            "forbidden",
        ),
        (
            json!({ "op": "create", "rid": 6, "namespace": "crew" }),
            "bad_request",
        ),
        (
            json!({ "op": "create", "rid": 7, "namespace": "crew", "kind": "club" }),
            "bad_request",
        ),
        (
            json!({ "op": "create", "rid": 8, "namespace": "none", "kind": "dm", "members": ["ann"] }),
            "unknown_namespace",
        ),
    ] {
        let reply = raw.call(command.clone()).await;
        assert_eq!(reply["code"], code, "{command}: {reply}");
    }
    let made = raw.call(json!({ "op": "create", "rid": 9, "namespace": "crew", "kind": "dm", "members": ["bob", "ann"] })).await;
    assert_eq!(
        (&made["op"], &made["room"], &made["created"]),
        (&json!("room"), &json!(room), &json!(false))
    );
    let inbox = raw.call(json!({ "op": "inbox", "rid": 10 })).await;
    assert_eq!(inbox["rooms"][0]["room"], json!(room), "{inbox}");
    let watching = raw
        .call(json!({ "op": "watch", "rid": 11, "mine": true }))
        .await;
    assert_eq!(watching["op"], "watching");
    say(at, &room, "bob", "hi").await;
    let push = timeout(LONG, raw.json()).await.unwrap();
    assert_eq!(
        (&push["op"], &push["rooms"][0]["unread"]),
        (&json!("inbox"), &json!(1))
    );
    let signals = mesh.metric(0, "natter_signal_received_total", "").await;
    assert!(signals > 0);
    let ended = raw
        .call(json!({ "op": "unwatch", "rid": 12, "watch": 1 }))
        .await;
    assert_eq!(ended["op"], "ok");
    eventually("nobody watches", LONG, async || {
        match mesh.metric(0, "natter_session_watching", "").await {
            0 => Ok(()),
            some => Err(some.to_string()),
        }
    })
    .await;
    let signals = mesh.metric(0, "natter_signal_received_total", "").await;
    say(at, &room, "bob", "again").await;
    let inbox = raw.call(json!({ "op": "inbox", "rid": 13 })).await;
    assert_eq!(inbox["rooms"][0]["unread"], 2, "{inbox}");
    assert_eq!(
        mesh.metric(0, "natter_signal_received_total", "").await,
        signals
    );
}
