//! History: what was said in durable rooms, kept in MongoDB and read from there and from the streams as one.
//!
//! ```text
//! stream ─► worker (durable pull consumer ► batch ► store ► ack after the majority's write)
//! edge ─► request over NATS ─► service ─► MongoDB ∪ what the stream has and MongoDB may not have yet
//! ```
//!
//! The process is there, answers over HTTP and waits, also while NATS or MongoDB is away; nothing of that ends it.

mod client;
mod dead;
mod entry;
mod erase;
mod figures;
mod http;
mod merge;
mod pages;
mod question;
mod removals;
mod service;
mod show;
mod status;
mod tail;
mod worker;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;

use crate::{
    bus::{Bucket, ConnectError, Connection, Origins, Reader, Remembered, STREAMS_WATCH, Streams},
    config::Config,
    http1,
    mesh::mirrors,
    runtime::{Late, Lifecycle, Phase, Tasks},
    store::{Migrated, Store, StoreError},
    subject::bucket,
};
use figures::Figures;

pub use client::{Client, Heads};
pub use dead::{Retried, dead_letters, retry};
pub use entry::{entry, key_of};
pub use erase::{EraseRequest, EraseWhat};
pub use pages::Pages;
pub use question::{At, Lies, PageAnswer, PageRequest, SearchRequest};
pub use status::{Status, instances, status};

/// How long what is in hand may take to be written when the process is told to end.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// How often it is looked whether who migrates documents is still there.
const MIGRATION_WATCH: Duration = Duration::from_secs(15);

/// What the parts of the service share.
#[derive(Debug, Clone)]
struct Parts {
    config: Arc<Config>,
    /// For requests, acknowledgements and answers.
    connection: Connection,
    /// For reads of streams, over a connection of its own.
    reader: Reader,
    origins: Arc<Origins>,
    /// Of the own region: those that are written to MongoDB here.
    streams: Arc<Streams>,
    store: Store,
    /// The own region's, of what is remembered to be erased.
    control: Bucket,
    remembered: Arc<Remembered>,
    tasks: Tasks,
    /// Ready when MongoDB is prepared.
    lifecycle: Lifecycle,
    figures: Arc<Figures>,
}

/// A running history service.
#[derive(Debug)]
pub struct History {
    lifecycle: Lifecycle,
    tasks: Tasks,
    http: Tasks,
    connections: Vec<Connection>,
}

/// The service can't start.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The address is taken or not ours.
    #[error("history.listen = {address}: can't listen there")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    /// NATS can't be used with what the configuration says.
    #[error(transparent)]
    Nats(#[from] ConnectError),
    /// MongoDB can't be used with what the configuration says.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl History {
    /// Binds the address and begins to work, as soon as streams and MongoDB are there.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub async fn start(config: Config) -> Result<Self, HistoryError> {
        let config = Arc::new(config);
        let address = config.history.listen;
        let listen = |source| HistoryError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let store = Store::open(&config.mongodb).await?;
        let connection = Connection::open(&config.nats, "natter history").await?;
        let reads = Connection::open(&config.nats, "natter history reads").await?;
        let mut connections = vec![reads.clone(), connection.clone()];
        let tasks = Tasks::default();
        // Needs no streams, and no MongoDB.
        if !config.mirrors.leafnodes.is_empty() {
            let nats = config.nats_of_mirrors();
            let connection = Connection::open(&nats, "natter history mirrors").await?;
            let keep = mirrors::keep(connection.clone(), &config);
            tasks.keep_running("help mirrors", keep);
            connections.push(connection);
        }
        let history = Self {
            lifecycle: Lifecycle::default(),
            tasks,
            http: Tasks::default(),
            connections,
        };
        let Self {
            lifecycle,
            tasks,
            http,
            ..
        } = &history;
        for connection in &history.connections {
            let connection = connection.clone();
            tasks.keep_running("NATS connection", async move { connection.ended().await });
        }
        let limits = http1::Limits::new(&config);
        http::serve(
            listener,
            limits,
            lifecycle.clone(),
            connection.clone(),
            http,
        );
        let start = start(
            Arc::clone(&config),
            connection,
            Reader::new(reads, &config.nats),
            store,
            tasks.clone(),
            lifecycle.clone(),
        );
        tasks.spawn_until_stopping("start", start);
        tracing::info!(%address, "history service listening");
        Ok(history)
    }

    /// How far it is in its life. [`Phase::Stopped`] without a drain: it can't go on, and the log says why.
    #[must_use]
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// Waits until a part of it is gone without which it can't go on, and says which: it is to be drained then, and the process
    /// to end with an error. Cancel-safe.
    pub async fn failed(&self) -> String {
        tokio::select! {
            why = self.tasks.failed() => why,
            why = self.http.failed() => why,
        }
    }

    /// Ends in order: takes no more messages, writes and confirms what is in hand. What can't be written in time is given
    /// out to another worker.
    ///
    /// # Errors
    /// [`Late`] when something was cut; no message is lost by that.
    pub async fn drain(self) -> Result<(), Late> {
        self.lifecycle.advance(Phase::Draining);
        let tasks = self.tasks.drain(DRAIN_WITHIN).await;
        for connection in &self.connections {
            connection.close().await;
        }
        let http = self.http.drain(Duration::from_secs(1)).await;
        self.lifecycle.advance(Phase::Stopped);
        tasks.and(http)
    }
}

/// Waits for the streams and starts the parts; they wait for MongoDB where they need it.
async fn start(
    config: Arc<Config>,
    connection: Connection,
    reader: Reader,
    store: Store,
    tasks: Tasks,
    lifecycle: Lifecycle,
) {
    let origins = Origins::wait_for(&connection, &config.region(), &config.nats).await;
    let streams = Arc::clone(origins.own());
    let control = Bucket::new(connection.clone(), reader.clone(), &config, bucket::CONTROL);
    let remembered: Arc<Remembered> = Arc::default();
    if let Some(feed) = remembered.open(&control, &origins).await {
        let follow = Arc::clone(&remembered);
        let follow = follow.follow(control.clone(), Arc::clone(&origins), feed);
        tasks.keep_running("follow what was erased", follow);
    }
    let parts = Parts {
        control,
        remembered,
        config,
        connection,
        reader,
        streams,
        origins: Arc::clone(&origins),
        store,
        tasks,
        lifecycle,
        figures: Arc::default(),
    };
    let tasks = &parts.tasks;
    // All that runs: what may be cut at any point, and the workers, which finish what is in hand.
    let watch = origins.watch(STREAMS_WATCH);
    tasks.keep_running("watch streams", watch);
    tasks.spawn_until_stopping("prepare MongoDB", prepare(parts.clone()));
    tasks.keep_running("keep figures", status::keep(parts.clone()));
    let erasing = erase::Erasing::new(parts.clone());
    tasks.spawn_until_stopping("take over erasures", erasing.clone().keep());
    tasks.spawn_until_stopping("take out of the streams", removals::keep(parts.clone()));
    if let Err(error) = service::serve(&parts, erasing).await {
        tracing::error!(%error, "history can't be read");
        parts.lifecycle.advance(Phase::Stopped);
    }
    for part in 0..parts.streams.partitions() {
        tasks.spawn_essential("worker", worker::run(parts.clone(), part));
    }
}

/// Creates collections and indexes, as soon as MongoDB takes it.
async fn prepare(parts: Parts) {
    let mut pause = worker::Backoff::default();
    loop {
        match parts.store.prepare().await {
            Ok(()) => break,
            Err(error @ (StoreError::Schema { .. } | StoreError::Url(_))) => {
                tracing::error!(%error, "history can't be written");
                parts.lifecycle.advance(Phase::Stopped);
                return;
            }
            Err(error) => {
                parts.figures.failed(&error, "waiting for MongoDB");
                tokio::time::sleep(pause.next()).await;
            }
        }
    }
    parts.figures.succeeded();
    parts.lifecycle.advance(Phase::Ready);
    tracing::info!("history service ready");
    migrate(&parts).await;
}

/// Writes documents of an earlier version anew, no more than half of the time.
async fn migrate(parts: &Parts) {
    let holder = ulid::Ulid::new().to_string();
    let mut renewed = 0;
    let mut pause = worker::Backoff::default();
    loop {
        let begun = tokio::time::Instant::now();
        let wait = match parts.store.migrate(&holder).await {
            Ok(Migrated::All) => break,
            Ok(Migrated::Some(more)) => {
                if renewed == 0 && more > 0 {
                    tracing::info!("documents of an earlier version are written anew");
                }
                renewed += more;
                pause = worker::Backoff::default();
                begun.elapsed()
            }
            Ok(Migrated::Elsewhere) => MIGRATION_WATCH,
            Err(error) => {
                parts
                    .figures
                    .failed(&error, "documents wait to be written anew");
                pause.next()
            }
        };
        tokio::time::sleep(wait).await;
    }
    if renewed > 0 {
        tracing::info!(renewed, "all documents are of this version");
    }
}
