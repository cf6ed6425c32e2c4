//! How many sessions and how fast, and what the edge answers over HTTP.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use natter::testing::telemetry::metrics::{Counter, Gauge};
use serde_json::{Value, json};

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, token},
    raw::{Dial, FIN, Raw, TEXT, bearer, frame, request},
};

async fn counted(mesh: &Mesh, name: &str, label: &str) -> u64 {
    mesh.metric(0, name, &format!("\"{label}\"")).await
}

/// Connects until there is a place again, as somebody has just left.
async fn eventually_open(address: SocketAddr, user: &str) -> Raw {
    eventually("a place is given back", LONG, async || {
        let mut raw = Raw::open(address, &token(user)).await;
        raw.text(r#"{"op":"ping","rid":1}"#).await;
        match raw.frame().await {
            Some((first, _)) if first == FIN | TEXT => Ok(raw),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test]
async fn a_user_has_so_many_sessions_on_an_edge() {
    let mesh = Mesh::start(support::nats_url(), 1, "limits.sessions_per_user = 2").await;
    let address = mesh.edges[0].address;
    let mut first = Raw::open(address, &token("kim")).await;
    let mut second = Raw::dial(address, Dial::default()).await;
    let auth = json!({"op": "auth", "rid": 1, "token": token("kim")});
    assert_eq!(second.call(auth.clone()).await["op"], "authed");
    // One more, by header and by frame.
    let mut third = Raw::open(address, &token("kim")).await;
    assert_eq!(
        third.until_close().await,
        (vec![], 4005, "too_many".to_owned())
    );
    let mut third = Raw::dial(address, Dial::default()).await;
    third.text(&auth.to_string()).await;
    let (frames, code, _) = third.until_close().await;
    assert_eq!(code, 4005);
    assert_eq!(frames.len(), 1);
    assert_eq!(
        (&frames[0]["rid"], &frames[0]["code"]),
        (&json!(1), &json!("limit"))
    );
    assert_eq!(
        counted(&mesh, "natter_session_refused_total", "per_user").await,
        2
    );
    // Others have their own places, those that were there stay, and a place is given back.
    Raw::open(address, &token("lee"))
        .await
        .call(json!({"op": "ping", "rid": 1}))
        .await;
    for session in [&mut first, &mut second] {
        assert_eq!(
            session.call(json!({"op": "ping", "rid": 2})).await["op"],
            "pong"
        );
    }
    drop(first);
    eventually_open(address, "kim").await;
}

#[tokio::test]
async fn an_address_has_so_many_sessions_on_an_edge() {
    let mesh = Mesh::start(support::nats_url(), 1, "limits.sessions_per_ip = 2").await;
    let address = mesh.edges[0].address;
    let first = Raw::open(address, &token("kim")).await;
    // A connection without a token takes a place too.
    let mut second = Raw::dial(address, Dial::default()).await;
    let mut third = Raw::open(address, &token("lee")).await;
    assert_eq!(
        third.until_close().await,
        (vec![], 4005, "too_many".to_owned())
    );
    assert_eq!(
        counted(&mesh, "natter_session_refused_total", "per_address").await,
        1
    );
    let headers = bearer(&token("lee"));
    let elsewhere = Dial {
        headers: &headers,
        from: Some(SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0))),
        ..Dial::default()
    };
    let mut other = Raw::dial(address, elsewhere).await;
    assert_eq!(
        other.call(json!({"op": "ping", "rid": 1})).await["op"],
        "pong"
    );
    let auth = json!({"op": "auth", "rid": 1, "token": token("kim")});
    assert_eq!(second.call(auth).await["op"], "authed");
    drop(first);
    eventually_open(address, "lee").await;
}

#[tokio::test]
async fn who_goes_on_too_fast_or_with_nonsense_is_closed() {
    let toml = "limits.commands_per_second = 1\nlimits.commands_burst = 10\nedge.shards = 1";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let mut kim = Raw::open(address, &token("kim")).await;
    // One a second gets through, and the count begins anew with it: a client that goes on for ever is closed in the end.
    let ping = frame(FIN | TEXT, br#"{"op":"ping","rid":1}"#);
    kim.write(&ping.repeat(3000)).await;
    let (frames, code, _) = kim.until_close().await;
    assert_eq!(code, 4005);
    let pongs = frames.iter().filter(|frame| frame["op"] == "pong").count();
    assert!(pongs >= 10, "{pongs} pongs");
    let refused = &frames[frames.len() - 1000..];
    for error in refused {
        assert_eq!(error["code"], "rate_limited", "{error}");
        assert_eq!(error["retry"], json!(true));
    }
    assert_eq!(
        counted(&mesh, "natter_session_closed_total", "too_many").await,
        1
    );
}

#[tokio::test]
async fn who_does_not_speak_the_protocol_is_closed() {
    let mesh = Mesh::start(support::nats_url(), 1, "edge.shards = 1").await;
    let mut kim = Raw::open(mesh.edges[0].address, &token("kim")).await;
    // Frames without a `rid` are not commands. 31 in a row are borne, again and again; the 32nd is not.
    let nonsense = ["", "GET / HTTP/1.1", "{", "[]", "null", r#"{"op":"ping"}"#];
    let noise = |n: usize| -> Vec<u8> {
        let frames = nonsense.iter().cycle().take(n);
        frames
            .flat_map(|text| frame(FIN | TEXT, text.as_bytes()))
            .collect()
    };
    for _ in 0..3 {
        kim.write(&noise(31)).await;
        kim.text(r#"{"op":"ping","rid":1}"#).await;
        for _ in 0..31 {
            let error = kim.json().await;
            assert_eq!(
                (&error["op"], &error["rid"]),
                (&json!("error"), &Value::Null)
            );
            let code = error["code"].as_str().unwrap();
            assert!(["bad_json", "bad_request"].contains(&code), "{error}");
        }
        assert_eq!(kim.json().await["op"], "pong");
    }
    kim.write(&noise(40)).await;
    let (frames, code, reason) = kim.until_close().await;
    assert_eq!(
        (frames.len(), code, reason.as_str()),
        (32, 4004, "protocol_error")
    );
    assert_eq!(
        counted(&mesh, "natter_session_closed_total", "protocol_error").await,
        1
    );
}

#[tokio::test]
async fn http_answers_in_one_shape_whatever_is_asked() {
    let mesh = Mesh::start(
        support::nats_url(),
        1,
        "centrifugal.api_key = 'a-key-of-the-server-api'",
    )
    .await;
    let address = mesh.edges[0].address;
    let token = bearer(&token("kim"));
    for path in ["/v1", "/nothing", "/v2/rooms/chat:a/messages", "/ws/"] {
        for method in ["GET", "POST", "DELETE"] {
            let answer = request(address, method, path, &token, "").await;
            assert_eq!(answer.status, 404, "{method} {path}");
            assert_eq!(answer.json()["code"], "bad_request", "{method} {path}");
            assert_eq!(answer.json()["retry"], json!(false));
        }
    }
    // A path that is there, but not for this method.
    for (method, path, allowed) in [
        ("PUT", "/v1/rooms/chat:a/messages", "get,head,post,delete"),
        ("PUT", "/v1/rooms", "get,head,post"),
        ("POST", "/healthz", "get,head"),
        ("POST", "/ws", "get,head"),
    ] {
        let answer = request(address, method, path, &token, "").await;
        assert_eq!(answer.status, 405, "{method} {path}");
        assert_eq!(answer.header("allow"), Some(allowed), "{method} {path}");
        assert_eq!(answer.json()["code"], "bad_request", "{method} {path}");
    }
    for path in ["/ws", "/connection/websocket", "/stomp"] {
        let plain = request(address, "GET", path, &token, "").await;
        assert_eq!(
            (plain.status, &plain.json()["code"]),
            (426, &json!("bad_request")),
            "{path}"
        );
    }
    for path in ["/healthz", "/readyz"] {
        let answer = request(address, "GET", path, "", "").await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }

    let answer = request(address, "GET", "/v1/openapi.json", "", "").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let document = answer.json();
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(
        paths,
        [
            "/api/{method}",
            "/connection/http_stream",
            "/connection/sse",
            "/connection/websocket",
            "/emulation",
            "/healthz",
            "/metrics",
            "/readyz",
            "/stomp",
            "/v1/devices",
            "/v1/devices/{device}",
            "/v1/events",
            "/v1/inbox",
            "/v1/inbox/{room}",
            "/v1/messages",
            "/v1/openapi.json",
            "/v1/rooms",
            "/v1/rooms/{room}",
            "/v1/rooms/{room}/events",
            "/v1/rooms/{room}/members/{user}",
            "/v1/rooms/{room}/messages",
            "/v1/rooms/{room}/pins/{message}",
            "/v1/rooms/{room}/poll",
            "/v1/rooms/{room}/presence",
            "/v1/rooms/{room}/read",
            "/v1/rooms/{room}/readers",
            "/v1/rooms/{room}/search",
            "/v1/rooms/{room}/sessions/{user}",
            "/v1/rooms/{room}/uploads",
            "/v1/rooms/{room}/uploads/{upload}",
            "/v1/search",
            "/v1/tickets",
            "/v1/unread",
            "/v1/uploads/{upload}",
            "/v1/users/{user}/blocks/{other}",
            "/v1/users/{user}/messages",
            "/v1/users/{user}/sessions",
            "/ws",
        ]
    );
    // Each of them is a route: none answers 404. Those of uploads are off here.
    for path in paths.iter().filter(|path| !path.contains("/uploads")) {
        let path = path.replace("{room}", "chat:a");
        assert_ne!(
            request(address, "GET", &path, "", "").await.status,
            404,
            "{path}"
        );
    }

    let text = request(address, "GET", "/metrics", "", "").await.body;
    let exported = |name: &str| {
        text.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        })
    };
    // Those of workers and hooks have the names of the configured ones, and here are none.
    let is_here =
        |name: &str| !name.starts_with("natter.worker.") && !name.starts_with("natter.hook.");
    for counter in Counter::LIST {
        let name = format!("{}_total", counter.name.replace('.', "_"));
        assert_eq!(exported(&name), is_here(counter.name), "{name}:\n{text}");
    }
    for gauge in Gauge::LIST {
        let unit = match gauge.unit {
            "By" => "_bytes",
            "s" => "_seconds",
            _ => "",
        };
        let name = format!("{}{unit}", gauge.name.replace('.', "_"));
        assert_eq!(exported(&name), is_here(gauge.name), "{name}:\n{text}");
    }
}

#[tokio::test]
async fn an_edge_without_nats_is_alive_and_not_ready() {
    let nats = support::dedicated_nats().await;
    let mut nats = nats;
    let mesh = Mesh::start(&nats.url(), 1, "").await;
    let address = mesh.edges[0].address;
    nats.server.kill().await;
    eventually("the edge is not ready", LONG, async || {
        match request(address, "GET", "/readyz", "", "").await.status {
            503 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    assert_eq!(
        request(address, "GET", "/healthz", "", "").await.status,
        200
    );
    nats.server.restart().await.unwrap();
    eventually("the edge is ready", LONG, async || {
        match request(address, "GET", "/readyz", "", "").await.status {
            200 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
}

#[tokio::test]
async fn http_requests_of_a_user_have_the_same_rate_as_commands() {
    let toml = "limits.commands_per_second = 1\nlimits.commands_burst = 3";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let post = async |user: &str| {
        let path = "/v1/rooms/chat:a/messages";
        request(
            address,
            "POST",
            path,
            &bearer(&token(user)),
            r#"{"body":1}"#,
        )
        .await
    };
    let refused = eventually(
        "a request is too fast",
        Duration::from_secs(30),
        async || {
            let answer = post("kim").await;
            match answer.status {
                429 => Ok(answer),
                other => Err(other.to_string()),
            }
        },
    )
    .await;
    assert_eq!(refused.json()["code"], "rate_limited");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(
        post("lee").await.status,
        200,
        "another user has a rate of their own"
    );
}
