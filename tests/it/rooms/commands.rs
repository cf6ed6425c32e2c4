//! Changes of records as commands: they do what their requests over HTTP do, and are refused as they are.

use std::net::SocketAddr;

use natter::testing::{auth::Right, client::Connection};
use serde_json::{Value, json};

use super::{CLUB, boss, done, group, may, open};
use crate::support::{
    self,
    calls::{next, reply},
    centrifugal::Client,
    mesh::{Mesh, ask},
    raw::{bearer, request},
};

/// Commands of one who looks after all rooms, in their order, in a room with the members `boss`, `kim` and `lee`. A
/// version `now` stands for the newest one of the record.
fn script() -> Vec<(&'static str, Value)> {
    vec![
        (
            "settings",
            json!({"title": "Tea", "slow_mode_s": 5, "info": {"color": 7}}),
        ),
        (
            "settings",
            json!({"frozen": true, "archived": true, "version": "now"}),
        ),
        ("settings", json!({"title": "late", "version": "0"})),
        (
            "settings",
            json!({"frozen": false, "archived": false, "assignee": "ann", "version": null}),
        ),
        ("settings", json!({})),
        ("settings", json!({"slow_mode_s": 86_401})),
        ("settings", json!({"assignee": "$x"})),
        ("settings", json!({"title": 7})),
        ("member", json!({"user": "ann"})),
        ("member", json!({"user": "ann", "role": "moderator"})),
        ("member", json!({"user": "lee", "muted_until": super::FAR})),
        ("member", json!({"user": "lee", "muted_until": 0})),
        ("member", json!({"user": "lee", "state": "banned"})),
        ("member", json!({"user": "lee", "state": "in"})),
        ("member", json!({"user": "lee", "state": "out"})),
        // Once more changes nothing.
        ("member", json!({"user": "lee", "state": "out"})),
        ("member", json!({"user": "nobody", "state": "out"})),
        ("member", json!({"user": "$x"})),
        ("member", json!({"user": "kim", "role": "king"})),
        ("member", json!({"user": "kim", "muted_until": -1})),
        (
            "send",
            json!({"kind": "pin", "id": "p1", "target": "kim/m1"}),
        ),
        (
            "send",
            json!({"kind": "pin", "id": "p2", "target": "m2", "body": "not looked at"}),
        ),
        (
            "send",
            json!({"kind": "unpin", "id": "u1", "target": "kim/m1"}),
        ),
        (
            "send",
            json!({"kind": "pin", "id": "p1", "target": "kim/m1"}),
        ),
        ("send", json!({"kind": "pin"})),
        ("send", json!({"kind": "pin", "target": "a b"})),
        ("arrange", json!({"muted": true, "pinned": true})),
        ("arrange", json!({"muted": false})),
        ("arrange", json!({"muted": "no"})),
        ("block", json!({"user": "lee", "blocked": true})),
        ("block", json!({"user": "lee", "blocked": false})),
        ("block", json!({"user": "boss", "blocked": true})),
        ("block", json!({"user": "$x", "blocked": true})),
        ("room", json!({})),
    ]
}

/// The request that a command is the same as.
fn request_of(op: &str, room: &str, fields: &Value) -> (&'static str, String, Value) {
    let text = |name: &str| fields[name].as_str().unwrap().to_owned();
    let without = |names: &[&str]| {
        let mut body = fields.clone();
        for name in names {
            body.as_object_mut().unwrap().remove(*name);
        }
        body
    };
    let base = format!("/v1/rooms/{room}");
    match op {
        "settings" => ("PATCH", base, without(&["version"])),
        "member" => {
            let path = format!("{base}/members/{}", text("user").replace('$', "%24"));
            match fields["state"] == "out" {
                true => ("DELETE", path, Value::Null),
                false => ("PUT", path, without(&["user"])),
            }
        }
        "send" => ("POST", format!("{base}/messages"), fields.clone()),
        "arrange" => ("PATCH", format!("/v1/inbox/{room}"), fields.clone()),
        "block" => {
            let other = text("user").replace('$', "%24");
            let method = if fields["blocked"] == true {
                "PUT"
            } else {
                "DELETE"
            };
            (
                method,
                format!("/v1/users/boss/blocks/{other}"),
                Value::Null,
            )
        }
        "room" => ("GET", base, Value::Null),
        other => panic!("{other} is in no script"),
    }
}

/// Where a script runs.
enum Over {
    Http(SocketAddr),
    Socket(Connection),
    Rpc(Client),
}

impl Over {
    /// The answer to a command in `room`: the fields of the reply, or `{code, message}`.
    async fn call(&mut self, op: &str, room: &str, mut fields: Value) -> Value {
        let answer = match self {
            Self::Http(address) => {
                let (method, path, body) = request_of(op, room, &fields);
                let mut headers = bearer(&boss());
                if let Some(version) = fields["version"].as_str() {
                    headers += &format!("If-Match: \"{version}\"\r\n");
                }
                let body = if body.is_null() {
                    String::new()
                } else {
                    body.to_string()
                };
                let answer = request(*address, method, &path, &headers, &body).await;
                match answer.status {
                    204 => json!({}),
                    _ => answer.json(),
                }
            }
            Self::Socket(connection) => {
                fields["room"] = json!(room);
                reply(connection, op, fields).await
            }
            Self::Rpc(client) => {
                fields["room"] = json!(room);
                let call = json!({"method": format!("room.{op}"), "data": fields});
                let answer = client.call("rpc", call).await;
                match &answer["error"] {
                    Value::Null => answer["rpc"]["data"].clone(),
                    error => error.clone(),
                }
            }
        };
        same_in_all(answer, room)
    }
}

/// An answer without what differs between rooms and protocols, except for `version`.
fn same_in_all(mut answer: Value, room: &str) -> Value {
    let fields = answer.as_object_mut().unwrap();
    for name in ["op", "rid", "retry", "room", "at", "ts"] {
        fields.remove(name);
    }
    if let Some(cursor) = fields.get_mut("cursor") {
        *cursor = json!("one");
    }
    if let Some(message) = fields.get_mut("message") {
        let text = message.as_str().unwrap().replace(room, "the room");
        // Where in the text the parser stopped.
        *message = json!(text.split(" at line ").next().unwrap());
    }
    answer
}

/// Runs the script; the answers, and the bodies of the entries in the room's log.
async fn run(
    mut over: Over,
    address: SocketAddr,
    room: &str,
) -> (Vec<(String, Value)>, Vec<Value>) {
    let mut version = Value::Null;
    let mut answers = Vec::new();
    for (op, mut fields) in script() {
        let what = format!("{op} {fields}");
        if fields["version"] == "now" {
            fields["version"] = version.clone();
        }
        let mut answer = over.call(op, room, fields).await;
        if let Some(its) = answer.as_object_mut().unwrap().remove("version") {
            version = its;
        }
        answers.push((what, answer));
    }
    let path = format!("/v1/rooms/{room}/messages");
    let page = done(address, ("GET", &path), &boss(), Value::Null).await;
    let told = page["messages"].as_array().unwrap().iter();
    let told = told.map(|entry| {
        assert_eq!(
            (&entry["kind"], &entry["from"]),
            (&json!("system"), &json!("$natter"))
        );
        entry["body"].clone()
    });
    (answers, told.collect())
}

/// The answer to a command of the script.
fn answer<'a>(answers: &'a [(String, Value)], what: &(&str, Value)) -> &'a Value {
    let what = format!("{} {}", what.0, what.1);
    let found = answers.iter().find(|(its, _)| *its == what);
    &found
        .unwrap_or_else(|| panic!("{what} is not in the script"))
        .1
}

#[tokio::test]
async fn a_command_does_what_its_request_does_and_is_refused_as_it_is() {
    let mesh = Mesh::start(support::nats_url(), 1, CLUB).await;
    let address = mesh.edges[0].address;
    let members = ["boss", "kim", "lee"];
    let by_http = group(address, "club", "http", &members).await;
    let (answers, told) = run(Over::Http(address), address, &by_http).await;

    // The script does something, and is refused for different reasons.
    let last = answer(&answers, &("room", json!({})));
    assert_eq!(
        (
            &last["title"],
            &last["assignee"],
            &last["pins"],
            &last["frozen"]
        ),
        (
            &json!("Tea"),
            &json!("ann"),
            &json!(["boss/m2"]),
            &Value::Null
        ),
        "{last}"
    );
    for (command, code) in [
        (
            ("settings", json!({"title": "late", "version": "0"})),
            "conflict",
        ),
        (("settings", json!({})), "bad_request"),
        (
            ("member", json!({"user": "kim", "role": "king"})),
            "bad_request",
        ),
        (("send", json!({"kind": "pin", "target": "a b"})), "bad_id"),
    ] {
        assert_eq!(answer(&answers, &command)["code"], code, "{command:?}");
    }
    let actions: Vec<&str> = told
        .iter()
        .map(|one| one["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        actions,
        [
            "created", "settings", "settings", "settings", "added", "role", "muted", "unmuted",
            "banned", "added", "removed", "pinned", "pinned", "unpinned"
        ]
    );

    let by_socket = group(address, "club", "socket", &members).await;
    let socket = Over::Socket(open(&mesh, 0, &boss()).await);
    let (its_answers, its_told) = run(socket, address, &by_socket).await;
    assert_eq!(its_answers, answers);
    assert_eq!(its_told, told);

    let by_rpc = group(address, "club", "rpc", &members).await;
    let (client, _) = Client::connect(&mesh, 0, &boss()).await;
    let (its_answers, its_told) = run(Over::Rpc(client), address, &by_rpc).await;
    for ((what, its), (_, wanted)) in its_answers.iter().zip(&answers) {
        // This protocol has numbers for codes, and names ours in the text.
        match wanted["code"].as_str() {
            None => assert_eq!(its, wanted, "{what}"),
            Some(code) => {
                let text = format!("{code}: {}", wanted["message"].as_str().unwrap());
                assert_eq!(its["message"], text, "{what}: {its}");
            }
        }
    }
    assert_eq!(its_told, told);

    // All three have left the same in the list of the user's rooms.
    let inbox = done(address, ("GET", "/v1/inbox"), &boss(), Value::Null).await;
    let rooms = inbox["rooms"].as_array().unwrap();
    assert_eq!(rooms.len(), 3, "{inbox}");
    for room in rooms {
        let flags = (&room["muted"], &room["pinned"]);
        assert_eq!(flags, (&Value::Null, &json!(true)), "{room}");
    }
}

#[tokio::test]
async fn a_user_leaves_and_blocks_over_the_socket_and_nothing_else_of_others() {
    let mesh = Mesh::start(support::nats_url(), 1, CLUB).await;
    let address = mesh.edges[0].address;
    let room = group(address, "club", "leaving", &["kim", "lee"]).await;
    let mut kim = open(&mesh, 0, &may("kim", &[])).await;
    let joined = reply(&mut kim, "join", json!({ "room": room })).await;
    assert_eq!(joined["op"], "joined", "{joined}");

    for (op, fields) in [
        ("settings", json!({"frozen": true})),
        ("member", json!({"user": "lee", "state": "out"})),
        ("member", json!({"user": "ann"})),
        ("send", json!({"kind": "pin", "target": "lee/m1"})),
    ] {
        let mut fields = fields;
        fields["room"] = json!(room);
        let refused = reply(&mut kim, op, fields).await;
        assert_eq!(refused["code"], "forbidden", "{op}: {refused}");
    }
    for (op, fields, code, told) in [
        ("settings", json!({"title": "x"}), "bad_request", "room"),
        (
            "member",
            json!({"room": room, "role": "owner"}),
            "bad_request",
            "user",
        ),
        (
            "member",
            json!({"room": room, "user": "kim", "state": "out", "muted_until": 0}),
            "bad_request",
            "out",
        ),
        (
            "arrange",
            json!({"room": "club:other", "muted": true}),
            "unknown_room",
            "club:other",
        ),
        ("block", json!({"user": "lee"}), "bad_request", "blocked"),
        ("block", json!({"blocked": true}), "bad_request", "user"),
    ] {
        let refused = reply(&mut kim, op, fields.clone()).await;
        assert_eq!(refused["code"], code, "{op} {fields}: {refused}");
        let message = refused["message"].as_str().unwrap();
        assert!(message.contains(told), "{op} {fields}: {refused}");
    }

    // Leaving ends the membership, also of the live room.
    let leave = json!({"room": room, "user": "kim", "state": "out"});
    let rid = kim.commands().send("member", leave).await.unwrap();
    let (mut left, mut kicked) = (Value::Null, Value::Null);
    while left.is_null() || kicked.is_null() {
        let frame = next(&mut kim).await.json();
        if frame["rid"] == rid {
            left = frame;
        } else if frame["op"] == "kicked" {
            kicked = frame;
        }
    }
    assert_eq!(kicked["code"], "removed", "{kicked}");
    assert_eq!(left["op"], "room", "{left}");
    let members = left["members"].as_array().unwrap();
    assert_eq!(
        (members.len(), &members[0]["user"]),
        (1, &json!("lee")),
        "{left}"
    );

    let direct = json!({"namespace": "club", "kind": "dm", "members": ["kim", "lee"]});
    let made = reply(&mut kim, "create", direct).await;
    let direct = made["room"].as_str().unwrap();
    let path = format!("/v1/rooms/{direct}/messages");
    for (blocked, wanted) in [(true, 403), (false, 200)] {
        let block = json!({"user": "lee", "blocked": blocked});
        let answer = reply(&mut kim, "block", block).await;
        assert_eq!(answer["op"], "ok", "{answer}");
        let (status, answer) = ask(
            address,
            ("POST", &path),
            &may("lee", &[]),
            &json!({"body": 1}),
        )
        .await;
        assert_eq!(status, wanted, "{answer}");
    }
}

#[tokio::test]
async fn a_pin_is_an_entry_of_the_log_and_a_repeat_of_it_changes_nothing() {
    let mesh = Mesh::start(support::nats_url(), 2, CLUB).await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let room = &group(here, "club", "pinned", &["kim", "mod"]).await;
    super::put(here, room, "mod", json!({"role": "moderator"})).await;
    let moderator = may("mod", &[Right::Moderate]);
    let mut kim = open(&mesh, 1, &may("kim", &[])).await;
    let joined = reply(&mut kim, "join", json!({ "room": room })).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    let mut moderates = open(&mesh, 0, &moderator).await;
    let send = |kind: &str, id: &str, target: &str| json!({"room": room, "kind": kind, "id": id, "target": target});
    let told =
        |action: &str, message: &str| json!({"action": action, "by": "mod", "message": message});
    let path = format!("/v1/rooms/{room}");
    let pins = async || {
        let record = done(here, ("GET", &path), &boss(), Value::Null).await;
        record["pins"].clone()
    };

    // The commands follow each other at once; what they do is in their order.
    let mut rids = Vec::new();
    for fields in [
        json!({"room": room, "id": "m1", "body": 1}),
        send("pin", "p1", "m1"),
        send("unpin", "u1", "mod/m1"),
        send("pin", "p2", "kim/m2"),
    ] {
        rids.push(moderates.commands().send("send", fields).await.unwrap());
    }
    let mut acks = Vec::new();
    for (rid, id) in rids.into_iter().zip(["m1", "p1", "u1", "p2"]) {
        let ack = next(&mut moderates).await.json();
        assert_eq!(
            (&ack["op"], &ack["rid"], &ack["id"], &ack["dup"]),
            (&json!("ack"), &json!(rid), &json!(id), &json!(false)),
            "{ack}"
        );
        acks.push(ack);
    }
    let wanted = [
        json!(1),
        told("pinned", "mod/m1"),
        told("unpinned", "mod/m1"),
        told("pinned", "kim/m2"),
    ];
    for (ack, wanted) in acks.iter().zip(&wanted) {
        let push = next(&mut kim).await.json();
        let got = (&push["body"], &push["cursor"], &push["ts"]);
        assert_eq!(got, (wanted, &ack["cursor"], &ack["ts"]), "{push}");
        if *wanted != 1 {
            let by = (&push["kind"], &push["from"]);
            assert_eq!(by, (&json!("system"), &json!("$natter")), "{push}");
        }
    }
    assert_eq!(pins().await, json!(["kim/m2"]));

    // A repeat is recognized, on both edges, and does not bring back what was unpinned since.
    let again = reply(&mut moderates, "send", send("pin", "p1", "m1")).await;
    assert_eq!(
        (&again["dup"], &again["cursor"]),
        (&json!(true), &acks[1]["cursor"]),
        "{again}"
    );
    let messages = format!("{path}/messages");
    let body = json!({"kind": "pin", "id": "p1", "target": "m1"});
    let again = done(there, ("POST", &messages), &moderator, body).await;
    assert_eq!(
        (&again["dup"], &again["cursor"]),
        (&json!(true), &acks[1]["cursor"]),
        "{again}"
    );
    assert_eq!(pins().await, json!(["kim/m2"]));

    // An id that stood for something else is another entry.
    let other = reply(&mut moderates, "send", send("unpin", "p2", "kim/m9")).await;
    assert_eq!(other["dup"], false, "{other}");
    let push = next(&mut kim).await.json();
    assert_eq!(push["body"], told("unpinned", "kim/m9"), "{push}");

    // Many at once are carried out in their order. What is pinned already is not pinned twice.
    let one = |kind: &str, target: &str| json!({"room": room, "kind": kind, "target": target});
    let many = json!({"messages": [
        one("pin", "kim/m3"), one("unpin", "kim/m3"), one("pin", "kim/m2"), one("pin", "kim/m4"),
    ]});
    let sent = done(there, ("POST", "/v1/messages"), &moderator, many).await;
    for result in sent["results"].as_array().unwrap() {
        assert_eq!(result["dup"], false, "{sent}");
    }
    for wanted in [
        told("pinned", "kim/m3"),
        told("unpinned", "kim/m3"),
        told("pinned", "kim/m2"),
        told("pinned", "kim/m4"),
    ] {
        let push = next(&mut kim).await.json();
        assert_eq!(push["body"], wanted, "{push}");
    }
    assert_eq!(pins().await, json!(["kim/m2", "kim/m4"]));

    // In a room without a log the entry is only told.
    let mut hears = open(&mesh, 1, &boss()).await;
    reply(&mut hears, "join", json!({"room": "live:a"})).await;
    let mut pin = one("pin", "kim/m1");
    pin["room"] = json!("live:a");
    let ack = reply(&mut hears, "send", pin).await;
    assert_eq!(
        (&ack["op"], &ack["cursor"]),
        (&json!("ack"), &Value::Null),
        "{ack}"
    );
    let record = done(here, ("GET", "/v1/rooms/live:a"), &boss(), Value::Null).await;
    assert_eq!(record["pins"], json!(["kim/m1"]), "{record}");
}
