//! Changes of a record act on live sessions, and the room is told of them.

use futures_util::future::join_all;
use natter::testing::{auth::Right, client::Connection};
use serde_json::{Value, json};

use super::{CLUB, FAR, boss, done, group, may, open, put};
use crate::support::{
    self, LONG,
    calls::{command, next, reply},
    centrifugal::Client,
    events::Events,
    eventually,
    mesh::{Mesh, ask},
    raw::{Dial, FIN, Raw, TEXT, bearer, request},
};

/// The unsubscribe of Centrifugo's protocol after which a client does not come back by itself.
const UNSUBSCRIBED: u64 = 2000;

/// The next push with this `op`. What comes before it is dropped.
async fn pushed(connection: &mut Connection, op: &str) -> Value {
    loop {
        let frame = next(connection).await.json();
        if frame["op"] == op {
            return frame;
        }
    }
}

async fn joined(mesh: &Mesh, edge: usize, user: &str, room: &str) -> Connection {
    let mut connection = open(mesh, edge, &may(user, &[Right::Moderate])).await;
    let answer = reply(&mut connection, "join", json!({ "room": room })).await;
    assert_eq!(answer["op"], "joined", "{user}: {answer}");
    connection
}

/// What one user has open in a room: a socket on each edge, a stream of events, a client of Centrifugo, one of STOMP.
struct Everywhere {
    sockets: Vec<Connection>,
    events: Events,
    centrifugal: Client,
    stomp: Raw,
}

/// The next frame of STOMP.
async fn stomp_frame(raw: &mut Raw) -> String {
    loop {
        let (first, payload) = raw.frame().await.expect("the connection ended");
        if first == FIN | TEXT && payload != b"\n" {
            return String::from_utf8(payload).unwrap();
        }
    }
}

impl Everywhere {
    async fn enter(mesh: &Mesh, user: &str, room: &str) -> Self {
        let edges = 0..mesh.edges.len();
        let sockets = edges.map(|edge| joined(mesh, edge, user, room));
        let sockets = join_all(sockets).await;
        let path = format!("/v1/rooms/{room}/events");
        let token = may(user, &[]);
        let mut events = Events::open(mesh.edges[1].address, &path, &bearer(&token)).await;
        events.named("joined").await;
        let (mut centrifugal, _) = Client::connect(mesh, 1, &token).await;
        let fields = json!({ "channel": room });
        let answer = centrifugal.call("subscribe", fields).await;
        assert!(answer["error"].is_null(), "{answer}");
        let dial = Dial {
            path: "/stomp",
            headers: &bearer(&token),
            ..Dial::default()
        };
        let mut stomp = Raw::dial(mesh.edges[1].address, dial).await;
        let connect = "CONNECT\naccept-version:1.2\nhost:x\n\n\0".to_owned();
        let subscribe = format!("SUBSCRIBE\nid:1\ndestination:/topic/{room}\nreceipt:r\n\n\0");
        for (frame, wanted) in [(connect, "CONNECTED\n"), (subscribe, "RECEIPT\n")] {
            stomp.text(&frame).await;
            let answer = stomp_frame(&mut stomp).await;
            assert!(answer.starts_with(wanted), "{answer}");
        }
        Self {
            sockets,
            events,
            centrifugal,
            stomp,
        }
    }

    /// Waits until each of them is told to be out, and checks that none gets back in, and why.
    async fn is_out(&mut self, room: &str, code: &str, why: &str) {
        let kicked = json!({"op": "kicked", "room": room, "code": code});
        for socket in &mut self.sockets {
            assert_eq!(pushed(socket, "kicked").await, kicked);
            let refused = reply(socket, "join", json!({ "room": room })).await;
            assert_eq!(refused["code"], "forbidden", "{refused}");
            assert!(
                refused["message"].as_str().unwrap().contains(why),
                "{refused}"
            );
        }
        let event = self.events.until("kicked").await.data;
        assert_eq!(
            (&event["room"], &event["code"]),
            (&kicked["room"], &kicked["code"])
        );
        let error = loop {
            let frame = stomp_frame(&mut self.stomp).await;
            if !frame.starts_with("MESSAGE\n") {
                break frame;
            }
        };
        assert!(
            error.starts_with("ERROR\n") && error.contains(code),
            "{error}"
        );
        let push = loop {
            let next = self.centrifugal.next().await;
            if !next["push"]["unsubscribe"].is_null() {
                break next["push"].clone();
            }
        };
        assert_eq!(push["channel"], room, "{push}");
        assert_eq!(
            push["unsubscribe"],
            json!({"code": UNSUBSCRIBED, "reason": code})
        );
    }
}

#[tokio::test]
async fn who_is_removed_or_banned_is_out_on_every_edge_and_so_is_everybody_when_the_room_ends() {
    let (nats, mongodb) = (support::nats_url(), support::mongodb_url());
    let mesh = Mesh::with_history(nats, mongodb, (2, 1), CLUB).await;
    let address = mesh.edges[0].address;
    let room = &group(address, "club", "exits", &["kim", "lee", "ann", "boss"]).await;
    let mut kim = Everywhere::enter(&mesh, "kim", room).await;
    let mut lee = Everywhere::enter(&mesh, "lee", room).await;
    let mut ann = Everywhere::enter(&mesh, "ann", room).await;

    let path = format!("/v1/rooms/{room}/members/kim");
    done(address, ("DELETE", &path), &boss(), Value::Null).await;
    kim.is_out(room, "removed", "not a member").await;
    put(address, room, "lee", json!({"state": "banned"})).await;
    lee.is_out(room, "banned", "banned").await;

    // What is said now reaches who is still in it, and nobody else.
    let path = format!("/v1/rooms/{room}/messages");
    let message = json!({"id": "later", "body": 1});
    done(address, ("POST", &path), &boss(), message).await;
    for (edge, socket) in ann.sockets.iter_mut().enumerate() {
        while pushed(socket, "msg").await["id"] != "later" {}
        for out in [&mut kim.sockets[edge], &mut lee.sockets[edge]] {
            let frames = command(out, "ping", json!({})).await;
            assert!(
                frames.iter().all(|frame| frame["op"] != "msg"),
                "{frames:?}"
            );
        }
    }

    // Who is added again may come back; who was banned has to be let in first.
    put(address, room, "kim", json!({})).await;
    let back = reply(&mut kim.sockets[0], "join", json!({ "room": room })).await;
    assert_eq!(back["op"], "joined", "{back}");
    put(address, room, "lee", json!({})).await;
    let still = reply(&mut lee.sockets[0], "join", json!({ "room": room })).await;
    assert_eq!(still["code"], "forbidden", "{still}");
    put(address, room, "lee", json!({"state": "in"})).await;
    let back = reply(&mut lee.sockets[0], "join", json!({ "room": room })).await;
    assert_eq!(back["op"], "joined", "{back}");

    let end = format!("/v1/rooms/{room}");
    let (status, refused) = ask(
        address,
        ("DELETE", &end),
        &may("ann", &[Right::Erase]),
        &Value::Null,
    )
    .await;
    assert_eq!(
        (status, &refused["code"]),
        (403, &json!("forbidden")),
        "{refused}"
    );
    done(address, ("DELETE", &end), &boss(), Value::Null).await;
    ann.is_out(room, "closed", "was closed").await;
    let kicked = pushed(&mut kim.sockets[0], "kicked").await;
    assert_eq!(kicked["code"], "closed", "{kicked}");
    // For good: not even for who looks after it.
    let again = json!({"namespace": "club", "kind": "group", "name": "exits"});
    for (method, path, body) in [
        ("POST", "/v1/rooms".to_owned(), again),
        ("PUT", format!("{end}/members/kim"), json!({})),
        ("PATCH", end.clone(), json!({"title": "again"})),
        ("POST", format!("{end}/messages"), json!({"body": 1})),
    ] {
        let (status, refused) = ask(address, (method, &path), &boss(), &body).await;
        assert_eq!(
            (status, &refused["code"]),
            (403, &json!("forbidden")),
            "{path} {refused}"
        );
        assert!(
            refused["message"].as_str().unwrap().contains("closed"),
            "{refused}"
        );
    }
}

/// Sends; `ack`, or the code of the refusal.
async fn says(connection: &mut Connection, room: &str) -> String {
    let answer = reply(connection, "send", json!({"room": room, "body": 1})).await;
    let word = if answer["op"] == "ack" { "op" } else { "code" };
    answer[word].as_str().unwrap().to_owned()
}

/// Sends until the answer is this one, as soon as the edge has heard of a change.
async fn comes_to_say(connection: &mut Connection, room: &str, wanted: &str) {
    eventually("another answer", LONG, async || {
        match says(connection, room).await {
            answer if answer == wanted => Ok(()),
            answer => Err(format!("{answer}, not {wanted}")),
        }
    })
    .await;
}

#[tokio::test]
async fn mutes_freezes_slow_mode_and_roles_act_on_live_sessions() {
    let mesh = Mesh::start(support::nats_url(), 2, CLUB).await;
    let address = mesh.edges[0].address;
    let room = &group(address, "club", "calm", &["kim", "mod", "rea", "own"]).await;
    put(address, room, "mod", json!({"role": "moderator"})).await;
    put(address, room, "own", json!({"role": "owner"})).await;
    put(address, room, "rea", json!({"role": "reader"})).await;
    let moderator = may("mod", &[Right::Moderate]);
    let mut here = joined(&mesh, 0, "kim", room).await;
    let mut there = joined(&mesh, 1, "kim", room).await;
    let mut moderates = joined(&mesh, 1, "mod", room).await;
    let of_kim = format!("/v1/rooms/{room}/members/kim");
    let settings = format!("/v1/rooms/{room}");

    // The edge that has made a change obeys it before it answers; the others as soon as they hear of it.
    for (path, method, change, undo) in [
        (
            &of_kim,
            "PUT",
            json!({"muted_until": FAR}),
            json!({"muted_until": 0}),
        ),
        // A time that is over.
        (
            &of_kim,
            "PUT",
            json!({"muted_until": FAR}),
            json!({"muted_until": 1}),
        ),
        (
            &settings,
            "PATCH",
            json!({"frozen": true}),
            json!({"frozen": false}),
        ),
    ] {
        done(address, (method, path), &moderator, change).await;
        assert_eq!(says(&mut here, room).await, "forbidden");
        comes_to_say(&mut there, room, "forbidden").await;
        assert_eq!(says(&mut moderates, room).await, "ack");
        done(address, (method, path), &moderator, undo).await;
        assert_eq!(says(&mut here, room).await, "ack");
        comes_to_say(&mut there, room, "ack").await;
    }

    done(
        address,
        ("PATCH", &settings),
        &moderator,
        json!({"slow_mode_s": 86400}),
    )
    .await;
    let first = reply(
        &mut here,
        "send",
        json!({"room": room, "id": "s1", "body": 1}),
    )
    .await;
    assert_eq!(first["op"], "ack", "{first}");
    let refused = reply(&mut here, "send", json!({"room": room, "body": 1})).await;
    assert_eq!(
        (&refused["code"], &refused["retry"]),
        (&json!("rate_limited"), &json!(true)),
        "{refused}"
    );
    let wait = refused["retry_after_ms"].as_u64().unwrap();
    assert!((1..=86_400_000).contains(&wait), "{refused}");
    let posted = request(
        address,
        "POST",
        &format!("{settings}/messages"),
        &bearer(&may("kim", &[])),
        r#"{"body":1}"#,
    )
    .await;
    assert_eq!(posted.status, 429, "{}", posted.body);
    let wait = posted.json()["retry_after_ms"].as_u64().unwrap();
    let seconds = posted
        .header("retry-after")
        .unwrap()
        .parse::<u64>()
        .unwrap();
    assert_eq!(seconds, wait.div_ceil(1000), "{}", posted.body);
    // An edit is not another message, and moderators don't wait.
    let edit = json!({"room": room, "kind": "edit", "target": "kim/s1", "body": 2});
    assert_eq!(reply(&mut here, "send", edit).await["op"], "ack");
    comes_to_say(&mut there, room, "rate_limited").await;
    for _ in 0..2 {
        assert_eq!(says(&mut moderates, room).await, "ack");
    }
    done(
        address,
        ("PATCH", &settings),
        &moderator,
        json!({"slow_mode_s": 0}),
    )
    .await;
    assert_eq!(says(&mut here, room).await, "ack");
    assert_eq!(says(&mut here, room).await, "ack");
    comes_to_say(&mut there, room, "ack").await;

    let mut reads_here = joined(&mesh, 0, "rea", room).await;
    let mut reads_there = joined(&mesh, 1, "rea", room).await;
    assert_eq!(says(&mut reads_here, room).await, "forbidden");
    assert_eq!(says(&mut reads_there, room).await, "forbidden");
    put(address, room, "rea", json!({"role": "member"})).await;
    assert_eq!(says(&mut reads_here, room).await, "ack");
    comes_to_say(&mut reads_there, room, "ack").await;
    put(address, room, "rea", json!({"role": "reader"})).await;
    assert_eq!(says(&mut reads_here, room).await, "forbidden");
    comes_to_say(&mut reads_there, room, "forbidden").await;

    // Who may change what. All of them have the right `moderate`; the role counts.
    let member = may("kim", &[Right::Moderate]);
    let owner = may("own", &[Right::Moderate]);
    let without = may("own", &[]);
    let of = |user: &str| format!("{settings}/members/{user}");
    for (token, method, path, body, status) in [
        (&member, "PUT", of("rea"), json!({"muted_until": FAR}), 403),
        (&member, "DELETE", of("rea"), Value::Null, 403),
        (
            &member,
            "PATCH",
            settings.clone(),
            json!({"frozen": true}),
            403,
        ),
        (
            &moderator,
            "PUT",
            of("own"),
            json!({"muted_until": FAR}),
            403,
        ),
        (&moderator, "PUT", of("mod"), json!({"role": "owner"}), 403),
        (
            &moderator,
            "PUT",
            of("kim"),
            json!({"role": "moderator"}),
            403,
        ),
        (
            &moderator,
            "PATCH",
            settings.clone(),
            json!({"title": "x"}),
            403,
        ),
        (&without, "PUT", of("kim"), json!({"muted_until": FAR}), 403),
        (&moderator, "PUT", of("new"), json!({}), 200),
        (&owner, "PUT", of("kim"), json!({"role": "moderator"}), 200),
        (
            &owner,
            "PATCH",
            settings.clone(),
            json!({"title": "x"}),
            200,
        ),
        // Anybody may leave.
        (&without, "DELETE", of("own"), Value::Null, 200),
    ] {
        let (got, answer) = ask(address, (method, &path), token, &body).await;
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
    }
}

/// The bodies of the entries about the room on a page of history, oldest first, and the ids of messages between them.
fn shown(page: &Value) -> Vec<Value> {
    let messages = page["messages"].as_array().unwrap().iter();
    let shown = messages.map(|message| {
        if message["kind"] == "system" {
            assert_eq!(message["from"], "$natter", "{message}");
            message["body"].clone()
        } else {
            message["id"].clone()
        }
    });
    shown.collect()
}

#[tokio::test]
async fn the_room_is_told_of_changes_live_and_in_its_history() {
    // The history service comes later.
    let toml = format!("{CLUB}\n[mongodb]\nurl = '{}'\n", support::mongodb_url());
    let mut mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let address = mesh.edges[0].address;
    let room = &group(address, "club", "told", &["kim", "lee"]).await;
    let mut kim = joined(&mesh, 0, "kim", room).await;
    let base = format!("/v1/rooms/{room}");
    let pages = format!("{base}/messages");
    let message = json!({"id": "m1", "body": 1});
    done(address, ("POST", &pages), &may("kim", &[]), message).await;
    for (method, path, body) in [
        ("PUT", "/members/ann", json!({"role": "reader"})),
        ("PUT", "/members/ann", json!({"role": "member"})),
        ("PUT", "/members/ann", json!({"muted_until": FAR})),
        ("PUT", "/members/ann", json!({"muted_until": 0})),
        ("PUT", "/members/ann", json!({"state": "banned"})),
        ("DELETE", "/members/lee", Value::Null),
        ("PATCH", "", json!({"title": "Tea", "slow_mode_s": 5})),
        ("PUT", "/pins/kim%2Fm1", Value::Null),
        ("DELETE", "/pins/kim%2Fm1", Value::Null),
        // Nothing changes: nothing is told.
        ("PATCH", "", json!({"title": "Tea"})),
        ("DELETE", "/members/lee", Value::Null),
    ] {
        done(address, (method, &format!("{base}{path}")), &boss(), body).await;
    }
    let path = format!("{base}/members/kim");
    done(address, ("DELETE", &path), &may("kim", &[]), Value::Null).await;
    let of_ann = |action: &str, role: &str| json!({"action": action, "by": "boss", "user": "ann", "role": role});
    let mut muted = of_ann("muted", "member");
    muted["muted_until"] = json!(FAR);
    let live = [
        json!("m1"),
        of_ann("added", "reader"),
        of_ann("role", "member"),
        muted,
        of_ann("unmuted", "member"),
        of_ann("banned", "member"),
        json!({"action": "removed", "by": "boss", "user": "lee"}),
        json!({"action": "settings", "by": "boss", "title": "Tea", "slow_mode_s": 5}),
        json!({"action": "pinned", "by": "boss", "message": "kim/m1"}),
        json!({"action": "unpinned", "by": "boss", "message": "kim/m1"}),
    ];
    for wanted in &live {
        let frame = pushed(&mut kim, "msg").await;
        let page = json!({ "messages": [frame] });
        assert_eq!(shown(&page), std::slice::from_ref(wanted), "{frame}");
    }
    let made =
        json!({"action": "created", "by": "boss", "kind": "group", "members": ["kim", "lee"]});
    let mut all = vec![made];
    all.extend(live);
    all.push(json!({"action": "left", "by": "kim", "user": "kim"}));

    let page = done(address, ("GET", &pages), &boss(), Value::Null).await;
    assert_eq!(page["partial"], true, "{page}");
    assert_eq!(shown(&page), all, "{page}");
    // Only what members say is unread.
    let unread = json!({"rooms": [room]});
    let unread = done(address, ("POST", "/v1/unread"), &boss(), unread).await;
    assert_eq!(unread["rooms"][0]["count"], 1, "{unread}");
    // Nobody else can say such a thing.
    let forged = json!({"kind": "system", "body": {"action": "banned"}});
    let (status, refused) = ask(address, ("POST", &pages), &boss(), &forged).await;
    assert_eq!(
        (status, &refused["code"]),
        (400, &json!("bad_request")),
        "{refused}"
    );

    mesh.add_worker("/readyz").await;
    let page = eventually("the history service has it all", LONG, async || {
        let page = done(address, ("GET", &pages), &boss(), Value::Null).await;
        match page["partial"].is_null() {
            true => Ok(page),
            false => Err(page.to_string()),
        }
    })
    .await;
    assert_eq!(shown(&page), all, "{page}");
}
