//! HTTP connections that do what no well-behaved client does: half closed, idle, slow, gone.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, http, token},
    raw::bearer,
    signal,
};

/// A request as text.
fn request(method: &str, path: &str, body: &str) -> String {
    let (token, length) = (bearer(&token("kim")), body.len());
    format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{token}Content-Length: {length}\r\n\r\n{body}")
}

/// A publish whose body comes in chunks.
fn chunked(id: &str) -> String {
    let (token, body) = (
        bearer(&token("kim")),
        json!({"id": id, "body": "x"}).to_string(),
    );
    let length = body.len();
    format!(
        "POST /v1/rooms/chat:a/messages HTTP/1.1\r\nHost: x\r\n{token}Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
    )
}

fn publish(id: &str) -> String {
    let body = json!({"id": id, "body": "x"}).to_string();
    request("POST", "/v1/rooms/chat:a/messages", &body)
}

/// Sends everything, shuts down the sending side, and gives the status of each answer.
async fn half_closed(address: SocketAddr, text: &str) -> Vec<String> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    statuses(&rest(&mut stream).await)
}

/// What comes until the connection ends.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A reset is an end too.
    let read = timeout(LONG, stream.read_to_end(&mut text)).await;
    let _reset = read.expect("the connection does not end");
    String::from_utf8(text).unwrap()
}

fn statuses(text: &str) -> Vec<String> {
    let words = text.split("HTTP/1.1 ").skip(1);
    words.map(|rest| rest.chars().take(3).collect()).collect()
}

#[tokio::test]
async fn a_half_closed_request_gets_its_answer() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let address = mesh.edges[0].address;
    let unread = request("POST", "/v1/unread", r#"{"rooms":["chat:a"]}"#);
    let presence = request("GET", "/v1/rooms/chat:a/presence", "");
    let readers = request("GET", "/v1/rooms/chat:a/readers", "");
    for round in 0..10 {
        let id = |n: u32| format!("{round}-{n}");
        for (what, text, answers) in [
            ("publish", publish(&id(0)), 1),
            ("chunked", chunked(&id(1)), 1),
            ("unread", unread.clone(), 1),
            ("presence", presence.clone(), 1),
            ("readers", readers.clone(), 1),
            (
                "pipelined",
                publish(&id(2)) + &presence + &chunked(&id(3)),
                3,
            ),
        ] {
            let got = half_closed(address, &text).await;
            assert_eq!(got, vec!["200"; answers], "{what}, round {round}");
        }
    }
    // What ends in the middle is not taken for the whole.
    for text in [publish("cut"), chunked("cut")] {
        for cut in [1, 5, 20] {
            let text = text.get(..text.len() - cut).unwrap();
            assert_eq!(half_closed(address, text).await, ["400"], "{text}");
        }
    }
}

#[tokio::test]
async fn a_half_closed_request_gets_its_answer_from_an_edge_that_drains() {
    let nats = support::dedicated_nats().await;
    let mut mesh = Mesh::start(&nats.url(), 1, "edge.drain_spread = '0s'").await;
    let address = mesh.edges[0].address;
    let server = nats.server.pid().unwrap();
    signal(server, Signal::STOP);
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(publish("1").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    // Who came later is answered: it has been read.
    for _ in 0..2 {
        http(address, "GET", "/healthz", "", "").await.unwrap();
    }
    mesh.edges[0].process.terminate();
    refuses(address).await;
    signal(server, Signal::CONT);
    // On a machine that is slow NATS may have been away for too long.
    let got = statuses(&rest(&mut stream).await);
    assert!(got == ["200"] || got == ["503"], "{got:?}");
    exits(&mut mesh, 0).await;
}

/// Waits until the edge accepts no connections.
async fn refuses(address: SocketAddr) {
    eventually(
        "it accepts nothing",
        LONG,
        async || match TcpStream::connect(address).await {
            Err(_refused) => Ok(()),
            Ok(_) => Err("still accepted".to_owned()),
        },
    )
    .await;
}

async fn exits(mesh: &mut Mesh, code: i32) {
    let status = timeout(LONG, mesh.edges[0].process.exited()).await;
    let status = status.expect("the edge ends").unwrap();
    assert_eq!(status.code(), Some(code), "{status}");
}

/// Requests whose bodies stop, each with what it would change.
fn stopped() -> Vec<(&'static str, String)> {
    let cut = |text: String, by: usize| text.get(..text.len() - by).unwrap().to_owned();
    let read = request("PUT", "/v1/rooms/chat:a/read", r#"{"cursor":"x"}"#);
    let unread = request("POST", "/v1/unread", r#"{"rooms":["chat:a"]}"#);
    let head = |text: String| format!("{}\r\n\r\n", text.split_once("\r\n\r\n").unwrap().0);
    let waits = publish("s").replace("\r\nContent", "\r\nExpect: 100-continue\r\nContent");
    vec![
        ("nothing of it came", head(publish("s"))),
        ("all but a byte", cut(publish("s"), 1)),
        ("a chunk is cut", cut(chunked("s"), 10)),
        ("the last chunk is missing", cut(chunked("s"), 5)),
        ("it waits to be asked", head(waits)),
        ("a read marker", cut(read, 3)),
        ("unread counts", cut(unread, 3)),
    ]
}

#[tokio::test]
async fn a_body_that_stops_arriving_is_given_up() {
    let toml = "http.body_timeout = '1s'\nhttp.header_timeout = '1s'\nhttp.keep_alive = '1s'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    for (what, text) in stopped() {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        let answer = answer.trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n");
        assert_eq!(statuses(answer), ["408"], "{what}: {answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.to_lowercase().contains("connection: close"),
            "{what}: {head}"
        );
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (&body["code"], &body["retry"]),
            (&json!("timeout"), &json!(true)),
            "{what}"
        );
    }
    // Nothing of it was done.
    let page = mesh.get(0, "/v1/rooms/chat:a/messages").await.unwrap();
    assert_eq!(page["messages"], json!([]));
    // A slow header, and an idle connection, as configured.
    for text in ["", "GET /readyz HTT"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        assert_eq!(rest(&mut stream).await, "", "{text:?}");
    }
}

/// Bodies, headers, idle connections, answers that nobody takes, and a handshake with a body that does not come.
#[tokio::test]
async fn clients_that_stand_still_do_not_hold_up_a_drain() {
    let mut mesh = Mesh::start(support::nats_url(), 1, "edge.drain_spread = '0s'").await;
    let address = mesh.edges[0].address;
    let openapi = request("GET", "/v1/openapi.json", "");
    let handshake = "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nContent-Length: 9\r\n\r\n";
    let mut others = vec![
        ("a header", openapi.get(..20).unwrap().to_owned()),
        ("a header behind a request", openapi.clone() + "GET /readyz"),
        ("idle", openapi.clone()),
        ("a handshake with a body", handshake.to_owned()),
    ];
    others.extend(stopped());
    let mut open = Vec::new();
    for (what, text) in others {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        open.push((what, stream));
    }
    // More answers than the sockets between take; the requests themselves stop being taken then.
    let mut greedy = TcpStream::connect(address).await.unwrap();
    let many = openapi.repeat(1000);
    let mut sent = 0;
    while let Ok(Ok(more)) = timeout(
        Duration::from_secs(1),
        greedy.write(many.as_bytes().get(sent..).unwrap()),
    )
    .await
        && more > 0
    {
        sent += more;
    }
    // All have been read.
    http(address, "GET", "/readyz", "", "").await.unwrap();
    let begun = Instant::now();
    mesh.edges[0].process.terminate();
    exits(&mut mesh, 0).await;
    println!("drained in {:?}", begun.elapsed());
    drop((open, greedy));
}

#[tokio::test]
async fn the_history_service_serves_as_edges_do() {
    let toml = "http.header_timeout = '1s'";
    let mut mesh =
        Mesh::with_history(support::nats_url(), support::mongodb_url(), (0, 1), toml).await;
    let address = mesh.workers[0].address;
    for path in ["/healthz", "/readyz", "/metrics"] {
        let get = request("GET", path, "");
        assert_eq!(half_closed(address, &get).await, ["200"], "{path}");
        assert_eq!(
            half_closed(address, &get.repeat(3)).await,
            ["200"; 3],
            "{path}"
        );
    }
    // It had no limit at all for a header.
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(b"GET /healthz HT").await.unwrap();
    assert_eq!(rest(&mut slow).await, "");
    let idle = TcpStream::connect(address).await.unwrap();
    let status = mesh.workers[0].process.stop().await.expect("it ran");
    assert_eq!(status.code(), Some(0), "{status}");
    drop(idle);
}
