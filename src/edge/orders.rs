//! Orders to the sessions of a user on every edge of every region.
//!
//! ```text
//! HTTP ─► Orders::give ─► natter.edge.orders ─► every edge ─► its shards ─► sessions
//!              ▲                                    │
//!              └── natter.edge.answers.<edge> ◄─────┘
//! ```
//!
//! Orders travel over core NATS and are not stored: an edge that is cut off does not hear them. An edge takes its own
//! orders from NATS too. A session that connects, or moves to another shard, at that moment may be missed.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

use super::{Shared, shard::Shards};
use crate::{
    bus::{Connection, LiveFeed, Message},
    protocol::{ErrorCode, Order, Refused},
    runtime::Tasks,
    subject::Subjects,
};

/// How long answers are waited for.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Answers to one order that wait to be counted. More are dropped: their edges count as missing.
const WAITING: usize = 1024;

/// Messages that are taken at once.
const BATCH: usize = 64;

/// Gives orders to all edges, and carries out those that come.
#[derive(Debug)]
pub(super) struct Orders {
    connection: Connection,
    subjects: Subjects,
    /// A name that no other edge has.
    name: String,
    next: AtomicU64,
    /// The orders whose answers are waited for.
    waiting: Mutex<HashMap<u64, mpsc::Sender<usize>>>,
}

/// The subscriptions of an edge.
#[derive(Debug)]
pub(super) struct Heard {
    orders: LiveFeed,
    answers: LiveFeed,
}

/// What became of an order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Given {
    /// Sessions that had something to do.
    pub(super) sessions: usize,
    /// Edges that have answered.
    pub(super) edges: usize,
    /// Edges that are known to live and did not answer in time.
    pub(super) missing: usize,
}

/// An order as it is sent.
#[derive(Serialize, Deserialize)]
struct Sent {
    number: u64,
    order: Order,
}

/// The answer of one edge.
#[derive(Serialize, Deserialize)]
struct Done {
    number: u64,
    sessions: usize,
}

/// Forgets an order whose answers nobody waits for any more.
struct Wait<'a> {
    orders: &'a Orders,
    number: u64,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.orders.waiting.lock().remove(&self.number);
    }
}

impl Orders {
    pub(super) fn new(connection: Connection, subjects: Subjects) -> Self {
        Self {
            connection,
            subjects,
            name: ulid::Ulid::new().to_string().to_lowercase(),
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    /// Subscribes. `None` if NATS was closed.
    pub(super) async fn hear(&self) -> Option<Heard> {
        let open = |subject| LiveFeed::open(&self.connection, subject);
        let heard = Heard {
            orders: open(self.subjects.orders()).await.ok()?,
            answers: open(self.subjects.order_answers(&self.name)).await.ok()?,
        };
        self.connection.round_trip(&self.subjects.nobody()).await;
        Some(heard)
    }

    /// Gives an order to all edges, and waits until `edges` of them have answered, but at most [`ANSWERS_WITHIN`].
    ///
    /// # Errors
    /// `unavailable`: nobody has heard it.
    pub(super) async fn give(&self, order: Order, edges: usize) -> Result<Given, Refused> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (done, mut answers) = mpsc::channel(WAITING);
        self.waiting.lock().insert(number, done);
        let _wait = Wait {
            orders: self,
            number,
        };
        let sent = serde_json::to_vec(&Sent { number, order })
            .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?;
        let reply = self.subjects.order_answers(&self.name);
        self.connection
            .publish(self.subjects.orders(), Some(reply), sent.into())
            .await
            .map_err(|error| Refused::new(ErrorCode::Unavailable, error.to_string()))?;
        let deadline = Instant::now() + ANSWERS_WITHIN;
        let mut given = Given::default();
        while given.edges < edges
            && let Ok(Some(sessions)) = timeout_at(deadline, answers.recv()).await
        {
            given.edges += 1;
            given.sessions += sessions;
        }
        given.missing = edges.saturating_sub(given.edges);
        let Given {
            sessions,
            edges,
            missing,
        } = given;
        tracing::debug!(sessions, edges, missing, "an order to sessions was given");
        if given.edges == 0 {
            let text =
                "no edge has answered, not even this one: natter doctor looks at the permissions";
            return Err(Refused::new(ErrorCode::Unavailable, text));
        }
        Ok(given)
    }

    fn on_answer(&self, message: &Message) {
        let Ok(Done { number, sessions }) = serde_json::from_slice(&message.payload) else {
            return tracing::warn!("an answer to an order is not understood");
        };
        // Nobody waits for an answer that comes too late.
        if let Some(waiting) = self.waiting.lock().get(&number)
            && waiting.try_send(sessions).is_err()
        {
            tracing::debug!("an answer to an order is one too many");
        }
    }

    /// Hands an order to the shards. Returns its number, and what they will say.
    async fn on_order(
        shards: &Shards,
        message: &Message,
    ) -> Option<(u64, Vec<oneshot::Receiver<usize>>)> {
        match serde_json::from_slice::<Sent>(&message.payload) {
            Ok(Sent { number, order }) => Some((number, shards.order(&Arc::new(order)).await)),
            Err(error) => {
                // An order of a newer edge.
                tracing::warn!(%error, "an order is not understood");
                None
            }
        }
    }

    /// Tells the edge that gave the order how many sessions of this edge had something to do.
    async fn answer(&self, to: String, number: u64, waits: Vec<oneshot::Receiver<usize>>) {
        // A shard that has ended has no sessions.
        let sessions = join_all(waits).await;
        let sessions = sessions.into_iter().map(Result::unwrap_or_default).sum();
        let answer = serde_json::json!(Done { number, sessions }).to_string();
        if let Err(error) = self.connection.publish(to, None, answer.into()).await {
            tracing::debug!(%error, "an order can't be answered");
        }
    }
}

/// Carries out orders, and takes answers, until NATS is closed. The edge must be ready.
pub(super) async fn listen(shared: Arc<Shared>, heard: Heard, tasks: Tasks) {
    let Some(ready) = shared.ready.get() else {
        return;
    };
    let Heard {
        mut orders,
        mut answers,
    } = heard;
    let obey = async {
        let mut batch = Vec::new();
        while orders.next_batch(&mut batch, BATCH).await {
            for message in batch.drain(..) {
                if let Some((number, waits)) = Orders::on_order(&ready.shards, &message).await
                    && let Some(to) = &message.reply
                {
                    let (to, orders) = (to.to_string(), Arc::clone(&ready.orders));
                    tasks.spawn_until_stopping("answer an order", async move {
                        orders.answer(to, number, waits).await;
                    });
                }
            }
        }
    };
    // Beside the orders: the shards may let those wait.
    let count = async {
        let mut batch = Vec::new();
        while answers.next_batch(&mut batch, BATCH).await {
            batch.drain(..).for_each(|it| ready.orders.on_answer(&it));
        }
    };
    tokio::select! {
        () = obey => {}
        () = count => {}
    }
}
