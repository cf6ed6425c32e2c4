//! A large ingest while workers and mongod are killed and stopped: MongoDB ends with exactly what was acknowledged, and
//! live sessions notice nothing.
//!
//! `NATTER_TEST_HISTORY_MESSAGES=200000` is the long run: mongod is stopped for a minute in it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use natter::testing::{
    bus::message_key,
    client::{Connection, Frame},
    model::{Cursor, Place, RoomId},
    store::{Change, Entry, Folded, Said, Store, What},
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{sync::Semaphore, task::JoinSet, time::sleep};

use super::{caught_up, keys};
use crate::support::{LONG, dedicated_mongod, dedicated_nats, eventually, mesh::Mesh, signal};

const MESSAGES: usize = 8000;
const LONG_RUN: usize = 100_000;
const ROOMS: usize = 50;
const PUBLISHERS: usize = 8;
/// Commands of one publisher that wait for their reply.
const WINDOW: usize = 32;
const STAGES: usize = 10;

/// What fails in a stage, from the middle of it to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    Worker(usize),
    MongodKilled,
    MongodStopped,
}

const FAULTS: [Fault; STAGES] = [
    Fault::Nothing,
    Fault::Worker(0),
    Fault::MongodKilled,
    Fault::Worker(1),
    Fault::MongodStopped,
    Fault::Worker(0),
    Fault::MongodKilled,
    Fault::Worker(1),
    Fault::Worker(0),
    Fault::Nothing,
];

/// What all tasks share.
struct Shared {
    /// How many more may be published.
    quota: Semaphore,
    /// Acknowledged, without repeats.
    acked: AtomicUsize,
    board: Mutex<Board>,
}

#[derive(Default)]
struct Board {
    /// What the acknowledgements say is in the log.
    entries: Vec<Entry>,
    /// Messages that were sent, by room: author and id.
    sent: Vec<Vec<(String, String)>>,
    /// Acknowledged messages and changes, by room.
    acked: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct Fields {
    room: String,
    id: String,
    body: Box<RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mentions: Vec<String>,
}

/// A command that waits for its reply.
struct Sent {
    room: usize,
    fields: Fields,
    /// What it is about, unless it is a message.
    change: Option<(String, Change)>,
    /// Sent again with another body: the first counts.
    repeat: bool,
}

#[derive(Deserialize)]
struct Acked {
    cursor: String,
    ts: u64,
    dup: bool,
}

struct Publisher {
    user: String,
    rng: StdRng,
    shared: Arc<Shared>,
    connection: Connection,
    waiting: HashMap<u64, Sent>,
    refused: Vec<Sent>,
    count: usize,
    /// Own messages that are acknowledged.
    own: Vec<(usize, String)>,
}

fn room_name(room: usize) -> String {
    format!("chat:history-{room}")
}

fn raw(text: String) -> Box<RawValue> {
    RawValue::from_string(text).unwrap()
}

impl Publisher {
    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut over = false;
        while !over || !self.waiting.is_empty() || !self.refused.is_empty() {
            let free = self.waiting.len() < WINDOW && !over;
            tokio::select! {
                frame = self.connection.next() => {
                    let frame = frame.unwrap_or_else(|| panic!("cut: {:?}", self.connection.end()));
                    self.on_frame(&frame);
                }
                permit = shared.quota.acquire(), if free => match permit {
                    Ok(permit) => {
                        permit.forget();
                        let next = self.next();
                        self.send(next).await;
                    }
                    Err(_closed) => over = true,
                },
                // The pause of a client before it tries again.
                () = sleep(Duration::from_millis(50)), if !self.refused.is_empty() => {
                    for sent in std::mem::take(&mut self.refused) {
                        self.send(sent).await;
                    }
                }
            }
        }
    }

    async fn send(&mut self, sent: Sent) {
        let rid = self.connection.commands().send("send", &sent.fields);
        let rid = rid.await.unwrap();
        self.waiting.insert(rid, sent);
    }

    /// Makes something up.
    fn next(&mut self) -> Sent {
        self.count += 1;
        let n = self.count;
        let rng = &mut self.rng;
        let room = rng.random_range(0..ROOMS);
        let mut fields = Fields {
            room: room_name(room),
            id: format!("{n}"),
            // As nobody would write it: it must come back as it is.
            body: raw(format!(
                "{{ \"n\":{n}.50,\"text\" : \"안녕 {} word{n}\"}}",
                rng.random_range(0..9999)
            )),
            kind: None,
            target: None,
            reply_to: None,
            mentions: Vec::new(),
        };
        let sent = |fields, change| Sent {
            room,
            fields,
            change,
            repeat: false,
        };
        let roll = rng.random_range(0..100);
        let mut board = self.shared.board.lock();
        let known = &board.sent[room];
        let any = (!known.is_empty()).then(|| known[rng.random_range(0..known.len())].clone());
        match (roll, any) {
            (60..70, _) if !self.own.is_empty() => {
                let (room, id) = self.own[rng.random_range(0..self.own.len())].clone();
                fields.room = room_name(room);
                let key = message_key(&fields.room, &self.user, &id);
                fields.target = Some(id);
                let change = if roll < 68 {
                    fields.kind = Some("edit");
                    Change::Edit {
                        body: fields.body.get().to_owned(),
                        mentions: None,
                    }
                } else {
                    fields.kind = Some("delete");
                    fields.body = raw("null".to_owned());
                    Change::Delete
                };
                Sent {
                    room,
                    ..sent(fields, Some((key, change)))
                }
            }
            (70..85, Some((author, id))) => {
                let key = message_key(&fields.room, &author, &id);
                fields.kind = Some("reaction");
                fields.target = Some(format!("{author}/{id}"));
                let on = rng.random_bool(0.7);
                let reaction = ["👍", "🎉"][rng.random_range(0..2)].to_owned();
                fields.body = raw(format!("{{\"key\":\"{reaction}\",\"remove\":{}}}", !on));
                sent(fields, Some((key, Change::React { key: reaction, on })))
            }
            (85..92, Some((author, id))) => {
                let key = message_key(&fields.room, &author, &id);
                fields.kind = Some("annotation");
                fields.target = Some(format!("{author}/{id}"));
                fields.body = raw(format!("{{\"emotion\": {{ \"n\" :{n}}}}}"));
                let annotation = ("emotion".to_owned(), format!("{{ \"n\" :{n}}}"));
                sent(fields, Some((key, Change::Annotate(vec![annotation]))))
            }
            (92..95, _) if !self.own.is_empty() => {
                let (room, id) = self.own[rng.random_range(0..self.own.len())].clone();
                fields.room = room_name(room);
                fields.id = id;
                Sent {
                    room,
                    repeat: true,
                    ..sent(fields, None)
                }
            }
            (_, any) => {
                if roll % 5 == 0 {
                    fields.reply_to = any.map(|(author, id)| format!("{author}/{id}"));
                    fields.mentions = vec!["lee".to_owned(), "박".to_owned()];
                }
                board.sent[room].push((self.user.clone(), fields.id.clone()));
                sent(fields, None)
            }
        }
    }

    fn on_frame(&mut self, frame: &Frame) {
        let Some(sent) = frame.rid().and_then(|rid| self.waiting.remove(&rid)) else {
            return;
        };
        if let Some(refusal) = frame.refusal() {
            assert!(refusal.retry, "{refusal:?} to {:?}", sent.fields);
            self.refused.push(sent);
            return;
        }
        let acked: Acked = frame.fields().unwrap();
        if sent.repeat {
            assert!(acked.dup, "stored twice: {:?}", sent.fields);
            return;
        }
        if acked.ts == 0 {
            // It is stored, and its time could not be read in time: who wants to know asks again.
            self.refused.push(sent);
            return;
        }
        let cursor: Cursor = acked.cursor.parse().unwrap();
        let position = cursor.positions()[0].clone();
        let Sent {
            room,
            fields,
            change,
            ..
        } = sent;
        let what = match change {
            Some((target, change)) => What::Change { target, change },
            None => {
                self.own.push((room, fields.id.clone()));
                let reply_key = fields.reply_to.as_ref().map(|reference| {
                    let (author, id) = reference.rsplit_once('/').unwrap();
                    message_key(&fields.room, author, id)
                });
                What::Message {
                    key: message_key(&fields.room, &self.user, &fields.id),
                    said: Said {
                        id: fields.id,
                        fingerprint: position.fingerprint.0,
                        body: fields.body.get().to_owned(),
                        reply_to: fields.reply_to,
                        reply_key,
                        mentions: fields.mentions,
                    },
                }
            }
        };
        let entry = Entry {
            room: RoomId::parse(&fields.room).unwrap(),
            place: Place {
                ts: acked.ts,
                origin: position.origin,
                epoch: position.epoch,
                seq: position.seq,
            },
            original_ts: None,
            from: self.user.clone(),
            what,
        };
        let mut board = self.shared.board.lock();
        board.entries.push(entry);
        board.acked[room] += 1;
        drop(board);
        self.shared.acked.fetch_add(1, Ordering::SeqCst);
    }
}

/// Counts what a session in all rooms sees, each message once.
struct Member {
    seen: Arc<Mutex<HashMap<String, HashSet<String>>>>,
}

impl Member {
    async fn join(mesh: &Mesh, edge: usize, tasks: &mut JoinSet<()>) -> Self {
        let mut connection = mesh.connect(edge, &format!("member-{edge}")).await;
        for room in 0..ROOMS {
            let fields = serde_json::json!({ "room": room_name(room) });
            let joined = connection.commands().call("join", fields).await.unwrap();
            assert_eq!(joined.op(), "joined");
        }
        let member = Self {
            seen: Arc::default(),
        };
        let seen = Arc::clone(&member.seen);
        tasks.spawn(async move {
            while let Some(frame) = connection.next().await {
                if frame.op() == "msg" {
                    let frame = frame.json();
                    let text = |name: &str| frame[name].as_str().unwrap().to_owned();
                    let new = seen
                        .lock()
                        .entry(text("room"))
                        .or_default()
                        .insert(text("cursor"));
                    assert!(new, "delivered twice: {frame}");
                }
            }
        });
        member
    }

    fn total(&self) -> usize {
        self.seen.lock().values().map(HashSet::len).sum()
    }
}

/// Waits until the live sessions have seen everything that was acknowledged, whatever MongoDB does.
async fn all_delivered(members: &[Member], shared: &Shared) {
    eventually("live sessions see everything", LONG, async || {
        let acked = shared.acked.load(Ordering::SeqCst);
        let seen: Vec<usize> = members.iter().map(Member::total).collect();
        if seen.iter().all(|seen| *seen >= acked) {
            Ok(())
        } else {
            Err(format!("{seen:?} of {acked}"))
        }
    })
    .await;
}

async fn acked_at_least(shared: &Shared, wanted: usize) {
    eventually("publishing goes on", LONG * 3, async || {
        let acked = shared.acked.load(Ordering::SeqCst);
        (acked >= wanted)
            .then_some(())
            .ok_or_else(|| format!("{acked} of {wanted}"))
    })
    .await;
}

/// How many messages, changes and repeats are sent.
#[expect(
    clippy::disallowed_methods,
    reason = "a test is told so; the configuration has nothing to do with it"
)]
fn total() -> usize {
    let given = std::env::var("NATTER_TEST_HISTORY_MESSAGES");
    given.map_or(MESSAGES, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_acknowledged_is_in_mongodb_once_whatever_fails() {
    let total = total();
    let seed = rand::random();
    eprintln!("{total} messages, seed {seed}");
    let stopped_for = Duration::from_secs(if total >= LONG_RUN { 60 } else { 4 });
    let nats = dedicated_nats().await;
    let mut mongod = dedicated_mongod().await;
    let toml = "[limits]\ncommands_per_second = 1000000\ncommands_burst = 1000000\n[history]\nack_wait = \"3s\"\n[mongodb]\nwrite_timeout = \"3s\"\n";
    let mut mesh = Mesh::with_history(&nats.url(), &mongod.url(), (2, 2), toml).await;
    let shared = Arc::new(Shared {
        quota: Semaphore::new(0),
        acked: AtomicUsize::new(0),
        board: Mutex::new(Board {
            entries: Vec::new(),
            sent: vec![Vec::new(); ROOMS],
            acked: vec![0; ROOMS],
        }),
    });
    let mut reading = JoinSet::new();
    let mut members = Vec::new();
    for edge in 0..2 {
        members.push(Member::join(&mesh, edge, &mut reading).await);
    }
    let mut publishing = JoinSet::new();
    for number in 0..PUBLISHERS {
        let user = match number % 3 {
            0 => format!("김 {number}"),
            _ => format!("user-{number}"),
        };
        let publisher = Publisher {
            connection: mesh.connect(number % 2, &user).await,
            user,
            rng: StdRng::seed_from_u64(seed + number as u64),
            shared: Arc::clone(&shared),
            waiting: HashMap::new(),
            refused: Vec::new(),
            count: 0,
            own: Vec::new(),
        };
        publishing.spawn(publisher.run());
    }

    let started = Instant::now();
    let stage = total / STAGES;
    let mut kills = (0, 0);
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let before = shared.acked.load(Ordering::SeqCst);
        // Some are repeats, and are not counted.
        shared.quota.add_permits(stage);
        acked_at_least(&shared, before + stage / 3).await;
        match fault {
            Fault::Nothing => {}
            Fault::Worker(worker) => {
                mesh.workers[worker].process.kill().await;
                kills.0 += 1;
            }
            Fault::MongodKilled => {
                mongod.server.kill().await;
                kills.1 += 1;
            }
            Fault::MongodStopped => signal(mongod.server.pid().unwrap(), Signal::STOP),
        }
        let fault_began = Instant::now();
        acked_at_least(&shared, before + stage * 9 / 10).await;
        // Also without MongoDB.
        all_delivered(&members, &shared).await;
        match fault {
            Fault::Nothing => {}
            Fault::Worker(worker) => mesh.workers[worker].process.start().await.unwrap(),
            Fault::MongodKilled => mongod.server.restart().await.unwrap(),
            Fault::MongodStopped => {
                sleep(stopped_for.saturating_sub(fault_began.elapsed())).await;
                signal(mongod.server.pid().unwrap(), Signal::CONT);
            }
        }
        eprintln!(
            "stage {number}: {fault:?}, {} acknowledged after {:.1?}",
            shared.acked.load(Ordering::SeqCst),
            started.elapsed()
        );
    }
    shared.quota.close();
    while let Some(ended) = publishing.join_next().await {
        ended.unwrap();
    }
    assert_eq!(kills, (5, 2));
    all_delivered(&members, &shared).await;
    eprintln!("published after {:.1?}", started.elapsed());
    caught_up(&mesh, LONG * 3).await;
    eprintln!("caught up after {:.1?}", started.elapsed());

    // Live sessions saw each of them once.
    let board = std::mem::take(&mut *shared.board.lock());
    let acked: usize = board.acked.iter().sum();
    for member in &members {
        assert_eq!(member.total(), acked);
        for (room, acked) in board.acked.iter().enumerate() {
            let seen = member
                .seen
                .lock()
                .get(&room_name(room))
                .map_or(0, HashSet::len);
            assert_eq!(seen, *acked, "room {room}");
        }
    }

    // MongoDB has what a model makes of the acknowledgements, in any order.
    let mut shuffled = board.entries;
    shuffled.shuffle(&mut StdRng::seed_from_u64(seed));
    let mut model: BTreeMap<String, Folded> = BTreeMap::new();
    for entry in &shuffled {
        let key = match &entry.what {
            What::Message { key, .. } => key,
            What::Change { target, .. } => target,
            What::Nothing(why) => panic!("{why}"),
        };
        model.entry(key.clone()).or_default().apply(entry);
    }
    for folded in model.values_mut() {
        // What an edit replaced is not kept.
        if let (Some(base), Some(edit)) = (&mut folded.base, &folded.edit) {
            base.said.body.clone_from(&edit.body);
        }
    }
    let expected: BTreeSet<String> = model.keys().cloned().collect();
    let found = keys(&mesh).await;
    let missing: Vec<&String> = expected.difference(&found).take(3).collect();
    let more: Vec<&String> = found.difference(&expected).take(3).collect();
    assert!(
        missing.is_empty() && more.is_empty(),
        "of {} messages {} are there; missing e.g. {missing:?}, not said e.g. {more:?}",
        expected.len(),
        found.len()
    );
    let store = Store::open(&mesh.config.mongodb).await.unwrap();
    let all: Vec<String> = expected.into_iter().collect();
    let mut edited = 0;
    for some in all.chunks(500) {
        let documents = store.get(some).await.unwrap();
        assert_eq!(documents.len(), some.len());
        for document in documents {
            edited += usize::from(
                document.folded
                    != Folded {
                        base: document.folded.base.clone(),
                        ..Folded::default()
                    },
            );
            assert_eq!(document.folded, model[&document.key], "{}", document.key);
        }
    }
    assert!(
        edited > total / 50,
        "hardly anything was said about messages"
    );
    assert_eq!(super::lag(&mesh).await.dead_letters, 0);
    let messages = all.len();
    eprintln!("{acked} acknowledged, {messages} messages, {edited} of them changed");
    reading.abort_all();
}
