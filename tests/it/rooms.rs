//! Room records: who may do what in a room, on every protocol, and how changes reach everybody.

mod across;
mod commands;
mod live;
mod made;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use natter::testing::{
    auth::{Grant, Right},
    client::Connection,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    self, LONG,
    calls::reply,
    centrifugal::Client,
    mesh::{Mesh, ask, token_with},
    raw::bearer,
};

/// `club` lets in members only; in `chat`, grants say who is in a room.
const CLUB: &str = "
[namespaces.club]
durable = true
typing = true
history = true
access = 'members'
create = 'members'
";

/// A time that no test reaches, in ms since 1970.
const FAR: u64 = 4_000_000_000_000;

/// A token of a user who may take part in all rooms, with further rights.
fn may(user: &str, more: &[Right]) -> String {
    let rights = [Right::Read, Right::Write, Right::Presence, Right::History];
    let rights: Vec<Right> = rights.into_iter().chain(more.iter().copied()).collect();
    let grants = vec![Grant::new("*:*", &rights)];
    token_with(user, Duration::from_secs(3600), grants)
}

/// The token of one who looks after all rooms.
fn boss() -> String {
    may("boss", &[Right::Manage, Right::Moderate, Right::Erase])
}

/// What an edge answers to a request of somebody; a refusal fails the test.
async fn done(address: SocketAddr, (method, path): (&str, &str), who: &str, body: Value) -> Value {
    let (status, answer) = ask(address, (method, path), who, &body).await;
    assert!(
        matches!(status, 200..=204),
        "{method} {path} {body}: {status} {answer}"
    );
    answer
}

/// Makes a group with this name; the room.
async fn group(address: SocketAddr, namespace: &str, name: &str, members: &[&str]) -> String {
    let body = json!({"namespace": namespace, "kind": "group", "name": name, "members": members});
    let made = done(address, ("POST", "/v1/rooms"), &boss(), body).await;
    let room = made["room"].as_str().unwrap().to_owned();
    assert_eq!(room, format!("{namespace}:{name}"), "{made}");
    room
}

/// Changes a member, as the one who looks after all rooms.
async fn put(address: SocketAddr, room: &str, user: &str, what: Value) -> Value {
    let path = format!("/v1/rooms/{room}/members/{user}");
    done(address, ("PUT", &path), &boss(), what).await
}

async fn open(mesh: &Mesh, edge: usize, token: &str) -> Connection {
    let opened = Connection::open(&mesh.endpoint(edge), Some(token)).await;
    opened.unwrap()
}

/// What somebody needs for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Needs {
    /// To be let in.
    Reads,
    /// To be let in, as a member who may speak now.
    Writes,
    /// To be a moderator.
    Moderates,
}
use Needs::{Moderates, Reads, Writes};

/// Who may do what: in a namespace for members only, and in one where grants say who is in. Everybody's token grants
/// `read`, `write`, `presence`, `history` and `moderate` on all rooms of the first. On those of the second, `moderate` is
/// only granted to the owner, the moderator, and the one who may also manage.
const TABLE: [(&str, &[Needs], &[Needs]); 9] = [
    (
        "owner",
        &[Reads, Writes, Moderates],
        &[Reads, Writes, Moderates],
    ),
    (
        "moderator",
        &[Reads, Writes, Moderates],
        &[Reads, Writes, Moderates],
    ),
    ("member", &[Reads, Writes], &[Reads, Writes]),
    ("reader", &[Reads], &[Reads]),
    ("muted", &[Reads], &[Reads]),
    ("banned", &[], &[]),
    ("gone", &[], &[Reads, Writes]),
    ("stranger", &[], &[Reads, Writes]),
    (
        "manager",
        &[Reads, Writes, Moderates],
        &[Reads, Writes, Moderates],
    ),
];

fn token_of(user: &str) -> String {
    let take_part = [Right::Read, Right::Write, Right::Presence, Right::History];
    let with = |right: Right| [&take_part[..], &[right]].concat();
    let mut grants = vec![
        Grant::new("club:*", &with(Right::Moderate)),
        Grant::new("chat:*", &take_part),
    ];
    if matches!(user, "owner" | "moderator" | "manager") {
        grants.push(Grant::new("chat:*", &[Right::Moderate]));
    }
    if user == "manager" {
        grants.push(Grant::new("*:*", &[Right::Manage]));
    }
    token_with(user, Duration::from_secs(3600), grants)
}

/// Makes the room that the table is about; the cursor of the message `author/m1` in it.
async fn furnish(address: SocketAddr, namespace: &str) -> (String, String) {
    let members = [
        "owner",
        "moderator",
        "member",
        "reader",
        "muted",
        "gone",
        "author",
    ];
    let room = group(address, namespace, "table", &members).await;
    for (user, what) in [
        ("owner", json!({"role": "owner"})),
        ("moderator", json!({"role": "moderator"})),
        ("reader", json!({"role": "reader"})),
        ("muted", json!({"muted_until": FAR})),
        ("banned", json!({"state": "banned"})),
    ] {
        put(address, &room, user, what).await;
    }
    let path = format!("/v1/rooms/{room}/members/gone");
    done(address, ("DELETE", &path), &boss(), Value::Null).await;
    let path = format!("/v1/rooms/{room}/messages");
    let message = json!({"id": "m1", "body": {"text": "hello"}});
    let ack = done(address, ("POST", &path), &token_of("author"), message).await;
    (room, ack["cursor"].as_str().unwrap().to_owned())
}

/// Compares what was allowed with the table.
#[derive(Default)]
struct Compared {
    wrong: Vec<String>,
    /// How often something was allowed, and refused, by what it needs.
    seen: BTreeMap<(Needs, bool), u32>,
}

impl Compared {
    /// `refusal`: the code, or `None` if it was allowed.
    fn note(&mut self, needs: Needs, allowed: &[Needs], refusal: Option<&str>, what: String) {
        let wanted = allowed.contains(&needs);
        *self.seen.entry((needs, wanted)).or_default() += 1;
        match (wanted, refusal) {
            (true, None) | (false, Some("forbidden")) => {}
            (_, other) => self
                .wrong
                .push(format!("{what}: allowed {wanted}, but {other:?}")),
        }
    }
}

async fn over_the_socket(
    mesh: &Mesh,
    (user, allowed): (&str, &[Needs]),
    (room, cursor): (&str, &str),
    compared: &mut Compared,
) {
    let mut connection = open(mesh, 0, &token_of(user)).await;
    for (needs, op, fields) in [
        (Reads, "join", json!({"presence": true, "read": true})),
        (Writes, "send", json!({"body": user})),
        (Writes, "typing", json!({})),
        (
            Moderates,
            "send",
            json!({"kind": "edit", "target": "author/m1", "body": user}),
        ),
        (Reads, "history", json!({})),
        (Reads, "presence", json!({})),
        (Reads, "readers", json!({})),
        (Reads, "read", json!({"cursor": cursor})),
        (Reads, "search", json!({"q": "hello"})),
        (Reads, "room", json!({})),
        (
            Moderates,
            "send",
            json!({"kind": "pin", "target": "author/m1"}),
        ),
        (Moderates, "settings", json!({"frozen": false})),
        (
            Moderates,
            "member",
            json!({"user": "author", "role": "member"}),
        ),
        (Reads, "unread", json!({"rooms": [room]})),
    ] {
        let mut fields = fields;
        if op != "unread" {
            fields["room"] = json!(room);
        }
        let answer = reply(&mut connection, op, fields).await;
        let code = (answer["op"] == "error").then(|| answer["code"].as_str().unwrap());
        let what = format!("socket {room} {user} {op}: {answer}");
        compared.note(needs, allowed, code, what);
    }
}

/// The status of a GET whose answer may have no end.
async fn status_of(address: SocketAddr, path: &str, token: &str) -> u16 {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = bearer(token);
    let text = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    let read = timeout(LONG, stream.read_exact(&mut answer)).await;
    read.expect("no answer comes").unwrap();
    std::str::from_utf8(&answer[9..]).unwrap().parse().unwrap()
}

async fn over_http(
    mesh: &Mesh,
    (user, allowed): (&str, &[Needs]),
    (room, cursor): (&str, &str),
    compared: &mut Compared,
) {
    let (address, token) = (mesh.edges[0].address, token_of(user));
    let of_room = |rest: &str| format!("/v1/rooms/{room}{rest}");
    let edit = json!({"kind": "edit", "target": "author/m1", "body": user});
    let pin = json!({"kind": "pin", "target": "author/m1"});
    for (needs, method, path, body) in [
        (Writes, "POST", of_room("/messages"), json!({"body": user})),
        (Moderates, "POST", of_room("/messages"), edit),
        (Moderates, "POST", of_room("/messages"), pin),
        (Moderates, "PUT", of_room("/pins/author%2Fm1"), Value::Null),
        (Moderates, "PATCH", of_room(""), json!({"frozen": false})),
        (
            Moderates,
            "PUT",
            of_room("/members/author"),
            json!({"role": "member"}),
        ),
        (Reads, "GET", of_room(""), Value::Null),
        (Reads, "GET", of_room("/messages"), Value::Null),
        (Reads, "GET", of_room("/presence"), Value::Null),
        (Reads, "GET", of_room("/readers"), Value::Null),
        (Reads, "PUT", of_room("/read"), json!({"cursor": cursor})),
        (Reads, "GET", of_room("/search?q=hello"), Value::Null),
        (
            Reads,
            "POST",
            "/v1/unread".to_owned(),
            json!({"rooms": [room]}),
        ),
        (
            Reads,
            "GET",
            of_room(&format!("/poll?since={cursor}&wait=1s")),
            Value::Null,
        ),
    ] {
        let (status, answer) = ask(address, (method, &path), &token, &body).await;
        let code = match status {
            200 | 204 => None,
            403 => answer["code"].as_str(),
            _ => Some("a status that was not expected"),
        };
        let what = format!("{method} {path} {user}: {status} {answer}");
        compared.note(needs, allowed, code, what);
    }
    let followed = format!("/v1/events?room={room}");
    for path in [of_room("/events"), followed] {
        let status = status_of(address, &path, &token).await;
        let code = match status {
            200 => None,
            403 => Some("forbidden"),
            _ => Some("a status that was not expected"),
        };
        let what = format!("GET {path} {user}: {status}");
        compared.note(Reads, allowed, code, what);
    }
}

async fn over_centrifugal(
    mesh: &Mesh,
    (user, allowed): (&str, &[Needs]),
    room: &str,
    compared: &mut Compared,
) {
    let (mut client, connected) = Client::connect(mesh, 0, &token_of(user)).await;
    assert!(connected["client"].is_string(), "{connected}");
    for (needs, method, fields) in [
        (Reads, "subscribe", json!({})),
        (Writes, "publish", json!({"data": user})),
        (Reads, "history", json!({"limit": 1})),
        (Reads, "presence", json!({})),
        (Reads, "room.room", json!({})),
        (
            Moderates,
            "room.send",
            json!({"kind": "pin", "target": "author/m1"}),
        ),
        (Moderates, "room.settings", json!({"frozen": false})),
        (
            Moderates,
            "room.member",
            json!({"user": "author", "role": "member"}),
        ),
    ] {
        let mut fields = fields;
        let answer = match method.starts_with("room.") {
            true => {
                fields["room"] = json!(room);
                let call = json!({"method": method, "data": fields});
                client.call("rpc", call).await
            }
            false => {
                fields["channel"] = json!(room);
                client.call(method, fields).await
            }
        };
        let code = match answer["error"]["code"].as_u64() {
            None => None,
            Some(103) => Some("forbidden"),
            Some(_) => Some("a code that was not expected"),
        };
        let what = format!("centrifugal {room} {user} {method}: {answer}");
        compared.note(needs, allowed, code, what);
    }
}

#[tokio::test]
async fn roles_and_states_allow_what_the_table_says_on_every_protocol() {
    let (nats, mongodb) = (support::nats_url(), support::mongodb_url());
    let mesh = Mesh::with_history(nats, mongodb, (1, 1), CLUB).await;
    let address = mesh.edges[0].address;
    let mut compared = Compared::default();
    for (namespace, of_members) in [("club", true), ("chat", false)] {
        let (room, cursor) = furnish(address, namespace).await;
        for (user, in_club, in_chat) in TABLE {
            let who = (user, if of_members { in_club } else { in_chat });
            over_the_socket(&mesh, who, (&room, &cursor), &mut compared).await;
            over_http(&mesh, who, (&room, &cursor), &mut compared).await;
            over_centrifugal(&mesh, who, &room, &mut compared).await;
        }
    }
    assert!(compared.wrong.is_empty(), "{:#?}", compared.wrong);
    // Each need was met by some and not by others.
    for needs in [Reads, Writes, Moderates] {
        for wanted in [true, false] {
            assert!(compared.seen[&(needs, wanted)] > 5, "{needs:?} {wanted}");
        }
    }
}

/// A search over all rooms finds nothing in rooms that one is not a member of, and the server says so of no room by name.
#[tokio::test]
async fn a_search_over_all_rooms_leaves_out_rooms_of_others() {
    let (nats, mongodb) = (support::nats_url(), support::mongodb_url());
    let mesh = Mesh::with_history(nats, mongodb, (1, 1), CLUB).await;
    let address = mesh.edges[0].address;
    let room = group(address, "club", "inside", &["kim"]).await;
    for room in [&room, "chat:outside"] {
        let path = format!("/v1/rooms/{room}/messages");
        let message = json!({"body": {"text": "needle"}});
        done(address, ("POST", &path), &may("kim", &[]), message).await;
    }
    let found = async |who: &str| {
        let found = done(address, ("GET", "/v1/search?q=needle"), who, Value::Null).await;
        let rooms = found["messages"].as_array().unwrap().iter();
        let mut rooms: Vec<String> = rooms
            .map(|one| one["room"].as_str().unwrap().to_owned())
            .collect();
        rooms.sort();
        rooms
    };
    support::eventually("kim finds both", LONG, async || {
        match found(&may("kim", &[])).await {
            rooms if rooms == ["chat:outside", "club:inside"] => Ok(()),
            rooms => Err(format!("{rooms:?}")),
        }
    })
    .await;
    assert_eq!(found(&may("lee", &[])).await, ["chat:outside"]);
    assert_eq!(found(&boss()).await, ["chat:outside", "club:inside"]);
}
