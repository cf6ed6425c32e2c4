//! Clients of two protocols in one room of a real edge on a real nats-server.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use figment::providers::{Format as _, Toml};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::SUBPROTOCOL;
use crate::{
    auth::{Claims, Grant, Right, issue},
    codec::native,
    config::Config,
    edge::Edge,
    mesh::provision::{Options, connect, provision},
    runtime::{Phase, unix_s},
    servers::{Binaries, Launcher, NatsOptions, NatsServer, Sources, free_port},
};

const SECRET: &str = "a secret of the tests, long enough for HS256";
const LONG: Duration = Duration::from_secs(60);

/// A WebSocket by hand.
struct Socket(TcpStream);

impl Socket {
    async fn open(edge: SocketAddr, subprotocol: &str, user: &str) -> Self {
        let mut claims = Claims::new(user, unix_s() + 3600);
        claims.grants = vec![Grant::new("chat:*", &[Right::Read, Right::Write])];
        let token = issue(&claims, SECRET).unwrap();
        let mut stream = TcpStream::connect(edge).await.unwrap();
        let request = format!(
            "GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: {subprotocol}\r\n\
             authorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains(subprotocol), "{head}");
        Self(stream)
    }

    async fn send(&mut self, text: &str) {
        // A mask of zeros changes nothing.
        let length = u8::try_from(text.len()).ok().filter(|length| *length < 126);
        let mut frame = vec![0x81, 0x80 | length.unwrap_or(126)];
        if length.is_none() {
            frame.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
        }
        frame.extend([0; 4]);
        frame.extend(text.as_bytes());
        self.0.write_all(&frame).await.unwrap();
    }

    async fn next(&mut self) -> Value {
        let read = async {
            let first = self.0.read_u8().await.unwrap();
            assert_eq!(first, 0x81, "a text frame");
            let length = match self.0.read_u8().await.unwrap() {
                126 => usize::from(self.0.read_u16().await.unwrap()),
                length => usize::from(length),
            };
            let mut payload = vec![0; length];
            self.0.read_exact(&mut payload).await.unwrap();
            serde_json::from_slice(&payload).unwrap()
        };
        timeout(LONG, read).await.unwrap()
    }
}

async fn start() -> (NatsServer, Edge, SocketAddr, tempfile::TempDir) {
    // Beside the folder in which the tests lie; `cargo test` makes it.
    let tests = std::env::current_exe().unwrap();
    let guard = tests.ancestors().nth(2).unwrap().join("natter");
    assert!(guard.exists(), "{}: build it first", guard.display());
    let sources = Sources {
        nats_server: PathBuf::new(),
        mongod: PathBuf::new(),
        cache: PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".natter/bin"),
        guard: guard.clone(),
    };
    let binaries = Binaries::locate(&sources, false, &|_| {}).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let port = free_port().unwrap();
    let toml = format!(
        "region = \"seoul\"\nauth.hs256_secret = \"{SECRET}\"\nedge.listen = \"127.0.0.1:{port}\"\nedge.shards = 1\n"
    );
    let mut config = Config::with_defaults(Toml::string(&toml)).unwrap();
    let options = NatsOptions::new(&config, binaries.nats_server, dir.path().join("nats"), 0);
    let launcher = Launcher { guard, held: None };
    let nats = NatsServer::start(launcher, options).await.unwrap();
    config.nats.url = nats.url();
    let client = connect(&config.nats).await.unwrap();
    provision(&client, &config, Options::default())
        .await
        .unwrap();
    let listen = config.edge.listen;
    let edge = Edge::start(config).await.unwrap();
    let ready = edge.lifecycle().reached(Phase::Ready);
    timeout(LONG, ready).await.unwrap();
    (nats, edge, listen, dir)
}

#[tokio::test]
async fn members_of_two_protocols_are_in_the_same_room() {
    let (_nats, edge, address, _dir) = start().await;
    let mut kim = Socket::open(address, native::SUBPROTOCOL, "kim").await;
    let mut lee = Socket::open(address, SUBPROTOCOL, "lee").await;
    kim.send(r#"{"op":"join","rid":1,"room":"chat:a"}"#).await;
    assert_eq!(kim.next().await["op"], "joined");
    // Two commands in one message, one of them no command.
    lee.send("{\"n\":1,\"do\":\"enter\",\"in\":\"chat:a\"}\n{\"n\":2,\"do\":\"sing\"}")
        .await;
    let entered = lee.next().await;
    assert_eq!((&entered["n"], &entered["missed"]), (&json!(1), &json!(0)));
    let no = lee.next().await;
    assert_eq!((&no["n"], &no["no"]), (&json!(2), &json!("unknown_op")));

    // Each is told in its own words, with the same id, order, content and cursor.
    kim.send(r#"{"op":"send","rid":2,"room":"chat:a","id":"m1","body":{"text":"안녕"}}"#)
        .await;
    let said = lee.next().await;
    assert_eq!((&said["who"], &said["key"]), (&json!("kim"), &json!("m1")));
    assert_eq!(said["what"], json!({"text": "안녕"}));
    let told = until(&mut kim, "msg").await;
    assert_eq!(told["cursor"], said["at"]);
    lee.send(r#"{"n":3,"do":"say","in":"chat:a","key":"m2","what":"hi"}"#)
        .await;
    let told = until(&mut kim, "msg").await;
    assert_eq!(
        (&told["from"], &told["id"], &told["body"]),
        (&json!("lee"), &json!("m2"), &json!("hi"))
    );
    let answers = [lee.next().await, lee.next().await];
    let (ack, push) = match answers[0].get("n") {
        Some(_) => (&answers[0], &answers[1]),
        None => (&answers[1], &answers[0]),
    };
    assert_eq!(
        (&ack["n"], &ack["key"], &ack["again"]),
        (&json!(3), &json!("m2"), &json!(false))
    );
    assert_eq!(push["at"], told["cursor"]);

    // Away for two messages, and back with the cursor, of which the other protocol has told too.
    drop(lee);
    for (rid, id) in [(4, "m3"), (5, "m4")] {
        let send = json!({"op": "send", "rid": rid, "room": "chat:a", "id": id, "body": id});
        kim.send(&send.to_string()).await;
        assert_eq!(until(&mut kim, "msg").await["id"], id);
    }
    let mut lee = Socket::open(address, SUBPROTOCOL, "lee").await;
    let enter = json!({"n": 1, "do": "enter", "in": "chat:a", "from": told["cursor"]});
    lee.send(&enter.to_string()).await;
    let entered = lee.next().await;
    assert_eq!(
        (&entered["missed"], &entered["lost"]),
        (&json!(2), &Value::Null)
    );
    assert_eq!(
        (
            lee.next().await["key"].clone(),
            lee.next().await["key"].clone()
        ),
        (json!("m3"), json!("m4"))
    );
    // Nothing else was told: the next frame is the answer.
    lee.send(r#"{"n":2,"do":"alive"}"#).await;
    assert_eq!(lee.next().await["n"], 2);
    drop((kim, lee));
    edge.drain().await.unwrap();
}

/// The next frame of `natter.v1` with this `op`.
async fn until(socket: &mut Socket, op: &str) -> Value {
    loop {
        let frame = socket.next().await;
        if frame["op"] == op {
            return frame;
        }
    }
}
