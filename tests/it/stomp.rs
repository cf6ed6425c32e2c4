//! STOMP where its libraries do not reach: trimmed streams, regions. What the libraries need is tested with them, in
//! `tests/clients/stomp`.

use std::{collections::VecDeque, time::Duration};

use natter::testing::runtime::unix_s;

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, token},
    raw::{CLOSE, Dial, FIN, PING, Raw, TEXT, bearer},
    regions::Regions,
};

/// A client, whose subscriptions have the numbers in which they were made.
struct Client {
    raw: Raw,
    frames: VecDeque<Frame>,
    /// What has come of a WebSocket message that has not ended.
    begun: Vec<u8>,
    subscriptions: u32,
}

/// A frame of the server.
#[derive(Debug)]
struct Frame {
    command: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Frame {
    fn header(&self, name: &str) -> &str {
        let mut headers = self.headers.iter();
        let found = headers.find(|(its, _)| its == name);
        found.map_or("", |(_, value)| value)
    }
}

impl Client {
    async fn connect(mesh: &Mesh, edge: usize) -> Self {
        let dial = Dial {
            path: "/stomp",
            headers: &bearer(&token("kim")),
            ..Dial::default()
        };
        let raw = Raw::dial(mesh.edges[edge].address, dial).await;
        assert_eq!(raw.status(), 101, "{}", raw.head);
        let mut client = Self {
            raw,
            frames: VecDeque::new(),
            begun: Vec::new(),
            subscriptions: 0,
        };
        client.send("CONNECT\naccept-version:1.1\n\n\0").await;
        assert_eq!(client.next().await.command, "CONNECTED");
        client
    }

    async fn send(&mut self, frame: &str) {
        self.raw.text(frame).await;
    }

    async fn next(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return frame;
            }
            let (first, payload) = self.raw.frame().await.expect("the connection ended");
            assert_ne!(first, FIN | CLOSE, "{}", String::from_utf8_lossy(&payload));
            if first == FIN | PING {
                continue;
            }
            self.begun.extend(payload);
            if first & FIN == 0 {
                continue;
            }
            let text = String::from_utf8(std::mem::take(&mut self.begun)).unwrap();
            for text in text.split('\0').filter(|text| !text.trim().is_empty()) {
                let (head, body) = text.split_once("\n\n").unwrap();
                let mut lines = head.lines();
                let headers = |line: &str| {
                    let (name, value) = line.split_once(':').unwrap();
                    (name.to_owned(), value.to_owned())
                };
                self.frames.push_back(Frame {
                    command: lines.next().unwrap().to_owned(),
                    headers: lines.map(headers).collect(),
                    body: body.to_owned(),
                });
            }
        }
    }

    /// Subscribes, and sends a message after it. Returns what comes on this subscription before that message.
    async fn from(&mut self, room: &str, offset: &str) -> Vec<String> {
        self.subscriptions += 1;
        let (id, end) = (self.subscriptions, format!("end {}", self.subscriptions));
        self.send(&format!(
            "SUBSCRIBE\nid:{id}\ndestination:/topic/{room}\nx-stream-offset:{offset}\n\n\0"
        ))
        .await;
        let receipt = self.say(room, &end).await;
        let mut bodies = Vec::new();
        let mut came = false;
        let mut frames = receipt.into_iter();
        while !came {
            let frame = match frames.next() {
                Some(frame) => frame,
                None => self.next().await,
            };
            if frame.command != "MESSAGE" || frame.header("subscription") != id.to_string() {
                continue;
            }
            came = frame.body == end;
            if !came {
                bodies.push(frame.body);
            }
        }
        self.send(&format!("UNSUBSCRIBE\nid:{id}\n\n\0")).await;
        bodies
    }

    /// Sends a message, and returns what comes before its receipt.
    async fn say(&mut self, room: &str, body: &str) -> Vec<Frame> {
        self.send(&format!(
            "SEND\ndestination:/topic/{room}\nreceipt:{body}\ncontent-type:text/plain\n\n{body}\0"
        ))
        .await;
        let mut before = Vec::new();
        loop {
            let frame = self.next().await;
            if frame.header("receipt-id") == body {
                return before;
            }
            before.push(frame);
        }
    }
}

/// The sequence of the last message of `room`, and the second since 1970 after the one in which it was stored.
async fn head(client: &mut Client, room: &str) -> (u64, u64) {
    let id = "head";
    client
        .send(&format!(
            "SUBSCRIBE\nid:{id}\ndestination:/topic/{room}\nx-stream-offset:last\n\n\0"
        ))
        .await;
    let message = client.next().await;
    client.send(&format!("UNSUBSCRIBE\nid:{id}\n\n\0")).await;
    let seq = message.header("cursor").split('.').nth(2).unwrap();
    let ms: u64 = message.header("timestamp").parse().unwrap();
    (seq.parse().unwrap(), ms / 1000 + 1)
}

async fn say_all(client: &mut Client, room: &str, bodies: &[&str]) {
    for body in bodies {
        client.say(room, body).await;
    }
}

/// Waits for the beginning of a second.
async fn second(at: u64) {
    eventually("the second", LONG, async || {
        let now = unix_s();
        (now >= at).then_some(()).ok_or_else(|| now.to_string())
    })
    .await;
}

#[tokio::test]
async fn a_subscription_begins_where_rabbitmqs_words_say() {
    let toml = "nats.partitions = 1\nrooms.ring = '1KiB'\nrooms.replay_max = 20";
    let mut mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut kim = Client::connect(&mesh, 0).await;
    let room = "chat:a";
    let nothing: [&str; 0] = [];
    assert_eq!(kim.from("chat:empty", "last").await, nothing);
    assert_eq!(kim.from("chat:empty", "last").await, ["end 1"]);

    say_all(&mut kim, room, &["1", "2", "3"]).await;
    let (third, after) = head(&mut kim, room).await;
    second(after).await;
    say_all(&mut kim, room, &["4", "5"]).await;
    assert_eq!(kim.from(room, "last").await, ["5"]);
    assert_eq!(
        kim.from(room, &format!("timestamp={after}")).await,
        ["4", "5", "end 3"]
    );
    let all = ["1", "2", "3", "4", "5", "end 3", "end 4"];
    assert_eq!(kim.from(room, "first").await, all);
    assert_eq!(
        kim.from(room, "timestamp=0").await,
        [&all[..], &["end 5"]].concat()
    );
    let from_third = kim.from(room, &format!("offset={third}")).await;
    assert_eq!(from_third[..2], ["3", "4"]);
    assert_eq!(kim.from(room, "offset=0").await.len(), 10);
    let (last, _) = head(&mut kim, room).await;
    assert_eq!(kim.from(room, &format!("offset={last}")).await.len(), 1);
    let (last, _) = head(&mut kim, room).await;
    assert_eq!(
        kim.from(room, &format!("offset={}", last + 1)).await,
        nothing
    );
    let soon = unix_s() + 3600;
    assert_eq!(kim.from(room, &format!("timestamp={soon}")).await, nothing);
    // A room that memory does not hold.
    for word in 0..30 {
        kim.say(room, &format!("{word} {}", "x".repeat(200))).await;
    }
    assert!(kim.from(room, "last").await[0].starts_with("29 "));
    let reset = |reason: &str| [format!("{{\"reason\":\"{reason}\"}}")];
    assert_eq!(kim.from(room, "first").await, reset("replay_max"));
    assert_eq!(kim.from(room, "offset=1").await, reset("replay_max"));
    assert_eq!(kim.from(room, "timestamp=0").await, reset("replay_max"));
    let (last, _) = head(&mut kim, room).await;
    let future = format!("offset={}", last + 100);
    assert_eq!(kim.from(room, &future).await, reset("future"));

    // A stream that has lost its beginning.
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    let stream = format!("ROOMS_{}_0", mesh.config.region);
    let jetstream = async_nats::jetstream::new(nats);
    let stream = jetstream.get_stream(&stream).await.unwrap();
    stream.purge().keep(3).await.unwrap();
    assert_eq!(kim.from(room, "offset=1").await, reset("trimmed"));
    assert_eq!(kim.from(room, "timestamp=0").await, reset("trimmed"));
    assert_eq!(kim.from(room, "first").await.len(), 5);
    let (_, after) = head(&mut kim, room).await;
    second(after).await;
    kim.say(room, "new").await;
    assert_eq!(kim.from(room, &format!("timestamp={after}")).await, ["new"]);
    // An edge that does not have the last message in memory either.
    stream.purge().await.unwrap();
    mesh.add_edge().await;
    let mut kim = Client::connect(&mesh, 1).await;
    assert_eq!(kim.from(room, "last").await, nothing);
    assert_eq!(kim.from(room, "last").await, ["end 1"]);
}

#[tokio::test]
async fn sessions_are_counted_by_their_protocol() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let counts = async |opened: bool| {
        let name = if opened { "opened_total" } else { "active" };
        let name = format!("natter_session_{name}");
        let mut counts = Vec::new();
        for protocol in ["natter.v1", "stomp\"", "stomp-old"] {
            counts.push(mesh.metric(0, &name, protocol).await);
        }
        (counts, mesh.metric(0, &name, "").await)
    };
    let native = mesh.connect(0, "kim").await;
    let stomp = Client::connect(&mesh, 0).await;
    // A session of an old version is one from its CONNECT on.
    assert_eq!(counts(true).await, (vec![1, 1, 0], 2));
    assert_eq!(counts(false).await, (vec![1, 0, 1], 2));
    drop((native, stomp));
    eventually("both are gone", LONG, async || {
        let active = counts(false).await;
        (active == (vec![0, 0, 0], 0))
            .then_some(())
            .ok_or_else(|| format!("{active:?}"))
    })
    .await;
}

#[tokio::test]
async fn bad_logins_wait_and_good_ones_do_not() {
    let toml = "limits.bad_logins_per_second = 1";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let login = async || {
        let dial = Dial {
            path: "/stomp",
            ..Dial::default()
        };
        let mut raw = Raw::dial(address, dial).await;
        raw.text("CONNECT\naccept-version:1.2\npasscode:nonsense\n\n\0")
            .await;
        raw
    };
    let delayed = async || {
        mesh.metric(0, "natter_session_login_delayed_total", "")
            .await
    };
    let refused = async |mut raw: Raw| loop {
        let (first, payload) = raw.frame().await.expect("an answer");
        if first == FIN | TEXT {
            return String::from_utf8(payload).unwrap();
        }
    };
    for _ in 0..20 {
        assert!(refused(login().await).await.starts_with("ERROR\n"));
    }
    assert_eq!(delayed().await, 0);
    let mut waiting = Vec::new();
    eventually("one waits", LONG, async || {
        waiting.push(login().await);
        let count = delayed().await;
        (count > 0).then_some(()).ok_or_else(|| count.to_string())
    })
    .await;
    // Somebody with the same address.
    let mut kim = Client::connect(&mesh, 0).await;
    kim.say("chat:a", "hello").await;
    for raw in waiting {
        assert!(refused(raw).await.contains("message:unauthorized\n"));
    }
}

#[tokio::test]
async fn a_sequence_is_of_the_own_region_and_a_time_of_all() {
    let names = ["seoul", "virginia"];
    let mut regions = Regions::start_with(&names, "nats.partitions = 1", Duration::ZERO).await;
    for name in names {
        regions.mesh(name).add_edge().await;
    }
    let (seoul, virginia) = (regions.at("seoul"), regions.at("virginia"));
    let (mut here, mut there) = (
        Client::connect(seoul, 0).await,
        Client::connect(virginia, 0).await,
    );
    let room = "chat:a";
    // In an order that both regions know: each message is seen by the other region before the next one is sent.
    let mut watching = [
        Client::connect(seoul, 0).await,
        Client::connect(virginia, 0).await,
    ];
    for client in &mut watching {
        client
            .send(&format!(
                "SUBSCRIBE\nid:w\nreceipt:w\ndestination:/topic/{room}\n\n\0"
            ))
            .await;
        assert_eq!(client.next().await.command, "RECEIPT");
    }
    let mut sequences = Vec::new();
    let mut seconds = Vec::new();
    for number in 0..4 {
        let client = [&mut here, &mut there].into_iter().nth(number % 2).unwrap();
        second(seconds.last().copied().unwrap_or_default()).await;
        client.say(room, &number.to_string()).await;
        for (at, client) in watching.iter_mut().enumerate() {
            let message = client.next().await;
            assert_eq!(message.body, number.to_string());
            if at == 0 {
                sequences.push(message.header("cursor").to_owned());
                let ms: u64 = message.header("timestamp").parse().unwrap();
                seconds.push(ms / 1000 + 1);
            }
        }
    }
    let own = |cursor: &str| {
        let mut positions = cursor
            .split('_')
            .map(|at| at.split('.').collect::<Vec<_>>());
        let own = positions.find(|at| at[0] == "seoul").unwrap();
        own[2].parse::<u64>().unwrap()
    };
    let mut reader = Client::connect(seoul, 0).await;
    // The third message is seoul's second one.
    let offset = format!("offset={}", own(&sequences[2]));
    assert_eq!(reader.from(room, &offset).await, ["2", "3"]);
    let timestamp = format!("timestamp={}", seconds[0]);
    let mut since = reader.from(room, &timestamp).await;
    since.sort();
    assert_eq!(since, ["1", "2", "3", "end 1"]);
    there.say(room, "the last").await;
    let is_here = watching[0].next().await;
    assert_eq!(is_here.body, "end 1");
    while watching[0].next().await.body != "the last" {}
    assert_eq!(reader.from(room, "last").await, ["the last"]);
}
