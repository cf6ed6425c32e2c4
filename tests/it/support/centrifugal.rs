//! A client of Centrifugo's protocol, in JSON, and tokens of a Centrifugo back end.

use std::collections::VecDeque;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use super::{
    mesh::Mesh,
    raw::{Dial, PING, Raw},
};

/// Secret of the tokens of a Centrifugo back end.
pub(crate) const SECRET: &str = "a secret of centrifugo, of 32 bytes and more";

/// A client of the protocol, in JSON.
pub(crate) struct Client {
    pub(crate) raw: Raw,
    id: u32,
    /// What was read and not looked at.
    unread: VecDeque<Value>,
}

impl Client {
    pub(crate) async fn dial(mesh: &Mesh, edge: usize) -> Self {
        let dial = Dial {
            path: "/connection/websocket",
            ..Dial::default()
        };
        let raw = Raw::dial(mesh.edges[edge].address, dial).await;
        assert_eq!(raw.status(), 101, "{}", raw.head);
        Self {
            raw,
            id: 0,
            unread: VecDeque::new(),
        }
    }

    pub(crate) async fn connect(mesh: &Mesh, edge: usize, token: &str) -> (Self, Value) {
        let mut client = Self::dial(mesh, edge).await;
        let reply = client.call("connect", json!({ "token": token })).await;
        (client, reply["connect"].clone())
    }

    pub(crate) async fn send(&mut self, method: &str, fields: Value) -> u32 {
        self.id += 1;
        let command = json!({ "id": self.id, method: fields });
        self.raw.text(&command.to_string()).await;
        self.id
    }

    /// Sends a command and returns its reply. Pushes before it are kept.
    pub(crate) async fn call(&mut self, method: &str, fields: Value) -> Value {
        let id = self.send(method, fields).await;
        let mut pushes = VecDeque::new();
        loop {
            let next = self.next().await;
            if next["id"] == id {
                pushes.append(&mut self.unread);
                self.unread = pushes;
                return next;
            }
            pushes.push_back(next);
        }
    }

    /// The next reply or push. Pings are answered.
    pub(crate) async fn next(&mut self) -> Value {
        loop {
            if let Some(next) = self.unread.pop_front() {
                if next == json!({}) {
                    self.raw.text("{}").await;
                    continue;
                }
                return next;
            }
            let (first, payload) = self.raw.frame().await.expect("the connection ended");
            if first & 0xf == PING {
                continue;
            }
            assert_eq!(first, 0x81, "{}", String::from_utf8_lossy(&payload));
            let text = String::from_utf8(payload).unwrap();
            let values = text.lines().map(|line| serde_json::from_str(line).unwrap());
            self.unread.extend(values);
        }
    }

    /// The data of the next publication of a channel. Other pushes are dropped.
    pub(crate) async fn publication(&mut self, channel: &str) -> Value {
        loop {
            let next = self.next().await;
            let push = &next["push"];
            if push["channel"] == channel && !push["pub"].is_null() {
                return push["pub"]["data"].clone();
            }
        }
    }

    /// The code of the close. What comes before it is dropped.
    pub(crate) async fn end(mut self) -> u16 {
        self.raw.until_close().await.1
    }
}

/// A token of a Centrifugo back end.
pub(crate) fn foreign(claims: Value) -> String {
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    encode(&Header::new(Algorithm::HS256), &claims, &key).unwrap()
}
