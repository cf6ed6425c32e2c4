//! Who is in a room, as a member and as the bucket tell it.

use std::collections::BTreeMap;

use natter::testing::{
    bus::{Bucket, Connection as Nats, Entry, Reader},
    client::Connection,
};
use serde_json::{Value, json};

use super::{
    LONG,
    calls::{command, reply},
    mesh::Mesh,
};

/// A member that follows who is in a room, as a client would: the list, then the pushes.
pub(crate) struct Follower {
    pub(crate) connection: Connection,
    room: String,
    /// The list, with the time a user came.
    pub(crate) users: BTreeMap<String, u64>,
    /// Every push since, in order.
    pub(crate) pushes: Vec<Value>,
}

impl Follower {
    pub(crate) async fn join(mesh: &Mesh, edge: usize, user: &str, room: &str) -> Self {
        let mut connection = mesh.connect(edge, user).await;
        let joined = reply(
            &mut connection,
            "join",
            json!({"room": room, "presence": true}),
        )
        .await;
        assert_eq!(joined["op"], "joined", "{joined}");
        let mut follower = Self {
            connection,
            room: room.to_owned(),
            users: BTreeMap::new(),
            pushes: Vec::new(),
        };
        follower.load().await;
        follower
    }

    /// Asks for the whole list, page by page.
    pub(crate) async fn load(&mut self) {
        let mut users = BTreeMap::new();
        let mut after = Value::Null;
        loop {
            let fields = json!({"room": self.room, "after": after, "limit": 1000});
            let frames = command(&mut self.connection, "presence", fields).await;
            let (page, pushes) = frames.split_last().unwrap();
            assert_eq!(page["op"], "presence", "{page}");
            for push in pushes {
                self.take(push);
            }
            for user in page["users"].as_array().unwrap() {
                let name = user["user"].as_str().unwrap().to_owned();
                users.insert(name, user["since"].as_u64().unwrap());
            }
            after = page["next"].clone();
            if after.is_null() {
                break;
            }
        }
        self.users = users;
    }

    fn take(&mut self, frame: &Value) {
        if frame["op"] != "presence" || frame["rid"] != Value::Null {
            return;
        }
        assert_eq!(frame["room"], self.room.as_str());
        let user = frame["user"].as_str().map(str::to_owned);
        match (frame["state"].as_str(), user) {
            (Some("join"), Some(user)) => {
                self.users.insert(user, frame["at"].as_u64().unwrap());
            }
            (Some("leave"), Some(user)) => {
                self.users.remove(&user);
            }
            _ => assert!(frame["count"].is_u64(), "{frame}"),
        }
        self.pushes.push(frame.clone());
    }

    /// Follows the pushes until the list is `users`.
    pub(crate) async fn until(&mut self, users: &[&str]) {
        let reached = async {
            while self
                .users
                .keys()
                .map(String::as_str)
                .ne(users.iter().copied())
            {
                let frame = self.connection.next().await.expect("open").json();
                self.take(&frame);
            }
        };
        let in_time = tokio::time::timeout(LONG, reached).await;
        assert!(in_time.is_ok(), "{:?} is not {users:?}", self.users.keys());
    }

    /// Everything that was pushed until now: what comes before the reply to a ping.
    pub(crate) async fn pushed(&mut self) -> Vec<Value> {
        for frame in command(&mut self.connection, "ping", json!({})).await {
            self.take(&frame);
        }
        std::mem::take(&mut self.pushes)
    }
}

/// The bucket of a mesh, read as any NATS client would.
pub(crate) async fn bucket_of(mesh: &Mesh, name: &'static str) -> Bucket {
    let nats = Nats::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(nats.clone(), &mesh.config.nats);
    Bucket::new(nats, reader, &mesh.config, name)
}

/// Keys that are there.
pub(crate) async fn living(bucket: &Bucket, keys: &str) -> Vec<Entry> {
    let mut entries = bucket.scan(keys).await.unwrap();
    entries.retain(|entry| entry.value.is_some());
    entries
}
