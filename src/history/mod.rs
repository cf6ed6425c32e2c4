//! History: the messages of durable rooms, written to MongoDB, and read from there and from the streams as one log.
//!
//! ```text
//! stream ─► worker (durable pull consumer ► batch ► store ► ack after the majority's write)
//! edge ─► request over NATS ─► service ─► MongoDB ∪ messages of the streams that MongoDB may not have yet
//! ```
//!
//! The process keeps running, answers over HTTP and retries while NATS or MongoDB can't be reached.

mod ask;
mod client;
mod dead;
mod directory;
mod entry;
mod erase;
mod figures;
mod http;
mod keep;
mod merge;
mod pages;
mod question;
mod removals;
mod repair;
mod service;
mod show;
mod status;
mod tail;
mod transfer;
mod uploads;
mod worker;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;

use crate::{
    bus::{Bucket, ConnectError, Connection, Origins, Reader, Remembered, STREAMS_WATCH, Streams},
    config::Config,
    http1,
    mesh::mirrors,
    people::People,
    runtime::{Late, Lifecycle, Phase, Tasks},
    store::{Migrated, Store, StoreError},
    subject::bucket,
    uploads::{OpenError, Storage},
};
use directory::Directory;
use figures::Figures;

pub use client::{Client, Heads};
pub use dead::{Retried, dead_letters, retry};
pub use entry::{entry, key_of};
pub use erase::{EraseRequest, EraseWhat};
pub use http::serve as serve_health;
pub use pages::Pages;
pub use question::{At, PageAnchor, PageAnswer, PageRequest, SearchRequest};
pub use show::shown;
pub use status::{Status, instances, status};
pub use transfer::{Deployment, Export, Import, Options, Report};

/// Timeout for writing the batches in hand when the process shuts down.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// Pause before checking again whether the instance that migrates documents still does so.
const MIGRATION_WATCH: Duration = Duration::from_secs(15);

/// What the parts of the service share.
#[derive(Debug, Clone)]
struct Parts {
    config: Arc<Config>,
    /// For requests, acknowledgements and answers.
    connection: Connection,
    /// For reads of streams, over their own connection.
    reader: Reader,
    origins: Arc<Origins>,
    /// The own region's streams, whose messages this service writes to MongoDB.
    streams: Arc<Streams>,
    store: Store,
    /// The own region's bucket with the record of erased messages.
    control: Bucket,
    remembered: Arc<Remembered>,
    /// The room records of all regions, and the index of users.
    people: Arc<People>,
    directory: Arc<Directory>,
    tasks: Tasks,
    /// Ready once MongoDB is prepared.
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
    /// The address is in use, or not an address of this machine.
    #[error("history.listen = {address}: can't listen there")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    /// The configuration can't be used to connect to NATS.
    #[error(transparent)]
    Nats(#[from] ConnectError),
    /// The configuration can't be used to connect to MongoDB.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The configuration can't be used for the files of uploads.
    #[error(transparent)]
    Uploads(#[from] OpenError),
}

impl History {
    /// Binds the address. The work starts when streams and MongoDB can be reached.
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
        let storage = Storage::open(&config.uploads)?.map(Arc::new);
        let connection = Connection::open(&config.nats, "natter history").await?;
        let reads = Connection::open(&config.nats, "natter history reads").await?;
        let mut connections = vec![reads.clone(), connection.clone()];
        let tasks = Tasks::default();
        // Needs neither streams nor MongoDB.
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
            (store, storage),
            tasks.clone(),
            lifecycle.clone(),
        );
        tasks.spawn_until_stopping("start", start);
        tracing::info!(%address, "history service listening");
        Ok(history)
    }

    /// The phase of the process. [`Phase::Stopped`] without a drain means that it can't continue; the log says why.
    #[must_use]
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// Waits until a part fails that the service can't do without, and returns its name. The caller should then drain,
    /// and end the process with an error. Cancel-safe.
    pub async fn failed(&self) -> String {
        tokio::select! {
            why = self.tasks.failed() => why,
            why = self.http.failed() => why,
        }
    }

    /// Shuts down in order: takes no more messages, then writes and acknowledges the batches in hand. What can't be
    /// written in time is redelivered to another worker.
    ///
    /// # Errors
    /// [`Late`] if a task had to be cut. No message is lost by that.
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

/// Waits for the streams and starts the parts. Parts that need MongoDB wait for it themselves.
async fn start(
    config: Arc<Config>,
    connection: Connection,
    reader: Reader,
    (store, storage): (Store, Option<Arc<Storage>>),
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
    // What edges keep of records is not used: they are read when they are needed.
    let (people, _loads) = People::new(&config, &reader, &origins);
    let parts = Parts {
        control,
        remembered,
        people,
        directory: Arc::default(),
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
    // Some tasks may be cut at any point; the workers finish the batches in hand.
    let watch = origins.watch(STREAMS_WATCH);
    tasks.keep_running("watch streams", watch);
    tasks.spawn_until_stopping("prepare MongoDB", prepare(parts.clone()));
    tasks.keep_running("keep figures", status::keep(parts.clone()));
    let erasing = erase::Erasing::new(parts.clone());
    tasks.spawn_until_stopping("take over erasures", erasing.clone().keep());
    tasks.spawn_until_stopping("list rooms", directory::list(parts.clone()));
    tasks.spawn_until_stopping("note activity", directory::note_activity(parts.clone()));
    tasks.spawn_until_stopping("repair the index", repair::keep(parts.clone()));
    tasks.spawn_until_stopping("remove what is too old", keep::keep(parts.clone()));
    tasks.spawn_until_stopping("take out of the streams", removals::keep(parts.clone()));
    if let Some(storage) = storage {
        tasks.spawn_until_stopping("remove files", uploads::remove(parts.clone(), storage));
        tasks.spawn_until_stopping("find unused uploads", uploads::find_unused(parts.clone()));
    }
    if let Err(error) = service::serve(&parts, erasing).await {
        tracing::error!(%error, "history can't be read");
        parts.lifecycle.advance(Phase::Stopped);
    }
    for part in 0..parts.streams.partitions() {
        tasks.spawn_essential("worker", worker::run(parts.clone(), part));
    }
}

/// Creates collections and indexes, retrying while MongoDB can't be reached. Then migrates old documents.
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

/// Rewrites documents of an earlier version. It pauses as long as it works, so it uses at most half of the time.
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
