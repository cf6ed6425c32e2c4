//! One client: it checks what it receives, and notes when it came.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use natter::testing::client::{Commands, Connection, Frame};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    measure::{MOST_US, Tally},
    support::{mesh::Mesh, unique},
};

/// How long anything may take before the benchmark gives up.
const GIVE_UP: Duration = Duration::from_secs(180);
/// Pause between two looks at what is awaited, and so how exact times of catching up are.
const LOOK: Duration = Duration::from_millis(5);
/// Messages of one client that wait for their acknowledgement.
const UNDER_WAY: usize = 64;
/// 200 bytes as JSON.
static BODY: LazyLock<String> = LazyLock::new(|| "x".repeat(198));
/// What the times in message ids count from.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A connection whose frames are taken by a task, which checks them and notes when they came.
pub(crate) struct Client {
    commands: Commands,
    replies: mpsc::Receiver<Value>,
    pub(crate) seen: Arc<Mutex<Seen>>,
    under_way: Arc<Semaphore>,
    name: String,
    /// The number of the next message, a room.
    said: HashMap<String, u64>,
    _task: AbortOnDropHandle<()>,
}

/// What came, and when it should not have come so. A message's id is `<number>-<µs since BEGIN>`.
#[derive(Default)]
pub(crate) struct Seen {
    /// The next number of each room and sender.
    next: HashMap<(String, String), u64>,
    messages: Tally,
    pub(crate) acks: Tally,
    /// The cursor of the last message.
    pub(crate) cursor: Value,
    /// Commands refused, rooms lost.
    refused: u64,
}

#[derive(Deserialize)]
struct Message {
    room: String,
    #[serde(default)]
    from: String,
    id: String,
    cursor: Value,
}

impl Seen {
    fn on(&mut self, message: Message) {
        let (number, us) = message.id.split_once('-').expect("an id of this benchmark");
        let number: u64 = number.parse().unwrap();
        let next = self.next.entry((message.room, message.from)).or_default();
        if number < *next {
            self.messages.repeated += 1;
        } else {
            self.messages.lost += number - *next;
            *next = number + 1;
        }
        self.messages.deliveries += 1;
        note(&mut self.messages.latency, since(us));
        self.cursor = message.cursor;
    }

    pub(crate) fn faults(&self) -> u64 {
        self.messages.lost + self.messages.repeated + self.refused
    }
}

pub(crate) fn now_us() -> u64 {
    u64::try_from(BEGIN.elapsed().as_micros()).unwrap()
}

fn since(us: &str) -> u64 {
    now_us().saturating_sub(us.parse().unwrap())
}

pub(crate) fn note(times: &mut Histogram<u64>, us: u64) {
    times.record(us.clamp(1, MOST_US)).unwrap();
}

impl Client {
    pub(crate) async fn connect(mesh: &Mesh, edge: usize, name: &str) -> Self {
        let name = unique(name);
        let connection = mesh.connect(edge, &name).await;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let under_way = Arc::new(Semaphore::new(UNDER_WAY));
        let (replied, replies) = mpsc::channel(1);
        Self {
            commands: connection.commands().clone(),
            replies,
            name,
            said: HashMap::new(),
            _task: AbortOnDropHandle::new(tokio::spawn(take(
                connection,
                Arc::clone(&seen),
                Arc::clone(&under_way),
                replied,
            ))),
            seen,
            under_way,
        }
    }

    /// Sends a command that is not a message, and waits for its reply; messages that came before it are in `seen`.
    pub(crate) async fn ask(&mut self, op: &str, fields: Value) -> Value {
        self.commands.send(op, fields).await.unwrap();
        let reply = timeout(GIVE_UP, self.replies.recv()).await;
        let reply = reply.expect("a reply in time").expect("a connection");
        assert_ne!(reply["op"], "error", "{reply}");
        reply
    }

    /// Joins a room; gives the cursor.
    pub(crate) async fn join(&mut self, room: &str, since: &Value) -> Value {
        let joined = self
            .ask("join", json!({"room": room, "since": since}))
            .await;
        assert!(joined.get("reset").is_none(), "{joined}");
        joined["cursor"].clone()
    }

    /// Says the next message of a room as soon as fewer than [`UNDER_WAY`] wait for their acknowledgement.
    pub(crate) async fn say(&mut self, room: &str) {
        self.under_way.acquire().await.unwrap().forget();
        let number = self.said.entry(room.to_owned()).or_default();
        let id = format!("{number}-{}", now_us());
        *number += 1;
        let fields = json!({"room": room, "id": id, "body": *BODY});
        self.commands.send("send", fields).await.unwrap();
    }

    /// Says something at a pace, for so long.
    pub(crate) async fn talk(&mut self, room: &str, rate: f64, time: Duration) {
        let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let end = Instant::now() + time;
        while Instant::now() < end {
            ticks.tick().await;
            self.say(room).await;
        }
    }

    /// How many messages of a room were said.
    pub(crate) fn said(&self, room: &str) -> u64 {
        self.said.get(room).copied().unwrap_or_default()
    }

    /// Waits until everything that this client said is acknowledged.
    pub(crate) async fn acknowledged(&self) {
        let all = self.said.values().sum();
        let answered = async || {
            let seen = self.seen.lock();
            seen.acks.deliveries + seen.refused >= all
        };
        until("acknowledgements", answered).await;
    }

    /// Waits until so many messages of a sender have come.
    pub(crate) async fn hear(&self, room: &str, from: &Client, count: u64) {
        let key = (room.to_owned(), from.name.clone());
        let has = async || self.seen.lock().next.get(&key).copied().unwrap_or_default() >= count;
        until("messages", has).await;
    }

    pub(crate) fn reset(&self) {
        let mut seen = self.seen.lock();
        seen.messages.latency.reset();
        seen.acks.latency.reset();
    }

    /// p50 and p99 of the messages' way, in ms.
    pub(crate) fn latency(&self) -> [f64; 2] {
        percentiles(&self.seen.lock().messages.latency)
    }
}

/// Takes the frames of a connection until it ends.
async fn take(
    mut connection: Connection,
    seen: Arc<Mutex<Seen>>,
    under_way: Arc<Semaphore>,
    replied: mpsc::Sender<Value>,
) {
    while let Some(frame) = connection.next().await {
        match frame.op() {
            "msg" => seen.lock().on(fields(&frame)),
            "ack" => {
                let ack: Message = fields(&frame);
                let (_, us) = ack.id.split_once('-').expect("an id of this benchmark");
                let mut seen = seen.lock();
                seen.acks.deliveries += 1;
                note(&mut seen.acks.latency, since(us));
                under_way.add_permits(1);
            }
            "error" | "kicked" => {
                eprintln!("{}", frame.text());
                seen.lock().refused += 1;
                under_way.add_permits(1);
                // Nobody waits for it who only speaks.
                replied.try_send(frame.json()).ok();
            }
            _ if frame.rid().is_some() => drop(replied.send(frame.json()).await),
            // Presence and receipts.
            _ => {}
        }
    }
    let end = connection.end();
    eprintln!("a connection ended: {end:?}");
    seen.lock().refused += 1;
}

fn fields(frame: &Frame) -> Message {
    frame
        .fields()
        .unwrap_or_else(|error| panic!("{error}: {}", frame.text()))
}

/// Waits until `done`; gives up with `what` after [`GIVE_UP`].
pub(crate) async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !done().await {
            sleep(LOOK).await;
        }
    };
    let waited = timeout(GIVE_UP, wait).await;
    waited.unwrap_or_else(|_elapsed| panic!("no {what} within {GIVE_UP:?}"));
}

pub(crate) fn percentiles(times: &Histogram<u64>) -> [f64; 2] {
    #[expect(clippy::cast_precision_loss, reason = "at most 60 s in µs")]
    [0.5, 0.99].map(|q| times.value_at_quantile(q) as f64 / 1000.0)
}
