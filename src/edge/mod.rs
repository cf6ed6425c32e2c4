//! The edge: accepts connections, hands WebSockets to shards, answers plain HTTP, drains.
//!
//! ```text
//!  accept ─► hyper + axum ─┬─ /ws: token, upgrade ─► bare TcpStream ─► one of the shards (threads); with its first join
//!                          │                         to the shard of that room
//!                          └─ /v1/…, /metrics, /healthz, /readyz, /
//! ```
//!
//! Each shard has its own NATS connections, rooms and sessions. Shards share tokens, revocations, presence, read
//! markers and counters. Of these, the path of a live message uses only the counters.

mod admission;
mod checked;
mod control;
mod http;
mod orders;
mod request;
mod shard;
mod streams;
mod upgrade;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{body::Body, extract::ConnectInfo};
use futures_util::future::join_all;
use hyper::{Request, body::Incoming, service::service_fn};
use tokio::{net::TcpListener, time::timeout};
use tower_service::Service as _;

pub use http::openapi_json;

use crate::{
    auth::{AuthConfigError, Verifier},
    bus::{
        Bucket, ConnectError, Connection, Line, Origins, Publisher, Reader, Remembered,
        STREAMS_WATCH,
    },
    config::Config,
    history, http1,
    mesh::mirrors,
    people::People,
    presence::Presence,
    read_marker::Markers,
    runtime::{Late, Lifecycle, Phase, Tasks},
    subject::{Subjects, bucket},
    uploads::{OpenError, Signer, Storage},
};
use admission::Admission;
use checked::Checked;
use control::Control;
use orders::Orders;
use shard::{Drained, Shards};
use streams::Streams;

/// How long the shards may take to close their NATS connections at the end of a drain.
const CLOSE_WITHIN: Duration = Duration::from_millis(1500);

/// A running edge.
#[derive(Debug)]
pub struct Edge {
    shared: Arc<Shared>,
    /// Background tasks. They end with the process.
    tasks: Tasks,
    /// The accept loop and the HTTP requests in progress.
    http: Tasks,
}

/// What all parts of an edge share.
#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    id: Arc<str>,
    verifier: Arc<Verifier>,
    /// The messages that were erased: none of them is stored again.
    remembered: Arc<Remembered>,
    lifecycle: Lifecycle,
    admission: Arc<Admission>,
    streams: Arc<Streams>,
    /// The files of uploads, and what signs their ids. `None`: there are no uploads.
    uploads: Option<Uploads>,
    /// The parts that need NATS. Set when the edge becomes ready.
    ready: tokio::sync::OnceCell<Ready>,
}

/// What uploads need.
#[derive(Debug)]
struct Uploads {
    storage: Storage,
    signer: Signer,
    checked: Checked,
}

/// The parts of a ready edge.
#[derive(Debug)]
struct Ready {
    connection: Connection,
    line: Line,
    /// For presence, reads of markers, and orders, so that no message waits behind them.
    state: Connection,
    /// For unread counts and history, which take long, so that presence and markers don't wait for them.
    questions: Connection,
    /// For the mirrors of the region, if this edge has to help them.
    mirrors: Option<Connection>,
    publisher: Publisher,
    presence: Arc<Presence>,
    markers: Arc<Markers>,
    people: Arc<People>,
    history: Arc<history::Client>,
    shards: Shards,
    orders: Arc<Orders>,
}

/// The edge can't start.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The address is in use or not available on this machine.
    #[error("edge.listen = {address}: can't listen there")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    /// The keys for tokens can't be used.
    #[error("the edge can't check tokens")]
    Auth(#[from] AuthConfigError),
    /// NATS can't be used with this configuration.
    #[error(transparent)]
    Nats(#[from] ConnectError),
    /// A thread could not be started.
    #[error("a shard could not be started")]
    Shard(#[source] io::Error),
    /// The configuration can't be used for the files of uploads.
    #[error(transparent)]
    Uploads(#[from] OpenError),
}

/// The edge did not end in order within `edge.drain_timeout`.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Tasks were left.
    #[error("the drain was cut")]
    Tasks(#[from] Late),
    /// Sessions were left.
    #[error("the drain was cut with {0} sessions left")]
    Sessions(usize),
    /// Shards did not answer.
    #[error("the drain was cut: shards {0:?} do not answer")]
    Shards(Vec<usize>),
}

impl Edge {
    /// Binds the address and begins to serve. Until the streams are available, the edge answers but is not ready.
    ///
    /// # Errors
    /// [`EdgeError`].
    pub async fn start(config: Config) -> Result<Self, EdgeError> {
        let listener = TcpListener::bind(config.edge.listen)
            .await
            .map_err(|source| EdgeError::Listen {
                address: config.edge.listen,
                source,
            })?;
        let address = listener.local_addr().map_err(|source| EdgeError::Listen {
            address: config.edge.listen,
            source,
        })?;
        let id = match config.edge.id.as_str() {
            "" => format!("e{}", ulid::Ulid::new().random() & 0xffff_ffff),
            id => id.to_owned(),
        };
        if config.centrifugal.anonymous && config.limits.sessions_per_ip == 0 {
            tracing::warn!(
                "centrifugal.anonymous without limits.sessions_per_ip: anybody may open any number of sessions"
            );
        }
        let shared = Arc::new(Shared {
            verifier: Arc::new(Verifier::of_edge(&config)?),
            remembered: Arc::default(),
            admission: Arc::new(Admission::new(&config.limits)),
            streams: Arc::default(),
            uploads: Storage::open(&config.uploads)?.map(|storage| Uploads {
                storage,
                signer: Signer::new(&config.uploads),
                checked: Checked::default(),
            }),
            id: id.into(),
            lifecycle: Lifecycle::default(),
            ready: tokio::sync::OnceCell::new(),
            config: Arc::new(config),
        });
        let edge = Self {
            shared,
            tasks: Tasks::default(),
            http: Tasks::default(),
        };
        let router = http::router(Arc::clone(&edge.shared));
        let limits = http1::Limits::new(&edge.shared.config);
        let service = move |peer: SocketAddr| {
            let router = router.clone();
            service_fn(move |request: Request<Incoming>| {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(ConnectInfo(peer));
                // A router is always ready.
                router.clone().call(request)
            })
        };
        let accept = http1::serve(listener, limits, edge.http.clone(), service);
        edge.http.spawn_essential("accept", accept);
        let nats = &edge.shared.config.nats;
        let name = format!("natter edge {} control", edge.shared.id);
        let connection = Connection::open(nats, &name).await?;
        let (shared, tasks) = (Arc::clone(&edge.shared), edge.tasks.clone());
        edge.tasks.spawn("start", async move {
            let start = make_ready(&shared, connection, &tasks);
            tokio::select! {
                started = start => if let Err(error) = started {
                    tracing::error!(error = &error as &dyn std::error::Error, "the edge can't start");
                    shared.lifecycle.advance(Phase::Stopped);
                },
                () = tasks.stopping() => {}
            }
        });
        tracing::info!(edge.id = %edge.shared.id, %address, "edge listening");
        Ok(edge)
    }

    /// The lifecycle of the edge.
    #[must_use]
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.shared.lifecycle
    }

    /// Waits until an essential part of the edge has failed, and returns which one. The caller should then drain the
    /// edge, as far as that is still possible, and end the process with an error. Cancel-safe.
    pub async fn failed(&self) -> String {
        tokio::select! {
            why = self.tasks.failed() => why,
            why = self.http.failed() => why,
        }
    }

    /// Ends in order: is no longer ready, accepts no new connections, tells sessions to reconnect elsewhere, and writes
    /// what is queued.
    ///
    /// # Errors
    /// [`DrainError`] if `edge.drain_timeout` was over before that. What is left is cut off and no longer waited for.
    pub async fn drain(self) -> Result<(), DrainError> {
        let deadline = tokio::time::Instant::now() + self.shared.config.edge.drain_timeout;
        self.shared.lifecycle.advance(Phase::Draining);
        tracing::info!(edge.id = %self.shared.id, "edge draining");
        self.http.stop();
        let mut drained = Drained::default();
        let ready = self.shared.ready.get();
        if let Some(ready) = ready {
            let spread = self.shared.config.edge.drain_spread;
            ready.presence.drain();
            drained = ready.shards.drain(spread, deadline).await;
            ready.presence.give_up(deadline).await;
        }
        let rest = deadline.saturating_duration_since(tokio::time::Instant::now());
        let http = self.http.drain(rest).await;
        if let Some(ready) = ready {
            // No marker moves any more. Without NATS, markers can't be written.
            if ready.line.is_up() && !ready.markers.flush(deadline).await {
                tracing::warn!("read markers could not be written before the end of the drain");
            }
            let shards = timeout(CLOSE_WITHIN, join_all(drained.ends));
            let mirrors = async {
                if let Some(mirrors) = &ready.mirrors {
                    mirrors.close().await;
                }
            };
            let (line, connection) = (&ready.line, &ready.connection);
            let (state, questions) = (&ready.state, &ready.questions);
            // In parallel, so that hanging connections are waited for only once.
            let (_late, ..) = tokio::join!(
                shards,
                mirrors,
                line.close(),
                state.close(),
                questions.close(),
                connection.close()
            );
        }
        let rest = deadline.saturating_duration_since(tokio::time::Instant::now());
        let tasks = self.tasks.drain(rest).await;
        self.shared.lifecycle.advance(Phase::Stopped);
        http?;
        tasks?;
        match drained {
            Drained { stuck, .. } if !stuck.is_empty() => Err(DrainError::Shards(stuck)),
            Drained { left, .. } if left > 0 => Err(DrainError::Sessions(left)),
            Drained { .. } => Ok(()),
        }
    }
}

/// Waits for the streams, then starts the shards.
async fn make_ready(
    shared: &Arc<Shared>,
    connection: Connection,
    tasks: &Tasks,
) -> Result<(), EdgeError> {
    let config = &shared.config;
    let origins = Origins::wait_for(&connection, &config.region(), &config.nats).await;
    keep_connected(&connection, tasks);
    let watch = Arc::clone(&origins).watch(STREAMS_WATCH);
    tasks.keep_running("watch streams", watch);
    let elections = Arc::clone(&origins).hear_elections();
    tasks.keep_running("hear of elections", elections);
    let mut mirrors = None;
    if !config.mirrors.leafnodes.is_empty() {
        let name = format!("natter edge {} mirrors", shared.id);
        let connection = Connection::open(&config.nats_of_mirrors(), &name).await?;
        let keep = mirrors::keep(connection.clone(), config);
        keep_connected(&connection, tasks);
        tasks.keep_running("help mirrors", keep);
        mirrors = Some(connection);
    }
    let streams = Arc::clone(origins.own());
    let name = format!("natter edge {} state", shared.id);
    let state = Connection::open(&config.nats, &name).await?;
    keep_connected(&state, tasks);
    let state_reader = Reader::new(state.clone(), &config.nats);
    // A reader of its own, so that reads of revocations don't wait behind those of presence.
    let control_reader = Reader::new(state.clone(), &config.nats);
    let control = Bucket::new(state.clone(), control_reader, config, bucket::CONTROL);
    let remembered = Arc::clone(&shared.remembered);
    match remembered.open(&control, &origins).await {
        Some(feed) => {
            let follow = remembered.follow(control.clone(), Arc::clone(&origins), feed);
            tasks.keep_running("follow what was erased", follow);
        }
        None => tasks.fail("what was erased can't be followed"),
    }
    let revocations = Arc::clone(shared.verifier.revocations());
    match Control::open(control, Arc::clone(&origins), revocations).await {
        Some(control) => {
            tasks.keep_running("follow what is revoked", control.follow());
        }
        None => tasks.fail("what is revoked can't be followed"),
    }
    // For messages that are published over HTTP, for receipts, and for writing read markers.
    let (line, driver) = Line::new(&config.nats, &format!("natter edge {} publish", shared.id))?;
    tasks.keep_running("publish over HTTP", driver.run(()));
    // When the edge is ready, it must be able to publish.
    line.ready().await;
    let reader = Reader::new(connection.clone(), &config.nats);
    let publisher = Publisher::new(
        line.clone(),
        reader,
        Arc::clone(&streams),
        Arc::clone(&shared.remembered),
        &config.nats,
        &shared.id,
    );
    // One of these requests can need hundreds of reads, or megabytes. Presence, markers and joins must not wait behind
    // them.
    let name = format!("natter edge {} questions", shared.id);
    let questions = Connection::open(&config.nats, &name).await?;
    keep_connected(&questions, tasks);
    match streams::hear(shared, &questions).await {
        Some(asked) => {
            let streams = Arc::clone(&shared.streams);
            let answers = streams::answer(streams, questions.clone(), asked);
            tasks.keep_running("answer other edges", answers);
        }
        None => tasks.fail("other edges can't be heard"),
    }
    let ask = || Reader::new(questions.clone(), &config.nats);
    let markers = Markers::new(&state_reader, ask(), &origins, config, publisher.clone());
    tasks.keep_running("keep read markers", Arc::clone(&markers).keep());
    let (people, loads) = People::new(config, &Reader::new(state.clone(), &config.nats), &origins);
    match people.open().await {
        Some(feeds) => {
            let follow = Arc::clone(&people).follow(loads, feeds);
            tasks.keep_running("follow room records", follow);
        }
        None => tasks.fail("room records can't be followed"),
    }
    let count = Shards::count(config);
    let (presence, pushes) =
        Presence::start(config, &shared.id, &state_reader, &origins, count, tasks);
    let history = history::Client::new(&ask(), &origins, config);
    let presences = (&presence, pushes);
    let known = (&markers, &people);
    let shards = Shards::start(tasks, shared, &origins, presences, known, &history).await?;
    let orders = Arc::new(Orders::new(
        state.clone(),
        Subjects::new(&config.nats.prefix),
    ));
    // Subscribed before the first session, so that none misses an order.
    let heard = orders.hear().await;
    // Nothing else sets this.
    let set = shared.ready.set(Ready {
        connection,
        line,
        state,
        questions,
        mirrors,
        publisher,
        presence,
        markers,
        people,
        history,
        shards,
        orders,
    });
    debug_assert!(set.is_ok(), "an edge is made ready once");
    match heard {
        Some(heard) => {
            let listen = orders::listen(Arc::clone(shared), heard, tasks.clone());
            tasks.keep_running("follow orders", listen);
        }
        None => tasks.fail("orders can't be followed"),
    }
    shared.lifecycle.advance(Phase::Ready);
    tracing::info!(edge.id = %shared.id, "edge ready");
    Ok(())
}

/// Makes the edge fail when a NATS connection has ended for good.
fn keep_connected(connection: &Connection, tasks: &Tasks) {
    let connection = connection.clone();
    tasks.keep_running("NATS connection", async move { connection.ended().await });
}
