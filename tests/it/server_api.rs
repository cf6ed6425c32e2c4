//! The API of a Centrifugo back end, and natter's own requests for what it can do: publishing in the name of others, and
//! orders to sessions on all edges.

use std::{net::SocketAddr, time::Duration};

use natter::testing::{
    auth::{Grant, Right},
    runtime::unix_s,
};
use serde_json::{Value, json};

use crate::support::{
    self, LONG,
    calls::{next, reply},
    centrifugal::{Client, SECRET, foreign},
    eventually,
    mesh::{Mesh, ask, http, token, token_with},
    raw::{Dial, Raw, bearer, request},
    regions::Regions,
};

const KEY: &str = "a key of the server API";

fn toml() -> String {
    format!(
        "auth.leeway = '0s'\n[centrifugal]\nhs256_secret = '{SECRET}'\napi_key = '{}'\ndefault_namespace = 'open'\n\
         [namespaces.open]\ndurable = true\ntyping = false\nhistory = true\npresence = 'users'\neverybody = ['read', 'write', 'presence', 'history']\n\
         [namespaces.closed]\ndurable = true\ntyping = false\npresence = 'off'\n[namespaces.brief]\ndurable = false\ntyping = false\neverybody = ['read', 'write']\n",
        key()
    )
}

fn key() -> String {
    KEY.replace(' ', "-")
}

/// A call with the right key: status and answer.
async fn call(address: SocketAddr, method: &str, body: &Value) -> (u16, Value) {
    let headers = format!("X-API-Key: {}\r\n", key());
    let path = format!("/api/{method}");
    let (status, answer) = http(address, "POST", &path, &headers, &body.to_string())
        .await
        .unwrap();
    let answer = serde_json::from_str(&answer);
    (status, answer.unwrap_or_default())
}

/// The result of a call that must succeed.
async fn result(address: SocketAddr, method: &str, body: Value) -> Value {
    let (status, mut answer) = call(address, method, &body).await;
    assert_eq!(status, 200, "{method} {body}: {answer}");
    assert!(answer["result"].is_object(), "{method} {body}: {answer}");
    answer["result"].take()
}

/// The code of a call that must fail, with something that its message must say.
async fn refused(address: SocketAddr, method: &str, body: Value, code: u32, said: &str) {
    let (status, answer) = call(address, method, &body).await;
    assert_eq!(status, 200, "{method} {body}: {answer}");
    assert_eq!(answer["error"]["code"], code, "{method} {body}: {answer}");
    assert_eq!(answer.as_object().unwrap().len(), 1, "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains(said), "{method} {body}: {message}");
}

/// Waits until an edge knows of so many edges: only then it waits for what they answer.
async fn knows(address: SocketAddr, edges: u64) {
    let expected = json!({ "sessions": 0, "edges": edges, "missing": 0 });
    eventually("the edges know of each other", LONG, async || {
        let path = "/v1/users/nobody/sessions";
        let answer = ask(address, ("DELETE", path), &token("root"), &Value::Null).await;
        match answer == (200, expected.clone()) {
            true => Ok(()),
            false => Err(format!("{answer:?}")),
        }
    })
    .await;
}

/// The next push of a kind, with its channel. What comes before it is dropped.
async fn push(client: &mut Client, kind: &str) -> (Value, Value) {
    loop {
        let mut next = client.next().await;
        let push = &mut next["push"];
        if !push[kind].is_null() {
            return (push["channel"].take(), push[kind].take());
        }
    }
}

#[tokio::test]
async fn there_is_an_api_only_with_its_key() {
    let without = Mesh::start(support::nats_url(), 1, "").await;
    let with = Mesh::start(support::nats_url(), 1, &toml()).await;
    let body = json!({ "channel": "a", "data": 1 }).to_string();
    let post = async |mesh: &Mesh, path: &str, headers: &str, body: &str| {
        request(mesh.edges[0].address, "POST", path, headers, body).await
    };
    let right = format!("X-API-Key: {}\r\n", key());
    for headers in ["", &right, "X-API-Key: \r\n"] {
        let answer = post(&without, "/api/publish", headers, &body).await;
        assert_eq!(answer.status, 404, "{headers}: {}", answer.body);
    }
    let other = format!("Authorization: apikey {}\r\n", key());
    for headers in [&right, &other] {
        let answer = post(&with, "/api/publish", headers, &body).await;
        assert_eq!(answer.status, 200, "{headers}: {}", answer.body);
    }
    let key_of_api = key();
    let nearly = key_of_api.strip_prefix("a").unwrap();
    for headers in [
        String::new(),
        "X-API-Key: \r\n".to_owned(),
        format!("X-API-Key: {nearly}\r\n"),
        format!("X-API-Key: {}x\r\n", key()),
        format!("Authorization: Bearer {}\r\n", key()),
        bearer(&token("kim")),
    ] {
        for path in ["/api/publish", "/api/nonsense"] {
            let answer = post(&with, path, &headers, &body).await;
            assert_eq!(answer.status, 401, "{path} {headers}: {}", answer.body);
            assert_eq!(answer.json()["code"], "unauthorized");
        }
    }
    for path in ["/api/nonsense", "/api/", "/api", "/api/publish/x"] {
        let answer = post(&with, path, &right, &body).await;
        assert_eq!(answer.status, 404, "{path}: {}", answer.body);
    }
    let address = with.edges[0].address;
    let got = request(address, "GET", "/api/publish", &right, "").await;
    assert_eq!(got.status, 405);
    for (text, code) in [
        ("", "bad_json"),
        ("{", "bad_json"),
        ("{\"channel\":\"a\",\"data\":1}}", "bad_json"),
        ("[1]", "bad_request"),
        ("7", "bad_request"),
        (r#"{"channel":7,"data":1}"#, "bad_request"),
    ] {
        for method in ["publish", "history", "batch", "disconnect"] {
            if method != "publish" && text.contains('7') {
                continue;
            }
            let path = format!("/api/{method}");
            let answer = post(&with, &path, &right, text).await;
            assert_eq!(answer.status, 400, "{path} {text}: {}", answer.body);
            if text != "[1]" {
                assert_eq!(answer.json()["code"], code, "{path} {text}");
            }
        }
    }
    let large = format!(
        r#"{{"channel":"a","data":"{}"}}"#,
        "x".repeat(4 * 1024 * 1024)
    );
    let answer = post(&with, "/api/publish", &right, &large).await;
    assert_eq!(answer.status, 413, "{}", answer.body);
}

#[tokio::test]
async fn a_back_end_publishes_and_reads() {
    let mesh = Mesh::start(support::nats_url(), 1, &toml()).await;
    let address = mesh.edges[0].address;
    let (mut kim, _) = Client::connect(&mesh, 0, &foreign(json!({ "sub": "kim" }))).await;
    let of = kim.call("subscribe", json!({ "channel": "a" })).await["subscribe"].clone();

    // A position as those of subscriptions, and a sender that no token can name.
    let first = result(
        address,
        "publish",
        json!({ "channel": "a", "data": { "n": 1 } }),
    )
    .await;
    assert_eq!(first["epoch"], of["epoch"], "{first} {of}");
    let heard = kim.next().await["push"]["pub"].clone();
    assert_eq!(heard["data"], json!({ "n": 1 }));
    assert_eq!(heard["offset"], first["offset"]);
    assert_eq!(heard["info"]["user"], "$api");

    // The key of a repeated call is the id of the message.
    let keyed = json!({ "channel": "a", "data": 2, "idempotency_key": "k-2", "user": "lee", "delta": true });
    let second = result(address, "publish", keyed.clone()).await;
    assert_eq!(result(address, "publish", keyed).await, second);
    let heard = kim.next().await["push"]["pub"].clone();
    assert_eq!(
        (&heard["tags"]["id"], &heard["info"]["user"]),
        (&json!("k-2"), &json!("lee"))
    );
    // "three" as the JSON text of a string.
    let third =
        json!({ "channel": "a", "b64data": "InRocmVlIg==", "tags": {}, "skip_history": false });
    let third = result(address, "publish", third).await;
    assert_eq!(kim.next().await["push"]["pub"]["data"], "three");

    for (fields, code, said) in [
        (json!({ "channel": "", "data": 1 }), 107, "channel"),
        (
            json!({ "channel": "x".repeat(65), "data": 1 }),
            107,
            "bytes",
        ),
        (json!({ "channel": "nowhere:a", "data": 1 }), 102, "nowhere"),
        (json!({ "channel": "a" }), 107, "data"),
        (json!({ "channel": "a", "b64data": "eA==" }), 107, "b64data"),
        (json!({ "channel": "a", "b64data": "%" }), 107, "b64data"),
        (
            json!({ "channel": "a", "data": 1, "tags": { "a": "b" } }),
            107,
            "tags",
        ),
        (
            json!({ "channel": "a", "data": 1, "version": 3 }),
            107,
            "version",
        ),
        (
            json!({ "channel": "a", "data": 1, "skip_history": true }),
            107,
            "skip_history",
        ),
        (
            json!({ "channel": "a", "data": 1, "idempotency_key": "a b" }),
            107,
            "idempotency_key",
        ),
        (
            json!({ "channel": "a", "data": 1, "user": "$natter" }),
            107,
            "user",
        ),
        (
            json!({ "channel": "a", "data": "x".repeat(70_000) }),
            107,
            "limit",
        ),
    ] {
        refused(address, "publish", fields, code, said).await;
    }
    let brief = json!({ "channel": "brief:a", "data": 1, "skip_history": true });
    assert_eq!(result(address, "publish", brief).await, json!({}));

    // To many, each with its own outcome.
    let many = json!({ "channels": ["a", "closed:b", "nowhere:a", "brief:x"], "data": 4 });
    let many = result(address, "broadcast", many).await["responses"].clone();
    assert!(
        many[0]["result"]["offset"].as_u64() > third["offset"].as_u64(),
        "{many}"
    );
    assert!(many[1]["result"]["offset"].is_u64(), "{many}");
    assert_eq!(many[2]["error"]["code"], 102, "{many}");
    assert_eq!(many[3], json!({ "result": {} }));
    refused(address, "broadcast", json!({ "data": 1 }), 107, "channels").await;
    let too_many: Vec<_> = (0..1001).map(|n| format!("brief:{n}")).collect();
    let too_many = json!({ "channels": too_many, "data": 1 });
    refused(address, "broadcast", too_many, 106, "1000").await;

    // History.
    let history = async |fields: Value| {
        let page = result(address, "history", fields).await;
        let data = page["publications"].as_array().unwrap().iter();
        let data: Vec<_> = data.map(|one| one["data"].clone()).collect();
        (data, page)
    };
    let (data, page) = history(json!({ "channel": "a" })).await;
    assert!(data.is_empty());
    assert_eq!(
        (&page["offset"], &page["epoch"]),
        (&many[0]["result"]["offset"], &of["epoch"])
    );
    let (data, page) = history(json!({ "channel": "a", "limit": -1 })).await;
    assert_eq!(
        data,
        [json!({ "n": 1 }), json!(2), json!("three"), json!(4)]
    );
    assert_eq!(page["publications"][0]["offset"], first["offset"]);
    let since = json!({ "offset": second["offset"], "epoch": of["epoch"] });
    let (data, _) = history(json!({ "channel": "a", "limit": 1, "since": since })).await;
    assert_eq!(data, ["three"]);
    let (data, _) = history(json!({ "channel": "a", "limit": 2, "reverse": true })).await;
    assert_eq!(data, [json!(4), json!("three")]);
    let since = json!({ "offset": 65536, "epoch": "nonsense" });
    let foreign_epoch = json!({ "channel": "a", "limit": 1, "since": since });
    refused(address, "history", foreign_epoch, 112, "epoch").await;
    refused(
        address,
        "history",
        json!({ "channel": "brief:a" }),
        107,
        "history",
    )
    .await;
    refused(address, "history", json!({}), 107, "channel").await;

    // Presence.
    let there = eventually("kim is there", LONG, async || {
        let there = result(address, "presence", json!({ "channel": "a" })).await;
        match there["presence"]["kim"]["user"] == "kim" {
            true => Ok(there),
            false => Err(there.to_string()),
        }
    })
    .await;
    assert_eq!(there["presence"].as_object().unwrap().len(), 1, "{there}");
    let stats = result(address, "presence_stats", json!({ "channel": "a" })).await;
    assert_eq!(stats, json!({ "num_clients": 1, "num_users": 1 }));
    refused(
        address,
        "presence",
        json!({ "channel": "closed:a" }),
        107,
        "presence",
    )
    .await;

    // Of a batch each by itself.
    for parallel in [false, true] {
        let batch = json!({ "parallel": parallel, "commands": [
            { "publish": { "channel": "closed:c", "data": 1 } },
            { "publish": { "channel": "nowhere:c", "data": 1 } },
            { "presence_stats": { "channel": "a" } },
            { "nonsense": {} },
            { "publish": { "channel": 7 } },
            { "batch": { "commands": [] } },
            { "history": { "channel": "a", "limit": 1 } },
            { "broadcast": { "channels": ["brief:a"], "data": 1 } },
        ] });
        let (status, answer) = call(address, "batch", &batch).await;
        assert_eq!(status, 200, "{answer}");
        let replies = answer["replies"].as_array().unwrap();
        assert_eq!(replies.len(), 8, "{answer}");
        assert!(replies[0]["publish"]["offset"].is_u64(), "{answer}");
        for (number, code) in [(1, 102), (3, 104), (4, 107), (5, 107)] {
            assert_eq!(replies[number]["error"]["code"], code, "{answer}");
        }
        assert_eq!(replies[2]["presence_stats"]["num_users"], 1, "{answer}");
        assert_eq!(
            replies[6]["history"]["publications"][0]["data"],
            json!({ "n": 1 })
        );
        assert_eq!(
            replies[7]["broadcast"]["responses"],
            json!([{ "result": {} }])
        );
    }
    let (status, answer) = call(address, "batch", &json!({ "commands": [] })).await;
    assert_eq!((status, answer), (200, json!({ "replies": [] })));
}

/// A session of natter.v1 and one of STOMP of `kim`, in a room.
async fn others(
    mesh: &Mesh,
    edge: usize,
    room: &str,
) -> (natter::testing::client::Connection, Raw) {
    let mut native = mesh.connect(edge, "kim").await;
    let joined = reply(&mut native, "join", json!({ "room": room })).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    let dial = Dial {
        path: "/stomp",
        headers: "Sec-WebSocket-Protocol: v12.stomp\r\n",
        ..Dial::default()
    };
    let mut stomp = Raw::dial(mesh.edges[edge].address, dial).await;
    let connect = format!(
        "CONNECT\naccept-version:1.2\nhost:x\npasscode:{}\n\n\0",
        token("kim")
    );
    stomp.text(&connect).await;
    assert!(stomp_frame(&mut stomp).await.starts_with("CONNECTED\n"));
    let subscribe = format!("SUBSCRIBE\nid:1\ndestination:/topic/{room}\nreceipt:r\n\n\0");
    stomp.text(&subscribe).await;
    assert!(stomp_frame(&mut stomp).await.starts_with("RECEIPT\n"));
    (native, stomp)
}

async fn stomp_frame(raw: &mut Raw) -> String {
    let (_, payload) = raw.frame().await.expect("the connection ended");
    String::from_utf8(payload).unwrap()
}

#[tokio::test]
async fn orders_reach_the_sessions_of_a_user_on_every_edge_and_shard() {
    let toml = format!("edge.shards = 3\n{}", toml());
    let mesh = Mesh::start(support::nats_url(), 2, &toml).await;
    let address = mesh.edges[0].address;
    knows(address, 2).await;
    let kim = foreign(json!({ "sub": "kim" }));
    let mut clients = Vec::new();
    for edge in [0, 0, 1, 1] {
        clients.push(Client::connect(&mesh, edge, &kim).await.0);
    }
    let (mut lee, _) = Client::connect(&mesh, 1, &foreign(json!({ "sub": "lee" }))).await;
    let (mut native, mut stomp) = others(&mesh, 1, "open:s").await;

    // Into a room that the token does not allow. Those of other protocols can't be told.
    for _ in 0..2 {
        let subscribe =
            json!({ "user": "kim", "channel": "closed:s", "data": { "why": "because" } });
        assert_eq!(result(address, "subscribe", subscribe).await, json!({}));
    }
    let said = result(
        address,
        "publish",
        json!({ "channel": "closed:s", "data": 1 }),
    )
    .await;
    for client in &mut clients {
        let (channel, subscribe) = push(client, "subscribe").await;
        assert_eq!(channel, "closed:s");
        assert_eq!(subscribe["recoverable"], true, "{subscribe}");
        assert_eq!(subscribe["positioned"], true, "{subscribe}");
        assert_eq!(subscribe["data"], json!({ "why": "because" }));
        assert_eq!(subscribe["epoch"], said["epoch"]);
        // The next one is the message: it was subscribed once.
        assert_eq!(client.next().await["push"]["pub"]["data"], 1);
    }

    // Out of it. Of those who were not there, nobody hears it.
    let unsubscribe = json!({ "user": "kim", "channel": "closed:s" });
    assert_eq!(result(address, "unsubscribe", unsubscribe).await, json!({}));
    for client in &mut clients {
        let (channel, unsubscribe) = push(client, "unsubscribe").await;
        assert_eq!(channel, "closed:s");
        assert_eq!(unsubscribe["code"], 2000, "{unsubscribe}");
        let stats = client
            .call("presence_stats", json!({ "channel": "s" }))
            .await;
        assert!(stats["error"].is_null(), "{stats}");
    }
    result(
        address,
        "unsubscribe",
        json!({ "user": "kim", "channel": "s" }),
    )
    .await;
    let kicked = next(&mut native).await.json();
    assert_eq!(
        kicked,
        json!({ "op": "kicked", "room": "open:s", "code": "removed" })
    );
    let left = reply(&mut native, "leave", json!({ "room": "open:s" })).await;
    assert_eq!(left["code"], "not_joined");
    let error = stomp_frame(&mut stomp).await;
    assert!(
        error.starts_with("ERROR\n") && error.contains("open:s"),
        "{error}"
    );
    assert_eq!(stomp.until_close().await.1, 4004);

    // Until a time, at which the token of the subscription is over.
    let until = json!({ "user": "kim", "channel": "closed:s", "expire_at": unix_s() + 2 });
    result(address, "subscribe", until).await;
    for client in &mut clients {
        push(client, "subscribe").await;
        assert_eq!(push(client, "unsubscribe").await.1["code"], 2501);
    }

    // A new end of the token, and the end.
    let refresh = json!({ "user": "kim", "expire_at": unix_s() + 600 });
    assert_eq!(result(address, "refresh", refresh).await, json!({}));
    for client in &mut clients {
        let (_, refresh) = push(client, "refresh").await;
        assert_eq!(refresh["expires"], true, "{refresh}");
        assert!(
            (500..=600).contains(&refresh["ttl"].as_u64().unwrap()),
            "{refresh}"
        );
    }
    result(address, "refresh", json!({ "user": "kim" })).await;
    for client in &mut clients {
        let (_, refresh) = push(client, "refresh").await;
        assert_eq!(refresh, json!({}));
    }
    for (fields, said) in [
        (json!({ "user": "" }), "user"),
        (json!({}), "user"),
        (json!({ "user": "kim", "client": "x" }), "client"),
        (json!({ "user": "kim", "session": "x" }), "session"),
    ] {
        for method in ["disconnect", "unsubscribe", "subscribe", "refresh"] {
            refused(address, method, fields.clone(), 107, said).await;
        }
    }
    for (method, fields, code, said) in [
        (
            "disconnect",
            json!({ "user": "kim", "whitelist": ["x"] }),
            107,
            "whitelist",
        ),
        (
            "disconnect",
            json!({ "user": "kim", "disconnect": { "code": 1000 } }),
            107,
            "code",
        ),
        ("subscribe", json!({ "user": "kim" }), 107, "channel"),
        (
            "subscribe",
            json!({ "user": "kim", "channel": "nowhere:a" }),
            102,
            "nowhere",
        ),
        (
            "unsubscribe",
            json!({ "user": "kim", "channel": "nowhere:a" }),
            102,
            "nowhere",
        ),
        (
            "subscribe",
            json!({ "user": "kim", "channel": "s", "recover_since": { "offset": 1 } }),
            107,
            "recover_since",
        ),
    ] {
        refused(address, method, fields, code, said).await;
    }

    // Expired: a client comes back with a new token.
    let last = clients.pop().unwrap();
    result(
        address,
        "refresh",
        json!({ "user": "kim", "expired": true }),
    )
    .await;
    assert_eq!(last.end().await, 3005);
    for client in clients {
        assert_eq!(client.end().await, 3005);
    }
    assert_eq!(next_end(&mut native).await, 4001);

    // Ended, with a code of Centrifugo's and with one of its own; whoever comes back is let in.
    let (client, _) = Client::connect(&mesh, 1, &kim).await;
    let (mut native, mut stomp) = others(&mesh, 0, "open:s").await;
    let disconnect =
        json!({ "user": "kim", "disconnect": { "code": 4123, "reason": "another device" } });
    assert_eq!(result(address, "disconnect", disconnect).await, json!({}));
    let mut client = client;
    let (_, code, reason) = client.raw.until_close().await;
    assert_eq!((code, &*reason), (4123, "another device"));
    assert_eq!(next_end(&mut native).await, 4006);
    assert_eq!(stomp.until_close().await.1, 4006);
    let (client, _) = Client::connect(&mesh, 1, &kim).await;
    result(address, "disconnect", json!({ "user": "kim" })).await;
    assert_eq!(client.end().await, 3503);
    // Nobody else.
    let published = lee
        .call("publish", json!({ "channel": "s", "data": 1 }))
        .await;
    assert!(published["error"].is_null(), "{published}");
}

/// The code with which a session of natter.v1 is closed.
async fn next_end(connection: &mut natter::testing::client::Connection) -> u16 {
    let ended = async { while connection.next().await.is_some() {} };
    tokio::time::timeout(LONG, ended).await.expect("it goes on");
    connection.end().expect("it has ended").code
}

#[tokio::test]
async fn a_token_with_the_right_does_the_same() {
    let mesh = Mesh::start(support::nats_url(), 2, &toml()).await;
    let address = mesh.edges[0].address;
    let hour = Duration::from_secs(3600);
    let some = |user: &str, rooms: &str, can: &[Right]| {
        token_with(user, hour, vec![Grant::new(rooms, can)])
    };
    let admin = some("root", "*:*", &[Right::Admin, Right::Write]);
    let of_room = some("host", "closed:a", &[Right::Admin, Right::Write]);
    let without = some(
        "eve",
        "*:*",
        &[
            Right::Read,
            Right::Write,
            Right::Presence,
            Right::History,
            Right::Moderate,
        ],
    );
    let delete =
        async |path: &str, token: &str| ask(address, ("DELETE", path), token, &Value::Null).await;
    let mut kims = Vec::new();
    for edge in [0, 1] {
        let mut kim = mesh.connect(edge, "kim").await;
        for room in ["closed:a", "closed:b"] {
            let joined = reply(&mut kim, "join", json!({ "room": room })).await;
            assert_eq!(joined["op"], "joined", "{joined}");
        }
        kims.push(kim);
    }

    // As another.
    let post = async |token: &str, user: &str, body: Value| {
        let path = format!("/v1/rooms/closed:a/messages?as={user}");
        ask(address, ("POST", &path), token, &body).await
    };
    let (status, answer) = post(&without, "kim", json!({ "body": 0 })).await;
    assert_eq!(
        (status, &answer["code"]),
        (403, &json!("forbidden")),
        "{answer}"
    );
    for user in ["", "%24natter", &"x".repeat(257)] {
        let (status, answer) = post(&admin, user, json!({ "body": 0 })).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!("bad_request")),
            "{answer}"
        );
    }
    for (number, token) in [&admin, &of_room].into_iter().enumerate() {
        let (status, ack) = post(
            token,
            "lee%20%C3%A9",
            json!({ "body": number, "id": number.to_string() }),
        )
        .await;
        assert_eq!(status, 200, "{ack}");
        for kim in &mut kims {
            let message = next(kim).await.json();
            assert_eq!(
                (&message["body"], &message["from"]),
                (&json!(number), &json!("lee é"))
            );
        }
    }
    // The message is that user's own.
    let edit = json!({ "body": "edited", "kind": "edit", "target": "0" });
    let (status, answer) = post(&of_room, "lee%20%C3%A9", edit).await;
    assert_eq!(status, 200, "{answer}");
    for kim in &mut kims {
        assert_eq!(next(kim).await.json()["kind"], "edit");
    }
    // The sender's own messages count as read.
    let path = "/v1/rooms/closed:b/messages?as=lee";
    let (status, answer) = ask(address, ("POST", path), &of_room, &json!({ "body": 0 })).await;
    assert_eq!(
        (status, &answer["code"]),
        (403, &json!("forbidden")),
        "{answer}"
    );

    // Many.
    let many =
        async |token: &str, body: &Value| ask(address, ("POST", "/v1/messages"), token, body).await;
    let messages = json!({ "messages": [
        { "room": "closed:a", "body": 1, "id": "m1" },
        { "room": "closed:a", "body": 2, "as": "lee" },
        { "room": "closed:b", "body": 3 },
        { "room": "nowhere:a", "body": 4 },
        { "body": 5 },
        { "room": "closed:a" },
        7,
        { "room": "closed:a", "body": 6, "id": "m1" },
    ] });
    let (status, answer) = many(&of_room, &messages).await;
    assert_eq!(status, 200, "{answer}");
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 8);
    assert_eq!(
        (&results[0]["id"], &results[0]["room"]),
        (&json!("m1"), &json!("closed:a"))
    );
    assert!(results[1]["cursor"].is_string(), "{answer}");
    for (number, code) in [
        (2, "forbidden"),
        (3, "unknown_namespace"),
        (4, "bad_request"),
        (5, "bad_request"),
        (6, "bad_request"),
    ] {
        assert_eq!(results[number]["error"]["code"], code, "{answer}");
        assert_eq!(results[number]["error"]["retry"], false, "{answer}");
    }
    assert_eq!(results[7]["dup"], true, "{answer}");
    for kim in &mut kims {
        for (body, from) in [(1, "host"), (2, "lee")] {
            let message = next(kim).await.json();
            assert_eq!(
                (&message["body"], &message["from"]),
                (&json!(body), &json!(from))
            );
        }
    }
    for (body, status, code) in [
        (json!({}), 400, "bad_request"),
        (json!([]), 400, "bad_request"),
        (json!({ "messages": vec![json!({}); 101] }), 429, "limit"),
    ] {
        let (got, answer) = many(&admin, &body).await;
        assert_eq!((got, &answer["code"]), (status, &json!(code)), "{answer}");
    }
    let (status, answer) = many(&admin, &json!({ "messages": [] })).await;
    assert_eq!((status, answer), (200, json!({ "results": [] })));

    // Out of a room, and out of all.
    let (status, answer) = delete("/v1/rooms/closed:a/sessions/kim", &without).await;
    assert_eq!(
        (status, &answer["code"]),
        (403, &json!("forbidden")),
        "{answer}"
    );
    for (path, status, code) in [
        ("/v1/rooms/closed:b/sessions/kim", 403, "forbidden"),
        ("/v1/rooms/nowhere:b/sessions/kim", 404, "unknown_namespace"),
        ("/v1/rooms/closed/sessions/kim", 400, "bad_room"),
        ("/v1/rooms/closed:a/sessions/%24api", 400, "bad_request"),
        ("/v1/users/kim/sessions", 403, "forbidden"),
    ] {
        let (got, answer) = delete(path, &of_room).await;
        assert_eq!(
            (got, &answer["code"]),
            (status, &json!(code)),
            "{path}: {answer}"
        );
    }
    knows(address, 2).await;
    let (status, answer) = delete("/v1/rooms/closed:a/sessions/kim", &of_room).await;
    assert_eq!(
        (status, answer),
        (200, json!({ "sessions": 2, "edges": 2, "missing": 0 }))
    );
    for kim in &mut kims {
        assert_eq!(
            next(kim).await.json(),
            json!({ "op": "kicked", "room": "closed:a", "code": "removed" })
        );
        let again = reply(kim, "join", json!({ "room": "closed:a" })).await;
        assert_eq!(again["op"], "joined", "{again}");
    }
    let (status, answer) = delete("/v1/users/kim/sessions", &admin).await;
    assert_eq!(
        (status, answer),
        (200, json!({ "sessions": 2, "edges": 2, "missing": 0 }))
    );
    for kim in &mut kims {
        assert_eq!(next_end(kim).await, 4006);
    }
}

#[tokio::test]
async fn orders_reach_other_regions_unless_they_are_cut_off() {
    let names = ["seoul", "virginia"];
    let mut regions = Regions::start_with(&names, &toml(), Duration::ZERO).await;
    for name in names {
        regions.mesh(name).add_edge().await;
    }
    let seoul = regions.at("seoul").edges[0].address;
    let kim = foreign(json!({ "sub": "kim" }));
    let root = token("root");
    let end = async |user: &str| {
        let path = format!("/v1/users/{user}/sessions");
        let (status, answer) = ask(seoul, ("DELETE", &path), &root, &Value::Null).await;
        assert_eq!(status, 200, "{answer}");
        answer
    };
    knows(seoul, 2).await;
    let (client, _) = Client::connect(regions.at("virginia"), 0, &kim).await;
    assert_eq!(end("kim").await["sessions"], 1);
    assert_eq!(client.end().await, 3503);
    let (mut client, _) = Client::connect(regions.at("virginia"), 0, &kim).await;
    regions.cut("virginia");
    knows(seoul, 1).await;
    // It goes on there, and can be reached when the region is back.
    let published = client
        .call("publish", json!({ "channel": "a", "data": 1 }))
        .await;
    assert!(published["error"].is_null(), "{published}");
    regions.heal("virginia");
    knows(seoul, 2).await;
    assert_eq!(end("kim").await["sessions"], 1);
    assert_eq!(client.end().await, 3503);
}

#[tokio::test]
async fn without_nats_nobody_hears_an_order_and_the_caller_is_told() {
    let mut nats = support::dedicated_nats().await;
    let mesh = Mesh::start(&nats.url(), 1, &toml()).await;
    let address = mesh.edges[0].address;
    let (mut client, _) = Client::connect(&mesh, 0, &foreign(json!({ "sub": "kim" }))).await;
    nats.server.kill().await;
    let root = token("root");
    eventually("the edge knows it", LONG, async || {
        let ready = request(address, "GET", "/readyz", "", "").await;
        match ready.status {
            503 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    let path = "/v1/users/kim/sessions";
    let (status, answer) = ask(address, ("DELETE", path), &root, &Value::Null).await;
    assert_eq!(
        (status, &answer["code"]),
        (503, &json!("unavailable")),
        "{answer}"
    );
    refused(
        address,
        "disconnect",
        json!({ "user": "kim" }),
        100,
        "unavailable",
    )
    .await;
    refused(
        address,
        "publish",
        json!({ "channel": "a", "data": 1 }),
        100,
        "",
    )
    .await;
    nats.server.restart().await.unwrap();
    // What was refused is not made up for.
    eventually("orders are heard again", LONG, async || {
        let path = "/v1/users/nobody/sessions";
        let (status, answer) = ask(address, ("DELETE", path), &root, &Value::Null).await;
        match status {
            200 => Ok(()),
            _ => Err(answer.to_string()),
        }
    })
    .await;
    let stats = client
        .call("presence_stats", json!({ "channel": "a" }))
        .await;
    assert!(stats["error"].is_null(), "{stats}");
    let (status, answer) = ask(address, ("DELETE", path), &root, &Value::Null).await;
    assert_eq!((status, &answer["sessions"]), (200, &json!(1)), "{answer}");
    assert_eq!(client.end().await, 3503);
}

#[tokio::test]
async fn each_of_many_messages_counts_as_a_command() {
    let toml = format!(
        "limits.commands_per_second = 1\nlimits.commands_burst = 3\n{}",
        toml()
    );
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let address = mesh.edges[0].address;
    let messages = vec![json!({ "room": "brief:a", "body": 1 }); 100];
    let body = json!({ "messages": messages });
    let (status, answer) = ask(address, ("POST", "/v1/messages"), &token("kim"), &body).await;
    assert_eq!(status, 200, "{answer}");
    let results = answer["results"].as_array().unwrap();
    assert!(
        results[..3].iter().all(|one| one["id"].is_string()),
        "{answer}"
    );
    let last = &results[99]["error"];
    assert_eq!(
        (&last["code"], &last["retry"]),
        (&json!("rate_limited"), &json!(true)),
        "{answer}"
    );
}
