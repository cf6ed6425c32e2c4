//! Every error code, provoked from outside: over the socket, and over HTTP where there is the same command.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use natter::testing::{
    auth::{Grant, Right},
    client::{CallError, Connection},
    protocol::ErrorCode,
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    support::{
        self, LONG,
        calls::{next, reply},
        eventually,
        mesh::{Mesh, token, token_with},
        raw::{Answer, Raw, bearer, exchange, request},
        signal, unique,
    },
    workers::said_by_hand,
};

/// Codes that have no HTTP request: it has no `op`, and no room to be in.
const NOT_OVER_HTTP: [ErrorCode; 2] = [ErrorCode::UnknownOp, ErrorCode::NotJoined];

/// Codes that only an HTTP request has: a frame has come when it is looked at, and files have URLs.
const NOT_OVER_THE_SOCKET: [ErrorCode; 3] =
    [ErrorCode::Timeout, ErrorCode::Pending, ErrorCode::Infected];

/// The codes that were seen, each with all that belongs to it.
#[derive(Debug, Default)]
struct Seen {
    socket: BTreeSet<&'static str>,
    http: BTreeSet<&'static str>,
}

fn code_of(body: &Value) -> ErrorCode {
    let word = body["code"]
        .as_str()
        .unwrap_or_else(|| panic!("no code: {body}"));
    ErrorCode::ALL
        .into_iter()
        .find(|code| code.as_str() == word)
        .unwrap_or_else(|| panic!("not in the table: {body}"))
}

impl Seen {
    /// An `error` reply of the socket, which must be for `rid`.
    fn reply(&mut self, what: &str, error: &Value, rid: &Value, expected: ErrorCode) {
        assert_eq!(error["op"], "error", "{what}: {error}");
        assert_eq!(code_of(error), expected, "{what}: {error}");
        assert_eq!(&error["rid"], rid, "{what}: {error}");
        assert_eq!(error["retry"], json!(expected.retry()), "{what}: {error}");
        assert_ne!(error["message"].as_str(), Some(""), "{what}: {error}");
        self.socket.insert(expected.as_str());
    }

    /// Sends a command that is refused.
    async fn call(&mut self, raw: &mut Raw, command: Value, expected: ErrorCode) {
        let what = command.to_string();
        let rid = command["rid"].clone();
        let error = raw.call(command).await;
        self.reply(&what, &error, &rid, expected);
    }

    /// Publishes over HTTP what is refused.
    async fn post(
        &mut self,
        address: SocketAddr,
        token: &str,
        room: &str,
        body: &str,
        expected: ErrorCode,
    ) {
        let path = format!("/v1/rooms/{room}/messages");
        self.request(address, token, ("POST", &path, body), expected)
            .await;
    }

    /// Asks over HTTP what is refused.
    async fn request(
        &mut self,
        address: SocketAddr,
        token: &str,
        (method, path, body): (&str, &str, &str),
        expected: ErrorCode,
    ) {
        let answer = request(address, method, path, &bearer(token), body).await;
        self.answer(&format!("{method} {path}"), &answer, expected);
    }

    fn answer(&mut self, what: &str, answer: &Answer, expected: ErrorCode) {
        let json = answer.json();
        let what = format!("{what}: {} {json}", answer.status);
        assert_eq!(code_of(&json), expected, "{what}");
        assert_eq!(answer.status, expected.http_status(), "{what}");
        assert_eq!(json["retry"], json!(expected.retry()), "{what}");
        let told = answer.header("retry-after").is_some();
        assert_eq!(told, expected.retry(), "{what}");
        self.http.insert(expected.as_str());
    }

    fn merge(&mut self, other: Self) {
        self.socket.extend(other.socket);
        self.http.extend(other.http);
    }
}

/// The table. A code that is added to `ErrorCode::ALL` and provoked by none of the parts fails it.
#[tokio::test]
async fn every_error_code_is_provoked() {
    let parts = tokio::join!(
        Box::pin(refused_by_the_edge()),
        Box::pin(refused_for_rate()),
        Box::pin(refused_by_the_stream()),
        Box::pin(nats_is_away()),
        Box::pin(refused_for_erasure()),
        Box::pin(files_that_are_held_back()),
    );
    let mut seen = Seen::default();
    for part in [parts.0, parts.1, parts.2, parts.3, parts.4, parts.5] {
        seen.merge(part);
    }
    let all: BTreeSet<&str> = ErrorCode::ALL.into_iter().map(ErrorCode::as_str).collect();
    let without = |codes: &[ErrorCode]| {
        let has = |word: &&str| codes.iter().any(|code| code.as_str() == *word);
        all.iter().copied().filter(|word| !has(word)).collect()
    };
    assert_eq!(seen.socket, without(&NOT_OVER_THE_SOCKET));
    assert_eq!(seen.http, without(&NOT_OVER_HTTP));
}

/// Names that are no rooms, each with itself in a path.
fn bad_rooms() -> Vec<String> {
    let mut rooms: Vec<String> = [
        "",
        ":",
        "chat",
        "chat:",
        ":a",
        "chat:a:b",
        "chat:a.b",
        "chat.a",
        "chat:*",
        "*:*",
        "chat:>",
        ">",
        "chat:a b",
        " chat:a",
        "chat:a ",
        "chat:a\r\nPUB x 1",
        "chat:a\n",
        "chat:a\0",
        "$JS:a",
        "chat:$JS",
        "$JS.API.>",
        "chat:방",
        "聊天:a",
        "chat:ａ",
        "chat:é",
        "chat:a/b",
        "chat:a%2Eb",
        "chat:{sub}",
    ]
    .map(str::to_owned)
    .to_vec();
    rooms.push(format!("chat:{}", "a".repeat(65)));
    rooms.push(format!("{}:a", "a".repeat(65)));
    rooms
}

fn in_path(room: &str) -> String {
    room.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn refused_for_erasure() -> Seen {
    let mut seen = Seen::default();
    let (nats, mongodb) = (support::nats_url(), support::mongodb_url());
    let mesh = Mesh::with_history(nats, mongodb, (1, 1), "").await;
    let (address, token) = (mesh.edges[0].address, token("kim"));
    let mut kim = Raw::open(address, &token).await;
    let send = json!({"op": "send", "rid": 1, "room": "chat:a", "id": "m1", "body": 1});
    assert_eq!(kim.call(send.clone()).await["op"], "ack");
    eventually("it is erased", LONG, async || {
        let headers = bearer(&token);
        let answer = request(address, "DELETE", "/v1/rooms/chat:a", &headers, "").await;
        match answer.status {
            200 => Ok(()),
            status => Err(format!("{status} {}", answer.json())),
        }
    })
    .await;
    seen.call(&mut kim, send, ErrorCode::Erased).await;
    let body = r#"{"id":"m1","body":1}"#;
    seen.post(address, &token, "chat:a", body, ErrorCode::Erased)
        .await;
    seen
}

async fn files_that_are_held_back() -> Seen {
    let mut seen = Seen::default();
    let folder = tempfile::tempdir().unwrap();
    let toml = format!(
        "uploads.storage = 'local'\nuploads.folder = '{}'\nuploads.scan = 'scan'\nuploads.secret = 'a secret of the tests, of more than 32 bytes'",
        folder.path().display()
    );
    let (nats, mongodb) = (support::nats_url(), support::mongodb_url());
    let mesh = Mesh::with_history(nats, mongodb, (1, 1), &toml).await;
    let (address, token) = (mesh.edges[0].address, token("kim"));
    let file = r#"{"name":"a","type":"image/png","size":5}"#;
    let path = "/v1/rooms/chat:a/uploads";
    let granted = request(address, "POST", path, &bearer(&token), file).await;
    let granted = granted.json();
    let upload = granted["upload"].as_str().unwrap();
    let path = format!("{path}/{upload}");
    let get = ("GET", path.as_str(), "");
    seen.request(address, &token, get, ErrorCode::Pending).await;
    let verdict = json!({"scan": {"files": {upload: "infected"}}});
    said_by_hand(&mesh, "chat:a", "scan", ("v1", "kim/m1"), &verdict).await;
    eventually("the verdict is known", LONG, async || {
        let answer = request(address, "GET", &path, &bearer(&token), "").await;
        match answer.status {
            410 => Ok(()),
            status => Err(format!("{status} {}", answer.json())),
        }
    })
    .await;
    seen.request(address, &token, get, ErrorCode::Infected)
        .await;
    seen
}

async fn refused_by_the_edge() -> Seen {
    let mut seen = Seen::default();
    let toml = "limits.rooms_per_session = 2\nhttp.body_timeout = '1s'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let token = token("kim");
    let hour = Duration::from_secs(3600);
    let grants = vec![
        Grant::new("chat:read", &[Right::Read]),
        Grant::new("chat:write", &[Right::Write]),
        Grant::new("chat:moderated", &[Right::Write, Right::Moderate]),
    ];
    let little = token_with("lee", hour, grants);
    let mut kim = Raw::open(address, &token).await;
    let mut lee = Raw::open(address, &little).await;

    // Not JSON, or no command: without a rid the answer has none either.
    for (text, rid, code) in [
        ("", Value::Null, ErrorCode::BadJson),
        ("{", Value::Null, ErrorCode::BadJson),
        (r#"{"op":"ping","rid":1}}"#, Value::Null, ErrorCode::BadJson),
        ("[]", Value::Null, ErrorCode::BadRequest),
        (r#"{"op":"ping"}"#, Value::Null, ErrorCode::BadRequest),
        (
            r#"{"op":"ping","rid":-1}"#,
            Value::Null,
            ErrorCode::BadRequest,
        ),
        (r#"{"op":7,"rid":1}"#, json!(1), ErrorCode::BadRequest),
        (r#"{"rid":1}"#, json!(1), ErrorCode::BadRequest),
    ] {
        kim.text(text).await;
        let error = kim.json().await;
        seen.reply(text, &error, &rid, code);
    }
    for command in [
        json!({"op": "join", "rid": 1}),
        json!({"op": "send", "rid": 1, "room": "chat:a"}),
        json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1, "kind": "shout"}),
        json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1, "kind": "edit"}),
        json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1, "target": "x"}),
        json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1, "mentions": "x"}),
        json!({"op": "auth", "rid": 1, "token": token}),
        json!({"op": "typing", "rid": 1, "room": "live:a"}),
    ] {
        seen.call(&mut kim, command, ErrorCode::BadRequest).await;
    }
    for op in ["", "sing", "JOIN", "join ", &"x".repeat(1000)] {
        let command = json!({"op": op, "rid": 1});
        seen.call(&mut kim, command, ErrorCode::UnknownOp).await;
    }
    for (body, code) in [
        ("", ErrorCode::BadJson),
        ("{\"body\":", ErrorCode::BadJson),
        ("[]", ErrorCode::BadRequest),
        ("{}", ErrorCode::BadRequest),
        (r#"{"body":1,"kind":"edit"}"#, ErrorCode::BadRequest),
        (r#"{"body":1,"id":7}"#, ErrorCode::BadRequest),
    ] {
        seen.post(address, &token, "chat:a", body, code).await;
    }

    // A body that stops.
    let text = format!(
        "POST /v1/rooms/chat:a/messages HTTP/1.1\r\nHost: x\r\n{}Content-Length: 10\r\n\r\n{{\"body\"",
        bearer(&token)
    );
    let answer = exchange(address, &text).await;
    seen.answer("a body that stops", &answer, ErrorCode::Timeout);

    // Rooms.
    for room in bad_rooms() {
        for op in ["join", "leave", "typing", "send"] {
            let command = json!({"op": op, "rid": 1, "room": room, "body": 1});
            seen.call(&mut kim, command, ErrorCode::BadRoom).await;
        }
        let path = in_path(&room);
        seen.post(address, &token, &path, r#"{"body":1}"#, ErrorCode::BadRoom)
            .await;
    }
    let not_utf8 = "chat:%FF";
    seen.post(
        address,
        &token,
        not_utf8,
        r#"{"body":1}"#,
        ErrorCode::BadRoom,
    )
    .await;
    for room in ["nowhere:a", "Chat:a"] {
        for op in ["join", "typing", "send"] {
            let command = json!({"op": op, "rid": 1, "room": room, "body": 1});
            seen.call(&mut kim, command, ErrorCode::UnknownNamespace)
                .await;
        }
        let body = r#"{"body":1}"#;
        seen.post(address, &token, room, body, ErrorCode::UnknownNamespace)
            .await;
    }

    // Ids, references, cursors.
    for id in ["", "a b", "a/b", "안녕", "a\r\nb", &"x".repeat(65)] {
        let send = json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1, "id": id});
        seen.call(&mut kim, send, ErrorCode::BadId).await;
        let body = json!({"body": 1, "id": id}).to_string();
        seen.post(address, &token, "chat:a", &body, ErrorCode::BadId)
            .await;
    }
    for reference in ["", "/", "a b", "kim/", "/1"] {
        for fields in [
            json!({"kind": "edit", "target": reference}),
            json!({"reply_to": reference}),
        ] {
            let mut send = json!({"op": "send", "rid": 1, "room": "chat:a", "body": 1});
            send.as_object_mut()
                .unwrap()
                .extend(fields.as_object().unwrap().clone());
            seen.call(&mut kim, send, ErrorCode::BadId).await;
        }
    }
    for since in ["", "x", "a.b.c", "a.b.1.1_", "a.b.-1.1", "a.b.1.zz"] {
        let join = json!({"op": "join", "rid": 1, "room": "chat:a", "since": since});
        seen.call(&mut kim, join, ErrorCode::BadCursor).await;
        let read = json!({"op": "read", "rid": 1, "room": "chat:a", "cursor": since});
        seen.call(&mut kim, read, ErrorCode::BadCursor).await;
        let body = json!({"cursor": since}).to_string();
        let put = ("PUT", "/v1/rooms/chat:a/read", body.as_str());
        seen.request(address, &token, put, ErrorCode::BadCursor)
            .await;
    }

    // Size: the JSON text of the body counts, with its quotes.
    let most = "x".repeat(64 * 1024 - 2);
    let more = format!("{most}x");
    for room in ["chat:a", "live:a"] {
        let send = json!({"op": "send", "rid": 1, "room": room, "body": more});
        seen.call(&mut kim, send, ErrorCode::TooLarge).await;
        let send = json!({"op": "send", "rid": 1, "room": room, "body": most});
        assert_eq!(kim.call(send).await["op"], "ack");
        for body in [&more, &"x".repeat(1 << 20)] {
            let body = json!({"body": body}).to_string();
            seen.post(address, &token, room, &body, ErrorCode::TooLarge)
                .await;
        }
    }

    // Tokens and grants.
    let mut nobody = Raw::dial(address, Default::default()).await;
    let ping = json!({"op": "ping", "rid": 9});
    seen.call(&mut nobody, ping, ErrorCode::Unauthorized).await;
    for bad in ["", "x"] {
        let refresh = json!({"op": "refresh", "rid": 9, "token": bad});
        seen.call(&mut kim, refresh, ErrorCode::Unauthorized).await;
        seen.post(
            address,
            bad,
            "chat:a",
            r#"{"body":1}"#,
            ErrorCode::Unauthorized,
        )
        .await;
    }
    for command in [
        json!({"op": "join", "rid": 1, "room": "chat:write"}),
        json!({"op": "join", "rid": 1, "room": "chat:other"}),
        json!({"op": "send", "rid": 1, "room": "chat:read", "body": 1}),
        json!({"op": "typing", "rid": 1, "room": "chat:read"}),
        json!({"op": "refresh", "rid": 1, "token": token}),
        // Of another, and nothing else counts: whether there is such a message is not even asked.
        json!({"op": "send", "rid": 1, "room": "chat:write", "kind": "edit", "target": "kim/1", "body": 1}),
        json!({"op": "send", "rid": 1, "room": "chat:write", "kind": "delete", "target": "kim/1"}),
    ] {
        seen.call(&mut lee, command, ErrorCode::Forbidden).await;
    }
    for (room, body) in [
        ("chat:read", r#"{"body":1}"#),
        ("chat:write", r#"{"kind":"edit","target":"kim/1","body":1}"#),
    ] {
        seen.post(address, &little, room, body, ErrorCode::Forbidden)
            .await;
    }
    for (room, kind, target) in [
        ("chat:write", "edit", "lee/1"),
        ("chat:write", "delete", "1"),
        ("chat:write", "reaction", "kim/1"),
        ("chat:moderated", "edit", "kim/1"),
        ("chat:moderated", "delete", "kim/1"),
    ] {
        let send = json!({"op": "send", "rid": 1, "room": room, "kind": kind, "target": target, "body": 1});
        let ack = lee.call(send).await;
        assert_eq!(ack["op"], "ack", "{kind} of {target} in {room}: {ack}");
    }

    // Rooms at once.
    let rooms = json!({"rooms": vec!["chat:a"; 501]}).to_string();
    let post = ("POST", "/v1/unread", rooms.as_str());
    seen.request(address, &token, post, ErrorCode::Limit).await;

    // Records of rooms.
    let path = "/v1/rooms/chat:nobody-made-it";
    seen.request(address, &token, ("GET", path, ""), ErrorCode::UnknownRoom)
        .await;
    let headers = format!("{}If-Match: \"0\"\r\n", bearer(&token));
    let answer = request(address, "PATCH", path, &headers, r#"{"title":"x"}"#).await;
    seen.answer("another version", &answer, ErrorCode::Conflict);
    let room = "chat:nobody-made-it";
    let command = json!({"op": "room", "rid": 1, "room": room});
    seen.call(&mut kim, command, ErrorCode::UnknownRoom).await;
    let command = json!({"op": "settings", "rid": 1, "room": room, "title": "x", "version": "0"});
    seen.call(&mut kim, command, ErrorCode::Conflict).await;

    // Membership.
    for op in ["leave", "typing"] {
        let command = json!({"op": op, "rid": 1, "room": "chat:a"});
        seen.call(&mut kim, command, ErrorCode::NotJoined).await;
    }
    for room in ["chat:a", "live:b", "chat:a"] {
        let joined = kim
            .call(json!({"op": "join", "rid": 1, "room": room}))
            .await;
        assert_eq!(joined["op"], "joined", "{joined}");
    }
    let third = json!({"op": "join", "rid": 1, "room": "chat:c"});
    seen.call(&mut kim, third.clone(), ErrorCode::Limit).await;
    let left = kim
        .call(json!({"op": "leave", "rid": 1, "room": "live:b"}))
        .await;
    assert_eq!(left["op"], "left");
    assert_eq!(kim.call(third).await["op"], "joined");
    seen
}

async fn refused_for_rate() -> Seen {
    let mut seen = Seen::default();
    let toml = "limits.commands_per_second = 1\nlimits.commands_burst = 2";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let token = token("kim");
    let mut kim = Raw::open(address, &token).await;
    let mut rid = 0;
    let error = loop {
        rid += 1;
        let answer = kim.call(json!({"op": "ping", "rid": rid})).await;
        if answer["op"] != "pong" {
            break answer;
        }
    };
    seen.reply("ping", &error, &json!(rid), ErrorCode::RateLimited);
    loop {
        let path = "/v1/rooms/live:a/messages";
        let answer = request(address, "POST", path, &bearer(&token), r#"{"body":1}"#).await;
        if answer.status != 200 {
            break;
        }
    }
    seen.post(address, &token, "live:a", "{}", ErrorCode::RateLimited)
        .await;
    seen
}

/// Changes the configuration of the mesh's only stream, as an operator would.
async fn update_stream(mesh: &Mesh, nats: &str, change: impl FnOnce(&mut Value)) {
    update_named(nats, &format!("ROOMS_{}_0", mesh.config.region), change).await;
}

pub(crate) async fn update_named(nats: &str, stream: &str, change: impl FnOnce(&mut Value)) {
    let client = async_nats::connect(nats).await.unwrap();
    let ask = async |verb: &str, body: String| -> Value {
        let subject = format!("$JS.API.STREAM.{verb}.{stream}");
        let answer = client.request(subject, body.into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    };
    let mut config = ask("INFO", String::new()).await["config"].take();
    change(&mut config);
    let answer = ask("UPDATE", config.to_string()).await;
    assert_eq!(answer.get("error"), None, "{answer}");
}

async fn refused_by_the_stream() -> Seen {
    let mut seen = Seen::default();
    let nats = support::nats_url();
    let mesh = Mesh::start(nats, 1, "nats.partitions = 1").await;
    let address = mesh.edges[0].address;
    let token = token("kim");
    let mut kim = Raw::open(address, &token).await;
    let mut lee = mesh.connect(0, "lee").await;
    for room in ["chat:a", "live:a"] {
        reply(&mut lee, "join", json!({"room": room})).await;
    }
    let send = |id: &str| json!({"op": "send", "rid": 1, "room": "chat:a", "body": id, "id": id});
    assert_eq!(kim.call(send("first")).await["op"], "ack");

    // Full: no more messages than there are, and the new one is the one that goes.
    update_stream(&mesh, nats, |config| {
        config["max_msgs"] = json!(1);
        config["discard"] = json!("new");
    })
    .await;
    seen.call(&mut kim, send("full"), ErrorCode::StreamFull)
        .await;
    seen.post(
        address,
        &token,
        "chat:a",
        r#"{"body":1}"#,
        ErrorCode::StreamFull,
    )
    .await;
    let ephemeral = json!({"op": "send", "rid": 2, "room": "live:a", "body": "ephemeral"});
    assert_eq!(kim.call(ephemeral.clone()).await["op"], "ack");
    let typing = json!({"op": "join", "rid": 3, "room": "chat:a"});
    assert_eq!(kim.call(typing).await["op"], "joined");
    update_stream(&mesh, nats, |config| {
        config["max_msgs"] = json!(-1);
        config["discard"] = json!("old");
    })
    .await;
    assert_eq!(kim.call(send("room")).await["op"], "ack");

    // Sealed: an operator has closed the log for good. That is no state a client could mend or wait for.
    update_stream(&mesh, nats, |config| config["sealed"] = json!(true)).await;
    seen.call(&mut kim, send("sealed"), ErrorCode::Internal)
        .await;
    seen.post(
        address,
        &token,
        "chat:a",
        r#"{"body":1}"#,
        ErrorCode::Internal,
    )
    .await;
    assert_eq!(kim.call(ephemeral).await["op"], "ack");

    // Both sessions were there all the time, and what was refused was not delivered.
    let mut delivered = Vec::new();
    while delivered.len() < 4 {
        delivered.push(next(&mut lee).await.json()["body"].clone());
    }
    delivered.sort_by_key(Value::to_string);
    assert_eq!(delivered, ["ephemeral", "ephemeral", "first", "room"]);
    assert_eq!(reply(&mut lee, "ping", json!({})).await["op"], "pong");
    seen
}

/// Repeats a send with the same id until it is acknowledged; every refusal on the way must say that this is the thing to do.
async fn send_until_acked(connection: &mut Connection, room: &str, id: &str) -> Value {
    let fields = json!({"room": room, "id": id, "body": id});
    eventually(&format!("{id} is acknowledged"), LONG, async || {
        // What is pushed in between belongs to the reader of another connection.
        let answer = connection.commands().call("send", fields.clone()).await;
        match answer {
            Ok(ack) => Ok(ack.json()),
            Err(CallError::Refused(refusal)) => {
                assert!(refusal.retry, "{refusal}");
                Err(refusal.code)
            }
            Err(other) => panic!("{other}"),
        }
    })
    .await
}

async fn nats_is_away() -> Seen {
    let mut seen = Seen::default();
    let mut nats = support::dedicated_nats().await;
    let mesh = Mesh::start(&nats.url(), 1, "edge.shards = 1").await;
    let address = mesh.edges[0].address;
    let token = token("kim");
    let mut raw = Raw::open(address, &token).await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(0, "lee").await;
    reply(&mut lee, "join", json!({"room": "chat:a"})).await;
    send_until_acked(&mut kim, "chat:a", "before").await;

    // Gone: the edge knows within a moment. Until then it may have sent what nobody answered.
    nats.server.kill().await;
    let send =
        |room: &str, id: &str| json!({"op": "send", "rid": 1, "room": room, "body": id, "id": id});
    eventually("a send is refused at once", LONG, async || {
        let fields = json!({"room": "chat:a", "id": "away", "body": "away"});
        let refusal = match kim.commands().call("send", fields).await {
            Err(CallError::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        };
        assert!(refusal.retry, "{refusal}");
        match refusal.code.as_str() {
            "unavailable" => Ok(()),
            "unknown_outcome" => Err(refusal.code),
            _ => panic!("{refusal}"),
        }
    })
    .await;
    for command in [
        send("chat:a", "away"),
        send("live:a", "away"),
        json!({"op": "join", "rid": 2, "room": unique("chat:fresh")}),
        json!({"op": "join", "rid": 2, "room": unique("live:fresh")}),
    ] {
        seen.call(&mut raw, command, ErrorCode::Unavailable).await;
    }
    eventually("HTTP knows it too", LONG, async || {
        match request(address, "GET", "/readyz", "", "").await.status {
            503 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    for room in ["chat:a", "live:a"] {
        let body = r#"{"body":1,"id":"away-http"}"#;
        seen.post(address, &token, room, body, ErrorCode::Unavailable)
            .await;
    }
    // What does not need NATS goes on, and after its return everything does, on the same sessions.
    let pong = raw.call(json!({"op": "ping", "rid": 5})).await;
    assert_eq!(pong["op"], "pong");
    nats.server.restart().await.unwrap();
    send_until_acked(&mut kim, "chat:a", "away").await;
    let room = unique("chat:fresh");
    eventually("a fresh room can be joined", LONG, async || {
        match kim.commands().call("join", json!({"room": room})).await {
            Ok(_joined) => Ok(()),
            Err(CallError::Refused(refusal)) if refusal.retry => Err(refusal.code),
            Err(other) => panic!("{other}"),
        }
    })
    .await;
    // Again a time of quiet: acknowledged at the first try.
    send_until_acked(&mut kim, "chat:a", "back").await;

    // The connections come back one by one: the edge's own four, and the shard's for live messages and for replay.
    eventually("all connections are back", LONG, async || {
        match mesh.metric(0, "natter_nats_connected", "").await {
            6 => Ok(()),
            other => Err(format!("{other} connections")),
        }
    })
    .await;

    // Frozen: it may have taken what was sent, or not.
    let mut joining = Raw::open(address, &token).await;
    let pid = nats.server.pid().unwrap();
    signal(pid, Signal::STOP);
    let over_http = async {
        let mut seen = Seen::default();
        let body = r#"{"body":"frozen-http","id":"frozen-http"}"#;
        seen.post(address, &token, "chat:a", body, ErrorCode::UnknownOutcome)
            .await;
        seen
    };
    let over_socket = async {
        let mut seen = Seen::default();
        let frozen = send("chat:a", "frozen");
        seen.call(&mut raw, frozen, ErrorCode::UnknownOutcome).await;
        seen
    };
    let join = async {
        let fresh = json!({"op": "join", "rid": 7, "room": unique("chat:frozen")});
        let mut seen = Seen::default();
        seen.call(&mut joining, fresh, ErrorCode::Unavailable).await;
        seen
    };
    let (over_socket, over_http, join) = tokio::join!(over_socket, over_http, join);
    signal(pid, Signal::CONT);
    seen.merge(join);
    seen.merge(over_socket);
    seen.merge(over_http);
    for id in ["frozen", "frozen-http", "end"] {
        send_until_acked(&mut kim, "chat:a", id).await;
    }
    let mut delivered = Vec::new();
    loop {
        let frame = next(&mut lee).await.json();
        assert_eq!(frame["op"], "msg", "{frame}");
        let body = frame["body"].as_str().unwrap().to_owned();
        if body == "end" {
            break;
        }
        delivered.push(body);
    }
    // Each once. The two that were sent in the frozen time may come in either order.
    delivered[3..].sort();
    assert_eq!(
        delivered,
        ["before", "away", "back", "frozen", "frozen-http"]
    );
    assert_eq!(reply(&mut lee, "ping", json!({})).await["op"], "pong");
    seen
}
